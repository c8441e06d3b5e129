"""Presets: named combinations of exchange, ordering, block sparsity and guard."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.guard import Guard
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.pattern.ordering import Ordering
    from lightning_longnet.attention.pattern.sparsity import BlockKind

# the defaults of the preset "block_sparse", for a pattern without block sparsity
_KIND: BlockKind = "local_window"
_BLOCK_SIZE, _SPARSITY_RATIO = 64, 0.1


@dataclass(frozen=True)
class Preset:
    """A named combination of options.  A layer takes its arguments from `settings` and its pattern from `pattern_of`.

    Attributes:
        name: the key in `available_presets`.
        line: one line that describes the preset.
        exchange: see `attend`; None leaves the choice to the strategy.
        ordering: the order of tokens that the pattern applies to.
        is_sparse: whether `pattern_of` keeps only some blocks of the pattern.
        is_guarded: whether the layers have a `Guard`.
    """

    name: str
    line: str
    exchange: Exchange | None = None
    ordering: Ordering = "raster"
    is_sparse: bool = False
    is_guarded: bool = False

    def pattern_of(
        self,
        pattern: Pattern,
        kind: BlockKind = _KIND,
        block_size: int = _BLOCK_SIZE,
        sparsity_ratio: float = _SPARSITY_RATIO,
        **options: Any,
    ) -> Pattern:
        """Return the pattern that layers of this preset attend by.

        A preset that is sparse keeps blocks of `pattern`, unless it is block-sparse already; others return it as it is.

        Args:
            pattern: the pattern of the user.
            kind: which blocks are kept; see `Pattern.block_sparse`.
            block_size: tokens of a block.
            sparsity_ratio: share of the blocks that are kept.
            options: further arguments of `Pattern.block_sparse`.
        """
        if not self.is_sparse or any(branch.sparsity is not None for branch in pattern.branches):
            return pattern
        sparse: Pattern = Pattern.block_sparse(kind, block_size, sparsity_ratio, within=pattern, **options)
        return sparse

    def settings(self) -> dict[str, Any]:
        """Return exchange, ordering and guard as keyword arguments of the attention layers.

        Each call makes a new guard.
        """
        return {
            "exchange": self.exchange,
            "ordering": self.ordering,
            "guard": Guard() if self.is_guarded else None,
        }


_PRESETS = {
    preset.name: preset
    for preset in (
        Preset("collective", "keys are gathered, each row once, before they are used", "gather"),
        Preset("ring", "keys pass from rank to rank; a rank holds those of at most two other ranks at a time", "ring"),
        Preset("ulysses", "ranks trade tokens for heads, and each holds whole sequences of some heads", "swap"),
        Preset("hilbert", "the pattern is drawn along a Hilbert curve over the sequence", ordering="hilbert"),
        Preset("block_sparse", "a share of the blocks of a pattern, by default a tenth", is_sparse=True),
        Preset("production", "kernels and memory are tried before the first step, events logged", is_guarded=True),
    )
}


def available_presets() -> dict[str, str]:
    """Return the name of each preset and a line that describes it.

    >>> print(available_presets()["ring"])
    keys pass from rank to rank; a rank holds those of at most two other ranks at a time
    """
    return {name: preset.line for name, preset in _PRESETS.items()}


def preset_of(name: str) -> Preset:
    """Return the preset of this name."""
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}{nearest(name, _PRESETS)}"
        )
    return _PRESETS[name]


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the closest match of `name` in `known`, or an empty text."""
    matches = get_close_matches(str(name), list(known), n=1)
    return f": is it {matches[0]!r}?" if matches else ""
