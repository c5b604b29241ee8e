"""A sample -> one view of it: geometry shared by its pictures, colour where the annotations stay true.

Pictures are (H, W, 3) uint8 RGB. No policy shows a border: a tilted pair is cropped to what lies inside,
so that no black corner, and no reflected limb of the wrong side, enters a view.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
import albumentations as A

Colour = tuple[int, int, int]
ColourPairs = tuple[tuple[Colour, Colour], ...]

# (left, right) limbs in OpenPose's colours: what `annotate.MIRRORED_COLOURS` has (a test compares the two).
OPENPOSE_COLOURS: ColourPairs = (
    ((255, 85, 0), (255, 0, 0)),
    ((170, 255, 0), (255, 170, 0)),
    ((85, 255, 0), (255, 255, 0)),
    ((0, 255, 255), (0, 255, 0)),
    ((0, 170, 255), (0, 255, 85)),
    ((0, 85, 255), (0, 255, 170)),
    ((255, 0, 255), (85, 0, 255)),
    ((255, 0, 170), (170, 0, 255)),
)


def swap_colours(picture: np.ndarray, pairs: ColourPairs) -> np.ndarray:
    """The picture with the two colours of every pair exchanged; only exact matches change, black never."""
    swapped = picture.reshape(-1, 3).copy()
    drawn = np.flatnonzero(swapped.any(axis=1))  # a skeleton is mostly black: look at the rest alone
    red, green, blue = swapped[drawn].astype(np.int32).T
    packed = red * 65536 + green * 256 + blue
    for left, right in pairs:
        for old, new in ((left, right), (right, left)):
            swapped[drawn[packed == old[0] * 65536 + old[1] * 256 + old[2]]] = new
    return swapped.reshape(picture.shape)


class MirrorPerson(A.HorizontalFlip):
    """A horizontal flip after which left limbs have the colours of left limbs again."""

    def __init__(self, pairs: ColourPairs, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.pairs = pairs

    def apply_to_mask(self, mask: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        return np.ascontiguousarray(swap_colours(mask, self.pairs)[:, ::-1])


def shrink(size: int, nearest: bool) -> A.SmallestMaxSize:
    """The shorter side becomes `size`."""
    return A.SmallestMaxSize(size, **resampling(nearest))


def resampling(nearest: bool) -> dict[str, Any]:
    """Area averages where a picture gets smaller; the nearest pixel for a mask of labels."""
    return {
        "interpolation": cv2.INTER_LINEAR,
        # The exact kind: plain INTER_NEAREST takes a block's first pixel, and so shifts the mask.
        "mask_interpolation": cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_LINEAR,
        "area_for_downscale": "image" if nearest else "image_mask",
    }


def tilt(degrees: float, nearest: bool) -> A.Rotate:
    """A small rotation, cropped to the largest upright rectangle without a border."""
    return A.Rotate(
        (-degrees, degrees),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR,
        border_mode=cv2.BORDER_REFLECT_101,  # crop_border rounds: a sub-pixel of border may be left
        crop_border=True,
        p=0.7,
    )


def crop(size: int, smallest: float, nearest: bool) -> A.RandomResizedCrop:
    """A random window of `smallest` to all of the area, stretched by up to 4:3, to (size, size)."""
    return A.RandomResizedCrop((size, size), scale=(smallest, 1.0), **resampling(nearest))


def image_colour() -> list[A.BasicTransform]:
    """Light and colour of the image alone."""
    return [
        A.ColorJitter((0.7, 1.3), (0.7, 1.3), saturation=(0.5, 1.5), hue=(-0.15, 0.15), p=0.8),
        A.ChannelShuffle(p=0.2),
    ]


def joint_colour() -> list[A.BasicTransform]:
    """One map from colour to colour for both pictures (not ColorJitter: it looks at a picture's mean)."""
    return [
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.25, p=0.7),
        A.HueSaturationValue(hue_shift_limit=25, sat_shift_limit=40, val_shift_limit=0, p=0.6),
        A.RandomGamma(gamma_limit=(70, 140), p=0.5),
        A.ChannelShuffle(p=0.15),
    ]


Transforms = list[A.BasicTransform]


def none(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """The pair itself: shorter side to `size`, centre crop."""
    return [shrink(size, nearest), A.CenterCrop(size, size)]


def crops(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """For photographs with any annotation: random crops, left-right flips."""
    return [A.HorizontalFlip(), crop(size, 0.3, nearest)]


def geometric(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """`crops`, tilted by up to 15 degrees."""
    return [A.HorizontalFlip(), tilt(15, nearest), crop(size, 0.4, nearest)]


def segmentation(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """`geometric`, with other light and colours in the image alone."""
    return [A.HorizontalFlip(), tilt(15, nearest), crop(size, 0.5, nearest), *image_colour()]


def restoration(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """For an annotation that is the clean image: all flips, crops, the same change of light in both."""
    flips = [A.HorizontalFlip(), A.VerticalFlip()]
    return [*flips, tilt(10, nearest), crop(size, 0.35, nearest), *joint_colour()]


def pose(size: int, nearest: bool, pairs: ColourPairs) -> Transforms:
    """For skeletons: flips that exchange left and right colours, tilts, crops, colours of the image alone."""
    return [MirrorPerson(pairs), tilt(15, nearest), crop(size, 0.65, nearest), *image_colour()]


POLICIES: dict[str, Callable[[int, bool, ColourPairs], Transforms]] = {
    "none": none,
    "crops": crops,
    "geometric": geometric,
    "segmentation": segmentation,
    "restoration": restoration,
    "pose": pose,
}
JOINT_COLOUR = ("restoration",)
"""Policies that treat the annotation as a second image."""


@functools.cache
def compose(
    policy: str, size: int, nearest: bool, large: bool, pairs: ColourPairs, annotations: tuple[bool, ...]
) -> A.Compose:
    """A policy's transforms, built once. `large`: first shrink the shorter side to four times `size`."""
    transforms = POLICIES[policy](size, nearest, pairs)
    if large:
        # After the flip (a skeleton's colours must still be exact there), before the costly warps.
        transforms.insert(1, shrink(4 * size, nearest))
    kind = "image" if policy in JOINT_COLOUR else "mask"
    targets = {f"picture{place}": kind if drawn else "image" for place, drawn in enumerate(annotations)}
    # No check of shapes in every call: `view` makes it.
    return A.Compose(transforms, additional_targets=targets, is_check_shapes=False)


def view(
    sample: Sequence[np.ndarray],
    annotations: Sequence[bool],
    *,
    policy: str,
    size: int,
    nearest: bool,
    seed: Sequence[int],
    mirrored_colours: ColourPairs = OPENPOSE_COLOURS,
) -> list[np.ndarray]:
    """One view of a sample: the same for the same arguments, whatever was called before.

    All pictures move together, and all images of a sample (the frames of a clip) get the same colours. Not to
    be called by several threads of one process: they would share the random state.

    Args:
        sample: pictures (H, W, 3) uint8, all of one size; the first is an image.
        annotations: which of them are annotations.
        policy: a name from `POLICIES`; `none` is the sample itself, scaled and cropped to its centre.
        size: side of the view, in pixels.
        nearest: the annotations' colours are labels: they are resampled to the nearest pixel and no new
            colour comes in. Otherwise they are averaged like the images.
        seed: non-negative integers, e.g. (seed, sample, view).
        mirrored_colours: (left, right) RGB that `pose` exchanges when it flips; other policies ignore it.
            Only exact matches are exchanged: keep skeletons without anti-aliasing, in a lossless format.

    Returns:
        As many pictures, each (size, size, 3) uint8.

    Raises:
        ValueError: an unknown policy; pictures of different shapes; `restoration` with `nearest`.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: '{policy}' is unknown; choices: {', '.join(POLICIES)}")
    shapes = {picture.shape for picture in sample}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[2] != 3:
        raise ValueError(f"pictures {[picture.shape for picture in sample]}: all must be one (H, W, 3)")
    if nearest and policy in JOINT_COLOUR:
        choices = ", ".join(name for name in POLICIES if name not in JOINT_COLOUR)
        raise ValueError(f"policy: '{policy}' changes labels' colours, not for nearest; choices: {choices}")
    large = policy != "none" and min(shape[:2]) > 4 * size
    composed = compose(policy, size, nearest, large, tuple(mirrored_colours), tuple(annotations))
    # Compose.set_random_seed gives every transform the same numbers: flips and colours would come in step.
    seeds = np.random.SeedSequence(list(seed)).generate_state(len(composed.transforms))
    for transform, number in zip(composed.transforms, seeds.tolist(), strict=True):
        transform.set_random_seed(number)
    # albumentations wants one picture by the name `image`: the first, which stands in no other place
    others = {f"picture{place}": picture for place, picture in enumerate(sample) if place}
    out = composed(image=sample[0], **others)
    return [out["image"], *(out[name] for name in others)]
