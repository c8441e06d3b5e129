"""The cells of a soak by kind, and how each is run."""

import random
from contextlib import ExitStack, closing

import counted
import faults_of_ranks
import kills_of_ranks
import resumes
from trainers import Trainers

ENGINES = ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
FAULTS = {"faults, ddp": "ddp", "faults, fsdp2": "fsdp2"}
KINDS = (*FAULTS, *(f"kills, {engine}" for engine in ENGINES), "exact", "elastic", "engines")
TESTS = {
    "corruptions": counted.CORRUPTIONS,
    "bad data": counted.BAD_DATA,
    "hostile files": counted.HOSTILE,
    "operations": counted.OPERATIONS,
}


def cells():
    """(kind, cell) of all cells but those that are tests."""
    yield from (("faults, ddp", cell) for cell in faults_of_ranks.CELLS)
    yield from ((f"kills, {cell[0]}", cell) for cell in kills_of_ranks.CELLS)
    yield from (("exact", cell) for cell in resumes.EXACT)
    yield from (("elastic", cell) for cell in resumes.ELASTIC)
    yield from (("engines", cell) for cell in resumes.PAIRS)
    yield from (("faults, fsdp2", cell) for cell in faults_of_ranks.CELLS)


class Soak:
    """Runs cells, and keeps what several of them need.

    Args:
        folder: an empty folder.
        seed: of the kills.
    """

    def __init__(self, folder, seed):
        self.folder, self.seed, self.number = folder, seed, 0
        self.stack, self.pools = ExitStack(), {}
        self.resumes = resumes.Resumes(folder / "resumes", self._workers)

    def run(self, kind, cell):
        """Run a cell, and return what it shows; an AssertionError says what does not hold."""
        if kind in FAULTS:
            return self._fault(FAULTS[kind], *cell)
        if kind.startswith("kills"):
            return self._kills(*cell)
        part = {"exact": self.resumes.exact, "elastic": self.resumes.elastic, "engines": self.resumes.pair}[kind]
        return part(*cell) or {}

    def close(self):
        self.stack.close()

    def _fault(self, engine, fault, rank, phase):
        checkpoints = self.folder / f"{engine}-saved"
        if phase == "load" and not checkpoints.exists():
            faults_of_ranks.saved(checkpoints, engine)
        return faults_of_ranks.cell(self._new(), checkpoints, engine, fault, rank, phase)

    def _kills(self, engine, background, number):
        whole = self.folder / f"{engine}-{background}"
        if not whole.exists():
            kills_of_ranks.undisturbed(whole, engine, background)
        draws = random.Random(f"{self.seed} {engine} {background} {number}")
        return kills_of_ranks.cell(self._new(), whole, draws, engine, background)

    def _new(self):
        self.number += 1
        (folder := self.folder / str(self.number)).mkdir()
        return folder

    def _workers(self, engine, ranks):
        """Processes that run Trainers: DeepSpeed's stay connected."""
        key = ranks if engine in resumes.STAGES else 0
        if key not in self.pools:
            pool = Trainers(ranks, stays_connected=True) if key else Trainers(4)
            self.pools[key] = self.stack.enter_context(closing(pool))
        return self.pools[key]
