"""The comparison of a plan's memory with the memory that there is, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.planning.engines import Engine, Weights
from lightning_longnet.planning.run import USABLE, advice, peak_of

if TYPE_CHECKING:
    from lightning_longnet.planning.job import Job
    from lightning_longnet.planning.room import Room

# The share of a planned peak that a run holds at least: in benchmarks/results/planner-cpu.json plans are 0.95 to 1.08
# of what runs held
LEAST = 0.8
# Bytes for each number: of a token's hidden state in a layer, of a received key and value, and of the vocabulary.  They
# are more than any block keeps: a run that fits even so is not traced
_ROUGH_LAYER, _ROUGH_KEY, _ROUGH_LOGIT = 512, 16, 16


class Finding(NamedTuple):
    """The result of a comparison: an error, a warning, or neither."""

    error: str = ""
    warning: str = ""


def compare(job: Job, room: Room) -> Finding:
    """Return what is wrong with the memory of a job on ranks that each have this room.

    It is an error where the least that the run holds is more than there is at all, and a warning where the planned peak
    is more than is free.  A trace of the step, which takes seconds, is made only where a rough estimate does not fit.
    """
    weights = Weights.of(job)
    if _rough(job, weights) <= room.free:
        return Finding()
    peak = peak_of(job)
    least = max(states(job, weights), 0.0 if job.sharding.startswith("deepspeed") else LEAST * peak)
    if least > room.total:
        return Finding(error=_message(job, f"at least {_gib(least)}", f"there are {_gib(room.total)}", room.total))
    if peak > room.free:
        return Finding(warning=_message(job, f"about {_gib(peak)}", f"{_gib(room.free)} are free", room.free))
    return Finding()


def states(job: Job, weights: Weights) -> float:
    """Return the bytes of parameters, gradients and optimizer states that a rank holds at least in a step."""
    if job.sharding.startswith("deepspeed"):  # which may hold parameters in half types, and gathers them
        return 0.0 if "mixed" in job.precision else Engine(job, weights).step().optimizer
    held = Engine(job, weights).step()
    return held.parameters + held.gradients + held.optimizer if job.sharding != "fsdp2_offload" else 0.0


def _rough(job: Job, weights: Weights) -> float:
    """Return more bytes than a rank of the job holds."""
    config, engine = job.config, Engine(job, weights)
    held = max(sum(each) for each in (engine.forward(), engine.backward(weights.all), engine.step()))
    tokens = job.most_tokens * job.batch
    inner = max(config.hidden_dim or 0, 4 * config.dim)
    received = job.tokens * job.batch * config.layers * _ROUGH_KEY * config.dim
    return held + received + tokens * (config.layers * _ROUGH_LAYER * inner / 4 + _ROUGH_LOGIT * config.vocab_size)


def _message(job: Job, needed: str, available: str, room: float) -> str:
    changes = [f"{each.change} (about {_gib(each.peak)})" for each in advice(job, USABLE * room)]
    tries = (
        f"it would fit with {', or '.join(changes)}" if changes else "no change that longnet plan knows makes it fit"
    )
    return (
        f"a step of {job.tokens:,} tokens holds {needed} on a rank by longnet plan, and {available} for each: {tries}; "
        f"memory_check='off' of the strategy leaves this out"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
