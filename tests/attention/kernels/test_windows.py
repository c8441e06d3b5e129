"""Windows of a block, against counting pairs by flash attention's own rules."""

import emulated
import torch

from lightning_longnet.attention.kernels.windows import windows


def test_windows_show_the_pairs_of_their_block_once():
    limits = [None, *range(-8, 9)]
    for queries in range(1, 7):
        for keys in range(1, 7):
            apart = torch.arange(queries)[:, None] - torch.arange(keys)
            for low in limits:
                for high in limits:
                    if low is not None and high is not None and low > high:
                        continue
                    truth = torch.ones_like(apart, dtype=torch.bool)
                    if low is not None:
                        truth &= apart >= low
                    if high is not None:
                        truth &= apart <= high
                    result = torch.zeros_like(apart)
                    for rows, columns, left, right in windows(queries, keys, low, high):
                        size = rows.stop - rows.start, columns.stop - columns.start
                        seen = emulated.flash_seen(*size, False, left, right)
                        assert seen.any(0).all()
                        assert seen.any(1).all()
                        result[rows, columns] += seen
                    assert torch.equal(result, truth.long())


def test_what_a_plan_holds_is_one_window():
    assert len(windows(64, 64, None, None)) == len(windows(64, 64, 0, None)) == 1
    assert len(windows(64, 127, -63, 0)) == 1  # a tile of a window, and its keys
    assert len(windows(64, 32, None, None)) == 1
    assert windows(6, 6, 0, 5)[0].left == -1  # which is the faster triangle
