"""A seed -> (image, annotation) pairs drawn over crops of real photographs, with exact annotations.

The photographs come inside scikit-image's wheel: nothing is downloaded.
"""

import functools
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import skimage.data

from delvm.images.annotate import Joints, pixel, skeleton
from delvm.images.degrade import rain
from delvm.images.files import Sample

Pair = tuple[np.ndarray, np.ndarray]
Colour = tuple[int, int, int]

# No photograph is in both splits. Each has natural colour pictures and a grey texture.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "astronaut",
        "rocket",
        "stereo_motorcycle",
        "hubble_deep_field",
        "immunohistochemistry",
        "retina",
        "camera",
        "gravel",
    ),
    "validation": ("chelsea", "coffee", "brick"),
}
WINDOW = (64, 200)
"""Shortest and longest side of a crop, in the photograph's pixels."""

SHAPES: dict[str, Colour] = {"ellipse": (255, 0, 0), "rectangle": (0, 255, 0), "triangle": (0, 0, 255)}
"""The class of a shape and its colour in the mask."""


@functools.cache
def photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8, read-only, kept for the life of the process."""
    loaded = getattr(skimage.data, name)()
    picture = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, axis=-1)
    if name == "retina":  # the round picture's black corners
        picture = picture[200:-200, 200:-200]
    picture = np.array(picture[..., :3])
    picture.setflags(write=False)
    return picture


def background(rng: np.random.Generator, split: str, size: int) -> np.ndarray:
    """A random square window of a random photograph of the split: (size, size, 3) uint8."""
    names = PHOTOGRAPHS[split]
    picture = photograph(names[int(rng.integers(len(names)))])
    side = int(rng.integers(WINDOW[0], WINDOW[1] + 1))
    top = int(rng.integers(picture.shape[0] - side + 1))
    left = int(rng.integers(picture.shape[1] - side + 1))
    window = picture[top : top + side, left : left + side]
    kind = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(window, (size, size), interpolation=kind))


def vivid(rng: np.random.Generator) -> Colour:
    """A random colour that stands out: any hue, never grey or dark."""
    hue, saturation, value = rng.random(3)
    value = 160 + 95 * value
    low = value * (0.4 - 0.4 * saturation)
    sector, part = divmod(6 * hue, 1)
    rising, falling = low + (value - low) * part, value - (value - low) * part
    channels = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ][int(sector)]
    return round(channels[0]), round(channels[1]), round(channels[2])


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Colour with soft stripes of a random direction and width: (size, size, 3) uint8."""
    angle, phase, depth = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.3)
    steps = np.arange(size, dtype=np.float32) * (rng.uniform(2, 7) * 2 * math.pi / size)
    waves_hw = np.sin(steps * math.cos(angle) + (steps * math.sin(angle) + phase)[:, None])
    stripes = 1 - depth * (0.5 + 0.5 * waves_hw)
    return (stripes[..., None] * np.array(vivid(rng), np.float32)).astype(np.uint8)


def outline(rng: np.random.Generator, shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """A turned shape's outline: (points, 2) int32."""
    if shape == "ellipse":
        angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        stretch = np.array([1.0, rng.uniform(0.65, 1.0)])
    elif shape == "rectangle":
        corner = rng.uniform(0.55, 1.0)  # half a diagonal's angle: from 2:3 to about a square
        angles = np.array([corner, math.pi - corner, math.pi + corner, -corner])
        stretch = np.array([1.0, 1.0])
    else:
        angles = math.pi * (np.array([-0.5, 1 / 6, 5 / 6]) + rng.uniform(-0.08, 0.08, 3))
        stretch = np.array([1.15, 1.15])
    points = radius * stretch * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    turn = rng.uniform(-math.pi, math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    turned: np.ndarray = np.rint(points @ rotation.T + centre).astype(np.int32)
    return turned


def segmentation(rng: np.random.Generator, split: str, size: int) -> Pair:
    """One to three striped shapes over a photograph; the mask has each in its class's colour on black."""
    image, mask = background(rng, split, size), np.zeros((size, size, 3), np.uint8)
    names = list(SHAPES)
    placed: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(1, 4))):
        shape, radius = names[int(rng.integers(len(names)))], size * rng.uniform(0.15, 0.27)
        for _ in range(8):  # a shape that finds no room is left out; the first always does
            x, y = rng.uniform(0.18 * size, 0.82 * size, 2)
            if all(math.hypot(x - u, y - v) > 0.85 * (radius + r) for u, v, r in placed):
                break
        else:
            continue
        placed.append((x, y, radius))
        inside = np.zeros((size, size), np.uint8)
        cv2.fillPoly(inside, [outline(rng, shape, (x, y), radius)], 255)
        cv2.copyTo(texture(rng, size), inside, image)
        mask[inside > 0] = SHAPES[shape]
    return image, mask


def deraining(rng: np.random.Generator, split: str, size: int) -> Pair:
    """A photograph behind rain; the annotation is the photograph."""
    clean = background(rng, split, size)
    return rain(clean, rng), clean


def stand(rng: np.random.Generator, size: int) -> dict[str, tuple[float, float]]:
    """The joints of a person who faces the viewer, all within the picture: name -> (x, y) in pixels."""
    joints: dict[str, tuple[float, float]] = {"neck": (0.0, 0.0)}

    def limb(start: str, end: str, length: float, angle: float) -> None:
        """`angle` in degrees: 0 points down, 90 to the viewer's right."""
        x, y = joints[start]
        joints[end] = (x + length * math.sin(math.radians(angle)), y + length * math.cos(math.radians(angle)))

    lean = rng.uniform(-10, 10)
    limb("neck", "nose", 0.22, 180 + lean + rng.uniform(-8, 8))
    for side, sign in (("right", -1), ("left", 1)):  # the person's right is the viewer's left
        # Arms and legs stay on their own side: left and right can be told from where they are.
        limb("neck", f"{side}_shoulder", 0.19, lean + sign * 82)
        upper = rng.uniform(5, 150)
        limb(f"{side}_shoulder", f"{side}_elbow", 0.26, sign * upper)
        limb(f"{side}_elbow", f"{side}_wrist", 0.25, sign * np.clip(upper + rng.uniform(-50, 80), 0, 180))
        limb("neck", f"{side}_hip", 0.46, lean + sign * 15)
        thigh = rng.uniform(2, 45)
        limb(f"{side}_hip", f"{side}_knee", 0.30, sign * thigh)
        limb(f"{side}_knee", f"{side}_ankle", 0.30, sign * (thigh + rng.uniform(-min(thigh, 40), 5)))
    points = np.array(list(joints.values()))
    # Room for the head, and for the limbs' width.
    low, high = points.min(axis=0) - [0.06, 0.2], points.max(axis=0) + 0.06
    scale = size * rng.uniform(0.62, 0.96) / max(high - low)
    corner = rng.uniform(0, 1, 2) * (size - scale * (high - low))
    moved = (points - low) * scale + corner
    return {name: (float(x), float(y)) for name, (x, y) in zip(joints, moved, strict=True)}


def person(image: np.ndarray, joints: Joints, rng: np.random.Generator) -> None:
    """Draw a clothed person into the image: an outline of light or dark first, then the parts."""
    unit = math.dist(joints["neck"], joints["right_hip"])  # about half of the torso and head
    thickness = max(3, round(0.24 * unit))
    head, eye = max(3, round(0.36 * unit)), max(1, round(0.06 * unit))
    shirt, trousers = vivid(rng), vivid(rng)
    tone = rng.uniform(0.45, 1.0)
    skin: Colour = (round(245 * tone), round(200 * tone), round(165 * tone))
    edge: Colour = (25, 25, 30) if rng.random() < 0.7 else (245, 245, 240)
    corners = ("right_shoulder", "left_shoulder", "left_hip", "right_hip")
    torso = np.array([pixel(joints[corner]) for corner in corners])
    lines: list[tuple[str, str, Colour]] = [("neck", "nose", skin)]
    for side in ("right", "left"):
        lines += [
            (f"{side}_hip", f"{side}_knee", trousers),
            (f"{side}_knee", f"{side}_ankle", trousers),
            (f"{side}_elbow", f"{side}_wrist", skin),
            (f"{side}_shoulder", f"{side}_elbow", shirt),
        ]
    centre = pixel(joints["nose"])
    for border in (2, 0):
        for start, end, colour in lines:
            shade = edge if border else colour
            cv2.line(image, pixel(joints[start]), pixel(joints[end]), shade, thickness + border)
        cv2.polylines(image, [torso], True, edge if border else shirt, thickness + border)
        cv2.fillPoly(image, [torso], shirt)
        cv2.circle(image, centre, head + border // 2, edge if border else skin, -1)
    for sign in (-1, 1):
        cv2.circle(image, (centre[0] + sign * max(2, head // 2), centre[1]), eye, (20, 20, 25), -1)


def pose(rng: np.random.Generator, split: str, size: int) -> Pair:
    """A person over a photograph; the annotation is the skeleton on black in OpenPose's colours."""
    image, joints = background(rng, split, size), stand(rng, size)
    person(image, joints, rng)
    return image, skeleton(joints, (size, size), thickness=max(2, round(size / 16)))


# A place in this table is part of the seed: add new kinds at the end.
SCENES: dict[str, Callable[[np.random.Generator, str, int], Pair]] = {
    "segmentation": segmentation,
    "deraining": deraining,
    "pose": pose,
}


class Scenes(Sequence[Sample]):
    """Pairs of one kind: sample i depends on (seed, kind, split, i) alone, in any order and any process.

    Args:
        kind: a name from `SCENES`.
        num_samples: how many there are; the first ones are the same for every number.
        split: "train" or "validation"; they share no photograph.
        seed: at least 0.
        size: side of the pictures, in pixels.

    Raises:
        ValueError: an unknown kind or split, a number out of range.
    """

    def __init__(self, kind: str, num_samples: int, split: str, seed: int, size: int = 64) -> None:
        if kind not in SCENES:
            raise ValueError(f"scene: '{kind}' is unknown; choices: {', '.join(SCENES)}")
        if split not in PHOTOGRAPHS:
            raise ValueError(f"split: '{split}' is unknown; choices: {', '.join(PHOTOGRAPHS)}")
        for key, number, least in (("num_samples", num_samples, 0), ("seed", seed, 0), ("size", size, 16)):
            if number < least:
                raise ValueError(f"{key}: {number} must be at least {least}")
        self.kind, self.num_samples, self.split, self.seed, self.size = kind, num_samples, split, seed, size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        """[image, annotation], each (size, size, 3) uint8."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        place = (list(SCENES).index(self.kind), list(PHOTOGRAPHS).index(self.split))
        return list(
            SCENES[self.kind](np.random.default_rng((self.seed, *place, index)), self.split, self.size)
        )
