"""``optkit list``: every name that a recipe can use, with one line and its settings."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer


def list_names(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List transforms, meters, tasks, networks and model sources."""
    from optkit.core.files import json_text
    from optkit.measure import METERS
    from optkit.models.networks import NETWORKS
    from optkit.models.sources import SOURCES
    from optkit.tasks import TASKS
    from optkit.transforms import TRANSFORMS

    kinds: dict[str, dict[str, Any]] = {}
    for title, registry in (("transforms", TRANSFORMS), ("meters", METERS), ("tasks", TASKS), ("networks", NETWORKS)):
        kinds[title] = {name: _entry(registry[name]) for name in registry}
    kinds["models"] = {name: {"summary": summary, "settings": {}} for name, summary in SOURCES.items()}
    if as_json:
        sys.stdout.write(json_text({"schema": 1, **kinds}))
        return
    for title, entries in kinds.items():
        sys.stdout.write(f"{title}\n")
        for name, entry in entries.items():
            sys.stdout.write(f"  {name}: {entry['summary']}\n")
            for setting, about in entry["settings"].items():
                sys.stdout.write(f"      {setting} = {about['default']}: {about['description']}\n")


def _entry(kind: Any) -> dict[str, Any]:
    settings = {}
    for name, field in kind.model_fields.items():
        default = "(needed)" if field.is_required() else field.get_default(call_default_factory=True)
        plain = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        settings[name] = {"default": list(plain) if isinstance(plain, tuple) else plain, "description": field.description or ""}
    return {"summary": (kind.__doc__ or "").strip().splitlines()[0], "settings": settings}
