"""Run the blocks of a plan through a kernel: merge their results, and add up their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels import threads
from lightning_longnet.attention.kernels.accumulator import Accumulator, adoptable
from lightning_longnet.attention.kernels.block_calls import cut_parts, kernel_calls
from lightning_longnet.attention.kernels.partial import Partial, uninitialized_partial
from lightning_longnet.attention.kernels.steps import backward_steps, forward_steps, strided
from lightning_longnet.attention.plan.lattice import fold_rows, unfold_rows
from lightning_longnet.attention.plan.padded import PaddedLattice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel, PartsKernel
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.pair_options import PairOptions
    from lightning_longnet.attention.kernels.steps import Steps
    from lightning_longnet.attention.plan.block import Part
    from lightning_longnet.attention.plan.parts import Parts, Task


def forward_blocks(
    kernel: BlockKernel | PartsKernel,
    parts: Parts,
    q: Tensor,
    keys: Keys,
    options: PairOptions,
    totals: list[Partial | None],
) -> None:
    """Merge the result of each block into the partial of its branch, or into the only one.

    `RoundsCall` calls it for the blocks on this rank's keys, and for those on the keys of each round.  In the backward
    of "detached" it calls it for one branch, whose result the forward did not keep.

    A total that is None has no memory yet: the first branch shows every row once, so that its results are written.  If
    they are those of one block, they become the total.
    """
    if hasattr(kernel, "forward_parts"):
        kernel.forward_parts(parts, q, keys, options, totals)
        return
    stores = [total is None for total in totals]
    count = threads.available(q.device) if torch.get_num_threads() > 1 else 1
    tasks = parts.tasks(len(q), count) if count > 1 else ()
    if not tasks:
        _forward(kernel, cut_parts(kernel, parts, q), q, keys, options, totals, stores, threads.all_steps)
        return
    width = keys.tensors().v.shape[3]
    totals[:] = partials = [uninitialized_partial(q, width) if total is None else total for total in totals]

    def forward_task(task: Task, steps: threads.Steps) -> None:
        """Compute the parts of a task; a thread calls it, and `steps` ends it early if another task has failed."""
        some, cut = task.samples, cut_parts(kernel, task.parts, q, count)
        views: list[Partial | None] = [partial.of_samples(some) for partial in partials]
        own_options = options.of_samples(some, len(q))
        _forward(kernel, cut, q[some], keys.of_samples(some), own_options, views, stores, steps)

    threads.run(forward_task, tasks, count)


def _forward(
    kernel: BlockKernel,
    parts: Parts,
    q: Tensor,
    keys: Keys,
    options: PairOptions,
    totals: list[Partial | None],
    stores: list[bool],
    each: threads.Steps,
) -> None:
    """Merge the result of each block into the partial of its branch, or into the only one.

    `stores` says for each partial that the first branch writes every row of it, over uninitialized memory.  `each`
    iterates over the parts, and ends early if the task of another thread has failed.  `forward_blocks` calls it for all
    parts, or for those of each task.
    """
    stays = not options.per_branch
    if len(totals) == 1 and (tensors := keys.unmasked()) is not None:
        steps = forward_steps(parts, q, tensors, options)
        if steps is not None:
            qkv = q, tensors.k, tensors.v
            totals[0] = _forward_steps(kernel, steps, qkv, totals[0], stores[0], stays, each)
            return
    for part, call in kernel_calls(each(parts), q, keys, options):
        queries, i = part.block.queries, part.branch if len(totals) > 1 else 0
        out, lse = kernel.forward(fold_rows(queries, q), *keys.read(part), call)
        lse, total, writes = lse.unsqueeze(-1), totals[i], stores[i] and part.branch == 0
        if total is not None and not writes and queries.folds(total.out) and queries.folds(total.lse):
            Partial(queries.folded(total.out), queries.folded(total.lse)).add_(out, lse, part.block.weight, stays=stays)
            del out, lse  # frees them before the next call allocates its own
            continue
        if total is None:
            total = totals[i] = _adopted(part, q, out, lse)
            if total is not None:
                continue
            total = totals[i] = uninitialized_partial(q, out.shape[3])
        result = Partial(unfold_rows(queries, out, q.shape[0]), unfold_rows(queries, lse, q.shape[0]))
        if writes:
            queries.write(total.out, result.out)
            queries.write(total.lse, result.lse)
        else:
            rows = Partial(queries.read(total.out), queries.read(total.lse))
            rows.add_(*result, part.block.weight, stays=stays)
            if not queries.is_view:
                queries.write(total.out, rows.out)
                queries.write(total.lse, rows.lse)
        del out, lse, result  # frees them before the next call allocates its own


def _forward_steps(
    kernel: BlockKernel,
    steps: Steps,
    tensors: tuple[Tensor, Tensor, Tensor],
    total: Partial | None,
    stores: bool,
    stays: bool,
    each: threads.Steps,
) -> Partial | None:
    """Return the partial with the results of steps, of q, k and v.

    The arguments are those of `_forward`, where it calls this; for `stays` see `Partial.add_`.
    """
    q, _, v = tensors
    *read, at_out, at_lse = steps.views
    results: Iterator[Partial] | None = None
    rows = zip(*map(strided, read, tensors), strict=True)
    for n, (step, (queries, keys, values)) in enumerate(each(zip(steps.steps, rows, strict=True))):
        out, lse = kernel.forward(queries, keys, values, step.call)
        lse = lse.unsqueeze(-1)
        if total is None:
            total = _adopted(step.part, q, out, lse)
            if total is not None:
                continue
            total = uninitialized_partial(q, v.shape[3])
        if results is None:
            results = map(Partial, strided(at_out[n:], total.out), strided(at_lse[n:], total.lse))
        result = next(results)
        if stores and step.part.branch == 0:
            result.out.copy_(out)
            result.lse.copy_(lse)
        else:
            result.add_(out, lse, step.part.block.weight, step.has_keys, stays)
        del out, lse  # frees them before the next call allocates its own
    return total


class BackwardInputs(NamedTuple):
    """The inputs of every block's backward: the gradient of out (B, N, H, D), and the results of the forward.

    `outs` holds the out of the whole softmax, or that of each branch; `lse` (B, N, H, 1) is that of the whole.
    `RoundsCall.gradients` makes it.
    """

    grad: Tensor
    outs: Sequence[Tensor]
    lse: Tensor

    def of_samples(self, samples: slice) -> BackwardInputs:
        """Return those of some samples; `backward_blocks` calls it for the task of a thread."""
        return BackwardInputs(self.grad[samples], [out[samples] for out in self.outs], self.lse[samples])


def backward_blocks(
    kernel: BlockKernel | PartsKernel,
    parts: Parts,
    q: Tensor,
    keys: Keys,
    inputs: BackwardInputs,
    options: PairOptions,
    dq: Accumulator,
    stores: tuple[bool, bool] = (False, False),
) -> None:
    """Run each block's backward with the lse of the whole softmax, and add its gradients to dq and to those of `keys`.

    `RoundsCall` calls it for the blocks on this rank's keys, and for those on the keys of each round.

    With `P = exp(S - lse)` the exact gradient of the scores is `P (g.v - g.out)`.  "detached" stops it at the branches'
    weights, which leaves `P (g.v - g.out_b)`, where out_b is the branch's own.  `stores` says for queries and for keys
    that the first branch shows every row once: its gradients are written over uninitialized memory.
    """
    if hasattr(kernel, "backward_parts"):
        kernel.backward_parts(parts, q, keys, inputs, options, dq, stores)
        return
    count = threads.available(q.device) if torch.get_num_threads() > 1 else 1
    tasks = parts.tasks(len(q), count) if count > 1 else ()
    if not tasks:
        _backward(kernel, cut_parts(kernel, parts, q), q, keys, inputs, options, dq, stores, threads.all_steps)
        return
    keys.allocate_gradients()
    dq.allocate()

    def backward_task(task: Task, steps: threads.Steps) -> None:
        """Add the gradients of the parts of a task; a thread calls it, as `forward_task` in `forward_blocks`."""
        some, cut = task.samples, cut_parts(kernel, task.parts, q, count)
        own_options, own_inputs = options.of_samples(some, len(q)), inputs.of_samples(some)
        of_some = keys.of_samples(some), own_inputs, own_options, dq.of_samples(some)
        _backward(kernel, cut, q[some], *of_some, stores, steps)

    threads.run(backward_task, tasks, count)


def _backward(
    kernel: BlockKernel,
    parts: Parts,
    q: Tensor,
    keys: Keys,
    inputs: BackwardInputs,
    options: PairOptions,
    dq: Accumulator,
    stores: tuple[bool, bool],
    each: threads.Steps,
) -> None:
    """Add the gradients of each block to dq and to those of `keys`; `each` is that of `_forward`.

    `backward_blocks` calls it for all parts, or for those of each task.
    """
    if len(inputs.outs) == 1 and stores[0] == stores[1] and (tensors := keys.unmasked()) is not None:
        assert tensors.gradients is not None
        dk, dv = tensors.gradients
        assert isinstance(dk, Accumulator)
        assert isinstance(dv, Accumulator)
        steps = backward_steps(parts, q, tensors, (dk.layout, dv.layout), inputs, options)
        if steps is not None:
            read = inputs.grad, q, tensors.k, tensors.v, inputs.outs[0], inputs.lse
            _backward_steps(kernel, steps, read, (dq, dk, dv), stores[0], each)
            return
    for part, call in kernel_calls(each(parts), q, keys, options):
        queries = part.block.queries
        is_first = part.branch == 0
        lse = fold_rows(queries, inputs.lse).squeeze(-1)
        if isinstance(queries, PaddedLattice):
            lse = queries.without_weight(lse)
        gradients = kernel.backward(
            fold_rows(queries, inputs.grad),
            fold_rows(queries, q),
            *keys.read(part),
            fold_rows(queries, inputs.outs[part.branch if len(inputs.outs) > 1 else 0]),
            lse,
            call,
        )
        dq.add(queries, gradients[0], part.block.weight, stores[0] and is_first)
        keys.add(part, *gradients[1:], stores[1] and is_first)
        del gradients, lse  # frees them before the next call allocates its own


def _backward_steps(
    kernel: BlockKernel,
    steps: Steps,
    tensors: tuple[Tensor, ...],
    accumulators: tuple[Accumulator, ...],
    stores: bool,
    each: threads.Steps,
) -> None:
    """Run the backward of each step on views of `tensors` (grad, q, k, v, out, lse); add the gradients to dq, dk, dv.

    `_backward` calls it where no key is masked, one out serves all parts and every row is read as a view: also for
    "detached", which runs one branch at a time.  With `stores`, the gradients of the first branch are written over
    uninitialized memory; those of a block with all rows become the accumulators.
    """
    read, added = steps.views[:6], steps.views[6:]
    totals: Iterator[tuple[Tensor, ...]] | None = None
    rows = zip(*map(strided, read, tensors), strict=True)
    for n, (step, (grad, q, k, v, out, lse)) in enumerate(each(zip(steps.steps, rows, strict=True))):
        gradients, block = kernel.backward(grad, q, k, v, out, lse, step.call), step.part.block
        writes, adopted = stores and step.part.branch == 0, [False] * len(accumulators)
        if totals is None:
            if writes:
                # no name holds the zip, which would hold the gradients of this step during the next one
                adopted = [
                    x.adopts(at, gradient) for x, at, gradient in zip(accumulators, block.sides, gradients, strict=True)
                ]
            if all(adopted):
                continue
            columns = [strided(at[n:], x.total) for at, x in zip(added, accumulators, strict=True)]
            totals = zip(*columns, strict=True)
        for total, gradient, is_adopted in zip(next(totals), gradients, adopted, strict=True):
            if is_adopted:
                continue
            if writes:
                total.copy_(gradient)
            elif block.weight == 1:
                total.add_(gradient)
            else:
                total.add_(gradient, alpha=block.weight)
        del gradients, gradient  # frees them before the next call allocates its own


def _adopted(part: Part, q: Tensor, out: Tensor, lse: Tensor) -> Partial | None:
    """Return the result of a block as that of all rows, out without a copy; None if it has other rows or another type.

    Out is (B * segments, heads, rows, D) as the kernel returns it, and in lse D is 1.
    """
    queries, wide = part.block.queries, torch.promote_types(q.dtype, torch.float32)
    whole = adoptable(queries, out, q, wide)
    if whole is None or lse.dtype != wide:
        return None
    if len(queries.starts) > 1:
        lse = unfold_rows(queries, lse, q.shape[0]).transpose(1, 2).flatten(2, 3)
    return Partial(whole, lse.contiguous().transpose(1, 2))
