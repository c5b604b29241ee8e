import gc
import gzip
import inspect
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from delvm.errors import UserError
from delvm.images import sa1b
from delvm.images.sa1b import CROP, NUM_CROPS, Sa1b, crop, members

HEIGHT, WIDTH = 24, 40


def _rectangle(rows, columns, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


SMALL = _rectangle(slice(8, 12), slice(10, 20))
MIDDLE = _rectangle(slice(4, 16), slice(8, 30))
LARGE = _rectangle(slice(0, 24), slice(0, 36))


def _jpg(seed=0, size=(HEIGHT, WIDTH)):
    blocks = np.random.default_rng(seed).integers(256, size=(size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(file, "jpeg")
    return file.getvalue()


def _json(masks=(SMALL, LARGE, MIDDLE)):
    annotations = []
    for mask in masks:
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        annotations.append({"segmentation": segmentation, "area": int(mask.sum())})
    return json.dumps({"image": {"height": HEIGHT, "width": WIDTH}, "annotations": annotations}).encode()


def _tar(path, files):
    """A tar of (name, content); content None is a directory."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def _sa1b(path, files, **settings):
    return Sa1b(_tar(path, files), key="tasks.t", **settings)


def _whole(path, masks=(SMALL, LARGE, MIDDLE), stem="sa_1", **settings):
    """The photograph and its annotation, uncropped."""
    storage = _sa1b(path, [(f"{stem}.jpg", _jpg()), (f"{stem}.json", _json(masks))], crops=False, **settings)
    [entry] = storage.entries()
    return storage.read(entry)


def _colours(picture):
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}


def _refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- entries


def test_entries_say_where_jpg_and_json_lie(tmp_path):
    photograph, text = _jpg(), _json()
    files = [
        ("./sa_7.jpg", photograph),
        ("./sa_7.json", text),
        ("./sa_2.json", b"{}"),
        ("./sa_2.jpg", b"x" * 600),
    ]
    storage = _sa1b(tmp_path / "t.tar", files)
    entries = list(storage.entries())
    assert [entry[0] for entry in entries] == ["sa_7"] * 6 + ["sa_2"] * 6
    assert [entry[-1] for entry in entries] == [0, 1, 2, 3, 4, 5] * 2
    raw = (tmp_path / "t.tar").read_bytes()
    for entry, content in ((entries[0], (photograph, text)), (entries[-1], (b"x" * 600, b"{}"))):
        _, path, jpg_offset, jpg_size, json_offset, json_size, _ = entry
        assert path == f"{tmp_path}/t.tar"
        assert raw[jpg_offset : jpg_offset + jpg_size] == content[0]
        assert raw[json_offset : json_offset + json_size] == content[1]


def test_whole_photographs_are_one_entry_each(tmp_path):
    storage = _sa1b(tmp_path / "t.tar", [("sa_1.jpg", b"1"), ("sa_1.json", b"22")], crops=False)
    assert list(storage.entries()) == [["sa_1", f"{tmp_path}/t.tar", 512, 1, 1536, 2, -1]]


def test_jpgs_and_jsons_may_stand_apart_among_other_members(tmp_path):
    files = [
        ("folder.jpg", None),
        ("sa_1.json", b"{}"),
        ("LICENSE.txt", b"text"),
        ("._sa_1.jpg", b"another system's"),
        ("sa_2.jpg", b"2"),
        ("sa_1.jpg", b"1"),
        ("a/sa_2.json", b"{}"),
        ("a/sa_2.jpg", b"2"),
        ("sa_2.json", b"{}"),
    ]
    entries = list(_sa1b(tmp_path / "t.tar", files, crops=False).entries())
    assert [entry[0] for entry in entries] == ["sa_1", "sa_2", "sa_2"]
    assert [(entry[2], entry[4]) for entry in entries] == [(5120, 1024), (7168, 6144), (4096, 8192)]


def test_names_too_long_for_a_header(tmp_path):
    stem = "sa_" + "1" * 200
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=kind) as tar:
            for suffix, content in ((".jpg", b"photograph"), (".json", b"{}")):
                member = tarfile.TarInfo(stem + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        [entry] = Sa1b(f"{tmp_path}/t.tar", key="tasks.t", crops=False).entries()
        assert entry[0] == stem
        assert (tmp_path / "t.tar").read_bytes()[entry[2] : entry[2] + entry[3]] == b"photograph"


def test_a_tar_a_folder_or_a_pattern(tmp_path):
    for number in (2, 1, 3):
        _tar(tmp_path / f"part{number}.tar", [(f"sa_{number}.jpg", b""), (f"sa_{number}.json", b"")])
    (tmp_path / "notes.txt").write_text("not a tar")
    (tmp_path / "folder.tar").mkdir()

    def stems(place):
        return [entry[0] for entry in Sa1b(str(place), key="tasks.t", crops=False).entries()]

    assert stems(tmp_path / "part3.tar") == ["sa_3"]
    assert stems(tmp_path) == ["sa_1", "sa_2", "sa_3"]
    assert stems(tmp_path / "part[13].tar") == ["sa_1", "sa_3"]
    assert _refused(stems, tmp_path / "x*.tar") == f"tasks.t.images: no tar file at '{tmp_path}/x*.tar'"
    assert _refused(stems, tmp_path / "folder.tar").startswith("tasks.t.images: no tar file at")


def test_entries_are_lazy_and_no_header_is_kept(tmp_path):
    files = [(f"sa_{number // 2}.{('jpg', 'json')[number % 2]}", b"") for number in range(40)]
    path = tmp_path / "t.tar"
    entries = _sa1b(path, files).entries()
    assert inspect.isgenerator(entries)
    assert next(entries)[0] == "sa_0"
    entries.close()
    headers = members(path)
    assert [next(headers).name for _ in range(39)][-1] == "sa_19.jpg"
    assert sum(isinstance(thing, tarfile.TarInfo) for thing in gc.get_objects()) <= 2


# --- reading


def test_masks_are_painted_smaller_over_larger(tmp_path):
    picture, annotation = _whole(tmp_path / "t.tar")
    with Image.open(io.BytesIO(_jpg())) as expected:
        np.testing.assert_array_equal(picture, np.asarray(expected))
    assert (annotation.shape, annotation.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    small, middle, large = annotation[9, 12], annotation[5, 9], annotation[1, 1]
    expected = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for mask, colour in ((LARGE, large), (MIDDLE, middle), (SMALL, small)):
        expected[mask] = colour
    np.testing.assert_array_equal(annotation, expected)
    assert len(_colours(annotation)) == 4  # three masks and black


def test_colours_depend_on_seed_and_stem_alone(tmp_path):
    first = _whole(tmp_path / "a.tar")[1]
    np.testing.assert_array_equal(_whole(tmp_path / "b.tar")[1], first)
    assert (_whole(tmp_path / "a.tar", seed=1)[1] != first).any()
    assert (_whole(tmp_path / "c.tar", stem="sa_2")[1] != first).any()


def test_hundreds_of_masks_are_told_apart(tmp_path):
    masks = [_rectangle(row, column) for row in range(20) for column in range(20)]
    assert len(_colours(_whole(tmp_path / "t.tar", masks)[1])) == 401


def test_a_photograph_without_masks_is_black(tmp_path):
    assert _colours(_whole(tmp_path / "t.tar", [])[1]) == {(0, 0, 0)}


def test_the_six_squares_of_wide_tall_and_square_pictures():
    def places(size):
        squares = [crop(size, number) for number in range(NUM_CROPS)]
        sides = {place.stop - place.start for square in squares for place in square}
        assert len(sides) == 1
        return sides.pop(), [(rows.start, columns.start) for rows, columns in squares]

    assert CROP == 800
    wide = [(0, 0), (0, 1450), (0, 725), (700, 0), (700, 1450), (700, 725)]
    tall = [(0, 0), (0, 700), (725, 0), (725, 700), (1450, 0), (1450, 700)]
    assert places((1500, 2250)) == (800, wide)
    assert places((2250, 1500)) == (800, tall)
    assert places((1000, 1000)) == (800, [(0, 0), (0, 200), (0, 100), (200, 0), (200, 200), (200, 100)])
    # the shorter side, where that is below 800
    assert places((600, 900)) == (600, [(0, 0), (0, 300), (0, 150)] * 2)
    assert places((801, 799)) == (799, [(0, 0), (0, 0), (1, 0), (1, 0), (2, 0), (2, 0)])


@pytest.mark.parametrize("size", [(816, 1000), (1000, 816), (24, 40)])
def test_image_and_annotation_are_cropped_alike(tmp_path, size):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < 0.5, _rectangle(slice(3, 20), slice(5, 22), size)]
    storage = _sa1b(tmp_path / "t.tar", [("sa_1.jpg", _jpg(1, size)), ("sa_1.json", _json(masks))])
    entries = list(storage.entries())
    image, annotation = storage.read([*entries[0][:-1], -1])
    assert image.shape == annotation.shape == (*size, 3)
    side = min(800, *size)
    for entry in entries:
        where = crop(size, entry[-1])
        pictures = storage.read(entry)
        assert [picture.shape for picture in pictures] == [(side, side, 3)] * 2
        np.testing.assert_array_equal(pictures[0], image[where])
        np.testing.assert_array_equal(pictures[1], annotation[where])


def test_what_is_done_to_a_sample_stays_there(tmp_path):
    storage = _sa1b(tmp_path / "t.tar", [("sa_1.jpg", _jpg()), ("sa_1.json", _json())])
    entry = next(storage.entries())
    expected = [picture.copy() for picture in storage.read(entry)]
    for picture in storage.read(entry):
        picture[:] = 7
    for picture, before in zip(storage.read(entry), expected, strict=True):
        np.testing.assert_array_equal(picture, before)


def test_a_pickled_storage_reads_the_same(tmp_path):
    storage = _sa1b(tmp_path / "t.tar", [("sa_1.jpg", _jpg()), ("sa_1.json", _json())], seed=3)
    entry = list(storage.entries())[4]
    expected = storage.read(entry)
    again = pickle.loads(pickle.dumps(storage))
    sa1b.paint.cache_clear()
    for picture, before in zip(again.read(json.loads(json.dumps(entry))), expected, strict=True):
        np.testing.assert_array_equal(picture, before)


# --- what is wrong


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sa_1.jpg", "sa_1.json", "sa_2.jpg"], "'sa_2.jpg' without 'sa_2.json'"),
        (["sa_1.json"], "'sa_1.json' without 'sa_1.jpg'"),
        (["a/sa_1.json", "b/sa_1.jpg"], "'a/sa_1.json' without 'sa_1.jpg'"),
        (["sa_1.jpg", "sa_1.jpg"], "'sa_1.jpg' is there twice"),
    ],
)
def test_a_member_without_its_partner(tmp_path, names, message):
    storage = _sa1b(tmp_path / "t.tar", [(name, b"content") for name in names])
    assert _refused(list, storage.entries()) == f"{tmp_path}/t.tar: {message}"


def test_not_a_tar(tmp_path):
    path = tmp_path / "t.tar"
    storage = _sa1b(path, [("sa_1.jpg", b""), ("sa_1.json", b"")])
    packed = gzip.compress(path.read_bytes())
    for content in (b"", b"text", b"x" * 2000, packed):
        path.write_bytes(content)
        assert _refused(list, storage.entries()).startswith(f"{path}: not an uncompressed tar (")


@pytest.mark.parametrize(
    ("length", "member"),
    [
        (512 + 100, "sa_1.jpg"),  # within a member
        (2048 + 512 + 80, "sa_1.json"),  # within the last
        (512 + 1024 + 512, "sa_1.jpg"),  # a header is due
        (512 + 1024 + 512 + 40, "sa_1.jpg"),  # within a header
        (5 * 512 + 512, "sa_1.json"),  # the end mark is due
    ],
)
def test_a_tar_cut_short(tmp_path, length, member):
    path = tmp_path / "t.tar"
    storage = _sa1b(path, [("sa_1.jpg", b"j" * 1100), ("sa_1.json", b"{" * 300)])
    raw = path.read_bytes()
    path.write_bytes(raw[:length])
    assert _refused(list, storage.entries()).startswith(f"{path}: breaks off in or after '{member}' (")


def test_a_damaged_header(tmp_path):
    path = tmp_path / "t.tar"
    storage = _sa1b(path, [("sa_1.jpg", b"1"), ("sa_1.json", b"2"), ("sa_2.jpg", b"3"), ("sa_2.json", b"4")])
    raw = bytearray(path.read_bytes())
    raw[2048 + 148 : 2048 + 156] = b"\x00damaged"  # the checksum of the third
    path.write_bytes(raw)
    assert _refused(list, storage.entries()).startswith(f"{path}: breaks off in or after 'sa_1.json' (")


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"not JSON", "Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (b"{}", "no 'annotations'"),
        (b'{"annotations": 3}', "'int' object is not iterable"),
        (b'{"annotations": [{}]}', "no 'segmentation'"),
        (RLE | {"counts": "T"}, "RLE counts are cut or not COCO's compressed string"),
        (RLE | {"counts": [900, 61]}, "the RLE counts do not cover a picture of size [24, 40] exactly"),
        (RLE | {"size": [40, 24]}, "an RLE of size [40, 24], its picture has [24, 40]"),
        ({"size": [24, 40]}, "no 'counts'"),
    ],
)
def test_damaged_masks(tmp_path, text, message):
    if isinstance(text, dict):
        text = json.dumps({"annotations": [{"segmentation": RLE}, {"segmentation": text}]}).encode()
    storage = _sa1b(tmp_path / "t.tar", [("sa_1.jpg", _jpg()), ("sa_1.json", text)])
    entry = next(storage.entries())
    assert _refused(storage.read, entry).startswith(f"{tmp_path}/t.tar: sa_1.json: {message}")


def test_a_damaged_photograph_and_a_tar_that_is_gone(tmp_path):
    path = tmp_path / "t.tar"
    storage = _sa1b(path, [("sa_1.jpg", _jpg()[:300]), ("sa_1.json", _json())])
    entry = next(storage.entries())
    assert _refused(storage.read, entry).startswith(f"{path}: sa_1.jpg: unreadable picture (")
    path.unlink()
    assert _refused(storage.read, entry) == f"{path}: No such file or directory"
