"""What a block computes, pair by pair, and which tokens a rank holds."""

import torch


def shown_pairs(block):
    """(query row, query head, key row, key head, how often) of one block, by listing its cells."""
    queries, keys = list(block.queries.elements()), list(block.keys.elements())
    group = block.queries.heads // block.keys.heads
    for cells, lattice in ((queries, block.queries), (keys, block.keys)):
        assert len(cells) == lattice.size
    assert len(set(queries)) == len(queries), "a query stands twice in one call"
    assert len(set(keys)) == len(keys), "a key stands twice in one call: its gradient would be written twice"
    for n, (row, head) in enumerate(queries):
        rest, a = divmod(n, block.queries.rows)
        segment, h = divmod(rest, block.queries.heads)
        first = (segment * block.keys.heads + h // group) * block.keys.rows
        for b in range(block.keys.rows):
            if (block.low is None or a - b >= block.low) and (block.high is None or a - b <= block.high):
                again = sum(a % r.every == r.queries and b % r.every == r.keys for r in block.repeats)
                yield row, head, *keys[first + b], 1 + again


def held(placement, rank):
    """The tokens of a rank, in its order."""
    parts = [torch.arange(stretch.begin, stretch.end) for stretch in placement.chunks(rank)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
