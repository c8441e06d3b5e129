"""Record what `attend` gives to 200 drawn calls, on one process and over ranks: `tests/data/results.json`.

    python tests/data/record_results.py

It is recorded anew only where a result is meant to change.  `tests/attention/test_recorded.py` compares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise, product
from math import lcm
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pool import Pool
from recorded import RESULTS, held, summaries

from lightning_longnet import Branch, Pattern, Sparsity

# "weighted" are nested branches that show many pairs several times, which are computed once where kernel and mix let it
KINDS = ("nested", "weighted", "dilated", "window", "sum", "sparse", "sparse sum", "dense")
# the calls over ranks of each exchange: how many ranks share the sequence
WORLDS = (1, 1, *(2,) * 8, *(3,) * 7, *(4,) * 7)
# What is worked out by tiles, bands or weights takes part only from some length on: kinds of calls by their number
LONG = {
    5: "weighted",
    12: "weighted",
    17: "weighted",
    24: "weighted",
    30: "window",
    33: "sum",
    40: "weighted",
    49: "dilated",
    55: "sparse sum",
    60: "nested",
}
_UNDROPPED = {"dropout": 0.0, "dropout_seed": None, "dropout_samples": (0, 1)}
_EXACT = {"mix": "exact", "scale": None, **_UNDROPPED}
_ALONE = {"documents": None, "padding": None}
VERY_LONG: dict[int, tuple[dict[str, Any], Pattern]] = {
    64: (
        {"shape": [1, 2300, 2, 1, 4, 4], "settings": {"kernel": "auto", "return_lse": True, **_EXACT}, **_ALONE},
        Pattern.dilated((1200, 2400), (1, 2), is_causal=True),
    ),
    69: (
        {"shape": [1, 1300, 2, 2, 4, 4], "settings": {"kernel": "sdpa", "return_lse": True, **_EXACT}, **_ALONE},
        Pattern.window(290) + Pattern.window(700, is_causal=True),
    ),
    74: (
        {"shape": [1, 1100, 2, 2, 4, 6], "settings": {"kernel": "eager", "return_lse": True, **_EXACT}, **_ALONE},
        Pattern.dilated((64, 256, 1024), (1, 2, 4)),
    ),
}


def drawn_pattern(rng: Random, kind: str, length: int, multiplicity: str | None = None) -> Pattern:
    """Draw a pattern of a kind, whose segments and windows are shorter than the sequence, or not much longer."""
    is_causal = rng.random() < 0.5
    multiplicity = multiplicity or ("multiset" if kind == "weighted" else rng.choice(["multiset", "multiset", "set"]))
    keywords_given: dict[str, Any] = {"is_causal": is_causal, "multiplicity": multiplicity}
    if kind in ("nested", "dilated"):
        keywords_given["head_offsets"] = rng.choice(["interleaved", "interleaved", "blocked"])
    if kind == "nested":
        segment, rate, pairs = rng.choice([4, 8, 16] if length < 100 else [16, 32, 64]), 1, []
        for _ in range(rng.randint(2, 3)):
            pairs.append((segment, rate))
            segment, rate = segment * rng.randint(2, 4), rate * rng.choice([1, 2, 2, 3])
        if rng.random() < 0.3:  # some begin anew at another residue
            pairs = [(w + rng.randint(0, 2), r) for w, r in pairs]
        return Pattern.dilated(*zip(*pairs, strict=True), **keywords_given)
    if kind == "weighted":
        segment, rates = (
            rng.choice([4, 8] if length < 100 else [16, 32, 64]),
            rng.choice([(1, 2), (1, 1, 2), (1, 2, 2)]),
        )
        return Pattern.dilated([segment * 2**i for i in range(len(rates))], rates, **keywords_given)
    if kind == "dilated":
        pairs = [(rng.randint(1, max(2, length)), rng.randint(1, 5)) for _ in range(rng.randint(1, 3))]
        return Pattern.dilated(*zip(*pairs, strict=True), **keywords_given)
    if kind == "window":
        segment = rng.choice([None, None, rng.randint(1, length)])
        branch = Branch(segment, rng.choice([1, 1, 2, 3]), rng.randint(1, max(2, length // 2)), is_causal)
        return Pattern((branch,), multiplicity)
    if kind == "sum":
        parts = [
            drawn_pattern(rng, each, length, multiplicity)
            for each in ("window", rng.choice(("nested", "nested", "dilated")))
        ]
        return parts[0] + parts[1]
    if kind == "sparse":
        sparsity = drawn_sparsity(rng, length)
        within = drawn_pattern(rng, rng.choice(["nested", "dilated", "dense"]), length, multiplicity)
        if rng.random() < 0.5:
            keywords_given = asdict(sparsity)
            return Pattern.block_sparse(**keywords_given, within=within)
        return Pattern(tuple(replace(b, sparsity=sparsity) for b in within.branches[:2]), multiplicity)
    if kind == "sparse sum":
        parts = [drawn_pattern(rng, each, length, multiplicity) for each in ("sparse", rng.choice(KINDS[:4]))]
        return parts[1] + parts[0]
    return Pattern(Pattern.dense(is_causal).branches, multiplicity)


def drawn_sparsity(rng: Random, length: int) -> Sparsity:
    kind = rng.choice(["local_window", "dilated_sparse", "global_local", "strided"])
    size = rng.randint(1, 4) if length < 100 else rng.choice([4, 8, 16])
    some = rng.choice([None, None, rng.randint(1, 2 * size)])
    varies = kind in ("dilated_sparse", "strided") and rng.random() < 0.5
    return Sparsity(kind, size, rng.choice([0.1, 0.25, 0.4, 0.7, 1.0]), some, varies)


def plain(pattern: Pattern) -> dict[str, Any]:
    """Return the keywords of a pattern, without those that have their defaults."""

    def keywords_given(branch: Branch | Sparsity, default: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in asdict(branch).items() if default.get(name, ...) != value}

    branches = []
    for branch in pattern.branches:
        keywords = keywords_given(branch, asdict(Branch()))
        if branch.sparsity:
            keywords["sparsity"] = keywords_given(branch.sparsity, {"varies_over_heads": False})
        branches.append(keywords)
    values = {"branches": branches, "multiplicity": pattern.multiplicity}
    assert Pattern(**values) == pattern
    return values


def drawn_cuts(rng: Random, length: int, also: tuple[int, ...] = ()) -> list[int]:
    """Draw the lengths of documents, some neighbours of which are equally long; no document crosses a cut in `also`."""
    cuts, place = {0, length, *also}, 0
    while place < length:
        size = rng.randint(1, max(2, length // 2))
        for _ in range(rng.choice([1, 1, 2, 3])):
            place += size
            cuts.add(min(place, length))
    ordered = sorted(cuts)
    return [b - a for a, b in pairwise(ordered)]


def drawn_documents(rng: Random, batch: int, length: int, also: tuple[int, ...] = ()) -> Any:
    """Draw None, the lengths that all rows have, or those of each row."""
    kind = rng.choice(["shared", "own"] if also else [None, None, "shared", "own"])
    if kind is None:
        return None
    if kind == "shared":
        return drawn_cuts(rng, length, also)
    rows = [drawn_cuts(rng, length, also)]
    while len(rows) < batch:  # some rows are alike, and computed together
        rows.append(rows[-1] if rng.random() < 0.3 else drawn_cuts(rng, length, also))
    return rows


def drawn_padding(rng: Random, batch: int, length: int) -> Any:
    where = rng.choice([None, None, None, "right", "left", "anywhere"])
    if where is None:
        return None
    if where == "anywhere":
        return {where: [rng.randint(1, 10), rng.randint(0, 10), rng.randint(1, 15)]}
    return {
        where: [rng.randint(0, length) if rng.random() < 0.3 else rng.randint(0, length // 2) for _ in range(batch)]
    }


def drawn_settings(rng: Random, kernel: str, mix: str, share: float) -> dict[str, Any]:
    """Draw the keywords of `attend`; of the calls whose kernel has dropout, `share` have some."""
    keywords_given: dict[str, Any] = {"kernel": kernel, "mix": mix, "scale": rng.choice([None, None, 0.4, 0.9])}
    keywords_given |= _UNDROPPED
    if kernel != "sdpa" and rng.random() < share:
        keywords_given["dropout"] = rng.choice([0.3, 0.3, 0.1, 0.6])
        keywords_given["dropout_seed"] = rng.choice([rng.randrange(2**31), rng.randrange(-(2**63), 2**63)])
        keywords_given["dropout_samples"] = rng.choice([(0, 1), (1, 2), (0, 3)])
    return keywords_given


def drawn_width(rng: Random, settings: dict[str, Any], width: int) -> int:
    """Draw the width of v: another than that of q only where the kernel serves it."""
    return rng.randint(1, 9) if settings["kernel"] != "sdpa" and rng.random() < 0.3 else width


def on_one_process(rng: Random, number: int) -> dict[str, Any]:
    kernel = ("auto", "sdpa", "eager", "reference")[number % 4]
    mix = ("exact", "exact", "detached")[number // 4 % 3]
    settings = drawn_settings(rng, kernel, mix, 0.4)
    settings["return_lse"] = rng.random() < 0.75
    batch, length, kv_heads, group = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 4), rng.randint(1, 3)
    width, kind = rng.randint(1, 9), rng.choice(KINDS)
    if number in LONG:
        batch, length, kv_heads, group = rng.randint(1, 2), rng.randint(300, 700), rng.randint(1, 2), 1 + number % 2
        width, kind = rng.choice([4, 8]), LONG[number]
    if kind == "weighted":
        settings |= _UNDROPPED
    value_width = width if kind == "weighted" else drawn_width(rng, settings, width)
    shape = [batch, length, kv_heads * group, kv_heads, width, value_width]
    return {
        "shape": shape,
        "pattern": plain(VERY_LONG[number][1] if number in VERY_LONG else drawn_pattern(rng, kind, length)),
        "documents": drawn_documents(rng, batch, length),
        "padding": drawn_padding(rng, batch, length),
        "lengths": None,
        "placement": None,
        "settings": settings,
    } | VERY_LONG.get(number, ({},))[0]


def drawn_lengths(rng: Random, world: int, length: int) -> list[int]:
    """Draw the tokens of each rank: mostly unequal, sometimes none."""
    if rng.random() < 0.2:
        return [-(-length // world)] * world
    borders = sorted(rng.randint(0, length) for _ in range(world - 1))
    lengths = [b - a for a, b in zip([0, *borders], [*borders, length], strict=True)]
    if world > 1 and rng.random() < 0.25:
        empty = rng.randrange(world)
        lengths[(empty + 1) % world] += lengths[empty]
        lengths[empty] = 0
    return lengths


def borders_of(case: dict[str, Any]) -> tuple[int, ...]:
    """Return the tokens whose predecessor is on another rank."""
    owner = torch.empty(sum(case["lengths"]), dtype=torch.long)
    for rank in range(len(case["lengths"])):
        owner[held(case, rank)] = rank
    return tuple(((owner[1:] != owner[:-1]).nonzero().flatten() + 1).tolist())


def over_ranks(rng: Random, exchange: str, number: int) -> dict[str, Any]:
    world, kernel = WORLDS[number], ("auto", "eager", "sdpa", "auto")[number % 4]
    mix = ("exact", "exact", "detached")[number // 2 % 3]
    settings = drawn_settings(rng, kernel, mix, 0.6 if mix == "detached" else 0.3)
    settings |= {"exchange": exchange, "return_lse": (number + len(exchange)) % 2 == 0}
    placement = rng.choice(["contiguous", "zigzag"])
    is_long = number in (6, 14)
    batch, length = (rng.randint(1, 2), rng.randint(300, 420)) if is_long else (rng.randint(1, 3), rng.randint(4, 70))
    kv_heads, group = (world * rng.randint(1, 2) if exchange == "swap" else rng.randint(1, 4)), rng.randint(1, 2)
    width = 4 if is_long else rng.randint(1, 9)
    pattern = drawn_pattern(rng, "weighted" if is_long else rng.choice(KINDS), length)
    lengths = drawn_lengths(rng, world, length)
    aligned = exchange == "local" and rng.random() < 0.5
    if aligned:  # each segment is on one rank
        rates = rng.choice([(1, 2), (1, 3, 2), (2,), (1, 1)])
        segments = rng.choice([(2, 4), (3, 6), (4, 12), (6, 4)])[: len(rates)]
        rates = rates[: len(segments)]
        pattern = Pattern.dilated(segments, rates, rng.random() < 0.5, multiplicity=rng.choice(["multiset", "set"]))
        if rng.random() < 0.3:
            pattern = pattern + Pattern((Branch(segments[0], 1, 2),), pattern.multiplicity)
        unit = lcm(*segments) * (2 if placement == "zigzag" else 1)
        lengths = [unit * rng.randint(0, 3) for _ in range(world)]
        lengths[rng.randrange(world)] += unit
        if placement == "contiguous":
            lengths[-1] += rng.randint(0, unit - 1)
    length = sum(lengths)
    case = {
        "shape": [batch, length, kv_heads * group, kv_heads, width, drawn_width(rng, settings, width)],
        "pattern": plain(pattern),
        "documents": None,
        "padding": drawn_padding(rng, batch, length),
        "lengths": lengths,
        "placement": placement,
        "settings": settings,
    }
    if exchange != "local":
        case["documents"] = drawn_documents(rng, batch, length)
    elif not aligned:  # each document is on one rank
        case["documents"] = drawn_documents(rng, batch, length, (0, *borders_of(case)))
    return case


def drawn_cases() -> list[dict[str, Any]]:
    rng = Random(2718)
    values = [on_one_process(rng, number) for number in range(80)]
    exchanges = ("auto", "gather", "ring", "swap", "local")
    return values + [over_ranks(rng, exchange, n) for exchange, n in product(exchanges, range(len(WORLDS)))]


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    listed = drawn_cases()
    pool = Pool(max(WORLDS))
    try:
        values = summaries(listed, lambda: pool)
    finally:
        pool.close()
    lines = [json.dumps(case | {"results": each}, allow_nan=False) for case, each in zip(listed, values, strict=True)]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
