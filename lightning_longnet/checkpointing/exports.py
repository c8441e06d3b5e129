"""Export of models to folders of safetensors and JSON, which this package and optionally transformers read."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_longnet.checkpointing.checkpoints import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    is_decoder,
    need_safetensors,
    read_checkpoint,
)
from lightning_longnet.inference.cache import refusal
from lightning_longnet.models.longnet import LongNet, LongNetConfig
from lightning_longnet.models.longvit import LongViT, LongViTConfig
from lightning_longnet.trust import check_class

if TYPE_CHECKING:
    from lightning_longnet.data.tokenizers import Tokenizer

Format = Literal["safetensors", "huggingface"]

_PREFIX = "model."  # prefix of the names of weights in a LightningModule and in the model of transformers
_GENERATION = "generation_config.json"
_CODE = ("configuration_longnet.py", "modeling_longnet.py")
_HEAD, _EMBEDDING = "head.weight", "embedding.weight"
_FOR_TRANSFORMERS = {
    "architectures": ["LongNetForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_longnet.LongNetPretrainedConfig",
        "AutoModelForCausalLM": "modeling_longnet.LongNetForCausalLM",
    },
}


def export_model(
    model: LongNet | LongViT,
    folder: str | Path,
    format: Format = "safetensors",
    *,
    tokenizer: Tokenizer | None = None,
    trained_length: int | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` to a folder.

    Args:
        model: the model, on any device and of any dtype.
        folder: a folder that is empty or does not exist.
        format: "safetensors", or "huggingface", which adds `generation_config.json` and the code with which
            `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` reads the folder.  That format is for
            causal LongNets, and reading needs lightning-longnet installed.
        tokenizer: the tokenizer of the model, as `tokenizer_of` returns it, which is written for
            `AutoTokenizer.from_pretrained(folder)`; of format "huggingface" only.
        trained_length: number of tokens of a row in training, which transformers reads as `max_position_embeddings`
            where no learned positions limit the length; of format "huggingface" only.
    """
    folder = Path(folder)
    _check_export(model, folder, format, tokenizer)
    need_safetensors()
    from safetensors.torch import save_file

    weights = {f"{_PREFIX}{name}": x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if isinstance(model, LongNet) and model.config.tied_embeddings:
        del weights[_PREFIX + _HEAD]  # safetensors refuses tensors that share memory
    name = "longnet" if isinstance(model, LongNet) else "longvit"
    values: dict[str, Any] = {"model_type": name, name: model.config.to_dict()}
    if format == "huggingface":
        assert isinstance(model, LongNet)
        values |= _FOR_TRANSFORMERS | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
        if (length := model.config.learned_positions or trained_length) is not None:
            values["max_position_embeddings"] = length
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, values)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets no other user read its file
    if format == "huggingface":
        for file in _CODE:
            shutil.copyfile(Path(__file__).parents[1] / "huggingface" / file, folder / file)
        special = {} if tokenizer is None else tokenizer.special_tokens()
        _write_json(folder / _GENERATION, {**special, "use_cache": refusal(model.config) is None})
        if tokenizer is not None:
            tokenizer.save(folder)


def _check_export(model: LongNet | LongViT, folder: Path, format: Format, tokenizer: Tokenizer | None) -> None:
    """Raise a ValueError for what cannot be exported, before anything is written; see `export_model`."""
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(map(repr, get_args(Format)))}, got {format!r}")
    if format == "huggingface" and not (isinstance(model, LongNet) and model.config.is_causal):
        kind = "a LongViT" if isinstance(model, LongViT) else "a LongNet whose pattern is not causal"
        raise ValueError(
            f"format 'huggingface' is of models that predict the next token, got {kind}: take 'safetensors'"
        )
    if tokenizer is not None:
        if format != "huggingface":
            raise ValueError(f"tokenizer must be None with format {format!r}: take 'huggingface'")
        assert isinstance(model, LongNet)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer must be the model's: {tokenizer.name!r} has {tokenizer.vocab_size:,} tokens, and the model "
                f"{model.config.vocab_size:,}"
            )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values to a file as JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def load_model(path: str | Path, *, trust: bool = False) -> LongNet | LongViT:
    """Return the model of an exported folder or of a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: as of `read_checkpoint`.
        trust: runs the code that the checkpoint holds, and imports the classes that it names.
    """
    return model_of(read_checkpoint(path, trust=trust), trust)


def model_of(checkpoint: Checkpoint, trust: bool = False) -> LongNet | LongViT:
    """Return the model of a checkpoint, in evaluation mode: the attribute `model` of its LightningModule.

    The parameters are the tensors of the checkpoint, not copies.  With `trust` it may be of any class.
    """
    if is_decoder(checkpoint.hyper_parameters):
        raise ValueError(
            "the checkpoint is of a CausalLMModule, which only `export` and `needle` read: longnet export CHECKPOINT "
            "FOLDER --format huggingface, then AutoModelForCausalLM.from_pretrained(FOLDER).generate"
        )
    config = config_of(checkpoint.hyper_parameters, trust)
    weights = {name.removeprefix(_PREFIX): x for name, x in checkpoint.state_dict.items() if name.startswith(_PREFIX)}
    is_tied = isinstance(config, LongNetConfig) and config.tied_embeddings
    if is_tied and _EMBEDDING in weights:
        weights[_HEAD] = weights[_EMBEDDING]
    # the meta device allocates nothing for weights that are replaced below; a custom attention class may hold tensors
    # that are not in the state dict, and needs the CPU
    is_ours = config.attention is None
    with torch.device("meta" if is_ours else "cpu"), _WithoutValues() if is_ours else nullcontext():
        model = LongNet(config) if isinstance(config, LongNetConfig) else LongViT(config)
    _check_weights(model, weights)
    model.load_state_dict(weights, assign=True)
    if is_tied:
        assert isinstance(model, LongNet)
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


class _WithoutValues(TorchFunctionMode):
    """A mode of torch in which initialisation leaves parameters as they are.

    On the meta device torch would import its compiler for it.
    """

    _FILLS = (nn.init.normal_, Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def config_of(hyper_parameters: dict[str, Any], trust: bool = False) -> LongNetConfig | LongViTConfig:
    """Return the configuration in the hyper-parameters of a LightningModule, which hold it or its `to_dict`.

    A class of attention that it names must be one that `check_class` allows, unless the checkpoint is trusted.
    """
    value = hyper_parameters.get("config")
    attention = value.get("attention") if isinstance(value, dict) else getattr(value, "attention", None)
    if isinstance(attention, dict):
        check_class("a checkpoint's config.attention", attention.get("class_path"), trust)
    if isinstance(value, (LongNetConfig, LongViTConfig)):
        return value
    if not isinstance(value, dict) or "pattern" not in value:
        held = ", ".join(map(str, hyper_parameters)) or "nothing"
        raise ValueError(
            f"hyper_parameters must hold the config of a LongNet or a LongViT, got {held}: only checkpoints of "
            f"LongNetModule, LongViTModule and their subclasses are read without their class. For another "
            f"LightningModule: saved = lightning_longnet.read_checkpoint(path); module = "
            f"MyModule(**saved.hyper_parameters); module.load_state_dict(saved.state_dict). export_model takes a "
            f"LongNet that it holds"
        )
    kind = LongViTConfig if "patch_size" in value else LongNetConfig
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"config must hold what {kind.__name__} has, got another: {error}") from None


def _check_weights(model: LongNet | LongViT, weights: dict[str, Tensor]) -> None:
    """Raise a ValueError if the names or shapes of weights are not those of the model."""
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
