"""Workers that are connected once, with a group for each of the worlds that tests are over."""

from datetime import timedelta

from workers import Workers, answer, free_port

WORLDS = (1, 2, 3, 4, 5, 8)


def _work(rank, ranks, port, timeout, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, as in the session itself
    options = {"backend": "gloo", "timeout": timedelta(seconds=timeout)}  # a new group has another one by default
    dist.init_process_group(init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, **options)
    groups = {world: dist.new_group(list(range(world)), **options) for world in WORLDS if world <= ranks}
    while (case := pipe.recv()) is not None:
        function, world, arguments = case
        answer(pipe, function, groups[world], *arguments)
    dist.destroy_process_group()


class Pool(Workers):
    """Functions are given the group of the first ranks, and their arguments."""

    def __init__(self, ranks, timeout=60):
        super().__init__(ranks, _work, ranks, free_port(), timeout)
