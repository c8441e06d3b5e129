"""What stands between a run and its surprises: kernels tried before they are used, memory looked at, failures told."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
import torch.distributed as dist

from lightning_longnet.attention.attend import attend, explain
from lightning_longnet.attention.checks import prepared_call
from lightning_longnet.attention.kernels import judge, kernel_names, reference
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.checks import AttendOptions

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
    """Call `attend` with the kernel that a guard has chosen, or as it is where there is no guard.

    `is_placed` says that whole sequences are meant to be on one rank though there are others.
    """
    if guard is None:
        return attend(q, k, v, pattern, **options)
    out: Tensor = guard.attend(q, k, v, pattern, is_placed=is_placed, **options)
    return out


class _Kind(NamedTuple):
    """Of calls that one preflight serves: what all ranks that share sequences have in common."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    has_dropout: bool
    group: str | None  # that agreed; a verdict of one rank alone holds for its whole sequences

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}, heads of {self.head_dim}{', dropout' * self.has_dropout}"


class Guard:
    """`attend` with a preflight.  The layers of a model share one.

    Before the first call of a kind each kernel is tried on a few tokens, forward and backward, and compared with the
    equation; one that raises, or is wrong, is not used on any of the ranks that share sequences, which agree on it.
    The next kernel that serves replaces it.  The memory that is free is compared with what that call's results need at
    the least, and where that is too little on one rank, all of them end before the first step.  Later calls of the kind
    are not looked at again, longer ones neither.

    An error in the middle of a step ends all ranks: that of one is told with advice, the others' with whom they waited
    for.  Nothing is guessed and no call is repeated on fewer devices.

    Each event is a line of the logger "lightning_longnet.attention.guard".

    Attributes:
        counts: of "preflights", "replacements", "refusals" for want of memory and "failures" on this rank.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("preflights", "replacements", "refusals", "failures"), 0)
        self._broken: dict[_Kind, dict[str, str]] = {}
        self._announced: set[tuple[_Kind, str]] = set()
        self._has_warned = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        kernel: str = "auto",
        shard: SequenceShard | None = None,
        is_placed: bool = False,
        **settings: Any,
    ) -> Tensor:
        """As `attend`.  With `is_placed` whole sequences are meant to be on one rank, though there are others."""
        told: dict[str, Any] = {**settings, "shard": shard}
        chosen = self._chosen(q, k, v, pattern, kernel, told)
        if isinstance(shard, SequenceShard):
            with shard.comm.failures_to(self._failed):
                part: Tensor = attend(q, k, v, pattern, kernel=chosen, **told)
            return part
        if not is_placed:
            self._warn_of_ranks()
        try:
            out: Tensor = attend(q, k, v, pattern, kernel=chosen, **told)
        except RuntimeError as error:
            self._failed(error, f"attention over {q.shape[1]:,} tokens failed")
            raise
        return out

    # Preflight

    def _chosen(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kernel: str, told: dict[str, Any]) -> str:
        shard: SequenceShard | None = told["shard"]
        group = shard.comm.group.group_name if isinstance(shard, SequenceShard) else None
        try:
            # a given seed, so that none is drawn: `attend` draws its own
            options = {**told, "kernel": kernel, "dropout_seed": told.get("dropout_seed") or 0}
            said = judge(kernel, prepared_call(q, k, v, pattern, options).request)
        except ValueError as error:
            if isinstance(shard, SequenceShard) and all(kind.group != group for kind in self._broken):
                shard.agree([], fault=str(error))  # where the other ranks wait for this one
                raise
            return kernel  # `attend` says so, and tells the other ranks
        assert said.chosen is not None
        kind = _Kind(q.device.type, said.request.dtype, q.shape[3], v.shape[3], told.get("dropout", 0.0) > 0, group)
        if kind not in self._broken:
            names = [verdict.kernel for verdict in said.verdicts if not verdict.refusals]
            self._broken[kind] = self._preflight(kind, q, k, v, pattern, told, names)
        broken = self._broken[kind]
        others = [verdict.kernel for verdict in said.verdicts if not verdict.refusals and verdict.kernel != said.chosen]
        serving = [
            name
            for name in (said.chosen, *others)
            if name not in broken and not (shard is not None and name == reference.name)
        ]
        if not serving:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
            fault = f"{_rank(shard)}: no kernel can serve this call, as each that could has failed: {reasons}"
            if shard is not None:
                shard.check({}, fault=fault)
            raise ValueError(fault)
        if serving[0] != said.chosen and (kind, said.chosen) not in self._announced:
            self._announced.add((kind, said.chosen))
            self.counts["replacements"] += 1
            words = "%s: kernel %r is replaced with %r for calls on %s: %s"
            logger.warning(words, _rank(shard), said.chosen, serving[0], kind, broken[said.chosen])
        return serving[0]

    def _preflight(
        self,
        kind: _Kind,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        told: dict[str, Any],
        serving: list[str],
    ) -> dict[str, str]:
        """Why kernels must not be used, by their names; the same names on all ranks of the shard."""
        shard: SequenceShard | None = told["shard"]
        names = kernel_names()
        # A thread of its own knows nothing of what the call may stand in: inference mode, autocast, and checkpoints,
        # which would count what the trial saves
        with ThreadPoolExecutor(1) as thread:
            found = thread.map(lambda name: _fault(name, kind, q, k, pattern, told), names)
            broken = {name: fault for name, fault in zip(names, found, strict=True) if fault}
        needed, free = _needed_bytes(q, k, v, kind.dtype), _free_bytes(q.device)
        is_short = free is not None and needed > free
        everywhere = [[int(name in broken) for name in names] + [int(is_short)]]
        own = 0
        if shard is not None:
            everywhere, own = shard.agree(everywhere[0]), shard.rank
        if any(found[-1] for found in everywhere):
            self.counts["refusals"] += 1
            shown = "unknown" if free is None else f"{free / 2**20:,.0f} MiB"
            fault = (
                f"{_rank(shard)}: this call's results alone need {needed / 2**20:,.0f} MiB, and free are {shown}"
                if is_short
                else f"{_rank(shard)}: another rank, {[f[-1] for f in everywhere].index(1)}, has too little memory"
            )
            logger.error("%s", fault)
            raise ValueError(f"{fault}: {_LESS_MEMORY}")
        for i, name in enumerate(names):
            ranks = [rank for rank, found in enumerate(everywhere) if found[i] and rank != own]
            if ranks and name not in broken:
                broken[name] = f"it fails on rank {ranks[0]}, whose own log says why"
        self.counts["preflights"] += 1
        works = ", ".join(name for name in serving if name not in broken)
        words = "%s: preflight on %s: kernels that work: %s; results need %.1f MiB of %s free"
        shown = "an unknown number" if free is None else f"{free / 2**20:,.0f} MiB"
        logger.info(words, _rank(shard), kind, works, needed / 2**20, shown)
        return broken

    def _warn_of_ranks(self) -> None:
        if self._has_warned or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._has_warned = True
        words = "%d ranks are connected, and attention is given whole sequences on each: a strategy or hand_down splits"
        logger.warning(f"{words} them", dist.get_world_size())

    # Failures

    def _failed(self, error: BaseException, what: str) -> None:
        if not isinstance(error, RuntimeError):
            return  # an interrupt, which wants no advice
        self.counts["failures"] += 1
        advice = _advice(error)
        error.add_note(advice)
        logger.error("%s; %s", what, advice)


def _advice(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"Memory is short: {_LESS_MEMORY}."
    if isinstance(error.__cause__, RuntimeError):  # of a message that did not come
        return "Another rank has ended or does something else: the first error among the ranks says why."
    return (
        "The step cannot be finished, and all ranks end: the kernel 'eager' is the plainest; where memory may be the "
        f"cause, {_LESS_MEMORY}."
    )


def _rank(shard: SequenceShard | None) -> str:
    if shard is not None:
        return f"rank {shard.rank} of {shard.comm.ranks} that share sequences"
    return "whole sequences"


def _fault(name: str, kind: _Kind, q: Tensor, k: Tensor, pattern: Pattern, told: dict[str, Any]) -> str:
    """Why a kernel fails on a few tokens, by its own error or by the equation; nothing where it serves or refuses."""
    small = Pattern.dilated((4, 8), (1, 2), is_causal=pattern.is_causal)
    widths = ((q.shape[2], kind.head_dim), (k.shape[2], kind.head_dim), (k.shape[2], kind.value_dim))
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        hidden = (torch.arange(8) >= 6).to(q.device)[None]
        given = [_waves(8, *width, place).to(q.device, kind.dtype) for place, width in enumerate(widths)]
        grad = _waves(8, q.shape[2], kind.value_dim, 3).to(q.device, kind.dtype)
        for mask, dropout in product((None, hidden), {0.0, told.get("dropout", 0.0)}):
            judged = {"key_padding_mask": mask, "dropout": dropout}
            if explain(given[0], given[1], given[2], small, kernel=name, **judged).chosen is None:
                continue
            settings = {**judged, "mix": told.get("mix", "exact"), "dropout_seed": 0}
            truth = _tried(reference.name, [x.double() for x in given], small, grad.double(), settings)
            try:
                found = _tried(name, given, small, grad, settings)
            except (RuntimeError, ImportError) as error:
                return f"it fails on a few tokens: {error!r}"
            allowed = torch.finfo(kind.dtype).eps ** 0.5
            for ours, true in zip(found, truth, strict=True):
                far = (ours.double() - true).abs().max().item()
                if not far <= allowed * max(1.0, true.abs().max().item()):  # nor where it is no number
                    return f"it is wrong on a few tokens, by {far:.2g}"
    return ""


def _tried(
    name: str, given: list[Tensor], pattern: Pattern, grad: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    out: Tensor = attend(leaves[0], leaves[1], leaves[2], pattern, kernel=name, **settings)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _waves(tokens: int, heads: int, width: int, place: int) -> Tensor:
    """Numbers of one sample that draw on no generator."""
    return torch.arange(tokens * heads * width).mul(0.7 + place).sin().view(1, tokens, heads, width)


def _needed_bytes(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> int:
    """Of out and lse, and of the gradients where there will be any."""
    out = q.shape[:3].numel() * v.shape[3]
    found = out * dtype.itemsize + q.shape[:3].numel() * max(dtype.itemsize, 4)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        found += (q.numel() + k.numel() + v.numel()) * dtype.itemsize
    return found


def _free_bytes(device: torch.device) -> int | None:
    """None where the platform does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    rows = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024
