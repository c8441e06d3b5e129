"""`NonFiniteGuard`: a callback that skips steps with NaN in the loss or the gradient on all ranks, or ends the run."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.distributed.tensor import DTensor

from lightning_longnet.callbacks.host import host_group
from lightning_longnet.callbacks.monitor import is_logging_step
from lightning_longnet.sequence import sequence_context
from lightning_longnet.sequence.batches import digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

Action = Literal["skip", "raise"]


class _Seen(NamedTuple):
    """A micro-batch of the current step, and its loss."""

    batch_idx: int
    batch: Any
    samples: tuple[str, ...]
    loss: Tensor


class NonFiniteGuard(Callback):
    """Skips steps with a NaN or an infinity in the loss or the gradient, on all ranks, or ends the run.

    A loss that is not finite makes its gradient NaN, and after averaging that of every rank; before the optimizer's
    step all ranks compare their parts of the gradient.  Then either all skip the step, or all raise a
    FloatingPointError.  Schedules of learning rates go on.  The warning or error names the batches of the step: their
    numbers, and for each data-parallel group the names of samples or a hash.

    With DeepSpeed its own check is switched on and used.  A GradScaler of 16-bit floats skips steps by itself, as it
    must to find its scale: these are not counted.

    It waits for a GPU once a step, before the optimizer's step.  Lightning calls the hooks `on_*` on all ranks.

    Args:
        action: "skip" or "raise".
        patience: the number of skipped steps in a row that ends the run.
    """

    def __init__(self, action: Action = "skip", patience: int = 10) -> None:
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {', '.join(map(repr, get_args(Action)))}, got {action!r}")
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience must be a number of steps, at least 1, got {patience!r}")
        self.action, self.patience = action, patience
        self.skipped_steps = self._in_a_row = 0
        self._seen: list[_Seen] = []
        self._group: dist.ProcessGroup | None = None
        self._current: tuple[int, Any, tuple[str, ...]] = 0, None, ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a group on the host, and switch DeepSpeed's own check on."""
        self._group = host_group(trainer)
        self._seen = []
        engine = _engine(trainer)
        if engine is not None and hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch, for the description of a bad step."""
        self._current = batch_idx, batch, sequence_context(pl_module).samples

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, and make its gradient NaN if it is not finite, so that the gradients of all ranks show it."""
        known = loss.detach()
        self._seen.append(_Seen(*self._current, known))
        if loss.requires_grad:
            loss.register_hook(lambda grad: torch.where(known.isfinite(), grad, torch.nan))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare the gradients of all ranks; if one is not finite, remove all of them, and warn or end the run."""
        if _engine(trainer) is not None or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        bad = _is_bad(parameters).to(trainer.strategy.root_device)
        if self._group is not None:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bad.item():
            self._in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # every optimizer skips parameters without a gradient
        self._react(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the result of DeepSpeed's check, if it makes it, and log how many steps were skipped."""
        if trainer.fit_loop._should_accumulate():
            return
        engine = _engine(trainer)
        if engine is not None and not engine.fp16_enabled():
            if engine.optimizer.overflow:
                self._react(trainer, pl_module)
            else:
                self._in_a_row = 0
        self._seen = []
        if is_logging_step(trainer):
            pl_module.log("guard/skipped_steps", float(self.skipped_steps), on_step=True, on_epoch=False, batch_size=1)

    def _react(self, trainer: Trainer, module: LightningModule) -> None:
        """Count a bad step and warn of it, or raise a FloatingPointError, on all ranks together."""
        self.skipped_steps += 1
        self._in_a_row += 1
        story = self._story(trainer, module)
        if self.action == "raise":
            raise FloatingPointError(story)
        if self._in_a_row >= self.patience:
            raise FloatingPointError(f"{self._in_a_row} steps in a row were skipped; the last: {story}")
        rank_zero_warn(f"NonFiniteGuard: skipped a step: {story}", category=RuntimeWarning)

    def _story(self, trainer: Trainer, module: LightningModule) -> str:
        """Return a description of the step that is the same on all ranks, which call this together."""
        context = sequence_context(module)
        losses = [float(seen.loss) for seen in self._seen]
        own = context.data_parallel_rank, losses, [_identity(seen) for seen in self._seen]
        everyone: list[Any] = [own]
        if self._group is not None:
            everyone = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everyone, own, group=self._group)
        wrong = [rank for rank, (_, each, _) in enumerate(everyone) if not all(map(isfinite, each))]
        if wrong:
            what = f"the loss is not finite on rank {_listed(wrong)}"
        else:
            most = max((loss for _, each, _ in everyone for loss in each), default=0.0)
            what = f"the gradient is not finite, at losses up to {most:.4g}"
        held: dict[int, list[str]] = {}
        for group, _, batches in everyone:
            held.setdefault(group, batches)
        groups = [f"group {group} held {', '.join(batches)}" for group, batches in list(held.items())[:8]]
        numbers = _listed([seen.batch_idx for seen in self._seen])
        return (
            f"{what}, in step {trainer.global_step} of epoch {trainer.current_epoch}, batch {numbers} of each group: "
            + "; ".join(groups)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps, which Lightning saves in checkpoints."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of skipped steps of a checkpoint."""
        self.skipped_steps = state_dict["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group and the batches, which another process does not have."""
        return {**self.__dict__, "_group": None, "_seen": []}


def _engine(trainer: Trainer) -> Any:
    """Return the `DeepSpeedEngine` of a Trainer whose optimizer checks gradients for NaN and infinity, else None."""
    strategy = trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy) or not hasattr(strategy.deepspeed_engine.optimizer, "overflow"):
        return None
    return strategy.deepspeed_engine


def _identity(seen: _Seen) -> str:
    """Return the names of a batch's first eight samples, or a hash of this rank's part if it has no names."""
    if seen.samples:
        return " ".join(seen.samples[:8]) + (" ..." if len(seen.samples) > 8 else "")
    return f"{digest(seen.batch):014x}"


@torch.no_grad()  # with gradients, to_local would be recorded
def _is_bad(parameters: list[Any]) -> Tensor:
    """Return 1 if a gradient of this rank, or its shard, is not finite, else 0, as a tensor on its device.

    It does not wait for a GPU.
    """
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.int32)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
    return (~norms.isfinite().all()).int()


def _listed(numbers: list[int]) -> str:
    """Return "1, 3" for a message; "-" for none."""
    return ", ".join(map(str, numbers)) or "-"
