"""Documents of a batch under strategies that split nothing: models of transformers do not attend across them."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tiers import tiered
from torch.utils.data import DataLoader

from lightning_longnet import CausalLMModule, SequenceContext, attach_context, sequence_context
from lightning_longnet.huggingface.documents import fault_of_documents

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS, TOKENS, VOCABULARY = (19, 1, 10), 30, 61
CONFIG = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IDS = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
DOCUMENTS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
LABELS = IDS.roll(-1, 1).index_fill(1, torch.tensor(LENGTHS).cumsum(0) - 1, -100)
BATCH = {"input_ids": IDS, "labels": LABELS, "documents": DOCUMENTS}
ROUNDED = {"rtol": 1e-7, "atol": 0}  # transformers computes angles and eager softmax in float32
RUNNING = torch.arange(TOKENS).expand(2, -1)


def decoder(kind="llama", attention="ring", **options):
    torch.manual_seed(3)
    config = {"model_type": kind, **CONFIG}
    if kind == "gpt_oss":
        config |= {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}
    made = CausalLMModule(config=config, dtype="float64", attention=attention, **options)
    made.model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # so that what a token sees matters
    return made


def separate(net):
    """Return the loss and the gradients where each document is a row of its own."""
    parts = zip(IDS.split(LENGTHS, 1), LABELS.split(LENGTHS, 1), strict=True)
    losses = [net._losses({"input_ids": ids, "labels": labels}) for ids, labels in parts]
    loss = sum(x.loss_sum for x in losses) / sum(x.token_count for x in losses)
    return loss.detach(), gradients(net, loss)


def gradients(net, loss):
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


def check(net, loss, result):
    expected = separate(net)
    torch.testing.assert_close(loss.detach(), expected[0], **ROUNDED)
    for ours, theirs in zip(result, expected[1], strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("recompute", tiered(["nothing", "all but attention", "everything"], quick=["everything"]))
def test_positions_that_run_on_do_not_join_documents(recompute):
    net = decoder(recompute=recompute)
    total, count = net._losses({**BATCH, "positions": RUNNING})
    check(net, total / count, gradients(net, total / count))
    total, count = net._losses({"input_ids": IDS, "labels": LABELS})  # the documents were those of that batch alone
    assert (total / count - separate(net)[0]).abs() > 1e-4


def test_padding_beside_documents():
    net = decoder()
    mask = torch.ones_like(IDS)
    mask[1, 25:] = 0
    labels = LABELS.masked_fill(mask == 0, -100)
    total, _ = net._losses({**BATCH, "labels": labels, "attention_mask": mask, "positions": RUNNING})
    expected, _ = net._losses({**BATCH, "labels": labels})
    torch.testing.assert_close(total, expected, **ROUNDED)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_implementations_separate_documents_or_refuse_them(attention):
    net = decoder(attention=attention)
    total, count = net._losses(BATCH)
    check(net, total / count, gradients(net, total / count))
    with pytest.raises(ValueError, match=r'positions must restart where a document begins.*attention="ring"'):
        net._losses({**BATCH, "positions": RUNNING})


def test_a_model_that_does_not_read_packed_rows_is_refused():
    net = decoder("gpt_oss", "eager")
    net._losses({**BATCH, "documents": torch.zeros_like(DOCUMENTS)})  # one document in each row
    with pytest.raises(ValueError, match=r"documents are not separated by attn_implementation='eager'.*GptOss"):
        net._losses(BATCH)
    net = decoder("gpt_oss")
    total, count = net._losses(BATCH)
    check(net, total / count, gradients(net, total / count))


# Modules of users, which give a model of transformers no documents


class Own(L.LightningModule):
    def __init__(self, restarts=False):
        super().__init__()
        self.net, self.restarts = decoder(), restarts
        self.losses = []

    def loss(self, batch):
        ids = batch["input_ids"]
        positions = sequence_context(self).positions_of(ids)[None].expand(len(ids), -1)
        logits = self.net.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        summed = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return sequence_context(self).token_mean(summed, (batch["labels"] != -100).sum())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **options)


def loader(batch):
    return DataLoader([batch], batch_size=None)


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Install the entry point of pyproject.toml, where this package is installed without it."""
    points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    group = "lightning.pytorch.callbacks_factory"
    if not [x for x in importlib.metadata.entry_points(group=group) if "lightning_longnet" in x.value]:
        folder = tmp_path / "entry_point-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-point\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[{group}]\nlongnet = {points[group]['longnet']}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        importlib.invalidate_caches()


@pytest.mark.parametrize("stage", tiered(["fit", "validate", "test", "predict"], quick=["fit", "validate"]))
def test_a_module_of_a_user_separates_the_documents_of_its_batch(entry_point, stage):
    module, run = Own(), trainer(max_steps=1, num_sanity_val_steps=0)
    assert [type(each).__name__ for each in run.callbacks].count("BatchDocuments") == 1
    results = getattr(run, stage)(module, loader(BATCH))
    loss = results[0] if stage == "predict" else module.losses[0]
    torch.testing.assert_close(loss, separate(module.net)[0], **ROUNDED)
    torch.testing.assert_close(module.loss({**BATCH}), module.loss({"input_ids": IDS, "labels": LABELS}))
    assert (module.loss(BATCH) - loss).abs() > 1e-4  # without a batch of the Trainer there are no documents


class Generates(Own):
    def training_step(self, batch, batch_idx):
        with sequence_context(self).whole():
            self.other = self.loss({"input_ids": IDS, "labels": LABELS}).detach()
        with pytest.raises(ValueError, match="documents of the batch must have the model's 9 tokens, got 30"):
            self.net.model(input_ids=IDS[:, :9])
        return super().training_step(batch, batch_idx)


def test_other_sequences_than_the_batchs_are_computed_inside_whole(entry_point):
    module = Generates()
    trainer(max_steps=1).fit(module, loader(BATCH))
    assert (module.other - module.losses[0]).abs() > 1e-4
    torch.testing.assert_close(module.losses[0], separate(module.net)[0], **ROUNDED)


def test_several_documents_in_a_batch_are_refused(entry_point):
    module = Own()
    batch = {"chosen": BATCH, "rejected": {**BATCH, "documents": DOCUMENTS * 0}, **BATCH}
    with pytest.raises(ValueError, match=r"documents .* got chosen.documents and rejected.documents, which differ"):
        trainer(max_steps=1).fit(module, loader(batch))


def test_a_module_trained_by_the_library_is_not_disturbed(entry_point):
    net = decoder(warmup_steps=0)
    losses = []
    net.token_loss = lambda *a, **k: losses.append(x := CausalLMModule.token_loss(net, *a, **k)) or x
    trainer(max_steps=1).fit(net, loader({**BATCH, "positions": RUNNING}))
    total, count = losses[0]
    torch.testing.assert_close((total / count).detach(), separate(decoder())[0], **ROUNDED)


def test_a_list_of_callbacks_that_two_trainers_share(entry_point):
    shared = [L.pytorch.callbacks.Timer()]  # Lightning adds to it
    trainer(callbacks=shared)
    run, module = trainer(callbacks=shared, max_steps=2), Own()
    assert [type(each).__name__ for each in run.callbacks].count("BatchDocuments") == 2
    plain = {"input_ids": IDS, "labels": LABELS}
    run.fit(module, DataLoader([BATCH, plain], batch_size=None))
    torch.testing.assert_close(module.losses[0], separate(module.net)[0], **ROUNDED)
    torch.testing.assert_close(module.losses[1], module.loss(plain).detach())


class Stops(Own):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_leaves_no_documents(entry_point, monkeypatch, error):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning would have this process ignore further interrupts
    module = Stops(error)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(max_steps=1).fit(module, loader(BATCH))
    torch.testing.assert_close(module.loss(BATCH), module.loss({"input_ids": IDS, "labels": LABELS}))
    assert sequence_context(module.net.model) is not sequence_context(module.net.model)  # none is attached


class Attaches(Own):
    def on_train_start(self):
        self.context = SequenceContext()
        attach_context(self.net, self.context)

    def training_step(self, batch, batch_idx):
        assert sequence_context(self.net) is self.context
        with self.context.with_documents(batch["documents"]):
            return super().training_step(batch, batch_idx)


def test_a_context_that_a_user_attached_to_a_submodule_stays(entry_point):
    module = Attaches()
    trainer(max_steps=1).fit(module, loader(BATCH))
    torch.testing.assert_close(module.losses[0], separate(module.net)[0], **ROUNDED)
    assert sequence_context(module.net) is module.context


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Foreign(Own):
    @property
    def config(self):
        raise RuntimeError("the configuration is not there yet")


def test_configurations_of_other_libraries_are_not_read(entry_point):
    module = Foreign()
    module.net.config = Attributes(width=3)
    trainer(max_steps=1).fit(module, loader(BATCH))
    torch.testing.assert_close(module.losses[0], separate(module.net)[0], **ROUNDED)


class Fetches(Own):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def test_a_step_that_fetches_its_batch_gets_no_documents_of_another(entry_point):
    module = Fetches()
    batches = DataLoader([BATCH, {"input_ids": IDS, "labels": LABELS}, BATCH], batch_size=None)
    with pytest.warns(UserWarning, match="training_step takes dataloader_iter, .* documents") as warned:
        trainer(max_steps=3).fit(module, batches)
    assert len([each for each in warned if "documents" in str(each.message)]) == 1
    expected = module.loss({"input_ids": IDS, "labels": LABELS}).detach()
    for loss in module.losses:
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_separates_documents_of_one_row_alone(attention):
    net = decoder(attention="sdpa")
    net.model.config._attn_implementation_internal = attention  # its package need not be here
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    for documents in (DOCUMENTS, DOCUMENTS[0]):
        with pytest.raises(ValueError, match=rf'{attention}.* batch size 1.*attention="ring"'):
            net.hidden_states(IDS, documents=documents)
    assert fault_of_documents(net.model, DOCUMENTS[:1], positions[None]) == ""
    assert fault_of_documents(net.model, DOCUMENTS * 0, RUNNING) == ""
