"""Embedding of text files to one file, which is whole or absent, and whose run goes on where it was killed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from lightning_longnet.data.texts import TokenReader, check_tokens, regrouped
from lightning_longnet.evaluation.journal import Journal
from lightning_longnet.evaluation.state_files import StateFile, need_h5py, write_hdf5
from lightning_longnet.evaluation.stream import TextStates, block_tokens, one_text
from lightning_longnet.models.embedding import Pooling, check_pooling, wide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lightning_longnet.data.texts import Text
    from lightning_longnet.evaluation.loading import Loaded
    from lightning_longnet.models.longnet import LongNet

Format = Literal["safetensors", "hdf5"]


class EmbeddingOptions(NamedTuple):
    """The options of embedding texts.

    Attributes:
        pooling: "mean", "last" or "tokens"; see `lightning_longnet.models.embedding.embed`.
        format: "safetensors" or "hdf5".
    """

    pooling: Pooling = "mean"
    format: Format = "safetensors"


def embed_files(
    source: Loaded, texts: Sequence[Text], out: Path, options: EmbeddingOptions, advance: Callable[[float], object]
) -> int:
    """Write the embeddings of texts to a file, and return the number of their tokens.

    A run that was killed goes on with the text at which it stopped, if it has the same texts, checkpoint and options.

    Args:
        source: the model and the tokenizer.
        texts: the texts.
        out: the file to write, which must not exist.
        options: the options.
        advance: called with numbers of bytes of text that are done.
    """
    check_pooling(options.pooling)
    if options.format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {options.format!r}")
    if options.format == "hdf5":
        need_h5py()
    with Journal(out, _identity(source, texts, options)) as journal, _opened(source, texts, journal, options) as file:
        _append_texts(source, texts, journal, file, options.pooling, advance)
        counts = [entry["tokens"] for entry in journal.entries]
        file.finish(counts)
    if options.format == "hdf5":
        converted = out.with_name(f"{out.name}.hdf5.part")
        write_hdf5(journal.data, converted)
        os.replace(converted, out)
        journal.data.unlink()
    else:
        os.replace(journal.data, out)
    journal.remove()
    return sum(counts)


def _identity(source: Loaded, texts: Sequence[Text], options: EmbeddingOptions) -> dict[str, object]:
    """Return what the file depends on."""
    files = [[str(text.path), text.size, text.changed] for text in texts]
    return {"files": files, "source": source.identity, "tokenizer": source.tokenizer.name, "options": [*options]}


@contextmanager
def _opened(source: Loaded, texts: Sequence[Text], journal: Journal, options: EmbeddingOptions) -> Iterator[StateFile]:
    """Open the unfinished file at the place where the journal ends."""
    dtype = next(source.model.parameters()).dtype
    is_pooled = options.pooling != "tokens"
    metadata = {
        "pooling": options.pooling,
        "checkpoint": str(source.identity[0]),
        "tokenizer": source.tokenizer.name,
    }
    file = StateFile(
        journal.data,
        [str(text.path) for text in texts],
        source.model.config.dim,
        wide(dtype) if is_pooled else dtype,
        metadata,
        is_pooled=is_pooled,
    )
    try:
        file.rewind(len(journal.entries) if is_pooled else sum(entry["tokens"] for entry in journal.entries))
        yield file
    finally:
        file.close()


def _append_texts(
    source: Loaded,
    texts: Sequence[Text],
    journal: Journal,
    file: StateFile,
    pooling: Pooling,
    advance: Callable[[float], object],
) -> None:
    """Append the rows of each text that the journal does not name."""
    done = len(journal.entries)
    advance(sum(text.size for text in texts[:done]))
    for text in texts[done:]:
        count, total, last = 0, None, None
        for states in state_blocks(source, text, advance):
            count += len(states)
            if pooling == "tokens":
                file.append(states)
            elif pooling == "last":
                last = states[-1:]
            else:
                added = states.sum(0, keepdim=True, dtype=wide(states.dtype))
                total = added if total is None else total + added
        check_tokens(text, count, 1)
        if pooling != "tokens":
            row = last if total is None else total / count
            assert row is not None
            file.append(row)
        file.sync()
        journal.add({"tokens": count})


def state_blocks(source: Loaded, text: Text, advance: Callable[[float], object]) -> Iterator[Tensor]:
    """Yield the states (n, dim) of consecutive tokens of a text: all at once where the model cannot use a cache."""
    model = source.model
    reader = TokenReader(text, source.tokenizer, model.config.vocab_size)
    states = TextStates(model)
    done = 0.0
    with one_text(model):
        for ids in regrouped(reader, block_tokens(model.config)):
            share = len(ids) * reader.bytes / reader.tokens
            if states.cache is None:
                with _by_layer(model, share, advance):
                    yield states.encode(ids)
            else:
                yield states.encode(ids)
                advance(share)
            done += share
    model._warn_of_reach(reader.tokens)
    advance(text.size - done)


@contextmanager
def _by_layer(model: LongNet, size: float, advance: Callable[[float], object]) -> Iterator[None]:
    """Call `advance` after each block of the model with its share of `size`."""

    def count(*_: object) -> None:  # a hook that returned something would replace the output
        advance(size / len(model.blocks))

    hooks = [block.register_forward_hook(count) for block in model.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
