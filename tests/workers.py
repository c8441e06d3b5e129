"""Worker processes of tests over ranks: started once, and handed many cases."""

import multiprocessing
import socket
import traceback

PATIENCE = 180  # seconds for one case
PRELOADED = ["torch", "torch.distributed", "lightning_longnet.attention", "lightning.pytorch", "lightning.pytorch.cli"]


def forked():
    """What makes processes that have loaded what takes long to load."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(pipe, function, *arguments):
    """What a worker does with a case."""
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:  # noqa: BLE001  handed to the test, which raises or expects it
        pipe.send((False, (type(error), str(error), traceback.format_exc())))


class Workers:
    """`run` has the first of them do a case together, and gives back what each returned."""

    def __init__(self, ranks, work, *arguments):
        """`work(rank, *arguments, pipe)` runs in each of them, and receives cases until there is None."""
        context = forked()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(rank, *arguments, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def case(self, world, function, arguments):
        """What each is sent."""
        return function, world, arguments

    def outcomes(self, world, function, *arguments):
        """(did it return, what it returned or (type, message, traceback)) of each rank."""
        case = self.case(world, function, arguments)
        for pipe in self.pipes[:world]:
            pipe.send(case)
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

    def close(self, kill=False):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
