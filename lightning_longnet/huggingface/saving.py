"""Folders that `from_pretrained` of transformers reads, out of the whole weights of a trained model."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.huggingface.adapters import add_adapters, merge_adapters
from lightning_longnet.huggingface.dilation import check_dilated, has_dilated_layers
from lightning_longnet.huggingface.models import config_of, created, loaded
from lightning_longnet.registration import ATTENTION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from lightning_longnet.huggingface.lineage import Lineage

_RUN = ".longnet_run.json"  # names the run that wrote a folder, the files that it wrote, and sums of some
_GENERATION = "generation_config.json"  # which users edit


def save_weights(
    folder: str | Path,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Any] | None = None,
    generation: Any = None,
    run: Lineage | None = None,
) -> None:
    """Write a folder that transformers reads without this package: weights in safetensors, and the configuration.

    Args:
        folder: a folder that is empty or does not exist, or that the same run wrote, which is then replaced at once.
        config: the configuration of the model.
        weights: whole weights by their names in the model, those of adapters included.
        lora: the adapters, which are merged into the weights.
        generation: the `generation_config` of the model.
        run: the names of the run that trained the model, and of those that it goes on from, which may replace the
            folder later.
    """
    check_folder(folder, run)
    model = model_with(config, weights, lora)
    if generation is not None:
        model.generation_config = generation
    if run is None:
        model.save_pretrained(folder)
    else:
        _write_whole(Path(folder), run, model.save_pretrained)


def _write_whole(folder: Path, run: Lineage, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place with the name of the run, and put it there when it is whole.

    What others have added to a folder that is replaced, such as a tokenizer, is kept, and a generation_config.json
    that they have changed as well.
    """
    final = folder.resolve()
    if final.is_dir() and not any(final.iterdir()):  # it may be a mount, which cannot be replaced
        write(final)
        _name_run(final, run)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}-", suffix=".part", dir=final.parent))
    former = unfinished.with_suffix(".replaced")
    try:
        content = unfinished / final.name
        content.mkdir()
        write(content)
        _name_run(content, run)
        if not final.is_dir():
            content.rename(final)
            return
        former_run = _wrote(final)
        known = {_RUN, *former_run.get("files", ())}
        if _is_changed(final / _GENERATION, former_run.get("sums", {})):
            shutil.copy2(final / _GENERATION, content / _GENERATION)
        for path in final.iterdir():
            if path.name not in known and not (content / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, content / path.name)
        final.rename(former)
        content.rename(final)
    finally:
        if former.exists():
            if not final.exists():
                former.rename(final)
            else:
                shutil.rmtree(former)
        shutil.rmtree(unfinished)


def _name_run(folder: Path, run: Lineage) -> None:
    """Write a file with the name of the run that wrote a folder, the names of its files, and sums of those to edit."""
    written = sorted(path.name for path in folder.iterdir())
    sums = {_GENERATION: _sum(folder / _GENERATION)} if _GENERATION in written else {}
    (folder / _RUN).write_text(json.dumps({"run": run[-1], "files": written, "sums": sums}) + "\n")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_changed(path: Path, sums: Mapping[str, str]) -> bool:
    """Return whether a file that a run wrote is no longer what it wrote."""
    return path.is_file() and path.name in sums and _sum(path) != sums[path.name]


def _wrote(folder: Path) -> dict[str, Any]:
    """Return what the file of the run that wrote a folder says; an empty dictionary where there is none."""
    path = folder / _RUN
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def saved_decoder(state: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model of a checkpoint of `CausalLMModule`, with adapters merged into the weights that they are for."""
    weights = {name.removeprefix("model."): x for name, x in state.items()}
    lora, name = hyper_parameters.get("lora"), hyper_parameters.get("name")
    if lora is None:
        return model_with(config_of(hyper_parameters["config"]), weights)
    if name is None:
        raise ValueError(
            "the checkpoint holds adapters, and no name of their model: call save_pretrained of the module that has it"
        )
    base = loaded(name, "sdpa", hyper_parameters.get("dtype"), hyper_parameters.get("overrides"))
    config = base.config
    add_adapters(base, lora)
    whole = {key: x.detach() for key, x in base.named_parameters()} | weights
    return model_with(config, whole, lora)


def trained_decoder(
    state: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any], attention: str
) -> PreTrainedModel:
    """Return the same model ready to compute: `saved_decoder` has no values that are not in files, as of rotations.

    Args:
        state: the weights.
        hyper_parameters: the arguments of the module.
        attention: the implementation of attention.
    """
    saved = saved_decoder(state, hyper_parameters)
    check_dilated(saved.config, attention)
    model: PreTrainedModel = type(saved).from_pretrained(
        None, config=saved.config, state_dict=saved.state_dict(), attn_implementation=attention, dtype=saved.dtype
    )
    return model


def check_folder(folder: str | Path, run: Lineage | None = None) -> None:
    """Raise a ValueError where a folder holds something already that none of the runs of these names wrote."""
    path = Path(folder)
    if path.is_dir() and run is not None and _wrote(path).get("run") in run:
        return
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"folder must be new or empty{', or written by this run' if run else ''}, got {path}")


def model_with(
    config: PretrainedConfig, weights: Mapping[str, Tensor], lora: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Return a model of transformers with these weights, adapters merged.

    It has transformers' own attention, or "ring" where layers are dilated.
    """
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    if lora is not None:
        adapted = _empty(config, dtype)
        add_adapters(adapted, lora)
        _fill(adapted, weights)
        weights = merge_adapters(adapted)
    model = _empty(config, dtype)
    _fill(model, weights)
    model.config.use_cache = True
    model.eval()
    return model


def _empty(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    attention = ATTENTION if has_dilated_layers(config) else "sdpa"
    with torch.device("meta"):
        return created(config, attention, dtype)


def _fill(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put weights in the place of the parameters of a model on the meta device."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unexpected:
        raise ValueError(f"weights must be those of a {type(model).__name__}, got {[*empty, *unexpected][:3]} besides")
    del missing
