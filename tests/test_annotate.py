import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.images.annotate import (
    COCO_KEYPOINTS,
    JOINT_COLOURS,
    LIMBS,
    MIRRORED_COLOURS,
    coco_joints,
    distinct_colours,
    paint_boxes,
    paint_masks,
    skeleton,
    skeletons,
)
from delvm.images.augment import swap_colours

# The person faces the viewer; every limb is level, upright or diagonal: drawn alike in both directions.
BODY = {
    "nose": (0, -12),
    "neck": (0, 0),
    "right_eye": (-9, -21),
    "right_ear": (-16, -21),
    "right_shoulder": (-15, 0),
    "right_elbow": (-26, 11),
    "right_wrist": (-26, -2),
    "right_hip": (-14, 14),
    "right_knee": (-14, 28),
    "right_ankle": (-20, 34),
    "left_eye": (9, -21),
    "left_ear": (9, -28),
    "left_shoulder": (15, 0),
    "left_elbow": (15, 12),
    "left_wrist": (24, 21),
    "left_hip": (18, 18),
    "left_knee": (24, 24),
    "left_ankle": (24, 36),
}


def other_side(name: str) -> str:
    side, _, part = name.partition("_")
    return {"left": "right_", "right": "left_"}.get(side, side) + part


def found_colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


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


def test_joint_colours_are_distinct_and_mirror_by_the_pairs_of_limbs():
    assert set(JOINT_COLOURS) == {*COCO_KEYPOINTS, "neck"} == set(BODY)
    assert len(set(JOINT_COLOURS.values())) == 18
    swap = {left: right for left, right in MIRRORED_COLOURS}
    swap |= {right: left for left, right in MIRRORED_COLOURS}
    for name, colour in JOINT_COLOURS.items():
        assert swap.get(colour, colour) == JOINT_COLOURS[other_side(name)], name
    assert JOINT_COLOURS["left_ankle"] == (0, 85, 255)  # as the left shin
    assert JOINT_COLOURS["neck"] == (255, 0, 85)


@pytest.mark.parametrize(("thickness", "radius"), [(1, 1), (1, 2), (2, 3), (3, 3), (4, 5)])
@pytest.mark.parametrize("width", [96, 97])
def test_a_flip_with_exchanged_colours_is_the_skeleton_of_the_mirrored_person(width, thickness, radius):
    joints = {name: (width // 3 + 12 + x, 40 + y) for name, (x, y) in BODY.items()}
    mirrored = {other_side(name): (width - 1 - x, y) for name, (x, y) in joints.items()}
    picture = skeletons([joints], (80, width), thickness, radius)
    expected = skeletons([mirrored], (80, width), thickness, radius)
    flipped = picture[:, ::-1]
    assert (flipped != expected).any()
    assert found_colours(picture) == {(0, 0, 0), *JOINT_COLOURS.values()}
    np.testing.assert_array_equal(
        swap_colours(np.ascontiguousarray(flipped), tuple(MIRRORED_COLOURS)), expected
    )


def test_discs_lie_over_limbs_and_have_their_radius():
    joints = {"right_shoulder": (10.0, 20.0), "right_elbow": (40.2, 20.0), "left_ear": (25.0, 8.0)}
    picture = skeletons([joints], (40, 64), thickness=3, radius=5)
    for name, (x, y) in ((name, (round(x), round(y))) for name, (x, y) in joints.items()):
        disc = (picture == JOINT_COLOURS[name]).all(axis=-1)
        for dx, dy in ((5, 0), (-5, 0), (0, 5), (0, -5), (3, 3), (0, 0)):
            assert disc[y + dy, x + dx], name
        assert not disc[y + 6, x]
        assert not disc[y - 6, x]
    # A limb ends in a disc of its own colour; at its start the other joint's disc lies over it.
    assert tuple(picture[20, 15]) == JOINT_COLOURS["right_shoulder"] == (255, 0, 0)
    assert tuple(picture[20, 16]) == (255, 170, 0)


def test_people_lie_over_those_before_them_and_without_discs_are_skeletons():
    first = {name: (30 + x, 40 + y) for name, (x, y) in BODY.items()}
    second = {name: (x + 9, y) for name, (x, y) in first.items()}
    for thickness in (1, 4):
        one, two = (skeleton(joints, (80, 72), thickness) for joints in (first, second))
        np.testing.assert_array_equal(skeletons([first], (80, 72), thickness, radius=0), one)
        both = skeletons([first, second], (80, 72), thickness, radius=0)
        np.testing.assert_array_equal(both, np.where(two.any(axis=-1, keepdims=True), two, one))
    assert not skeletons([], (8, 9), 1, 3).any()
    with pytest.raises(ValueError, match=r"'tail' is unknown; choices: left_ankle, .*, right_wrist$"):
        skeletons([first, {"tail": (0.0, 0.0)}], (8, 8), 1, 1)


def test_coco_joints_names_the_labelled_ones_and_adds_the_neck():
    keypoints = [float(number) for i in range(17) for number in (10 * i, 10 * i + 1, 2)]
    joints = coco_joints(keypoints)
    assert len(joints) == 18
    assert joints["nose"] == (0, 1)
    assert joints["left_eye"] == (10, 11)
    assert joints["right_ear"] == (40, 41)
    assert joints["left_shoulder"] == (50, 51)
    assert joints["right_wrist"] == (100, 101)
    assert joints["left_hip"] == (110, 111)
    assert joints["right_ankle"] == (160, 161)
    assert joints["neck"] == (55, 56)
    keypoints[3 * 5 + 2] = 1  # a hidden shoulder counts
    assert coco_joints(keypoints) == joints
    keypoints[3 * 5 + 2] = 0
    missing = coco_joints(keypoints)
    assert set(joints) - set(missing) == {"left_shoulder", "neck"}
    assert coco_joints([0] * 51) == {}


@pytest.mark.parametrize("keypoints", [[1.0] * 50, [1.0] * 52, [], [math.nan] + [1.0] * 50])
def test_coco_joints_refuses_what_is_not_51_numbers(keypoints):
    with pytest.raises(ValueError, match=f"keypoints: {len(keypoints)} numbers, must be 51 finite ones"):
        coco_joints(keypoints)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(0, 12))
def test_paint_masks_is_painting_from_the_largest_to_the_smallest(seed, num):
    rng = np.random.default_rng(seed)
    masks = list(rng.random((num, 5, 7)) < rng.choice([0.1, 0.5, 0.9], (num, 1, 1)))
    colours = distinct_colours(num, rng)
    expected = np.zeros((5, 7, 3), np.uint8)
    for i in sorted(range(num), key=lambda i: -int(masks[i].sum())):
        expected[masks[i]] = colours[i]
    before = [mask.copy() for mask in masks]
    np.testing.assert_array_equal(paint_masks(iter(masks), (5, 7), colours), expected)
    assert all((mask == copy).all() for mask, copy in zip(masks, before, strict=True))


def test_paint_masks_refuses_a_mask_that_does_not_fit():
    full = np.ones((4, 6), bool)
    assert (paint_masks([full], (4, 6), [(1, 2, 3)]) == (1, 2, 3)).all()
    with pytest.raises(ValueError, match=r"mask 1: bool \(6, 4\), must be bool \(4, 6\)"):
        paint_masks([full, full.T], (4, 6), [(1, 2, 3)] * 2)
    with pytest.raises(ValueError, match=r"mask 0: uint8 \(4, 6\), must be bool"):
        paint_masks([full.astype(np.uint8)], (4, 6), [(1, 2, 3)])
    with pytest.raises(ValueError, match="shorter"):
        paint_masks([full, full], (4, 6), [(1, 2, 3)])


@pytest.mark.parametrize(("num", "least"), [(1, 255), (7, 255), (8, 63), (124, 63), (335, 42), (504, 36)])
def test_distinct_colours_keep_their_distance(num, least):
    colours = distinct_colours(num, np.random.default_rng(num))
    assert len(colours) == num
    assert colours == distinct_colours(num, np.random.default_rng(num))
    assert num == 1 or colours != distinct_colours(num, np.random.default_rng(num + 1))
    table = np.array(colours)
    assert table.min() >= 0
    assert table.max() <= 255
    assert table.max(axis=1).min() >= 64
    apart = np.abs(table[:, None] - table).max(axis=-1) + 255 * np.eye(num, dtype=int)
    assert apart.min() >= least
    assert distinct_colours(0, np.random.default_rng(0)) == []


def test_paint_boxes_outlines_the_box_to_the_pixel():
    red = (255, 0, 0)
    picture = paint_boxes([(3.2, 1.8, 6.0, 5.0, red)], (10, 12), thickness=2)
    expected = np.zeros((10, 12, 3), np.uint8)
    expected[2:7, 3:9] = red
    expected[4:5, 5:7] = 0
    np.testing.assert_array_equal(picture, expected)


def test_paint_boxes_draws_smaller_over_larger_and_cuts_at_the_border():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    small, large = (2, 2, 4, 3, green), (0, 2, 10, 6, red)
    for boxes in ([small, large], [large, small]):
        picture = paint_boxes(boxes, (8, 10), thickness=1)
        assert picture[2, :].tolist() == [list(red)] * 2 + [list(green)] * 4 + [list(red)] * 4
    same = paint_boxes([(1, 1, 4, 4, red), (1, 1, 4, 4, blue)], (8, 10), thickness=1)
    assert found_colours(same) == {(0, 0, 0), blue}
    cut = paint_boxes([(-4, -4, 8, 7, red)], (8, 10), thickness=1)
    assert (cut[:3, :4].any(axis=-1) == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]).all()
    assert cut.any(axis=-1).sum() == 10
    for outside in ((-9, 2, 4, 4, red), (2, -9, 4, 4, red), (15, 2, 4, 4, red), (2, 15, 4, 4, red)):
        assert not paint_boxes([outside], (8, 10), thickness=2).any()
    speck = paint_boxes([(4.1, 3.1, 0.2, 0.2, red)], (8, 10), thickness=3)
    assert np.argwhere(speck.any(axis=-1)).tolist() == [[3, 4]]
