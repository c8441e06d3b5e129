"""A process that has imported torch and Lightning, and forks runs of several ranks: a run costs no imports."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "soak"))
import forks
from workers import Workers, answer


def _work(rank, pipe):
    forks.adopt()
    while (case := pipe.recv()) is not None:
        function, _, arguments = case
        answer(pipe, function, *arguments)


class ForkingProcess(Workers):
    """Runs functions that start supervisors and ranks by `tests/soak/forks.py`, as forks of the process."""

    def __init__(self):
        super().__init__(1, _work)

    def result(self, function, *arguments):
        """Return what the function returns in the process."""
        (value,) = self.run(1, function, *arguments)
        return value
