"""The kernel "hub": a build of flash-attn in the cache of the Hub, emulated by operators that compute with torch."""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import emulated
import pytest
import torch
from compared import calls, compare_attention, compare_block, widened
from drawn import cases
from hypothesis import given, settings

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import BLOCK_KERNELS, Request, candidates, hub

FLOAT = (torch.float32,)
REQUEST = Request("cuda", torch.bfloat16, 8, 2, 64, 64, capability=(9, 0))
FOLDER = "kernels--kernels-community--flash-attn2"


def downloaded(cache, versions, folder=FOLDER):
    """Write the cache of the Hub with these versions, each of which has a snapshot of its own."""
    for version in versions:
        (cache / folder / "snapshots" / f"commit-{version}").mkdir(parents=True)
        (cache / folder / "refs").mkdir(exist_ok=True)
        (cache / folder / "refs" / version).write_text(f"commit-{version}")


@contextmanager
def package(cache, interface=emulated, error=None):
    """Register a stand-in of the package `kernels`, which loads this interface from a cache."""
    loaded = []

    def get_local_kernel(path, name):
        loaded.append(path)
        assert (path.is_dir(), name) == (True, "flash_attn2")
        if error is not None:
            raise error
        return SimpleNamespace(flash_attn_interface=interface)

    kernels, utils = ModuleType("kernels"), ModuleType("kernels.utils")
    kernels.__spec__, utils.__spec__ = ModuleSpec("kernels", None), ModuleSpec("kernels.utils", None)
    kernels.get_local_kernel, utils.CACHE_DIR = get_local_kernel, str(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kernels", kernels)
        patch.setitem(sys.modules, "kernels.utils", utils)
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)  # the package, which the device has
        hub._interface.cache_clear()
        yield loaded
    hub._interface.cache_clear()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A cache with a build that loads."""
    cache = tmp_path_factory.mktemp("hub")
    downloaded(cache, ["v2"])
    return cache


@settings(max_examples=60, deadline=None)
@given(case=calls())
def test_every_block(build, case):
    """Forward and backward; the operators check strides, types, the log-sum-exp and all other arguments."""
    shape, low, high, _, seed = widened(case)
    with emulated.device(half=FLOAT), package(build):
        compare_block(BLOCK_KERNELS["hub"], (shape, low, high, None, seed), dtype=torch.float32, tolerance=1e-5)
        assert {"package forward", "package backward"} <= set(emulated.calls)


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_equals_brute_force(build, case):
    *shape, dim = case["shape"]
    case = case | {"shape": (*shape, 8 * dim), "hidden": None, "dropout": 0.0}
    with emulated.device(half=FLOAT), package(build):
        compare_attention(case, "hub", torch.float32, 1e-5)


def test_explain_announces_it(build):
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    with emulated.device(), package(build):
        rows = {line.split()[0]: line for line in str(explain(q, q, q, Pattern.dense())).splitlines()}
        assert rows["hub"].split(maxsplit=2)[1:] == [
            "could",
            "serve  kernels-community/flash-attn2 of the kernels hub: every block as it is; its speed has not been "
            "measured",
        ]
        assert explain(q, q, q, Pattern.dense(), kernel="hub").chosen == "hub"
    assert "hub" not in candidates("auto")
    assert "hub" in candidates("hub")


def refusals(**changes):
    return hub.refusals(REQUEST._replace(**changes))


def test_what_is_refused_and_why(build):
    with package(build):
        assert refusals() == []
        assert refusals(device="cpu") == ["serves CUDA tensors, these are on cpu"]
        assert refusals(dtype=torch.float32) == ["serves bfloat16 and float16, q is torch.float32"]
        assert refusals(value_dim=32) == ["needs v as wide as q and k, got 32 and 64"]
        assert refusals(is_padded=True, has_dropout=True) == ["has no padding masks", "has no dropout"]
        assert refusals(has_softcap=True) == ["cannot bound scores by a softcap"]


def test_where_it_is_not_installed_one_line_says_so(monkeypatch, tmp_path):
    download = "kernels.get_kernel('kernels-community/flash-attn2', version=2) downloads"
    absent = f"kernels-community/flash-attn2 is not in the cache of the Hub: {download} it"
    with package(tmp_path) as loaded:
        assert refusals() == [absent]
        q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
        with emulated.device(), pytest.raises(ValueError, match=r"kernel='hub' cannot serve this call: kernels-comm"):
            attend(q, q, q, Pattern.dense(), kernel="hub")
        assert loaded == []
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert refusals() == ["the package kernels is not installed: pip install kernels"]


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusals() == ["the package kernels is not installed: pip install kernels"]
    monkeypatch.delitem(sys.modules, "kernels")


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), FileNotFoundError("no variant")])
def test_a_build_for_another_torch_is_refused(build, error):
    with package(build, error=error):
        (reason,) = refusals()
    assert reason.startswith("kernels-community/flash-attn2 cannot be loaded, kernels.get_kernel(")
    assert reason.endswith(str(error))


def test_a_build_with_other_operators_is_refused(build):
    with package(build, interface=SimpleNamespace()):
        assert refusals() == [
            "kernels-community/flash-attn2 in the cache of the Hub has no operators of flash-attn 2.8"
        ]


def test_the_newest_version_is_loaded(tmp_path):
    downloaded(tmp_path, ["main", "v9"], "models--kernels-community--flash-attn2")
    with package(tmp_path) as loaded:
        assert refusals() == []
    downloaded(tmp_path, ["v2", "v10"])
    (tmp_path / FOLDER / "refs" / "v11").write_text("commit-of-no-snapshot")
    with package(tmp_path) as later:
        assert refusals() == []
    assert [path.name for path in (*loaded, *later)] == ["commit-v9", "commit-v10"]


def test_nothing_is_looked_up_for_a_cpu(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda _: pytest.fail("looked up"))
    assert refusals(device="cpu") == ["serves CUDA tensors, these are on cpu"]
