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
        timeout = timedelta(seconds=self.timeout)
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout, **engine)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint without running code that it may hold, unless the user trusts it."""
        trust = is_trusted(weights_only is False)
        with restricted(trust=trust):
            return super().load_checkpoint(checkpoint_path, not trust)

    def setup_environment(self) -> None:
        super().setup_environment()
        self._make_context()
