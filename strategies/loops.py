"""The part of the strategy that stands between loaders and steps, in all loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ParallelStrategy

if TYPE_CHECKING:
    from lightning_longnet.strategies.loaders import LoaderWatch
    from lightning_longnet.strategies.samplers import RepeatWarning


class WatchedLoops(ParallelStrategy):
    """Lets no step begin before the batches of all ranks are compared, and warns of samples that are repeated."""

    _loaders: LoaderWatch | None = None  # made when the ranks are connected
    _repeats: RepeatWarning

    def process_dataloader(self, dataloader: object) -> object:
        self._repeats.of(dataloader)
        return super().process_dataloader(dataloader)

    def _watch_loop(self) -> None:
        """Watch the loop that begins now."""
        if self._loaders is not None:
            assert self.lightning_module is not None
            self._loaders.begin(self.lightning_module.trainer)

    def _await_others(self) -> None:
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
        self._await_others()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._await_others()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._await_others()
        return super().predict_step(*args, **kwargs)
