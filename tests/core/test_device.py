from __future__ import annotations

import pytest
import torch
from torch import nn

from optkit.core.device import device_of, place_of
from optkit.core.errors import ProblemsError, ResourceError
from optkit.harness.checking import check_recipe
from optkit.recipe.reading import recipe_from_dict

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def test_the_processor_is_always_there() -> None:
    assert device_of("cpu") == torch.device("cpu")


def test_a_device_beyond_the_last_is_refused_with_their_number() -> None:
    with pytest.raises(ResourceError, match=r"cuda:99 is not here: .*CUDA devices are.*set device to cpu"):
        device_of("cuda:99")


def test_a_module_is_where_its_tensors_are() -> None:
    assert place_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert place_of(nn.Identity()).type == "cpu"


@without_cuda
def test_a_recipe_for_cuda_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ProblemsError, match=r"device.*cuda is not here"):
        check_recipe(recipe_from_dict({"name": "x", "device": "cuda"}), "x")
