"""Small stand-ins for transforms, so that these tests judge the reader and not the techniques."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator
from torch import nn

import optkit.transforms
from optkit.core.errors import ProblemsError
from optkit.core.registry import Registry, UnknownNameError
from optkit.core.subject import Calibration
from optkit.core.targets import Targets
from optkit.recipe import Recipe, load_recipe
from optkit.transforms.contract import Plan, Stage, Transform


class StandIn(Transform):
    """Changes nothing."""

    stage: ClassVar[Stage] = Stage.QUANTIZE

    def check(self, plan: Plan) -> None:
        """Accept everything."""

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        return module


class Magnitude(StandIn):
    """Stands for pruning."""

    stage: ClassVar[Stage] = Stage.PRUNE
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.5, description="share of weights set to zero")
    scope: Literal["layer", "global"] = "layer"
    targets: Targets = Field(default=Targets())


class DropLayers(StandIn):
    """Stands for a transform whose settings depend on one another."""

    stage: ClassVar[Stage] = Stage.PRUNE
    count: Annotated[int, Field(ge=1)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> DropLayers:
        if self.count and self.layers:
            raise ValueError("give count or layers, not both")
        return self


class Dtype(StandIn):
    """Stands for a transform with a required setting."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="type to store in")


class Int8(StandIn):
    """Stands for quantization."""

    targets: Targets = Field(default=Targets())


class Int4(StandIn):
    """Stands for quantization with groups."""

    group_size: Literal[32, 64, 128] = Field(default=64, description="inputs that share a scale")
    head: bool = False
    targets: Targets = Field(default=Targets())


class DataParallel(StandIn):
    """Stands for placement."""

    stage: ClassVar[Stage] = Stage.PARALLEL
    size: Annotated[int, Field(ge=2, le=64)] = 2


class StandIns(Registry[Transform]):
    """A registry of classes that are there already, and one that cannot be imported."""

    def __init__(self) -> None:
        kinds = (Magnitude, DropLayers, Dtype, Int8, Int4, DataParallel)
        self.kinds: dict[str, type[Transform]] = {optkit.transforms.contract.name_of(kind): kind for kind in kinds}
        super().__init__("transform", {name: "" for name in [*self.kinds, "lost_plugin"]})

    def __getitem__(self, name: str) -> type[Transform]:
        if name == "lost_plugin":
            raise ModuleNotFoundError("No module named 'lost'")
        if name not in self.kinds:
            raise UnknownNameError(self.unknown(name))
        return self.kinds[name]


Reading = Callable[..., Recipe]
Findings = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    registry = StandIns()
    monkeypatch.setattr(optkit.transforms, "TRANSFORMS", registry)
    return registry


@pytest.fixture
def read(tmp_path: Path, stand_ins: StandIns) -> Reading:
    """Read a text as a recipe file."""

    def reading(text: str | bytes, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return reading


@pytest.fixture
def problems(read: Reading) -> Findings:
    """Read a text that must be refused, and return lines, places and messages."""

    def finding(text: str | bytes, *overrides: str) -> list[tuple[int, str, str]]:
        with pytest.raises(ProblemsError) as caught:
            read(text, *overrides)
        assert caught.value.exit_code == 2
        return [(problem.line, problem.path, problem.message) for problem in caught.value.problems]

    return finding


@pytest.fixture
def message(problems: Findings) -> Callable[..., str]:
    """Read a text with exactly one problem, and return its message."""

    def only(text: str | bytes, *overrides: Any) -> str:
        found = problems(text, *overrides)
        assert len(found) == 1, found
        return found[0][2]

    return only
