"""The placement of a run's sequences, chosen by the layers of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_longnet.attention.parallel.placement_choice import placement_choice
from lightning_longnet.huggingface.placements import attention_layers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_longnet.attention.parallel.placement import Kind
    from lightning_longnet.attention.parallel.placement_choice import LayerAttention

StrategyPlacement = Literal["auto", "contiguous", "zigzag"]


def check_placement(placement: Any) -> None:
    """Raise a ValueError where the option of the strategy has a wrong value."""
    if placement not in get_args(StrategyPlacement):
        allowed = ", ".join(map(repr, get_args(StrategyPlacement)))
        raise ValueError(f"placement must be one of {allowed}, got {placement!r}")


class RunPlacement:
    """The placement of `placement="auto"`: a function of the length of sequences and the number of ranks.

    It reads the layers of the module at its first call in a run, which is after `configure_model` where data is read in
    the hooks that Lightning calls for loaders.
    """

    def __init__(self) -> None:
        self._module: LightningModule | None = None
        self._layers: tuple[tuple[LayerAttention, int], ...] | None = None
        self._logged: set[Kind] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return RunPlacement, ()  # in another process there is no such module

    def begin(self, module: LightningModule | None) -> None:
        """Begin a run of a module, whose layers may be made later."""
        self._module, self._layers = module, None

    def __call__(self, length: int, ranks: int) -> Kind:
        """Return the placement of sequences, and log it with the reason at its first use."""
        if self._layers is None:
            assert self._module is not None
            self._layers = attention_layers(self._module)
        choice = placement_choice(self._layers, length, ranks)
        if choice.placement not in self._logged:
            self._logged.add(choice.placement)
            rank_zero_info(f"RingSequenceParallelStrategy: placement {choice.reason}")
        return choice.placement
