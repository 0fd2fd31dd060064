"""Every layer shared by several processes: each token reads a part of the weights per process, and waits for the sums of all.

It pays where reading weights takes longer than two sums a block; small models lose by it.
"""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn

from optkit.core.errors import TransformError
from optkit.core.mesh import Mesh
from optkit.core.subject import Calibration, Subject
from optkit.engines.parallel.cut import cut, hollow
from optkit.engines.parallel.part import Part
from optkit.engines.parallel.rehearsal import rehearse
from optkit.transforms.contract import Plan
from optkit.transforms.layers import is_on_meta
from optkit.transforms.parallel.contract import Parallel, Role


class TensorParallel(Parallel):
    """Split heads, feed-forward units and vocabulary among ``size`` processes (Shoeybi et al. 2019, arXiv 1909.08053).

    The model's own plan says how, or ours for gpt2, opt and bloom. The parts are held to the answers of the whole before it is saved.
    """

    role: ClassVar[Role] = "tensor"

    def check(self, plan: Plan) -> None:
        """Refuse sizes that do not divide heads, units or groups of packed weights, and layers that cannot be shared."""
        super().check(plan)
        refuse_other_kinds(plan.subject, self.step().name)
        mesh = Mesh(tensor=self.size)
        for rank in range(self.size):
            cut(hollow(plan.subject.module), Part(mesh, mesh.place(rank)))

    def decide(self, module: nn.Module, data: Calibration | None) -> Self:
        """Hold the parts to the answers of the whole.

        Raises:
            TransformError: they answer otherwise.
        """
        if not is_on_meta(module):
            rehearse(module, Mesh(tensor=self.size))
        return self


def refuse_other_kinds(subject: Subject, name: str) -> None:
    """Refuse what is no causal language model.

    Raises:
        TransformError: with what to use instead.
    """
    what = "an ensemble" if subject.kind == "causal-lm" else f"a {subject.kind}"
    if subject.kind != "causal-lm" or not hasattr(subject.module, "get_input_embeddings"):
        raise TransformError(f"{name} shares causal language models; this is {what}: use data_parallel")
