"""Routing a CPU's products: only where it rounds nothing, and undone after."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels import products
from lightning_longnet.attention.kernels.sdpa import cpu


@pytest.fixture
def slow_mkl(monkeypatch):
    """A CPU of another maker, whatever this one is."""
    monkeypatch.setattr(products, "_cpu_vendor", lambda: "AuthenticAMD")
    products.uses_onednn.cache_clear()
    yield
    products.uses_onednn.cache_clear()


@pytest.mark.usefixtures("slow_mkl")
def test_products_are_left_to_mkl_on_its_makers_cpus(monkeypatch):
    assert products.uses_onednn() == products._is_exact()
    products.uses_onednn.cache_clear()
    monkeypatch.setattr(products, "_cpu_vendor", lambda: "GenuineIntel")
    assert not products.uses_onednn()


@pytest.mark.usefixtures("slow_mkl")
def test_uses_onednn_only_where_that_rounds_nothing():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 300, generator=generator) for _ in range(2))
    truth = a.double() @ b.double()
    with products.routed_products():
        error = ((a @ b) - truth).abs().max()
    assert error <= 4 * ((a @ b) - truth).abs().max()


@pytest.mark.parametrize(
    "surroundings",
    [
        FakeTensorMode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["fake tensors", "another device", "autocast", "inference mode", "another dtype"],
)
@pytest.mark.usefixtures("slow_mkl")
def test_what_surrounds_the_first_product_does_not_choose_the_library(surroundings):
    answer = products.uses_onednn()
    products.uses_onednn.cache_clear()
    with surroundings():
        assert products.uses_onednn() == answer


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("slow_mkl")
def test_routing_is_undone_to_what_the_user_chose():
    setting = torch.backends.mkldnn.matmul
    assert setting.fp32_precision == "none"

    def broken():
        with products.routed_products():
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert setting.fp32_precision == "none"
    setting.fp32_precision = "ieee"
    try:
        with products.routed_products():
            assert setting.fp32_precision in ("ieee", "bf16")
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = "none"


@pytest.mark.usefixtures("slow_mkl")
def test_routing_stays_off_where_it_would_round(monkeypatch):
    monkeypatch.setattr(products, "_is_exact", lambda: False)
    products.uses_onednn.cache_clear()
    with products.routed_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.usefixtures("slow_mkl")
def test_threads_that_come_and_go_leave_the_setting_as_it_was():
    inside = Barrier(4)

    def route():
        for _ in range(50):
            with products.routed_products():
                pass
        with products.routed_products():
            inside.wait(10)

    on_threads(4, route)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_threads_that_ask_at_once_whether_products_are_exact_leave_the_setting_as_it_was():
    ready = Barrier(4)

    def ask():
        for _ in range(50):
            ready.wait(10)
            products._is_exact()

    on_threads(4, ask)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def on_threads(count, task):
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(task) for _ in range(count)]:
            future.result()


@pytest.mark.usefixtures("slow_mkl")
def test_only_large_uses_onednn(monkeypatch):
    """A call of oneDNN costs more than that of MKL, many times as much for a few tokens."""
    monkeypatch.setattr(products, "_is_exact", lambda: True)
    chosen = []

    def record(kernel):
        def recording(*args, **options):
            chosen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return kernel(*args, **options)

        return recording

    monkeypatch.setattr(cpu, "_forward", record(cpu._forward))
    monkeypatch.setattr(cpu, "_backward", record(cpu._backward))
    for tokens in (128, 300, 512):
        q, k, v = (torch.randn(1, tokens, 1, 64, requires_grad=True) for _ in range(3))
        attend(q, k, v, Pattern.dense()).sum().backward()
    assert chosen == ["none", "none", "bf16", "none", "bf16", "bf16"]


@pytest.mark.usefixtures("slow_mkl")
def test_what_another_thread_has_set_meanwhile_stays():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        with products._setting.routed():
            matmul.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


def test_a_process_that_is_forked_within_a_product_computes_further_ones():
    with products._setting.routed(), products._setting._lock:
        child = os.fork()
        if child == 0:
            with products._setting.routed():
                inside = torch.backends.mkldnn.matmul.fp32_precision
            os._exit(not (inside == "bf16" and torch.backends.mkldnn.matmul.fp32_precision != "bf16"))
        end = time.monotonic() + 10
        status = (0, 0)
        while status[0] == 0 and time.monotonic() < end:
            status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if status[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == (child, 0)
