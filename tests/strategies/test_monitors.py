"""Every figure that a monitor logs, against a count of the same by other means, over meshes and unequal parts."""

from itertools import product

import pytest
import torch
from test_training import MESHES
from tiers import tiered
from torch.utils.flop_counter import FlopCounterMode
from trained import LENGTH, PATTERN, adamw, collated, samples, sgd, started, sums
from watched import PEAK, watch

STEPS, MICRO_BATCHES, SAMPLES = 2, 2, 4  # between logging steps; samples of all groups in a micro-batch


def last(result):
    return result["rows"][-1][1]


def enumerated(length):
    """Operations of a sample: the pairs that the pattern shows, and linear maps as torch counts them."""
    pairs = int((PATTERN.mask(length, 4, 2) > 0).sum())
    model = started({"dropout": 0.0, "dtype": torch.float64})
    batch = collated(samples(1, length))
    with FlopCounterMode(display=False) as counter:
        sums(model(batch), batch["labels"])[0].backward()
    return counter.get_total_flops() + 2 * 12 * 4 * pairs


EVERYWHERE = list(product(MESHES, ["ddp", "fsdp2"]))


@pytest.mark.parametrize(
    ("mesh", "sharding"),
    tiered(EVERYWHERE, quick=[("1x2", "ddp")], long=[]),
)
def test_throughput_is_that_of_all_ranks(trainers, mesh, sharding):
    world, size = MESHES[mesh]
    many = STEPS * MICRO_BATCHES * SAMPLES
    seconds = STEPS * MICRO_BATCHES * (1.25 + 0.5 * (world - 1))  # of the slowest, without validation
    for result in trainers.run(world, watch, size, sharding, sgd, LENGTH):
        figures = {key.removeprefix("throughput/"): value for key, value in last(result).items()}
        assert figures["tokens"] == 2 * many * LENGTH
        assert figures["samples_per_second"] == pytest.approx(many / seconds)
        assert figures["tokens_per_second"] == pytest.approx(many * LENGTH / seconds)
        assert figures["step_seconds_mean"] == pytest.approx(seconds / STEPS)
        for name in ("p50", "p90", "max"):
            assert figures[f"step_seconds_{name}"] == pytest.approx(seconds / STEPS)
        assert figures["waiting_seconds"] == pytest.approx(MICRO_BATCHES * 0.25)
        assert figures["mfu"] == pytest.approx(many * enumerated(LENGTH) / seconds / (world * PEAK))
        assert figures["hfu"] >= figures["mfu"]
        assert figures["computed_pairs_ratio"] >= 1
        # it was logged at every second step, and not between
        logged = {step: row.get("throughput/tokens") for step, row in result["rows"]}
        assert logged[2] == many * LENGTH
        assert logged[3] == logged[2]


@pytest.mark.parametrize("mesh", tiered(["1x2", "2x1"], quick=[], full=["2x1"]))
def test_padding_and_documents_are_those_of_the_logged_batch(trainers, mesh):
    rows, (world, size) = samples(32, documents=True), MESHES[mesh]
    for result in trainers.run(world, watch, size, "ddp", sgd, LENGTH, True):
        share, tokens = last(result)["throughput/padding_share"], SAMPLES * LENGTH
        assert 0 < share < 1
        assert share * tokens == pytest.approx(round(share * tokens))  # whole tokens, of all ranks
        whole = int((PATTERN.mask(LENGTH, 4, 2) > 0).sum())
        required = sum(result["by_rank"]["required_pairs"]) / (2 * STEPS * MICRO_BATCHES * SAMPLES)
        most, least = (
            sum(int((PATTERN.mask(int(n), 4, 2) > 0).sum()) for n in row["documents"].bincount())
            for row in (max(rows, key=lambda r: r["documents"].bincount().max()), rows[0])
        )
        assert min(most, least) <= required <= max(most, least) < whole


@pytest.mark.parametrize(
    ("mesh", "exchange"),
    tiered(
        [
            *(("1x2", exchange) for exchange in ("gather", "ring", "swap")),
            *(("2x2", exchange) for exchange in ("gather", "swap", "ring")),
            *(("1x4", exchange) for exchange in ("ring", "auto")),
        ],
        quick=[("2x2", "gather")],
        long=[("1x4", "ring")],
    ),
)
def test_bytes_are_those_on_the_wire_and_those_of_the_plan(trainers, mesh, exchange):
    world, size = MESHES[mesh]
    ranks = trainers.run(world, watch, size, "ddp", sgd, LENGTH, False, exchange)
    wire = [result["sent"][-1] for result in ranks]
    for result in ranks:
        figures = {key.removeprefix("exchange/"): value for key, value in last(result).items()}
        assert figures["sent_bytes"] == sum(each["sent_bytes"] for each in wire) > 0
        assert figures["sent_bytes_max"] == max(each["sent_bytes"] for each in wire)
        assert figures["messages"] == sum(each["messages"] for each in wire)
        assert figures["predicted_bytes"] == figures["sent_bytes"]
        assert result["by_rank"]["predicted_bytes"] == result["by_rank"]["sent_bytes"]
        branches = [figures.get(f"branch_{w}_{r}_bytes", 0.0) for w, r in ((8, 1), (16, 2), (64, 3))]
        assert sum(branches) == (0 if exchange == "swap" else figures["sent_bytes"])
        assert 0 <= figures["waited_seconds"] <= figures["waited_seconds_max"]
        assert figures["hidden_share"] == pytest.approx(1 - figures["waited_seconds"] / figures["flight_seconds"])


@pytest.mark.long
def test_packed_documents_are_predicted_to_the_byte(trainers):
    for result in trainers.run(2, watch, 2, "ddp", sgd, LENGTH, True):
        figures = last(result)
        assert figures["exchange/predicted_bytes"] == figures["exchange/sent_bytes"] > 0


@pytest.mark.parametrize("exchange", tiered(["gather", "ring", "swap"], quick=[], full=["ring", "swap"]))
def test_what_is_computed_again_is_sent_again(trainers, exchange):
    for result in trainers.run(2, watch, 2, "ddp", sgd, LENGTH, False, exchange, None, False, True):
        figures = last(result)
        assert figures["exchange/sent_bytes"] == sum(result["by_rank"]["sent_bytes"]) > 0
        assert result["by_rank"]["predicted_bytes"] == result["by_rank"]["sent_bytes"]


@pytest.mark.parametrize(("slow", "is_before"), tiered(product([0, 1], [True, False]), quick=[], long=[(1, True)]))
def test_the_slowest_rank_is_the_one_that_others_wait_for(trainers, slow, is_before):
    for result in trainers.run(2, watch, 2, "ddp", sgd, LENGTH, False, "gather", (slow, is_before)):
        figures = last(result)
        assert figures["exchange/slowest_rank"] == slow
        # of 0.12 s a micro-batch; after the forward, it is for the loss that the other waits
        waited = result["by_rank"]["waited_seconds" if is_before else "loss_seconds"][1 - slow] / STEPS
        assert waited > 0.6 * 2 * 0.12
        if is_before:
            assert figures["exchange/waited_seconds_max"] == pytest.approx(waited)


@pytest.mark.long
def test_nothing_is_logged_of_an_exchange_where_there_is_none(trainers):
    for world in (1, 2):
        for result in trainers.run(world, watch, 1, "ddp", sgd, LENGTH):
            assert not [key for key in last(result) if key.startswith("exchange/")]


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2"], quick=[], full=["ddp"]))
def test_memory_is_reported_by_kind(trainers, sharding):
    ranks = trainers.run(2, watch, 2, sharding, adamw, LENGTH)
    fullest = int(last(ranks[0])["memory/peak_rank"])
    result, figures = ranks[fullest], {k: v * 2**30 for k, v in last(ranks[0]).items() if k.startswith("memory/")}
    assert figures["memory/parameters_gib"] == pytest.approx(result["parameters"])
    assert figures["memory/gradients_gib"] == pytest.approx(result["parameters"])
    assert figures["memory/optimizer_gib"] == pytest.approx(result["state"])
    assert result["state"] >= 2 * result["parameters"]
    # the second rank keeps what the first has sent it in a forward; the first sees no later key
    assert [each["forward"] for each in ranks][::-1] == ranks[0]["by_rank"]["exchange"]
    assert figures["memory/exchange_gib"] == ranks[0]["by_rank"]["exchange"][fullest]
    if sharding == "fsdp2":
        whole = sum(each["parameters"] for each in ranks)
        assert result["parameters"] < 0.7 * whole


@pytest.mark.long
def test_memory_is_that_of_each_rank(trainers):
    plain, hoarding = (
        trainers.run(2, watch, 2, "ddp", sgd, LENGTH, False, "auto", None, hoard) for hoard in (False, True)
    )
    held = 2**27 / 2**30
    for result in hoarding:
        figures, by_rank = last(result), result["by_rank"]
        assert figures["memory/peak_rank"] == 1
        assert by_rank["current"][1] - plain[1]["by_rank"]["current"][1] > 0.9 * 2**27
        assert figures["memory/current_gib_max"] - figures["memory/current_gib_min"] > 0.5 * held
        assert figures["memory/peak_gib_max"] * 2**30 == max(by_rank["peak"])
        assert figures["memory/peak_gib_min"] * 2**30 == min(by_rank["peak"])
        assert figures["memory/peak_gib_median"] * 2**30 == pytest.approx(sum(by_rank["peak"]) / 2)
