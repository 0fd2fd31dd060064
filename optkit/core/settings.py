"""The base of everything a recipe can set: frozen, typed, unknown keys refused. Settings hold and check values, and do nothing else."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model without coercion between kinds: a text is no number, a number is no text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
