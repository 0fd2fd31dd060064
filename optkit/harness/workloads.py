"""Which task a run judges by; and workloads from Python, for models that no recipe can name. A recipe never names code."""

from __future__ import annotations

import importlib

from torch import nn

from optkit.core.errors import OptkitError
from optkit.core.subject import Kind
from optkit.recipe.schema import Recipe
from optkit.tasks import TASKS, Task
from optkit.tasks.supervised import Supervised

_DEFAULTS = {"causal-lm": "language-modeling"}


def task_for(recipe: Recipe, kind: Kind, workload: str | None = None) -> Task:
    """Return the task of the workload, of the recipe, or the usual one for this kind of model.

    Raises:
        OptkitError: there is no usual one, or the recipe's is for models that generate and this one does not.
    """
    if workload is not None:
        return build_workload(workload)[1]
    if kind in _DEFAULTS and isinstance(recipe.task, Supervised):
        raise OptkitError(f"{recipe.task.word()} is for models that run forward, and this one generates")
    own = "bring a task of your own from Python: optkit.run(recipe, workload='module:function')"
    if kind not in _DEFAULTS and isinstance(recipe.task, TASKS[_DEFAULTS["causal-lm"]]):
        raise OptkitError(f"language-modeling is for models that generate, and this one only runs forward; {own}")
    if recipe.task is not None:
        return recipe.task
    if kind not in _DEFAULTS:
        raise OptkitError(f"a model that does not generate has no usual task; {own}")
    return TASKS[_DEFAULTS[kind]]()


def supervised(recipe: Recipe) -> Supervised:
    """Return the task that a network of the recipe is trained on.

    Raises:
        OptkitError: the recipe names none.
    """
    if isinstance(recipe.task, Supervised):
        return recipe.task
    known = ", ".join(name for name in TASKS if issubclass(TASKS[name], Supervised))
    raise OptkitError(f"a network is trained on a task with right answers, and the recipe names none; task: one of {known}")


def build_workload(name: str) -> tuple[nn.Module, Task]:
    """Call ``module:function``, which returns a fresh module and its task.

    Raises:
        OptkitError: it cannot be imported, or returns something else.
    """
    module_name, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptkitError(f"workload {name!r} cannot be imported: {error}; give 'module:function' of an importable function") from None
    made = build()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], Task)):
        raise OptkitError(f"workload {name!r} must return (nn.Module, optkit.tasks.Task), got {type(made).__name__}")
    return made[0].eval(), made[1]
