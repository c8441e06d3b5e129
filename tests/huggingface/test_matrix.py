"""All architectures by all kinds of attention, batches, ranks and exchanges, and the result that is committed."""

import json
from itertools import product

import matrix
import pytest
import torch
from architectures import ARCHITECTURES, whole_step
from matrix import ATTENTION, EVEN, RESULT, Row, Way

CELLS = {"1 rank": 18, "2 ranks": 18, "4 ranks": 18, "uneven": 48}  # kinds x exchanges x placements x numbers of ranks
REFUSED = {"uneven": 6}  # swap on 3 ranks


@pytest.mark.full
@pytest.mark.parametrize(("name", "attention"), list(product(ARCHITECTURES, ATTENTION)))
def test_all_cells_of_an_architecture_give_what_one_process_gives(pool, name, attention):
    row = Row(name, attention).fill(pool)
    assert not row.faults, "\n".join(row.faults)
    assert row.counts() == {"equal": CELLS, "refused": REFUSED}


@pytest.fixture
def step():
    """One step of a model, as the one rank of a world returns it."""
    matrix.expected.cache_clear()
    logits, loss, gradients = whole_step("Llama", "plain", length=EVEN)
    return [torch.arange(EVEN), logits, loss, gradients]


def test_a_cell_counts_as_equal_only_if_everything_is(step):
    way = Way("1 rank", 1, EVEN, "gather", "contiguous")
    row = Row("Llama", "own")
    row.add("plain", way, [step])
    assert (row.faults, row.counts()) == ([], {"equal": {"1 rank": 1}, "refused": {}})
    changed = {name: x.clone() for name, x in step[3].items()}
    changed["lm_head.weight"][0, 0] += 1e-6
    row.add("plain", way, [[*step[:3], changed]])
    row.add("plain", way, [[step[0], step[1] * (1 + 1e-9), *step[2:]]])
    row.add("plain", way, ["an error of the model"])
    assert [fault.partition("): ")[2].partition(" by ")[0] for fault in row.faults] == [
        "lm_head.weight differs",
        "logits differs",
        "an error of the model",
    ]
    with pytest.raises(AssertionError, match=r"lm_head\.weight differs by"):
        row.result()


def test_a_refusal_counts_only_with_its_reason_on_all_ranks(step):
    way = Way("uneven", 3, EVEN, "swap", "zigzag")
    message = "swap needs key heads that 3 ranks divide, got 2: use 'gather' or 'ring'"
    row = Row("Llama", "own")
    row.add("plain", way, [message] * 3)
    assert (row.faults, row.counts()) == ([], {"equal": {}, "refused": {"uneven": 1}})
    row.add("plain", way, [message, message, step])
    row.add("plain", way, [message, "another error", message])
    assert len(row.faults) == 2


def test_the_committed_result_has_all_cells_of_all_architectures():
    rows = json.loads(RESULT.read_text())["rows"]
    assert list(rows) == list(ARCHITECTURES)
    for name, attention in product(rows, ATTENTION):
        row = rows[name][attention]
        assert (row["equal"], row["refused"]) == (CELLS, REFUSED), (name, attention)
        assert row["largest_difference"] < matrix.TOLERANCE
        assert row.get("largest_rounded_difference", 0) < matrix.ROUNDED_TOLERANCE


def test_the_page_names_architectures_that_were_not_run():
    rows = json.loads(RESULT.read_text())["rows"]
    assert "Not run: Mistral" in matrix.table({"rows": {name: rows[name] for name in rows if name != "Mistral"}})
