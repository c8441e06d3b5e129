"""The pairs of a block, one by one, and the tokens of a rank."""

import torch


def shown_pairs(block):
    """Yield (query row, query head, key row, key head, count) for each pair of a block, by listing its rows."""
    queries, keys = (dict(zip(places(x), x.elements(), strict=True)) for x in (block.queries, block.keys))
    group = block.queries.heads // block.keys.heads
    for elements, lattice in ((queries, block.queries), (keys, block.keys)):
        assert len(elements) == lattice.size
    assert len(set(queries.values())) == len(queries), "a query stands twice in one call"
    assert len(set(keys.values())) == len(keys), "a key stands twice in one call: its gradient would be written twice"
    for (segment, h, a), (row, head) in queries.items():
        repeats = block.head_repeats[h // group] if block.head_repeats else block.repeats
        for b in range(block.keys.rows):
            if (segment, h // group, b) not in keys:
                continue
            if (block.low is None or a - b >= block.low) and (block.high is None or a - b <= block.high):
                again = sum(a % r.every == r.queries and b % r.every == r.keys for r in repeats)
                yield row, head, *keys[segment, h // group, b], 1 + again


def places(lattice):
    """The (segment, head, row) of each element, without the padding."""
    lengths = getattr(lattice, "lengths", None) or [lattice.rows] * len(lattice.starts)
    return [(s, a, i) for s, length in enumerate(lengths) for a in range(lattice.heads) for i in range(length)]


def held(placement, rank):
    """Return the tokens of a rank, in its order."""
    parts = [torch.arange(chunk.begin, chunk.end) for chunk in placement.chunks(rank)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
