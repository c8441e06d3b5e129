"""Ranks that check the exchanges: what is right, what is wrong, and what happens to a rank that does not answer."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from tiers import tiered

from lightning_longnet.diagnosis import exactness
from lightning_longnet.diagnosis.exactness import EXCHANGES, check_exchanges
from lightning_longnet.diagnosis.ranks import Answers, ask, local_world

ENDS = Path(__file__).parent / "ends.py"


def findings(group, scale=1.0, exchange=None):
    """What a rank finds where `exchange` multiplies its results."""
    attend, begun = exactness.attend, []

    def scaled(*tensors, **options):
        out = attend(*tensors, **options)
        return out * scale if options.get("exchange") == exchange else out

    exactness.attend = scaled
    try:
        return [*check_exchanges(group, torch.device("cpu"), begun.append)], begun
    finally:
        exactness.attend = attend


@pytest.mark.parametrize("ranks", tiered((1, 2, 3, 5), quick=(2,)))
def test_every_exchange_is_exact(pool, ranks):
    for result, begun in pool.run(ranks, findings):
        assert [each.exchange for each in result] == begun == [*EXCHANGES]
        assert all(each.is_exact for each in result), result
        assert max(each.error for each in result) < 1e-13
        assert all(each.patterns == 3 and each.seconds > 0 for each in result)


@pytest.mark.parametrize("scale", [1 + 1e-9, float("nan")])
@pytest.mark.parametrize("exchange", tiered(EXCHANGES, quick=("ring",)))
def test_a_wrong_exchange_is_found(pool, exchange, scale):
    for result, _ in pool.run(2, findings, scale, exchange):
        assert [each.exchange for each in result if not each.is_exact] == [exchange]
        assert not Answers([result], []).is_exact


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def asked(kind, ranks=2, timeout=60.0):
    """The answers, the seconds that they took, and the processes that are left."""
    before, begin = children(), time.monotonic()
    answers = ask(local_world(ranks), "gloo", timeout, (sys.executable, str(ENDS), kind))
    spent = time.monotonic() - begin
    return answers, spent, [pid for pid in children() - before if is_running(pid)]


def test_a_rank_that_does_not_answer_is_named_in_time():
    answers, spent, left = asked("asleep", timeout=1.0)
    assert answers.failures == [f"rank {rank} gave no answer before it had started" for rank in range(2)]
    assert spent < 5
    assert left == []


def test_a_rank_that_ends_is_named_with_its_last_words():
    answers, spent, left = asked("gone")
    expected = "rank 0 ended with status 7 before it had started: or something else"
    assert answers.failures[0] == expected
    assert spent < 10
    assert left == []


@pytest.mark.parametrize(
    ("kind", "timeout", "expected"),
    [
        pytest.param(
            "one asleep",
            15,
            {1: "gave no answer before it had started", 0: "gave no answer while connecting to the "},
            marks=pytest.mark.full,
        ),
        pytest.param("stopped", 20, {1: "gave no answer in ring", 0: "gave no answer in "}, marks=pytest.mark.full),
        pytest.param("killed", 90, {1: "ended with status -9 in ring"}, marks=pytest.mark.long),
        pytest.param("raising", 90, {1: r"failed in ring: RuntimeError: no such wire$"}, marks=pytest.mark.full),
    ],
)
def test_what_a_rank_did_last_is_named(kind, timeout, expected):
    answers, spent, left = asked(kind, timeout=timeout)
    for rank, words in expected.items():
        assert any(re.search(f"^rank {rank} {words}", line) for line in answers.failures), answers.failures
    assert not answers.is_exact
    assert spent < timeout + 5
    assert left == []


@pytest.mark.long
def test_a_wrong_rank_makes_the_exchange_wrong():
    answers, _, left = asked("wrong")
    assert answers.failures == []
    wrong = {each.exchange for ranks in answers.findings for each in ranks if not each.is_exact}
    assert wrong == {"ring"}
    assert not answers.is_exact
    assert left == []
