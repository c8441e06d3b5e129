"""What a run of several ranks leaves of itself, and the page that is made of it."""

import csv
import json

import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from trained import LENGTH, PATTERN, Module, collated, quiet, samples, sgd, started, trainer_of

from lightning_longnet.callbacks import CommunicationMonitor, MemoryMonitor, RunReport, TokenThroughput
from lightning_longnet.strategies import RingSequenceParallelStrategy


def report(rank, world, size, folder, fails=False):
    with quiet():
        module = Module(started({"dropout": 0.0, "dtype": torch.float32}), sgd)
        if fails:
            module.on_train_batch_end = fail
        trainer = trainer_of(
            RingSequenceParallelStrategy(size, "fsdp2"),
            world,
            logger=CSVLogger(folder, "", 0),
            log_every_n_steps=1,
            limit_train_batches=3,
            callbacks=[TokenThroughput(1e9), MemoryMonitor(), CommunicationMonitor(), RunReport()],
        )
        trainer.fit(module, DataLoader(samples(16), batch_size=2, collate_fn=collated))
    return sum(x.numel() for x in started({"dropout": 0.0, "dtype": torch.float32}).parameters())


def fail(*_):
    raise KeyError("on all ranks")


def test_a_run_leaves_its_record_and_a_page(trainers, tmp_path):
    parameters = trainers.run(4, report, 2, str(tmp_path))[0]
    folder = tmp_path / "version_0"
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "run.json", "report.html"}
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert (record["ranks"], record["data_parallel"], record["sequence_parallel"]) == (4, 2, 2)
    assert record["parameters"] == parameters
    assert (record["steps"], record["tokens"], record["samples"]) == (3, LENGTH, 2)
    assert len(record["by_rank"]["peak"]) == 4
    (kind,) = record["attention"]
    assert (kind["layers"], kind["heads"], kind["kv_heads"]) == (2, 4, 2)
    assert kind["pattern"] == PATTERN.to_dict()
    assert kind["plan"]["stretches"] == [[[0, 18]], [[18, 37]]]
    # the plan of two layers, forward and backward, in two groups, is what was sent
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    sent = float(rows[-1]["exchange/sent_bytes"])
    assert sent == 2 * 2 * sum(kind["plan"]["sent"]) > 0
    assert record["final"]["exchange/sent_bytes"] == sent
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert "Placement over ranks" in (folder / "report.html").read_text()


def test_a_run_that_fails_leaves_what_was_known(trainers, tmp_path):
    for is_result, (kind, *_) in trainers.outcomes(2, report, 2, str(tmp_path), True):
        assert not is_result
        assert kind is KeyError
    record = json.loads((tmp_path / "version_0" / "run.json").read_text())
    assert record["status"] == "ended by KeyError"
