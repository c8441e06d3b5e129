"""`CausalLMModule`: a LightningModule that trains any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.optim import Optimizer  # noqa: TC002

from lightning_longnet.huggingface.adapters import add_adapters, base_digest
from lightning_longnet.huggingface.batches import fault_of_batch, fault_of_packing, named_as_ours
from lightning_longnet.huggingface.documents import fault_of_documents, whole_documents
from lightning_longnet.huggingface.generation import generated
from lightning_longnet.huggingface.head import OutputHead
from lightning_longnet.huggingface.lineage import first_run
from lightning_longnet.huggingface.models import Source, body_of, check_splits, model_of, need_transformers
from lightning_longnet.huggingface.prompts import padding_refusal
from lightning_longnet.huggingface.recomputation import chunk_feed_forwards, recompute_layers
from lightning_longnet.huggingface.vocabulary import check_vocabulary
from lightning_longnet.huggingface.weight_files import WeightFiles, empty_model
from lightning_longnet.inference.prompts import fault_of_prompts, whole_prompts
from lightning_longnet.layers.attending import places_of
from lightning_longnet.layers.loss import CHUNK_TOKENS
from lightning_longnet.layers.options import positive_integer
from lightning_longnet.models.blocks import Recompute  # noqa: TC001  the command line evaluates annotations
from lightning_longnet.registration import ATTENTION
from lightning_longnet.sequence import SequenceContext, sequence_context
from lightning_longnet.training.causal_lm_checkpoints import CausalLMCheckpoints

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.layers.loss import TokenLoss


class CausalLMModule(CausalLMCheckpoints):
    """A causal language model of transformers with its loss, metrics and optimiser, for any Lightning strategy.

    Under `ring_sequence_parallel` each rank holds its part of every sequence, and by `attn_implementation="ring"` the
    model attends over whole sequences.

    Batches are dictionaries with `input_ids` and `labels` (B, N), and optionally `attention_mask`, `documents` and
    `positions`.  `labels[:, t]` is the token that token t is to predict, or -100: the data shifts labels, unlike that
    of transformers' own `Trainer`.  `shift_labels` and `position_ids`, transformers' names of `labels` and `positions`,
    are read as well.  Positions are global, and restart in each document.

    The module logs the mean loss over the tokens of all ranks, the perplexity of validation and test data, and bits per
    byte where the data module has an attribute `bytes_per_token`.

    Args:
        model: a model of transformers, or a configuration, of which a model with initial weights is made.
        name: in place of `model`, the name or the folder of a model, which is loaded with its weights.
        config: in place of `model`, the values of a configuration, `model_type` among them.
        overrides: values of the configuration of `name` that replace its own, such as `rope_parameters` for YaRN.
        learning_rate: the highest learning rate.
        warmup_steps: number of steps in which the learning rate rises to that.  It then falls as half a cosine until
            the end of training.
        final_share: the last learning rate, as a share of the highest.
        weight_decay: weight decay of matrices; biases and norms have none.
        betas: betas of AdamW.
        eps: eps of AdamW.
        optimizer: another optimiser, called with the parameter groups: in YAML a class of torch.optim and its
            arguments.
        lora: arguments of `peft.LoraConfig`, such as {"r": 16}: only adapters are trained, and saved in checkpoints.
        recompute: activations of a layer that are recomputed in the backward instead of saved: "nothing", "all but
            attention" or "everything".
        activation_offload: keeps the inputs of recomputed layers, and the results of attention that are not recomputed,
            in the memory of the host until the backward.
        mlp_chunk_tokens: number of tokens that a feed-forward computes at a time, and recomputes in the backward; by
            default all.
        loss_chunk: number of tokens whose logits the loss holds at a time.
        load_sharded: reads the weights of `name` when a Trainer starts, and with FSDP2 each rank reads only the parts
            that it holds.  Until then the model has no weights.
        attention: the implementation of attention, "ring"; others of transformers serve whole sequences alone.
        dtype: the dtype of the parameters of `name` and `config`; float32 by default.
        generated_tokens: number of tokens that `predict` adds to each sequence.
        temperature: divisor of the logits in `predict`; 0 takes the most likely token.
        top_k: `predict` samples from this many of the most likely tokens only.
    """

    sequence_dims: ClassVar[dict[str, int | None]] = {"position_ids": 1, "shift_labels": 1}

    def __init__(
        self,
        model: Any = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        overrides: dict[str, Any] | None = None,
        learning_rate: float = 1e-5,
        warmup_steps: int = 100,
        final_share: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        optimizer: Callable[[Iterable], Optimizer] | None = None,  # type: ignore[type-arg]  # what the command line reads
        lora: dict[str, Any] | None = None,
        recompute: Recompute = "nothing",
        activation_offload: bool = False,
        mlp_chunk_tokens: int | None = None,
        loss_chunk: int = CHUNK_TOKENS,
        load_sharded: bool = False,
        attention: str = ATTENTION,
        dtype: str | None = None,
        generated_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, final_share, weight_decay, betas, eps, optimizer)
        need_transformers()
        positive_integer("loss_chunk", loss_chunk)
        if mlp_chunk_tokens is not None:
            positive_integer("mlp_chunk_tokens", mlp_chunk_tokens)
        self.lora, self.loss_chunk, self.overrides = lora, loss_chunk, overrides
        self.savings: dict[str, Any] = {
            "recompute": recompute,
            "activation_offload": activation_offload,
            "mlp_chunk_tokens": mlp_chunk_tokens,
        }
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self.generated_tokens = generated_tokens
        self._files: WeightFiles | None = None
        if load_sharded:
            if name is None or lora is not None:
                raise ValueError("load_sharded is for the weights of a name, without lora: set load_sharded to False")
            self.model = empty_model(name, attention, dtype, overrides)
            self._files = WeightFiles(name, self.model)
        else:
            self.model = model_of(Source(model, name, config, overrides), attention, dtype)
        self._lineage = first_run()
        self.name = name or getattr(self.model, "name_or_path", None) or None
        self.used_cache = getattr(self.model.config, "use_cache", True)  # what an exported configuration says
        self.model.config.use_cache = False
        self.head = OutputHead.of(self.model)
        if mlp_chunk_tokens is not None:
            chunk_feed_forwards(self.model, mlp_chunk_tokens)
        if lora is not None:
            add_adapters(self.model, lora)
            self._base = base_digest(self.model)
        recompute_layers(self.model, recompute, activation_offload)
        self.model.train()  # from_pretrained returns it in evaluation mode, without dropout
        self._save_arguments(attention, dtype)

    def _save_arguments(self, attention: str, dtype: str | None) -> None:
        """Save the arguments from which the module can be made again as hyperparameters, in plain values.

        A model that was given as an object is saved as its configuration.
        """
        source: dict[str, Any] = {"config": self.model.config.to_dict()}
        if self.lora is not None:  # whose checkpoints hold no other weights
            source = {"name": self.name, "overrides": self.overrides}
        self.save_hyperparameters(
            {
                **source,
                **self.optimization,
                "lora": self.lora,
                **self.savings,
                "loss_chunk": self.loss_chunk,
                "attention": attention,
                "dtype": dtype,
                "generated_tokens": self.generated_tokens,
                **self.sampling,
            }
        )

    # The batch

    def read_batch(self, batch: Any) -> Any:
        """Return a batch with this package's names in place of those of transformers; each step calls it.

        A ValueError is raised if `batch_fault` finds something wrong.  If sequences are split, the strategy has called
        that before, so that all ranks raise the error together.
        """
        if not sequence_context(self).is_split and (fault := self.batch_fault(batch)):
            raise ValueError(fault)
        return named_as_ours(batch)

    def batch_fault(self, batch: Any) -> str:
        """Return the error message for a batch that would silently train or predict something wrong; else "".

        The strategy calls it for each batch that a loop is given, if ranks share sequences, and `read_batch` otherwise.
        It is about labels that are not shifted, say, or in prediction about padding that the model cannot leave out.
        """
        if self._trainer is None or not self._trainer.predicting:
            return fault_of_batch(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        is_padded = mask is not None and not bool(mask.all())
        return fault_of_prompts(batch) or (padding_refusal(self.model) if is_padded else "")

    def check_vocabulary(self, data: Any) -> None:
        """Raise a ValueError if a data module has another tokenizer or more tokens than the model; `setup` calls it."""
        check_vocabulary(self.model, self.name, data)

    def setup(self, stage: str) -> None:
        """Check the vocabulary of the data module, and that sequences of the model can be split if ranks share them."""
        super().setup(stage)
        strategy = getattr(self.trainer.strategy, "sequence_context", None)
        if isinstance(strategy, SequenceContext) and strategy.sequence_parallel_size > 1:
            check_splits(self.model)

    # The model

    def configure_model(self) -> None:
        """Read the weights for `load_sharded`, unless FSDP2's strategy reads them after it has sharded the model.

        Lightning calls it after `setup`.
        """
        if self._files is None:  # Lightning calls this without a Trainer, too
            return
        if self._trainer is None or not getattr(self.trainer.strategy, "shards_before_loading", False):
            self._load_sharded_weights(torch.device("cpu"))

    def _load_sharded_weights(self, device: torch.device) -> None:
        """Read the weights for `load_sharded` once, or this rank's shards of them; all ranks call it together.

        FSDP2's strategy calls it when it has sharded the module.

        Args:
            device: the device of the parameters.
        """
        if self._files is not None:
            self._files.load(device)
            self._files = None

    def hidden_states(self, input_ids: Tensor, **options: Tensor) -> Tensor:
        """Return the last hidden states of this rank's tokens, (B, L, width), which the output head takes.

        Args:
            input_ids: (B, L).
            options: `positions`, `documents` and `attention_mask` of the batch, where it has them; see the class.
        """
        positions, documents = options.get("positions"), options.get("documents")
        if positions is None:
            positions = places_of(input_ids, documents, sequence_context(self))
        positions = positions.expand(input_ids.shape)
        arguments: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        if self.model.config._attn_implementation != ATTENTION:  # no token sees the padding after it
            if fault := fault_of_documents(self.model, documents, positions):
                raise ValueError(fault)
        elif "attention_mask" in options:
            arguments["attention_mask"] = options["attention_mask"]
        with whole_documents(self, documents):
            hidden: Tensor = body_of(self.model)(input_ids=input_ids, **arguments).last_hidden_state
        return hidden

    def forward(self, input_ids: Tensor, **options: Tensor) -> Tensor:
        """Return the logits (B, L, vocabulary) of this rank's tokens; see `hidden_states` for the arguments."""
        return self.head.logits(self.model.get_output_embeddings(), self.hidden_states(input_ids, **options))

    def token_loss(self, input_ids: Tensor, labels: Tensor, **options: Tensor) -> TokenLoss:
        """Return (sum of the losses, number) of this rank's tokens with a label, without holding the logits of all.

        Args:
            input_ids: (B, L).
            labels: (B, L), the token that each token is to predict, or -100.
            options: those of `hidden_states`.
        """
        hidden = self.hidden_states(input_ids, **options)
        return self.head.loss(self.model.get_output_embeddings(), hidden, labels, self.loss_chunk)

    # Generation

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the sequences of the batch continued by `generated_tokens` tokens, whole on every rank.

        The batch holds `input_ids` (B, N), and `attention_mask` where rows have padding, on either side.  A row is one
        text: `documents` and `positions` that say otherwise are refused.
        """
        if fault := fault_of_packing(batch):
            raise ValueError(fault)
        whole, mask = whole_prompts(batch, sequence_context(self))
        return self.generate(whole, self.generated_tokens, attention_mask=mask, **self.sampling)

    def generate(
        self,
        input_ids: Tensor,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return input_ids (B, N) continued by `tokens` tokens, by transformers' own `generate`, on whole sequences.

        Every rank computes the same; where parameters are sharded, all ranks call this together.

        Args:
            input_ids: (B, N), the same on all ranks that share sequences.
            tokens: number of tokens to add.
            temperature: divisor of the logits; 0 takes the most likely token.
            top_k: samples from this many of the most likely tokens only.
            seed: seed of the sampling.
            attention_mask: (B, N), 0 where a row has padding, on either side; the new tokens follow the N columns.
                The most likely tokens are those of each row alone.
        """
        with sequence_context(self).whole():
            return generated(
                self.model,
                input_ids,
                tokens,
                attention_mask=attention_mask,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                use_cache=self.used_cache,
            )
