"""What ranks do wrong is an error on all of them, with words that say what and where; nobody waits for ever."""

import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_longnet import Pattern, SequenceShard, attend, balanced_placement

CAUSAL = Pattern.dilated((8, 32), (1, 2), is_causal=True)


def drawn(length=16, heads=2, kv_heads=2, dim=4, value_dim=None, batch=1, dtype=torch.float32, has_gradient=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    result = [torch.randn(batch, length, *shape, generator=generator).to(dtype) for shape in shapes]
    return [x.requires_grad_(has_gradient) for x in result]


def make(group, settings):
    SequenceShard(group, **settings[group.rank()])


def call(group, tensors, settings):
    shard = SequenceShard(group, 16)
    attend(*drawn(**tensors[group.rank()]), **{"pattern": CAUSAL, "shard": shard, **settings[group.rank()]})


def padded(group, batch):
    shard = SequenceShard(group, 16, key_padding_mask=torch.zeros(1, 16, dtype=torch.bool))
    attend(*drawn(batch=batch), CAUSAL, shard=shard)


def documented(group, batch):
    shard = SequenceShard(group, 16, documents=torch.zeros(3, 16, dtype=torch.long))
    attend(*drawn(batch=batch), CAUSAL, shard=shard)


def outsider(group):
    shard = None
    if group.rank() == 1:
        shard = dist.GroupMember.NON_GROUP_MEMBER
        SequenceShard(shard, 16)


ids = torch.arange(4)
SHARDS = {
    "negative length": ([{"length": 4}, {"length": -1}], r"length must be .*, got -1 on rank 1", 1),
    "no length": ([{"length": 4}, {"length": 4.0}], r"length must be .*, got 4.0 on rank 1", 1),
    "placements": (
        [{"length": 4, "placement": "zigzag"}, {"length": 4}],
        "placement must be equal on all ranks, got zigzag on rank 0 and contiguous on rank 1",
        None,
    ),
    "unknown placement": (
        [{"length": 4}, {"length": 4, "placement": "random"}],
        "placement must be one of .* on rank 1",
        1,
    ),
    "documents on one rank": (
        [{"length": 4, "documents": ids}, {"length": 4}],
        "rows of documents must be equal on all ranks, got 1 on rank 0 and none on rank 1",
        None,
    ),
    "documents of another length": (
        [{"length": 4}, {"length": 4, "documents": torch.arange(5)}],
        r"documents must be \(4,\) or \(batch, 4\), got \(5,\) on rank 1",
        1,
    ),
    "documents that decrease over the border": (
        [{"length": 4, "documents": ids + 3}, {"length": 4, "documents": ids}],
        "documents must not decrease along a row, got 6 followed by 0 at token 4",
        None,
    ),
    "documents in a list": (
        [{"length": 4}, {"length": 4, "documents": [0, 0, 1, 1]}],
        "documents must be a tensor of integer ids, got list on rank 1",
        1,
    ),
    "complex documents": (
        [{"length": 4}, {"length": 4, "documents": ids.to(torch.complex64)}],
        "documents must be integer ids, got torch.complex64 on rank 1",
        1,
    ),
    "documents of no sample": (
        [{"length": 4}, {"length": 4, "documents": ids.new_empty(0, 4)}],
        "rows of documents must be equal on all ranks, got none on rank 0 and 0 on rank 1",
        None,
    ),
    "padding in a list": (
        [{"length": 4}, {"length": 4, "key_padding_mask": [[True] * 4]}],
        r"key_padding_mask must be bools of shape \(batch, 4\), got list on rank 1",
        1,
    ),
    "placements of other documents": (
        [{"length": 4, "placement": balanced_placement(documents, 2)} for documents in ((8,), (5, 3))],
        "placement must be equal on all ranks, got a Placement on rank 0 and a Placement on rank 1",
        None,
    ),
    "a placement of another length": (
        [
            {"length": 4, "placement": balanced_placement((8,), 2)},
            {"length": 3, "placement": balanced_placement((8,), 2)},
        ],
        r"length must be that of the placement on rank 1 of \(4, 4\), got 3",
        1,
    ),
    "a placement of more ranks": (
        [{"length": 2, "placement": balanced_placement((8,), 4)}] * 2,
        "placement must have 2 ranks, as the group, got 4",
        None,
    ),
    "no placement": (
        [{"length": 4}, {"length": 4, "placement": None}],
        "placement must be one of 'contiguous', 'zigzag', got None on rank 1",
        1,
    ),
    "checks": (
        [{"length": 4}, {"length": 4, "check": "always"}],
        "check must be equal on all ranks, got first on rank 0 and always on rank 1",
        None,
    ),
    "unknown check": (
        [{"length": 4}, {"length": 4, "check": "never"}],
        "check must be one of 'first', 'always', got 'never' on rank 1",
        1,
    ),
    "padding of floats": (
        [{"length": 4}, {"length": 4, "key_padding_mask": torch.zeros(1, 4)}],
        r"key_padding_mask must be bools of shape \(batch, 4\), got torch.float32",
        1,
    ),
}

CALLS = {
    "patterns": (
        [{}, {}],
        [{}, {"pattern": Pattern.dense(True)}],
        "pattern must be equal on all ranks of a shard, got .*32.* on rank 0 and .*null.* on rank 1",
        None,
    ),
    "batches": ([{}, {"batch": 2}], [{}, {}], "batch must be equal .* got 1 on rank 0 and 2 on rank 1", None),
    "heads": ([{}, {"heads": 4}], [{}, {}], "heads of q must be equal .* got 2 on rank 0 and 4 on rank 1", None),
    "key heads": (
        [{"heads": 4}, {"heads": 4, "kv_heads": 4}],
        [{}, {}],
        "heads of k must be equal .* got 2 on rank 0 and 4 on rank 1",
        None,
    ),
    "widths": ([{}, {"dim": 8}], [{}, {}], "head_dim must be equal .* got 4 on rank 0 and 8 on rank 1", None),
    "dtypes": (
        [{}, {"dtype": torch.float64}],
        [{}, {}],
        "dtype must be equal .* got 'torch.float32' on rank 0 and 'torch.float64' on rank 1",
        None,
    ),
    "exchanges": (
        [{}, {}],
        [{"exchange": "ring"}, {}],
        "exchange must be equal .* got 'ring' on rank 0 and 'auto' on rank 1",
        None,
    ),
    "widths of v": (
        [{}, {"value_dim": 3}],
        [{"kernel": "eager"}] * 2,
        "width of v must be equal .* got 4 on rank 0 and 3",
        None,
    ),
    "mixes": (
        [{}, {}],
        [{"mix": "detached"}, {}],
        "mix must be equal .* got 'detached' on rank 0 and 'exact' on rank 1",
        None,
    ),
    "wishes for lse": (
        [{}, {}],
        [{"return_lse": True}, {}],
        "return_lse must be equal .* got True on rank 0 and False on rank 1",
        None,
    ),
    "kernels": (
        [{}, {}],
        [{"kernel": "eager"}, {}],
        "kernel must be equal .* got 'eager' on rank 0 and 'sdpa' on rank 1",
        None,
    ),
    "scales": ([{}, {}], [{"scale": 0.3}, {}], "scale must be equal .* got 0.3 on rank 0 and 0.5 on rank 1", None),
    "dropouts": (
        [{}, {}],
        [{"dropout": 0.3}, {"dropout": 0.4}],
        "dropout must be equal .* got 0.3 on rank 0 and 0.4 on rank 1",
        None,
    ),
    "dropout on one rank": ([{}, {}], [{"dropout": 0.3}, {}], "(dropout|kernel) must be equal", None),
    "seeds": (
        [{}, {}],
        [{"dropout": 0.3, "dropout_seed": 1}, {"dropout": 0.3, "dropout_seed": 2}],
        "dropout_seed must be equal .* got 1 on rank 0 and 2 on rank 1",
        None,
    ),
    "a seed on one rank": (
        [{}, {}],
        [{"dropout": 0.3, "dropout_seed": 1}, {"dropout": 0.3}],
        "presence of a dropout_seed must be equal .* got True on rank 0 and False on rank 1",
        None,
    ),
    "samples": (
        [{}, {}],
        [{"dropout": 0.3, "dropout_samples": (0, 2)}, {"dropout": 0.3, "dropout_samples": (1, 2)}],
        r"dropout_samples must be equal .* got \(0, 2\) on rank 0 and \(1, 2\) on rank 1",
        None,
    ),
    "gradients": (
        [{"has_gradient": True}, {}],
        [{}, {}],
        "presence of a gradient must be equal .* got True on rank 0 and False on rank 1",
        None,
    ),
    "tokens": ([{}, {"length": 15}], [{}, {}], "q must have the shard's 16 tokens of rank 1, got 15", 1),
    "documents": (
        [{}, {}],
        [{}, {"documents": torch.arange(16)}],
        "documents must be None where a shard is given, which was made with its own",
        1,
    ),
    "no head for a rank": ([{"heads": 3, "kv_heads": 3}] * 2, [{"exchange": "swap"}] * 2, "swap needs key heads", None),
    "keys elsewhere": ([{}] * 2, [{"exchange": "local"}] * 2, "'local' needs every query's keys on its own rank", None),
    "unknown exchange": ([{}] * 2, [{"exchange": "all"}] * 2, "exchange must be one of .*, got 'all'", None),
    "no exchange": ([{}] * 2, [{}, {"exchange": None}], "exchange must be one of .*, got None", 1),
}


def check(outcomes, message, culprit):
    for rank, (is_result, error) in enumerate(outcomes):
        assert not is_result, f"rank {rank} saw nothing wrong"
        kind, text, _ = error
        assert issubclass(kind, ValueError), error[2]
        expected = message if culprit in (None, rank) else f"rank {culprit} of the group was given arguments"
        assert re.search(expected, text), text


@pytest.mark.parametrize(("settings", "message", "culprit"), SHARDS.values(), ids=SHARDS)
def test_a_shard_that_does_not_fit(pool, settings, message, culprit):
    check(pool.outcomes(2, make, settings), message, culprit)


@pytest.mark.parametrize(("tensors", "settings", "message", "culprit"), CALLS.values(), ids=CALLS)
def test_a_call_that_does_not_fit(pool, tensors, settings, message, culprit):
    check(pool.outcomes(2, call, tensors, settings), message, culprit)


def repeatedly(group, tensors, settings):
    """What every call of a shard that compares them all was told: a good one, and one that does not fit, twice."""
    shard, messages = SequenceShard(group, 16, check="always"), []
    attend(*drawn(), CAUSAL, shard=shard)
    for _ in range(2):
        try:
            attend(*drawn(**tensors[group.rank()]), **{"pattern": CAUSAL, "shard": shard, **settings[group.rank()]})
        except ValueError as error:
            messages.append((False, (ValueError, str(error), "")))
    attend(*drawn(), CAUSAL, shard=shard)
    return messages


@pytest.mark.parametrize(("tensors", "settings", "message", "culprit"), CALLS.values(), ids=CALLS)
def test_a_later_call_that_does_not_fit(pool, tensors, settings, message, culprit):
    for outcomes in zip(*pool.run(2, repeatedly, tensors, settings), strict=True):
        check(outcomes, message, culprit)


def failing_first(group):
    """A shard that compares first calls goes on comparing them until one is equal."""
    shard, messages = SequenceShard(group, 16), []
    for _ in range(2):
        try:
            attend(*drawn(), Pattern.dense(group.rank() == 1), shard=shard)
        except ValueError as error:
            messages.append(str(error))
    attend(*drawn(), CAUSAL, shard=shard)
    return messages


def test_a_comparison_that_failed_is_none(pool):
    for messages in pool.run(2, failing_first):
        assert len(messages) == 2
        assert all("pattern must be equal on all ranks of a shard" in each for each in messages)


def compared(group):
    """How often ranks compared, after each of five calls."""
    shard, result = SequenceShard(group, 16), []
    with patch.object(shard.comm, "all_gather", wraps=shard.comm.all_gather) as all_gather:
        for dropout, seed in ((0, None), (0, None), (0.1, 1), (0.1, 2), (0, None)):
            attend(*drawn(), CAUSAL, shard=shard, kernel="eager", dropout=dropout, dropout_seed=seed)
            result.append(all_gather.call_count)
    return result


def test_a_call_of_a_known_kind_costs_no_comparison(pool):
    assert pool.run(2, compared) == [[1, 1, 2, 2, 2]] * 2


def other_things(group):
    shard = SequenceShard(group, 16)
    if group.rank():
        SequenceShard(group, 16)
    else:
        attend(*drawn(), CAUSAL, shard=shard)


def test_ranks_that_do_not_do_the_same(pool):
    check(pool.outcomes(2, other_things), "rank [01] of the group (makes a shard|compares a call), rank", None)


def other_shards(group):
    shards = [SequenceShard(group, 16) for _ in range(2)]
    attend(*drawn(), CAUSAL, shard=shards[group.rank()])


def test_ranks_that_take_other_shards(pool):
    check(pool.outcomes(2, other_shards), "number of the shard must be equal", None)


def of_two(group):
    """A group that does not begin with the first rank: what is named is the rank in it."""
    own, messages = dist.new_group([1, 2]), []
    if group.rank() not in (1, 2):
        return messages
    for make in (
        lambda: SequenceShard(own, 16 if own.rank() == 0 else -1),
        lambda: attend(*drawn(16 - own.rank()), CAUSAL, shard=SequenceShard(own, 16)),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            make()
        messages.append(str(caught.value))
    return messages


def test_ranks_are_named_by_their_place_in_the_group(pool):
    _, first, second, *_ = pool.run(8, of_two)
    assert all(messages.startswith("rank 1 of the group was given arguments that do not fit") for messages in first)
    assert "got -1 on rank 1" in second[0]
    assert "16 tokens of rank 1, got 15" in second[1]


def everyone(group):
    """Of no group in particular: all ranks, as everywhere in torch."""
    shard = SequenceShard(None, 1)
    return shard.comm.ranks, shard.placement.ranks


def test_no_group_is_that_of_all_ranks(pool):
    assert pool.run(8, everyone) == [(8, 8)] * 8


def of_nothing(group, batch, length, exchange):
    shard = SequenceShard(group, length)
    tensors = [x.requires_grad_() for x in drawn(length, 4, 4, batch=batch)]
    out, lse = attend(*tensors, CAUSAL, shard=shard, exchange=exchange, return_lse=True)
    out.sum().backward()
    documents = SequenceShard(group, length, documents=torch.zeros(batch, length, dtype=torch.long))
    attend(*tensors, CAUSAL, shard=documents)
    return out.shape, lse.shape, [x.grad.shape for x in tensors], documents.places.shape


@pytest.mark.parametrize("exchange", ["gather", "swap", "auto"])
@pytest.mark.parametrize(("batch", "length"), [(0, 16), (2, 0), (0, 0)])
def test_nothing_at_all_is_nothing(pool, exchange, batch, length):
    shape = batch, length, 4, 4
    rows = (batch, length) if batch != 1 else (length,)
    for out, lse, grads, places in pool.run(2, of_nothing, batch, length, exchange):
        assert (out, lse, grads, places) == (shape, (batch, 4, length), [shape] * 3, rows)


@pytest.mark.parametrize("function", [padded, documented])
def test_a_batch_that_is_not_the_shards(pool, function):
    check(pool.outcomes(2, function, 2), "q must have the batch of the shard's .*, [13], got 2", None)


def test_a_group_that_this_rank_is_not_in(pool):
    (is_result, _), (is_other, error) = pool.outcomes(2, outsider)
    assert is_result
    assert not is_other
    assert "group must be a process group that holds this rank, 1 of all, got" in error[1]
