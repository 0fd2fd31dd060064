"""All tasks. A new one is one file and one line in ``TASKS``."""

from __future__ import annotations

from optkit.core.registry import Registry
from optkit.tasks.contract import Task

TASKS: Registry[Task] = Registry(
    "task",
    {
        "language-modeling": "optkit.tasks.language_modeling:LanguageModeling",
        "text-generation": "optkit.tasks.text_generation:TextGeneration",
        "text-classification": "optkit.tasks.text_classification:TextClassification",
        "token-classification": "optkit.tasks.token_classification:TokenClassification",
        "forecasting": "optkit.tasks.forecasting:Forecasting",
        "translation": "optkit.tasks.translation:Translation",
        "summarization": "optkit.tasks.summarization:Summarization",
        "few-shot": "optkit.tasks.few_shot:FewShot",
        "question-answering": "optkit.tasks.question_answering:QuestionAnswering",
    },
)

__all__ = ["TASKS", "Task"]
