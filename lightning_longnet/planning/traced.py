"""The trace of a step of one rank on fake tensors: what it would hold and when, without memory and other ranks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_longnet.layers import loss, offloading
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.planning.fake_rank import WORKSPACE, PlannedContext
from lightning_longnet.planning.ledger import Event, Ledger
from lightning_longnet.sequence.attach import attach_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import Footprint
    from lightning_longnet.planning.job import Job

_CHUNKS = 4  # of the loss that a trace runs before the last one
FORWARD, LOSS, BACKWARD = "forward", "loss", "backward"


class Moment(NamedTuple):
    """The bytes that are held at one moment; gradients are the whole ones that this backward has computed."""

    phase: str
    activations: int
    exchange: int
    loss: int
    gradients: int


class Trace(NamedTuple):
    """The trace of a micro-batch.

    Attributes:
        moments: the moments at which most is held.
        moved_bytes: the bytes that operators other than products read and write.
        calls: the number of operators.
    """

    moments: tuple[Moment, ...]
    moved_bytes: int
    calls: int


def trace(job: Job, rank: int, footprints: Mapping[str, Footprint]) -> Trace:
    """Trace the forward, the loss and the backward of a rank of a sequence group."""
    tokens = job.placed().lengths[rank]
    # a lookup of learned positions compares values, which fake tensors lack; it adds one tensor of (N, dim).  The
    # options that a preset sets are in the configuration already, except its guard, which compares values, too
    config = replace(job.config, learned_positions=None, preset=None)
    ledger = Ledger(WORKSPACE)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = _made(config, job.parameter_dtype)
        model._checked_length = job.tokens  # the plan's notes say what its pattern reaches
        attach_context(model, PlannedContext(job, rank, footprints))
        ids = torch.zeros(job.batch, tokens, dtype=torch.long)
        for known in (*model.parameters(), ids):
            ledger.knows(known)
        cast = torch.autocast("cpu", job.dtype, enabled="mixed" in job.precision)
        with ledger, _nothing_on_host():
            with cast:
                ledger.phase = FORWARD
                hidden = model.encode(model.embed(ids))
                ledger.phase = ledger.kind = LOSS
                with _few_chunks(ledger):
                    loss_sum, count = loss.chunked_cross_entropy(
                        hidden, model.head.weight, ids, chunk_tokens=config.loss_chunk
                    )
            del hidden
            ledger.phase, ledger.kind = BACKWARD, "activations"
            (loss_sum / count).backward()
        gradients = ledger.storages(p.grad for p in model.parameters() if p.grad is not None)
    return Trace(tuple(_moments(ledger.events, gradients)), ledger.moved, ledger.calls)


@contextmanager
def _few_chunks(ledger: Ledger) -> Iterator[None]:
    """Let the loss run its first chunks and the last, and count those between, which are alike, without running them.

    A sequence of a million tokens has a thousand chunks, each of which holds the same.
    """
    every = loss.chunk_starts

    def few(tokens: int, chunk_tokens: int) -> Iterator[int]:
        starts = every(tokens, chunk_tokens)
        yield from starts[: _CHUNKS - 1]
        if len(starts) < _CHUNKS:
            return
        before = ledger.moved, ledger.calls
        yield starts[_CHUNKS - 1]
        skipped = len(starts) - _CHUNKS - 1
        if skipped >= 0:
            ledger.moved += skipped * (ledger.moved - before[0])
            ledger.calls += skipped * (ledger.calls - before[1])
            yield starts[-1]

    loss.chunk_starts = few  # type: ignore[assignment]
    try:
        yield
    finally:
        loss.chunk_starts = every


@contextmanager
def _nothing_on_host() -> Iterator[None]:
    """Let what is kept in the memory of the host take none of the device's."""

    def store(x: Tensor) -> offloading.Stored:
        return offloading.Stored((x.shape, x.dtype), x.device)

    def load(stored: offloading.Stored) -> Tensor:
        shape, dtype = stored.copy
        return torch.empty(shape, dtype=dtype, device=stored.device)

    before = offloading.store, offloading.load
    offloading.store, offloading.load = store, load
    try:
        yield
    finally:
        offloading.store, offloading.load = before


def _made(config: LongNetConfig, dtype: torch.dtype) -> LongNet:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake tensors cannot be converted in place
    try:
        return LongNet(config)
    finally:
        torch.set_default_dtype(before)


def _moments(events: list[Event], gradients: set[int]) -> Iterator[Moment]:
    """Yield the moments that no later one of their phase exceeds, which holds as many gradients or more."""
    held = {"activations": 0, "exchange": 0, "loss": 0, "gradients": 0}
    best: dict[str, list[tuple[int, Moment]]] = {}
    for event in events:
        kind = "gradients" if event.storage in gradients else event.kind
        held[kind] += event.bytes
        if event.bytes <= 0:
            continue
        total = sum(held.values())
        rivals = best.setdefault(event.phase, [])
        # gradients only grow, so a moment that is no fuller without them than a later one is never the fullest
        without = total - held["gradients"]
        if rivals and rivals[-1][0] >= without and rivals[-1][1].gradients == held["gradients"]:
            continue
        while rivals and rivals[-1][0] <= without:
            rivals.pop()
        rivals.append((without, Moment(event.phase, **held)))
    for rivals in best.values():
        yield from (moment for _, moment in rivals)
