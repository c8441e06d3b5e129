"""The phase that a rank is at: for errors, for the timeouts of its groups, and for a supervisor that watches it."""

from __future__ import annotations

import faulthandler
import os
import sys
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ParallelStrategy

from lightning_longnet.supervision.record import (
    BACKWARD,
    BETWEEN,
    COMPILATION,
    CONNECT,
    FOLDER,
    FORWARD,
    LOAD,
    OPTIMIZER,
    OUTSIDE,
    PREDICT,
    SAVE,
    SET_UP,
    START,
    TEST,
    VALIDATION,
    Record,
)
from lightning_longnet.supervision.stacks import SIGNAL, path_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Trainer

    from lightning_longnet.strategies.timeouts import Timeouts

_STACKS: list[Any] = []  # the open file of this process's stacks


# Methods of engines with the phases that begin and end with them; states are restored after a checkpoint is read
_METHODS = (
    ("setup_environment", CONNECT, SET_UP),
    ("load_checkpoint", LOAD, LOAD),
    ("save_checkpoint", SAVE, BETWEEN),
)


class Progress:
    """The phase and the step of this rank; they are written to the record of a supervisor, where there is one.

    Attributes:
        phase, step: the phase, and the number of optimizer steps that are complete.
        steps: how many steps of training this run has begun after the first.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.steps = START, 0, 0
        self.record: Record | None = None
        self._forward: float | None = None  # when the last step began, unless something else came in between
        self._watches_compiler = False

    def connect(self, rank: int, ranks: int) -> None:
        """Open the record, where a supervisor has made a folder for it."""
        folder = os.environ.get(FOLDER)
        if folder is None or not Path(folder).is_dir():
            return
        self.record = Record(folder, rank, ranks)
        file = path_of(Path(folder), rank).open("w")
        faulthandler.enable(file)
        faulthandler.register(SIGNAL, file, all_threads=True, chain=False)
        _STACKS[:] = [file]
        self.record.print_stacks_at_signal()

    def mark(self, phase: str, step: int | None = None) -> None:
        """Begin a phase."""
        self.phase = phase
        if step is not None:
            self.step = step
        if self.record is not None:
            self.record.mark(phase, self.step)

    def mark_step(self, step: int) -> None:
        """Mark the forward of a step of training, and record how long the step before it took."""
        if self.record is not None:
            self._watch_compiler()
            now = monotonic()
            if self.steps > 0:
                self.record.add_step(None if self._forward is None else now - self._forward)
            self._forward = now
        self.steps += 1
        self.mark(FORWARD, step)

    def interrupt(self, phase: str, step: int | None = None) -> None:
        """Begin a phase that is no part of a step."""
        self._forward = None
        self.mark(phase, step)

    def _watch_compiler(self) -> None:
        """Mark the times in which torch compiles."""
        if self._watches_compiler or "torch._dynamo" not in sys.modules:
            return
        from torch._dynamo.callback import callback_handler

        self._watches_compiler = True
        before = [self.phase]

        def begin(_: object) -> None:
            before[:] = [self.phase]
            self.interrupt(COMPILATION)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(lambda _: self.mark(before[0]))


class MarkedPhases(ParallelStrategy):
    """Marks the phases of a run, and sets the timeouts of the groups that fit them."""

    progress: Progress
    timeouts: Timeouts
    resumed: str | None = None  # the checkpoint that a restart by a supervisor goes on from

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "lightning_class" in cls.__dict__:  # the class of an engine, which overrides these methods
            for name, begins, ends in _METHODS:
                setattr(cls, name, _marked(getattr(cls, name), begins, ends))

    def _step(self) -> int:
        trainer: Trainer | None = getattr(self.lightning_module, "_trainer", None)
        return 0 if trainer is None else trainer.global_step

    def _interrupt(self, phase: str) -> None:
        """Begin a phase in which ranks may wait long for each other."""
        self.timeouts.interrupt()
        self.progress.interrupt(phase, self._step())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.progress.steps > 0 and self.progress.phase in (BETWEEN, OPTIMIZER, VALIDATION):
            self._interrupt(SAVE)  # it ends with the next phase; a Trainer calls this method when it saves
        return super().lightning_module_state_dict()

    def on_train_start(self) -> None:
        self.progress.mark(BETWEEN, self._step())
        super().on_train_start()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.timeouts.shorten()
        self.progress.mark_step(self._step())
        return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Any) -> None:
        self.progress.mark(BACKWARD)
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Any) -> None:
        super().post_backward(closure_loss)
        self.progress.mark(OPTIMIZER)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        self.timeouts.restore()
        self.progress.mark(BETWEEN)
        return result

    def on_validation_start(self) -> None:
        self._interrupt(VALIDATION)
        super().on_validation_start()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.mark(VALIDATION)
        return super().validation_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.progress.mark(BETWEEN)

    def on_test_start(self) -> None:
        self._interrupt(TEST)
        super().on_test_start()

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.mark(TEST)
        return super().test_step(*args, **kwargs)

    def on_predict_start(self) -> None:
        self._interrupt(PREDICT)
        super().on_predict_start()

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.mark(PREDICT)
        return super().predict_step(*args, **kwargs)

    def on_train_end(self) -> None:
        super().on_train_end()
        self._interrupt(BETWEEN)

    def _leave_run(self) -> None:
        """Mark that what the process does from now on is no part of the run."""
        self.progress.steps = 0
        self.progress.interrupt(OUTSIDE)

    def _end_run(self, text: str, outcome: int) -> None:
        """Write for the supervisor how this rank ended."""
        if self.progress.record is not None:
            self.progress.record.end(outcome, text)


def _marked(method: Callable[..., Any], begins: str, ends: str) -> Callable[..., Any]:
    """Return a method that does the same, and marks the phase that begins with it and the one that follows it.

    `MarkedPhases.__init_subclass__` puts it in place of methods that the engines override.  What a program saves or
    loads after a run is not a part of it; connecting begins the next run.
    """

    @wraps(method)
    def marked(self: MarkedPhases, *args: Any, **kwargs: Any) -> Any:
        is_outside = self.progress.phase == OUTSIDE and begins != CONNECT
        self._interrupt(begins)
        try:
            result = method(self, *args, **kwargs)
        finally:
            if is_outside:
                self.progress.mark(OUTSIDE)
        if not is_outside:
            self.progress.mark(ends)
        return result

    return marked
