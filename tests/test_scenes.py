import subprocess
import sys

import cv2
import numpy as np
import pytest

from delvm.images import scenes
from delvm.images.annotate import LIMBS, MIRRORED_COLOURS
from delvm.images.scenes import PHOTOGRAPHS, SCENES, SHAPES, Scenes, photograph

KINDS = list(SCENES)


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_place_alone(kind):
    forward = [Scenes(kind, 6, "train", 5)[i] for i in range(6)]
    longer = Scenes(kind, 60, "train", 5)
    backward = [longer[i] for i in reversed(range(6))][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert (first[0] == second[0]).all()
        assert (first[1] == second[1]).all()
    for other in (Scenes(kind, 6, "train", 6)[0], Scenes(kind, 6, "validation", 5)[0], forward[1]):
        assert (other[0] != forward[0][0]).any()


def test_another_process_draws_the_same():
    code = (
        "import zlib; from delvm.images.scenes import SCENES, Scenes\n"
        "print([zlib.crc32(p.tobytes()) for k in SCENES for p in Scenes(k, 3, 'validation', 1)[2]])"
    )
    out = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert out[0] == out[1] != ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 96])
def test_pictures_are_square_uint8(kind, size):
    for picture in Scenes(kind, 1, "validation", 0, size)[0]:
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["validation"])
    seen: dict[bytes, str] = {}
    for names in PHOTOGRAPHS.values():
        for name in names:
            picture = photograph(name)
            assert picture.ndim == 3
            assert picture.shape[2] == 3
            assert min(picture.shape[:2]) > 200
            thumbnail = cv2.resize(picture, (8, 8), interpolation=cv2.INTER_AREA).tobytes()
            assert seen.setdefault(thumbnail, name) == name


def test_masks_have_only_the_colours_of_classes():
    found = set()
    for i in range(60):
        _, mask = Scenes("segmentation", 60, "train", 0)[i]
        found |= colours(mask)
        share = (mask > 0).any(axis=-1).mean()
        assert 0.02 < share < 0.6
    assert found == {(0, 0, 0), *SHAPES.values()}


def test_a_mask_covers_exactly_what_is_drawn():
    image, mask = Scenes("segmentation", 1, "train", 0)[0]
    place = (0, KINDS.index("segmentation"), 0, 0)
    crop = scenes.background(np.random.default_rng(place), "train", 64)
    inside = (mask > 0).any(axis=-1)
    assert (image[~inside] == crop[~inside]).all()
    assert (image[inside] != crop[inside]).any(axis=-1).mean() > 0.95


def test_deraining_annotates_with_the_crop_itself():
    for i in range(20):
        image, clean = Scenes("deraining", 20, "train", 0)[i]
        same = (image == clean).all(axis=-1).mean()
        assert 0.3 < same < 0.95  # rain everywhere enough, and clean exactly where none falls


def test_skeletons_have_the_colours_of_limbs_and_stay_inside():
    limbs = {colour for _, _, colour in LIMBS}
    for i in range(60):
        _, annotation = Scenes("pose", 60, "train", 0)[i]
        found = colours(annotation) - {(0, 0, 0)}
        assert found <= limbs
        assert len(found) >= 11
        for left, right in MIRRORED_COLOURS[:1] + MIRRORED_COLOURS[-3:-2]:
            # shoulders and shins: the person faces the viewer, so left limbs stand further right
            columns = [np.nonzero((annotation == colour).all(axis=-1))[1] for colour in (left, right)]
            if all(len(column) > 3 for column in columns):
                assert columns[0].mean() > columns[1].mean()


def test_the_person_is_where_the_skeleton_is():
    for i in range(10):
        image, annotation = Scenes("pose", 10, "validation", 2)[i]
        rng = np.random.default_rng((2, KINDS.index("pose"), 1, i))
        drawn = (image != scenes.background(rng, "validation", 64)).any(axis=-1)
        assert drawn[(annotation > 0).any(axis=-1)].mean() > 0.9


def test_names_and_length():
    people = Scenes("pose", 3, "train", 0)
    assert len(people) == 3
    with pytest.raises(IndexError, match="sample 3 of 3"):
        people[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fog", 1, "train", 0), "scene: 'fog' is unknown; choices: segmentation, deraining, pose"),
        (("pose", 1, "test", 0), "split: 'test' is unknown; choices: train, validation"),
        (("pose", 1, "train", -1), "seed: -1 must be at least 0"),
        (("pose", 1, "train", 0, 8), "size: 8 must be at least 16"),
    ],
)
def test_bad_arguments_name_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(*arguments)
