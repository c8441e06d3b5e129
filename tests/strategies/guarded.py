"""A run some of whose steps go wrong, and what was left of parameters and optimiser by each."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from trained import SMALL_BUCKETS, Module, collated, quiet, samples, started, trainer_of, whole

from lightning_longnet import sequence_context
from lightning_longnet.callbacks import NonFiniteGuard
from lightning_longnet.strategies import RingSequenceParallelStrategy


class Failing(Module):
    """At the batches of `wrong`, on the last rank: a loss that is NaN, or the infinite gradient of a number."""

    def __init__(self, *arguments, wrong, what):
        super().__init__(*arguments)
        self.wrong, self.what = wrong, what
        self.sums = []

    def training_step(self, batch, batch_idx):
        is_wrong = batch_idx in self.wrong and self.global_rank == self.trainer.world_size - 1
        loss = super().training_step(batch, batch_idx)
        if not is_wrong:
            return loss
        if self.what == "loss":
            return loss + torch.nan  # whose gradient by itself would be finite
        return loss + _Infinite.apply(self.model.head.bias[0])  # where it is sharded, on one rank alone

    def on_fit_start(self):
        assert sequence_context(self).mesh is not None


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


class Snapshots(L.Callback):
    """Parameters, and whatever the optimiser holds, before the first batch and after each."""

    def __init__(self):
        self.taken = []

    def on_train_start(self, trainer, module):
        self._take(trainer, module)

    def on_train_batch_end(self, trainer, module, *_):
        self._take(trainer, module)

    def _take(self, trainer, module):
        parameters = [whole(x) for x in module.parameters()]
        states = [
            x.to_local().clone() if hasattr(x, "to_local") else x.clone()
            for values in trainer.optimizers[0].state.values()
            for x in values.values()
            if torch.is_tensor(x)
        ]
        self.taken.append((parameters, states))


def guard(rank, world, size, sharding, optimizer, what, action="skip", patience=10, wrong=(2, 3), accumulate=1):
    """Return (did each batch leave everything as it was, steps skipped, the warnings) of 6 batches."""
    import warnings

    snapshots, guarding = Snapshots(), NonFiniteGuard(action, patience)
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="NonFiniteGuard")
        setting = {"dropout": 0.0, "dtype": torch.float32}
        module = Failing(started(setting), optimizer, wrong=wrong, what=what)
        engine = {"engine": SMALL_BUCKETS} if sharding.startswith("deepspeed") else {}
        loader = DataLoader(samples(48), batch_size=4 // (world // size), collate_fn=collated)
        trainer = trainer_of(
            RingSequenceParallelStrategy(size, sharding, **engine),
            world,
            limit_train_batches=6,
            gradient_clip_val=1.0,
            accumulate_grad_batches=accumulate,
            callbacks=[guarding, snapshots],
            log_every_n_steps=1,
        )
        trainer.fit(module, loader)
    same = [
        len(before[1]) == len(after[1])
        and all(torch.equal(a, b) for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True))
        for before, after in zip(snapshots.taken, snapshots.taken[1:], strict=False)
    ]
    is_finite = all(bool(x.isfinite().all()) for x in snapshots.taken[-1][0])
    logged = float(trainer.callback_metrics["guard/skipped_steps"])
    return same, guarding.skipped_steps, logged, is_finite, [str(each.message) for each in caught]
