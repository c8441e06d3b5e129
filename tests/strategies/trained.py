"""A small model of the tests' own, its data, the plain loop that it must equal, and a run of it under a Trainer."""

import os
import tempfile
import warnings
from contextlib import contextmanager

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_longnet import DilatedSelfAttention, Pattern, SequenceContext, attach_context, sequence_context

VOCABULARY, WIDTH, LENGTH = 23, 16, 37
SMALL_BUCKETS = {"reduce_bucket_size": 2**14, "allgather_bucket_size": 2**14}  # else gigabytes, filled with NaN
PATTERN = Pattern.dilated((8, 16, 64), (1, 2, 3), is_causal=True)


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = DilatedSelfAttention(WIDTH, 4, PATTERN, num_kv_heads=2, dropout=dropout)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x, **conditions):
        x = x + self.attention(self.norm(x), **conditions)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        x = self.embedding(batch["input_ids"])
        hidden = batch["attention_mask"] == 0
        for block in self.blocks:
            x = block(x, key_padding_mask=hidden, documents=batch.get("documents"))
        return self.head(x)


def sums(logits, labels):
    """Return (sum of losses, number of tokens that have a label)."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, (labels != -100).sum()


class Module(L.LightningModule):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.make_optimizer = model, optimizer
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = sequence_context(self).token_mean(*sums(self.model(batch), batch["labels"]))
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def samples(many, length=LENGTH, seed=3, documents=False):
    """Return sequences of `length`, all but the first padded by some; labels are the tokens that follow."""
    generator = torch.Generator().manual_seed(seed)
    padded_samples = []
    for i in range(many):
        tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        real = length - (i * 5) % 17
        sample = {
            "input_ids": tokens[:-1],
            "labels": torch.where(torch.arange(length) < real, tokens[1:], -100),
            "attention_mask": (torch.arange(length) < real).long(),
        }
        if documents:
            sample["documents"] = torch.arange(length) // (9 + i % 3)
        padded_samples.append(sample)
    return padded_samples


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-4)


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def reference(setting):
    """Return (losses of the micro-batches, final parameters) of a plain loop in one process, on the global batches."""
    model = started(setting)
    context = SequenceContext(seed=setting["seed"])
    attach_context(model, context)
    optimizer, rows = setting["optimizer"](model.parameters()), setting["samples"]
    size, accumulate, losses = setting["global_batch"], setting["accumulate"], []
    order = []
    for epoch in range(setting.get("epochs", 1)):
        sampler = DistributedSampler(rows, num_replicas=1, rank=0, seed=setting["seed"])  # Lightning shuffles so
        sampler.set_epoch(epoch)
        order += list(sampler)[: size * setting["micro_batches"]]
    model.train()
    for step in range(len(order) // size):
        context.begin_step(step)
        batch = collated([rows[i] for i in order[step * size : (step + 1) * size]])
        loss_sum, count = sums(model(batch), batch["labels"])
        loss = loss_sum / count
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if setting["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), setting["clip"])
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: x.detach().clone() for name, x in model.state_dict().items()}


def started(setting, seed=11):
    torch.manual_seed(seed)
    return Model(setting["dropout"]).to(setting["dtype"])


@contextmanager
def quiet():
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def trainer_of(strategy, world, **settings):
    options = {
        "accelerator": "cpu",
        "devices": world,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "default_root_dir": tempfile.gettempdir(),
    }
    return L.Trainer(strategy=strategy, **{**options, **settings})


def fit(rank, world, setting, sharding, sequence_parallel_size, resume_from=None, callbacks=(), **options):
    """Return (losses, final parameters) of a run under our strategy; ranks begin with different parameters."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    os.environ["PL_GLOBAL_SEED"] = str(setting["seed"])
    with quiet():
        if sharding.startswith("deepspeed"):
            options = {"engine": SMALL_BUCKETS, **options}
        strategy = RingSequenceParallelStrategy(sequence_parallel_size, sharding, **options)
        module = Module(started(setting, seed=11 + rank), setting["optimizer"])
        data_parallel_size = world // sequence_parallel_size
        batch_size = setting["global_batch"] // data_parallel_size
        loader = DataLoader(setting["samples"], batch_size=batch_size, collate_fn=collated, shuffle=True)
        kept = KeepParameters()
        trainer = trainer_of(
            strategy,
            world,
            accumulate_grad_batches=setting["accumulate"],
            gradient_clip_val=setting["clip"],
            limit_train_batches=setting["micro_batches"],
            max_epochs=setting.get("epochs", 1),
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
            callbacks=[kept, *callbacks],
        )
        trainer.fit(module, loader, ckpt_path=resume_from)
    return module.losses, kept.parameters


def fit_and_save(rank, world, setting, sharding, sequence_parallel_size, folder):
    """Return the same as `fit`; each step of the optimiser leaves `folder`/step=n.ckpt."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    return fit(rank, world, setting, sharding, sequence_parallel_size, callbacks=[saving])


class KeepParameters(L.Callback):
    """The whole parameters at the end, whatever shards them."""

    def __init__(self):
        self.parameters = {}

    def on_train_end(self, trainer, module):
        self.parameters.update({name: whole(x) for name, x in module.model.named_parameters()})


def whole(parameter):
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
