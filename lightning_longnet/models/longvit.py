"""LongViT: a vision transformer for large images, which are long sequences of patches, with the blocks of LongNet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_longnet.attention.kernels.compiling import constant_result
from lightning_longnet.attention.pattern.ordering import Ordering, order_of
from lightning_longnet.layers.options import positive_integer, require
from lightning_longnet.layers.positions import Kind  # noqa: TC001  for the command line's reading of types
from lightning_longnet.models.blocks import Blocks, BlocksConfig, epsilon

Pooling = Literal["mean", "class"]
Normed = Literal["pooled", "tokens"]


@dataclass(frozen=True)
class LongViTConfig(BlocksConfig):
    """The configuration of a LongViT, in plain values that a YAML file can hold.

    `BlocksConfig` documents the other arguments.

    Args:
        dim: width of the model.
        heads: number of query heads in each block.
        rotary: rotary embedding of the number of a patch in the grid, counted row by row; None, as in the paper, by
            default.
        classes: number of classes; with 0 there is no head, and the model returns the pooled features.
        image_size: width and height of the images for whose grid positions are learned.  For other sizes they are
            interpolated.
        patch_size: width and height of a patch.
        ordering: order of the patches in the sequence: row by row ("raster"), or along a Hilbert curve ("hilbert"), so
            that a segment is a compact part of the image.  Use a model with the ordering that it was trained with.
        channels: number of channels of an image.
        learned_positions: adds a learned embedding for each patch of the grid.
        resize_offset: added to the size of a grid where positions are interpolated; torchscale's models have 0.1.
        pooling: "mean" over all patches, or "class", the output of a class token before them.
        normed: input of the last LayerNorm: the "pooled" features, or all "tokens" before pooling.
        final_norm_eps: epsilon of that LayerNorm; `norm_eps` by default.
    """

    dim: int = 384
    heads: int = 16
    rotary: Kind | None = None
    classes: int = 1000
    image_size: int = 1024
    patch_size: int = 32
    channels: int = 3
    learned_positions: bool = True
    resize_offset: float = 0.0
    pooling: Pooling = "mean"
    normed: Normed = "pooled"
    final_norm_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels"):
            positive_integer(name, getattr(self, name))
        if not isinstance(self.classes, int) or isinstance(self.classes, bool) or self.classes < 0:
            raise ValueError(f"classes must be an integer, at least 0, got {self.classes!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        for name, kinds in (("pooling", Pooling), ("normed", Normed)):
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(map(repr, get_args(kinds)))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.final_norm_eps is not None:
            object.__setattr__(self, "final_norm_eps", epsilon("final_norm_eps", self.final_norm_eps))
        if self.ordering != "raster" and any(branch.is_causal for p in self.patterns for branch in p.branches):
            raise ValueError(
                f"pattern must not be causal where ordering is {self.ordering!r}: the curve, not the image, would say "
                "which patches come later, and no order serves segments of several lengths (see causal_order)"
            )
        if not 0 <= self.resize_offset < 1:
            raise ValueError(f"resize_offset must be at least 0 and less than 1, got {self.resize_offset!r}")

    @property
    def layer_ordering(self) -> Ordering:
        """The ordering of the attention layers: always "raster", as `LongViT.encode` orders the patches itself."""
        return "raster"

    @property
    def grid(self) -> int:
        """The number of patches along a side of the grid for which positions are learned."""
        return self.image_size // self.patch_size


class LongViT(Blocks):
    """A LongViT, which maps images (B, channels, height, width) to logits (B, classes).

    Where sequences are split over ranks, each rank gets whole images, and embeds and computes only its own patches.
    The pooled features are summed over the ranks, so all of them return the same logits.

    >>> model = LongViT(LongViTConfig(Pattern.dilated((16, 64), (1, 4)), dim=32, layers=2, heads=4, image_size=64,
    ...                               patch_size=8, classes=10))
    >>> model(torch.randn(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    config: LongViTConfig

    def __init__(self, config: LongViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, config.dim)
        self.position_table = None
        if config.learned_positions:
            self.position_table = nn.Parameter(torch.empty(config.grid, config.grid, config.dim))
        self.class_token = nn.Parameter(torch.empty(config.dim)) if config.pooling == "class" else None
        self._make_blocks(config)
        eps = config.norm_eps if config.final_norm_eps is None else config.final_norm_eps
        self.norm = nn.LayerNorm(config.dim, eps)
        self.head = nn.Linear(config.dim, config.classes) if config.classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters but those of the blocks, whose layers initialise themselves."""
        for linear in (self.patch_embedding, self.head):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for table in (self.position_table, self.class_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, pixels: Tensor, *, ordering: Tensor | None = None) -> Tensor:
        """Return the logits (B, classes) of whole images, the same on every rank that shares them.

        Args:
            pixels: (B, channels, height, width), whole images on every rank; height and width are multiples of the
                patch size.
            ordering: integers (patches,), the numbers of the patches in the order of the sequence, where patches are
                numbered row by row; the ordering of the configuration by default.  It does not change the position
                embedding of a patch.
        """
        x, pooled_share = self.encode(pixels, ordering=ordering)
        if self.config.normed == "tokens":
            x = self.norm(x)
        pooled = (x * pooled_share[:, None]).sum(1)
        context = self.sequence_context
        if context is not None:
            pooled = context.sum_parts(pooled)
        if self.config.normed == "pooled":
            pooled = self.norm(pooled)
        logits: Tensor = self.head(pooled)
        return logits

    def encode(self, pixels: Tensor, *, ordering: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output of the blocks for this rank's tokens (B, L, dim), and their weights in the pooling (L,)."""
        rows, columns = self._grid_of(pixels)
        first = int(self.class_token is not None)
        places = self._begin_sequence(rows * columns + first).to(pixels.device)
        patches = (places - first).clamp(min=0)
        positions = None
        if ordering is not None:
            ordering = _checked_ordering(ordering, rows * columns, pixels.device)
        elif self.config.ordering != "raster":
            ordering = _grid_order(self.config.ordering, rows, columns, pixels.device)
        if ordering is not None:
            patches = ordering[patches]
            if self.config.rotary is not None:
                positions = patches + first
        x = self.patch_embedding(self._pixels_of(pixels, patches, columns))
        if self.position_table is not None:
            x = x + self._positions(rows, columns)[patches]
        share = torch.full(places.shape, 1 / (rows * columns), dtype=x.dtype, device=x.device)
        if self.class_token is not None:
            is_class = places == 0
            # on ranks without the class token too: every rank must have a gradient for it
            x = torch.where(is_class[:, None], self.class_token.to(x.dtype), x)
            share = is_class.to(x.dtype)
            if positions is not None:
                positions = positions.masked_fill(is_class, 0)
        return self._run_blocks(x, positions), share

    def _begin_sequence(self, length: int) -> Tensor:
        """Begin a sequence of this length in the context, and return the positions of this rank's tokens (L,)."""
        context = self.sequence_context
        return torch.arange(length) if context is None else context.begin_sequences(length)

    def _grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """Check pixels, and return how many rows and columns of patches they have."""
        size, channels = self.config.patch_size, self.config.channels
        if pixels.dim() != 4 or pixels.shape[1] != channels:
            raise ValueError(f"pixels must be (batch, {channels}, height, width), got shape {tuple(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height % size or width % size or not height or not width:
            raise ValueError(f"pixels must be multiples of patch_size {size} high and wide, got {height} x {width}")
        return height // size, width // size

    def _pixels_of(self, pixels: Tensor, patches: Tensor, columns: int) -> Tensor:
        """Return the pixels of the patches with these numbers (L,), as (B, L, channels * size * size)."""
        size = self.config.patch_size
        grid: Tensor = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
        return grid[:, :, patches // columns, :, patches % columns].permute(1, 0, 2, 3, 4).flatten(2)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return position embeddings (rows * columns, dim), interpolated for grids other than that of `image_size`."""
        assert self.position_table is not None
        config, table = self.config, self.position_table
        if (rows, columns) == (config.grid, config.grid):
            return table.flatten(0, 1)
        factors = tuple((many + config.resize_offset) / config.grid for many in (rows, columns))
        options = {"size": (rows, columns)} if config.resize_offset == 0 else {"scale_factor": factors}
        with torch.autocast(table.device.type, enabled=False):
            wide = table.permute(2, 0, 1)[None].float() if table.dtype.itemsize < 4 else table.permute(2, 0, 1)[None]
            resized = F.interpolate(wide, mode="bicubic", **options)[0]
        assert resized.shape[1:] == (rows, columns)
        return resized.to(table.dtype).flatten(1).T


@constant_result
def _grid_order(ordering: Ordering, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the order of the patches (rows * columns,), as a constant where the model is compiled."""
    return _cached_order(ordering, rows, columns, device)


@lru_cache(32)
def _cached_order(ordering: Ordering, rows: int, columns: int, device: torch.device) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):  # for later calls without modes
        order = order_of(ordering, (rows, columns))
    return order.to(device)


def _checked_ordering(ordering: Tensor, patches: int, device: torch.device) -> Tensor:
    """Check that ordering is a permutation of `patches` numbers, and return it as int64 on the device."""
    if not isinstance(ordering, Tensor) or ordering.dtype.is_floating_point or ordering.shape != (patches,):
        shown = tuple(ordering.shape) if isinstance(ordering, Tensor) else type(ordering).__name__
        raise ValueError(f"ordering must be a permutation of the {patches} patches, integers ({patches},), got {shown}")
    ordering = ordering.to(device).long()
    seen = torch.zeros(patches, dtype=torch.bool, device=device)
    inside = (ordering >= 0) & (ordering < patches)
    seen[ordering.clamp(0, patches - 1)] = True
    require(inside & seen, ordering, f"ordering must name each of the {patches} patches once")
    return ordering
