"""The comparison of each exchange with one process, forward and backward, on a few small patterns."""

from __future__ import annotations

from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.attention import Pattern, SequenceShard, attend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lightning_longnet.attention.parallel.schedule import Exchange

EXCHANGES: tuple[Exchange, ...] = ("gather", "ring", "swap", "local")
_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4}  # rounding is far less, and a wrong key far more
SWAPPED = 64  # ranks up to which swap is checked: it needs a key head for each
_WIDTH = 8
_DENSE = 2**24  # scores of all heads up to which the reference holds them at once


class Finding(NamedTuple):
    """The result of checking one exchange on a rank.

    Attributes:
        exchange: its name.
        patterns: how many patterns were computed with it.
        error: the largest error of outputs and gradients, relative to the largest value, or to 1 if that is less.
        allowed: the largest error that is taken for rounding.
        seconds: the time of this rank.
    """

    exchange: str
    patterns: int
    error: float
    allowed: float
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether the error is within rounding."""
        return self.error <= self.allowed  # NaN is no smaller than anything


def check_exchanges(
    group: dist.ProcessGroup, device: torch.device, begin: Callable[[str], object]
) -> Iterator[Finding]:
    """Yield the finding of each exchange: its results on this rank, compared with those of one process.

    All ranks of the group call it together, as the processes of `lightning_longnet.diagnosis.rank` do.

    Args:
        group: the ranks.
        device: the device on which this rank computes, in float64 unless it is MPS, which has no float64.
        begin: called with the name of each exchange before it runs.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for exchange in EXCHANGES:
        begin(exchange)
        cases = _cases(exchange, dist.get_world_size(group))
        if not cases:
            continue
        errors, seconds = [], 0.0
        for case in cases:
            error, spent = _compare(group, exchange, case, device, dtype)
            errors.append(error)
            seconds += spent
        largest = float("nan") if any(error != error for error in errors) else max(errors)
        yield Finding(exchange, len(cases), largest, _ALLOWED[dtype], seconds)


class _Case(NamedTuple):
    """A call of `attend` over ranks; `lengths` are the numbers of tokens that the ranks hold."""

    pattern: Pattern
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    has_documents: bool = False


def _cases(exchange: Exchange, ranks: int) -> list[_Case]:
    """Return the calls that are checked for an exchange; none for "swap" on too many ranks.

    The ranks hold different numbers of tokens, and the patterns have keys on other ranks, except for "local".
    """
    if exchange == "local":  # segments that end where ranks do
        lengths = tuple(16 + 16 * (rank % 2) for rank in range(ranks))
        patterns = [
            Pattern.dilated((8, 16), (1, 2), is_causal=True),
            Pattern.dilated((16,), (4,)),
            Pattern.dilated((16,), (1,), is_causal=True),
        ]
        return [_Case(pattern, lengths, 4, 2) for pattern in patterns]
    if exchange == "swap" and ranks > SWAPPED:
        return []
    lengths = tuple(9 + 4 * (rank % 3) for rank in range(ranks))
    heads, kv_heads = (2 * ranks, ranks) if exchange == "swap" else (4, 2)  # swap deals key heads out to the ranks
    whole = sum(lengths)
    return [
        _Case(Pattern.dilated((8, 24, whole), (1, 2, 4), is_causal=True), lengths, heads, kv_heads),
        _Case(Pattern.window(11) + Pattern.dilated((whole,), (3,)), lengths, heads, kv_heads, has_documents=True),
        _Case(Pattern.dense(is_causal=True), lengths, heads, kv_heads),
    ]


def _compare(
    group: dist.ProcessGroup, exchange: Exchange, case: _Case, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return (largest relative error of out, dq, dk and dv of this rank's tokens, seconds of the call over ranks)."""
    pattern, lengths, heads, kv_heads, has_documents = case
    rank, whole = dist.get_rank(group), sum(lengths)
    generator = torch.Generator().manual_seed(whole)  # on the CPU: all ranks draw the same
    drawn = [
        torch.randn(1, whole, each, _WIDTH, generator=generator, dtype=torch.float64) for each in (heads, kv_heads)
    ]
    drawn.append(torch.randn(1, whole, kv_heads, _WIDTH, generator=generator, dtype=torch.float64))
    grad = torch.randn(1, whole, heads, _WIDTH, generator=generator, dtype=torch.float64)
    documents = (torch.arange(whole) * 3 // whole) if has_documents else None
    end = [*accumulate(lengths)][rank]
    own = slice(end - lengths[rank], end)
    q, k, v = (x[:, own].to(device, dtype).requires_grad_() for x in drawn)
    begin = perf_counter()
    shard = SequenceShard(group, lengths[rank], documents=None if documents is None else documents[own])
    out = attend(q, k, v, pattern, shard=shard, exchange=exchange)
    results = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad[:, own].to(device, dtype))]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = perf_counter() - begin
    truth = _one_process(drawn, grad, pattern, documents)
    scale = [max(1.0, x.abs().max().item()) for x in truth]
    errors = [
        (result.cpu().double() - x[:, own]).abs().max().item() / most
        for result, x, most in zip(results, truth, scale, strict=True)
    ]
    return (float("nan") if any(error != error for error in errors) else max(errors)), seconds


def _one_process(drawn: list[Tensor], grad: Tensor, pattern: Pattern, documents: Tensor | None) -> list[Tensor]:
    """Return out, dq, dk and dv of whole sequences by plain products on the CPU, in float64.

    Args:
        drawn: q (1, N, H, D), k and v (1, N, Hkv, D).
        grad: the gradient of out, in its shape.
        pattern: the pattern.
        documents: (N,), or None.
    """
    q, k, v = (x.clone().requires_grad_() for x in drawn)
    kernel = "reference" if q.shape[2] * q.shape[1] ** 2 <= _DENSE else "eager"
    out = attend(q, k, v, pattern, documents=documents, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
