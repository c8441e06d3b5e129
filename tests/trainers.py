"""Worker processes that a Trainer runs in: started once, and connected anew for each case or once for all."""

import multiprocessing
import os
import socket
import traceback

PATIENCE = 180  # seconds for one case


def _work(rank, stays, pipe):
    import torch
    import torch.distributed as dist

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
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except Exception as error:  # noqa: BLE001  handed to the test, which raises or expects it
            pipe.send((False, (type(error), str(error), traceback.format_exc())))
        os.environ.pop("PL_GLOBAL_SEED", None)
        if dist.is_initialized() and not stays:
            dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Trainers:
    """`run` calls a function of (rank, world, *arguments) in as many processes as the world has.

    With `stays_connected` a world is always of all processes, and lasts: DeepSpeed keeps groups in globals.
    """

    def __init__(self, ranks, stays_connected=False):
        self.stays_connected, self.port = stays_connected, free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "lightning_longnet", "lightning.pytorch"])
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, stays_connected, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def outcomes(self, world, function, *arguments):
        """(did it return, what it returned or (type, message, traceback)) of each rank."""
        assert not self.stays_connected or world == len(self.pipes)
        port = self.port if self.stays_connected else free_port()
        for pipe in self.pipes[:world]:
            pipe.send((function, world, port, arguments))
        found = []
        for rank, pipe in enumerate(self.pipes[:world]):
            assert pipe.poll(PATIENCE), f"rank {rank} of {world} gave no answer in {PATIENCE} s"
            found.append(pipe.recv())
        return found

    def run(self, world, function, *arguments):
        found = self.outcomes(world, function, *arguments)
        for rank, (is_result, value) in enumerate(found):
            assert is_result, f"rank {rank} of {world} failed:\n{value[2]}"
        return [value for _, value in found]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
