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


_OF_LONGNETS = "a LongNetCache must be of a LongNetForCausalLM: other models attend to other keys than it keeps"


class LongNetCache(Cache):
    """A `DilatedCache` for `LongNetForCausalLM.forward(past_key_values=)`, made at the first call.

    Attributes:
        columns: the number of columns of the rows so far, padding included.
        rows: the cache, or None before the first call.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[LongNetCacheLayer(self) for _ in range(layers)])
        self.columns = 0
        self.rows: DilatedCache | None = None

    def rows_of(self, model: LongNet, batch: int) -> DilatedCache:
        """Return the cache for a model and a number of rows."""
        if self.rows is None:
            self.rows = model.new_cache(batch)
        return self.rows

    def reset(self) -> None:
        self.columns, self.rows = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of these beams."""
        if self.rows is not None:
            self.rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.rows.select(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a LongNetCache takes no tokens back: keys that no later token sees are not kept")
