"""The checkpoints of `CausalLMModule`: their content, checks before they are loaded, and exports for transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.checkpointing.comparison import message_of
from lightning_longnet.huggingface.adapters import adapter_state
from lightning_longnet.huggingface.lineage import Lineage, continued
from lightning_longnet.huggingface.saving import check_folder, save_weights
from lightning_longnet.sequence.agreement import fault_of, fault_of_rank_zero
from lightning_longnet.training.token_module import TokenModule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The values of a configuration that a checkpoint must agree on.  With some of them different the weights would still
# fit in shape, but the model would compute something else
_OF_THE_WEIGHTS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_parameters"),
    *("layer_types", "sliding_window", "tie_word_embeddings", "num_experts", "num_local_experts"),
)
_RUN = "export_run"  # the entry of a checkpoint that names the run, which may replace its own exports
_ADAPTED = "lora_base"  # the entry of a checkpoint that names the frozen weights, which it does not hold


class CausalLMCheckpoints(TokenModule):
    """The base of `CausalLMModule`, with the methods that save, load and export a model of transformers.

    Attributes:
        model: the model.
        lora: arguments of `peft.LoraConfig` where only adapters are trained, else None.
        used_cache: the `use_cache` of an exported configuration.
    """

    model: Any
    lora: dict[str, Any] | None
    used_cache: bool
    _lineage: Lineage
    _base: str

    @property
    def excludes_frozen_parameters(self) -> bool:
        """Whether checkpoints hold only the trained parameters; DeepSpeed's strategy reads it at set-up."""
        return self.lora is not None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights; with LoRA those of the adapters alone, so that checkpoints are small."""
        state = super().state_dict(*args, **kwargs)
        if self.lora is None:
            return state
        prefix = kwargs.get("prefix", "")
        trained = {f"{prefix}{name}" for name, parameter in self.named_parameters() if parameter.requires_grad}
        return adapter_state(state, trained)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights; with LoRA those of the adapters, which must all be there if `strict`."""
        if self.lora is None:
            return super().load_state_dict(state_dict, strict, assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if strict and set(state_dict) != trained:
            name = min(trained ^ set(state_dict))
            raise ValueError(f"the checkpoint must hold the adapters of lora {self.lora}, and these differ in {name}")
        return super().load_state_dict(state_dict, False, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the name of the run, and with LoRA a hash of the frozen weights; Lightning calls it at each save."""
        checkpoint[_RUN] = [*self._lineage]
        if self.lora is not None:
            checkpoint[_ADAPTED] = self._base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise a ValueError for a checkpoint of another model, or of adapters for other weights.

        Lightning calls it before it loads the weights.  `fit` also takes the name of the run from the checkpoint, so
        that it may replace the run's exports.
        """
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._lineage = continued(checkpoint.get(_RUN, self._lineage))
        saved = checkpoint.get("hyper_parameters", {})
        if (saved.get("lora") is None) != (self.lora is None):
            raise ValueError(f"the checkpoint's model has lora {saved.get('lora')}, and this one {self.lora}")
        base = checkpoint.get(_ADAPTED)
        if self.lora is not None and base is not None and base != self._base:
            raise ValueError("the checkpoint's adapters were trained with other weights than those of this model")
        known, own = saved.get("config"), self.model.config.to_dict()
        if known is None:
            return
        for name in _OF_THE_WEIGHTS:
            if name in known and known[name] != own.get(name):
                difference = f"the checkpoint's model has {name} {known[name]}, and this one has {own.get(name)}"
                path = getattr(self._trainer, "ckpt_path", None)
                raise ValueError(difference if path is None else message_of(path, difference))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder that transformers reads without this package, adapters merged.

        All ranks call it together, in a callback such as `on_train_end`, or after a run; the first one writes.  The
        folder must be new or empty, or written by this run, also before it was resumed: it is then replaced at once,
        and what others have added to it or changed in its `generation_config.json` is kept.  Runs that went on from one
        checkpoint do not replace each other's folders.
        """
        trainer = self._trainer
        whole = getattr(getattr(trainer, "strategy", None), "_whole_parameter", None) or torch.Tensor.detach
        run = None if trainer is None else self._lineage
        if trainer is None:
            check_folder(folder)
        elif fault := fault_of_rank_zero(trainer.strategy, lambda: fault_of(lambda: check_folder(folder, run))):
            raise ValueError(fault)
        is_first = trainer is None or trainer.is_global_zero
        weights = {}
        for name, parameter in self.model.named_parameters():
            value = whole(parameter).detach()
            if is_first:
                weights[name] = value.to("cpu", copy=True)
        persistent = self.model.state_dict().keys() - weights.keys()
        weights |= {name: x.detach().cpu() for name, x in self.model.named_buffers() if name in persistent}
        if is_first:
            self.model.config.use_cache = self.used_cache
            try:
                generation = getattr(self.model, "generation_config", None)
                save_weights(folder, self.model.config, weights, self.lora, generation, run)
            finally:
                self.model.config.use_cache = False
        if trainer is not None:
            trainer.strategy.barrier()
