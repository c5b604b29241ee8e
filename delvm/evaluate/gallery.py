"""Rows of pictures -> best, median and worst, and pictures as PNG inside HTML."""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from delvm.evaluate.scores import Scored
from delvm.evaluate.tables import measure

PictureRow = Sequence[tuple[str, np.ndarray]]

JUDGED = ("student", "teacher", "scratch")
"""Whose pictures rank the rows: the first of these that has drawn any, else the last model."""
_SHADES = np.array([[255, 247, 230], [240, 134, 58], [96, 24, 40]], np.float64)  # low, middle, high
_CELL = 8  # pixels of a number of a grid


def extremes(
    rows: Sequence[PictureRow], scored: Mapping[str, Scored] | None = None
) -> tuple[list[tuple[str, PictureRow]], list[PictureRow]]:
    """Name the rows in which a model does best, worst, and those between.

    By the task's own score of that model's pictures; without one, by the PSNR of the picture captioned with
    the model's name against that captioned "truth".

    Args:
        rows: pictures with their captions; those of models stand behind the truth.
        scored: by model, what the pictures of these rows (and perhaps of more that are not shown) are worth.

    Returns:
        ("best", "median" and "worst" with the score, row), and the other rows as they came; under three that
        can be compared, all of them unnamed.
    """
    pictures = [dict(row) for row in rows]
    models = [*JUDGED, *(row[-1][0] for row in rows[:1])]
    judged = next((name for name in models if all(name in row for row in pictures)), "truth")
    if len(rows) < 3 or judged == "truth" or not all("truth" in row for row in pictures):
        return [("", row) for row in rows], []
    own = (scored or {}).get(judged)
    worth = [math.nan] * len(rows) if own is None else own.by_picture[: len(rows)].tolist()
    if own is not None and len(worth) == len(rows) and sum(map(math.isfinite, worth)) >= 3:
        key, sign = next(iter(own.metrics)), 1 if own.higher_is_better else -1
        said = [f"{key.replace('_', ' ')} {measure(key, value)}" for value in worth]
    else:
        worth, sign = [psnr(row[judged], row["truth"]) for row in pictures], 1
        said = [f"{value:.1f} dB" for value in worth]
    ranked = [place for place, value in enumerate(worth) if not math.isnan(value)]  # else nothing to score
    order = sorted(ranked, key=lambda place: -sign * worth[place])
    named = {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}
    shown = [(f"{name}, {said[place]}", rows[place]) for name, place in named.items()]
    return shown, [row for place, row in enumerate(rows) if place not in named.values()]


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures of one shape, in dB; infinite where they are equal."""
    error = np.mean((picture.astype(np.float64) - truth) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def png(picture: np.ndarray) -> str:
    """A picture as base64 of a PNG. Raises ValueError for one that is not (H, W, 3) uint8."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"pictures: {picture.dtype} {picture.shape}, must be uint8 (H, W, 3)")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def heat_maps(
    grids: Mapping[tuple[str, ...], np.ndarray],
) -> dict[tuple[str, ...], tuple[np.ndarray, float, float]]:
    """(rows, columns) float grids -> pictures on one scale, light to dark as the numbers grow.

    Returns:
        By the same names, ((8 rows, 8 columns, 3) uint8, lowest, highest of that grid). What is not finite
        is white.
    """
    if not grids:
        return {}
    finite = {name: grid[np.isfinite(grid)] for name, grid in grids.items()}
    found = {
        name: (float(v.min()), float(v.max())) if v.size else (math.nan, math.nan)
        for name, v in finite.items()
    }
    known = np.concatenate(list(finite.values()))
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    shaded = {}
    for name, grid in grids.items():
        place = np.nan_to_num((grid - low) / ((high - low) or 1)) * 2
        shades = np.stack([np.interp(place, [0, 1, 2], _SHADES[:, c]) for c in range(3)], axis=-1)
        shades[~np.isfinite(grid)] = 255
        shaded[name] = (
            np.kron(shades.round().astype(np.uint8), np.ones((_CELL, _CELL, 1), np.uint8)),
            *found[name],
        )
    return shaded
