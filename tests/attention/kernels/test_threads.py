"""Tasks in threads: exact, the same in each run, and without a trace in the threads of the caller."""

import os
import signal
import time
from collections import Counter
from itertools import count, product
from threading import Barrier, Event, Thread, main_thread
from unittest.mock import patch

import drawn
import pytest
import torch
from tiers import tiered

from lightning_longnet import Branch, Pattern, attend
from lightning_longnet.attention.kernels import threads
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.pattern.sparsity import Sparsity
from lightning_longnet.attention.plan import parts
from lightning_longnet.attention.plan.blocks import plan

LONGNET = Pattern.dilated((8, 16, 64), (1, 2, 4), is_causal=True)
PATTERNS = {
    "longnet": LONGNET,
    "set": Pattern(Pattern.dilated((8, 16, 64), (1, 2, 3)).branches, "set"),
    "window": Pattern.window(9, True) + Pattern.dilated((12,), (3,), ragged="zero_keys"),
    "sparse": Pattern((Branch(32, 1, sparsity=Sparsity("dilated_sparse", 4, 0.4, 1, True)),)),
}
PACKED = torch.tensor([[0] * 30 + [1] * 40, [0] * 11 + [1] * 9 + [2] * 50])
OPTIONS = {
    "plain": {},
    "packed": {"documents": PACKED},
    "padded": {"key_padding_mask": torch.arange(70).expand(2, 70) % 9 > torch.tensor([[6], [8]])},
    "dropout": {"dropout": 0.3, "dropout_seed": 5},
    "packed dropout": {"documents": PACKED, "dropout": 0.3, "dropout_seed": 5},
    "detached": {"mix": "detached"},
    "sinks": {"sinks": torch.linspace(-1, 1, 6, dtype=torch.float64)},
    "softcap": {"softcap": 2.0},
}


@pytest.fixture
def small_tasks(monkeypatch):
    """Divide every call, however small."""
    monkeypatch.setattr(parts, "LEAST_PAIRS", 0)
    monkeypatch.setattr(parts, "LEAST_CALL", 1)
    monkeypatch.setattr(parts, "LEAST_BUSY", 0)
    plan.cache_clear()  # whose parts keep their tasks
    yield
    plan.cache_clear()


def results(tensors, pattern, **options):
    *inputs, grad = tensors
    if options.get("kernel") == "reference":
        torch.set_num_threads(1)  # the threads of small operators wait for whatever else the machine does
    out = attend(*inputs, pattern, **options)
    return out, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize(
    ("name", "options", "number"),
    tiered(
        product(PATTERNS, OPTIONS, [2, 3]),
        quick=[("longnet", o, 2) for o in OPTIONS] + [("sparse", "padded", 3)],
        covers=2,
    ),
)
def test_tasks_are_exact(name, options, number):
    pattern = PATTERNS[name]
    kernel = {"kernel": "eager"} if options == "softcap" else {}
    tensors = drawn.tensors((2, 70, 6, 3, 8))
    torch.set_num_threads(number)
    with patch.object(threads, "run", wraps=threads.run) as run:
        result = results(tensors, pattern, **OPTIONS[options], **kernel)
    assert run.call_count >= 2
    assert all(len(call.args[1]) >= 3 for call in run.call_args_list)
    truth = results(tensors, pattern, **OPTIONS[options], kernel="reference")
    torch.testing.assert_close(result, truth)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("options", ["plain", "dropout"])
@pytest.mark.parametrize("samples", [1, 3])
def test_one_key_head_is_a_task_for_each_sample(samples, options):
    tensors = drawn.tensors((samples, 70, 4, 1, 8))
    torch.set_num_threads(2)
    with patch.object(threads, "run", wraps=threads.run) as run:
        result = results(tensors, LONGNET, **OPTIONS[options])
    assert [len(call.args[1]) for call in run.call_args_list] == [samples, samples]
    torch.testing.assert_close(result, results(tensors, LONGNET, **OPTIONS[options], kernel="reference"))


def test_parts_without_blocks_have_no_tasks(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_PAIRS", 0)
    assert parts.Parts(()).tasks(1, 2) == ()


@pytest.mark.usefixtures("small_tasks")
def test_results_are_those_of_any_number_of_threads_bit_by_bit():
    tensors = drawn.tensors((2, 70, 6, 3, 8), dtype=torch.float32)
    found = []
    for number in (2, 3, 2, 6):
        torch.set_num_threads(number)
        found.append(results(tensors, LONGNET))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "least"), [(6, 3, 1), (6, 3, 300), (4, 4, 10**6)])
@pytest.mark.parametrize("name", PATTERNS)
def test_tasks_have_every_row_of_a_plan_once(name, heads, kv_heads, least, monkeypatch):
    monkeypatch.setattr(parts, "LEAST_PAIRS", 0)
    monkeypatch.setattr(parts, "LEAST_CALL", least)
    monkeypatch.setattr(parts, "LEAST_BUSY", 0)
    plan.cache_clear()
    whole = plan(PATTERNS[name], heads, kv_heads, (0, 70)).parts
    tasks = whole.tasks(3, 2)

    def pairs_of(some, samples):
        return Counter(
            (sample, part.branch, *query)
            for sample in samples
            for part in some
            for query in part.block.queries.elements()
        )

    total = Counter()
    for task in tasks:
        own = pairs_of(task.parts, range(3)[task.samples])
        assert {head * kv_heads // heads for _, _, _, head in own} == {h for p in task.parts for h in p.key_heads}
        total += own
    assert total == pairs_of(whole, range(3))
    plan.cache_clear()


def test_short_calls_and_too_few_tasks_stay_with_the_caller():
    torch.set_num_threads(2)
    with patch.object(threads, "run") as run:
        attend(*drawn.tensors((1, 512, 8, 8, 8))[:3], Pattern.dense(True))
    assert not run.called
    long = plan(Pattern.dense(True), 6, 3, (0, 4096)).parts
    assert [len(long.tasks(1, number)) for number in (1, 2, 3, 4)] == [0, 0, 3, 0]
    assert len(long.tasks(2, 2)) == 6


@pytest.mark.usefixtures("small_tasks")
def test_a_call_within_a_dispatch_mode_stays_in_its_thread():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            return operator(*args, **(kwargs or {}))

    torch.set_num_threads(2)
    assert threads.available(torch.device("cpu")) == 2
    assert threads.available(torch.device("meta")) == 1
    with Mode():
        assert threads.available(torch.device("cpu")) == 1


@pytest.mark.usefixtures("small_tasks")
def test_threads_of_the_caller_and_later_ones_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    seen, later = [], []

    def task(_, steps):
        seen.extend(torch.get_num_threads() for _ in steps(range(2)))
        assert not torch.is_grad_enabled()

    torch.set_num_threads(3)
    threads.run(task, range(6), 2)
    assert seen == [1] * 12
    assert torch.get_num_threads() == 3
    thread = Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


@pytest.mark.usefixtures("small_tasks")
def test_inference_mode_reaches_the_threads():
    torch.set_num_threads(2)
    tensors = drawn.tensors((2, 70, 6, 3, 8))[:3]
    with torch.inference_mode():
        out = attend(*tensors, LONGNET)
        assert out.is_inference()
        torch.testing.assert_close(out, attend(*tensors, LONGNET, kernel="reference"))
    trained = attend(*tensors, LONGNET)  # with what was kept in inference mode
    torch.autograd.grad(trained.sum(), tensors)


@pytest.mark.usefixtures("small_tasks")
def test_an_error_in_a_thread_is_raised_in_the_caller(monkeypatch):
    class OddError(Exception):
        pass

    def failing(*_, **__):
        raise OddError("a kernel")

    torch.set_num_threads(2)
    tensors, forward = drawn.tensors((1, 70, 4, 4, 8)), cpu._forward
    monkeypatch.setattr(cpu, "_forward", failing)
    with pytest.raises(OddError, match="a kernel"):
        results(tensors, LONGNET)
    monkeypatch.setattr(cpu, "_forward", forward)
    torch.testing.assert_close(results(tensors, LONGNET), results(tensors, LONGNET, kernel="reference"))


def test_an_interrupt_ends_the_tasks():
    begun, ended, is_over = Barrier(3, timeout=60), [], Event()

    def endless(task, steps):
        begun.wait()
        for _ in steps(count()):
            time.sleep(0.01)
        ended.append(task)

    def interrupt():
        begun.wait()
        # again where the first came just before the main thread began to wait, which would not see it until it ends
        while not is_over.wait(0.5):
            signal.pthread_kill(main_thread().ident, signal.SIGINT)

    thread = Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        threads.run(endless, range(8), 2)
    is_over.set()
    thread.join()
    assert len(ended) == 2


@pytest.mark.usefixtures("small_tasks")
def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    tensors = drawn.tensors((1, 70, 4, 4, 8))
    truth = results(tensors, LONGNET)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it by a signal where it hangs
        found = results(tensors, LONGNET)
        os._exit(not all(torch.equal(a, b) for a, b in zip(found, truth, strict=True)))
    assert os.waitpid(child, 0) == (child, 0)
