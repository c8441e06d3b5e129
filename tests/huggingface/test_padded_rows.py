"""Rows with padding and packed rows give in transformers what plain rows give."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoders import KINDS, LENGTHS, MASKS, decoder, scattered, tokens
from tiers import tiered

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:(Nothing crosses|In the branch)"
)


@pytest.mark.parametrize("side", tiered(MASKS, quick=["left"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_padding_equals_the_row_without(kind, side):
    model, mask = decoder(kind), torch.tensor(MASKS[side])
    rows = [tokens(3, 30)[i, : sum(each)] for i, each in enumerate(mask)]
    ids = scattered(rows, mask)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # as `generate` has them
    for given in (None, positions):
        result = model(ids, mask, given, output_hidden_states=True)
        for i, row in enumerate(rows):
            expected = model(row[None], output_hidden_states=True)
            torch.testing.assert_close(result.logits[i, mask[i] == 1], expected.logits[0], rtol=1e-12, atol=1e-12)
            for one, other in zip(result.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(one[i, mask[i] == 1], other[0], rtol=1e-12, atol=1e-12)
        assert not result.logits[mask == 0].any()
    # the loss of transformers is computed in float32
    if side != "within":
        expected = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / (57 - 3)
        torch.testing.assert_close(model(ids, mask, labels=labels).loss, expected, rtol=1e-5, atol=0)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        result = model(ids, mask, labels=labels, shift_labels=shifted).loss
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pad", [(10, 0), (0, 10)])
def test_padding_takes_no_learned_positions(pad):
    model, ids = decoder("learned"), tokens(2, 30)  # 30 positions are learned
    mask = F.pad(torch.ones_like(ids), pad)
    result = model(F.pad(ids, pad), mask).logits[mask == 1].view(2, 30, -1)
    torch.testing.assert_close(result, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_padding_changes_no_gradient():
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    (model(scattered(rows, mask), mask).logits[mask == 1] ** 2).sum().backward()
    result = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    sum((model(row[None]).logits ** 2).sum() for row in rows).backward()
    for one, parameter in zip(result, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", tiered(["none", "left", "right"], quick=["left"]))
def test_documents_that_share_a_row_equal_each_alone(kind, side):
    model, row = decoder(kind), tokens(1, 30)[0]
    pieces = row.split([11, 3, 1, 15])
    index = torch.cat([torch.arange(len(piece)) for piece in pieces])
    ids, positions, mask = row[None].repeat(2, 1), torch.stack([index, torch.arange(30)]), None
    if side != "none":
        pad = (5, 0) if side == "left" else (0, 5)
        mask = F.pad(torch.ones_like(ids), pad)
        ids, positions = F.pad(ids, pad), F.pad(positions, pad, value=1)
        if kind in ("learned", "xpos"):  # rows that are longer than the learned positions hold shorter documents
            ids, positions, mask = ids[:1], positions[:1], mask[:1]
    result = model(ids, mask, positions).logits
    result = result if mask is None else result[mask == 1].view(len(ids), 30, -1)
    expected = torch.cat([model(piece[None]).logits[0] for piece in pieces])
    torch.testing.assert_close(result[0], expected, rtol=1e-12, atol=1e-12)
    if len(result) > 1:
        torch.testing.assert_close(result[1], model(row[None]).logits[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(row[None]).logits[0], expected, atol=1e-3)


class DocumentMean(torch.nn.Module):
    """An attention layer that reads what follows a token in its document, too."""

    def __init__(self, dim, heads, pattern):
        super().__init__()

    def forward(self, x, *, positions=None, documents=None, key_padding_mask=None):
        documents = torch.zeros(x.shape[:2]) if documents is None else documents
        same = (documents[:, None] == documents[:, :, None]).to(x.dtype)
        return same @ x / same.sum(2, keepdim=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_that_read_what_follows_a_token_do_not_read_padding(side, monkeypatch):
    monkeypatch.setitem(sys.modules, "document_mean", SimpleNamespace(DocumentMean=DocumentMean))
    model = decoder(attention={"class_path": "document_mean.DocumentMean"}, kv_heads=None)
    mask, ids = torch.tensor(MASKS[side]), tokens(3, 30)
    result = model(ids, mask).logits
    for i in range(3):
        expected = model(ids[i : i + 1, mask[i] == 1]).logits[0]
        torch.testing.assert_close(result[i, mask[i] == 1], expected, rtol=1e-12, atol=1e-12)


def test_the_rows_of_the_flattening_collator_are_documents():
    from transformers import DataCollatorWithFlattening

    model, rows = decoder(), tokens(1, 30)[0].split([11, 4, 15])
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    expected = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / 27
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=0)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row.tolist()} for row in rows])
    with pytest.raises(ValueError, match="cu_seq_lens_q is no argument of a LongNet: give position_ids that restart"):
        model(**batch)
