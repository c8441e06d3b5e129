"""`longnet score`: the perplexity and the bits per byte of text files, computed with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longnet.cli.embed import add_shared_arguments

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Print a line of JSON for each text file: its loss in nats per token, perplexity and bits per byte under a LongNet
decoder.

  longnet score book.txt --checkpoint last.ckpt
  longnet score books/ --checkpoint last.ckpt --out scores.jsonl --plot loss.html

Each token is predicted from all tokens of its file before it, and the first is not predicted.  Texts are read and
computed in blocks, so memory does not grow with their length where each branch of the pattern has a segment or a
window.  With `--out`, a run that was killed goes on where it stopped if it is started again with the same arguments.
Under torchrun or srun the ranks share the files.
"""

EXAMPLE = "longnet score books --checkpoint last.ckpt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_shared_arguments(parser)
    parser.add_argument("--out", help="a file for the lines, which also makes the run resumable")
    parser.add_argument("--plot", help="a plot of the loss against the position: .html, or .png, .svg, .pdf")
    parser.add_argument(
        "--documents",
        action="store_true",
        help="each end token of the tokenizer ends a document, and tokens see their document alone",
    )


def run(arguments: argparse.Namespace) -> None:
    """Score the files with a progress bar."""
    from lightning_longnet.cli.counts import counted
    from lightning_longnet.cli.progress import bar
    from lightning_longnet.cli.ranks import launched
    from lightning_longnet.data.paths import found_files
    from lightning_longnet.data.texts import texts_of
    from lightning_longnet.evaluation.loading import loaded
    from lightning_longnet.evaluation.score_files import ScoreOptions, score_files
    from lightning_longnet.evaluation.scoring import check_scorable

    out, plot = (None if path is None else Path(path) for path in (arguments.out, arguments.plot))
    options = ScoreOptions(arguments.documents, out, plot)
    with launched(arguments.device) as (ranks, device):
        files = ranks.first(lambda: found_files("FILE", arguments.paths, arguments.pattern, is_sorted=False))
        source = loaded(arguments.checkpoint, arguments.tokenizer, arguments.dtype, device, ranks=ranks)
        check_scorable(source.model)
        texts = ranks.first(lambda: texts_of(files, source.tokenizer, 2))
        total, is_off = sum(text.size for text in texts), not ranks.is_first
        name = counted(len(texts), "file")
        with bar(total, name, "B", unit_scale=True, leave=True, delay=0, disable=is_off) as shown:

            def show(line: str) -> None:
                shown.clear()
                print(line, flush=True)  # noqa: T201

            score_files(source, texts, options, shown.update, show)
