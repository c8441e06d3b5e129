"""A real SLURM of two nodes runs the batch script that is shipped, and stops it, and queues it again."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from launched import ROOT, environment
from tiers import tiered

pytestmark = pytest.mark.long

SCRIPT = "examples/slurm/train.sbatch"
MODEL = ("--tokens=256", "--dim=32", "--layers=1", "--accelerator=cpu")
RANKS = ("--sequence-parallel-size=2", "--batch-size=1")  # two groups of two ranks
FEW_RANKS = ("--sequence-parallel-size=2", "--batch-size=2")  # a group of one rank on each node
STEPS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from slurm.cluster import Cluster

    result = Cluster(tmp_path_factory.mktemp("cluster"))
    yield result
    result.close()


@pytest.fixture(scope="module")
def alone():
    """The losses of one process, on batches as large as those of all ranks."""
    command = [sys.executable, "examples/train.py", *MODEL, "--batch-size=2", f"--steps={STEPS}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr
    return losses(result.stdout)


def losses(text):
    """(step, loss) as they were printed."""
    return [(int(step), float(loss)) for step, loss in re.findall(r"^step (\d+): loss (\S+)$", text, re.MULTILINE)]


def same(result, expected):
    assert [step for step, _ in result] == list(range(len(result)))
    torch.testing.assert_close(
        torch.tensor([x for _, x in result]),
        torch.tensor([x for _, x in expected[: len(result)]]),
        rtol=1e-4,
        atol=1e-4,
    )


class Job:
    def __init__(self, cluster, folder, *words, ranks=RANKS, tasks=2):
        self.cluster, self.folder, self.output = cluster, folder, folder / "output.txt"
        places = ("--chdir", str(ROOT), "--output", str(self.output), f"--ntasks-per-node={tasks}")
        options = (*MODEL, *ranks, "--folder", str(folder), *words)
        self.number = cluster.submit(*places, str(ROOT / SCRIPT), *options, **places_of_loopback())

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def await_step(self, step):
        patience = self.cluster.patience
        self.cluster.await_(lambda: f"step {step}: " in self.text(), patience, f"no step {step}\n{self.text()[-2000:]}")

    def start_again(self):
        """Have a requeued job start soon: SLURM itself waits for two minutes.

        Not at once: a node that ended the job refuses to start it again within the same second.
        """
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")

    def ended(self):
        """(its state, its exit status)"""
        result = self.cluster.await_state(self.number, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        return result["JobState"], int(result["ExitCode"].split(":")[0])

    def saved(self):
        return sorted(path.name for path in self.folder.iterdir() if "ckpt" in path.name)


def places_of_loopback():
    """Names of nodes mean nothing here."""
    return {**environment(), "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(("tasks", "ranks"), tiered([(1, FEW_RANKS), (2, RANKS)], quick=[], long=[(1, FEW_RANKS)]))
def test_losses_are_those_of_one_process_though_usr1_stops_it(cluster, alone, tmp_path, tasks, ranks):
    job = Job(cluster, tmp_path, f"--steps={STEPS}", "--pause=0.5", ranks=ranks, tasks=tasks)
    job.await_step(2)
    cluster.run("scancel", "--signal=USR1", job.number)
    cluster.await_state(job.number, "PENDING")
    assert job.saved() == ["hpc_ckpt_1.ckpt"]
    done = len(losses(job.text()))
    assert 3 <= done < STEPS
    job.start_again()
    assert job.ended() == ("COMPLETED", 0), job.text()
    assert cluster.about(job.number)["Restarts"] == "1"
    same(losses(job.text()), alone)  # each step once
    assert len(losses(job.text())) == STEPS
    assert job.text().endswith("done\n")
    assert f"saved step {done} as {tmp_path / 'hpc_ckpt_1.ckpt'}" in job.text()
    assert job.saved() == ["hpc_ckpt_1.ckpt"]


@pytest.mark.parametrize("signalled", tiered(["all ranks", "rank 2"], quick=[], long=[]))
def test_sigterm_ends_it_with_one_checkpoint(cluster, alone, tmp_path, signalled):
    job = Job(cluster, tmp_path, "--steps=10000", "--pause=0.3")
    job.await_step(2)
    if signalled == "all ranks":
        cluster.run("scancel", "--signal=TERM", job.number)
    else:
        subprocess.run(["kill", "-TERM", rank_of(job, 2)], check=True, timeout=10)
    assert job.ended() == ("FAILED", 143), job.text()
    same(losses(job.text())[: len(alone)], alone)
    assert job.saved() == ["hpc_ckpt_1.ckpt"]


@pytest.mark.full
def test_a_rank_that_is_killed_has_the_job_queued_again(cluster, alone, tmp_path):
    job = Job(cluster, tmp_path, f"--steps={STEPS}", "--pause=0.5", "--save-every=2")
    job.await_step(4)
    subprocess.run(["kill", "-KILL", rank_of(job, 2)], check=True, timeout=10)
    cluster.await_state(job.number, "PENDING")
    assert "rank 2 was ended by SIGKILL" in job.text()
    job.start_again()
    assert job.ended() == ("COMPLETED", 0), job.text()
    result = losses(job.text())
    resumed = [step for (before, _), (step, _) in pairwise(result) if step <= before]
    assert len(resumed) == 1  # once, from a checkpoint
    assert resumed[0] >= 4
    assert resumed[0] % 2 == 0
    same(sorted(dict(result).items()), alone)
    assert len(dict(result)) == STEPS


@pytest.mark.full  # SLURM takes its time to miss a node
def test_a_node_whose_daemon_is_killed_has_the_job_queued_again(alone, tmp_path_factory, tmp_path):
    from slurm.cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("failing"), daemon_timeout=10)
    try:
        job = Job(cluster, tmp_path, f"--steps={STEPS}", "--pause=4", "--save-every=1")
        job.await_step(1)
        former = rank_of(job, 2)
        cluster.kill_daemon(1)
        cluster.await_state(job.number, "PENDING")  # SLURM queues it by itself
        cluster.await_(lambda: not Path("/proc", former).exists(), 60, "rank 2 goes on without its job")
        cluster.start_daemon(1)
        job.start_again()
        assert job.ended() == ("COMPLETED", 0), job.text()
        assert cluster.about(job.number)["Restarts"] == "1"
    finally:
        cluster.close()
    result = losses(job.text())
    same(sorted(dict(result).items()), alone)
    assert len(dict(result)) == STEPS
    assert len(result) < STEPS + 3  # it resumed from a checkpoint


def rank_of(job, number):
    """Return the pid of a rank, not of its supervisor."""
    expected = {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={number}"}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = (path.parent / "cmdline").read_text()
            is_rank = "train.py" in command and "supervise" not in command
            if is_rank and expected <= set(path.read_text().split("\0")):
                return path.parent.name
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    raise AssertionError(f"no rank {number} of job {job.number}")
