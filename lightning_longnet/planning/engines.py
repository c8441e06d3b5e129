"""What each engine holds beside a step's own tensors: parameters, gradients, the optimiser's states, and its buffers.

Constants are of the engines' own code, and of what the profiler showed of them (benchmarks/planner.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.models.longnet import LongNet
from lightning_longnet.planning.flops import Flops, ModelFlops

if TYPE_CHECKING:
    from lightning_longnet.planning.job import Job

# Blocks whose gradients and gathered parameters FSDP2 still holds when it no longer needs them: on CPUs 1 to 10
LINGERING_BLOCKS = 2.5
# Blocks that are whole at once in FSDP2's backward: the one that runs, the next, and the gradients of both
WHOLE_BLOCKS = 4.0
# DeepSpeed's stage3_max_live_parameters, as Lightning leaves it
LIVE_NUMBERS = 10**9
# What DeepSpeed's own step makes for a moment, in copies of the parameters: stages 1 and 2, and stage 3
STEP_COPIES, STEP_COPIES_SPLIT = 2.0, 1.4


class Weights(NamedTuple):
    """Bytes of a model's parameters: all, a block's, those outside of the blocks, and the largest.

    `parameters` is how many numbers they are, `token` what its linear maps compute for a token.
    """

    all: int
    block: int
    root: int
    largest: int
    parameters: int
    token: Flops

    @classmethod
    def of(cls, job: Job) -> Weights:
        with torch.device("meta"):
            model = LongNet(job.config)
        counts = [p.numel() for p in model.parameters()]
        width, many = job.parameter_dtype.itemsize, sum(counts)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        root = width * (many - sum(blocks))
        return cls(width * many, width * max(blocks), root, width * max(counts), many, ModelFlops.of(model).token)


class Held(NamedTuple):
    """Bytes, on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float


class Engine(NamedTuple):
    """What is held in the forward, in a backward that has brought gradients of so many bytes, and in the step."""

    job: Job
    weights: Weights

    @property
    def splits(self) -> int:
        """Over how many ranks the model is split, where it is."""
        if self.job.sharding == "ddp":
            return 1
        return self.job.shared_by if self.job.sharding == "hsdp" else self.job.ranks

    def forward(self) -> Held:
        """The gradients of the step before are there until the backward begins."""
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

    def backward(self, come: float) -> Held:
        """Where micro-batches are accumulated, what earlier ones have brought is there from the first."""
        all_, part = self.weights.all, self.weights.all / self.splits
        many = self.job.accumulate > 1
        before, kind = self.forward(), self.job.sharding
        if kind == "ddp":
            return before._replace(gradients=all_ + self.weights.largest if many else come)
        if kind in ("fsdp2", "hsdp", "fsdp2_offload"):
            whole = WHOLE_BLOCKS / 2 * self.weights.block if self.splits > 1 else 0
            here = 0.0 if kind == "fsdp2_offload" else part if many else come / self.splits
            return before._replace(gradients=here, buffers=whole + before.buffers)
        if kind.startswith("deepspeed_stage_3"):
            return before._replace(buffers=before.buffers + self._bucket())
        # two buckets: one is reduced while the other is filled
        arrived = come if kind == "deepspeed_stage_1" else come / self.splits
        return before._replace(gradients=part if many else arrived, buffers=2 * self._bucket())

    def step(self) -> Held:
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
        """What is whole from the forward on: DeepSpeed lets nothing go while it is fewer numbers than that."""
        return min(self.weights.all, LIVE_NUMBERS * self.job.parameter_dtype.itemsize)

    def _bucket(self) -> int:
        return self.job.bucket * self.job.parameter_dtype.itemsize
