"""Thumbnails of photographs -> which training pictures are held-out ones in another guise.

Two pictures are compared by their gradients, over the lowest frequencies of a 16 x 16 grey thumbnail. In the
cosine basis, that of the perceptual hash (Zauner 2010), this is a matrix product: each frequency is weighted
by the length of its gradient, and mirroring only turns the sign of the odd horizontal frequencies.

Measured, where a correlation of 0.9 makes two pictures one (percentages rounded down):

- Distinct photographs: none of 10,000 CIFAR-10 pictures is dropped for one of 2,000 others (highest
  correlation 0.881; a selection cleaned of duplicates by plain grey, and of plain skies with them), none of
  700 of BSDS500 and ImageNet for another one of them (0.821), none of their upper thirds or quarters, skies
  often, for another (0.894). The correlation of plain grey would drop 17 of the 10,000.
- The same photograph, found in BSDS500 and ImageNet / in CIFAR-10 at 32 x 32: mirrored, grey, half the size,
  JPEG at quality 30, 30 levels brighter, gamma 0.6 or 1.6: all. 1.3 times brighter with clipped highlights:
  99 % / 99 %. Mirrored, half the size and JPEG at once: 100 % / 99 %. Cropped by 2 % of both sides:
  99 % / 96 %; by 4 %: 92 % / 96 %.
- Mostly missed: cropped by 8 % (23 % / 7 % found), cut to a square (9 % in BSDS500 and ImageNet), drawn rain
  (55 % / 36 %; compare the clean picture instead), a crop of regular texture.
"""

import cv2
import numpy as np

SIDE = 16  # of a thumbnail, in pixels
FREQUENCIES = 8  # kept along each axis: crops of a few per cent change the higher ones too much
LEAST_CORRELATION = 0.9
FLAT = 1.0  # standard deviation in grey levels; below it, what is compared is the rounding to whole levels
BATCH_VALUES = 2**22  # float32: 16 MiB


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """(256,) uint8: the whole picture as 16 x 16 grey, row by row, averaged over areas; its aspect is lost.

    Args:
        picture: (H, W, 3) uint8 RGB.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).reshape(-1)


def near(training: np.ndarray, held_out: np.ndarray, least: float = LEAST_CORRELATION) -> np.ndarray:
    """(n,) int64: for each training thumbnail the index of the held-out one that it nearly duplicates, or -1.

    The best match counts, upright or mirrored left-right. A flat thumbnail (`FLAT`) has nothing to correlate
    and duplicates only one of the same bytes: two black pictures are one, black and nearly black are not.
    Every pair is compared, in batches: beside the result, memory depends on `held_out` alone.

    Args:
        training: (n, 256) uint8 of `thumbnail`; may be a memmap.
        held_out: (m, 256) uint8 of `thumbnail`.
        least: a duplicate's correlation, above 0 and below 1.

    Raises:
        ValueError: `least` is outside its range.
    """
    if not 0 < least < 1:
        raise ValueError(f"least: {least} is not above 0 and below 1")
    found = np.full(len(training), -1, np.int64)
    if len(held_out) == 0:
        return found
    even_mf, odd_mf, flat_m = gradients(held_out)
    flat_ones = {held_out[index].tobytes(): index for index in np.flatnonzero(flat_m)}
    rows = max(1, BATCH_VALUES // (len(held_out) + SIDE * SIDE))  # a row's scores and its thumbnail
    for start in range(0, len(training), rows):
        batch = np.asarray(training[start : start + rows])
        even_bf, odd_bf, flat_b = gradients(batch)
        scores_bm = odd_bf @ odd_mf.T
        np.abs(scores_bm, out=scores_bm)  # the better of upright (+) and mirrored (-)
        scores_bm += even_bf @ even_mf.T
        best = scores_bm.argmax(axis=1)
        found[start : start + rows] = np.where(scores_bm.max(axis=1) >= least, best, -1)
        for row in np.flatnonzero(flat_b):
            found[start + row] = flat_ones.get(batch[row].tobytes(), -1)
    return found


def gradients(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients' even and odd horizontal frequencies, (n, 32) float32 each; what is flat, (n,) bool.

    Both halves together have length 1, or 0 where the thumbnail is flat. Their inner product is that of the
    pictures' gradients, the differences of neighbouring pixels: the cosines are eigenvectors of the grid's
    Laplacian.
    """
    frequency = np.arange(FREQUENCIES)
    cosines = np.cos(np.pi / SIDE * frequency[:, None] * (np.arange(SIDE) + 0.5)) * np.sqrt(2 / SIDE)
    cosines[0] *= np.sqrt(0.5)  # orthonormal
    cosines = cosines.astype(np.float32)
    laplacian = 2 - 2 * np.cos(np.pi / SIDE * frequency)
    weights = np.sqrt(laplacian[:, None] + laplacian).astype(np.float32)

    coefficients = cosines @ thumbnails.reshape(-1, SIDE, SIDE).astype(np.float32) @ cosines.T
    coefficients[:, 0, 0] = 0  # the mean grey has no gradient
    flat = np.linalg.norm(coefficients, axis=(1, 2)) < FLAT * SIDE
    coefficients[flat] = 0
    coefficients *= weights
    length = np.linalg.norm(coefficients, axis=(1, 2), keepdims=True)
    coefficients /= np.where(length > 0, length, 1)
    even, odd = coefficients[:, :, ::2], coefficients[:, :, 1::2]
    return even.reshape(len(even), -1), odd.reshape(len(odd), -1), flat
