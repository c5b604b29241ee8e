"""A photograph -> an (image, annotation) pair made of it alone: to be restored, or to find its edges in.

Pictures are (H, W, 3) uint8 RGB, 8 pixels or more a side. Lengths are relative to the shorter side; still,
degrade at the size that the model sees, for shrinking averages noise and thin streaks away. What is random is
drawn from the generator alone, and no input is changed.
"""

import inspect
import math
from collections.abc import Callable

import cv2
import numpy as np

from delvm.images.annotate import pixel

Range = tuple[float, float]
"""(lowest, highest) of what is drawn for each picture."""

Maker = Callable[..., tuple[np.ndarray, np.ndarray]]
"""(picture, rng, **ranges) -> (what the model sees, what it must answer); both as large as the picture."""


def rain(
    picture: np.ndarray,
    rng: np.random.Generator,
    *,
    streaks: Range = (14, 30),
    length: Range = (0.12, 0.34),
    opacity: Range = (0.45, 0.9),
    angle: Range = (-25.0, 25.0),
) -> np.ndarray:
    """The picture with streaks of rain of one direction; pixels without a streak keep their exact value.

    Args:
        picture: (H, W, 3) uint8.
        streaks: fewest and most streaks.
        length: of a streak, as a fraction of the shorter side.
        opacity: 0 leaves the picture, 1 covers it.
        angle: to the vertical, in degrees, of all streaks.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    thickness = max(1, round(side / 32))  # two pixels at 64, so that a streak lives through halving to 32
    slant = rng.uniform(*angle)
    alpha = np.zeros((height, width), np.uint8)
    count = int(rng.integers(int(streaks[0]), int(streaks[1]) + 1))
    # One draw for all streaks: a call of the generator costs more than the line.
    for x, y, reach, cover, wobble in rng.random((count, 5)):
        tilt = math.radians(slant + 6 * (wobble - 0.5))
        run = side * (length[0] + reach * (length[1] - length[0]))
        across, down = run * math.sin(tilt) / 2, run * math.cos(tilt) / 2
        start = (x * width - across, y * height - down)  # about the point: every edge gets as much rain
        end = (x * width + across, y * height + down)
        strength = 255 * (opacity[0] + cover * (opacity[1] - opacity[0]))
        cv2.line(alpha, pixel(start), pixel(end), strength, thickness, cv2.LINE_AA)
    light = np.float32(rng.uniform(205, 245))
    cover_hw1 = alpha[..., None].astype(np.float32) / 255
    return np.rint(picture + (light - picture) * cover_hw1).astype(np.uint8)


def motion_blur(picture: np.ndarray, rng: np.random.Generator, *, length: Range = (0.05, 0.12)) -> np.ndarray:
    """The picture smeared along a line of a random direction.

    Args:
        picture: (H, W, 3) uint8.
        length: of the line, as a fraction of the shorter side.
    """
    angle, reach = rng.uniform(0, math.pi), rng.uniform(*length) * min(picture.shape[:2])
    return convolve(picture, line_kernel(angle, reach))


def defocus(picture: np.ndarray, rng: np.random.Generator, *, radius: Range = (0.01, 0.03)) -> np.ndarray:
    """The picture out of focus: every point becomes a disc.

    Args:
        picture: (H, W, 3) uint8.
        radius: of the disc, as a fraction of the shorter side.
    """
    return convolve(picture, disc_kernel(rng.uniform(*radius) * min(picture.shape[:2])))


def blur(
    picture: np.ndarray,
    rng: np.random.Generator,
    *,
    length: Range = (0.05, 0.12),
    radius: Range = (0.01, 0.03),
) -> np.ndarray:
    """`motion_blur` by a length or `defocus` by a radius, each as often as the other."""
    if rng.random() < 0.5:
        return motion_blur(picture, rng, length=length)
    return defocus(picture, rng, radius=radius)


def line_kernel(angle: float, length: float) -> np.ndarray:
    """A line of `length` pixels through the middle, `angle` in radians, clockwise from the right."""
    x, y = offsets(length / 2)
    along = np.clip(x * math.cos(angle) + y * math.sin(angle), -length / 2, length / 2)
    return soft_kernel(np.hypot(x - along * math.cos(angle), y - along * math.sin(angle)))


def disc_kernel(radius: float) -> np.ndarray:
    """A disc of `radius` pixels."""
    return soft_kernel(np.hypot(*offsets(radius)) - radius)


def offsets(reach: float) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the pixels of an odd square, from its middle pixel; a shape of `reach` and its rim fit in."""
    half = math.ceil(reach) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float64)
    return x, y


def soft_kernel(distance: np.ndarray) -> np.ndarray:
    """1 inside a shape, falling to 0 at one pixel's distance from it, so that no size is lost; its sum 1."""
    kernel: np.ndarray = np.clip(1 - distance, 0, 1)
    return kernel / kernel.sum()


def convolve(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Every pixel becomes its neighbours' mean with the kernel's weights.

    Beyond its border the picture goes on as its reflection: no edge gets darker.
    """
    return np.asarray(cv2.filter2D(picture, -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def noise(picture: np.ndarray, rng: np.random.Generator, *, sigma: Range = (5.0, 50.0)) -> np.ndarray:
    """The picture with Gaussian noise of one random strength, each pixel and channel on its own.

    Args:
        picture: (H, W, 3) uint8.
        sigma: lowest and highest standard deviation, of 255.
    """
    spread = np.float32(rng.uniform(*sigma))
    return to_uint8(picture + spread * rng.standard_normal(picture.shape, np.float32))


def low_light(
    picture: np.ndarray,
    rng: np.random.Generator,
    *,
    gamma: Range = (1.5, 3.0),
    gain: Range = (0.3, 0.8),
    sigma: Range = (1.0, 5.0),
) -> np.ndarray:
    """The picture as taken in the dark: gain * picture ** gamma, and a little sensor noise on top.

    The curve is that of Lv et al. (IJCV 2021).

    Args:
        picture: (H, W, 3) uint8.
        gamma: 1 keeps the contrast; more darkens shadows first.
        gain: what is left of white.
        sigma: lowest and highest standard deviation of the noise, of 255.
    """
    scale, power = rng.uniform(*gain), rng.uniform(*gamma)
    curve = 255 * scale * (np.arange(256) / 255) ** power
    return noise(to_uint8(curve)[picture], rng, sigma=sigma)


def grey(picture: np.ndarray) -> np.ndarray:
    """0.2989 R + 0.5870 G + 0.1140 B (LVM's weights), rounded, in three equal channels."""
    # In whole numbers: no float to round differently on another machine.
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    value = (2989 * red + 5870 * green + 1140 * blue + 5000) // 10000
    return np.repeat(value[..., None].astype(np.uint8), 3, axis=-1)


def holes(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with black holes, by the rules of LVM (Bai et al., CVPR 2024).

    With probability 0.3 one square of 0.1 to 0.5 of the shorter side, anywhere inside the picture; else
    patches of a grid, 1/8 of the shorter side each (32 pixels at 256), removed at a rate drawn from 0 to 1.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    if rng.random() < 0.3:
        hole = max(1, round(side * rng.uniform(0.1, 0.5)))
        top, left = rng.integers(height - hole + 1), rng.integers(width - hole + 1)
        removed = np.zeros((height, width), bool)
        removed[top : top + hole, left : left + hole] = True
    else:
        patch = max(1, side // 8)
        rate = rng.random()
        grid = rng.random((math.ceil(height / patch), math.ceil(width / patch))) < rate
        removed = grid.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width]
    return np.where(removed[..., None], np.uint8(0), picture)


def edges(picture: np.ndarray) -> np.ndarray:
    """Edges by Canny (TPAMI 1986): one pixel wide, white on black, in three equal channels.

    The thresholds follow the picture: the upper one is the gradient that a tenth of its pixels exceed.
    """
    # Wider for larger pictures: about the same edges whatever the size.
    blurred = cv2.GaussianBlur(grey(picture)[..., 0], (0, 0), max(0.8, min(picture.shape[:2]) / 200))
    across, down = (cv2.Sobel(blurred, cv2.CV_16S, *order) for order in ((1, 0), (0, 1)))
    # 48: a step of 12 grey levels; less in a flat picture is noise.
    upper = max(48.0, float(np.percentile(np.hypot(across.astype(np.float32), down), 90)))
    found = cv2.Canny(across, down, 0.4 * upper, upper, L2gradient=True)
    return np.repeat(found[..., None], 3, axis=-1)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Rounded, and clipped to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def colourless(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`grey`; nothing is random."""
    return grey(picture)


RESTORED: dict[str, Callable[..., np.ndarray]] = {
    "rain": rain,
    "blur": blur,
    "noise": noise,
    "low_light": low_light,
    "colour": colourless,
    "inpainting": holes,
}
"""What a photograph is to be restored from."""


def restoration(degrade: Callable[..., np.ndarray]) -> Maker:
    """The image is the degraded picture, the annotation the picture itself."""

    def make(picture: np.ndarray, rng: np.random.Generator, **ranges: Range) -> tuple[np.ndarray, np.ndarray]:
        clean = np.ascontiguousarray(picture)
        return degrade(clean, rng, **ranges), clean

    return make


def edge_detection(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The image is the picture itself, the annotation its edges; nothing is random."""
    image = np.ascontiguousarray(picture)
    return image, edges(image)


MAKERS: dict[str, Maker] = {
    **{name: restoration(degrade) for name, degrade in RESTORED.items()},
    "edges": edge_detection,
}


def ranges_of(maker: str) -> dict[str, Range]:
    """The ranges that one of MAKERS draws from, with what they are unless given."""
    parameters = inspect.signature(RESTORED.get(maker, edge_detection)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
