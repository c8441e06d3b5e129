"""`longnet tokenize`: text files to a stream of tokens that training reads without loading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Text files to shards of tokens (.npy) and a tokens.json that says what they are, for lightning_longnet.TokenFileData.

A file is a document; a token for its end follows each.  A run that was stopped goes on where it was when it is
started again in the same way, and leaves the same bytes.  Files longer than 1 MiB are handed to the tokenizer in
pieces that end with a line.

  longnet tokenize books/ --out tokens --tokenizer gpt2 --pattern '*.txt'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="files and folders of text in UTF-8")
    parser.add_argument("--out", required=True, help="the folder to write; of its own")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="a Hugging Face tokenizer, by its name or folder; bytes (the default) for none",
    )
    parser.add_argument("--pattern", default="*.txt", help="which files of a folder, however deep; *.txt by default")
    parser.add_argument("--workers", type=int, default=0, help="processes; as many as there are cores by default")
    parser.add_argument("--shard-megabytes", type=float, default=64.0, help="of text in a shard; 64 by default")


def run(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from lightning_longnet.data.paths import found_files
    from lightning_longnet.data.tokenizing import plan_of, tokenize

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = arguments.workers or cores or 1
    if workers < 1:
        raise ValueError(f"workers must be a positive number, or 0 for one to each core, got {arguments.workers}")
    if not 0 < arguments.shard_megabytes < float("inf"):
        raise ValueError(f"shard-megabytes must be more than 0, got {arguments.shard_megabytes:g}")
    files = found_files("paths", arguments.paths, arguments.pattern)
    plan = plan_of(files, arguments.tokenizer, max(1, int(arguments.shard_megabytes * 2**20)))
    with tqdm(total=plan.bytes, unit="B", unit_scale=True, desc=f"{len(files):,} files") as bar:
        found = tokenize(plan, Path(arguments.out), workers, bar.update)
    print(  # noqa: T201
        f"{found['tokens']:,} tokens of {found['bytes_per_token']:.2f} bytes, vocabulary {found['vocab_size']:,}, in "
        f"{arguments.out}\n"
        f"next: longnet fit --data lightning_longnet.TokenFileData --data.path {arguments.out} ..."
    )
