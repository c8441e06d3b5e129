"""Which ends of the batch script have its job queued again, with commands in the place of SLURM's."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"


def run(folder, status, restarts):
    """The exit status of the script where the ranks end with one, and how often its job was queued again so far."""
    for name, text in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" >> "{folder}/requeues"')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    result = subprocess.run(["bash", str(SCRIPT)], env=environment, cwd=folder, timeout=20)
    requeues = folder / "requeues"
    return result.returncode, len(requeues.read_text().splitlines()) if requeues.exists() else 0


def test_failures_count_and_ends_of_the_time_limit_do_not(tmp_path):
    assert run(tmp_path, 137, restarts=30) == (137, 1)
    for _ in range(12):
        status, requeues = run(tmp_path, 1, restarts=0)
    assert (status, requeues) == (1, 10)


@pytest.mark.parametrize("status", [0, 2, 143])
def test_the_end_of_a_job_is_no_failure(tmp_path, status):
    assert run(tmp_path, status, restarts=0) == (status, 0)
    assert not (tmp_path / "runs/7/failures").exists()
