"""The context in plain PyTorch: means, gathered sequences, layers and positions, without Lightning."""

import copy
import pickle

import pytest
import torch
from contexts import made
from tiers import tiered
from torch import nn

from lightning_longnet import (
    Branch,
    DilatedSelfAttention,
    Pattern,
    SequenceContext,
    attach_context,
    attend,
    hand_down,
    sequence_context,
)
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.sequence.position import MeshPosition

PATTERN = Pattern.dilated((4, 8, 16), (1, 2, 3), is_causal=True)


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gathered(group, placement, length):
    context = made(group, placement)
    x, weights = drawn(1, 2, length, 3), drawn(2, 2, length, 3)
    part = context.split({"x": x}, {"x": 1})["x"].requires_grad_()
    whole = context.gather_sequence(part)
    (grad,) = torch.autograd.grad((whole * weights).sum(), part)
    again = context.split({"x": weights}, {"x": 1})["x"]
    positions = context.positions_of(part)
    swapped = context.gather_sequence(part.detach().transpose(0, 1), dim=0).transpose(0, 1)
    return (
        torch.equal(whole, x) and torch.equal(swapped, x),
        torch.allclose(grad, context.sequence_parallel_size * again),  # of the sum of what all ranks compute
        torch.equal(part, x[:, positions]),
        len(positions),
    )


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [3, 7, 12])
def test_whole_sequences_come_back_with_their_gradients(pool, placement, length):
    for world in (1, 2, 3):
        result = pool.run(world, gathered, placement, length)
        assert all(each[:3] == (True, True, True) for each in result)
        assert sum(each[3] for each in result) == length


@pytest.mark.parametrize(("length", "ranks", "lengths"), [(12, 3, (4, 4, 4)), (7, 3, (2, 2, 3)), (2, 3, (0, 1, 1))])
def test_an_even_placement_differs_by_a_token_at_most(length, ranks, lengths):
    for kind in ("contiguous", "zigzag"):
        result = Placement.even(length, ranks, kind)
        assert (result.lengths, result.kind) == (lengths, kind)
        assert Placement.even(length, ranks, kind) is result
    with pytest.raises(ValueError, match="placement must be one of"):
        Placement.even(length, ranks, "striped")


def attended(group, placement, documents, hidden):
    """Whether a layer that is handed a context computes its part of what it computes alone, gradients included."""
    torch.manual_seed(0)
    layer = DilatedSelfAttention(16, 4, PATTERN, num_kv_heads=2, rotary="xpos", dtype=torch.float64, dropout=0.2)
    x, weights = drawn(3, 2, 23, 16), drawn(4, 2, 23, 16)
    given = {"documents": documents, "key_padding_mask": hidden}
    given = {name: value for name, value in given.items() if value is not None}
    plain = SequenceContext()
    plain.begin_step(3)
    attach_context(layer, plain)
    (layer(x, **given) * weights).sum().backward()
    expected, best = layer(x, **given).detach(), [p.grad for p in layer.parameters()]
    layer.zero_grad()
    context = made(group, placement)
    context.begin_step(3)
    attach_context(layer, context)
    parts = context.split({"x": x, "weights": weights, **given}, dict.fromkeys(("x", "weights", *given), -1) | XW)
    options = {name: parts[name] for name in given}
    out = layer(parts["x"], **options)
    (out * parts["weights"]).sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    for grad in grads:
        torch.distributed.all_reduce(grad, group=group)
    torch.testing.assert_close(context.gather_sequence(out.detach()), expected, rtol=1e-10, atol=1e-10)
    for result, right in zip(grads, best, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)


def attended_by_hand(group, documents):
    """With the shard of the batch, which knows its documents and its attention_mask."""
    context = made(group)
    q, k, v = drawn(5, 3, 2, 23, 4, 8)
    real = ~HIDDEN
    batch = {"q": q, "k": k, "v": v, "attention_mask": real.long(), "documents": documents}
    part = context.split(batch, {"q": 1, "k": 1, "v": 1})
    shard = context.shard
    assert context.shard is shard
    out = attend(part["q"], part["k"], part["v"], PATTERN, shard=shard)
    expected = attend(q, k, v, PATTERN, documents=documents, key_padding_mask=HIDDEN)
    torch.testing.assert_close(context.gather_sequence(out), expected)
    context.split(batch, {"q": 1, "k": 1, "v": 1})
    assert context.shard is not shard  # another batch, other documents for all that is known
    context.begin(None)
    assert context.shard is None


def attended_with_heads_first(group):
    """Errors of q whose heads come before its tokens, and of another length; none where both numbers are equal."""
    context = made(group)
    q = context.split({"q": drawn(5, 2, 24, 4, 8)}, {"q": 1})["q"]
    message = (
        r"q must be .* head_dim\), got \(2, 4, 12, 8\), whose tokens are in dimension 2: leave out transpose\(1, 2\)"
    )
    with pytest.raises(ValueError, match=message):
        context.attend(*[q.transpose(1, 2)] * 3, PATTERN)
    with pytest.raises(ValueError, match="this rank holds 12 tokens of each sequence of 24, got 11"):
        context.attend(*[q[:, 1:]] * 3, PATTERN)
    square = context.split({"q": drawn(6, 2, 8, 4, 8)}, {"q": 1})["q"]
    return context.attend(square, square, square, PATTERN).shape


def test_heads_before_tokens_are_refused(pool):
    assert pool.run(2, attended_with_heads_first) == [(2, 4, 4, 8)] * 2


@pytest.mark.parametrize("rows", [slice(None), 0])
def test_a_batchs_shard_knows_documents_and_padding(pool, rows):
    pool.run(3, attended_by_hand, DOCUMENTS[rows])


def shards_made(group):
    """How many shards layers make that are handed the same tensors, others, and changed ones."""
    context = made(group)
    batch = context.split({"input_ids": torch.zeros(2, 23), "documents": DOCUMENTS})
    documents = batch["documents"]
    first = context.shard_of(documents)
    same = [context.shard_of(documents.detach()) is first, context.shard_of(documents[:]) is first]
    plain = context.shard_of()
    documents += 1
    other = [context.shard_of(documents) is not first, context.shard_of(documents.clone()) is not first]
    context.split({"input_ids": torch.zeros(2, 23)})
    return all(same) and all(other) and context.shard_of() is plain


def test_one_shard_serves_all_calls_with_the_same_tensors(pool):
    assert all(pool.run(2, shards_made))


XW = {"x": 1, "weights": 1}
DOCUMENTS = torch.stack([torch.arange(23) // 6, torch.arange(23) // 11])
HIDDEN = torch.arange(23).expand(2, 23) >= torch.tensor([[20], [15]])


@pytest.mark.parametrize("placement", tiered(["contiguous", "zigzag"], quick=["zigzag"]))
@pytest.mark.parametrize(
    ("documents", "hidden"), [(None, None), (DOCUMENTS, None), (DOCUMENTS[0], HIDDEN), (None, HIDDEN)]
)
def test_a_layer_computes_its_part(pool, placement, documents, hidden):
    for world in (2, 3):
        pool.run(world, attended, placement, documents, hidden)


def means(group, cases):
    """token_mean goes over all ranks there are; here the groups' world is larger than the case, so all take part."""
    context = SequenceContext()
    rank = torch.distributed.get_rank()
    result = []
    for counts in cases:
        loss_sum = torch.tensor(float(rank + 1) if counts[rank] else 0.0, dtype=torch.float64, requires_grad=True)
        mean = context.token_mean(loss_sum, torch.tensor(counts[rank]))
        mean.backward()
        result.append((mean.item(), loss_sum.grad.item()))
    return result


def test_a_mean_is_over_the_tokens_of_all_ranks(pool):
    cases = [(1,) * 8, (0, 5, 2, 0, 1, 7, 3, 4), (0,) * 8]
    for result in pool.run(8, means, cases):
        for counts, (mean, grad) in zip(cases, result, strict=True):
            total = sum(counts)
            expected = sum(rank + 1 for rank, n in enumerate(counts) if n) / total if total else 0.0
            assert mean == pytest.approx(expected)
            assert grad == pytest.approx(8 / total if total else 0.0)  # engines average over the 8 ranks


@pytest.mark.parametrize("wrong", [(torch.ones(2), 2), (torch.ones(()), torch.ones(2))])
def test_a_mean_wants_a_sum_and_a_number(wrong):
    with pytest.raises(ValueError, match="must be"):
        SequenceContext().token_mean(*wrong)


def test_without_ranks_everything_is_there():
    context, x = SequenceContext(), torch.randn(2, 5, 3)
    assert context.gather_sequence(x) is x
    assert torch.equal(context.positions_of(x), torch.arange(5))
    assert (context.mesh, context.positions, context.sequence_group) == (None,) * 3
    assert context.token_mean(torch.tensor(6.0), 4).item() == 1.5
    assert copy.deepcopy(context) is context
    assert isinstance(pickle.loads(pickle.dumps(context)), SequenceContext)
    assert context.gather_samples(x)[0] is x


def test_layers_and_all_other_modules_are_given_it():
    layer = DilatedSelfAttention(16, 4, PATTERN)
    model, context = nn.Sequential(nn.Linear(16, 16), layer, DilatedSelfAttention(16, 4, PATTERN)), SequenceContext()
    attach_context(model, context)
    assert layer.sequence_context is context
    assert [layer.layer_number, model[2].layer_number] == [0, 1]
    assert all(sequence_context(each) is context for each in model.modules())
    assert all(sequence_context(each) is context for each in copy.deepcopy(model).modules())
    assert set(model.state_dict()) == set(nn.Sequential(nn.Linear(16, 16), layer, layer).state_dict())
    attach_context(model, None)
    assert not any(sequence_context(each) is context for each in model.modules())


def test_former_names_still_work():
    assert hand_down is attach_context
    assert torch.equal(SequenceContext().begin_made(3), torch.arange(3))
    context = SequenceContext()
    assert context.window is context.token_window
    assert Branch(4, 1).border(10) == Branch(4, 1).border_spacing(10) == 4
    assert Placement((2, 4), "zigzag").stretches(1) == Placement((2, 4), "zigzag").chunks(1)


def test_what_counts_samples_is_distinguished():
    from torchmetrics import MetricCollection, SumMetric

    context, metrics = SequenceContext(), MetricCollection({"a": SumMetric(), "b": SumMetric()})
    assert context.per_sample(metrics) is metrics
    assert all(metric.dist_sync_fn == context.gather_samples for metric in metrics.values())
    with pytest.raises(ValueError, match="metric must be a torchmetrics Metric or a collection"):
        context.per_sample(nn.Linear(2, 2))


def test_whole_gives_back_what_it_took():
    context = SequenceContext()
    context.split({"input_ids": torch.zeros(2, 9)})
    with context.whole():
        assert context.length is None
    assert context.length == 9


def windows(group):
    """Counts of a window weigh its gradients; what has no gradient is no part of it."""
    context, rank = SequenceContext(), torch.distributed.get_rank()
    context.token_window.open()
    result = []
    for count in (3, 5):
        loss = torch.tensor(2.0 * count, requires_grad=True)
        context.token_mean(loss.detach(), count)
        context.token_mean(loss, count).backward()
        result.append(loss.grad.item())
    assert context.token_window.means == 2
    factor = context.token_window.close(2)
    assert (context.token_window.means, rank >= 0) == (0, True)
    return [grad / 2 * factor for grad in result]


def test_a_window_weighs_by_tokens(pool):
    for result in pool.run(8, windows):
        assert result == pytest.approx([1 / 8] * 2)  # of a mean over 8 tokens on each of 8 ranks, averaged over ranks


def test_dropout_follows_step_layer_and_place():
    q = torch.randn(2, 20, 4, 8)

    def drop(step, layer=0, rank=0, ranks=1):
        position = MeshPosition(data_parallel_size=ranks, data_parallel_rank=rank)
        context = SequenceContext(seed=3, position=position)
        context.begin_step(step)
        return context.attend(q, q, q, PATTERN, dropout=0.5, layer=layer)

    first = drop(0)
    assert torch.equal(drop(0), first)
    assert not torch.equal(drop(1), first)
    assert not torch.equal(drop(0, layer=1), first)
    assert not torch.equal(drop(0, rank=1, ranks=2), first)
    assert torch.equal(drop(0, rank=0, ranks=2)[:1], first[:1])
