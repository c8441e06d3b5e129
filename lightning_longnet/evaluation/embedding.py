"""Embedding of text files to one file, which is whole or absent, and whose run goes on where it was killed."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from lightning_longnet.data.texts import TokenReader, check_tokens, regrouped
from lightning_longnet.evaluation.journal import Journal
from lightning_longnet.evaluation.ranks import SHORT
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
    ranks = source.ranks
    with ExitStack() as stack:
        output = ranks.together(lambda: _opened(source, texts, out, options, stack) if ranks.is_first else None)
        done = ranks.first(lambda: _of(output).texts)
        advance(sum(text.size for text in texts[:done]))
        for some in ranks.rounds(texts[done:], lambda text: text.size <= SHORT):
            _append(source, some, output, options.pooling, advance)
        return ranks.first(lambda: _of(output).finish(out, options.format))


class _Output(NamedTuple):
    """The unfinished file of a run, and its journal."""

    journal: Journal
    file: StateFile

    @property
    def texts(self) -> int:
        """The number of texts whose rows the file has."""
        return len(self.journal.entries)

    def add(self, rows: Tensor | None, tokens: int) -> None:
        """Append the row of a text, or None where it has all, and name the text in the journal."""
        if rows is not None:
            assert len(rows) == 1 or not self.file.is_pooled
            self.file.append(rows)
        self.file.sync()
        self.journal.add({"tokens": tokens})

    def finish(self, out: Path, format: Format) -> int:
        """Give the file its name, and return the number of tokens of all texts."""
        counts = [entry["tokens"] for entry in self.journal.entries]
        self.file.finish(counts)
        if format == "hdf5":
            converted = out.with_name(f"{out.name}.hdf5.part")
            write_hdf5(self.journal.data, converted)
            os.replace(converted, out)
            self.journal.data.unlink()
        else:
            os.replace(self.journal.data, out)
        self.journal.remove()
        return sum(counts)


def _of(output: _Output | None) -> _Output:
    """Return the output, which the first rank has."""
    assert output is not None
    return output


def _identity(source: Loaded, texts: Sequence[Text], options: EmbeddingOptions) -> dict[str, object]:
    """Return what the file depends on."""
    files = [[str(text.path), text.size, text.changed] for text in texts]
    return {"files": files, "source": source.identity, "tokenizer": source.tokenizer.name, "options": [*options]}


def _opened(source: Loaded, texts: Sequence[Text], out: Path, options: EmbeddingOptions, stack: ExitStack) -> _Output:
    """Open the unfinished file at the place where its journal ends, until the stack ends."""
    journal = stack.enter_context(Journal(out, _identity(source, texts, options)))
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
    stack.callback(file.close)
    file.rewind(len(journal.entries) if is_pooled else sum(entry["tokens"] for entry in journal.entries))
    return _Output(journal, file)


def _append(
    source: Loaded,
    texts: Sequence[Text],
    output: _Output | None,
    pooling: Pooling,
    advance: Callable[[float], object],
) -> None:
    """Append the rows of consecutive texts: of one that the ranks share, or of one for each rank."""
    ranks = source.ranks
    if len(texts) == 1:

        def append(rows: Tensor, count: int) -> None:
            whole = ranks.joined(rows, count)
            ranks.first(lambda: _of(output).file.append(whole))

        found = [_embedded(source, texts[0], pooling, append, advance)]
    else:
        own = texts[ranks.rank : ranks.rank + 1]
        parts: list[Tensor] = []

        def embedded(text: Text) -> tuple[Tensor | None, int]:
            row, tokens = _embedded(source.alone, text, pooling, lambda rows, _: parts.append(rows), advance)
            return (torch.cat(parts) if row is None else row).cpu(), tokens

        found = [each for some in ranks.each(lambda: [embedded(text) for text in own]) for each in some]
        advance(sum(text.size for text in texts) - sum(text.size for text in own))
    ranks.first(lambda: [_of(output).add(row, tokens) for row, tokens in found])


def _embedded(
    source: Loaded,
    text: Text,
    pooling: Pooling,
    append: Callable[[Tensor, int], object],
    advance: Callable[[float], object],
) -> tuple[Tensor | None, int]:
    """Return the row (1, dim) of a text and the number of its tokens.

    Of "tokens" there is no row: `append` gets the states of this rank of each block, and the number of the block's.
    """
    ranks, count, total, last = source.ranks, 0, None, None
    for states, tokens in state_blocks(source, text, advance):
        count += tokens
        if pooling == "tokens":
            append(states, tokens)
        elif pooling == "last":  # the last rank has the last token of each block
            last = states[-1:]
        else:
            added = states.sum(0, keepdim=True, dtype=wide(states.dtype))
            total = added if total is None else total + added
    check_tokens(text, count, 1)
    if total is not None:
        return ranks.summed(total) / count, count
    if last is not None:
        is_last = ranks.rank == ranks.size - 1
        # a rank may have no token of a short last block
        return ranks.summed((last if is_last else states.new_zeros(1, states.shape[1])).to(wide(states.dtype))), count
    return None, count


def state_blocks(source: Loaded, text: Text, advance: Callable[[float], object]) -> Iterator[tuple[Tensor, int]]:
    """Yield the states (n, dim) of consecutive blocks of a text, and the tokens of each block.

    The text is one block where the model cannot use a cache.  Of ranks that share the text, each gets its share.
    """
    model, ranks = source.model, source.ranks
    states = TextStates(model, ranks=ranks)
    done, tokens = 0.0, 0
    with one_text(model):
        for ids, share in ranks.shared(_blocks(source, text)):
            if states.cache is None:
                with _by_layer(model, share, advance):
                    yield states.encode(ids), len(ids)
            else:
                yield states.encode(ids), len(ids)
                advance(share)
            done, tokens = done + share, tokens + len(ids)
    model._warn_of_reach(tokens)
    advance(text.size - done)


def _blocks(source: Loaded, text: Text) -> Iterator[tuple[Tensor, float]]:
    """Yield the tokens of each block of a text, and its bytes."""
    reader = TokenReader(text, source.tokenizer, source.model.config.vocab_size)
    for ids in regrouped(reader, block_tokens(source.model.config)):
        yield ids, len(ids) * reader.bytes / reader.tokens


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
