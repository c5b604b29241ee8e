import json
import pickle
import re
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from delvm import llama, ranks
from delvm.distill import cache as caching
from delvm.distill.cache import (
    COUNTS,
    CacheConfig,
    Cached,
    CachedRows,
    cache_bytes,
    open_cache,
    row_hashes,
    weights_hash,
    write_cache,
)
from delvm.distill.records import Record
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig
from delvm.tokens.store import Grid, TokenStore
from tests.processes import together
from tests.tiny_store import TOKENS, every_view, tiny_forms

pytestmark = pytest.mark.usefixtures("one_thread")
CODES, VOCAB = 19, 21  # and BOS and EOS: 5 bits an id
PAIRS = {"pairs": (12, 1, 1, 2)}
CPU = torch.device("cpu")


def _rows(num_rows=10, *, seed=0, data=0, kinds=CODES, **config):
    """Rows of two pairs, 10 tokens; with `length=7` cut ones, which have labels and positions."""
    codes = np.random.default_rng(data).integers(kinds, size=(12, 1, 2, TOKENS)).astype(np.uint16)
    store = TokenStore({"num_codes": CODES, "tokens_per_image": TOKENS}, {"train": {"pairs": Grid([codes])}},
                       {"train": {}})  # fmt: skip
    chosen = SentencesConfig(**config)
    return TrainingSentences(
        store, every_view(PAIRS), tiny_forms(PAIRS, chosen), chosen, num_rows=num_rows, seed=seed
    )


def _teacher(seed=0, vocab=VOCAB):
    model = llama.build("micro", vocab, 16, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return Live(model)


def _write(folder, rows=None, teacher=None, *, kind="topk", count=5, num_rows=0, **changes):
    """A small cache in shards of three rows."""
    rows, teacher = rows or _rows(), teacher or _teacher()
    config = CacheConfig(kind, count, num_rows)
    row_bytes = Record(kind, config.codes, VOCAB).row_bytes(rows.length)
    arguments = {
        "temperature": 2.0, "seed": 3, "batch_size": 4, "device": CPU, "teacher_hash": "t" * 16,
        "tokenizer_hash": "k" * 16, "shard_bytes": 3 * row_bytes,
    }  # fmt: skip
    write_cache(folder, rows, teacher, config, **(arguments | changes))


def _files(folder):
    """Every file in a folder, its content and when it was written."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def _shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}


def _refused(message, call, *arguments, **settings):
    with pytest.raises(UserError, match=message) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)


def _live(rows, teacher, indices, temperature=2.0):
    """(rows, length-1, vocabulary) float64 probabilities of the teacher itself."""
    target = teacher.targets(rows.__getitems__(indices))
    logits = target.hidden.double() @ target.head.double().T / temperature
    return logits.softmax(-1).view(len(indices), rows.length - 1, -1)


# --- writing and reading ---


@pytest.mark.parametrize("config", [{}, {"length": 7}], ids=["whole rows", "cut rows"])
def test_all_codes_are_the_live_distribution(tmp_path, config):
    rows, teacher = _rows(**config), _teacher()
    _write(tmp_path, rows, teacher, count=VOCAB)
    cache = open_cache(tmp_path, teacher="t" * 16, tokenizer="k" * 16, temperature=2.0)
    cached, signal = CachedRows(rows, cache), Cached(cache)
    assert (signal.kind, signal.vocabulary, signal.temperature) == ("topk", VOCAB, 2.0)
    assert signal.to(CPU) is signal
    batch = cached.__getitems__([3, 0, 9])
    for key, part in rows.__getitems__([3, 0, 9]).items():
        assert torch.equal(batch[key], part)
    shape = (3, rows.length - 1, VOCAB)
    ids, probabilities = batch["teacher_ids"], batch["teacher_probabilities"]
    assert (ids.dtype, ids.shape) == (torch.int32, shape)
    assert (probabilities.dtype, probabilities.shape) == (torch.float32, shape)

    target = signal.targets(batch)
    assert target.tail
    found = torch.zeros(3 * (rows.length - 1), VOCAB, dtype=torch.float64)
    found.scatter_(-1, target.ids.long(), target.probabilities.double())
    expected = _live(rows, teacher, [3, 0, 9]).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert expected.max() > 3 / VOCAB  # else the test would see little


def test_the_likeliest_codes_of_the_live_distribution(tmp_path):
    rows, teacher = _rows(), _teacher()
    _write(tmp_path, rows, teacher, count=4)
    target = Cached(open_cache(tmp_path)).targets(
        CachedRows(rows, open_cache(tmp_path)).__getitems__(range(10))
    )
    expected, ids = _live(rows, teacher, range(10)).flatten(0, 1).topk(4)
    assert torch.equal(target.ids.long(), ids)
    torch.testing.assert_close(target.probabilities.double(), expected, rtol=1e-3, atol=1e-6)


def test_drawn_codes_have_the_shares_of_the_live_distribution(tmp_path):
    rows, teacher, count = _rows(), _teacher(), 200
    _write(tmp_path, rows, teacher, kind="sampled", count=count)
    cached = CachedRows(rows, open_cache(tmp_path))
    batch = cached.__getitems__([7, 2])
    assert "teacher_probabilities" not in batch
    target = Cached(cached.cache).targets(batch)
    assert not target.tail
    torch.testing.assert_close(target.probabilities.sum(-1), torch.ones(18))
    found = torch.zeros(18, VOCAB).scatter_add_(-1, target.ids.long(), target.probabilities)
    assert (found - _live(rows, teacher, [7, 2]).flatten(0, 1)).abs().max() < 2 / count


def test_draws_follow_the_seed_and_the_number_of_the_row(tmp_path):
    rows = _rows(kinds=1)  # which are all the same
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        _write(tmp_path / name, rows, kind="sampled", count=8, seed=seed)
    one, same, other = (
        CachedRows(rows, open_cache(tmp_path / name)).__getitems__(range(10))["teacher_ids"]
        for name in ("one", "same", "other")
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({tuple(row.flatten().tolist()) for row in one}) == 10


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 100}, {"shard_bytes": 1}, {"shard_bytes": 1 << 20}], ids=str
)
def test_batches_shards_and_chunks_change_nothing(tmp_path, kind, changes, monkeypatch):
    rows = _rows(length=7)
    _write(tmp_path / "one", rows, kind=kind)
    monkeypatch.setattr(caching, "CHUNK", 5)
    _write(tmp_path / "two", rows, kind=kind, **changes)
    one, two = (CachedRows(rows, open_cache(tmp_path / name)) for name in ("one", "two"))
    expected, found = one.__getitems__(range(10)), two.__getitems__(range(10))
    assert torch.equal(found["teacher_ids"], expected["teacher_ids"])
    if kind == "topk":  # up to how the teacher's products are rounded
        key = "teacher_probabilities"
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-6)


def test_the_manifest_says_what_was_written(tmp_path):
    rows = _rows()
    _write(tmp_path, rows, kind="sampled", count=12)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", manifest.pop("rows_hash"))
    assert manifest == {
        "tokenizer": "k" * 16, "teacher": "t" * 16, "precision": "32", "kind": "sampled", "count": 12,
        "temperature": 2.0, "vocabulary": VOCAB, "length": 10, "seed": 3, "rows": 10, "bits_per_id": 5,
        "bytes_per_token": 8, "bytes_per_row": 84, "shard": 3,
    }  # fmt: skip
    # 10 rows: their checksums and hashes, and 9 distributions of 8 bytes each
    names = ["00000.npy", "00001.npy", "00002.npy", "00003.npy", "manifest.json"]
    assert sorted(_files(tmp_path)) == names
    shards = [np.load(tmp_path / name) for name in names[:4]]
    assert [(shard.shape, shard.dtype) for shard in shards] == [
        ((n, 1, 1, 84), np.uint8) for n in (3, 3, 3, 1)
    ]


def test_a_row_holds_the_hash_of_its_tokens_and_the_records_of_all_but_the_first(tmp_path):
    rows, teacher = _rows(), _teacher()
    _write(tmp_path, rows, teacher)
    row = np.load(tmp_path / "00001.npy")[2, 0, 0]  # the sixth
    assert row[4:12].tobytes() == row_hashes(rows.__getitems__([5])).tobytes()
    ids, _ = Record("topk", 5, VOCAB).read(row[12:].reshape(9, -1))
    np.testing.assert_array_equal(ids, _live(rows, teacher, [5])[0].topk(5).indices)


@pytest.mark.parametrize(
    ("config", "num_rows", "rows"),
    [
        (CacheConfig("topk", 5), 10, 10), (CacheConfig("sampled"), 7, 7), (CacheConfig("topk", 2, 4), 10, 4),
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_on_disk_are_known_before(tmp_path, config, num_rows, rows):
    data = _rows(num_rows)
    _write(tmp_path, data, kind=config.kind, count=config.count, num_rows=config.rows, shard_bytes=64 << 20)
    found = sum(file.stat().st_size for file in tmp_path.glob("*.npy"))
    assert cache_bytes(config, VOCAB, data.length, num_rows) == found
    # whose headers have 128 bytes
    assert found == 128 + rows * Record(config.kind, config.codes, VOCAB).row_bytes(10)


def test_the_bytes_of_many_shards_are_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "MAX_SHARDS", 4)
    _write(tmp_path, shard_bytes=1)  # 3, 3, 3 and 1 rows
    found = [file.stat().st_size for file in sorted(tmp_path.glob("*.npy"))]
    assert len(found) == 4
    assert cache_bytes(CacheConfig("topk", 5), VOCAB, 10, 10, shard_bytes=1) == sum(found)


@pytest.mark.parametrize(
    ("kind", "row", "shards"), [("topk", 479_010, 512), ("sampled", 40_952, 512)], ids=["topk", "sampled"]
)
def test_the_bytes_of_the_recipes(kind, row, shards):
    # 5.12 million rows of 2,048 tokens over 8,192 codes
    assert cache_bytes(CacheConfig(kind), 8192, 2048, 5_120_000) == 5_120_000 * row + shards * 128


def test_no_shard_is_held_in_memory(tmp_path):
    rows, teacher = _rows(3000), _teacher()
    rows.__getitems__([0, 2999])  # composes the epochs
    tracemalloc.start()
    try:
        _write(tmp_path, rows, teacher, count=VOCAB, batch_size=50, shard_bytes=64 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(np.load(file, mmap_mode="r")) for file in tmp_path.glob("*.npy")] == [3000]
    size = (tmp_path / "00000.npy").stat().st_size
    assert size > 1_500_000
    assert peak < size / 3


def test_never_more_shards_than_can_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "MAX_SHARDS", 4)
    _write(tmp_path, _rows(41), shard_bytes=1)
    assert [len(np.load(tmp_path / name)) for name in _shards(tmp_path)] == [11, 11, 11, 8]


# --- killed and gone on, or written by many ---


class _Killed(Exception):
    pass


def _kill_after(teacher, calls):
    """The teacher's forward passes, counted; the one after `calls` is the last."""
    counted = []

    def hook(*_):
        if len(counted) == calls:
            raise _Killed
        counted.append(1)

    teacher.model.model.register_forward_pre_hook(hook)
    return counted


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_killed_pass_leaves_whole_shards_and_goes_on(tmp_path, kind):
    teacher = _teacher()
    _kill_after(teacher, 4)
    with pytest.raises(_Killed):
        _write(tmp_path / "cache", teacher=teacher, kind=kind, batch_size=2)
    left = _shards(tmp_path / "cache")
    # 8 rows went through, shards have 3
    assert sorted(_files(tmp_path / "cache")) == ["00000.npy", "00001.npy", "begun.json"]
    with pytest.raises(UserError, match=r"cache: not a teacher's cache \(no manifest\.json\)$"):
        open_cache(tmp_path / "cache")

    teacher = _teacher()
    calls = _kill_after(teacher, 100)
    _write(tmp_path / "cache", teacher=teacher, kind=kind, batch_size=2)
    assert len(calls) == 2  # rows 6 to 9
    _write(tmp_path / "straight", kind=kind, batch_size=2)
    found = _shards(tmp_path / "cache")
    assert {name: found[name] for name in left} == left
    assert "begun.json" not in _files(tmp_path / "cache")
    one, two = (CachedRows(_rows(), open_cache(tmp_path / name)) for name in ("cache", "straight"))
    assert torch.equal(*(part.__getitems__(range(10))["teacher_ids"] for part in (one, two)))

    calls.clear()
    _write(tmp_path / "cache", teacher=teacher, kind=kind, batch_size=2)
    assert calls == []  # all is there


def test_a_shard_that_was_deleted_is_written_again(tmp_path):
    _write(tmp_path, batch_size=3)
    before = _shards(tmp_path)
    (tmp_path / "00001.npy").unlink()
    teacher = _teacher()
    calls = _kill_after(teacher, 100)
    _write(tmp_path, teacher=teacher, batch_size=3)
    assert len(calls) == 1
    assert _shards(tmp_path) == before
    open_cache(tmp_path)


def test_what_a_single_process_does_not_write_is_missed(tmp_path):
    message = (
        r": 2 of 4 shards are missing, the first 00000\.npy; other processes should have written them, do all"
    )
    _refused(message, _write, tmp_path, rank=1, world=2, batch_size=3)
    assert sorted(_files(tmp_path)) == ["00001.npy", "00003.npy", "begun.json"]
    _refused(
        r": 1 of 4 shards are missing, the first 00002\.npy", _write, tmp_path, rank=0, world=4, batch_size=3
    )
    _write(tmp_path, batch_size=3)
    _write(tmp_path.with_name("alone"), batch_size=3)
    assert _shards(tmp_path) == _shards(tmp_path.with_name("alone"))


def test_two_processes_write_what_one_writes(tmp_path):
    def work():
        teacher, seen = _teacher(), []

        def hook(*_):
            time.sleep(0.3 * ranks.rank())  # the second is done long after the first
            seen.append((tmp_path / "two" / "manifest.json").exists())

        teacher.model.model.register_forward_pre_hook(hook)
        _write(tmp_path / "two", teacher=teacher, batch_size=3)
        return seen, sorted(_files(tmp_path / "two"))

    names = ["00000.npy", "00001.npy", "00002.npy", "00003.npy", "manifest.json"]
    # each writes two shards, and when the one has returned the other's are whole, and the manifest is there
    assert together(work) == [([False, False], names)] * 2
    _write(tmp_path / "one", batch_size=3)
    one, two = (
        {name: content for name, (content, _) in _files(tmp_path / part).items()} for part in ("one", "two")
    )
    assert one == two


def test_no_manifest_where_a_process_has_failed(tmp_path):
    def work():
        teacher = _teacher()
        if ranks.rank() == 1:
            _kill_after(teacher, 1)
        _write(tmp_path, teacher=teacher, batch_size=3)

    first, second = together(work)
    assert isinstance(first, ranks.Ended)
    assert isinstance(second, _Killed)
    assert sorted(_files(tmp_path)) == ["00000.npy", "00001.npy", "00002.npy", "begun.json"]


def test_two_processes_refuse_as_one(tmp_path):
    _write(tmp_path)
    before = _files(tmp_path)
    first, second = together(lambda: _write(tmp_path, temperature=1.0))
    assert re.search(r"holds a teacher's cache with temperature 2\.0, wanted is 1\.0; ", str(first))
    assert isinstance(second, ranks.Ended)
    assert _files(tmp_path) == before


# --- a folder that several runs share ---


def test_a_whole_cache_is_left_as_it_is(tmp_path):
    folder = tmp_path / "shared" / "cache"  # made
    _write(folder)
    before = _files(folder)
    teacher = _teacher()
    _kill_after(teacher, 0)
    _write(folder, teacher=teacher)
    _write(folder, teacher=teacher, batch_size=1, shard_bytes=1)  # which change no row
    _write(folder, _rows(6), teacher)  # a student that sees fewer rows
    _write(folder, teacher=teacher, num_rows=4)
    assert _files(folder) == before
    # what it reads are the rows of the many
    many, few = (CachedRows(_rows(number), open_cache(folder)) for number in (10, 6))
    assert len(few) == 6
    assert torch.equal(many[5]["teacher_ids"], few[5]["teacher_ids"])


OTHERS = [
    ({"temperature": 1.0}, "temperature 2.0, wanted is 1.0"),
    ({"seed": 4}, "seed 3, wanted is 4"),
    ({"teacher_hash": "u" * 16}, f"teacher {'t' * 16}, wanted is {'u' * 16}"),
    ({"tokenizer_hash": "l", "teacher_hash": "u"}, f"tokenizer {'k' * 16}, wanted is l"),
    ({"kind": "sampled"}, "kind topk, wanted is sampled"),
    ({"count": 4}, "count 5, wanted is 4"),
    ({"rows": _rows(12)}, "rows 10, wanted is 12"),
    ({"rows": _rows(length=7)}, "length 10, wanted is 7"),
    ({"rows": _rows(data=1)}, "rows_hash [0-9a-f]{16}, wanted is [0-9a-f]{16}"),
    ({"teacher": Live(_teacher().model, precision="bf16")}, "precision 32, wanted is bf16"),
    ({"teacher": _teacher(vocab=22)}, f"vocabulary {VOCAB}, wanted is 22"),
]


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "begun"])
@pytest.mark.parametrize(("changes", "message"), OTHERS, ids=[message.split(",")[0] for _, message in OTHERS])
def test_a_cache_of_other_settings_is_refused_and_stays(tmp_path, changes, message, begun):
    teacher = _teacher()
    if begun:
        _kill_after(teacher, 2)
        with pytest.raises(_Killed):
            _write(tmp_path, teacher=teacher)
    else:
        _write(tmp_path, teacher=teacher)
    before = _files(tmp_path)
    expected = (
        rf"^{tmp_path}: holds a teacher's cache with {message}; choose another folder, or delete that cache$"
    )
    _refused(expected, _write, tmp_path, **changes)
    assert _files(tmp_path) == before


def test_a_begun_cache_of_more_rows_is_not_ended_for_fewer(tmp_path):
    teacher = _teacher()
    _kill_after(teacher, 2)
    with pytest.raises(_Killed):
        _write(tmp_path, teacher=teacher)
    _refused("with rows 10, wanted is 6; ", _write, tmp_path, _rows(6))


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path):
    (tmp_path / "photographs").mkdir()
    message = rf"^{tmp_path}: holds 'photographs' and no teacher's cache; choose another folder$"
    _refused(message, _write, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]
    (tmp_path / "manifest.json").write_text('{"tokenizer": "abc", "num_codes": 256, "tasks": {}}')
    message = rf"^{tmp_path}/manifest\.json: not the manifest of a teacher's cache \(KeyError\('kind'\)\)$"
    _refused(message, _write, tmp_path)
    _refused(r"manifest\.json: not a folder$", _write, tmp_path / "manifest.json")


def test_what_a_stage_and_the_system_leave_in_a_folder_is_no_hindrance(tmp_path):
    for name in ("stage.json", ".DS_Store", ".begun.json.partial"):
        (tmp_path / name).touch()
    _write(tmp_path)
    assert len(open_cache(tmp_path).grid) == 10


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    many = 10**12
    wanted = many * Record("topk", 5, VOCAB).row_bytes(10) + caching.MAX_SHARDS * 128
    message = rf"^{tmp_path}: the teacher's cache takes {wanted:,} bytes, the disk has [0-9,]+ free; "
    _refused(message, _write, tmp_path, _rows(many))
    assert list(tmp_path.iterdir()) == []


# --- who reads ---


def test_rows_beyond_the_cache_are_its_rows_again(tmp_path):
    rows = _rows(10)
    _write(tmp_path, rows, num_rows=4)
    cached = CachedRows(rows, open_cache(tmp_path))
    assert len(cached) == 10
    assert len(cached.cache.grid) == 4
    for index in (0, 3, 4, 9):
        item, again = cached[index], cached[index % 4]
        assert torch.equal(item["tokens"], rows[index % 4]["tokens"])
        assert item.keys() == again.keys()
        assert all(torch.equal(part, again[key]) for key, part in item.items())
    assert not torch.equal(cached[4]["tokens"], rows[4]["tokens"])


def test_several_students_read_one_cache(tmp_path):
    _write(tmp_path, _rows(10))
    cache = open_cache(tmp_path)
    long, short = CachedRows(_rows(10), cache), CachedRows(_rows(6), cache)
    assert (len(long), len(short)) == (10, 6)
    ours, theirs = long.__getitems__([5, 1]), short.__getitems__([5, 1])
    assert all(torch.equal(part, theirs[key]) for key, part in ours.items())


def test_worker_processes_change_nothing(tmp_path):
    rows = _rows(length=7)
    _write(tmp_path, rows)
    cached = CachedRows(rows, open_cache(tmp_path))
    loader = DataLoader(
        cached, batch_size=4, num_workers=2, collate_fn=cached.collate, multiprocessing_context="fork"
    )
    found, expected = list(loader), cached.__getitems__(range(10))
    assert [len(batch["tokens"]) for batch in found] == [4, 4, 2]
    for key, part in expected.items():
        assert torch.equal(torch.cat([batch[key] for batch in found]), part)
    copied = pickle.loads(
        pickle.dumps(cached)
    )  # as for processes that are spawned: the files are mapped again
    assert torch.equal(copied[9]["teacher_ids"], cached[9]["teacher_ids"])
    assert isinstance(copied.cache.grid.shards[0], np.memmap)


# --- what is refused ---


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"teacher": "other"}, "written with teacher tttttttttttttttt, asked for other$"),
        ({"tokenizer": "other"}, "written with tokenizer kkkkkkkkkkkkkkkk, asked for other$"),
        ({"temperature": 1.0}, r"written with temperature 2\.0, asked for 1\.0$"),
    ],
)
def test_another_teacher_tokenizer_or_temperature_is_refused(tmp_path, asked, message):
    _write(tmp_path)
    _refused(message, open_cache, tmp_path, **asked)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_rows(length=7), "written for rows of 10 tokens, these have 7$"),
        (
            _rows(seed=1),
            "written for rows of hash [0-9a-f]{16}, these have [0-9a-f]{16}; their data, order and",
        ),
        (_rows(data=1), "written for rows of hash"),
    ],
    ids=["length", "seed", "data"],
)
def test_other_rows_are_refused(tmp_path, rows, message):
    _write(tmp_path)
    _refused(message, CachedRows, rows, open_cache(tmp_path))


def test_the_same_tokens_under_other_boundaries_are_refused(tmp_path):
    _write(tmp_path, _rows(length=7))
    rows = _rows(length=7, boundaries="run_on")
    assert torch.equal(rows[3]["tokens"], _rows(length=7)[3]["tokens"])
    _refused("written for rows of hash", CachedRows, rows, open_cache(tmp_path))


class _Numbered:
    """Rows whose tokens are their number, but for one of them."""

    def __init__(self, other=-1):
        self.other = other

    def __getitems__(self, numbers):
        return {"tokens": torch.tensor([[-1 if number == self.other else number] for number in numbers])}


@pytest.mark.parametrize(
    ("num_rows", "seen"), [(701, range(0, 701, 100)), (5_120_000, [0, 5_119_999]), (8, range(8)), (1, [0])]
)
def test_rows_are_compared_from_the_first_to_the_last(num_rows, seen):
    expected = caching.rows_hash(_Numbered(), num_rows)
    assert all(caching.rows_hash(_Numbered(number), num_rows) != expected for number in seen)
    assert caching.rows_hash(_Numbered(num_rows), num_rows) == expected  # beyond the last


def test_a_row_with_other_tokens_is_refused_when_it_is_read(tmp_path):
    rows = _rows()
    _write(tmp_path, rows)
    cache = open_cache(tmp_path)
    right, wrong = (row_hashes(rows.__getitems__(numbers)) for numbers in ([2, 8], [2, 9]))
    assert cache.read([2, 8], right)["teacher_ids"].shape == (2, 9, 5)
    message = rf"^{tmp_path}/00002\.npy: row 8 of the cache was written for other tokens$"
    _refused(message, cache.read, [2, 8], wrong)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize("place", [0, 4, 12, -1], ids=["checksum", "hash", "first record", "last record"])
def test_a_damaged_row_is_refused_when_it_is_read(tmp_path, kind, place):
    rows = _rows()
    _write(tmp_path, rows, kind=kind)
    shard = np.load(tmp_path / "00001.npy", mmap_mode="r+")
    shard[2, 0, 0, place] ^= 1
    shard.flush()
    cached = CachedRows(rows, open_cache(tmp_path))
    message = (
        rf"^{tmp_path}/00001\.npy: row 5 of the cache is damaged, its content is not what was written"
        r" \(another crc32\)$"
    )
    _refused(message, cached.__getitems__, [9, 5, 0])
    assert cached.__getitems__([0, 4, 6, 9])["teacher_ids"].shape == (4, 9, 5)  # the others are as they were


def test_more_codes_or_rows_than_there_are_are_refused(tmp_path):
    message = f"^cache.count: 22, the teacher's vocabulary has {VOCAB} ids$"
    _refused(message, _write, tmp_path, count=22)
    _refused("^cache.rows: 11, the student sees 10$", _write, tmp_path, num_rows=11)
    _write(tmp_path, kind="sampled", count=22)  # of these there may be any number


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "{}", {"kind": "all"}, {"count": 0}, {"rows": 0}, {"length": "x"}, {"shard": 0},
        {"temperature": None}, {"temperature": 0}, {"vocabulary": None}, {"bytes_per_row": 63},
        {"teacher": None}, {"tokenizer": 1}, {"rows_hash": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    _write(tmp_path)
    path = tmp_path / "manifest.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage)
    path.write_text(damage)
    _refused(r"manifest\.json: not the manifest of a teacher's cache \(", open_cache, tmp_path)


def test_damaged_shards_are_refused(tmp_path):
    _write(tmp_path)
    file = tmp_path / "00001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    _refused(r"00001\.npy: unreadable array", open_cache, tmp_path)
    np.save(file, np.zeros((2, 1, 1, 5), np.uint8))
    _refused(r"00001\.npy: uint8 \[2, 1, 1, 5\], the manifest says uint8 \[3, 1, 1, ", open_cache, tmp_path)
    file.unlink()
    _refused(r"00001\.npy: unreadable array", open_cache, tmp_path)
    file.write_bytes(whole)
    assert len(open_cache(tmp_path).grid) == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "all"}, "^kind: 'all' is unknown; choices: topk, sampled$"),
        ({"count": -1}, "^count: -1 must be at least 0$"),
        ({"rows": -1}, "^rows: -1 must be at least 0$"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**values)


def test_the_number_of_codes_follows_the_kind():
    assert [CacheConfig(kind).codes for kind in COUNTS] == [64, 12]
    assert replace(CacheConfig(count=3), kind="sampled").codes == 3


def test_the_hash_of_weights_is_that_of_the_weights(tmp_path):
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        llama.save(_teacher(seed).model, tmp_path / name)
        found.append(weights_hash(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 16
