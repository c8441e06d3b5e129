"""DistributedDataParallel: a whole model on each rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_longnet.checkpointing.restricted import restricted
from lightning_longnet.strategies.base import RingSequenceParallelStrategy
from lightning_longnet.trust import is_trusted


class DDPSequenceParallelStrategy(RingSequenceParallelStrategy, DDPStrategy):
    """The strategy of the sharding "ddp"."""

    lightning_class = DDPStrategy

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Call `__init__` of `DDPStrategy` with the options of the user.

        `RingSequenceParallelStrategy.__init__` calls it.
        """
        timeout = timedelta(seconds=self.timeout)
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout, **engine)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint; Lightning calls it on each rank of a run that is given a `ckpt_path`.

        It is `CheckpointSaves.load_checkpoint`, inside which code that the file may hold does not run, unless
        `weights_only` is False or the user trusts all files.
        """
        trust = is_trusted(weights_only is False)
        with restricted(trust=trust):
            return super().load_checkpoint(checkpoint_path, not trust)

    def setup_environment(self) -> None:
        """Connect the ranks, and make their context; Lightning calls it in each process before `setup`."""
        super().setup_environment()
        self._make_context()
