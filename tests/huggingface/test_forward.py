"""The arguments and the outputs of `forward`, as the decoders of transformers have them."""

import pytest
import torch
from decoders import decoder, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:(Nothing crosses|In the branch)"
)


def test_hidden_states_are_the_inputs_of_the_blocks_and_of_the_head():
    model, ids = decoder("learned"), tokens(2, 9)
    seen = []
    hooks = [each.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for each in model.model.blocks]
    hooks.append(model.model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    result = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(result.hidden_states) == len(seen) == 3
    assert all(torch.equal(one, other) for one, other in zip(result.hidden_states, seen, strict=True))
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert "hidden_states" not in model(ids, output_hidden_states=False)
    model.config.tie_last_hidden_states = False
    torch.testing.assert_close(model.model.norm(model(ids).hidden_states[-1]), seen[-1])


def test_outputs_are_a_tuple_on_request():
    model, ids = decoder(), tokens(2, 9)
    expected = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert len(states) == 3
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected.logits)


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([2, 7])])
def test_logits_of_some_tokens(kept):
    model, ids = decoder(), tokens(2, 9)
    expected = model(ids).logits
    result = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(result, expected[:, kept] if isinstance(kept, torch.Tensor) else expected[:, -kept:])


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_embedded_tokens_give_what_tokens_give(kind):
    model, ids = decoder(kind), tokens(2, 9)
    result = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids)
    assert torch.equal(result.logits, model(ids).logits)
    assert torch.equal(result.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False: the kernels compute no matrix"),
        ({"output_hidden_states": 2}, "output_hidden_states must be True or False, got 2"),
        ({"past_key_values": object()}, "past_key_values must be a LongNetCache, or None: "),
        ({"token_type_ids": tokens(2, 9)}, "token_type_ids is no argument of a LongNet"),
        ({"cu_seq_lens_q": tokens(2)}, "cu_seq_lens_q is no argument of a LongNet: give position_ids that restart"),
        ({"inputs_embeds": torch.zeros(2, 9, 16)}, "either input_ids or inputs_embeds must be given"),
        ({"input_ids": None}, "either input_ids or inputs_embeds must be given"),
        ({"labels": tokens(2, 9), "logits_to_keep": 1}, "logits_to_keep must be 0 with labels"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask must be \(batch, tokens\), \(2, 9\), got shape"),
        ({"attention_mask": tokens(2, 9)}, "attention_mask must be 1 .* and holds other values: give documents that"),
        ({"position_ids": torch.arange(9)}, r"position_ids must be \(batch, tokens\) or .* got shape \(9,\)"),
        ({"position_ids": torch.zeros(2, 9)}, "position_ids must be integers"),
        ({"position_ids": torch.arange(9)[None] + 4}, "as the pattern counts them; row 0 has 4 at its first token"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6, 7, 8, 9]])}, "row 0 has 4 after 2"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5, 6]])}, "row 0 has 2 after 3"),
        (
            {"position_ids": torch.arange(9)[None], "attention_mask": torch.tensor([[1] * 9, [0] + [1] * 8])},
            "without the padding of attention_mask, as .* row 1 has 1 at its first token",
        ),
    ],
)
def test_what_is_not_done_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        decoder()(**{"input_ids": tokens(2, 9), **given})
