"""Pictures of classes -> batches of random views to train on, perhaps mixed in pairs, by timm.

Views are drawn of the pixels, and where a model reads codes they are encoded in passing: crops, RandAugment
and mixing mean nothing to codes, and a cache of codes would show one view of each picture again and again.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from delvm.evaluate.features import Listing
from delvm.images.files import read_picture


@dataclass
class ViewsConfig:
    """How pictures and labels are varied; all zero and `crop` 1: each as it is, scaled to a square."""

    crop: float = 0.35
    """Least share of a picture that a crop keeps; 1 takes all of it that fits into 3:4 to 4:3."""
    mirror: bool = True
    """Mirror every second view."""
    augment: str = ""
    """RandAugment (Cubuk et al. 2020) as timm spells it, such as `rand-m9-mstd0.5-inc1`; empty: none."""
    colour: float = 0.0
    """How far brightness, contrast and saturation change, 0..1; nothing with `augment`, which does it too."""
    erasing: float = 0.0
    """Chance that a rectangle of a view is blackened (Zhong et al. 2017)."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that two views are blended by (Zhang et al. 2017); 0: never."""
    cutmix: float = 0.0
    """Alpha of the area that two views exchange (Yun et al. 2019); with `mixup`, half of the pairs each."""
    mixing: float = 1.0
    """Chance that a pair is mixed at all."""
    smoothing: float = 0.1
    """Share of a label that is spread over all classes (Szegedy et al. 2015)."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"views.crop: {self.crop} must lie in 0..1, 0 excluded")
        for key in ("colour", "erasing", "mixing"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"views.{key}: {getattr(self, key)} must lie in 0..1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"views.smoothing: {self.smoothing} must lie in 0..1, 1 excluded")
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"views.{key}: {getattr(self, key)} must be at least 0 and finite")
        if self.augment:
            try:
                rand_augment_transform(self.augment, {})
            except (AssertionError, ValueError, KeyError) as error:
                raise ValueError(
                    f"views.augment: '{self.augment}' is no RandAugment of timm, such as rand-m9-mstd0.5-inc1"
                ) from error

    @property
    def mixes(self) -> bool:
        """Whether views are mixed in pairs."""
        return bool(self.mixup or self.cutmix) and self.mixing > 0


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within, Python's, numpy's and torch's random numbers are those of these whole numbers alone."""
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from it
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)  # noqa: NPY002
            torch.manual_seed(number)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


class Views(Dataset):
    """Views of pictures, epoch after epoch, each epoch in a random order of its own.

    Items: `pictures` (size, size, 3) uint8; `labels`, the class; `index`; `draws` (num_draws,) float32 in
    0..1, random numbers for what else is drawn by item. Item i depends on the seed and i alone, and so does a
    mixed pair, items 2k and 2k+1: a step is the same, however many processes and micro-batches share it.
    """

    def __init__(
        self,
        listing: Listing,
        size: int,
        config: ViewsConfig,
        num_items: int,
        *,
        seed: int,
        num_draws: int = 0,
    ) -> None:
        """size: side of a view in pixels."""
        self.listing, self.config, self.num_items, self.seed = listing, config, num_items, seed
        self.num_draws = num_draws
        self.transform = create_transform(
            size, is_training=True, scale=(config.crop, 1.0), hflip=0.5 * config.mirror,
            color_jitter=config.colour or None, auto_augment=config.augment or None, interpolation="bicubic",
            use_prefetcher=True,
        )  # fmt: skip
        self.erase = RandomErasing(config.erasing, mode="const", device="cpu")
        self.mixup = Mixup(
            config.mixup, config.cutmix, prob=config.mixing, mode="pair", label_smoothing=config.smoothing,
            num_classes=len(listing.classes),
        )  # fmt: skip
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self.listing))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.listing))
            self._epoch = epoch
        sample = int(self._order[place])
        picture = Image.fromarray(read_picture(Path(self.listing.files[sample])))
        with seeded(self.seed, 1, index):
            view = self.erase(self.transform(picture))  # (3, size, size) uint8
            draws = torch.rand(self.num_draws)
        labels = int(self.listing.labels[sample])
        return {"pictures": view.permute(1, 2, 0), "labels": labels, "index": index, "draws": draws}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches: the items' parts stacked, and `targets` (n, classes) float32, shares of the classes.

        With mixing n is even, the first item's index too.
        """
        labels = torch.tensor([item["labels"] for item in items])
        batch = {
            "pictures": torch.stack([item["pictures"] for item in items]),
            "labels": labels,
            "draws": torch.stack([item["draws"] for item in items]),
        }
        if not self.config.mixes:
            spread = {"num_classes": len(self.listing.classes), "smoothing": self.config.smoothing}
            # of one class alone: mixed with itself
            return batch | {"targets": mixup_target(labels, lam=1.0, **spread).float()}
        pairs, targets = batch["pictures"].permute(0, 3, 1, 2).float(), []
        for place in range(0, len(items), 2):
            both = slice(place, place + 2)
            with seeded(self.seed, 2, items[place]["index"]):
                mixed, target = self.mixup(pairs[both], labels[both])
            pairs[both] = mixed
            targets.append(target)
        pictures = pairs.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return batch | {"pictures": pictures, "targets": torch.cat(targets).float()}
