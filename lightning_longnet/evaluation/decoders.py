"""`loaded_decoder`: a causal model of any kind, a LongNet or a model of transformers, for evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.checkpointing.checkpoints import CONFIG, is_decoder, read_checkpoint
from lightning_longnet.checkpointing.exports import model_of
from lightning_longnet.data.tokenizers import BYTES, HubTokenizer, tokenizer_of
from lightning_longnet.evaluation.loading import CHUNK, check_dtype, chunk_own_feed_forwards, identity_of, placed
from lightning_longnet.evaluation.scoring import check_scorable
from lightning_longnet.huggingface.models import check_model, loaded
from lightning_longnet.huggingface.recomputation import chunk_feed_forwards, fault_of_chunks
from lightning_longnet.huggingface.saving import trained_decoder
from lightning_longnet.models.longnet import LongNet
from lightning_longnet.registration import ATTENTION

if TYPE_CHECKING:
    from lightning_longnet.data.tokenizers import Tokenizer


class Decoder(NamedTuple):
    """A causal model for evaluation.

    Attributes:
        model: the model, in evaluation mode: a LongNet, or a model of transformers.
        tokenizer_name: the argument of `tokenizer_of`; None where neither the user nor the checkpoint names a
            tokenizer.
        identity: what identifies the weights and how they are computed, for the journal of a run.
    """

    model: Any
    tokenizer_name: str | None
    identity: list[str | int]

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the model has embeddings for."""
        if isinstance(self.model, LongNet):
            return self.model.config.vocab_size
        size: int = self.model.get_input_embeddings().weight.shape[0]
        return size

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer; a ValueError says that it must be named where nobody did."""
        if self.tokenizer_name is None and self.vocab_size != 256:
            raise ValueError(f"--tokenizer must be named: the checkpoint names none for {self.vocab_size:,} tokens")
        tokenizer = tokenizer_of(self.tokenizer_name or BYTES)
        if tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"--tokenizer must be the model's: {tokenizer.name!r} has {tokenizer.vocab_size:,} tokens, and the "
                f"model {self.vocab_size:,}"
            )
        return tokenizer

    def begin(self) -> list[int]:
        """Return the tokens that stand before a text, as a model of transformers expects it; a LongNet expects none."""
        tokenizer = self.tokenizer()
        return tokenizer.begin if isinstance(tokenizer, HubTokenizer) and not isinstance(self.model, LongNet) else []


def loaded_decoder(
    checkpoint: str,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    attention: str = ATTENTION,
) -> Decoder:
    """Return the causal model of a checkpoint, of a folder or of a name of the Hub.

    Args:
        checkpoint: what `read_checkpoint` reads, a checkpoint of `CausalLMModule` among it, the folder of a model of
            transformers, or the name of one on the Hub.
        tokenizer: the name or folder of a tokenizer, or "bytes"; by default that of the training, or of the model.
        dtype: the dtype of the weights: "float32", "bfloat16", "float16" or "float64".
        device: a device of torch; a CUDA device where there is one, by default.
        attention: the implementation of attention of a model of transformers.
    """
    check_dtype(dtype)
    identity = [*identity_of(checkpoint, dtype), attention]
    if _is_of_transformers(checkpoint):
        model = loaded(checkpoint, attention, dtype)
        check_model(model)
        return Decoder(_prepared(model, dtype, device), tokenizer or checkpoint, identity)
    saved = read_checkpoint(checkpoint)
    name = tokenizer or saved.hyper_parameters.get("tokenizer")
    if is_decoder(saved.hyper_parameters):
        model = trained_decoder(saved.state_dict, saved.hyper_parameters, attention)
        return Decoder(_prepared(model, dtype, device), name, identity)
    own = model_of(saved)
    if not isinstance(own, LongNet):
        raise ValueError(f"checkpoint must be of a model that predicts tokens, got a {type(own).__name__}")
    check_scorable(own)
    own = placed(own, dtype, device)
    chunk_own_feed_forwards(own)
    return Decoder(own, name, identity)


def _is_of_transformers(checkpoint: str) -> bool:
    """Return whether this is the folder of a model of transformers, or a name of the Hub, as in "Qwen/Qwen3-0.6B"."""
    path = Path(checkpoint)
    if not path.exists():
        return checkpoint.count("/") == 1 and path.suffix not in (".ckpt", ".pt") and not checkpoint.startswith(".")
    if not (path / CONFIG).is_file():
        return False
    try:
        values = json.loads((path / CONFIG).read_text())
    except ValueError:  # `read_checkpoint` says so
        return False
    return isinstance(values, dict) and "model_type" in values and not {"longnet", "longvit"} & set(values)


def _prepared(model: Any, dtype: str, device: str | None) -> Any:
    """Return a model of transformers that computes long rows in one forward: no keys are kept for later tokens."""
    model = placed(model, dtype, device).eval()
    model.config.use_cache = False
    if not fault_of_chunks(model):
        chunk_feed_forwards(model, CHUNK)
    return model
