"""Images by folder: sizes, values, classes, and a split that stays."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_longnet import ImageFolderData


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("cats", 0), ("dogs", 255)):
        for i in range(10):
            place = tmp_path / name / ("more" if i % 2 else ".")
            place.mkdir(parents=True, exist_ok=True)
            wide = np.full((12, 20, 3), shade, np.uint8)
            wide[:, :4] = wide[:, -4:] = 100  # cut off
            Image.fromarray(wide).save(place / f"{i}.png")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    return tmp_path


def made(folder, **options):
    data = ImageFolderData(str(folder), **{"size": 6, "batch_size": 4, "validation_share": 0.3} | options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_labels(folder, channels):
    data = made(folder, channels=channels)
    assert data.classes == ["cats", "dogs"]
    labels = []
    for batch in data.train_dataloader():
        assert batch["pixels"].shape == (4, channels, 6, 6)
        assert batch["pixels"].dtype == torch.float32
        for pixels, label in zip(batch["pixels"], batch["label"], strict=True):
            assert (pixels[..., 1:-1] == (1.0 if label else -1.0)).all()  # the outermost are blurred
        labels += batch["label"].tolist()
    assert set(labels) == {0, 1}
    assert len(labels) == 12


def test_the_split_goes_by_names(folder):
    def names(images):
        return {path.relative_to(folder) for path, _ in images.files}

    data, again = made(folder), made(folder, seed=3)
    assert names(data.val_images) == names(again.val_images)
    assert len(data.val_images) == 6
    assert not names(data.val_images) & names(data.train_images)
    assert len(data.train_images) == 14
    assert len(made(folder, validation_share=0.01).val_images) == 2  # one at least of each class
    before = names(data.val_images)
    for path, _ in data.train_images.files[:3]:
        path.unlink()
    assert names(made(folder).val_images) <= before  # nothing comes in that was trained on


def test_every_image_is_validated(folder):
    data = made(folder)
    assert [len(batch["label"]) for batch in data.val_dataloader()] == [4, 2]
    assert sum(len(batch["label"]) for batch in data.predict_dataloader()) == 6


def test_what_does_not_fit_is_reported_in_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a folder of folders of images, there is no folder"):
        ImageFolderData(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="path must hold a folder for each class, found none"):
        ImageFolderData(str(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=r"path must hold images in each class's folder, found none in .*cats"):
        made(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "cats" / "a.png")
    with pytest.raises(ValueError, match="path must hold at least two images of some class"):
        made(tmp_path)
    for options, message in (({"channels": 2}, "channels must be 1 or 3"), ({"size": 0}, "size must be a positive")):
        with pytest.raises(ValueError, match=message):
            ImageFolderData(str(tmp_path), **options)
