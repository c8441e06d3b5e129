"""`longnet tokenize`: convert text files to shards of tokens, which training reads without loading them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Convert text files to shards of tokens (.npy) with a tokens.json that describes them, for
lightning_longnet.TokenFileData.

Each file is a document, which ends with an end token.  An interrupted run continues if it is started again with the
same arguments, and writes the same bytes.  The tokenizer gets files longer than 1 MiB in pieces that end with a line.

  longnet tokenize books/ --out tokens --tokenizer gpt2 --pattern '*.txt'
"""

EXAMPLE = "longnet tokenize books --out tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("paths", nargs="+", help="files and folders of text in UTF-8")
    parser.add_argument("--out", required=True, help="the folder to write, which holds nothing else")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="the name or folder of a Hugging Face tokenizer, or bytes (the default)",
    )
    parser.add_argument(
        "--pattern", default="*.txt", help="files that are read in folders and subfolders; *.txt by default"
    )
    parser.add_argument("--workers", type=int, default=0, help="number of processes; the number of cores by default")
    parser.add_argument("--shard-megabytes", type=float, default=64.0, help="text in a shard; 64 by default")


def run(arguments: argparse.Namespace) -> None:
    """Tokenise the files with a progress bar, and print the result."""
    from lightning_longnet.cli.progress import bar
    from lightning_longnet.data.paths import found_files
    from lightning_longnet.data.tokenizing import plan_of, tokenize

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = arguments.workers or cores or 1
    if workers < 1:
        raise ValueError(f"workers must be a positive number, or 0 for one to each core, got {arguments.workers}")
    if not 0 < arguments.shard_megabytes < float("inf"):
        raise ValueError(f"shard-megabytes must be more than 0, got {arguments.shard_megabytes:g}")
    if Path(arguments.out).is_file():
        raise ValueError(f"--out must be a folder, or a new name, got {arguments.out}, which is a file")
    files = found_files("paths", arguments.paths, arguments.pattern)
    plan = plan_of(files, arguments.tokenizer, max(1, int(arguments.shard_megabytes * 2**20)))
    with bar(plan.bytes, f"{len(files):,} files", "B", unit_scale=True, leave=True, delay=0) as shown:
        result = tokenize(plan, Path(arguments.out), workers, shown.update)
    print(  # noqa: T201
        f"{result['tokens']:,} tokens of {result['bytes_per_token']:.2f} bytes, vocabulary "
        f"{result['vocab_size']:,}, in {arguments.out}\n"
        f"next: longnet fit --config FILE --data lightning_longnet.TokenFileData --data.path {arguments.out} "
        f"--model.config.vocab_size {result['vocab_size']}"
    )
