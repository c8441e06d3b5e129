"""The calls of `attend` that are recorded as plain values, and what is recorded of their results.

A call is a dictionary that JSON can hold:

    shape      batch, tokens, heads, key heads, width of q and k, width of v
    pattern    the keywords of a `Pattern`, without those that have their defaults
    documents  None, the lengths of the documents, or such a list for each row
    padding    None, {"right" or "left": tokens hidden in each row}, or {"anywhere": [a, b, c]}: see `padding_of`
    lengths    None for one process, or the tokens of each rank
    placement  "contiguous" or "zigzag", with ranks
    settings   the other keywords of `attend`

Inputs are formulas of the place of an element, so that no stream of random numbers is relied on.  Of each tensor of the
result, put together in the order of the sequence, two projections and the norm are kept.
"""

import json
from itertools import groupby
from pathlib import Path

import torch

from lightning_longnet import Pattern, SequenceShard, attend

RESULTS = Path(__file__).parent / "data" / "results.json"
NAMES = "out", "lse", "dq", "dk", "dv"


def cases():
    """The recorded calls, each with its results."""
    return json.loads(RESULTS.read_text())


def waves(shape, rate, bend):
    """A chirp over the elements, in float64: no two rows are alike."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (rate * places + bend * places * places).sin().view(shape)


def tensors_of(case):
    """The whole q, k and v, and the gradient of out."""
    batch, length, heads, kv_heads, width, value_width = case["shape"]
    return (
        2 * waves((batch, length, heads, width), 0.7, 0.0013),
        waves((batch, length, kv_heads, width), 1.1, 0.0017),
        waves((batch, length, kv_heads, value_width), 1.9, 0.0023),
        waves((batch, length, heads, value_width), 2.3, 0.0),
    )


def documents_of(case):
    """The whole ids, (N,) or (B, N)."""
    lengths = case["documents"]
    if lengths is None:
        return None
    has_own = isinstance(lengths[0], list)
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in (lengths if has_own else [lengths])]
    ids = 3 * torch.stack(rows) + 5
    return ids if has_own else ids[0]


def padding_of(case):
    """The whole mask, (B, N): "anywhere" hides token i of row b where (a i + b) mod 11 + 11 (i // 11 mod 2) < c."""
    if case["padding"] is None:
        return None
    batch, length, *_ = case["shape"]
    ((where, numbers),) = case["padding"].items()
    places = torch.arange(length)
    if where == "anywhere":
        factor, shift, bound = numbers
        rows = [(factor * places + shift + row) % 11 + 11 * (places // 11 % 2) < bound for row in range(batch)]
    elif where == "right":
        rows = [places >= length - count for count in numbers]
    else:
        rows = [places < count for count in numbers]
    return torch.stack(rows)


def held(case, rank):
    """The tokens of a rank, in the order in which it holds them."""
    lengths = case["lengths"]
    if lengths is None:
        return torch.arange(case["shape"][1])
    if case["placement"] == "contiguous":
        return torch.arange(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    firsts, seconds = [-(-n // 2) for n in lengths], [n // 2 for n in lengths]
    begin, end = sum(firsts[:rank]), sum(lengths) - sum(seconds[:rank])
    return torch.cat([torch.arange(begin, begin + firsts[rank]), torch.arange(end - seconds[rank], end)])


def results(case, group=None):
    """Run a call on this rank, or on one process: out, lse or None, dq, dk, dv."""
    at = held(case, 0 if group is None else group.rank())
    q, k, v, grad = (x[:, at] for x in tensors_of(case))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ids, hidden = documents_of(case), padding_of(case)
    ids, hidden = (None if x is None else x[..., at].contiguous() for x in (ids, hidden))
    settings = dict(case["settings"])
    settings["dropout_samples"] = tuple(settings["dropout_samples"])
    if group is None:
        settings |= {"documents": ids, "key_padding_mask": hidden}
    else:
        settings["shard"] = SequenceShard(group, len(at), case["placement"], ids, hidden)
        assert torch.equal(settings["shard"].tokens(), at)
    result = attend(*leaves, Pattern(**case["pattern"]), **settings)
    out, lse = result if settings["return_lse"] else (result, None)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, grad)


def rank_results(group, listed):
    """Run several calls on this rank, which is asked once for all of them."""
    return [results(case, group) for case in listed]


def projections(x):
    """The number of -inf, and of the rest the projections onto two waves without a period, and the norm."""
    x, places = x.double().flatten(), torch.arange(x.numel(), dtype=torch.float64)
    empty = x == -torch.inf
    x = x.masked_fill(empty, 0)
    numbers = (x @ (0.37 * places).cos(), x @ (1.7 * places + 0.3).cos(), x.norm())
    return int(empty.sum()), *(float(number) for number in numbers)


def summary(case, parts):
    """Put the results of the ranks together, and return what is recorded of them."""
    order = torch.cat([held(case, rank) for rank in range(len(parts))])
    summaries = {}
    for name, pieces in zip(NAMES, zip(*parts, strict=True), strict=True):
        if pieces[0] is None:
            continue
        dim = 2 if name == "lse" else 1
        whole = torch.cat(pieces, dim).index_select(dim, order.argsort())
        empty, *numbers = projections(whole)
        assert name == "lse" or not empty
        summaries[name] = [empty, *numbers] if name == "lse" else numbers
    return summaries


def summaries(listed, pool):
    """Run all calls, and return what is recorded of each; `pool()` gives the ranks, where a call needs any."""
    summaries = [None] * len(listed)
    ranks = [0 if case["lengths"] is None else len(case["lengths"]) for case in listed]
    for world, numbered in groupby(sorted(range(len(listed)), key=ranks.__getitem__), ranks.__getitem__):
        some = list(numbered)
        chosen = [listed[i] for i in some]
        given = pool().run(world, rank_results, chosen) if world else [rank_results(None, chosen)]
        for i, *parts in zip(some, *given, strict=True):
            summaries[i] = summary(listed[i], parts)
    return summaries
