"""The operators `lightning_longnet::attend` and `attend_backward`, for whole sequences and for parts of them.

Selective checkpointing and torch.compile see these two and nothing inside them.  A spec travels through their schema as
text, a shard as its number; without a shard the call is that of one process.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longnet.attention.kernels.compiling import operator
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.parallel.calls import distributed_calls, unsharded_call
from lightning_longnet.attention.parallel.exchange import PassOptions
from lightning_longnet.attention.parallel.shard import SHARDS
from lightning_longnet.attention.plan.lattice import as_readable, concat_batches
from lightning_longnet.attention.spec import AttentionSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning_longnet.attention.parallel.comm import Direction


@operator("lightning_longnet::attend")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    spec: str,
    shard: int | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return out (B, N, H, Dv), lse (B, H, N), and the tensors that the backward needs besides.

    `attend` calls it with the fields of a `PreparedCall`, and `_attend_part` where there is a shard.  `spec` is the
    text of `AttentionSpec.dumps`, and `shard` the number of a `SequenceShard` in `SHARDS`, as an operator takes no
    objects.

    Without a shard the backward needs no other tensors.  With one, N is the number of this rank's tokens, and the first
    of these tensors is the number of the forward among those of the shard; where the batch or the whole sequences are
    empty there is none.
    """
    loaded = AttentionSpec.loads(spec)
    with _exact_products(q):
        if shard is None:
            if not q.numel():
                return _empty_results(q, v)
            pass_options = _pass_options(loaded, "forward", q, seed, sinks)
            q, k, v = as_readable(q), as_readable(k), as_readable(v)
            call = unsharded_call(pass_options, q, k, documents, key_padding_mask)
            return *call.forward(q, k, v)[:2], []
        split = SHARDS[shard]
        if not q.shape[0] * split.length:  # true on all ranks; where it is so on some only, others wait for them
            out, lse, _ = _empty_results(q, v)
            return out.zero_(), lse.zero_(), []
        number = torch.tensor(split.calls)
        with split.comm.whole_call(f"forward of {split.call_of(split.calls)}"):
            pass_options = _pass_options(loaded, "forward", q, seed, sinks)
            q, k, v = (as_readable(x) for x in (q, k, v))
            # all calls are planned before the first message: what one rank cannot plan leaves no other rank waiting
            planned = list(distributed_calls(pass_options, q, k, v, split, split.calls))
            split.saves_inputs_of[spec] = all(call.saves_inputs for _, call in planned)
            results = [call.forward(q[samples], k[samples], v[samples]) for samples, call in planned]
            out, lse = concat_batches([result[:2] for result in results])
    # the backward goes by the number of its forward: ranks may run their backward passes in different orders
    return out, lse, [number, *(tensor for *_, saved in results for tensor in saved)]


@operator("lightning_longnet::attend_backward")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    sinks: Tensor | None,
    documents: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    spec: str,
    shard: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dsinks for the gradient of out; dsinks is empty where there are no sinks.

    `_differentiate` calls it for autograd, with the arguments and results of `forward`; `saved` is the last of these.
    """
    loaded = AttentionSpec.loads(spec)
    with _exact_products(q):
        dsinks = q.new_empty(0) if sinks is None else _gradient_of_sinks(grad, out, lse, sinks)
        if shard is None:
            if not q.numel():
                return *_empty_gradients(q, k, v), dsinks
            pass_options = _pass_options(loaded, "backward", q, seed, sinks)
            grad, q, k, v, out = as_readable(grad), as_readable(q), as_readable(k), as_readable(v), as_readable(out)
            call = unsharded_call(pass_options, q, k, documents, key_padding_mask)
            return *call.backward(grad, q, k, v, out, lse, []), dsinks
        if not saved:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dsinks
        split, number, first, gradients = SHARDS[shard], int(saved[0]), 1, []
        with split.comm.whole_call(f"backward of {split.call_of(number)}"):
            pass_options = _pass_options(loaded, "backward", q, seed, sinks)
            planned = list(distributed_calls(pass_options, q, k, v, split, number))
            grad = as_readable(grad)
            if not all(call.saves_inputs for _, call in planned):
                q, k, v, out = (as_readable(x) for x in (q, k, v, out))
            for samples, call in planned:
                last = first + call.saved_count
                own = grad[samples], q[samples], k[samples], v[samples], out[samples], lse[samples]
                gradients.append(call.backward(*own, saved[first:last]))
                first = last
            dq, dk, dv = concat_batches(gradients)
    return dq, dk, dv, dsinks


def _exact_products(q: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, which would round the products; it does nothing where autocast is off."""
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _pass_options(
    spec: AttentionSpec, direction: Direction, q: Tensor, seed: Tensor | None, sinks: Tensor | None
) -> PassOptions:
    """Return the options of a forward or backward; both get one seed, so that they drop the same pairs."""
    dropout = None
    if seed is not None:
        dropout = Dropout(spec.dropout, int(seed), spec.first_sample, spec.sample_step)
    return PassOptions(spec, direction, dropout, sinks, q.shape[3])


def _gradient_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return -sum exp(s - lse) (g . out) for each head, (H,): a sink takes weight from all values and gives none."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0)
    slope = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    return -(share * slope).sum((0, 2)).to(sinks.dtype)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return uninitialized out (B, N, H, Dv) and lse (B, H, N), and no saved tensors.

    `forward` calls it where there is nothing to compute, and `_fake_forward`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    return out, lse, []


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized dq, dk and dv, contiguous."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


# Autograd: the gradient of a softmax is that of its blocks, given the out and lse of the whole; none flows through lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    """Save what the backward takes; autograd calls it after the forward.

    Where calls over ranks save other inputs than q, k and v, only the shapes of these three are kept.
    """
    *tensors, spec, shard = inputs
    out, lse, saved = output
    q, k, v, *others = tensors
    # without gradients for the saved rows of other ranks, of which torch would allocate zeros
    ctx.mark_non_differentiable(lse, *saved)
    ctx.set_materialize_grads(False)
    if shard is not None and SHARDS[shard].saves_inputs(spec):  # the backward reads their shapes alone
        q, k, v = (x.new_empty(()).expand(x.shape) for x in (q, k, v))
    ctx.save_for_backward(q, k, v, out, lse, *others, *saved)
    ctx.spec, ctx.number = spec, shard
    # the registry of shards is weak: the graph must keep the shard
    ctx.shard = None if shard is None else SHARDS[shard]


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of `forward`, in their order; autograd calls it."""
    q, k, v, out, lse, sinks, documents, padding, seed, *saved = ctx.saved_tensors
    if grad is None:  # undefined on this rank, whose messages others may need
        grad = torch.zeros_like(out)
    dq, dk, dv, dsinks = backward(grad, q, k, v, out, lse, saved, sinks, documents, padding, seed, ctx.spec, ctx.number)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None, None


def _refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    """Raise a RuntimeError: autograd calls it for the gradient of a gradient."""
    raise RuntimeError("attend has no second derivative; kernel='reference' has")


forward.register_autograd(_differentiate, setup_context=_setup_context)
backward.register_autograd(_refuse_second_derivative)


# Fake tensors: for torch.compile, and for the planner, whose shards know what a call keeps


@forward.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return uninitialized results of `forward` for fake tensors, as torch.compile and `longnet plan` pass them."""
    *_, spec, shard = others
    out, lse, saved = _empty_results(q, v)
    if shard is not None:
        loaded = AttentionSpec.loads(spec)
        footprint = SHARDS[shard].footprint(loaded)
        saved = [torch.empty((), dtype=torch.long), *footprint.saved(q, k, v, loaded)]
    return out, lse, saved


@backward.register_fake
def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return uninitialized gradients for fake tensors, as torch.compile and `longnet plan` pass them."""
    return *_empty_gradients(q, k, v), q.new_empty(0) if sinks is None else torch.empty_like(sinks)
