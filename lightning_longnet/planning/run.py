"""`RunPlan`: what a run holds, sends and takes, whether it fits, and what to change where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.parallel.schedule import refusal_of
from lightning_longnet.attention.pattern.pattern import check_heads
from lightning_longnet.planning.engines import Weights
from lightning_longnet.planning.exchange import LayerKind, layer_kinds, sent_bytes
from lightning_longnet.planning.memory import Memory, memory
from lightning_longnet.planning.speed import StepTime, required_flops, step_time
from lightning_longnet.planning.traced import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_longnet.models.blocks import Recompute
    from lightning_longnet.planning.devices import Device
    from lightning_longnet.planning.job import Job
    from lightning_longnet.planning.traced import Trace

# The share of a device's memory that a run may fill: the rest is for the driver, the libraries and fragmentation
USABLE = 0.9
_LONGEST = 2**30  # tokens of a rank
_WIDER = (2, 4, 8, 16)  # multiples of the nodes that advice tries
_STEPS = 3  # of a plan, besides those of advice
_CHUNK = 4096  # tokens of a feed-forward's chunk, in advice
_OFFLOAD = {True: "activation_offload", False: "offload_activations"}  # of a model of transformers, and of ours
_CHUNKS = 64  # of a sequence, at most: a trace runs each


class Advice(NamedTuple):
    """A change after which a run fits, and the peak of its memory then."""

    change: str
    peak: float


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: `str` shows it as tables, `to_dict` as plain values, and `planning.picture.draw` draws it.

    Attributes:
        job, device: as given.
        peak_flops: the peak of a device in operations a second.
        weights: the sizes of the model's parameters.
        kinds: the layers by their pattern.
        fullest: the rank of a group that holds most.
        memory: what that rank holds at its fullest.
        time: the time of a step, of the slowest rank.
        required: the required operations of a step of all ranks.
        longest: the estimated tokens of the longest sequence that fits; 0 where none does.
        advice: the changes that make the run fit, where it does not.
        notes: what the plan does not count.
    """

    job: Job
    device: Device
    peak_flops: float
    weights: Weights
    kinds: tuple[LayerKind, ...]
    fullest: int
    memory: Memory
    time: StepTime
    required: float
    longest: int
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def usable(self) -> float:
        """The bytes of a device that a run may fill."""
        return USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits into its device."""
        return self.memory.peak <= self.usable

    @property
    def tokens_per_second(self) -> float:
        """The tokens a second of all ranks."""
        return self.job.tokens * self.job.batch * self.job.groups * self.job.accumulate / self.time.seconds

    @property
    def mfu(self) -> float:
        """The model FLOPs utilization: the required operations over the peak of all devices."""
        return self.required / self.time.seconds / (self.peak_flops * self.job.ranks)

    def sent_bytes(self, rank: int) -> int:
        """Return the bytes that a rank sends for attention in a step."""
        return sent_bytes(self.job, self.kinds, rank)

    @property
    def imbalance(self) -> float:
        """The pairs of the busiest rank over the mean of the ranks that were planned."""
        ranks = list(self.kinds[0].shares)
        pairs = [sum(kind.layers * kind.shares[rank].pairs for kind in self.kinds) for rank in ranks]
        return max(pairs) * len(pairs) / sum(pairs)

    def __str__(self) -> str:
        from lightning_longnet.planning.table import table

        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        from lightning_longnet.planning.table import values

        return values(self)


def plan_run(
    job: Job, device: Device, peak_flops: float | None = None, report: Callable[[int, int], None] | None = None
) -> RunPlan:
    """Return the plan of a job on devices of a kind.

    `report` is called with the number of steps that are done, and of all that may be: the search for changes after
    which the run fits ends at the first number of nodes that is enough.
    """
    _check_length(job)
    device = device.shared(job.per_node, torch.get_num_threads())
    kinds, weights = layer_kinds(job, "cpu" if device.name == "cpu" else "cuda"), Weights.of(job)
    report = report or _no_report
    report(1, _STEPS)
    fullest = _fullest(job, kinds)
    traced = _traced(job, kinds, fullest)
    held = memory(job, weights, traced)
    report(2, _STEPS)
    peak_flops = device.peak(job.dtype) if peak_flops is None else peak_flops
    timed = [step_time(job, device, peak_flops, kinds, rank, traced, weights) for rank in kinds[0].shares]
    usable = USABLE * device.memory
    longest = _longest(job, kinds, fullest, weights, held.peak, usable)
    report(_STEPS, _STEPS)
    return RunPlan(
        job,
        device,
        peak_flops,
        weights,
        kinds,
        fullest,
        held,
        max(timed, key=lambda each: each.seconds),
        required_flops(job, weights),
        longest,
        () if held.peak <= usable else tuple(advice(job, usable, report)),
        tuple(_notes(job)),
    )


def _check_length(job: Job) -> None:
    """Refuse sequences whose part on a rank no device could hold, before tables of its rows are made."""
    most = max(job.placed().lengths)
    if most > _LONGEST:
        raise ValueError(
            f"tokens must be at most {_LONGEST:,} on a rank in a plan, got {most:,} on each of {job.shared_by}: plan "
            f"with more nodes, or fewer tokens"
        )


def _traced(job: Job, kinds: tuple[LayerKind, ...], rank: int) -> Trace:
    return trace(job, rank, {kind.pattern.dumps(): kind.shares[rank].footprint for kind in kinds})


def _fullest(job: Job, kinds: tuple[LayerKind, ...]) -> int:
    """Return the rank with most tokens and, among those, most remote rows: in all else ranks are alike."""
    lengths = job.placed().lengths

    def held(rank: int) -> tuple[int, int]:
        return lengths[rank], sum(kind.shares[rank].footprint.kv_rows(kind.layers) for kind in kinds)

    return max(kinds[0].shares, key=held)


def _longest(job: Job, kinds: tuple[LayerKind, ...], rank: int, weights: Weights, peak: float, usable: float) -> int:
    """Extrapolate the length that fits from the peaks of this length and of half of it: memory is linear in tokens."""
    half = job.tokens // 2
    if half < job.shared_by:
        return 0
    shorter = replace(job, tokens=half)
    less = memory(shorter, weights, _traced(shorter, kinds, rank)).peak
    slope = (peak - less) / (job.tokens - half)
    tokens = int(job.tokens + (usable - peak) / slope) if slope > 0 else 0
    return max(tokens // job.shared_by * job.shared_by, 0)


def _no_report(done: int, total: int) -> None:
    pass


def advice(job: Job, usable: float, report: Callable[[int, int], None] = _no_report) -> Iterator[Advice]:
    """Yield the changes that make a run fit, each tried alone; more nodes last."""
    changes: list[tuple[str, Job]] = []
    config = job.config
    place = "--model" if job.is_decoder else "--model.config"
    values: tuple[Recompute, ...] = ("all but attention", "everything")
    for value in values:
        if config.recompute not in (value, "everything"):
            changes.append((f"{place}.recompute '{value}'", replace(job, config=replace(config, recompute=value))))
    if config.feed_forward_chunk is None:
        chunk = _CHUNK
        while max(job.placed().lengths) > _CHUNKS * chunk:
            chunk *= 2
        smaller = replace(config, recompute="everything", feed_forward_chunk=chunk)
        name = "mlp_chunk_tokens" if job.is_decoder else "feed_forward_chunk"
        changes.append((f"{place}.recompute everything {place}.{name} {chunk}", replace(job, config=smaller)))
        if not config.offload_activations:
            name, smaller = _OFFLOAD[job.is_decoder], replace(smaller, offload_activations=True)
            changes.append((f"{changes[-1][0]} {place}.{name} true", replace(job, config=smaller)))
    if job.sharding == "ddp" and job.ranks > 1:
        split = replace(job, sharding="fsdp2")
        changes.append(("--trainer.strategy ring_sequence_parallel, which splits the model", split))
    if job.batch > 1:
        changes.append(("--data.batch_size 1", replace(job, batch=1)))

    def is_refused(ranks: int) -> bool:
        return bool(refusal_of(config.exchange or job.exchange, ranks, check_heads(config.heads, config.kv_heads)))

    if job.shared_by < job.ranks and not is_refused(job.ranks):
        changes.append((f"sequence_parallel_size {job.ranks}", replace(job, sequence_parallel_size=job.ranks)))
    total = _STEPS + len(changes) + len(_WIDER)
    for done, (change, other) in enumerate(changes, _STEPS):
        report(done, total)
        peak = peak_of(other)
        if peak <= usable:
            yield Advice(change, peak)
    for done, factor in enumerate(_WIDER, _STEPS + len(changes)):
        report(done, total)
        wider = replace(job, nodes=job.nodes * factor, sequence_parallel_size=job.shared_by * factor)
        if is_refused(wider.shared_by):
            continue
        if wider.shared_by <= job.tokens and (peak := peak_of(wider)) <= usable:
            yield Advice(f"--nodes {wider.nodes}, which share the sequence", peak)
            return


def peak_of(job: Job) -> float:
    """Return the bytes of the fullest rank of a job at its fullest."""
    kinds = layer_kinds(job)
    return memory(job, Weights.of(job), _traced(job, kinds, _fullest(job, kinds))).peak


def _notes(job: Job) -> Iterator[str]:
    if job.is_packed:
        yield "documents are packed: they send and compute less than the whole rows that are planned here"
    if job.sharding.endswith("offload") or job.config.offload_activations:
        yield "what is kept in the host's memory is not counted, nor the time to bring it"
    if job.sharding.startswith("deepspeed") and "mixed" in job.precision:
        yield "DeepSpeed holds parameters in half types here, and is planned as if in float32: it holds less"
    config = job.config
    if job.is_decoder:
        yield "the model of transformers is planned as a LongNet with the same matrices; its own norms may hold more"
    reaches = [p.reach(job.tokens, config.heads, config.kv_heads) for p in dict.fromkeys(config.patterns)]
    if all(reach.has_gaps for reach in reaches):
        yield from (" ".join(str(reach).split()) for reach in reaches)
