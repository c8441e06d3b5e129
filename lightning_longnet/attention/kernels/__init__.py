"""The kernels that compute attention, and the choice between them.

Every kernel gives the same result up to rounding.  A kernel that cannot compute a call says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from lightning_longnet.attention.kernels import cudnn, eager, flash, hub, reference, sdpa, triton
from lightning_longnet.attention.kernels.activated import FLASH3, FLASH4

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lightning_longnet.attention.kernels.accumulator import Accumulator
    from lightning_longnet.attention.kernels.blocks import BackwardInputs
    from lightning_longnet.attention.kernels.call import Call
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.parts import Parts


class Request(NamedTuple):
    """The properties of a call on which the choice of a kernel depends.

    `request_of` makes it for `attend` and `explain`; `longnet plan` and `ModelFlops` make one for calls that they only
    count.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    heads: int
    head_dim: int
    value_dim: int
    is_padded: bool = False
    has_dropout: bool = False
    capability: tuple[int, int] | None = None  # that of a CUDA device
    has_few_keys: bool = False
    masks_later: bool = False  # whether calls have an `OrderMask` (call.py)
    has_softcap: bool = False
    excluded: frozenset[str] = frozenset()  # the option `excluded_kernels` of `attend`

    def lacks(self, *features: str) -> list[str]:
        """Return why a kernel that lacks some features must refuse the request: a reason for each that the request has.

        `features` are fields of the request with a reason in `_REASONS`.  `refusals` of the kernels calls it.
        """
        return [_REASONS[feature] for feature in features if getattr(self, feature)]


# why a kernel refuses a request that has a feature, for the features that several kernels lack
_REASONS = {
    "is_padded": "has no padding masks",
    "has_dropout": "has no dropout",
    "masks_later": "cannot mask keys by their tokens",
    "has_softcap": "cannot bound scores by a softcap",
}


class Kernel(Protocol):
    """The interface that `judge` uses to ask a kernel module whether it can compute a call."""

    @property
    def name(self) -> str:
        """The value of the option `kernel` that selects this one."""

    def note(self, request: Request) -> str:
        """Return what this kernel would run for a call that it does not refuse.

        `judge` asks, and `explain` shows it.
        """

    def refusals(self, request: Request) -> list[str]:
        """Return the reasons why this kernel cannot compute a call; an empty list if it can.

        `judge` asks.
        """


class BlockKernel(Protocol):
    """A kernel that computes one block of a larger softmax.

    `forward_blocks` and `backward_blocks` call it for each kernel call that the blocks of a plan were cut into, and
    merge the results.

    Shapes: q is (batch, heads, queries, D), k (batch, key heads, keys, D) and v (batch, key heads, keys, Dv), where
    batch counts the samples times the segments of the block, and each key head serves heads / key heads query heads.
    The lse is the log-sum-exp of the scores, (batch, heads, queries).
    """

    def takes_weights(self, device: str) -> bool:
        """Return whether the kernel takes weights of pairs (`Block.repeats`) on such a device: how often each counts.

        `AttentionSpec.weighted_segments` asks before a plan is made: only then may a plan compute a pair once that
        several branches show.  On a CPU `cut_parts` asks in each forward and backward: then it also joins small
        blocks.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return out, (batch, heads, queries, Dv), and lse of the block alone.

        A query that sees no key of the block has out = 0 and lse = -inf.  Both may be in the type of q or in a wider
        one.  `_forward` of blocks.py calls it, or `_forward_steps` where nothing is masked.
        """

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the block adds to dq, dk and dv.

        `out` and `lse` are those of the whole softmax over all blocks, for the queries of this block.  A query that
        sees no key in the whole softmax has lse = +inf, so that its weights exp(S - lse) are 0.  `_backward` of
        blocks.py calls it, or `_backward_steps` where nothing is masked.
        """


class PartsKernel(Protocol):
    """A kernel that computes the blocks of many parts in few launches, which merge their results.

    Its arguments are those of `forward_blocks` and `backward_blocks`.  The kernel "triton" is one.
    """

    def takes_weights(self, device: str) -> bool:
        """Return whether the kernel takes weights of pairs (`Block.repeats`), in a launch of any number of segments.

        `AttentionSpec.weighted_segments` asks before a plan is made.
        """

    def forward_parts(
        self,
        parts: Parts,
        q: Tensor,
        keys: Keys,
        options: PairOptions,
        totals: list[Partial | None],
    ) -> None:
        """Merge the result of each part into the partial of its branch, or into the only one.

        `forward_blocks` calls it once for all parts that it was given.  A total that is None must be allocated.
        """

    def backward_parts(
        self,
        parts: Parts,
        q: Tensor,
        keys: Keys,
        inputs: BackwardInputs,
        options: PairOptions,
        dq: Accumulator,
        stores: tuple[bool, bool] = (False, False),
    ) -> None:
        """Add the gradients of all parts to dq, and to the gradients of `keys`.

        `backward_blocks` calls it once for all parts that it was given.
        """


BLOCK_KERNELS: dict[str, BlockKernel | PartsKernel] = {
    "flash": flash,
    "sdpa": sdpa,
    "cudnn": cudnn,
    "flash3": FLASH3,
    "flash4": FLASH4,
    "hub": hub,
    "eager": eager,
    "triton": triton,
}
# in order of preference
_KERNELS: tuple[Kernel, ...] = (flash, sdpa, cudnn, FLASH3, FLASH4, hub, eager, reference, triton)
# "auto" does not choose these: no GPU has measured them, and flash3 and flash4 switch what torch's flash attention runs
# in for the whole process
_NAMED_ONLY = (FLASH3.name, FLASH4.name, hub.name, triton.name)
# On a CPU flash attention takes longer than plain products for calls of fewer keys (benchmarks/block_sparse.py)
FEW_KEYS = 512


class Verdict(NamedTuple):
    """The answer of one kernel to a request: what it would run, or why it refuses; `judge` asks each kernel."""

    kernel: str
    note: str
    refusals: tuple[str, ...]


class Explanation(NamedTuple):
    """The kernel that runs a call, or None if none that may run can, and the verdict of each kernel.

    `judge` returns it, and `explain` gives it to users.
    """

    chosen: str | None
    verdicts: tuple[Verdict, ...]
    request: Request

    def __str__(self) -> str:
        """Return a table with a line for each kernel, in the order of preference, below a line about the tensors."""
        device, dtype, capability = self.request.device, self.request.dtype, self.request.capability
        where = device if capability is None else "{} of compute capability {}.{}".format(device, *capability)
        wide = "float64" if dtype.itemsize > 4 else "float32"
        rows = [f"{where}, {str(dtype).removeprefix('torch.')}, accumulates in {wide}"]
        for verdict in self.verdicts:
            state = "runs" if verdict.kernel == self.chosen else "refuses" if verdict.refusals else "could serve"
            rows.append(f"{verdict.kernel:<10} {state:<12} {'; '.join(verdict.refusals) or verdict.note}")
        return "\n".join(rows)


def kernel_names() -> tuple[str, ...]:
    """Return the names of all kernels, in the order of preference.

    `checked_exclusions` checks the names that `attend` is given by it, `kernel_name` those that layers are given, and
    `candidates` chooses among them.
    """
    return tuple(kernel.name for kernel in _KERNELS)


def candidates(kernel: str) -> tuple[str, ...]:
    """Return the names of the kernels that may run where the option is `kernel`, in the order of preference.

    `judge` chooses one of them, and a `Guard` tries each of them in its preflight.
    """
    return tuple(name for name in kernel_names() if name not in _NAMED_ONLY or name == kernel)


def has_few_keys(pattern: Pattern) -> bool:
    """Return whether the kept blocks of a query hold at most `FEW_KEYS` keys in every branch, and nothing else is seen.

    The answer depends on the pattern alone, not on the length, so that it is the same on all ranks.  `request_of` asks;
    `judge` prefers "eager" for such a pattern on a CPU.
    """
    for branch in pattern.branches:
        if branch.sparsity is None or branch.segment_length is None:
            return False
        kept = branch.sparsity.sparsity_ratio * branch.segment_length / branch.dilation_rate
        if max(kept, branch.sparsity.block_size) > FEW_KEYS:  # a query keeps its own block at any ratio
            return False
    return True


def judge(kernel: str, request: Request) -> Explanation:
    """Return the verdicts of all kernels, and the choice: `kernel`, or for "auto" the first that does not refuse.

    "auto" leaves out the kernels of `_NAMED_ONLY`, and on a CPU takes "eager" first if the request `has_few_keys`.  If
    the request excludes `kernel`, the choice is that of "auto".  It is None where no kernel that may run can.

    `explain`, the guard's preflight, `longnet plan` and `ModelFlops` ask, and `select` where no kernel can.
    """
    chosen, verdicts = _chosen(kernel, request), []
    for candidate in _KERNELS:
        refusals = _refusals(candidate, request)
        verdicts.append(Verdict(candidate.name, "" if refusals else candidate.note(request), refusals))
    return Explanation(chosen, tuple(verdicts), request)


def _chosen(kernel: str, request: Request) -> str | None:
    """Return the choice of `judge`: it asks the kernels that may run, in their order, until one does not refuse."""
    if kernel != "auto" and kernel not in kernel_names():
        raise ValueError(f"kernel must be one of 'auto', {', '.join(map(repr, kernel_names()))}, got {kernel!r}")
    allowed = candidates("auto") if kernel == "auto" or kernel in request.excluded else (kernel,)
    asked = [candidate for candidate in _KERNELS if candidate.name in allowed]
    if request.has_few_keys and request.device == "cpu":
        # the sort is stable: eager goes to the front, the others keep their order
        asked.sort(key=lambda candidate: candidate.name != eager.name)
    for candidate in asked:
        if not _refusals(candidate, request):
            return candidate.name
    return None


def _refusals(kernel: Kernel, request: Request) -> tuple[str, ...]:
    """Return why a kernel cannot run a request, or must not."""
    return ("excluded_kernels names it",) if kernel.name in request.excluded else tuple(kernel.refusals(request))


def select(kernel: str, request: Request) -> str:
    """Return the name of the kernel that runs a request, or raise a ValueError with the reasons of those that refuse.

    `kernel` is a name, or "auto".  `prepared_call` calls it for each call of `attend`.
    """
    chosen = _chosen(kernel, request)
    if chosen is None:
        explanation = judge(kernel, request)
        asked = "no kernel can" if kernel == "auto" else f"kernel={kernel!r} cannot"
        reasons = "; ".join(r for v in explanation.verdicts if kernel in ("auto", v.kernel) for r in v.refusals)
        others = [v.kernel for v in explanation.verdicts if not v.refusals]
        raise ValueError(
            f"{asked} serve this call: {reasons}. Those that can: {', '.join(map(repr, others)) or 'none'}"
        )
    return chosen
