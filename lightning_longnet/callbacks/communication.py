"""`CommunicationMonitor`: what attention sends between ranks, how long it waits, and what the plan predicts."""

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
_BRANCHES = 16  # the most that are logged; ranks gather lists of one length


class CommunicationMonitor(Monitor):
    """Logs `exchange/...`; see `lightning_longnet.callbacks.monitor` for the keys.

    Bytes and messages are exact counts of the logged step; times are means over the steps since the last logging step.
    They do not include the gradients and parameters that DDP, FSDP or DeepSpeed send.  If no sequence is split, nothing
    is logged.  Over NCCL no times are logged, because the host does not wait for messages.

    A row travels once for all branches, so the bytes of a branch are those that the plan adds to the finer branches for
    it.  If layers have several patterns, they are those of the first layer.

    Lightning calls the hooks `on_*` on all ranks, and `Monitor.on_train_batch_end` the methods that give numbers.
    """

    names = (*_COUNTED, "steps", "predicted_bytes", *(f"branch_{i}" for i in range(_BRANCHES)))

    def __init__(self) -> None:
        super().__init__()
        self._branches: tuple[Branch, ...] = ()
        self._has_times = True
        self._forget()

    def _forget(self) -> None:
        """Begin to count anew, after a logging step."""
        self._step = dict.fromkeys(_COUNTED, 0.0)  # of the current step
        self._seconds = dict.fromkeys(_SECONDS, 0.0)  # since the last logging step
        self._steps = 0
        self._calls: list[Any] = []
        self._is_new_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count anew."""
        super().on_train_start(trainer, pl_module)
        self._has_times = trainer.strategy.root_device.type == "cpu"
        self._branches = ()
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the counts before a micro-batch, and have its calls of attention listed."""
        if self._is_new_step:
            self._step, self._calls, self._is_new_step = dict.fromkeys(_COUNTED, 0.0), [], False
        traffic = sequence_context(pl_module).traffic
        traffic.calls = []
        self._before = _counts(traffic)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what the micro-batch sent to the step, and at its end the times of the step to those that are logged."""
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
        """Return what this rank counted, and what the plan predicts for the logged step, in the order of `names`."""
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

    def figures_of(self, gathered: dict[str, Tensor]) -> dict[str, float]:
        """Return `exchange/...` of all ranks; nothing if attention has sent nothing."""
        steps = max(float(gathered["steps"].max()), 1.0)
        sent = gathered["sent_bytes"]
        if not float(gathered["predicted_bytes"].sum()) and not float(sent.sum()):
            return {}
        figures = {
            "sent_bytes": float(sent.sum()),
            "sent_bytes_max": float(sent.max()),
            "messages": float(gathered["messages"].sum()),
            "predicted_bytes": float(gathered["predicted_bytes"].sum()),
        }
        for i, branch in enumerate(self._branches[:_BRANCHES]):
            name = f"branch_{branch.segment_length or 'all'}_{branch.dilation_rate}"
            name += f"_window_{branch.window}" if branch.window else ""
            figures[f"{name}_bytes"] = figures.get(f"{name}_bytes", 0.0) + float(gathered[f"branch_{i}"].sum())
        if self._has_times:
            waited, flight = gathered["waited_seconds"] / steps, gathered["flight_seconds"] / steps
            figures |= {
                "flight_seconds": float(flight.mean()),
                "waited_seconds": float(waited.mean()),
                "waited_seconds_max": float(waited.max()),
                "slowest_rank": float((gathered["waited_seconds"] + gathered["loss_seconds"]).argmin()),
            }
            if float(flight.sum()) > 0:
                figures["hidden_share"] = float(1 - waited.sum() / flight.sum())
        return {f"exchange/{name}": value for name, value in figures.items()}


def _counts(traffic: Traffic) -> dict[str, float]:
    """Return the counts of a rank's traffic by name."""
    return {name: getattr(traffic, name) for name in _COUNTED}


def _alike(calls: list[Any]) -> list[tuple[ExchangePlan, Sizes, int, int]]:
    """Return (plan, sizes, forwards, backwards) for each kind of the calls of attention that `Traffic.calls` lists."""
    counts: dict[Any, list[int]] = {}
    for direction, *kind in calls:
        counts.setdefault(tuple(kind), [0, 0])[direction == "backward"] += 1
    return [(*kind, *many) for kind, many in counts.items()]


def _sent(volume: Volume, forwards: int, backwards: int) -> int:
    """Return the bytes that calls send; with activation checkpointing there are more forwards than backwards."""
    return backwards * volume.sent_bytes + (forwards - backwards) * volume.forward_bytes


@lru_cache(64)
def _volume(plan: ExchangePlan, rank: int, sizes: Sizes) -> Volume:
    """Return what a rank sends in one call by a plan, cached."""
    return plan.volume(rank, sizes)


@lru_cache(64)
def _branch_volumes(plan: ExchangePlan, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
    """Return what a rank sends in one call for each branch of a plan's pattern, cached."""
    return plan.branch_volumes(rank, sizes)
