"""`longnet generate`: continue a text with a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DESCRIPTION = "Continue a text with a trained model, in one process, which computes the whole prefix for each token."

EXAMPLE = 'longnet generate last.ckpt --prompt "Once upon"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("checkpoint", help="a checkpoint of `longnet fit`: a file, or the folder of a sharded engine")
    parser.add_argument("--prompt", default="\n", help="the text to continue; a newline by default")
    parser.add_argument("--prompt-file", help="a file that holds the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="number of tokens to add (200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divisor of the logits; 0 takes the likeliest (0.8)"
    )
    parser.add_argument("--top-k", type=int, help="sample from this many of the most likely tokens only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument(
        "--tokenizer", help="a Hugging Face name or folder, or `bytes`; that of the training by default"
    )


def run(arguments: argparse.Namespace) -> None:
    """Generate tokens, and print the whole text."""
    import torch

    from lightning_longnet.checkpointing.checkpoints import read_checkpoint
    from lightning_longnet.checkpointing.exports import model_of
    from lightning_longnet.cli.progress import bar
    from lightning_longnet.data.tokenizers import tokenizer_of
    from lightning_longnet.models.generation import generate
    from lightning_longnet.models.longnet import LongNet

    saved = read_checkpoint(arguments.checkpoint)
    hyper_parameters: dict[str, Any] = saved.hyper_parameters
    if "config" not in hyper_parameters:
        raise ValueError(
            f"checkpoint must be of a LongNetModule, got hyperparameters {', '.join(hyper_parameters) or 'of nothing'}"
        )
    model = model_of(saved).float()
    if not isinstance(model, LongNet):
        raise ValueError(f"checkpoint must be of a model that predicts tokens, got a {type(model).__name__}")
    config = model.config
    name = arguments.tokenizer or hyper_parameters.get("tokenizer")
    if name is None and config.vocab_size != 256:
        raise ValueError(f"--tokenizer must be named: the checkpoint tells none for {config.vocab_size} tokens")
    tokenizer = tokenizer_of(name or "bytes")
    prompt = arguments.prompt
    if arguments.prompt_file is not None:
        try:
            with open(arguments.prompt_file, encoding="utf-8") as file:
                prompt = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file must hold text in UTF-8, {arguments.prompt_file} does not") from error
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt must hold at least one token, got an empty text")
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"--tokenizer must be the model's: it gives token {max(ids)}, and the model has {config.vocab_size}"
        )
    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "seed")}
    with bar(arguments.tokens, "generating", "token") as shown:

        def count(*_: Any) -> None:  # a hook that returned something would replace the logits
            shown.update()

        model.head.register_forward_hook(count)  # the head runs once for each token
        output_ids = generate(model, torch.tensor([ids]), arguments.tokens, **options)
    print(tokenizer.decode(output_ids[0].tolist()))  # noqa: T201
