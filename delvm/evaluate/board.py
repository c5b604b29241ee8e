"""Metrics and pictures of a run that has ended -> TensorBoard."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delvm.evaluate.gallery import PictureRow
from delvm.evaluate.prompting import grid


def write(folder: Path, metrics: Mapping[str, Any], pictures: Mapping[str, Sequence[PictureRow]]) -> None:
    """Write what metrics.json and the report's pictures hold as scalars and images of step 0.

    Args:
        folder: of the event file; what was there is replaced.
        metrics: nested; the number under `a`, `b`, `c` becomes the scalar `a/b/c`.
        pictures: task -> rows of square (caption, (H, W, 3) uint8); one image a task, `pictures/TASK`.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for key, value in scalars(metrics):
            writer.add_scalar(key, value, 0)
        for task, rows in pictures.items():
            if rows:
                writer.add_image(f"pictures/{task}", _array(rows), 0, dataformats="HWC")


def scalars(tree: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in nested mappings and lists, under its keys joined by `/`; lists count from 1."""
    for name, value in tree.items():
        inner = f"{key}/{name}" if key else str(name)
        if isinstance(value, list | tuple):
            value = {str(number): item for number, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from scalars(value, inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield inner, float(value)


def _array(rows: Sequence[PictureRow]) -> Any:
    import numpy as np

    return np.asarray(grid(rows))
