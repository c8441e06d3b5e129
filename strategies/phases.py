"""The phase of the run that a rank is in: for errors, for the timeouts of its groups, and for a supervisor."""

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


# (method of the strategy, the phase that begins with its call, the phase after it).  The phase LOAD goes on after a
# checkpoint is read, as Lightning then restores the states
_METHODS = (
    ("setup_environment", CONNECT, SET_UP),
    ("load_checkpoint", LOAD, LOAD),
    ("save_checkpoint", SAVE, BETWEEN),
)


class Progress:
    """The phase and the step of this rank; they are written to the record of a supervisor, if one watches the run.

    The phases are the constants of `lightning_longnet.supervision.record`.

    Attributes:
        phase, step: the phase, and the number of optimizer steps that are complete.
        steps: how often this run has called `training_step`.
        record: the file that a supervisor reads; None without one.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.steps = START, 0, 0
        self.record: Record | None = None
        self._forward: float | None = None  # when the last step began, unless something else came in between
        self._watches_compiler = False

    def connect(self, rank: int, ranks: int) -> None:
        """Open the record of this rank, if a supervisor has made a folder for it.

        `SequenceRanks._configure_launcher` calls it when a Trainer is made.  A signal of the supervisor then has
        faulthandler write the stacks of all threads to a file in the folder.
        """
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
        """Begin a phase, and set the number of complete optimizer steps if `step` is given.

        The hooks of `MarkedPhases` call it, and `CheckpointSaves.settle_saves` for the phase before a save.
        """
        self.phase = phase
        if step is not None:
            self.step = step
        if self.record is not None:
            self.record.mark(phase, self.step)

    def mark_step(self, step: int) -> None:
        """Begin the phase FORWARD of a training step, and record for a supervisor how long the step before it took.

        A step that a validation, a save or a compilation interrupted is counted without a time.
        `MarkedPhases.training_step` calls it.
        """
        if self.record is not None:
            self._watch_compiler()
            now = monotonic()
            if self.steps > 0:
                self.record.add_step(None if self._forward is None else now - self._forward)
            self._forward = now
        self.steps += 1
        self.mark(FORWARD, step)

    def interrupt(self, phase: str, step: int | None = None) -> None:
        """Begin a phase that is no part of a training step, such as a validation: the step is not timed.

        `MarkedPhases._interrupt` calls it, which also makes timeouts long; the end of a run and compilation do without.
        """
        self._forward = None
        self.mark(phase, step)

    def _watch_compiler(self) -> None:
        """Have torch.compile begin the phase COMPILATION when it compiles, and the phase before it afterwards.

        It does so once, when torch.compile has been imported.
        """
        if self._watches_compiler or "torch._dynamo" not in sys.modules:
            return
        from torch._dynamo.callback import callback_handler

        self._watches_compiler = True
        before = [self.phase]

        def begin(_: object) -> None:
            """Begin COMPILATION; torch.compile calls it when it begins to compile."""
            before[:] = [self.phase]
            self.interrupt(COMPILATION)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(lambda _: self.mark(before[0]))


class MarkedPhases(ParallelStrategy):
    """The part of the strategy that marks the phases of a run, and sets the timeouts that fit each phase.

    Lightning calls its methods on all ranks: `on_*_start` and `on_*_end` at the start and the end of a loop, `*_step`
    for each batch, and `pre_backward` and `post_backward` around each backward.  Each begins a phase before or after it
    does what Lightning's method does.
    """

    progress: Progress
    timeouts: Timeouts
    resumed: str | None = None  # the checkpoint from which a run resumes that a supervisor has restarted

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the methods in `_METHODS` of the subclass for a sharding mark their phases."""
        super().__init_subclass__(**options)
        if "lightning_class" in cls.__dict__:  # the class for a sharding, which overrides these methods
            for name, begins, ends in _METHODS:
                setattr(cls, name, _with_phases(getattr(cls, name), begins, ends))

    def _step(self) -> int:
        """Return the number of complete optimizer steps; 0 before a Trainer has the module."""
        trainer: Trainer | None = getattr(self.lightning_module, "_trainer", None)
        return 0 if trainer is None else trainer.global_step

    def _interrupt(self, phase: str) -> None:
        """Begin a phase between training steps, in which ranks may wait long for each other: timeouts are long.

        The hooks of this class call it, and `CheckpointSaves.settle_saves` for a save.
        """
        self.timeouts.interrupt()
        self.progress.interrupt(phase, self._step())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights; a Trainer calls it first when it saves a checkpoint, and so the phase SAVE begins here.

        That is so between steps of training and in a validation; elsewhere `save_checkpoint` begins the phase.
        """
        if self.progress.steps > 0 and self.progress.phase in (BETWEEN, OPTIMIZER, VALIDATION):
            self._interrupt(SAVE)  # it ends with the next phase
        return super().lightning_module_state_dict()

    def on_train_start(self) -> None:
        self.progress.mark(BETWEEN, self._step())
        super().on_train_start()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step in the phase FORWARD, with short timeouts unless the optimizer has not stepped since a pause."""
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
        """Step the optimizer; with Lightning's optimisation the step of the module runs inside of it.

        Lightning calls it for each step of an optimizer.  Afterwards timeouts are long, in the phase BETWEEN.
        """
        result = super().optimizer_step(*args, **kwargs)
        self.timeouts.end_step()
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
        """Mark that what the process does from now on is no part of the run.

        `SplitSteps.teardown` calls it at the end of a run that no error or Ctrl-C has ended.
        """
        self.progress.steps = 0
        self.progress.interrupt(OUTSIDE)

    def _end_run(self, text: str, outcome: int) -> None:
        """Write for a supervisor how the run of this rank ended, or with RUNS that it has begun.

        `NamedFailures` calls it at set-up and for an error.  Without a supervisor it does nothing.

        Args:
            text: the error, or "".
            outcome: RUNS, ENDED, FAILED or DISCONNECTED of `lightning_longnet.supervision.record`.
        """
        if self.progress.record is not None:
            self.progress.record.end(outcome, text)


def _with_phases(method: Callable[..., Any], begins: str, ends: str) -> Callable[..., Any]:
    """Return a method of a strategy that calls `method` between two changes of the phase, with long timeouts.

    `MarkedPhases.__init_subclass__` puts it in place of the methods in `_METHODS`.  After a run, when a program saves
    or loads, the phase is OUTSIDE again at the end of the call, also after an error; only CONNECT begins the next run.

    Args:
        method: the method of the class for a sharding.
        begins: the phase that begins with the call.
        ends: the phase that follows it; after an error in a run the phase `begins` stays.
    """

    @wraps(method)
    def marked(self: MarkedPhases, *args: Any, **kwargs: Any) -> Any:
        """Call the method between the two phases, and return what it returns."""
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
