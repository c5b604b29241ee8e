import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval

from delvm.evaluate.pose import SIGMAS, compare, distance_to, find_joints, has_discs, oks, pck
from delvm.images.annotate import COCO_KEYPOINTS, JOINT_COLOURS, coco_joints, skeleton, skeletons
from delvm.images.scenes import stand

SQUARE = {"nose": (0.0, 0.0), "neck": (40.0, 0.0), "left_hip": (40.0, 20.0), "right_hip": (0.0, 20.0)}


def person(seed: int, side: int) -> dict[str, tuple[float, float]]:
    return stand(np.random.default_rng(seed), side)


def moved(joints, across: float, down: float) -> dict[str, tuple[float, float]]:
    return {name: (x + across, y + down) for name, (x, y) in joints.items()}


def farthest(found, joints) -> float:
    assert set(found) == set(joints)
    return max(math.dist(found[name], joints[name]) for name in joints)


def test_pck_counts_joints_within_a_fraction_of_the_longer_side():
    found = {"nose": (4.0, 0.0), "neck": (40.0, -4.1), "left_hip": (48.0, 20.0), "left_ear": (0.0, 0.0)}
    assert pck(found, SQUARE, 0.1) == 1 / 4  # 4 px are near, 4.1 are not; a missing joint is wrong
    assert pck(found, SQUARE, 0.2) == 3 / 4
    assert pck({}, SQUARE, 0.2) == 0
    assert pck(SQUARE, SQUARE, 0) == 1
    with pytest.raises(ValueError, match="truth: no joint"):
        pck(found, {}, 0.1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_oks_is_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 200, (17, 3))
    true[:, 2] = rng.integers(0, 3, 17)
    true[0, 2] = 2
    made = true[:, :2] + rng.normal(0, rng.uniform(0.1, 20), (17, 2))
    area = rng.uniform(100, 40000)
    evaluation = COCOeval(iouType="keypoints")
    evaluation._gts[1, 1] = [{"keypoints": true.ravel().tolist(), "bbox": [0, 0, 200, 200], "area": area}]
    placed = np.append(made, np.ones((17, 1)), axis=1).ravel().tolist()
    evaluation._dts[1, 1] = [{"keypoints": placed, "score": 1.0}]
    joints = coco_joints(true.ravel())
    assert oks(coco_joints(placed), joints, area) == pytest.approx(
        evaluation.computeOks(1, 1)[0, 0], rel=1e-9
    )
    np.testing.assert_allclose([SIGMAS[name] for name in COCO_KEYPOINTS], evaluation.params.kpt_oks_sigmas)


def test_oks_by_hand():
    truth = {"nose": (10.0, 10.0), "left_hip": (30.0, 50.0), "neck": (20.0, 20.0)}
    assert oks(truth, truth, 100) == 1
    assert oks({"nose": (10.0, 10.0)}, truth, 100) == 0.5  # the neck is none of COCO's joints
    off = {"nose": (13.0, 14.0), "left_hip": (30.0, 50.0)}
    assert oks(off, truth, 2500) == pytest.approx((math.exp(-25 / (2 * 2500 * 0.052**2)) + 1) / 2)
    with pytest.raises(ValueError, match=r"truth: no joint of COCO's; choices: nose, .*right_ankle"):
        oks(truth, {"neck": (1.0, 2.0)}, 100)


@pytest.mark.parametrize("seed", range(6))
def test_joints_are_found_where_limbs_were_drawn(seed):
    joints = person(seed, 64)
    picture = skeleton(joints, (64, 64), thickness=4)
    assert farthest(find_joints(picture, discs=False), joints) < 2
    half = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_NEAREST_EXACT)
    scaled = {name: (x / 2 - 0.25, y / 2 - 0.25) for name, (x, y) in joints.items()}
    assert farthest(find_joints(half, discs=False), scaled) < 2


def test_joints_are_found_in_averaged_skeletons():
    shares = []
    for seed in range(12):
        joints = person(seed, 64)
        picture = cv2.resize(skeleton(joints, (64, 64), 4), (32, 32), interpolation=cv2.INTER_AREA)
        scaled = {name: (x / 2 - 0.25, y / 2 - 0.25) for name, (x, y) in joints.items()}
        shares.append(pck(find_joints(picture, discs=False), scaled, 0.1))
    assert np.mean(shares) > 0.95


@pytest.mark.parametrize("seed", range(6))
def test_joints_are_found_where_discs_were_drawn(seed):
    joints = person(seed, 128)
    # a disc needs no limb
    lone = {"left_wrist": joints["left_wrist"], "right_ear": (120.0, 5.0)}
    for people in (joints, lone):
        picture = skeletons([people], (128, 128), thickness=2, radius=4)
        assert farthest(find_joints(picture, discs=True), people) < 1.5


def test_a_limb_that_another_crosses_keeps_both_ends():
    body = {"neck": (30.0, 10.0), "left_hip": (30.0, 50.0), "left_shoulder": (50.0, 10.0)}
    arm = {"left_elbow": (50.0, 30.0), "left_wrist": (10.0, 30.0)}  # the forearm passes behind the torso
    found = find_joints(skeleton(body | arm, (64, 64), 4), discs=False)
    assert farthest(found, body | arm) < 2


def test_what_shows_no_joint_has_none():
    assert find_joints(np.zeros((16, 16, 3), np.uint8), discs=False) == {}
    assert find_joints(np.full((16, 16, 3), 200, np.uint8), discs=True) == {}
    forearm = {"left_elbow": (4.0, 4.0), "left_wrist": (28.0, 4.0)}
    assert find_joints(skeleton(forearm, (32, 32), 4), discs=False) == {}  # which end is the wrist?


def test_discs_are_told_by_the_neck():
    joints = person(0, 64)
    limbs, discs = skeleton(joints, (64, 64), 4), skeletons([joints], (64, 64), 2, 4)
    assert not has_discs(np.stack([limbs, limbs]))
    assert has_discs(np.stack([limbs, discs]))


@pytest.mark.parametrize("radius", [0, 5])
def test_compare_tells_people_apart(radius):
    size, thickness, discs = (128, 256), 4 if radius == 0 else 2, radius > 0
    first, second = person(1, 120), moved(person(2, 120), 126, 4)

    def draw(*people):
        return skeletons(people, size, thickness, radius)

    truth = draw(first, second)
    both = compare(truth, truth, discs=discs)
    assert [person.joints for person in both] == [14, 14]
    assert all(person[1:] == (1, 1, 1) for person in both)
    alone = compare(draw(first), truth, discs=discs)
    assert sorted(person.pck_20 for person in alone) == [0, 1]
    assert min(person.oks for person in alone) == 0
    assert compare(truth, np.zeros_like(truth), discs=discs) == []
    # all of one person 16 px lower, with a box of 80 to 120 px: 0.2 of it is more, 0.1 is less
    low, high = np.min(list(first.values()), axis=0), np.max(list(first.values()), axis=0)
    assert 80 < max(high - low) < 120
    start = moved(first, 0, -min(low[1] - 3, 0))
    (shifted,) = compare(draw(moved(start, 0, 16)), draw(start), discs=discs)
    assert shifted.pck_10 == 0
    assert shifted.pck_20 > 0.8
    assert 0 < shifted.oks < 0.6


def test_the_wrong_side_is_wrong():
    joints = person(3, 128)
    other = {
        name.replace("left", "?").replace("right", "left").replace("?", "right"): at
        for name, at in joints.items()
    }
    (found,) = compare(skeleton(other, (128, 128), 6), skeleton(joints, (128, 128), 6), discs=False)
    assert found.pck_10 <= 4 / 14  # neck, nose, and what happens to lie close


def test_noise_is_no_skeleton():
    truth = skeleton(person(4, 64), (64, 64), 4)
    noise = np.random.default_rng(0).choice(np.array(list(JOINT_COLOURS.values()), np.uint8), (64, 64))
    (found,) = compare(noise, truth, discs=False)
    assert found.pck_10 < 0.25


def test_distance_to_by_hand():
    mask = np.zeros((3, 5), bool)
    mask[0, 0] = True
    expected = [[math.hypot(x, y) for x in range(5)] for y in range(3)]
    np.testing.assert_allclose(distance_to(mask), expected, rtol=1e-6)
    assert np.isinf(distance_to(np.zeros((3, 5), bool))).all()
