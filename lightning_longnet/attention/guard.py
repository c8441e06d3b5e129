"""`Guard`: tries kernels and looks at the memory before the first step, and adds advice to errors."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
import torch.distributed as dist

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.checks import prepared_call
from lightning_longnet.attention.kernels import candidates, judge, reference
from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.parallel.shard import SequenceShard, report_errors
from lightning_longnet.attention.trial import free_bytes, kernel_fault, needed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.checks import AttendOptions
    from lightning_longnet.attention.pattern.pattern import Pattern

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "share each sequence among more ranks (sequence_parallel_size), take fewer samples at a time and accumulate, or "
    "compute activations again in the backward (recompute)"
)


def guarded_attend(
    guard: Guard | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_placed: bool = False,
    **options: Unpack[AttendOptions],
) -> Tensor:
    """Call `attend` through a guard, which chooses the kernel; without a guard call it directly.

    `is_placed`: a context says that sequences are whole, so several connected ranks need no warning.
    """
    if guard is None:
        return attend(q, k, v, pattern, **options)
    out: Tensor = guard.attend(q, k, v, pattern, is_placed=is_placed, **options)
    return out


class _CallKey(NamedTuple):
    """The properties that calls of one preflight have in common, on all ranks that share sequences.

    `group` names the ranks that agreed on the verdict; None is a verdict of one rank for its whole sequences.
    `kernels` are those that may run.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    has_dropout: bool
    has_softcap: bool
    group: str | None
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        extras = ", dropout" * self.has_dropout + ", softcap" * self.has_softcap
        return f"{self.device}, {dtype}, heads of {self.head_dim}{extras}"


class Guard:
    """A preflight of `attend` and a handler of its errors.  The layers of a model share one.

    Before the first call of a kind the guard tries each kernel on a few tokens, forward and backward, and compares it
    with the equation.  A kernel that raises or is wrong runs on none of the ranks that share sequences, which agree on
    it; the next kernel that serves replaces it.  The guard also compares the free memory with what the results of the
    call need at the least, and where that is too little on one rank, all of them end before the first step.  It does
    not look at later calls of the kind, nor at longer ones.

    An error in the middle of a step ends all ranks: the guard adds advice to the error of the rank that failed, and to
    those of the ranks that waited for it.  It guesses nothing and repeats no call on fewer devices.

    Each event is a line of the logger "lightning_longnet.attention.guard".

    Attributes:
        counts: of "preflights", "replacements", "refusals" for lack of memory and "failures" on this rank.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("preflights", "replacements", "refusals", "failures"), 0)
        self._broken: dict[_CallKey, dict[str, str]] = {}
        self._announced: set[tuple[_CallKey, str]] = set()
        self._has_warned = False
        self._memory: tuple[int, int | None] = 0, None  # needed and free bytes in the latest preflight

    @not_compiled
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        is_placed: bool = False,
        **options: Any,
    ) -> Tensor:
        """Call `attend` with a kernel that has passed the preflight.

        `is_placed`: a context says that sequences are whole, so several connected ranks need no warning.
        """
        shard: SequenceShard | None = options.get("shard")
        options["kernel"] = self._kernel(q, k, v, pattern, options)
        if not isinstance(shard, SequenceShard) and not is_placed:
            self._warn_of_ranks()
        with self._advised_errors(shard, q.shape[1]):
            out: Tensor = attend(q, k, v, pattern, **options)
        return out

    # Preflight

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]) -> str:
        """Return the name of the kernel that is to run."""
        shard, kernel = options.get("shard"), options.get("kernel", "auto")
        group = shard.comm.name if isinstance(shard, SequenceShard) else None
        try:
            # with a seed, so that none is drawn: `attend` draws its own
            seeded = {**options, "dropout_seed": options.get("dropout_seed") or 0}
            explanation = judge(kernel, prepared_call(q, k, v, pattern, seeded).request)
        except ValueError as error:
            if isinstance(shard, SequenceShard) and all(kind.group != group for kind in self._broken):
                shard.exchange_verdicts(
                    [], fault=str(error)
                )  # the other ranks wait there, for the first preflight of the group
                raise
            return str(kernel)  # `attend` raises the error, and reports it to the other ranks
        assert explanation.chosen is not None
        dtype, has_dropout = explanation.request.dtype, options.get("dropout", 0.0) > 0
        has_softcap, names = options.get("softcap") is not None, candidates(kernel)
        kind = _CallKey(q.device.type, dtype, q.shape[3], v.shape[3], has_dropout, has_softcap, group, names)
        serving = [
            verdict.kernel for verdict in explanation.verdicts if not verdict.refusals and verdict.kernel in names
        ]
        if kind not in self._broken:
            self._broken[kind] = self._preflight(kind, q, k, v, pattern, options)
            self._log_preflight(kind, shard, [name for name in serving if name not in self._broken[kind]])
        broken = self._broken[kind]
        serving.sort(key=lambda name: name != explanation.chosen)
        working = [name for name in serving if name not in broken]
        if shard is not None:
            working = [name for name in working if name != reference.name]
        if not working:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
            with report_errors(shard):
                raise ValueError(
                    f"{_rank(shard)}: no kernel can serve this call, as each that could has failed: {reasons}"
                )
        if working[0] != explanation.chosen and (kind, explanation.chosen) not in self._announced:
            self._announced.add((kind, explanation.chosen))
            self.counts["replacements"] += 1
            message = "%s: kernel %r is replaced with %r for calls on %s: %s"
            logger.warning(message, _rank(shard), explanation.chosen, working[0], kind, broken[explanation.chosen])
        return working[0]

    def _preflight(
        self, kind: _CallKey, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]
    ) -> dict[str, str]:
        """Return {name: reason} of the kernels that fail; all ranks of the shard return the same names."""
        shard: SequenceShard | None = options.get("shard")
        names = kind.kernels
        # Inference mode, autocast and the hooks of a checkpoint belong to a thread: a new one has none of them
        with ThreadPoolExecutor(1) as thread:
            faults = thread.map(lambda name: kernel_fault(name, kind.dtype, q, k, v, pattern, options), names)
            broken = {name: fault for name, fault in zip(names, faults, strict=True) if fault}
        needed, free = needed_bytes(q, k, v, kind.dtype), free_bytes(q.device)
        is_short = free is not None and needed > free
        everywhere = [[int(name in broken) for name in names] + [int(is_short)]]
        own = 0
        if shard is not None:
            everywhere, own = shard.exchange_verdicts(everywhere[0]), shard.rank
        if any(verdict[-1] for verdict in everywhere):
            self.counts["refusals"] += 1
            shown = "unknown" if free is None else f"{free / 2**20:,.0f} MiB"
            fault = (
                f"{_rank(shard)}: this call's results alone need {needed / 2**20:,.0f} MiB, and free are {shown}"
                if is_short
                else f"{_rank(shard)}: another rank, {[v[-1] for v in everywhere].index(1)}, has too little memory"
            )
            logger.error("%s", fault)
            raise ValueError(f"{fault}: {_LESS_MEMORY}")
        for i, name in enumerate(names):
            ranks = [rank for rank, verdict in enumerate(everywhere) if verdict[i] and rank != own]
            if ranks and name not in broken:
                broken[name] = f"it fails on rank {ranks[0]}, whose own log says why"
        self.counts["preflights"] += 1
        self._memory = needed, free
        return broken

    def _log_preflight(self, kind: _CallKey, shard: SequenceShard | None, working: list[str]) -> None:
        needed, free = self._memory
        shown = "an unknown number" if free is None else f"{free / 2**20:,.0f} MiB"
        message = "%s: preflight on %s: kernels that work: %s; results need %.1f MiB of %s free"
        logger.info(message, _rank(shard), kind, ", ".join(working), needed / 2**20, shown)

    def _warn_of_ranks(self) -> None:
        """Warn once where each of several ranks attends to whole sequences, which is seldom meant."""
        if self._has_warned or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._has_warned = True
        message = (
            "%d ranks are connected, and attention is given whole sequences on each: a strategy or attach_context "
            "splits them"
        )
        logger.warning(message, dist.get_world_size())

    # Failures

    @contextmanager
    def _advised_errors(self, shard: SequenceShard | None, tokens: int) -> Iterator[None]:
        """Add advice to the error of a call inside the block, and with a shard also to that of its backward."""
        if isinstance(shard, SequenceShard):
            with shard.comm.failures_to(self._failed):
                yield
            return
        try:
            yield
        except RuntimeError as error:
            self._failed(error, f"attention over {tokens:,} tokens failed")
            raise

    def _failed(self, error: BaseException, description: str) -> None:
        """Add advice to an error of a call, and log it; the handler of `Comm.failures_to`."""
        if not isinstance(error, RuntimeError):
            return  # an interrupt, for which there is no advice
        self.counts["failures"] += 1
        advice = _advice(error)
        error.add_note(advice)
        logger.error("%s; %s", description, advice)


def _advice(error: RuntimeError) -> str:
    """Return what may help against an error of a call."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"Memory is short: {_LESS_MEMORY}."
    if isinstance(error.__cause__, RuntimeError):  # the cause is a message that did not come
        return "Another rank has ended or does something else: the first error among the ranks says why."
    return (
        "The step cannot be finished, and all ranks end: the kernel 'eager' is the plainest; where memory may be the "
        f"cause, {_LESS_MEMORY}."
    )


def _rank(shard: SequenceShard | None) -> str:
    """Return the name of this rank for log messages and errors."""
    if shard is not None:
        return f"rank {shard.rank} of {shard.comm.ranks} that share sequences"
    return "whole sequences"
