"""The plan of attention over ranks: what each computes, sends and keeps.  It needs no process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention.parallel.exchange import Sizes, Volume
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.schedule import Schedule, schedule
from lightning_longnet.attention.pattern.pattern import Pattern, check_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20


@dataclass(frozen=True)
class SequencePlan:
    """A table of what every rank computes, sends and keeps in one forward and backward, as `print` shows it.

    `sequence_plan` returns it, for users and for the report of a run.

    Attributes:
        layout: the pattern, the heads, the documents and the placement.
        schedule: the exchange of each branch, and why.
        volumes: for each rank what it sends and keeps.
        pairs: for each rank how many (query, key) pairs its queries see, each as often as branches show it.
        received: the bytes of keys and values of rank b that rank a receives in the forward, `received[a][b]`.
    """

    layout: Layout
    schedule: Schedule
    volumes: tuple[Volume, ...]
    pairs: tuple[int, ...]
    received: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        """Return the table: the exchange of each branch with the reason, then a line for each rank."""
        pattern, placement = self.layout.pattern, self.layout.placement
        lines = [
            f"{placement.length:,} tokens on {placement.ranks} ranks, {placement.kind}",
            f"{'branch':<28} exchange",
        ]
        for branch, exchange in zip(pattern.ordered(), self.schedule.exchanges, strict=True):
            words = f"{branch.segment_length or 'all'} / {branch.dilation_rate}"
            words += " causal" * branch.is_causal + (f" window {branch.window}" if branch.window else "")
            words += f" {branch.sparsity}" if branch.sparsity else ""
            lines.append(f"{words:<28} {exchange}")
        lines += [f"why: {self.schedule.why}", ""]
        lines.append(f"{'rank':>6} {'tokens':>10} {'pairs':>14} {'sends MiB':>10} {'messages':>9} {'keeps MiB':>10}")
        for rank, (volume, pairs) in enumerate(zip(self.volumes, self.pairs, strict=True)):
            lines.append(
                f"{rank:>6} {placement.lengths[rank]:>10,} {pairs:>14,} {volume.sent_bytes / MIB:>10.2f} "
                f"{volume.messages:>9} {volume.kept_bytes / MIB:>10.2f}"
            )
        mean = sum(self.pairs) / len(self.pairs)
        lines.append(f"the busiest rank has {max(self.pairs) / mean if mean else 1:.2f} times the mean of the pairs")
        if len(pattern.branches) > 1 and pattern.multiplicity == "multiset":
            lines.append(
                "a pair counts as often as branches show it; kernels that take weights compute it once, if that pays"
            )
        return "\n".join(lines)

    def plot(self) -> Any:
        """Return a matplotlib figure of the keys and values sent between ranks, and of the pairs of each rank.

        Users call it.
        """
        from lightning_longnet.attention.pattern.picture import draw_ranks

        return draw_ranks(self.received, self.pairs, self.layout.placement.kind, self.schedule.exchanges)


def sequence_plan(
    pattern: Pattern,
    lengths: Sequence[int],
    heads: int,
    kv_heads: int | None = None,
    *,
    placement: Any = "contiguous",
    exchange: str = "auto",
    documents: Sequence[int] | None = None,
    batch: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> SequencePlan:
    """Return the plan of one layer's attention over ranks.

    Users call it before a run, and the callback `RunReport` for the attention of a run.

    Args:
        pattern: which keys a query sees.
        lengths: the number of tokens of each rank.
        heads, kv_heads: the numbers of query heads and of key/value heads of the whole layer.
        placement: "contiguous" or "zigzag", or the placement of `balanced_placement`, which has these lengths.
        exchange: the option of `attend`.
        documents: the lengths of the documents of a row, not their ids as `attend` takes them; one document by default.
        batch, head_dim, dtype: the sizes and the type of q, k and v.

    >>> print(sequence_plan(Pattern.dilated((512, 2048), (1, 4), is_causal=True), (1024,) * 4, heads=8))
    4,096 tokens on 4 ranks, contiguous
    branch                       exchange
    512 / 1 causal               gather
    2048 / 4 causal              gather
    why: gather sends least, 1.19 MiB with the cost of its messages; ring 2.38 MiB; swap 14.29 MiB
    <BLANKLINE>
      rank     tokens          pairs  sends MiB  messages  keeps MiB
         0      1,024      2,364,416       1.00         1       0.00
         1      1,024      2,888,704       1.00         1       1.00
         2      1,024      2,364,416       1.00         1       0.00
         3      1,024      2,888,704       1.00         1       1.00
    the busiest rank has 1.10 times the mean of the pairs
    a pair counts as often as branches show it; kernels that take weights compute it once, if that pays
    """
    where = placement if isinstance(placement, Placement) else Placement(tuple(lengths), placement)
    if where.lengths != tuple(lengths):
        raise ValueError(f"lengths must be those of the placement, {where.lengths}, got {tuple(lengths)}")
    cuts = [0]
    for length in documents or (where.length,):
        cuts.append(cuts[-1] + length)
    if cuts[-1] != where.length:
        raise ValueError(f"documents must have the {where.length} tokens of all ranks together, got {cuts[-1]}")
    layout = Layout(pattern, heads, check_heads(heads, kv_heads), tuple(cuts), where)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    sizes = Sizes(batch, head_dim, head_dim, dtype.itemsize, wide)
    chosen = schedule(layout, exchange, sizes)
    planned, ranks = chosen.plan(layout), range(where.ranks)
    received = [[0] * where.ranks for _ in ranks]
    pairs = []
    for rank in ranks:
        work = planned.work(rank)
        pairs.append(work.visible_pairs)
        for source, kv_rows in work.received.items():
            received[rank][source] = kv_rows * batch * 2 * head_dim * dtype.itemsize
    volumes = tuple(planned.volume(rank, sizes) for rank in ranks)
    return SequencePlan(layout, chosen, volumes, tuple(pairs), tuple(map(tuple, received)))
