"""`RingMask`: the mask of a decoder of transformers as a pattern and the documents and padding of its tokens.

transformers describes a mask as a function of indices, made of functions of its own.  `ring_mask` reads what they are
made of, so that no tensor of all pairs is made, and refuses a mask that it cannot express.
"""

from __future__ import annotations

from inspect import getclosurevars
from typing import TYPE_CHECKING, Any

import torch
from transformers import masking_utils

from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class RingMask:
    """The keys that the layers of one kind see in one forward: what `ring_mask` returns in place of a tensor.

    Attributes:
        pattern: the keys that a query sees in its document.
        key_padding_mask: (B, N), True where padding hides a key, or None.
        documents: (B, N) ids of documents, where transformers recognised packed rows; else None.
        arguments: the arguments that transformers gave, from which `visible` makes a tensor.
        resolved: what `tokens_of` found out for these layers, so that it does so once in a forward.
    """

    def __init__(
        self,
        pattern: Pattern,
        key_padding_mask: Tensor | None = None,
        documents: Tensor | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.pattern, self.key_padding_mask, self.documents = pattern, key_padding_mask, documents
        self.arguments = arguments or {}
        self.resolved: dict[str, Any] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the queries are the tokens of all keys, so that nothing was computed in an earlier call."""
        get = self.arguments.get
        return get("q_length") == get("kv_length") and _is_zero(get("q_offset", 0)) and get("kv_offset", 0) == 0

    def contiguous(self) -> RingMask:
        """Refuse a cache of a given size: `generate` calls this to make a mask beforehand, which models take as is."""
        raise ValueError(
            "a static cache is not served by attn_implementation='ring': generate with the default cache, or load the "
            "model with attn_implementation='sdpa'"
        )

    def visible(self) -> Tensor:
        """Return (B, 1, queries, keys), True where a query sees a key, as transformers makes it for SDPA."""
        if "visible" not in self.resolved:
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            self.resolved["visible"] = masking_utils.sdpa_mask(**{**self.arguments, **skips})
        mask: Tensor = self.resolved["visible"]
        return mask


def ring_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> RingMask:
    """Return the mask of a decoder's layers; a ValueError names a mask that no pattern expresses.

    transformers calls it for `attn_implementation="ring"`.
    """
    arguments = {
        **{"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset},
        **{"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask},
        **options,
    }
    if not isinstance(q_length, int) or not isinstance(kv_length, int):
        raise ValueError("q_length and kv_length must be integers: attn_implementation='ring' cannot be exported")
    causal, window, chunk, documents = False, None, None, None
    for name, values in _conditions(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            window = values["sliding_window"]
        elif name == "sliding_window_bidirectional_overlay":
            window = values["sliding_window"] + 1  # both ends are seen
        elif name == "chunked_overlay":
            chunk = values["chunk_size"]
        elif name == "packed_sequence_mask_function":
            documents = values["packed_sequence_mask"]
        elif name != "bidirectional_mask_function":
            raise ValueError(
                f"attn_implementation='ring' cannot express the mask {name!r}: it serves causal and bidirectional "
                f"masks, sliding windows, chunks, packed documents and padding. attn_implementation='eager' serves it "
                f"where sequences are not split"
            )
    if chunk is not None and (window is not None or not causal):
        raise ValueError("attn_implementation='ring' serves chunked attention that is causal and has no window")
    if chunk is not None:
        pattern = Pattern.dilated((chunk,), (1,), is_causal=True)
    elif window is not None:
        pattern = Pattern.window(window, is_causal=causal)
    else:
        pattern = Pattern.dense(is_causal=causal)
    padding = None if attention_mask is None else ~attention_mask.bool()
    return RingMask(pattern, padding, documents, arguments)


def _conditions(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, values) of each function of transformers whose conditions must all hold.

    A function that transformers makes by another one has the name of that one, and the values that it was made with.
    """
    name, is_made, _ = function.__qualname__.partition(".<locals>.")
    if function.__module__ != masking_utils.__name__:
        name, is_made = f"{function.__module__}.{function.__qualname__}", ""
    values = dict(getclosurevars(function).nonlocals) if is_made else {}
    if name == "and_masks":
        for each in values["mask_functions"]:
            yield from _conditions(each)
    elif name == "remap_positions_for_packed_sequence":  # a pattern counts the tokens of each document alone anyway
        yield from _conditions(values["mask_function"])
    else:
        yield name, values


def _is_zero(offset: int | Tensor) -> bool:
    return bool(offset == 0) if isinstance(offset, torch.Tensor) else offset == 0
