import io
import json
import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest
from PIL import Image

from delvm.errors import UserError
from delvm.images.lmdb import Lmdb


def _picture(seed, shape=(20, 30)):
    return np.random.default_rng(seed).integers(256, size=(*shape, 3), dtype=np.uint8)


def _encoded(picture, suffix="png"):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, suffix)
    return buffer.getvalue()


def _write(folder, values, meta=None):
    """An LMDB folder of (name -> encoded picture); `meta` replaces the lines of meta_info.txt."""
    environment = lmdb.open(str(folder), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for name, value in values.items():
            transaction.put(name.encode(), value)
    environment.close()  # one environment of a folder a process
    lines = [f"{name}.png (20,30,3) 1" for name in values] if meta is None else meta
    (folder / "meta_info.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


NAMES = ["z", "GOPR0372-000047_s001", "a b", "sub/a.b"]


@pytest.fixture
def storage(tmp_path):
    """Rainy pictures 0, 1, ..., their clean ones 10, 11, ..., whose LMDB lists them in another order."""
    rainy = _write(tmp_path / "rain.lmdb", {name: _encoded(_picture(i)) for i, name in enumerate(NAMES)})
    clean = {name: _encoded(_picture(10 + i)) for i, name in reversed(list(enumerate(NAMES)))}
    return Lmdb(rainy, [_write(tmp_path / "clean.lmdb", clean)], key="tasks.rain")


def _refused(function, *arguments):
    """The message with which a call, and the listing of what it returns, is refused; one line."""
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _equal(sample, *seeds):
    assert len(sample) == len(seeds)
    for got, seed in zip(sample, seeds, strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, _picture(seed))


def test_pairs_in_the_order_of_the_images(storage):
    entries = json.loads(json.dumps(list(storage.entries())))
    assert entries == [[name, name, 20, 30] for name in NAMES]
    for i in (2, 0, 3, 1, 2):
        _equal(storage.read(entries[i]), i, 10 + i)


def test_no_annotations_and_two_of_them(storage):
    entry = [NAMES[1], NAMES[1], 20, 30]
    _equal(Lmdb(storage.images, [], key="tasks.rain").read(entry), 1)
    kinds = [storage.annotations[0], storage.images]
    _equal(Lmdb(storage.images, kinds, key="tasks.rain").read(entry), 1, 11, 1)


def test_pickled_with_open_files(storage):
    entries = list(storage.entries())
    _equal(storage.read(entries[0]), 0, 10)
    _equal(pickle.loads(pickle.dumps(storage)).read(entries[1]), 1, 11)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_opens_its_own(storage, method):
    entries = list(storage.entries())
    _equal(storage.read(entries[0]), 0, 10)
    with multiprocessing.get_context(method).Pool(1) as pool:
        for i, sample in enumerate(pool.map(storage.read, entries)):
            _equal(sample, i, 10 + i)
    _equal(storage.read(entries[1]), 1, 11)


def test_threads_open_it_once(storage):
    entries = list(storage.entries())
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(storage.read, entries * 8))
    for i, sample in enumerate(samples):
        _equal(sample, i % 4, 10 + i % 4)


def test_a_jpg_and_a_grey_picture(tmp_path):
    picture = np.full((20, 30, 3), (90, 90, 90), np.uint8)
    values = {"jpg": _encoded(picture, "jpeg"), "grey": _encoded(picture[..., 0])}
    storage = Lmdb(_write(tmp_path / "x", values), [], key="tasks.t")
    for entry in storage.entries():
        (got,) = storage.read(entry)
        np.testing.assert_array_equal(got, picture)


def test_meta_info_is_read_line_by_line(tmp_path):
    folder = _write(tmp_path / "x", {}, ["a.png (20,30,3) 1", "b.png (20,30,1) 1", "c.png 20 30", "d.png"])
    entries = Lmdb(folder, [], key="tasks.t").entries()
    assert [next(entries), next(entries)] == [["a", "a", 20, 30], ["b", "b", 20, 30]]
    message = f"{folder}/meta_info.txt:3: 'c.png 20 30' is not 'NAME.png (H,W,C) 1'"
    assert _refused(list, entries) == message


@pytest.mark.parametrize(
    "line", ["", "a (20,30,3) 1", "a.png (20,30) 1", "a.png (20,30,x) 1", "a.png (20,30,3)"]
)
def test_bad_lines(tmp_path, line):
    folder = _write(tmp_path / "x", {}, [line])
    message = f"{folder}/meta_info.txt:1: '{line}' is not 'NAME.png (H,W,C) 1'"
    assert _refused(Lmdb(folder, [], key="tasks.t").entries) == message


def test_folders_that_are_refused(tmp_path):
    good = _write(tmp_path / "good", {"a": _encoded(_picture(0))})
    nowhere, empty = f"{tmp_path}/nowhere", tmp_path / "empty"
    empty.mkdir()

    def refused(images, *annotations):
        return _refused(Lmdb(str(images), list(annotations), key="tasks.t").entries)

    assert refused(nowhere) == f"tasks.t.images: no folder '{nowhere}'"
    assert refused(good, good, nowhere) == f"tasks.t.annotations: no folder '{nowhere}'"
    assert refused(empty) == f"tasks.t.images: no data.mdb in '{empty}'"
    assert refused(good, str(empty)) == f"tasks.t.annotations: no data.mdb in '{empty}'"
    (empty / "data.mdb").write_bytes(b"")
    assert refused(empty) == f"tasks.t.images: no meta_info.txt in '{empty}'"
    (empty / "meta_info.txt").write_text("")
    assert refused(empty) == f"tasks.t.images: no samples in '{empty / 'meta_info.txt'}'"


def test_a_name_without_picture(tmp_path, storage):
    other = _write(tmp_path / "other", {"z": _encoded(_picture(0))})
    storage = Lmdb(storage.images, [other], key="tasks.t")
    entries = list(storage.entries())
    _equal(storage.read(entries[0]), 0, 0)
    assert _refused(storage.read, entries[2]) == f"{other}: no picture 'a b' in this LMDB"


def test_pictures_that_are_refused(tmp_path, storage):
    values = {
        "cut": _encoded(_picture(0))[:200],
        "text": b"no picture at all",
        "deep": _encoded(np.full((20, 30), 700, np.uint16)),
        "turned": _encoded(_picture(0, (30, 20))),
    }
    folder = _write(tmp_path / "x", values)
    storage = Lmdb(folder, [], key="tasks.t")
    messages = {entry[0]: _refused(storage.read, entry) for entry in storage.entries()}
    assert messages["cut"].startswith(f"{folder}: 'cut': unreadable picture (")
    assert messages["text"] == f"{folder}: 'text': unreadable picture (not a picture)"
    assert messages["deep"].endswith("(more than 8 bits a channel; save it with 8)")
    size = "20x30 pixels, the images' meta_info.txt says 30x20"
    assert messages["turned"] == f"{folder}: 'turned': {size}"


def test_an_annotation_of_another_size(tmp_path, storage):
    values = {name: _encoded(_picture(0, (19, 30))) for name in NAMES}
    other = _write(tmp_path / "other", values, [f"{name}.png (19,30,3) 1" for name in NAMES])
    storage = Lmdb(storage.images, [other], key="tasks.t")
    message = f"{other}: 'z': 30x19 pixels, the images' meta_info.txt says 30x20"
    assert _refused(storage.read, next(storage.entries())) == message


def test_a_truncated_file(tmp_path):
    whole = tmp_path / "whole"
    _write(whole, {str(i): _encoded(_picture(i)) for i in range(40)})
    data = (whole / "data.mdb").read_bytes()
    for size in (len(data) - 1, len(data) // 2, 9000):
        folder = tmp_path / f"cut{size}"
        _write(folder, {str(i): b"" for i in range(40)})
        (folder / "data.mdb").write_bytes(data[:size])
        storage = Lmdb(str(folder), [], key="tasks.t")
        message = f"{folder}/data.mdb: truncated, {size} of {len(data)} bytes"
        for entry in list(storage.entries())[-2:]:
            assert _refused(storage.read, entry) == message


@pytest.mark.parametrize("data", [b"", b"no LMDB" * 2000])
def test_another_file(tmp_path, data):
    folder = _write(tmp_path / "x", {"a": b""})
    (tmp_path / "x" / "data.mdb").write_bytes(data)
    storage = Lmdb(folder, [], key="tasks.t")
    assert _refused(storage.read, next(storage.entries())).startswith(f"{folder}: unreadable LMDB (")


def test_the_package_is_missing(storage, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    message = _refused(storage.read, next(storage.entries()))
    assert message == "an LMDB needs a package that is missing: pip install delvm[data]"
