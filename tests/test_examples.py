"""The examples, as they are started by those who read them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import programs
from tiers import tiered

ROOT = Path(__file__).parents[1]


def run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_attention_alone():
    ((status, shown, _),) = programs([[ROOT / "examples/attend.py"]])
    assert status == 0
    (difference,) = re.findall(r"largest difference to the dense definition: (\S+)", shown)
    assert float(difference) < 1e-5


@pytest.mark.long
def test_plain_pytorch_learns_alike_on_one_process_and_on_two():
    alone = run("examples/plain_pytorch.py")
    shared = run("-m", "torch.distributed.run", "--nproc-per-node=2", "examples/plain_pytorch.py")
    assert "500 of 1,000 tokens here" in shared
    losses = [list(map(float, re.findall(r"loss (\S+),", text))) for text in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.full  # test_slurm.py runs it, too
def test_the_trainer_in_python_ends_with_a_text(tmp_path):
    words = ["--devices=2", "--accelerator=cpu", "--steps=3", "--tokens=256", "--dim=32", f"--folder={tmp_path}"]
    shown = run("examples/train.py", *words)
    assert re.findall(r"^step (\d)", shown, flags=re.MULTILINE) == ["0", "1", "2"]
    assert "def main(" in shown
    assert "done" in shown


@pytest.mark.full
def test_images_are_distinguished_better_than_by_chance():
    (share,) = re.findall(r"([\d.]+)% are told rightly, by 2 processes", run("examples/longvit.py"))
    assert float(share) > 50


@pytest.mark.long
def test_a_model_of_transformers_is_trained_by_two_processes_and_read_by_transformers():
    shown = run("examples/huggingface.py", "--steps=10", "--tokens=256")
    assert "2 ranks equal one process" in shown or "validation loss" in shown
    assert "def main(" in shown
    assert "done" in shown


LOOPS = [("accelerate_loop", r"step 7: loss (\S+),"), ("transformers_trainer", r"evaluation loss (\S+)")]


@pytest.mark.parametrize(("example", "last"), tiered(LOOPS, quick=[], long=[]))
def test_loops_of_hugging_face_learn_alike_on_one_process_and_on_two(example, last):
    alone = run(f"examples/{example}.py")
    shared = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"examples/{example}.py")
    losses = [float(re.search(last, text).group(1)) for text in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[1] < 3  # of 4.16 = log(64) at the beginning
