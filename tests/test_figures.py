"""The plots of the committed results, drawn again from their JSON files."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def figure(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import figure

    return figure


@pytest.fixture
def axes(monkeypatch):
    """All axes of the figures that are drawn."""
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: shown.extend(self.axes))
    return shown


def result(name):
    return json.loads((FOLDER / f"results/{name}.json").read_text())


def test_a_peer_that_computes_another_function_is_marked(figure, axes, tmp_path):
    figure.draw(result("attention-cpu"), tmp_path / "drawn.png")
    for axis in axes[:2]:
        lines = {line.get_label(): line for line in axis.lines}
        (label,) = [label for label in lines if label.startswith("dilated-attention-pytorch")]
        assert "another function" in label
        assert lines[label].get_markerfacecolor() == "white"
        assert lines[label].get_linewidth() < lines["lightning-longnet"].get_linewidth()
        assert any("another function" in text.get_text() for text in axis.texts)
    assert "dotted" in axes[-1].get_xlabel()


def test_the_label_names_no_lines_that_are_not_there(figure, axes, tmp_path):
    figure.draw(result("conditions-cpu"), tmp_path / "drawn.png")
    assert all("dotted" not in axis.get_xlabel() for axis in axes)
    assert {line.get_linestyle() for axis in axes for line in axis.lines} == {"-"}


def test_an_exchange_has_its_peer_and_no_empty_panel(figure, axes, tmp_path):
    outcome = result("exchange-cpu")
    figure.draw_exchange(outcome, tmp_path / "drawn.png")
    bars = [bar.get_width() for axis in axes for bar in axis.patches]
    several = [row for row in outcome["rows"] if row["ranks"] > 1]
    assert len(bars) == len(outcome["rows"]) + len(several)
    texts = [text.get_text() for axis in axes for text in axis.texts]
    (row,) = [row for row in outcome["rows"] if row["participant"].startswith("ring-attention-pytorch")]
    assert any(f"{row['step_seconds']:.2f} s, " in text for text in texts), "a bar that is cut says its value"
    for axis in axes:
        if axis.axison:
            assert max(bar.get_width() for bar in axis.patches) > 0
        else:
            assert [text.get_text() for text in axis.texts] == ["one rank sends nothing"]


def test_recall_shows_both_patterns_beside_chance(figure, axes, tmp_path):
    outcome = result("recall-cpu")
    figure.draw_recall(outcome, tmp_path / "drawn.png")
    (axis,) = axes
    dilated, local, chance = axis.lines
    assert list(dilated.get_ydata()) == [share for _, share in outcome["rows"][0]["curve"]]
    assert list(local.get_ydata()) == [share for _, share in outcome["rows"][1]["curve"]]
    assert set(chance.get_ydata()) == {outcome["rows"][0]["chance"]}


@pytest.mark.parametrize("name", ["attention", "exchange", "recall", "ordering"])
def test_a_plot_is_drawn_again_without_measuring(name, monkeypatch, axes):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, "--plot-only"])
    before = (FOLDER / f"results/{name}-cpu.json").read_bytes()
    __import__(name).main()
    assert axes
    assert (FOLDER / f"results/{name}-cpu.json").read_bytes() == before
