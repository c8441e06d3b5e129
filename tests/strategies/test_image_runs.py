"""Losses and accuracies of images are those of one process, however their patches and they themselves are split."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tiers import tiered
from torch.utils.data import DataLoader
from trained import quiet, trainer_of

from lightning_longnet import LongViTConfig, LongViTModule, Pattern
from lightning_longnet.data import ImageFolderData
from lightning_longnet.strategies import RingSequenceParallelStrategy

CONFIG = LongViTConfig(
    Pattern.dilated((4, 16, 64), (1, 2, 2)),
    dim=16,
    layers=2,
    heads=4,
    classes=3,
    image_size=20,
    patch_size=5,
    channels=1,
    pooling="class",
    norm_eps=1e-3,
)


def images(many):
    generator = torch.Generator().manual_seed(5)
    return [
        {"pixels": torch.randn(1, 20, 20, generator=generator, dtype=torch.float64), "label": i % 3}
        for i in range(many)
    ]


class Plain(LongViTModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Losses(Callback):
    def __init__(self):
        self.result = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.result.append((outputs["loss"].item(), trainer.callback_metrics["train/accuracy"].item()))


def train(rank, world, sharding, size):
    """(losses and accuracies of the steps, those of the validation) of the same global batches."""
    with quiet():
        torch.manual_seed(3)
        module, losses = Plain(CONFIG).double(), Losses()
        trainer = trainer_of(RingSequenceParallelStrategy(size, sharding), world, max_epochs=2, callbacks=[losses])
        share = 4 * size // world
        trainer.fit(module, DataLoader(images(8), batch_size=share), DataLoader(images(6), batch_size=share))
        values = trainer.callback_metrics
        return losses.result, [values[f"val/{name}"].item() for name in ("loss", "accuracy")]


@pytest.fixture(scope="module")
def expected(trainers):
    return trainers.run(1, train, "ddp", 1)[0]


@pytest.mark.parametrize(
    ("world", "sharding", "size"),
    tiered(
        [(2, "ddp", 2), (2, "fsdp2", 2), (4, "ddp", 2), (4, "hsdp", 2), (4, "fsdp2", 4)],
        quick=[],
        long=[(4, "hsdp", 2)],
    ),
)
def test_runs_are_equal_on_every_mesh(trainers, expected, world, sharding, size):
    (steps, validated) = expected
    assert len(steps) == 4
    for result, values in trainers.run(world, train, sharding, size):
        assert result == [pytest.approx(step, rel=1e-9) for step in steps]
        assert values == pytest.approx(validated, rel=1e-6)


def train_on_folders(rank, world, folder):
    with quiet():
        torch.manual_seed(3)
        module, losses = Plain(CONFIG), Losses()
        data = ImageFolderData(folder, size=20, channels=1, batch_size=4, validation_share=0.2)
        trainer = trainer_of(RingSequenceParallelStrategy(world, "ddp"), world, max_epochs=1, callbacks=[losses])
        trainer.fit(module, data)
        return losses.result, [trainer.callback_metrics[f"val/{name}"].item() for name in ("loss", "accuracy")]


def test_images_of_folders_are_split_too(trainers, tmp_path):
    generator = torch.Generator().manual_seed(2)
    for name in "abc":
        (tmp_path / name).mkdir()
        for i in range(5):
            pixels = torch.randint(256, (24, 30), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.png")
    ((expected, validated),) = trainers.run(1, train_on_folders, str(tmp_path))
    assert len(expected) == 3
    for result, values in trainers.run(2, train_on_folders, str(tmp_path)):
        assert result == [pytest.approx(step, rel=1e-5) for step in expected]
        assert values == pytest.approx(validated, rel=1e-5)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/0.png").write_bytes((tmp_path / "a/0.png").read_bytes())
    for is_result, value in trainers.outcomes(1, train_on_folders, str(tmp_path)):
        assert not is_result
        assert value[:2] == (ValueError, "config.classes must be at least those of the data, 4, got 3")


class Unsplit(Plain):
    """Whose model knows nothing of ranks."""

    def __init__(self, config):
        super().__init__(config)
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(400, 3))

    def forward(self, pixels):
        return self.model(pixels)


def train_unsplit(rank, world):
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(world, "ddp"), world, max_steps=1)
        trainer.fit(Unsplit(CONFIG).double(), DataLoader(images(4), batch_size=2))


def test_a_model_that_splits_nothing_is_reported(trainers):
    for is_result, value in trainers.outcomes(2, train_unsplit):
        assert not is_result
        assert value[0] is ValueError
        assert "sequence_parallel_size must be 1 where no tensor of a batch is a sequence" in value[1]
    trainers.run(1, train_unsplit)
