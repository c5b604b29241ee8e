"""Rows of pictures -> best, median and worst, and pictures as PNG inside HTML."""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

PictureRow = Sequence[tuple[str, np.ndarray]]

JUDGED = ("student", "teacher", "scratch")
"""Whose pictures rank the rows: the first of these that has drawn any."""
_SHADES = np.array([[255, 247, 230], [240, 134, 58], [96, 24, 40]], np.float64)  # low, middle, high
_CELL = 8  # pixels of a number of a grid


def extremes(rows: Sequence[PictureRow]) -> tuple[list[tuple[str, PictureRow]], list[PictureRow]]:
    """Name the rows in which a model comes closest to the truth, farthest from it, and those between.

    Closeness is the PSNR of the picture captioned with the first of JUDGED that the rows have, against that
    captioned "truth".

    Returns:
        ("best", "median" and "worst" with the PSNR, row), and the other rows as they came; under three rows,
        or where nothing can be compared, all of them unnamed.
    """
    pictures = [dict(row) for row in rows]
    judged = next((model for model in JUDGED if all(model in row for row in pictures)), None)
    if len(rows) < 3 or judged is None or not all("truth" in row for row in pictures):
        return [("", row) for row in rows], []
    closeness = [psnr(row[judged], row["truth"]) for row in pictures]
    order = sorted(range(len(rows)), key=lambda place: -closeness[place])
    named = {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}
    shown = [(f"{name}, {closeness[place]:.1f} dB", rows[place]) for name, place in named.items()]
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
