"""Facts -> an annotation as a picture; a clean picture -> the degraded one that it annotates.

Pictures are (H, W, 3) uint8 RGB. Nothing here keeps a state: what is random takes the generator to draw from.
"""

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

Colour = tuple[int, int, int]
Joints = Mapping[str, tuple[float, float]]

# OpenPose's limbs and colours for its COCO body (Cao et al., TPAMI 2021); left and right are the person's.
# Neck to nose is drawn after shoulders and hips, so that neither side of the body lies on top at the neck.
LIMBS: list[tuple[str, str, Colour]] = [
    ("neck", "right_shoulder", (255, 0, 0)),
    ("neck", "left_shoulder", (255, 85, 0)),
    ("right_shoulder", "right_elbow", (255, 170, 0)),
    ("right_elbow", "right_wrist", (255, 255, 0)),
    ("left_shoulder", "left_elbow", (170, 255, 0)),
    ("left_elbow", "left_wrist", (85, 255, 0)),
    ("neck", "right_hip", (0, 255, 0)),
    ("right_hip", "right_knee", (0, 255, 85)),
    ("right_knee", "right_ankle", (0, 255, 170)),
    ("neck", "left_hip", (0, 255, 255)),
    ("left_hip", "left_knee", (0, 170, 255)),
    ("left_knee", "left_ankle", (0, 85, 255)),
    ("neck", "nose", (0, 0, 255)),
    ("nose", "right_eye", (85, 0, 255)),
    ("right_eye", "right_ear", (170, 0, 255)),
    ("nose", "left_eye", (255, 0, 255)),
    ("left_eye", "left_ear", (255, 0, 170)),
]


def mirrored_colours(limbs: Sequence[tuple[str, str, Colour]]) -> list[tuple[Colour, Colour]]:
    """(left limb's colour, right limb's colour) of every limb that has a counterpart on the other side."""
    colours = {(start, end): colour for start, end, colour in limbs}
    pairs = []
    for (start, end), colour in colours.items():
        other = (start.replace("left_", "right_"), end.replace("left_", "right_"))
        if other != (start, end):
            pairs.append((colour, colours[other]))
    return pairs


MIRRORED_COLOURS: list[tuple[Colour, Colour]] = mirrored_colours(LIMBS)


def skeleton(joints: Joints, size: tuple[int, int], thickness: int) -> np.ndarray:
    """The limbs of one person on black, each in its colour of `LIMBS`, without anti-aliasing.

    Args:
        joints: name -> (x, y) in pixels; a limb is drawn when both of its joints are there.
        size: (H, W) of the result.
        thickness: of the limbs, in pixels.

    Raises:
        ValueError: a joint that no limb has.
    """
    known = {name for start, end, _ in LIMBS for name in (start, end)}
    for name in joints:
        if name not in known:
            raise ValueError(f"joints: '{name}' is unknown; choices: {', '.join(sorted(known))}")
    picture = np.zeros((*size, 3), np.uint8)
    for start, end, colour in LIMBS:
        if start in joints and end in joints:
            cv2.line(picture, pixel(joints[start]), pixel(joints[end]), colour, thickness)
    return picture


def pixel(point: tuple[float, float]) -> tuple[int, int]:
    """The nearest pixel's (x, y)."""
    return round(point[0]), round(point[1])


def rain(
    picture: np.ndarray,
    rng: np.random.Generator,
    *,
    streaks: tuple[int, int] = (14, 30),
    length: tuple[float, float] = (0.12, 0.34),
    opacity: tuple[float, float] = (0.45, 0.9),
    slant: float = 25.0,
) -> np.ndarray:
    """The picture with streaks of rain of one direction; pixels without a streak keep their exact value.

    Args:
        picture: (H, W, 3) uint8.
        streaks: fewest and most streaks.
        length: of a streak, as a fraction of the shorter side.
        opacity: 0 leaves the picture, 1 covers it.
        slant: largest angle to the vertical, in degrees.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    thickness = max(1, round(side / 32))  # two pixels at 64, so that a streak lives through halving to 32
    angle = rng.uniform(-slant, slant)
    alpha = np.zeros((height, width), np.uint8)
    count = int(rng.integers(streaks[0], streaks[1] + 1))
    # One draw for all streaks: a call of the generator costs more than the line.
    for x, y, reach, cover, wobble in rng.random((count, 5)):
        tilt = math.radians(angle + 6 * (wobble - 0.5))
        run = side * (length[0] + reach * (length[1] - length[0]))
        across, down = run * math.sin(tilt) / 2, run * math.cos(tilt) / 2
        start = (x * width - across, y * height - down)  # about the point: every edge gets as much rain
        end = (x * width + across, y * height + down)
        strength = 255 * (opacity[0] + cover * (opacity[1] - opacity[0]))
        cv2.line(alpha, pixel(start), pixel(end), strength, thickness, cv2.LINE_AA)
    light = np.float32(rng.uniform(205, 245))
    cover_hw1 = alpha[..., None].astype(np.float32) / 255
    return np.rint(picture + (light - picture) * cover_hw1).astype(np.uint8)
