"""LongNetModule: what it learns and tells is the same on any mesh, and what a newcomer gets wrong is told."""

import lightning as L
import pytest
import torch
from tiers import tiered
from torch.utils.data import DataLoader
from trained import KeepParameters, quiet, trainer_of

from lightning_longnet import LongNet, LongNetConfig, LongNetModule, LongViT, LongViTConfig, Pattern, export_model
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.models.generation import generate
from lightning_longnet.strategies import RingSequenceParallelStrategy

PATTERN = Pattern.dilated((8, 64), (1, 2), is_causal=True)
CONFIG = LongNetConfig(PATTERN, vocab_size=29, dim=16, layers=2, heads=4)


def rows(many, seed, tokens=37):
    drawn = torch.randint(29, (many, tokens + 1), generator=torch.Generator().manual_seed(seed))
    # of other lengths each
    labels = [row[1:].where(torch.arange(tokens) < tokens - 7 * i % 20, -100) for i, row in enumerate(drawn)]
    return [{"input_ids": row[:-1], "labels": each} for row, each in zip(drawn, labels, strict=True)]


class Rows(L.LightningDataModule):
    def __init__(self, batch_size=4, vocab_size=29, bytes_per_token=2.5):
        super().__init__()
        self.batch_size, self.vocab_size, self.bytes_per_token = batch_size, vocab_size, bytes_per_token

    def train_dataloader(self):
        return DataLoader(rows(8, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(rows(8, 2), batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(rows(8, 3), batch_size=self.batch_size)

    def predict_dataloader(self):
        return DataLoader(rows(4, 4), batch_size=self.batch_size)


class KeepLosses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def module(**options):
    torch.manual_seed(2)
    settings = {"learning_rate": 0.05, "warmup_steps": 2, "eps": 1e-4, "generated_tokens": 5, "temperature": 0}
    return LongNetModule(CONFIG, **{**settings, **options})


def run(rank, world, sequence_parallel_size, sharding):
    with quiet():
        strategy = RingSequenceParallelStrategy(sequence_parallel_size, sharding)
        kept, losses = KeepParameters(), KeepLosses()
        trainer = trainer_of(strategy, world, callbacks=[kept, losses], max_epochs=3, gradient_clip_val=1.0)
        net, data = module(), Rows(4 * sequence_parallel_size // world)
        trainer.fit(net, datamodule=data)
        options = {name: x.item() for name, x in trainer.callback_metrics.items()}
        tested = trainer.test(net, data, verbose=False)[0]
        predicted = trainer.predict(net, data)
    return (
        losses.losses,
        options,
        tested,
        kept.parameters,
        torch.cat(predicted),
        strategy.sequence_context.data_parallel_rank,
    )


@pytest.fixture(scope="module")
def alone(trainers):
    return trainers.run(1, run, 1, "ddp")[0]


@pytest.mark.parametrize(
    ("world", "size", "sharding"),
    tiered(
        [(2, 2, "fsdp2"), (2, 2, "ddp"), (2, 1, "fsdp2"), (4, 2, "ddp")],
        quick=[(2, 2, "fsdp2")],
        long=[],
    ),
)
def test_curves_figures_and_texts_are_those_of_one_process(trainers, alone, world, size, sharding):
    losses, options, tested, parameters, predicted, _ = alone
    assert losses[0] > losses[-1] + 0.1, "it learns"
    result = trainers.run(world, run, size, sharding)
    for each in result:
        assert each[0] == pytest.approx(losses, rel=1e-5)
        assert each[1] == pytest.approx(options, rel=1e-5)
        assert each[2] == pytest.approx(tested, rel=1e-5)
        for name, parameter in each[3].items():
            torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-5)
    groups = {each[5]: each[4] for each in result}
    texts = torch.stack([groups[i % len(groups)][i // len(groups)] for i in range(4)])
    assert texts.tolist() == predicted.tolist()


def test_what_it_says_is_what_the_model_says(trainers, alone):
    _, options, tested, parameters, predicted, _ = alone
    assert {"train/loss", "train/bits_per_byte", "val/loss", "val/perplexity", "val/bits_per_byte"} <= set(options)
    net = LongNet(CONFIG)
    net.load_state_dict({**parameters, "head.weight": parameters["embedding.weight"]})
    batch = torch.utils.data.default_collate(rows(8, 3))
    loss_sum, count = net(batch["input_ids"], batch["labels"])
    nats = (loss_sum / count).item()
    assert tested["test/loss"] == pytest.approx(nats, rel=1e-5)
    assert tested["test/perplexity"] == pytest.approx(torch.tensor(nats).exp().item(), rel=1e-5)
    assert tested["test/bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item() / 2.5, rel=1e-5)
    prompts = torch.utils.data.default_collate(rows(4, 4))["input_ids"]
    assert predicted.tolist() == generate(net, prompts, 5, temperature=0).tolist()


def fitted(net, data=None, **options):
    with quiet():
        trainer = trainer_of("auto", 1, max_steps=2, max_epochs=-1, **options)
        trainer.fit(net, datamodule=data or Rows())
    return trainer


def test_a_checkpoint_makes_the_module_again(tmp_path):
    net = module(top_k=7)
    fitted(net).save_checkpoint(tmp_path / "some.ckpt")
    with quiet():
        again = LongNetModule.load_from_checkpoint(tmp_path / "some.ckpt")
    assert again.config == CONFIG
    assert again.sampling == {"temperature": 0, "top_k": 7}
    for name, x in net.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 31}, "the checkpoint's model has vocab_size 29, and config.vocab_size is 31"),
        ({"layers": 3}, "the checkpoint's model has layers 2, and config.layers is 3"),
        ({"rotary": "xpos"}, "the checkpoint's model has rotary rope, and config.rotary is xpos"),
        ({"activation": "relu"}, "the checkpoint's model has activation gelu, and config.activation is relu"),
        ({"tied_embeddings": False}, "has tied_embeddings True, and config.tied_embeddings is False"),
    ],
)
def test_a_checkpoint_of_another_model_is_distinguished(tmp_path, change, message):
    fitted(module()).save_checkpoint(tmp_path / "some.ckpt")
    other = LongNetModule(LongNetConfig(**{**CONFIG.to_dict(), **change}))
    with quiet(), pytest.raises(ValueError, match=message):
        trainer_of("auto", 1, max_steps=3).fit(other, datamodule=Rows(), ckpt_path=tmp_path / "some.ckpt")


def test_what_is_not_of_the_weights_may_change(tmp_path):
    fitted(module()).save_checkpoint(tmp_path / "some.ckpt")
    change = {"pattern": Pattern.window(8, is_causal=True), "kv_heads": 4, "dropout": 0.1, "recompute": "everything"}
    other = LongNetModule(LongNetConfig(**{**CONFIG.to_dict(), **change}))
    with quiet():
        trainer_of("auto", 1, max_steps=3).fit(other, datamodule=Rows(), ckpt_path=tmp_path / "some.ckpt")


def test_a_checkpoint_of_images_is_distinguished(tmp_path):
    images = LongViTConfig(Pattern.dense(), dim=8, layers=1, heads=2, classes=2, image_size=8, patch_size=4)
    write_checkpoint(LongViT(images), tmp_path / "images.ckpt")
    with quiet(), pytest.raises(ValueError, match="the checkpoint must be of a LongNet, got another model's"):
        trainer_of("auto", 1).validate(module(), datamodule=Rows(), ckpt_path=tmp_path / "images.ckpt")


def test_training_begins_with_the_weights_of_another_run(tmp_path):
    trained = module()
    fitted(trained).save_checkpoint(tmp_path / "some.ckpt")
    export_model(trained.model, tmp_path / "exported")
    for path in ("some.ckpt", "exported"):
        begun = LongNetModule(CONFIG, learning_rate=0.5, weights=tmp_path / path)
        for name, x in trained.model.state_dict().items():
            assert torch.equal(x, begun.model.state_dict()[name]), name
        assert begun.model.head.weight is begun.model.embedding.weight
    fitted(begun).save_checkpoint(tmp_path / "after.ckpt")
    (tmp_path / "some.ckpt").unlink()
    with quiet():
        LongNetModule.load_from_checkpoint(tmp_path / "after.ckpt")  # asks for nothing but itself
    other = LongNetConfig(**{**CONFIG.to_dict(), "dim": 32})
    with pytest.raises(ValueError, match=r"the checkpoint's model has dim 16, and config\.dim is 32"):
        LongNetModule(other, weights=tmp_path / "exported")


def test_data_of_more_tokens_than_the_model_knows_is_refused():
    with pytest.raises(ValueError, match=r"config\.vocab_size must be at least that of the data, 30, got 29"):
        fitted(module(), Rows(vocab_size=30))


@pytest.mark.parametrize(
    ("row", "got"), [({"input_ids": torch.zeros(4).long()}, "input_ids"), ([torch.ones(4)], "a lis")]
)
def test_batches_of_something_else_are_refused(row, got):
    with quiet(), pytest.raises(ValueError, match=f"batch must be a dictionary that holds .*, got {got}"):
        trainer_of("auto", 1, max_steps=1).fit(module(), DataLoader([row]))


def test_training_without_an_end_is_refused():
    with quiet(), pytest.raises(ValueError, match="max_steps or max_epochs of the Trainer must be set"):
        trainer_of("auto", 1, max_epochs=-1).fit(module(), datamodule=Rows())


def test_another_optimizer_has_the_same_groups():
    net = module(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), weight_decay=0.25)
    (optimizer,) = fitted(net).optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.25]


class Own(torch.nn.Module):
    """Attention of one's own: a mean of what came before."""

    def __init__(self, dim, heads, pattern, gain=1.0):
        super().__init__()
        self.linear, self.gain = torch.nn.Linear(dim, dim), gain

    def forward(self, x, positions=None, documents=None, key_padding_mask=None):
        before = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.gain * self.linear(x.cumsum(1) / before)


def test_attention_of_ones_own_is_named_by_its_class_path(tmp_path):
    spec = {"class_path": f"{__name__}.Own", "init_args": {"gain": 0.5}}
    net = LongNetModule(LongNetConfig(**{**CONFIG.to_dict(), "attention": spec}))
    assert [(type(block.attention), block.attention.gain) for block in net.model.blocks] == [(Own, 0.5)] * 2
    fitted(net).save_checkpoint(tmp_path / "some.ckpt")
    with quiet():
        assert isinstance(LongNetModule.load_from_checkpoint(tmp_path / "some.ckpt").model.blocks[0].attention, Own)


def fit_what_it_sees(rank, world, placement, shift):
    """Train on labels that a model sees, of which the last rank alone has some: the next tokens, or the tokens."""
    ids = torch.randint(1, 29, (8, 65), generator=torch.Generator().manual_seed(1))
    labels = ids[:, shift : shift + 64].where(torch.arange(64) >= 40, -100)
    data = [{"input_ids": row, "labels": each} for row, each in zip(ids[:, :-1], labels, strict=True)]
    pattern = Pattern.dilated((8, 64), (1, 2), is_causal=shift == 0)
    config = LongNetConfig(pattern, vocab_size=29, dim=16, layers=1, heads=4)
    with quiet():
        strategy = RingSequenceParallelStrategy(world, "ddp", placement=placement)
        trainer_of(strategy, world, max_steps=1).fit(LongNetModule(config), DataLoader(data, batch_size=4))


@pytest.mark.parametrize(
    ("placement", "shift", "message"),
    [
        ("contiguous", 1, "labels must not be the next tokens where the pattern is not causal"),
        ("zigzag", 1, "labels must not be the next tokens where the pattern is not causal"),
        ("zigzag", 0, "labels must not be the input_ids themselves"),
    ],
)
def test_labels_that_the_model_sees_are_an_error_on_all_ranks(trainers, placement, shift, message):
    for is_result, error in trainers.outcomes(2, fit_what_it_sees, placement, shift):
        assert not is_result
        assert message in error[1]
