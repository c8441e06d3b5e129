"""`longnet convert`: convert a model of torchscale to a checkpoint of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from lightning_longnet.models.longnet import LongNet
    from lightning_longnet.models.longvit import LongViT

DESCRIPTION = """Read a LongNet or a LongViT of torchscale, and write it as a checkpoint that computes the same.

torchscale pads segments with zeros, and its encoders and LongViTs attend to them; so does the result.  With
--ragged exact it attends to tokens alone, which changes its outputs at lengths that segments do not divide.

  longnet convert longvit.pth longvit.ckpt --set encoder_attention_heads=16
  longnet convert decoder.pt decoder.ckpt --set decoder_attention_heads=12 \\
      "segment_length=[2048,4096,8192]" "dilated_ratio=[1,2,4]" no_scale_embedding=False

Arguments that the file contains need not be given.  A feature that has no counterpart here is refused by its name.
longnet export and lightning_longnet.load_model read the result.
"""

EXAMPLE = "longnet convert longvit.pth longvit.ckpt"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("source", help="a file that torch.save wrote")
    parser.add_argument("checkpoint", help="the file to write")
    parser.add_argument("--key", help="the key of the weights in the file, if several could be")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model, by torchscale's names"
    )
    parser.add_argument(
        "--mix",
        choices=("detached", "exact"),
        default="detached",
        help="the gradient in further training: torchscale's (the default), or that of the computed function",
    )
    parser.add_argument(
        "--ragged",
        choices=("zero_keys", "exact"),
        default="zero_keys",
        help="whether an encoder attends to the padding of segments: as torchscale (the default), or to tokens alone",
    )


def run(arguments: Namespace) -> None:
    """Convert the model, write the checkpoint and print its size."""
    from difflib import get_close_matches
    from pathlib import Path

    options = dict(map(_setting, arguments.set))
    target = Path(arguments.checkpoint)
    if target.exists():
        raise ValueError(f"checkpoint must be a new file, got {target}, which exists")
    from lightning_longnet.checkpointing.checkpoints import write_checkpoint
    from lightning_longnet.checkpointing.torchscale import (
        ARGUMENTS,
        REFUSED_ARGUMENTS,
        from_torchscale,
        read_torchscale,
    )
    from lightning_longnet.cli.progress import written

    for name in set(options) - {*ARGUMENTS, *REFUSED_ARGUMENTS}:
        # torchscale has many arguments without effect here, so an unknown name is an error only if it looks misspelt
        if near := get_close_matches(name, ARGUMENTS, 1, 0.85):
            raise ValueError(f"set must name torchscale's arguments, as {near[0]}, got {name}")
    state, saved = read_torchscale(arguments.source, arguments.key)
    model = from_torchscale(state, {**saved, **options}, arguments.mix, arguments.ragged)
    size = sum(parameter.numel() for parameter in model.parameters())
    with written(target, sum(x.nbytes for x in model.state_dict().values()), f"writing {target}"):
        write_checkpoint(model, target)
    print(f"{target}: {type(model).__name__}, {size:,} parameters{_padding(model)}")  # noqa: T201


def _padding(model: LongNet | LongViT) -> str:
    """Return what the model attends to beside tokens, or an empty text for a decoder."""
    config = model.config
    if all(pattern.is_causal for pattern in config.patterns):
        return ""
    if any(pattern.has_null_keys for pattern in config.patterns):
        return ", attends to the padding of segments, as torchscale"
    return ", attends to tokens alone, unlike torchscale where segments are padded"


def _setting(text: str) -> tuple[str, Any]:
    """Return (name, value) of the text `NAME=VALUE`, where the value is a Python literal or text."""
    from ast import literal_eval

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"set must be NAME=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):  # as in YAML: the text "false" would count as True
        return name, value.lower() == "true"
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # text, such as that of activation_fn=gelu
