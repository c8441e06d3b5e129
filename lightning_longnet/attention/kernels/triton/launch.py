"""The launches of a call: a phase at a time, with the tile lists of its parts and the tensors read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.kernels.accumulator import Accumulator
from lightning_longnet.attention.kernels.blocks import uninitialized_partial
from lightning_longnet.attention.kernels.triton.arguments import Form, Lists, Rows
from lightning_longnet.attention.kernels.triton.backward import key_gradients, query_gradient
from lightning_longnet.attention.kernels.triton.forward import forward
from lightning_longnet.attention.kernels.triton.joined import tiled_phases
from lightning_longnet.attention.kernels.triton.rectangles import Phase, phases
from lightning_longnet.attention.kernels.triton.tiles import Tile, tile_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.blocks import BackwardInputs, PairOptions
    from lightning_longnet.attention.kernels.keys import Keys, KeyTensors
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.plan.parts import Parts


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
    tensors = keys.tensors()
    tile = _tile("forward", q, tensors)
    stores = [total is None for total in totals]
    launches = _cached_launches(parts, q, tensors, tile, is_by_key=False, joins=len(totals) == 1)
    for phase, lists in launches:
        i = phase.branch if len(totals) > 1 else 0
        total = totals[i]
        if total is None:
            total = totals[i] = uninitialized_partial(q, tensors.v.shape[3])
        accumulates = not (stores[i] and phase.branch == 0)
        arguments = (
            *(Rows.of(x) for x in (q, tensors.k, tensors.v, total.out, total.lse)),
            lists._replace(programs=q.shape[0] * (q.shape[2] // tensors.k.shape[2])),
            _padding(tensors),
            options.scale,
            _form(phase, tile, q, tensors, accumulates),
        )
        _launch(forward, lists, arguments, tile)


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
    deltas = [_delta(inputs.grad, out) for out in inputs.outs]
    common = [Rows.of(x) for x in (q, tensors.k, tensors.v, inputs.grad)]
    for name, program, is_by_key, gradients in (
        ("query_gradient", query_gradient, False, (dq,)),
        ("key_gradients", key_gradients, True, tensors.gradients),
    ):
        tile = _tile(name, q, tensors)
        launches = _cached_launches(parts, q, tensors, tile, is_by_key, joins=len(deltas) == 1)
        is_whole = len(launches) == 1
        memory = [
            Rows.of(x if not isinstance(x, Accumulator) else x.written() if is_whole else x.total) for x in gradients
        ]
        results: Any = tuple(memory) if is_by_key else memory[0]
        programs = q.shape[0] * (1 if is_by_key else q.shape[2] // tensors.k.shape[2])
        for phase, lists in launches:
            delta = deltas[phase.branch if len(deltas) > 1 else 0]
            accumulates = not (stores[is_by_key] and phase.branch == 0)
            arguments = (
                *common,
                (Rows.of(inputs.lse), Rows.of(delta)),
                results,
                lists._replace(programs=programs),
                _padding(tensors),
                options.scale,
                _form(phase, tile, q, tensors, accumulates),
            )
            _launch(program, lists, arguments, tile)


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    """Return grad . out of each row, (B, N, H), in float32; an eighth of the rows is converted at a time."""
    rows = -(-grad.shape[1] // 8)
    pieces = zip(grad.split(rows, 1), out.split(rows, 1), strict=True)
    return torch.cat([(some_grad.float() * some_out.float()).sum(-1) for some_grad, some_out in pieces], 1)


def _launch(program: Any, lists: Lists, arguments: tuple[Any, ...], tile: Tile) -> None:
    """Run a program for each item, and each of its samples and query heads.

    Triton launches on the current device, which need not be that of the tensors.
    """
    programs = next(x.programs for x in arguments if isinstance(x, Lists))
    with torch.cuda.device_of(lists.items):
        program[(len(lists.items) * programs,)](
            *arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True
        )


def _cached_launches(
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
