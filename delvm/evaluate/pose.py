"""Pictures of skeletons -> joints, and how far they are from the true ones: PCK and OKS."""

import math
from typing import NamedTuple

import cv2
import numpy as np

from delvm.images.annotate import COCO_KEYPOINTS, JOINT_COLOURS, LIMBS, Joints

JOINTS = tuple(JOINT_COLOURS)
"""A joint's colour is that of its disc and of the limb that ends there."""

LEAST_CHROMA = 96
"""Of 255: half of a limb's colour on black is seen, the grey where two colours were mixed is not."""

LEAST_JOINTS = 3
"""A drawing with fewer is no person: it has hardly a size."""

LEAST_PIXELS = 4
"""A limb with fewer is what mixing two others left."""

AREA_OF_BOX = 0.53
"""A person fills about so much of the box around it; a skeleton shows no area."""

# pycocotools' of the keypoint evaluation (Lin et al., ECCV 2014), fractions of the person's size. The neck is
# no keypoint of COCO: OKS leaves it out.
SIGMAS: dict[str, float] = {
    "nose": 0.026,
    "left_eye": 0.025,
    "right_eye": 0.025,
    "left_ear": 0.035,
    "right_ear": 0.035,
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
}


class Person(NamedTuple):
    """How well one person of a true picture was drawn."""

    joints: int
    """How many of them the truth shows."""
    pck_10: float
    pck_20: float
    oks: float


def compare(generated: np.ndarray, truth: np.ndarray, *, discs: bool) -> list[Person]:
    """Every person of a true picture against what was drawn there instead.

    A person is a connected drawing in which `LEAST_JOINTS` can be found: people who touch count as one, a
    drawing in two pieces as two. Of what was generated, each person gets what is nearer to it than to the
    others, and no farther off than a quarter of its box's longer side: all beyond is wrong at the fractions
    here, 0.1 and 0.2. Both pictures go through the same finder, so that the truth scores 1 against itself.

    Args:
        generated, truth: (H, W, 3) uint8.
        discs: see `has_discs`.
    """
    _, pieces = cv2.connectedComponents((coloured_parts(truth) >= 0).astype(np.uint8))
    people = []
    for piece in range(1, pieces.max() + 1):  # 0 is the background
        joints = find_joints(only(truth, pieces == piece), discs=discs)
        if len(joints) >= LEAST_JOINTS:
            people.append((joints, distance_to(pieces == piece)))
    compared = []
    for joints, off in people:
        width, height = box_size(joints)
        near = off <= max(width, height) / 4
        for _, other in people:
            near &= off <= other
        found = find_joints(only(generated, near), discs=discs)
        area = AREA_OF_BOX * (width + 1) * (height + 1)
        compared.append(
            Person(len(joints), pck(found, joints, 0.1), pck(found, joints, 0.2), oks(found, joints, area))
        )
    return compared


def pck(found: Joints, truth: Joints, fraction: float) -> float:
    """The share of the true joints that lie within `fraction` of the figure's size of where they should.

    The size is the longer side of the box around the true joints (Yang and Ramanan, TPAMI 2013). A joint that
    was not found is wrong; one that the truth does not show counts for nothing.

    Args:
        found, truth: name -> (x, y) in pixels; for keypoints of COCO, `annotate.coco_joints`.

    Raises:
        ValueError: no true joint.
    """
    reach = fraction * max(box_size(truth))
    return sum(math.dist(found[name], truth[name]) <= reach for name in truth if name in found) / len(truth)


def oks(found: Joints, truth: Joints, area: float) -> float:
    """Object keypoint similarity, 0..1: the mean over true joints of exp(-d² / (2 area (2 sigma)²)).

    That of COCO's evaluation for a person with labelled joints, over its 17. A joint that was not found
    counts 0; COCO's own files place every joint.

    Args:
        found, truth: name -> (x, y) in pixels.
        area: of the person, in square pixels, as COCO's annotation has it; a mask's rather than a box's.

    Raises:
        ValueError: no true joint of COCO's.
    """
    names = [name for name in COCO_KEYPOINTS if name in truth]
    if not names:
        raise ValueError("truth: no joint of COCO's; choices: " + ", ".join(COCO_KEYPOINTS))
    total = 0.0
    for name in names:
        if name in found:
            variance = (area + np.spacing(1)) * (2 * SIGMAS[name]) ** 2
            total += math.exp(-(math.dist(found[name], truth[name]) ** 2) / (2 * variance))
    return total / len(names)


def box_size(joints: Joints) -> tuple[float, float]:
    """(width, height) of the box around joints, in pixels.

    Raises:
        ValueError: no joint.
    """
    if not joints:
        raise ValueError("truth: no joint, must have at least 1")
    across, down = zip(*joints.values(), strict=True)
    return max(across) - min(across), max(down) - min(down)


def has_discs(truth: np.ndarray) -> bool:
    """Whether skeletons have discs at their joints: no limb has the neck's colour.

    Args:
        truth: (..., H, W, 3) uint8, true pictures: somewhere the colour must be exact.
    """
    return bool((truth == JOINT_COLOURS["neck"]).all(axis=-1).any())


def find_joints(picture: np.ndarray, *, discs: bool) -> Joints:
    """The joints of one skeleton as `annotate.skeletons` draws it: name -> (x, y) in pixels.

    A pixel belongs to the limb or disc whose hue it has. With discs a joint is where its colour is deepest;
    what is less than half as deep as the deepest of all is limb or rim, so that a radius of two pixels is the
    least. Without, a limb is a straight stroke between two joints; which end is which, the limbs that it
    meets say, and a limb alone has no joints. Of two discs of one colour the larger counts: show one person.

    Args:
        picture: (H, W, 3) uint8.
        discs: see `has_discs`.
    """
    parts = coloured_parts(picture)
    regions = {name: parts == place for place, name in enumerate(JOINTS)}
    return joints_of_discs(regions) if discs else joints_of_limbs(regions)


def coloured_parts(picture: np.ndarray) -> np.ndarray:
    """(H, W) int64: the place in `JOINTS` of the colour with the pixel's hue; -1 for grey and dark ones."""
    low, high = picture.min(axis=-1).astype(np.int64), picture.max(axis=-1).astype(np.int64)
    drawn = high - low >= LEAST_CHROMA
    # as bright and as saturated as the colours are: a mean with black keeps its hue
    pure = 255 * (picture[drawn] - low[drawn, None]) / (high - low)[drawn, None]
    colours = np.array([JOINT_COLOURS[name] for name in JOINTS])
    parts = np.full(drawn.shape, -1)
    parts[drawn] = ((pure[:, None] - colours) ** 2).sum(axis=-1).argmin(axis=-1)
    return parts


def joints_of_discs(regions: dict[str, np.ndarray]) -> Joints:
    """The middles of discs, one of each colour; those less than half as wide as the widest are specks."""
    depths = {name: depth(region) for name, region in regions.items() if region.any()}
    radius = max((float(inside.max()) for inside in depths.values()), default=0.0)
    joints = {}
    for name, inside in depths.items():
        if inside.max() >= radius / 2:
            rows, columns = np.nonzero(inside >= inside.max() - 0.5)
            joints[name] = (float(columns.mean()), float(rows.mean()))
    return joints


def joints_of_limbs(regions: dict[str, np.ndarray]) -> Joints:
    """The ends of strokes, one of each limb's colour, each way round as its neighbours ask for."""
    whole = {name: without_specks(region) for name, region in regions.items()}
    strokes = {name: ends_of(region) for name, region in whole.items() if region.sum() >= LEAST_PIXELS}
    limbs = [(start, end, strokes[end]) for start, end, _ in LIMBS if end in strokes]
    joints: dict[str, tuple[float, float]] = {}
    for start, end, ends in limbs:
        apart = [0.0, 0.0]  # for each way round, how far its ends are from those of the limbs that it meets
        for way, points in enumerate((ends, ends[::-1])):
            for joint, point in zip((start, end), points, strict=True):
                for other_start, other_end, tips in limbs:
                    if other_end != end and joint in (other_start, other_end):
                        apart[way] += min(math.dist(point, tip) for tip in tips)
        if any(apart):
            first, last = ends if apart[0] <= apart[1] else ends[::-1]
            # of the limbs that meet at a joint, the one drawn last lies on top and shows its end
            joints |= {start: first, end: last}
    return joints


def without_specks(region: np.ndarray) -> np.ndarray:
    """Its pieces of at least a quarter of the largest one: a limb may be cut by another that crosses it."""
    _, pieces = cv2.connectedComponents(region.astype(np.uint8))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # the background
    return np.asarray((sizes >= max(1, sizes.max() / 4))[pieces])


def ends_of(region: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """(x, y) of both ends of a stroke's middle line: half its thickness within the outline."""
    points = np.argwhere(region)[:, ::-1].astype(np.float64)
    middle = points.mean(axis=0)
    axis = np.linalg.eigh(np.cov(points.T))[1][:, -1]
    along = (points - middle) @ axis
    length = np.ptp(along) + 1
    inset = (len(points) / length - 1) / 2
    (x0, y0), (x1, y1) = (middle + place * axis for place in (along.min() + inset, along.max() - inset))
    return (float(x0), float(y0)), (float(x1), float(y1))


def only(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, black outside of the mask."""
    return np.where(mask[..., None], picture, np.uint8(0))


def depth(region: np.ndarray) -> np.ndarray:
    """(H, W): how far a pixel is from the nearest one outside, which all beyond the border is."""
    return distance_to(~np.pad(region, 1))[1:-1, 1:-1]


def distance_to(mask: np.ndarray) -> np.ndarray:
    """(H, W): from each pixel to the nearest of the mask, Euclidean; infinite without any."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
