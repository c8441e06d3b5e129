"""The cells of a `NeedleGrid` as lines of JSON and a picture, by a run that goes on where it was killed."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.evaluation.journal import Journal
from lightning_longnet.evaluation.needles import NeedleCell, NeedleGrid, check_grid, needle_cell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lightning_longnet.evaluation.decoders import Decoder
    from lightning_longnet.evaluation.needles import Needles


class NeedleOptions(NamedTuple):
    """The options of a run.

    Attributes:
        lengths: the numbers of tokens of a row.
        depths: where in the row the answer is, from 0 to 1.
        samples: the number of rows of each length and depth.
        seed: the seed of the rows.
        out: the file of the lines of JSON, which makes a run resumable; None writes none.
        plot: the file of the heat map; None draws none.
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    seed: int = 0
    out: Path | None = None
    plot: Path | None = None


def needle_files(
    source: Decoder, needles: Needles, options: NeedleOptions, advance: Callable[[int], object]
) -> NeedleGrid:
    """Return the results for each length and depth, and write the files of the options.

    Args:
        source: the model.
        needles: the rows.
        options: the options.
        advance: called with the length of a row for each cell that is done.
    """
    check_grid(source.model, options.lengths, options.depths, options.samples)
    pairs = [(length, depth) for length in options.lengths for depth in options.depths]
    journal = None if options.out is None else Journal(options.out, _identity(source, needles, options))
    cells = [] if journal is None else [NeedleCell(**entry) for entry in journal.entries]
    with nullcontext() if journal is None else journal:
        advance(sum(cell.length for cell in cells))
        for length, depth in pairs[len(cells) :]:
            cell = needle_cell(source.model, needles, length, depth, samples=options.samples, seed=options.seed)
            cells.append(cell)
            if journal is not None:
                journal.add(cell._asdict())
            advance(length)
    grid = NeedleGrid(tuple(cells), options.samples, needles.chance)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        grid.plot(options.plot)
    if options.out is not None and journal is not None:
        lines = [{**cell._asdict(), "samples": grid.samples, "chance": grid.chance} for cell in cells]
        journal.data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(journal.data, options.out)
        journal.remove()
    return grid


def _identity(source: Decoder, needles: Needles, options: NeedleOptions) -> dict[str, Any]:
    """Return what the results depend on."""
    grid = [[*options.lengths], [*options.depths], options.samples, options.seed]
    return {"source": source.identity, "needles": needles.identity, "grid": grid}
