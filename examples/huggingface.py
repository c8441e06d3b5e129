"""Train a model of transformers on packed rows that processes share: `python examples/huggingface.py`.

It makes a Qwen3 of two layers with random weights, so that nothing is downloaded, trains it on the sources of Python's
standard library, writes it as a folder, and continues a text with plain transformers.  `--name` takes a model that
exists, by its name or folder; `HubData(tokenizer=NAME)` then gives the tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from lightning_longnet import ByteData, CausalLMModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes that share each row")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024, help="bytes of a row")
    parser.add_argument("--name", help="a model of transformers, in place of the small one")
    options = parser.parse_args()
    L.seed_everything(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    # line 1: any causal model of transformers, with attn_implementation="ring"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    if options.name is not None:
        model = AutoModelForCausalLM.from_pretrained(options.name, attn_implementation="ring")
    module = CausalLMModule(model, learning_rate=3e-3, warmup_steps=5)
    data = ByteData(tokens=options.tokens, batch_size=1, megabytes=1.0, packed=True)
    trainer = L.Trainer(
        strategy="ring_sequence_parallel",  # line 2
        accelerator="cpu",
        devices=options.devices,
        max_steps=options.steps,
        limit_val_batches=4,
        val_check_interval=options.steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.print(f"validation loss {trainer.callback_metrics['val/loss']:.3f} after {options.steps} steps", flush=True)

    folder = Path(trainer.strategy.broadcast(tempfile.mkdtemp())) / "model"
    module.save_pretrained(folder)  # all ranks call it, and the first one writes
    if trainer.is_global_zero:
        plain: Any = AutoModelForCausalLM.from_pretrained(folder)
        prompt = data.encode("def main(")[None]
        text = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        print(data.decode(text[0]), f"\n{folder}: done", flush=True)


if __name__ == "__main__":
    main()
