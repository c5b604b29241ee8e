"""Prompted annotations: how they are drawn, and the pictures kept of them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from delvm.images.files import read_picture


@dataclass
class PromptingConfig:
    """How held-out annotations are generated."""

    pictures: int = 4
    """Prompted queries a task, each a row of pictures in the report."""
    temperature: float = 0.0
    """0: the most likely code each time."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"pictures: {self.pictures} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must be above 0 and at most 1")


Picture = tuple[str, np.ndarray]
"""A caption and a (H, W, 3) uint8 picture."""


def save_pictures(folder: Path, pictures: dict[str, list[list[Picture]]]) -> None:
    """Rows of pictures by task -> `TASK/ROW-PLACE-CAPTION.png`."""
    for task, rows in pictures.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows):
            for place, (caption, picture) in enumerate(row):
                Image.fromarray(picture).save(folder / task / f"{number:03}-{place:02}-{caption}.png")


def load_pictures(folder: Path) -> dict[str, list[list[Picture]]]:
    """What `save_pictures` wrote; empty for a folder that is not there."""
    pictures: dict[str, list[list[Picture]]] = {}
    for task in sorted(path for path in folder.glob("*") if path.is_dir()):
        rows: dict[str, list[Picture]] = {}
        for file in sorted(task.glob("*.png")):
            number, _, caption = file.stem.split("-", 2)
            rows.setdefault(number, []).append((caption, read_picture(file)))
        pictures[task.name] = list(rows.values())
    return pictures
