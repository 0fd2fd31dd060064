"""What a result depends on, as plain data: a resumed run compares it field by field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from optkit.core import files
from optkit.core.environment import environment
from optkit.data.documents import files_of
from optkit.measure.latency import Latency
from optkit.models.sources import local_folder
from optkit.recipe.schema import Recipe
from optkit.tasks.language_modeling import LanguageModeling, TextFiles
from optkit.tasks.supervised import Supervised

_STAGES = 2  # the form in which the stages of a run are kept
_QUICK_SECONDS, _QUICK_TOKENS = 10.0, 8192


def inputs_of(recipe: Recipe, quick: bool, trust_remote_code: bool, workload: str | None) -> dict[str, Any]:
    """Return everything that a result depends on."""
    facts = environment()
    return {
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.sha256(),
        "stages": _STAGES,
        "model_sha256": model_digest(recipe),
        "data_sha256": data_digest(recipe),
        "quick": quick,
        "trust_remote_code": trust_remote_code,
        "workload": workload,
        "threads": recipe.threads or facts["cores"],
        "environment": facts,
    }


def quickened(recipe: Recipe) -> Recipe:
    """Return the recipe with fewer samples, for a first look."""
    measure = {
        name: meter.model_copy(update={"seconds": min(meter.seconds, _QUICK_SECONDS)}) if isinstance(meter, Latency) else meter
        for name, meter in recipe.measure.items()
    }
    if isinstance(recipe.task, Supervised):
        return recipe.model_copy(update={"measure": measure})
    task = recipe.task or LanguageModeling()
    if isinstance(task, LanguageModeling):
        task = task.model_copy(update={"tokens": min(task.tokens, _QUICK_TOKENS)})
    return recipe.model_copy(update={"measure": measure, "task": task})


def model_digest(recipe: Recipe) -> str | None:
    """Return one digest for all files of a model folder; None where there is no folder."""
    if not isinstance(recipe.model, str) or recipe.model.startswith("shape:"):
        return None
    folder = local_folder(recipe.model)
    return None if folder is None else _digest(sorted(path for path in folder.iterdir() if path.is_file()))


def data_digest(recipe: Recipe) -> str | None:
    """Return one digest for the files of a corpus; None for the bundled one, whose texts the report names by their own digest.

    Raises:
        DataError: a pattern matches no file.
    """
    corpus = getattr(recipe.task, "corpus", None)
    if isinstance(recipe.task, Supervised):
        patterns = getattr(corpus, "files", None) or [getattr(corpus, key, None) for key in ("file", "source_file", "target_file")]
        patterns = [pattern for pattern in patterns if pattern]
    else:
        patterns = corpus.files if isinstance(corpus, TextFiles) else [corpus] if isinstance(corpus, str) and corpus != "python" else []
    return _digest(sorted(files_of(patterns))) if patterns else None


def _digest(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name} {files.digest(path)}\n".encode())
    return whole.hexdigest()
