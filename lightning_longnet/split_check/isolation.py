"""The isolation of a LightningModule's copy: what it logs, and what it does with optimizers, reaches no Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn


class StopStep(BaseException):
    """The exception that ends a step with manual optimisation which has made enough updates for the check.

    `_Gradients.update` of runs.py raises it, and a hook of `FirstBatchCheck` in a step of an optimizer of the run;
    `Runner.run` takes it for the end of the step.
    """


class Logged(dict[str, float]):
    """The numbers that a step logs, by name, if Lightning would reduce them over ranks by a mean or a sum.

    `isolate` makes it, and `Runner.run` puts it into the outcome.

    Args:
        ranks: how many ranks share a sequence.

    Attributes:
        shared: the names of the numbers that ranks reduce: those with `sync_dist=True`, and torchmetrics.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self.shared: set[str] = set()
        self._metrics: dict[str, Any] = {}

    def add(self, name: str, value: Any, *_: Any, reduce_fx: Any = "mean", **options: Any) -> None:
        """Keep a number or a metric; a step calls it as `self.log`, with that method's arguments.

        The number of a metric is kept by `compute`.  A sum is multiplied by the ranks, as all numbers are averaged over
        ranks later.
        """
        if hasattr(value, "dist_sync_fn") and not options.get("rank_zero_only"):
            self._metrics[name] = value
            self.shared.add(name)
        kind = getattr(reduce_fx, "__name__", reduce_fx)
        if kind not in ("mean", "sum", "avg"):
            return
        if options.get("sync_dist"):
            self.shared.add(name)
        factor = self._ranks if kind == "sum" else 1
        if isinstance(value, Tensor) and value.numel() == 1:
            self[name] = factor * float(value.detach())
        elif isinstance(value, (int, float)):
            self[name] = factor * float(value)

    def compute(self) -> None:
        """Compute the metrics, and keep their numbers; all ranks call it together, as metrics gather their states.

        `Runner.run` calls it after a step of evaluation.
        """
        for name, metric in self._metrics.items():
            self.add(name, metric.compute())

    def add_all(self, dictionary: Mapping[str, Any], *_: Any, **options: Any) -> None:
        """Keep the numbers of a dictionary; a step calls it as `self.log_dict`."""
        for name, value in dictionary.items():
            self.add(name, value, **options)


def isolate(module: nn.Module, backward: Callable[..., None], update: Callable[[], None], ranks: int) -> Logged:
    """Replace the methods by which a LightningModule's step reaches its Trainer; return what the step will log.

    `Runner` calls it before a step.  Modules that are no LightningModules stay as they are.

    Args:
        module: the copy, with other LightningModules in it or not.
        backward: called with each loss of manual optimisation, as `manual_backward`.
        update: called where an optimizer would update the parameters.
        ranks: how many ranks share a sequence.
    """
    logged = Logged(ranks)
    for each in module.modules():
        if hasattr(each, "manual_backward"):
            each.__dict__.update(_methods(each, logged, backward, update))
    return logged


def _methods(module: Any, logged: Logged, backward: Callable[..., None], update: Callable[[], None]) -> dict[str, Any]:
    """Return what replaces methods of a LightningModule, by their names; the arguments are those of `isolate`."""
    optimizer, scheduler = _Optimizer(module, update), _Scheduler()

    def optimizers(*_: Any, **__: Any) -> Any:
        many = len(module.trainer.optimizers)
        return optimizer if many == 1 else [optimizer] * many

    def schedulers(*_: Any, **__: Any) -> Any:
        many = len(module.trainer.lr_scheduler_configs)
        return (None, scheduler)[many] if many < 2 else [scheduler] * many

    return {
        "log": logged.add,
        "log_dict": logged.add_all,
        "print": _nothing,
        "manual_backward": backward,
        "optimizers": optimizers,
        "lr_schedulers": schedulers,
        "toggle_optimizer": _nothing,
        "untoggle_optimizer": _nothing,
        "clip_gradients": _nothing,
    }


def _nothing(*_: Any, **__: Any) -> None:
    pass


class _Optimizer:
    """What `self.optimizers()` returns in a check: `step` calls `update`, and leaves the parameters as they are."""

    def __init__(self, module: nn.Module, update: Callable[[], None]) -> None:
        self._module, self._update = module, update
        self.param_groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "lr": 0.0}]
        self.state: dict[Any, Any] = {}

    @property
    def optimizer(self) -> _Optimizer:
        return self

    def zero_grad(self, *_: Any, **__: Any) -> None:
        self._module.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None, **__: Any) -> None:
        if closure is not None:
            closure()
        self._update()


class _Scheduler:
    """What `self.lr_schedulers()` returns in a check; it does nothing."""

    def step(self, *_: Any, **__: Any) -> None:
        pass

    def get_last_lr(self) -> list[float]:
        return [0.0]
