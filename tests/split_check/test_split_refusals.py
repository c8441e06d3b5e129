"""The split check of models of transformers: what to write is named, and refusals are the error themselves."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lightning_longnet import SequenceContext, sequence_context, sequence_mesh
from lightning_longnet.split_check import SplitMismatch, check_split

VOCABULARY = 23


class Decoder(torch.nn.Module):
    def __init__(self, attention, gives_positions):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=VOCABULARY, **small, attn_implementation=attention)
        self.net, self.gives_positions = LlamaForCausalLM(config), gives_positions

    def step(self, batch):
        ids, context = batch["input_ids"], sequence_context(self)
        return self.loss(batch, context.positions_of(ids)[None] if self.gives_positions else None)

    def packed_step(self, batch):
        return self.loss(batch, batch["position_ids"])

    def loss(self, batch, positions):
        ids, context = batch["input_ids"], sequence_context(self)
        logits = self.net(input_ids=ids, position_ids=positions, use_cache=False).logits
        summed = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return context.token_mean(summed, ids.numel())


def checked(rank, world, attention, gives_positions):
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    context = SequenceContext(sequence_mesh(2, "cpu", 60))
    ids = torch.randint(VOCABULARY, (2, 65), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    torch.manual_seed(0)
    return check_split(Decoder(attention, gives_positions), lambda copy, part: copy.step(part), batch, context).kind


def test_attention_of_transformers_must_be_ring(trainers):
    for is_result, value in trainers.outcomes(2, checked, "sdpa", True):
        assert not is_result
        assert value[0] is SplitMismatch
        assert "self_attn (LlamaAttention) is the first that gets the same and computes something else" in value[1]
        assert 'load the model with attn_implementation="ring"' in value[1]


@pytest.mark.parametrize("gives_positions", [False, True])
def test_a_refusal_of_parts_is_the_error_on_all_ranks(trainers, gives_positions):
    outcomes = trainers.outcomes(2, checked, "ring", gives_positions)
    if gives_positions:
        assert outcomes == [(True, "equal")] * 2
        return
    for is_result, value in outcomes:
        assert not is_result
        assert value[0] is ValueError
        assert value[1].startswith("position_ids must be those of the whole sequence")


def checked_packed(rank, world, length):
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    context = SequenceContext(sequence_mesh(2, "cpu", 60))
    ids = torch.randint(VOCABULARY, (1, 8195), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length), torch.arange(8194 - length)])[None]
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}
    torch.manual_seed(0)
    return check_split(Decoder("ring", False), lambda copy, part: copy.packed_step(part), batch, context).kind


@pytest.mark.long
def test_documents_that_begin_where_a_part_of_the_sample_does(trainers):
    assert trainers.outcomes(2, checked_packed, 64) == [(True, "not checked")] * 2  # of 129 tokens rank 0 has 64
    assert trainers.outcomes(2, checked_packed, 65) == [(True, "equal")] * 2
