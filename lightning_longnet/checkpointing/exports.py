"""Export of models to folders of safetensors and JSON, which this package and optionally transformers read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_longnet.checkpointing.checkpoints import CONFIG, WEIGHTS, Checkpoint, need_safetensors, read_checkpoint
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.models.longvit import LongViT, LongViTConfig

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["safetensors", "huggingface"]

_PREFIX = "model."  # prefix of the names of weights in a LightningModule and in the model of transformers
_CODE = ("configuration_longnet.py", "modeling_longnet.py")
_HEAD, _EMBEDDING = "head.weight", "embedding.weight"
_FOR_TRANSFORMERS = {
    "architectures": ["LongNetForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_longnet.LongNetPretrainedConfig",
        "AutoModelForCausalLM": "modeling_longnet.LongNetForCausalLM",
    },
}


def export_model(model: LongNet | LongViT, folder: str | Path, format: Format = "safetensors") -> None:
    """Write `config.json` and `model.safetensors` to a folder.

    Args:
        model: the model, on any device and of any dtype.
        folder: a folder that is empty or does not exist.
        format: "safetensors", or "huggingface", which adds the code with which
            `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` reads the folder.  That format is for
            causal LongNets, and reading needs lightning-longnet installed.
    """
    folder = Path(folder)
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(map(repr, get_args(Format)))}, got {format!r}")
    if format == "huggingface" and not (isinstance(model, LongNet) and model.config.is_causal):
        kind = "a LongViT" if isinstance(model, LongViT) else "a LongNet whose pattern is not causal"
        raise ValueError(
            f"format 'huggingface' is of models that predict the next token, got {kind}: take 'safetensors'"
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}")
    need_safetensors()
    from safetensors.torch import save_file

    weights = {f"{_PREFIX}{name}": x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if isinstance(model, LongNet) and model.config.tied_embeddings:
        del weights[_PREFIX + _HEAD]  # safetensors refuses tensors that share memory
    name = "longnet" if isinstance(model, LongNet) else "longvit"
    values: dict[str, Any] = {"model_type": name, name: model.config.to_dict()}
    if format == "huggingface":
        values |= _FOR_TRANSFORMERS | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    if format == "huggingface":
        for file in _CODE:
            shutil.copyfile(Path(__file__).parents[1] / "huggingface" / file, folder / file)


def load_model(path: str | Path) -> LongNet | LongViT:
    """Return the model of an exported folder or of a checkpoint, on the CPU and in evaluation mode."""
    return model_of(read_checkpoint(path))


def model_of(checkpoint: Checkpoint) -> LongNet | LongViT:
    """Return the model of a checkpoint, in evaluation mode: the attribute `model` of its LightningModule.

    The parameters are the tensors of the checkpoint, not copies.
    """
    config = config_of(checkpoint.hyper_parameters)
    weights = {name.removeprefix(_PREFIX): x for name, x in checkpoint.state_dict.items() if name.startswith(_PREFIX)}
    is_tied = isinstance(config, LongNetConfig) and config.tied_embeddings
    if is_tied and _EMBEDDING in weights:
        weights[_HEAD] = weights[_EMBEDDING]
    # the meta device allocates nothing for weights that are replaced below; a custom attention class may hold tensors
    # that are not in the state dict, and needs the CPU
    with torch.device("meta" if config.attention is None else "cpu"):
        model = LongNet(config) if isinstance(config, LongNetConfig) else LongViT(config)
    _check_weights(model, weights)
    model.load_state_dict(weights, assign=True)
    if is_tied:
        assert isinstance(model, LongNet)
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def config_of(hyper_parameters: dict[str, Any]) -> LongNetConfig | LongViTConfig:
    """Return the configuration in the hyper-parameters of a LightningModule, which hold it or its `to_dict`."""
    value = hyper_parameters.get("config")
    if isinstance(value, (LongNetConfig, LongViTConfig)):
        return value
    if not isinstance(value, dict) or "pattern" not in value:
        held = ", ".join(map(str, hyper_parameters)) or "nothing"
        raise ValueError(f"hyper_parameters must hold the config of a LongNet or a LongViT, got {held}")
    kind = LongViTConfig if "patch_size" in value else LongNetConfig
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"config must hold what {kind.__name__} has, got another: {error}") from None


def _check_weights(model: LongNet | LongViT, weights: dict[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of the model."""
    expected = model.state_dict()
    if isinstance(model, LongNet) and _EMBEDDING in weights and len(weights[_EMBEDDING]) != model.config.vocab_size:
        raise ValueError(
            f"vocab_size must be that of the weights, {len(weights[_EMBEDDING])}, got {model.config.vocab_size}"
        )
    for name, x in expected.items():
        if name not in weights:
            raise ValueError(f"weights must hold {name}, which is missing")
        if weights[name].shape != x.shape:
            raise ValueError(
                f"weights must fit the config: {name} is {tuple(x.shape)} by that, got {tuple(weights[name].shape)}"
            )
    if rest := [name for name in weights if name not in expected]:
        raise ValueError(f"weights must hold what the config has, got {rest[0]}, which it has not")
