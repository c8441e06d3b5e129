"""Scoring of several text files, as lines of JSON, whose run goes on where it was killed."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.evaluation.curve import LossCurve
from lightning_longnet.evaluation.half import HalfScored
from lightning_longnet.evaluation.journal import Journal
from lightning_longnet.evaluation.scoring import check_scorable, score_text
from lightning_longnet.report.charts import Chart, Line
from lightning_longnet.report.plot import check_plot, write_plot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lightning_longnet.data.texts import Text
    from lightning_longnet.evaluation.loading import Loaded

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
    options.

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
    journal = None if options.out is None else Journal(options.out, _identity(source, texts, options))
    entries: list[dict[str, Any]] = [] if journal is None else [*journal.entries]
    with nullcontext() if journal is None else journal:
        for entry, text in zip(entries, texts, strict=False):
            show(json.dumps(entry["figures"]))
            advance(text.size)
        for number, text in list(enumerate(texts))[len(entries) :]:
            half = None if options.out is None else HalfScored(options.out, number)
            score = score_text(source, text, advance, has_documents=options.has_documents, half=half)
            entry = {"figures": score.figures(text), "curve": score.curve.state()}
            if journal is not None and half is not None:
                journal.add(entry)
                half.remove()
            entries.append(entry)
            show(json.dumps(entry["figures"]))
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
