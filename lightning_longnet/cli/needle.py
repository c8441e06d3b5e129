"""`longnet needle`: whether a model recalls what is far back, by the length of a text and the depth in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longnet.cli.counts import token_count

if TYPE_CHECKING:
    import argparse

    from lightning_longnet.evaluation.decoders import Decoder
    from lightning_longnet.evaluation.needles import Needles

DESCRIPTION = """\
Print how often a causal model recalls a number from a sentence far back, for each length of a text and each depth of
the sentence in it.

  longnet needle last.ckpt --lengths 1k 4k 16k
  longnet needle Qwen/Qwen3-0.6B --lengths 8k 32k 128k --dtype bfloat16 --out needle.jsonl --plot needle.png

CHECKPOINT is a LongNet or a model of transformers: a checkpoint of `longnet fit`, a folder of `longnet export` or of
save_pretrained, or a name of the Hub.  An answer is right if greedy decoding gives the whole number.  With `--out`, a
run that was killed goes on where it stopped if it is started again with the same arguments.
"""

EXAMPLE = "longnet needle last.ckpt --lengths 1k 4k 16k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("checkpoint", help="a checkpoint, an exported folder, or a folder or name of transformers")
    parser.add_argument(
        "--lengths", nargs="+", type=token_count, default=[1024, 4096, 16384], help="tokens of a row (1k 4k 16k)"
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the sentence is, from 0, the beginning, to 1, before the question (0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--samples", type=token_count, default=8, help="rows of each length and depth (8)")
    parser.add_argument(
        "--task",
        choices=("text", "tokens"),
        default="text",
        help="text: a number in a text; tokens: the token after a mark among random tokens, for models of no language",
    )
    parser.add_argument("--haystack", metavar="FILE", help="the text around the sentence; plain sentences by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows (0)")
    parser.add_argument("--out", help="a file for lines of JSON, which also makes the run resumable")
    parser.add_argument("--plot", help="a heat map: .png, .svg or .pdf; needs matplotlib")
    parser.add_argument(
        "--tokenizer", help="a Hugging Face name or folder, or `bytes`; that of the training or the model by default"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="of the weights (float32)",
    )
    parser.add_argument("--device", help="a device of torch, such as cuda:1; CUDA where there is one, by default")
    parser.add_argument("--attention", default="ring", help="attn_implementation of a model of transformers (ring)")


def run(arguments: argparse.Namespace) -> None:
    """Compute the cells with a progress bar, and print the table."""
    from lightning_longnet.cli.counts import counted
    from lightning_longnet.cli.progress import bar
    from lightning_longnet.cli.ranks import check_alone
    from lightning_longnet.evaluation.decoders import loaded_decoder
    from lightning_longnet.evaluation.needle_files import NeedleOptions, needle_files
    from lightning_longnet.report.plot import check_image

    check_alone("needle")
    out, plot = (None if path is None else Path(path) for path in (arguments.out, arguments.plot))
    if plot is not None:
        check_image(plot)
    haystack = _haystack(arguments)
    source = loaded_decoder(
        arguments.checkpoint, arguments.tokenizer, arguments.dtype, arguments.device, arguments.attention
    )
    needles = _needles(source, arguments.task, haystack)
    options = NeedleOptions(arguments.lengths, arguments.depths, arguments.samples, arguments.seed, out, plot)
    total = sum(options.lengths) * len(options.depths)
    with bar(total, "needles", "token", unit_scale=True) as shown:
        grid = needle_files(source, needles, options, shown.update)
    print(grid.table())  # noqa: T201
    print(f"right answers of {counted(grid.samples, 'row')} each{grid.by_chance()}")  # noqa: T201


def _haystack(arguments: argparse.Namespace) -> str | None:
    """Return the text of `--haystack`."""
    if arguments.haystack is None:
        return None
    if arguments.task != "text":
        raise ValueError(f"--haystack is of --task text, got --task {arguments.task}")
    try:
        return Path(arguments.haystack).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--haystack must hold text in UTF-8, {arguments.haystack} does not") from error


def _needles(source: Decoder, task: str, haystack: str | None) -> Needles:
    """Return what makes the rows."""
    from lightning_longnet.evaluation.needle_rows import NumberInText, TokenAfterMark

    if task == "tokens":
        return TokenAfterMark(source.vocab_size)
    return NumberInText(source.tokenizer(), haystack, source.begin())
