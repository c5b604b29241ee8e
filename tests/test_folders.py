import itertools
import json
import pickle
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from delvm.errors import UserError
from delvm.images.folders import Classes, Folder, Listed, Pairs, Pictures


def _picture(seed, shape=(6, 9)):
    return np.random.default_rng(seed).integers(256, size=(*shape, 3), dtype=np.uint8)


def _save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return str(path)


def _refused(function, *arguments):
    """The message with which a call, and the listing of what it returns, is refused; one line."""
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _equal(sample, pictures):
    assert len(sample) == len(pictures)
    for got, wanted in zip(sample, pictures, strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, wanted)


def _travelled(storage):
    """A storage and its entries as another process gets them."""
    return pickle.loads(pickle.dumps(storage)), json.loads(json.dumps(list(storage.entries())))


# --- the pictures of a folder


def test_the_pictures_of_a_folder(tmp_path):
    for name in ("b.jpg", "a.JPG", "c.jpeg", "e.PNG", "d.png", "two.dots.png", "two.png", "two-.png"):
        (tmp_path / name).touch()
    for name in (".f.jpg", "._b.jpg", ".png", "notes.txt", "jpg", "g.gif", "h.jpg.part", "i.tiff"):
        (tmp_path / name).touch()
    _save(tmp_path / "inside" / "z.jpg", _picture(0))
    found = Folder(str(tmp_path), "tasks.t.images")
    # by file name: "-" comes before "."
    assert list(found) == ["a", "b", "c", "d", "e", "two-", "two.dots", "two"]
    assert len(found) == 8
    assert found["a"] == tmp_path / "a.JPG"
    assert (found["two"], found["two.dots"]) == (tmp_path / "two.png", tmp_path / "two.dots.png")
    for stem in ("f", ".f", "notes", "h", "h.jpg", "jpg", "", "tw", "two.", "z"):
        assert stem not in found


def test_a_folder_without_pictures_has_none(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert Folder(tmp_path, "tasks.t.images") == {}


NAMES = st.sets(st.text("ab.-\udce9", min_size=1, max_size=4).map("{}.".format), max_size=8)


@given(NAMES, st.lists(st.sampled_from(["jpg", "png", "JPEG", "txt"]), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_folder_is_a_dictionary_of_stems(tmp_path_factory, stems, suffixes):
    root = tmp_path_factory.mktemp("names")
    for stem, suffix in zip(stems, suffixes, strict=False):
        (root / (stem + suffix)).touch()
    expected = {
        path.stem: path
        for path in sorted(root.iterdir())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    }
    assert list(Folder(root, "tasks.t.images").items()) == list(expected.items())


@pytest.mark.parametrize("between", [[], ["b.a.jpg", "b.jpg.png"]])
def test_two_files_with_one_stem(tmp_path, between):
    for name in ("a.jpg", "b.PNG", "b.jpg", "c.jpg", *between):
        (tmp_path / name).touch()
    message = _refused(Folder, str(tmp_path), "tasks.t.images")
    assert message == f"tasks.t.images: 'b.PNG' and 'b.jpg' have the same stem in {tmp_path}"


def test_no_folder(tmp_path):
    folder = str(tmp_path / "nowhere")
    assert _refused(Folder, folder, "tasks.t.images") == f"tasks.t.images: no folder '{folder}'"
    (tmp_path / "nowhere").touch()  # a file is no folder
    assert _refused(Folder, folder, "tasks.t.images") == f"tasks.t.images: no folder '{folder}'"


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _save(tmp_path / "photos" / "a.jpg", _picture(0))
    assert Folder("~/photos", "tasks.t.images") == {"a": tmp_path / "photos" / "a.jpg"}


def test_a_large_folder_takes_little_memory(tmp_path):
    num = 2000
    for number in range(num):
        (tmp_path / f"{number:012}.jpg").touch()
    tracemalloc.start()
    try:
        found = Folder(tmp_path, "tasks.t.images")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == num
    assert peak < 100 * num  # with a path for each it would be 400


# --- pictures


def test_pictures_of_a_folder_and_all_within(tmp_path):
    names = ["b.2.png", "c.PNG", "a/2.png", "a/b/1.png", "d/2.png"]
    paths = [_save(tmp_path / name, _picture(i)) for i, name in enumerate(names)]
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    _save(tmp_path / ".thumbnails" / "2.png", _picture(9))
    (tmp_path / "empty").mkdir()
    storage, entries = _travelled(Pictures(str(tmp_path), key="tasks.t"))
    assert entries == [list(x) for x in zip(["b.2", "c", "a/2", "a/b/1", "d/2"], paths, strict=True)]
    for i, entry in enumerate(entries):
        _equal(storage.read(entry), [_picture(i)])


def test_pictures_are_listed_as_asked_for(tmp_path):
    _save(tmp_path / "a" / "1.png", _picture(0))
    _save(tmp_path / "b" / "1.png", _picture(1))
    _save(tmp_path / "b" / "1.jpg", _picture(1))  # refused, when it is reached
    entries = Pictures(str(tmp_path), key="tasks.t").entries()
    assert next(entries)[0] == "a/1"
    assert _refused(list, entries).startswith("tasks.t.images: '1.jpg' and '1.png' have the same stem in ")


def test_listing_opens_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    storage = Pictures(str(tmp_path), key="tasks.t")
    (entry,) = storage.entries()
    assert _refused(storage.read, entry).startswith(f"{tmp_path / 'a.png'}: unreadable picture (")


def test_no_pictures(tmp_path):
    (tmp_path / "inner").mkdir()
    message = _refused(Pictures(str(tmp_path), key="tasks.t").entries)
    assert message == f"tasks.t.images: no pictures (.jpg, .jpeg, .png) in '{tmp_path}'"
    nowhere = f"{tmp_path}/nowhere"
    assert _refused(Pictures(nowhere, key="tasks.t").entries) == f"tasks.t.images: no folder '{nowhere}'"


# --- pairs


def _pairs(root, stems, kinds=("images", "depth", "mask")):
    for number, (stem, kind) in enumerate(itertools.product(stems, kinds)):
        _save(root / kind / f"{stem}.png", _picture(number))
    return Pairs(str(root / kinds[0]), [str(root / kind) for kind in kinds[1:]], key="tasks.t")


def test_pairs_of_several_kinds(tmp_path):
    _save(tmp_path / "depth" / "spare.png", _picture(50))
    storage, entries = _travelled(_pairs(tmp_path, "ba"))
    assert entries == [
        [stem, *(str(tmp_path / kind / f"{stem}.png") for kind in ("images", "depth", "mask"))]
        for stem in "ab"
    ]
    _equal(storage.read(entries[0]), [_picture(3), _picture(4), _picture(5)])
    _equal(storage.read(entries[1]), [_picture(0), _picture(1), _picture(2)])


def test_images_without_annotation(tmp_path):
    storage = _pairs(tmp_path, "abc")
    (tmp_path / "mask" / "b.png").unlink()
    image = tmp_path / "images" / "b.png"
    assert _refused(storage.entries) == f"tasks.t: image without annotation: {image}"
    (tmp_path / "mask" / "c.png").unlink()
    assert _refused(storage.entries) == f"tasks.t: image without annotation: {image} (and 1 more)"


def test_folders_of_pairs_that_are_refused(tmp_path):
    images, nowhere = tmp_path / "images", f"{tmp_path}/nowhere"
    images.mkdir()
    message = _refused(Pairs(nowhere, [str(images)], key="tasks.t").entries)
    assert message == f"tasks.t.images: no folder '{nowhere}'"
    message = _refused(Pairs(str(images), [str(images)], key="tasks.t").entries)
    assert message == f"tasks.t.images: no pictures (.jpg, .jpeg, .png) in '{images}'"
    _save(images / "a.png", _picture(0))
    message = _refused(Pairs(str(images), [str(images), nowhere], key="tasks.t").entries)
    assert message == f"tasks.t.annotations: no folder '{nowhere}'"


def test_sizes_that_differ(tmp_path):
    storage = _pairs(tmp_path, "a")
    path = _save(tmp_path / "mask" / "a.png", _picture(0, (9, 6)))
    (entry,) = storage.entries()
    assert _refused(storage.read, entry) == f"{path}: 6x9 pixels, its image has 9x6"


# --- classes


def test_a_folder_a_class(tmp_path):
    names = ["n01/2.png", "n02/1.png", "n02/2.png"]
    paths = [_save(tmp_path / name, _picture(i)) for i, name in enumerate(names)]
    (tmp_path / "labels.txt").write_text("no class")
    (tmp_path / ".cache").mkdir()
    storage = Classes(str(tmp_path), key="tasks.t")
    assert storage.classes() == ["n01", "n02"]
    storage, entries = _travelled(storage)
    assert entries == [
        ["n01/2", paths[0], "n01"],
        ["n02/1", paths[1], "n02"],
        ["n02/2", paths[2], "n02"],
    ]
    for i, entry in enumerate(entries):
        _equal(storage.read(entry), [_picture(i)])
    (tmp_path / "n03").mkdir()
    entries = storage.entries()
    assert [next(entries)[0] for _ in range(3)] == ["n01/2", "n02/1", "n02/2"]
    message = f"tasks.t.images: no pictures (.jpg, .jpeg, .png) in '{tmp_path / 'n03'}'"
    assert _refused(list, entries) == message


def test_no_classes(tmp_path):
    _save(tmp_path / "a.png", _picture(0))
    message = _refused(Classes(str(tmp_path), key="tasks.t").entries)
    assert message == f"tasks.t.images: no folder of a class in '{tmp_path}'"
    nowhere = f"{tmp_path}/nowhere"
    assert _refused(Classes(nowhere, key="tasks.t").classes) == f"tasks.t.images: no folder '{nowhere}'"


# --- lists


@pytest.fixture
def files(tmp_path):
    """Four pictures of one size; two of them in a folder, with a comma in the name of one."""
    names = ["x.png", "y.png", "inner/x.png", "inner/y, z.png"]
    return [_save(tmp_path / name, _picture(i)) for i, name in enumerate(names)]


def _listed(folder, name, *lines):
    path = folder / name
    path.write_bytes(b"".join(x if isinstance(x, bytes) else f"{x}\n".encode() for x in lines))
    return Listed(str(path), key="tasks.t")


def test_a_csv(tmp_path, files):
    lines = (
        "annotation_b,name,image,annotation",
        'x.png,first,y.png,"inner/y, z.png"',
        "",
        f"y.png,,x.png,{files[2]}",
    )
    for mark in (b"", b"\xef\xbb\xbf"):  # with and without a byte order mark
        storage, entries = _travelled(_listed(tmp_path, "a.csv", mark, *lines))
        assert entries == [["first", files[1], files[0], files[3]], ["x", files[0], files[1], files[2]]]
        _equal(storage.read(entries[0]), [_picture(1), _picture(0), _picture(3)])
    assert list(_listed(tmp_path, "b.CSV", b"image\r\nx.png\r\n").entries()) == [["x", files[0]]]


def test_a_jsonl(tmp_path, files):
    storage = _listed(
        tmp_path,
        "a.jsonl",
        '{"image": "inner/x.png", "annotation2": "x.png", "annotation": "y.png"}',
        "",
        json.dumps({"name": "second", "annotation": files[3], "annotation2": files[0], "image": files[1]}),
    )
    storage, entries = _travelled(storage)
    assert entries == [["x", files[2], files[0], files[1]], ["second", files[1], files[0], files[3]]]
    _equal(storage.read(entries[1]), [_picture(1), _picture(0), _picture(3)])


@pytest.mark.parametrize(
    ("name", "lines", "place", "message"),
    [
        ("a.csv", ["image,mask", "x.png,y.png"], ":1", "unknown column 'mask'; choices: image, annotation,"),
        ("a.csv", ["annotation", "x.png"], ":1", "no column 'image'; it has annotation"),
        ("a.csv", ["image,image", "x.png,y.png"], ":1", "a column stands twice in image, image"),
        ("a.csv", ["image,annotation", "x.png"], ":2", "1 fields, the header has 2"),
        ("a.csv", ["image", "", "x.png,y.png"], ":3", "2 fields, the header has 1"),
        ("a.csv", ["image,annotation", "x.png,"], ":2", "no path in column 'annotation'"),
        ("a.csv", ["image,annotation", "x.png,z.png"], ":2", "no file 'z.png'"),
        ("a.csv", ["image,annotation", "x.png,y.png", f"{'x' * 300},y.png"], ":3", "no file 'xxx"),
        ("a.csv", ["image", '"x.png'], ":2", "broken CSV (unexpected end of data)"),
        ("a.csv", ["image", b"x\xff.png\n"], ":2", "not UTF-8 (invalid start byte)"),
        ("a.jsonl", ['{"image": "x.png"}', '{"image": "x.png"'], ":2", "broken JSON (Expecting"),
        ("a.jsonl", ["[" * 100_000], ":1", "broken JSON (maximum recursion depth"),
        ("a.jsonl", ["{}"], ":1", "no column 'image'"),
        ("a.jsonl", ['["x.png"]'], ":1", "not an object with the key 'image'"),
        ("a.jsonl", ['{"image": 5}'], ":1", "no path in column 'image'"),
        ("a.jsonl", ['{"image": "x.png", "mask": "y.png"}'], ":1", "unknown column 'mask'; choices: image,"),
        (
            "a.jsonl",
            ['{"image": "x.png"}', '{"image": "x.png", "annotation": "y.png"}'],
            ":2",
            "unknown column 'annotation'; the first line has image",
        ),
        (
            "a.jsonl",
            ['{"image": "x.png", "annotation": "y.png"}', "", '{"image": "x.png"}'],
            ":3",
            "no path in column 'annotation'",
        ),
    ],
)
def test_lines_that_are_refused(tmp_path, files, name, lines, place, message):
    refusal = _refused(_listed(tmp_path, name, *lines).entries)
    assert refusal.startswith(f"{tmp_path / name}{place}: {message}")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.txt", ["x.png"], "'FILE' is no list; choices: .csv, .jsonl"),
        ("a.csv", [], "no samples in 'FILE'"),
        ("a.csv", ["image,annotation"], "no samples in 'FILE'"),
        ("a.jsonl", ["", ""], "no samples in 'FILE'"),
    ],
)
def test_lists_that_are_refused(tmp_path, name, lines, message):
    storage = _listed(tmp_path, name, *lines)
    assert _refused(storage.entries) == f"tasks.t.images: {message.replace('FILE', storage.file)}"


def test_a_list_that_is_not_there(tmp_path):
    message = _refused(Listed(f"{tmp_path}/a.csv", key="tasks.t").entries)
    assert message == f"tasks.t.images: no file '{tmp_path}/a.csv'"


def test_a_list_is_read_line_by_line(tmp_path, files):
    for name, head, good in (("a.csv", ["image"], "x.png"), ("a.jsonl", [], '{"image": "x.png"}')):
        entries = _listed(tmp_path, name, *head, good, good, b"\xff\n").entries()
        assert [next(entries), next(entries)] == [["x", files[0]]] * 2
        with pytest.raises(UserError, match=re.escape(f"{name}:{3 + len(head)}: not UTF-8")):
            next(entries)


def test_listed_pictures_of_other_sizes(tmp_path, files):
    path = _save(tmp_path / "small.png", _picture(0, (3, 4)))
    storage = _listed(tmp_path, "a.csv", "image,annotation", "x.png,small.png")
    (entry,) = storage.entries()
    assert _refused(storage.read, entry) == f"{path}: 4x3 pixels, its image has 9x6"
