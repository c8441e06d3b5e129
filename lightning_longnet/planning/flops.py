"""The floating-point operations that a training step requires, and those that it does: counted, not measured.

What is required is what a model needs by its definition, however it is computed: each pair that a query sees once, and
nothing computed again.  What is done is what runs: the pairs of the plan, the scores again in the backward, and blocks
that a checkpoint computes again.  Shares of a machine's peak of these two are MFU and HFU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lightning_longnet.attention.kernels import Request, judge
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.layers.feed_forward import FeedForward
from lightning_longnet.models.blocks import Blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Pairs(NamedTuple):
    """(query, key) pairs over all heads: those that are seen, each once, and those that are computed."""

    required: int
    computed: int


class Flops(NamedTuple):
    """The operations of forward and backward together: those that are required, and those that are done."""

    required: float
    done: float

    def __add__(self, other: object) -> Flops:
        if not isinstance(other, Flops):
            return NotImplemented
        return Flops(self.required + other.required, self.done + other.done)

    def times(self, factor: float) -> Flops:
        return Flops(self.required * factor, self.done * factor)


@lru_cache(256)
def attended_pairs(
    pattern: Pattern, heads: int, kv_heads: int | None = None, cuts: tuple[int, ...] = (0,), weighted_segments: int = 0
) -> Pairs:
    """The pairs of a row whose documents are `cuts[i]` to `cuts[i + 1]`; (0, N) is one whole sequence.

    `weighted_segments` is that of `plan`: with it a pair that several branches show is computed once, where that pays.

    >>> pattern = Pattern.dilated((4, 8), (1, 2))
    >>> attended_pairs(pattern, heads=2, cuts=(0, 8))  # 2 heads: 2 segments of 4 x 4 pairs, and 4 x 4 of every second
    Pairs(required=80, computed=96)
    """
    kv_heads = heads if kv_heads is None else kv_heads
    once = plan(Pattern(pattern.branches, "set"), heads, kv_heads, cuts)
    required = sum(block.pairs * block.weight for blocks in once.branches for block in blocks)
    return Pairs(required, plan(pattern, heads, kv_heads, cuts, weighted_segments).pairs)


class Work(NamedTuple):
    """The operations and pairs of attention."""

    flops: Flops
    pairs: Pairs


class AttentionShape(NamedTuple):
    """The properties of a layer that its pairs depend on: spec, heads, type of device, and checkpointing."""

    spec: AttentionSpec
    heads: int
    kv_heads: int
    head_dim: int
    device: str
    is_recomputed: bool

    def work(self, cuts: tuple[int, ...], samples: int) -> Work:
        """Return the work of `samples` rows with these documents."""
        segments = self.spec.weighted_segments(
            self.device, samples, torch.get_num_threads(), per_branch=self.spec.mix == "detached"
        )
        pairs = attended_pairs(self.spec.pattern, self.heads, self.kv_heads, cuts, segments)
        # scores and values are 4 operations a pair and width, their four gradients 8, the scores again 2
        passes = 14 + 4 * self.is_recomputed
        flops = Flops(12 * pairs.required, passes * pairs.computed).times(self.head_dim * samples)
        return Work(flops, Pairs(*(samples * each for each in pairs)))


@dataclass(frozen=True)
class ModelFlops:
    """The operations of a module: of linear maps for each token, of attention for each pair of tokens.

    Linear maps, patch projections and attention are counted, each as used once a token; norms, activations, embeddings
    and an optimiser are not, nor attention that calls `attend` outside of a layer of ours.

    Attributes:
        token: of all linear maps, for a token.
        attention: the layers.
    """

    token: Flops
    attention: tuple[AttentionShape, ...]

    @classmethod
    def of(cls, module: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ModelFlops:
        """Return the operations of a module; `device` and `dtype` of the attention's tensors decide on its kernel."""
        again, attention_again = _recomputed(module)
        token, shapes = Flops(0, 0), []
        for each in module.modules():
            token += _linear(each, each in again)
            if isinstance(each, AttentionLayer):
                shapes.append(_shape(each, each in attention_again, device, dtype))
        return cls(token, tuple(shapes))

    def rows(self, cuts: Sequence[tuple[int, ...]]) -> Work:
        """Return the work of attention for a batch with a row for each entry; equal neighbours run in one call."""
        flops, required, computed = Flops(0, 0), 0, 0
        for row, alike in groupby(cuts):
            many = len(list(alike))
            for shape in self.attention:
                work = shape.work(tuple(row), many)
                flops += work.flops
                required, computed = required + work.pairs.required, computed + work.pairs.computed
        return Work(flops, Pairs(required, computed))


def _recomputed(module: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """Return what checkpoints compute again: the modules with linear maps, and the attention layers."""
    linear: set[nn.Module] = set()
    attention: set[nn.Module] = set()
    for model in module.modules():
        if isinstance(model, Blocks) and model.config.recompute != "nothing":
            linear.update(model.blocks.modules())
            if model.config.dropout == 0:  # the last map's result is not needed again, and so not computed
                linear -= {each.second for each in model.blocks.modules() if isinstance(each, FeedForward)}
            if model.config.recompute == "everything":
                attention.update(model.blocks.modules())
    return linear, attention


def _linear(module: nn.Module, is_recomputed: bool) -> Flops:
    """A multiplication and an addition for each weight; as much for the gradient of the input, and of the weight."""
    products = trained = 0
    if isinstance(module, nn.Linear):
        products = module.in_features * module.out_features
        trained = products * module.weight.requires_grad
    elif isinstance(module, _CONVOLUTIONS):
        products = module.out_channels * (module.in_channels // module.groups)
        for width in module.kernel_size:
            products *= width
        trained = products * module.weight.requires_grad
    else:
        for weight in (getattr(module, name, None) for name in _PROJECTIONS):
            if isinstance(weight, nn.Parameter):
                products += _numel(weight)
                trained += _numel(weight) * weight.requires_grad
    required = 2 * (2 * products + trained)
    return Flops(required, required + 2 * products * is_recomputed)


def _numel(weight: Any) -> int:
    """Return the number of elements of the whole weight, of which DeepSpeed may hold a part."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _shape(layer: Any, is_recomputed: bool, device: str, dtype: torch.dtype) -> AttentionShape:
    heads, head_dim = layer.num_heads, layer.head_dim
    request = Request(device, dtype, 2, heads, head_dim, head_dim, False, layer.dropout > 0, _capability(device))
    kernel = judge(layer.kernel, request).chosen or ""
    spec = AttentionSpec(layer.pattern, kernel, dropout=layer.dropout, mix=layer.mix)
    return AttentionShape(spec, heads, getattr(layer, "num_kv_heads", heads), head_dim, device, is_recomputed)


def _capability(device: str) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if device == "cuda" else None
