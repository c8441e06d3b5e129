"""A LongNet for transformers.  This file needs the package lightning-longnet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_longnet.huggingface.cache_longnet import LongNetCache
from lightning_longnet.layers.positions import checked_positions
from lightning_longnet.models.generation import caches
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
_OTHER_CACHE = "past_key_values must be a LongNetCache, or None: a LongNet attends to other keys than other caches keep"


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LongNet.  `generate` goes on from a `LongNetCache`, whose size does not depend on the text's length.

    With `use_cache=False`, in training, and with a custom attention or an ordering along a curve, each step of
    `generate` computes the whole sequence again.
    """

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
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the logits (B, N, vocabulary), with labels the loss, and on request the hidden states.

        The logits of a token are those of its row without padding, or of its document alone; those of padding are 0.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 where padding is, on any side of the tokens.
            position_ids: (B, N), the index of each token in its row or in its document, which begins at each 0; padding
                is not counted.
            past_key_values: a LongNetCache with the tokens before these.  attention_mask may have their columns, too;
                its padding is on the left.  position_ids must follow them.
            inputs_embeds: (B, N, dim) instead of input_ids: what `get_input_embeddings()` returns for them.
            labels: (B, N), usually the `input_ids`, or -100: as in other causal models of transformers, they are
                shifted here.  What padding would have to predict is not counted.
            use_cache: changes nothing here; `generate` makes a cache or none.
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
        if labels is not None and past_key_values is not None:
            raise ValueError("labels must be None with past_key_values: compute the loss of the whole rows")
        if labels is not None and not keeps_all:
            raise ValueError("logits_to_keep must be 0 with labels: the loss needs the logits of all tokens")

        x = self.model.scale_embeddings(self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        if past_key_values is not None:
            output = self._forward_cached(
                x, past_key_values, (attention_mask, position_ids), output_hidden_states, logits_to_keep
            )
            return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
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
        whole = CausalLMOutput(loss=loss, logits=logits, hidden_states=hidden_states)
        return whole if (self.config.return_dict if return_dict is None else return_dict) else whole.to_tuple()

    def _forward_cached(
        self,
        x: Tensor,
        past: LongNetCache,
        given: tuple[Tensor | None, Tensor | None],
        output_hidden_states: bool,
        logits_to_keep: int | Tensor,
    ) -> CausalLMOutputWithPast:
        """Return the output for tokens x (B, n, dim) that follow those of a cache.

        `given` are attention_mask and position_ids.
        """
        mask, position_ids = (None if each is None else each[:, -x.shape[1] :] for each in given)
        if mask is not None and not (mask[:, -1] != 0).all():
            raise ValueError("attention_mask must end with tokens with past_key_values: padding is on the left")
        rows = past.rows_of(self.model, len(x))
        if position_ids is not None:
            _check_positions(position_ids, mask, x, rows.positions)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model.encode(x, attention_mask=mask, states=states, cache=rows)
        past.columns += x.shape[1]
        if mask is not None and not bool((mask != 0).all()):
            past.padded_columns = past.columns
        if states is not None and getattr(self.config, "tie_last_hidden_states", None) is not False:
            states[-1] = hidden  # after the last norm, as transformers has it
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.model.head(hidden),
            past_key_values=past,
            hidden_states=None if states is None else tuple(states),
        )

    def _refuse(self, past_key_values: Any, output_attentions: bool | None, others: dict[str, Any]) -> None:
        """Raise a ValueError for what is not supported."""
        if past_key_values is not None and not isinstance(past_key_values, LongNetCache):
            raise ValueError(f"{_OTHER_CACHE}, got a {type(past_key_values).__name__}")
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
        """Return False: caches of other models keep other keys."""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
    ) -> None:
        """Give `generate` a `LongNetCache`, where it uses one."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)  # type: ignore[misc]
        is_wanted = generation_config.use_cache is not False and not self.training and caches(self.model)
        takes_back = generation_mode == "assisted_generation"  # tokens that the assistant guessed wrong
        if is_wanted and not takes_back and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongNetCache(self.model.config.layers)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LongNetCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache_position: Tensor | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for a step: of the further tokens with a cache, otherwise of all.

        `cache_position` is of other models, and `tokenizer` of the texts that `generate` stops at.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if past_key_values is not None:
            if not isinstance(past_key_values, LongNetCache):
                raise ValueError(f"{_OTHER_CACHE}, got a {type(past_key_values).__name__}")
            inputs["past_key_values"] = past_key_values
            if past_key_values.columns:
                inputs["input_ids"] = (
                    input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
                )
                return inputs
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


def _check_positions(position_ids: Tensor, mask: Tensor | None, x: Tensor, before: tuple[int, ...]) -> None:
    """Refuse position_ids that do not count the tokens of each row from those before them."""
    given = checked_positions(position_ids.expand(x.shape[:2]), x, "position_ids")
    is_token = torch.ones_like(given) if mask is None else (mask != 0).long()
    positions = torch.tensor(before, device=given.device)[:, None] + is_token.cumsum(1) - 1
    if ((given != positions) & (is_token != 0)).any():
        raise ValueError(
            f"position_ids must count the tokens of each row from those before them, {list(before)}, with "
            f"past_key_values: a cache has one document in each row"
        )


def _of_tokens(options: dict[str, Any], rows: TokenRows) -> dict[str, Any]:
    """Return the options of the loss with labels that padding does not predict."""
    if rows.is_token is None:
        return options
    is_token = rows.restore(rows.is_token)
    predicted = {"labels": nn.functional.pad(is_token[:, :-1], (1, 0), value=True), "shift_labels": is_token}
    ignored = options.get("ignore_index", -100)
    masked = {name: options[name].masked_fill(~kept, ignored) for name, kept in predicted.items() if name in options}
    return {**options, **masked}
