"""`longnet export`: export a trained model to a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

DESCRIPTION = """Write a trained model as a folder.

  longnet export last.ckpt folder                       config.json and model.safetensors
  longnet export last.ckpt folder --format huggingface  the same, and code for transformers:
      AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)

In Python, lightning_longnet.load_model("folder") reads either.  Needs the extra hf.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "checkpoint", help="a checkpoint of a Trainer on any engine, a file or a folder, or of longnet convert"
    )
    parser.add_argument("folder", help="the folder to create")
    parser.add_argument("--format", choices=("safetensors", "huggingface"), default="safetensors")


def run(arguments: Namespace) -> None:
    """Export the model and print its size."""
    from lightning_longnet.checkpointing.exports import export_model, load_model

    model = load_model(arguments.checkpoint)
    export_model(model, arguments.folder, arguments.format)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: {type(model).__name__}, {size:,} parameters")  # noqa: T201
