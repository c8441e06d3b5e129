"""`longnet generate`: continue a text with a trained model."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.cli.counts import token_count

if TYPE_CHECKING:
    import argparse

    from lightning_longnet.data.tokenizers import Tokenizer
    from lightning_longnet.evaluation.ranks import Ranks
    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.models.longnet import LongNet

DESCRIPTION = """Continue a text with a trained model.  The text appears as it is generated.

  longnet generate last.ckpt --prompt "Once upon"
  longnet generate last.ckpt --prompt-file - < story.txt   the prompt from the standard input
  longnet generate last.ckpt --chat                        a conversation on a terminal

Under torchrun or srun the ranks share the keys and values that are kept.
"""
EXAMPLE = 'longnet generate last.ckpt --prompt "Once upon"'

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
# Fewer parameters than this are multiplied by one thread in the time in which several would start
_ONE_THREAD = 20_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("checkpoint", help="a checkpoint of `longnet fit`: a file, or the folder of a sharded engine")
    parser.add_argument("--prompt", default="\n", help="the text to continue; a newline by default")
    parser.add_argument("--prompt-file", help="a file that holds the prompt; - is the standard input")
    parser.add_argument("--chat", action="store_true", help="answer each line that is typed on a terminal")
    parser.add_argument("--tokens", type=token_count, default=200, help="tokens to add, or of an answer (200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divisor of the logits; 0 takes the likeliest (0.8)"
    )
    parser.add_argument("--top-k", type=int, help="sample from this many of the most likely tokens only")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens with this sum of probabilities")
    parser.add_argument("--min-p", type=float, help="sample from tokens with this share of the highest probability")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1, makes tokens that the text has less likely (1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument(
        "--cache",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="the dtype of the keys and values that are kept; that of the weights, float32, by default",
    )
    parser.add_argument(
        "--tokenizer", help="a Hugging Face name or folder, or `bytes`; that of the training by default"
    )


def run(arguments: argparse.Namespace) -> None:
    """Generate tokens, and print the whole text as they come, and the speed to stderr."""
    from lightning_longnet.cli.ranks import launched

    with launched("cpu") as (ranks, _):
        if arguments.chat and ranks.size > 1:
            raise ValueError(f"--chat needs one process with a terminal, got {ranks.size} ranks")
        if arguments.chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError("--chat needs a terminal; --prompt-file - reads the standard input")
        source = _source(ranks.together(lambda: _read(arguments)), arguments, ranks)
        if arguments.chat:
            _chat(source, arguments)
            return
        prompt = arguments.prompt
        if arguments.prompt_file is not None:
            prompt = ranks.first(lambda: _text_of(arguments.prompt_file))
        ids = _ids(source.tokenizer, prompt, source.model)
        begin = perf_counter()
        count, seconds, _ = _answer(source, ids, arguments, prompt)
        source.say("\n")
        before = perf_counter() - begin - seconds
        rate = f"{(count - 1) / seconds:,.0f} tokens/s" if count > 1 and seconds else "-"
        if ranks.is_first:
            speed = f"longnet: {count} tokens, {rate}; {len(ids)} of the prompt in {before:.2f} s"
            print(speed, file=sys.stderr)  # noqa: T201


class _Source(NamedTuple):
    """A model that continues texts.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        cache: the cache of the text, which the ranks share; None where the model has none.
        ranks: the ranks.
    """

    model: LongNet
    tokenizer: Tokenizer
    cache: DilatedCache | None
    ranks: Ranks

    def say(self, text: str) -> None:
        """Print a text, on the first rank."""
        if self.ranks.is_first:
            print(text, end="", flush=True)  # noqa: T201


def _source(read: tuple[LongNet, Tokenizer], arguments: argparse.Namespace, ranks: Ranks) -> _Source:
    """Return a model with its cache, for the threads and the ranks that there are."""
    import torch

    from lightning_longnet.models.generation import caches

    model, tokenizer = read
    ranks.attach(model)
    if sum(parameter.numel() for parameter in model.parameters()) < _ONE_THREAD:
        torch.set_num_threads(1)
    cache = None
    if caches(model):
        dtype = None if arguments.cache is None else getattr(torch, arguments.cache)
        cache = model.new_cache(dtype=dtype, group=ranks.group)
    elif arguments.cache is not None:
        raise ValueError("--cache is of models that have a cache, and this one computes the whole prefix of each token")
    return _Source(model, tokenizer, cache, ranks)


def _read(arguments: argparse.Namespace) -> tuple[LongNet, Tokenizer]:
    """Return the model of the checkpoint, and its tokenizer."""
    from lightning_longnet.checkpointing.checkpoints import read_checkpoint
    from lightning_longnet.checkpointing.exports import model_of
    from lightning_longnet.data.tokenizers import tokenizer_of
    from lightning_longnet.models.longnet import LongNet

    saved = read_checkpoint(arguments.checkpoint)
    hyper_parameters: dict[str, Any] = saved.hyper_parameters
    model = model_of(saved).float()
    if not isinstance(model, LongNet):
        raise ValueError(f"checkpoint must be of a model that predicts tokens, got a {type(model).__name__}")
    name = arguments.tokenizer or hyper_parameters.get("tokenizer")
    if name is None and model.config.vocab_size != 256:
        raise ValueError(f"--tokenizer must be named: the checkpoint tells none for {model.config.vocab_size} tokens")
    return model, tokenizer_of(name or "bytes")


def _text_of(path: str) -> str:
    """Return the text of a file, or of the standard input."""
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file must hold text in UTF-8, {path} does not") from error


def _ids(tokenizer: Tokenizer, text: str, model: LongNet) -> list[int]:
    """Return the tokens of a text."""
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("--prompt must hold at least one token, got an empty text")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"--tokenizer must be the model's: it gives token {max(ids)}, and the model has {model.config.vocab_size}"
        )
    return ids


def _answer(
    source: _Source, ids: list[int], arguments: argparse.Namespace, prompt: str = ""
) -> tuple[int, float, list[int]]:
    """Print the prompt, once the options are checked, and then the text of further tokens as they come.

    Returns:
        the number of tokens, the seconds from the first to the last, and the tokens.
    """
    import torch

    from lightning_longnet.cli.progress import bar
    from lightning_longnet.inference.text import TextStream

    shown = TextStream(source.tokenizer.decode, arguments.stop)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in _SAMPLING}
    options |= {"cache": source.cache, "context": source.ranks.context}
    further = source.model.stream(torch.tensor([ids]), arguments.tokens, **options)  # checks the options
    source.say(prompt)
    found: list[int] = []
    first = last = 0.0
    is_off = sys.stdout.isatty() or not source.ranks.is_first
    with bar(arguments.tokens, "generating", "token", disable=is_off) as progress:
        for token in further:
            last = perf_counter()
            first = first or last
            found.append(int(token))
            source.say(shown.add(found[-1]))
            progress.update()
            if shown.is_stopped:
                break
    source.say(shown.end())
    return len(found), last - first, found


def _chat(source: _Source, arguments: argparse.Namespace) -> None:
    """Answer each line that is typed, until the end of the input: the text goes on with the line, and then the answer.

    An answer ends at a stop text, or after `--tokens`.
    """
    text: list[int] = []  # the tokens that the cache does not hold yet; without a cache, all of them
    print("A line is added to the text, and the model goes on with it.  End with Ctrl-D.", file=sys.stderr)  # noqa: T201
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)  # noqa: T201
            return
        text += _ids(source.tokenizer, f"{line}\n", source.model)
        _, _, found = _answer(source, text, arguments)
        print(flush=True)  # noqa: T201
        text = found[-1:] if source.cache is not None else text + found
