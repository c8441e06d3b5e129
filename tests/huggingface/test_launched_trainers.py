"""A loop of accelerate and transformers' own Trainer on two processes, beside plain loops with transformers' attention.

`launched_trainers.py` runs the programs of `examples`, in float64.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launched_trainers import CASES, ROWS, STEPS, TOKENS, decoder, gradients, options, trainer_rows
from torch.utils.data import DistributedSampler

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The outcomes of all cases on each of two ranks."""
    folder = tmp_path_factory.mktemp("launched")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "launched_trainers.py"), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, cwd=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert all(list(each) == list(CASES) for each in result)
    return result


def stepped(net, batches, clip=None):
    """Return the losses of a plain loop, whose batches are rows with labels that are shifted."""
    optimizer, losses = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.01 if clip is None else 0.0), []
    for batch in batches:
        labels = batch.pop("labels")
        loss = F.cross_entropy(net(**batch).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def loop_batches(count, many, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from accelerate_loop import rows

    result = rows(count, TOKENS)
    if many == 2:
        return [stacked(result[i : i + 2]) for i in range(0, count, 2)]
    # each rank takes two of the rows of its own
    return [stacked([result[i], result[i + 2], result[i + 1], result[i + 3]]) for i in range(0, count, 4)]


@pytest.mark.parametrize(
    ("case", "count", "many"),
    [("first step", 2, 2), ("loop", 2 * STEPS, 2), ("loop, other rows on each rank", 4 * STEPS, 4)],
)
def test_a_loop_of_accelerate_trains_as_one_process(ranks, case, count, many, monkeypatch):
    net = decoder("sdpa")
    expected = stepped(net, loop_batches(count, many, monkeypatch))
    tolerance = 1e-12 if case == "first step" else 1e-9  # AdamW divides by gradients that are nearly 0
    for outcomes in ranks:
        losses, result = outcomes[case]
        assert losses == pytest.approx(expected, rel=tolerance)
        for name, gradient in gradients(net).items():
            assert (result[name] - gradient).norm() < tolerance * gradient.norm(), name


def shifted(rows):
    batch = stacked(rows)
    return {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


@pytest.mark.parametrize("case", ["trainer", "trainer, packed rows"])
def test_the_trainer_of_transformers_trains_and_evaluates_as_one_process(ranks, tmp_path, case):
    """Two accumulated batches have other numbers of labels, and count by them."""
    seed, rows = options(tmp_path).seed, trainer_rows()
    sampler, chosen = DistributedSampler(rows, 1, 0, seed=seed), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        chosen += [rows[i] for i in sampler]
    net = decoder("sdpa")
    expected = stepped(net, [shifted(chosen[4 * i : 4 * i + 4]) for i in range(STEPS)], clip=1.0)
    batch = shifted(trainer_rows(4))
    assert len(batch["labels"]) == ROWS
    reference = batch.pop("labels")
    with torch.no_grad():
        evaluated = F.cross_entropy(net(**batch).logits.flatten(0, 1), reference.flatten()).item()
    for outcomes in ranks:
        losses, loss, weights = outcomes[case]
        assert losses == pytest.approx(expected, rel=1e-6)  # the Trainer logs float32
        assert loss == pytest.approx(evaluated, rel=1e-6)
        for name, x in net.state_dict().items():
            torch.testing.assert_close(weights[name], x, rtol=1e-9, atol=1e-9)


def test_other_rows_on_ranks_that_share_them_are_refused(ranks):
    """Loaders that accelerate prepares give each rank other rows."""
    for outcomes in ranks:
        assert "ranks that share sequences must be given the same batches" in outcomes["rows of accelerate"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("counts of each rank", "average_tokens_across_devices must be True"),
        ("metrics", "compute_metrics must be None and label_smoothing_factor 0"),
        ("smoothing", "compute_metrics must be None and label_smoothing_factor 0"),
    ],
)
def test_what_needs_whole_rows_on_a_rank_is_refused(ranks, case, message):
    for outcomes in ranks:
        assert message in outcomes[case]


def test_without_the_subclass_a_trainer_splits_no_row(ranks):
    """Its ranks train on other rows, each whole: as data parallelism does, and as it would without a context."""
    result = [outcomes["no subclass"] for outcomes in ranks]
    assert result[0] == result[1]
    with_context, without = result[0]
    assert with_context == pytest.approx(without, rel=1e-6)
    assert with_context != pytest.approx(ranks[0]["trainer"][0], rel=1e-3)
