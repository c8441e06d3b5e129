"""Runs of `CausalLMModule` under a Trainer, and the plain loop of transformers that they must equal."""

import os

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler
from trained import SMALL_BUCKETS, KeepParameters, collated, quiet, trainer_of

from lightning_longnet import CausalLMModule, decay_groups, warmup_cosine

VOCABULARY, LENGTH = 61, 37
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
OPTIMIZATION = {"learning_rate": 0.01, "warmup_steps": 2, "final_share": 0.5, "weight_decay": 0.1, "eps": 1e-4}
BATCH, STEPS = 4, 6
LORA = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


def rows(many=16, length=LENGTH):
    """Packed rows, whose documents have other borders in each."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(many):
        ids = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        documents = torch.arange(length + 1) // (8 + i % 3)
        labels = torch.where(documents[1:] == documents[:-1], ids[1:], -100)
        made.append({"input_ids": ids[:-1], "labels": labels, "documents": documents[:-1]})
    return made


def module(dtype, seed=7, **options):
    torch.manual_seed(seed)
    return CausalLMModule(**{"config": CONFIG, "dtype": dtype, **OPTIMIZATION, **options})


def order(epochs=2):
    drawn = []
    for epoch in range(epochs):
        sampler = DistributedSampler(rows(), num_replicas=1, rank=0, seed=5)  # Lightning shuffles so
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    return drawn


def plain_loop(dtype, source=None, lora=None):
    """Return (losses, final parameters) of transformers' model with its own attention, in one process."""
    model = module(dtype, attention="sdpa", **(source or {}), lora=lora).model
    groups = decay_groups(model, OPTIMIZATION["weight_decay"])
    optimizer = torch.optim.AdamW(groups, OPTIMIZATION["learning_rate"], (0.9, 0.95), OPTIMIZATION["eps"])
    schedule = warmup_cosine(optimizer, STEPS, OPTIMIZATION["warmup_steps"], OPTIMIZATION["final_share"])
    data, drawn, losses = rows(), order(), []
    for step in range(STEPS):
        batch = collated([data[i] for i in drawn[step * BATCH : (step + 1) * BATCH]])
        documents = batch["documents"]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row.bincount()]) for row in documents])
        logits = model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, {name: x.detach().clone() for name, x in model.named_parameters()}


class KeepLosses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Export(L.Callback):
    """Writes the model for transformers when training ends."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        module.save_pretrained(self.folder)


def fit(rank, world, dtype, sharding, sequence_parallel_size, options=None, folder=None, resume_from=None):
    """Return (losses, final parameters) of a run; ranks begin with different parameters, unless these are loaded."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    os.environ["PL_GLOBAL_SEED"] = "5"
    options = dict(options or {})
    settings = {"engine": SMALL_BUCKETS} if sharding.startswith("deepspeed") else {}
    callbacks = [losses := KeepLosses(), kept := KeepParameters()]
    if folder is not None:
        callbacks.append(ModelCheckpoint(f"{folder}/saved", "{step}", every_n_train_steps=2, save_top_k=-1))
        callbacks.append(Export(f"{folder}/exported"))
    with quiet():
        chosen = RingSequenceParallelStrategy(sequence_parallel_size, sharding, **settings)
        seed = options.pop("seed", 7 + rank)
        net = module(dtype, seed, **options)
        trainer = trainer_of(
            chosen,
            world,
            max_steps=STEPS,
            max_epochs=2,
            gradient_clip_val=1.0,
            enable_checkpointing=folder is not None,
            callbacks=callbacks,
        )
        loader = DataLoader(rows(), BATCH * sequence_parallel_size // world, collate_fn=collated, shuffle=True)
        trainer.fit(net, loader, ckpt_path=resume_from)
    return losses.losses, kept.parameters


def predict(rank, world, sharding, sequence_parallel_size, is_padded=False):
    """Return the continuations of two batches, by the most likely tokens; with padding on the left and the right."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    with quiet():
        chosen = RingSequenceParallelStrategy(sequence_parallel_size, sharding) if world > 1 else "auto"
        net = module("float64", generated_tokens=4, temperature=0)
        given = [{"input_ids": row["input_ids"]} for row in rows(4)]
        for i, row in enumerate(given if is_padded else ()):
            places = torch.arange(LENGTH)
            row["attention_mask"] = ((places >= 7 * i) if i % 2 else (places < LENGTH - 5 * i)).long()
        loader = DataLoader(given, 2, collate_fn=collated)
        return torch.cat(trainer_of(chosen, world).predict(net, loader))


def predict_documents(rank, world, reads_parts):
    """Return the error of rows whose halves, of two ranks, are a document each."""
    from lightning_longnet.sequence.parts import SequencePart
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    half = LENGTH // 2
    given = [{"input_ids": row["input_ids"], "documents": (torch.arange(LENGTH) >= half).long()} for row in rows(2)]
    if reads_parts:
        mine = slice(half, LENGTH) if rank else slice(half)
        given = [
            SequencePart({name: x[mine] for name, x in row.items()}, LENGTH, ((mine.start or 0, mine.stop),), (str(i),))
            for i, row in enumerate(given)
        ]
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(2, "ddp", placement="contiguous"), world)
        try:
            trainer.predict(module("float64", generated_tokens=2), DataLoader(given, 2))
        except ValueError as error:
            return str(error)
    return "no error"


def padded_rows():
    """Rows that end with padding, and one without."""
    made = []
    for i, row in enumerate(rows(6)):
        real = torch.arange(LENGTH) < LENGTH - 6 * i
        labels = row["labels"].masked_fill(~real, -100)
        made.append({"input_ids": row["input_ids"], "labels": labels, "attention_mask": real.long()})
    return made


def validate(rank, world, sequence_parallel_size):
    """Return the loss of rows with padding, in one process with transformers' own attention."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    with quiet():
        chosen = RingSequenceParallelStrategy(sequence_parallel_size, "ddp") if world > 1 else "auto"
        net = module("float64", attention="sdpa" if world == 1 else "ring")
        loader = DataLoader(padded_rows(), 2, collate_fn=collated)
        return trainer_of(chosen, world).validate(net, loader, verbose=False)[0]["val/loss"]
