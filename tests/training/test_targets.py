"""Labels that a model can see are an error, and no other labels are."""

from unittest.mock import patch

import pytest
import torch

from lightning_longnet import LongNetConfig, LongNetModule, Pattern
from lightning_longnet.training.module import target_counts

REFUSED = "labels must not be the next tokens where the pattern is not causal"
SAME = "labels must not be the input_ids themselves"


def module(is_causal=False, **options):
    pattern = Pattern.dilated((8, 32), (1, 2), is_causal=is_causal)
    return LongNetModule(LongNetConfig(pattern, vocab_size=50, dim=16, layers=1, heads=2, **options))


def begin(net, ids, labels):
    net.on_train_batch_start({"input_ids": ids, "labels": labels}, 0)


def tokens(rows=2, length=32, vocabulary=50):
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def following(ids):
    """The labels of a decoder: the next tokens, and none for the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


def masked(ids, hides=None):
    """The inputs and labels of an encoder: every fifth token is masked, and is to be found."""
    hides = (torch.arange(ids.shape[1]) % 5 == 0 if hides is None else hides).expand_as(ids)
    return ids.masked_fill(hides, 0), ids.masked_fill(~hides, -100)


def test_the_tokens_that_follow_are_no_labels_of_an_encoder():
    ids = tokens()
    with pytest.raises(ValueError, match=REFUSED):
        begin(module(), ids, following(ids))
    packed = following(ids)
    packed[:, 9::10] = -100  # documents of ten tokens
    with pytest.raises(ValueError, match="set is_causal=True in the pattern, or give labels of masked tokens"):
        begin(module(), ids, packed)
    causal = Pattern.window(8, is_causal=True)  # of the first layer, and the second one shows the target
    patterns = LongNetConfig([causal, Pattern.window(8)], vocab_size=50, dim=16, layers=2, heads=2)
    with pytest.raises(ValueError, match=REFUSED):
        begin(LongNetModule(patterns), ids, following(ids))
    labels = following(ids)
    chunks = [torch.cat([x[:, 16:], x[:, :16]], 1) for x in (ids, labels)]  # as with placement="zigzag"
    with pytest.raises(ValueError, match=REFUSED):
        begin(module(), *chunks)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_tokens_themselves_are_no_labels(is_causal):
    ids = tokens()
    for labels in (ids, ids.masked_fill(ids < 9, -100)):
        with pytest.raises(ValueError, match=SAME):
            begin(module(is_causal), ids, labels)
    one_masked = ids.clone()
    one_masked[1, 7] = 0
    begin(module(is_causal), one_masked, ids)
    begin(module(is_causal), torch.full_like(ids, 7), torch.full_like(ids, 7))
    layer = {"class_path": "lightning_longnet.DilatedSelfAttention"}
    with pytest.raises(ValueError, match=SAME):
        begin(module(is_causal, attention=layer), ids, ids)


def test_other_labels_and_causal_patterns_are_left_alone():
    ids = tokens()
    begin(module(is_causal=True), ids, following(ids))
    begin(module(), *masked(ids))
    same = torch.full_like(ids, 7)
    begin(module(), same, following(same))
    begin(module(), *masked(same))
    begin(module(attention={"class_path": "lightning_longnet.DilatedSelfAttention"}), ids, following(ids))
    for seed in range(50):
        torch.manual_seed(seed)
        letters = tokens(8, 128, vocabulary=3)
        begin(module(), *masked(letters, torch.rand(8, 128) < 0.15))
    margin = tokens(16)
    margin[:, :20] = 7
    begin(module(), *masked(margin, torch.arange(32) < 10))


def test_the_first_batches_that_have_enough_labels_decide():
    net, ids = module(), tokens()
    few = torch.full_like(ids, -100)
    few[0, 1:5] = ids[0, 2:6]
    for _ in range(7):  # of four labels
        begin(net, ids, few)
    with pytest.raises(ValueError, match=REFUSED):
        begin(net, ids, few)
    with pytest.raises(ValueError, match=REFUSED):  # in another fit
        begin(net, ids, following(ids))
    net = module()
    begin(net, *masked(tokens(16)))
    begin(net, ids, following(ids))


def test_batches_without_enough_labels_are_not_counted_for_ever():
    net, ids = module(), tokens()
    none = torch.full_like(ids, -100)
    with patch("lightning_longnet.training.module.target_counts", wraps=target_counts) as counting:
        for _ in range(200):
            begin(net, ids, none)
    assert counting.call_count == 64
