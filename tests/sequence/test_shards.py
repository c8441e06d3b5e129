"""The shards of a batch: masks that are changed in place, on all ranks or on one, and the batch's own masks."""

import pytest
import torch
from contexts import made

from lightning_longnet import (
    DilatedSelfAttention,
    MultiheadDilatedAttention,
    Pattern,
    SequenceContext,
    SequencePart,
    attach_context,
    attend,
)

PATTERN = Pattern.dilated((4, 8, 16), (1, 2, 3), is_causal=True)
LENGTH = 23
DOCUMENTS = torch.stack([torch.arange(LENGTH) // 6, torch.arange(LENGTH) // 11])
HIDDEN = torch.arange(LENGTH).expand(2, LENGTH) >= torch.tensor([[20], [15]])


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def changed(group, changing, mode):
    """Whether two calls are right, between which the ranks of `changing` hide their first token in place."""
    context, q = made(group), drawn(0, 2, LENGTH, 4, 8)
    hidden = HIDDEN.clone()
    with mode():
        part = context.split({"q": q, "hidden": hidden}, {"q": 1, "hidden": 1})
        for step in range(3):  # in the third nothing has changed since the second
            if step == 1:
                for rank in changing:
                    hidden[:, context.placement_of(LENGTH).chunks(rank)[0].begin] = True
                if group.rank() in changing:
                    part["hidden"][:, 0] = True
            x = part["q"]
            whole = context.gather_sequence(context.attend(x, x, x, PATTERN, key_padding_mask=part["hidden"]))
            torch.testing.assert_close(whole, attend(q, q, q, PATTERN, key_padding_mask=hidden))
    return context._splitter.current.shards.count


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad}


@pytest.mark.parametrize(
    ("changing", "mode"), [(changing, mode) for changing in [(0, 1), ()] for mode in MODES] + [((1,), "inference")]
)
def test_a_mask_changed_in_place_is_met_by_all_ranks(pool, changing, mode):
    """In inference mode the values of one rank's part alone may change."""
    assert pool.run(2, changed, changing, MODES[mode]) == [2 if changing else 1] * 2


def converted(group, changing):
    """As above, of a layer that converts its mask of floats."""
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(16, 4, batch_first=True, pattern=PATTERN, dtype=torch.float64)
    context, x, hidden = made(group), drawn(0, 2, LENGTH, 16), HIDDEN.clone()
    with torch.inference_mode():
        attach_context(layer, context)
        floats = torch.zeros(2, LENGTH).masked_fill(hidden, -torch.inf)
        part = context.split({"x": x, "mask": floats}, {"x": 1, "mask": 1})
        for step in range(2):
            if step == 1:
                hidden[:, context.placement_of(LENGTH).chunks(1)[0].begin] = True
                if group.rank() in changing:
                    part["mask"][:, 0] = -torch.inf
            out, _ = layer(part["x"], part["x"], part["x"], key_padding_mask=part["mask"])
            attach_context(layer, None)
            reference, _ = layer(x, x, x, key_padding_mask=hidden)
            attach_context(layer, context)
            torch.testing.assert_close(context.gather_sequence(out), reference)


def test_converted_masks_too(pool):
    pool.run(2, converted, (1,))


# The batch's own documents and padding


def batch_of(documents=True, mask=True):
    q = drawn(5, 2, LENGTH, 4, 8)
    batch = {"q": q}
    if documents:
        batch["documents"] = DOCUMENTS
    if mask:
        batch["attention_mask"] = (~HIDDEN).long()
    return batch


def by_hand(context, batch):
    """The whole result of `attend` with the batch's shard."""
    part = context.split(batch, {"q": 1})
    x = part["q"]
    return context.gather_sequence(attend(x, x, x, PATTERN, shard=context.shard))


def expected(batch):
    q, hidden = batch["q"], HIDDEN if "attention_mask" in batch else None
    return attend(q, q, q, PATTERN, documents=batch.get("documents"), key_padding_mask=hidden)


def by_hand_over_ranks(group, *given):
    return by_hand(made(group), batch_of(*given))


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_a_batchs_shard_has_its_documents_and_padding_on_any_number_of_ranks(pool, given):
    batch = batch_of(*given)
    reference = expected(batch)
    torch.testing.assert_close(by_hand(SequenceContext(), batch), reference)
    for world in (1, 2):
        for result in pool.run(world, by_hand_over_ranks, *given):
            torch.testing.assert_close(result, reference)


def test_one_process_has_a_shard_with_gradients_and_errors():
    context, batch = SequenceContext(), batch_of()
    q = context.split(batch, {"q": 1})["q"].requires_grad_()
    shard = context.shard
    assert context.shard is shard
    (grad,) = torch.autograd.grad(attend(q, q, q, PATTERN, shard=shard).square().sum(), q)
    (reference,) = torch.autograd.grad(expected({**batch, "q": q}).square().sum(), q)
    torch.testing.assert_close(grad, reference)
    with pytest.raises(ValueError, match="q must have the shard's 23 tokens"):
        attend(q[:, 1:], q[:, 1:], q[:, 1:], PATTERN, shard=shard)
    with context.whole():
        assert context.shard is None
    assert context.shard is shard
    context.begin(None)
    assert context.shard is None


def test_a_part_of_one_process_has_a_shard():
    context, batch = SequenceContext(), batch_of()
    tensors = {name: batch[name] for name in ("documents", "attention_mask")}
    part = SequencePart({"input_ids": DOCUMENTS, **tensors}, LENGTH, ((0, LENGTH),), ("a", "b"))
    context.split(part)
    q = batch["q"]
    torch.testing.assert_close(attend(q, q, q, PATTERN, shard=context.shard), expected(batch))


def test_a_context_that_knows_no_batch_refuses_a_shard():
    with pytest.raises(ValueError, match=r"context.attend\(q, k, v, pattern, documents=..., key_padding_mask=...\)"):
        _ = SequenceContext().shard


def own_masks(group):
    """The batch's own shard, made once, of the masks as they were split; a rank may look at it alone."""
    context, batch = made(group), batch_of()
    part = context.split(batch, {"q": 1})
    part["documents"].zero_()
    shard = context.shard
    if group.rank() == 0:
        assert context.shard is shard
    x = part["q"]
    torch.testing.assert_close(context.gather_sequence(attend(x, x, x, PATTERN, shard=shard)), expected(batch))


def test_a_batchs_shard_is_of_the_masks_as_they_were_split(pool):
    pool.run(2, own_masks)


def scaled(group):
    """`context.attend` with a scale and sinks, over ranks and in one process."""
    q, sinks = drawn(0, 2, LENGTH, 4, 8), drawn(1, 4)
    options = {"scale": 0.2, "sinks": sinks}
    reference = attend(q, q, q, PATTERN, documents=DOCUMENTS, key_padding_mask=HIDDEN, **options)
    for context in (SequenceContext(), made(group)):
        part = context.split({"q": q, "documents": DOCUMENTS, "hidden": HIDDEN}, {"q": 1, "hidden": 1})
        x, masks = part["q"], {"documents": part["documents"], "key_padding_mask": part["hidden"]}
        result = context.attend(x, x, x, PATTERN, **masks, **options)
        torch.testing.assert_close(context.gather_sequence(result), reference)


def test_attend_of_a_context_takes_scale_and_sinks(pool):
    pool.run(2, scaled)


def packed(group):
    """A layer that rotates by the places in documents, with documents that one rank changes in place."""
    torch.manual_seed(0)
    layer = DilatedSelfAttention(16, 4, PATTERN, dtype=torch.float64)
    context, x = made(group), drawn(0, 2, LENGTH, 16)
    documents = DOCUMENTS.clone()
    with torch.inference_mode():
        part = context.split({"x": x, "documents": documents}, {"x": 1})
        for step in range(2):
            if step:
                documents[:, -1] += 1
                if group.rank() == 1:
                    part["documents"][:, -1] += 1
            attach_context(layer, None)
            reference = layer(x, documents=documents)
            attach_context(layer, context)
            result = context.gather_sequence(layer(part["x"], documents=part["documents"]))
            torch.testing.assert_close(result, reference)


def test_documents_changed_in_place_move_the_rotation_too(pool):
    pool.run(2, packed)
