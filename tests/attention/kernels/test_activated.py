"""FA3 and FA4 behind torch's flash operators: what is active while these are called, and what afterwards."""

import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType

import emulated
import pytest
import torch
from compared import calls, compare_attention, compare_block, widened
from drawn import cases
from hypothesis import given, settings

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import BLOCK_KERNELS, activated, kernel_names
from lightning_longnet.attention.kernels.sdpa import flash as torchs
from lightning_longnet.diagnosis import machine

FLOAT = (torch.float32,)
NAMES = {"flash3": "FA3", "flash4": "FA4"}
KERNELS = pytest.mark.parametrize("kernel", NAMES)


class Registry:
    """What torch.nn.attention keeps of implementations, and which was active in each call of a flash operator."""

    def __init__(self):
        self.active, self.switches, self.seen = None, [], []

    def activate_flash_attention_impl(self, name):
        assert name in NAMES.values()
        self.active = name
        self.switches.append(name)

    def restore_flash_attention_impl(self):
        assert self.active is not None, "torch warns"
        self.active = None
        self.switches.append(None)

    def current_flash_attention_impl(self):
        return self.active

    def list_flash_attention_impls(self):
        return list(NAMES.values())

    def noted(self, operator):
        def call(*args, **kwargs):
            self.seen.append(self.active)
            return operator(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    result = Registry()
    monkeypatch.setattr(activated, "attention", result)
    monkeypatch.setattr(activated, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(activated, "_is_deterministic", lambda: False)
    return result


@pytest.fixture
def device(monkeypatch, registry):
    """Enters the emulated device, whose flash operators note what is active."""

    def enter(capability=(9, 0), half=FLOAT):
        context = emulated.device(capability, half)
        context.__enter__()
        monkeypatch.setattr(torchs, "_forward", registry.noted(torchs._forward))
        monkeypatch.setattr(torchs, "_backward", registry.noted(torchs._backward))
        contexts.append(context)

    contexts = []
    yield enter
    monkeypatch.undo()
    for context in reversed(contexts):
        context.__exit__(None, None, None)


@KERNELS
@settings(max_examples=60, deadline=None)
@given(case=calls())
def test_every_block(kernel, case):
    shape, low, high, _, seed = widened(case)
    with emulated.device(half=FLOAT):
        compare_block(BLOCK_KERNELS[kernel], (shape, low, high, None, seed), dtype=torch.float32, tolerance=1e-5)
        assert "_flash_attention_backward" in emulated.calls
    assert activated.attention.active is None


@KERNELS
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_equals_brute_force(kernel, case):
    *shape, dim = case["shape"]
    case = case | {"shape": (*shape, 8 * dim), "hidden": None}
    with emulated.device(half=FLOAT):
        compare_attention(case, kernel, torch.float32, 1e-5)


def step(kernel, pattern, length=40):
    q = torch.randn(1, length, 2, 8, requires_grad=True)
    attend(q, q, q, pattern, kernel=kernel).sum().backward()


@KERNELS
@pytest.mark.parametrize("before", [None, "FA3", "FA4"])
def test_it_is_active_in_the_flash_operators_alone(device, registry, kernel, before):
    device()
    registry.active = before
    step(kernel, Pattern.dilated((8, 16), (1, 2), is_causal=True))
    assert set(registry.seen) == {NAMES[kernel]}
    assert len(registry.seen) >= 4, "forward and backward, of each branch"
    assert registry.active == before
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= set(emulated.calls)
    assert (registry.switches == []) == (before == NAMES[kernel]), "what is active already stays"
    registry.seen.clear()
    step("sdpa", Pattern.dense(True))
    assert set(registry.seen) == {before}, "other kernels run in what was active"


@pytest.mark.parametrize(("kernel", "windowed"), [("flash3", "FA3"), ("flash4", None)])
def test_fa4_leaves_windows_to_torchs_own(device, registry, kernel, windowed):
    device()
    step(kernel, Pattern.window(5, True))
    assert set(registry.seen) == {windowed}


def test_after_an_error_it_is_not_active(device, registry, monkeypatch):
    device()

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torchs, "_forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        step("flash4", Pattern.dense())
    assert registry.active is None


def test_threads_do_not_switch_under_each_other(registry):
    entered, seen = threading.Event(), []

    def other():
        entered.wait()
        with activated.activated_implementation("FA3"):
            seen.append(registry.active)

    thread = threading.Thread(target=other)
    thread.start()
    with activated.activated_implementation("FA4"):
        entered.set()
        thread.join(0.1)
        assert not seen
        with activated.activated_implementation("FA4"):
            assert registry.active == "FA4"
        assert registry.active == "FA4"
    thread.join()
    assert seen == ["FA3"]
    assert registry.active is None


def refusal(kernel, dtype=torch.bfloat16, capability=(9, 0), dim=64, **settings):
    q = torch.zeros(1, 8, 2, dim, dtype=dtype)
    with emulated.device(capability):
        verdicts = explain(q, q, q, Pattern.dense(), **settings).verdicts
        return "; ".join(next(each.refusals for each in verdicts if each.kernel == kernel))


def test_why_it_does_not_serve(monkeypatch, registry):
    padding = torch.zeros(1, 8, dtype=torch.bool)
    assert refusal("flash3") == refusal("flash4") == ""
    assert refusal("flash3", capability=(10, 0)) == "needs compute capability 9.x, got 10.0"
    assert refusal("flash4", capability=(8, 0)) == "needs compute capability 9.x or 10.x, got 8.0"
    assert refusal("flash4", dim=136) == "needs a head_dim of 128 at most, got 136"
    assert refusal("flash3", dim=136) == ""
    assert refusal("flash3", torch.float32) == "serves bfloat16 and float16, q is torch.float32"
    assert refusal("flash3", key_padding_mask=padding) == "has no padding masks"
    assert refusal("flash4", dropout=0.1) == "has no dropout"
    assert refusal("flash3", softcap=30.0) == refusal("flash4", softcap=30.0) == "cannot bound scores by a softcap"
    monkeypatch.setattr(activated, "_is_deterministic", lambda: True)
    assert refusal("flash4").startswith("has no deterministic backward here")
    assert refusal("flash4", capability=(10, 0)) == refusal("flash3") == ""
    monkeypatch.setattr(activated, "find_spec", lambda name: None)
    assert refusal("flash3") == "FA3 is not installed: there is no module flash_attn_interface"

    def misses(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(activated, "find_spec", misses)
    assert "FA4 is not installed: there is no module flash_attn.cute.interface" in refusal("flash4")
    monkeypatch.setattr(registry, "list_flash_attention_impls", lambda: ["FA3"])
    assert f"torch {torch.__version__} cannot put FA4 behind its flash operators" in refusal("flash4")
    monkeypatch.setattr(activated, "attention", ModuleType("attention"))
    assert "cannot put FA3 behind" in refusal("flash3")


def test_it_is_announced_and_auto_leaves_it(capsys):
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    with emulated.device():
        explained = explain(q, q, q, Pattern.dense())
    rows = {row.split()[0]: row for row in str(explained).splitlines()[1:]}
    assert explained.chosen == "flash"
    assert "could serve" in rows["flash3"]
    assert "FA3 behind torch's flash operators, active in the whole process while a block is called" in rows["flash3"]
    assert "blocks with windows go where sdpa sends them" in rows["flash4"]
    names = [name for name, _ in machine._kernels(torch.device("cpu"))]
    assert names == list(kernel_names())
    assert "flash4" in names


@pytest.mark.parametrize("implementation", ["FA3", "FA4"])
def test_torchs_own_registry(monkeypatch, implementation):
    """The true functions of torch, with modules that hold no kernels: the dispatcher has them in this time alone."""
    monkeypatch.setattr(activated, "attention", torch.nn.attention)
    modules = ["flash_attn_interface", "flash_attn", "flash_attn.cute", "flash_attn.cute.interface"]
    for name in modules:
        module = ModuleType(name)
        module._flash_attn_fwd = module._flash_attn_bwd = None
        monkeypatch.setitem(sys.modules, name, module)
    if implementation == "FA3":
        operators = ModuleType("operators")
        operators.fwd = operators.bwd = None
        monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)

    def registered():
        names = ("_flash_attention_forward", "_flash_attention_backward")
        return {torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA") for name in names}

    before = registered()
    assert implementation in torch.nn.attention.list_flash_attention_impls()
    with activated.activated_implementation(implementation):
        assert torch.nn.attention.current_flash_attention_impl() == implementation
        assert registered() == {True}
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert registered() == before
