"""Workers whose Triton interprets its programs: it reads that from the environment when it is imported."""

import multiprocessing
import os
from unittest.mock import patch

from pool import Pool


class Interpreted(Pool):
    """A pool of processes that are not forked: torch imports Triton in the server of forked ones."""

    def context(self):
        return multiprocessing.get_context("spawn")

    def start(self):
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            super().start()
