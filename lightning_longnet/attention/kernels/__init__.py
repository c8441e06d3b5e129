"""Who does the arithmetic?  The choice must not change the answer, and a kernel that cannot serve says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from lightning_longnet.attention.kernels import cudnn, eager, flash, reference, sdpa

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lightning_longnet.attention.kernels.call import Call
    from lightning_longnet.attention.pattern.pattern import Pattern


class Request(NamedTuple):
    """What a kernel may judge a call by."""

    device: str
    dtype: torch.dtype
    tokens: int
    heads: int
    head_dim: int
    value_dim: int
    is_padded: bool = False
    has_dropout: bool = False
    capability: tuple[int, int] | None = None  # of a CUDA device
    has_few_keys: bool = False


class Kernel(Protocol):
    """What `judge` asks of each."""

    @property
    def name(self) -> str: ...

    def note(self, request: Request) -> str: ...

    def refusals(self, request: Request) -> list[str]: ...


class BlockKernel(Protocol):
    """A kernel that computes one block of a larger softmax, and may count a pair of it several times."""

    def takes_weights(self, device: str) -> bool: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]: ...


BLOCK_KERNELS: dict[str, BlockKernel] = {"flash": flash, "sdpa": sdpa, "cudnn": cudnn, "eager": eager}
_KERNELS: tuple[Kernel, ...] = (flash, sdpa, cudnn, eager, reference)  # in the order of preference
# On a CPU flash attention takes longer than plain products for calls of fewer keys (benchmarks/block_sparse.py)
FEW_KEYS = 512


class Verdict(NamedTuple):
    kernel: str
    note: str
    refusals: tuple[str, ...]


class Explanation(NamedTuple):
    """Which kernel runs, and what each of them says to this call."""

    chosen: str | None
    verdicts: tuple[Verdict, ...]
    request: Request

    def __str__(self) -> str:
        device, dtype, capability = self.request.device, self.request.dtype, self.request.capability
        where = device if capability is None else "{} of compute capability {}.{}".format(device, *capability)
        wide = "float64" if dtype.itemsize > 4 else "float32"
        rows = [f"{where}, {str(dtype).removeprefix('torch.')}, accumulates in {wide}"]
        for verdict in self.verdicts:
            state = "runs" if verdict.kernel == self.chosen else "refuses" if verdict.refusals else "could serve"
            rows.append(f"{verdict.kernel:<10} {state:<12} {'; '.join(verdict.refusals) or verdict.note}")
        return "\n".join(rows)


def kernel_names() -> tuple[str, ...]:
    return tuple(each.name for each in _KERNELS)


def has_few_keys(pattern: Pattern) -> bool:
    """Are kept blocks all that a query sees, and few of them?  Alike on all ranks, whatever their lengths."""
    for branch in pattern.branches:
        if branch.sparsity is None or branch.segment_length is None:
            return False
        kept = branch.sparsity.sparsity_ratio * branch.segment_length / branch.dilation_rate
        if max(kept, branch.sparsity.block_size) > FEW_KEYS:  # own blocks stay, whatever the ratio
            return False
    return True


def judge(kernel: str, request: Request) -> Explanation:
    """The kernel of this name, or for "auto" the first that serves the request."""
    verdicts = []
    for each in _KERNELS:
        refusals = tuple(each.refusals(request))
        verdicts.append(Verdict(each.name, "" if refusals else each.note(request), refusals))
    names = [verdict.kernel for verdict in verdicts]
    if kernel != "auto" and kernel not in names:
        raise ValueError(f"kernel must be one of 'auto', {', '.join(map(repr, names))}, got {kernel!r}")
    serving = [v.kernel for v in verdicts if not v.refusals and kernel in ("auto", v.kernel)]
    if request.has_few_keys and request.device == "cpu":
        serving.sort(key=lambda name: name != eager.name)
    return Explanation(serving[0] if serving else None, tuple(verdicts), request)


def select(kernel: str, request: Request) -> str:
    explanation = judge(kernel, request)
    if explanation.chosen is None:
        asked = "no kernel can" if kernel == "auto" else f"kernel={kernel!r} cannot"
        reasons = "; ".join(r for v in explanation.verdicts if kernel in ("auto", v.kernel) for r in v.refusals)
        others = [v.kernel for v in explanation.verdicts if not v.refusals]
        raise ValueError(
            f"{asked} serve this call: {reasons}. Those that can: {', '.join(map(repr, others)) or 'none'}"
        )
    return explanation.chosen
