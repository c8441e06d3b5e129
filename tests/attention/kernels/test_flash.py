"""The flash-attn package: when it is asked, and what is said where it cannot serve."""

import sys

import emulated
import pytest
import torch

from lightning_longnet.attention.kernels import Request, flash

REQUEST = Request("cuda", torch.bfloat16, 8, 2, 64, 64, capability=(9, 0))


def refusals(**changes):
    return flash.refusals(REQUEST._replace(**changes))


def test_what_is_refused_and_why():
    with emulated.device():
        assert refusals() == []
        assert refusals(device="cpu") == ["serves CUDA tensors, these are on cpu"]
        assert refusals(dtype=torch.float32) == ["serves bfloat16 and float16, q is torch.float32"]
        assert refusals(head_dim=60, value_dim=60) == ["needs a head_dim that 8 divides, 256 at most, got 60"]
        assert refusals(head_dim=264, value_dim=264) == ["needs a head_dim that 8 divides, 256 at most, got 264"]
        assert refusals(value_dim=32) == ["needs v as wide as q and k, got 32 and 64"]
        assert refusals(capability=(7, 5)) == ["needs compute capability 8.0, got 7.5"]
        assert refusals(is_padded=True, has_dropout=True) == ["has no padding masks", "has no dropout"]


def test_the_package_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert refusals() == ["flash-attn is not installed"]


@pytest.mark.parametrize("version", ["2.7.4.post1", "1.0", "dev"])
def test_the_package_is_of_another_release(monkeypatch, version):
    with emulated.device():
        monkeypatch.setattr(sys.modules["flash_attn"], "__version__", version)
        assert refusals() == [f"needs flash-attn 2.8, found {version}"]


def test_the_package_cannot_be_imported(monkeypatch):
    with emulated.device():
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
        (reason,) = refusals()
    assert reason.startswith("flash-attn cannot be imported: ")


def test_the_package_is_not_looked_up_for_a_cpu(monkeypatch):
    monkeypatch.setattr(flash, "find_spec", lambda _: pytest.fail("looked up"))
    assert refusals(device="cpu") == ["serves CUDA tensors, these are on cpu"]
