"""The reader of folders of torch.distributed.checkpoint, which runs no code that they hold."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from lightning_longnet.checkpointing.restricted import NO_CHECKPOINT, refusal
from lightning_longnet.trust import confined, is_trusted


class Reader(FileSystemReader):
    """A reader of folders of torch.distributed.checkpoint that runs no code and reads no file outside of the folder.

    Args:
        path: the folder.
        trust: whether the folder is trusted: it may run code, and lead to files outside of it.
    """

    def __init__(self, path: str | Path, trust: bool = False) -> None:
        super().__init__(path)
        self.trust = is_trusted(trust)

    def read_metadata(self, *args: Any, **options: Any) -> dcp.Metadata:
        """Return the `.metadata` of the folder; torch calls it when it loads."""
        metadata = read_metadata(Path(self._get_metadata_path(options.get("rank"))), self.trust)
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(file: Path, trust: bool = False) -> dcp.Metadata:
    """Return the `.metadata` of a folder of torch.distributed.checkpoint without running code.

    A ValueError is raised if it holds objects of other classes than torch's own, or names a file outside of its folder.

    Args:
        file: the path of `.metadata`.
        trust: allows any class and any file.
    """
    confined("a checkpoint's .metadata", file, file.parent, trust)
    unpickler = pickle.Unpickler if is_trusted(trust) else _Metadata
    try:
        with file.open("rb") as opened:
            metadata = unpickler(opened).load()
    except NO_CHECKPOINT as error:
        raise ValueError(f"path must be {refusal(file, error)}") from None
    if not isinstance(metadata, dcp.Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"path must be {refusal(file, ValueError())}")
    stored = getattr(metadata, "storage_data", None)
    for each in {str(info.relative_path) for info in (stored or {}).values()}:
        confined("the files of a checkpoint's .metadata", file.parent / each, file.parent, trust)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = dcp.StorageMeta()
    return metadata


class _Metadata(pickle.Unpickler):
    """An unpickler that knows only the classes that torch writes into `.metadata`, and no attribute of them."""

    _CLASSES = (
        *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorProperties, dcp._MEM_FORMAT_ENCODING),
        *(dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata),
        *(_StorageInfo, torch.Size, OrderedDict),
    )
    _KNOWN = {(each.__module__, each.__qualname__): each for each in _CLASSES} | {
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or raise an UnpicklingError; pickle calls it for each class in the file."""
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # Python 3.13 has moved the classes, and a file may be read by another version than the one that wrote it
        if module in ("pathlib", "pathlib._local") and name in ("Path", "PosixPath", "WindowsPath"):
            return Path
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
