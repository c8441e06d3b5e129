"""The safetensors files of a model of transformers, of which each rank reads the parts that it holds."""

from __future__ import annotations

import json
import re
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_longnet.huggingface.dilation import check_dilated
from lightning_longnet.huggingface.models import check_model, created, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_FILE = "model.safetensors"
_DTYPES = {  # of safetensors
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_ROWS = 1024  # of two tensors that are compared
_PLACE = "load_sharded must be False"


def empty_model(
    name: str, attention: str, dtype: str | None, overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Return the model of a name or a folder with its parameters on the meta device; see `loaded` for the arguments."""
    config = read_config(name, overrides)
    if (named := getattr(config, "transformers_weights", None)) is not None:
        raise ValueError(f"{_PLACE} with {name!r}, whose configuration names the file of its weights, {named!r}")
    with torch.device("meta"):
        model = created(config, attention, dtype)
    _check_dtype(model)
    _compute_buffers(model)
    check_model(model)
    check_dilated(model.config, attention)
    return model


def _check_dtype(model: PreTrainedModel) -> None:
    """Raise a ValueError where transformers loads some parameters in float32 whatever the dtype is."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else set()
    for name in model.state_dict() if model.dtype in (torch.float16, torch.bfloat16) else ():
        if any(each in name for each in kept):
            raise ValueError(
                f"{_PLACE} with the dtype {str(model.dtype).removeprefix('torch.')}: transformers loads {name} of "
                f"{type(model).__name__} in float32"
            )


@torch.no_grad()
def _compute_buffers(model: Any) -> None:
    """Compute the buffers that files do not hold, such as the frequencies of rotations, as transformers does."""
    for path, module in model.named_modules():
        results = [_initialized(model, module, value) for value in (0, 1)]
        for name, x in results[0].items():
            if not torch.equal(x, results[1][name]):  # what was there before is still there
                raise ValueError(
                    f"{_PLACE} with a {type(model).__name__}, which does not compute its buffer "
                    f"{f'{path}.{name}'.lstrip('.')} in _init_weights"
                )


def _initialized(model: Any, module: nn.Module, value: int) -> dict[str, Tensor]:
    """Fill the buffers of a module that files do not hold with a value, initialise the module, and return them."""
    buffers = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
    for name, buffer in buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.full_like(buffer, value, device="cpu")
    if buffers:
        model._init_weights(module)
    return {name: x for name in buffers if (x := module._buffers[name]) is not None}


class Entry(NamedTuple):
    """The place of a tensor in a safetensors file: the number of its first byte, and how it is to be read."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, rows: slice) -> Tensor:
        """Return rows of the tensor, without mapping or reading the rest of the file."""
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        shape = (max(last - first, 0), *self.shape[1:])
        width = prod(self.shape[1:]) * self.dtype.itemsize
        content = torch.empty(shape[0] * width, dtype=torch.uint8)
        buffer: Any = content.numpy()  # of the same memory
        with self.path.open("rb") as file:
            file.seek(self.begin + first * width)
            if file.readinto(buffer) != len(content):
                raise ValueError(f"{self.path} is shorter than its header says")
        return content.view(self.dtype).reshape(shape if self.shape else ())

    def equals(self, other: Entry) -> bool:
        """Return whether two tensors have the same values; a few rows of each are in memory at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        parts = [slice(i, i + _ROWS) for i in range(0, self.shape[0] if self.shape else 1, _ROWS)]
        return all(torch.equal(self.read(part), other.read(part)) for part in parts)


class WeightFiles:
    """The tensors of the safetensors files of a model, read one by one.

    Args:
        name: the folder of a model, or its name on the Hub.
        model: the model, whose parameters have the names of the tensors.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self.files = _files(name)
        self._check()

    def _check(self) -> None:
        """Raise a ValueError where the tensors of the files are not those of the model by their names."""
        names = self._names()
        known = {each for alike in names.values() for each in alike} | set(self._buffers())
        ignored = [*(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()), *self._formerly_saved()]
        strange = [each for each in self.files if each not in known and not any(re.search(p, each) for p in ignored)]
        missing = [name for name, alike in names.items() if not any(each in self.files for each in alike)]
        missing += [name for name in self._buffers() if name not in self.files]
        if strange or missing:
            what = f"has no {missing[0]}" if missing else f"has {strange[0]}, which the model has not"
            raise ValueError(
                f"{_PLACE} with {self.name!r}: transformers converts its weights while it loads them, as the file "
                f"{what} by this name"
            )
        for name, tensor in self.model.state_dict().items():
            if name in self.files and self.files[name].shape != tuple(tensor.shape):
                shapes = f"{tuple(tensor.shape)}, got {self.files[name].shape}"
                raise ValueError(f"{name} of {self.name!r} must have the shape {shapes}")
        for alike in names.values():
            first, *others = [each for each in alike if each in self.files]
            for other in others:
                if not self.files[first].equals(self.files[other]):
                    raise ValueError(
                        f"{_PLACE} with {self.name!r}: its configuration ties {first} to {other}, and the file has "
                        f"other values for each; set tie_word_embeddings to False in it"
                    )

    def _formerly_saved(self) -> list[str]:
        """Return patterns of buffers that files of former versions of transformers hold, and which are computed now."""
        buffers = [name for name, _ in self.model.named_buffers()]
        known = ("rotary_emb.inv_freq", "position_ids")
        return [rf"(^|\.){re.escape(each)}$" for each in known if any(name.endswith(each) for name in buffers)]

    def _names(self) -> dict[str, list[str]]:
        """Return the name of each parameter, and all names that it has in the model, where weights are tied."""
        alike: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            alike.setdefault(id(parameter), []).append(name)
        return {names[0]: names for names in alike.values()}

    def _buffers(self) -> list[str]:
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return [name for name in self.model.state_dict() if name not in names]

    @torch.no_grad()
    def load(self, device: torch.device) -> None:
        """Give the parameters of the model on the meta device their values: of those that are sharded, this rank's."""
        state: dict[str, Any] = {}
        for alike in self._names().values():
            parameter = self.model.get_parameter(alike[0])
            name = next(each for each in alike if each in self.files)
            value = nn.Parameter(self._value(name, parameter, device), parameter.requires_grad)
            state.update(dict.fromkeys(alike, value))  # one parameter by all its names: tied weights stay tied
        for name in self._buffers():
            buffer = self.model.get_buffer(name)
            state[name] = self.files[name].read(slice(None)).to(device, buffer.dtype)
        self.model.load_state_dict(state, assign=True)

    def _value(self, name: str, parameter: Tensor, device: torch.device) -> Tensor:
        """Return the value of a parameter, or this rank's part of it."""
        if self.files[name].shape != tuple(parameter.shape):  # as after `resize_token_embeddings`
            raise ValueError(f"{_PLACE} where {name} has another shape than when the module was made")
        if not isinstance(parameter, DTensor):
            return self.files[name].read(slice(None)).to(device, parameter.dtype)
        mesh, rows = parameter.device_mesh, slice(None)
        sharded = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        for axis in sharded:
            if len(sharded) > 1 or parameter.placements[axis] != Shard(0):
                raise ValueError(f"{_PLACE} where {name} is not sharded by rows, got {parameter.placements}")
            rows = part_of(parameter.shape[0], mesh.size(axis), mesh.get_local_rank(axis))
        local = self.files[name].read(rows).to(device, parameter.dtype)
        options: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(local, mesh, parameter.placements, run_check=False, **options)


def part_of(size: int, ranks: int, rank: int) -> slice:
    """Return the rows of a rank where as many ranks share `size` rows, as FSDP2 splits them."""
    share = ceil(size / ranks)
    return slice(min(rank * share, size), min((rank + 1) * share, size))


def _files(name: str) -> dict[str, Entry]:
    """Return where each tensor of a model is; its files are downloaded where they are not in the cache."""
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    paths = [cached_file(name, _FILE, **options)]
    if paths == [None] and (index := cached_file(name, f"{_FILE}.index.json", **options)) is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        paths = [cached_file(name, each) for each in names]
    if paths == [None]:
        raise ValueError(f"{_PLACE} with {name!r}, which has no {_FILE}: save_pretrained of transformers writes it")
    return {tensor: entry for path in paths for tensor, entry in _entries(Path(str(path))).items()}


def _entries(path: Path) -> dict[str, Entry]:
    """Return where each tensor of a safetensors file is, by the header of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        if begin > size:
            raise ValueError(f"{path} must be a safetensors file, and its header is longer than the file")
        header = json.loads(file.read(begin - 8))
    header.pop("__metadata__", None)
    for tensor, each in header.items():
        if each["dtype"] not in _DTYPES:
            raise ValueError(f"{_PLACE} with {path}, whose {tensor} has the dtype {each['dtype']}")
        if begin + each["data_offsets"][1] > size:
            raise ValueError(f"{path} is shorter than its header says")
    return {
        tensor: Entry(path, _DTYPES[each["dtype"]], tuple(each["shape"]), begin + each["data_offsets"][0])
        for tensor, each in header.items()
    }
