"""Tokens that are dropped from a cache leave nothing behind, or the call says that it cannot be undone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cached_model import KINDS, made
from tiers import tiered

from lightning_longnet import Branch, Pattern, load_cache, save_cache
from lightning_longnet.inference import layer

pytestmark = pytest.mark.filterwarnings("ignore:.*(Nothing crosses|In the branch).*")
NAMES = ["xpos", "a pattern for each layer", "block sparse", "zero keys", "learned positions"]
WINDOW = Pattern.window(5, is_causal=True)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@st.composite
def patterns(draw):
    """A causal pattern of one to three branches: segments with rates, windows, and dense attention."""
    branches = []
    for _ in range(draw(st.integers(1, 3))):
        rate = draw(st.sampled_from([1, 1, 2, 3]))
        length = draw(st.sampled_from([None, 4, 6, 12, 24, 40]))
        length = None if length is None else max(length, 2 * rate)
        window = draw(st.sampled_from([None, None, 1, 4, 9]))
        branches.append(Branch(length, rate, window=window, is_causal=True))
    return Pattern(tuple(branches), draw(st.sampled_from(["multiset", "set"])))


DROPS = st.lists(st.integers(0, 9), max_size=3)
MOVES = st.lists(st.tuples(st.integers(1, 15), DROPS), min_size=2, max_size=10)
# Tokens go into a segment that has ended, where no head sees rows before them; `rewind` goes on from there
INTO_ENDED = {
    "two heads": (Pattern.dilated((12,), (3,), is_causal=True), 2, [(14, [3, 5]), (6, [])]),
    "one head": (Pattern.dilated((12,), (3,), is_causal=True), 1, [(14, [4]), (1, [5]), (6, [])]),
    "a window": (Pattern((Branch(12, 3, window=7, is_causal=True),)), 1, [(14, [4]), (1, [5]), (6, [])]),
}


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), moves=MOVES, kv_heads=st.sampled_from([1, 2, 4]), by_branches=st.booleans())
def test_texts_after_rewinding_are_as_computed_at_once(pattern, moves, kv_heads, by_branches):
    """Append, rewind, append: each step equals the whole text that is then there, and what is refused was dropped."""
    check_moves(pattern, moves, kv_heads, by_branches)


@pytest.mark.parametrize("kind", INTO_ENDED)
def test_rows_of_a_segment_that_ended_stay_dropped(kind):
    pattern, kv_heads, moves = INTO_ENDED[kind]
    check_moves(pattern, moves, kv_heads, False, heads=kv_heads)


def test_steps_back_over_segments_need_no_step_at_once():
    """Rows of a long segment are kept although a rewind goes to the beginning of a short one that has ended."""
    model, text = made(), torch.randint(19, (1, 40))
    cache = model.new_cache()
    model(text[:, :30], cache=cache)
    for at in (24, 20, 16):
        cache.rewind(cache.positions[0] - at)
        assert cache.rewindable() == 0
    torch.testing.assert_close(model(text[:, 16:], cache=cache), model(text)[:, 16:], rtol=0, atol=1e-9)


def test_copies_know_which_rows_a_rewind_left(tmp_path):
    """Rows that are selected, a copy and a file keep it; a document that begins has all its rows."""
    model, text = made(Pattern.dilated((300,), (3,), is_causal=True), kv_heads=1), torch.randint(19, (2, 310))
    cache = model.new_cache(2)
    model(text[:, :301], cache=cache)
    cache.rewind([3, 0])
    save_cache(cache, tmp_path / "text", model)
    cache.select(torch.tensor([1, 0]))
    for same, row in ((cache, 1), (copy.deepcopy(cache), 1), (load_cache(tmp_path / "text", model), 0)):
        assert (same.positions[row], same.rewindable(row), same.rewindable(1 - row)) == (298, 0, 1)
        drops = [0, 0]
        drops[row] = 8
        with pytest.raises(ValueError, match=f"tokens must be at most 0 in row {row}, got 8"):
            same.rewind(drops)
        last = text.flip(0)[:, 301:] if row else text[:, 301:]
        model(last, documents=torch.tensor([[0] * 4 + [1] * 5] * 2), cache=same)
        assert same.rewindable(row) == 4
        same.rewind(4)


def check_moves(pattern, moves, kv_heads, by_branches, **options):
    model, rng = made(pattern, kv_heads=kv_heads, layers=2, **options), torch.Generator().manual_seed(3)
    cache, text = model.new_cache(2), torch.zeros(2, 0, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        if by_branches:
            patch.setattr(layer, "BRANCH_TOKENS", 2)
        for size, drops in moves:
            further = torch.randint(19, (2, size), generator=rng)
            text = torch.cat([text, further], 1)
            expected = model(text)[:, -size:]
            torch.testing.assert_close(model(further, cache=cache), expected, rtol=0, atol=1e-9)
            for dropped in drops:
                possible = cache.rewindable()
                assert 0 <= possible <= text.shape[1]
                try:
                    cache.rewind(dropped)
                except ValueError:
                    assert dropped > possible
                    continue
                text = text[:, : text.shape[1] - dropped]
                assert cache.positions == (text.shape[1],) * 2


@pytest.mark.parametrize("kind", tiered(NAMES, quick=["xpos"]))
def test_layers_of_each_kind_rewind(kind):
    model, text = made(**KINDS[kind]), torch.randint(19, (1, 70))
    expected, cache = model(text), model.new_cache()
    at = 0
    for size in [17, *[3] * 12, *[1] * 12]:
        copied = copy.deepcopy(cache)
        model(torch.randint(19, (1, 2)), cache=cache)  # a draft that is not taken
        cache = copied if cache.rewindable() < 2 else (cache.rewind(2), cache)[1]
        result = model(text[:, at : at + size], cache=cache)
        torch.testing.assert_close(result, expected[:, at : at + size], rtol=0, atol=1e-9)
        at += size


def test_rows_rewind_by_their_own_numbers():
    model, texts = made(), torch.randint(19, (3, 40))
    cache = model.new_cache(3)
    model(texts[:, :31], cache=cache)
    cache.rewind([2, 0, 3])
    assert cache.positions == (29, 31, 28)
    step = torch.stack([texts[0, 29], texts[1, 31], texts[2, 28]])[:, None]
    result = model(step, cache=cache)
    for row, n in enumerate((30, 32, 29)):
        torch.testing.assert_close(result[row, 0], model(texts[row : row + 1, :n])[0, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", tiered([torch.int8, torch.bfloat16, torch.float64], quick=[torch.int8]))
def test_rounded_rows_are_those_of_a_cache_that_never_had_the_tokens(dtype):
    """The same steps without those that were dropped give the same bits."""
    model, text = made().float(), torch.randint(19, (1, 60))
    plain, cache = model.new_cache(dtype=dtype), model.new_cache(dtype=dtype)
    count = 0
    for at in range(60):
        if cache.positions[0] % 4 in (1, 2):
            model(torch.randint(19, (1, 1)), cache=cache)
            cache.rewind(1)
            count += 1
        part = text[:, at : at + 1]
        assert torch.equal(model(part, cache=cache), model(part, cache=plain))
    assert count == 30
    for own, other in zip(cache.layers, plain.layers, strict=True):
        for a, b in zip(own.stores, other.stores, strict=True):
            read = (store.read(slice(None), b.slots, torch.float64) for store in (a, b))
            torch.testing.assert_close(*read, rtol=0, atol=0)


def test_what_was_dropped_is_refused():
    model, text = made(), torch.randint(19, (2, 40))
    cache = model.new_cache(2)
    model(text[:, :30], cache=cache)
    assert cache.rewindable() == 2  # the segment of 4 began at 28
    with pytest.raises(ValueError, match=r"tokens must be at most 2 in row 0, got 3: .* from 27 on see .*deepcopy"):
        cache.rewind(3)
    assert cache.positions == (30, 30)
    torch.testing.assert_close(model(text[:, 30:35], cache=cache), model(text[:, :35])[:, 30:], rtol=0, atol=1e-9)
    wrongs = ((-1, "tokens must be 0 or more"), ([1], "a list of 2 such"), (36, "at most those of row 0, 35"))
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            cache.rewind(wrong)
    cache.rewind(35)
    torch.testing.assert_close(model(text, cache=cache), model(text), rtol=0, atol=1e-9)

    windows = made(WINDOW)
    cache = windows.new_cache()
    windows(text[:1, :20], cache=cache)
    with pytest.raises(ValueError, match=r"tokens must be at most 0 in row 0, got 1: .* a window has passed them"):
        cache.rewind(1)


def test_documents_rewind_within_the_last_one():
    model, text = made(), torch.randint(19, (1, 25))
    documents = torch.tensor([[0] * 10 + [1] * 15])
    cache = model.new_cache()
    model(text[:, :17], documents=documents[:, :17], cache=cache)
    with pytest.raises(ValueError, match="tokens must be fewer than those of the last document of row 0, 7, got 7"):
        cache.rewind(7)
    cache.rewind(3)
    result = model(text[:, 14:], documents=documents[:, 14:], cache=cache)
    torch.testing.assert_close(result, model(text, documents=documents)[:, 14:], rtol=0, atol=1e-9)
