"""What layers read, summed up over calibration data, block after block: each block sees what the changed blocks before it answer.

Only one block's sums are in memory at a time. A model whose blocks do not simply follow one another is run as a whole for each block:
slower, and the same result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optkit.core.errors import TransformError
from optkit.core.subject import Calibration
from optkit.transforms.layers import blocks
from optkit.transforms.tracing import evaluating

_MOST_DAMPING = 1.0


class Moments:
    """The inputs x (n, in) of a layer, summed up: ``gram``, ``magnitude`` and ``mean`` are the means of x x^T, |x| and x, in float32."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self._gram, self._magnitude, self._mean = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)

    def add(self, inputs: Tensor) -> None:
        """Take inputs (..., in) into account."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.rows += len(x)
        self._gram.addmm_(x.T, x)
        self._magnitude += x.abs().sum(0)
        self._mean += x.sum(0)

    @property
    def gram(self) -> Tensor:
        """The mean of x x^T (in, in)."""
        return self._gram / max(1, self.rows)

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x| (in,)."""
        return self._magnitude / max(1, self.rows)

    @property
    def mean(self) -> Tensor:
        """The mean of x (in,)."""
        return self._mean / max(1, self.rows)

    def divide(self, scale: Tensor) -> None:
        """Go on as if the inputs had been divided by a scale (in,)."""
        self._gram /= scale[:, None] * scale
        self._magnitude /= scale
        self._mean /= scale


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of gram (in, in) with ``damping`` times its mean diagonal on the diagonal.

    Raises:
        TransformError: there is none, whatever the damping.
    """
    mean = float(gram.diagonal().mean()) or 1.0
    while damping <= _MOST_DAMPING:
        damped = gram + torch.eye(len(gram)) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10
    raise TransformError("the moments of the calibration inputs have no Cholesky factor; give more calibration data, or use method awq")


Work = Callable[[Mapping[str, Moments]], None]


@torch.no_grad()
def by_blocks(module: nn.Module, data: Calibration, names: Sequence[str], work: Work) -> None:
    """Call ``work`` once for each block, in order, with the moments of those of the named layers that it holds.

    It may change their weights. Layers outside the blocks come last, together; a module without blocks is one block. A layer that no
    data reached has no entry.

    Raises:
        TransformError: a layer's inputs are not finite.
    """
    with evaluating(module):
        try:
            place, stack = blocks(module)
        except TransformError:
            place, stack = "", nn.ModuleList()
        inside = [[name for name in names if name.startswith(f"{place}.{index}.")] for index in range(len(stack))]
        run_all = partial(_run_all, module, data)
        chain = _Chain.of(module, stack, data) if len(stack) else None
        for block, here in zip(stack, inside, strict=True):
            if chain is not None:
                _work_on(module, here, partial(chain.run, block), work)
                chain.advance(block)
            else:
                _work_on(module, here, run_all, work)
        del chain
        rest = [name for name in names if not any(name in here for here in inside)]
        _work_on(module, rest, run_all, work)


def refuse_missed(names: Sequence[str], reached: Container[str]) -> None:
    """Refuse layers that no calibration data has reached.

    Raises:
        TransformError: there are some; they are named, with the way to leave them as they are.
    """
    missed = [name for name in names if name not in reached]
    if missed:
        raise TransformError(
            f"no calibration data reached {len(missed)} of {len(names)} layers ({', '.join(missed[:3])}); exclude them: "
            f"targets: {{exclude: ['{missed[0]}']}}"
        )


class _Chain:
    """Blocks that follow one another: the hidden states of every batch before the next block, and what else each block was called with."""

    def __init__(self, states: list[Tensor], calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]) -> None:
        self._states = states
        self._calls = calls  # of each block, for each batch, without the hidden states
        self._next = 0

    @classmethod
    def of(cls, module: nn.Module, stack: nn.ModuleList, data: Calibration) -> _Chain | None:
        """Run the model once and look at the calls; None where a block does not get just what the one before gave."""
        states: list[Tensor] = []
        calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in stack]
        last: list[Tensor | None] = [None]
        whole = True

        def before(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal whole
                state = args[0] if args else kwargs.get("hidden_states")
                if index == 0 and isinstance(state, Tensor):
                    states.append(state.detach().clone())
                else:
                    whole = whole and state is last[0] and state is not None
                calls[index].append(
                    (args[1:] if args else (), {name: value for name, value in kwargs.items() if args or name != "hidden_states"})
                )

            return hook

        def after(_: nn.Module, __: Any, output: Any) -> None:
            last[0] = _state(output)

        with ExitStack() as hooks:
            for index, block in enumerate(stack):
                hooks.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(after).remove)
            _run_all(module, data)
        batches = len(data.batches)
        return cls(states, calls) if whole and len(states) == batches and all(len(made) == batches for made in calls) else None

    def run(self, block: nn.Module) -> list[Tensor]:
        """Run the next block on every batch and return what it gives."""
        found = []
        for state, (args, kwargs) in zip(self._states, self._calls[self._next], strict=True):
            output = _state(block(state.clone(), *args, **kwargs))
            assert output is not None
            found.append(output)
        return found

    def advance(self, block: nn.Module) -> None:
        """Go on to the block after this one."""
        self._states = self.run(block)
        self._calls[self._next] = []
        self._next += 1


def _work_on(module: nn.Module, names: Sequence[str], run: Callable[[], Any], work: Work) -> None:
    if not names:
        return
    moments: dict[str, Moments] = {}
    leaders: dict[str, str] = {}
    read: list[tuple[str, Tensor]] = []  # within one call of the model, so that layers with one input share its moments

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                return
            x = args[0]
            if name not in leaders:
                same = (other for other, tensor in read if tensor is x and leaders.get(other) == other)
                leaders[name] = next(same, name)
                moments[name] = moments[leaders[name]] if leaders[name] != name else Moments(x.shape[-1])
            if leaders[name] == name:
                moments[name].add(x)
                read[:] = [*[pair for pair in read if pair[0] != name][-8:], (name, x)]

        return look

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(module.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        run()
    read.clear()
    for name, found in moments.items():
        if not bool(torch.isfinite(found.magnitude).all()):
            raise TransformError(f"{name}: its inputs on the calibration data are not all finite")
    work(moments)


def _run_all(module: nn.Module, data: Calibration) -> None:
    for batch in data.batches:
        module(**_without_cache(module, batch))


def _without_cache(module: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    takes = "use_cache" in inspect.signature(module.forward).parameters
    return {"use_cache": False, **batch} if takes else batch


def _state(output: Any) -> Tensor | None:
    first = output if isinstance(output, Tensor) else next(iter(_values(output)), None)
    return first if isinstance(first, Tensor) else None


def _values(output: Any) -> Iterable[Any]:
    return output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
