"""Reading of checkpoints that a Trainer saved with any strategy, without a Trainer and on the CPU."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.checkpointing.newest import check_saved
from lightning_longnet.checkpointing.restricted import check_folder, deepspeed_classes, read_file, restricted
from lightning_longnet.trust import confined

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_longnet.models.longnet import LongNet
    from lightning_longnet.models.longvit import LongViT

_STATE = "state_dict."  # prefix of the names of the weights in folders of FSDP2
OTHERS = "meta.pt"  # the file in which Lightning saves everything else: hyper-parameters, loops
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # the files of an exported folder
_DEEPSPEED_TAG = "checkpoint"  # the folder inside the checkpoint that Lightning lets DeepSpeed write to


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        state_dict: the weights, by their names in the LightningModule.
        hyper_parameters: the arguments that the LightningModule saved with `save_hyperparameters`.
    """

    state_dict: dict[str, Tensor]
    hyper_parameters: dict[str, Any]


def read_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Return the weights and hyper-parameters of a checkpoint, on the CPU.

    No code in files and folders runs: a ValueError is raised for other objects than tensors, plain values and the few
    classes that FSDP2 and DeepSpeed write.

    Args:
        path: a file of DDP, a folder of FSDP2 or DeepSpeed, or a folder that `export_model` wrote.  A folder of
            DeepSpeed needs the package deepspeed, and gives the float32 weights of its optimiser.
        trust: reads all objects, and runs the code that they hold.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"path must be a checkpoint, got {path}, which does not exist")
    check_saved(path)
    if path.is_file():
        return _checkpoint_of(path, read_file(path, trust=trust))
    if (path / CONFIG).is_file():
        return _read_exported(path)
    if (path / ".metadata").is_file():
        return _read_distributed(path, trust)
    if any((path / _DEEPSPEED_TAG).glob("*model_states.pt")):
        return _read_deepspeed(path, trust)
    # the folder of a run, as the loggers of Lightning make it
    inside = sorted(path.glob("**/checkpoints/*.ckpt"), key=lambda each: each.stat().st_mtime)
    question = f"; did you mean {inside[-1]}?" if inside else ""
    raise ValueError(
        f"path must be a checkpoint: a file, or a folder as FSDP2 or DeepSpeed write them, got {path}, a folder "
        f"without .metadata and without {_DEEPSPEED_TAG}/*model_states.pt{question}"
    )


def is_decoder(hyper_parameters: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint with these hyper-parameters is of a `CausalLMModule`, a model of transformers."""
    config = hyper_parameters.get("config")
    if config is None:
        return "lora" in hyper_parameters  # adapters, whose checkpoint names the model that they are for
    return isinstance(config, dict) and "model_type" in config


def write_checkpoint(model: LongNet | LongViT, path: str | Path) -> None:
    """Write the file that a Trainer would save for a LightningModule whose attribute `model` is this model.

    `read_checkpoint` and `load_from_checkpoint` of the LightningModule read it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "state_dict": {f"model.{name}": x for name, x in model.state_dict().items()},
        "hyper_parameters": {"config": model.config.to_dict()},
        "pytorch-lightning_version": version("lightning"),
    }
    torch.save(saved, path)


def _checkpoint_of(path: Path, content: Any) -> Checkpoint:
    """Check the dictionary that was read from `path`, and return its weights and hyper-parameters."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        shown = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"path must be a checkpoint of a Trainer, which holds a state_dict, got {path}: {shown}")
    # copies, because memory-mapped tensors would change with the file
    weights = {name: x.clone() for name, x in content["state_dict"].items() if isinstance(x, Tensor)}
    return Checkpoint(weights, dict(content.get("hyper_parameters", {})))


def _read_distributed(path: Path, trust: bool) -> Checkpoint:
    """Return the content of a folder of torch.distributed.checkpoint, which FSDP2 writes."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from lightning_longnet.checkpointing.reader import Reader

    reader = Reader(path, trust)
    shards = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(shard.size, dtype=shard.properties.dtype)
        for name, shard in shards.items()
        if name.startswith(_STATE) and isinstance(shard, TensorStorageMetadata)
    }
    if not weights:
        raise ValueError(f"path must be a checkpoint of a Trainer, which holds a state_dict, got {path}")
    with warnings.catch_warnings(), restricted(trust=trust):
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(weights, storage_reader=reader, no_dist=True)
    others = path / OTHERS
    content = read_file(confined("path", others, path, trust), trust=trust) if others.is_file() else {}
    state = {name.removeprefix(_STATE): x for name, x in weights.items()}
    return _checkpoint_of(path, {**content, "state_dict": state})


def _read_deepspeed(path: Path, trust: bool) -> Checkpoint:
    """Return the content of a folder of DeepSpeed: float32 weights merged from shards, the rest from the first rank."""
    if find_spec("deepspeed") is None:
        raise ValueError(f"path {path} was written by DeepSpeed, which is not installed: lightning-longnet[deepspeed]")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    classes = tuple(deepspeed_classes())
    check_folder(path, trust)
    with restricted(*classes, trust=trust), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # DeepSpeed prints its shards
        state = get_fp32_state_dict_from_zero_checkpoint(str(path), _DEEPSPEED_TAG)
    first = min((path / _DEEPSPEED_TAG).glob("*mp_rank_00_model_states.pt"))
    others = read_file(first, classes, trust)
    return _checkpoint_of(path, {**others, "state_dict": state})


def _read_exported(folder: Path) -> Checkpoint:
    """Return the content of a folder that `export_model` wrote."""
    need_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"path must be an exported folder, got {folder}, whose {CONFIG} is no JSON: {error}") from None
    contents = values if isinstance(values, dict) else {}
    config = next((contents[name] for name in ("longnet", "longvit") if isinstance(contents.get(name), dict)), None)
    if config is None:
        hint = "; it is a folder of transformers: load it with AutoModelForCausalLM" if "model_type" in contents else ""
        raise ValueError(
            f"path must be an exported folder, got {folder}, whose {CONFIG} has no longnet or longvit{hint}"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"path must be an exported folder, got {folder}, which has no {WEIGHTS}")
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"path must be an exported folder, got {folder}: {WEIGHTS}: {error}") from None
    if config.get("tied_embeddings") and "model.embedding.weight" in weights:
        weights["model.head.weight"] = weights["model.embedding.weight"]  # safetensors hold it once
    return Checkpoint(weights, {"config": config})


def need_safetensors() -> None:
    """Raise a ValueError if the package safetensors is not installed; functions that import it call this first."""
    if find_spec("safetensors") is None:
        raise ValueError("safetensors is not installed: lightning-longnet[hf]")
