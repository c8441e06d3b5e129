"""Run by torchrun on two processes: the loop of accelerate and the Trainer of transformers, and their mistakes.

It writes what each rank had as a result, or its error, into a folder.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[2] / "examples")]
STEPS, TOKENS, ROWS = 3, 53, 8


def decoder(implementation):
    from architectures import model

    return model("Qwen3", implementation, vocab_size=64)


def trainer_rows(seed=3):
    """Return rows that predict different numbers of tokens, so that a mean of means is another loss."""
    ids = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(TOKENS) < 6 * torch.arange(ROWS)[:, None], -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def options(folder):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=ROWS,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )


def gradients(net):
    return {name: x.grad.clone() for name, x in net.named_parameters()}


def loop(folder, sequence_parallel_size=2, count=2 * STEPS):
    import accelerate_loop

    net = decoder("ring")
    losses = accelerate_loop.train(net, accelerate_loop.rows(count, TOKENS), sequence_parallel_size)
    return losses, gradients(net)


def ring_trainer(folder, **collator):
    from transformers_trainer import RingTrainer

    rows = {"train_dataset": trainer_rows(), "eval_dataset": trainer_rows(4)}
    trainer = RingTrainer(decoder("ring"), options(folder), **rows, **collator)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()


def ring_trainer_of_packed_rows(folder):
    """Return the same of rows that a collator joins to one, with the lengths that flash attention takes."""
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    return ring_trainer(folder, data_collator=collator)


def ring_trainer_with_rows_of_accelerate(folder):
    from transformers import Trainer
    from transformers_trainer import RingTrainer

    class OtherRows(RingTrainer):
        get_train_dataloader = Trainer.get_train_dataloader

    OtherRows(decoder("ring"), options(folder), train_dataset=trainer_rows()).train()


def plain_trainer(folder):
    """Return the losses with a context that is attached, and without one."""
    from transformers import Trainer

    from lightning_longnet import SequenceContext, attach_context, sequence_mesh

    losses = []
    for context in (SequenceContext(sequence_mesh()), None):
        net = decoder("ring" if context is not None else "sdpa")
        attach_context(net, context)
        trainer = Trainer(net, options(folder), train_dataset=trainer_rows())
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    return losses


def refused(change, **keywords):
    """Return a case that makes a RingTrainer of changed arguments."""

    def case(folder):
        from transformers_trainer import RingTrainer

        arguments = options(folder)
        vars(arguments).update(change)
        RingTrainer(decoder("ring"), arguments, train_dataset=trainer_rows(), **keywords)

    return case


CASES = {
    "loop": loop,
    "first step": lambda folder: loop(folder, count=2),
    "loop, other rows on each rank": lambda folder: loop(folder, sequence_parallel_size=1, count=4 * STEPS),
    "trainer": ring_trainer,
    "trainer, packed rows": ring_trainer_of_packed_rows,
    "rows of accelerate": ring_trainer_with_rows_of_accelerate,
    "no subclass": plain_trainer,
    "counts of each rank": refused({"average_tokens_across_devices": False}),
    "metrics": refused({}, compute_metrics=len),
    "smoothing": refused({"label_smoothing_factor": 0.1}),
}


def main():
    folder, outcomes = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    for name, case in CASES.items():
        try:
            outcomes[name] = case(folder / "run")
        except ValueError as error:
            outcomes[name] = str(error)
    torch.save(outcomes, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
