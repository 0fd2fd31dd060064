"""All tasks. A new one is one file and one line in ``TASKS``."""

from __future__ import annotations

from optkit.core.registry import Registry
from optkit.tasks.contract import Task

TASKS: Registry[Task] = Registry(
    "task",
    {
        "language-modeling": "optkit.tasks.language_modeling:LanguageModeling",
        "text-classification": "optkit.tasks.text_classification:TextClassification",
        "token-classification": "optkit.tasks.token_classification:TokenClassification",
        "forecasting": "optkit.tasks.forecasting:Forecasting",
    },
)

__all__ = ["TASKS", "Task"]
