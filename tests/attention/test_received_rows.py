"""Where parts read received keys as views, these are the rows that their index names."""

import random
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from test_routes import uneven

from lightning_longnet import Pattern
from lightning_longnet.attention.parallel.placement import Placement
from lightning_longnet.attention.parallel.rank_blocks import Layout
from lightning_longnet.attention.parallel.routes import Round, route
from lightning_longnet.attention.plan.merging import joined_keys

DILATED = Pattern.dilated((16, 32, 64, 128, 256), (1, 2, 4, 8, 16), is_causal=True)


def rounds_of(layout):
    exchanges = len(layout.pattern.branches)
    for exchange in ("gather", "ring"):
        for rank in range(layout.placement.ranks):
            yield from route(layout, rank, (exchange,) * exchanges).rounds


def read(part, rows):
    """The places of a part's keys among the received rows, in the order in which a kernel gets them."""
    if part.kv_index is not None:
        return part.kv_index.long()
    return part.block.keys.read(torch.arange(rows).view(1, rows, 1, 1))[0, ..., 0]


def keys_of(parts, rows):
    """How often each head of queries is given each received row."""
    counts = Counter()
    for part in parts:
        for segment, heads in enumerate(read(part, rows).tolist()):
            for head, keys in enumerate(heads):
                for key in keys:
                    counts[part.branch, part.block.queries, segment, head, key] += part.block.weight
    return counts


@pytest.mark.parametrize("seed", range(40))
def test_views_read_the_rows_of_the_index(seed):
    rng = random.Random(seed)
    layout = uneven(rng)
    if seed % 2:
        kind = rng.choice(["contiguous", "zigzag"])
        layout = Layout(DILATED, 8, rng.choice([2, 4, 8]), (0, 256), Placement.even(256, rng.choice([2, 4, 8]), kind))
    for each in rounds_of(layout):
        index, views = each.indices(), each.indices(with_views=True)
        rows = sum(map(len, index.receive.values()))
        if not views.has_views:
            continue
        for a, b in zip(index.parts, views.parts, strict=True):
            assert (a.branch, a.block.queries, a.key_heads) == (b.branch, b.block.queries, b.key_heads)
            assert torch.equal(read(a, rows), read(b, rows))
        for limit in (1, 100, 2**20):
            counts = [keys_of(joined_keys(x.parts, limit), rows) for x in (index, views)]
            assert counts[0] == counts[1] == keys_of(views.parts, rows)


def test_dense_rounds_have_views_and_few_calls():
    """Under a zigzag all earlier chunks are one call, and the later ones of the second chunk another."""
    layout = Layout(Pattern.dense(is_causal=True), 8, 8, (0, 256), Placement.even(256, 8, "zigzag"))
    (gather,) = route(layout, 4, ("gather",)).rounds
    parts = gather.indices(with_views=True).parts
    assert len(parts) == 10
    assert len(list(joined_keys(parts, 2**20))) == 2


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_dilated_rounds_have_views_where_one_lattice_has_all_rows(exchange):
    layout = Layout(DILATED, 8, 8, (0, 256), Placement.even(256, 8))
    has_views = [
        all(each.indices(with_views=True).has_views for each in route(layout, rank, (exchange,) * 5).rounds)
        for rank in (4, 7)
    ]
    assert has_views == [True, False]  # the last rank needs rows of three branches of the rank before it


def test_ranks_that_need_equal_rows_are_one_group():
    layout = Layout(DILATED, 8, 8, (0, 256), Placement.even(256, 8))
    (gather,) = route(layout, 4, ("gather",) * 5).rounds
    indices = gather.indices()
    assert indices.equal_sends == ((5,), (6, 7))
    assert torch.equal(indices.send[6], indices.send[7])
    assert not torch.equal(indices.send[5], indices.send[6])


def test_indices_without_views_are_kept_beside_those_with_views():
    layout = Layout(Pattern.dense(), 2, 2, (0, 64), Placement.even(64, 2))
    (gather,) = route(layout, 0, ("gather",)).rounds
    with patch.object(Round, "_compute_indices", autospec=True, side_effect=Round._compute_indices) as computed:
        for _ in range(2):
            assert gather.indices(with_views=True).has_views
            assert not gather.indices().has_views
    assert computed.call_count == 2
