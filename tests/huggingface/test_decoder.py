"""A LongNet in transformers does what a decoder of transformers does: padding, packing, generation and training."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lightning_longnet import LongNetConfig, Pattern

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers.*",
    "ignore::DeprecationWarning",
    "ignore:(Nothing crosses|In the branch):UserWarning",
)

DILATED = Pattern.dilated((8, 16, 64), (1, 2, 2), is_causal=True)
SMALL = {"vocab_size": 23, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2}
KINDS = {
    "rope": {},
    "learned": {"rotary": None, "learned_positions": 30, "embedding_scale": 3.0},
    "xpos": {"rotary": "xpos", "learned_positions": 30, "tied_embeddings": False},
    "sparse": {"pattern": Pattern.block_sparse("dilated_sparse", 4, 0.4, within=DILATED)},
}
LENGTHS = (30, 21, 6)
MASKS = {
    "left": [[0] * (30 - n) + [1] * n for n in LENGTHS],
    "right": [[1] * n + [0] * (30 - n) for n in LENGTHS],
    "both": [[0] * ((30 - n) // 2) + [1] * n + [0] * (30 - n - (30 - n) // 2) for n in LENGTHS],
    "within": [[1] * 30, [1, 1, 0] * 9 + [1] * 3, [1, 0, 0, 0, 0] * 6],
}


def decoder(kind="rope", **changes):
    from lightning_longnet.huggingface.configuration_longnet import LongNetPretrainedConfig
    from lightning_longnet.huggingface.modeling_longnet import LongNetForCausalLM

    torch.manual_seed(0)
    config = LongNetConfig(**{"pattern": DILATED, **SMALL, **KINDS[kind], **changes})
    return LongNetForCausalLM(LongNetPretrainedConfig(config.to_dict())).double().eval()


def tokens(*shape):
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(1))


def spread(rows, mask):
    """Rows of any lengths as one tensor, where the mask has ones."""
    ids = torch.zeros_like(mask)
    ids[mask == 1] = torch.cat(rows)
    return ids


# Padding and packing


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_padding_equals_the_row_without(kind, side):
    model, mask = decoder(kind), torch.tensor(MASKS[side])
    rows = [tokens(3, 30)[i, : sum(each)] for i, each in enumerate(mask)]
    ids = spread(rows, mask)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # as `generate` has them
    for given in (None, positions):
        found = model(ids, mask, given, output_hidden_states=True)
        for i, row in enumerate(rows):
            wanted = model(row[None], output_hidden_states=True)
            torch.testing.assert_close(found.logits[i, mask[i] == 1], wanted.logits[0], rtol=1e-12, atol=1e-12)
            for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
                torch.testing.assert_close(one[i, mask[i] == 1], other[0], rtol=1e-12, atol=1e-12)
        assert not found.logits[mask == 0].any()
    # the loss of transformers is computed in float32
    if side != "within":
        wanted = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / (57 - 3)
        torch.testing.assert_close(model(ids, mask, labels=labels).loss, wanted, rtol=1e-5, atol=0)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        found = model(ids, mask, labels=labels, shift_labels=shifted).loss
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_padding_changes_no_gradient():
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    (model(spread(rows, mask), mask).logits[mask == 1] ** 2).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    sum((model(row[None]).logits ** 2).sum() for row in rows).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_documents_that_share_a_row_equal_each_alone(kind, side):
    model, row = decoder(kind), tokens(1, 30)[0]
    pieces = row.split([11, 3, 1, 15])
    index = torch.cat([torch.arange(len(piece)) for piece in pieces])
    ids, positions, mask = row[None].repeat(2, 1), torch.stack([index, torch.arange(30)]), None
    if side != "none":
        pad = (5, 0) if side == "left" else (0, 5)
        mask = F.pad(torch.ones_like(ids), pad)
        ids, positions = F.pad(ids, pad), F.pad(positions, pad, value=1)
        if kind in ("learned", "xpos"):  # rows that are longer than the learned positions hold shorter documents
            ids, positions, mask = ids[:1], positions[:1], mask[:1]
    found = model(ids, mask, positions).logits
    found = found if mask is None else found[mask == 1].view(len(ids), 30, -1)
    wanted = torch.cat([model(piece[None]).logits[0] for piece in pieces])
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=1e-12)
    if len(found) > 1:
        torch.testing.assert_close(found[1], model(row[None]).logits[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(row[None]).logits[0], wanted, atol=1e-3)


class DocumentMean(torch.nn.Module):
    """An attention layer that reads what follows a token in its document, too."""

    def __init__(self, dim, heads, pattern):
        super().__init__()

    def forward(self, x, *, positions=None, documents=None, key_padding_mask=None):
        documents = torch.zeros(x.shape[:2]) if documents is None else documents
        same = (documents[:, None] == documents[:, :, None]).to(x.dtype)
        return same @ x / same.sum(2, keepdim=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_that_read_what_follows_a_token_do_not_read_padding(side, monkeypatch):
    monkeypatch.setitem(sys.modules, "document_mean", SimpleNamespace(DocumentMean=DocumentMean))
    model = decoder(attention={"class_path": "document_mean.DocumentMean"}, kv_heads=None)
    mask, ids = torch.tensor(MASKS[side]), tokens(3, 30)
    found = model(ids, mask).logits
    for i in range(3):
        wanted = model(ids[i : i + 1, mask[i] == 1]).logits[0]
        torch.testing.assert_close(found[i, mask[i] == 1], wanted, rtol=1e-12, atol=1e-12)


# Generation


def greedy(model, row, steps):
    for _ in range(steps):
        row = torch.cat([row, model(row[None]).logits[0, -1:].argmax(-1)])
    return row[-steps:]


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_rows_of_a_batch_are_generated_as_alone(use_cache):
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    options = {} if use_cache is None else {"use_cache": use_cache}
    found = model.generate(spread(rows, mask), attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(found[:, 30:], torch.stack([greedy(model, row, 5) for row in rows]))


@pytest.mark.parametrize("with_tokens", [False, True])
def test_embeddings_are_continued_as_tokens_are(with_tokens):
    model, ids = decoder("learned", learned_positions=40), tokens(2, 20)
    given = {"input_ids": ids} if with_tokens else {}
    embedded = model.get_input_embeddings()(ids)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found = model.generate(inputs_embeds=embedded, **given, max_new_tokens=4, **options)
        assert torch.equal(found[:, -4:], model.generate(ids, max_new_tokens=4, **options)[:, 20:])
    with pytest.raises(ValueError, match=r"inputs_embeds must embed all tokens of .*, 19, got 20"):
        model.generate(ids[:, 1:], inputs_embeds=embedded, max_new_tokens=4)


def test_beams_of_a_batch_are_those_of_each_row():
    model, mask = decoder(), torch.tensor(MASKS["left"])
    rows = [tokens(3, 30)[i, :n] for i, n in enumerate(LENGTHS)]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    found = model.generate(spread(rows, mask), attention_mask=mask, **options)
    for one, row in zip(found, rows, strict=True):
        assert torch.equal(one[30:], model.generate(row[None], **options)[0, len(row) :])


def test_samples_are_drawn_from_the_logits():
    model, row = decoder(), tokens(1, 9)
    torch.manual_seed(3)
    options = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True, "top_k": 0}
    found = model.generate(row, max_new_tokens=5, do_sample=True, **options)
    torch.manual_seed(3)
    for logits in found.logits:
        torch.testing.assert_close(logits, model(row).logits[:, -1].float())
        row = torch.cat([row, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(found.sequences, row)
    assert [states[0].shape for states in found.hidden_states] == [(1, n, 16) for n in range(9, 14)]


# The arguments and the outputs of forward


def test_hidden_states_are_the_inputs_of_the_blocks_and_of_the_head():
    model, ids = decoder("learned"), tokens(2, 9)
    seen = []
    hooks = [each.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for each in model.model.blocks]
    hooks.append(model.model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    found = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(found.hidden_states) == len(seen) == 3
    assert all(torch.equal(one, other) for one, other in zip(found.hidden_states, seen, strict=True))
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert "hidden_states" not in model(ids, output_hidden_states=False)


def test_outputs_are_a_tuple_on_request():
    model, ids = decoder(), tokens(2, 9)
    wanted = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(logits, wanted.logits)
    assert len(states) == 3
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], wanted.logits)


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([2, 7])])
def test_logits_of_some_tokens(kept):
    model, ids = decoder(), tokens(2, 9)
    wanted = model(ids).logits
    found = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(found, wanted[:, kept] if isinstance(kept, torch.Tensor) else wanted[:, -kept:])


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_embedded_tokens_give_what_tokens_give(kind):
    model, ids = decoder(kind), tokens(2, 9)
    found = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids)
    assert torch.equal(found.logits, model(ids).logits)
    assert torch.equal(found.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False: the kernels compute no matrix"),
        ({"output_hidden_states": 2}, "output_hidden_states must be True or False, got 2"),
        ({"past_key_values": object()}, "past_key_values must be None: a LongNet has no key cache"),
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


def test_a_curve_over_whole_rows_takes_neither_padding_nor_documents():
    model = decoder(pattern=Pattern.dilated((16,), (2,), is_causal=True), ordering="hilbert")
    ids = tokens(2, 9)
    assert model(ids, torch.ones_like(ids), torch.arange(9)[None]).logits.shape == (2, 9, 23)
    with pytest.raises(ValueError, match="attention_mask must be 1 everywhere with ordering 'hilbert'"):
        model(ids, torch.tensor([[1] * 9, [1] * 8 + [0]]))
    with pytest.raises(ValueError, match="documents must be None where ordering is 'hilbert'"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))


def test_generation_refuses_what_needs_a_cache_or_weights_of_attention():
    from transformers import DynamicCache

    model, ids = decoder(), tokens(1, 9)
    for given, error, message in (
        ({"past_key_values": DynamicCache()}, ValueError, "past_key_values must be None: a LongNet has no key cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, ValueError, "output_attentions must be False"),
        ({"prompt_lookup_num_tokens": 3}, RuntimeError, "assisted decoding requires a cache"),
        ({"token_type_ids": ids}, ValueError, "token_type_ids"),
    ):
        with pytest.raises(error, match=message):
            model.generate(ids, max_new_tokens=3, **given)
    # a right padding, after which `generate` counts from 1
    mask = torch.tensor([[1] * 7 + [0] * 2])
    with pytest.raises(ValueError, match=r"position_ids must count .* row 0 has 1 after 6"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


# Training


@pytest.fixture
def trainer_of(monkeypatch):
    from transformers import trainer

    # of accelerate, which only a whole Trainer needs
    monkeypatch.setattr(trainer, "DistributedType", SimpleNamespace(DEEPSPEED="DEEPSPEED"), raising=False)
    return losses_of


def losses_of(model, accumulated):
    """The parts of a Trainer that compute the loss and its gradient."""
    from transformers import Trainer
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    trainer = object.__new__(Trainer)
    accelerator = SimpleNamespace(
        backward=lambda loss, **_: loss.backward(), distributed_type="NO", parallelism_config=None, num_processes=1
    )
    trainer.accelerator, trainer.model, trainer.model_wrapped = accelerator, model, model
    trainer.args = SimpleNamespace(
        n_gpu=1,
        average_tokens_across_devices=False,
        world_size=1,
        torch_empty_cache_steps=None,
        device="cpu",
        optim="adamw_torch",
    )
    trainer.model_accepts_loss_kwargs = model.accepts_loss_kwargs
    trainer._loss_shifts_labels = LOSS_MAPPING[model.loss_type] is ForCausalLMLoss
    trainer.label_smoother = trainer.compute_loss_func = trainer.loss_is_scaled_for_ga = trainer.optimizer = None
    trainer.current_gradient_accumulation_steps = accumulated
    trainer._prepare_inputs = lambda inputs: inputs
    trainer._prepare_context_parallel_inputs = lambda _, inputs: (torch.enable_grad, inputs)
    trainer.compute_loss_context_manager = torch.enable_grad
    trainer.get_tp_size = trainer.get_cp_size = trainer.get_sp_size = lambda: 1
    return trainer


def float64_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """The loss of transformers, which has it in float32."""
    options = {"reduction": "mean" if num_items_in_batch is None else "sum"}
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].flatten(), **options)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_accumulated_gradients_are_those_of_the_whole_batch(trainer_of, precision):
    model, ids = decoder(), tokens(4, 20)
    if precision == "float64":
        model.loss_function = float64_loss
    labels = ids.masked_fill(torch.arange(20) < torch.tensor([[0], [3], [17], [9]]), -100)
    model.train()
    wanted = model(ids, labels=labels).loss
    wanted.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    trainer = trainer_of(model, 4)
    batches = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)]
    batches, items = trainer.get_batch_samples(iter(batches), 4, "cpu")
    assert items == (labels[:, 1:] != -100).sum()
    found = sum(trainer.training_step(model, batch, items) for batch in batches)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if precision == "float64" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, wanted.detach(), **tolerance)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)


def test_trainer_shifts_the_labels_that_it_smooths(trainer_of):
    from transformers.trainer_pt_utils import LabelSmoother

    model, ids = decoder(), tokens(2, 20)
    trainer = trainer_of(model, 1)
    trainer.label_smoother = LabelSmoother(epsilon=0.1)
    accelerator = vars(trainer.accelerator)
    accelerator["unwrap_model"] = lambda each: each
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_takes_the_options_of_transformers():
    model, ids = decoder(), tokens(2, 20)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    wanted = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, wanted)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(76)).loss, wanted / 2)
    masked = ids.masked_fill(ids == 7, 0)
    found = model(ids, labels=masked, ignore_index=0).loss
    torch.testing.assert_close(found, model(ids, labels=ids.masked_fill(ids == 7, -100)).loss)


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_nothing(options, every):
    model, ids = decoder(dropout=0.1, attention_dropout=0.1).train(), tokens(2, 20)
    calls = []
    for block in model.model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    wanted = gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (2, False)
    model.gradient_checkpointing_enable(options, **({"every_n_layers": every} if every > 1 else {}))
    found = gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (4 if every == 1 else 3, True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    model.gradient_checkpointing_disable()
    gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (2, False)


def test_parts_of_sequences_are_refused():
    model = decoder()
    model.model.sequence_context = SimpleNamespace(is_split=True)
    with pytest.raises(ValueError, match="sequences must be whole: train a LongNetModule to split them"):
        model(tokens(2, 9))
