"""Sequences that a model goes on with, on one process and over ranks."""

import pytest
import torch
from contexts import made

from lightning_longnet import LongNet, LongNetConfig, Pattern, attach_context
from lightning_longnet.models import generation
from lightning_longnet.models.generation import generate

pytestmark = pytest.mark.filterwarnings("ignore:Nothing crosses")

PATTERN = Pattern.dilated((4, 16), (1, 2), is_causal=True)
PROMPTS = torch.tensor([[5, 1, 7, 2, 9], [3, 3, 8, 0, 4]])
DRAWN = {"temperature": 0.7, "top_k": 5, "seed": 3}


def model():
    torch.manual_seed(1)
    options = {"dropout": 0.3, "embedding_scale": 1.5, "tied_embeddings": False}
    result = LongNet(LongNetConfig(PATTERN, vocab_size=19, dim=16, layers=2, heads=4, **options)).double()
    torch.nn.init.normal_(result.embedding.weight)  # so that logits differ
    return result


def test_the_likeliest_token_follows_each_prefix():
    net = model()
    result = generate(net, PROMPTS, 6, temperature=0)
    assert net.training, "it is left as it was"
    net.eval()
    expected = PROMPTS
    for _ in range(6):
        expected = torch.cat([expected, net(expected)[:, -1:].argmax(-1)], 1)
    assert result.tolist() == expected.tolist()
    assert len(set(result[:, 5:].flatten().tolist())) > 2, "a model that says one thing would prove little"


def test_what_is_drawn_follows_the_seed_the_temperature_and_the_likeliest():
    net = model()
    result = generate(net, PROMPTS, 8, **DRAWN)
    assert result.tolist() == generate(net, PROMPTS, 8, **DRAWN).tolist()
    assert result.tolist() != generate(net, PROMPTS, 8, **{**DRAWN, "seed": 4}).tolist()
    assert generate(net, PROMPTS, 8, top_k=1).tolist() == generate(net, PROMPTS, 8, temperature=0).tolist()
    net.eval()
    for end in range(5, 13):
        best = net(result[:, :end])[:, -1].topk(5).indices
        assert (best == result[:, end : end + 1]).any(1).all()
    # cold draws are those of the likeliest, hot ones are not
    assert generate(net, PROMPTS, 8, temperature=1e-4).tolist() == generate(net, PROMPTS, 8, temperature=0).tolist()
    assert generate(net, PROMPTS, 8, temperature=9.0).tolist() != generate(net, PROMPTS, 8, temperature=0).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3}, marks=pytest.mark.long)],
    ids=["plain", "all"],
)
def test_a_cache_and_the_whole_prefix_give_the_same_tokens(options, monkeypatch):
    """More tokens than the largest segment has."""
    net = model()
    result = generate(net, PROMPTS, 60, **DRAWN, **options)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "refusal", lambda config: "none")
        assert generate(net, PROMPTS, 60, **DRAWN, **options).tolist() == result.tolist()
    assert net.generate(PROMPTS, 60, **DRAWN, **options).tolist() == result.tolist()
    streamed = torch.stack(list(net.stream(PROMPTS, 60, **DRAWN, **options)), 1)
    assert streamed.tolist() == result[:, 5:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_go_on_as_alone(side):
    net = model()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0] if side == "right" else [0, 0, 0, 1, 1]])
    result = generate(net, PROMPTS, 20, temperature=0, repetition_penalty=1.4, attention_mask=mask)
    for row in range(2):
        alone = PROMPTS[row : row + 1, mask[row] == 1]
        expected = generate(net, alone, 20, temperature=0, repetition_penalty=1.4)
        assert result[row, 5:].tolist() == expected[0, -20:].tolist()


def test_rows_end_at_their_end_token_and_generation_where_all_did():
    net = model()
    plain = generate(net, PROMPTS, 30, **DRAWN)[:, 5:].tolist()
    end = plain[0][3]
    places = [row.index(end) if end in row else 30 for row in plain]
    result = generate(net, PROMPTS, 30, **DRAWN, end=end)[:, 5:].tolist()
    assert len(result[0]) == min(max(places) + 1, 30)
    for row, expected, place in zip(result, plain, places, strict=True):
        assert row[: place + 1] == expected[: min(place + 1, len(row))]
        assert set(row[place:]) <= {end}


def test_a_text_goes_on_from_its_cache():
    net = model()
    cache = net.new_cache(2)
    first = generate(net, PROMPTS, 10, temperature=0, cache=cache)
    assert cache.positions == (14, 14), "the last token is yet to be given"
    result = generate(net, torch.cat([first[:, -1:], PROMPTS], 1), 10, temperature=0, cache=cache)
    assert (
        result[:, 1:].tolist() == generate(net, torch.cat([first, PROMPTS], 1), 10, temperature=0)[:, 10 + 5 :].tolist()
    )


def test_models_without_a_cache_compute_the_prefix():
    torch.manual_seed(1)
    config = LongNetConfig(PATTERN, vocab_size=19, dim=16, layers=1, heads=4, ordering="hilbert")
    net = LongNet(config).double().eval()
    result = generate(net, PROMPTS, 6, temperature=0)
    with torch.no_grad():
        assert result[:, -1].tolist() == net(result[:, :-1])[:, -1].argmax(-1).tolist()
    with pytest.raises(ValueError, match="cache and attention_mask must be None where the whole prefix is computed"):
        generate(net, PROMPTS, 1, attention_mask=torch.ones(2, 5))


def over_ranks(group, prompts, has_cache):
    context = made(group)
    net = model()
    attach_context(net, context)
    context.begin(31)  # a batch that is being worked on
    with pytest.MonkeyPatch.context() as patch:
        if not has_cache:
            patch.setattr(generation, "refusal", lambda config: "none")
        result = generate(net, prompts, 8, **DRAWN, context=context)
    return result, context.length


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:, :1]], ids=["five tokens", "one, fewer than ranks"])
def test_ranks_that_share_sequences_draw_what_one_process_does(pool, prompts, has_cache):
    expected = generate(model(), prompts, 8, **DRAWN).tolist()
    for result, length in pool.run(3, over_ranks, prompts, has_cache):
        assert result.tolist() == expected
        assert length == 31


def generated_over_ranks(group, options):
    return model().generate(PROMPTS, 40, **options, context=made(group))


def test_ranks_continue_padded_prompts_and_end_them_as_one_process_does(pool):
    """Longer than twice the largest segment, and ended where all rows have the end token."""
    options = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]), "temperature": 0}
    options |= {"repetition_penalty": 1.4}
    plain = model().generate(PROMPTS, 40, **options)
    end = int(plain[0, 30])
    expected = model().generate(PROMPTS, 40, **options, end=end)
    for given, tokens in ((options, plain), ({**options, "end": end}, expected)):
        for result in pool.run(2, generated_over_ranks, given):
            assert result.tolist() == tokens.tolist()


def refused_over_ranks(group, changes):
    context, net = made(group), model()
    options = {"input_ids": PROMPTS, "tokens": 4, **DRAWN, **(changes if group.rank() else {})}
    if "cache" in changes:
        options["cache"] = net.new_cache(2)
    generate(net, **options, context=context)


DIFFERS = ["rank 1 of 2 was given other tokens than rank 0, or other options"] * 2


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"input_ids": PROMPTS + 1}, DIFFERS),
        ({"seed": 4}, DIFFERS),
        ({"tokens": 5}, DIFFERS),
        ({"tokens": 0}, ["rank 1 of 2 cannot go on with these tokens", "tokens must be a positive integer, got 0"]),
        ({"cache": None}, ["cache must be split over the 2 ranks that share sequences, got one of 1: make it by"] * 2),
    ],
    ids=["prompts", "seed", "more tokens", "no tokens", "a cache of one process"],
)
def test_what_ranks_do_not_agree_on_is_refused_on_all(pool, changes, messages):
    outcomes = pool.outcomes(2, refused_over_ranks, changes)
    for (is_result, outcome), message in zip(outcomes, messages, strict=True):
        assert not is_result
        kind, said, _ = outcome
        assert kind is ValueError
        assert said.startswith(message)
        assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"beams": 3}, "no option beams; sampling has repetition_penalty, temperature, top_k, top_p, min_p, seed"),
        ({"input_ids": PROMPTS[0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(5,\)"),
        ({"input_ids": PROMPTS[:, :0]}, r"input_ids must be \(B, N\) with at least one token, got shape \(2, 0\)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), **{"input_ids": PROMPTS, "tokens": 3, **change})


def test_an_encoder_cannot_go_on():
    net = LongNet(LongNetConfig(Pattern.dilated((4,), (1,)), vocab_size=19, dim=16, layers=1, heads=4))
    with pytest.raises(ValueError, match="model must be causal in every layer"):
        generate(net, PROMPTS, 1)
