"""A run that monitors watch, beside counts of the same things by other means."""

import time
from collections import defaultdict
from functools import partial

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from trained import Module, collated, quiet, samples, started, trainer_of

from lightning_longnet.callbacks import CommunicationMonitor, MemoryMonitor, TokenThroughput, clock, throughput
from lightning_longnet.strategies import RingSequenceParallelStrategy

PEAK = 1e9


class Time(L.Callback):
    """The clock of the monitors: every micro-batch takes a known time, and so does what lies between."""

    def __init__(self, step):
        self.now, self.step = 100.0, step

    def __call__(self):
        return self.now

    def on_train_batch_start(self, *_):
        self.now += 0.25  # data, beside the step

    def on_before_backward(self, *_):
        self.now += self.step

    def on_validation_batch_start(self, *_):
        self.now += 1000


class Sent(L.Callback):
    """Bytes and messages that are sent in the steps of training, and how long ranks stand still."""

    def __init__(self):
        self.steps, self.counts, self.real = [], defaultdict(int), dist.batch_isend_irecv

    def __call__(self, operations):
        for each in operations:
            if each.op is dist.isend:
                self.counts["messages"] += 1
                self.counts["sent_bytes"] += each.tensor.numel() * each.tensor.element_size()
        return self.real(operations)

    def on_train_batch_start(self, trainer, *_):
        self.before = dict(self.counts)

    def on_before_backward(self, *_):
        self.forward = self.counts["sent_bytes"] - self.before.get("sent_bytes", 0)

    def on_train_batch_end(self, trainer, *_):
        counts = {name: many - self.before.get(name, 0) for name, many in self.counts.items()}
        if not self.steps or self.steps[-1]["done"]:
            self.steps.append(defaultdict(int, done=False))
        for name, many in counts.items():
            self.steps[-1][name] += many
        self.steps[-1]["done"] = not trainer.fit_loop._should_accumulate()


class Logged(L.Callback):
    """The figures that were logged at each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        figures = {key: float(x) for key, x in trainer.callback_metrics.items() if "/" in key}
        self.rows.append((trainer.global_step, figures))
        states = trainer.optimizers[0].state.values()
        self.parameters = sum(_local(x) for x in module.parameters())
        self.state = sum(_local(x) for values in states for x in values.values() if torch.is_tensor(x))


class Slow(Module):
    """One rank takes its time."""

    def __init__(self, *arguments, slow=None):
        super().__init__(*arguments)
        if slow is not None:
            rank, is_before = slow
            hooks = self.model.register_forward_pre_hook if is_before else self.model.register_forward_hook
            hooks(lambda *_: time.sleep(0.12) if self.training and self.global_rank == rank else None)

    def validation_step(self, batch, batch_idx):
        self.model(batch)


def watch(
    rank,
    world,
    size,
    sharding,
    optimizer,
    length,
    documents=False,
    exchange="auto",
    slow=None,
    hoard=False,
    again=False,
):
    """Return {callback: figures} of this rank, of 4 steps of 2 micro-batches that are logged at every second."""
    timed = Time(1.0 + 0.5 * rank)
    sent, logged = Sent(), Logged()
    monitors = [TokenThroughput(peak_flops=PEAK), MemoryMonitor(), CommunicationMonitor()]
    real = clock.perf_counter, throughput.perf_counter, dist.batch_isend_irecv
    clock.perf_counter = throughput.perf_counter = timed
    dist.batch_isend_irecv = sent
    groups = world // size
    hoarded = torch.ones(2**25) if hoard and rank == 1 else None  # 128 MiB
    try:
        with quiet():
            setting = {"dropout": 0.0, "dtype": torch.float64}
            module = Slow(started(setting), optimizer, slow=slow)
            for block in module.model.blocks if again else ():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            rows = samples(32, length=length, documents=documents)
            loader = DataLoader(rows, batch_size=4 // groups, collate_fn=collated)
            trainer = trainer_of(
                RingSequenceParallelStrategy(size, sharding, exchange),
                world,
                accumulate_grad_batches=2,
                limit_train_batches=8,
                val_check_interval=2,
                limit_val_batches=1,
                num_sanity_val_steps=1,
                log_every_n_steps=2,
                callbacks=[timed, sent, *monitors, logged],
            )
            trainer.fit(module, loader, loader)
    finally:
        clock.perf_counter, throughput.perf_counter, dist.batch_isend_irecv = real
    del hoarded
    return {
        "rows": logged.rows,
        "forward": sent.forward,  # of the last micro-batch
        "sent": [dict(each) for each in sent.steps],
        "by_rank": {name: values for each in monitors for name, values in each.by_rank.items()},
        "parameters": logged.parameters,
        "state": logged.state,
    }


def _local(x):
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.numel() * x.element_size()
