"""The Trainer of transformers on exported models, beside a plain loop, and exported models that `device_map` places."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from tiers import tiered

from lightning_longnet import LongNet, LongNetConfig, Pattern, export_model

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:(Nothing crosses|In the branch)",
        "ignore:.*pin_memory.*:UserWarning",  # of a machine without a GPU
    ),
]

TOKENS, BATCH, STEPS, RATE, CLIP = 20, 2, 4, 1e-2, 1.0


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    pattern = Pattern.dilated((8, 64), (1, 2), is_causal=True)
    model = LongNet(LongNetConfig(pattern, vocab_size=23, dim=16, layers=2, heads=4, kv_heads=2)).eval()
    export_model(model, tmp_path / "out", "huggingface")
    return tmp_path / "out"


def rows():
    """Rows that predict different numbers of tokens, so that a mean of means is another loss."""
    ids = torch.randint(23, (16, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(TOKENS) < torch.arange(16)[:, None], -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def read(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def plain(folder, accumulated):
    """The losses of each step, and the weights after the last, of a loop that takes the accumulated rows at once."""
    model, result = read(folder).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    for step in range(STEPS):
        many = accumulated * BATCH
        chosen = rows()[step * many : (step + 1) * many]
        ids, labels = (torch.stack([row[name] for row in chosen]) for name in ("input_ids", "labels"))
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        result.append(loss.item())
    return result, model.state_dict()


@pytest.mark.parametrize(("recomputes", "accumulated"), tiered(product([False, True], [1, 2]), quick=[], covers=1))
def test_the_trainer_trains_as_a_plain_loop(folder, tmp_path, accumulated, recomputes):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulated,
        gradient_checkpointing=recomputes,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model, calls = read(folder), []
    model.model.blocks[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    expected, weights = plain(folder, accumulated)
    assert len(calls) == STEPS * accumulated * (2 if recomputes else 1)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_places_a_model(folder, places):
    ids = torch.stack([row["input_ids"] for row in rows()])
    result, expected = read(folder, device_map=places), read(folder)
    assert torch.equal(result(ids).logits, expected(ids).logits)
    assert {str(x.device) for x in result.parameters()} == {"cpu"}


@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_a_device_map_may_leave_a_block_on_disk(folder, tmp_path):
    ids = torch.stack([row["input_ids"] for row in rows()])
    places = {f"model.{name}": "cpu" for name in ("embedding", "blocks.0", "norm", "head")} | {"model.blocks.1": "disk"}
    result = read(folder, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    assert {x.device.type for x in result.model.blocks[1].parameters()} == {"meta"}
    assert torch.equal(result(ids).logits, read(folder)(ids).logits)
    generated = result.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, read(folder).generate(ids[:1], max_new_tokens=3, do_sample=False))
