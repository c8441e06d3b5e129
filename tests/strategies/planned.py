"""A run of a LongNetModule, what it hands to the network counted there."""

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from trained import quiet, trainer_of
from watched import Sent

from lightning_longnet import LongNetConfig, LongNetModule, Pattern
from lightning_longnet.strategies import RingSequenceParallelStrategy

PATTERN = Pattern.dilated((16, 32, 96), (1, 2, 3), is_causal=True)
SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 4}


def config_of(options):
    return LongNetConfig(PATTERN, **SHAPE, **options)


def train(rank, world, shared, exchange, tokens, options, accumulate, batch):
    """Train, and return the bytes of attention in each step on this rank."""
    real, sent = dist.batch_isend_irecv, Sent()
    dist.batch_isend_irecv = sent
    torch.manual_seed(0)
    rows = [{"input_ids": torch.arange(tokens) % 256, "labels": torch.arange(1, tokens + 1) % 256} for _ in range(16)]
    try:
        with quiet():
            trainer = trainer_of(
                RingSequenceParallelStrategy(shared, "ddp", exchange),
                world,
                max_steps=2,
                accumulate_grad_batches=accumulate,
                callbacks=[sent],
            )
            loader = DataLoader(rows, batch_size=batch)
            trainer.fit(LongNetModule(config_of(options)), loader)
    finally:
        dist.batch_isend_irecv = real
    assert isinstance(trainer, L.Trainer)
    return [step["sent_bytes"] for step in sent.steps]
