"""What attention sends between ranks, how long it waits for it, and what the plan had said."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lightning_longnet.callbacks.monitor import Monitor
from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Traffic
    from lightning_longnet.attention.parallel.exchange import ExchangePlan, Sizes, Volume
    from lightning_longnet.attention.pattern.pattern import Branch

_COUNTED = ("messages", "sent_bytes", "waited_seconds", "flight_seconds", "loss_seconds")
_SECONDS = _COUNTED[2:]
_BRANCHES = 16  # that are told apart; ranks tell each other lists of one length


class CommunicationMonitor(Monitor):
    """Logs `exchange/...`; see `lightning_longnet.callbacks.monitor` for the keys.

    Bytes and messages are those of the logged step, which is known to the byte; times are means over the steps since
    the last.  What engines send for gradients and parameters is not in them.  Nothing is logged where no sequence is
    split, and no times over NCCL, where the host waits for nothing.

    The bytes of a branch are what the plan says that it adds to the branches finer than it, whose rows travel once for
    all of them; where layers have several patterns, those of the first layer's.
    """

    names = (*_COUNTED, "steps", "predicted_bytes", *(f"branch_{i}" for i in range(_BRANCHES)))

    def __init__(self) -> None:
        super().__init__()
        self._branches: tuple[Branch, ...] = ()
        self._has_times = True
        self._forget()

    def _forget(self) -> None:
        self._step = dict.fromkeys(_COUNTED, 0.0)  # of the step that is being done
        self._seconds = dict.fromkeys(_SECONDS, 0.0)  # since the last logging step
        self._steps = 0
        self._calls: list[Any] = []
        self._is_new_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._has_times = trainer.strategy.root_device.type == "cpu"
        self._branches = ()
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_new_step:
            self._step, self._calls, self._is_new_step = dict.fromkeys(_COUNTED, 0.0), [], False
        traffic = sequence_context(pl_module).traffic
        traffic.calls = []
        self._before = _counts(traffic)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        traffic = sequence_context(pl_module).traffic
        for name, after in _counts(traffic).items():
            self._step[name] += after - self._before[name]
        self._calls += traffic.calls or []
        if not trainer.fit_loop._should_accumulate():
            for name in _SECONDS:
                self._seconds[name] += self._step[name]
            self._steps += 1
            self._is_new_step = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def own_numbers(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[float]:
        rank, predicted = sequence_context(module).sequence_parallel_rank, 0
        by_branch = [0.0] * _BRANCHES
        for plan, sizes, forwards, backwards in _alike(self._calls):
            predicted += _sent(_volume(plan, rank, sizes), forwards, backwards)
            branches = plan.layout.pattern.ordered()
            if not self._branches:
                self._branches = branches
            if branches == self._branches:
                for i, each in enumerate(_branch_volumes(plan, rank, sizes)[:_BRANCHES]):
                    by_branch[i] += _sent(each, forwards, backwards)
        step = self._step | self._seconds
        own = [*(float(step[name]) for name in _COUNTED), float(self._steps), float(predicted), *by_branch]
        self._forget()
        return own

    def figures_of(self, told: dict[str, Tensor]) -> dict[str, float]:
        steps = max(float(told["steps"].max()), 1.0)
        sent = told["sent_bytes"]
        if not float(told["predicted_bytes"].sum()) and not float(sent.sum()):
            return {}
        found = {
            "sent_bytes": float(sent.sum()),
            "sent_bytes_max": float(sent.max()),
            "messages": float(told["messages"].sum()),
            "predicted_bytes": float(told["predicted_bytes"].sum()),
        }
        for i, branch in enumerate(self._branches[:_BRANCHES]):
            name = f"branch_{branch.segment_length or 'all'}_{branch.dilation_rate}"
            name += f"_window_{branch.window}" if branch.window else ""
            found[f"{name}_bytes"] = found.get(f"{name}_bytes", 0.0) + float(told[f"branch_{i}"].sum())
        if self._has_times:
            waited, flight = told["waited_seconds"] / steps, told["flight_seconds"] / steps
            found |= {
                "flight_seconds": float(flight.mean()),
                "waited_seconds": float(waited.mean()),
                "waited_seconds_max": float(waited.max()),
                "slowest_rank": float((told["waited_seconds"] + told["loss_seconds"]).argmin()),
            }
            if float(flight.sum()) > 0:
                found["hidden_share"] = float(1 - waited.sum() / flight.sum())
        return {f"exchange/{name}": value for name, value in found.items()}


def _counts(traffic: Traffic) -> dict[str, float]:
    return {name: getattr(traffic, name) for name in _COUNTED}


def _alike(calls: list[Any]) -> list[tuple[ExchangePlan, Sizes, int, int]]:
    """Return each kind of call with the numbers of its forward and backward passes."""
    counts: dict[Any, list[int]] = {}
    for direction, *kind in calls:
        counts.setdefault(tuple(kind), [0, 0])[direction == "backward"] += 1
    return [(*kind, *many) for kind, many in counts.items()]


def _sent(told: Volume, forwards: int, backwards: int) -> int:
    """A checkpoint computes a forward again."""
    return backwards * told.sent_bytes + (forwards - backwards) * told.forward_bytes


@lru_cache(64)
def _volume(plan: ExchangePlan, rank: int, sizes: Sizes) -> Volume:
    return plan.volume(rank, sizes)


@lru_cache(64)
def _branch_volumes(plan: ExchangePlan, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
    return plan.branch_volumes(rank, sizes)
