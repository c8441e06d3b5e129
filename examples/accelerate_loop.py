"""Split the rows of a transformers model over processes in a loop of accelerate, with a context made by hand.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_longnet import SequenceContext, attach_context, sequence_mesh

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def rows(count: int, tokens: int) -> list[dict[str, Tensor]]:
    """Return rows of two documents each: positions restart, and the last token of a document predicts nothing."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(count):
        text = torch.randint(64, (tokens,), generator=generator).sort().values
        first = tokens // 3
        labels = text.roll(-1)  # shifted before the row is split
        labels[[first - 1, -1]] = -100
        positions = torch.cat([torch.arange(first), torch.arange(tokens - first)])
        found.append({"input_ids": text, "labels": labels, "position_ids": positions})
    return found


def train(model: Any, data: Any, sequence_parallel_size: int | None = None) -> list[float]:
    """Train on rows, two at a time, and return the losses; a model that `attn_implementation="ring"` loaded."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device.type
    mesh = sequence_mesh(sequence_parallel_size, device) if accelerator.num_processes > 1 else None
    context = SequenceContext(mesh, placement="zigzag")
    attach_context(model, context)  # every attention layer finds it
    # accelerate gives every process other rows, so it does not prepare this loader: ranks that share rows get the same
    groups, group = context.data_parallel_size, context.data_parallel_rank
    sampler: Any = DistributedSampler(data, groups, group, shuffle=False)
    loader: Any = DataLoader(data, batch_size=2, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    losses = []
    for step, batch in enumerate(loader):
        whole = {name: x.to(accelerator.device) for name, x in batch.items()}
        if step == 0:
            context.check_same(whole)  # an error on all ranks where those that share rows hold different ones
        part = context.split(whole)
        context.begin_step(step)
        logits = model(input_ids=part["input_ids"], position_ids=part["position_ids"], use_cache=False).logits
        loss_sum = F.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum")
        loss = context.token_mean(loss_sum, (part["labels"] != -100).sum())  # over the tokens of all ranks
        optimizer.zero_grad()
        accelerator.backward(loss)  # DDP averages the gradients, which makes them those of this mean
        optimizer.step()
        losses.append(loss.item())
        accelerator.print(f"step {step}: loss {losses[-1]:.5f}, {part['input_ids'].shape[1]} tokens of a row here")
    return losses


def main() -> None:
    torch.manual_seed(0)  # so that all ranks begin with the same parameters
    train(AutoModelForCausalLM.from_config(CONFIG, attn_implementation="ring"), rows(16, 1001))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
