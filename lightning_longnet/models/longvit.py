"""LongViT: images as long sequences of patches, in the blocks of LongNet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_longnet.attention.pattern.ordering import Ordering, order_of
from lightning_longnet.layers.options import positive_integer, require
from lightning_longnet.layers.positions import Kind  # noqa: TC001  for the command line's reading of types
from lightning_longnet.models.blocks import Blocks, BlocksConfig, epsilon

Pooling = Literal["mean", "class"]
Normed = Literal["pooled", "tokens"]


@dataclass(frozen=True)
class LongViTConfig(BlocksConfig):
    """The shape of a model of images, in plain values that a YAML file can hold.

    What is not named here is of the blocks; see `BlocksConfig`.

    Args:
        dim: width of the model.
        heads: query heads in each block.
        rotary: by a patch's number in the grid, which counts row by row; None, as LongViT has it.
        classes: how many the head tells apart; 0 has no head, and gives what was pooled.
        image_size: width and height of the images whose grid has learned positions; others are interpolated.
        patch_size: width and height of a patch.
        ordering: in which order patches form the sequence: row by row ("raster"), or along a Hilbert curve ("hilbert"),
            so that a segment is a compact part of the image.  The model is another one: train it with the same.
        channels: of an image.
        learned_positions: a learned vector is added for each place in the grid.
        resize_offset: added to a grid's size where positions are interpolated; torchscale's models have 0.1.
        pooling: "mean" of all patches, or "class", a token of its own before them.
        normed: where the last LayerNorm stands: over what was "pooled", or over the "tokens" before that.
        final_norm_eps: of that LayerNorm; `norm_eps` by default.
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
        """Patches are ordered where they enter the model, by the grid that they form."""
        return "raster"

    @property
    def grid(self) -> int:
        """Patches to a side, where positions are learned."""
        return self.image_size // self.patch_size


class LongViT(Blocks):
    """Images (B, channels, height, width) to logits (B, classes).

    Where sequences are split over ranks each of them is given whole images, and embeds and computes its own patches
    alone; what is pooled is a sum over the ranks, so that all of them have the same logits.

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
        """Of both ends; the layers between begin by themselves."""
        for linear in (self.patch_embedding, self.head):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for table in (self.position_table, self.class_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, pixels: Tensor, *, ordering: Tensor | None = None) -> Tensor:
        """Logits (B, classes), on every rank those of whole images.

        Args:
            pixels: (B, channels, height, width), whole images on every rank; multiples of the patch's size.
            ordering: the patches in the order in which they form the sequence, a permutation of their numbers in the
                grid, which count row by row; that of the configuration by default.  Positions stay those of the grid.
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
        """Tokens of this rank (B, L, dim) after the blocks, and each one's share (L,) of what is pooled."""
        rows, columns = self._grid_of(pixels)
        first = int(self.class_token is not None)
        places = self._begin(rows * columns + first).to(pixels.device)
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
        x = self.patch_embedding(self._cut(pixels, patches, columns))
        if self.position_table is not None:
            x = x + self._positions(rows, columns)[patches]
        share = torch.full(places.shape, 1 / (rows * columns), dtype=x.dtype, device=x.device)
        if self.class_token is not None:
            is_class = places == 0
            # where there is none, too: every rank has a gradient for it
            x = torch.where(is_class[:, None], self.class_token.to(x.dtype), x)
            share = is_class.to(x.dtype)
            if positions is not None:
                positions = positions.masked_fill(is_class, 0)
        return self._passed(x, positions), share

    def _begin(self, length: int) -> Tensor:
        context = self.sequence_context
        return torch.arange(length) if context is None else context.begin_made(length)

    def _grid_of(self, pixels: Tensor) -> tuple[int, int]:
        size, channels = self.config.patch_size, self.config.channels
        if pixels.dim() != 4 or pixels.shape[1] != channels:
            raise ValueError(f"pixels must be (batch, {channels}, height, width), got shape {tuple(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height % size or width % size or not height or not width:
            raise ValueError(f"pixels must be multiples of patch_size {size} high and wide, got {height} x {width}")
        return height // size, width // size

    def _cut(self, pixels: Tensor, patches: Tensor, columns: int) -> Tensor:
        """These patches alone (B, L, channels * size * size)."""
        size = self.config.patch_size
        grid: Tensor = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
        return grid[:, :, patches // columns, :, patches % columns].permute(1, 0, 2, 3, 4).flatten(2)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Learned for the grid of `image_size`, interpolated for others: (rows * columns, dim)."""
        assert self.position_table is not None
        config, table = self.config, self.position_table
        if (rows, columns) == (config.grid, config.grid):
            return table.flatten(0, 1)
        factors = tuple((many + config.resize_offset) / config.grid for many in (rows, columns))
        told = {"size": (rows, columns)} if config.resize_offset == 0 else {"scale_factor": factors}
        with torch.autocast(table.device.type, enabled=False):
            wide = table.permute(2, 0, 1)[None].float() if table.dtype.itemsize < 4 else table.permute(2, 0, 1)[None]
            found = F.interpolate(wide, mode="bicubic", **told)[0]
        assert found.shape[1:] == (rows, columns)
        return found.to(table.dtype).flatten(1).T


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _grid_order(ordering: Ordering, rows: int, columns: int, device: torch.device) -> Tensor:
    """Made once for each grid and device; a compiled model takes it for a constant."""
    return _made_order(ordering, rows, columns, device)


@lru_cache(32)
def _made_order(ordering: Ordering, rows: int, columns: int, device: torch.device) -> Tensor:
    return order_of(ordering, (rows, columns)).to(device)


def _checked_ordering(ordering: Tensor, patches: int, device: torch.device) -> Tensor:
    if not isinstance(ordering, Tensor) or ordering.dtype.is_floating_point or ordering.shape != (patches,):
        shown = tuple(ordering.shape) if isinstance(ordering, Tensor) else type(ordering).__name__
        raise ValueError(f"ordering must be a permutation of the {patches} patches, integers ({patches},), got {shown}")
    ordering = ordering.to(device).long()
    seen = torch.zeros(patches, dtype=torch.bool, device=device)
    inside = (ordering >= 0) & (ordering < patches)
    seen[ordering.clamp(0, patches - 1)] = True
    require(inside & seen, ordering, f"ordering must name each of the {patches} patches once")
    return ordering
