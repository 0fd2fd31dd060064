"""A profile, from a model or a recipe to its folder: every arm in its own process, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optkit.core.errors import OptkitError
from optkit.harness import stages
from optkit.harness.checking import check_recipe, refuse_small_disk
from optkit.harness.folder import RunFolder
from optkit.harness.inputs import inputs_of
from optkit.recipe.reading import load_recipe, recipe_from_dict
from optkit.recipe.schema import Recipe
from optkit.report.profile import ArmProfile, ProfileReport, write_profile

Progress = Callable[[str, float | None], None]
_SUFFIXES = (".yaml", ".yml")


def profile(
    model_or_recipe: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    rounds: int,
    threads: int | None = None,
    overrides: tuple[str, ...] = (),
    out: Path = Path("experiments"),
    trust_remote_code: bool = False,
    progress: Progress = lambda doing, share: None,
) -> tuple[Path, ProfileReport]:
    """Measure the stages of a model, or of a recipe's model before and after, and write them.

    Returns:
        the folder, and what was written there.

    Raises:
        OptkitError: bad input, or a recipe whose result is served by several processes together.
    """
    recipe = _recipe(model_or_recipe, overrides, threads)
    progress("checking", None)
    checked = check_recipe(recipe, model_or_recipe, trust_remote_code)
    refuse_small_disk(checked.disk_bytes, out)
    inputs = inputs_of(recipe, False, trust_remote_code, None)
    with RunFolder.new(out / recipe.name, inputs) as folder:
        work = stages.Stages(recipe, folder, inputs["threads"], trust_remote_code, None, progress)
        arms = []
        for name in work.prepared():
            progress(f"watching {name}", None)
            with work.opened(name) as workers:
                found = workers.ask("profile", prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, rounds=rounds)
                arms.append(ArmProfile.of(name, workers.facts, found))
        facts: dict[str, Any] = {**inputs["environment"], "threads": inputs["threads"]}
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds}
        report = ProfileReport(recipe.name, str(recipe.to_dict()["model"]), sizes, facts, tuple(arms))
        write_profile(report, folder.path)
        folder.finish()
    return folder.path, report


def _recipe(spec: str, overrides: tuple[str, ...], threads: int | None) -> Recipe:
    """Return the recipe of a file, or one that only names a model."""
    if overrides and not spec.endswith(_SUFFIXES):
        raise OptkitError(f"{spec!r} is a model, and --set changes recipes; write one")
    if spec.endswith(_SUFFIXES):
        found = load_recipe(spec, overrides)
        found = found.model_copy(update={"name": f"profile-{found.name}"[:64]})
    else:
        name = "".join(letter if letter.isalnum() else "-" for letter in Path(spec).name).strip("-")[:50] or "model"
        found = recipe_from_dict({"name": f"profile-{name}", "model": spec})
    return found if threads is None else found.model_copy(update={"threads": threads})
