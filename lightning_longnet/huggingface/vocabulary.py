"""Whether the tokens of a data module are those of a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_longnet.trust import is_trusted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ("tokenizer_config.json", "tokenizer.json")  # of which a folder with a tokenizer has one


def check_vocabulary(model: PreTrainedModel, name: str | None, data: Any) -> None:
    """Raise a ValueError where the tokens of a data module are not those of the model.

    Args:
        model: the model.
        name: its name or folder, where a tokenizer may be as well; a name of the Hub is looked up in the cache alone.
        data: the data module, or None.
    """
    vocabulary = getattr(data, "vocab_size", None)
    weight: Any = model.get_input_embeddings().weight
    known = getattr(weight, "ds_shape", weight.shape)[0]
    if vocabulary is not None and vocabulary > known:
        raise ValueError(
            f"the tokenizer of the data must be that of the model: it has {vocabulary:,} tokens, and the embedding of "
            f"the {type(model).__name__} {known:,}"
        )
    theirs = getattr(data, "tokenizer_name", None)
    if theirs is None or name is None or theirs == name:
        return
    own = _words(name)
    if own is None:
        return
    others = _words(theirs)
    if others is None or own != others:
        differing = None if others is None else min(set(own.items()) ^ set(others.items()))[0]
        detail = "" if differing is None else f"; they differ in {differing!r}"
        raise ValueError(
            f"the tokenizer of the data must be that of the model: data.tokenizer is {theirs!r}, and the model was "
            f"trained with the tokenizer of {name!r}{detail}. Set data.tokenizer to {name!r}"
        )


def _words(name: str) -> dict[str, int] | None:
    """Return the vocabulary of the tokenizer of a folder or of a name in the cache; None where there is none."""
    if name == "bytes" or (Path(name).is_dir() and not any((Path(name) / each).is_file() for each in _FILES)):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=is_trusted())
    except (OSError, ValueError):
        return None
    words: dict[str, int] = tokenizer.get_vocab()
    return words
