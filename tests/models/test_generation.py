"""Sequences that a model goes on with, on one process and over ranks."""

import pytest
import torch
from contexts import made

from lightning_longnet import LongNet, LongNetConfig, Pattern, attach_context
from lightning_longnet.models.generation import generate

PATTERN = Pattern.dilated((4, 16), (1, 2), is_causal=True)
PROMPTS = torch.tensor([[5, 1, 7, 2, 9], [3, 3, 8, 0, 4]])
DRAWN = {"temperature": 0.7, "top_k": 5, "seed": 3}


def model():
    torch.manual_seed(1)
    told = {"dropout": 0.3, "embedding_scale": 1.5, "tied_embeddings": False}
    found = LongNet(LongNetConfig(PATTERN, vocab_size=19, dim=16, layers=2, heads=4, **told)).double()
    torch.nn.init.normal_(found.embedding.weight)  # so that logits differ
    return found


def test_the_likeliest_token_follows_each_prefix():
    net = model()
    found = generate(net, PROMPTS, 6, temperature=0)
    assert net.training, "it is left as it was"
    net.eval()
    wanted = PROMPTS
    for _ in range(6):
        wanted = torch.cat([wanted, net(wanted)[:, -1:].argmax(-1)], 1)
    assert found.tolist() == wanted.tolist()
    assert len(set(found[:, 5:].flatten().tolist())) > 2, "a model that says one thing would prove little"


def test_what_is_drawn_follows_the_seed_the_temperature_and_the_likeliest():
    net = model()
    found = generate(net, PROMPTS, 8, **DRAWN)
    assert found.tolist() == generate(net, PROMPTS, 8, **DRAWN).tolist()
    assert found.tolist() != generate(net, PROMPTS, 8, **{**DRAWN, "seed": 4}).tolist()
    assert generate(net, PROMPTS, 8, top_k=1).tolist() == generate(net, PROMPTS, 8, temperature=0).tolist()
    net.eval()
    for end in range(5, 13):
        best = net(found[:, :end])[:, -1].topk(5).indices
        assert (best == found[:, end : end + 1]).any(1).all()
    # cold draws are those of the likeliest, hot ones are not
    assert generate(net, PROMPTS, 8, temperature=1e-4).tolist() == generate(net, PROMPTS, 8, temperature=0).tolist()
    assert generate(net, PROMPTS, 8, temperature=9.0).tolist() != generate(net, PROMPTS, 8, temperature=0).tolist()


def over_ranks(group, prompts):
    context = made(group)
    net = model()
    attach_context(net, context)
    context.begin(31)  # a batch that is being worked on
    found = generate(net, prompts, 8, **DRAWN, context=context)
    return found, context.length


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:, :1]], ids=["five tokens", "one, fewer than ranks"])
def test_ranks_that_share_sequences_draw_what_one_process_does(pool, prompts):
    wanted = generate(model(), prompts, 8, **DRAWN).tolist()
    for found, length in pool.run(3, over_ranks, prompts):
        assert found.tolist() == wanted
        assert length == 31


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"input_ids": PROMPTS[0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(5,\)"),
        ({"input_ids": PROMPTS[:, :0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(2, 0\)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), **{"input_ids": PROMPTS, "tokens": 3, **change})


def test_an_encoder_cannot_go_on():
    net = LongNet(LongNetConfig(Pattern.dilated((4,), (1,)), vocab_size=19, dim=16, layers=1, heads=4))
    with pytest.raises(ValueError, match="model must be causal in every layer"):
        generate(net, PROMPTS, 1)
