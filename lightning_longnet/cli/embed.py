"""`longnet embed`: write embeddings of text files, computed with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Write an embedding of each text file to one file, computed with a LongNet: an encoder or a decoder.

  longnet embed books/ --checkpoint last.ckpt --out books.safetensors
  longnet embed book.txt --checkpoint last.ckpt --out states.safetensors --pooling tokens

An embedding is the mean of the states of all tokens before the head, or the state of the last token.  With
`--pooling tokens` the file has the states of all tokens of each text, by its path.  A run that was killed goes on
where it stopped if it is started again with the same arguments; the file has its name when it is whole.  Under torchrun
or srun the ranks share the files, and the tokens of long ones.
"""

EXAMPLE = "longnet embed books --checkpoint last.ckpt --out books.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_shared_arguments(parser)
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument(
        "--pooling",
        choices=("mean", "last", "tokens"),
        default="mean",
        help="the mean of all states (the default), the last, or the states of all tokens",
    )
    parser.add_argument(
        "--format", choices=("safetensors", "hdf5"), default="safetensors", help="of the file; hdf5 needs h5py"
    )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads texts with a model."""
    parser.add_argument("paths", nargs="+", metavar="FILE", help="files and folders of text, read in this order")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a folder that `longnet export` wrote")
    parser.add_argument("--pattern", default="*.txt", help="files that are read in folders; *.txt by default")
    parser.add_argument(
        "--tokenizer", help="a Hugging Face name or folder, or `bytes`; that of the training by default"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="of the weights (float32)",
    )
    parser.add_argument("--device", help="a device of torch, such as cuda:1; CUDA where there is one, by default")


def run(arguments: argparse.Namespace) -> None:
    """Write the embeddings with a progress bar, and print the result."""
    from lightning_longnet.cli.counts import counted
    from lightning_longnet.cli.progress import bar
    from lightning_longnet.cli.ranks import launched
    from lightning_longnet.data.paths import found_files
    from lightning_longnet.data.texts import texts_of
    from lightning_longnet.evaluation.embedding import EmbeddingOptions, embed_files
    from lightning_longnet.evaluation.loading import loaded

    options = EmbeddingOptions(arguments.pooling, arguments.format)
    with launched(arguments.device) as (ranks, device):
        files = ranks.first(lambda: found_files("FILE", arguments.paths, arguments.pattern, is_sorted=False))
        source = loaded(arguments.checkpoint, arguments.tokenizer, arguments.dtype, device, ranks=ranks)
        texts = ranks.first(lambda: texts_of(files, source.tokenizer, 1))
        total, is_off = sum(text.size for text in texts), not ranks.is_first
        name = counted(len(texts), "file")
        with bar(total, name, "B", unit_scale=True, leave=True, delay=0, disable=is_off) as shown:
            tokens = embed_files(source, texts, Path(arguments.out), options, shown.update)
        if ranks.is_first:
            found = f"{counted(len(texts), 'text')} of {counted(tokens, 'token')}"
            print(f"{arguments.out}: {found}, {source.model.config.dim} values a row")  # noqa: T201
