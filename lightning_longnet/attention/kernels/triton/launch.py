"""The launches of a call: a phase at a time, with the tile lists of its parts and the tensors read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.kernels.accumulator import Accumulator
from lightning_longnet.attention.kernels.block_calls import WHOLE_BYTES
from lightning_longnet.attention.kernels.partial import uninitialized_partial
from lightning_longnet.attention.kernels.triton.arguments import Form, Lists, Rows
from lightning_longnet.attention.kernels.triton.backward import key_gradients, query_gradient
from lightning_longnet.attention.kernels.triton.forward import forward
from lightning_longnet.attention.kernels.triton.joined import tiled_phases
from lightning_longnet.attention.kernels.triton.rectangles import Phase, phases
from lightning_longnet.attention.kernels.triton.tiles import Tile, tile_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels.blocks import BackwardInputs
    from lightning_longnet.attention.kernels.keys import Keys, KeyTensors
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.plan.parts import Parts


MOST_LAUNCHES = 32  # parts keep the launches for so many layouts


class _ListsKey(NamedTuple):
    """The key of cached tile lists: all that they depend on besides the parts."""

    group: int
    sources: tuple[int, ...]
    rows: int
    others: int
    is_by_key: bool
    joins: bool
    device: torch.device


class _PhaseLaunch(NamedTuple):
    """A phase with its tile list on a device: what one launch computes."""

    phase: Phase
    lists: Lists


class _Launch(NamedTuple):
    """A launch without the tensors of a step, which is kept with the parts.

    Attributes:
        branch: the branch of its phase.
        lists: the tile list, with the number of programs of an item.
        form: the constants of the program.
        grid: the number of programs.
        options: how Triton compiles the program.
    """

    branch: int
    lists: Lists
    form: Form
    grid: tuple[int]
    options: dict[str, Any]


def forward_parts(
    parts: Parts,
    q: Tensor,
    keys: Keys,
    options: PairOptions,
    totals: list[Partial | None],
) -> None:
    """Merge the results of all parts into the partials of their branches; see `PartsKernel`.

    `forward_parts` of the kernel calls it.  A total that is None is allocated here, uninitialized.  The first branch
    then stores its results instead of merging them, as it shows every row once.
    """
    tensors, stores = keys.tensors(), tuple(total is None for total in totals)
    rows = Rows.of(q), Rows.of(tensors.k), Rows.of(tensors.v)
    padding = _padding(tensors)
    for launch in _cached_launches(parts, q, tensors, "forward", joins=len(totals) == 1, stores=stores):
        i = launch.branch if len(totals) > 1 else 0
        total = totals[i]
        if total is None:
            total = totals[i] = uninitialized_partial(q, tensors.v.shape[3])
        results = Rows.of(total.out), Rows.of(total.lse)
        _launch(forward, launch, (*rows, *results, launch.lists, padding, options.scale, launch.form))


def backward_parts(
    parts: Parts,
    q: Tensor,
    keys: Keys,
    inputs: BackwardInputs,
    options: PairOptions,
    dq: Accumulator,
    stores: tuple[bool, bool] = (False, False),
) -> None:
    """Add the gradients of all parts to dq and to those of `keys`; see `PartsKernel`.

    `backward_parts` of the kernel calls it.  Where one launch holds all branches and nothing is added later, gradients
    are written in the type of their tensors.
    """
    tensors = keys.tensors()
    assert tensors.gradients is not None
    deltas = [Rows.of(_delta(inputs.grad, out)) for out in inputs.outs]
    common = Rows.of(q), Rows.of(tensors.k), Rows.of(tensors.v), Rows.of(inputs.grad)
    lse, padding = Rows.of(inputs.lse), _padding(tensors)
    for name, program, is_stored, gradients in (
        ("query_gradient", query_gradient, stores[0], (dq,)),
        ("key_gradients", key_gradients, stores[1], tensors.gradients),
    ):
        launches = _cached_launches(parts, q, tensors, name, joins=len(deltas) == 1, stores=(is_stored,))
        is_whole = len(launches) == 1
        memory = [
            Rows.of(x if not isinstance(x, Accumulator) else x.written() if is_whole else x.total) for x in gradients
        ]
        results: Any = memory[0] if len(memory) == 1 else tuple(memory)
        for launch in launches:
            delta = deltas[launch.branch if len(deltas) > 1 else 0]
            last = (lse, delta), results, launch.lists, padding, options.scale, launch.form
            _launch(program, launch, (*common, *last))


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    """Return grad . out of each row, (B, N, H), in float32; of long rows an eighth is converted at a time."""
    rows = grad.shape[1] if grad.nbytes <= WHOLE_BYTES else -(-grad.shape[1] // 8)
    pieces = zip(grad.split(rows, 1), out.split(rows, 1), strict=True)
    deltas = [(some_grad.float() * some_out.float()).sum(-1) for some_grad, some_out in pieces]
    return deltas[0] if len(deltas) == 1 else torch.cat(deltas, 1)


def _launch(program: Any, launch: _Launch, arguments: tuple[Any, ...]) -> None:
    """Run a program for each item, and each of its samples and query heads.

    Triton launches on the current device, which need not be that of the tensors.
    """
    with torch.cuda.device_of(launch.lists.items):
        program[launch.grid](*arguments, **launch.options)


def _cached_launches(
    parts: Parts, q: Tensor, tensors: KeyTensors, name: str, *, joins: bool, stores: tuple[bool, ...]
) -> tuple[_Launch, ...]:
    """Return the launches of a program, cached in `parts`: they are made when parts first run with such tensors.

    `joins` says whether one launch may hold several branches, and `stores` whether the first branch stores its results,
    in all partials or in each.
    """
    tile, is_padded = _tile(name, q, tensors), tensors.padding is not None
    shapes = q.shape, tensors.k.shape[2], tensors.v.shape[3], tensors.sources
    key = name, tile, joins, stores, *shapes, is_padded, q.device
    kept: dict[Any, tuple[_Launch, ...]] = vars(parts).setdefault("_launches", {})
    launches = kept.get(key)
    if launches is None:
        if len(kept) >= MOST_LAUNCHES:
            kept.clear()
        launches = kept[key] = tuple(_made_launches(parts, q, tensors, tile, name == "key_gradients", joins, stores))
    return launches


def _made_launches(
    parts: Parts, q: Tensor, tensors: KeyTensors, tile: Tile, is_by_key: bool, joins: bool, stores: tuple[bool, ...]
) -> Iterator[_Launch]:
    """Yield the launches of a program; batches of any number of samples have the same tile lists."""
    programs = q.shape[0] * (1 if is_by_key else q.shape[2] // tensors.k.shape[2])
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    for phase, lists in _cached_lists(parts, q, tensors, tile, is_by_key, joins):
        accumulates = not (stores[phase.branch if len(stores) > 1 else 0] and phase.branch == 0)
        form, grid = _form(phase, tile, q, tensors, accumulates), (len(lists.items) * programs,)
        yield _Launch(phase.branch, lists._replace(programs=programs), form, grid, options)


def _cached_lists(
    parts: Parts, q: Tensor, tensors: KeyTensors, tile: Tile, is_by_key: bool, joins: bool
) -> tuple[_PhaseLaunch, ...]:
    """Return the phases of parts with their tile lists, cached in `parts`; see `tiled_phases`.

    They are made when the parts first run with these options.
    """
    if not parts:
        return ()
    group = q.shape[2] // tensors.k.shape[2]
    key = _ListsKey(group, tensors.sources, tile.rows, tile.others, is_by_key, joins, q.device)
    kept: dict[_ListsKey, tuple[_PhaseLaunch, ...]] = vars(parts).setdefault("_tile_lists", {})
    if key not in kept:
        kept[key] = _make_launches(parts, key)
    return kept[key]


def _make_launches(parts: Parts, key: _ListsKey) -> tuple[_PhaseLaunch, ...]:
    """Return the phases of parts with their lists on a device."""
    launches = tiled_phases(phases(parts, key.group, key.sources), key.rows, key.others, key.is_by_key, key.joins)
    return tuple(_PhaseLaunch(phase, Lists.of(phase, tiles, key.device)) for phase, tiles in launches)


def _tile(name: str, q: Tensor, tensors: KeyTensors) -> Tile:
    """Return the tile of a program for the width and the type of the heads."""
    return tile_of(name, max(q.shape[3], tensors.v.shape[3]), q.element_size())


def _form(phase: Phase, tile: Tile, q: Tensor, tensors: KeyTensors, accumulates: bool) -> Form:
    """Return the constants that a program is compiled for; `accumulates` adds to results instead of writing them."""
    width, value_width = q.shape[3], tensors.v.shape[3]
    padded_width, padded_value_width = (max(16, 1 << (n - 1).bit_length()) for n in (width, value_width))
    return Form(
        tile.rows,
        tile.others,
        width,
        value_width,
        padded_width,
        padded_value_width,
        q.shape[2] // tensors.k.shape[2],
        phase.every,
        phase.is_joined,
        phase.is_signed,
        phase.received is not None,
        tensors.padding is not None,
        accumulates,
    )


def _padding(tensors: KeyTensors) -> Rows:
    """Return the padding of keys as bytes; where there is none, any tensor, which is not read."""
    if tensors.padding is None:
        return Rows(tensors.k, 0, 0, 0)
    mask = tensors.padding.view(torch.uint8)
    return Rows(mask, mask.stride(0), mask.stride(1), 0)
