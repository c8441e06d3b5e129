"""Processes that wait for the word of the first rank: they begin as ranks, or end without a sound."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.distributed import _suggested_max_num_threads

from lightning_longnet.cli import early
from lightning_longnet.strategies.launcher import WatchedLauncher
from lightning_longnet.supervision import standby

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
# notes what it has before its word, and what after it
PROGRAM = """
import os, sys
from pathlib import Path
from lightning_longnet.supervision import standby
names = ("LOCAL_RANK", "OMP_NUM_THREADS", "WORLD_SIZE", "MASTER_PORT", "LIGHTNING_LONGNET_LAUNCHER")
note = lambda: print(*(os.environ.get(name) for name in names), flush=True)
assert standby.prepare()
sys.stdout = Path(sys.argv[1], os.environ["LOCAL_RANK"]).open("w")
note()
standby.await_word()
note()
"""


@pytest.fixture
def alone(monkeypatch):
    """An environment without ranks, whose changes end with the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored to what it is now
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    standby.dismiss()
    torch.set_num_threads(threads)


def started(folder, count):
    standby.start([sys.executable, "-c", PROGRAM, str(folder)], count)
    return [each.process for each in standby._WAITING]


def launched(ranks):
    launcher = WatchedLauncher(LightningEnvironment(), ranks, 1)
    launcher._call_children_scripts()
    return launcher


def test_ranks_that_wait_begin_with_the_environment_of_the_launcher(alone, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    processes = started(tmp_path, 2)
    launcher = launched(3)
    assert launcher.procs == processes  # no others were started
    assert [each.wait(60) for each in processes] == [0, 0]
    threads = str(_suggested_max_num_threads(3))
    assert torch.get_num_threads() == int(threads)
    for rank in (1, 2):
        before, after = map(str.split, (tmp_path / str(rank)).read_text().splitlines())
        assert before == [str(rank), threads, "None", "None", "None"]
        assert after == [str(rank), threads, "3", os.environ["MASTER_PORT"], str(os.getpid())]
    assert os.environ["LOCAL_RANK"] == "0"
    assert "LIGHTNING_LONGNET_LAUNCHER" not in os.environ


def test_another_number_of_ranks_is_started_anew(alone, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    processes = started(tmp_path, 2)
    environments = []
    monkeypatch.setattr(standby.subprocess, "Popen", lambda _, env, **__: environments.append(env))
    launched(4)
    assert all(each.returncode is not None for each in processes)
    assert [each["LOCAL_RANK"] for each in environments] == ["1", "2", "3"]
    # Lightning sets the threads of the first rank alone
    assert {each["OMP_NUM_THREADS"] for each in environments} == {str(_suggested_max_num_threads(4))}
    assert torch.get_num_threads() == _suggested_max_num_threads(4)


def test_a_rank_without_a_word_ends(alone, monkeypatch, tmp_path):
    """The process that started it has ended, whatever ended it."""
    monkeypatch.chdir(ROOT)
    (process,) = started(tmp_path, 1)
    os.close(standby._WAITING.pop().pipe)
    assert process.wait(60) == 0
    assert len((tmp_path / "1").read_text().splitlines()) == 1


@pytest.mark.long
def test_the_command_line_begins_ranks_before_it_imports_torch():
    """They are as many as the configuration says, and of a command that fails none is left."""
    code = (
        "import os, sys\n"
        "os.cpu_count = lambda: 2\n"
        "from lightning_longnet.cli import main\n"
        "from lightning_longnet.supervision import standby\n"
        "start, dismiss = standby.start, standby.dismiss\n"
        "def noted(command, count):\n"
        "    print(count, command[-1], 'torch' in sys.modules)\n"
        "    start([sys.executable, '-c', 'import time; time.sleep(300)'], count)\n"
        "def ended():\n"
        "    processes = [each.process for each in standby._WAITING]\n"
        "    dismiss()\n"
        "    print([each.returncode for each in processes])\n"
        "standby.start, standby.dismiss = noted, ended\n"
        "sys.argv[0] = 'longnet'\n"
        "sys.exit(main())\n"
    )
    words = ["fit", "--config", "configs/quickstart.yaml", "--trainer.devices", "2", "--trainer.max_steps=some"]
    environment = {name: text for name, text in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert result.stdout.splitlines() == ["1 --trainer.max_steps=some False", "[-15]"], result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--config configs/quickstart.yaml", 1),
        ("--config=configs/quickstart.yaml --trainer.devices=3", 2),
        ("--trainer.devices [0,2,3] --trainer.strategy ring_sequence_parallel_ddp", 2),
        ('--trainer {"devices":2,"strategy":{"class_path":"lightning_longnet.RingSequenceParallelStrategy"}}', 1),
        ("--config configs/quickstart.yaml --trainer.devices 1", 0),
        ("--config configs/quickstart.yaml --trainer.devices auto", 0),
        ("--config configs/quickstart.yaml --trainer.devices 5", 0),  # more than there are cores
        ("--config configs/quickstart.yaml --trainer.strategy ddp", 0),  # whose launcher starts its own
        ("--config configs/quickstart.yaml --print_config", 0),
        ('--trainer {"devices":2,"strategy":["ring_sequence_parallel"]}', 0),  # the parser refuses it
        ('--trainer {"devices":2,"strategy":{"class_path":{}}}', 0),
        ("--config pyproject.toml", 0),
        ("--trainer {", 0),
    ],
)
def test_the_number_of_other_ranks_is_that_of_words_and_files(monkeypatch, words, count):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert early.other_ranks(words.split()) == count


@pytest.mark.parametrize("name", early._RANKS)
def test_ranks_of_a_launcher_start_no_others(alone, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(early, "_own_command", lambda: [sys.executable])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    counts = []
    monkeypatch.setattr(standby, "start", lambda _, count: counts.append(count))
    early.start_ranks(["--config", "configs/quickstart.yaml"])
    monkeypatch.setenv(name, "1")
    early.start_ranks(["--config", "configs/quickstart.yaml"])
    assert counts == [1]


def test_other_programs_start_no_ranks(monkeypatch):
    """Lightning starts them by the words of the program, once it has made its Trainer."""
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    assert early._own_command() is None
