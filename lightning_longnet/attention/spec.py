"""`AttentionSpec`: every option of a call of attention that is not a tensor, as one value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.plan.blocks import UNCUT

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.ordering import Ordering

Mix = Literal["exact", "detached"]


@dataclass(frozen=True)
class AttentionSpec:
    """The options of a call, checked: frozen, hashable, and equal on all ranks that share sequences.

    `prepared_call` makes it for each call, `longnet plan` and `ModelFlops` for calls that they count.  As text
    (`dumps`) it is an argument of the operators of op.py.

    Args:
        pattern: which keys a query sees.
        kernel: the name of the kernel that runs; never "auto".
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
        dropout: the probability that a pair is dropped.
        first_sample, sample_step: sample b of the batch is number `first_sample + sample_step * b` to dropout.
        mix: "exact" or "detached"; see `attend`.
        exchange: how keys reach the queries of other ranks.
        ordering: the permutation of tokens in which the pattern is defined; "raster" is the sequence's own order.
        returns_lse: whether the caller, or the gradient of sinks, reads the log-sum-exp: an all_to_all must then carry
            it, too.
        softcap: the bound of the scores, or None; see `attend`.
    """

    pattern: Pattern
    kernel: str
    scale: float | None = None
    dropout: float = 0.0
    first_sample: int = 0
    sample_step: int = 1
    mix: Mix = "exact"
    exchange: Exchange = "auto"
    ordering: Ordering = "raster"
    returns_lse: bool = False
    softcap: float | None = None

    def dumps(self) -> str:
        """Return one line of JSON, the same for equal specs: how a spec travels through an operator's schema.

        `attend` and `_attend_part` call it in each call.  It is formatted by hand because torch.compile traces this
        method and cannot follow a JSON encoder.
        """
        scale = "null" if self.scale is None else repr(self.scale)
        softcap = "null" if self.softcap is None else repr(self.softcap)
        return (
            f'{{"pattern":{self.pattern.dumps()},"kernel":"{self.kernel}","scale":{scale},"dropout":{self.dropout!r},'
            f'"first_sample":{self.first_sample},"sample_step":{self.sample_step},"mix":"{self.mix}",'
            f'"exchange":"{self.exchange}","ordering":"{self.ordering}","returns_lse":{int(self.returns_lse)},'
            f'"softcap":{softcap}}}'
        )

    @staticmethod
    def loads(text: str) -> AttentionSpec:
        """Return the spec that `dumps` wrote; equal texts give the same object.

        The operators of op.py call it in each forward and backward, also on fake tensors, and `longnet plan` calls it.
        """
        return _loads(text)

    @property
    def counts_once(self) -> bool:
        """Whether a pair is one and the same in whichever branch it is computed.

        Then dropout decides about it independently of the branch.  `RankCall.pair_options` asks for a rank's part; a
        call on whole sequences asks `Plan.counts_once`.
        """
        return self.pattern.multiplicity == "set"

    @property
    def partials(self) -> int:
        """The number of partial results that the backward needs: one of each branch for "detached", else one of all.

        `_line_call` and `RankCall.branch_outs` ask, so that the backward gets the out of each branch, and
        `Footprint.saved`, which allocates as many of them on fake tensors.
        """
        return len(self.pattern.branches) if self.mix == "detached" else 1

    def scale_of(self, head_dim: int) -> float:
        """Return the factor of the scores: `scale`, or 1 / sqrt(head_dim).

        `_line_call` and `RankCall.pair_options` ask for a call that runs blocks, `call_kind` to compare it between
        ranks, and the kernel "reference".
        """
        return head_dim**-0.5 if self.scale is None else self.scale

    def weighted_segments(self, device: str, samples: int, threads: int, *, per_branch: bool = False) -> int:
        """Return how many segments a kernel call must cover for the plan to compute a repeated pair once.

        0 means that every branch computes its own pairs: where the caller needs each branch's result (`per_branch`),
        where dropout drops the copies of a pair one by one, and where the kernel takes no weights on such a device.
        Otherwise a call that computes pairs once serves one head, and must keep all threads busy with its segments and
        samples: the result is threads / samples, rounded up.  A `PartsKernel` runs the segments of all heads in one
        launch and takes any number: the result is `UNCUT`.  `_line_call` and `distributed_calls` ask before they plan,
        and `longnet plan` and `ModelFlops` before they count.
        """
        kernel = BLOCK_KERNELS.get(self.kernel)  # the reference runs no blocks
        if per_branch or self.dropout > 0 or kernel is None or not kernel.takes_weights(device):
            return 0
        if hasattr(kernel, "forward_parts"):
            return UNCUT
        return -(-threads // samples)


@lru_cache(1024)
def _loads(text: str) -> AttentionSpec:
    """Return the spec of a line of `AttentionSpec.dumps`; equal lines give the same object."""
    values: dict[str, Any] = json.loads(text)
    pattern = Pattern.loads(json.dumps(values.pop("pattern"), separators=(",", ":")))
    return AttentionSpec(pattern, **{**values, "returns_lse": bool(values["returns_lse"])})
