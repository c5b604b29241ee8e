import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.errors import UserError
from delvm.tokens.store import Grid, Layout, code_dtype, open_store, verify, write_manifest
from tests.processes import PATIENCE, end

SHAPES = {
    "pose": {"train": (5, 3, 2, 4), "validation": (2, 1, 2, 4)},
    "film": {"train": (7, 1, 6, 4), "validation": (3, 1, 6, 4)},
}
SAMPLE = 3 * 2 * 4 * 2  # bytes of a training sample of pose


def _codes(shape, num_codes=256, seed=0):
    return np.random.default_rng(seed).integers(num_codes, size=shape)


def _rows(codes, batch=4):
    """The samples' views in batches that end neither where a sample does nor where a shard does."""
    rows = codes.reshape(-1, *codes.shape[2:])
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]


def _layout(folder, shape=SHAPES["pose"]["train"], shard_bytes=2 * SAMPLE, num_codes=256):
    return Layout.plan(folder, shape, code_dtype(num_codes), shard_bytes)


def _write(folder, num_codes=256, shard_bytes=2 * SAMPLE):
    """A small store; returns its codes, `codes[split][task]`."""
    folder.mkdir(exist_ok=True)
    codes, tasks = {"train": {}, "validation": {}}, {}
    for task, splits in SHAPES.items():
        tasks[task] = {}
        for split, shape in splits.items():
            codes[split][task] = _codes(shape, num_codes)
            layout = _layout(folder / f"{task}.{split}", shape, shard_bytes, num_codes)
            layout.write_all(layout.missing(), _rows(codes[split][task]))
            tasks[task][split] = layout.describe()
    manifest = {"tokenizer": "abc", "num_codes": num_codes, "tokens_per_image": 4, "tasks": tasks}
    write_manifest(folder, manifest)
    return codes


def _whole(grid):
    """All codes of a grid, (samples, views, images, tokens)."""
    samples, views = np.indices(grid.shape[:2])
    return grid.gather(samples, views)


def _files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _refused(folder, message, **settings):
    """Opening ends in one line that says this."""
    with pytest.raises(UserError, match=message) as error:
        open_store(folder, **settings)
    assert "\n" not in str(error.value)


# --- the roundtrip


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(1, "uint16"), (256, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")],
)
def test_the_type_holds_every_code(num_codes, dtype):
    assert code_dtype(num_codes) == np.dtype(dtype)
    assert np.iinfo(code_dtype(num_codes)).max >= num_codes - 1


@pytest.mark.parametrize("shard_bytes", [1, 2 * SAMPLE, 3 * SAMPLE + 1, 1 << 20])
@pytest.mark.parametrize("num_codes", [256, 65_536, 65_537])
def test_roundtrip(tmp_path, num_codes, shard_bytes):
    codes = _write(tmp_path, num_codes, shard_bytes)
    store = open_store(tmp_path, tokenizer="abc")
    assert (store.num_codes, store.tokens_per_image) == (num_codes, 4)
    assert store.classes == {"train": {}, "validation": {}}
    for split, parts in codes.items():
        assert list(store.grids[split]) == ["pose", "film"]
        for task, expected in parts.items():
            grid = store.grids[split][task]
            assert (len(grid), grid.shape) == (len(expected), expected.shape)
            found = _whole(grid)
            assert found.dtype == (np.uint16 if num_codes <= 65_536 else np.uint32)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_codes", [65_536, 65_537])
def test_the_largest_code_comes_back(tmp_path, num_codes):
    layout = _layout(tmp_path, (1, 1, 1, 2), num_codes=num_codes)
    layout.write_all([0], [np.array([[[0, num_codes - 1]]])])
    assert np.load(layout.path(0)).tolist() == [[[[0, num_codes - 1]]]]


def test_a_plan_cuts_whole_samples():
    bytes_of = {1: 5, SAMPLE - 1: 5, SAMPLE: 5, 2 * SAMPLE: 3, 3 * SAMPLE - 1: 3, 4 * SAMPLE: 2, 1 << 20: 1}
    assert {size: _layout(Path("x"), shard_bytes=size).num_shards for size in bytes_of} == bytes_of
    layout = _layout(Path("x"), shard_bytes=2 * SAMPLE)
    assert [layout.samples(number) for number in range(3)] == [range(2), range(2, 4), range(4, 5)]
    # codes of 4 bytes: half as many samples
    assert _layout(Path("x"), shard_bytes=2 * SAMPLE, num_codes=65_537).num_shards == 5


def test_shards_are_plain_memory_mapped_npy_files(tmp_path):
    codes = _write(tmp_path)["train"]["pose"]
    folder = tmp_path / "pose.train"
    assert sorted(file.name for file in folder.iterdir()) == ["00000.npy", "00001.npy", "00002.npy"]
    shard = np.load(folder / "00001.npy", mmap_mode="r", allow_pickle=False)
    assert (shard.shape, shard.dtype) == ((2, 3, 2, 4), np.uint16)
    np.testing.assert_array_equal(shard, codes[2:4])
    for opened in open_store(tmp_path).grids["train"]["pose"].shards:
        assert isinstance(opened, np.memmap)
        assert not opened.flags.writeable


def test_the_manifest_tells_shapes_shards_and_checksums(tmp_path):
    _write(tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["tasks"]["pose"]["train"]
    files = [tmp_path / "pose.train" / f"0000{number}.npy" for number in range(3)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert entry == {"shape": [5, 3, 2, 4], "shard": 2, "sha256": digests}
    assert len(set(digests)) == 3


def test_classes_of_samples(tmp_path):
    _write(tmp_path)
    classes = np.array([2, 0, 2, 1, 0])
    _layout(tmp_path / "pose.train").write_classes(classes)
    found = open_store(tmp_path).classes
    assert list(found["train"]) == ["pose"]
    assert found["validation"] == {}
    np.testing.assert_array_equal(found["train"]["pose"], classes)
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(AssertionError):
        _layout(tmp_path / "pose.train").write_classes(classes[:4])


# --- gather


@given(
    shard=st.integers(1, 6),
    samples=st.integers(1, 6),
    views=st.integers(1, 3),
    images=st.integers(1, 3),
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (40, 2)]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_gather_is_fancy_indexing_of_the_whole_array(shard, samples, views, images, shape, data):
    codes = _codes((samples, views, images, 3), 60_000).astype(np.uint16)
    grid = Grid([codes[start : start + shard] for start in range(0, samples, shard)])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = [rng.integers(size, size=shape) for size in (samples, views, images)]
    for found, expected in (
        (grid.gather(*index), codes[tuple(index)]),
        (grid.gather(*index[:2]), codes[tuple(index[:2])]),
    ):
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, expected, strict=True)


def test_what_is_gathered_can_be_changed_and_the_store_stays(tmp_path):
    codes = _write(tmp_path)["train"]["pose"]
    grid = open_store(tmp_path).grids["train"]["pose"]
    grid.gather(np.array([0, 4]), np.array([2, 0]))[:] = 999
    np.testing.assert_array_equal(_whole(grid), codes)


@pytest.mark.parametrize(("sample", "view"), [(5, 0), (0, 3), (-1, 0)])
def test_what_no_grid_holds_is_not_gathered(tmp_path, sample, view):
    _write(tmp_path)
    grid = open_store(tmp_path).grids["train"]["pose"]
    with pytest.raises(ValueError, match="invalid entry in coordinates"):
        grid.gather(np.array([sample]), np.array([view]))


def test_a_pickled_grid_names_its_files(tmp_path):
    # a worker process that is not forked gets the store as a pickle: not gigabytes of codes
    codes = _write(tmp_path, shard_bytes=1 << 20)["train"]["pose"]
    grid = open_store(tmp_path).grids["train"]["pose"]
    text = pickle.dumps(grid)
    assert codes[0].astype(np.uint16).tobytes() not in text
    copy = pickle.loads(text)
    assert isinstance(copy.shards[0], np.memmap)
    np.testing.assert_array_equal(_whole(copy), codes)
    # codes in memory, or a part of a file, travel as they are
    part = pickle.loads(pickle.dumps(Grid([grid.shards[0][1:3]])))
    np.testing.assert_array_equal(_whole(part), codes[1:3])


# --- writing, and going on


def test_a_writer_that_fails_leaves_whole_shards_and_another_goes_on(tmp_path):
    codes = _codes(SHAPES["pose"]["train"])
    whole, layout = _layout(tmp_path / "whole"), _layout(tmp_path / "part")
    whole.write_all(whole.missing(), _rows(codes))

    def failing():
        yield from _rows(codes)[:2]  # 8 of the first shard's 6 and the second's 6 rows
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layout.write_all(layout.missing(), failing())
    assert sorted(_files(layout.folder)) == ["00000.npy"]
    assert layout.missing() == [1, 2]
    layout.write_all(layout.missing(), _rows(codes[2:]))
    assert layout.missing() == []
    assert _files(layout.folder) == _files(whole.folder)


def _killed(folder, codes):
    def rows():
        yield from _rows(codes)[:2]
        os.kill(os.getpid(), signal.SIGKILL)

    _layout(folder).write_all([0, 1, 2], rows())


def _write_part(folder, codes, rank, world):
    layout = _layout(folder)
    numbers = layout.missing(rank, world)
    mine = np.concatenate([codes[layout.samples(number)] for number in numbers])
    layout.write_all(numbers, _rows(mine))


def _run(*calls):
    """Call each in a process of its own, side by side; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call, args=arguments) for call, *arguments in calls]
    for process in processes:
        process.start()
    end(*processes, after=PATIENCE)
    return [process.exitcode for process in processes]


def _on_a_full_disk(folder, codes, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(OSError, match="File too large"):
        _layout(folder).write_all([0], _rows(codes[:2]))


@pytest.mark.parametrize("size", [10, 140, 223])  # in the header, in the data, at the last byte of 224
def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, size):
    assert _run((_on_a_full_disk, tmp_path, _codes(SHAPES["pose"]["train"]), size)) == [0]
    assert list(tmp_path.iterdir()) == []


def test_a_shard_has_the_bytes_of_np_save(tmp_path):
    codes = _codes((2, 3, 2, 4))
    _layout(tmp_path).write_all([0], _rows(codes))
    np.save(tmp_path / "expected.npy", codes.astype(np.uint16))
    assert (tmp_path / "00000.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_a_killed_process_leaves_whole_shards(tmp_path):
    codes = _codes(SHAPES["pose"]["train"])
    assert _run((_killed, tmp_path, codes)) == [-signal.SIGKILL]
    layout = _layout(tmp_path)
    assert layout.missing() == [1, 2]
    np.testing.assert_array_equal(np.load(layout.path(0)), codes[:2])


def test_two_processes_write_what_one_writes(tmp_path):
    codes = _codes(SHAPES["pose"]["train"])
    _write_part(tmp_path / "one", codes, 0, 1)
    assert _run(*((_write_part, tmp_path / "two", codes, rank, 2) for rank in range(2))) == [0, 0]
    assert sorted(_files(tmp_path / "two")) == ["00000.npy", "00001.npy", "00002.npy"]
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


@given(shards=st.integers(1, 20), world=st.integers(1, 7))
def test_ranks_share_the_shards(shards, world):
    layout = replace(_layout(Path("nowhere")), shape=(shards, 3, 2, 4), shard=1)
    parts = [layout.missing(rank, world) for rank in range(world)]
    assert sorted(number for part in parts for number in part) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [14, 16])
def test_rows_that_do_not_fill_the_shape_are_our_mistake(tmp_path, count):
    layout = _layout(tmp_path)
    with pytest.raises(AssertionError, match="rows than samples"):
        layout.write_all(layout.missing(), iter(np.zeros((count, 1, 2, 4), np.int64)))


def test_blocks_of_another_shape_are_our_mistake(tmp_path):
    with pytest.raises(AssertionError):
        _layout(tmp_path).write_all([2], [np.zeros((3, 2, 5), np.int64)])  # pictures have 4 tokens
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 8), st.lists(st.integers(0, 21), max_size=6))
@settings(max_examples=40, deadline=None)
def test_shards_do_not_depend_on_how_rows_come_in_blocks(tmp_path_factory, samples, views, shard, cuts):
    codes = _codes((samples, views, 2, 3))
    blocks = np.split(codes.reshape(-1, 2, 3), sorted(cuts))  # some of them empty
    layout = Layout(tmp_path_factory.mktemp("blocks"), codes.shape, np.dtype(np.uint16), shard)
    numbers = layout.missing()
    layout.write_all(numbers, iter(blocks))
    assert [len(np.load(layout.path(number))) for number in numbers] == list(
        map(len, map(layout.samples, numbers))
    )
    np.testing.assert_array_equal(_whole(layout.open()), codes)
    assert layout.num_bytes == sum(file.stat().st_size for file in layout.folder.iterdir())


def test_bytes_of_shards_are_known_before():
    # 10 shards whose headers have 128 bytes, and codes of 4 bytes
    layout = Layout.plan(Path("nowhere"), (10, 1, 2, 256), code_dtype(65_537), shard_bytes=1)
    assert layout.num_bytes == 10 * (128 + 2 * 256 * 4)


def test_no_shard_is_held_in_memory(tmp_path):
    codes = np.arange(1 << 15).reshape(1, 8, -1)  # blocks of 64 KB on disk, 256 KB in memory
    layout = Layout(tmp_path, (200, 1, 8, 1 << 12), np.dtype(np.uint16), 100)
    tracemalloc.start()
    try:
        layout.write_all([0, 1], (codes + number for number in range(200)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layout.path(1).stat().st_size > 6 << 20
    assert peak < 2 << 20
    np.testing.assert_array_equal(np.load(layout.path(1))[99, 0], (codes[0] + 199).astype(np.uint16))


def test_a_shard_has_its_name_once_its_last_row_is_there(tmp_path):
    codes = _codes(SHAPES["pose"]["train"]).reshape(-1, 1, 2, 4)  # 6 rows a shard
    layout, seen = _layout(tmp_path), []

    def rows():
        for row in codes:
            seen.append(sorted(file.name for file in tmp_path.glob("0*.npy")))
            yield row

    layout.write_all(layout.missing(), rows())
    names = ["00000.npy", "00001.npy"]
    assert seen == [[]] * 6 + [names[:1]] * 6 + [names] * 3


def test_what_a_killed_process_left_goes_when_its_shard_is_written(tmp_path):
    codes = _codes(SHAPES["pose"]["train"])
    assert _run((_killed, tmp_path, codes)) == [-signal.SIGKILL]
    assert [file.name[:7] for file in tmp_path.glob("*.partial")] == [".00001."]
    layout = _layout(tmp_path)
    layout.write_all([2], _rows(codes[4:]))
    assert len(list(tmp_path.glob("*.partial"))) == 1
    layout.write_all([1], _rows(codes[2:4]))
    assert sorted(_files(tmp_path)) == ["00000.npy", "00001.npy", "00002.npy"]
    np.testing.assert_array_equal(_whole(layout.open()), codes)


def test_two_runs_at_once_end_in_one_line_and_a_whole_shard(tmp_path):
    codes = _codes(SHAPES["pose"]["train"])

    def rows():
        yield from _rows(codes[:1])
        assert _run((_write_part, tmp_path, codes, 0, 1)) == [0]
        yield from _rows(codes[1:])

    with pytest.raises(UserError, match=rf"^{tmp_path}/00000\.npy: another run writes it at the same time$"):
        _layout(tmp_path).write_all([0, 1, 2], rows())
    np.testing.assert_array_equal(_whole(_layout(tmp_path).open()), codes)


# --- what can be wrong with a store


def test_another_tokenizer(tmp_path):
    _write(tmp_path)
    open_store(tmp_path, tokenizer="abc")
    _refused(tmp_path, rf"^{tmp_path}: written by tokenizer abc, this one is abd$", tokenizer="abd")


def test_no_manifest(tmp_path):
    _refused(tmp_path, rf"^{tmp_path}: not a token store \(no manifest\.json\)$")
    _refused(tmp_path / "nowhere", "not a token store")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"tokenizer": "abc", "num_codes": 256}'])
def test_a_damaged_manifest(tmp_path, text):
    _write(tmp_path)
    (tmp_path / "manifest.json").write_bytes(text)
    _refused(tmp_path, rf"^{tmp_path}/manifest\.json: unreadable manifest \(")


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": "pose"},
        {"shape": [5, 3, 2]},
        {"shape": [0, 3, 2, 4]},
        {"shape": [5, 3, -2, 4]},
        {"shape": None},
        {"shard": 0},
        {"shard": "two"},
        {"shard": None},
    ],
)
def test_a_manifest_of_impossible_grids(tmp_path, entry):
    _write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["tasks"]["pose"]["train"] |= entry
    write_manifest(tmp_path, manifest)
    _refused(tmp_path, r"manifest\.json: unreadable manifest \(")
    manifest["tasks"] = ["pose"]
    write_manifest(tmp_path, manifest)
    _refused(tmp_path, r"manifest\.json: unreadable manifest \(")


def test_a_missing_shard(tmp_path):
    _write(tmp_path)
    (tmp_path / "pose.train" / "00001.npy").unlink()
    _refused(tmp_path, rf"^{tmp_path}/pose\.train/00001\.npy: unreadable array \(.*No such file")


# 200: in the data; 100: in the header; 3: in the magic string
@pytest.mark.parametrize("size", [200, 100, 3, 0])
def test_a_shard_cut_short(tmp_path, size):
    _write(tmp_path)
    path = tmp_path / "pose.train" / "00001.npy"
    path.write_bytes(path.read_bytes()[:size])
    _refused(tmp_path, rf"^{path}: unreadable array \(")


@given(place=st.integers(0, 127), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_never_escapes_as_another_error(tmp_path_factory, place, byte):
    folder = tmp_path_factory.getbasetemp() / "header"
    if not folder.exists():
        _write(folder)
    path = folder / "pose.train" / "00001.npy"
    before = path.read_bytes()
    path.write_bytes(before[:place] + bytes([byte]) + before[place + 1 :])
    try:
        found = f"{path}: {open_store(folder).grids['train']['pose'].shards[1].shape}"
    except UserError as error:
        found = str(error)
    finally:
        path.write_bytes(before)
    assert found.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 2, 2, 4), np.uint16), r"uint16 \[2, 2, 2, 4\]"),
        (np.zeros((1, 3, 2, 4), np.uint16), r"uint16 \[1, 3, 2, 4\]"),
        (np.zeros((2, 3, 2, 4), np.uint32), r"uint32 \[2, 3, 2, 4\]"),
        (np.zeros((2, 3, 2, 4), np.int16), r"int16 \[2, 3, 2, 4\]"),
        (np.zeros((2, 3, 2, 4), ">u2"), r">u2 \[2, 3, 2, 4\]"),
    ],
)
def test_a_shard_of_another_shape_or_type(tmp_path, array, found):
    _write(tmp_path)
    path = tmp_path / "pose.train" / "00001.npy"
    np.save(path, array)
    _refused(tmp_path, rf"^{path}: {found}, the manifest says uint16 \[2, 3, 2, 4\]$")


def test_a_file_of_another_kind(tmp_path):
    _write(tmp_path)
    path = tmp_path / "pose.train" / "00001.npy"

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    np.save(path, np.array([Trap()], object), allow_pickle=True)  # would run code when read
    _refused(tmp_path, rf"^{path}: unreadable array \(")
    path.write_bytes(pickle.dumps(Trap()))
    _refused(tmp_path, rf"^{path}: unreadable array \(")
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))
    _refused(tmp_path, rf"^{path}: unreadable array \(")
    assert not (tmp_path / "sprung").exists()


def test_damaged_classes(tmp_path):
    _write(tmp_path)
    path = tmp_path / "pose.train" / "classes.npy"
    np.save(path, np.arange(4))
    _refused(tmp_path, rf"^{path}: int64 \[4\], the manifest says integers \[5\]$")
    np.save(path, np.zeros(5))
    _refused(tmp_path, rf"^{path}: float64 \[5\]")
    path.write_bytes(b"")
    _refused(tmp_path, rf"^{path}: unreadable array")


# --- checksums


def _shards(folder):
    """In the order of the manifest, the training ones first."""
    return [
        folder / f"{task}.{split}" / f"{number:05}.npy"
        for split, counts in (("train", {"pose": 3, "film": 4}), ("validation", {"pose": 1, "film": 2}))
        for task, count in counts.items()
        for number in range(count)
    ]


def test_a_whole_store_is_what_was_written(tmp_path):
    _write(tmp_path)
    _layout(tmp_path / "pose.train").write_classes(np.arange(5))
    files = _shards(tmp_path)
    assert sorted(files) == sorted(file for file in tmp_path.rglob("0*.npy"))
    assert verify(tmp_path) == sum(file.stat().st_size for file in files)


@given(data=st.data(), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_one_changed_bit_is_found(tmp_path_factory, data, bit):
    folder = tmp_path_factory.getbasetemp() / "bits"
    if not folder.exists():
        _write(folder)
    path = data.draw(st.sampled_from(_shards(folder)))
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
    try:
        with pytest.raises(UserError) as error:
            verify(folder)
    finally:
        path.write_bytes(before)
    assert str(error.value) == f"{path}: damaged, its content is not what was written (another sha256)"
    verify(folder)


def test_the_first_damaged_shard_is_named(tmp_path):
    _write(tmp_path)
    files = _shards(tmp_path)
    for path in reversed(files):
        codes = bytearray(path.read_bytes())
        codes[-1] ^= 1  # a code that opening takes for as good as another
        path.write_bytes(codes)
        open_store(tmp_path)
        with pytest.raises(UserError, match=rf"^{path}: damaged, "):
            verify(tmp_path)
    files[0].unlink()
    message = rf"^{files[0]}: unreadable array \(No such file or directory\)$"
    with pytest.raises(UserError, match=message):
        verify(tmp_path)


@pytest.mark.parametrize("digests", [None, [], ["0"], "01", {"0": 1, "1": 2}])
def test_a_manifest_without_checksums(tmp_path, digests):
    _write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["tasks"]["film"]["validation"]["sha256"] = digests
    write_manifest(tmp_path, manifest)
    open_store(tmp_path)
    message = rf"^{tmp_path}/manifest\.json: tasks\.film\.validation\.sha256 must be a list of 2 checksums$"
    with pytest.raises(UserError, match=message):
        verify(tmp_path)
    with pytest.raises(UserError, match="not a token store"):
        verify(tmp_path / "nowhere")


# --- pictures -> codes
