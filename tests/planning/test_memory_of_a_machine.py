"""What memory a rank has, and what a plan says beside it."""

import pytest
from tiers import tiered

from lightning_longnet import LongNetConfig, Pattern
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.preflight import LEAST, compare
from lightning_longnet.planning.room import Room, host_room
from lightning_longnet.planning.run import peak_of

PATTERN = Pattern.dilated((16, 64), (1, 2), is_causal=True)
GIB, KIB = 2**30, 2**10


def job(**changes):
    config = {"dim": 32, "layers": 2, "heads": 2, "vocab_size": 64} | changes.pop("config", {})
    return Job(LongNetConfig(PATTERN, **config), tokens=256, **changes)


@pytest.fixture
def machine(tmp_path):
    """A machine of 8 GiB of which 6 are available, with 1 GiB of swap, and a function that adds a control group."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    memory = {"MemTotal": 8 * GIB, "MemFree": GIB, "MemAvailable": 6 * GIB, "SwapTotal": GIB}
    (proc / "meminfo").write_text("".join(f"{name}:  {size // KIB} kB\n" for name, size in memory.items()))
    (proc / "self/status").write_text(f"Name: python\nVmRSS:  {GIB // KIB} kB\n")

    def limit(group, files):
        (proc / "self/cgroup").write_text(group)
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)

    return lambda ranks=1: host_room(ranks, proc, tmp_path / "cgroup"), limit


def test_the_memory_of_a_host_is_shared_by_its_ranks(machine, tmp_path):
    room, _ = machine
    assert room() == Room(7 * GIB, 9 * GIB)
    assert room(2) == Room(4 * GIB, 4.5 * GIB), "what this process holds is its own"
    assert host_room(1, tmp_path / "nowhere", tmp_path) is None


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/job\n", {"job/memory.max": f"{2 * GIB}\n", "job/memory.current": str(GIB)}),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n", "memory.current": str(GIB)}),
        (
            "0::/job/step\n",
            {
                **{"job/step/memory.max": "max\n", "job/step/memory.current": str(GIB)},
                **{"job/memory.max": str(2 * GIB), "job/memory.current": str(GIB)},
            },
        ),
        (
            "3:cpu:/x\n5:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": str(2 * GIB), "memory/job/memory.usage_in_bytes": str(GIB)},
        ),
    ],
)
def test_the_limit_of_a_control_group_counts(machine, group, files):
    room, limit = machine
    limit(group, files)
    assert room() == Room(2 * GIB, 3 * GIB)


def test_a_group_without_a_limit_changes_nothing(machine):
    room, limit = machine
    limit("5:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"})
    assert room() == Room(7 * GIB, 9 * GIB)


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=["fsdp2"], long=[]))
def test_a_plan_is_compared_with_what_is_free_and_with_what_there_is(sharding):
    run = job(sharding=sharding, per_node=2)
    peak = peak_of(run)
    assert compare(run, Room(1.01 * peak, 1.01 * peak)) == ("", "")
    error, warning = compare(run, Room(0.99 * peak, peak))
    assert not error, "a plan may be a little wrong: no run is refused that could fit"
    assert "about 0.0 GiB on a rank by longnet plan" in warning
    error, warning = compare(run, Room(0.9 * LEAST * peak, 0.99 * LEAST * peak))
    assert not warning
    assert "memory_check='off'" in error


@pytest.mark.long
def test_the_advice_is_that_of_longnet_plan():
    run = job(sharding="ddp", batch=4, config={"layers": 8})
    room = 0.6 * peak_of(run)
    error, _ = compare(run, Room(room, room))
    assert "it would fit with --model.config.recompute 'all but attention' (about" in error
    assert "--data.batch_size 1" in error


def test_what_clearly_fits_is_not_traced(monkeypatch):
    monkeypatch.setattr("lightning_longnet.planning.preflight.peak_of", None)  # a call would fail
    assert compare(job(), Room(GIB, GIB)) == ("", "")


@pytest.mark.parametrize("changes", [{}, {"sharding": "ddp"}, {"per_node": 4}, {"config": {"vocab_size": 4000}}])
def test_the_rough_estimate_is_never_less_than_the_plan(changes):
    from lightning_longnet.planning.engines import Weights
    from lightning_longnet.planning.preflight import _rough

    run = job(**changes)
    assert _rough(run, Weights.of(run)) > peak_of(run)
