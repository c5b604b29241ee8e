import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from delvm.tokens.balance import TaskPlan
from delvm.tokens.rows import IGNORED, TrainingSentences, row_length
from delvm.tokens.sentences import ANNOTATION, IMAGE, SPECIAL, SentencesConfig, find_forms
from delvm.tokens.store import Grid, TokenStore
from tests.tiny_store import (
    BOS,
    EOS,
    FILM,
    PAIRS,
    SINGLE,
    TOKENS,
    cut_at_bos,
    epoch_of,
    pictures_of,
    stream_of,
    tiny_dataset,
    tiny_forms,
    where,
)

FIXTURE = Path(__file__).parents[2] / "shared" / "fixtures" / "delvm_tokens"
laws = settings(max_examples=30, deadline=None)

MIXED = {"pairs": (6, 2, 1, 2), "single": SINGLE, "film": FILM}  # sentences of 10, 4 and 14 tokens
COMBINATIONS = [{"pairs": PAIRS}, {"single": SINGLE, "film": FILM}, MIXED]


def _expected(stream, length, *, boundaries, supervise):
    """Labels and positions of a stream of tokens, from the rules and the tokens alone."""
    labels, positions = [], []
    for place, token in enumerate(stream):
        opens = place % length == 0 or token == BOS
        positions.append(0 if opens else positions[-1] + 1)
        target = True
        if supervise == "annotations":  # task, picture: of these samples every other picture is an annotation
            target = token < BOS and where(token)[3] % 2 == 1
        labels.append(IGNORED if not target or (opens and boundaries == "stop") else token)
    return labels, positions


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("config", [{}, {"length": 8}], ids=["as it comes", "of its length"])
def test_a_row_of_the_length_of_a_sentence_is_one(specials, config):
    length = 2 * 2 * TOKENS + 2 * specials
    if config:
        config = {"length": length}
    dataset = tiny_dataset({"one": PAIRS, "two": PAIRS}, specials=specials, **config)
    assert (dataset.whole, dataset.length) == (True, length)
    for index in range(40):
        row = dataset[index]
        assert list(row) == ["tokens"]  # all of them are targets, none is out of sight
        assert row["tokens"].dtype == torch.int64
        pictures = pictures_of(row["tokens"].tolist())
        assert len(pictures) == 4
        assert len({task for task, *_ in pictures}) == 1


@given(
    length=st.integers(2, 45),
    shapes=st.sampled_from(COMBINATIONS),
    boundaries=st.sampled_from(["stop", "run_on"]),
    seed=st.integers(0, 9),
)
@laws
def test_rows_end_to_end_are_sentences_end_to_end(length, shapes, boundaries, seed):
    dataset = tiny_dataset(shapes, length=length, boundaries=boundaries, seed=seed)
    assert dataset.length == length
    total = 3 * dataset.tokens_per_epoch
    stream = stream_of(dataset, -(-total // length))
    labels, positions = _expected(stream, length, boundaries=boundaries, supervise="all")
    rows = [dataset[index] for index in range(len(stream) // length)]
    if boundaries == "stop" and not dataset.whole:
        assert torch.cat([row["labels"] for row in rows]).tolist() == labels
        assert torch.cat([row["positions"] for row in rows]).tolist() == positions
    else:  # every token is a target, and attention runs through the row
        assert all(list(row) == ["tokens"] for row in rows)

    sentences = cut_at_bos(stream[:total])
    assert len(sentences) == 3 * dataset.sentences_per_epoch
    epochs = [sentences[e * dataset.sentences_per_epoch :][: dataset.sentences_per_epoch] for e in range(3)]
    for epoch in epochs:
        shown = Counter()
        for sentence in epoch:
            assert sentence[-1] == EOS
            shown.update(pictures_of(sentence))
        every = {
            (task, sample, view, picture)
            for task, (samples, views, frames, channels) in enumerate(shapes.values())
            for sample, view, picture in itertools.product(
                range(samples), range(views), range(frames * channels)
            )
        }
        assert shown == Counter(every)
    assert epochs[0] != epochs[1] != epochs[2]


@given(length=st.integers(2, 45), other=st.integers(2, 45), specials=st.booleans())
@laws
def test_the_stream_is_the_same_at_any_length(length, other, specials):
    streams = []
    for size in (length, other):
        dataset = tiny_dataset(MIXED, length=size, specials=specials)
        streams.append(stream_of(dataset, -(-200 // size))[:200])
    assert streams[0] == streams[1]


def test_sentences_stand_in_rows_as_they_stand_alone():
    alone, cut = tiny_dataset({"pairs": PAIRS}), tiny_dataset({"pairs": PAIRS}, length=7)
    expected = [*epoch_of(alone, 0), *epoch_of(alone, 1)]
    assert cut_at_bos(stream_of(cut, 40))[: len(expected)] == expected


@pytest.mark.parametrize("boundaries", ["stop", "run_on"])
@pytest.mark.parametrize("length", [0, 7, 30])
def test_annotations_alone_as_targets(length, boundaries):
    shapes = {"pairs": PAIRS, "film": (6, 1, 1, 2)}
    dataset = tiny_dataset(shapes, length=length, boundaries=boundaries, supervise="annotations")
    rows = [dataset[index] for index in range(40)]
    stream = torch.cat([row["tokens"] for row in rows]).tolist()
    labels = torch.cat([row["labels"] for row in rows]).tolist()
    assert labels == _expected(stream, dataset.length, boundaries=boundaries, supervise="annotations")[0]
    assert BOS not in labels
    assert EOS not in labels
    assert 0.3 < sum(label != IGNORED for label in labels) / len(labels) <= 0.4  # 4 of 10 but row starts


def test_code_0_is_a_target():
    # code 0 is the first token of sample 0: it opens a piece where there is no BOS, else it is a label
    for length, specials in ((0, True), (9, True), (7, False), (50, False)):
        dataset = tiny_dataset({"single": SINGLE}, shots={"single": 2}, length=length, specials=specials)
        found = 0
        for index in range(60):
            row = dataset[index]
            labels = row.get("labels", row["tokens"])
            opens = row["positions"] == 0 if "positions" in row else torch.arange(dataset.length) == 0
            zeros = (row["tokens"] == 0) & ~opens
            assert (labels[zeros] == 0).all()
            found += int(zeros.sum())
        assert found > 5


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        ({"one": PAIRS, "two": (8, 1, 1, 2)}, {}),
        ({"one": PAIRS}, {"supervise": "annotations"}),
        (MIXED, {"length": 13}),
        (MIXED, {"length": 13, "boundaries": "run_on", "specials": False}),
        (MIXED, {"length": 64}),
    ],
)
def test_a_row_depends_on_seed_and_number_alone(shapes, config):
    one, two, other = (tiny_dataset(shapes, seed=seed, **config) for seed in (3, 3, 4))
    rows = [one[index] for index in range(60)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  the global state must not matter

    def check(row, index):
        assert list(row) == list(rows[index])
        for key, value in rows[index].items():
            assert row[key].dtype == torch.int64
            assert torch.equal(row[key], value)

    for index in np.random.default_rng(0).permutation(60).tolist():
        check(two[index], index)
    copy = pickle.loads(pickle.dumps(two))
    check(copy[59], 59)
    check(copy[2], 2)
    differing = [not torch.equal(row["tokens"], other[index]["tokens"]) for index, row in enumerate(rows)]
    assert sum(differing) > 30

    # a list of rows, in any order and over epochs, is the same rows
    for indices in ([0], [5, 1, 59, 1], list(range(60))):
        batch = one.__getitems__(indices)
        assert {key: tuple(part.shape) for key, part in batch.items()} == dict.fromkeys(
            rows[0], (len(indices), one.length)
        )
        for place, index in enumerate(indices):
            check({key: part[place] for key, part in batch.items()}, index)


@pytest.mark.parametrize("config", [{"length": 13}, {"length": 10, "shots": {"film": 1}}])
def test_worker_processes_change_nothing(config):
    dataset = tiny_dataset(MIXED, num_rows=33, **config)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=dataset.collate)
    batches = list(loader)
    assert [len(batch["tokens"]) for batch in batches] == [8, 8, 8, 8, 1]
    for key in ("tokens", "labels", "positions"):
        expected = torch.stack([dataset[index][key] for index in range(33)])
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


def test_length_is_the_number_asked_for():
    assert len(tiny_dataset({"pairs": PAIRS}, num_rows=7)) == 7


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs a row that DeLVM packed")
def test_delvm_packs_the_same_row_but_leaves_code_0_out():
    packed = np.load(FIXTURE / "packed_0.npz")
    codes = np.load(FIXTURE / "tokens.npy").astype(np.uint16)  # 20 pictures: sentences of 8, 8 and 4
    long, short = codes[:16].reshape(2, 1, 8, 256), codes[16:].reshape(1, 1, 4, 256)
    train = {"long": Grid([long]), "short": Grid([short])}
    store = TokenStore({"num_codes": 8192, "tokens_per_image": 256}, {"train": train}, {"train": {}})
    config = SentencesConfig(specials=False, length=4096)
    forms = find_forms(config, {"long": (8, 8), "short": (4, 4)}, 256)
    plans = {"long": TaskPlan(2, 1, 2, 1.0, 1.0, 1), "short": TaskPlan(1, 1, 1, 1.0, 1.0, 1)}
    rows = (TrainingSentences(store, plans, forms, config, num_rows=1, seed=seed)[0] for seed in range(100))
    # of the six orders of three sentences, the one in which DeLVM's shuffle has them
    row = next(row for row in rows if np.array_equal(row["tokens"], packed["input_ids"][0]))

    np.testing.assert_array_equal(row["positions"], packed["indexes"])
    assert np.flatnonzero(row["positions"] == 0).tolist() == packed["cu_seqlens"][:-1].tolist()
    # its labels are shifted already; the row's last one is the next row's first token, which here has
    # nothing in sight before it
    ours, theirs = row["labels"].numpy()[1:], packed["labels"][0, :-1]
    differing = np.flatnonzero(ours != theirs)
    assert differing.tolist() == [260]
    assert (ours[260], theirs[260]) == (0, -100)
    assert np.flatnonzero(ours == IGNORED).tolist() == [2047, 3071]


def test_sentences_of_several_lengths_ask_for_a_row_length():
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        tiny_dataset(MIXED)
    assert str(error.value) == (
        "sentences.length: needed, the tasks' sentences differ in length: pairs 10, single 4, film 14"
    )
    assert tiny_dataset(MIXED, length=4096).length == 4096
    same = tiny_forms({"a": PAIRS, "b": PAIRS}, SentencesConfig())
    assert row_length(SentencesConfig(), same) == 10


# --- what stands where


@pytest.mark.parametrize("length", [0, 9, 23])
@pytest.mark.parametrize("supervise", ["all", "annotations"])
def test_details_say_what_every_token_is(length, supervise):
    shapes = {"one": PAIRS, "two": PAIRS} if length == 0 else {"pairs": PAIRS, "film": FILM}
    dataset = tiny_dataset(shapes, length=length, supervise=supervise, details=True)
    plain = tiny_dataset(shapes, length=length, supervise=supervise)
    rows = dataset.__getitems__(range(30))
    for index in range(30):
        row = dataset[index]
        assert {key: value.tolist() for key, value in row.items()} == {
            key: value[index].tolist() for key, value in rows.items()
        }
        assert {key: row[key].tolist() for key in plain[index]} == {
            key: value.tolist() for key, value in plain[index].items()
        }
        assert set(row) - set(plain[index]) == {"tasks", "roles", "places"}
        told = (row[key].tolist() for key in ("tokens", "tasks", "roles", "places"))
        for token, task, role, place in zip(*told, strict=True):
            if token >= BOS:
                assert (role, place) == (SPECIAL, -1)
            else:
                assert (task, place) == (where(token)[0], where(token)[4])
                assert role == (ANNOTATION if where(token)[3] % 2 else IMAGE)
        assert len(set(row["tasks"].tolist())) == 1 or length  # a whole row is of one task
