"""What the ways of sharing a model among processes have in common: they place it, and leave its weights as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, overload

from pydantic import Field
from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Calibration, Subject
from optkit.engines import refusal_of_parts
from optkit.transforms.contract import Plan, Stage, Transform

Role = Literal["data", "pipeline", "tensor"]
MOST_PROCESSES = 64


class Parallel(Transform):
    """A transform that says by how many processes the model is served."""

    stage: ClassVar[Stage] = Stage.PARALLEL
    opens_in: ClassVar[Literal["transformers", "optkit"]] = "transformers"
    not_for_modules: ClassVar[str] = "it places a whole subject on several processes, and a bare module has no place"
    role: ClassVar[Role]
    size: Annotated[int, Field(ge=2, le=MOST_PROCESSES)] = Field(default=2, description="number of processes")

    def check(self, plan: Plan) -> None:
        """Refuse to share twice in one way, and more processes than can be.

        Raises:
            TransformError: with the numbers.
        """
        mesh, name = plan.subject.mesh, self.step().name
        taken = getattr(mesh, self.role)
        if taken > 1:
            raise TransformError(f"the model has {name} over {taken} ranks already; name it once")
        if self.mesh(mesh).size > MOST_PROCESSES:
            raise TransformError(f"{mesh.size} x {self.size} processes are more than {MOST_PROCESSES}; use a smaller size")
        reason = refusal_of_parts(plan.subject, self.mesh(mesh))
        if reason is not None:
            raise TransformError(reason)

    def mesh(self, before: Mesh) -> Mesh:
        """Return the mesh with this one's processes."""
        return replace(before, **{self.role: self.size})

    def preview(self, subject: Subject) -> Subject:
        """Return the same shapes, placed."""
        return replace(subject, mesh=self.mesh(subject.mesh), history=(*subject.history, self.step()))

    @overload
    def apply(self, model: Subject, data: Calibration | None = None) -> Subject: ...
    @overload
    def apply(self, model: nn.Module, data: Calibration | None = None) -> nn.Module: ...
    def apply(self, model: Subject | nn.Module, data: Calibration | None = None) -> Subject | nn.Module:
        """Return the subject, to be opened by a group of ranks.

        Raises:
            TransformError: a bare module was given; placement belongs to a subject. Or the parts together answer otherwise than the whole.
        """
        if isinstance(model, nn.Module):
            raise TransformError(f"{self.step().name}: {self.not_for_modules}")
        return self.decide(model.module, data).preview(model)

    def change(self, module: nn.Module, data: Calibration | None) -> nn.Module:
        """Return the module as it is: only its placement changes."""
        return module
