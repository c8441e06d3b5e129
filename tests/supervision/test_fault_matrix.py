"""Whatever becomes of a rank, wherever it is: all ranks end in time, the status says so, and the last line names it."""

import re
import socket
import subprocess
import sys
import threading
from functools import partial

import forking  # noqa: F401  has the folder of `faults_of_ranks` in the path
import pytest
import torch
from program import FAULTS, PHASES
from supervised import WORDS, check_end, command, ended, environment, losses, start
from tiers import tiered
from workers import free_port

import faults_of_ranks  # isort: skip


RANKS = (0, 1)
MATRIX = [(fault, rank, phase) for fault in FAULTS for rank in RANKS for phase in PHASES]
UNSUPERVISED = [("exception", "validation", "ddp"), ("exit 0", "save", "fsdp2")]
FORKS = [
    *(("exit 0", 1, "forward"), ("exit 3", 0, "save"), ("abort", 1, "validation"), ("segfault", 0, "backward")),
    *(("SIGINT", 1, "forward"), ("SIGTERM", 1, "validation"), ("SIGKILL", 0, "save"), ("SIGSTOP", 0, "forward")),
    *(("endless loop", 1, "load"), ("GIL held", 0, "validation")),
]


@pytest.mark.parametrize(("fault", "rank", "phase"), tiered(MATRIX, quick=[], long=[]))
def test_a_fault(tmp_path, saved, fault, rank, phase):
    resume = str(saved / "step=2.ckpt") if phase == "load" else None
    process = start(tmp_path, "--restarts", "0", fault=fault, rank=rank, phase=phase, resume=resume)
    status, lines, seconds, left = ended(process, tmp_path)
    check_end(fault, rank, phase, (tmp_path / "failed").exists(), status, lines, seconds, left)


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """The folder of a run that ended well, where a case loads one of its checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    if not any("load" in item.name for item in request.session.items if "test_a_fault[" in item.name):
        return folder
    process = start(folder, "--restarts", "0", steps=2)
    status, lines, _, left = ended(process, folder)
    assert (status, left) == (0, []), "\n".join(lines)
    return folder


@pytest.fixture(scope="module")
def saved_by_forks(forking_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks") / "saved"
    forking_process.result(faults_of_ranks.saved, folder, "ddp")
    return folder


@pytest.mark.parametrize(("fault", "rank", "phase"), tiered(FORKS, quick=[], long=FORKS[::2]))
def test_a_fault_of_forked_ranks(tmp_path, forking_process, saved_by_forks, fault, rank, phase):
    """The assertions are those of `check_end`, in the process that forks."""
    shown = forking_process.result(faults_of_ranks.cell, tmp_path, saved_by_forks, "ddp", fault, rank, phase)
    assert shown["status"] != 0
    assert f"rank {rank} " in shown["last_line"]
    assert WORDS[fault] in shown["last_line"]


@pytest.mark.parametrize("kind", tiered(["ddp", "fsdp2"], quick=[], full=["ddp"]))
def test_a_run_that_is_killed_is_restarted_and_equal(tmp_path, forking_process, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, options in ((whole, {}), (killed, {"fault": "SIGKILL", "rank": 1, "phase": "backward"})):
        folder.mkdir()
        run = partial(faults_of_ranks.run, folder, restarts=3, kind=kind, **options)
        status, lines, _, left = forking_process.result(run)
        assert (status, left) == (0, []), "\n".join(lines)
    assert "rank 1 was ended by SIGKILL" in (killed / "output.txt").read_text()
    assert dict(losses(killed)) == dict(losses(whole))
    assert [step for step, _ in losses(killed)] == [0, 1, 2, 3, 2, 3, 4, 5]  # from step=2.ckpt
    expected, result = (torch.load(folder / "parameters.pt") for folder in (whole, killed))
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.full
def test_torchrun_restarts_the_ranks_and_they_go_on(tmp_path):
    # else torchrun keeps a store whose addresses of gloo are those of the ranks that ended
    variables = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = [*agent, "-m", "lightning_longnet.supervise", "--stall", "5", "--"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*words, *command(tmp_path, fault="endless loop", rank=1, phase="forward")], stdout=output, stderr=output,
            cwd=tmp_path, env=variables,
        )  # fmt: skip
    status, lines, _, left = ended(process, tmp_path)
    text = "\n".join(lines)
    assert (status, left) == (0, []), text
    assert "rank 1 made no progress for" in text  # its supervisor or that of the rank that waits sees it first
    assert [step for step, _ in losses(tmp_path)] == [0, 1, 2, 2, 3, 4, 5], text  # from step=2.ckpt


def outputs(folder, world, **options):
    """(exit statuses, what each rank printed, by writes) of ranks that no launcher of Lightning's started."""
    port, processes, printed, readers = str(free_port()), [], [[] for _ in range(world)], []
    for rank in range(world):
        names = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        reads, output = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # which keeps writes distinct
        with output:
            processes.append(
                subprocess.Popen(
                    command(folder, devices=world, timeout=60, **options), stdout=output, stderr=output, cwd=folder,
                    env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **names),
                )
            )  # fmt: skip
        readers.append(threading.Thread(target=read, args=(reads, printed[rank]), daemon=True))
        readers[-1].start()
    try:
        statuses = [each.wait(200) for each in processes]
    finally:
        for each in processes:
            each.kill()
    for each in readers:
        each.join(30)
    return statuses, printed


def read(reads, writes):
    """Append what each write to a socket sends, until it is closed."""
    with reads:
        while content := reads.recv(2**20):
            writes.append(content.decode())


def lines_of(printed):
    return ["".join(writes).strip().splitlines() for writes in printed]


@pytest.mark.parametrize(("fault", "phase", "kind"), tiered(UNSUPERVISED, quick=[], long=UNSUPERVISED[:1]))
def test_each_rank_names_the_first_without_a_supervisor(tmp_path, fault, phase, kind):
    statuses, writes = outputs(tmp_path, 2, fault=fault, rank=1, phase=phase, kind=kind)
    printed = lines_of(writes)
    last = [lines[-1] for lines in printed]
    assert 0 not in statuses, last
    assert "because another rank failed first: rank 1 of 2" in last[0], last
    assert all(f"rank 1 of 2, in {phase} of step" in line and WORDS[fault] in line for line in last), last
    frames = [sum(line.lstrip("[rank01]: ").startswith("File ") for line in lines) for lines in printed]
    if fault == "exception":
        assert frames[0] < 8, "a rank that lost its connection prints where the run was started, and no more"
        assert frames[1] > 15
        for rank in range(2):  # the ranks' errors do not interleave where they print to one terminal or file
            assert "Traceback" in writes[rank][-1], writes[rank]
            assert last[rank] in writes[rank][-1], writes[rank]


@pytest.mark.parametrize("ranks", tiered([[0, 1], [2, 3]], quick=[], long=[]))
@pytest.mark.parametrize("kind", tiered(["ddp", "fsdp2"], quick=[], full=["fsdp2"]))
def test_an_error_of_one_group_ends_all_ranks_by_its_name(tmp_path, kind, ranks):
    """Where the group of rank 0 fails, rank 0 holds what it reports until the others have read it."""
    options = {"fault": "exception", "ranks": ranks, "phase": "forward", "kind": kind, "size": 2}
    statuses, printed = outputs(tmp_path, 4, **options)
    assert statuses == [1] * 4
    for rank, lines in enumerate(lines_of(printed)):
        assert "of step 3: OSError: the disk is gone" in lines[-1], lines[-1]
        if rank not in ranks:
            assert re.search(
                rf"rank {rank} of 4, .* another rank failed first: rank [{ranks[0]}{ranks[1]}] of 4", lines[-1]
            )
