"""All tasks. A new one is one file and one line in ``TASKS``."""

from __future__ import annotations

from optkit.core.registry import Registry
from optkit.tasks.contract import Task

TASKS: Registry[Task] = Registry("task", {"language-modeling": "optkit.tasks.language_modeling:LanguageModeling"})

__all__ = ["TASKS", "Task"]
