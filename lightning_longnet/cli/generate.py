"""longnet generate: a text, and what a trained model goes on with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "A text, and what a trained model goes on with; one process, which computes the whole prefix for each token."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="of `longnet fit`: a file, or the folder of a sharded engine")
    parser.add_argument("--prompt", default="\n", help="where the text begins; a line's end by default")
    parser.add_argument("--prompt-file", help="a file that holds the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of what is drawn; 0 takes the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument(
        "--tokenizer", help="a Hugging Face name or folder, or `bytes`; that of the training by default"
    )


def run(arguments: argparse.Namespace) -> None:
    import torch

    from lightning_longnet.checkpointing.checkpoints import read_checkpoint
    from lightning_longnet.checkpointing.exports import model_of
    from lightning_longnet.data.tokenizers import tokenizer_of
    from lightning_longnet.models.generation import generate
    from lightning_longnet.models.longnet import LongNet

    found = read_checkpoint(arguments.checkpoint)
    told: dict[str, Any] = found.hyper_parameters
    if "config" not in told:
        raise ValueError(
            f"checkpoint must be of a LongNetModule, got hyperparameters {', '.join(told) or 'of nothing'}"
        )
    model = model_of(found).float()
    if not isinstance(model, LongNet):
        raise ValueError(f"checkpoint must be of a model that predicts tokens, got a {type(model).__name__}")
    config = model.config
    name = arguments.tokenizer or told.get("tokenizer")
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
    whole = generate(
        model,
        torch.tensor([ids]),
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(tokenizer.decode(whole[0].tolist()))  # noqa: T201
