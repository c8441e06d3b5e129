"""Whole training steps: a plain GPT as nanoGPT writes it, LongNets of its size, and one LongNet over two ranks.

The plain model has the blocks of nanoGPT (LayerNorm, fused projection, torch's attention, GELU) with rotary positions,
of two halves of a head and with tables that are kept.  A LongNet of the same widths has rotary positions and no further
norms.  Both train with AdamW on the same tokens.
"""

from __future__ import annotations

import statistics
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longnet import LongNet, LongNetConfig, SequenceContext, attach_context, sequence_mesh

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_longnet import Pattern

# the widths of nanoGPT's model of characters, with two of its six layers
DIM, HEADS, LAYERS, VOCABULARY = 384, 6, 2, 256


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.first, self.second = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(self.first_norm(x)).split(DIM, dim=2)
        q, k, v = (y.view(batch, tokens, HEADS, DIM // HEADS).transpose(1, 2) for y in parts)
        q, k = (_rotated(y, cos, sin) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, tokens, DIM))
        out: Tensor = x + self.second(F.gelu(self.first(self.second_norm(x))))
        return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class PlainGPT(nn.Module):
    """A GPT whose head shares the weight of the embedding; it returns the mean loss."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(DIM)
        half = torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS)
        angles = torch.outer(torch.arange(tokens), 10000.0**-half)
        self.tables = angles.cos(), angles.sin()

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text[:, :-1])
        for block in self.blocks:
            x = block(x, *self.tables)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def longnet(pattern: Pattern) -> LongNet:
    config = LongNetConfig(pattern, dim=DIM, heads=HEADS, layers=LAYERS, vocab_size=VOCABULARY, sub_norm=False)
    return LongNet(config)


def plain_step(tokens: int) -> Callable[[], None]:
    """Return a function that trains a plain GPT for a step."""
    model = PlainGPT(tokens)
    optimizer, text = torch.optim.AdamW(model.parameters(), 1e-4), _text(tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(text).backward()
        optimizer.step()

    return step


def longnet_step(pattern: Pattern, tokens: int, context: SequenceContext | None = None) -> Callable[[], None]:
    """Return a function that trains a LongNet for a step, on the ranks of a context where there is one."""
    torch.manual_seed(0)  # all ranks begin with the same parameters
    model = longnet(pattern)
    attach_context(model, context)
    optimizer, text = torch.optim.AdamW(model.parameters(), 1e-4), _text(tokens)
    batch, numbers = {"input_ids": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}, count()

    def step() -> None:
        optimizer.zero_grad()
        part = batch
        if context is not None:
            part = context.split(dict(batch))
            context.begin_step(next(numbers))
        loss_sum, many = model(part["input_ids"], part["labels"])
        loss = loss_sum / many if context is None else context.token_mean(loss_sum, many)
        loss.backward()
        if context is not None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()

    return step


def _text(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens + 1), generator=torch.Generator().manual_seed(0))


def over_one_rank(pattern: Pattern, tokens: int, rounds: int) -> float:
    """Return the median ratio of the seconds of a step on all ranks over those on rank 0, while the others wait."""
    dist.init_process_group("gloo")
    whole = longnet_step(pattern, tokens)
    split = longnet_step(pattern, tokens, SequenceContext(sequence_mesh(dist.get_world_size(), "cpu")))
    ratios = []
    for _ in range(1 + rounds):  # the first one warms up
        seconds = []
        for run in (split, whole):
            dist.barrier()
            begin = perf_counter()
            if run is split or dist.get_rank() == 0:
                run()
            dist.barrier()
            seconds.append(perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])
