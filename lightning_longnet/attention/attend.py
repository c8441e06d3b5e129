"""`attend`: exact attention over a pattern, on one process or over the ranks that share a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor

from lightning_longnet.attention import op
from lightning_longnet.attention.checks import (
    checked_exclusions,
    checked_padding,
    checked_probability,
    checked_softcap,
    checked_tensors,
)
from lightning_longnet.attention.kernels import Explanation, judge, reference
from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.parallel.calls import call_kind
from lightning_longnet.attention.parallel.shard import SequenceShard, report_errors
from lightning_longnet.attention.pattern.pattern import Pattern  # noqa: TC001  for the examples below
from lightning_longnet.attention.prepared import AttendOptions, PreparedCall, prepared_call, request_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.spec import Mix


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendOptions],
) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, return_lse: Literal[True], **options: Unpack[AttendOptions]
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_samples: tuple[int, int] = (0, 1),
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    shard: SequenceShard | None = None,
    exchange: Exchange = "auto",
    ordering: Ordering = "raster",
    sinks: Tensor | None = None,
    softcap: float | None = None,
    excluded_kernels: Collection[str] = (),
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute one softmax over all keys that the pattern shows each query.

    Users call it in their own modules.  The layers (`AttentionLayer`), `ContextAttention.attend`, `Guard.attend`, the
    caches of inference, exported models and `longnet doctor` call it, too.

    Args:
        q: queries (B, N, H, D).
        k, v: keys and values (B, N, Hkv, D); each key head serves H / Hkv consecutive query heads.
        pattern: which keys a query sees, and how often each counts.
        documents: an integer id per token, (N,) or (B, N), not decreasing.  Each document gives the same result as
            alone.
        key_padding_mask: (B, N), True where a key is masked for all queries.  Padded queries are computed like others,
            and values in padding must be finite: 0 times infinity is NaN.
        dropout: the probability that a pair is dropped from the softmax's weights; the rest grow by 1 / (1 - dropout).
            There is no training mode here: pass 0 to evaluate.
        dropout_seed: an integer, or one in a CPU tensor.  Which pairs are dropped depends on the seed and on the
            position of a pair, never on how the work is split.  By default torch's CPU generator draws a seed, so that
            `torch.manual_seed` and activation checkpointing repeat it.
        dropout_samples: (first, step): sample b is counted as number first + step b.  If n ranks take turns with the
            samples of a batch, rank r drops the pairs that one process would drop with (r, n).
        scale: of the scores; 1 / sqrt(D) by default.
        mix: "exact" is the gradient of the one softmax; "detached" stops it at the branches' weights, as torchscale.
        kernel: "auto", or the name of one; `explain` shows which kernels support a call.
        shard: the `SequenceShard` if q, k and v are one rank's part of sequences that are split over ranks.  All of its
            ranks call together; documents and padding are those of the shard.  To drop the same pairs for any split,
            pass the same `dropout_seed` on all ranks.
        exchange: how keys reach the queries of other ranks: "gather", "ring", "swap", "local" if no key has to travel,
            or "auto", the cheapest.
        ordering: the line on which the pattern is drawn: the sequence itself ("raster"), or a Hilbert curve over it
            ("hilbert"); see `sequence_hilbert_order`.  A causal branch shows the keys of its segment and residue along
            the curve that are not later in the sequence.
        sinks: (H,) one more logit of the softmax for each query head, without a value: it takes weight from all keys.
        softcap: bounds the scores: each becomes softcap * tanh(score / softcap), before masks and sinks.
        excluded_kernels: the names of kernels that must not run, as those that failed a `Guard`.  A call that names one
            of them runs as with "auto".
        return_lse: return also the log-sum-exp of the scores, the null keys (see `Branch`) and the sink, (B, H, N),
            natural log.  It carries no gradient, and the backward reads it: change it only in a copy.

    Returns:
        out (B, N, H, D), 0 where a query sees no key; with `return_lse` the pair (out, lse), lse -inf there.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> attend(q, k, v, Pattern.dilated((256, 1024), (1, 4), is_causal=True)).shape
    torch.Size([1, 1000, 4, 16])
    """
    options: AttendOptions = {
        "documents": documents,
        "key_padding_mask": key_padding_mask,
        "dropout": dropout,
        "dropout_seed": dropout_seed,
        "dropout_samples": dropout_samples,
        "scale": scale,
        "mix": mix,
        "kernel": kernel,
        "shard": shard,
        "exchange": exchange,
        "ordering": ordering,
        "sinks": sinks,
        "softcap": softcap,
        "excluded_kernels": excluded_kernels,
    }
    if shard is not None:
        with report_errors(shard):
            call = prepared_call(q, k, v, pattern, options, return_lse)
        out, lse = _attend_part(call, shard, dropout_seed is not None)
    else:
        call = prepared_call(q, k, v, pattern, options, return_lse)
        if call.spec.kernel == reference.name and q.numel():
            out, lse = _attend_reference(call)
        else:
            out, lse, _ = op.forward(*call[:7], call.spec.dumps(), None)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    kernel: str = "auto",
    excluded_kernels: Collection[str] = (),
) -> Explanation:
    """Return which kernel `attend` would run on these tensors, which others could serve, and why the rest cannot.

    Users call it, `kernel_fault` for the trial of a `Guard`, and `longnet doctor`; it computes nothing.

    >>> q = torch.zeros(1, 8, 2, 4)
    >>> print(explain(q, q, torch.zeros(1, 8, 2, 6), Pattern.dense()))
    cpu, float32, accumulates in float32
    flash      refuses      serves CUDA tensors, these are on cpu
    sdpa       refuses      needs v as wide as q and k, got 6 and 4
    cudnn      refuses      serves CUDA tensors, these are on cpu
    flash3     refuses      serves CUDA tensors, these are on cpu
    flash4     refuses      serves CUDA tensors, these are on cpu
    hub        refuses      serves CUDA tensors, these are on cpu
    eager      runs         plain products in float32 or float64, a tile of scores at a time
    reference  could serve  holds all N x N scores; differentiable any number of times
    triton     refuses      serves CUDA tensors, and CPU tensors under TRITON_INTERPRET=1, these are on cpu
    """
    q, k, v, _ = checked_tensors(q, k, v, pattern, documents)
    checked_probability(dropout)
    padding = checked_padding(key_padding_mask, q)
    request = request_of(q, v, pattern, padding is not None, dropout > 0)
    has_softcap, excluded = checked_softcap(softcap) is not None, checked_exclusions(excluded_kernels)
    return judge(kernel, request._replace(has_softcap=has_softcap, excluded=excluded))


def _attend_reference(call: PreparedCall) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, Dv) and lse (B, H, N) of the kernel "reference".

    `attend` calls it without a shard, if q is not empty: where the call names "reference", as the trial of a `Guard`
    does, or where "auto" finds no other kernel.  It is not a custom operator: autograd differentiates its torch
    operations, any number of times.
    """
    dropout = None
    if call.seed is not None:
        dropout = Dropout(call.spec.dropout, int(call.seed), call.spec.first_sample, call.spec.sample_step)
    return reference.attend(call, dropout)


@not_compiled
def _attend_part(call: PreparedCall, shard: SequenceShard, is_seed_given: bool) -> tuple[Tensor, Tensor]:
    """Return out (B, L, H, Dv) and lse (B, H, L) of this rank's tokens; all ranks of the shard call it together.

    The ranks compare their arguments first, and all raise an error where these differ.  A compiled graph breaks here: a
    pure operator may be dropped or reordered, and other ranks would wait for it.
    """
    # a seed differs from step to step, and ranks that draw their own each have another
    seed = {"dropout_seed": int(call.seed)} if is_seed_given and call.seed is not None else {}
    has_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.sinks)
    )
    extra = {"presence of a dropout_seed": bool(seed), "presence of a gradient": has_gradient}
    kind = call_kind(call.q, call.k, call.v, call.spec, call.sinks is not None)
    shard.check(kind | extra, seed)
    out, lse, _ = op.forward(*call[:7], call.spec.dumps(), shard.number)
    return out, lse
