"""The pairs of a block, one by one, and the tokens of a rank."""

import torch


def shown_pairs(block):
    """Yield (query row, query head, key row, key head, count) for each pair of a block, by listing its rows."""
    queries, keys = list(block.queries.elements()), list(block.keys.elements())
    group = block.queries.heads // block.keys.heads
    for elements, lattice in ((queries, block.queries), (keys, block.keys)):
        assert len(elements) == lattice.size
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
    """Return the tokens of a rank, in its order."""
    parts = [torch.arange(chunk.begin, chunk.end) for chunk in placement.chunks(rank)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
