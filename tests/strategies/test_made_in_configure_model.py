"""Layers and models that `configure_model` makes, where DeepSpeed's stage 3 takes their parameters apart at once."""

import lightning as L
import pytest
import torch
from decoder_runs import BATCH, CONFIG, STEPS, KeepLosses, order, rows
from tiers import tiered
from torch import nn
from torch.utils.data import DataLoader
from trained import SMALL_BUCKETS, KeepParameters, collated, quiet, sums, trainer_of

from lightning_longnet import DilatedSelfAttention, MultiheadDilatedAttention, Pattern, sequence_context

PATTERN = Pattern.dilated((8, 16), (1, 2), is_causal=True)
KINDS = ["layers", "config", "weights"]


class Layers(nn.Module):
    """Attention layers of this package between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)
        self.attention = DilatedSelfAttention(16, 4, PATTERN, num_kv_heads=2)
        self.multihead = MultiheadDilatedAttention(16, 4, batch_first=True, pattern=PATTERN)

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        x = x + self.attention(x, documents=batch["documents"])
        x = x + self.multihead(x, x, x, need_weights=False)[0]
        return self.head(x)


class Module(L.LightningModule):
    """A module whose model is made in `configure_model`.

    Args:
        kind: "layers" of this package, a model of transformers from its "config", or from a folder with "weights".
        folder: that folder.
    """

    def __init__(self, kind, folder, attention):
        super().__init__()
        self.kind, self.folder, self.attention, self.model = kind, folder, attention, None

    def configure_model(self):
        from transformers import AutoModelForCausalLM, Qwen3Config

        if self.model is not None:
            return
        torch.manual_seed(7 + (0 if self._trainer is None else self._trainer.global_rank))  # that of rank 0 counts
        if self.kind == "layers":
            self.model = Layers()
            return
        options = {"attn_implementation": self.attention, "dtype": torch.float32}
        if self.kind == "config":
            values = {name: value for name, value in CONFIG.items() if name != "model_type"}
            self.model = AutoModelForCausalLM.from_config(Qwen3Config(**values), **options)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, **options)
        self.model.train()

    def training_step(self, batch):
        context = sequence_context(self)
        if self.kind == "layers":
            logits = self.model(batch)
        else:
            positions = context.places_of(batch["input_ids"], batch["documents"]) if context.is_split else places(batch)
            logits = self.model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).logits
        return context.token_mean(*sums(logits, batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def places(batch):
    return torch.stack([torch.cat([torch.arange(n) for n in row.bincount()]) for row in batch["documents"]])


def loop(kind, folder):
    """Return (losses, final parameters) of a plain loop in one process."""
    module = Module(kind, folder, "sdpa")
    module.configure_model()
    optimizer, data, losses = module.configure_optimizers(), rows(), []
    for step in range(STEPS):
        batch = collated([data[i] for i in order()[step * BATCH : (step + 1) * BATCH]])
        loss = module.training_step(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: x.detach().clone() for name, x in module.model.named_parameters()}


def fit(rank, world, kind, folder):
    """Return (losses, final parameters) of a run under DeepSpeed's stage 3."""
    import os

    from lightning_longnet.strategies import RingSequenceParallelStrategy

    os.environ["PL_GLOBAL_SEED"] = "5"
    with quiet():
        strategy = RingSequenceParallelStrategy(world, "deepspeed_stage_3", engine=SMALL_BUCKETS)
        callbacks = [losses := KeepLosses(), kept := KeepParameters()]
        trainer = trainer_of(strategy, world, max_steps=STEPS, max_epochs=2, callbacks=callbacks)
        loader = DataLoader(rows(), BATCH, collate_fn=collated, shuffle=True)
        trainer.fit(Module(kind, folder, "ring"), loader)
    return losses.losses, kept.parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the weights of a model."""
    module = Module("config", None, "sdpa")
    module.configure_model()
    path = tmp_path_factory.mktemp("weights") / "model"
    module.model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", tiered(KINDS, quick=[], long=["weights"]))
def test_training_equals_one_process(deepspeed_trainers, folder, kind):
    expected, parameters = loop(kind, folder)
    assert expected[-1] < expected[0]
    for losses, result in deepspeed_trainers(2).run(2, fit, kind, folder):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert result.keys() == parameters.keys()
        for name, x in result.items():
            torch.testing.assert_close(x, parameters[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
