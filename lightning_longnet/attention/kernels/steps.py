"""The steps of parts: kernel calls whose rows are strided views, which are computed once for tensors of a layout.

While Python looks up where the rows of a block are, a GPU waits.  Where nothing is masked one by one, that depends only
on the parts and on the shapes and strides of the tensors, and is kept with the parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.attention.kernels.call import Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels.blocks import BackwardInputs
    from lightning_longnet.attention.kernels.keys import KeyTensors
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.plan.block import Part
    from lightning_longnet.attention.plan.lattice import Layout, View
    from lightning_longnet.attention.plan.parts import Parts

    Layouts = tuple[Layout, Layout]

MOST_LAYOUTS = 8  # parts keep the steps of so many layouts


class Step(NamedTuple):
    """A kernel call without masks of single rows.

    Attributes:
        part: the block.
        call: the arguments of the kernel besides tensors.
        has_keys: whether each query of the block sees a key of it; see `Partial.add_`.
    """

    part: Part
    call: Call
    has_keys: bool


class Steps(NamedTuple):
    """The steps of parts, and their views in some tensors; `forward_steps` and `backward_steps` return it.

    Attributes:
        steps: the kernel calls in the order in which they run.
        views: for each tensor its view in each step.
    """

    steps: tuple[Step, ...]
    views: tuple[tuple[View, ...], ...]


def strided(views: Iterable[View], t: Tensor) -> list[Tensor]:
    """Return views of a tensor of the layout for which they were computed.

    `forward_blocks` and `backward_blocks` make those of all steps at once.
    """
    first = t.storage_offset()
    return [t.as_strided(sizes, strides, first + offset) for sizes, strides, offset in views]


def forward_steps(parts: Parts, q: Tensor, keys: KeyTensors, options: PairOptions) -> Steps | None:
    """Return the steps of a forward, with the views in q, k, v, out and lse; None where some rows are copied.

    `forward_blocks` asks where no row is masked.  Out and lse are those of `uninitialized_partial`.
    """
    k, v = keys.k, keys.v
    key = options.scale, options.softcap, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()
    kept = _kept(parts)
    found = kept.get(key)
    if found is None:
        batch, rows, heads, _ = q.shape
        out = contiguous_layout((batch, rows, heads, v.shape[3]))
        of_queries = [_layout(q), out, ((batch, rows, heads, 1), (heads * rows, 1, rows, 1))]
        views, steps = _views(parts, of_queries, [_layout(k), _layout(v)]), None
        if views is not None:
            at_q, at_out, at_lse, at_k, at_v = views
            steps = Steps(_steps(parts, options), (at_q, at_k, at_v, at_out, at_lse))
        found = _keep(kept, key, steps)
    return found[0]


def backward_steps(
    parts: Parts, q: Tensor, keys: KeyTensors, gradients: Layouts, inputs: BackwardInputs, options: PairOptions
) -> Steps | None:
    """Return the steps of a backward; None where some rows are copied.

    Their views are those in grad, q, k, v, out and lse, without the last dimension of lse, and in dq, dk and dv; dq is
    contiguous, and `gradients` has the layouts of dk and dv.  `backward_blocks` asks where no row is masked.
    """
    k, v, grad, (out, *_), lse = keys.k, keys.v, inputs.grad, inputs.outs, inputs.lse
    key = (
        *(options.scale, options.softcap, grad.stride(), out.stride(), lse.stride()),
        *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()),
    )
    kept = _kept(parts)
    found = kept.get(key)
    if found is None:
        of_queries = [*map(_layout, (grad, q, out, lse)), contiguous_layout(q.shape)]
        of_keys = [_layout(k), _layout(v), *gradients]
        views, steps = _views(parts, of_queries, of_keys), None
        if views is not None:
            at_grad, at_q, at_out, at_lse, at_dq, at_k, at_v, at_dk, at_dv = views
            at_lse = tuple(view._replace(sizes=view.sizes[:3], strides=view.strides[:3]) for view in at_lse)
            columns = at_grad, at_q, at_k, at_v, at_out, at_lse, at_dq, at_dk, at_dv
            steps = Steps(_steps(parts, options), columns)
        found = _keep(kept, key, steps)
    return found[0]


def contiguous_layout(shape: Sequence[int]) -> Layout:
    """Return the layout of a contiguous tensor (B, N, H, D)."""
    _, rows, heads, width = shape
    return tuple(shape), (rows * heads * width, heads * width, width, 1)


def _layout(t: Tensor) -> Layout:
    return t.shape, t.stride()


def _kept(parts: Parts) -> dict[Any, tuple[Steps | None]]:
    """Return the steps that parts keep, by the layouts of tensors."""
    kept: dict[Any, tuple[Steps | None]] = vars(parts).setdefault("_steps", {})
    return kept


def _keep(kept: dict[Any, tuple[Steps | None]], key: Any, steps: Steps | None) -> tuple[Steps | None]:
    """Keep the steps of a layout, of `MOST_LAYOUTS` at most, and return what is kept."""
    if len(kept) >= MOST_LAYOUTS:
        kept.clear()
    found = kept[key] = (steps,)
    return found


def _steps(parts: Parts, options: PairOptions) -> tuple[Step, ...]:
    return tuple(
        Step(part, Call(part.block, options.scale, softcap=options.softcap), part.block.has_keys) for part in parts
    )


def _views(parts: Parts, of_queries: Iterable[Layout], of_keys: Iterable[Layout]) -> list[tuple[View, ...]] | None:
    """Return for each layout the views of the parts, those of the queries first; None where some rows are copied."""
    sides = [([part.block.queries for part in parts], of_queries), ([part.block.keys for part in parts], of_keys)]
    columns = []
    for lattices, layouts in sides:
        for layout in layouts:
            views = tuple(view for lattice in lattices if (view := lattice.view(layout)) is not None)
            if len(views) < len(lattices):
                return None
            columns.append(views)
    return columns
