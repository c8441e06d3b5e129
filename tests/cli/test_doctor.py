"""`longnet doctor`, as a newcomer calls it, and under the launchers of a cluster."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_longnet
from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.diagnosis.exactness import Finding
from lightning_longnet.diagnosis.ranks import Answers

ROOT = Path(__file__).parents[2]
EXACT = r"  {} +3 patterns, largest error \d\.\de-1\d, \d+\.\d\d s +exact\n"
EXCHANGES = ("gather", "ring", "swap", "local")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_is_shown(capsys, monkeypatch):
    def versions(name, result=None):
        from importlib.metadata import PackageNotFoundError, version

        if name == "deepspeed":
            raise PackageNotFoundError
        return version(name)

    monkeypatch.setattr("lightning_longnet.diagnosis.machine.version", versions)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  lightning-longnet {lightning_longnet.__version__}\n" in shown
    assert re.search(r"\n  deepspeed +not installed: pip install 'lightning-longnet\[deepspeed\]' for ", shown)
    assert re.search(r"\n  cpu +.*\d+ cores, \d+ threads, \d+\.\d GiB, \d+\.\d GiB free\n", shown)
    assert re.search(r"\nkernels of attend on cpu\n  flash +refuses float32, bfloat16: serves CUDA tensors", shown)
    assert re.search(r"\n  sdpa +runs float32, bfloat16\n", shown)
    assert re.search(r"\n  gloo +available\n", shown)
    assert "exact" not in shown


@pytest.mark.long
def test_two_ranks_are_checked(capsys):
    assert main(["doctor", "--ranks", "2", "--backend", "gloo"]) == 0
    shown = capsys.readouterr().out
    assert "2 ranks over gloo, forward and backward, beside one process\n" in shown
    assert re.search("".join(map(EXACT.format, EXCHANGES)), shown), shown
    assert shown.endswith("all exchanges are exact to rounding\n")


def test_what_is_wrong_is_shown(capsys, monkeypatch):
    ring = [Finding("ring", 3, error, 1e-10, 0.5) for error in (1e-16, 0.25)]
    answers = Answers([[Finding("gather", 3, 1e-16, 1e-10, 0.25)] * 2, ring], ["rank 1 gave no answer in swap"])
    monkeypatch.setattr("lightning_longnet.diagnosis.ranks.ask", lambda *_: answers)
    assert main(["doctor", "--ranks", "2"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-4:] == [
        "  gather   3 patterns, largest error 1.0e-16, 0.25 s   exact",
        "  ring     3 patterns, largest error 2.5e-01, 0.50 s   WRONG, more than 1e-10",
        "  rank 1 gave no answer in swap",
        "something is wrong: see above",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks=0"], "--ranks must be at least 1, got 0"),
        (["--ranks=2", "--timeout=0"], "--timeout must be more than 0, got 0"),
        (["--ranks=2", "--timeout=nan"], "--timeout must be more than 0, got nan"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err == f"longnet: error: {message}\n"


def test_the_number_of_ranks_is_that_of_the_launcher(capsys, monkeypatch):
    environment = {"RUN_ID": "x", "USE_AGENT_STORE": "True"}
    environment = {f"TORCHELASTIC_{name}": value for name, value in environment.items()}
    environment |= {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--ranks", "2"]) == 2
    assert "--ranks must be the number that torchrun has started, 4, got 2" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "", "rank 0 shows the machine"


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.full
def test_ranks_of_torchrun_are_used(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "lightning_longnet", "doctor", "--ranks=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("versions\n") == 1
    assert re.search("".join(map(EXACT.format, EXCHANGES)), result.stdout), result.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from slurm.cluster import Cluster

    result = Cluster(tmp_path_factory.mktemp("cluster"))
    yield result
    result.close()


@pytest.mark.full
def test_ranks_of_slurm_generate_a_text(cluster, tmp_path, capsys):
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(Pattern.dilated((8, 64), (1, 2), is_causal=True), dim=16, layers=1, heads=4))
    torch.nn.init.normal_(model.embedding.weight)
    write_checkpoint(model, tmp_path / "a.ckpt")
    words = ["generate", str(tmp_path / "a.ckpt"), "--prompt=abc", "--tokens=20", "--temperature=0"]
    assert main(words) == 0
    places = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_longnet", *words]
    shown = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, **places)
    assert shown.startswith(capsys.readouterr().out), shown
    assert shown.count("abc") == 1


@pytest.mark.full
def test_ranks_of_slurm_are_used(cluster):
    doctor = [sys.executable, "-m", "lightning_longnet", "doctor", "--ranks=2"]
    places = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *doctor, **places)
    assert shown.count("versions\n") == 1
    assert re.search("".join(map(EXACT.format, EXCHANGES)), shown), shown
