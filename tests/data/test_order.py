"""What all ranks work on in a step goes by seed and epoch alone."""

import pytest

from lightning_longnet.data.order import GlobalOrder, seed_of


def global_batches(samples, batch_size, replicas, epoch=0, skipped=0, **options):
    orders = [GlobalOrder(samples, batch_size, replicas, rank, **options) for rank in range(replicas)]
    result = []
    for order in orders:
        order.set_epoch(epoch)
        order.skip_samples(skipped * batch_size)
        indices = list(order)
        assert len(indices) == len(order) - skipped * batch_size
        result.append([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
    assert len({len(batches) for batches in result}) == 1 or options.get("end") == "ragged"
    # in the order of samples that attention dropout knows them by: the ranks take turns
    return [
        [batch[i] for i in range(batch_size) for batch in batches if i < len(batch)]
        for batches in zip(*result, strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"seed": 4}, {"epoch": 2}])
def test_the_same_global_batches_on_any_mesh(options):
    expected = global_batches(53, 12, 1, **options)
    assert [len(batch) for batch in expected] == [12] * 4
    assert len({i for batch in expected for i in batch}) == 48
    for replicas in (2, 3, 4, 12):
        assert global_batches(53, 12 // replicas, replicas, **options) == expected
        assert global_batches(53, 12 // replicas, replicas, skipped=3, **options) == expected[3:]


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    result = [global_batches(50, 5, 1, epoch=epoch, seed=seed)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in result}) == 9
    assert seed_of(1, 2) != seed_of(12)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_samples_that_are_left_over(replicas):
    options = {"shuffle": False, "batch_size": 8 // replicas, "replicas": replicas}
    past = list(range(10, 10 + -10 % replicas))  # which a dataset hands out without targets
    assert global_batches(10, **options, end="ignore") == [list(range(8)), [8, 9, *past]]
    assert global_batches(10, **options, end="repeat") == [list(range(8)), [8, 9, *(i - 10 for i in past)]]
    assert global_batches(10, **options, end="drop") == [list(range(8))]


def test_nothing_is_repeated_for_prediction():
    result = [list(GlobalOrder(5, 2, 2, rank, shuffle=False, end="ragged")) for rank in range(2)]
    assert result == [[0, 2, 4], [1, 3]]


def test_a_pass_is_skipped_into_once():
    order = GlobalOrder(8, 2, shuffle=False)
    order.skip_samples(6)
    assert [list(order), list(order)] == [[6, 7], list(range(8))]
    with pytest.raises(ValueError, match="samples must be at most the 8 of this rank, got 9"):
        order.skip_samples(9)


def test_what_makes_no_batch_is_refused():
    with pytest.raises(
        ValueError, match="batch_size must leave a batch for each of the 2 groups of ranks: there are 5"
    ):
        GlobalOrder(5, 3, 2)
    with pytest.raises(ValueError, match="end must be one of 'drop', 'ignore', 'repeat', 'ragged', got 'x'"):
        GlobalOrder(5, 3, end="x")
