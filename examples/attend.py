"""Run attention without a model, and compare it with the dense definition: `python examples/attend.py`."""

from time import perf_counter

import torch

from lightning_longnet import Pattern, attend

# all near tokens, fewer of those farther away, and 8 query heads with 4 key heads
pattern = Pattern.dilated(segment_lengths=(512, 2048, 8192), dilation_rates=(1, 2, 4), is_causal=True)
q, k, v = (torch.randn(1, 8192, heads, 64, requires_grad=True) for heads in (8, 4, 4))
begin = perf_counter()
attend(q, k, v, pattern).sum().backward()
print(f"8,192 tokens forward and backward: {perf_counter() - begin:.2f} s on {torch.get_num_threads()} threads")

with torch.no_grad():  # the same by the definition, on a part that a dense matrix can hold
    q, k, v = (x[:, :600] for x in (q, k, v))
    expected = attend(q, k, v, pattern, kernel="reference")
    print(f"largest difference to the dense definition: {(attend(q, k, v, pattern) - expected).abs().max():.1e}")
print(pattern.reach(8192, heads=8, kv_heads=4))
