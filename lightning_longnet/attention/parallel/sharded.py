"""Attention over a sequence that is split over ranks: one autograd.Function over the exchanges."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.blocks import Terms
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.parallel import all_to_all, rounds
from lightning_longnet.attention.parallel.comm import Errand
from lightning_longnet.attention.parallel.routes import Layout, head_parts, route
from lightning_longnet.attention.parallel.schedule import Sizes, schedule
from lightning_longnet.attention.parallel.shard import SHARDS
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.plan.lattice import joined, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.parallel.shard import SequenceShard


class Settings(NamedTuple):
    """What a call is told beside its tensors."""

    shard: SequenceShard
    pattern: Pattern
    scale: float
    dropout: float
    seed: Tensor | None
    first_sample: int
    sample_step: int
    kernel: str
    mix: str
    exchange: str
    wants_lse: bool

    @property
    def branches(self) -> int:
        """How many partials are kept apart."""
        return len(self.pattern.branches) if self.mix == "detached" else 1


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor, settings: Settings, is_seed_given: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's tokens; all ranks of the shard call it together.

    A compiled graph is broken here: what is kept for the backward has shapes that no schema tells.
    """
    # a seed is another one in every step, and of ranks that draw their own each has its own
    seed = {"dropout_seed": int(settings.seed)} if is_seed_given and settings.seed is not None else {}
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    beside = {"presence of a dropout_seed": bool(seed), "presence of a gradient": has_gradient}
    settings.shard.check(_kind(q, k, v, settings) | beside, seed)
    out, lse = _ShardedAttention.apply(q, k, v, settings)  # type: ignore[no-untyped-call]
    return out, lse


@torch.library.custom_op("lightning_longnet::attend_sharded", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    shard: int,
    pattern: str,
    scale: float,
    dropout: float,
    first_sample: int,
    sample_step: int,
    kernel: str,
    mix: str,
    exchange: str,
    wants_lse: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Out, lse, and what the backward is to be given besides."""
    told = scale, dropout, seed, first_sample, sample_step, kernel, mix, exchange, wants_lse
    settings = Settings(SHARDS[shard], Pattern.loads(pattern), *told)
    if not q.shape[0] * settings.shard.length:  # on all ranks, which others wait for where it is on some only
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros((len(q), q.shape[2], q.shape[1]), dtype=wide), []
    number, found = torch.tensor(settings.shard.calls), []
    call = f"forward of {settings.shard.call_of(settings.shard.calls)}"
    # autocast would round the products
    with settings.shard.comm.finished(call), torch.autocast(q.device.type, enabled=False):
        q, k, v = (readable(x) for x in (q, k, v))
        for rows, each in list(_groups(settings, call, q, k, v)):
            found.append(each.forward(q[rows], k[rows], v[rows], settings.branches))
        out, lse = joined([(each[0], each[1]) for each in found])
    # the backward goes by the number of its forward: ranks need not do theirs in one order to know whose messages come
    return out, lse, [number, *(tensor for *_, kept in found for tensor in kept)]


@torch.library.custom_op("lightning_longnet::attend_sharded_backward", mutates_args=())
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    seed: Tensor | None,
    shard: int,
    pattern: str,
    scale: float,
    dropout: float,
    first_sample: int,
    sample_step: int,
    kernel: str,
    mix: str,
    exchange: str,
    wants_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    told = scale, dropout, seed, first_sample, sample_step, kernel, mix, exchange, wants_lse
    settings = Settings(SHARDS[shard], Pattern.loads(pattern), *told)
    if not kept:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    call, found, first = f"backward of {settings.shard.call_of(int(kept[0]))}", [], 1
    with settings.shard.comm.finished(call), torch.autocast(q.device.type, enabled=False):
        grad, q, k, v, out = (readable(x) for x in (grad, q, k, v, out))
        for rows, each in list(_groups(settings, call, q, k, v)):
            last = first + each.kept(settings.branches)
            found.append(each.backward(grad[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], kept[first:last]))
            first = last
        dq, dk, dv = joined(found)
    return dq, dk, dv


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        shard, pattern, scale, dropout, seed, *words = settings
        told = seed, shard.number, pattern.dumps(), scale, dropout, *words
        out, lse, kept = forward(q, k, v, *told)
        ctx.save_for_backward(q, k, v, out, lse, seed, *kept)
        ctx.told, ctx.shard, ctx.on_failure = told[1:], shard, shard.comm.on_failure
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, seed, *kept = ctx.saved_tensors
        with ctx.shard.comm.heard(ctx.on_failure):
            return *backward(grad, q, k, v, out, lse, kept, seed, *ctx.told), None


def _kind(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> dict[str, Any]:
    """What all ranks must call with; what each has of its own, as the number of its tokens, is not in it."""
    return {
        "batch": q.shape[0],
        "heads of q": q.shape[2],
        "heads of k": k.shape[2],
        "head_dim": q.shape[3],
        "width of v": v.shape[3],
        "dtype": str(q.dtype),
        "pattern": settings.pattern.dumps(),
        "exchange": settings.exchange,
        "mix": settings.mix,
        "return_lse": settings.wants_lse,
        "kernel": settings.kernel,
        "scale": settings.scale,
        "dropout": settings.dropout,
        "dropout_samples": (settings.first_sample, settings.sample_step) if settings.dropout else None,
    }


def _groups(
    settings: Settings, call: str, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, rounds.Rounds | all_to_all.Swap]]:
    """Samples that follow one another with the same documents, and how their keys are exchanged."""
    shard, kernel = settings.shard, BLOCK_KERNELS[settings.kernel]
    dropout = None
    if settings.seed is not None:
        dropout = Dropout(settings.dropout, int(settings.seed), settings.first_sample, settings.sample_step)
    # the copies of a pair in several branches are dropped one by one
    apart = settings.mix == "detached" or not kernel.takes_weights(q) or dropout is not None
    cuts = shard.cuts * (q.shape[0] if len(shard.cuts) == 1 else 1)
    first, kind = 0, str(_kind(q, k, v, settings))
    for each, group in groupby(cuts):
        last = first + len(list(group))
        rows = slice(first, last)
        errand = Errand(f"{call}, samples {first} to {last - 1}", kind)
        distinct = 0 if apart else -(-shard.threads // (last - first))
        layout = Layout(settings.pattern, q.shape[2], k.shape[2], each, shard.placement)
        wide = torch.promote_types(q.dtype, torch.float32)
        sizes = Sizes(last - first, q.shape[3], v.shape[3], q.element_size(), wide.itemsize)
        # looked up by the row, which stands for its documents
        told = settings.pattern, q.shape[2], k.shape[2], first if len(shard.cuts) > 1 else 0
        chosen = shard.once((*told, settings.exchange, sizes), partial(schedule, layout, settings.exchange, sizes))
        shard.comm.traffic.note(call.startswith("backward"), layout, chosen.exchanges, sizes)
        layout = layout._replace(distinct=distinct)
        heads = k.shape[2] // shard.placement.ranks
        tokens = (torch.arange(shard.length) if chosen.is_swap else shard.tokens()).to(q.device)
        terms = Terms(
            settings.scale,
            shard.hidden(tokens, rows),
            dropout,
            rows=torch.arange(first, last, device=q.device),
            tokens=tokens,
            first_head=shard.rank * heads * (q.shape[2] // k.shape[2]) if chosen.is_swap else 0,
            counts_once=settings.pattern.multiplicity == "set",
        )
        if chosen.is_swap:
            own = range(shard.rank * heads, (shard.rank + 1) * heads)
            parts = shard.once((*told, distinct), partial(head_parts, layout, own))
            yield rows, all_to_all.Swap(shard.comm, errand, shard.placement, parts, terms, kernel, settings.wants_lse)
        else:
            key = *told, distinct, chosen.exchanges
            own_route = shard.once(key, partial(route, layout, shard.rank, chosen.exchanges))
            hidden = partial(shard.hidden, rows=rows)
            yield rows, rounds.Rounds(shard.comm, errand, own_route, terms, kernel, shard.tokens, hidden)
        first = last
