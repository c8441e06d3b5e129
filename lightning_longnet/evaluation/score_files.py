"""Scoring of several text files, as lines of JSON, whose run goes on where it was killed."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.evaluation.curve import LossCurve
from lightning_longnet.evaluation.half import HalfScored
from lightning_longnet.evaluation.journal import Journal
from lightning_longnet.evaluation.ranks import SHORT
from lightning_longnet.evaluation.scoring import check_scorable, score_text
from lightning_longnet.report.charts import Chart, Line
from lightning_longnet.report.plot import check_plot, write_plot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lightning_longnet.data.texts import Text
    from lightning_longnet.evaluation.loading import Loaded
    from lightning_longnet.evaluation.ranks import Ranks

_LINES = 12  # of a plot; more curves could not be distinguished


class ScoreOptions(NamedTuple):
    """The options of scoring texts.

    Attributes:
        has_documents: as of `score_text`.
        out: the file of the lines of JSON, which makes a run resumable; None writes none.
        plot: the file of a plot of the loss against the position; None draws none.
    """

    has_documents: bool = False
    out: Path | None = None
    plot: Path | None = None


def score_files(
    source: Loaded,
    texts: Sequence[Text],
    options: ScoreOptions,
    advance: Callable[[float], object],
    show: Callable[[str], object],
) -> None:
    """Score texts, and show a line of JSON of each as soon as it is known.

    A run with `options.out` that was killed goes on where it stopped, if it has the same texts, checkpoint and
    options.  Ranks share long texts, and each computes other short ones; the first rank shows and writes.

    Args:
        source: the model and the tokenizer.
        texts: the texts.
        options: the options.
        advance: called with numbers of bytes of text that are done.
        show: called with each line.
    """
    check_scorable(source.model)
    if options.plot is not None:
        check_plot(options.plot)
    ranks = source.ranks
    journal = ranks.together(lambda: _journal(source, texts, options))
    with nullcontext() if journal is None else journal:
        entries = ranks.first(lambda: [] if journal is None else [*journal.entries])
        for entry, text in zip(entries, texts, strict=False):
            _show(ranks, entry, show)
            advance(text.size)
        numbers = range(len(entries), len(texts))
        for some in ranks.rounds(numbers, lambda number: texts[number].size <= SHORT):
            begin = len(entries)
            entries += _scored(source, [texts[number] for number in some], some[0], options, advance)
            ranks.first(partial(_add, journal, options.out, entries[begin:]))
            for entry in entries[begin:]:
                _show(ranks, entry, show)
        ranks.first(lambda: _finish(journal, options, entries))


def _journal(source: Loaded, texts: Sequence[Text], options: ScoreOptions) -> Journal | None:
    """Return the journal of the run; None without a file, and on all ranks but the first."""
    if options.out is None or not source.ranks.is_first:
        return None
    return Journal(options.out, _identity(source, texts, options))


def _show(ranks: Ranks, entry: dict[str, Any], show: Callable[[str], object]) -> None:
    if ranks.is_first:
        show(json.dumps(entry["figures"]))


def _scored(
    source: Loaded, texts: Sequence[Text], number: int, options: ScoreOptions, advance: Callable[[float], object]
) -> list[dict[str, Any]]:
    """Return the entries of consecutive texts, the first of which has this number: one text, or one for each rank."""

    def scored(by: Loaded, text: Text, half: HalfScored | None) -> dict[str, Any]:
        score = score_text(by, text, advance, has_documents=options.has_documents, half=half)
        return {"figures": score.figures(text), "curve": score.curve.state()}

    ranks = source.ranks
    if len(texts) == 1:
        return [scored(source, texts[0], None if options.out is None else HalfScored(options.out, number))]
    own = texts[ranks.rank : ranks.rank + 1]
    entries = ranks.each(lambda: [scored(source.alone, text, None) for text in own])
    advance(sum(text.size for text in texts) - sum(text.size for text in own))
    return [entry for each in entries for entry in each]


def _add(journal: Journal | None, out: Path | None, entries: Sequence[dict[str, Any]]) -> None:
    """Add entries to the journal of a run, which then needs no state within their texts."""
    if journal is None or out is None:
        return
    for entry in entries:
        journal.add(entry)
    HalfScored(out, len(journal.entries) - 1).remove()


def _finish(journal: Journal | None, options: ScoreOptions, entries: Sequence[dict[str, Any]]) -> None:
    """Write the plot and the lines."""
    if options.plot is not None:
        write_plot(_chart(entries), options.plot)
    if options.out is not None and journal is not None:
        journal.data.write_text("".join(json.dumps(entry["figures"]) + "\n" for entry in entries))
        os.replace(journal.data, options.out)
        journal.remove()


def _identity(source: Loaded, texts: Sequence[Text], options: ScoreOptions) -> dict[str, object]:
    """Return what the scores depend on."""
    files = [[str(text.path), text.size, text.changed] for text in texts]
    identity: dict[str, object] = {"files": files, "source": source.identity, "tokenizer": source.tokenizer.name}
    return identity | {"documents": options.has_documents}


def _chart(entries: Sequence[dict[str, Any]]) -> Chart:
    """Return the chart of the loss against the position."""
    shown = entries[:_LINES]
    lines = [
        Line("", LossCurve(entry["curve"]).points(), i, run=entry["figures"]["file"] if len(entries) > 1 else "")
        for i, entry in enumerate(shown)
    ]
    note = f"The first {len(shown)} of {len(entries)} files." if len(shown) < len(entries) else ""
    label = "position in the document, in tokens"
    return Chart("loss", "Loss against position", "nats per token", lines, x_label=label, note=note)
