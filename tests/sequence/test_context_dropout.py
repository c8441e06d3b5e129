"""Dropout in a context: attention's seeds without a step that was begun, and plain dropout on parts of sequences."""

import copy
import pickle
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from contexts import made
from tiers import tiered
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_longnet import (
    DilatedSelfAttention,
    FeedForward,
    LongNet,
    LongNetConfig,
    Pattern,
    SequenceContext,
    attach_context,
    keep_attention,
)

PATTERN = Pattern.dilated((4, 8, 16), (1, 2, 3), is_causal=True)
LENGTH = 24


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Attention, where nobody begins steps


def dropped(context, q, dropout=0.5, layer=0):
    return context.attend(q, q, q, PATTERN, dropout=dropout, layer=layer)


def test_calls_outside_of_steps_drop_other_pairs_and_torchs_seed_repeats_them():
    q, context = drawn(0, 2, 20, 4, 8), SequenceContext(seed=3)
    torch.manual_seed(5)
    first, second = dropped(context, q), dropped(context, q)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropped(SequenceContext(seed=4), q), first)
    torch.manual_seed(6)
    assert not torch.equal(dropped(context, q), first)
    context.begin_step(0)
    assert torch.equal(dropped(context, q), dropped(context, q))
    context.begin_step(None)
    torch.manual_seed(5)
    assert torch.equal(dropped(context, q), first)


@pytest.mark.parametrize("step", [0, None])
def test_attention_that_drops_has_a_number_in_the_model(step):
    q, context = drawn(0, 1, 20, 4, 8), SequenceContext(seed=3)
    context.begin_step(step)
    with pytest.raises(
        ValueError,
        match=r"layer must be the number of this attention .*dropout=p if self.training else 0.0, layer=i.*Got None",
    ):
        dropped(context, q, layer=None)
    assert torch.equal(dropped(context, q, dropout=0.0, layer=None), dropped(context, q, dropout=0.0, layer=1))
    assert not torch.equal(dropped(context, q, layer=0), dropped(context, q, layer=1))


def dropped_over_ranks(group, placement):
    """The results of two calls as whole sequences, and of one process with the same generator as the first rank."""
    context, q = made(group, placement), drawn(0, 2, 23, 4, 8)
    torch.manual_seed(5 + group.rank())  # generators that do not agree
    part = context.split({"q": q}, {"q": 1})["q"]
    result = [context.gather_sequence(dropped(context, part)) for _ in range(2)]
    with context.whole():
        if group.rank() == 1:
            dropped(context, q)  # moves the generator of this rank alone, and waits for none
    result.append(context.gather_sequence(dropped(context, part)))
    torch.manual_seed(5)
    return result, [dropped(SequenceContext(), q) for _ in range(3)]


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_ranks_drop_the_same_pairs_though_their_generators_differ(pool, placement):
    for result, expected in pool.run(3, dropped_over_ranks, placement):
        assert not torch.equal(result[0], result[1])
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "attention kept": {"use_reentrant": False, "context_fn": keep_attention},
}


class Layer(nn.Module):
    """Attention and a feed-forward with dropout in each place."""

    def __init__(self):
        super().__init__()
        self.attention = DilatedSelfAttention(16, 4, PATTERN, dropout=0.3, dtype=torch.float64)
        self.feed_forward = FeedForward(16, 32, dropout=0.3, chunk_tokens=5, dtype=torch.float64)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = x + self.dropout(self.attention(x))
        return x + self.dropout(self.feed_forward(x))


def gradients(context, ways, step=None):
    """The gradients of a layer by each way of calling it, and how they are without one."""
    torch.manual_seed(0)
    layer = Layer()
    attach_context(layer, context)
    x = context.split({"x": drawn(3, 2, LENGTH - 1, 16)}, {"x": 1})["x"]
    result = []
    for options in (None, *ways):
        torch.manual_seed(8)
        context.begin_step(step)
        given = x.clone().requires_grad_()
        out = layer(given) if options is None else checkpoint(layer, given, **WAYS[options])
        torch.manual_seed(9)
        out.square().sum().backward()
        result.append([given.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad(set_to_none=True)
    return result


def gradients_over_ranks(group, step):
    first, *others = gradients(made(group), WAYS, step)
    return [all(torch.equal(a, b) for a, b in zip(first, each, strict=True)) for each in others]


def test_recomputed_activations_drop_the_same_in_one_process():
    first, *others = gradients(SequenceContext(), WAYS)
    assert all(torch.equal(a, b) for each in others for a, b in zip(first, each, strict=True))


@pytest.mark.parametrize("step", tiered([None, 3], quick=[3]))
def test_recomputed_activations_drop_the_same_over_ranks(pool, step):
    assert pool.run(2, gradients_over_ranks, step) == [[True] * len(WAYS)] * 2


def compiled_attention(group):
    torch._dynamo.reset()
    context, q = made(group), drawn(0, 2, LENGTH, 4, 8)
    part = context.split({"q": q}, {"q": 1})["q"]
    compiled = torch.compile(lambda x: dropped(context, x), backend="aot_eager")
    torch.manual_seed(5)
    result = [compiled(part) for _ in range(2)]
    torch.manual_seed(5)
    return [torch.equal(x, dropped(context, part)) for x in result]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_calls_outside_of_steps_draw_too(pool):
    context, q = SequenceContext(), drawn(0, 2, LENGTH, 4, 8)
    compiled = torch.compile(lambda x: dropped(context, x), backend="aot_eager", fullgraph=True)
    for step in (None, 2, None):
        context.begin_step(step)
        torch.manual_seed(5)
        result = [compiled(q) for _ in range(2)]
        torch.manual_seed(5)
        assert all(torch.equal(x, dropped(context, q)) for x in result)
        assert torch.equal(*result) == (step is not None)
    assert pool.run(2, compiled_attention) == [[True, True]] * 2


def one_begins(group):
    """A rank that begins a step and one that does not have other seeds: an error on both."""
    context, q = made(group), drawn(0, 2, LENGTH, 4, 8)
    part = context.split({"q": q}, {"q": 1})["q"]
    if group.rank() == 0:
        context.begin_step(1)
    return dropped(context, part)


def test_a_step_that_one_rank_begins_is_an_error_on_all(pool):
    for is_result, value in pool.outcomes(2, one_begins):
        assert not is_result
        assert value[0] is ValueError
        assert "all ranks of a group must do the same" in value[1]


# Plain dropout


KINDS = {
    "elements": (nn.Dropout, (2, LENGTH, 8)),
    "sequence first": (nn.Dropout, (LENGTH, 2, 8)),
    "heads": (nn.Dropout, (2, 4, LENGTH, 8)),
    "alpha": (nn.AlphaDropout, (2, LENGTH, 8)),
    "tokens": (nn.Dropout1d, (2, LENGTH, 8)),
    "tokens of grids": (nn.Dropout2d, (2, LENGTH, 4, 4)),
    "tokens by alpha": (nn.FeatureAlphaDropout, (2, LENGTH, 8)),
}


def masks(group, step=None, seed=5, data_rank=0):
    """Which elements each kind of module drops on this rank in two calls, and torch's generator after them."""
    position = replace(made(group).position, data_parallel_rank=data_rank, data_parallel_size=2)
    context, result = SequenceContext(position=position), {}
    for name, (kind, shape) in KINDS.items():
        dim = shape.index(LENGTH)
        module = kind(0.5).train()
        attach_context(module, context)
        x = context.split({"x": torch.ones(shape)}, {"x": dim})["x"]
        torch.manual_seed(seed)
        context.begin_step(step)
        result[name] = [(out := module(x)) == out.max() for _ in range(2)]
        result[name].append(torch.rand(3))
    return result


@pytest.mark.parametrize("step", [None, 4])
def test_ranks_drop_other_elements_and_their_generators_stay_in_step(pool, step):
    ours, theirs = pool.run(2, masks, step)
    for name in KINDS:
        assert not torch.equal(ours[name][0], theirs[name][0]), name
        assert not torch.equal(ours[name][0], ours[name][1]), name
        assert 0.2 < ours[name][0].float().mean() < 0.8, name
        assert torch.equal(ours[name][2], theirs[name][2]), name
    again = pool.run(2, masks, step)[0]
    other_group = pool.run(2, masks, step, 5, 1)[0]
    for name in KINDS:
        assert torch.equal(ours[name][0], again[name][0])
        assert not torch.equal(ours[name][0], other_group[name][0]), name


def test_a_step_repeats_its_masks_whatever_the_generator(pool):
    for ours, other, next_step in zip(
        pool.run(2, masks, 4), pool.run(2, masks, 4, 6), pool.run(2, masks, 5), strict=True
    ):
        for name in KINDS:
            assert torch.equal(ours[name][0], other[name][0])
            assert torch.equal(ours[name][1], other[name][1])
            assert not torch.equal(ours[name][0], next_step[name][0])


SHARED = {
    "pooled": (nn.Dropout, (2, 8)),
    "pooled, as wide as a part": (nn.Dropout, (2, LENGTH // 2)),
    "whole": (nn.Dropout, (2, LENGTH, 8)),
    "whole, as wide as a part": (nn.Dropout, (2, LENGTH, LENGTH // 2)),
    "channels of a part": (nn.Dropout1d, (2, 8, LENGTH // 2)),
}


def shared_masks(group):
    """Which elements are dropped of what all ranks hold alike."""
    context = made(group)
    context.split({"input_ids": torch.zeros(2, LENGTH)})
    result = []
    for kind, shape in SHARED.values():
        module, x = kind(0.5).train(), torch.ones(shape)
        attach_context(module, context)
        torch.manual_seed(5)
        result.append((module(x), context.dropout(torch.ones(2, 12, 8), 0.5, is_part=False)))
    with context.whole():
        torch.manual_seed(5)
        whole = nn.Dropout(0.5)
        attach_context(whole, context)
        x = torch.ones(2, 12, 8)
        inside = whole(x)
        torch.manual_seed(5)
        assert torch.equal(inside, nn.functional.dropout(x, 0.5))
    return result


def test_what_all_ranks_hold_alike_is_dropped_alike(pool):
    ours, theirs = pool.run(2, shared_masks)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def uneven(group):
    """Parts of unequal lengths, and one of no token: the next random number of each rank."""
    context, result = made(group), []
    for module in (nn.Dropout(0.5), Layer()):
        attach_context(module, context)
        x = context.split({"x": drawn(3, 2, 4, 16)}, {"x": 1})["x"]
        torch.manual_seed(5)
        module(x)
        result.append(torch.rand(()).item())
    attach_context(module, None)
    return result


def test_parts_of_unequal_lengths_leave_generators_in_step(pool):
    first, *others = pool.run(3, uneven)
    assert all(each == first for each in others)


def feed_forward_masks(group, chunk_tokens):
    """Whether hidden values of the same numbers are dropped alike on two ranks."""
    context = made(group)
    layer = FeedForward(16, 64, dropout=0.5, activation="relu", chunk_tokens=chunk_tokens)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    attach_context(layer, context)
    x = context.split({"x": torch.ones(2, LENGTH, 16)}, {"x": 1})["x"]
    torch.manual_seed(5)
    return layer(x).detach(), torch.rand(())


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_feed_forwards_drop_other_hidden_values_on_each_rank(pool, chunk_tokens):
    (ours, after), (theirs, after_too) = pool.run(2, feed_forward_masks, chunk_tokens)
    assert not torch.equal(ours, theirs)
    assert torch.equal(after, after_too)


def test_whole_sequences_and_evaluation_are_as_in_torch():
    x, module = torch.ones(2, LENGTH, 8), nn.Dropout(0.5)
    torch.manual_seed(5)
    expected = nn.functional.dropout(x, 0.5)
    attach_context(module, context := SequenceContext())
    context.split({"x": x}, {"x": 1})
    torch.manual_seed(5)
    assert torch.equal(module(x), expected)
    torch.manual_seed(5)
    assert torch.equal(context.dropout(x, 0.5), expected)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(context.dropout(x, 0.5, training=False), x)
    assert torch.equal(torch.get_rng_state(), before)


def hooks(group):
    """The numbers of hooks, and whether an error in a module's forward leaves torch's generator as a call does."""
    context, model = made(group), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    numbers = []

    def count(*models):
        numbers.extend((len(each[1]._forward_pre_hooks), len(each[1]._forward_hooks)) for each in models)

    attach_context(model, SequenceContext())
    count(model)
    attach_context(model, context)
    attach_context(model, context)
    count(model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    context.split({"input_ids": torch.zeros(2, LENGTH)})
    after = []
    for call in (lambda: model[1](torch.ones(2, 12, 8)), lambda: model[1](torch.ones(2, 12, 8), 1)):
        torch.manual_seed(5)
        with suppress(TypeError):
            call()
        after.append(torch.rand(()).item())
    attach_context(model, None)
    count(model)
    return numbers, after[0] == after[1]


def test_hooks_come_and_go_with_the_context(pool):
    assert pool.run(2, hooks) == [([(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)], True)] * 2


def compiled_dropout(group):
    """Masks of a compiled module in whole and split batches."""
    torch._dynamo.reset()
    context, result = made(group), []
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    attach_context(module, context)
    compiled = torch.compile(module, backend="aot_eager")
    for length in (LENGTH, 2 * LENGTH):
        x = context.split({"x": torch.ones(2, length, 8)}, {"x": 1})["x"]
        torch.manual_seed(5)
        result.append((compiled(x).detach(), torch.rand(())))
    with context.whole():
        torch.manual_seed(5)
        result.append((compiled(torch.ones(2, 5, 8)).detach(), torch.rand(())))
    context.begin(None)
    torch._dynamo.reset()
    return result, torch._dynamo.explain(module)(torch.ones(2, LENGTH, 8)).graph_break_count


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_modules_drop_other_elements_on_each_rank(pool):
    (ours, breaks), (theirs, _) = pool.run(2, compiled_dropout)
    for i, ((mine, after), (other, after_too)) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other) == (i == 2)
        assert torch.equal(after, after_too)
    assert breaks == 0  # of whole sequences


def layer_drops(group):
    """A model that leaves out layers by torch's generator, between dropouts: it must not part the ranks."""
    context = made(group)
    layers = nn.ModuleList([Layer() for _ in range(4)])
    attach_context(layers, context)
    x = context.split({"x": drawn(3, 2, LENGTH - 1, 16)}, {"x": 1})["x"]
    torch.manual_seed(5)
    kept = []
    for layer in layers:
        kept.append(torch.rand(()).item() < 0.6)
        if kept[-1]:
            x = layer(x)
    whole = context.gather_sequence(x)
    dist.barrier(group)
    return kept, whole.detach()


def test_layers_that_are_left_out_at_random_are_the_same_on_all_ranks(pool):
    (kept, whole), *others = pool.run(2, layer_drops)
    assert all(each[0] == kept for each in others)
    assert torch.isfinite(whole).all()


def model_drops(group, step):
    """What the dropouts of a LongNet drop on this rank, and its gradients for each way to recompute."""
    context, dropped, grads = made(group), [], []
    for recompute in ("nothing", "all but attention", "everything"):
        torch.manual_seed(0)
        options = {"dropout": 0.3, "attention_dropout": 0.2, "recompute": recompute, "feed_forward_chunk": 5}
        model = LongNet(LongNetConfig(PATTERN, vocab_size=11, dim=16, layers=2, heads=4, **options)).double()
        attach_context(model, context)
        if recompute == "nothing":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.register_forward_hook(lambda _, __, out: dropped.append(out == 0))
        tokens = torch.arange(LENGTH).expand(2, LENGTH) % 11
        batch = context.split({"input_ids": tokens, "labels": tokens})
        torch.manual_seed(5)
        context.begin_step(step)
        loss, _ = model(batch["input_ids"], batch["labels"])
        torch.manual_seed(6)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    same = [all(torch.equal(a, b) for a, b in zip(grads[0], each, strict=True)) for each in grads[1:]]
    return dropped, same


@pytest.mark.parametrize("step", tiered([None, 3], quick=[3]))
def test_a_model_drops_other_values_on_each_rank_and_the_same_when_it_recomputes(pool, step):
    (ours, same), (theirs, same_too) = pool.run(2, model_drops, step)
    assert len(ours) == 5  # of the embeddings, and two in each of two blocks
    assert not any(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert same == same_too == [True, True]
