"""Runs that are stopped and go on, in workers of the pool."""

import multiprocessing
import os
import signal
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from trained import Module, collated, quiet, samples, started, trainer_of


def by_rank(parameters):
    """Return groups of weight decay, as language models have them: the optimizer's order is not the module's."""
    parameters = list(parameters)
    flat, matrices = ([x for x in parameters if (x.dim() > 1) == is_matrix] for is_matrix in (False, True))
    return torch.optim.AdamW([{"params": matrices}, {"params": flat, "weight_decay": 0.0}], lr=0.01, eps=1e-4)


SETTING = {"dropout": 0.2, "dtype": torch.float64, "optimizer": by_rank, "seed": 5}


class Watched(Module):
    """Keeps the loss of each micro-batch by its number, and sends itself signals: {(where, number): signal}."""

    def __init__(self, model, optimizer, signals):
        super().__init__(model, optimizer)
        self.signals, self.losses = signals, {}

    def _pass(self, where, number):
        if (where, number) in self.signals:
            os.kill(os.getpid(), self.signals[where, number])

    def training_step(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        self._pass("training", number)
        kept, self.losses = self.losses, []
        loss = super().training_step(batch, batch_idx)
        self.losses = {**kept, number: self.losses[0]}
        return loss

    def validation_step(self, batch, batch_idx):
        self._pass("sanity" if self.trainer.sanity_checking else "validation", self.trainer.global_step)
        self.model(batch)

    def on_train_start(self):
        self._pass("start", 0)

    def on_train_epoch_end(self):
        self._pass("epoch", self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint):
        self._pass("saving", self.trainer.global_step)


def strategy_of(kind, size):
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    if kind == "stock ddp":
        return "ddp"
    if kind == "fsdp2 in one file":
        return RingSequenceParallelStrategy(size, timeout=60, engine={"save_distributed_checkpoint": False})
    return RingSequenceParallelStrategy(size, kind, timeout=60)


def train(rank, world, folder, kind, size, *, signals=None, resume=None, callbacks=None, loading=None, **options):
    """Run, and return losses by micro-batch, exit status or None, and the files that are there."""
    loading = {"batch_size": 4 * size // world, "collate_fn": collated, **(loading or {})}
    os.environ["PL_GLOBAL_SEED"] = str(SETTING["seed"])
    multiprocessing.current_process()._config["daemon"] = False  # else the loader may have no workers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    code = None
    with quiet():
        module = Watched(started(SETTING, seed=11 + rank), SETTING["optimizer"], (signals or {}).get(rank, {}))
        trainer = trainer_of(
            strategy_of(kind, size),
            world,
            **{
                "accumulate_grad_batches": 2,
                "max_epochs": 2,
                "num_sanity_val_steps": 0,
                "default_root_dir": folder,
                "callbacks": list(callbacks(folder) if callbacks else []),
                "enable_checkpointing": callbacks is checkpoints_by_steps,
                **options,
            },
        )
        streamed = loading.pop("iterable", None)
        rows = samples(18) if streamed is None else Stream(samples(streamed))
        train_loader = DataLoader(rows, shuffle=None if streamed else True, **loading)
        val_loader = DataLoader(samples(8, seed=4), **{**loading, "num_workers": 0})
        try:
            trainer.fit(module, train_loader, val_loader, ckpt_path=resume)
        except SystemExit as ending:
            code = ending.code
            for number, handler in handlers.items():
                signal.signal(number, handler)
        restored = {number: signal.getsignal(number) == handler for number, handler in handlers.items()}
        assert all(restored.values()), restored
    return module.losses, code, sorted(path.name for path in Path(folder).iterdir() if path.name != ".checkpoints.json")


class Run:
    """`train` with its arguments, to be sent to workers."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options

    def __call__(self, rank, world):
        return train(rank, world, *self.arguments, **self.options)


class Stream(IterableDataset):
    """A dataset without a known length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class AtEachEnd(L.Callback):
    """A checkpoint wherever Lightning's own callback would save one."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _save(self, trainer, place):
        steps = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        trainer.save_checkpoint(self.folder / f"{steps}-{place}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


def checkpoints_everywhere(folder):
    return [AtEachEnd(folder)]


def checkpoints_by_steps(folder):
    return [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
