"""Losses and gradients as the Trainer of transformers takes them, and activation checkpointing."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoders import decoder, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:(Nothing crosses|In the branch)"
)


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
    expected = model(ids, labels=labels).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    trainer = trainer_of(model, 4)
    batches = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)]
    batches, items = trainer.get_batch_samples(iter(batches), 4, "cpu")
    assert items == (labels[:, 1:] != -100).sum()
    result = sum(trainer.training_step(model, batch, items) for batch in batches)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if precision == "float64" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result, expected.detach(), **tolerance)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)


def test_trainer_shifts_the_labels_that_it_smooths(trainer_of):
    from transformers.trainer_pt_utils import LabelSmoother

    model, ids = decoder(), tokens(2, 20)
    trainer = trainer_of(model, 1)
    trainer.label_smoother = LabelSmoother(epsilon=0.1)
    accelerator = vars(trainer.accelerator)
    accelerator["unwrap_model"] = lambda each: each
    result = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_takes_the_options_of_transformers():
    model, ids = decoder(), tokens(2, 20)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(76)).loss, expected / 2)
    masked = ids.masked_fill(ids == 7, 0)
    result = model(ids, labels=masked, ignore_index=0).loss
    torch.testing.assert_close(result, model(ids, labels=ids.masked_fill(ids == 7, -100)).loss)


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

    expected = gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (2, False)
    model.gradient_checkpointing_enable(options, **({"every_n_layers": every} if every > 1 else {}))
    result = gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (4 if every == 1 else 3, True)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    model.gradient_checkpointing_disable()
    gradients()
    assert (len(calls), model.is_gradient_checkpointing) == (2, False)


def test_parts_of_sequences_are_refused():
    model = decoder()
    model.model.sequence_context = SimpleNamespace(is_split=True)
    with pytest.raises(ValueError, match="sequences must be whole: train a LongNetModule to split them"):
        model(tokens(2, 9))
