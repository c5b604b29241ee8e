import inspect
import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from delvm.errors import UserError
from delvm.images.annotate import COCO_KEYPOINTS, skeletons
from delvm.images.coco import NUM_COLOURS, Coco, decode_rle, decode_segmentation, unpack_runs
from delvm.images.files import read_picture

HEIGHT, WIDTH = 24, 32
SIZE = (HEIGHT, WIDTH)
SQUARE = [4, 4, 12, 4, 12, 10, 4, 10]  # rows 4 to 9, columns 4 to 11


def _rectangle(rows, columns):
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


def _rle(mask):
    """As in COCO's results and in SA-1B: a compressed string."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def _counts(mask):
    """As in COCO's crowds: the runs."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def _person(**joints):
    return [number for name in COCO_KEYPOINTS for number in joints.get(name, (0, 0, 0))]


def _instance(image, category=1, **facts):
    return {"image_id": image, "category_id": category, "iscrowd": 0} | facts


def _dataset(folder, annotations, names=("b", "a", "c")):
    """Photographs 1, 2, ... of these names, and the JSON: the arguments of `Coco`."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    photographs = []
    for number, name in enumerate(names, 1):
        blocks = np.random.default_rng(number).integers(
            256, size=(HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8
        )
        Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(images / f"{name}.jpg")
        photographs.append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": photographs, "annotations": annotations}))
    return str(images), str(path)


def _coco(folder, annotations, draw, **settings):
    return Coco(*_dataset(folder, annotations), draw, key="tasks.t", **settings)


def _read(coco):
    """The annotation of the only entry."""
    [entry] = coco.entries()
    picture, annotation = coco.read(entry)
    assert picture.shape == annotation.shape == (*SIZE, 3)
    assert picture.dtype == annotation.dtype == np.uint8
    return annotation


def _refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- run lengths


def test_runs_go_column_by_column_and_begin_with_off():
    expected = np.array([[False, True, True], [False, True, False]])
    np.testing.assert_array_equal(decode_rle([2, 3, 1], (2, 3)), expected)
    np.testing.assert_array_equal(decode_rle([0, 2, 4], (2, 3)), [[True, False, False]] * 2)
    assert decode_rle([2, 3, 1], (2, 3)).dtype == bool


def test_a_string_of_runs():
    # 2, 3, 1, then 5 - 3, then -1 for 0 - 1; 100 is 4 + 32 (more), 3
    assert unpack_runs("2312O").tolist() == [2, 3, 1, 5, 0]
    assert unpack_runs("T3").tolist() == [100]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_masks_come_back(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    np.testing.assert_array_equal(decode_rle(_rle(mask)["counts"], mask.shape), mask)
    np.testing.assert_array_equal(decode_rle(_counts(mask), mask.shape), mask)


def test_a_large_mask_comes_back():
    mask = np.zeros((1500, 2250), bool)
    mask[200:1400, 3:2000] = True
    mask[700:, 900:1000] = False
    mask[1499, 2249] = True
    np.testing.assert_array_equal(decode_rle(_rle(mask)["counts"], mask.shape), mask)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 3], "do not cover a picture of size [2, 3] exactly"),
        ([2, 5], "do not cover"),
        ([2, 3, 2, -1], "do not cover"),
        ([2**63 - 1, 2**63 - 1, 8], "do not cover"),  # the sum wraps around to 6
        ([2**64, 1], "whole numbers"),
        ([2.0, 4.0], "whole numbers"),
        ([True, False], "whole numbers"),
        ([], "whole numbers"),
        ([[2, 4]], "whole numbers"),
        (None, "whole numbers"),
        ("", "cut or not COCO's compressed string"),
        ("23T", "cut"),  # a number goes on after it
        ("23 1", "cut"),
        ("23é1", "cut"),
        ("23p1", "cut"),  # one beyond the last character
        ("P" * 7 + "0", "impossible number"),
        ("23", "do not cover"),
        ("2311", "do not cover"),
        ("24O", "do not cover"),
    ],
)
def test_damaged_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        decode_rle(counts, (2, 3))


@given(st.text("01234<MNOPQ", max_size=6) | st.text(st.characters(min_codepoint=40, max_codepoint=120)))
@settings(max_examples=300, deadline=None)
@example("<")
@example("432M1")  # 4, 3, 2, 0, 3
def test_any_text_is_a_mask_or_refused(text):
    try:
        mask = decode_rle(text, (3, 4))
    except ValueError:
        return
    np.testing.assert_array_equal(mask, coco_mask.decode({"size": [3, 4], "counts": text}))


# --- segmentations


def test_polygons_and_runs_of_one_mask():
    expected = _rectangle(slice(4, 10), slice(4, 12))
    for segmentation in ([SQUARE], _rle(expected), {"size": list(SIZE), "counts": _counts(expected)}):
        mask = decode_segmentation(segmentation, SIZE)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def test_polygons_of_one_thing_are_joined_and_cut_to_the_picture():
    parts = [SQUARE, [28, 20, 40, 20, 40, 30, 28, 30]]
    expected = _rectangle(slice(4, 10), slice(4, 12)) | _rectangle(slice(20, 24), slice(28, 32))
    np.testing.assert_array_equal(decode_segmentation(parts, SIZE), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 5]], "a polygon of 4 numbers; it needs x and y of three points or more"),
        ([[1, 1, 5, 1, 5, 5, 1]], "a polygon of 7 numbers"),
        ([SQUARE, [1, 1, 5, 1, 5, 1e9]], r"a polygon far outside its picture of size \[24, 32\]"),
        ([[1, 1, 5, 1, 5, float("nan")]], "far outside"),
        ({"size": [32, 24], "counts": [768]}, r"an RLE of size \[32, 24\], its picture has \[24, 32\]"),
    ],
)
def test_damaged_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, SIZE)


# --- entries


def test_entries_are_photographs_with_something_to_draw_by_file_name(tmp_path):
    limb = _person(left_hip=(4, 4, 2), left_knee=(4, 12, 1))
    no_limb = _person(left_hip=(4, 4, 2), right_knee=(9, 12, 2))
    people = [(1, limb), (2, no_limb), (3, no_limb), (2, limb), (2, limb)]
    annotations = [{"image_id": image, "keypoints": keypoints} for image, keypoints in people]
    coco = _coco(tmp_path, annotations, "skeletons")
    images = tmp_path / "images"
    assert list(coco.entries()) == [
        ["a", f"{images}/a.jpg", [24, 32], [limb, limb]],
        ["b", f"{images}/b.jpg", [24, 32], [limb]],
    ]


def test_entries_of_masks_and_boxes(tmp_path):
    annotations = [
        _instance(1, 7, segmentation=[SQUARE], bbox=[4, 4, 8, 6.5]),
        _instance(1, 9, segmentation=[], bbox=[4, 4, 0, 6]),
        _instance(1, 9, segmentation={"size": [24, 32], "counts": [768]}, bbox=[0, 0, 9, 9], iscrowd=1),
    ]
    path = f"{tmp_path}/images/b.jpg"
    facts = [[7, [SQUARE]], [9, {"size": [24, 32], "counts": [768]}]]
    assert list(_coco(tmp_path, annotations, "masks").entries()) == [["b", path, [24, 32], facts]]
    assert list(_coco(tmp_path, annotations, "boxes").entries()) == [
        ["b", path, [24, 32], [[7, 4, 4, 8, 6.5]]]
    ]


def test_entries_are_lazy_and_json_ready(tmp_path):
    coco = _coco(tmp_path, [_instance(image, segmentation=[SQUARE]) for image in (1, 2)], "masks")
    entries = coco.entries()
    assert inspect.isgenerator(entries)
    assert next(entries)[0] == "a"
    (tmp_path / "images" / "b.jpg").unlink()
    assert _refused(next, entries) == f"{tmp_path}/annotations.json: 'b.jpg' is not in {tmp_path}/images"


# --- reading


def test_the_photograph_comes_as_it_is(tmp_path):
    coco = _coco(tmp_path, [_instance(2, segmentation=[SQUARE])], "masks")
    [entry] = coco.entries()
    np.testing.assert_array_equal(coco.read(entry)[0], read_picture(tmp_path / "images" / "a.jpg"))


def test_skeletons_are_drawn_at_their_joints(tmp_path):
    people = [
        _person(left_hip=(5, 4, 2), left_knee=(5, 18, 1)),
        _person(right_knee=(20, 6, 2), right_ankle=(20, 16, 2)),
    ]
    annotations = [{"image_id": 1, "keypoints": keypoints} for keypoints in people]
    thin = _read(_coco(tmp_path, annotations, "skeletons", radius=0, thickness=1))
    expected = np.zeros((*SIZE, 3), np.uint8)
    expected[4:19, 5] = (0, 170, 255)  # left thigh
    expected[6:17, 20] = (0, 255, 170)  # right shin
    np.testing.assert_array_equal(thin, expected)
    wide = _read(_coco(tmp_path, annotations, "skeletons", radius=5, thickness=2))
    joints = [
        {"left_hip": (5, 4), "left_knee": (5, 18)},
        {"right_knee": (20, 6), "right_ankle": (20, 16)},
    ]
    np.testing.assert_array_equal(wide, skeletons(joints, SIZE, thickness=2, radius=5))
    assert wide[11, 20].any()  # within five pixels of both joints
    assert not wide[11, 8].any()  # a limb is not as wide


def test_masks_lie_smaller_over_larger_in_their_category_s_colour(tmp_path):
    large = _rectangle(slice(0, 20), slice(0, 30))
    crowd = _rectangle(slice(0, 24), slice(0, 32))
    annotations = [
        _instance(1, 3, segmentation=[SQUARE]),
        _instance(1, 90, segmentation=_rle(large)),
        _instance(1, 3, segmentation={"size": list(SIZE), "counts": _counts(crowd)}, iscrowd=1),
    ]
    coco = _coco(tmp_path, annotations, "masks")
    expected = np.empty((*SIZE, 3), np.uint8)
    expected[:] = coco.palette[3]
    expected[large] = coco.palette[90]
    expected[4:10, 4:12] = coco.palette[3]
    np.testing.assert_array_equal(_read(coco), expected)


def test_boxes_are_outlines_in_their_category_s_colour(tmp_path):
    coco = _coco(tmp_path, [_instance(1, 44, bbox=[4, 6, 10, 8])], "boxes", thickness=2)
    expected = np.zeros((*SIZE, 3), np.uint8)
    expected[6:14, 4:14] = coco.palette[44]
    expected[8:12, 6:12] = 0
    np.testing.assert_array_equal(_read(coco), expected)


def test_a_category_has_one_colour_everywhere(tmp_path):
    (tmp_path / "other").mkdir()
    one = _coco(tmp_path, [_instance(1, 5, segmentation=[SQUARE])], "masks")
    other = _coco(
        tmp_path / "other",
        [_instance(2, 8, bbox=[0, 0, 9, 9]), _instance(2, 5, bbox=[3, 3, 20, 20])],
        "boxes",
    )
    colours = [{tuple(colour) for colour in _read(coco).reshape(-1, 3).tolist()} for coco in (one, other)]
    assert colours[0] == {(0, 0, 0), one.palette[5]}
    assert colours[1] == {(0, 0, 0), one.palette[5], one.palette[8]}
    assert len(set(one.palette) - {(0, 0, 0)}) == NUM_COLOURS == 91  # COCO's ids reach 90
    assert _coco(tmp_path, [], "masks", seed=1).palette != one.palette


def test_a_pickled_storage_reads_the_same(tmp_path):
    coco = _coco(tmp_path, [_instance(1, 5, segmentation=[SQUARE])], "masks")
    [entry] = coco.entries()
    again = pickle.loads(pickle.dumps(coco))
    for picture, expected in zip(again.read(json.loads(json.dumps(entry))), coco.read(entry), strict=True):
        np.testing.assert_array_equal(picture, expected)


# --- what is wrong


def test_unknown_drawing():
    with pytest.raises(ValueError, match=r"^tasks\.t\.draw: 'bones' .*; choices: skeletons, masks, boxes$"):
        Coco("images", "annotations.json", "bones", key="tasks.t")


def test_missing_files(tmp_path):
    images, path = _dataset(tmp_path, [])
    nowhere = Coco(f"{tmp_path}/x", path, "masks", key="tasks.t")
    assert _refused(list, nowhere.entries()) == f"tasks.t.images: no folder '{tmp_path}/x'"
    nothing = Coco(images, f"{tmp_path}/x.json", "masks", key="tasks.t")
    assert (
        _refused(list, nothing.entries())
        == f"tasks.t.annotations: No such file or directory: '{tmp_path}/x.json'"
    )


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_not_json(tmp_path, content):
    coco = _coco(tmp_path, [], "masks")
    coco.annotations.write_bytes(content)
    assert _refused(list, coco.entries()).startswith(f"{coco.annotations}: not JSON (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "not COCO's JSON: no 'images'"),
        (lambda content: content.pop("annotations"), "not COCO's JSON: no 'annotations'"),
        (lambda content: content["images"][0].pop("height"), "images[0]: no 'height'"),
        (lambda content: content["images"][0].update(width=float("inf")), "images[0]: cannot convert"),
        (lambda content: content["images"][1].pop("id"), "images[1]: no 'id'"),
        (lambda content: content["annotations"][1].pop("image_id"), "annotations[1]: no 'image_id'"),
        (lambda content: content["annotations"][1].pop("category_id"), "annotations[1]: no 'category_id'"),
        (
            lambda content: content["annotations"][1].update(category_id=91),
            "annotations[1]: category_id: 91 must be a whole number from 0 to 90",
        ),
        (
            lambda content: content["annotations"][0].update(category_id=1.0),
            "annotations[0]: category_id: 1.0",
        ),
        (lambda content: content["annotations"][0].pop("bbox"), "annotations[0]: no 'bbox'"),
        (
            lambda content: content["annotations"][0].update(bbox=[1, 2, 3]),
            "annotations[0]: not enough values",
        ),
        (
            lambda content: content["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
            "annotations[0]: bbox: [1, 2, 3, nan] must be numbers from -32768 to 32768",
        ),
        (lambda content: content["annotations"].insert(0, "text"), "annotations[0]: string indices"),
    ],
)
def test_not_coco_s_json(tmp_path, change, message):
    coco = _coco(tmp_path, [_instance(1, bbox=[1, 2, 3, 4]), _instance(2, bbox=[1, 2, 3, 4])], "boxes")
    content = json.loads(coco.annotations.read_bytes())
    change(content)
    coco.annotations.write_text(json.dumps(content))
    assert _refused(list, coco.entries()).startswith(f"{coco.annotations}: {message}")


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        ([1, 2, 3], "annotations[0]: keypoints: 3 numbers"),
        (_person(nose=(1e6, 5, 2)), "annotations[0]: keypoints: [1000000.0, 5, 2,"),
        (_person(nose=(10**400, 5, 2)), "annotations[0]: "),
        (_person(nose=(None, 5, 2)), "annotations[0]: "),
    ],
)
def test_damaged_keypoints(tmp_path, keypoints, message):
    coco = _coco(tmp_path, [{"image_id": 1, "keypoints": keypoints}], "skeletons")
    assert _refused(list, coco.entries()).startswith(f"{coco.annotations}: {message}")


def test_skeletons_of_instances_without_keypoints(tmp_path):
    coco = _coco(tmp_path, [_instance(1, segmentation=[SQUARE])], "skeletons")
    assert _refused(list, coco.entries()) == f"{coco.annotations}: annotations[0]: no 'keypoints'"


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 5]], "a polygon of 4 numbers; it needs x and y of three points or more"),
        ([7], "object of type 'int' has no len()"),
        (["abcdef"], "'<=' not supported between instances of 'int' and 'str'"),
        ({"size": [24, 32]}, "no 'counts'"),
        (
            {"size": [24, 32], "counts": [700]},
            "the RLE counts do not cover a picture of size [24, 32] exactly",
        ),
        ({"size": [24, 32], "counts": "T"}, "RLE counts are cut or not COCO's compressed string"),
        ({"size": [24, 31], "counts": [744]}, "an RLE of size [24, 31], its picture has [24, 32]"),
    ],
)
def test_damaged_segmentation_of_a_photograph(tmp_path, segmentation, message):
    coco = _coco(tmp_path, [_instance(1, segmentation=segmentation)], "masks")
    [entry] = coco.entries()
    file = tmp_path / "images" / "b.jpg"
    assert _refused(coco.read, entry) == f"{coco.annotations}: segmentation of {file}: {message}"


def test_a_photograph_of_another_size_or_none(tmp_path):
    coco = _coco(tmp_path, [_instance(1, bbox=[1, 2, 3, 4])], "boxes")
    [entry] = coco.entries()
    file = tmp_path / "images" / "b.jpg"
    Image.new("RGB", (HEIGHT, WIDTH)).save(file)
    assert _refused(coco.read, entry) == f"{file}: 24x32 pixels, {coco.annotations} says 32x24"
    file.write_bytes(b"not a picture")
    assert _refused(coco.read, entry).startswith(f"{file}: unreadable picture (")
