"""Plain data to YAML that the strict reader takes back unchanged. Comments and layout of an original are not kept."""

from __future__ import annotations

from typing import Any

import yaml

from optkit.recipe.scalars import scalar


def to_yaml(data: dict[str, Any]) -> str:
    """Return the YAML of plain data, keys in their given order. Text that the reader would take for something else is quoted."""
    return yaml.dump(data, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


class _StrictDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out, because the reader refuses aliases."""
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        """Quote what would be read as a number, a truth value or nothing."""
        return self.represent_scalar("tag:yaml.org,2002:str", value, style="'" if _is_ambiguous(value) else None)


def _is_ambiguous(value: str) -> bool:
    try:
        return not isinstance(scalar(value), str)
    except ValueError:
        return True


_StrictDumper.add_representer(str, _StrictDumper.text)
