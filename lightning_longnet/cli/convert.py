"""`longnet convert`: what torchscale trained, as a checkpoint of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

DESCRIPTION = """Read a LongNet or a LongViT of torchscale, and write it as a checkpoint that computes the same.

  longnet convert longvit.pth longvit.ckpt --set encoder_attention_heads=16
  longnet convert decoder.pt decoder.ckpt --set decoder_attention_heads=12 \\
      "segment_length=[2048,4096,8192]" "dilated_ratio=[1,2,4]" no_scale_embedding=False

Arguments that the file holds need not be told.  What has no counterpart here is refused by its name.  The result is
for longnet export, and for lightning_longnet.load_model.
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="a file that torch.save wrote")
    parser.add_argument("checkpoint", help="the file to write")
    parser.add_argument("--key", help="under which of its keys the weights are, where there are several")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model, by torchscale's names"
    )
    parser.add_argument(
        "--mix",
        choices=("detached", "exact"),
        default="detached",
        help="in further training: torchscale's gradient (by default), or that of what is computed",
    )


def run(arguments: Namespace) -> None:
    from difflib import get_close_matches
    from pathlib import Path

    told = dict(map(_setting, arguments.set))
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

    for name in set(told) - {*ARGUMENTS, *REFUSED_ARGUMENTS}:
        # torchscale has many arguments that change nothing here; one that is nearly read is misspelt
        if near := get_close_matches(name, ARGUMENTS, 1, 0.85):
            raise ValueError(f"set must name torchscale's arguments, as {near[0]}, got {name}")
    state, found = read_torchscale(arguments.source, arguments.key)
    model = from_torchscale(state, {**found, **told}, arguments.mix)
    write_checkpoint(model, target)
    many = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {type(model).__name__}, {many:,} parameters")  # noqa: T201


def _setting(text: str) -> tuple[str, Any]:
    from ast import literal_eval

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"set must be NAME=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):  # as YAML and shells write them: a text would be taken for True
        return name, value.lower() == "true"
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # text, as of activation_fn=gelu
