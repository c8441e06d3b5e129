"""What a step of attention does besides arithmetic, in counts and never in seconds: calls, copies, Python, plans."""

import dataclasses
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels.call import Call
from lightning_longnet.attention.kernels.sdpa import cpu
from lightning_longnet.attention.parallel import rank_blocks as blocks_of_ranks
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout, rank_blocks
from lightning_longnet.attention.parallel.routes import route
from lightning_longnet.attention.parallel.shares import shares
from lightning_longnet.attention.plan import blocks, documents, lattice, packed, parts
from lightning_longnet.attention.plan.block import Block

DENSE = Pattern.dense(is_causal=True)
SOME = lattice.Lattice(range(1), rows=1, step=1, head=0, heads=1)  # a kernel is given its rows, and does not look
LONGNET = Pattern.dilated((2048, 4096, 8192), (1, 2, 4), is_causal=True)


@contextmanager
def counted_kernels():
    """Count the blocks that the CPU's kernel computes, forward and backward."""
    counts, forward, backward = Counter(), cpu.forward, cpu.backward

    def counting(name, real):
        def call(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        return call

    with ExitStack() as patches:
        patches.enter_context(patch.object(cpu, "forward", counting("forward", forward)))
        patches.enter_context(patch.object(cpu, "backward", counting("backward", backward)))
        yield counts


def inputs(batch, length, heads=8, width=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, heads, width, generator=generator).requires_grad_() for _ in range(3)]


def step(tensors, pattern, **options):
    out = attend(*tensors, pattern, **options)
    return out, *torch.autograd.grad(out, tensors, torch.ones_like(out))


@pytest.mark.parametrize("length", [1, 128, 2048])
def test_a_short_sequence_is_one_call_each_way(length):
    tensors = inputs(1, length)
    with counted_kernels() as counts:
        step(tensors, DENSE)
    assert counts == {"forward": 1, "backward": 1}


def test_a_long_result_is_cut():
    """Beyond 8 MiB the result of a call that is held beside the accumulators is an eighth of all rows."""
    tensors = inputs(1, 8192, 8, 64)
    with counted_kernels() as counts, torch.no_grad():
        attend(*tensors, LONGNET)
    whole = blocks.plan(LONGNET, 8, 8, (0, 8192), 1)
    assert counts["forward"] > sum(map(len, whole.calls))


def test_a_step_cuts_and_plans_nothing_anew():
    tensors = inputs(1, 512)
    step(tensors, LONGNET)
    with patch.object(dataclasses, "replace", side_effect=AssertionError), ExitStack() as patches:
        for module in (blocks, lattice, parts):
            if hasattr(module, "replace"):
                patches.enter_context(patch.object(module, "replace", side_effect=AssertionError))
        step(tensors, LONGNET)


def python_calls(function):
    """The number of Python functions that are called on this thread and by autograd's."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_a_short_step_calls_few_python_functions():
    tensors = inputs(1, 128)
    step(tensors, DENSE)
    assert python_calls(lambda: step(tensors, DENSE)) <= 400


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def test_the_result_of_one_call_is_not_copied():
    from lightning_longnet.attention import op
    from lightning_longnet.attention.spec import AttentionSpec

    q, k, v = (x.detach() for x in inputs(1, 128))
    none = (None,) * 4
    spec = AttentionSpec(DENSE, "sdpa").dumps()
    with Operators() as forward:
        out, lse, saved = op.forward.body(q, k, v, *none, spec, None)
    with Operators() as backward:
        op.backward.body(out, q, k, v, out, lse, saved, *none, spec, None)
    copies = "copy_", "clone", "index_select", "index_copy_", "index_put_", "empty_like", "zeros_like"
    # the lse is brought from the order of the operator into that of the result
    assert [forward.counts[name] for name in copies] == [0, 1, 0, 0, 0, 0, 0]
    assert [backward.counts[name] for name in copies] == [0] * 7


class Stub:
    """A kernel that computes nothing: results are in memory as those of torch's operators."""

    takes_weights = staticmethod(lambda device: False)

    @staticmethod
    def rows(x):
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)

    def forward(self, q, k, v, call):
        return self.rows(q), q.new_empty(q.shape[:3])

    def backward(self, grad, q, k, v, out, lse, call):
        return self.rows(q), self.rows(k), self.rows(v)


def test_a_layer_of_five_branches_runs_few_operators():
    """Each of its 7 calls reads and merges rows by one view of each tensor; the results of the first one are kept."""
    from lightning_longnet.attention import op
    from lightning_longnet.attention.kernels import BLOCK_KERNELS
    from lightning_longnet.attention.spec import AttentionSpec

    q, k, v = (x.detach() for x in inputs(1, 32))
    pattern = Pattern.dilated((32, 64, 128, 256, 512), (1, 2, 4, 8, 16), is_causal=True)
    arguments = *(None,) * 4, AttentionSpec(pattern, "sdpa").dumps(), None
    with patch.dict(BLOCK_KERNELS, sdpa=Stub()):
        out, lse, saved = op.forward.body(q, k, v, *arguments)
        with Operators() as forward:
            op.forward.body(q, k, v, *arguments)
        with Operators() as backward:
            op.backward.body(out, q, k, v, out, lse, saved, *arguments)
        calls = python_calls(lambda: op.forward.body(q, k, v, *arguments))
        calls += python_calls(lambda: op.backward.body(out, q, k, v, out, lse, saved, *arguments))
    names = "as_strided", "sub", "sigmoid_", "eq", "masked_fill_", "lerp_", "logaddexp", "add_", "copy_", "squeeze"
    assert [forward.counts[name] for name in names] == [7 * 3 + 6 * 2, 6, 6, 0, 0, 6, 6, 0, 0, 1]
    assert [backward.counts[name] for name in names] == [7 * 6 + 6 * 3, *(0,) * 6, 6 * 3, 0, 0]
    assert calls <= 280


@pytest.mark.parametrize(("length", "tiles"), [(128, 0), (512, 2), (2048, 0)])
def test_a_causal_block_of_some_hundred_rows_is_few_tiles(length, tiles, monkeypatch):
    """With one thread it is, and each tile computes its products and exponentials once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors = [x.detach().transpose(1, 2) for x in inputs(1, length)]
    call = Call(Block(SOME, SOME, low=0), 0.25)
    with Operators() as forward:
        out, lse = cpu.forward(*tensors, call)
    with Operators() as backward:
        cpu.backward(out, *tensors, out, lse, call)
    names = "bmm", "baddbmm_", "exp2_", "amax"
    assert [forward.counts[name] for name in names] == [2 * tiles, 0, tiles, tiles]
    assert [backward.counts[name] for name in names] == [3 * tiles, 2 * tiles, tiles, 0]


# Packed rows


def packed_ids(batch, length, many, seed=0):
    """Rows of `many` documents of random lengths, other ones in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(batch, length, dtype=torch.long)
    for row in ids:
        row[torch.randperm(length - 1, generator=generator)[: many - 1] + 1] = 1
    return ids.cumsum(1)


def test_rows_of_other_documents_share_calls():
    """Calls are at most as many as there are lengths of documents, not as many as rows."""
    one, many = packed_ids(1, 256, 64), packed_ids(33, 256, 64)
    counted = []
    for ids in (one, many):
        with counted_kernels() as counts:
            step(inputs(len(ids), 256), DENSE, documents=ids)
        counted.append(counts["forward"])
    lengths = documents.document_cuts(many, *many.shape)
    assert counted[0] <= 5
    assert counted[1] <= len({end - begin for cuts in lengths for begin, end in pairwise(cuts)})


@pytest.mark.parametrize("pattern", [DENSE, LONGNET], ids=["dense", "dilated"])
def test_a_thousand_documents_share_calls(pattern):
    """Calls are at most as many as there are lengths, and not as many as lengths and heads."""
    ids, threads = packed_ids(1, 16384, 1000), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with counted_kernels() as counts:
            step(inputs(1, 16384, 8, 4), pattern, documents=ids)
    finally:
        torch.set_num_threads(threads)
    assert counts["forward"] == counts["backward"] <= len(ids[0].bincount().unique()) == 74


def test_a_layout_is_read_and_planned_once_for_all_layers():
    ids, tensors = packed_ids(33, 64, 9), inputs(33, 64)
    made = Counter()

    def counting(real):
        def call(*arguments):
            made[real.__name__] += 1
            return real(*arguments)

        return call

    with (
        patch.object(packed, "make_plan", counting(packed.make_plan)),
        patch.object(packed, "document_cuts", counting(documents.document_cuts)),
    ):
        for _layer in range(3):
            step(tensors, DENSE, documents=ids)
    assert made == {"make_plan": 1, "document_cuts": 1}


def test_a_change_of_documents_in_place_is_seen_whoever_makes_it():
    ids, tensors = packed_ids(2, 48, 5), inputs(2, 48)
    step(tensors, DENSE, documents=ids)
    for change in (ids.zero_, lambda: ids.numpy().__setitem__((1, slice(20, None)), 7)):
        change()
        result = attend(*tensors, DENSE, documents=ids)
        torch.testing.assert_close(result, attend(*tensors, DENSE, documents=ids.clone(), kernel="reference"))


def test_the_layout_of_a_tensor_is_forgotten_with_it():
    before = len(packed._KEPT)
    ids = packed_ids(2, 48, 5)
    attend(*inputs(2, 48), DENSE, documents=ids)
    assert len(packed._KEPT) == before + 1
    del ids
    assert len(packed._KEPT) == before


@pytest.mark.parametrize("ordering", ["raster", "hilbert"])
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_joined_rows_are_rows(ordering, mix):
    """With padding, dropout and null keys, each row equals itself as a batch of one."""
    pattern = Pattern.dilated((8, 32), (1, 2), is_causal=True) + Pattern.dilated((12,), (3,), ragged="zero_keys")
    tensors = [x.double().detach().requires_grad_() for x in inputs(3, 40, 4)]
    ids, hidden = packed_ids(3, 40, 4), torch.arange(40).expand(3, 40) % 7 == 2
    options = {"dropout": 0.3, "dropout_seed": 3, "mix": mix, "ordering": ordering}
    result = step(tensors, pattern, documents=ids, key_padding_mask=hidden, **options)
    for row in range(3):
        alone = [x[row : row + 1].detach().requires_grad_() for x in tensors]
        masks = {"documents": ids[row : row + 1], "key_padding_mask": hidden[row : row + 1]}
        truth = step(alone, pattern, **masks, **options, dropout_samples=(row, 1))
        torch.testing.assert_close([x[row : row + 1] for x in result], list(truth))


# Plans over ranks


def test_a_rank_plans_the_documents_that_it_has():
    length, ranks = 1 << 16, 64
    cuts = (0, *sorted({*range(777, length, 777)}), length)
    layout = Layout(Pattern.dilated((512, 1024, 2048), (1, 2, 4), True), 8, 8, cuts, Placement.even(length, ranks))
    rank_blocks.cache_clear()
    result = route(layout, 11, ("gather",) * 3)
    assert result.own
    planned = rank_blocks(layout)._documents
    assert sum(last - first + 1 for first, last in planned) < 16 < len(cuts)


@pytest.mark.parametrize("document", [777, 1 << 16])
def test_each_block_that_a_rank_cuts_has_a_share(document):
    """A rank of a zigzag looks only at segments with queries in one of its chunks and keys in one of the other's."""
    length, ranks = 1 << 16, 64
    cuts = (0, *range(document, length, document), length)
    where = Placement.even(length, ranks, "zigzag")
    layout = Layout(Pattern.dilated((512, 1024, 2048), (1, 2, 4), True), 8, 8, cuts, where)
    result = []
    with patch.object(blocks_of_ranks, "shares", lambda *a: result.append([*shares(*a)]) or result[-1]):
        rank_blocks.cache_clear()
        route(layout, 11, ("gather",) * 3)
    assert result
    assert all(result)
