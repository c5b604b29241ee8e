import io

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn

from delvm.images import duplicates
from delvm.images.duplicates import FLAT, near, thumbnail

NAMES = (
    "astronaut",
    "rocket",
    "chelsea",
    "coffee",
    "camera",
    "hubble_deep_field",
    "retina",
    "brick",
    "gravel",
)


def photograph(name: str) -> np.ndarray:
    picture = getattr(skimage.data, name)()
    return np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [photograph(name) for name in NAMES]


@pytest.fixture(scope="module")
def thumbnails(photographs: list[np.ndarray]) -> np.ndarray:
    return np.stack([thumbnail(picture) for picture in photographs])


def jpeg(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def half(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))


def brighter(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture.astype(int) + 30, 0, 255).astype(np.uint8)


def cropped(picture: np.ndarray) -> np.ndarray:
    """2 % of both sides, unevenly."""
    height, width = picture.shape[:2]
    return picture[round(0.005 * height) : round(0.985 * height), round(0.015 * width) : round(0.995 * width)]


def clouds(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 256) uint8: random smooth pictures of some contrast."""
    noise = rng.normal(size=(count, 16, 16))
    smooth = np.stack([cv2.GaussianBlur(one, (0, 0), 1.5) for one in noise]) if count else noise
    return np.clip(128 + 200 * smooth, 0, 255).astype(np.uint8).reshape(count, 256)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """What `near` promises, picture by picture in float64, from the gradients themselves."""

    def gradient(thumb: np.ndarray) -> np.ndarray:
        coefficients = dctn(thumb.reshape(16, 16).astype(np.float64))
        coefficients[8:] = 0
        coefficients[:, 8:] = 0
        smooth = idctn(coefficients)
        return np.concatenate([np.diff(smooth, axis=0).ravel(), np.diff(smooth, axis=1).ravel()])

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    mirrored = other.reshape(16, 16)[:, ::-1]
    return max(cosine(gradient(one), gradient(other)), cosine(gradient(one), gradient(mirrored)))


def test_thumbnail_is_the_mean_of_areas():
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:3, :5] = 200  # the first of 16 x 16 areas
    picture[3:6, 75:80:2] = 100  # three of its five columns
    expected = np.zeros((16, 16), np.uint8)
    expected[0, 0], expected[1, 15] = 200, 60
    small = thumbnail(picture)
    assert small.shape == (256,)
    assert small.dtype == np.uint8
    assert (small.reshape(16, 16) == expected).all()


def test_thumbnail_takes_sides_that_16_does_not_divide_and_smaller_pictures():
    ramp = np.broadcast_to(np.linspace(0, 255, 37)[None, :, None], (21, 37, 3)).astype(np.uint8)
    rows = thumbnail(ramp).reshape(16, 16)
    assert (rows == rows[0]).all()
    assert np.abs(rows[0] - np.linspace(4.5, 250.5, 16)).max() < 2
    assert (thumbnail(np.full((3, 1, 3), 77, np.uint8)) == 77).all()


def test_thumbnail_weighs_colours_as_grey_does():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[..., 0] = 255
    assert set(thumbnail(picture)) == {76}  # 0.299 of red (ITU-R BT.601)


@pytest.mark.parametrize(
    "guise",
    [
        jpeg,
        half,
        brighter,
        lambda picture: picture[:, ::-1],
        lambda picture: jpeg(half(brighter(picture[:, ::-1]))),
        lambda picture: cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA),
        lambda picture: cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    ],
    ids=["jpeg", "half", "brighter", "mirrored", "several", "aspect", "grey"],
)
def test_a_photograph_in_another_guise_is_found(guise, photographs, thumbnails):
    training = np.stack([thumbnail(guise(picture)) for picture in photographs])
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert near(training, thumbnails[order]).tolist() == np.argsort(order).tolist()


def test_a_slightly_cropped_photograph_is_found(photographs, thumbnails):
    natural = photographs[: NAMES.index("brick")]  # a wall of bricks repeats itself: a crop shifts them all
    training = np.stack([thumbnail(cropped(picture)) for picture in natural])
    assert near(training, thumbnails).tolist() == list(range(len(natural)))


def test_distinct_photographs_are_not(thumbnails):
    for index in range(len(NAMES)):
        others = np.delete(thumbnails, index, axis=0)
        assert near(thumbnails[index : index + 1], others).tolist() == [-1]


def test_upside_down_is_another_picture(photographs, thumbnails):
    upended = np.stack([thumbnail(picture[::-1]) for picture in photographs[:4]])
    assert near(upended, thumbnails).tolist() == [-1] * 4


def test_the_best_match_is_returned(photographs):
    picture = photographs[NAMES.index("coffee")]
    little, more = picture.copy(), picture.copy()
    little[100:120, 200:220] = 255
    more[100:140, 200:240] = 255
    held_out = np.stack([thumbnail(one) for one in (more, little, picture)])
    exact = thumbnail(picture)[None]
    assert near(exact, held_out[:1]).tolist() == [0]
    assert near(exact, held_out[:2]).tolist() == [1]
    assert near(exact, held_out).tolist() == [2]
    assert near(exact, held_out[::-1]).tolist() == [0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 12), m=st.integers(0, 6), rows=st.integers(1, 5))
def test_near_is_the_correlation_of_gradients_whatever_the_batch(seed, n, m, rows):
    rng = np.random.default_rng(seed)
    held_out = clouds(rng, m)
    training = clouds(rng, n)
    for row in range(0, n, 2):  # every other one: a held-out one, disturbed more or less, mirrored or not
        if m:
            source = held_out[rng.integers(m)].reshape(16, 16)[:, :: rng.choice([-1, 1])].reshape(-1)
            disturbed = source + rng.uniform(0, 1) * (clouds(rng, 1)[0] - 128.0)
            training[row] = np.clip(disturbed, 0, 255).astype(np.uint8)
    table = np.array([[correlation(one, other) for other in held_out] for one in training]).reshape(n, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BATCH_VALUES", rows * (m + 256))
        found = near(training, held_out, least=0.6)
    assert found.shape == (n,)
    assert found.dtype == np.int64
    for index, row in zip(found, table, strict=True):
        if index >= 0:
            assert row[index] >= max(0.6, row.max()) - 1e-5  # float32
        else:
            assert row.max(initial=-1) < 0.6 + 1e-5


def test_least_is_the_correlation_from_which_on_pictures_are_one(thumbnails):
    rng = np.random.default_rng(2)
    disturbed = np.clip(thumbnails + 0.4 * (clouds(rng, len(thumbnails)) - 128.0), 0, 255).astype(np.uint8)
    for one, other in zip(thumbnails, disturbed, strict=True):
        expected = correlation(one, other)
        assert 0.01 < expected < 0.999
        assert near(one[None], other[None], least=expected - 1e-4).tolist() == [0]
        assert near(one[None], other[None], least=expected + 1e-4).tolist() == [-1]


def test_pictures_are_one_from_a_correlation_of_nine_tenths_on(thumbnails):
    disturbance = clouds(np.random.default_rng(3), 1)[0] - 128.0
    outcomes = []
    for strength in np.linspace(0.1, 3, 30):
        other = np.clip(thumbnails[0] + strength * disturbance, 0, 255).astype(np.uint8)
        outcomes.append(near(other[None], thumbnails[:1])[0] == 0)
        assert outcomes[-1] == (correlation(other, thumbnails[0]) >= 0.9)
    assert 3 < sum(outcomes) < 27


@pytest.mark.parametrize("least", [0, 1, -0.5, 90])
def test_least_outside_its_range_is_refused(least, thumbnails):
    with pytest.raises(ValueError, match=rf"least: {least} is not above 0 and below 1"):
        near(thumbnails, thumbnails, least)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_flat_pictures_are_duplicates_of_the_same_bytes_alone(rows, thumbnails, monkeypatch):
    monkeypatch.setattr(duplicates, "BATCH_VALUES", rows * (4 + 256))
    black, almost, sky = (np.full(256, value, np.uint8) for value in (0, 1, 190))
    speck = black.copy()
    speck[7] = 3  # too little contrast to correlate
    held_out = np.stack([thumbnails[0], almost, black, speck])
    training = np.stack([black, sky, thumbnails[0], almost, speck, speck[::-1]])
    assert near(training, held_out).tolist() == [2, -1, 0, 1, 3, -1]


def test_contrast_above_flat_is_compared():
    ramp = np.tile(np.arange(16, dtype=np.uint8), (16, 1)).ravel()
    faint, weak = ramp // 6, ramp // 3
    assert faint.std() < FLAT < weak.std()
    for contrast, found in ((faint, -1), (weak, 0), (5 * ramp, 0)):
        assert near(contrast[None] + 100, contrast[None]).tolist() == [found]
    assert near(ramp[None] + 90, 5 * ramp[None]).tolist() == [0]


def test_nothing_on_either_side(thumbnails):
    nothing = np.empty((0, 256), np.uint8)
    assert near(thumbnails, nothing).tolist() == [-1] * len(thumbnails)
    assert near(nothing, thumbnails).shape == near(nothing, nothing).shape == (0,)


def test_training_may_be_a_memmap(tmp_path, thumbnails, monkeypatch):
    rng = np.random.default_rng(5)
    training = clouds(rng, 50)
    training[[0, 6, 7, 49]] = thumbnails[[2, 0, 1, 2]]
    np.save(tmp_path / "training.npy", training)
    monkeypatch.setattr(
        duplicates, "BATCH_VALUES", 7 * (len(thumbnails) + 256)
    )  # 7 rows: 7 whole batches, 1 row
    found = near(np.load(tmp_path / "training.npy", mmap_mode="r"), thumbnails)
    expected = np.full(50, -1)
    expected[[0, 6, 7, 49]] = [2, 0, 1, 2]
    assert found.tolist() == expected.tolist()
