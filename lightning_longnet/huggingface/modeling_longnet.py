"""A LongNet for transformers.  It needs the package lightning-longnet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_longnet.models.longnet import LongNet, LongNetConfig

from .configuration_longnet import LongNetPretrainedConfig  # from its own folder, wherever that is

if TYPE_CHECKING:
    from torch import Tensor, nn


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token.  Nothing is kept between the steps of `generate`: each begins anew."""

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
        """A LongNet begins by itself."""

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.embedding
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.head
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """As any causal model of transformers: `labels` are the `input_ids`, and are shifted here."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # generate always hands one in, and kernels are fewer with it
        logits = self.model(input_ids, attention_mask=attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
