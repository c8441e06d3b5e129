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
_PLACE = "load_sharded must be False"


def empty_model(
    name: str, attention: str, dtype: str | None, overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Return the model of a name or a folder with its parameters on the meta device; see `loaded` for the arguments."""
    config = read_config(name, overrides)
    with torch.device("meta"):
        model = created(config, attention, dtype)
    _fill_buffers(model)
    check_model(model)
    check_dilated(model.config, attention)
    return model


@torch.no_grad()
def _fill_buffers(model: Any) -> None:
    """Compute the buffers that files do not hold, such as the frequencies of rotations, as transformers does."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        if module._non_persistent_buffers_set:
            model._init_weights(module)


class Entry(NamedTuple):
    """The place of a tensor in a safetensors file: the number of its first byte, and how it is to be read."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, rows: slice) -> Tensor:
        """Return rows of the tensor, without mapping or reading the rest of the file."""
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        width = prod(self.shape[1:]) * self.dtype.itemsize
        content = torch.empty(max(last - first, 0) * width, dtype=torch.uint8)
        buffer: Any = content.numpy()  # of the same memory
        with self.path.open("rb") as file:
            file.seek(self.begin + first * width)
            if file.readinto(buffer) != len(content):
                raise ValueError(f"{self.path} is shorter than its header says")
        return content.view(self.dtype).reshape(-1, *self.shape[1:]) if self.shape else content.view(self.dtype)[0]


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
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
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
            if not parameter.is_meta:
                continue
            name = next(each for each in alike if each in self.files)
            value = nn.Parameter(self._value(name, parameter, device), parameter.requires_grad)
            state.update(dict.fromkeys(alike, value))  # one parameter by all its names: tied weights stay tied
        for name in self._buffers():
            buffer = self.model.get_buffer(name)
            state[name] = self.files[name].read(slice(None)).to(device, buffer.dtype)
        self.model.load_state_dict(state, strict=False, assign=True)

    def _value(self, name: str, parameter: Tensor, device: torch.device) -> Tensor:
        """Return the value of a parameter, or this rank's part of it."""
        if not isinstance(parameter, DTensor):
            return self.files[name].read(slice(None)).to(device, parameter.dtype)
        mesh, rows = parameter.device_mesh, slice(None)
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0
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
    if (index := cached_file(name, f"{_FILE}.index.json", **options)) is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        paths = [cached_file(name, each) for each in names]
    else:
        paths = [cached_file(name, _FILE, **options)]
    if paths == [None]:
        raise ValueError(f"{_PLACE} with {name!r}, which has no {_FILE}: save_pretrained of transformers writes it")
    return {tensor: entry for path in paths for tensor, entry in _entries(Path(str(path))).items()}


def _entries(path: Path) -> dict[str, Entry]:
    """Return where each tensor of a safetensors file is, by the header of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} must be a safetensors file, and its header is longer than the file")
        header = json.loads(file.read(length))
    return {
        tensor: Entry(path, _DTYPES[each["dtype"]], tuple(each["shape"]), 8 + length + each["data_offsets"][0])
        for tensor, each in header.items()
        if tensor != "__metadata__"
    }
