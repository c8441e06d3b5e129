"""`longnet export`: export a trained model to a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from lightning_longnet.checkpointing.checkpoints import Checkpoint

DESCRIPTION = """Write a trained model as a folder.

  longnet export last.ckpt folder                       config.json and model.safetensors
  longnet export last.ckpt folder --format huggingface  the same, the tokenizer, and code for transformers:
      AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)

In Python, lightning_longnet.load_model("folder") reads either.  Needs the extra hf.
"""
EXAMPLE = "longnet export last.ckpt folder"
NONE = "none"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "checkpoint", help="a checkpoint of a Trainer on any engine, a file or a folder, or of longnet convert"
    )
    parser.add_argument("folder", help="the folder to create")
    parser.add_argument("--format", choices=("safetensors", "huggingface"), default="safetensors")
    parser.add_argument(
        "--tokenizer",
        help=f"with --format huggingface: a Hugging Face name or folder, `bytes`, or `{NONE}` to write no tokenizer; "
        f"that of the training by default",
    )


def run(arguments: Namespace) -> None:
    """Export the model, and print its size and tokenizer."""
    from pathlib import Path

    from lightning_longnet.checkpointing.checkpoints import is_decoder, read_checkpoint
    from lightning_longnet.checkpointing.exports import export_model, model_of
    from lightning_longnet.cli.progress import written
    from lightning_longnet.data.tokenizers import tokenizer_of

    saved = read_checkpoint(arguments.checkpoint)
    if is_decoder(saved.hyper_parameters):
        _export_decoder(arguments, saved)
        return
    model = model_of(saved)
    is_plain = arguments.format == "safetensors"
    if is_plain and arguments.tokenizer is not None:
        raise ValueError(f"--tokenizer is of --format huggingface, got {arguments.tokenizer!r}")
    name = None if is_plain else arguments.tokenizer or saved.hyper_parameters.get("tokenizer")
    tokenizer = None if name in (None, NONE) else tokenizer_of(name)
    trained_length = saved.hyper_parameters.get("tokens")
    size = sum(parameter.numel() for parameter in model.parameters())
    total, folder = sum(x.nbytes for x in model.state_dict().values()), Path(arguments.folder)
    with written(folder, total, f"writing {folder}"):
        export_model(model, folder, arguments.format, tokenizer=tokenizer, trained_length=trained_length)
    print(f"{arguments.folder}: {type(model).__name__}, {size:,} parameters")  # noqa: T201
    if not is_plain:
        unknown = "none: the checkpoint names none, and --tokenizer adds one" if name is None else NONE
        print(f"tokenizer: {unknown if tokenizer is None else tokenizer.name}")  # noqa: T201


def _export_decoder(arguments: Namespace, saved: Checkpoint) -> None:
    """Export a model of transformers as a folder that transformers reads without this package, adapters merged."""
    from pathlib import Path

    from lightning_longnet.cli.progress import written
    from lightning_longnet.data.tokenizers import tokenizer_of
    from lightning_longnet.huggingface.saving import check_folder, saved_decoder

    if arguments.format != "huggingface":
        raise ValueError("--format must be huggingface for a model of transformers, got 'safetensors'")
    folder = Path(arguments.folder)
    check_folder(folder)
    model = saved_decoder(saved.state_dict, saved.hyper_parameters)
    name = arguments.tokenizer or saved.hyper_parameters.get("tokenizer")
    tokenizer = None if name in (None, NONE) else tokenizer_of(name)
    with written(folder, sum(x.nbytes for x in model.parameters()), f"writing {folder}"):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {type(model).__name__}, {size:,} parameters")  # noqa: T201
    print(f"tokenizer: {NONE if tokenizer is None else tokenizer.name}")  # noqa: T201
