"""Train a small byte-level LongNet whose sequences are split over ranks, with any launcher.

    python examples/train.py --devices 2                 # two processes of this machine
    torchrun --nproc-per-node=2 examples/train.py --devices 2
    sbatch examples/slurm/train.sbatch                   # two nodes

It trains on the sources of Python's standard library, on GPUs if there are any, prints the loss of each step, and
finally continues a text.  `longnet fit` does the same from a YAML file.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_longnet import ByteData, LongNetConfig, LongNetModule, Pattern
from lightning_longnet.registration import NAMES
from lightning_longnet.strategies import RingSequenceParallelStrategy


class PrintedLoss(L.Callback):
    """A callback that prints the loss of each step, which is the same on all ranks."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        pl_module.print(f"step {trainer.global_step - 1}: loss {outputs['loss'].item():.7f}", flush=True)
        time.sleep(self.pause)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs", help="for checkpoints; all nodes must see it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder, if any")
    parser.add_argument("--sharding", choices=sorted(set(NAMES.values())), default="fsdp2")
    parser.add_argument("--sequence-parallel-size", type=int, help="ranks that share a sequence; all by default")
    parser.add_argument("--tokens", type=int, default=4096, help="bytes of a sequence, at least 8")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of each group of ranks in a step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds in each step, to try signals out")
    # the Trainer must get the numbers of nodes and devices that SLURM allocated
    parser.add_argument("--nodes", type=int, default=int(os.environ.get("SLURM_NNODES", 1)))
    parser.add_argument("--devices", type=int, default=int(os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
    parser.add_argument("--accelerator", default="auto")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    L.seed_everything(0)
    pattern = Pattern.dilated((options.tokens // 8, options.tokens // 2, options.tokens), (1, 2, 4), is_causal=True)
    heads = options.dim // 16
    config = LongNetConfig(
        pattern, dim=options.dim, layers=options.layers, heads=heads, attention_dropout=options.dropout
    )
    module = LongNetModule(config, learning_rate=1e-3, warmup_steps=10)
    data = ByteData(tokens=options.tokens, batch_size=options.batch_size, megabytes=1.0)
    trainer = L.Trainer(
        strategy=RingSequenceParallelStrategy(options.sequence_parallel_size, options.sharding),
        accelerator=options.accelerator,
        num_nodes=options.nodes,
        devices=options.devices,
        max_steps=options.steps,
        default_root_dir=options.folder,
        limit_val_batches=0,
        callbacks=[
            PrintedLoss(options.pause),
            ModelCheckpoint(
                options.folder,
                "{step}",
                every_n_train_steps=options.save_every,
                save_on_train_epoch_end=False,
            ),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path="last" if options.resume else None)

    # all ranks compute their part of the text, and the first one prints it
    text = module.generate(data.encode("def main(")[None].to(module.device), tokens=20)
    trainer.print(data.decode(text[0]), "\ndone", flush=True)


if __name__ == "__main__":
    main()
