"""A LongNet for transformers.  This file needs the package lightning-longnet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_longnet.models.longnet import LongNet, LongNetConfig

from .configuration_longnet import LongNetPretrainedConfig  # relative: this file is copied into exported folders

if TYPE_CHECKING:
    from torch import Tensor, nn


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LongNet.  It has no key cache: each step of `generate` computes the whole sequence again."""

    config_class = LongNetPretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012  as transformers has it

    def __init__(self, config: LongNetPretrainedConfig) -> None:
        super().__init__(config)
        if config.longnet is None:
            raise ValueError("longnet must be the values of a LongNetConfig, got None")
        self.model = LongNet(LongNetConfig(**config.longnet))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: LongNet initialises its weights itself."""

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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return the logits (B, N, vocabulary), and with labels the loss.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 where a token is padding.
            labels: (B, N), usually the `input_ids`: as in other causal models of transformers, they are shifted here.
            kwargs: ignored.
        """
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # generate always passes a mask, and fewer kernels take one
        logits = self.model(input_ids, attention_mask=attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
