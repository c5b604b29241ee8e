"""Facts -> an annotation as a picture: skeletons, masks, boxes.

Pictures are (H, W, 3) uint8 RGB, drawn on black without anti-aliasing: every pixel has exactly one of the
colours. Nothing here keeps a state: what is random takes the generator to draw from.
"""

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

Colour = tuple[int, int, int]
Joints = Mapping[str, tuple[float, float]]
Box = tuple[float, float, float, float, Colour]
"""(x, y, width, height, colour), in pixels from the upper left corner, as in COCO."""

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

# A joint has the colour of the limb that ends there, and the neck, where limbs only begin, the one that the
# limbs leave of OpenPose's wheel of 18. So the pairs above exchange left and right discs as well as limbs;
# with OpenPose's own joint colours a colour would be that of a left joint and of a right limb.
JOINT_COLOURS: dict[str, Colour] = {"neck": (255, 0, 85)} | {end: colour for _, end, colour in LIMBS}

COCO_KEYPOINTS: tuple[str, ...] = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)


def coco_joints(keypoints: Sequence[float]) -> Joints:
    """The joints of a person in COCO, and the neck half-way between the shoulders when both are labelled.

    Args:
        keypoints: x, y, v of `COCO_KEYPOINTS`; x and y in pixels, v = 0 where nothing is labelled, 1 for a
            hidden and 2 for a visible joint. Hidden ones count: they are labelled where they are.

    Raises:
        ValueError: not 51 finite numbers.
    """
    numbers = np.asarray(keypoints, np.float64)
    if numbers.shape != (3 * len(COCO_KEYPOINTS),) or not np.isfinite(numbers).all():
        raise ValueError(f"keypoints: {len(keypoints)} numbers, must be 51 finite ones: x, y, v of 17 joints")
    triples = zip(COCO_KEYPOINTS, numbers.reshape(-1, 3).tolist(), strict=True)
    joints = {name: (x, y) for name, (x, y, labelled) in triples if labelled > 0}
    if "left_shoulder" in joints and "right_shoulder" in joints:
        left, right = joints["left_shoulder"], joints["right_shoulder"]
        joints["neck"] = (left[0] + right[0]) / 2, (left[1] + right[1]) / 2
    return joints


def skeletons(people: Sequence[Joints], size: tuple[int, int], thickness: int, radius: int) -> np.ndarray:
    """The limbs of people in the colours of `LIMBS`, the joints over them as discs of `JOINT_COLOURS`.

    Args:
        people: name -> (x, y) in pixels; a limb is drawn when both of its joints are there. Later people lie
            over earlier ones.
        size: (H, W) of the result.
        thickness: of the limbs, in pixels.
        radius: of the discs, in pixels; 0 draws none. DeLVM has thickness 4 and radius 8 at COCO's sizes.

    Raises:
        ValueError: a joint that no limb has.
    """
    picture = np.zeros((*size, 3), np.uint8)
    for joints in people:
        for name in joints:
            if name not in JOINT_COLOURS:
                raise ValueError(f"joints: '{name}' is unknown; choices: {', '.join(sorted(JOINT_COLOURS))}")
        for start, end, colour in LIMBS:
            if start in joints and end in joints:
                cv2.line(picture, pixel(joints[start]), pixel(joints[end]), colour, thickness)
        if radius > 0:
            for name, colour in JOINT_COLOURS.items():
                if name in joints:
                    cv2.circle(picture, pixel(joints[name]), radius, colour, cv2.FILLED)
    return picture


def skeleton(joints: Joints, size: tuple[int, int], thickness: int) -> np.ndarray:
    """The limbs of one person alone: `skeletons` without discs."""
    return skeletons([joints], size, thickness, radius=0)


def pixel(point: tuple[float, float]) -> tuple[int, int]:
    """The nearest pixel's (x, y)."""
    return round(point[0]), round(point[1])


def paint_masks(masks: Iterable[np.ndarray], size: tuple[int, int], colours: Iterable[Colour]) -> np.ndarray:
    """Masks in their colours, the smaller over the larger, and of equal ones the later over the earlier.

    Args:
        masks: (H, W) bool each; read one by one, so that hundreds of large ones need not be held at once.
        size: (H, W) of the result.
        colours: one a mask.

    Raises:
        ValueError: a mask of another size or type; not one colour a mask.
    """
    picture, smallest = np.zeros((*size, 3), np.uint8), np.full(size, size[0] * size[1])
    for i, (mask, colour) in enumerate(zip(masks, colours, strict=True)):
        if mask.shape != tuple(size) or mask.dtype != bool:
            raise ValueError(f"mask {i}: {mask.dtype} {mask.shape}, must be bool {tuple(size)}")
        area = np.count_nonzero(mask)
        on_top = mask & (area <= smallest)
        picture[on_top] = colour
        smallest[on_top] = area
    return picture


def distinct_colours(num: int, rng: np.random.Generator) -> list[Colour]:
    """Random colours that can be told from each other and from black.

    They lie on the coarsest cubic grid that has enough of them. Any two differ in some channel by at least
    255 for up to 7 colours, 63 for 124, 42 for 335, 36 for 504; each has a channel of at least 64.
    """
    levels, grid = 1, np.zeros((0, 3), np.int64)
    while len(grid) < num:
        levels += 1
        steps = np.rint(np.linspace(0, 255, levels)).astype(np.int64)
        grid = steps[np.indices((levels,) * 3).reshape(3, -1).T]
        grid = grid[grid.max(axis=1) >= 64]
    return [(red, green, blue) for red, green, blue in rng.permutation(grid)[:num].tolist()]


def paint_boxes(boxes: Iterable[Box], size: tuple[int, int], thickness: int) -> np.ndarray:
    """The outlines of boxes, the smaller over the larger, and of equal ones the later over the earlier.

    An outline lies within its box, so that its outer edge is the box to the nearest pixel. A box is cut to
    the picture, and at least one pixel wide and high.

    Args:
        boxes: see `Box`.
        size: (H, W) of the result.
        thickness: of an outline, in pixels, at least 1; a box too small for it is filled.
    """
    picture = np.zeros((*size, 3), np.uint8)
    for x, y, width, height, colour in sorted(boxes, key=lambda box: -box[2] * box[3]):
        (left, top), (right, bottom) = pixel((x, y)), pixel((x + width, y + height))
        columns = slice(max(left, 0), max(right, left + 1, 0))
        rows = slice(max(top, 0), max(bottom, top + 1, 0))
        box = picture[rows, columns]
        box[:thickness] = box[-thickness:] = colour
        box[:, :thickness] = box[:, -thickness:] = colour
    return picture
