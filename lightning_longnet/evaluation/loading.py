"""The model and the tokenizer of a checkpoint, for work on texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.checkpointing.exports import model_of
from lightning_longnet.data.tokenizers import Tokenizer, tokenizer_of
from lightning_longnet.evaluation.ranks import Ranks
from lightning_longnet.layers.feed_forward import FeedForward
from lightning_longnet.models.longnet import LongNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CHUNK = 8192  # tokens of which a feed-forward holds the hidden values


class Loaded(NamedTuple):
    """A model for texts.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        trained_length: number of tokens of a row in training; None where the checkpoint does not name it.
        identity: what identifies the weights, for the journal of a run.
        ranks: the ranks that share the work.
    """

    model: LongNet
    tokenizer: Tokenizer
    trained_length: int | None
    identity: list[str | int]
    ranks: Ranks = Ranks()

    @property
    def alone(self) -> Loaded:
        """The same for work that this process does alone."""
        return self._replace(ranks=Ranks())


def loaded(
    checkpoint: str | Path,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    *,
    trust: bool = False,
    ranks: Ranks | None = None,
) -> Loaded:
    """Return the model and the tokenizer of a checkpoint.

    Args:
        checkpoint: as of `read_checkpoint`.
        tokenizer: the name or folder of a tokenizer, or "bytes"; by default that of the training.
        dtype: the dtype of the weights: "float32", "bfloat16", "float16" or "float64".
        device: a device of torch; a CUDA device where there is one, by default.
        trust: as of `read_checkpoint`.
        ranks: the ranks that share the work and call this together; this process alone by default.
    """
    ranks = Ranks() if ranks is None else ranks
    result = ranks.together(lambda: _loaded(checkpoint, tokenizer, dtype, device, trust))
    ranks.attach(result.model)
    return result._replace(ranks=ranks)


def _loaded(checkpoint: str | Path, tokenizer: str | None, dtype: str, device: str | None, trust: bool) -> Loaded:
    check_dtype(dtype)
    saved = read_checkpoint(checkpoint, trust=trust)
    model = model_of(saved, trust)
    if not isinstance(model, LongNet):
        raise ValueError(f"checkpoint must be of a model of tokens, a LongNet, got a {type(model).__name__}")
    name = tokenizer or saved.hyper_parameters.get("tokenizer")
    if name is None and model.config.vocab_size != 256:
        raise ValueError(f"tokenizer must be named: the checkpoint names none for {model.config.vocab_size} tokens")
    model = placed(model, dtype, device)
    chunk_own_feed_forwards(model)
    identity = identity_of(checkpoint, dtype)
    return Loaded(model, tokenizer_of(name or "bytes"), saved.hyper_parameters.get("tokens"), identity, Ranks())


def check_dtype(dtype: str) -> None:
    """Raise a ValueError where a dtype is none of those in which weights can be computed."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def placed(model: Any, dtype: str, device: str | None) -> Any:
    """Return a model on a device and in a dtype; a device that is not there raises a ValueError."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(place, DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:  # which torch raises for a device that is not there
        raise ValueError(f"device must be one that torch finds here, got {place!r}: {error}") from None


def chunk_own_feed_forwards(model: nn.Module) -> None:
    """Have the feed-forwards of a LongNet hold the hidden values of a bounded number of tokens."""
    for layer in model.modules():
        if isinstance(layer, FeedForward) and (layer.chunk_tokens or CHUNK) >= CHUNK:
            layer.chunk_tokens = CHUNK


def identity_of(checkpoint: str | Path, dtype: str) -> list[str | int]:
    """Return what identifies the weights of a checkpoint, for the journal of a run."""
    newest = max((each.stat().st_mtime_ns for each in _files(Path(checkpoint))), default=0)
    return [str(Path(checkpoint).resolve()), newest, dtype]


def _files(path: Path) -> list[Path]:
    return [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
