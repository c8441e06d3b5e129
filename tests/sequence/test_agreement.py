"""A fault of one rank is known to all of them."""

import pytest
import torch
import torch.distributed as dist

from lightning_longnet.sequence.agreement import all_gather, check_same_batch, fault_of, fault_of_rank_zero


class Ranks:
    """What `fault_of_rank_zero` takes of a strategy."""

    def __init__(self, group):
        self.group, self.is_global_zero = group, group.rank() == 0

    def broadcast(self, obj, src=0):
        values = [obj]
        dist.broadcast_object_list(values, dist.get_global_rank(self.group, src), group=self.group)
        return values[0]


def agreed(group):
    rank, attempts = group.rank(), []

    def attempt():
        attempts.append(rank)
        return f"rank {rank} failed"

    fault = fault_of_rank_zero(Ranks(group), attempt)
    numbers = all_gather(torch.tensor([rank, 2**60 + rank]), group)
    return fault, attempts, numbers.tolist(), all_gather(torch.tensor(rank / 2, dtype=torch.float64), group).tolist()


def test_all_ranks_hear_of_the_first_ones_fault(pool):
    for rank, (fault, attempts, numbers, halves) in enumerate(pool.run(3, agreed)):
        assert fault == "rank 0 failed"
        assert attempts == ([0] if rank == 0 else [])
        assert numbers == [[each, 2**60 + each] for each in range(3)]
        assert halves == [0.0, 0.5, 1.0]


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path):
    assert "Is a directory" in fault_of(tmp_path.read_bytes)


def faulty(group, digests, faults):
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    rank = group.rank()
    return fault_of(lambda: check_same_batch(digests[rank], faults[rank], group, alone, (0, 1)))


@pytest.mark.parametrize(
    ("digests", "faults", "messages"),
    [
        ((7, 7, 7), ("", "", ""), ("", "", "")),
        ((7, 8, 7), ("", "", ""), ("ranks 1 of the sequence group hold others than rank 0",) * 3),
        ((7, 7, 7), ("", "bad rows", ""), ("batch that does not fit", "bad rows", "batch that does not fit")),
    ],
)
def test_a_fault_of_a_batch_is_an_error_on_all_ranks(pool, digests, faults, messages):
    for result, message in zip(pool.run(3, faulty, digests, faults), messages, strict=True):
        assert message in result
        assert bool(message) == bool(result)
