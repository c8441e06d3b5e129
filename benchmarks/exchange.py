"""Measure dilated attention over ranks with each exchange, without an exchange, and dense ring attention.

    python benchmarks/exchange.py
    python benchmarks/exchange.py --table            # the committed result, as the pages show it
    python benchmarks/exchange.py --plot-only        # draws the committed result again
    python benchmarks/exchange.py --long             # 65,536 tokens on two ranks, where a dense ring takes minutes
    python benchmarks/exchange.py --peer             # adds ring-attention-pytorch at the smallest size: minutes, too

Every rank is a process of one thread on this machine, and messages use gloo.  Each round runs every participant once,
on all ranks together.  The time of a step is that of its slowest rank, and results are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from figure import draw_exchange
from machine import described
from peers import ring_attention_pytorch
from ranks import on_ranks

from lightning_longnet import Pattern, SequenceShard, attend
from lightning_longnet.attention.parallel.comm import Comm, MessageContext, Pending

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEADS, HEAD_DIM = 8, 64
WIDTHS, RATES = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]
CASES = [
    # ranks, tokens, factor of the segment lengths
    (1, 16384, 1),
    (2, 16384, 1),
    (2, 16384, 2),
    (4, 32768, 1),
    (4, 32768, 2),
]
LONG = [(2, 65536, 2)]
PEER, PEER_CASE = "ring-attention-pytorch, dense", (2, 16384, 1)
TAKE_MINUTES = {PEER, "dense ring, zigzag"}  # these run only one round
RESULT = Path(__file__).parent / "results" / "exchange-cpu.json"


Participant = tuple[SequenceShard, "Callable[[Tensor, Tensor, Tensor], Tensor]"]


class Silent(Comm):
    """A Comm that sends nothing, to run the same blocks without an exchange."""

    def exchange(
        self, send: dict[int, Tensor], receive: dict[int, Tensor], context: MessageContext, content: str
    ) -> Pending:
        for tensor in receive.values():
            tensor.fill_(0.5)
        return Pending([], (), self)


def participants(
    group: dist.ProcessGroup, ranks: int, tokens: int, factor: int
) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Return a shard and a function of q, k and v for each name."""
    here = tokens // ranks
    pattern = Pattern.dilated([w * factor for w in WIDTHS], RATES, is_causal=True)
    dense = Pattern.dense(is_causal=True)
    found: dict[str, Participant] = {}

    def add(name: str, shown: Pattern, exchange: Any, placement: Any = "contiguous", silent: bool = False) -> None:
        shard = SequenceShard(group, here, placement)
        if silent:
            shard.comm = Silent(group)
        found[name] = shard, lambda q, k, v: attend(q, k, v, shown, shard=shard, exchange=exchange)

    add("same blocks, no exchange", pattern, "gather", silent=True)
    for exchange in ("gather", "ring", "swap"):
        add(exchange, pattern, exchange)
    shard, alone = found["same blocks, no exchange"]
    found["all keys to all ranks"] = shard, lambda q, k, v: alone(q, _everywhere(k, group), _everywhere(v, group))
    add("dense ring, zigzag", dense, "ring", "zigzag")
    return found


def with_peer(
    group: dist.ProcessGroup, ranks: int, tokens: int, factor: int
) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Return the peer and the participants that it is compared with."""
    found = participants(group, ranks, tokens, factor)
    chosen = {name: found[name] for name in ("same blocks, no exchange", "gather", "dense ring, zigzag")}
    return chosen | {PEER: (chosen["gather"][0], ring_attention_pytorch(ranks))}


def _everywhere(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _Everywhere.apply(x, group)  # type: ignore[no-untyped-call]
    return found


class _Everywhere(torch.autograd.Function):
    """An all-gather of keys that returns this rank's part, so that blocks are the same; gradients are reduced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return parts[dist.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ranks = dist.get_world_size(ctx.group)
        received = [torch.empty_like(grad) for _ in range(ranks)]
        dist.all_to_all(received, [grad.contiguous()] * ranks, group=ctx.group)
        return grad, None


def work(ranks: int, tokens: int, factor: int, rounds: int, has_peer: bool = False) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = 1, tokens // ranks, HEADS, HEAD_DIM
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    running = (with_peer if has_peer else participants)(group, ranks, tokens, factor)
    times: dict[str, list[float]] = {name: [] for name in running}
    told: dict[str, dict[str, float]] = {}
    for turn in range(1 + rounds):  # the first one warms up
        for name, (shard, call) in running.items():
            if turn == 0 and rounds == 1 and name in TAKE_MINUTES:
                continue
            for x in inputs:
                x.grad = None
            before = shard.comm.sent_bytes, shard.comm.waited_seconds
            dist.barrier()
            begin = perf_counter()
            call(*inputs).backward(grad)
            took = torch.tensor(perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:
                times[name].append(took.item())
            told[name] = {
                "sent_mib": (shard.comm.sent_bytes - before[0]) / 2**20,
                "waited_seconds": shard.comm.waited_seconds - before[1],
            }
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, told)
    alone = statistics.median(times["same blocks, no exchange"])
    rows = []
    for name, seconds in times.items():
        step = statistics.median(seconds)
        sent = [each[name]["sent_mib"] for each in everywhere]
        one = q.numel() * q.element_size() / 2**20
        if name == "all keys to all ranks":  # forward both, and both gradients back
            sent = [4 * (ranks - 1) * one] * ranks
        elif name == PEER:  # both forward; both and their gradients backward, and those home
            sent = [(2 * (ranks - 1) + 4 * (ranks - 1) + 2) * one] * ranks
        rows.append(
            {
                "ranks": ranks,
                "tokens": tokens,
                "widths": _widths(factor),
                "participant": name,
                "step_seconds": round(step, 4),
                "over_same_blocks": round(step / alone, 3),
                "sent_mib_mean": round(statistics.mean(sent), 2),
                "sent_mib_most": round(max(sent), 2),
                "waited_share": round(max(each[name]["waited_seconds"] for each in everywhere) / step, 3),
                "rounds": len(seconds),
            }
        )
    return rows


def measure(case: tuple[int, int, int], rounds: int, has_peer: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = on_ranks(case[0], work, *case, rounds, has_peer)
    return rows


def table(result: dict[str, Any]) -> str:
    cases = _cases(result)
    heads = map(_title, cases)
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(cases) + 1) + "|"]
    for name in dict.fromkeys(r["participant"] for r in result["rows"]):
        rows = [[r for r in _rows(result, case) if r["participant"] == name] for case in cases]
        lines.append(f"| {name} | " + " | ".join(_cell(r[0]) if r else "" for r in rows) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    found = f"{row['step_seconds']:.2f} s, {row['over_same_blocks']:.2f} x, {row['sent_mib_most']:.1f} MiB"
    is_counted = row["participant"] in ("gather", "ring", "swap", "dense ring, zigzag") and row["ranks"] > 1
    return f"{found}, {row['waited_share']:.0%}" if is_counted else found


def _cases(result: dict[str, Any]) -> list[tuple[int, int, str]]:
    return list(dict.fromkeys((r["ranks"], r["tokens"], r["widths"]) for r in result["rows"]))


def _title(case: tuple[int, int, str]) -> str:
    ranks, tokens, widths = case
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'}, {tokens:,} tokens, segments {widths}"


def _widths(factor: int) -> str:
    return f"{WIDTHS[0] * factor} to {WIDTHS[-1] * factor}"


def _rows(result: dict[str, Any], case: tuple[int, int, str]) -> list[dict[str, Any]]:
    return [r for r in result["rows"] if (r["ranks"], r["tokens"], r["widths"]) == case]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the JSON; the plot stands beside it")
    parser.add_argument("--long", action="store_true", help="the long case, one round, to exchange-long-cpu.json")
    parser.add_argument("--peer", action="store_true", help="measure the peer, and add its row to the result at --out")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, to replace those at --out")
    parser.add_argument("--table", action="store_true", help="print the table of the result at --out, measure nothing")
    parser.add_argument("--plot-only", action="store_true", help="draw the result at --out again, measure nothing")
    options = parser.parse_args()
    if options.long:
        options.out, options.rounds = options.out.with_stem("exchange-long-cpu"), 1
    if options.table:
        print(table(json.loads(options.out.read_text())) if options.out.exists() else "not measured")
        return
    if options.plot_only:
        draw_exchange(json.loads(options.out.read_text()), options.out.with_suffix(".png"))
        return
    if options.peer:
        result: dict[str, Any] = json.loads(options.out.read_text())
        result["rows"] = [r for r in result["rows"] if r["participant"] != PEER]
        for row in measure(PEER_CASE, 1, has_peer=True):
            print(json.dumps(row), flush=True)
            result["rows"] += [row] if row["participant"] == PEER else []
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        draw_exchange(result, options.out.with_suffix(".png"))
        return
    before = {"rows": []} if options.only is None else json.loads(options.out.read_text())
    found: list[dict[str, Any]] = []
    for number, case in enumerate(LONG if options.long else CASES):
        stays = _rows(before, (case[0], case[1], _widths(case[2])))
        if options.only is None or number in options.only:
            measured = measure(case, options.rounds)
            print(*map(json.dumps, measured), sep="\n", flush=True)
            stays = measured + [r for r in stays if r["participant"] == PEER]
        found += stays
    result = {"machine": described("cpu"), "rows": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw_exchange(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
