"""Train with transformers' own Trainer on rows that processes share, with a context made by hand.

torchrun --nproc-per-node 2 examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from lightning_longnet import SequenceContext, attach_context, sequence_mesh

PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids")  # what a batch has for each token


class RingTrainer(Trainer):
    """A Trainer whose ranks share rows.

    Batches are those of any Trainer: `labels` are the tokens themselves, -100 where a token is not to be predicted,
    and packed rows have `position_ids` that restart.  Load the model with `attn_implementation="ring"`.
    """

    def __init__(self, *arguments: Any, sequence_parallel_size: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must be True, as the loss is a mean over all ranks")
        if self.compute_metrics is not None or self.label_smoother is not None:
            raise ValueError(
                "compute_metrics must be None and label_smoothing_factor 0, as each rank has the logits of its tokens"
            )
        mesh = sequence_mesh(sequence_parallel_size, self.args.device.type) if self.args.world_size > 1 else None
        self.context = SequenceContext(mesh, placement="zigzag")
        attach_context(self.model, self.context)  # type: ignore[arg-type]  # every attention layer finds it
        self.loss_is_scaled_for_ga = True  # by num_items_in_batch
        self.is_checked = False

    def get_train_dataloader(self) -> Any:
        loader = self._loader(self.train_dataset, self.args.train_batch_size, True)
        loader.set_epoch = loader.sampler.set_epoch  # which the Trainer calls
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size)

    def _loader(self, rows: Any, batch_size: int, is_training: bool = False) -> Any:
        """Return a loader that gives the same rows to ranks that share them, which accelerate's own does not."""
        groups, group = self.context.data_parallel_size, self.context.data_parallel_rank
        sampler: Any = DistributedSampler(
            rows, groups, group, shuffle=is_training, seed=self.args.seed, drop_last=is_training
        )
        return DataLoader(rows, batch_size, sampler=sampler, collate_fn=self.data_collator, drop_last=is_training)

    def part_of(self, inputs: Any) -> dict[str, Tensor]:
        """Return the tokens of this rank, with labels that are shifted before the rows are split."""
        rows = {name: x for name, x in inputs.items() if name in PER_TOKEN}  # collators that pack add lengths
        if not self.is_checked:
            self.context.check_same(rows)  # an error on all ranks where those that share rows hold different ones
            self.is_checked = True
        labels = F.pad(rows["labels"][:, 1:], (0, 1), value=-100)
        index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        part: dict[str, Tensor] = self.context.split({"position_ids": index, **rows, "labels": labels})
        self.context.begin_step(self.state.global_step)
        return part

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        part = self.part_of(inputs)
        targets = part.pop("labels")
        logits = model(**part, use_cache=False).logits
        loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        if num_items_in_batch is None:
            loss = self.context.token_mean(loss_sum, (targets != -100).sum())
        else:
            # the count adds up the rows of all ranks; DDP, and the Trainer's log, average over all ranks
            items = num_items_in_batch / self.context.sequence_parallel_size
            loss = loss_sum * self.args.world_size / items
        return (loss, {"loss": loss}) if return_outputs else loss


def rows(count: int, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(64, (count, tokens), generator=generator).sort(1).values
    return [{"input_ids": text, "labels": text} for text in texts]


def main() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    torch.manual_seed(0)  # so that all ranks begin with the same parameters
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    trainer = RingTrainer(model, arguments, train_dataset=rows(32, 501, 1), eval_dataset=rows(4, 501, 2))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"evaluation loss {loss:.5f} after {trainer.state.global_step} steps: done")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
