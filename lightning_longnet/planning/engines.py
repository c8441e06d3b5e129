"""The memory of each engine beside a step's own tensors: parameters, gradients, optimizer states and its buffers.

The constants are those of the engines' code, and what the profiler showed (benchmarks/planner.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.models.longnet import LongNet
from lightning_longnet.planning.flops import Flops, ModelFlops

if TYPE_CHECKING:
    from lightning_longnet.planning.job import Job

# How many blocks' gradients and gathered parameters FSDP2 still holds after their use: on CPUs 1 to 10
LINGERING_BLOCKS = 2.5
# How many blocks are whole at once in FSDP2's backward: the one that runs, the next, and the gradients of both
WHOLE_BLOCKS = 4.0
# DeepSpeed's stage3_max_live_parameters, as Lightning leaves it
LIVE_NUMBERS = 10**9
# The temporary tensors of DeepSpeed's step, in copies of the parameters: stages 1 and 2, and stage 3
STEP_COPIES, STEP_COPIES_SPLIT = 2.0, 1.4


class Weights(NamedTuple):
    """The bytes of a model's parameters: all, a block's, those outside of the blocks, and the largest.

    `parameters` counts their numbers; `token` counts the operations of linear maps for a token.
    """

    all: int
    block: int
    root: int
    largest: int
    parameters: int
    token: Flops

    @classmethod
    def of(cls, job: Job) -> Weights:
        """Return those of a job's model, which is made on the meta device."""
        with torch.device("meta"):
            model = LongNet(job.config)
        counts = [p.numel() for p in model.parameters()]
        width, many = job.parameter_dtype.itemsize, sum(counts)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        root = width * (many - sum(blocks))
        return cls(width * many, width * max(blocks), root, width * max(counts), many, ModelFlops.of(model).token)


class Held(NamedTuple):
    """The bytes of one kind of tensor on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float


class Engine(NamedTuple):
    """The engine of a job: what a rank holds in the forward, in the backward and in the optimizer's step."""

    job: Job
    weights: Weights

    @property
    def splits(self) -> int:
        """The number of ranks that the model is split over; 1 where it is not."""
        if self.job.sharding == "ddp":
            return 1
        return self.job.shared_by if self.job.sharding == "hsdp" else self.job.ranks

    def forward(self) -> Held:
        """Return what is held in the forward; the gradients of the step before are kept until the backward begins."""
        all_, part = self.weights.all, self.weights.all / self.splits
        states = self.job.optimizer_copies
        kind = self.job.sharding
        if kind == "ddp":
            return Held(all_, all_, states * all_, all_)
        if kind in ("fsdp2", "hsdp"):
            gathered = self.weights.root + (self.weights.block if self.splits > 1 else 0)
            return Held(part + gathered, part, states * part, self._lingering())
        if kind == "fsdp2_offload":
            return Held(self.weights.root + 2 * self.weights.block, 0, 0, self._lingering())
        if kind == "deepspeed_stage_3":
            late = self.weights.root + 2 * self.weights.block if self.splits > 1 else 0
            return Held(2 * part + self._live(), part, states * part, self._bucket() + late)
        if kind == "deepspeed_stage_3_offload":
            return Held(self._live(), 0, 0, self._bucket())
        return Held(all_ + part, 0, states * part, 0)

    def backward(self, done: float) -> Held:
        """Return what is held in a backward that has computed gradients of `done` bytes.

        With accumulated micro-batches the gradients of earlier ones are held from the start.
        """
        all_, part = self.weights.all, self.weights.all / self.splits
        many = self.job.accumulate > 1
        before, kind = self.forward(), self.job.sharding
        if kind == "ddp":
            return before._replace(gradients=all_ + self.weights.largest if many else done)
        if kind in ("fsdp2", "hsdp", "fsdp2_offload"):
            whole = WHOLE_BLOCKS / 2 * self.weights.block if self.splits > 1 else 0
            here = 0.0 if kind == "fsdp2_offload" else part if many else done / self.splits
            return before._replace(gradients=here, buffers=whole + before.buffers)
        if kind.startswith("deepspeed_stage_3"):
            return before._replace(buffers=before.buffers + self._bucket())
        # two buckets: one is reduced while the other is filled
        arrived = done if kind == "deepspeed_stage_1" else done / self.splits
        return before._replace(gradients=part if many else arrived, buffers=2 * self._bucket())

    def step(self) -> Held:
        """Return what is held in the optimizer's step."""
        before, kind = self.forward(), self.job.sharding
        part = self.weights.all / self.splits
        if kind.startswith("deepspeed_stage_3"):
            return before._replace(buffers=self._bucket() + STEP_COPIES_SPLIT * part)
        if kind.startswith("deepspeed"):
            return before._replace(buffers=STEP_COPIES * self.weights.all)
        # a foreach step on a GPU takes square roots of all states at once
        extra = part if kind != "fsdp2_offload" else 0.0
        return before._replace(parameters=part, buffers=before.buffers + extra)

    def _lingering(self) -> float:
        return LINGERING_BLOCKS * self.weights.block if self.splits > 1 else 0.0

    def _live(self) -> float:
        """Return the bytes of gathered parameters, which DeepSpeed keeps while they are fewer than `LIVE_NUMBERS`."""
        return min(self.weights.all, LIVE_NUMBERS * self.job.parameter_dtype.itemsize)

    def _bucket(self) -> int:
        return self.job.bucket * self.job.parameter_dtype.itemsize
