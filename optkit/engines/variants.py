"""A model beside variants of itself, or smaller models, that help to serve it."""

from __future__ import annotations

from typing import Any

from optkit.engines.ensemble import Members


class Variants(Members):
    """The first member is the model: called, judged and asked for its configuration, it answers. Engines know what the others are for."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model returns."""
        return self.members[0](*inputs, **named)
