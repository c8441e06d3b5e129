"""The ancestor's classes on drawn configurations, forward and backward, beside a softmax over all masked pairs."""

import brute
import hypothesis.strategies as st
import torch
from drawn import document_ids
from hypothesis import given, settings

from lightning_longnet import compat, sequence_hilbert_order

CLASSES = {
    "RingDilatedAttention": "plain",
    "RingDilatedAttentionV3": "plain",
    "RingDilatedAttentionV2Collective": "plain",
    "RingDilatedAttentionProduction": "plain",
    "RingDilatedAttentionHilbertOptimized": "hilbert",
    "BlockSparseRingDilatedAttention": "sparse",
    "RingMultiheadDilatedAttentionHybrid": "plain",
    "BlockSparseRingMultiheadDilatedAttentionFixed": "sparse",
}


@st.composite
def cases(draw):
    """Draw a class, its arguments and the shape of its tensors."""
    name = draw(st.sampled_from(sorted(CLASSES)))
    branches = draw(st.integers(1, 3))
    case = {
        "name": name,
        "segment_lengths": [draw(st.integers(1, 24)) for _ in range(branches)],
        "dilation_rates": [draw(st.integers(1, 5)) for _ in range(branches)],
        "shape": (draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 5))),
        "causal": draw(st.booleans()),
        "sparsity": None,
        "options": {},
    }
    if CLASSES[name] == "sparse":
        kind = draw(st.sampled_from(["local_window", "dilated_sparse", "global_local", "strided"]))
        some = draw(st.integers(1, 5)) if kind == "global_local" else 0
        size, ratio = draw(st.integers(1, 4)), draw(st.sampled_from([0.1, 0.35, 0.6, 1.0]))
        config = {"pattern_type": kind, "block_size": size, "sparsity_ratio": ratio}
        if some:
            config["global_tokens"] = some
        case["sparsity"] = (kind, size, ratio, some, False)
        case["options"]["sparse_config"] = compat.SparsePatternConfig(**config) if draw(st.booleans()) else config
    batch, length = case["shape"][:2]
    case["along_curve"] = CLASSES[name] == "hilbert"
    if CLASSES[name] != "sparse" and draw(st.booleans()):
        case["along_curve"] = case["options"]["use_hilbert"] = draw(st.booleans())
    case["hidden"] = draw(st.none() | st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    if "Multihead" in name:
        case["documents"] = None
        case["options"]["layer_norm"] = draw(st.booleans())
    else:
        case["documents"] = draw(document_ids(length))
        case["options"]["attention_scale"] = draw(st.none() | st.sampled_from([0.2, 1.5]))
    return case


def tables_along_the_curve(case):
    """Count the pairs of branches whose segments and residues are those of the places along a document's curve."""
    _, length, heads, _ = case["shape"]
    ids = case["documents"] or [0] * length
    place = [0] * length
    for each in set(ids):
        first = ids.index(each)
        for at, token in enumerate(sequence_hilbert_order(ids.count(each)).tolist()):
            place[first + token] = at
    tables = []
    for w, r in zip(case["segment_lengths"], case["dilation_rates"], strict=True):
        table = torch.zeros(heads, length, length, dtype=torch.float64)
        for h in range(heads):
            for i in range(length):
                for j in range(i + 1 if case["causal"] else length):
                    a, b = place[i], place[j]
                    table[h, i, j] = ids[i] == ids[j] and a // w == b // w and a % w % r == h % r == b % w % r
        tables.append(table)
    return tables


def expected(case, q, k, v):
    batch, length, heads, width = case["shape"]
    if case["along_curve"]:
        tables = tables_along_the_curve(case)
    else:
        shown = [
            brute.Shown(w, r, None, case["causal"], sparsity=case["sparsity"])
            for w, r in zip(case["segment_lengths"], case["dilation_rates"], strict=True)
        ]
        tables = brute.counts(shown, "multiset", length, heads, case["documents"])
    each = [tables] * batch
    if (hidden := case["hidden"]) is not None:
        each = [brute.padded(tables, hidden[b * length : (b + 1) * length]) for b in range(batch)]
    scale = case["options"].get("attention_scale") or width**-0.5
    return brute.attention(q, k, v, each, scale)[0]


def compare(case):
    """Compare output and gradients of a class with the definition."""
    torch.manual_seed(0)
    batch, length, heads, width = case["shape"]
    kind = getattr(compat, case["name"])
    options = {name: case[name] for name in ("segment_lengths", "dilation_rates")} | case["options"]
    hidden = None if case["hidden"] is None else torch.tensor(case["hidden"]).view(batch, length)
    if "Multihead" in case["name"]:
        layer = kind(heads * width, heads, dtype=torch.float64, **options)
        rows = [torch.randn(batch, length, heads * width, dtype=torch.float64, requires_grad=True)]
        out, _ = layer(rows[0], is_causal=case["causal"], key_padding_mask=hidden)
        q, k, v = (
            (rows[0] @ weight.T + bias).unflatten(-1, (heads, width))
            for weight, bias in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
        )
        normed = (layer.sub_norm or torch.nn.Identity())(expected(case, q, k, v).flatten(2))
        truth = layer.out_proj(normed)
    else:
        rows = list(torch.randn(3, batch, length, heads, width, dtype=torch.float64).unbind())
        for x in rows:
            x.requires_grad_()
        documents = None if case["documents"] is None else torch.tensor(case["documents"])
        out = kind(**options)(*rows, is_causal=case["causal"], documents=documents, key_padding_mask=hidden)
        truth = expected(case, *rows)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), rows, retain_graph=True) for x in (out, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_drawn_class_equals_the_definition(case):
    compare(case)
