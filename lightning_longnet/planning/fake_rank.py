"""A rank whose group nobody has connected: layers get their part of the tokens, and attention its memory.

A planned step runs on fake tensors.  Attention over ranks is one operator there, whose fake asks the shard for what a
call keeps of other ranks' rows; `WORKSPACE` adds what the operator holds while it runs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention import op
from lightning_longnet.attention.parallel.comm import Comm, Traffic
from lightning_longnet.attention.parallel.shard import SHARDS, SequenceShard, register_shard
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.position import MeshPosition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import Footprint
    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.planning.job import Job

# The memory of attention's own tensors beyond its results, as a share of a tensor like q: measured by
# benchmarks/planner.py
FORWARD_SHARE = 0.5
BACKWARD_SHARE = 0.75


class FakeComm(Comm):
    """The messages of a rank without peers: nothing is sent, and nothing fails."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.shard = rank, ranks, 0
        self.traffic, self.failure = Traffic(), ""


class PlannedShard(SequenceShard):
    """A shard that knows the memory of its calls by their patterns, and compares nothing with other ranks."""

    def __init__(self, placement: Placement, rank: int, footprints: Mapping[str, Footprint]) -> None:
        self.placement, self.rank, self.footprints = placement, rank, footprints
        self.cuts, self._borders, self.key_padding_mask = [(0, placement.length)], None, None
        self._cache = {}
        self.comm = FakeComm(rank, placement.ranks)
        self.number = register_shard(self)

    def check(self, call: Mapping[str, Any], extra: Mapping[str, Any] | None = None, fault: str = "") -> None:
        """Compare nothing."""

    def saves_inputs(self, spec: str) -> bool:
        return self.footprint(AttentionSpec.loads(spec)).saves_inputs

    def footprint(self, spec: AttentionSpec) -> Footprint:
        return self.footprints[spec.pattern.dumps()]


class PlannedContext(SequenceContext):
    """The context of a rank of a job in the middle of a batch."""

    def __init__(self, job: Job, rank: int, footprints: Mapping[str, Footprint]) -> None:
        position = MeshPosition(job.shared_by, rank, job.groups)
        super().__init__(placement=job.placement_choice.placement, exchange=job.exchange, position=position)
        self.planned = PlannedShard(job.placed(), rank, footprints)
        self.begin(job.tokens)
        self.begin_step(0)

    def random_part(self, device: torch.device, is_part: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def shard_of(self, documents: Tensor | None = None, key_padding_mask: Tensor | None = None) -> SequenceShard:
        assert documents is None
        assert key_padding_mask is None
        return self.planned


def _forward_workspace(
    q: Tensor, k: Tensor, v: Tensor, sinks: Any, documents: Any, padding: Any, seed: Any, spec: str, shard: int | None
) -> int:
    """Return the bytes that the forward holds while it runs, beyond its results."""
    wide = torch.promote_types(q.dtype, torch.float32).itemsize
    accumulated = q.numel() // q.shape[3] * (v.shape[3] * (q.element_size() < wide) + 1) * wide
    return int(accumulated + FORWARD_SHARE * q.numel() * wide) + _in_flight(q, k, v, spec, shard, is_backward=False)


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    """Return the bytes that the backward holds while it runs, beyond the gradients in the type of q."""
    *_, spec, shard = others
    wide = torch.promote_types(q.dtype, torch.float32).itemsize
    gradients = sum(x.numel() for x in (q, k, v)) * wide if q.element_size() < wide else 0
    return int(gradients + BACKWARD_SHARE * q.numel() * wide) + _in_flight(q, k, v, spec, shard, is_backward=True)


def _in_flight(q: Tensor, k: Tensor, v: Tensor, spec: str, shard: int | None, *, is_backward: bool) -> int:
    if shard is None:
        return 0
    footprint = SHARDS[shard].footprint(AttentionSpec.loads(spec))
    return footprint.in_flight_bytes(q, k, v, is_backward=is_backward)


WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.lightning_longnet.attend.default: _forward_workspace,
    torch.ops.lightning_longnet.attend_backward.default: _backward_workspace,
}
assert op.forward is not None  # the import registers the operators
