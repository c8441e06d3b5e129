"""Checkpointing of a whole block: what is computed again, what is kept, and that nothing changes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_longnet import DilatedSelfAttention, FeedForward, Pattern, keep_attention

LONGNET = Pattern.dilated((16, 32, 64), (1, 2, 4), is_causal=True)


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = DilatedSelfAttention(32, 4, LONGNET, num_kv_heads=2, sub_norm=True, dropout=dropout)
        self.feed_forward = FeedForward(32, sub_norm=True)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])

    def forward(self, x, **settings):
        x = x + self.attention(self.norms[0](x), **settings)
        return x + self.feed_forward(self.norms[1](x))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def step(block, x, settings, call):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with Operations() as operations:
        out = call(block, x, **settings)
        torch.manual_seed(50)
        out.square().sum().backward()
    result = [out, x.grad, *(p.grad for p in block.parameters())]
    block.zero_grad(set_to_none=True)
    return result, operations.seen


def plain(block, x, **settings):
    return block(x, **settings)


def whole(block, x, **settings):
    return checkpoint(block, x, use_reentrant=False, **settings)


def kept(block, x, **settings):
    return checkpoint(block, x, use_reentrant=False, context_fn=keep_attention, **settings)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("conditions", ["none", "padding and documents"])
def test_attention_is_computed_once_and_all_else_twice(dropout, conditions):
    torch.manual_seed(0)
    block, x = Block(dropout), torch.randn(2, 70, 32)
    settings = {}
    if conditions != "none":
        settings = {
            "documents": torch.arange(70) // 30,
            "key_padding_mask": torch.arange(70).expand(2, 70) >= torch.tensor([[70], [50]]),
        }
    truth, once = step(block, x, settings, plain)
    for call, attentions in ((whole, 2), (kept, 1)):
        result, operations = step(block, x, settings, call)
        assert all(torch.equal(a, b) for a, b in zip(result, truth, strict=True))
        assert (operations["attend"], operations["attend_backward"]) == (attentions, 1)
        assert operations["gelu"] == 2 * once["gelu"] == 2
    assert (once["attend"], once["attend_backward"]) == (1, 1)


def test_no_more_is_kept_than_the_input_and_what_attention_gave():
    block, x = Block(), torch.randn(2, 70, 32, requires_grad=True)
    held = {}

    def hold(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        sizes = []
        for call in (plain, kept):
            held.clear()
            call(block, x)
            sizes.append(sum(size for pointer, size in held.items() if pointer not in parameters))
    assert sizes[1] < sizes[0] / 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.full), 0.3])
def test_a_compiled_block_has_no_graph_break_and_gives_equal_results(dropout):
    torch.manual_seed(0)
    block, x = Block(dropout).double(), torch.randn(2, 70, 32, dtype=torch.float64)
    settings = {"key_padding_mask": torch.arange(70).expand(2, 70) >= torch.tensor([[70], [50]])}
    assert torch._dynamo.explain(block)(x, **settings).graph_break_count == 0
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for length in (70, 33):
        x, settings = x[:, :length], {"key_padding_mask": settings["key_padding_mask"][:, :length]}
        truth, _ = step(block, x, settings, plain)
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        out = compiled(given, **settings)
        out.square().sum().backward()
        result = [out, given.grad, *(p.grad for p in block.parameters())]
        block.zero_grad(set_to_none=True)
        torch.testing.assert_close(result, truth)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_documents_and_positions_of_changing_lengths_are_compiled_without_a_break():
    layer = DilatedSelfAttention(32, 4, LONGNET, rotary="xpos")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (20, 33, 27, 20):
        x = torch.randn(2, length, 32)
        for settings in (
            {},
            {"documents": torch.arange(length) // 6},
            {"documents": (torch.arange(length) // 6).expand(2, length)},
            {"positions": torch.arange(length) + 3},
        ):
            torch.testing.assert_close(compiled(x, **settings), layer(x, **settings))
