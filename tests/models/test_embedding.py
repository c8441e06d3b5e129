"""Embeddings of sequences, on one process and over ranks."""

import pytest
import torch
from contexts import made

from lightning_longnet import LongNet, LongNetConfig, Pattern, attach_context
from lightning_longnet.models.embedding import embed

PATTERNS = {
    "encoder": Pattern.dilated((4, 32), (1, 2)),
    "decoder": Pattern.dilated((4, 32), (1, 2), is_causal=True),
}
IDS = torch.arange(2 * 21).reshape(2, 21) * 7 % 19
COUNTS = torch.tensor([21, 10])
MASK = (torch.arange(21) < COUNTS[:, None]).long()


def model(kind):
    torch.manual_seed(1)
    return LongNet(LongNetConfig(PATTERNS[kind], vocab_size=19, dim=16, layers=2, heads=4, dropout=0.3)).double()


@pytest.mark.parametrize("kind", PATTERNS)
def test_an_embedding_pools_what_the_head_reads(kind):
    net = model(kind)
    states = embed(net, IDS, "tokens")
    assert net.training, "it is left as it was"
    torch.testing.assert_close(net.head(states), net.eval()(IDS))
    torch.testing.assert_close(embed(net, IDS), states.mean(1))
    torch.testing.assert_close(embed(net, IDS, "last"), states[:, -1])


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_changes_nothing(kind, pooling):
    net = model(kind)
    expected = torch.cat([embed(net, IDS[i : i + 1, :count], pooling) for i, count in enumerate(COUNTS)])
    torch.testing.assert_close(embed(net, IDS, pooling, attention_mask=MASK), expected)


def over_ranks(group, kind, pooling, mask, placement):
    context = made(group, placement)
    net = model(kind)
    attach_context(net, context)
    context.begin(31)  # a batch that is being worked on
    result = embed(net, IDS, pooling, attention_mask=mask, context=context)
    return result, context.length


@pytest.mark.parametrize(("kind", "placement"), [("encoder", "contiguous"), ("decoder", "zigzag")])
def test_ranks_that_share_sequences_embed_as_one_process(pool, kind, placement):
    for pooling, mask in (("mean", None), ("last", None), ("mean", MASK), ("last", MASK)):
        expected = embed(model(kind), IDS, pooling, attention_mask=mask)
        for result, length in pool.run(2, over_ranks, kind, pooling, mask, placement):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
            assert length == 31


def test_each_rank_gets_the_states_of_its_tokens(pool):
    parts = [result for result, _ in pool.run(2, over_ranks, "encoder", "tokens", None, "contiguous")]
    assert [part.shape[1] for part in parts] == [10, 11]
    torch.testing.assert_close(torch.cat(parts, 1), embed(model("encoder"), IDS, "tokens"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of 'mean', 'last', 'tokens', got 'max'"),
        ({"input_ids": IDS[0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(21,\)"),
        ({"input_ids": IDS[:, :0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(2, 0\)"),
        ({"attention_mask": MASK[:1]}, r"attention_mask must have the shape \(2, 21\) of input_ids, got \(1, 21\)"),
        ({"attention_mask": MASK.flip(1)}, "attention_mask must be 1 for the first tokens of each row"),
        ({"attention_mask": MASK * 0}, "attention_mask must be 1 for at least one token of each row"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        embed(model("encoder"), **{"input_ids": IDS, **change})
