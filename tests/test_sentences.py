import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from delvm.tokens.balance import BalanceConfig, TaskPlan, plan
from delvm.tokens.sentences import (
    ANNOTATION,
    IMAGE,
    SPECIAL,
    SentencesConfig,
    TrainingSentences,
    compose,
    roles,
    sentence_length,
    shuffled_pairs,
    validation_picks,
    validation_sentences,
)
from delvm.tokens.store import TokenStore

NUM_CODES = 30_000
SAMPLES = {"head": 24, "tail": 6}  # four times as many: 1 view against 4


def _coded(samples, views, offset):
    """A grid whose codes tell where they come from: (samples, views, 2, 3); code 0 is among them."""
    shape = (samples, views, 2, 3)
    return (offset + np.arange(np.prod(shape))).reshape(shape).astype(np.uint16)


@pytest.fixture
def store():
    train = {"head": _coded(24, 1, 0), "tail": _coded(6, 4, 1000)}
    validation = {"head": _coded(5, 1, 2000), "tail": _coded(3, 2, 3000)}
    return TokenStore(
        {"num_codes": NUM_CODES, "tokens_per_image": 3}, {"train": train, "validation": validation}
    )


def _dataset(store, *, pairs=2, seed=0, plans=None, num_sentences=10_000):
    plans = plans or plan(SAMPLES, BalanceConfig())
    return TrainingSentences(
        store, plans, SentencesConfig(pairs=pairs), num_sentences=num_sentences, seed=seed
    )


def _origin(store, item):
    """The (task, sample, view) of each pair of a training sentence."""
    task = ["head", "tail"][item["task"]]
    offset, views = {"head": (0, 1), "tail": (1000, 4)}[task]
    first = item["tokens"][1:-1].reshape(-1, 6)[:, 0].numpy() - offset
    return [(task, int(place) // views, int(place) % views) for place in first // 6]


def test_the_layout_of_a_sentence():
    grid = np.zeros((3, 2, 2, 2), np.uint16)
    grid[2, 1] = [[5, 0], [7, 65_535]]
    grid[0, 1] = [[1, 2], [3, 4]]
    sentence = compose(grid, np.array([[2, 1], [0, 1]]), 65_536)
    assert sentence.dtype == torch.int64
    #                             BOS     image annotation image annotation EOS
    assert sentence.tolist() == [65_536, 5, 0, 7, 65_535, 1, 2, 3, 4, 65_537]


def test_roles_name_every_position():
    assert (SPECIAL, IMAGE, ANNOTATION) == (0, 1, 2)
    assert roles(2, 3).tolist() == [0, 1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2, 0]
    assert roles(2, 3).dtype == torch.int8
    assert [len(roles(pairs, 64)) for pairs in (1, 2, 8)] == [
        sentence_length(pairs, 64) for pairs in (1, 2, 8)
    ]
    assert sentence_length(2, 64) == 258


def test_roles_fit_the_sentences(store):
    tokens = _dataset(store)[0]["tokens"]
    assert len(tokens) == len(roles(2, 3)) == sentence_length(2, 3)
    assert torch.equal(tokens >= NUM_CODES, roles(2, 3) == SPECIAL)
    # in the coded grid an annotation's codes follow its image's
    image, annotation = (tokens[roles(2, 3) == role].view(2, 3) for role in (IMAGE, ANNOTATION))
    assert torch.equal(annotation, image + 3)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_every_view_once_an_epoch(store, pairs):
    dataset = _dataset(store, pairs=pairs)
    assert dataset.sentences_per_epoch == 48 // pairs
    everything = {("head", s, 0) for s in range(24)} | {("tail", s, v) for s in range(6) for v in range(4)}
    for epoch in range(3):
        start = epoch * dataset.sentences_per_epoch
        seen = Counter()
        for index in range(start, start + dataset.sentences_per_epoch):
            seen.update(_origin(store, dataset[index]))
        assert seen == Counter(everything)  # each exactly once


def test_resampling_repeats_every_sample_as_often(store):
    dataset = _dataset(store, plans=plan(SAMPLES, BalanceConfig("resample")))
    seen = Counter()
    for index in range(dataset.sentences_per_epoch):
        seen.update(_origin(store, dataset[index]))
    assert seen == Counter({("head", s, 0): 1 for s in range(24)} | {("tail", s, 0): 4 for s in range(6)})


@pytest.mark.parametrize("pairs", [2, 3, 4, 5, 6])
def test_two_views_of_a_sample_never_meet_in_a_sentence(store, pairs):
    # 6 is no multiple of 4 and 5: there a sentence reaches over two rounds
    dataset = _dataset(store, pairs=pairs)
    for index in range(4 * dataset.sentences_per_epoch):
        samples = [sample for _, sample, _ in _origin(store, dataset[index])]
        assert len(set(samples)) == pairs


def test_each_round_shows_every_sample_once():
    plan = TaskPlan(samples=6, views=4, repeats=2, wanted=8)
    picks = shuffled_pairs(plan, 4, np.random.default_rng(0))
    assert picks.shape == (48, 2)
    for round_picks in picks.reshape(8, 6, 2):
        assert sorted(round_picks[:, 0]) == list(range(6))
    assert set(Counter(map(tuple, picks)).values()) == {2}
    # the views of one round differ from sample to sample
    assert len(set(picks[:6, 1])) > 1


def test_epochs_pair_anew(store):
    dataset = _dataset(store)
    n = dataset.sentences_per_epoch
    epochs = [{tuple(sorted(_origin(store, dataset[e * n + i]))) for i in range(n)} for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sentence_has_one_task_and_names_it(store):
    dataset = _dataset(store)
    tasks = []
    for index in range(dataset.sentences_per_epoch):
        item = dataset[index]
        body = item["tokens"][1:-1]
        assert ((body < 1000) if item["task"] == 0 else (body >= 1000)).all()
        tasks.append(item["task"])
    assert Counter(tasks) == {0: 12, 1: 12}
    assert tasks != sorted(tasks)  # mixed, not task after task


def test_an_item_depends_on_seed_and_index_alone(store):
    one, two, other = _dataset(store), _dataset(store), _dataset(store, seed=1)
    indices = np.random.default_rng(0).permutation(4 * one.sentences_per_epoch)
    shuffled = {int(index): two[int(index)]["tokens"] for index in indices}
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  the global state must not matter
    in_order = [one[index]["tokens"] for index in range(len(indices))]
    assert all(torch.equal(tokens, shuffled[index]) for index, tokens in enumerate(in_order))
    differing = [not torch.equal(tokens, other[index]["tokens"]) for index, tokens in enumerate(in_order)]
    assert sum(differing) > 0.8 * len(differing)


def test_worker_processes_change_nothing(store):
    # spawned workers (macOS, Windows) get the data set as a pickle
    dataset = _dataset(store, num_sentences=60)
    expected = [dataset[index]["tokens"] for index in range(60)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(tokens, copy[index]["tokens"]) for index, tokens in enumerate(expected))
    loaded = [batch["tokens"] for batch in DataLoader(dataset, batch_size=8, num_workers=1)]
    assert torch.equal(torch.cat(loaded), torch.stack(expected))


def test_length_is_the_number_asked_for(store):
    assert len(_dataset(store, num_sentences=7)) == 7


def test_a_task_smaller_than_a_sentence_starts_again(store):
    store.grids["train"]["tail"] = store.grids["train"]["tail"][:2, :1]
    plans = plan({"head": 24, "tail": 2}, BalanceConfig("none"))
    dataset = _dataset(store, pairs=5, plans=plans)
    assert dataset.sentences_per_epoch == 4 + 1
    items = [dataset[index] for index in range(5)]
    (tail,) = [item["tokens"][1:-1].reshape(5, 6) for item in items if item["task"] == 1]
    first, second = sorted({int(row[0]) for row in tail})
    assert (first, second) == (1000, 1024)  # the two samples' first codes
    assert torch.equal(tail[0], tail[2])
    assert not torch.equal(tail[0], tail[1])


def test_code_0_is_a_label_like_any_other(store):
    # code 0 stands in the head's sample 0 alone; it must reach the tokens that labels are cut from
    dataset = _dataset(store)
    zeros = sum(int((dataset[index]["tokens"] == 0).sum()) for index in range(dataset.sentences_per_epoch))
    assert zeros == 1
    assert all((dataset[index]["tokens"] >= 0).all() for index in range(dataset.sentences_per_epoch))


def test_validation_is_fixed_and_real(store):
    config = SentencesConfig(pairs=2, validation=4)
    held = validation_sentences(store, config, 0)
    assert {task: tuple(rows.shape) for task, rows in held.items()} == {"head": (4, 14), "tail": (4, 14)}
    again, other = validation_sentences(store, config, 0), validation_sentences(store, config, 1)
    assert all(torch.equal(held[task], again[task]) for task in held)
    assert not all(torch.equal(held[task], other[task]) for task in held)
    # the tail's validation grid has 2 views; the first of sample s starts at 3000 + 12 s
    starts = (held["tail"][:, 1:-1].reshape(-1, 6)[:, 0] - 3000).tolist()
    assert set(starts) == {0, 12, 24}
    starts = (held["head"][:, 1:-1].reshape(-1, 6)[:, 0] - 2000).tolist()
    assert set(starts) == {0, 6, 12, 18, 24}
    # the same rows as their picks
    picks = validation_picks(3, config, 0, 1)
    assert (held["tail"][:, 1:-1].reshape(4, 2, 6)[:, :, 0] - 3000).tolist() == (12 * picks).tolist()


def test_validation_shows_every_sample_equally_often():
    picks = validation_picks(5, SentencesConfig(pairs=2, validation=10), 3, 0)
    assert picks.shape == (10, 2)
    assert Counter(picks.reshape(-1).tolist()) == dict.fromkeys(range(5), 4)


def test_no_held_out_sentence_repeats_a_sample():
    picks = validation_picks(5, SentencesConfig(pairs=3, validation=50), 0, 0)
    assert all(len(set(sentence)) == 3 for sentence in picks.tolist())


@pytest.mark.parametrize("key", ["pairs", "validation"])
def test_impossible_values(key):
    with pytest.raises(ValueError, match=f"^{key}: 0 must be at least 1$"):
        SentencesConfig(**{key: 0})
