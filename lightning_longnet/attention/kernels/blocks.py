"""Run the blocks of a plan through a kernel: merge their results, and add up their gradients."""

from __future__ import annotations

from itertools import groupby
from math import inf, nan
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels import threads
from lightning_longnet.attention.kernels.accumulator import Accumulator, adoptable
from lightning_longnet.attention.kernels.call import Call, DropoutMask, OrderMask
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.attention.kernels.steps import backward_steps, forward_steps, strided
from lightning_longnet.attention.plan.lattice import fold_rows, unfold_rows
from lightning_longnet.attention.plan.padded import PaddedLattice
from lightning_longnet.attention.plan.parts import part_segments

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel, PartsKernel
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.kernels.keys import Keys
    from lightning_longnet.attention.kernels.null_keys import NullKeys
    from lightning_longnet.attention.kernels.steps import Steps
    from lightning_longnet.attention.plan.block import Part
    from lightning_longnet.attention.plan.parts import Parts, Task

# A call covers about this share of all rows: its result is held beside the accumulators until it is merged
CALL_SHARE = 1 / 8
# but a result of at most so many bytes is never cut: the calls would cost more time than the memory is worth
WHOLE_BYTES = 8 * 2**20


class PairOptions(NamedTuple):
    """The options that hold for every pair of a call, whichever block computes it.

    `_line_call` makes them for whole sequences, `RankCall.pair_options` for a rank's part.

    Attributes:
        scale: the factor of the scores.
        key_padding_mask: (B, N) of the keys on this rank, True where padding masks one.
        dropout: the rule that drops pairs, or None.
        samples: (B,) the rows of the batch, as dropout numbers them; of rows that are joined to one long row, (N,) that
            of each token.
        tokens: (N,) the index in the whole sequence of each token on this rank.
        first_head: the first query head on this rank, where ranks hold different heads.
        counts_once: whether a pair is one and the same in whichever branch it is computed.
        branches: the index of each branch in the whole pattern; empty where these are all branches.
        masks_later: whether each key is masked that comes later in the sequence than the query.
        sinks: (H,) one more logit of the softmax for each query head on this rank, without a value.
        null_keys: the keys of score 0 and value 0 of the queries on this rank, or None.
        softcap: the bound of the scores, or None.
    """

    scale: float
    key_padding_mask: Tensor | None = None
    dropout: Dropout | None = None
    samples: Tensor | None = None
    tokens: Tensor | None = None
    first_head: int = 0
    counts_once: bool = False
    branches: tuple[int, ...] = ()
    masks_later: bool = False
    sinks: Tensor | None = None
    null_keys: NullKeys | None = None
    softcap: float | None = None

    def of_samples(self, samples: slice, batch: int) -> PairOptions:
        """Return the options of some of `batch` samples.

        Rows that are joined to one long row are one sample, of which dropout has a number for each token.
        `forward_blocks` and `backward_blocks` call it for the task of a thread.
        """
        if self.samples is None or len(self.samples) != batch:
            return self
        return self._replace(samples=self.samples[samples])

    def key_words(self) -> Tensor | None:
        """Return dropout's word, a hash, for each key on this rank, (N,); None without dropout.

        `RoundsCall` calls it once in a forward or backward, and gives the words to `OwnKeys`.
        """
        if self.dropout is None:
            return None
        assert self.tokens is not None
        return self.dropout.key_words(self.tokens)

    def key_tokens(self) -> Tensor | None:
        """Return the index in the whole sequence of each key on this rank, (N,); None unless later keys are masked.

        `RoundsCall` calls it once in a forward or backward, and gives them to `OwnKeys`.
        """
        return self.tokens if self.masks_later else None

    def query_words(self, q: Tensor, branch: int) -> Tensor:
        """Return dropout's word, a hash, for each query of q (B, N, H, D) in a branch: (B, N, H, 1).

        `branch` is an index in `branches`, if there are any.  `_kernel_calls` calls it for each branch.
        """
        assert self.dropout is not None
        assert self.samples is not None
        assert self.tokens is not None
        heads = torch.arange(q.shape[2], device=q.device) + self.first_head
        role = 0 if self.counts_once else self.branches[branch] if self.branches else branch
        if len(self.samples) != len(q):
            return self.dropout.token_words(self.samples, self.tokens, heads, role)[None, ..., None]
        return self.dropout.query_words(self.samples, self.tokens, heads, role).unsqueeze(-1)


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
        _forward(kernel, _cut(kernel, parts, q), q, keys, options, totals, stores, threads.all_steps)
        return
    width = keys.tensors().v.shape[3]
    totals[:] = partials = [uninitialized_partial(q, width) if total is None else total for total in totals]

    def forward_task(task: Task, steps: threads.Steps) -> None:
        """Compute the parts of a task; a thread calls it, and `steps` ends it early if another task has failed."""
        some, cut = task.samples, _cut(kernel, task.parts, q, count)
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
    if len(totals) == 1 and (tensors := keys.unmasked()) is not None:
        steps = forward_steps(parts, q, tensors, options)
        if steps is not None:
            totals[0] = _forward_steps(kernel, steps, (q, tensors.k, tensors.v), totals[0], stores[0], each)
            return
    for part, call in _kernel_calls(each(parts), q, keys, options):
        queries, i = part.block.queries, part.branch if len(totals) > 1 else 0
        out, lse = kernel.forward(fold_rows(queries, q), *keys.read(part), call)
        lse, total, writes = lse.unsqueeze(-1), totals[i], stores[i] and part.branch == 0
        if total is not None and not writes and queries.folds(total.out) and queries.folds(total.lse):
            Partial(queries.folded(total.out), queries.folded(total.lse)).add_(out, lse, part.block.weight)
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
            rows.add_(*result, part.block.weight)
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
    each: threads.Steps,
) -> Partial | None:
    """Return the partial with the results of steps, of q, k and v; the arguments are those of `_forward`."""
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
            result.add_(out, lse, step.part.block.weight, step.has_keys)
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
        _backward(kernel, _cut(kernel, parts, q), q, keys, inputs, options, dq, stores, threads.all_steps)
        return
    keys.allocate_gradients()
    dq.allocate()

    def backward_task(task: Task, steps: threads.Steps) -> None:
        """Add the gradients of the parts of a task; a thread calls it, as `forward_task` in `forward_blocks`."""
        some, cut = task.samples, _cut(kernel, task.parts, q, count)
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
    for part, call in _kernel_calls(each(parts), q, keys, options):
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
                adopted = [x.adopts(*of) for x, *of in zip(accumulators, block.sides, gradients, strict=True)]
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


def no_key_partial(q: Tensor, v: Tensor) -> Partial:
    """Return the partial of no key: out (B, N, H, Dv) is 0 and lse (B, N, H, 1) is -inf.

    `RoundsCall` calls it before the first block, unless the first branch writes every row, and before it computes the
    result of a branch again for "detached".
    """
    partial = uninitialized_partial(q, v.shape[3])
    partial.out.zero_()
    partial.lse.fill_(-inf)
    return partial


def uninitialized_partial(q: Tensor, width: int) -> Partial:
    """Return uninitialized out (B, N, H, width) and lse (B, N, H, 1) in float32, or in float64 for such tensors.

    Lse is in memory as (B, H, N), as operators return it.  `forward_blocks` writes the results of a first branch to
    these, and `forward_parts` of the kernel "triton" those of a launch; `no_key_partial` fills them.
    """
    wide, (batch, rows, heads, _) = torch.promote_types(q.dtype, torch.float32), q.shape
    lse = q.new_empty((batch, heads, rows, 1), dtype=wide)
    return Partial(q.new_empty((batch, rows, heads, width), dtype=wide), lse.transpose(1, 2))


def merge_branches(partials: Sequence[Partial], options: PairOptions, is_saved: bool = False) -> Partial:
    """Return the partials of the branches, merged by their lse, with the null keys in it.

    `RoundsCall.partial` calls it at the end of a forward.  Null keys are merged into `partials` in place: "detached"
    needs the result of each branch with its null keys.  With `is_saved` the backward reads `partials` later, so that
    the sum must be other memory than the only partial.
    """
    if options.null_keys is not None:
        for branch, partial in enumerate(partials):
            options.null_keys.add_to(partial, branch if len(partials) > 1 else None)
    if len(partials) == 1 and not is_saved:
        return partials[0]
    total = Partial(*(x.clone() for x in partials[0]))
    for partial in partials[1:]:
        total.add_(*partial)
    return total


def finalized(total: Partial, like: Tensor, sinks: Tensor | None = None) -> Partial:
    """Return out in the type of `like`, and lse as (B, H, N), both with the sinks in the softmax.

    `RoundsCall` and `LinesCall` call it last in a forward, when all keys have been merged; `like` is q.
    """
    if sinks is not None:
        total.add_logits_(sinks.to(total.lse.dtype)[:, None])
    out = total.out if total.out.dtype == like.dtype else total.out.to(like.dtype)
    return Partial(out, total.lse.transpose(1, 2).squeeze(-1).contiguous())


def backward_lse(lse: Tensor, has_keys: bool) -> Tensor:
    """Return lse (B, H, N) as (B, N, H, 1), +inf for a query without keys: its P = exp(S - lse) must be 0.

    `has_keys` says that there is no such query.  `RoundsCall.gradients` calls it before the first block of a backward.
    """
    if not has_keys:
        lse = lse.nan_to_num(nan=nan, posinf=inf, neginf=inf)
    return lse.transpose(1, 2).unsqueeze(-1)


def _cut(kernel: BlockKernel, parts: Parts, q: Tensor, count: int = 1) -> Parts:
    """Return parts cut into calls of bounded size, of which `count` threads compute one each at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    limit = q.shape[1] * q.shape[2]
    if q.numel() * wide.itemsize > WHOLE_BYTES:
        limit = int(limit * CALL_SHARE)
    joins = q.device.type == "cpu" and kernel.takes_weights("cpu")  # joined blocks have masks, and weights by head
    key_limit = WHOLE_BYTES // (len(q) * q.shape[3] * wide.itemsize)  # as small as a result that is never cut
    return parts.bounded(limit // count, torch.get_num_threads(), joins, key_limit // count)


def _kernel_calls(parts: Iterable[Part], q: Tensor, keys: Keys, options: PairOptions) -> Iterator[tuple[Part, Call]]:
    """Yield the kernel calls of parts, with the masks of padding, dropout and later keys."""
    branch, words = -1, None
    for whole in parts:
        mask = keys.key_padding_mask(whole)
        for part, padding in ((whole, None),) if mask is None else _split_by_padding(whole, mask, q.shape[0]):
            if isinstance(part.block.keys, PaddedLattice) and part.block.low is None:
                # a causal mask hides the rows behind the last one from all before them
                behind = part.block.keys.padding(q.device).repeat(q.shape[0], 1)[:, None]
                padding = behind if padding is None else padding | behind
            dropped = None
            if options.dropout is not None:
                if words is None or branch != part.branch:
                    branch, words = part.branch, options.query_words(q, part.branch)
                dropped = DropoutMask(
                    options.dropout, fold_rows(part.block.queries, words).squeeze(-1), keys.words(part)
                )
            order = None
            if options.masks_later:
                assert options.tokens is not None
                tokens = options.tokens[None, :, None, None].expand(*q.shape[:3], 1)
                order = OrderMask(fold_rows(part.block.queries, tokens).squeeze(-1), keys.tokens(part))
            yield part, Call(part.block, options.scale, padding, dropped, order, options.softcap)


def _split_by_padding(part: Part, padding: Tensor, batch: int) -> Iterator[tuple[Part, Tensor | None]]:
    """Yield a part's segments with their masks: without those that padding masks wholly, and without needless masks.

    On a GPU the part is yielded as it is, with its whole mask.
    """
    if padding.device.type != "cpu":  # reading a mask on a GPU would wait for the device
        yield part, padding
        return
    segments = padding.unflatten(0, (batch, -1))
    some, every = segments.any(-1).any(2).any(0), segments.all(-1).all(2).all(0)
    kinds = (some.int() + every.int()).tolist()  # 0: no key is padding, 1: some are, 2: all are
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        if kind < 2:
            yield part_segments(part, first, last), segments[:, first:last].flatten(0, 1) if kind == 1 else None
        first = last
