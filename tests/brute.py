"""The definition of the contract, by counting pairs one by one.  It shares no code with the library."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shown:
    """One branch: segment length (None: the whole), rate, window (None: no end), causal, grouping of the heads."""

    w: int | None = None
    r: int = 1
    window: int | None = None
    causal: bool = False
    offsets: str = "interleaved"


def counts(shown, multiplicity, length, kv_heads, ids=None):
    """For each branch, finest first: how often query i of key/value head g counts key j, as (Hkv, N, N)."""
    ids = [0] * length if ids is None else list(ids)
    index = [i - ids.index(ids[i]) for i in range(length)]
    inf = float("inf")
    shown = sorted(shown, key=lambda b: (b.r, b.w or inf, b.window or inf))
    tables = [torch.zeros(kv_heads, length, length, dtype=torch.float64) for _ in shown]
    for g in range(kv_heads):
        for query in range(length):
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
                    if sees:
                        table[g, query, key] = 1
                        if multiplicity == "set":
                            break  # the first branch that shows it has it
    return tables


def attention(q, k, v, tables, scale, mix="exact"):
    """Out (B, N, H, D) and lse (B, H, N), in float64 and differentiable, from each sample's tables."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        group = q.shape[2] // k.shape[2]
        out_heads, lse_heads = [], []
        for h in range(q.shape[2]):
            g = h // group
            scores = q[b, :, h].double() @ k[b, :, g].double().T * scale
            values = v[b, :, g].double()
            weights = [table[g] * scores.exp() for table in tables[b]]
            total = sum(weights).sum(-1)
            lse_heads.append(total.log())
            out = 0
            for weight in weights:
                own = weight.sum(-1)
                safe_own, safe_total = own.masked_fill(own == 0, 1), total.masked_fill(total == 0, 1)
                if mix == "detached":
                    share = (safe_own / safe_total).detach()[:, None] * (weight / safe_own[:, None])
                else:
                    share = weight / safe_total[:, None]
                out = out + share @ values
            out_heads.append(out)
        outs.append(torch.stack(out_heads, 1))
        lses.append(torch.stack(lse_heads))
    return torch.stack(outs), torch.stack(lses)
