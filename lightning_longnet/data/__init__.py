"""Data modules.  Each is imported at its first use, so that `longnet tokenize` runs without importing torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_longnet.data.base import TokenData
    from lightning_longnet.data.byte_data import ByteData
    from lightning_longnet.data.hub import HubData
    from lightning_longnet.data.images import ImageFolderData
    from lightning_longnet.data.long_range import LongRangeData
    from lightning_longnet.data.token_files import TokenFileData

__all__ = ["ByteData", "HubData", "ImageFolderData", "LongRangeData", "TokenData", "TokenFileData"]

_FILES = {
    "ByteData": "byte_data",
    "HubData": "hub",
    "ImageFolderData": "images",
    "LongRangeData": "long_range",
    "TokenData": "base",
    "TokenFileData": "token_files",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'lightning_longnet.data' has no attribute {name!r}")
    cls = getattr(import_module(f"lightning_longnet.data.{_FILES[name]}"), name)
    globals()[name] = cls
    return cls
