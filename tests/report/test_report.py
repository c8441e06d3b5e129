"""The page: everything that a run left is on it, nothing comes from elsewhere, and what is not there is left out."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from left import PATTERN, leave

from lightning_longnet import Pattern
from lightning_longnet.cli import main
from lightning_longnet.report import write_report
from lightning_longnet.report.charts import Bars, Chart, Line, shown, smoothed, svg, thinned, ticks
from lightning_longnet.report.figures import charts
from lightning_longnet.report.images import figure_of as drawn
from lightning_longnet.report.pictures import pattern_pictures, whole_shares
from lightning_longnet.report.runs import read_runs

SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def written(folders, out):
    return write_report(folders, out, images=False).read_text()


def test_a_run_is_on_its_page(tmp_path):
    page = written([leave(tmp_path / "run")], tmp_path / "report.html")
    for words in (
        "Run run",
        "2.869",  # bits per byte of the last validation, 2.5 + 4 exp(-19 / 6) + 0.2
        "31.0%",
        "0.61 GiB",
        "4.00 MiB",
        "80%",
        "819,200",
        "862,208",
        "2, 1 x 2",
        "fsdp2, 32-true",
        "1 min 23 s",
        "7.25",
        "Placement over ranks",
        "(256, 1) + (1024, 2) + (4096, 4), causal",
        "lr-AdamW",
        "model.dim",
    ):
        assert words in page, words
    charts = set(re.findall(r'<figure id="([^"]+)"', page))
    expected = {"bits", "loss", "throughput", "steps", "utilization", "memory-ranks", "memory-kinds", "memory"}
    assert charts == expected | {"exchange", "hidden", "bytes", "other-lr-AdamW"}
    assert len(SVG.findall(page)) == len(charts) + 3  # two of the pattern, one of the placement
    for each in SVG.findall(page):
        ET.fromstring(each)


def test_nothing_comes_from_elsewhere(tmp_path):
    page = written([leave(tmp_path / "run")], tmp_path / "report.html")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(|src=|href=", page)


def test_several_runs_stand_side_by_side(tmp_path):
    folders = [leave(tmp_path / "a" / "version_0"), leave(tmp_path / "b" / "version_0", slope=2.0, rate=8)]
    page = written(folders, tmp_path / "report.html")
    assert "<h1>2 runs</h1>" in page
    assert re.search(r"<th>validation, bits per byte</th><td>2.869</td><td>2.707</td>", page)
    assert re.search(r'<i class="key run1"></i>b</span>', page)
    # settings that are equal are left out
    assert "(256, 1) + (4096, 8)" in page
    assert "model.dim" not in page
    bits = re.search(r'<figure id="bits".*?</figure>', page, re.DOTALL)[0]
    assert bits.count("<path") == 6  # of each run the training, its mean, and the validation
    assert 'class="line run1 solid"' in bits


def test_a_run_of_others_is_shown_as_far_as_it_goes(tmp_path):
    folder = tmp_path / "lightning_logs" / "version_3"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch,step,train_loss,acc\n0,4,2.5,\n0,9,1.5,0.25\n0,14,nan,0.5\n")
    (folder / "hparams.yaml").write_text("lr: 0.1\npath: !!python/object/apply:pathlib.PosixPath\n- tmp\n")
    page = written([tmp_path / "lightning_logs"], tmp_path / "report.html")
    assert "Run lightning_logs/version_3" in page
    assert set(re.findall(r'<figure id="([^"]+)"', page)) == {"loss", "other-acc"}
    assert "1.5000" in page
    assert "nan" not in page.lower()
    assert "What a query sees" not in page
    assert "<td>0.1</td>" in page


def test_a_pattern_in_the_settings_is_drawn(tmp_path):
    folder = leave(tmp_path / "run")
    (folder / "run.json").unlink()
    page = written([folder], tmp_path / "report.html")
    assert "4 heads: (256, 1) + (4096, 4), causal" in page
    assert "A sequence of 4,096 tokens" in page
    assert "Placement" not in page


def test_names_of_a_run_are_text(tmp_path):
    folder = leave(tmp_path / "<b>&run")
    page = written([folder], tmp_path / "report.html")
    assert "<b>&run" not in page
    assert "&lt;b&gt;&amp;run" in page


def test_the_last_version_is_read(tmp_path):
    for version in (2, 10, 9):
        leave(tmp_path / f"version_{version}", is_ours=False)
    (run,) = read_runs([tmp_path])
    assert run.folder.name == "version_10"


def test_a_validation_is_not_taken_for_the_run(tmp_path):
    left = leave(tmp_path / "version_0")
    for version, metrics in ((1, "val/loss"), (2, "test_acc"), (3, "valid_loss")):
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"epoch,step,{metrics}\n0,0,2.5\n")
    (tmp_path / "version_4").mkdir()  # of a prediction
    assert read_runs([tmp_path])[0].folder == left
    (left / "run.json").unlink()  # of a run that was killed
    assert read_runs([tmp_path])[0].folder == left
    assert read_runs([tmp_path / "version_1"])[0].folder.name == "version_1", "which is asked for"
    (left / "metrics.csv").unlink()
    (left / "config.yaml").unlink()
    assert read_runs([tmp_path])[0].folder.name == "version_3", "where there is no other"


def test_the_length_of_a_class_of_data_is_found(tmp_path):
    folder = leave(tmp_path / "run")
    (folder / "run.json").unlink()
    config = (folder / "config.yaml").read_text().replace("  tokens: 4096", "  init_args: {tokens: 2048}")
    (folder / "config.yaml").write_text(config)
    assert "A sequence of 2,048 tokens" in written([folder], tmp_path / "report.html")


def test_shades_are_named_by_a_legend(tmp_path):
    """On a dark page they grow brighter, so no caption may call them darker."""
    page = written([leave(tmp_path / "run")], tmp_path / "report.html")
    assert not re.search("darke(r|st)", page.partition("</style>")[2])
    whole, close = re.findall(r"<figure><svg.*?</figure>", page, re.DOTALL)[:2]
    named = [re.findall(r'<i class="key shade(\d)"></i>([^<]*)<', each) for each in (whole, close)]
    assert named == [[("1", "up to 1/128"), ("2", "up to 1/32"), ("3", "up to 1/8"), ("4", "up to 1/2"), ("5", "more")],
                     [("2", "1"), ("4", "2"), ("5", "3")]]  # fmt: skip
    for each, names in zip((whole, close), named, strict=True):
        assert set(re.findall(r'<path [^>]*class="shade(\d)"', each)) <= {shade for shade, _ in names}


def test_shades_of_many_counts_are_ranges():
    pattern = sum((Pattern.dilated((64,), (1,)) for _ in range(5)), Pattern.dilated((64,), (1,)))
    _, close = pattern_pictures(pattern + Pattern.window(4), 64, 1, 1)
    assert close.shades == {1: "1", 2: "2", 3: "3 to 4", 4: "5", 5: "6 to 7"}


def test_the_command(tmp_path, capsys, monkeypatch):
    folder = leave(tmp_path / "run")
    assert main(["report", str(folder), "--no-images"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert not list(folder.glob("*.png"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder), str(leave(tmp_path / "other")), "--no-images"]) == 0
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "run_dirs must be folders of runs, got" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "run_dirs must hold metrics.csv or run.json" in capsys.readouterr().err


@pytest.mark.long
def test_images_are_written_beside_it(tmp_path):
    folder = leave(tmp_path / "run")
    write_report([folder], images=True)
    result = {path.name for path in folder.glob("*.png")}
    assert {"report-bits.png", "report-throughput.png", "report-memory-ranks.png", "report-pattern-0-0.png"} <= result
    for path in folder.glob("*.png"):
        assert path.stat().st_size > 5_000


@given(st.floats(-1e9, 1e9), st.floats(1e-4, 10), st.integers(3, 8))
def test_ticks_are_round_and_hold_all(low, share, many):
    width = share * max(abs(low), 1.0)
    high = low + width
    result = ticks(low, high, many)
    assert result[0] <= low + 1e-6 * width
    assert result[-1] >= high - 1e-6 * width
    assert 2 <= len(result) <= many + 3
    steps = {round((b - a) / (result[1] - result[0]), 3) for a, b in pairwise(result)}
    assert steps == {1.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 500, 1000), ["0", "500", "1,000"]),
        ((0, 0.5, 1.0), ["0", "0.5", "1.0"]),
        ((0, 0.25, 0.5), ["0", "0.25", "0.50"]),
        ((0, 20_000, 40_000), ["0", "20k", "40k"]),
        ((0, 2.5e6, 5e6), ["0", "2.5M", "5.0M"]),
        ((2.45, 2.5, 2.55), ["2.45", "2.50", "2.55"]),
        ((-1, 0, 1), ["-1", "0", "1"]),
    ],
)
def test_labels_tell_ticks_apart(values, expected):
    assert [shown(value, list(values)) for value in values] == expected


def test_a_line_is_drawn_where_its_numbers_are():
    chart = Chart("x", "title", "unit", [Line("a", [(0, 0.0), (100, 10.0)], 0)], from_zero=True)
    path = re.search(r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg(chart))
    assert [float(x) for x in path.groups()] == [52, 200, 388, 14]


def test_bars_stand_upon_one_another():
    chart = Chart("x", "title", "unit", bars=[Bars("a", [1.0], 0), Bars("b", [3.0], 0)], labels=["l"])
    shape = r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"'
    result = [tuple(map(float, each)) for each in re.findall(shape, svg(chart))]
    (top, height), (upper, tall) = result
    assert tall == pytest.approx(3 * height, abs=0.2)
    assert upper + tall == pytest.approx(top, abs=0.2)


def test_one_point_and_equal_points_can_be_drawn():
    for points in ([(3, 1.0)], [(3, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -5.0), (2, -5.0)]):
        ET.fromstring(svg(Chart("x", "title", "unit", [Line("a", points, 0)])))


def test_long_lines_are_thinned_by_means():
    points = [(float(i), float(i % 2)) for i in range(3000)]
    result = thinned(points)
    assert len(result) == 300
    assert {y for _, y in result} == {0.5}


@pytest.mark.parametrize(
    "pattern", [PATTERN, Pattern.dilated((64, 300), (1, 3)), Pattern.window(40, is_causal=True), Pattern.dense()]
)
def test_the_picture_of_a_pattern_is_its_mask(pattern):
    length, heads = 96 * 8, 4
    shares = whole_shares(pattern, length, heads)
    mask = (pattern.mask(length, heads) > 0).double().mean(0)
    expected = mask.view(96, 8, 96, 8).mean((1, 3))
    torch.testing.assert_close(shares.double(), expected)


@pytest.mark.long
def test_a_sequence_of_millions_can_be_drawn():
    pattern = Pattern.dilated((2048, 32768, 2**20), (1, 16, 512), is_causal=True)
    whole, close = pattern_pictures(pattern, 2**22 + 17, 8, 8)
    assert "4,194,321" in whole.svg
    assert "shade" in close.svg
    assert len(whole.svg) < 300_000


def test_a_noisy_loss_is_smoothed():
    noisy = [(10 * i, 5 - i / 100 + (-1) ** i) for i in range(200)]
    means = smoothed(noisy)
    assert [x for x, _ in means] == [x for x, _ in noisy]
    assert max(abs(y - (5 - x / 1000)) for x, y in means[20:-20]) < 0.1, "the noise is gone, and there is no lag"
    assert max(abs(y - (5 - x / 1000)) for x, y in noisy) > 0.9
    assert smoothed(noisy[:19]) == []


def test_a_loss_is_shown_raw_and_smoothed(tmp_path):
    page = written([leave(tmp_path / "run")], tmp_path / "report.html")
    bits = re.search(r'<figure id="bits".*?</figure>', page, re.DOTALL)[0]
    assert bits.count('class="line run0 faint"') == 1
    assert bits.count('class="line run0 solid"') == 1
    assert "training, smoothed" in bits
    assert bits.count("<circle") == 4, "validations are few, and marked"


def test_equal_runs_are_both_seen(tmp_path):
    folders = [leave(tmp_path / name / "version_0", slope=slope) for name, slope in (("a", 1), ("b", 1), ("c", 3))]
    page = written(folders, tmp_path / "report.html")
    loss = re.search(r'<figure id="loss".*?</figure>', page, re.DOTALL)[0]
    paths = re.findall(
        r'class="line run(\d) solid"(?: style="stroke-dasharray: (\d+) (\d+); stroke-dashoffset: (-?\d+))?', loss
    )
    assert paths == [("0", "9", "9", "0"), ("1", "9", "9", "-9"), ("2", "", "", "")]
    assert "Lines of a, b that are equal are drawn in alternating dashes." in loss
    marks = re.findall(r'<circle cx="([^"]+)" [^>]*class="fill run([01])"', loss)
    assert not {x for x, run in marks if run == "0"} & {x for x, run in marks if run == "1"}, (
        "nor does a mark hide another"
    )
    alone = written(folders[:1], tmp_path / "alone.html")
    assert "stroke-dashoffset" not in alone


def test_equal_runs_are_both_seen_in_pictures(tmp_path):
    folders = [leave(tmp_path / name / "version_0") for name in ("a", "b")]
    runs = read_runs(folders)
    (loss,) = [chart for chart in charts(runs) if chart.key == "loss"]
    lines = [line for line in drawn(loss).axes[0].lines if line.get_label().endswith("smoothed")]
    assert [line.is_dashed() for line in lines] == [True, True]
    assert lines[0]._dash_pattern[0] != lines[1]._dash_pattern[0]
