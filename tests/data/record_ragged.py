"""Record what torchscale's dilated attention computes at ragged lengths: `tests/data/torchscale_ragged.pt`.

    python tests/data/record_ragged.py PATH_OF_A_TORCHSCALE_CHECKOUT

The layer's projections are identities, so that its inputs are queries, keys and values.  Everything is in float64, and
the gradients are torchscale's: none flows through the weights of the branches.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from record_torchscale import prepare
from torch import nn

DIM = 2
# segment lengths and dilation rates, heads, whether it is causal, lengths
CASES = [
    # the proportions of Prov-GigaPath: 1024, 5792, 32768 ... with the rates 1, 2, 4, 8, 16
    ([8, 46, 256, 1448, 8192], [1, 2, 4, 8, 16], 4, False, [9, 11, 15, 17, 31, 37, 45, 47, 53]),
    # head counts that rates do not divide
    ([4, 12], [1, 3], 4, False, [5, 7, 10, 13, 23, 29]),
    ([6, 64], [2, 5], 3, False, [7, 9, 19, 26]),
    ([64], [4], 4, False, [3, 5, 6]),
    ([4, 12], [1, 3], 4, True, [10, 29]),
]


def inputs(length: int, heads: int) -> list[torch.Tensor]:
    """Return queries, keys, values and the gradient of out, (1, length, heads, DIM), which the test computes too."""
    i = torch.arange(length * heads * DIM, dtype=torch.float64)
    rows = [1.5 * (0.7 * i + 0.1).sin(), 1.5 * (1.3 * i + 0.2).sin(), (0.9 * i + 0.3).sin(), (0.37 * i).cos()]
    return [x.view(1, length, heads, DIM) for x in rows]


def layer(segments: list[int], rates: list[int], heads: int) -> nn.Module:
    from torchscale.component.dilated_attention import DilatedAttention

    options = {"flash_attention": True, "seq_parallel": False, "multiway": False, "xpos_rel_pos": False}
    attention = DilatedAttention(
        Namespace(segment_length=segments, dilated_ratio=rates, layernorm_eps=1e-5, **options),
        heads * DIM,
        heads,
        self_attention=True,
    ).double()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(attention, name, nn.Identity())
    return attention


def record(segments: list[int], rates: list[int], heads: int, causal: bool, length: int) -> list[torch.Tensor]:
    """Return out, and the gradients of queries, keys and values, each (length, heads, DIM)."""
    *leaves, grad = (x.flatten(2) for x in inputs(length, heads))
    leaves = [x.requires_grad_() for x in leaves]
    out, _ = layer(segments, rates, heads)(*leaves, is_causal=causal)
    results = (out, *torch.autograd.grad(out, leaves, grad))
    return [x.detach().view(length, heads, DIM) for x in results]


def main(path: str) -> None:
    prepare(path)
    recorded: dict[str, Any] = {"cases": [], "results": []}
    for segments, rates, heads, causal, lengths in CASES:
        for length in lengths:
            recorded["cases"].append((segments, rates, heads, causal, length))
            recorded["results"].append(torch.stack(record(segments, rates, heads, causal, length)).flatten())
    # a segment length that its rate does not divide, and a longer sequence: torchscale displaces what it computed
    recorded["displaced"] = record([5], [2], 2, False, 13)[0]
    recorded["results"] = torch.cat(recorded["results"])  # one tensor: a file has some hundred bytes for each
    torch.save(recorded, Path(__file__).parent / "torchscale_ragged.pt")


if __name__ == "__main__":
    main(sys.argv[1])
