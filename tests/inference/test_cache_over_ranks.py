"""A cache that ranks share gives what a cache of one process gives, and each rank keeps its share of the rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cached_model import KINDS, made
from test_rewinding import patterns
from tiers import tiered

from lightning_longnet import Pattern, load_cache, save_cache
from lightning_longnet.inference import branch_attention, layer
from lightning_longnet.inference import step as step_module

pytestmark = pytest.mark.filterwarnings("ignore:.*(Nothing crosses|In the branch).*")
SIZES = ([1] * 100, [50, *[3] * 16, 2], [64, 36], [7, 93], [48, 21, 31])
SHARING = (64, 48)  # the first sizes of those whose steps ranks share, if they begin where segments do
NAMES = ["xpos", "a pattern for each layer", "block sparse", "grouped heads, blocked", "zero keys"]


@torch.no_grad()
def by_steps_over_ranks(group, options, texts, every_size):
    """The logits of texts that ranks are given in parts of these sizes, and the slots of each cache."""
    model, result = made(**options), []
    with pytest.MonkeyPatch.context() as patch:
        for sizes in every_size:
            patch.setattr(layer, "BRANCH_TOKENS", 16 if sizes[0] in (7, 64) else 128)
            patch.setattr(branch_attention, "SCORES", 40)
            patch.setattr(branch_attention, "KEYS", 3)
            patch.setattr(step_module, "SHARED_TOKENS", 4 if sizes[0] in SHARING else 64)
            cache, computed = model.new_cache(len(texts), group=group), []
            hook = model.blocks[0].register_forward_hook(lambda _, given, out: computed.append(out.shape[1]))  # noqa: B023
            logits = torch.cat([model(part, cache=cache) for part in texts.split(sizes, 1)], 1)
            hook.remove()
            slots = [[store.data.shape[3] for store in each.stores] for each in cache.layers]
            result.append((logits, cache.most_rows(), slots, computed))
    return result


@pytest.mark.parametrize(
    ("kind", "world"),
    tiered(
        [(k, w) for k in NAMES for w in (1, 2, 4)], quick=[("xpos", 2)], long=[("block sparse", 4), ("zero keys", 1)]
    ),
)
def test_each_token_is_as_in_the_whole_text(pool, kind, world):
    """And each rank keeps at most its share of the rows, and one more of each branch."""
    texts = torch.randint(19, (2, 100))
    with torch.no_grad():
        expected = made(**KINDS[kind])(texts)
    outcomes = pool.run(world, by_steps_over_ranks, KINDS[kind], texts, SIZES)
    for rank, result in enumerate(outcomes):
        assert [each[3][0] for each in result[2::2]] == [n * (rank + 1) // world - n * rank // world for n in SHARING]
        for (logits, most, slots, _), (first, *_) in zip(result, outcomes[0], strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
            assert torch.equal(logits, first)
            for bound, own in zip(most, slots, strict=True):
                assert bound is None or sum(own) <= bound / world + len(own)


@st.composite
def cases(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.lists(st.sampled_from([1, 1, 3, 20, 48, 64]), min_size=2, max_size=6))
    return draw(patterns()), {"kv_heads": heads, "layers": 2}, sizes, draw(st.sampled_from([2, 3, 4]))


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_drawn_patterns_and_blocks(pool, case):
    pattern, options, sizes, world = case
    texts = torch.randint(19, (1, sum(sizes)))
    options = {"pattern": pattern, **options}
    with torch.no_grad():
        expected = made(**options)(texts)
    for ((logits, *_),) in pool.run(world, by_steps_over_ranks, options, texts, [sizes]):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def documents_over_ranks(group, text, documents):
    """The logits and states of documents that begin within steps which ranks share."""
    model, result, states = made(**KINDS["xpos"]), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "SHARED_TOKENS", 4)
        cache = model.new_cache(2, group=group)
        for part, ids in zip(text.split([32, 16, 3, 9], 1), documents.split([32, 16, 3, 9], 1), strict=True):
            own = []
            hidden = model.encode(model.embed(part), documents=ids, cache=cache, states=own)
            result.append(model.head(hidden))
            states.append(torch.stack(own))
    return torch.cat(result, 1), torch.cat(states, 2)


def test_documents_begin_within_steps_that_ranks_share(pool):
    text = torch.randint(19, (2, 60))
    documents = torch.stack([torch.tensor([3] * 17 + [5] + [6] * 42), torch.tensor([0] * 40 + [2] * 20)])
    (expected,) = pool.run(1, documents_over_ranks, text, documents)
    for result in pool.run(3, documents_over_ranks, text, documents):
        for own, right in zip(result, expected, strict=True):
            torch.testing.assert_close(own, right, rtol=0, atol=1e-9)


LENGTHS = (37, 1, 20)


@torch.no_grad()
def unequal_over_ranks(group, texts):
    """The logits of padded prompts with documents, and of steps after them."""
    model = made(**KINDS["xpos"])
    mask = torch.stack([(torch.arange(37) < n).long() for n in LENGTHS])
    documents = (torch.arange(60) >= 11).long().expand(3, 60)
    cache = model.new_cache(3, group=group)
    result = [model(texts[:, :37], attention_mask=mask, documents=documents[:, :37], cache=cache)]
    for i in range(20):
        step = torch.stack([texts[b, n + i] for b, n in enumerate(LENGTHS)])[:, None]
        ids = torch.stack([documents[b, n + i] for b, n in enumerate(LENGTHS)])[:, None]
        result.append(model(step, documents=ids, cache=cache))
    return torch.cat(result, 1)


def test_unequal_prompts_and_documents(pool):
    texts = torch.randint(19, (3, 60))
    (expected,) = pool.run(1, unequal_over_ranks, texts)
    for result in pool.run(2, unequal_over_ranks, texts):
        for b, n in enumerate(LENGTHS):
            torch.testing.assert_close(result[b, :n], expected[b, :n], rtol=0, atol=1e-9)
        torch.testing.assert_close(result[:, 37:], expected[:, 37:], rtol=0, atol=1e-9)


@torch.no_grad()
def attended_with_sinks(group, parts, sinks, sizes):
    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.models.blocks import BlocksConfig

    pattern = Pattern.dilated((4, 16), (1, 2), is_causal=True)
    config = BlocksConfig(pattern, dim=16, layers=1, heads=4, kv_heads=2)
    cache, result = DilatedCache(config, dtype=torch.float64, group=group), []
    for part in zip(*(x.split(sizes, 1) for x in parts), strict=True):
        with cache.step(part[0].shape[1]) as step:
            result.append(step.layer(0).attend(*part, sinks=sinks))
    return torch.cat(result, 1)


def test_a_sink_counts_once(pool):
    parts = [torch.randn(1, 60, n, 4, dtype=torch.float64) for n in (4, 2, 2)]
    sinks, sizes = torch.randn(4, dtype=torch.float64), [5, *[1] * 20, *[3] * 5, 20]
    (expected,) = pool.run(1, attended_with_sinks, parts, sinks, sizes)
    for result in pool.run(4, attended_with_sinks, parts, sinks, sizes):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def narrow_over_ranks(group, text, dtype):
    model = made().float()
    cache = model.new_cache(dtype=dtype, group=group)
    return torch.cat([model(part, cache=cache) for part in text.split([20, *[1] * 40], 1)], 1)


@pytest.mark.parametrize("dtype", tiered([torch.int8, torch.bfloat16, torch.float16], quick=[torch.int8]))
def test_narrow_rows_are_those_of_one_process(pool, dtype):
    text = torch.randint(19, (1, 60))
    (expected,) = pool.run(1, narrow_over_ranks, text, dtype)
    for result in pool.run(2, narrow_over_ranks, text, dtype):
        assert (result - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
def counted_over_ranks(group, text):
    model = made(kv_heads=2, layers=3).float()
    cache = model.new_cache(len(text), group=group)
    model(text[:, :20], cache=cache)
    traffic, result = cache.ranks.comm.traffic, []
    for token in text[:, 20:].split(1, 1):
        before = traffic.messages, traffic.sent_bytes
        model(token, cache=cache)
        result.append((traffic.messages - before[0], traffic.sent_bytes - before[1]))
    return result


@pytest.mark.parametrize("world", tiered([2, 4], quick=[2]))
def test_a_token_costs_one_exchange_a_layer_whatever_the_cache_holds(pool, world):
    """Of out and lse of each head in float32, and of three numbers that are compared."""
    batch, heads, width = 2, 4, 4
    messages = (3 + 1) * (world - 1)
    sent = (world - 1) * (3 * batch * heads * (width + 1) * 4 + 3 * 8)
    for result in pool.run(world, counted_over_ranks, torch.randint(19, (batch, 60))):
        assert result == [(messages, sent)] * 40


@torch.no_grad()
def moved_over_ranks(group, text, path):
    """Logits after a rewind, after a file, and after a selection of texts."""
    model = made()
    cache = model.new_cache(2, group=group)
    model(text[:, :29], cache=cache)
    model(text[:, 40:42], cache=cache)
    cache.rewind(2)
    result = [model(text[:, 29:33], cache=cache)]
    save_cache(cache, path, model)
    cache = load_cache(path, model, group=group)
    result.append(model(text[:, 33:41], cache=cache))
    cache.select(torch.tensor([1, 1]))
    result.append(model(text[1:, 41:].expand(2, -1), cache=cache))
    return result


@torch.no_grad()
def test_caches_rewind_select_and_go_to_files_over_ranks(pool, tmp_path):
    model, text = made(), torch.randint(19, (2, 60))
    expected = model(text)
    for world in (2, 1):
        for first, second, third in pool.run(world, moved_over_ranks, text, tmp_path / f"text{world}"):
            torch.testing.assert_close(first, expected[:, 29:33], rtol=0, atol=1e-9)
            torch.testing.assert_close(second, expected[:, 33:41], rtol=0, atol=1e-9)
            torch.testing.assert_close(third, expected[1:, 41:].expand(2, -1, -1), rtol=0, atol=1e-9)
    # what two ranks wrote is what one process reads
    cache = load_cache(tmp_path / "text2", model)
    torch.testing.assert_close(model(text[:, 33:], cache=cache), expected[:, 33:], rtol=0, atol=1e-9)


@torch.no_grad()
def mistaken(group, mistake):
    model, rank = made(), group.rank()
    text = torch.arange(22)[None] % 19
    cache = model.new_cache(group=group)
    if mistake == "dtype" and rank:
        cache = model.new_cache(dtype=torch.int8, group=group)
    model(text, cache=cache)
    if mistake == "tokens" and rank:
        text = text + 1 - 1 * (text == 18)
    elif mistake == "length" and rank:
        text = text[:, 1:]
    elif mistake == "rewind" and rank:
        cache.rewind(1)
    elif mistake == "training" and rank:
        model.train()
    model(text, cache=cache)


HOLDS = "rank 1 of 2 holds another cache than rank 0: the ranks of a group must make it alike"
GIVEN = "rank 1 of 2 was given other tokens than rank 0, or other options: all must go on alike"


@pytest.mark.parametrize(
    ("mistake", "messages"),
    [
        ("tokens", [GIVEN] * 2),
        ("length", [GIVEN] * 2),
        ("dtype", [HOLDS] * 2),
        ("rewind", [HOLDS] * 2),
        (
            "training",
            [
                "rank 1 of 2 cannot go on with these tokens: its own message says why",
                "the model must be in evaluation mode with a cache, got training: call model.eval()",
            ],
        ),
    ],
)
def test_mistakes_are_errors_on_all_ranks(pool, mistake, messages):
    outcomes = pool.outcomes(2, mistaken, mistake)
    assert [(is_result, outcome[:2]) for is_result, outcome in outcomes] == [
        (False, (ValueError, message)) for message in messages
    ]
