"""The definition of the contract, by counting pairs one by one.  It shares no code with the library."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass(frozen=True)
class Shown:
    """One branch: segment length (None: the whole), rate, window (None: no end), causal, grouping of the heads, kept
    blocks (None: all): kind, rows of a block, ratio, global rows, whether heads differ; and whether segments are padded
    with keys of zeros.
    """

    w: int | None = None
    r: int = 1
    window: int | None = None
    causal: bool = False
    offsets: str = "interleaved"
    sparsity: tuple | None = None
    ragged: str = "exact"


def kept_counts(ratio, some, blocks, causal):
    """How many blocks each row of blocks keeps, `some` of them global."""
    if causal:
        counts = []
        for i in range(blocks):
            expected = math.floor(ratio * ((i + 1) * (i + 2) // 2) + 0.5) - sum(counts)
            counts.append(max(1, min(expected, i + 1)))
        return counts
    total, some = math.floor(ratio * blocks * blocks + 0.5), min(some, blocks)
    others = blocks - some
    first = min(some * blocks, max(some, total - others))
    shares = [(first, some), (max(others, total - first), others)]
    return [x * (n + 1) // rows - x * n // rows for x, rows in shares for n in range(rows)]


@lru_cache(256)
def kept_blocks(sparsity, blocks, causal, head):
    """The pairs of blocks that are kept, each by its place among all that a row could keep."""
    kind, _, ratio, global_rows, varies = sparsity
    some = -(-global_rows // sparsity[1])
    pairs = set()
    for i, count in enumerate(kept_counts(ratio, some, blocks, causal)):
        others = [j for j in range(i + 1 if causal else blocks) if j != i]
        others.sort(key=lambda j: (abs(i - j), j))
        if kind == "dilated_sparse":
            every = math.floor(1 / ratio + 0.5)
            moved = head % every if varies else 0
            others.sort(key=lambda j: (i - moved - j) % every != 0)
        if kind == "strided":
            every = math.floor(2 / ratio + 0.5)
            moved = head % every if varies else 0
            columns = [j for j in others if (j + 1 + moved) % every == 0]
            rest = [j for j in others if (j + 1 + moved) % every]
            others.sort(key=lambda j: 2 * columns.index(j) + 1 if j in columns else 2 * rest.index(j))
        others.sort(key=lambda j: min(j, some))
        pairs |= {(i, j) for j in [i, *others][:count]}
    return pairs


def counts(shown, multiplicity, length, kv_heads, ids=None):
    """Return for each branch, finest first, how often query i of key/value head g counts key j, as (Hkv, N, N).

    Where a branch pads its segments, columns of keys of zeros follow the N of all tables.
    """
    ids = [0] * length if ids is None else list(ids)
    index = [i - ids.index(ids[i]) for i in range(length)]
    inf = float("inf")
    shown = sorted(shown, key=lambda b: (b.r, b.w or inf, b.window or inf))
    tables = [torch.zeros(kv_heads, length, length, dtype=torch.float64) for _ in shown]
    for g in range(kv_heads):
        for query in range(length):
            whole = ids.count(ids[query])
            for key in range(length):
                if ids[query] != ids[key]:
                    continue
                i, j = index[query], index[key]
                for table, b in zip(tables, shown, strict=True):
                    w = b.w or 10**9
                    offset = g % b.r if b.offsets == "interleaved" else g // math.ceil(kv_heads / b.r)
                    sees = (i % w) % b.r == offset and (j % w) % b.r == offset and i // w == j // w
                    sees = sees and not (b.causal and j > i)
                    sees = sees and not (b.window is not None and abs(i - j) >= b.window)
                    if sees and b.sparsity is not None:
                        size = b.sparsity[1]
                        rows = len(range(offset, min(w, whole - i // w * w), b.r))
                        pair = (i % w) // b.r // size, (j % w) // b.r // size
                        sees = pair in kept_blocks(b.sparsity, -(-rows // size), b.causal, g)
                    if sees:
                        table[g, query, key] = 1
                        if multiplicity == "set":
                            break  # the first branch that shows it has it
    if all(b.ragged == "exact" for b in shown):
        return tables
    lengths = [ids.count(each) for each in ids]
    places = max(lengths, default=0) + max(b.r for b in shown)
    zeros = [zero_keys(b, kv_heads, index, lengths, places) for b in shown]
    return [torch.cat(pair, -1) for pair in zip(tables, zeros, strict=True)]


def zero_keys(b, kv_heads, index, lengths, places):
    """Return the places without a token that each query sees in its padded segment, (Hkv, N, places)."""
    table = torch.zeros(kv_heads, len(index), places, dtype=torch.float64)
    for g in range(kv_heads if b.ragged == "zero_keys" else 0):
        offset = g % b.r if b.offsets == "interleaved" else g // math.ceil(kv_heads / b.r)
        for query, (i, whole) in enumerate(zip(index, lengths, strict=True)):
            w = min(b.w or whole, whole)
            first = i // w * w
            for place in range(math.ceil(w / b.r) * b.r):
                is_token = place < w and first + place < whole
                sees = place % b.r == offset and (i - first) % b.r == offset
                if sees and not is_token and not (b.causal and first + place > i):
                    table[g, query, place] = 1
    return table


def padded(tables, hidden):
    """The same tables, where no query counts a key that is hidden."""
    hidden = torch.tensor(hidden)
    return [
        table.masked_fill(torch.nn.functional.pad(hidden, (0, table.shape[-1] - len(hidden))), 0) for table in tables
    ]


def _hashed(x):
    """Return splitmix64 of each element of an array of unsigned integers, which wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def is_dropped(probability, seed, sample, head, branch, length):
    """Return for every (query, key) of one head and branch whether dropout drops it."""
    root, tokens = _hashed(np.array([seed % 2**64], np.uint64)), np.arange(length, dtype=np.uint64)
    row = _hashed(_hashed(_hashed(root + np.uint64(1 + branch)) + np.uint64(sample)) + np.uint64(head))
    query_words, key_words = (
        (_hashed(x + tokens) >> np.uint64(32)).astype(np.uint32) | 1 for x in (row, _hashed(root))
    )
    pairs = query_words[:, None] * key_words
    pairs ^= (pairs.view(np.int32) >> 15).view(np.uint32)
    return pairs * np.uint32(0x2C1B3C6D) >> 1 < round(probability * 2**31)


def kept(probability, seed, samples, heads, length, branches, multiplicity):
    """Return the dropout factors of the weights: for each sample and branch (H, N, N), for the keys that are tokens."""
    names = [0] * branches if multiplicity == "set" else range(branches)
    return [
        [
            torch.stack([~torch.tensor(is_dropped(probability, seed, b, h, name, length)) for h in range(heads)])
            / torch.tensor(1 - probability, dtype=torch.float64)
            for name in names
        ]
        for b in range(samples)
    ]


def attention(q, k, v, tables, scale, mix="exact", kept=None):
    """Return out (B, N, H, D) and lse (B, H, N), in float64 and differentiable, from each sample's tables."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        group = q.shape[2] // k.shape[2]
        out_heads, lse_heads = [], []
        for h in range(q.shape[2]):
            g = h // group
            zeros = tables[b][0].shape[-1] - k.shape[1]
            keys, values = (torch.nn.functional.pad(x[b, :, g].double(), (0, 0, 0, zeros)) for x in (k, v))
            scores = q[b, :, h].double() @ keys.T * scale
            weights = [table[g] * scores.exp() for table in tables[b]]
            total = sum(weights).sum(-1)
            lse_heads.append(total.log())
            out = 0
            for branch, weight in enumerate(weights):
                own = weight.sum(-1)
                safe_own, safe_total = own.masked_fill(own == 0, 1), total.masked_fill(total == 0, 1)
                if mix == "detached":
                    share = (safe_own / safe_total).detach()[:, None] * (weight / safe_own[:, None])
                else:
                    share = weight / safe_total[:, None]
                if kept is not None:  # what becomes of zeros does not matter
                    share = share * torch.nn.functional.pad(kept[b][branch][h], (0, zeros))
                out = out + share @ values
            out_heads.append(out)
        outs.append(torch.stack(out_heads, 1))
        lses.append(torch.stack(lse_heads))
    return torch.stack(outs), torch.stack(lses)
