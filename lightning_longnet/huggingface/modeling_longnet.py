"""A LongNet for transformers.  This file needs the package lightning-longnet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_longnet.models.longnet import LongNet
from lightning_longnet.models.padding import token_rows

from .configuration_longnet import LongNetPretrainedConfig  # relative: this file is copied into exported folders

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.models.padding import TokenRows

# Trainer's label smoothing shifts the labels of the models that are named here, and pipelines take them
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("longnet", "LongNetForCausalLM")

_OF_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_NO_CACHE = "past_key_values must be None: a LongNet has no key cache, and computes the whole sequence in each step"


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LongNet.  It has no key cache: each step of `generate` computes the whole sequence again."""

    config_class = LongNetPretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["LongNetBlock"]  # noqa: RUF012  as transformers has it
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _is_made = False

    def __init__(self, config: LongNetPretrainedConfig) -> None:
        super().__init__(config)
        self.model = LongNet(config.longnet_config())
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]
        self._is_made = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Return the logits (B, N, vocabulary), with labels the loss, and on request the hidden states.

        The logits of a token are those of its row without padding, or of its document alone; those of padding are 0.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 where padding is, on any side of the tokens.
            position_ids: (B, N), the index of each token in its row or in its document, which begins at each 0; padding
                is not counted.
            past_key_values: refused.
            inputs_embeds: (B, N, dim) instead of input_ids: what `get_input_embeddings()` returns for them.
            labels: (B, N), usually the `input_ids`, or -100: as in other causal models of transformers, they are
                shifted here.  What padding would have to predict is not counted.
            use_cache: changes nothing.
            logits_to_keep: number of tokens at the end of the rows whose logits are returned, or the indices of tokens;
                0 returns all.
            output_attentions: refused where True.
            output_hidden_states: returns also the input of each block and the input of the head.
            return_dict: returns a tuple where False; `config.return_dict` by default.
            kwargs: num_items_in_batch, shift_labels and ignore_index, for the loss; others are refused.
        """
        loss_options = {name: kwargs.pop(name) for name in _OF_THE_LOSS if name in kwargs}
        self._refuse(past_key_values, output_attentions, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds must be given, got both or neither")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or False
        if not isinstance(output_hidden_states, bool):
            raise ValueError(f"output_hidden_states must be True or False, got {output_hidden_states!r}")
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise ValueError("logits_to_keep must be 0 with labels: the loss needs the logits of all tokens")

        x = self.model.scale_embeddings(self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        config = self.model.config
        # a curve depends on the length of its document, and a custom layer may read what follows a token
        separates = config.attention is not None or config.layer_ordering != "raster"
        rows = token_rows(x, attention_mask, position_ids, separates_padding=separates)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model.encode(
            rows.arrange(x),
            positions=None if self.model.position_table is None else rows.positions(),
            documents=rows.documents,
            states=states,
        )
        if rows.is_token is not None:
            hidden = hidden.masked_fill(~rows.is_token[..., None], 0.0)  # padding saw tokens that stand after it
        if states is not None and getattr(self.config, "tie_last_hidden_states", None) is not False:
            states[-1] = hidden  # after the last norm, as transformers has it
        hidden = rows.restore(hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden if keeps_all else hidden[:, kept])
        loss = None
        if labels is not None:
            options = _of_tokens({"labels": labels, **loss_options}, rows)
            loss = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **options)
        hidden_states = None if states is None else tuple(map(rows.restore, states))
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _refuse(self, past_key_values: Any, output_attentions: bool | None, others: dict[str, Any]) -> None:
        """Raise a ValueError for what is not supported."""
        if past_key_values is not None:
            raise ValueError(_NO_CACHE)
        if output_attentions or (output_attentions is None and getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions must be False: the kernels compute no matrix of attention weights")
        context = self.model.sequence_context
        if context is not None and context.is_split:
            raise ValueError("sequences must be whole: train a LongNetModule to split them over ranks")
        for name, value in others.items():
            if value is not None:
                instead = ": give position_ids that restart at 0 in each document" if name in _PACKING else ""
                raise ValueError(f"{name} is no argument of a LongNet{instead}")

    # Generation

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False, so that `generate` makes no cache, whatever `use_cache` is."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache_position: Tensor | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for a step, which are those of the whole sequence.

        `next_sequence_length`, `is_first_iteration` and `cache_position` are of models with a cache; `tokenizer` is of
        the texts that `generate` stops at, and passed on by it.
        """
        if past_key_values is not None:
            raise ValueError(_NO_CACHE)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if inputs_embeds is not None:
            length = next((x.shape[-1] for x in (kwargs.get("position_ids"), attention_mask) if x is not None), None)
            if length is None or (is_first_iteration and length != inputs_embeds.shape[1]):
                raise ValueError(
                    f"inputs_embeds must embed all tokens of attention_mask, or else of input_ids, {length}, got "
                    f"{inputs_embeds.shape[1]}"
                )
            generated = input_ids[:, input_ids.shape[1] + inputs_embeds.shape[1] - length :]
            inputs["input_ids"] = None
            inputs["inputs_embeds"] = torch.cat([inputs_embeds, self.model.embedding(generated)], 1)
        return inputs

    # Embeddings

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.embedding
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embedding and the head; `vocab_size` follows in the configurations of both libraries."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = replace(self.model.config, vocab_size=embedding.num_embeddings)
        return embedding

    # Weights and activations

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint does not hold, and new tokens, as LongNet does; what was loaded stays.

        A LongNet that is made, and not loaded, initialises itself.
        """
        if not self._is_made:
            return
        name = next((name for name, each in self.named_modules() if each is module), None)
        if name is None:  # the rows of new tokens, on their own
            nn.init.normal_(module.weight, std=self.model.config.dim**-0.5)  # type: ignore[arg-type]
            return
        owner = self.get_submodule(name.rpartition(".")[0])
        if module is self.model or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            owner = module
        if not hasattr(owner, "reset_parameters"):
            return
        # layers fill parts of a weight, of which transformers does not know whether they were loaded
        loaded = [(x, x.clone()) for x in owner.parameters() if getattr(x, "_is_hf_initialized", False)]
        owner.reset_parameters()  # type: ignore[operator]
        for parameter, value in loaded:
            parameter.copy_(value)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Tensor] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Have every n-th block called by a function that recomputes it in the backward, or by none."""
        self.gradient_checkpointing = enable
        for number, block in enumerate(self.model.blocks):
            block.checkpointing = gradient_checkpointing_func if enable and number % every_n_layers == 0 else None


def _of_tokens(options: dict[str, Any], rows: TokenRows) -> dict[str, Any]:
    """Return the options of the loss with labels that padding does not predict."""
    if rows.is_token is None:
        return options
    is_token = rows.restore(rows.is_token)
    predicted = {"labels": nn.functional.pad(is_token[:, :-1], (1, 0), value=True), "shift_labels": is_token}
    ignored = options.get("ignore_index", -100)
    masked = {name: options[name].masked_fill(~kept, ignored) for name, kept in predicted.items() if name in options}
    return {**options, **masked}
