"""The snippets of MIGRATING.md on two ranks, causal and not: the results and the losses are those of one process."""

from pathlib import Path

import pages
import pytest
import torch

from lightning_longnet import MultiheadDilatedAttention, Pattern, attach_context, compat
from lightning_longnet.layers import DilatedAttention

PAGE = Path(__file__).parents[2] / "MIGRATING.md"
BRANCHES = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
PATTERN = Pattern.dilated((8, 16), (1, 2))

# the layers that the page makes, smaller
LAYERS = {
    "hybrid": lambda: compat.RingDilatedAttentionHybrid(**BRANCHES),
    "hilbert": lambda: compat.create_standardized_ring_attention("hilbert", dim=6, heads=4, **BRANCHES),
    "production": lambda: compat.RingDilatedAttentionProduction(compat.RingAttentionConfig(**BRANCHES)),
    "block-sparse": lambda: compat.BlockSparseRingDilatedAttention(**BRANCHES, sparsity_ratio=0.4, block_size=2),
    "hilbert, configured": lambda: compat.RingDilatedAttentionHilbertOptimizedFixed(
        compat.StandardizedRingConfig(dim=6, heads=4, **BRANCHES)
    ),
    "multihead": lambda: compat.create_ring_multihead_attention_hybrid(24, 4, [8, 16], [1, 2]),
    "magneto": lambda: compat.RingMultiheadDilatedAttentionHybrid(24, 4, **BRANCHES, layer_norm=True, gamma_init=0.5),
    "replaced": lambda: DilatedAttention(PATTERN, exchange="ring"),
    "replaced, multihead": lambda: MultiheadDilatedAttention(24, 4, pattern=PATTERN, batch_first=True, sub_norm=True),
}


def made(name, is_causal, context=None):
    """Return this rank's tokens of the output, of a layer with weights of a seed."""
    torch.manual_seed(3)
    layer = LAYERS[name]().double()
    shape = (2, 41, 24) if isinstance(layer, MultiheadDilatedAttention) else (2, 41, 4, 6)
    rows = list(torch.randn(3, *shape, dtype=torch.float64).unbind())
    if context is not None:
        attach_context(layer, context)
        rows = [context.split({"x": x}, {"x": 1})["x"] for x in rows]
    out = layer(*rows, is_causal=is_causal)
    return (out[0] if isinstance(out, tuple) else out).detach()


def on_ranks(group):
    from contexts import made as context_of

    context = context_of(group)
    cases = [(name, is_causal) for name in LAYERS for is_causal in (False, True)]
    return [(case, made(*case, context)) for case in cases]


def test_layers_of_the_page_are_the_same_on_two_ranks(pool):
    first, second = pool.run(2, on_ranks)
    for (case, part), (_, rest) in zip(first, second, strict=True):
        torch.testing.assert_close(torch.cat([part, rest], 1), made(*case), rtol=1e-10, atol=1e-10)


def module_section():
    """Return the code of the page's LightningModule."""
    text = PAGE.read_text()
    start = text.index("### In a LightningModule")
    (code,) = [piece.text for piece in pages.pieces(text[start : text.index("\n## ", start)]) if piece.kind == "python"]
    return code


def run_module(rank, world):
    names = {"torch": torch}
    code = module_section()
    assert code.count("devices=1,") == 1
    exec(code.replace("devices=1,", f"devices={world},"), names)
    return names["language_model"].losses


@pytest.mark.long
def test_the_module_of_the_page_has_the_same_losses_on_two_ranks(trainers):
    (expected,) = trainers.run(1, run_module)
    assert len(expected) == 4
    for result in trainers.run(2, run_module):
        assert result == pytest.approx(expected, rel=1e-4)
