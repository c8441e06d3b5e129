"""Workers that a Trainer runs in: connected anew for each case, or once for all."""

import os

from workers import Workers, answer, free_port


def forget_meshes():
    """Drop the meshes that DTensor's caches hold.

    They hold the groups of former cases, each with threads that wake up a hundred times a second: in a long session
    those of idle processes take a third of the machine.
    """
    from torch.distributed.tensor import debug

    if hasattr(debug, "_clear_sharding_prop_cache"):  # not in the oldest torch
        debug._clear_sharding_prop_cache()


def _work(rank, stays, checks_splits, pipe):
    import gc
    import multiprocessing

    import torch
    import torch.distributed as dist

    from lightning_longnet.strategies import RingSequenceParallelStrategy, failures

    if not checks_splits:
        RingSequenceParallelStrategy.__init__.__kwdefaults__["split_check"] = "off"

    # as in a user's process; with the method of this pool, each worker of a DataLoader would import torch anew
    multiprocessing.set_start_method("fork", force=True)
    is_frozen = False
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, as in the session itself
    while (case := pipe.recv()) is not None:
        function, world, port, arguments = case
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world),
        )
        if not stays:
            # A new group has a new store, in which ranks report failures by the number of their run.  Cases of fewer
            # ranks have made this number differ, and the first rank would wait three seconds for each failure.
            failures._RUNS[0] = 0
        answer(pipe, function, rank, world, *arguments)
        os.environ.pop("PL_GLOBAL_SEED", None)
        # a Trainer is part of a cycle: without this, the groups of a hundred cases, with their threads and sockets,
        # wait for a collection in the middle of another case
        del function, arguments, case
        forget_meshes()
        gc.collect()
        if not is_frozen:  # what the first case loaded stays, and need not be looked at again
            gc.freeze()
            is_frozen = True
        if dist.is_initialized() and not stays:
            dist.destroy_process_group()


class Trainers(Workers):
    """Functions are given their rank, the number of ranks, and their arguments.

    With `stays_connected` a world is always of all processes, and lasts: DeepSpeed keeps groups in globals.  Without
    `checks_splits` the split check of strategies is off unless a test asks for it: it takes as long as a short run.
    """

    def __init__(self, ranks, stays_connected=False, checks_splits=True):
        super().__init__(ranks, _work, stays_connected, checks_splits)
        self.stays_connected, self.port = stays_connected, free_port()

    def case(self, world, function, arguments):
        assert not self.stays_connected or world == len(self.pipes)
        return function, world, self.port if self.stays_connected else free_port(), arguments
