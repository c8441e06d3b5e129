"""Files of embeddings and states: safetensors that grow by rows and are whole at the end, and HDF5."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "BF16": "<u2"}
_LARGEST = 10**15  # of the numbers in a header, for which it reserves room
_ROWS = 65536  # rows that are copied at a time
EMBEDDINGS, TOKENS = "embeddings", "tokens"


class StateFile:
    """A safetensors file to which rows are appended, and whose header is written last.

    Args:
        path: the file.
        files: the name of each text.
        width: number of values of a row.
        dtype: dtype of the rows.
        metadata: what else the header says, by names.
        is_pooled: whether each text has one row, of the tensor "embeddings", with the numbers of tokens in "tokens".
            Otherwise each text has a tensor of its name, with a row for each token.
    """

    def __init__(
        self,
        path: Path,
        files: list[str],
        width: int,
        dtype: torch.dtype,
        metadata: dict[str, str],
        *,
        is_pooled: bool,
    ) -> None:
        self.path, self.files, self.width, self.dtype, self.is_pooled = path, files, width, dtype, is_pooled
        self.metadata = metadata | ({"files": json.dumps(files)} if is_pooled else {})
        size = len(json.dumps(self._header([_LARGEST // len(files)] * len(files))).encode())
        self._header_bytes = -(-size // 8) * 8
        self._begin = 8 + self._header_bytes + 8 * len(files) * is_pooled
        if not path.exists():
            path.touch()
        self._file = path.open("r+b")

    def rewind(self, rows: int) -> None:
        """Drop what follows the first `rows` rows."""
        end = self._begin + rows * self.width * self.dtype.itemsize
        if rows and self.path.stat().st_size < end:  # truncate would fill it up with zeros
            raise ValueError(f"{self.path} is shorter than its journal says: remove both, and compute the texts again")
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, rows: Tensor) -> None:
        """Append rows (n, width)."""
        assert rows.shape[1] == self.width
        stored = rows.detach().to("cpu", self.dtype).contiguous()
        self._file.write(memoryview(stored.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def sync(self) -> None:
        """Wait until the disk holds the rows."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, counts: list[int]) -> None:
        """Write the header, with the number of tokens of each text, and close the file."""
        header = json.dumps(self._header(counts)).encode()
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        if self.is_pooled:
            self._file.write(np.array(counts, dtype="<i8").tobytes())
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _header(self, counts: list[int]) -> dict[str, Any]:
        """Return the header where the texts have `counts` tokens."""
        header: dict[str, Any] = {"__metadata__": self.metadata}
        row, begin = self.width * self.dtype.itemsize, 0
        if self.is_pooled:
            begin = 8 * len(counts)
            header[TOKENS] = {"dtype": "I64", "shape": [len(counts)], "data_offsets": [0, begin]}
        tensors = [(EMBEDDINGS, len(counts))] if self.is_pooled else zip(self.files, counts, strict=True)
        for name, rows in tensors:
            end = begin + rows * row
            shape = {"dtype": _NAMES[self.dtype], "shape": [rows, self.width], "data_offsets": [begin, end]}
            header[name], begin = shape, end
        return header


def need_h5py() -> None:
    """Raise a ValueError where h5py is not installed."""
    if find_spec("h5py") is None:
        raise ValueError("--format hdf5 needs h5py, which is not installed: pip install 'lightning-longnet[hdf5]'")


def write_hdf5(source: Path, out: Path) -> None:
    """Write the tensors of a safetensors file as an HDF5 file of datasets, with the metadata as attributes.

    HDF5 has no bfloat16: such tensors become float32.
    """
    import h5py

    with source.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    with h5py.File(out, "w") as file:
        file.attrs.update(header.pop("__metadata__"))
        for name, tensor in header.items():
            shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
            place = 8 + size + tensor["data_offsets"][0]
            stored = np.memmap(source, _NUMPY[dtype], "r", place, shape)
            kind = "<f4" if dtype == "BF16" else _NUMPY[dtype]
            dataset = file.create_dataset(name, shape, kind)
            for begin in range(0, shape[0], _ROWS):
                rows = np.asarray(stored[begin : begin + _ROWS])
                if dtype == "BF16":  # the upper half of a float32
                    rows = (rows.astype("<u4") << 16).view("<f4")
                dataset[begin : begin + _ROWS] = rows
