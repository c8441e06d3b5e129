"""Reading of files of torch, torch.distributed.checkpoint and DeepSpeed without running code that they hold."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention.pattern.pattern import Branch, Pattern
from lightning_longnet.attention.pattern.sparsity import Sparsity
from lightning_longnet.models.longnet import LongNetConfig
from lightning_longnet.models.longvit import LongViTConfig
from lightning_longnet.trust import ADVICE, confined, is_trusted

if TYPE_CHECKING:
    from collections.abc import Iterator

# The classes that checkpoints may contain, under all module paths that they have had
OWN: tuple[Any, ...] = (
    *(Branch, Sparsity, Pattern, LongNetConfig, LongViTConfig),
    (Branch, "lightning_longnet.attention.branch.Branch"),
    (Branch, "lightning_longnet.attention.pattern.Branch"),
    (Pattern, "lightning_longnet.attention.pattern.Pattern"),
    (Sparsity, "lightning_longnet.attention.sparsity.Sparsity"),
    (LongNetConfig, "lightning_longnet.model.LongNetConfig"),
    (LongViTConfig, "lightning_longnet.vision.LongViTConfig"),
)
# the classes that DeepSpeed puts into its files beside tensors and plain values
_DEEPSPEED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# the exceptions that torch.load raises on files that are no checkpoints
NO_CHECKPOINT: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, AssertionError),
    *(struct.error, zipfile.BadZipFile, AttributeError, TypeError),
)
_FORCED, _UNFORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # which torch.load reads


def read_file(path: Path, allowed: tuple[Any, ...] = (), trust: bool = False) -> Any:
    """Return the content of a file that `torch.save` wrote, on the CPU and memory-mapped where that is possible.

    The file may hold tensors, plain values, configurations and patterns of this package, and the classes in `allowed`.
    For others, and for files that are no checkpoints, a ValueError is raised; `trust` allows any class.
    """
    is_plain = not is_trusted(trust)
    try:
        with restricted(*allowed, trust=trust):
            return torch.load(path, map_location="cpu", weights_only=is_plain, mmap=zipfile.is_zipfile(path))
    except NO_CHECKPOINT as error:
        raise ValueError(f"path must be {refusal(path, error)}") from None


def refusal(path: str | Path, error: Exception) -> str:
    """Return the end of an error message, "a checkpoint of ..., got PATH, which ...", for a file that cannot be read.

    torch's own message would advise to load objects nevertheless, which runs whatever code they hold.

    Args:
        path: the file.
        error: the error of reading it, which says why.
    """
    others = re.search(
        r"(?:GLOBAL|class|function) `?([\w.]+)`? was not an allowed global"
        r"|Trying to (?:instantiate class|call reduce for unrecognized function|load unsupported GLOBAL) (?P<name>\S+)",
        str(error),
    )
    if others:
        reason = f"holds objects of {others[1] or others['name']}: loading them could run any code; {ADVICE}"
    elif Path(path).is_file() and not Path(path).stat().st_size:
        reason = "is empty"
    elif isinstance(error, RuntimeError) and str(error).strip():
        reason = f"cannot be read: {str(error).strip().splitlines()[-1]}"
    else:
        reason = "is something else"
    return (
        f"a checkpoint of tensors and plain values, as longnet fit and torch.save write it, got {path}, which {reason}"
    )


@contextmanager
def restricted(*allowed: Any, trust: bool = False) -> Iterator[None]:
    """Restrict each call of torch.load inside the block to tensors, plain values and the given classes.

    Libraries that read checkpoints, as torch.distributed.checkpoint and DeepSpeed, call it with weights_only=False.

    Args:
        allowed: classes beside those of this package, as for `torch.serialization.safe_globals`.
        trust: restricts nothing.
    """
    if is_trusted(trust):
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _UNFORCED)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals([*OWN, *allowed]):
            yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def deepspeed_classes() -> list[Any]:
    """Return the classes that DeepSpeed's checkpoints contain, for `restricted`; none if it is not installed."""
    if find_spec("deepspeed") is None:
        return []
    split = [path.rpartition(".") for path in _DEEPSPEED]
    return [getattr(import_module(module), name) for module, _, name in split]


def check_folder(path: Path, trust: bool = False) -> None:
    """Raise a ValueError if a folder of FSDP2 or DeepSpeed holds objects that could run code when they are loaded.

    Rank 0 calls it before all ranks load: without it a rank would fail alone, at one of its files, while the others
    wait for it.
    """
    if is_trusted(trust) or not path.is_dir():
        return
    from lightning_longnet.checkpointing.reader import read_metadata  # its imports take a second

    for tag in filter(Path.is_file, (path / "latest", path / "latest_universal")):  # the folder that DeepSpeed reads
        confined(f"{tag.name} of a checkpoint", path / tag.read_text(errors="replace").strip(), path)
    for file in sorted(path.rglob("*.metadata")):
        read_metadata(file)
    files = sorted(path.rglob("*.pt"))
    classes = tuple(deepspeed_classes()) if any(file.name.endswith("_states.pt") for file in files) else ()
    for file in files:
        content = read_file(confined("the files of a checkpoint", file, path), classes)
        for name in _parameters(content):  # DeepSpeed's conversion writes a folder for each
            confined("the names of a checkpoint's parameters", path / name, path)


def _parameters(content: Any) -> Iterator[str]:
    """Yield the names of parameters in the content of a file of DeepSpeed."""
    if not isinstance(content, dict):
        return
    states = content.get("optimizer_state_dict")
    held = [content.get(name) for name in ("module", "param_shapes", "frozen_param_shapes")]
    held.append(states.get("param_slice_mappings") if isinstance(states, dict) else None)
    for each in held:
        for names in each if isinstance(each, (list, tuple)) else [each]:
            yield from (name for name in names if isinstance(name, str)) if isinstance(names, dict) else ()
