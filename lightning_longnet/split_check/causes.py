"""The likely causes of a wrong split: what modules and functions compute across tokens, and what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable

TRANSFORMERS, ATTENTION, POSITIONS, MEAN, SHIFT, NEIGHBOURS, STATE, STATISTICS, REDUCTION, ORDER = (
    "attention of transformers",
    "attention",
    "positions",
    "mean",
    "shift",
    "neighbours",
    "state",
    "statistics",
    "reduction",
    "order",
)

# In the order in which they are named where several fit: (what happens, what to write)
ADVICE = {
    TRANSFORMERS: (
        "attention of transformers among the tokens of this rank alone",
        'load the model with attn_implementation="ring", or call model.set_attn_implementation("ring")',
    ),
    ATTENTION: (
        "attention among the tokens of this rank alone",
        "call sequence_context(self).attend(q, k, v, pattern), each (batch, tokens, heads, head_dim), or use "
        "DilatedSelfAttention or MultiheadDilatedAttention; Pattern.dense() is full attention",
    ),
    STATE: (
        "a recurrence that begins anew on each rank",
        "gather first, x = sequence_context(self).gather_sequence(x), and take this rank's tokens of the result, "
        "y[:, sequence_context(self).positions]",
    ),
    POSITIONS: (
        "positions that count from 0 on each rank",
        "take sequence_context(self).positions_of(x) in the place of torch.arange",
    ),
    NEIGHBOURS: (
        "a window over neighbouring tokens that ends at the border of a rank",
        "gather first, x = sequence_context(self).gather_sequence(x), and take this rank's tokens of the result, "
        "y[:, sequence_context(self).positions]",
    ),
    STATISTICS: (
        "statistics of the tokens of this rank alone",
        "normalise over features (LayerNorm, RMSNorm), or use SyncBatchNorm",
    ),
    ORDER: (
        "a function over all tokens in their order, computed on the tokens of this rank alone",
        "gather first, x = sequence_context(self).gather_sequence(x), and take this rank's tokens of the result, "
        "y[:, sequence_context(self).positions]",
    ),
    SHIFT: (
        "tokens or labels that are shifted inside of each rank's part",
        "shift them in the dataset, before the batch is split: labels[:, t] is what token t predicts",
    ),
    MEAN: (
        "a mean over the tokens of this rank alone",
        "sum the losses, and return sequence_context(self).token_mean(loss_sum, token_count)",
    ),
    REDUCTION: (
        "a sum, mean or maximum over the tokens of this rank alone",
        "use sequence_context(self).token_mean(x_sum, count) for losses, sum_parts(x.sum(1)) for sums that are "
        "features, gather_sequence(x) for anything else",
    ),
}
UNKNOWN = (
    "something across tokens, which sees those of this rank alone",
    "compute it on whole sequences, sequence_context(self).gather_sequence(x), or token by token",
)

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    ATTENTION: (nn.MultiheadAttention,),
    STATE: (nn.RNNBase,),
    NEIGHBOURS: (
        nn.modules.conv._ConvNd,
        nn.modules.pooling._AvgPoolNd,
        nn.modules.pooling._MaxPoolNd,
        nn.Fold,
        nn.Unfold,
    ),
    STATISTICS: (
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
    ),
    REDUCTION: (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
    MEAN: (nn.modules.loss._Loss,),
}
_NAMES = {
    ATTENTION: ("scaled_dot_product_attention", "multi_head_attention_forward"),
    STATE: ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    NEIGHBOURS: ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "unfold", "avg_pool1d", "max_pool1d"),
    STATISTICS: ("batch_norm", "instance_norm", "group_norm"),
    ORDER: (
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "sort", "argsort", "topk", "rfft"),
        *("fft_rfft", "fft_fft", "fft", "median", "quantile", "diff", "bucketize", "unique"),
    ),
    MEAN: (
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
    ),
}
_REDUCTIONS = (
    "mean",
    "sum",
    "max",
    "amax",
    "min",
    "amin",
    "logsumexp",
    "norm",
    "std",
    "var",
    "argmax",
    "argmin",
    "any",
)
_MATRIX = ("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm", "mm", "softmax")


def cause_of_class(kind: type[nn.Module]) -> str | None:
    """Return what a class of modules computes across tokens, a key of `ADVICE`; None if it is not known to."""
    if "Attention" in kind.__name__ and kind.__module__.startswith("transformers."):
        return TRANSFORMERS
    return next((cause for cause, kinds in _CLASSES.items() if issubclass(kind, kinds)), None)


def cause_of_call(function: Any, args: Any, kwargs: Any, result: Any, tokens: int) -> str | None:
    """Return what a call of a torch function computes across tokens, a key of `ADVICE`; None if nothing.

    The name of the function and the sizes of its tensors decide it.  `Watch` calls it for each function that a step
    calls.

    Args:
        function, args, kwargs, result: the function, what it was called with, and what it returned.
        tokens: the number of tokens of each sequence in this run.
    """
    name = getattr(function, "__name__", "")
    if name.startswith("_") and not name.startswith("__"):
        name = name.lstrip("_")
    before = _sizes((args, kwargs))
    after = _sizes(result)
    if name == "arange":
        return POSITIONS if tokens in after else None
    if name in _NAMES[MEAN]:
        return MEAN if kwargs.get("reduction", "mean") == "mean" and not after else None
    for cause, names in _NAMES.items():
        if name in names:
            return cause if _holds(before, tokens) else None
    if name in _REDUCTIONS:
        return REDUCTION if _holds(before, tokens) and not _holds(after, tokens) else None
    if name in _MATRIX:
        return ATTENTION if _twice(result, tokens) else None
    if name == "__getitem__" or name in ("narrow", "pad", "constant_pad_nd", "cat"):
        return SHIFT if tokens in before and tokens not in after and {tokens - 1, tokens + 1} & after else None
    return None


def named_causes(kind: type[nn.Module] | None, causes: Iterable[str]) -> list[str]:
    """Return the likely causes of a wrong result of a module as keys of `ADVICE`, the likeliest first.

    `place_of` of locate.py asks for the place that it found.

    Args:
        kind: the class of the module, which decides if its cause is known; None for the step itself.
        causes: what functions that the module called compute across tokens.
    """
    of_class = None if kind is None else cause_of_class(kind)
    if of_class is not None:
        return [of_class]
    held = set(causes)
    return [cause for cause in ADVICE if cause in held]


def _sizes(values: Any) -> set[int]:
    """Return the sizes of all dimensions of the tensors in nested values."""
    return {size for x in tree_leaves(values) if isinstance(x, Tensor) for size in x.shape}


def _holds(sizes: set[int], tokens: int) -> bool:
    """Return whether one of the sizes is the number of tokens, or that of several flattened sequences."""
    return any(size and size % tokens == 0 for size in sizes)


def _twice(values: Any, tokens: int) -> bool:
    """Return whether a tensor has two dimensions of tokens, as scores of queries and keys have."""
    return any(isinstance(x, Tensor) and list(x.shape).count(tokens) >= 2 for x in tree_leaves(values))
