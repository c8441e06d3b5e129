"""A rank of a group that nobody has connected: layers are told of their part, and attention what it would leave.

Everything but attention over ranks runs as it is, on fake tensors.  That is an operator of its own, of which fake
tensors are told here what it returns: out, lse, and what it keeps of other ranks until the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention import operators
from lightning_longnet.attention.parallel import sharded
from lightning_longnet.attention.parallel.comm import Comm, Traffic
from lightning_longnet.attention.parallel.shard import SHARDS, SequenceShard, numbered
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.position import MeshPosition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.planning.job import Job

# Attention's own tensors beyond its results, in shares of one like q: measured by benchmarks/planner.py
FORWARD_SHARE = 0.5
BACKWARD_SHARE = 0.75


class Remote(NamedTuple):
    """What a call of attention has of other ranks: cells that are kept, cells of a round, or heads of all tokens."""

    kept_cells: int
    round_cells: int
    is_swap: bool


class Unconnected(Comm):
    """Nobody is at the other end: nothing is sent, and nothing fails."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.shard = rank, ranks, 0
        self.traffic, self.failure, self.on_failure = Traffic(), "", None


class PlannedShard(SequenceShard):
    """What a rank would know of the others; there is nobody to ask."""

    def __init__(self, placement: Placement, rank: int, remote: Mapping[str, Remote]) -> None:
        self.placement, self.rank, self.remote = placement, rank, remote
        self.cuts, self._borders, self.key_padding_mask = [(0, placement.length)], None, None
        self._made = {}
        self.comm = Unconnected(rank, placement.ranks)
        self.number = numbered(self)

    def check(self, call: Mapping[str, Any], beside: Mapping[str, Any] | None = None, fault: str = "") -> None:
        pass


class PlannedContext(SequenceContext):
    """That of a rank of a job, in the middle of a batch."""

    def __init__(self, job: Job, rank: int, remote: Mapping[str, Remote]) -> None:
        position = MeshPosition(job.shared_by, rank, job.groups)
        super().__init__(placement=job.placement, exchange=job.exchange, position=position)
        self.planned = PlannedShard(job.placed(), rank, remote)
        self.begin(job.tokens)

    def shard_of(self, documents: Tensor | None = None, key_padding_mask: Tensor | None = None) -> SequenceShard:
        assert documents is None
        assert key_padding_mask is None
        return self.planned


@sharded.forward.register_fake
def _results_like(
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
    planned, shown = SHARDS[shard], Pattern.loads(pattern)
    assert isinstance(planned, PlannedShard)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    remote = planned.remote[pattern]
    kept = [torch.empty((), dtype=torch.long)]
    apart = len(shown.branches) if mix == "detached" else 0
    if remote.is_swap:
        ranks, whole = planned.placement.ranks, planned.length
        kept += [x.new_empty((x.shape[0], whole, x.shape[2] // ranks, x.shape[3])) for x in (q, k, v)]
        traded = (q.shape[0], whole, q.shape[2] // ranks)
        kept.append(q.new_empty(traded, dtype=wide))
        kept += [q.new_empty((*traded, v.shape[3]), dtype=wide if apart else q.dtype) for _ in range(apart or 1)]
    else:
        if remote.kept_cells:
            kept.append(k.new_empty((remote.kept_cells, k.shape[0], k.shape[3] + v.shape[3])))
        kept += [q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide) for _ in range(apart)]
    return out, lse, kept


@sharded.backward.register_fake
def _gradients_like(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _forward_workspace(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    wide = torch.promote_types(q.dtype, torch.float32).itemsize
    accumulated = q.numel() // q.shape[3] * (v.shape[3] * (q.element_size() < wide) + 1) * wide
    return int(accumulated + FORWARD_SHARE * _bytes(q, wide))


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    wide = torch.promote_types(q.dtype, torch.float32).itemsize
    gradients = sum(x.numel() for x in (q, k, v)) * wide if q.element_size() < wide else 0
    return int(gradients + BACKWARD_SHARE * _bytes(q, wide))


def _remote_forward(q: Tensor, k: Tensor, v: Tensor, seed: Any, shard: int, pattern: str, *rest: Any) -> int:
    return _forward_workspace(q, k, v) + _traveling(q, k, v, shard, pattern, is_backward=False)


def _remote_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, kept: Any, seed: Any,
                     shard: int, pattern: str, *rest: Any) -> int:  # fmt: skip
    return _backward_workspace(grad, q, k, v) + _traveling(q, k, v, shard, pattern, is_backward=True)


def _traveling(q: Tensor, k: Tensor, v: Tensor, shard: int, pattern: str, *, is_backward: bool) -> int:
    """What is on its way, in both directions, while a call runs."""
    planned = SHARDS[shard]
    assert isinstance(planned, PlannedShard)
    remote, wide = planned.remote[pattern], torch.promote_types(q.dtype, torch.float32).itemsize
    if remote.is_swap:
        # what is sent and what comes, and the wide gradients of the heads that are here
        here = planned.length * q.shape[0] // planned.placement.ranks
        own = here * (q.shape[2] * q.shape[3] + k.shape[2] * (k.shape[3] + v.shape[3]))
        return own * (2 * q.element_size() + (wide if is_backward else 0))
    cell = q.shape[0] * (k.shape[3] + v.shape[3])
    narrow = (2 * remote.round_cells + (0 if is_backward else remote.kept_cells)) * q.element_size()
    return cell * (narrow + (2 * (remote.kept_cells + remote.round_cells) * wide if is_backward else 0))


def _bytes(x: Tensor, itemsize: int) -> int:
    return x.numel() * itemsize


WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.lightning_longnet.attend.default: _forward_workspace,
    torch.ops.lightning_longnet.attend_backward.default: _backward_workspace,
    torch.ops.lightning_longnet.attend_sharded.default: _remote_forward,
    torch.ops.lightning_longnet.attend_sharded_backward.default: _remote_backward,
}
assert operators.forward is not None  # which registers the first two
