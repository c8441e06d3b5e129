"""Split sequences over processes in a plain training loop, without Lightning.

torchrun --nproc-per-node 2 examples/plain_pytorch.py
"""

import os

import torch
import torch.distributed as dist

from lightning_longnet import LongNet, LongNetConfig, Pattern, SequenceContext, attach_context, sequence_mesh


def main() -> None:
    if "RANK" in os.environ:  # as torchrun sets it; one process needs no group
        dist.init_process_group("gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1

    torch.manual_seed(0)  # so that all ranks begin with the same parameters
    pattern = Pattern.dilated((64, 256, 1024), (1, 2, 4), is_causal=True)
    model = LongNet(LongNetConfig(pattern, vocab_size=64, dim=64, layers=2, heads=4))
    context = SequenceContext(sequence_mesh(ranks, "cpu") if ranks > 1 else None)
    attach_context(model, context)  # every attention layer finds it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(1)  # the same batches on all ranks that share sequences
    for step in range(8):
        text = torch.randint(64, (2, 1001), generator=generator).sort().values  # something to be learnt
        batch = context.split({"input_ids": text[:, :-1], "labels": text[:, 1:]})  # this rank's part
        context.begin_step(step)
        loss_sum, token_count = model(batch["input_ids"], batch["labels"])
        loss = context.token_mean(loss_sum, token_count)  # over the tokens of all ranks
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():  # as DistributedDataParallel does
            if ranks > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        if context.sequence_parallel_rank == 0:
            print(f"step {step}: loss {loss.item():.5f}, {batch['input_ids'].shape[1]} of 1,000 tokens here")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
