import numpy as np
import pytest

from delvm.images.annotate import LIMBS, MIRRORED_COLOURS, rain, skeleton


def test_colours_of_limbs_are_distinct_and_mirror_in_pairs():
    colours = {colour for _, _, colour in LIMBS}
    assert len(colours) == len(LIMBS) == 17
    assert ((255, 85, 0), (255, 0, 0)) in MIRRORED_COLOURS  # left and right shoulder
    assert ((0, 85, 255), (0, 255, 170)) in MIRRORED_COLOURS  # left and right shin
    paired = [colour for pair in MIRRORED_COLOURS for colour in pair]
    assert len(paired) == len(set(paired)) == 16
    assert colours - set(paired) == {(0, 0, 255)}  # neck to nose has no other side


def test_skeleton_draws_the_limbs_whose_joints_are_there():
    joints = {
        "neck": (10.0, 5.0),
        "nose": (10.0, 2.0),
        "left_shoulder": (16.4, 5.0),
        "right_hip": (8.0, 20.0),
    }
    picture = skeleton(joints, (24, 32), thickness=1)
    assert picture.shape == (24, 32, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[5, 14]) == (255, 85, 0)
    assert tuple(picture[5, 16]) == (255, 85, 0)
    assert tuple(picture[5, 17]) == (0, 0, 0)
    assert tuple(picture[3, 10]) == (0, 0, 255)
    found = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert found == {(0, 0, 0), (255, 85, 0), (0, 0, 255), (0, 255, 0)}


def test_skeleton_refuses_an_unknown_joint():
    with pytest.raises(ValueError, match=r"'tail' is unknown; choices: .*left_ankle.*neck"):
        skeleton({"tail": (0.0, 0.0)}, (8, 8), 1)


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
