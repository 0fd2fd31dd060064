"""Which task a run judges by; and workloads from Python, for models that no recipe can name. A recipe never names code."""

from __future__ import annotations

import importlib

from torch import nn

from optkit.core.errors import OptkitError
from optkit.core.subject import Kind
from optkit.recipe.schema import Recipe, word_of
from optkit.tasks import TASKS, Task
from optkit.tasks.supervised import Supervised

_DEFAULTS = {"causal-lm": "language-modeling"}
_CALLED: dict[Kind, str] = {
    "causal-lm": "models that go on with a text",
    "seq2seq-lm": "models that answer one text by another",
    "module": "models that only run forward",
}


def task_for(recipe: Recipe, kind: Kind, workload: str | None = None) -> Task:
    """Return the task of the workload, of the recipe, or the usual one for this kind of model.

    Raises:
        OptkitError: there is no usual one, or the recipe's is for models of another kind.
    """
    if workload is not None:
        return build_workload(workload)[1]
    able = ", ".join(name for name in TASKS if kind in TASKS[name].kinds)
    way = f"task: one of {able}; or bring one of your own from Python: optkit.run(recipe, workload='module:function')"
    if recipe.task is not None and kind not in recipe.task.kinds:
        fit = " and ".join(_CALLED[one] for one in recipe.task.kinds)
        raise OptkitError(f"{word_of(TASKS, recipe.task)} is for {fit}, and this is one of the {_CALLED[kind]}; {way}")
    if recipe.task is not None:
        return recipe.task
    if kind not in _DEFAULTS:
        raise OptkitError(f"{_CALLED[kind]} have no usual task, and the recipe names none; {way}")
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
