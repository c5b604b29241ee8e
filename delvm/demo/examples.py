"""Tasks -> solved pairs as files, to choose from: a run's own, and scenes that are drawn here."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from delvm.evaluate.prompting import load_pictures
from delvm.images.files import Sample
from delvm.images.scenes import SCENES, Scenes

SAMPLES = 12  # scenes of a kind
SMALLEST = 16  # pixels: no scene is smaller

Example = tuple[Path, Path]
"""The files of an image and its annotation."""


def write_examples(folder: Path, run: Path, size: int) -> dict[str, list[Example]]:
    """Solved pairs by task, those of the run first: `TASK-NUMBER.png` and `TASK-NUMBER-annotation.png`.

    Args:
        folder: where they are written.
        run: a run's folder; one of a model alone brings no pairs.
        size: side of what is drawn, in pixels.
    """
    tasks = held_out(run)
    for kind in SCENES:
        drawn = Scenes(kind, SAMPLES, "validation", seed=0, size=max(size, SMALLEST))
        tasks.setdefault(kind, [drawn[number] for number in range(SAMPLES)])
    return {task: [_write(folder, f"{task}-{n}", s) for n, s in enumerate(tasks[task], 1)] for task in tasks}


def held_out(run: Path) -> dict[str, list[Sample]]:
    """[image, annotation] of the held-out samples of which a run keeps pictures, by task."""
    solved = {("example", "annotation"), ("query", "truth")}
    tasks: dict[str, list[Sample]] = {}
    for task, rows in load_pictures(run / "evaluate" / "pictures").items():
        for row in rows:
            for (caption, image), (following, annotation) in pairwise(row):
                if (caption, following) in solved:
                    tasks.setdefault(task, []).append([image, annotation])
    return tasks


def _write(folder: Path, name: str, sample: Sample) -> Example:
    files = folder / f"{name}.png", folder / f"{name}-annotation.png"
    for file, picture in zip(files, sample, strict=True):
        Image.fromarray(np.asarray(picture)).save(file)
    return files
