"""`Guard`: tries kernels and looks at the memory before the first step, and adds advice to errors of steps."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.attention.attend import attend
from lightning_longnet.attention.kernels import candidates, judge
from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.parallel.shard import SequenceShard, report_errors
from lightning_longnet.attention.prepared import prepared_call
from lightning_longnet.attention.trial import free_bytes, kernel_fault, needed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.prepared import PreparedCall

logger = logging.getLogger(__name__)

_CORE = "lightning_longnet.attention."  # the modules of a call and its backward

_LESS_MEMORY = (
    "share each sequence among more ranks (sequence_parallel_size), take fewer samples at a time and accumulate, or "
    "compute activations again in the backward (recompute)"
)


class _CallKey(NamedTuple):
    """The properties that calls of one preflight have in common, on all ranks that share sequences.

    A `Guard` keeps the verdict on kernels by it.  `group` names the ranks that agreed on the verdict; None is a verdict
    of one rank for its whole sequences.  `kernels` are those that may run.
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
        """Return the properties in words, for lines of the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        extras = ", dropout" * self.has_dropout + ", softcap" * self.has_softcap
        return f"{self.device}, {dtype}, heads of {self.head_dim}{extras}"


class Guard:
    """A preflight of the kernels and the memory of a run, and advice for errors in its steps.

    The layers of a model share one.  Before the first call of a kind, the guard tries each kernel on a few tokens,
    forward and backward, and compares it with the equation.  A kernel that raises or is wrong is excluded on all ranks
    that share sequences, and the next kernel that serves replaces it.  The guard also compares the free memory with
    what the results of the call need at the least, and where that is too little on one rank, all of them end before the
    first step.  Later calls of the kind go to `attend` directly, without the kernels that are excluded.

    An error in the middle of a step cannot be repaired, as other ranks wait for messages.  The strategy adds the advice
    of the guard to it, and ends all ranks; a loop without the strategy adds the advice with `advised_errors`.

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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, is_placed: bool = False, **options: Any
    ) -> Tensor:
        """Call `attend` after the `preflight` of the call, with advice for an error of the forward.

        It is for loops without the layers of this package, which call `preflight` themselves.
        """
        options["excluded_kernels"] = self.preflight(q, k, v, pattern, is_placed=is_placed, **options)
        with self.advised_errors():
            out: Tensor = attend(q, k, v, pattern, **options)
        return out

    # Preflight

    @not_compiled
    def preflight(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, is_placed: bool = False, **options: Any
    ) -> frozenset[str]:
        """Return the kernels that calls of this kind must exclude; the first call of a kind tries the kernels.

        `AttentionLayer._attended` calls it before the layer's first call of each kind, and `Guard.attend` before each
        call.  All ranks of a shard call it together.  All get the same kernels, or all raise an error.

        Args:
            q, k, v, pattern: those of the first call.
            is_placed: whether a context says that sequences are whole on each rank.  If not, a call without a shard
                warns once where several ranks are connected.
            options: the other arguments of `attend`.
        """
        shard: SequenceShard | None = options.get("shard")
        kernel, group = options.get("kernel", "auto"), shard.comm.name if isinstance(shard, SequenceShard) else None
        # with a seed, so that none is drawn: `attend` draws its own
        options["dropout_seed"] = options.get("dropout_seed") or 0
        try:
            call = prepared_call(q, k, v, pattern, options)
        except ValueError as error:
            if isinstance(shard, SequenceShard):
                if any(kind.group == group for kind in self._broken):
                    shard.check({}, fault=str(error))  # the others get the error where they compare this call
                else:  # the other ranks wait in the first preflight of the group
                    shard.exchange_verdicts([], fault=str(error))
            raise
        if shard is None and not is_placed:
            self._warn_of_ranks()
        has_dropout, has_softcap, names = call.spec.dropout > 0, call.spec.softcap is not None, candidates(kernel)
        kind = _CallKey(q.device.type, call.q.dtype, q.shape[3], v.shape[3], has_dropout, has_softcap, group, names)
        if kind not in self._broken:
            self._broken[kind] = self._try_kernels(kind, q, k, v, pattern, options)
            verdicts = judge(kernel, call.request).verdicts
            serving = [verdict.kernel for verdict in verdicts if verdict.kernel in names and not verdict.refusals]
            self._log_preflight(kind, shard, [name for name in serving if name not in self._broken[kind]])
        broken = self._broken[kind]
        excluded = frozenset({*broken, *options.get("excluded_kernels", ())})
        if call.spec.kernel in broken:
            self._announce(kind, call.spec.kernel, self._replacement(call, pattern, options, broken), shard)
        return excluded

    def _replacement(
        self, call: PreparedCall, pattern: Pattern, options: dict[str, Any], broken: dict[str, str]
    ) -> str:
        """Return the kernel that runs a call whose kernel is broken, or raise a ValueError where none is left."""
        shard = options.get("shard")
        try:
            return prepared_call(call.q, call.k, call.v, pattern, {**options, "excluded_kernels": broken}).spec.kernel
        except ValueError:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
            fault = f"{_rank_name(shard)}: no kernel can serve this call, as each that could has failed: {reasons}"
        with report_errors(shard):
            raise ValueError(fault)

    def _announce(self, kind: _CallKey, broken: str, replacement: str, shard: SequenceShard | None) -> None:
        """Log and count once that a kernel is replaced."""
        if (kind, broken) in self._announced:
            return
        self._announced.add((kind, broken))
        self.counts["replacements"] += 1
        message = "%s: kernel %r is replaced with %r for calls on %s: %s"
        logger.warning(message, _rank_name(shard), broken, replacement, kind, self._broken[kind][broken])

    def _try_kernels(
        self, kind: _CallKey, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]
    ) -> dict[str, str]:
        """Return {name: reason} of the kernels that fail or are wrong on a few tokens, on any rank of the shard.

        All ranks of the shard call it together, and return the same names.  If the results of the call need more memory
        than is free on one of them, all raise a ValueError.
        """
        shard: SequenceShard | None = options.get("shard")
        names = kind.kernels
        # Inference mode, autocast and the hooks of a checkpoint belong to a thread: a new one has none of them
        with ThreadPoolExecutor(1) as thread:
            faults = thread.map(lambda name: kernel_fault(name, kind.dtype, q, k, v, pattern, options), names)
            broken = {name: fault for name, fault in zip(names, faults, strict=True) if fault}
        needed, free = needed_bytes(q, k, v, kind.dtype), free_bytes(q.device)
        is_short = free is not None and needed > free
        # for each rank: 1 for each kernel that fails there, and then 1 if memory is short
        everywhere = [[int(name in broken) for name in names] + [int(is_short)]]
        own = 0
        if shard is not None:
            everywhere, own = shard.exchange_verdicts(everywhere[0]), shard.rank
        if any(verdict[-1] for verdict in everywhere):
            self.counts["refusals"] += 1
            shown = "unknown" if free is None else f"{free / 2**20:,.0f} MiB"
            fault = (
                f"{_rank_name(shard)}: this call's results alone need {needed / 2**20:,.0f} MiB, and free are {shown}"
                if is_short
                else f"{_rank_name(shard)}: another rank, {[v[-1] for v in everywhere].index(1)}, has too little memory"
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
        """Log which kernels work, and the memory that the results of a call need and that is free."""
        needed, free = self._memory
        shown = "an unknown number" if free is None else f"{free / 2**20:,.0f} MiB"
        message = "%s: preflight on %s: kernels that work: %s; results need %.1f MiB of %s free"
        logger.info(message, _rank_name(shard), kind, ", ".join(working), needed / 2**20, shown)

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
    def advised_errors(self) -> Iterator[None]:
        """Add advice to a RuntimeError of a step, and raise it again; other errors pass unchanged.

        Loops without the strategy use it: `with guard.advised_errors(): loss.backward()`.  `Guard.attend` does for the
        forward; the strategy calls `advise` itself.
        """
        try:
            yield
        except RuntimeError as error:
            self.advise(error, f"{type(error).__name__}: {error}")
            raise

    def advise(self, error: BaseException, description: str, *, is_lost: bool = False) -> str:
        """Add advice to an error of a step, log it and count it; return the advice, empty where there is none.

        A RuntimeError gets advice if it came out of attention, in the forward or the backward, or if memory was short.
        The strategy calls it when a step has failed, before all ranks end (`NamedFailures`), and `advised_errors` in
        other loops.

        Args:
            error: the error, with its traceback.
            description: what failed, for the log.
            is_lost: whether the error says only that another rank did not answer; then it gets advice in any case.
        """
        advice = _advice(error, is_lost) if isinstance(error, RuntimeError) else ""
        if advice and advice not in getattr(error, "__notes__", ()):
            self.counts["failures"] += 1
            error.add_note(advice)
            logger.error("%s; %s", description, advice)
        return advice


def _advice(error: RuntimeError, is_lost: bool) -> str:
    """Return the advice for an error of a step, or an empty text if there is none."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"Memory is short: {_LESS_MEMORY}."
    is_of_attention = _is_of_attention(error)
    # the cause of an error of attention is a message that did not come
    if is_lost or (is_of_attention and isinstance(error.__cause__, RuntimeError)):
        return "Another rank has ended or does something else: the first error among the ranks says why."
    if not is_of_attention:
        return ""
    return (
        "The step cannot be finished on this rank: the kernel 'eager' is the plainest; where memory may be the cause, "
        f"{_LESS_MEMORY}."
    )


def _is_of_attention(error: BaseException) -> bool:
    """Return whether an error was raised inside a call of `attend` or its backward, according to its traceback."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith(_CORE) and name != __name__ for name in modules)


def _rank_name(shard: SequenceShard | None) -> str:
    """Return the name of this rank for log messages and errors."""
    if shard is not None:
        return f"rank {shard.rank} of {shard.comm.ranks} that share sequences"
    return "whole sequences"
