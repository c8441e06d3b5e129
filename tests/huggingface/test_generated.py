"""`generate` of transformers, of batches and of rows alone."""

from itertools import product

import pytest
import torch
from decoders import LENGTHS, MASKS, decoder, scattered, tokens
from tiers import tiered

from lightning_longnet.huggingface.cache_longnet import LongNetCache

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:(Nothing crosses|In the branch)"
)


def greedy(model, row, steps):
    for _ in range(steps):
        row = torch.cat([row, model(row[None]).logits[0, -1:].argmax(-1)])
    return row[-steps:]


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_rows_of_a_batch_are_generated_as_alone(options):
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    result = model.generate(scattered(rows, mask), attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(result[:, 30:], torch.stack([greedy(model, row, 5) for row in rows]))


@pytest.mark.parametrize("with_tokens", [False, True])
def test_embeddings_are_continued_as_tokens_are(with_tokens):
    model, ids = decoder("learned", learned_positions=40), tokens(2, 20)
    given = {"input_ids": ids} if with_tokens else {}
    embedded = model.get_input_embeddings()(ids)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        result = model.generate(inputs_embeds=embedded, **given, max_new_tokens=4, **options)
        assert torch.equal(result[:, -4:], model.generate(ids, max_new_tokens=4, **options)[:, 20:])
    with pytest.raises(ValueError, match=r"inputs_embeds must embed all tokens of .*, 19, got 20"):
        model.generate(ids[:, 1:], inputs_embeds=embedded, max_new_tokens=4)


def test_beams_of_a_batch_are_those_of_each_row():
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    result = model.generate(scattered(rows, mask), attention_mask=mask, **options)
    for one, row in zip(result, rows, strict=True):
        assert torch.equal(one[30:], model.generate(row[None], **options)[0, len(row) :])


def test_samples_are_drawn_from_the_logits():
    model, row = decoder(), tokens(1, 9)
    torch.manual_seed(3)
    options = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True, "top_k": 0}
    result = model.generate(row, max_new_tokens=5, do_sample=True, **options)
    torch.manual_seed(3)
    for logits in result.logits:
        torch.testing.assert_close(logits, model(row).logits[:, -1].float())
        row = torch.cat([row, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(result.sequences, row)
    assert [states[0].shape for states in result.hidden_states] == [(1, n, 16) for n in (9, 1, 1, 1, 1)]


def test_generation_refuses_what_needs_a_cache_or_weights_of_attention():
    from transformers import DynamicCache

    model, ids = decoder(), tokens(1, 9)
    for given, error, message in (
        ({"past_key_values": DynamicCache()}, ValueError, "past_key_values must be a LongNetCache, or None"),
        ({"output_attentions": True, "return_dict_in_generate": True}, ValueError, "output_attentions must be False"),
        ({"prompt_lookup_num_tokens": 3}, RuntimeError, "assisted decoding requires a cache"),
        ({"token_type_ids": ids}, ValueError, "token_type_ids"),
    ):
        with pytest.raises(error, match=message):
            model.generate(ids, max_new_tokens=3, **given)
    # a right padding, after which `generate` counts from 1
    mask = torch.tensor([[1] * 7 + [0] * 2])
    with pytest.raises(ValueError, match=r"position_ids must count .* row 0 has 1 after 6"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False)
    with pytest.raises(ValueError, match="attention_mask must end with tokens with past_key_values"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


@pytest.mark.parametrize(
    ("kind", "beams"),
    tiered(
        product(["rope", "xpos", "learned", "sparse"], [1, 3]),
        quick=[("rope", 1), ("learned", 3), ("sparse", 3)],
        covers=1,
    ),
)
def test_a_cache_and_the_whole_rows_give_the_same_tokens(kind, beams):
    """Beyond the largest segment, with beams that change places."""
    changes = {"learned_positions": 120} if kind in ("xpos", "learned") else {}
    model, mask = decoder(kind, **changes), torch.tensor(MASKS["left"])
    torch.nn.init.normal_(model.model.embedding.weight)
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    options = {"max_new_tokens": 50 if beams == 1 else 12, "num_beams": beams, "do_sample": False}
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    ids = scattered(rows, mask)
    expected = model.generate(ids, **options, use_cache=False)
    result = model.generate(ids, **options, use_cache=True)
    assert torch.equal(result.sequences, expected.sequences)
    assert isinstance(result.past_key_values, LongNetCache)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def test_a_text_goes_on_from_its_cache():
    model, ids = decoder(), tokens(2, 20)
    past = LongNetCache(2)
    first = model.generate(ids, past_key_values=past, max_new_tokens=40, do_sample=False)
    assert past.get_seq_length() == 59
    more = torch.cat([first, tokens(2, 5)], 1)
    result = model.generate(more, past_key_values=past, max_new_tokens=10, do_sample=False)
    assert torch.equal(result, model.generate(more, max_new_tokens=10, do_sample=False, use_cache=False))
    assert past.rows.nbytes < 2 * 2 * 64 * 2 * 2 * 2 * 4 * 8, "the rows of four segments of 64"


def test_a_cache_is_cropped_where_its_rows_are_kept():
    model, ids, mask = decoder(), tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for columns, length in ((27, 25), (27, -2), (26, 40)):
            past = LongNetCache(2)
            model(ids[:, :25], attention_mask=mask[:, :25], past_key_values=past)
            model(ids[:, 25:columns] + 1, past_key_values=past)  # others than those of the text
            past.crop(length)
            assert past.get_seq_length() == min(columns, 25 if length < 40 else 26)
            if length < 40:
                result = model(ids[:, 25:], past_key_values=past).logits
                torch.testing.assert_close(result, expected[:, 25:], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="max_length must be at least 25, got 24: rows have padding"):
            past.crop(24)
        model(tokens(2, 200), past_key_values=past)
        with pytest.raises(ValueError, match=r"tokens must be at most .* no longer kept"):
            past.crop(40)


def test_what_a_cache_cannot_do_is_refused():
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    model, ids, past = decoder(), tokens(1, 9), LongNetCache(2)
    assert DYNAMIC_LAYER_TYPE_MAPPING["longnet"] is type(past.layers[0])
    with torch.no_grad():
        model(ids, past_key_values=past)
        for given, message in (
            ({"labels": ids}, "labels must be None with past_key_values"),
            ({"position_ids": torch.arange(9)[None]}, r"position_ids must count .* before them, \[9\], with past"),
        ):
            with pytest.raises(ValueError, match=message):
                model(ids, past_key_values=past, **given)
        assert model(ids, past_key_values=past, position_ids=torch.arange(9, 18)[None], return_dict=False)[0].shape
    with pytest.raises(ValueError, match="a LongNetCache must be of a LongNetForCausalLM"):
        past.update(ids, ids, 0)
    with pytest.raises(ValueError, match="a cache holds no gradients"):
        model(ids, past_key_values=past)
