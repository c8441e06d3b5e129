"""The cache of a LongNet as transformers knows caches, for `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.models.longnet import LongNet


class LongNetCacheLayer(CacheLayerMixin):
    """One layer of a `LongNetCache`.  Its rows are in the layers of the `DilatedCache`, which attend to them."""

    _layer_type = "longnet"

    def __init__(self, cache: LongNetCache | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError(_OF_LONGNETS)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(_OF_LONGNETS)

    def get_seq_length(self) -> int:
        return 0 if self._cache is None else self._cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Return what `get_max_length` returns, which older releases of transformers call so."""
        return self.get_max_length()


_OF_LONGNETS = "a LongNetCache must be of a LongNetForCausalLM: other models attend to other keys than it keeps"


class LongNetCache(Cache):
    """A `DilatedCache` for `LongNetForCausalLM.forward(past_key_values=)`, made at the first call.

    Attributes:
        columns: the number of columns of the rows so far, padding included.
        padded_columns: the number of columns up to the last call in which some row had padding.
        rows: the cache, or None before the first call.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[LongNetCacheLayer(self) for _ in range(layers)])
        self.columns = self.padded_columns = 0
        self.rows: DilatedCache | None = None

    def rows_of(self, model: LongNet, batch: int) -> DilatedCache:
        """Return the cache for a model and a number of rows."""
        if self.rows is None:
            self.rows = model.new_cache(batch)
        return self.rows

    def reset(self) -> None:
        self.columns, self.padded_columns, self.rows = 0, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of these beams."""
        if self.rows is not None:
            self.rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.rows.select(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Drop the last columns of all rows, down to `max_length`; where it is negative, so many.

        A ValueError says where rows of keys that are then seen are no longer kept; see `DilatedCache.rewind`.
        """
        length = max_length if max_length >= 0 else self.columns + max_length
        if length >= self.columns:
            return
        if length < self.padded_columns:
            raise ValueError(
                f"max_length must be at least {self.padded_columns}, got {max_length}: rows have padding up to "
                f"there, and the cache counts tokens"
            )
        assert self.rows is not None
        self.rows.rewind(self.columns - length)
        self.columns = length
