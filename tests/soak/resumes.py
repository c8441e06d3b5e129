"""Runs that go on from a checkpoint: on the mesh that saved it, on each other one, and with each other engine.

All are compared with a run that was never stopped, losses and parameters.
"""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_training import FLOAT32, FLOAT64, compare
from trained import adamw, fit, reference, samples

# (ranks, those of a sequence)
MESHES = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (2, 2), "4x1": (4, 1), "2x2": (4, 2), "1x4": (4, 4)}
STAGES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
ONE_FILE = "fsdp2 in one file"
TWO_EPOCHS = {"samples": samples(24), "micro_batches": 6, "epochs": 2}
STEPS = (1, 2, 3)  # the last is the end of an epoch
EXACT = [
    *((engine, mesh, step) for engine in ("ddp", "fsdp2") for mesh in ("1x1", "2x1", "1x2") for step in STEPS),
    *((engine, "1x2", step) for engine in STAGES[1:] for step in STEPS),
]
ELASTIC = [(saved, resumed) for saved in MESHES for resumed in MESHES if saved != resumed]
ENGINES = ("ddp", "fsdp2", "hsdp", *STAGES)
PAIRS = [(saved, resumed) for saved in (*ENGINES[:2], ONE_FILE, *ENGINES[2:]) for resumed in ENGINES]
READS = {"ddp": ("ddp", ONE_FILE), "fsdp2": ("ddp", ONE_FILE, "fsdp2", "hsdp"), STAGES[2]: STAGES[2:]}
READS |= {"hsdp": READS["fsdp2"], **dict.fromkeys(STAGES[:2], STAGES[:2])}


def setting_of(engine):
    """DeepSpeed's optimizer works in float32."""
    return {**(FLOAT32 if engine in STAGES else FLOAT64), **TWO_EPOCHS, "optimizer": adamw}


def saved_run(rank, world, setting, engine, size, folder):
    """Losses and parameters of a run that saves each step."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"engine": {"save_distributed_checkpoint": False}} if engine == ONE_FILE else {}
    return fit(rank, world, setting, engine.partition(" ")[0], size, None, [saving], split_check="off", **options)


def resumed_run(rank, world, setting, engine, size, path):
    return fit(rank, world, setting, engine, size, path, split_check="off")


def plain_run(rank, world, setting):
    return reference(setting)


class Resumes:
    """Saves a run once for all cells that need it.

    Args:
        folder: where checkpoints are saved.
        workers: of an engine and a number of ranks, processes that run Trainers.
    """

    def __init__(self, folder, workers):
        self.folder, self.workers, self.saved = folder, workers, {}

    def run_of(self, engine, mesh, setting):
        key = (engine, mesh, setting["dtype"])
        if key not in self.saved:
            (folder := self.folder / str(len(self.saved))).mkdir(parents=True)
            ranks, size = MESHES[mesh]
            result = self.workers(engine, ranks).run(ranks, saved_run, setting, engine, size, str(folder))
            self.saved[key] = folder, result
        return self.saved[key]

    def exact(self, engine, mesh, step):
        """Bit by bit what the run on this mesh has that saved the checkpoint."""
        setting, (ranks, size) = setting_of(engine), MESHES[mesh]
        folder, whole = self.run_of(engine, mesh, setting)
        path = str(folder / f"step={step}.ckpt")
        result = self.workers(engine, ranks).run(ranks, resumed_run, setting, engine, size, path)
        for (losses, parameters), (right, expected) in zip(result, whole, strict=True):
            assert losses == right[step * setting["accumulate"] :]
            assert parameters.keys() == expected.keys()
            assert all(torch.equal(parameters[name], expected[name]) for name in expected)

    def elastic(self, saved, resumed, engine="fsdp2"):
        """What a plain loop in one process has, up to rounding."""
        setting, (ranks, size) = setting_of(engine), MESHES[resumed]
        folder, _ = self.run_of(engine, saved, setting)
        self._compare(setting, engine, ranks, size, folder, 1e-9)

    def pair(self, saved, resumed):
        """The same, or an error that says what would work, on all ranks."""
        setting = setting_of(STAGES[0])
        folder, _ = self.run_of(saved, "1x2", setting)
        if saved in READS[resumed]:
            self._compare(setting, resumed, 2, 2, folder, 1e-5)
            return {"goes_on": True}
        path, errors = str(folder / "step=2.ckpt"), set()
        for is_result, value in self.workers(resumed, 2).outcomes(2, resumed_run, setting, resumed, 2, path):
            assert not is_result
            assert value[0] is ValueError, value[2]
            assert "cannot go on from: take '" in value[1], value[2]
            errors.add(value[1].partition("\n")[0])
        return {"goes_on": False, "error": sorted(errors)[0]}

    def _compare(self, setting, engine, ranks, size, folder, tolerance):
        step = 2
        losses, parameters = self._right(setting)
        path = str(folder / f"step={step}.ckpt")
        for result in self.workers(engine, ranks).run(ranks, resumed_run, setting, engine, size, path):
            compare(result, (losses[step * setting["accumulate"] :], parameters), tolerance)

    def _right(self, setting):
        if setting["dtype"] not in self.saved:  # not in this process, whose forks are to run backwards
            (self.saved[setting["dtype"]],) = self.workers("ddp", 1).run(1, plain_run, setting)
        return self.saved[setting["dtype"]]
