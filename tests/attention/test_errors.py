"""Bad input: a ValueError that names the argument, the value and what is allowed."""

import pytest
import torch

from lightning_longnet import Branch, Pattern, attend, explain
from lightning_longnet.attention.kernels import Request, select

DENSE = Pattern.dense()


def x(*shape, **settings):
    return torch.zeros(shape or (1, 6, 2, 4), **settings)


CALLS = {
    "no tensor": (lambda: attend([1.0], x(), x(), DENSE), "q must be a tensor, got list"),
    "rank of q": (
        lambda: attend(x(6, 2, 4), x(), x(), DENSE),
        r"q must be \(batch, tokens, heads, head_dim\), got shape \(6, 2, 4\)",
    ),
    "rank of v": (
        lambda: attend(x(), x(), x(1, 6, 8), DENSE),
        r"v must be \(batch, tokens, heads, head_dim\), got shape \(1, 6, 8\)",
    ),
    "integer k": (lambda: attend(x(), x().long(), x(), DENSE), "k must have a floating-point dtype, got torch.int64"),
    "dtype of v": (
        lambda: attend(x(), x(), x().double(), DENSE),
        "v must have the dtype of q, torch.float32, got torch.float64",
    ),
    "device of k": (lambda: attend(x(), x().to("meta"), x(), DENSE), "k must be on the device of q, cpu, got meta"),
    "tokens of k": (
        lambda: attend(x(), x(1, 5, 2, 4), x(1, 5, 2, 4), DENSE),
        r"k must have the batch and tokens of q, \(1, 6\), got \(1, 5\)",
    ),
    "batch of v": (
        lambda: attend(x(), x(), x(2, 6, 2, 4), DENSE),
        r"v must have the batch and tokens of q, \(1, 6\), got \(2, 6\)",
    ),
    "head_dim": (lambda: attend(x(), x(1, 6, 2, 3), x(), DENSE), "k must have the head_dim of q, 4, at least 1, got 3"),
    "no head_dim": (lambda: attend(x(1, 6, 2, 0), x(1, 6, 2, 0), x(1, 6, 2, 0), DENSE), "at least 1, got 0"),
    "heads of v": (lambda: attend(x(), x(), x(1, 6, 1, 4), DENSE), "v must have the heads of k, 2, got 1"),
    "heads of q": (
        lambda: attend(x(1, 6, 3, 4), x(), x(), DENSE),
        "q must have a multiple of the 2 heads of k and v, got 3",
    ),
    "no heads": (
        lambda: attend(x(1, 6, 0, 4), x(1, 6, 0, 4), x(1, 6, 0, 4), DENSE),
        "q must have a multiple of the 0 heads of k and v, got 0",
    ),
    "pattern": (lambda: attend(x(), x(), x(), (2048, 1)), "pattern must be a Pattern, got tuple"),
    "negative scale": (
        lambda: attend(x(), x(), x(), DENSE, scale=-0.5),
        "scale must be a positive, finite number, got -0.5",
    ),
    "no scale": (
        lambda: attend(x(), x(), x(), DENSE, scale=float("nan")),
        "scale must be a positive, finite number, got nan",
    ),
    "list of documents": (
        lambda: attend(x(), x(), x(), DENSE, documents=[0] * 6),
        "documents must be a tensor of integer ids, got list",
    ),
    "decreasing bytes": (
        lambda: attend(x(), x(), x(), DENSE, documents=torch.tensor([5, 5, 5, 3, 3, 3], dtype=torch.uint8)),
        "documents must not decrease along a row, got 5 followed by 3",
    ),
    "float8": (
        lambda: attend(*[x().to(torch.float8_e4m3fn)] * 3, DENSE),
        "no kernel can serve this call: .*; serves float64, float32, bfloat16 and float16, q is torch.float8_e4m3fn",
    ),
    "too long for the reference": (
        lambda: attend(*[torch.zeros(1, 65536, 8, 1, device="meta")] * 3, DENSE, kernel="reference"),
        "would hold 128 GiB of scores, more than the 16 that it takes. Those that can: 'eager'",
    ),
    "padding of integers": (
        lambda: attend(x(), x(), x(), DENSE, key_padding_mask=torch.zeros(1, 6)),
        "key_padding_mask must be a tensor of bools, True where a key is ignored, got torch.float32",
    ),
    "list of padding": (lambda: attend(x(), x(), x(), DENSE, key_padding_mask=[True] * 6), "tensor of bools.*got list"),
    "shape of padding": (
        lambda: attend(x(), x(), x(), DENSE, key_padding_mask=torch.zeros(6, dtype=torch.bool)),
        r"key_padding_mask must be \(batch, tokens\), \(1, 6\), got \(6,\)",
    ),
    "device of padding": (
        lambda: explain(x(), x(), x(), DENSE, key_padding_mask=torch.zeros(1, 6, dtype=torch.bool, device="meta")),
        "key_padding_mask must be on the device of q, cpu, got meta",
    ),
    "dropout of all": (
        lambda: attend(x(), x(), x(), DENSE, dropout=1.0),
        "dropout must be a probability, at least 0 and less than 1, got 1.0",
    ),
    "negative dropout": (lambda: explain(x(), x(), x(), DENSE, dropout=-0.1), "dropout must be .* got -0.1"),
    "dropout as a string": (lambda: attend(x(), x(), x(), DENSE, dropout="0.1"), "dropout must be .* got '0.1'"),
    "dropout with a kernel that has none": (
        lambda: attend(x(), x(), x(), DENSE, dropout=0.1, kernel="sdpa"),
        "kernel='sdpa' cannot serve this call: has no dropout. Those that can: 'eager', 'reference'",
    ),
    "seed of a float": (
        lambda: attend(x(), x(), x(), DENSE, dropout=0.1, dropout_seed=0.5),
        "dropout_seed must be an integer of 64 bits, got 0.5",
    ),
    "large seed": (lambda: attend(x(), x(), x(), DENSE, dropout=0.1, dropout_seed=2**63), "an integer of 64 bits"),
    "seeds": (
        lambda: attend(x(), x(), x(), DENSE, dropout=0.1, dropout_seed=torch.tensor([1, 2])),
        r"dropout_seed must be one integer, as a tensor on the CPU, got \(2,\) torch.int64 on cpu",
    ),
    "length of a mask": (lambda: DENSE.mask(-1, 1), "length must not be negative, got -1"),
    "a set of lengths": (lambda: Pattern.dilated({4, 8}, {1, 2}), "segment_lengths must be a sequence of integers"),
    "huge segment": (lambda: Branch(10**20), "segment_length must be a positive integer"),
    "mix": (lambda: attend(x(), x(), x(), DENSE, mix="sum"), "mix must be one of 'exact', 'detached', got 'sum'"),
    "kernel": (
        lambda: attend(x(), x(), x(), DENSE, kernel="fast"),
        "kernel must be one of 'auto', 'flash', 'sdpa', 'cudnn', 'flash3', 'flash4', 'hub', 'eager', 'reference', 'triton', got 'fast'",
    ),
    "kernel in explain": (lambda: explain(x(), x(), x(), DENSE, kernel="fast"), "kernel must be one of"),
    "decreasing documents": (
        lambda: attend(x(), x(), x(), DENSE, documents=torch.tensor([0, 0, 2, 1, 1, 3])),
        "documents must not decrease along a row, got 2 followed by 1 at row 0, token 3",
    ),
    "decreasing documents, reference": (
        lambda: attend(x(), x(), x(), DENSE, documents=torch.tensor([0, 0, 2, 1, 1, 3]), kernel="reference"),
        "documents must not decrease along a row, got 2 followed by 1 at row 0, token 3",
    ),
    "shape of documents": (
        lambda: attend(x(), x(), x(), DENSE, documents=torch.zeros(2, 6).long()),
        r"documents must be \(tokens,\) or \(batch, tokens\), \(6,\) or \(1, 6\), got \(2, 6\)",
    ),
    "dtype of documents": (
        lambda: attend(x(), x(), x(), DENSE, documents=torch.zeros(6)),
        "documents must be integer ids, got torch.float32",
    ),
    "segment of 0": (lambda: Pattern.dilated((0,), (1,)), "segment_length must be a positive integer, got 0"),
    "fraction": (lambda: Pattern.dilated((4.0,), (1,)), "segment_length must be a positive integer, got 4.0"),
    "rate of 0": (lambda: Pattern.dilated((4,), (0,)), "dilation_rate must be a positive integer, got 0"),
    "boolean rate": (lambda: Branch(4, True), "dilation_rate must be a positive integer, got True"),
    "window of 0": (lambda: Pattern.window(0), "window must be a positive integer, got 0"),
    "unequal counts": (
        lambda: Pattern.dilated((4, 8), (1,)),
        r"segment_lengths and dilation_rates must have the same count, got 2 \(\[4, 8\]\) and 1 \(\[1\]\)",
    ),
    "one number": (lambda: Pattern.dilated(2048, 1), "segment_lengths must be a sequence of integers, got 2048"),
    "no branch": (lambda: Pattern(()), "branches must hold at least one Branch, got none"),
    "a branch alone": (lambda: Pattern(Branch(4)), "branches must be a sequence of Branch"),
    "unknown key": (
        lambda: Pattern(({"segment_lenght": 4},)),
        "branches must be Branches or dictionaries of segment_length, .* got {'segment_lenght': 4}",
    ),
    "offsets": (
        lambda: Branch(4, head_offsets="mixed"),
        "head_offsets must be one of 'interleaved', 'blocked', got 'mixed'",
    ),
    "multiplicity": (lambda: Pattern((Branch(4),), "bag"), "multiplicity must be one of 'multiset', 'set', got 'bag'"),
    "is_causal": (lambda: Branch(4, is_causal="yes"), "is_causal must be True or False, got 'yes'"),
    "unequal sum": (
        lambda: Pattern((Branch(4),), "set") + DENSE,
        r"both sides of a \+ b must have one multiplicity, got 'set' and 'multiset'",
    ),
    "heads of a mask": (
        lambda: DENSE.mask(4, 3, 2),
        "heads must be a multiple of kv_heads, both at least 1, got 3 and 2",
    ),
    "length of a plot": (lambda: DENSE.plot(5000), "length must be at most 1024"),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_names_the_argument_the_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_asked_for_by_name_gives_every_reason():
    request = Request("meta", torch.float8_e4m3fn, 9, 2, 64, 32, has_dropout=True)
    with pytest.raises(ValueError, match="kernel='sdpa'") as refused:
        select("sdpa", request)
    reasons = ("these are on meta", "q is torch.float8_e4m3fn", "got 32 and 64", "no dropout", "Those that can: none")
    for reason in reasons:
        assert reason in str(refused.value)
