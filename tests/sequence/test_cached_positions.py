"""What is cached in the first call serves later ones, which may train: it keeps nothing of the modes around it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.models.longvit import _cached_order
from lightning_longnet.sequence.splitter import _positions

CACHED = {
    "positions of a rank": (_positions, (Placement((3, 2), "contiguous"), 1), [3, 4]),
    "order of patches": (_cached_order, ("raster", 1, 3, torch.device("cpu")), [0, 1, 2]),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(
    "surroundings",
    [torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")],
    ids=["inference", "fake", "meta"],
)
def test_a_cached_tensor_is_a_plain_one(name, surroundings):
    function, arguments, values = CACHED[name]
    function.cache_clear()
    with surroundings():
        cached = function(*arguments)
    try:
        assert (type(cached), cached.device.type, cached.is_inference()) == (torch.Tensor, "cpu", False)
        assert cached.tolist() == values
    finally:
        function.cache_clear()
