"""The choice of "contiguous" or "zigzag" for `placement="auto"`, by the attention layers of the model."""

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
    """Raise a ValueError if the argument `placement` of the strategy is not "auto", "contiguous" or "zigzag".

    `RingSequenceParallelStrategy.__init__` calls it.
    """
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
        """Pickle it without its module, which another process does not have."""
        return RunPlacement, ()

    def begin(self, module: LightningModule | None) -> None:
        """Forget the layers that were read, and take those of `module` at the next call.

        The strategy calls it when the ranks are connected, and at set-up, after `configure_model` has made layers.
        """
        self._module, self._layers = module, None

    def __call__(self, length: int, ranks: int) -> Kind:
        """Return the placement of sequences of `length` tokens over `ranks` ranks, and log each placement once.

        The context calls it, as its argument `placement`, whenever it needs the placement of a length.
        """
        if self._layers is None:
            assert self._module is not None
            self._layers = attention_layers(self._module)
        choice = placement_choice(self._layers, length, ranks)
        if choice.placement not in self._logged:
            self._logged.add(choice.placement)
            rank_zero_info(f"RingSequenceParallelStrategy: placement {choice.reason}")
        return choice.placement
