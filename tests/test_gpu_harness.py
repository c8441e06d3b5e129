"""`make gpu` without a GPU: the order of its units, how it goes on, what it records, refuses and draws."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import tiered

from lightning_longnet import Pattern, attend
from lightning_longnet.attention.kernels import kernel_names

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "1", "gpus": 1, "versions": {"torch": "2.13.0"}}
ANSWER = {"refusal": "", "machine": MACHINE, "kernels": {"sdpa": [], "triton": [], "flash": ["x"]}, "sanitizer": None}
GOOD = "print('{\"x\": 1}')"


@pytest.fixture
def gpu(monkeypatch):
    """The program, on a machine that a test describes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    monkeypatch.setattr(gpu, "check", lambda: ANSWER)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return gpu


def unit(gpu, name, text=GOOD, kind="ancestor", **settings):
    return gpu.Unit(name, kind, (sys.executable, "-S", "-c", text), **{"least": 0.0, "timeout": 60.0} | settings)


@pytest.fixture
def call(gpu, monkeypatch, tmp_path, capsys):
    """Runs these units in one call, and returns the exit status, the text and the units of the record."""

    def run(units, *words):
        monkeypatch.setattr(gpu, "units", lambda answer: units)
        status = gpu.main(["--out", str(tmp_path), "--shares", str(tmp_path / "shares.json"), *words])
        (record,) = tmp_path.glob("gpu-*.json")
        return status, capsys.readouterr().out, json.loads(record.read_text())["units"]

    return run


def test_what_is_right_comes_before_what_is_fast(gpu):
    many = {**ANSWER, "machine": {**MACHINE, "gpus": 8}, "sanitizer": "/usr/bin/compute-sanitizer"}
    units = gpu.units(many)
    assert len({each.name for each in units}) == len(units)
    kinds = list(dict.fromkeys(each.kind for each in units))
    assert kinds == ["exactness", "exchange", "sanitizer", "dense", "attention", "ancestor", "step", "shares"]
    assert [each.command[-1] for each in units if each.kind == "exchange"] == ["2", "8"]
    named = [each.name for each in units if each.kind == "exactness"]
    assert named == ["exactness, sdpa", "exactness, triton", "exactness, none"], "all kernels of the axis that serve"
    attention = [each for each in units if each.kind == "attention"]
    assert {each.command[3] for each in attention} == {"sdpa", "triton", "scheme sdpa"}
    assert {each.needs for each in attention if each.command[3] == "triton"} == {("exactness, triton",)}
    assert all(each.least <= each.timeout < 540 for each in units), "a unit must fit in a call of nine minutes"
    plain = gpu.units(ANSWER)
    assert not {"exchange", "sanitizer"} & {each.kind for each in plain}


@pytest.mark.long
def test_tests_on_a_gpu_are_those_of_the_kernel_axis():
    """They are collected by kernel, and every test belongs to one of the units."""

    def collected(*words):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/gpu", *words]
        shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120).stdout
        return {row for row in shown.splitlines() if "::" in row}

    parts = [collected("--kernel", name) for name in (kernel_names()[1], "none")]
    assert all(parts)
    assert all(f"{kernel_names()[1]}" in name for name in parts[0])
    assert "test_dropout_on_cuda" in "".join(parts[1])
    assert not parts[0] & parts[1]


def test_a_call_goes_on_where_the_last_one_stopped(gpu, call, tmp_path):
    log = tmp_path / "log"

    def noting(name, more=""):
        return unit(gpu, name, f"import os, time; open({str(log)!r}, 'a').write('{name} ');{more}" + GOOD)

    slow = f"time.sleep(0 if os.path.exists({str(tmp_path / 'fast')!r}) else 60);"
    units = [noting("a"), noting("b", slow), noting("c")]
    status, shown, rows = call(units, "--minutes", "0.1")
    assert (status, set(rows)) == (gpu.LEFT, {"a"}), "a unit that the end of a call cuts off is not recorded"
    assert "call this again to go on" in shown
    (tmp_path / "fast").touch()
    status, shown, rows = call(units)
    assert (status, set(rows)) == (0, {"a", "b", "c"})
    assert log.read_text().split() == ["a", "b", "b", "c"], "what is recorded is not run again"
    assert rows["a"]["result"] == {"x": 1}
    assert "send " in shown
    assert call(units)[0] == 0
    assert log.read_text().split() == ["a", "b", "b", "c"]


@pytest.mark.long
def test_a_unit_that_has_a_whole_call_and_does_not_end_is_given_up(gpu, call):
    units = [unit(gpu, "long", "import time; time.sleep(60)"), unit(gpu, "next", least=0.0)]
    _, _, rows = call(units, "--minutes", "0.02")
    assert rows["long"]["status"].startswith("no end in")
    status, shown, rows = call(units)
    assert (status, rows["next"]["status"]) == (1, "passed")
    assert "not passed: long" in shown


def test_a_unit_does_not_begin_without_the_time_that_it_needs(gpu, call):
    units = [unit(gpu, "a"), unit(gpu, "b", least=50.0)]
    status, _, rows = call(units, "--minutes", "0.5")
    assert (status, set(rows)) == (gpu.LEFT, {"a"})
    assert call(units, "--minutes", "0.5")[0] == 0, "the first of a call begins in any case"


def test_a_failure_is_recorded_with_what_it_wrote_and_run_again_where_that_is_asked_for(gpu, call, tmp_path):
    flag = tmp_path / "mended"
    text = f"import os, sys; os.path.exists({str(flag)!r}) or sys.exit('out of order');" + GOOD
    units = [
        unit(gpu, "exactness, x", text, "sanitizer"),
        unit(gpu, "speed of x", needs=("exactness, x",)),
        unit(gpu, "y"),
    ]
    status, shown, rows = call(units)
    assert status == 1
    assert "out of order" in rows["exactness, x"]["output"]
    assert "out of order" in shown
    assert rows["speed of x"]["status"] == "left out: exactness, x did not pass"
    assert rows["y"]["status"] == "passed"
    flag.touch()
    assert call(units)[0] == 1, "a failure stays one"
    before = rows["y"]["date"]
    status, _, rows = call(units, "--again")
    assert status == 0
    assert rows["y"]["date"] == before


def test_results_of_another_device_or_version_are_another_file(gpu, call, tmp_path, monkeypatch):
    call([unit(gpu, "a")])
    (first,) = tmp_path.glob("gpu-*.json")
    assert first.name.startswith("gpu-h100-80gb-hbm3-x1-")
    before = first.read_text()
    for other in ({"gpu": "NVIDIA H200"}, {"gpus": 2}, {"versions": {"torch": "2.12.0"}}):
        monkeypatch.setattr(gpu, "check", lambda other=other: {**ANSWER, "machine": {**MACHINE, **other}})
        monkeypatch.setattr(gpu, "units", lambda answer: [unit(gpu, "a", GOOD.replace("1", "2"))])
        assert gpu.main(["--out", str(tmp_path), "--shares", str(tmp_path / "shares.json")]) == 0
    assert len(list(tmp_path.glob("gpu-*.json"))) == 4
    assert first.read_text() == before


def test_other_sources_are_measured_again(gpu, call, monkeypatch):
    units = [unit(gpu, "a")]
    _, _, rows = call(units)
    monkeypatch.setattr(gpu, "digest_of", lambda *_: "other")
    monkeypatch.setattr(gpu, "units", lambda answer: units)
    _, _, again = call(units)
    assert again["a"]["source"] == "other" != rows["a"]["source"]


def test_a_call_that_is_killed_ends_its_unit_and_keeps_what_was_recorded(tmp_path):
    alive = tmp_path / "alive"
    text = f"import os, time; open({str(alive)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import gpu\n"
        f"gpu.check = lambda: {ANSWER!r}\n"
        "def made(name, text): return gpu.Unit(name, 'attention', (sys.executable, '-c', text), 0.0, 60.0)\n"
        f"gpu.units = lambda answer: [made('a', {GOOD!r}), made('b', {text!r})]\n"
        f"gpu.main(['--out', {str(tmp_path)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (alive.exists() and alive.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(alive.read_text()), 0)
    (record,) = tmp_path.glob("gpu-*.json")
    assert set(json.loads(record.read_text())["units"]) == {"a"}


@pytest.mark.long
def test_a_machine_that_cannot_run_this_is_refused_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, str(FOLDER / "gpu.py"), "--out", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert outcome.returncode == 1
    (line,) = outcome.stdout.splitlines()
    assert line.startswith("make gpu: torch ")
    assert "nvidia-smi" in line
    assert not list(tmp_path.iterdir())


def test_minutes_must_be_more_than_none(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
    assert "--minutes must be more than 0, got 0" in capsys.readouterr().err


def attention(participant, tokens, head_dim, rate, **more):
    rates = {"forward_tflops": rate, "step_tflops": rate / 2, "forward_seconds": 1 / rate, "step_seconds": 2 / rate}
    speed = {"forward_tokens_per_second": 4, "step_tokens_per_second": tokens // 2**14 if "x" in participant else 7}
    beside = {"beside": {"forward_tflops": 100.0, "step_tflops": 100.0}}
    result = {"participant": participant, "tokens": tokens, "head_dim": head_dim, "dtype": "bfloat16", **rates}
    return {"status": "passed", "kind": "attention", "result": result | speed | beside | more}


def test_figures_and_plots_come_from_the_record(gpu, tmp_path):
    lengths = gpu.gpu_figures.LENGTHS
    units = {f"{d} {n}": attention("triton", n, d, 90.0 + d) for d in (64, 128) for n in lengths}
    units |= {f"s {d} {n}": attention("scheme sdpa", n, d, 20.0) for d in (64, 128) for n in lengths}
    units["dense"] = attention("dense cudnn", 2**16, 64, 308.0) | {"kind": "dense"}
    units["full"] = {"status": "passed", "kind": "attention", "result": {**units["64 65536"]["result"]}}
    units["full"]["result"] = {"participant": "sdpa", "tokens": 2**22, "head_dim": 64, "out_of_memory": True}
    parts = {"attention, forward": 0.1, "attention, backward": 0.2, "products": 0.3, "all other operators": 0.1}
    step = {"tokens": 2**20, "step_seconds": 2.0, "tokens_per_second": 524288, "peak_gib": 60.0, "parts": parts}
    units["step"] = {"status": "passed", "kind": "step", "result": step}
    units["broken"] = {"status": "failed", "kind": "attention", "output": ""}
    path = tmp_path / "gpu-x.json"
    path.write_text(json.dumps({"machine": MACHINE, "units": units}))
    shown = gpu.gpu_figures.figures(tmp_path)
    rows = {cells[1].strip(): cells[3].strip() for cells in (row.split("|") for row in shown.splitlines()[2:])}
    assert "NVIDIA H100 80GB HBM3, torch 2.13.0" in shown.splitlines()[0]
    assert rows["forward, heads of 64, over dense torch's flash op"] == "1.54 x"
    assert rows["forward and backward, heads of 128, over dense torch's flash op"] == "1.09 x"
    assert rows["forward, heads of 64, over dense cuDNN"] == "0.50 x"
    assert rows["forward, heads of 128, over dense cuDNN"] == "not measured"
    assert rows["step, heads of 64, over torchscale's scheme on the same ops"] == "7.70 x"
    assert rows["slowest over fastest tokens/s from 64k to 4M, heads of 64"] == "1.00"
    assert rows["step of the 125M model at 1,048,576 tokens on one GPU"] == "2.00 s, 524,288 tokens/s, 60.0 GiB"
    assert rows["tokens/s at 4,096"] == "not measured"
    drawn = gpu.gpu_figures.draw(path)
    assert [each.name for each in drawn] == ["gpu-x-attention.png", "gpu-x-step.png"]
    assert all(each.stat().st_size > 10_000 for each in drawn)


def test_shares_are_written_beside_those_of_other_devices(gpu, call, tmp_path):
    (tmp_path / "shares.json").write_text('{"A100": {"linear": 0.5}}')
    text = 'print(\'{"device": "H100", "linear": 0.7, "attention": 0.4}\')'
    call([unit(gpu, "shares of the peak", text, "shares")])
    kept = json.loads((tmp_path / "shares.json").read_text())
    assert kept["A100"] == {"linear": 0.5}
    assert (kept["H100"]["linear"], kept["H100"]["attention"]) == (0.7, 0.4)
    assert kept["H100"]["date"]


@pytest.mark.parametrize("tokens", [64, 50])
@pytest.mark.parametrize("heads", [4, 3])
def test_torchscales_scheme_is_the_function_that_it_is_compared_with(monkeypatch, tokens, heads):
    monkeypatch.syspath_prepend(str(FOLDER))
    import scheme

    q, k, v, grad = (torch.randn(2, tokens, heads, 8, requires_grad=i < 3) for i in range(4))
    pattern = Pattern.dilated((16, 32, 48), (1, 2, 3), True, "blocked")
    outs = [scheme.torchscale("sdpa", (16, 32, 48), (1, 2, 3))(q, k, v), attend(q, k, v, pattern, mix="detached")]
    torch.testing.assert_close(*outs)
    outcome, true = (torch.autograd.grad(out, (q, k, v), grad) for out in outs)
    torch.testing.assert_close(outcome, true, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scheme.dense("sdpa")(q, k, v), attend(q, k, v, Pattern.dense(True)))


@pytest.mark.parametrize("name", tiered(["auto", "scheme sdpa", "dense sdpa"], quick=[], full=["auto", "dense sdpa"]))
def test_a_participant_is_measured(name):
    words = ["--tokens", "1024", "--segments", "256,512", "--rounds", "1", "--device", "cpu", "--yardstick", "128"]
    command = [sys.executable, str(FOLDER / "gpu_attention.py"), "--participant", name, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    result = json.loads(outcome.stdout.splitlines()[-1])
    pairs = 1024 * 1025 // 2 if name.startswith("dense") else result_pairs()
    seconds = result["forward_seconds"]
    assert result["forward_tflops"] == pytest.approx(4 * 64 * 8 * pairs / seconds / 1e12, rel=0.02, abs=1e-3)
    assert result["beside"]["forward_tokens_per_second"] > 0
    assert result["peak_tensors"] > 1


def result_pairs():
    """The pairs that a head of two branches of 256 and 512 tokens shows in 1,024, each once."""
    first, second = 4 * 256 * 257 // 2, 2 * 256 * 257 // 2
    both = 4 * 128 * 129 // 2  # of the second branch's rows, those in the same segment of the first
    return first + second - both


@pytest.mark.long
def test_the_parts_of_a_step_are_measured(tmp_path):
    config = tmp_path / "small.yaml"
    branches = "[{segment_length: 16, is_causal: true}, {segment_length: 32, dilation_rate: 2, is_causal: true}]"
    sizes = f"vocab_size: 64, dim: 32, layers: 2, heads: 2, recompute: nothing, pattern: {{branches: {branches}}}"
    config.write_text(f"model: {{config: {{{sizes}}}}}")
    command = [sys.executable, str(FOLDER / "gpu_step.py"), "--device", "cpu", "--tokens", "256", "--config", config]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["recompute"] == "all but attention"
    assert all(seconds > 0 for seconds in (*result["parts"].values(), *result["phases"].values()))


def test_the_page_shows_the_figures_of_the_committed_records(gpu, capsys):
    assert gpu.main(["--figures"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs/gpu.md").read_text()


def test_the_check_says_first_what_is_missing(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_check
    import machine

    outcome = {
        "is_available": True,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (7, 5),
        "mem_get_info": (8 * 2**30, 80 * 2**30),
        "device_count": 2,
        "get_device_properties": SimpleNamespace(total_memory=80 * 2**30),
    }
    for name in outcome:
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: outcome[name])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} is built without CUDA" in gpu_check.refusal()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert gpu_check.refusal() == "compute capability 8.0 is needed, NVIDIA H100 80GB HBM3 has 7.5"
    outcome["get_device_capability"] = (9, 0)
    assert gpu_check.refusal() == "16 GiB of free memory are needed, NVIDIA H100 80GB HBM3 has 8.0 of 80.0"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "find_spec", lambda name: None)
        assert gpu_check.refusal() == "pytest and hypothesis must be installed: pip install -e '.[dev]'"
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    described = gpu_check.described()
    assert (described["gpu"], described["gpus"], described["driver"]) == ("NVIDIA H100 80GB HBM3", 2, "unknown")
    assert described["versions"]["torch"]
    outcome["is_available"] = False
    assert "finds no device; see nvidia-smi" in gpu_check.refusal()
