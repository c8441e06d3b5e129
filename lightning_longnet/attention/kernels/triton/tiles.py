"""The sizes of tiles, from a table that `benchmarks/tune_triton.py` writes on a GPU."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "tiles.json"


class Tile(NamedTuple):
    """The tile of a program, and how Triton compiles it.

    Attributes:
        rows, others: the rows of an item, and the rows that it meets at a time.
        warps: the warps of a program.
        stages: how many tiles are loaded ahead.
    """

    rows: int
    others: int
    warps: int
    stages: int


@lru_cache(1)
def table() -> dict[tuple[str, int], Tile]:
    """Return the tile of each program at each width of heads, {(program, width): tile}."""
    rows = json.loads(TABLE.read_text())["rows"]
    return {(row["kernel"], row["width"]): Tile(*(row[name] for name in Tile._fields)) for row in rows}


def tile_of(kernel: str, width: int, itemsize: int) -> Tile:
    """Return the tile of a program for heads of at most `width` numbers of `itemsize` bytes.

    `_tile` of launch.py asks in each forward and backward.  A tile of float32 has half as many other rows, so that it
    fills as many bytes.
    """
    tiles = table()
    tile = tiles[kernel, min(most for name, most in tiles if name == kernel and width <= most)]
    return tile if itemsize < 4 else tile._replace(others=max(16, tile.others // 2), stages=min(tile.stages, 2))
