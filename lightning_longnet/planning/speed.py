"""The time of a step: the work that is computed, moved and sent, divided by the rates of a device and its links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.pattern.pattern import check_heads
from lightning_longnet.planning.flops import attended_pairs

if TYPE_CHECKING:
    from lightning_longnet.planning.devices import Device
    from lightning_longnet.planning.engines import Weights
    from lightning_longnet.planning.exchange import LayerKind, Share
    from lightning_longnet.planning.job import Job
    from lightning_longnet.planning.traced import Trace

# The seconds that a message takes before its first byte
LATENCY = 2e-5
# Operations of a pair and a unit of width: scores and values, their gradients and the scores again; see `flops`
FORWARD, BACKWARD = 4, 10


class Crossing(NamedTuple):
    """The seconds of one exchange: its messages in flight, and the part of it that the rank waits."""

    flight: float
    waited: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that needs most.

    Attributes:
        linear, attention: products.
        other: what reads and writes memory beside them, and the calls themselves.
        exchange: waited for keys and values.
        exchange_flight: that they take.
        gradients: waited for the engine's messages.
        gradients_flight: that these take.
        optimizer: its step.
    """

    linear: float
    attention: float
    other: float
    exchange: float
    exchange_flight: float
    gradients: float
    gradients_flight: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.linear + self.attention + self.other + self.exchange + self.gradients + self.optimizer

    @property
    def hidden_share(self) -> float | None:
        """The share of the exchange that computation hides; None where nothing travels."""
        return 1 - self.exchange / self.exchange_flight if self.exchange_flight else None


def required_flops(job: Job, weights: Weights) -> float:
    """Return the floating-point operations that a step of all ranks needs by its definition; see `flops`."""
    heads, kv_heads = job.config.heads, check_heads(job.config.heads, job.config.kv_heads)
    pairs = sum(attended_pairs(p, heads, kv_heads, (0, job.tokens)).required for p in job.config.patterns)
    samples = job.batch * job.groups * job.accumulate
    return samples * (weights.token.required * job.tokens + 12 * pairs * job.sizes.head_dim)


def step_time(
    job: Job, device: Device, peak: float, kinds: tuple[LayerKind, ...], rank: int, traced: Trace, weights: Weights
) -> StepTime:
    """Return the estimated time of a training step of one rank; `peak` is the device's, in operations a second."""
    linear_share, attention_share = device.efficiency
    tokens = job.placed().lengths[rank] * job.batch
    linear = tokens * weights.token.done / (peak * linear_share)
    pair = job.sizes.head_dim * job.batch / (peak * attention_share)
    again = job.config.recompute == "everything"
    attention = flight = waited = 0.0
    link = device.node_link if job.shared_by <= job.per_node else device.network
    for kind in kinds:
        share = kind.shares[rank]
        attention += kind.layers * share.pairs * pair * (FORWARD * (1 + again) + BACKWARD)
        crossing = _crossing(share, pair, link, device.overlaps and share.overlaps, 1 + again)
        flight, waited = flight + kind.layers * crossing.flight, waited + kind.layers * crossing.waited
    other = traced.moved_bytes / device.bandwidth + traced.calls * device.call_seconds
    many = job.accumulate
    sync = _synchronised(job, weights, device)
    backward = 2 / 3 * (linear + attention + other) * many
    return StepTime(
        many * linear,
        many * attention,
        many * other,
        many * waited,
        many * flight,
        max(0.0, sync - backward) if device.overlaps else sync,
        sync,
        _optimizer_bytes(job, weights) / device.bandwidth,
    )


def _crossing(share: Share, pair: float, link: float, overlaps: bool, forwards: int) -> Crossing:
    """Return the crossing of a layer: a round travels while the one before it, or the own pairs, are computed."""
    volume = share.volume
    sent = volume.sent_bytes + (forwards - 1) * volume.forward_bytes
    received = sum(each.received_bytes for each in share.rounds)
    flight = max(sent, received) / link + volume.messages * LATENCY
    if not overlaps or not flight:
        return Crossing(flight, flight)
    waited = 0.0
    rounds = len(share.rounds) or 1
    for is_backward in (False,) * forwards + (True,):
        pairs, operations = share.own_pairs, BACKWARD if is_backward else FORWARD
        each_flight = flight / (forwards + 1) / rounds
        for i in range(rounds):
            waited += max(0.0, each_flight - pairs * operations * pair)
            pairs = share.rounds[i].pairs if i < len(share.rounds) else 0
    return Crossing(flight, min(waited, flight))


def _synchronised(job: Job, weights: Weights, device: Device) -> float:
    """Return the seconds that gradients and parameters take to travel in a step."""
    ranks, kind = job.ranks, job.sharding
    if ranks == 1:
        return 0.0
    # what all ranks gather crosses to a node once, over the links of all its devices
    link = min(device.node_link, device.network * job.per_node) if job.nodes > 1 else device.node_link
    share = (ranks - 1) / ranks * weights.all / link
    if kind == "hsdp":
        here = job.shared_by
        inside = device.node_link if here <= job.per_node else device.network
        split = 3 * job.accumulate * (here - 1) / here * weights.all / inside
        return split + 2 * (job.groups - 1) / job.groups * weights.all / here / link
    if kind.startswith("fsdp2") or kind.startswith("deepspeed_stage_3"):
        return 3 * job.accumulate * share  # gathered twice, and gradients scattered
    return 2 * share * (job.accumulate if kind == "deepspeed_stage_2" else 1)


def _optimizer_bytes(job: Job, weights: Weights) -> float:
    """Return the bytes that the optimizer reads and writes: parameters and states both ways, gradients once."""
    splits = 1 if job.sharding == "ddp" else job.shared_by if job.sharding == "hsdp" else job.ranks
    return weights.all / splits * (3 + 2 * job.optimizer_copies)
