"""The time of the host in a layer of attention: kernels and messages do nothing, and tensors are small.

On a GPU this is the time in which a layer is launched.  What remains are the operators that read rows, merge results
and add gradients, here on a CPU, and the Python between them.  The bodies of the operators of op.py run as torch runs
them, below autograd; the checks of `attend`, the dispatcher and autograd come on top.  Rows without the name of a
kernel are those of a kernel that computes block after block, which is what "auto" takes on CUDA for any pattern.  The
kernel "triton" takes all blocks in one launch, and runs only if it is named: of its rows, what Triton does with the
arguments of a launch is left out.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from importlib.util import find_spec
from time import process_time
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from lightning_longnet import Pattern
from lightning_longnet.attention import op
from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.compiling import VIEWS
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.planning.fake_rank import FakeComm, PlannedShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.kernels.call import Call
    from lightning_longnet.attention.parallel.schedule import Exchange

HEADS, HEAD_DIM, RANKS, TOKENS = 8, 64, 8, 32
EXCHANGES: tuple[Exchange, ...] = "gather", "ring", "swap"
LOCAL_GOAL, RANKS_GOAL = 150, 400  # microseconds
# the branches of the other rows, as many times shorter as the sequence: the blocks are as many
FIVE = Pattern.dilated((16, 32, 64, 128, 256), (1, 2, 4, 8, 16), is_causal=True)
DENSE = Pattern.dense(is_causal=True)


class NoKernel:
    """A kernel that returns zeros, the same ones for equal shapes, in memory as those of torch's operators on CUDA."""

    def __init__(self) -> None:
        self._results: dict[Any, tuple[Tensor, ...]] = {}

    def takes_weights(self, device: str) -> bool:
        """Return whether blocks have weights: not on a GPU, whose blocks are measured here."""
        return False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        key = q.shape
        if key not in self._results:
            self._results[key] = _rows_in_order(q), torch.zeros(q.shape[:3])
        out, lse = self._results[key]
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        key = q.shape, k.shape
        if key not in self._results:
            self._results[key] = _rows_in_order(q), _rows_in_order(k), _rows_in_order(k)
        return self._results[key]


def _rows_in_order(x: Tensor) -> Tensor:
    """Return zeros of the shape of x (batch, heads, rows, D), of which the heads of a row are side by side."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class NoProgram:
    """A program of Triton that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """Take the arguments of a launch."""


class _Arrived:
    """Messages that have arrived."""

    def wait(self) -> None:
        """Return at once."""


class _Comm(FakeComm):
    """A rank whose messages arrive at once, with anything in them."""

    name = None

    def exchange(self, send: Any, receive: Any, context: Any, content: Any) -> _Arrived:  # type: ignore[override]
        return _Arrived()


class _Shard(PlannedShard):
    """A rank that runs attention, and does not only know its memory."""

    def __init__(self, placement: Placement, rank: int) -> None:
        super().__init__(placement, rank, {})
        self.comm = _Comm(rank, placement.ranks)
        self.threads, self.calls, self.saves_inputs_of, self.key_padding_mask = 1, 1, {}, None

    saves_inputs = SequenceShard.saves_inputs


def rows(rounds: int = 100) -> list[dict[str, Any]]:
    """Return the rows of a forward and of a backward, on one process and over ranks."""
    result = []
    for name, pattern, kind in (("five branches", FIVE, "contiguous"), ("dense", DENSE, "zigzag")):
        result += _of_layer(f"{name}, local", pattern, None, "auto", LOCAL_GOAL, rounds)
        if find_spec("triton") is not None:
            result += _of_layer(f"{name}, local, triton", pattern, None, "auto", LOCAL_GOAL, rounds, "triton")
        placement = Placement.even(RANKS * TOKENS, RANKS, kind)
        for exchange in EXCHANGES:
            shard = _Shard(placement, RANKS // 2)
            result += _of_layer(f"{name}, {RANKS} ranks, {exchange}", pattern, shard, exchange, RANKS_GOAL, rounds)
    return result


def _of_layer(
    name: str,
    pattern: Pattern,
    shard: _Shard | None,
    exchange: Exchange,
    goal: int,
    rounds: int,
    kernel: str = "sdpa",
) -> list[dict[str, Any]]:
    """Return the rows of the two directions of a layer: medians in microseconds."""
    spec = AttentionSpec(pattern, kernel, exchange=exchange).dumps()
    number = None if shard is None else shard.number
    q, k, v, grad = torch.zeros(4, 1, TOKENS, HEADS, HEAD_DIM).unbind()
    others = None, None, None, None, spec, number
    with ExitStack() as context:
        context.enter_context(patch.dict(BLOCK_KERNELS, sdpa=NoKernel()))
        if kernel == "triton":
            from lightning_longnet.attention.kernels.triton import launch

            for program in ("forward", "query_gradient", "key_gradients"):
                context.enter_context(patch.object(launch, program, NoProgram()))
        context.enter_context(torch._C._AutoDispatchBelowAutograd())
        context.enter_context(torch._C._ExcludeDispatchKeyGuard(VIEWS))
        out, lse, saved = op.forward.body(q, k, v, *others)
        directions: dict[str, Callable[[], Any]] = {
            "forward": lambda: op.forward.body(q, k, v, *others),
            "backward": lambda: op.backward.body(grad, q, k, v, out, lse, saved, *others),
        }
        return [
            {"name": f"microseconds of the host, {name}, {direction}", "ratio": _median(run, rounds), "goal": goal}
            for direction, run in directions.items()
        ]


def _median(run: Callable[[], Any], rounds: int) -> int:
    """Return the median time of the CPU in microseconds; the first calls are left out, as they make a plan."""
    times = []
    for _ in range(rounds + 3):
        begin = process_time()
        run()
        times.append(process_time() - begin)
    return round(1e6 * statistics.median(times[3:]))


def main() -> None:
    torch.set_num_threads(1)
    for row in rows():
        print(f"{row['name']:<64}  {row['ratio']:6d}   goal {row['goal']}")


if __name__ == "__main__":
    main()
