"""`TrainingProgress`: a progress bar with the figures of a run, as one line on a terminal, or lines in a file."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.callbacks import ProgressBar
from lightning_utilities.core.imports import RequirementCache

from lightning_longnet.callbacks.monitor import Monitor, is_logging_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# (keys, format): the first key that was logged is shown.  Losses in another unit are not shown beside bits per byte
_BITS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("train/bits_per_byte",), "train {:.3f} bits/byte"),
    (("val/bits_per_byte",), "val {:.3f} bits/byte"),
)
_LOSSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("train/loss", "train_loss", "loss"), "train loss {:.3f}"),
    (("val/loss", "val_loss"), "val loss {:.3f}"),
)
_OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("throughput/tokens_per_second",), "{} tokens/s"),
    (("throughput/mfu",), "MFU {:.1%}"),
    (("memory/peak_gib_max",), "{:.2f} GiB"),
)


class TrainingProgress(ProgressBar):
    """Shows a bar with the bits per byte of training and validation, tokens a second of all ranks, and memory.

    Where a module logs no bits per byte, the losses that it logs stand in their place, in the module's own unit.

    Rich draws it where it is installed, else tqdm; where the output is no terminal, it is a plain line at each of the
    Trainer's logging steps.  It reads figures at logging steps only, and never waits for a GPU.

    Lightning calls the hooks `on_*`.  Validation, test and prediction have a bar of their own, which `on_*_start`
    opens, `on_*_batch_end` advances and `on_*_end` closes.

    Args:
        refresh_rate: steps between two drawings of the bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        if not isinstance(refresh_rate, int) or isinstance(refresh_rate, bool) or refresh_rate < 1:
            raise ValueError(f"refresh_rate must be a number of steps, at least 1, got {refresh_rate!r}")
        self.refresh_rate = refresh_rate
        self._is_enabled = True
        self._train: _Line | None = None
        self._other: _Line | None = None
        self._text = ""

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first, and before its finders of settings."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar again; Lightning calls it after its finders of learning rates and batch sizes."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar; `LightningModule.print` calls it."""
        line = self._train or self._other
        if self._is_enabled and line is not None:
            line.print(*args)
        elif self._is_enabled:
            print(*args, **kwargs)  # noqa: T201

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put this callback behind all others; Lightning calls it at the begin of a run."""
        super().setup(trainer, pl_module, stage)
        # it must run after the monitors, to show their latest figures
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]  # type: ignore[attr-defined]

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of training, with the number of its optimizer steps where that is known."""
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        total = int(steps) if steps not in (-1, float("inf")) else None
        self._train = self._line("train", total)
        self._train.update(trainer.global_step, self._text)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Advance the bar of training at the end of an optimizer step, with new figures at logging steps."""
        if self._train is None or trainer.fit_loop._should_accumulate():
            return
        is_logged, step = is_logging_step(trainer), trainer.global_step
        if is_logged:
            self._text = described(trainer)
        if is_logged or step % self.refresh_rate == 0:
            self._train.update(step, self._text, is_logged)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last figures, and close the bar of training."""
        if self._train is not None:
            self._train.update(trainer.global_step, described(trainer))
            self._train.close()
        self._train = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close all bars, so that the error is below them."""
        for line in filter(None, (self._other, self._train)):
            line.close()
        self._train = self._other = None

    # Validation, test and prediction

    def _begin(self, name: str, batches: list[int | float]) -> None:
        """Open the bar of a loop other than training; `batches` are the numbers of batches of its loaders."""
        total = sum(batches)
        self._other = self._line(name, None if total == float("inf") else int(total))
        self._done = 0

    def _advance(self) -> None:
        """Count a batch in that bar."""
        if self._other is not None:
            self._done += 1
            self._other.update(self._done, "")

    def _finish(self) -> None:
        """Close that bar."""
        if self._other is not None:
            self._other.close()
        self._other = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("check" if trainer.sanity_checking else "validate", list(counts))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()
        if self._train is not None:
            self._text = described(trainer)
            self._train.update(trainer.global_step, self._text)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", list(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predict", list(trainer.num_predict_batches))

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def _line(self, name: str, total: int | None) -> _Line:
        """Return a bar that fits the output, of `total` steps or batches; None if their number is not known."""
        if not self._is_enabled:
            return _Nothing()
        if not sys.stdout.isatty():
            return _Plain(name, total)
        if not RequirementCache("rich>=13"):
            return _Tqdm(name, total)
        return _Rich(name, total, self._train.progress if isinstance(self._train, _Rich) else None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bars, which another process does not have."""
        return {**self.__dict__, "_train": None, "_other": None}


def described(trainer: Trainer) -> str:
    """Return the latest figures of a Trainer and its monitors as a line, "train 1.234 bits/byte, 56k tokens/s"."""
    figures = dict(trainer.callback_metrics)
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, Monitor):
            figures |= each.figures  # type: ignore[arg-type]
    words = []
    has_bits = any(key in figures for keys, _ in _BITS for key in keys)
    for keys, shape in (*(_BITS if has_bits else _LOSSES), *_OTHERS):
        value = next((float(figures[key]) for key in keys if key in figures), None)
        if value is not None:
            words.append(shape.format(_short(value) if shape == "{} tokens/s" else value))
    return ", ".join(words)


def _short(value: float) -> str:
    """Return a number in three digits with k, M or G; "9,999" below ten thousand."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}"


class _Line(Protocol):
    """What shows the progress of a loop.

    `update` shows how many steps or batches are done, with a text; `is_logged` is True at the Trainer's logging steps.
    """

    def update(self, done: int, text: str, is_logged: bool = False) -> None: ...

    def print(self, *args: Any) -> None: ...

    def close(self) -> None: ...


class _Nothing:
    """The line of ranks other than the first, which shows nothing."""

    def update(self, done: int, text: str, is_logged: bool = False) -> None: ...

    def print(self, *args: Any) -> None: ...

    def close(self) -> None: ...


class _Plain:
    """Lines in a file: at logging steps of training, and at the end of anything else."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total = name, total
        self.done, self.text = 0, ""
        self.begun = perf_counter()

    def update(self, done: int, text: str, is_logged: bool = False) -> None:
        self.done, self.text = done, text
        if is_logged:
            self.print(self._shown())

    def _shown(self) -> str:
        """Return the line: the steps or batches that are done, the time that they took, and the figures."""
        minutes, seconds = divmod(int(perf_counter() - self.begun), 60)
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.name} {self.done}{of}, {minutes}:{seconds:02d}" + (f", {self.text}" if self.text else "")

    def print(self, *args: Any) -> None:
        print(*args, flush=True)  # noqa: T201

    def close(self) -> None:
        if self.name != "train":
            self.print(self._shown())


class _Tqdm:
    """A bar by tqdm."""

    def __init__(self, name: str, total: int | None) -> None:
        from tqdm import tqdm

        shape = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(desc=name, total=total, leave=name == "train", dynamic_ncols=True, file=sys.stdout)
        if total is not None:
            self.bar.bar_format = shape

    def update(self, done: int, text: str, is_logged: bool = False) -> None:
        self.bar.n = done
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.refresh()

    def print(self, *args: Any) -> None:
        self.bar.write(" ".join(map(str, args)))

    def close(self) -> None:
        self.bar.close()


class _Rich:
    """A bar by Rich; bars that are shown together share one `Progress`, which the first of them makes and stops."""

    def __init__(self, name: str, total: int | None, progress: Any = None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", style="dim"),
        )
        self.is_owner = progress is None
        self.progress = progress or Progress(*columns, transient=name != "train")
        self.task = self.progress.add_task(name, total=total, text="")
        self.progress.start()

    def update(self, done: int, text: str, is_logged: bool = False) -> None:
        self.progress.update(self.task, completed=done, text=text)

    def print(self, *args: Any) -> None:
        self.progress.console.print(*args, markup=False, highlight=False)

    def close(self) -> None:
        if self.is_owner:
            self.progress.stop()
        else:
            self.progress.remove_task(self.task)
