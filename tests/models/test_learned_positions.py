"""Positions that a LongNet learns: of whole sequences, of documents, and of parts over ranks."""

import pytest
import torch
import torch.distributed as dist
from contexts import made

from lightning_longnet import LongNet, LongNetConfig, Pattern, attach_context

PATTERN = Pattern.dilated((8, 64), (1, 2), is_causal=True)
DOCUMENTS = torch.arange(30).expand(2, 30) // torch.tensor([[11], [14]])


def model_of(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "dim": 16, "layers": 1, "heads": 2, "rotary": None, "learned_positions": 30}
    return LongNet(LongNetConfig(PATTERN, **{**shape, **changes})).double()


TOKENS = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))


def test_they_are_added_to_what_is_embedded():
    model = model_of()
    table = model.position_table.data
    model.position_table.data = torch.zeros_like(table)
    expected = model.head(model.encode(model.embedding(TOKENS) + table))
    model.position_table.data = table
    torch.testing.assert_close(model(TOKENS), expected)
    reversed_positions = torch.arange(30).flip(0)
    model.position_table.data = table.flip(0)
    torch.testing.assert_close(model(TOKENS, positions=reversed_positions), expected)
    assert not torch.allclose(model(TOKENS), expected)


def test_a_packed_row_is_each_document_alone():
    model = model_of()
    packed = model(TOKENS, documents=DOCUMENTS)
    for row in range(2):
        for which in DOCUMENTS[row].unique():
            here = DOCUMENTS[row] == which
            torch.testing.assert_close(packed[row : row + 1, here], model(TOKENS[row : row + 1, here]))


@pytest.mark.parametrize("rotary", [None, "rope"])
def test_rotations_may_stand_beside_them(rotary):
    model = model_of(rotary=rotary)
    positions = torch.arange(30).flip(0)
    assert not torch.allclose(model(TOKENS, positions=positions), model(TOKENS))


def parts(group, with_documents, placement):
    model = model_of()
    options = {"documents": DOCUMENTS} if with_documents else {}
    (model(TOKENS, **options) * torch.arange(11)).sum().backward()
    expected, best = model(TOKENS, **options), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    context = made(group, placement)
    attach_context(model, context)
    batch = context.split({"input_ids": TOKENS, **options})
    out = model(**batch)
    (out * torch.arange(11)).sum().backward()
    torch.testing.assert_close(context.gather_sequence(out.detach()), expected)
    for parameter, right in zip(model.parameters(), best, strict=True):
        dist.all_reduce(parameter.grad, group=group)
        torch.testing.assert_close(parameter.grad, right)


@pytest.mark.parametrize(("with_documents", "placement"), [(False, "zigzag"), (True, "contiguous")])
def test_ranks_add_those_of_their_own_tokens(pool, with_documents, placement):
    pool.run(3, parts, with_documents, placement)


def test_places_beyond_them_are_refused():
    longer = torch.zeros(1, 31, dtype=torch.long)
    with pytest.raises(ValueError, match="positions must be from 0 to learned_positions - 1, 29, got 30"):
        model_of()(longer)
    with pytest.raises(ValueError, match="positions must be from 0 to learned_positions - 1, 29, got -1"):
        model_of()(TOKENS, positions=torch.arange(30) - 1)
    with pytest.raises(ValueError, match="learned_positions must be a positive integer, got 0"):
        model_of(learned_positions=0)
