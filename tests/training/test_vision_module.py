"""Images are told apart, on one process; `strategies/test_images.py` has it over ranks."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_longnet import LongViTConfig, LongViTModule, Pattern, load_model, read_checkpoint

CONFIG = LongViTConfig(
    Pattern.dilated((8, 16), (1, 2)), dim=16, layers=1, heads=2, classes=3, image_size=16, patch_size=4, channels=1
)


def rows(many=12):
    """Each has one bright quarter of three; the rest is noise."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for i in range(many):
        pixels = 0.3 * torch.randn(1, 16, 16, generator=generator)
        label = i % 3
        pixels[:, 8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8] += 1
        result.append({"pixels": pixels, "label": label})
    return result


def trainer_of(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",  # its advice
    "ignore:.*LeafSpec.*:FutureWarning",  # what it uses of torch
)


def test_a_few_images_are_learned_and_distinguished_again_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    module = LongViTModule(CONFIG, learning_rate=1e-2)
    loader = DataLoader(rows(), batch_size=5)
    trainer = trainer_of(tmp_path, max_epochs=25, enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    result = {name: x.item() for name, x in trainer.callback_metrics.items()}
    assert result["val/accuracy"] == 1.0
    assert result["val/loss"] < 0.05
    assert result["train/loss"] < 0.05
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(1e-4)  # a hundredth, at the end
    assert [each["weight_decay"] for each in trainer.optimizers[0].param_groups] == [0.05, 0.0]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LongViTModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.hparams == module.hparams
    tested = trainer_of(tmp_path).test(again, loader, verbose=False)[0]
    assert tested == {"test/loss": pytest.approx(result["val/loss"]), "test/accuracy": 1.0}
    predicted = torch.cat(trainer_of(tmp_path).predict(again, loader))
    assert predicted.tolist() == [i % 3 for i in range(12)]
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert LongViTConfig(**read.hyper_parameters["config"]) == CONFIG


def test_a_subclass_orders_the_patches():
    class Turned(LongViTModule):
        def ordering(self, rows, columns):
            return torch.arange(rows * columns).flip(0)

    pixels = torch.stack([row["pixels"] for row in rows()])
    torch.manual_seed(0)
    plain = LongViTModule(CONFIG)
    torch.manual_seed(0)
    turned = Turned(CONFIG)
    expected = plain.model(pixels, ordering=torch.arange(16).flip(0))
    assert torch.equal(turned(pixels), expected)
    assert not torch.allclose(plain(pixels), expected)


def test_a_checkpoint_knows_its_curve(tmp_path):
    curved = LongViTConfig(**{**CONFIG.to_dict(), "ordering": "hilbert"})
    torch.manual_seed(0)
    module = LongViTModule(curved)
    loader = DataLoader(rows(), batch_size=12)
    trainer = trainer_of(tmp_path, max_steps=2, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    pixels = torch.stack([row["pixels"] for row in rows()])
    expected = module.eval()(pixels)
    again = LongViTModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert again.config == curved
    assert torch.equal(again(pixels), expected)
    assert torch.equal(load_model(tmp_path / "a.ckpt").eval()(pixels), expected)
    assert not torch.allclose(expected, again.model(pixels, ordering=torch.arange(16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {**CONFIG.to_dict(), "classes": 0}}, "config must have at least 2 classes, got 0"),
        ({"config": CONFIG, "warmup_share": 1.0}, "warmup_share must be at least 0 and less than 1, got 1.0"),
        ({"config": CONFIG, "label_smoothing": -0.1}, "label_smoothing must be at least 0 and less than 1"),
    ],
)
def test_modules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongViTModule(**options)


def test_a_run_without_an_end_is_refused(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from rows(3)

    trainer = trainer_of(tmp_path, max_epochs=-1, max_steps=-1, enable_checkpointing=False)
    with pytest.raises(ValueError, match="max_steps must be set where the data has no end"):
        trainer.fit(LongViTModule(CONFIG), DataLoader(Endless(), batch_size=3))
