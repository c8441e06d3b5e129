"""The placement that balances packed rows: each token once, ranks with equally many tokens and about as many pairs."""

import random
from itertools import accumulate, pairwise

import pytest
from cells import held
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longnet import Pattern, balanced_placement, sequence_plan
from lightning_longnet.attention.parallel.document_placement import BALANCE, causal_pairs
from lightning_longnet.attention.parallel.placement import Placement

# Published mixes of lengths.  Each kind of document has a share of the documents, and bounds or a mean of its tokens;
# lengths between bounds are drawn evenly in their logarithm, and those about a mean from an exponential distribution.
MIXES = {
    # LMSYS-Chat-1M: Yuan et al., Efficient Long Context Fine-tuning with Chunk Flow, arXiv:2503.02356, table 1
    "chats": [
        (90.499, (64, 1024)),
        (9.04, (1024, 4096)),
        (0.369, (4096, 8192)),
        (0.079, (8192, 32768)),
        (0.009, (32768, 131072)),
        (0.004, (131072, 303000)),
    ],
    # supervised fine-tuning: Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783, table 7
    "instructions": [(52.66, 974), (14.89, 753), (3.01, 520), (8.14, 298), (21.19, 662), (0.11, 38136)],
    # pre-training: documents and bytes of each source on the card of iNeil77/pseudo-mini-pile, at four bytes a token
    "sources": [
        (11427438, 2765 / 4),
        (6474479, 4784 / 4),
        (32612199, 6804 / 4),
        (107443, 458351 / 4),
        (716532, 2839 / 4),
        (3247716, 4543 / 4),
        (1609190, 4678 / 4),
    ],
}


def packed_row(mix, tokens, seed):
    """Return the lengths of documents that fill a row; the last one is cut."""
    rng, lengths = random.Random(seed), []
    while (left := tokens - sum(lengths)) > 0:
        ((_, size),) = rng.choices(MIXES[mix], [share for share, _ in MIXES[mix]])
        drawn = size[0] * (size[1] / size[0]) ** rng.random() if isinstance(size, tuple) else rng.expovariate(1 / size)
        lengths.append(min(left, 1 + int(drawn)))
    return lengths


def busiest(placement, documents):
    """Return the most causal pairs of a rank over the mean."""
    pairs = causal_pairs(placement, [0, *accumulate(documents)])
    return max(pairs) * len(pairs) / sum(pairs)


@pytest.mark.parametrize(
    ("tokens", "ranks"), [(2**17, 8), (2**17, 32), pytest.param(2**19, 64, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("mix", MIXES)
def test_packed_causal_rows_are_balanced(mix, tokens, ranks):
    worst = {"contiguous": 0.0, "zigzag": 0.0}
    for seed in range(5):
        documents = packed_row(mix, tokens, seed)
        assert busiest(balanced_placement(documents, ranks), documents) <= BALANCE == 1.05
        for kind in worst:
            worst[kind] = max(worst[kind], busiest(Placement.even(tokens, ranks, kind), documents))
    # the rows are hard: neither of the other placements balances them
    assert min(worst.values()) > 1.4


@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=12), ranks=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_token_is_on_one_rank(documents, ranks):
    placement, tokens = balanced_placement(documents, ranks), sum(documents)
    assert max(placement.lengths) - min(placement.lengths) <= 1
    of_ranks = [held(placement, rank).tolist() for rank in range(ranks)]
    assert sorted(token for of_rank in of_ranks for token in of_rank) == list(range(tokens))
    places = [place for length in documents for place in range(length)]
    assert causal_pairs(placement, [0, *accumulate(documents)]) == [
        sum(places[token] + 1 for token in of_rank) for of_rank in of_ranks
    ]
    for rank, of_rank in enumerate(of_ranks):
        assert of_rank == sorted(of_rank)
        chunks = placement.chunks(rank)
        assert all(a.end < b.begin and b.local == a.local + a.end - a.begin for a, b in pairwise(chunks))
    for begin, end in ((0, tokens), (3, 4), (-2, 9), (tokens // 3, tokens // 2)):
        held_by = {rank for rank, of_rank in enumerate(of_ranks) if any(begin <= token < end for token in of_rank)}
        assert placement.holders(begin, end) == held_by


def test_the_plan_of_a_sequence_counts_the_same_pairs():
    documents = packed_row("sources", 2**13, 1)
    placement = balanced_placement(documents, 4)
    plan = sequence_plan(Pattern.dense(True), placement.lengths, 2, placement=placement, documents=documents)
    assert list(plan.pairs) == [2 * pairs for pairs in causal_pairs(placement, [0, *accumulate(documents)])]
    assert "4 ranks, documents" in str(plan)
    with pytest.raises(ValueError, match=r"lengths must be those of the placement, \(2048, 2048, 2048, 2048\), got"):
        sequence_plan(Pattern.dense(True), (2047, 2049, 2048, 2048), 2, placement=placement, documents=documents)


def test_as_few_documents_are_cut_as_balance_allows():
    """Equal documents are not cut: each rank has as many as another, and no key travels."""
    placement = balanced_placement((64,) * 32, 8)
    assert all(len(placement.chunks(rank)) == 1 for rank in range(8))
    longest_first = balanced_placement((4096, *(16,) * 256), 4)
    assert [len(longest_first.chunks(rank)) for rank in range(4)] == [2, 3, 3, 2]


def test_what_is_no_placement():
    with pytest.raises(ValueError, match=r"lengths of at least 1, over at least one rank, got \(3, 0\) over 2"):
        balanced_placement((3, 0), 2)
    with pytest.raises(ValueError, match="must hold each token of the sequence once"):
        Placement.of_chunks([[(0, 3)], [(4, 5)]])
    with pytest.raises(ValueError, match="placement must be one of 'contiguous', 'zigzag', got 'documents'"):
        Placement((3, 3), "documents")
