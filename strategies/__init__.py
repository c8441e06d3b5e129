"""Lightning strategies for sequence parallelism, imported as `lightning_longnet.strategies`."""

# This folder is linked into the package.  Under its bare name every class would exist twice, and isinstance would lie.
if __name__ == "strategies":
    raise ImportError("import lightning_longnet.strategies instead: the bare name would load every class twice")

from lightning_longnet.strategies.base import RingSequenceParallelStrategy
from lightning_longnet.strategies.last import install as _install_last
from lightning_longnet.strategies.restart import install as _install_restart

_install_last()
_install_restart()
__all__ = ["RingSequenceParallelStrategy"]
