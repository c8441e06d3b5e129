"""The part of the strategy that compares batches over ranks before each step, in all loops of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ParallelStrategy

if TYPE_CHECKING:
    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.strategies.loaders import LoaderWatch
    from lightning_longnet.strategies.samplers import RepeatWarning

_EVALUATED_BATCHES = 2**32  # more batches than an evaluation has


class WatchedLoops(ParallelStrategy):
    """A strategy that begins no step before the batches of all ranks are compared.

    It also warns if a sampler repeats samples, begins the context's steps in evaluation, and ends the last batch of
    each loop.  Lightning calls `on_*_start` and `on_*_end` on all ranks at the start and the end of a loop, and
    `*_step` for each batch: `training_step` waits until the ranks have compared their `Note`s of the batch; the
    other steps first begin a step of the context, then wait too.
    """

    sequence_context: SequenceContext
    _loaders: LoaderWatch | None = None  # made when the ranks are connected
    _repeats: RepeatWarning
    _evaluated = 0  # batches of the evaluation that runs

    def process_dataloader(self, dataloader: object) -> object:
        """Warn if a loader repeats samples, and return it; Lightning calls it for each loader of a loop."""
        self._repeats.check(dataloader)
        return super().process_dataloader(dataloader)

    def _watch_loop(self) -> None:
        """Have the `LoaderWatch` watch the loop that starts now."""
        if self._loaders is not None:
            assert self.lightning_module is not None
            self._loaders.begin(self.lightning_module.trainer)

    def _await_others(self) -> None:
        """Wait until all ranks have sent the note of their batch; raise a ValueError on all if the notes differ."""
        if self._loaders is not None:
            self._loaders.receive()

    def on_train_start(self) -> None:
        self._watch_loop()
        super().on_train_start()

    def on_validation_start(self) -> None:
        self._watch_loop()
        super().on_validation_start()

    def on_test_start(self) -> None:
        self._watch_loop()
        super().on_test_start()

    def on_predict_start(self) -> None:
        self._watch_loop()
        super().on_predict_start()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._await_others()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_evaluation()
        return super().predict_step(*args, **kwargs)

    def _begin_evaluation(self) -> None:
        """Begin a step of the context for a batch of evaluation, and wait for the notes of all ranks about the batch.

        The number of the step seeds dropout that is active in evaluation.  It is negative, so that it differs
        from those of training steps.  It depends on the number of training batches so far and on that of the batch in
        this evaluation, so that a run that is resumed repeats it.
        """
        assert self.lightning_module is not None
        trained = self.lightning_module.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._evaluated += 1
        self.sequence_context.begin_step(-(trained * _EVALUATED_BATCHES + self._evaluated))
        self._await_others()

    def _end_batches(self) -> None:
        """End the last batch of a loop and its step in the context, so that layers take whole sequences again.

        The hooks at the end of loops call it, and `SplitSteps.teardown`, as a loop that fails has no end.
        """
        self._evaluated = 0
        self.sequence_context.begin(None)
        self.sequence_context.begin_step(None)

    def on_train_end(self) -> None:
        self._end_batches()
        super().on_train_end()

    def on_validation_end(self) -> None:
        self._end_batches()
        super().on_validation_end()

    def on_test_end(self) -> None:
        self._end_batches()
        super().on_test_end()

    def on_predict_end(self) -> None:
        self._end_batches()
        super().on_predict_end()
