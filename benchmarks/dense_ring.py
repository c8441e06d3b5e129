"""Measure dense causal attention over two ranks: the ring of this package, torch's, and ring-attention-pytorch.

    python benchmarks/dense_ring.py                    # writes benchmarks/results/dense_ring-cpu.json
    python benchmarks/dense_ring.py --table            # the committed result

Every rank is a process of one thread, and messages use gloo.  Each round runs every participant once, forward and
backward, on the same tokens; the time of a step is that of its slowest rank.  Two participants compute the whole
sequence in one process while the other rank waits: half of their time would be ideal.  The output and the
gradients of each participant are compared with those of torch's attention to the whole sequence.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import peers
import torch
import torch.distributed as dist
from machine import described, run
from ranks import on_ranks

from lightning_longnet import Pattern, SequenceShard, attend
from lightning_longnet.attention.parallel.placement import Kind, Placement

if TYPE_CHECKING:
    from torch import Tensor

RANKS, TOKENS, HEADS, HEAD_DIM = 2, 8192, 8, 64
OWN, TORCH, PEER = "lightning-longnet, ring, zigzag", "torch, ring template, zigzag", "ring-attention-pytorch"
WHOLE, WHOLE_TORCH = "lightning-longnet, one process", "torch, one process"
CONTEXT_PARALLEL = "torch, context_parallel"
# ring-attention-pytorch 0.5.20 returns other gradients of keys and values: its backward takes the pair that its
# `ring_pass` returns, the received buffer and the sent one, for those of the keys and of the values
COMPARED = {PEER: 2}  # the output and the gradient of the queries
# the largest difference of an element of an output or a gradient from that of torch's attention, relative to the
# largest element: float32 sums of thousands of products, in other orders
TOLERANCE = 1e-4
RESULT = Path(__file__).parent / "results" / "dense_ring-cpu.json"


def participants() -> dict[str, tuple[Kind | None, peers.Call]]:
    """Return the placement of the tokens, None for all on one rank, and the function of q, k and v, by name."""
    group, pattern = dist.group.WORLD, Pattern.dense(is_causal=True)
    assert group is not None
    shard = SequenceShard(group, TOKENS // RANKS, "zigzag")
    found: dict[str, tuple[Kind | None, peers.Call]] = {
        OWN: ("zigzag", lambda q, k, v: attend(q, k, v, pattern, shard=shard, exchange="ring")),
        TORCH: ("zigzag", peers.torch_ring(group)),
        WHOLE: (None, lambda q, k, v: attend(q, k, v, pattern)),
        WHOLE_TORCH: (None, peers.dense(True)),
    }
    if peers.has_ring_attention_pytorch():
        found[PEER] = "contiguous", peers.ring_attention_pytorch(RANKS)
    return found


def rows_of(placement: Kind | None, rank: int) -> Tensor:
    """Return the tokens of a rank, in local order."""
    if placement is None:
        return torch.arange(TOKENS)
    chunks = Placement.even(TOKENS, RANKS, placement).chunks(rank)
    return torch.cat([torch.arange(chunk.begin, chunk.end) for chunk in chunks])


def step(call: peers.Call, inputs: list[Tensor], grad: Tensor) -> tuple[float, list[Tensor]]:
    """Return the seconds of a forward and backward, and the output with the gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    begin = perf_counter()
    out = call(*leaves)
    out.backward(grad)
    seconds = perf_counter() - begin
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return seconds, [out.detach(), *gradients]


def work(rounds: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    tensors = list(torch.randn(4, 1, TOKENS, HEADS, HEAD_DIM, generator=generator).unbind())
    _, whole = step(peers.dense(True), tensors[:3], tensors[3])
    scales = [x.abs().max() for x in whole]
    running, times = participants(), dict[str, list[float]]()
    differences: dict[str, list[float]] = {}
    for turn in range(1 + rounds):  # the first one warms up, and is compared
        for name, (placement, call) in running.items():
            if turn == 0 and name == PEER and rounds > 1:
                continue  # it would take as long as all rounds of the others
            rows = rows_of(placement, rank)
            *inputs, grad = (x[:, rows] for x in tensors)
            dist.barrier()
            seconds, found = step(call, inputs, grad) if placement or rank == 0 else (0.0, [x[:, rows] for x in whole])
            pairs = zip(found, whole, scales, strict=True)
            furthest = [float((x - y[:, rows]).abs().max() / scale) for x, y, scale in pairs]
            figures = torch.tensor([seconds, *furthest])
            dist.all_reduce(figures, dist.ReduceOp.MAX)
            differences[name] = figures[1:].tolist()
            assert max(differences[name][: COMPARED.get(name)]) < TOLERANCE, (name, differences[name])
            if turn:
                times.setdefault(name, []).append(figures[0].item())
    return {"seconds": times, "differences": differences}


def measured(rounds: int) -> dict[str, Any]:
    found = on_ranks(RANKS, work, rounds)
    own = found["seconds"][OWN]
    rows = [
        {
            "participant": name,
            "step_seconds": round(statistics.median(seconds), 3),
            "over_own": round(statistics.median(a / b for a, b in zip(seconds, own, strict=True)), 3),
            "differences": found["differences"][name],  # of the output, and of the gradients of q, k and v
        }
        for name, seconds in found["seconds"].items()
    ]
    return {
        "machine": described("cpu"),
        "ranks": RANKS,
        "tokens": TOKENS,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "rounds": rounds,
        "rows": rows,
        "context_parallel": on_ranks(1, peers.context_parallel_refusal),
    }


def table(result: dict[str, Any]) -> str:
    heads = "step", "over the ring of this package", "difference of the output, dq", "of dk, dv"
    lines = ["| | " + " | ".join(heads) + " |", "|---" * 5 + "|"]
    for row in result["rows"]:
        pairs = (max(row["differences"][at : at + 2]) for at in (0, 2))
        figures = f"{row['step_seconds']:.2f} s | {row['over_own']:.2f} | " + " | ".join(f"{x:.0e}" for x in pairs)
        lines.append(f"| {row['participant']} | {figures} |")
    reason = "does not run on a CPU" if result["context_parallel"] else "runs on a CPU, not measured"
    return "\n".join([*lines, f"| {CONTEXT_PARALLEL} | {reason} | | | |"])


if __name__ == "__main__":
    run(__doc__, RESULT, measured, table, rounds=3)  # --rounds, --table
