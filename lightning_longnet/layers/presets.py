"""Names for what is often wanted together: rows over the axes pattern, ordering, exchange and guard."""

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

# what the preset keeps of a pattern that has no blocks
_KIND: BlockKind = "local_window"
_BLOCK_SIZE, _SPARSITY_RATIO = 64, 0.1


@dataclass(frozen=True)
class Preset:
    """A row.  `settings` and `pattern_of` are what a layer is made with; an exchange of None leaves it to others."""

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
        **beside: Any,
    ) -> Pattern:
        """The pattern that is attended with: of a sparse row blocks of it, unless it is made of blocks already."""
        if not self.is_sparse or any(branch.sparsity is not None for branch in pattern.branches):
            return pattern
        found: Pattern = Pattern.block_sparse(kind, block_size, sparsity_ratio, within=pattern, **beside)
        return found

    def settings(self) -> dict[str, Any]:
        """Arguments of `DilatedAttention`, `DilatedSelfAttention` or `MultiheadDilatedAttention`."""
        return {
            "exchange": self.exchange,
            "ordering": self.ordering,
            "guard": Guard() if self.is_guarded else None,
        }


_PRESETS = {
    preset.name: preset
    for preset in (
        Preset("collective", "keys are gathered, each row once, before they are used", "gather"),
        Preset("ring", "keys pass round the ranks: of others' at most two pieces are held at a time", "ring"),
        Preset("ulysses", "ranks trade tokens for heads, and each holds whole sequences of some heads", "swap"),
        Preset("hilbert", "the pattern is drawn along a Hilbert curve over the sequence", ordering="hilbert"),
        Preset("block_sparse", "a share of the blocks of a pattern, by default a tenth", is_sparse=True),
        Preset("production", "kernels and memory are tried before the first step, events told", is_guarded=True),
    )
}


def available_presets() -> dict[str, str]:
    """The name of each, with a line of what it is.

    >>> print(available_presets()["ring"])
    keys pass round the ranks: of others' at most two pieces are held at a time
    """
    return {name: preset.line for name, preset in _PRESETS.items()}


def preset_of(name: str) -> Preset:
    """By its name."""
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}{nearest(name, _PRESETS)}"
        )
    return _PRESETS[name]


def nearest(name: Any, known: Iterable[str]) -> str:
    """What was meant, perhaps: the end of a message."""
    found = get_close_matches(str(name), list(known), n=1)
    return f": is it {found[0]!r}?" if found else ""
