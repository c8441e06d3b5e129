"""`Preemption`: a callback with which all ranks save one checkpoint at a signal, and the run ends.

On SLURM the job can be queued again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_longnet.callbacks.atomic_save import atomic_save
from lightning_longnet.callbacks.host import host_group
from lightning_longnet.sequence.agreement import device_of, fault_of_rank_zero

if TYPE_CHECKING:
    from types import FrameType

    from lightning.pytorch import LightningModule, Trainer

# Notes of the signals that a rank may have received; the largest of all ranks is obeyed
NOTHING, REQUEUE, TERMINATE = 0, 1, 2
TERMINATED = 128 + signal.SIGTERM  # the exit status that shells give to a process that SIGTERM ended
PATIENCE = 60  # seconds for scontrol
_RANKS = 2**20  # more than a run has


class Requeued(SystemExit):
    """The end of a run whose job SLURM has queued again."""


class Preemption(Callback):
    """Saves one checkpoint of all ranks at SIGTERM, or at SLURM's signal to requeue, to any rank, and ends the run.

    A signal handler only records its signal.  Ranks compare these records after each step of the optimizer, after each
    validation and at the end of training.  A SIGTERM before training or in a validation therefore takes effect at the
    next of these points.  All ranks then save one checkpoint, and

    - after SIGTERM each exits with status 143;
    - after the signal that the `SLURMEnvironment` requeues with, SIGUSR1 by default, rank 0 has SLURM queue the job
      again, and all exit with status 0.  If both signals came, SIGTERM decides.

    Under a `SLURMEnvironment` with `auto_requeue` the checkpoint is the "hpc_ckpt" in the Trainer's `default_root_dir`
    that Lightning resumes from by itself.  Elsewhere it is `preemption-step=N.ckpt`, and the log says where.  It is
    saved by `atomic_save`: a kill while saving leaves no incomplete checkpoint.

    While a model is fitted, it replaces Lightning's own handlers, which run collectives and hang.
    `RingSequenceParallelStrategy` adds it if a Trainer has none, unless `preemption=False`.

    Args:
        every_n_steps: notes are compared at every n-th step of the optimizer; each time costs an all-reduce of one
            number on the host.
        dirpath: the folder of the checkpoint; by default that of the Trainer's ModelCheckpoint, else its
            `default_root_dir`.  All ranks must see it.  Not used under SLURM's auto_requeue.
    """

    def __init__(self, every_n_steps: int = 1, dirpath: str | None = None) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a number of steps, at least 1, got {every_n_steps!r}")
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self._received = NOTHING
        self._steps = 0
        self._replaced: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._is_ending = False

    # Signals

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, in place of Lightning's."""
        # last, so that what other callbacks do at the end of a step is in the checkpoint
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]  # type: ignore[attr-defined]
        self._received, self._steps, self._is_ending = NOTHING, 0, False
        self._group = host_group(trainer)
        if threading.current_thread() is not threading.main_thread():
            return  # no handler can be set in other threads
        # Lightning calls this just before training, and would replace our handlers
        setattr(trainer._signal_connector, "register_signal_handlers", lambda: None)  # noqa: B010
        self._replace(signal.SIGTERM, TERMINATE)
        environment = _requeueing(trainer)
        if environment is not None and environment.requeue_signal is not None:
            requeue = environment.requeue_signal
            if signal.getsignal(requeue) in (None, signal.SIG_DFL):  # as with Lightning, a user's handler stays
                self._replace(requeue, REQUEUE)

    def _replace(self, signum: int, note: int) -> None:
        """Install a handler of a signal that records `note`, REQUEUE or TERMINATE, and keep the former handler."""

        def take_note(_: int, __: FrameType | None) -> None:
            """Record the signal; TERMINATE stays if both signals come."""
            self._received = max(self._received, note)

        self._replaced[signum] = signal.signal(signum, take_note)

    def _restore(self, trainer: Trainer) -> None:
        """Install the former handlers again, at the end of fitting or after an error."""
        self._group = None
        if not self._replaced:
            return
        for signum, handler in self._replaced.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._replaced = {}
        del trainer._signal_connector.register_signal_handlers
        if self._received == TERMINATE:
            signal.raise_signal(signal.SIGTERM)  # it came after the last comparison, and must not be lost

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the former signal handlers."""
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the former signal handlers, unless this callback itself ends the run."""
        if not self._is_ending:  # a second signal must find a handler until the process ends
            self._restore(trainer)

    # The hooks in which all ranks are at the same place of the program

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Compare notes at every n-th step of the optimizer."""
        if trainer.fit_loop._should_accumulate():
            return  # gradients that are being accumulated are in no checkpoint
        self._steps += 1
        if self._steps % self.every_n_steps == 0:
            self._compare_notes(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare notes after a validation of `fit`, unless gradients are being accumulated."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_fitting and not trainer.fit_loop._should_accumulate():
            self._compare_notes(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare notes at the end of training."""
        self._compare_notes(trainer)

    def _compare_notes(self, trainer: Trainer) -> None:
        """If any rank has received a signal, save one checkpoint and raise `SIGTERMException` or `Requeued` on all.

        All ranks call it together, in the three hooks above.
        """
        note = torch.tensor(self._received * _RANKS + trainer.global_rank if self._received else NOTHING)
        if self._group is not None:
            note = note.to(device_of(self._group))
            dist.all_reduce(note, dist.ReduceOp.MAX, group=self._group)
        agreed, rank = divmod(int(note), _RANKS)
        if agreed == NOTHING:
            return
        self._is_ending = True
        _dismiss_observer()
        path = self._path(trainer)
        atomic_save(trainer, path)
        rank_zero_info(f"Preemption: saved step {trainer.global_step} as {path}")
        if agreed == TERMINATE:
            ending = SIGTERMException(TERMINATED)
            ending.add_note(f"rank {rank} received SIGTERM")
            raise ending
        _requeue(trainer, path)
        raise Requeued(0)

    def _path(self, trainer: Trainer) -> str:
        """Return the path of the checkpoint on all ranks, which call it together; rank 0 chooses a free name."""
        path = ""
        if trainer.is_global_zero:
            if _requeueing(trainer) is not None:
                path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            else:
                saver = trainer.checkpoint_callback
                folder = self.dirpath or getattr(saver, "dirpath", None) or trainer.default_root_dir
                name = f"preemption-step={trainer.global_step}"
                path, version = os.path.join(folder, f"{name}.ckpt"), 0
                while Path(path).exists():
                    version += 1
                    path = os.path.join(folder, f"{name}-v{version}.ckpt")
        common: str = trainer.strategy.broadcast(path)
        return common

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group and the handlers, which another process does not have."""
        return {**self.__dict__, "_group": None, "_replaced": {}}


def _requeueing(trainer: Trainer) -> SLURMEnvironment | None:
    """Return the `SLURMEnvironment` of a Trainer if it has one with `auto_requeue`, else None."""
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def _dismiss_observer() -> None:
    """Stop the observer of Lightning's launcher, which kills rank 0 when another rank ends with any status but 0."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def _requeue(trainer: Trainer, path: str) -> None:
    """Have rank 0 queue the SLURM job again; raise a RuntimeError on all ranks if SLURM refuses.

    Args:
        trainer: the Trainer.
        path: the checkpoint, for the message.
    """
    if problem := fault_of_rank_zero(trainer.strategy, _ask_slurm):
        raise RuntimeError(
            f"SLURM was asked to queue the job again, and {problem}; submit it anew: it goes on from {path}"
        )


def _ask_slurm() -> str:
    """Run `scontrol requeue` for this job; return the error message, or ""."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    assert re.fullmatch("[0-9_]+", job)
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        return "scontrol is not on this node's PATH"
    except subprocess.TimeoutExpired:
        return f"scontrol did not answer in {PATIENCE} seconds"
    return "" if result.returncode == 0 else f"scontrol said: {result.stderr.strip()}"
