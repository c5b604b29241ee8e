import math

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.images.degrade import (
    MAKERS,
    blur,
    defocus,
    disc_kernel,
    edges,
    grey,
    holes,
    line_kernel,
    low_light,
    motion_blur,
    noise,
    rain,
    ranges_of,
)

SHAPES = [(8, 8), (9, 40), (64, 48), (96, 131)]


def photograph(height: int, width: int) -> np.ndarray:
    """A window around the astronaut's face."""
    return np.array(skimage.data.astronaut()[40 : 40 + height, 160 : 160 + width])


def found(picture: np.ndarray) -> set[int]:
    return set(np.unique(picture).tolist())


def test_ranges_are_drawn_from():
    photo = np.full((64, 64, 3), 120, np.uint8)
    assert ranges_of("rain") == {
        "streaks": (14, 30), "length": (0.12, 0.34), "opacity": (0.45, 0.9), "angle": (-25.0, 25.0),
    }  # fmt: skip
    assert list(ranges_of("blur")) == ["length", "radius"]
    assert ranges_of("edges") == ranges_of("colour") == ranges_of("inpainting") == {}
    for name in MAKERS:  # the defaults given are the defaults
        usual = MAKERS[name](photo, np.random.default_rng(3))
        given = MAKERS[name](photo, np.random.default_rng(3), **ranges_of(name))
        assert all((one == two).all() for one, two in zip(usual, given, strict=True))
    # one level streak in the middle: wider than high; an upright one: higher than wide
    for degrees, wide in ((90.0, True), (0.0, False)):
        ranges = {
            "streaks": (1.0, 1.0),
            "length": (0.6, 0.6),
            "angle": (degrees, degrees),
            "opacity": (1.0, 1.0),
        }
        image, clean = MAKERS["rain"](photo, np.random.default_rng(1), **ranges)
        rows, columns = np.nonzero((image != clean).any(axis=-1))
        assert (np.ptp(columns) > np.ptp(rows)) == wide
    spread = [
        np.std(MAKERS["noise"](photo, np.random.default_rng(0), sigma=(s, s))[0].astype(float))
        for s in (2.0, 20.0)
    ]
    assert spread == pytest.approx([2.0, 20.0], rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_a_maker_depends_on_picture_and_generator_alone(name, shape):
    picture = photograph(*shape)
    before = picture.copy()
    pairs = [MAKERS[name](picture, np.random.default_rng(seed)) for seed in range(8)]
    for made in (made for pair in pairs for made in pair):
        assert made.shape == (*shape, 3)
        assert made.dtype == np.uint8
        assert made.flags.c_contiguous
    clean = 0 if name == "edges" else 1
    for seed, pair in enumerate(pairs):
        again = MAKERS[name](picture, np.random.default_rng(seed))
        # The same from a view that lies otherwise in memory.
        turned = MAKERS[name](np.asfortranarray(picture), np.random.default_rng(seed))
        for one, two, three in zip(pair, again, turned, strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(one, three)
            assert three.flags.c_contiguous
        np.testing.assert_array_equal(pair[clean], before)
        assert (picture == before).all()
    assert any((pair[1 - clean] != before).any() for pair in pairs)
    made = {pair[1 - clean].tobytes() for pair in pairs}
    assert len(made) == 1 if name in ("colour", "edges") else len(made) > 4


def test_rain_leaves_pixels_between_streaks_and_lightens_the_others():
    clean = np.full((64, 96, 3), 60, np.uint8)
    clean[:, 48:] = (200, 20, 90)
    before = clean.copy()
    rainy = rain(clean, np.random.default_rng(3))
    assert (clean == before).all()
    assert rainy.shape == clean.shape
    assert rainy.dtype == np.uint8
    wet = (rainy != clean).any(axis=-1)
    assert 0.05 < wet.mean() < 0.6
    assert (rainy[wet].astype(int) >= clean[wet]).all()  # the light is lighter than this picture
    assert (rainy != rain(clean, np.random.default_rng(4))).any()
    assert (rainy == rain(clean, np.random.default_rng(3))).all()


def test_rain_without_streaks_is_the_picture():
    clean = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert (rain(clean, np.random.default_rng(1), streaks=(0, 0)) == clean).all()


def test_kernels_have_the_values_of_their_shapes():
    line = np.zeros((7, 7))
    line[3, 1:6] = 1 / 5
    np.testing.assert_allclose(line_kernel(0, 4), line, atol=1e-12)
    np.testing.assert_allclose(line_kernel(math.pi / 2, 4), line.T, atol=1e-12)
    corner = 2 - math.sqrt(2)
    disc = np.zeros((5, 5))
    disc[1:4, 1:4] = [[corner, 1, corner], [1, 1, 1], [corner, 1, corner]]
    np.testing.assert_allclose(disc_kernel(1), disc / (5 + 4 * corner), atol=1e-12)
    assert disc_kernel(0).max() == line_kernel(1, 0).max() == 1
    diagonal = line_kernel(math.pi / 4, 8)  # down to the right
    assert diagonal[7, 7] > 0
    assert diagonal[3, 7] == 0


@settings(max_examples=40, deadline=None)
@given(angle=st.floats(0, math.pi), size=st.floats(0, 60))
def test_kernels_weigh_1_and_move_nothing(angle, size):
    for kernel in (line_kernel(angle, size), disc_kernel(size / 2)):
        assert kernel.shape[0] == kernel.shape[1]
        assert kernel.shape[0] % 2 == 1
        assert kernel.min() >= 0
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)  # the centre stays the centre
        # The shape fits in: its rim ends within the square.
        assert max(kernel[0].max(), kernel[-1].max(), kernel[:, 0].max(), kernel[:, -1].max()) < 1e-12


@pytest.mark.parametrize("degrade", [motion_blur, defocus, blur])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blurred_constant_stays_to_the_border(degrade, shape):
    picture = np.full((*shape, 3), (255, 17, 0), np.uint8)
    for seed in range(10):
        np.testing.assert_array_equal(degrade(picture, np.random.default_rng(seed)), picture)


def test_blurs_spread_a_point_as_far_as_they_say():
    point = np.zeros((100, 140, 3), np.uint8)
    point[50, 70] = 255
    for seed in range(20):
        spread = motion_blur(point, np.random.default_rng(seed), length=(0.2, 0.2)).any(axis=-1)
        y, x = np.argwhere(spread).T
        assert math.hypot(np.ptp(x), np.ptp(y)) == pytest.approx(20, abs=3)
        assert spread.sum() < 60  # thin
        spread = defocus(point, np.random.default_rng(seed), radius=(0.05, 0.05)).any(axis=-1)
        y, x = np.argwhere(spread).T
        assert 4 <= np.hypot(x - 70, y - 50).max() < 6
        assert (np.ptp(x), np.ptp(y)) == (10, 10)


def test_blur_is_of_either_kind():
    picture, kinds = photograph(48, 48), []
    for seed in range(12):
        blurred = blur(picture, np.random.default_rng(seed))
        matches = []
        for kind in (motion_blur, defocus):
            rng = np.random.default_rng(seed)
            rng.random()
            matches.append(bool((kind(picture, rng) == blurred).all()))
        assert sorted(matches) == [False, True]
        kinds.append(matches[0])
    assert 3 <= sum(kinds) <= 9


def test_noise_has_its_sigma_and_stays_in_range():
    middle = np.full((64, 64, 3), 128, np.uint8)
    noisy = noise(middle, np.random.default_rng(0), sigma=(10, 10)).astype(float) - 128
    assert noisy.std() == pytest.approx(10, rel=0.03)
    assert noisy.mean() == pytest.approx(0, abs=0.4)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.06
    spreads = [noise(middle, np.random.default_rng(seed)).std() for seed in range(30)]
    assert 4.5 < min(spreads) < 15
    assert 35 < max(spreads) < 52
    black = noise(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0), sigma=(10, 10))
    assert (black == 0).mean() == pytest.approx(0.52, abs=0.03)  # clipped, not wrapped round
    assert black.max() < 60
    np.testing.assert_array_equal(noise(middle, np.random.default_rng(0), sigma=(0, 0)), middle)


def test_low_light_is_gain_times_a_power():
    picture = np.array([[[0, 128, 200]]], np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    dark = low_light(picture, np.random.default_rng(0), gamma=(2, 2), gain=(0.5, 0.5), sigma=(0, 0))
    assert (dark == (0, 32, 78)).all()
    bright = np.full((64, 64, 3), 200, np.uint8)
    for seed in range(10):
        taken = low_light(bright, np.random.default_rng(seed))
        assert 0.3 * 255 * (200 / 255) ** 3 - 1 < taken.mean() < 0.8 * 255 * (200 / 255) ** 1.5 + 1
        assert 0.9 < taken.std() < 5.2


def test_grey_has_the_weights_of_lvm():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (10, 20, 30)]
    picture = np.array([colours], np.uint8)
    assert grey(picture).tolist() == [[[value] * 3 for value in (76, 150, 29, 255, 0, 18)]]


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (50, 37)])
def test_holes_are_one_square_or_patches_of_a_grid(shape):
    picture = np.maximum(photograph(*shape), 1)
    side, num_squares, shares = min(shape), 0, []
    patch = side // 8
    for seed in range(300):
        image = holes(picture, np.random.default_rng(seed))
        removed = (image == 0).any(axis=-1)
        assert (image[~removed] == picture[~removed]).all()
        assert (image[removed] == 0).all()
        cells = removed[::patch, ::patch].repeat(patch, axis=0).repeat(patch, axis=1)
        if (removed == cells[: shape[0], : shape[1]]).all():
            shares.append(removed.mean())
            continue
        num_squares += 1
        y, x = np.argwhere(removed).T
        hole = int(np.ptp(y)) + 1
        assert hole == np.ptp(x) + 1
        assert removed.sum() == hole**2
        assert round(0.1 * side) <= hole <= round(0.5 * side)
    assert 65 < num_squares < 115
    # The rate is uniform, one a picture: were it fixed, shares would lie close together.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.std(shares) == pytest.approx(1 / math.sqrt(12), abs=0.06)


def test_patches_are_32_pixels_at_256():
    image = holes(np.full((256, 256, 3), 9, np.uint8), np.random.default_rng(0))[..., 0]
    cells = image.reshape(8, 32, 8, 32)
    assert (cells == cells[:, :1, :, :1]).all()
    assert len(np.unique(cells[:, 0, :, 0])) == 2


def test_edges_are_a_line_along_a_step_and_nothing_elsewhere():
    picture = np.full((32, 48, 3), (60, 80, 70), np.uint8)
    assert not edges(picture).any()
    picture[:, 20:] = (160, 150, 170)
    drawn = edges(picture)
    assert found(drawn) == {0, 255}
    columns = np.flatnonzero(drawn.any(axis=(0, 2)))
    assert len(columns) == 1
    assert columns[0] in (19, 20)
    assert (drawn[:, columns[0]] == 255).all()
    np.testing.assert_array_equal(edges(picture.transpose(1, 0, 2).copy()), drawn.transpose(1, 0, 2))


def test_edges_ignore_faint_noise():
    picture = noise(np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0), sigma=(2, 2))
    assert not edges(picture).any()


@pytest.mark.parametrize("side", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_edges_are_neither_empty_nor_full_at_any_size(name, side):
    picture = cv2.resize(getattr(skimage.data, name)(), (side, side), interpolation=cv2.INTER_AREA)
    drawn = edges(picture)
    assert found(drawn) == {0, 255}
    assert (drawn == drawn[..., :1]).all()
    assert 0.015 < (drawn > 0).mean() < 0.25
