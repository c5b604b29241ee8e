"""Prompted annotations: how they are drawn, and the pictures kept of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from delvm.images.files import read_picture


@dataclass
class PromptingConfig:
    """How held-out annotations are generated."""

    pictures: int = 4
    """Prompted queries a task, each a row of pictures in the report."""
    queries: int = 32
    """Prompted queries a task whose generated pictures are scored against the truth; 0: none."""
    scores: dict[str, str] = field(default_factory=dict)
    """How, by task, a name from `delvm.evaluate.scores.SCORES`; without one, as the task's settings say:
    `kind_of` there. Of a folder's masks of one thing none says `foreground`, nor `edges` of its lines."""
    shots: int = 0
    """Example pairs, at most, before the annotations whose losses are told by their number; fewer where a
    model's positions or the held-out samples end. 0: as many as the sentences have."""
    choices: str = ""
    """JSONL of multiple-choice questions that every model answers by lowest perplexity; its lines are those
    of `delvm.evaluate.choice`."""
    lvm_jsonl: str = ""
    """Examples of LVM's perplexity, pictures or tokens; the same."""
    temperature: float = 0.0
    """0: the most likely code each time."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"pictures: {self.pictures} must be at least 1")
        if self.queries < 0:
            raise ValueError(f"queries: {self.queries} must be at least 0")
        if self.shots < 0:
            raise ValueError(f"shots: {self.shots} must be at least 0")
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


SIDE, GAP, LINE = 128, 6, 16
"""Pixels of a small picture in a grid, between two of them, of a line of text."""


def grid(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """Rows of square pictures of one size under their captions; small ones grow, each pixel to a square."""
    size = max(len(picture) for row in rows for _, picture in row)
    scale = max(1, SIDE // size)
    step = size * scale + GAP
    canvas = Image.new("RGB", (GAP + max(map(len, rows)) * step, GAP + len(rows) * (LINE + step)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, row in enumerate(rows):
        for place, (caption, picture) in enumerate(row):
            left, top = GAP + place * step, GAP + line * (LINE + step)
            while draw.textlength(caption) > step - GAP:  # it ends where its picture does
                caption = caption[:-1]
            draw.text((left, top), caption, fill="dimgrey")
            scaled = Image.fromarray(picture).resize((size * scale,) * 2, Image.Resampling.NEAREST)
            canvas.paste(scaled, (left, top + LINE))
    return canvas
