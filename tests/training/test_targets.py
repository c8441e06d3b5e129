"""Labels that a model can see are an error, and no other labels are."""

import pytest
import torch

from lightning_longnet import LongNetConfig, LongNetModule, Pattern


def module(is_causal):
    pattern = Pattern.dilated((8, 32), (1, 2), is_causal=is_causal)
    return LongNetModule(LongNetConfig(pattern, vocab_size=50, dim=16, layers=1, heads=2))


def tokens(rows=2, length=32):
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def following(ids):
    """The labels of a decoder: the next tokens, and none for the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


def masked(ids):
    """The inputs and labels of an encoder: every fifth token is masked, and is to be found."""
    hides = (torch.arange(ids.shape[1]) % 5 == 0).expand_as(ids)
    return ids.masked_fill(hides, 0), ids.masked_fill(~hides, -100)


def test_the_tokens_that_follow_are_no_labels_of_an_encoder():
    ids = tokens()
    with pytest.raises(ValueError, match="labels must not be the next tokens where the pattern is not causal"):
        module(is_causal=False).token_loss(ids, following(ids))
    packed = following(ids)
    packed[:, 9::10] = -100  # documents of ten tokens
    chunks = torch.cat([ids[:, :16].flip(0), ids[:, 16:]], 1)  # as with placement="zigzag"
    labels = torch.cat([following(ids)[:, :16].flip(0), following(ids)[:, 16:]], 1)
    with pytest.raises(ValueError, match="labels must not be the next tokens"):
        module(is_causal=False).token_loss(chunks, labels)
    with pytest.raises(ValueError, match="set is_causal=True in the pattern, or give labels of masked tokens"):
        module(is_causal=False).token_loss(ids, packed)


def test_other_labels_and_causal_patterns_are_left_alone():
    ids = tokens()
    module(is_causal=True).token_loss(ids, following(ids))
    module(is_causal=False).token_loss(*masked(ids))
    same = torch.full_like(ids, 7)
    module(is_causal=False).token_loss(same, following(same))
    module(is_causal=False).token_loss(*masked(same))
    runs = torch.arange(2)[:, None].add(1).expand(2, 32).contiguous()  # of one token a row
    module(is_causal=False).token_loss(*masked(runs))
    few = tokens(1, 5)
    module(is_causal=False).token_loss(few, following(few))
    module(is_causal=False).eval().token_loss(ids, following(ids))


def test_the_first_batch_alone_is_read():
    net, ids = module(is_causal=False), tokens()
    net.token_loss(*masked(ids))
    net.token_loss(ids, following(ids))
