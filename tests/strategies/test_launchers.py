"""Whatever starts the ranks, they train alike."""

import sys

import pytest
from launched import end_group, ended, losses, start, start_forked
from workers import free_port

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def run_forks(folder):
    """Return the status of ranks that Lightning's launcher forks."""
    return ended(start_forked(folder, kind="fsdp2"), folder)


@pytest.fixture(scope="module")
def by_lightning(forking_process, tmp_path_factory):
    """The losses of ranks that Lightning's own launcher started."""
    folder = tmp_path_factory.mktemp("lightning")
    assert forking_process.result(run_forks, folder) == 0, (folder / "output.txt").read_text()
    result = losses(folder, 0)
    assert sorted(result) == [0, 1, 2]
    assert losses(folder, 1) == result
    return result


@pytest.mark.full
def test_torchrun(by_lightning, tmp_path):
    process = start(tmp_path, *TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", kind="fsdp2")
    assert ended(process, tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert losses(tmp_path, 0) == losses(tmp_path, 1) == by_lightning


@pytest.mark.long
def test_torchrun_with_two_agents(by_lightning, tmp_path):
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two-agents")
    command = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *rendezvous)
    agents = [start(tmp_path, *command, kind="fsdp2", devices=1, nodes=2) for _ in range(2)]
    try:
        assert [ended(agent, tmp_path) for agent in agents] == [0, 0], (tmp_path / "output.txt").read_text()
    finally:
        for agent in agents:
            end_group(agent)
    assert losses(tmp_path, 0) == losses(tmp_path, 1) == by_lightning
