"""Generation from a cache is a loop that computes each row alone and whole, whatever rows and options are drawn."""

import pytest
import torch
from contexts import made as context_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cached_model import made
from test_rewinding import patterns

from lightning_longnet.inference.sampling import Sampler, Sampling

pytestmark = pytest.mark.filterwarnings("ignore:.*(Nothing crosses|In the branch).*")
VOCABULARY, COLUMNS = 19, 24


def by_recomputation(net, rows, tokens, end, options):
    """Continue rows of unequal length: each token from the whole of its row alone, up to the end token of all."""
    rows, ended = [row.clone() for row in rows], [False] * len(rows)
    texts = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    is_token = torch.zeros_like(texts)
    for i, row in enumerate(rows):
        texts[i, : len(row)], is_token[i, : len(row)] = row, 1
    sampler, added = Sampler(Sampling(**options), texts, is_token), [[] for _ in rows]
    while len(added[0]) < tokens and not all(ended):
        logits = torch.stack([net(row[None])[0, -1] for row in rows])
        for i, token in enumerate(sampler.sample(logits)[:, 0].tolist()):
            added[i].append(end if ended[i] else token)
            ended[i] = ended[i] or token == end
            rows[i] = torch.cat([rows[i], torch.tensor(added[i][-1:])])
    return added


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, COLUMNS), min_size=1, max_size=3))
    begins = [draw(st.sampled_from([0, COLUMNS - n, draw(st.integers(0, COLUMNS - n))])) for n in lengths]
    options = {"repetition_penalty": draw(st.sampled_from([1.0, 1.3, 3.0, 0.8]))}
    options |= draw(
        st.sampled_from([{"temperature": 0.0}, {"temperature": 0.0}, {"top_k": 5, "seed": 3}, {"top_p": 0.8}])
    )
    return draw(patterns()), lengths, begins, draw(st.integers(1, 30)), draw(st.none() | st.integers(0, 29)), options


def continued(group, pattern, prompts, mask, tokens, end, options):
    with torch.no_grad():
        net = made(pattern)
        context = None if group is None else context_of(group)
        return net.generate(prompts, tokens, attention_mask=mask, end=end, context=context, **options)


@settings(max_examples=15, deadline=None)
@given(case=cases(), is_split=st.booleans())
@torch.no_grad()
def test_rows_go_on_and_end_as_each_alone(pool, case, is_split):
    """Rows with padding on any side, repeated tokens that count or not, and an end token of one of them."""
    pattern, lengths, begins, tokens, place, options = case
    net = made(pattern)
    places = torch.arange(COLUMNS)
    mask = torch.stack([(places >= b) & (places < b + n) for b, n in zip(begins, lengths, strict=True)]).long()
    prompts = torch.randint(VOCABULARY, mask.shape)  # padding holds tokens, too
    rows = [row[is_token == 1] for row, is_token in zip(prompts, mask, strict=True)]
    expected = by_recomputation(net, rows, tokens, None, options)
    end = None
    if place is not None:  # a token that the first row comes to, at this place or before, or in its prompt
        end = expected[0][min(place, tokens - 1)]
        expected = by_recomputation(net, rows, tokens, end, options)
    given = (pattern, prompts, mask if begins != [0] * len(rows) or set(lengths) != {COLUMNS} else None)
    for result in (
        pool.run(2, continued, *given, tokens, end, options)
        if is_split
        else [continued(None, *given, tokens, end, options)]
    ):
        assert torch.equal(result[:, :COLUMNS], prompts)
        assert result[:, COLUMNS:].tolist() == expected


@pytest.mark.parametrize("end", [-1, VOCABULARY])
def test_an_end_that_is_no_token_is_refused(end):
    with pytest.raises(ValueError, match=f"end must be a token of the model, from 0 to 18, got {end}"):
        made().generate(torch.zeros(1, 1, dtype=torch.int64), 1, end=end)
