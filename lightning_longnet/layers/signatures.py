"""Errors for the arguments of a class of dilated_attention_pytorch that has the name of a class here."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

_PATTERN = "pattern=Pattern.dilated(segment_lengths, dilation_rates)"
LAYER = {
    "segment_lengths": _PATTERN,
    "dilation_rates": _PATTERN,
    "softmax_scale": "scale",
    "attention_dropout": "dropout",
    "layer_norm": "sub_norm",
    "gamma_init": "gain",
    "layer_norm_eps": "sub_norm, whose eps is 1e-5",
    "op": "kernel",
}
MODEL = {
    "num_tokens": "vocab_size",
    "d_model": "dim",
    "nhead": "heads",
    "num_encoder_layers": "layers",
    "num_decoder_layers": "layers",
    "dim_feedforward": "hidden_dim",
    "segment_lengths": _PATTERN,
    "dilation_rates": _PATTERN,
    "layer_norm_eps": "norm_eps",
}


def refuse_former(
    replacements: dict[str, str], owner: str, place: str = ""
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator of `__init__` that raises a TypeError for an argument of the ancestor, with its replacement.

    Args:
        replacements: arguments of the ancestor's class, each with the argument here.
        owner: the class that messages name.
        place: the class that takes the arguments here, `owner` by default.
    """

    def decorate(function: Callable[P, None]) -> Callable[P, None]:
        @wraps(function)
        def checked(*arguments: P.args, **named: P.kwargs) -> None:
            if former := [name for name in replacements if name in named]:
                use = ", ".join(dict.fromkeys(replacements[name] for name in former))
                raise TypeError(
                    f"{owner} takes no {', '.join(former)}, unlike that of dilated_attention_pytorch: "
                    f"use {use} of {place or owner}"
                )
            if any(isinstance(value, (list, tuple)) for value in arguments):
                raise TypeError(f"{owner} takes no lists by place: use {_PATTERN} of {place or owner}")
            function(*arguments, **named)

        return checked

    return decorate
