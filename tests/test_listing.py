import json
import pickle
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from delvm.errors import UserError
from delvm.images.folders import Pictures
from delvm.images.listing import Entries, ListWriter, Stored, rename


def _thumbnail(number):
    return np.random.default_rng(number).integers(256, size=256, dtype=np.uint8)


def _write(file, entries):
    with ListWriter(file) as writer:
        for number, entry in enumerate(entries):
            writer.add(entry, _thumbnail(number))
    return Entries(file)


# what a storage may put behind the name: file names that are no Unicode, nested facts
FACTS = st.recursive(
    st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(st.characters()) | st.none(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(), max_size=4), FACTS), max_size=6))
def test_a_list_gives_back_what_was_added(rows):
    with tempfile.TemporaryDirectory() as folder:
        entries = _write(Path(folder) / "t.train", map(list, rows))
        assert len(entries) == len(rows)
        assert [entries[number] for number in range(len(rows))] == [list(row) for row in rows]
        assert list(entries) == [list(row) for row in rows]
        assert entries.thumbnails().shape == (len(rows), 256)
        for number, thumbnail in enumerate(entries.thumbnails()):
            np.testing.assert_array_equal(thumbnail, _thumbnail(number))


@pytest.mark.parametrize("name", ["grüße/猫", "two\nlines", '"quoted"', "latin\udce9", ""])
def test_names_of_every_kind(tmp_path, name):
    entries = _write(tmp_path / "t.train", [["a", "b.jpg"], [name, f"{name}.jpg", 3], ["z"]])
    assert entries[1] == [name, f"{name}.jpg", 3]
    assert entries[2] == ["z"]


def test_a_line_is_read_when_it_is_asked_for(tmp_path):
    entries = _write(tmp_path / "t.train", [["a"], ["b"], ["c"]])
    lines = tmp_path / "t.train.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b'["a"]', b"broke").replace(b'["b"]', b'["x"]'))
    assert entries[1] == ["x"]
    with pytest.raises(json.JSONDecodeError):
        entries[0]


def test_a_sample_that_is_not_in_the_list(tmp_path):
    entries = _write(tmp_path / "t.train", [["a"], ["b"]])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"^sample {index} of 2$"):
            entries[index]


def test_a_long_list_takes_no_memory(tmp_path):
    num = 5000
    tracemalloc.start()
    try:
        entries = _write(tmp_path / "t.train", ([f"{number}", "x" * 1000] for number in range(num)))
        copy = pickle.loads(pickle.dumps(entries))
        assert [entry[0] for entry in (entries[0], copy[num // 2], copy[num - 1])] == ["0", "2500", "4999"]
        assert sum(len(entry) for entry in entries) == 2 * num
        np.testing.assert_array_equal(copy.thumbnails()[num - 1], _thumbnail(num - 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "t.train.jsonl").stat().st_size > 1000 * num
    assert peak < 500_000  # of the 5 MB; 40 kB are offsets


def test_a_list_travels_as_its_name(tmp_path):
    entries = _write(tmp_path / "t.train", [[f"{number}"] for number in range(1000)])
    travelling = pickle.dumps(entries)
    assert len(travelling) < 400  # 8 kB of offsets do not come along
    copy = pickle.loads(travelling)
    assert (len(copy), copy[999]) == (1000, ["999"])


def test_a_list_of_nothing(tmp_path):
    entries = _write(tmp_path / "t.train", [])
    assert (len(entries), list(entries)) == (0, [])
    assert (entries.thumbnails().shape, entries.thumbnails().dtype) == ((0, 256), np.uint8)


def test_an_unfinished_list_cannot_be_opened(tmp_path):
    def broken():
        yield ["a"]
        raise UserError("a damaged picture")

    with pytest.raises(UserError, match="a damaged picture"):
        _write(tmp_path / "t.train", broken())
    with pytest.raises(FileNotFoundError):
        Entries(tmp_path / "t.train")


def test_lists_of_one_task_are_apart(tmp_path):
    # `.train` and `.validation` are no suffixes to be replaced
    train, held = _write(tmp_path / "t.train", [["a"]]), _write(tmp_path / "t.validation", [["b"], ["c"]])
    assert (list(train), list(held)) == ([["a"]], [["b"], ["c"]])
    assert len(list(tmp_path.iterdir())) == 6


def test_a_list_is_moved_over_another(tmp_path):
    old = _write(tmp_path / "t.train", [[f"{number}"] for number in range(9)])
    _write(tmp_path / ".t.kept", [["a"], ["b"]])
    assert old[8] == ["8"]
    rename(tmp_path / ".t.kept", tmp_path / "t.train")
    entries = Entries(tmp_path / "t.train")
    assert list(entries) == [["a"], ["b"]]
    np.testing.assert_array_equal(entries.thumbnails(), np.stack([_thumbnail(0), _thumbnail(1)]))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "t.train.jsonl",
        "t.train.npy",
        "t.train.thumbnails",
    ]


def test_listed_samples_are_read_from_their_storage(tmp_path):
    pictures = np.random.default_rng(0).integers(256, size=(3, 6, 9, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    storage = Pictures(str(tmp_path), key="tasks.t")
    backwards = reversed(list(storage.entries()))
    samples = pickle.loads(pickle.dumps(Stored(storage, _write(tmp_path / "t.train", backwards))))
    assert len(samples) == 3
    for number in range(3):
        (picture,) = samples[number]
        np.testing.assert_array_equal(picture, pictures[2 - number])
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="unreadable picture"):
        samples[1]
