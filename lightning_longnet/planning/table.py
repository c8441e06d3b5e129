"""A plan as tables for a terminal, and as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_longnet.planning.exchange import LayerKind
    from lightning_longnet.planning.run import RunPlan

GIB, MIB = 2**30, 2**20
WORDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "buffers": "engine's buffers",
    "activations": "activations",
    "exchange": "keys of other ranks",
    "loss": "loss",
}


def table(plan: RunPlan) -> str:
    """Return a plan as lines of text."""
    job, device = plan.job, plan.device
    lengths = job.placed().lengths
    here = f"{min(lengths):,}" if min(lengths) == max(lengths) else f"{min(lengths):,} to {max(lengths):,}"
    lines = [
        f"{plan.weights.parameters:,} parameters; {job.tokens:,} tokens, {here} on each of {job.shared_by:,} ranks",
        f"{job.ranks:,} x {device.name} in {job.nodes:,} node{'s' * (job.nodes > 1)}, {job.groups:,} "
        f"group{'s' * (job.groups > 1)} of {job.shared_by:,}; {job.sharding}, {job.precision}, batch {job.batch}"
        + f", {job.accumulate} micro-batches"
        * (job.accumulate > 1),
        *([f"placement {job.placement_choice.reason}"] if job.shared_by > 1 else []),
        "",
        *_memory_lines(plan),
        "",
        *(line for kind in plan.kinds for line in _branch_lines(plan, kind)),
        *_time_lines(plan),
    ]
    lines += [f"note: {note}" for note in plan.notes]
    if not plan.fits:
        lines += ["", "It does not fit.  What would:"]
        lines += [f"  {each.change}: {each.peak / GIB:.2f} GiB" for each in plan.advice] or [
            "  none of the changes that were tried: a smaller model, or a shorter sequence"
        ]
    return "\n".join(lines)


def _memory_lines(plan: RunPlan) -> list[str]:
    held = plan.memory
    lines = [f"{'memory of rank ' + str(plan.fullest):<28} {'GiB':>9}   at its fullest, in {_when(held.phase)}"]
    lines += [f"  {WORDS[name]:<26} {many / GIB:>9.3f}" for name, many in held.kinds.items()]
    room = f"of {plan.usable / GIB:.1f} GiB that may be filled"
    lines.append(f"  {'all':<26} {held.peak / GIB:>9.3f}   {held.peak / plan.usable:.0%} {room}")
    lines.append(f"the longest sequence that fits: about {plan.longest:,} tokens")
    return lines


def _when(phase: str) -> str:
    return phase if phase.startswith("the") else f"the {phase}"


def _branch_lines(plan: RunPlan, kind: LayerKind) -> list[str]:
    rank = max(kind.shares, key=lambda r: kind.shares[r].volume.sent_bytes)
    share = kind.shares[rank]
    link = plan.device.node_link if plan.job.shared_by <= plan.job.per_node else plan.device.network
    head = f"branch, {kind.layers} layer{'s' * (kind.layers > 1)}"
    lines = [f"{head:<28} {'exchange':<9} {'MiB sent':>9} {'ms':>8} {'hidden':>7}   rank {rank}, a layer"]
    hidden = plan.time.hidden_share
    for i, (branch, exchange) in enumerate(zip(kind.pattern.ordered(), kind.schedule.exchanges, strict=True)):
        words = f"{branch.segment_length or 'all'} / {branch.dilation_rate}" + " causal" * branch.is_causal
        words += f" window {branch.window}" if branch.window else ""
        sent = share.branch_bytes[i] if share.branch_bytes else share.volume.sent_bytes / len(kind.schedule.exchanges)
        name = exchange if share.volume.messages or sent else "none"
        numbers = f"{sent / MIB:>9.2f} {1e3 * sent / link:>8.3f} {_share(hidden if sent else None)}"
        lines.append(f"  {words:<26} {name:<9} {numbers}".rstrip())
    total = share.volume.sent_bytes
    whole = f"{total / MIB:>9.2f} {1e3 * total / link:>8.3f} {_share(hidden)}   {share.volume.messages} messages"
    lines.append(f"  {'all':<26} {'':<9} {whole}")
    lines += [f"why: {kind.schedule.why}", ""]
    return lines


def _share(hidden: float | None) -> str:
    return f"{'' if hidden is None else format(hidden, '.0%'):>7}"


def _time_lines(plan: RunPlan) -> list[str]:
    time = plan.time
    hidden = time.hidden_share
    lines = [
        f"{'a step of the slowest rank':<28} {'ms':>9}",
        f"  {'linear maps':<26} {1e3 * time.linear:>9.1f}",
        f"  {'attention':<26} {1e3 * time.attention:>9.1f}",
        f"  {'all other operators':<26} {1e3 * time.other:>9.1f}",
        f"  {'waits for keys':<26} {1e3 * time.exchange:>9.1f}"
        + ("" if hidden is None else f"   {hidden:.0%} of {1e3 * time.exchange_flight:.1f} is hidden"),
        f"  {'waits for the engine':<26} {1e3 * time.gradients:>9.1f}"
        + (f"   of {1e3 * time.gradients_flight:.1f}" if time.gradients_flight else ""),
        f"  {'optimiser':<26} {1e3 * time.optimizer:>9.1f}",
        f"  {'all':<26} {1e3 * time.seconds:>9.1f}",
        f"{plan.tokens_per_second:,.0f} tokens a second, MFU {plan.mfu:.1%} of {_rate(plan.peak_flops)}; "
        f"the busiest rank has {plan.imbalance:.2f} times the mean of the pairs",
    ]
    linear, attention = plan.device.efficiency
    lines.append(f"shares of the peak: linear maps {linear:.0%}, attention {attention:.0%}; {plan.device.source}")
    shown = len(plan.kinds[0].shares)
    if shown < plan.job.shared_by:
        lines.append(f"{shown} of {plan.job.shared_by:,} ranks were looked at, those that may have most to do")
    return lines


def _rate(flops: float) -> str:
    """Return operations a second with a unit in which they are at least 1."""
    name, size = next((each for each in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)) if flops >= each[1]), ("MFLOP/s", 1e6))
    return f"{flops / size:,.1f} {name}"


def values(plan: RunPlan) -> dict[str, Any]:
    """Return a plan as plain values for JSON."""
    job = plan.job
    return {
        "parameters": plan.weights.parameters,
        "tokens": job.tokens,
        "tokens_of_ranks": [min(job.placed().lengths), max(job.placed().lengths)],
        "ranks": job.ranks,
        "sequence_parallel_size": job.shared_by,
        "placement": job.placement_choice.placement,
        "placement_why": job.placement_choice.reason,
        "sharding": job.sharding,
        "precision": job.precision,
        "device": plan.device.name,
        "fullest_rank": plan.fullest,
        "memory_bytes": {"phase": plan.memory.phase, "peak": plan.memory.peak, **plan.memory.kinds},
        "usable_bytes": plan.usable,
        "fits": plan.fits,
        "longest_tokens": plan.longest,
        "layers": [
            {
                "pattern": kind.pattern.to_dict(),
                "layers": kind.layers,
                "exchanges": list(kind.schedule.exchanges),
                "why": kind.schedule.why,
                "ranks": {
                    str(rank): {
                        "sent_bytes": share.volume.sent_bytes,
                        "messages": share.volume.messages,
                        "kept_bytes": share.volume.kept_bytes,
                        "branch_bytes": list(share.branch_bytes),
                        "pairs": share.pairs,
                    }
                    for rank, share in kind.shares.items()
                },
            }
            for kind in plan.kinds
        ],
        "sent_bytes_of_a_step": {str(rank): plan.sent_bytes(rank) for rank in plan.kinds[0].shares},
        "imbalance": plan.imbalance,
        "seconds": {**vars(plan.time), "step": plan.time.seconds},
        "hidden_share": plan.time.hidden_share,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "efficiency": dict(zip(("linear", "attention"), plan.device.efficiency, strict=True)),
        "efficiency_source": plan.device.source,
        "advice": [{"change": each.change, "peak_bytes": each.peak} for each in plan.advice],
        "notes": list(plan.notes),
    }
