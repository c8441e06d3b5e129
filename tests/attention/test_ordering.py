"""Orders of grids: permutations whose steps join neighbours, compact segments, and what is causal under one of them."""

from itertools import permutations, product
from math import prod, sqrt
from statistics import median
from time import process_time

import pytest
import torch
from brute import Shown, counts

from lightning_longnet import (
    Pattern,
    attend,
    causal_order,
    hilbert_order,
    inverse_order,
    raster_order,
    sequence_hilbert_order,
)
from lightning_longnet.attention.pattern.ordering import order_of

FLAT = [
    *product(range(1, 18), repeat=2),
    (1, 97),
    (97, 1),
    (2, 101),
    (101, 2),
    (31, 64),
    (64, 31),
    (53, 59),
    (128, 128),
]
SOLID = [*product(range(1, 8), repeat=3), (3, 40, 5), (11, 13, 17), (16, 16, 16), (2, 2, 31), (9, 12, 10), (24, 7, 31)]


def places(order, shape):
    return torch.stack(torch.unravel_index(order, shape), 1)


@pytest.mark.parametrize("shapes", [FLAT, SOLID], ids=["flat", "solid"])
def test_each_token_comes_once_and_after_a_neighbour(shapes):
    for shape in shapes:
        order = hilbert_order(shape)
        assert order.dtype == torch.int64
        assert order.sort().values.equal(torch.arange(prod(shape))), shape
        steps = places(order, shape).diff(dim=0).abs().sum(1)
        assert bool((steps == 1).all()), f"{shape}: {int((steps != 1).sum())} steps that are not to a neighbour"


def test_of_powers_of_two_it_is_hilberts_own():
    """All aligned squares, of every size, are walked through without leaving them."""
    for side in (2, 4, 8, 32, 64):
        at = places(hilbert_order((side, side)), (side, side))
        size = 1
        while size <= side:
            squares = (at // size).view(-1, size * size, 2)
            assert bool((squares == squares[:, :1]).all())
            size *= 2


def test_inverses():
    x = torch.randn(7, 35)
    for order in (hilbert_order((5, 7)), raster_order((5, 7)), sequence_hilbert_order(35), torch.randperm(35).int()):
        inverse = inverse_order(order)
        assert inverse.dtype == order.dtype
        assert torch.equal(x[:, order][:, inverse], x)
        assert torch.equal(x[:, inverse][:, order], x)
        assert torch.equal(inverse, order.argsort())
    assert torch.equal(raster_order((2, 3, 4)), torch.arange(24))
    assert torch.equal(order_of("raster", (5, 7)), torch.arange(35))
    assert torch.equal(order_of("hilbert", (5, 7)), hilbert_order((5, 7)))


def spread(order, shape, length):
    """Mean distance in the grid of two tokens of a segment."""
    at = places(order, shape).double()
    whole = at[: len(at) // length * length].view(-1, length, at.shape[1])
    return torch.cdist(whole, whole).mean().item()


@pytest.mark.parametrize("shape", [(64, 64), (61, 67), (96, 40), (16, 16, 16), (15, 17, 19)])
def test_segments_are_compact(shape):
    for length in (27, 64, 256):
        side = length ** (1 / len(shape))
        cube = {2: 0.5214, 3: 0.6617}[len(shape)] * side  # the mean distance of two points in a square and in a cube
        assert spread(hilbert_order(shape), shape, length) < 1.4 * cube
        if length == 256 and len(shape) == 2:
            assert spread(raster_order(shape), shape, length) > 1.6 * cube


def test_a_long_grid_is_walked_along():
    """No part of the curve strays over the length of a grid that is much longer than wide."""
    for shape in ((3, 500), (500, 4), (2, 501), (501, 2), (4, 501), (5, 6, 301), (301, 2, 2)):
        axis = max(range(len(shape)), key=lambda i: shape[i])
        along = places(hilbert_order(shape), shape)[:, axis]
        width = prod(shape) // shape[axis]
        ideal = torch.arange(len(along)) // width
        off = torch.minimum((along - ideal).abs(), (shape[axis] - 1 - along - ideal).abs()).max()
        assert off <= 4 * sqrt(width) + 4, shape


def test_a_sequence_is_laid_over_a_nearly_square_grid():
    for length in (1, 2, 3, 5, 16, 17, 20, 97, 1000, 1024):
        order = sequence_hilbert_order(length)
        assert order.sort().values.equal(torch.arange(length))
    assert torch.equal(sequence_hilbert_order(1024), hilbert_order((32, 32)))
    assert torch.equal(sequence_hilbert_order(30), hilbert_order((5, 6)))
    steps = sequence_hilbert_order(1024).diff().abs()
    assert set(steps.tolist()) == {1, 32}
    kept = hilbert_order((6, 6))
    assert torch.equal(sequence_hilbert_order(32), kept[kept < 32])


def test_a_million_tokens_take_little_time():
    """Under 100 ms on two quiet cores; here the bound leaves room for what else a machine does."""
    for shape in ((1024, 1024), (1021, 1019), (101, 102, 103)):
        times = []
        for _ in range(3):
            begin = process_time()
            hilbert_order(shape)
            times.append(process_time() - begin)
        assert median(times) < 0.5, shape


def causal_by_brute_force(order, pattern, heads):
    """What query i sees, in the grid's numbers: sets of the curve, and nothing that comes later in the grid."""
    shown = [Shown(branch.segment_length, branch.dilation_rate) for branch in pattern.branches]
    inverse = inverse_order(order)
    seen = sum(counts(shown, "multiset", len(order), heads))
    return seen[:, inverse][:, :, inverse].tril()


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (3, 4, 5)])
@pytest.mark.parametrize(("length", "rate"), [(16, 1), (16, 2), (10, 3), (None, 1), (None, 4), (7, 7)])
def test_one_branch_may_be_causal_in_the_grid(shape, length, rate):
    torch.manual_seed(0)
    pattern = Pattern.dilated((length,), (rate,), is_causal=True) if length else Pattern.dense(is_causal=True)
    if length is None and rate > 1:
        pattern = Pattern(tuple(type(b)(None, rate, None, True) for b in pattern.branches))
    tokens, heads = prod(shape), 4
    order = causal_order(hilbert_order(shape), pattern)
    seen = causal_by_brute_force(hilbert_order(shape), pattern, heads)
    inverse = inverse_order(order)
    assert torch.equal(pattern.mask(tokens, heads=heads)[:, inverse][:, :, inverse], seen.long())
    q, k, v = torch.randn(3, 1, tokens, heads, 8, dtype=torch.float64).unbind()
    result = attend(q[:, order], k[:, order], v[:, order], pattern)[:, inverse]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    weights = scores.masked_fill(seen == 0, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(result, torch.einsum("bhij,bjhd->bihd", weights, v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "rates", [(1, 2), *(pytest.param(rates, marks=pytest.mark.long) for rates in ((1, 1), (2, 2), (2, 4)))]
)
def test_no_order_is_causal_for_nested_segments(rates):
    """Of all 40,320 orders of a 2 x 4 grid not one shows what each query should see; for one branch some do."""
    pattern = Pattern.dilated((4, 8), rates, is_causal=True)
    with pytest.raises(ValueError, match="pattern must have one branch of segments, got 2: no order keeps"):
        causal_order(hilbert_order((2, 4)), pattern)
    every = torch.tensor(list(permutations(range(8))))  # at which place each token stands

    def how_many_serve(chosen):
        expected = causal_by_brute_force(hilbert_order((2, 4)), chosen, heads=4)
        mask = chosen.mask(8, heads=4)
        result = mask[:, every[:, :, None], every[:, None, :]].transpose(0, 1)
        return int((result == expected).flatten(1).all(1).sum())

    assert how_many_serve(pattern) == 0
    assert all(how_many_serve(Pattern((branch,))) > 0 for branch in pattern.branches)


def test_windows_are_not_causal_in_the_grid():
    with pytest.raises(ValueError, match="pattern must have one branch of segments, got 1"):
        causal_order(hilbert_order((4, 4)), Pattern.window(4, is_causal=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hilbert_order((4,)), r"shape must have two or three sizes, got \(4,\)"),
        (lambda: hilbert_order((2, 2, 2, 2)), "shape must have two or three sizes"),
        (lambda: hilbert_order((4, 0)), r"shape must be positive integers, got \(4, 0\)"),
        (lambda: hilbert_order((4, 2.0)), "shape must be positive integers"),
        (lambda: raster_order(()), r"shape must be positive integers, got \(\)"),
        (lambda: sequence_hilbert_order(0), "length must be a positive integer, got 0"),
        (lambda: sequence_hilbert_order(True), "length must be a positive integer, got True"),
        (
            lambda: inverse_order(torch.zeros(2, 2).long()),
            r"order must be integers \(tokens,\), got torch.int64 \(2, 2\)",
        ),
        (lambda: inverse_order(torch.zeros(2)), "order must be integers"),
        (lambda: inverse_order(torch.tensor([0, 1, 1])), "order must name each of the 3 tokens once"),
        (lambda: inverse_order(torch.tensor([0, 1, 3, 4])), "order must name each of the 4 tokens once"),
    ],
)
def test_what_is_no_grid_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
