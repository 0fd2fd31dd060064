"""The kernels as PyTorch operators, so that torch.compile can trace past them. Eager layers call the kernels directly, which costs less.

There are two of them with one meaning: one in C++, which costs a graph next to nothing, and one in Python, where that cannot be compiled.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from optkit.core.errors import MissingError, OptkitError
from optkit.kernels.build import open_operator
from optkit.kernels.native import LayerStruct, Native, native, struct_at

HALF: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}  # what the kernels read and write


def multiply(kernels: Native, address: int, input: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Return input (..., cols) times the packed weight whose struct is at ``address``, plus bias (rows,), in the dtype of the input.

    Input and bias are float32 or bfloat16 on the CPU, and their sizes are the caller's promise.

    Raises:
        MemoryError: there is no memory for the rounded or widened copy of the input.
    """
    if not input.is_contiguous():
        input = input.contiguous()
    shape = input.shape
    output = input.new_empty((*shape[:-1], rows))
    status = kernels.linear(
        address,
        input.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        input.numel() // shape[-1],
        HALF[input.dtype] if bias is None else HALF[input.dtype] + 2 * HALF[bias.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for the product of an input {tuple(shape)} with {rows} rows of weights")
    return output


def struct_of(
    kernel: Tensor,
    rows: int,
    cols: int,
    scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    group: int = 0,
    float16: bool = False,
    integer: bool = False,
) -> tuple[LayerStruct, int]:
    """Return the C struct of a packed weight and its address; the tensors must live as long as it is used. See ``struct_at``."""
    places = [None if tensor is None else tensor.data_ptr() for tensor in (scale, input_scale)]
    return struct_at(kernel.data_ptr(), places[0], rows, cols, group, float16=float16, integer=integer, input_scale=places[1])


@torch.library.custom_op("optkit::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    input: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    scale: Tensor | None,
    input_scale: Tensor | None,
    group: int,
    float16: bool,
    integer: bool,
) -> Tensor:
    """Return input (..., cols) times the packed weight (rows, cols), plus bias (rows), in the dtype of the input.

    The weight is in the layout of the kernels; for the last five see ``struct_at``.
    """
    found = native()
    if found is None:
        raise OptkitError("a model compiled with packed kernels runs where there are none; compile it anew on this machine")
    struct, address = struct_of(kernel, rows, cols, scale, input_scale, group, float16, integer)
    output = multiply(found, address, input, bias, rows)
    del struct  # it had to live until here
    return output


@packed_linear.register_fake
def _shape(input: Tensor, kernel: Tensor, bias: Tensor | None, rows: int, *rest: object) -> Tensor:
    return input.new_empty((*input.shape[:-1], rows))


@cache
def has_native_operator() -> bool:
    """Open the operator in C++, compiled at first use; return False where there is none, after saying why."""
    found = native()
    if found is None:
        return False
    try:
        library = open_operator(Path(torch.__file__).parent, torch.__version__)
    except MissingError as error:
        print(f"optkit: compiled graphs call the kernels by way of Python, which costs some microseconds a call: {error}", file=sys.stderr)
        return False
    library.optkit_serve.argtypes = [ctypes.c_void_p]
    library.optkit_serve(ctypes.cast(found.linear, ctypes.c_void_p))  # type: ignore[arg-type]
    torch.library.register_fake("optkit::packed_linear_native", _shape)
    return True
