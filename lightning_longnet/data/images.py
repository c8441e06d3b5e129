"""Images in one folder for each class."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_longnet.data.base import Loaders, check_positive
from lightning_longnet.data.order import seed_of
from lightning_longnet.trust import confined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")


class ImageFolderData(Loaders):
    """A data module of images that are sorted into one folder per class, in which they may be in subfolders.

    Batches are {"pixels": (B, channels, size, size), "label": (B,)}, with pixels from -1 to 1.  Images are scaled to
    cover the square, and cropped to it at the centre.  The choice of the images for validation depends only on their
    names, so it is the same in every run and on every machine.

    Args:
        path: the folder that contains the folders of the classes.  Classes are numbered in the order of their names.
        size: width and height in pixels.
        channels: 3 for colour, 1 for grey.
        batch_size: images of a batch, on each rank or each group of ranks that share sequences.
        validation_share: share of the images of each class that is for validation, at least one of two.
        seed: seed of the order of training images.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
    """

    def __init__(
        self,
        path: str,
        size: int = 224,
        channels: int = 3,
        batch_size: int = 1,
        validation_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, pin_memory)
        check_positive(size=size)
        if find_spec("PIL") is None:
            raise ModuleNotFoundError("ImageFolderData needs pillow: pip install 'lightning-longnet[images]'")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share must be more than 0 and less than 1, got {validation_share!r}")
        self.folder, self.size, self.channels = Path(path), size, channels
        self.validation_share = validation_share
        if not self.folder.is_dir():
            raise FileNotFoundError(f"path must be a folder of folders of images, there is no folder {path}")
        self.classes = sorted(each.name for each in self.folder.iterdir() if each.is_dir() and each.name[0] != ".")
        if not self.classes:
            raise ValueError(f"path must hold a folder for each class, found none in {path}")

    def setup(self, stage: str) -> None:
        train: list[tuple[Path, int]] = []
        validation: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            images = [p for p in (self.folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
            for each in {*(p.parent for p in images), *filter(Path.is_symlink, images)}:
                confined("path", each, self.folder)
            if not images:
                raise ValueError(f"path must hold images in each class's folder, found none in {self.folder / name}")
            images.sort(key=lambda p: (seed_of(p.relative_to(self.folder).as_posix()), p))
            held_out = min(max(1, int(len(images) * self.validation_share)), len(images) - 1)
            validation += [(path, label) for path in images[:held_out]]
            train += [(path, label) for path in images[held_out:]]
        if not validation:
            raise ValueError(f"path must hold at least two images of some class, found one of each in {self.folder}")
        self.train_images = Images(sorted(train), self.size, self.channels)
        self.val_images = Images(sorted(validation), self.size, self.channels)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_images, True, "drop")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return images in their order.  Ranks without an image in the last batch get one of the first again."""
        return self._loader(self.val_images, False, "repeat")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_images, False, "ragged")


class Images(Dataset[dict[str, "Tensor"]]):
    """Image files with their classes, read at access; an item is {"pixels": (channels, size, size), "label": ()}."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int, channels: int) -> None:
        self.files, self.size, self.channels = list(files), size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        path, label = self.files[i]
        try:
            opened = Image.open(path, formats=FORMATS)  # whatever its name says, its content may be of another
        except UnidentifiedImageError as error:
            raise ValueError(f"path must hold images of {', '.join(FORMATS)}, {path} is none") from error
        with opened:
            image = ImageOps.fit(opened.convert("RGB" if self.channels == 3 else "L"), (self.size, self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(self.size, self.size, self.channels)
        return {"pixels": pixels.permute(2, 0, 1).contiguous() / 127.5 - 1, "label": torch.tensor(label)}
