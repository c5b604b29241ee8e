import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from delvm import llama
from delvm.distill import cache as caching
from delvm.distill.cache import (
    COUNTS,
    CacheConfig,
    Cached,
    CachedRows,
    Record,
    draw,
    open_cache,
    pack,
    row_hashes,
    unpack,
    weights_hash,
    write_cache,
)
from delvm.distill.divergences import forward_kl
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig
from delvm.tokens.store import Grid, TokenStore
from tests.tiny_store import TOKENS, every_view, tiny_forms

pytestmark = pytest.mark.usefixtures("one_thread")
laws = settings(max_examples=40, deadline=None)
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
    row_bytes = 8 + (rows.length - 1) * Record(kind, config.codes, VOCAB).num_bytes
    arguments = {
        "temperature": 2.0, "seed": 3, "batch_size": 4, "device": CPU, "teacher_hash": "t" * 16,
        "tokenizer_hash": "k" * 16, "shard_bytes": 3 * row_bytes,
    }  # fmt: skip
    write_cache(folder, rows, teacher, config, **(arguments | changes))


def _shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*/*.npy"))}


def _live(rows, teacher, indices, temperature=2.0):
    """(rows, length-1, vocabulary) float64 probabilities of the teacher itself."""
    target = teacher.targets(rows.__getitems__(indices))
    logits = target.hidden.double() @ target.head.double().T / temperature
    return logits.softmax(-1).view(len(indices), rows.length - 1, -1)


def _log_probabilities(tokens, codes, seed, scale=3.0):
    logits = torch.randn(tokens, codes, generator=torch.Generator().manual_seed(seed))
    return (scale * logits).log_softmax(-1)


# --- a token's bytes ---


@given(st.integers(1, 25), st.integers(1, 70), st.integers(1, 4), st.integers(0, 99))
@laws
def test_ids_come_back_from_their_bits(bits, count, tokens, seed):
    ids = np.random.default_rng(seed).integers(1 << bits, size=(tokens, count))
    ids[0, -1] = (1 << bits) - 1
    packed = pack(ids, bits)
    assert (packed.dtype, packed.shape) == (np.uint8, (tokens, -(-count * bits // 8)))
    found = unpack(packed, bits, count)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids)


def test_the_lowest_bits_come_first():
    assert pack(np.array([[1, 0, 7]]), 3).tolist() == [[0b11_000_001, 0b1]]


@pytest.mark.parametrize(
    ("kind", "count", "vocabulary", "bits", "num_bytes"),
    [
        ("sampled", 12, 8192, 13, 20),
        ("sampled", 12, 8193, 14, 21),
        ("sampled", 1, 1, 1, 1),
        ("topk", 64, 8192, 13, 104 + 2 * 65),
    ],
)
def test_bytes_of_a_token(kind, count, vocabulary, bits, num_bytes):
    record = Record(kind, count, vocabulary)
    assert (record.bits, record.num_bytes) == (bits, num_bytes)
    ids = torch.full((3, vocabulary), -torch.inf)
    ids[:, -1] = 0.0
    stored = record.write(ids, torch.ones(3, count, dtype=torch.float64))
    assert (stored.dtype, stored.shape) == (np.uint8, (3, num_bytes))
    assert record.read(stored)[0][:, 0].tolist() == [vocabulary - 1] * 3


@given(st.integers(2, 40), st.data(), st.integers(0, 99), st.sampled_from([0.3, 3.0, 12.0]))
@laws
def test_the_likeliest_codes_keep_their_probabilities(vocabulary, data, seed, scale):
    count = data.draw(st.integers(1, vocabulary))
    log_p = _log_probabilities(6, vocabulary, seed, scale)
    record = Record("topk", count, vocabulary)
    ids, found = record.read(record.write(log_p, torch.empty(6, 0)))
    expected, order = log_p.double().exp().topk(count)
    np.testing.assert_array_equal(ids, order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=6e-4, atol=1e-6)
    total = found.astype(np.float64).sum(1)
    assert (total <= 1).all()
    # what the codes left out have together, too, however little it is
    np.testing.assert_allclose(1 - total, 1 - expected.sum(1), rtol=6e-4, atol=1e-6)


def test_a_code_that_is_ruled_out_has_no_probability():
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    record = Record("topk", 2, 3)
    ids, found = record.read(record.write(log_p, torch.empty(1, 0)))
    assert ids[0, 0] == 0
    assert found[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


# --- draws ---


def _uniform(tokens, count, seed=0):
    return torch.from_numpy(1 - np.random.default_rng(seed).random((tokens, count)))


def test_shares_of_the_draws_are_the_probabilities():
    tokens, count = 20_000, 3
    log_p = _log_probabilities(1, 8, 0, 1.0)
    p = log_p.double().exp()[0]
    drawn = draw(log_p.expand(tokens, -1), _uniform(tokens, count))
    assert (drawn.dtype, drawn.shape) == (torch.int64, (tokens, count))
    found = torch.bincount(drawn.flatten(), minlength=8).double()
    expected = tokens * count * p
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom: 1 in 1,000 independent draws is above


def test_shares_vary_less_than_those_of_independent_draws():
    tokens, count = 4000, 6
    log_p = _log_probabilities(1, 8, 1, 1.0)
    p = log_p.double().exp()[0]
    drawn = torch.nn.functional.one_hot(draw(log_p.expand(tokens, -1), _uniform(tokens, count)), 8)
    shares = drawn.double().mean(1)
    assert shares.var(0).sum() < 0.5 * (p * (1 - p) / count).sum()
    # never off by more than the two slices that a code may share with its neighbours
    assert (shares - p).abs().max() < 2 / count


def test_only_what_is_possible_is_drawn():
    log_p = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(-1).expand(4, -1)
    ends = torch.tensor([[2**-53, 2**-53], [1.0, 1.0], [2**-53, 1.0], [0.5, 0.5]], dtype=torch.float64)
    # the second slice begins where code 1 ends, which is its last point
    assert draw(log_p, ends).tolist() == [[1, 1], [1, 3], [1, 3], [1, 3]]


def test_the_gradient_of_drawn_codes_is_that_of_forward_kl_on_average():
    tokens, count = 20_000, 12
    teacher, student = _log_probabilities(1, 9, 0, 1.5), _log_probabilities(1, 9, 1, 1.5)
    ids = draw(teacher.expand(tokens, -1), _uniform(tokens, count))
    drawn, whole = (student.double().clone().requires_grad_() for _ in range(2))
    (-drawn.log_softmax(-1).expand(tokens, -1).gather(-1, ids).mean()).backward()
    forward_kl(whole, teacher.double()).sum().backward()
    assert whole.grad.abs().max() > 0.1
    torch.testing.assert_close(drawn.grad, whole.grad, atol=2e-3, rtol=0)


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
    expected = {
        "kind": "sampled", "count": 12, "temperature": 2.0, "seed": 3, "vocabulary": VOCAB, "bits_per_id": 5,
        "bytes_per_token": 8, "rows": 10, "length": 10, "teacher": "t" * 16, "precision": "32",
        "tokenizer": "k" * 16, "shard": 3,
    }  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
    assert len(manifest["sha256"]) == 4
    # 10 rows: their hashes, and 9 distributions of 8 bytes each
    sizes = [np.load(file, mmap_mode="r").nbytes for file in sorted(tmp_path.glob("*/*.npy"))]
    assert sizes == [3 * 80, 3 * 80, 3 * 80, 80]


def test_never_more_shards_than_can_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "MAX_SHARDS", 4)
    _write(tmp_path, _rows(40), shard_bytes=1)
    assert len(_shards(tmp_path)) == 4


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
    assert list(left) == ["00000.npy", "00001.npy"]  # 8 rows went through, shards have 3
    assert sum(1 for file in (tmp_path / "cache").rglob("*") if file.is_file()) == 2
    with pytest.raises(UserError, match=r"cache: not a teacher's cache \(no manifest\.json\)$"):
        open_cache(tmp_path / "cache")

    teacher = _teacher()
    calls = _kill_after(teacher, 100)
    _write(tmp_path / "cache", teacher=teacher, kind=kind, batch_size=2)
    assert len(calls) == 2  # rows 6 to 9
    _write(tmp_path / "straight", kind=kind, batch_size=2)
    found = _shards(tmp_path / "cache")
    assert {name: found[name] for name in left} == left
    one, two = (CachedRows(_rows(), open_cache(tmp_path / name)) for name in ("cache", "straight"))
    assert torch.equal(*(part.__getitems__(range(10))["teacher_ids"] for part in (one, two)))

    calls.clear()
    _write(tmp_path / "cache", teacher=teacher, kind=kind, batch_size=2)
    assert calls == []  # all is there


@pytest.mark.parametrize(
    "changes", [{"temperature": 1.0}, {"seed": 4}, {"rows": _rows(seed=1)}, {"teacher_hash": "u"}], ids=str
)
def test_shards_of_other_settings_are_not_gone_on_from(tmp_path, changes):
    teacher = _teacher()
    _kill_after(teacher, 2)
    with pytest.raises(_Killed):
        _write(tmp_path / "cache", teacher=teacher, kind="sampled")
    assert len(_shards(tmp_path / "cache")) == 2
    _write(tmp_path / "cache", kind="sampled", **changes)
    _write(tmp_path / "fresh", kind="sampled", **changes)
    rows = changes.get("rows") or _rows()
    found, expected = (CachedRows(rows, open_cache(tmp_path / name)) for name in ("cache", "fresh"))
    batches = [part.__getitems__(range(10)) for part in (found, expected)]
    assert torch.equal(*(batch["teacher_ids"] for batch in batches))


def test_processes_share_the_shards(tmp_path):
    _write(tmp_path / "cache", rank=1, world=2, batch_size=3)
    assert list(_shards(tmp_path / "cache")) == ["00001.npy", "00003.npy"]
    assert not (tmp_path / "cache" / "manifest.json").exists()
    _write(tmp_path / "cache", rank=0, world=2, batch_size=3)
    _write(tmp_path / "alone", batch_size=3)
    assert _shards(tmp_path / "cache") == _shards(tmp_path / "alone")
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("cache", "alone")]
    assert manifests[0] == manifests[1]


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


def _refused(message, call, *arguments, **settings):
    with pytest.raises(UserError, match=message) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)


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


def test_a_row_with_other_tokens_is_refused_when_it_is_read(tmp_path):
    rows = _rows()
    _write(tmp_path, rows)
    cache = open_cache(tmp_path)
    right, wrong = (row_hashes(rows.__getitems__(numbers)) for numbers in ([2, 8], [2, 9]))
    assert cache.read([2, 8], right)["teacher_ids"].shape == (2, 9, 5)
    _refused("row 8 of the cache was written for other tokens$", cache.read, [2, 8], wrong)


def test_more_codes_or_rows_than_there_are_are_refused(tmp_path):
    message = f"^cache.count: 22, the teacher's vocabulary has {VOCAB} ids$"
    _refused(message, _write, tmp_path, count=22)
    _refused("^cache.rows: 11, the student sees 10$", _write, tmp_path, num_rows=11)
    _write(tmp_path, kind="sampled", count=22)  # of these there may be any number


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "{}", {"kind": "all"}, {"count": 0}, {"rows": 0}, {"length": "x"}, {"shard": 0},
        {"folder": None}, {"temperature": None}, {"temperature": 0}, {"vocabulary": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    _write(tmp_path)
    path = tmp_path / "manifest.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage)
    path.write_text(damage)
    _refused(r"manifest\.json: unreadable manifest", open_cache, tmp_path)


def test_damaged_shards_are_refused(tmp_path):
    _write(tmp_path)
    file = next(tmp_path.glob("*/00001.npy"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    _refused(r"00001\.npy: unreadable shard of a cache", open_cache, tmp_path)
    np.save(file, np.zeros((2, 1, 1, 5), np.uint8))
    _refused(r"00001\.npy: uint8 \[2, 1, 1, 5\], the manifest says uint8 \[3, 1, 1, ", open_cache, tmp_path)
    file.unlink()
    _refused(r"00001\.npy: unreadable shard", open_cache, tmp_path)
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
