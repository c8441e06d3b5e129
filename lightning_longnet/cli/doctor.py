"""`longnet doctor`: what this machine has, and whether ranks compute what one process does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from lightning_longnet.diagnosis.ranks import Answers

DESCRIPTION = """Print the versions, devices, kernels and backends of this machine, and what to install beside them.

  longnet doctor
  longnet doctor --ranks 2                          two processes on this machine
  torchrun --nproc-per-node 8 -m lightning_longnet doctor --ranks 8
  srun longnet doctor --ranks 16                    the processes of a job step of SLURM

With --ranks, attention over that many ranks is compared with one process, forward and backward, for each exchange
(swap: up to 64 ranks), over NCCL where each rank has a GPU, else over gloo on CPUs.  The exit status is 1 if anything
is wrong, or if a rank gives no answer in time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--ranks", type=int, help="number of ranks that check the exchanges")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a rank must have answered (120)")
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), help="by default nccl where each rank has a GPU, else gloo"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print this machine's devices and kernels and the answers of the ranks, and return the exit status."""
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {arguments.ranks}")
    if not 0 < arguments.timeout < float("inf"):
        raise ValueError(f"--timeout must be more than 0, got {arguments.timeout:g}")
    from lightning_longnet.cli.progress import steps
    from lightning_longnet.diagnosis.machine import examine
    from lightning_longnet.diagnosis.ranks import PROGRAM, ask, backend_of, launched_world, local_world

    world = launched_world()
    if world is not None and arguments.ranks not in (None, world.ranks):
        raise ValueError(
            f"--ranks must be the number that {world.launcher} has started, {world.ranks}, got {arguments.ranks}"
        )
    if world is None or world.reports:
        print("\n\n".join(map(str, examine())), flush=True)  # noqa: T201
    if arguments.ranks is None:
        return 0
    world = world or local_world(arguments.ranks)
    backend = arguments.backend or backend_of(world)
    if backend == "nccl" and backend_of(world) != "nccl":
        raise ValueError(f"--backend nccl needs a torch with NCCL and a GPU for each of {world.local_ranks} ranks here")
    with steps("checking", "exchange of a rank") as report:
        answers = ask(world, backend, arguments.timeout, PROGRAM, report)
    title = f"{world.ranks} rank{'s' * (world.ranks > 1)} over {backend}, forward and backward, beside one process"
    lines = _lines(title, answers) if world.reports else answers.failures
    if lines:
        print("\n".join(lines), flush=True)  # noqa: T201
    return 0 if answers.is_exact else 1


def _lines(title: str, answers: Answers) -> list[str]:
    """Return a line for each exchange, one for each rank that failed, and the verdict."""
    lines = ["", title]
    for ranks in answers.findings:
        name, patterns = ranks[0].exchange, ranks[0].patterns
        error = max((each.error for each in ranks), key=lambda value: (value != value, value))
        seconds = max(each.seconds for each in ranks)
        verdict = "exact" if all(each.is_exact for each in ranks) else f"WRONG, more than {ranks[0].allowed:g}"
        lines.append(f"  {name:<8} {patterns} patterns, largest error {error:.1e}, {seconds:.2f} s   {verdict}")
    lines += [f"  {failure}" for failure in answers.failures]
    wrong = "something is wrong: see above"
    return [*lines, "all exchanges are exact to rounding" if answers.is_exact else wrong]
