"""The hash of a batch's bytes, by which ranks notice that they were given different batches."""

import pytest
import torch

from lightning_longnet.sequence.comparison import checksum


@pytest.mark.parametrize("count", [1, 2, 3, 8, 1001, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_any_changed_elements_change_the_hash(dtype, count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(-100, 100, (count,), generator=generator).to(dtype).add(0.5 if dtype.is_floating_point else 1)
    x[x == 0] = 1
    known = checksum(x)
    assert 0 <= known < 2**61
    assert checksum(x.clone()) == known
    for step in (1, 2, 3):
        for first in range(min(4, count)):
            y = x.clone()
            y[first::step] *= -1  # the signs alone: bit 63 of a word, of one element or of many
            assert checksum(y) != known
    for bit in range(8 * x.element_size()):
        y = x.clone()
        y.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        assert checksum(y) != known
    if count > 2:
        y = x.clone()
        y.view(torch.uint8).view(-1, x.element_size())[[0, 2], -1] ^= 128  # two signs
        assert checksum(y) != known


def test_padding_labels_and_order_change_the_hash():
    labels = torch.arange(64)
    hashes = {checksum(labels), checksum(labels.flip(0)), checksum(torch.full((64,), -1)), checksum(torch.zeros(64))}
    hashes |= {checksum(torch.where(labels < n, labels, -100)) for n in range(64)}
    assert len(hashes) == 68


def test_a_view_has_the_hash_of_its_values():
    x = torch.arange(999.0)
    assert checksum(x[1:]) == checksum(x[1:].clone())
    assert checksum(x[::3]) == checksum(x[::3].clone())
