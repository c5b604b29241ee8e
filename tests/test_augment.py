import albumentations as A
import cv2
import numpy as np
import pytest

from delvm.images.annotate import MIRRORED_COLOURS, skeleton
from delvm.images.augment import (
    JOINT_COLOUR,
    OPENPOSE_COLOURS,
    POLICIES,
    MirrorPerson,
    compose,
    joint_colour,
    swap_colours,
)
from delvm.images.augment import view as view_sample
from delvm.images.scenes import Scenes

SHAPES = [(64, 64), (214, 320), (320, 214), (33, 47), (600, 410)]


def view(image: np.ndarray, annotation: np.ndarray, **settings) -> list[np.ndarray]:
    """A view of a pair."""
    return view_sample([image, annotation], (False, True), **settings)


def coordinates(shape: tuple[int, int]) -> np.ndarray:
    """Red grows with x, green with y, blue with both: where a pixel came from can be read off it."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    red, green = 20 + 200 * x / shape[1], 20 + 200 * y / shape[0]
    return np.stack([red, green, (red + green) / 2], axis=-1).astype(np.uint8)


def geometry(
    annotation: np.ndarray, policy: str, shape: tuple[int, int], seed: tuple[int, ...]
) -> np.ndarray:
    """What the policy does to an annotation next to some image."""
    return view(
        np.zeros((*shape, 3), np.uint8), annotation, policy=policy, size=32, nearest=False, seed=seed
    )[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_square_views_of_any_shape(policy, shape):
    image, annotation = view(
        coordinates(shape), coordinates(shape), policy=policy, size=32, nearest=False, seed=(1, 2, 3)
    )
    for picture in (image, annotation):
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8


@pytest.mark.parametrize("policy", POLICIES)
def test_a_view_depends_on_its_seed_alone(policy):
    pair = coordinates((64, 64)), coordinates((64, 64))[::-1].copy()
    before = pair[0].copy()
    first = [view(*pair, policy=policy, size=32, nearest=False, seed=(7, i)) for i in range(12)]
    again = [view(*pair, policy=policy, size=32, nearest=False, seed=(7, i)) for i in reversed(range(12))][
        ::-1
    ]
    for one, two in zip(first, again, strict=True):
        assert (one[0] == two[0]).all()
        assert (one[1] == two[1]).all()
    distinct = {one[0].tobytes() for one in first}
    assert len(distinct) == (1 if policy == "none" else 12)
    assert (pair[0] == before).all()


@pytest.mark.parametrize("shape", [(64, 64), (214, 320)])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in JOINT_COLOUR])
def test_geometry_is_the_same_for_image_and_annotation(policy, shape):
    # The image's own colours change, so follow bright discs: they must stay under the annotation's.
    image, annotation = np.full((*shape, 3), 10, np.uint8), np.zeros((*shape, 3), np.uint8)
    side = min(shape)
    for x, y in ((0.3, 0.35), (0.62, 0.3), (0.45, 0.7)):
        centre = round(x * shape[1]), round(y * shape[0])
        cv2.circle(image, centre, side // 8, (240, 240, 240), -1)
        cv2.circle(annotation, centre, side // 8, (255, 255, 255), -1)
    for i in range(25):
        for nearest in (False, True):
            out, mask = view(image, annotation, policy=policy, size=32, nearest=nearest, seed=(i,))
            light = out.mean(axis=-1)
            bright = light > (light.min() + light.max()) / 2
            assert (bright != (mask[..., 0] > 127)).mean() < (0.06 if nearest else 0.025)


def test_restoration_maps_both_pictures_alike():
    same = coordinates((64, 64))
    for i in range(20):
        out, clean = view(same, same.copy(), policy="restoration", size=32, nearest=False, seed=(i,))
        assert (out == clean).all()
    different = same.copy()
    different[:, 40:] = 255  # changes the picture's mean, and nothing in the left part
    light = A.Compose(joint_colour(), additional_targets={"annotation": "image"})
    for i in range(40):
        light.set_random_seed(i)
        out = light(image=different, annotation=same)
        assert (out["image"][:, :40] == out["annotation"][:, :40]).all()


def test_views_are_diverse_and_flips_do_not_go_with_colours():
    shape = (64, 64)
    flipped, shuffled = [], []
    for i in range(200):
        image, annotation = view(
            coordinates(shape), coordinates(shape), policy="segmentation", size=32, nearest=False, seed=(i,)
        )
        flipped.append(int(annotation[16, 0, 0]) > int(annotation[16, -1, 0]))
        shuffled.append(abs(image.astype(int) - annotation).mean() > 3)
    assert 0.38 < np.mean(flipped) < 0.62
    assert 0.6 < np.mean(shuffled) < 0.97
    assert abs(np.corrcoef(flipped, shuffled)[0, 1]) < 0.25


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in JOINT_COLOUR])
@pytest.mark.parametrize("shape", [(64, 64), (214, 320)])
def test_nearest_leaves_only_the_original_colours(policy, shape):
    # With both colours of a pair, since `pose` makes the one of the other.
    palette = np.array([(0, 0, 0), (255, 0, 0), (255, 85, 0), (0, 0, 255)], np.uint8)
    labels = np.random.default_rng(0).integers(0, 4, (shape[0] // 8 + 1, shape[1] // 8 + 1))
    mask = palette[np.kron(labels, np.ones((8, 8), int))][: shape[0], : shape[1]]
    for i in range(20):
        _, out = view(mask, mask, policy=policy, size=32, nearest=True, seed=(i,))
        assert {tuple(c) for c in out.reshape(-1, 3).tolist()} <= {tuple(c) for c in palette.tolist()}


def test_none_is_the_scaled_centre():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    out, annotation = view(image, image, policy="none", size=32, nearest=False, seed=(9,))
    blocks = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert abs(out - blocks).max() <= 1
    assert (out == annotation).all()
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    assert (view(wide, wide, policy="none", size=32, nearest=True, seed=(0,))[1] == 200).all()


def test_no_view_shows_a_border():
    white = np.full((64, 64, 3), 255, np.uint8)
    for policy in ("geometric", "pose", "segmentation", "crops"):
        for i in range(20):
            assert (view(white, white, policy=policy, size=32, nearest=False, seed=(i,))[1] == 255).all()


def test_the_table_of_colours_is_the_skeletons():
    assert set(OPENPOSE_COLOURS) == set(MIRRORED_COLOURS)


def test_swapping_exchanges_exact_colours_and_undoes_itself():
    picture = np.array([[(255, 0, 0), (255, 85, 0), (254, 0, 0), (0, 0, 255), (0, 0, 0)]], np.uint8)
    swapped = swap_colours(picture, OPENPOSE_COLOURS)
    assert swapped[0].tolist() == [[255, 85, 0], [255, 0, 0], [254, 0, 0], [0, 0, 255], [0, 0, 0]]
    assert (swap_colours(swapped, OPENPOSE_COLOURS) == picture).all()


def test_a_flipped_person_is_drawn_as_its_mirror_image_would_be():
    for i in range(20):
        image, annotation = Scenes("pose", 20, "train", 0)[i]
        flip = MirrorPerson(OPENPOSE_COLOURS, p=1.0)(image=image, mask=annotation)
        assert (flip["image"] == image[:, ::-1]).all()
        for left, right in MIRRORED_COLOURS:
            before = (annotation == right).all(axis=-1)
            assert ((flip["mask"] == left).all(axis=-1) == before[:, ::-1]).all()


def test_mirrored_joints_give_the_flipped_skeleton():
    joints = {"neck": (30.0, 12.0), "left_shoulder": (42.0, 14.0), "left_elbow": (50.0, 28.0)}
    other = {name.replace("left", "right"): (63 - x, y) for name, (x, y) in joints.items()}
    flip = MirrorPerson(OPENPOSE_COLOURS, p=1.0)
    out = flip(image=np.zeros((64, 64, 3), np.uint8), mask=skeleton(joints, (64, 64), 3))["mask"]
    assert (out != skeleton(other, (64, 64), 3)).any(axis=-1).mean() < 0.01


@pytest.mark.parametrize("shape", [(64, 64), (400, 300)])
def test_pose_views_keep_the_left_colour_on_the_left(shape):
    # A person of two blocks, the right half (viewer's left) red and the left half its partner's colour.
    annotation = np.zeros((*shape, 3), np.uint8)
    annotation[:, : shape[1] // 2], annotation[:, shape[1] // 2 :] = (255, 0, 0), (255, 85, 0)
    for i in range(20):
        out = geometry(annotation, "pose", shape, (i,))
        assert out[16, 0, 1] <= out[16, -1, 1]
        assert out[..., 1].max() <= 85


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("segmentation", "pose")])
@pytest.mark.parametrize("flags", [(False, True, True), (False, False), (False, True, False, True)])
def test_all_pictures_of_a_sample_move_together(policy, flags):
    # coordinates in every picture: where a pixel came from is the same in all, whatever their role
    sample = [coordinates((96, 64)) for _ in flags]
    for i in range(8):
        out = view_sample(sample, flags, policy=policy, size=32, nearest=False, seed=(i,))
        assert len(out) == len(flags)
        for picture in out[1:]:
            # geometry in one annotation and one image may round differently by a level
            assert np.abs(picture.astype(int) - out[0]).max() <= 2


@pytest.mark.parametrize("policy", ["segmentation", "pose"])
def test_frames_of_a_clip_get_the_same_colours(policy):
    sample = [coordinates((64, 64)), np.zeros((64, 64, 3), np.uint8)] * 3
    for i in range(8):
        out = view_sample(sample, (False, True) * 3, policy=policy, size=32, nearest=True, seed=(i,))
        for frame in (2, 4):
            assert (out[frame] == out[0]).all()
            assert not out[frame + 1].any()


def test_one_picture_alone_can_be_viewed():
    (out,) = view_sample(
        [coordinates((64, 64))], (False,), policy="restoration", size=32, nearest=False, seed=(3,)
    )
    assert out.shape == (32, 32, 3)


def test_transforms_are_built_once():
    first = compose("crops", 32, True, False, OPENPOSE_COLOURS, (False, True))
    assert compose("crops", 32, True, False, OPENPOSE_COLOURS, (False, True)) is first


def test_bad_arguments():
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"policy: 'crop' is unknown; choices: none, crops, geometric"):
        view(picture, picture, policy="crop", size=32, nearest=False, seed=(0,))
    with pytest.raises(ValueError, match=r"\[\(64, 64, 3\), \(32, 64, 3\)\]: all must be one"):
        view(picture, picture[:32], policy="crops", size=32, nearest=False, seed=(0,))
    with pytest.raises(ValueError, match=r"'restoration' changes labels' colours.*choices: none, crops"):
        view(picture, picture, policy="restoration", size=32, nearest=True, seed=(0,))
