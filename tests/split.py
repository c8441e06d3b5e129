"""A step of attention over ranks, the same in one process, and the comparison of ranks with the brute force."""

import brute
import drawn
import torch
from cells import held
from hypothesis import strategies as st

from lightning_longnet import Pattern, SequenceShard, attend, balanced_placement
from lightning_longnet.attention.parallel.placement import Placement

LONGNET = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal=True)


def step(group, tensors, placement, ids, hidden, settings, dtype):
    """Return (out, lse, dq, dk, dv, bytes sent, messages) of one rank's forward and backward."""
    at = held(placement, group.rank())
    q, k, v, grad = (x[:, at].to(dtype) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(
        group,
        len(at),
        placement if placement.listed else placement.kind,
        None if ids is None else ids[..., at],
        None if hidden is None else hidden[:, at],
    )
    out, lse = attend(*leaves, shard=shard, return_lse=True, **settings)
    gradients = torch.autograd.grad(out, leaves, grad)
    return *(x.detach() for x in (out, lse, *gradients)), shard.comm.sent_bytes, shard.comm.messages


def whole(tensors, pattern, placement, **settings):
    """Return out, dq, dk and dv of one process, in the order in which ranks hold tokens."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves, pattern, **settings)
    order = torch.cat([held(placement, rank) for rank in range(placement.ranks)])
    return [x[:, order] for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def side_by_side(per_rank):
    """Return the same from the results of all ranks."""
    return [torch.cat([(each[0], *each[2:5])[i] for each in per_rank], 1) for i in range(4)]


@st.composite
def split_cases(draw, world):
    case = draw(drawn.cases())
    length = case["shape"][1]
    borders = sorted(draw(st.lists(st.integers(0, length), min_size=world - 1, max_size=world - 1)))
    lengths = tuple(b - a for a, b in zip([0, *borders], [*borders, length], strict=True))
    kind = draw(st.sampled_from(["contiguous", "zigzag", "documents"]))
    if kind == "documents":
        return case, balanced_placement([n for n in lengths if n], world)
    return case, Placement(lengths, kind)


def compare(pool, world, exchange, case, placement, dtype=torch.float64, tolerance=1e-10, **more):
    batch, length, heads, kv_heads, dim = case["shape"]
    if exchange == "swap":
        heads, kv_heads = heads * world, kv_heads * world
    tensors = [
        x.detach() for x in drawn.tensors((batch, length, heads, kv_heads, dim), "contiguous", seed=case["seed"])
    ]
    ids, hidden = case["ids"], case["hidden"]
    rows = ids if ids and isinstance(ids[0], list) else [ids] * batch
    tables = [brute.counts(case["shown"], case["multiplicity"], length, kv_heads, row) for row in rows]
    moves = exchange == "swap" or any(
        table[:, held(placement, a)][:, :, held(placement, b)].any()  # of tokens: zero keys are on no rank
        for row in tables
        for table in row
        for a in range(world)
        for b in range(world)
        if a != b
    )
    if hidden is not None:
        tables = [brute.padded(table, row) for table, row in zip(tables, hidden, strict=True)]
    kept = None
    if case["dropout"]:
        count = len(case["shown"])
        kept = brute.kept(case["dropout"], case["seed"], batch, heads, length, count, case["multiplicity"])
    settings = {
        "pattern": drawn.pattern_of(case["shown"], case["multiplicity"]),
        "scale": 0.7 / dim**0.5,
        "mix": case["mix"],
        "exchange": exchange,
        "dropout": case["dropout"],
        "dropout_seed": case["seed"],
        **more,
    }
    result = pool.run(
        world,
        step,
        tensors,
        placement,
        None if ids is None else torch.tensor(ids),
        None if hidden is None else torch.tensor(hidden),
        settings,
        dtype,
    )
    wide = [x.to(dtype).double().requires_grad_() for x in tensors[:3]]
    out, lse = brute.attention(*wide, tables, settings["scale"], case["mix"], kept)
    truth = (out, *torch.autograd.grad(out, wide, tensors[3].to(dtype).double()))
    empty = lse == -torch.inf
    for rank, (rank_out, rank_lse, *grads, _, _) in enumerate(result):
        at = held(placement, rank)
        assert torch.equal(rank_lse == -torch.inf, empty[..., at])
        assert (rank_out.transpose(1, 2)[empty[..., at]] == 0).all()
        pairs = zip(
            (rank_out, *grads, rank_lse.masked_fill(empty[..., at], 0)),
            (*(x[:, at] for x in truth), lse.masked_fill(empty, 0)[..., at]),
            strict=True,
        )
        for ours, true in pairs:
            assert ours.shape == true.shape
            if ours.numel():
                assert (ours.double() - true).abs().max() <= tolerance * max(1, true.abs().max())
    if dtype == torch.float64 and world > 1:
        assert (sum(sent for *_, sent, _ in result) > 0) == bool(moves)
    return result
