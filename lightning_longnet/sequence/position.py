"""The position of a rank in the mesh: its sizes, ranks and groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from lightning_longnet.sequence.mesh import DATA, SEQUENCE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class MeshPosition:
    """The position of this rank in a device mesh as `sequence_mesh` makes one; by default that of one process.

    Attributes:
        sequence_parallel_size: how many ranks share a sequence.
        sequence_parallel_rank: the number of this rank among them.
        data_parallel_size: how many groups of such ranks there are, which work on different sequences.
        data_parallel_rank: the number of this rank's group among them.
        sequence_group: the ranks that share this rank's sequences; None without a mesh.
        data_parallel_group: the ranks that hold the same part of other sequences; None without a mesh.
    """

    sequence_parallel_size: int = 1
    sequence_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    sequence_group: dist.ProcessGroup | None = None
    data_parallel_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> MeshPosition:
        """Return the position of this rank in a mesh, or that of one process if it is None.

        `SequenceContext` calls it once, as reading sizes and groups of a mesh takes time.
        """
        if mesh is None:
            return cls()
        return cls(
            mesh[SEQUENCE].size(),
            mesh[SEQUENCE].get_local_rank(),
            mesh[DATA].size(),
            mesh[DATA].get_local_rank(),
            mesh.get_group(SEQUENCE),
            mesh.get_group(DATA),
        )


class Positioned:
    """A base class of `SequenceContext`, which gives the attributes of its `position` to the object itself.

    Data modules, callbacks, models, the split check and the strategy read them.
    """

    position: MeshPosition

    @property
    def sequence_parallel_size(self) -> int:
        """The number of ranks that share a sequence."""
        return self.position.sequence_parallel_size

    @property
    def sequence_parallel_rank(self) -> int:
        """The number of this rank among those that share its sequences."""
        return self.position.sequence_parallel_rank

    @property
    def data_parallel_size(self) -> int:
        """The number of groups of ranks, each of which works on other sequences."""
        return self.position.data_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """The number of this rank's group among the `data_parallel_size` groups."""
        return self.position.data_parallel_rank

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's sequences; None without a mesh."""
        return self.position.sequence_group

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of other sequences; None without a mesh."""
        return self.position.data_parallel_group


def world_group() -> dist.ProcessGroup | None:
    """Return the default process group, which has all ranks, or None if torch.distributed is not initialized.

    `Reductions` sums over it with `token_mean` and `gather_samples`, and the split check takes its device.
    """
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
