import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.tokens.balance import BalanceConfig, TaskPlan, plan
from delvm.tokens.rows import IGNORED, row_length
from delvm.tokens.sentences import (
    ANNOTATION,
    IMAGE,
    KINDS,
    SPECIAL,
    SentencesConfig,
    validation_picks,
    validation_sentences,
)
from tests.tiny_store import (
    BOS,
    EOS,
    FILM,
    PAIRS,
    SINGLE,
    TOKENS,
    code_of,
    epoch_of,
    pictures_of,
    samples_of,
    tiny_dataset,
    tiny_forms,
    tiny_store,
)

laws = settings(max_examples=30, deadline=None)

# --- the layout of every kind


LAYOUTS = {
    # kind: (frames, channels), shots, the order of a sample's pictures, their roles
    "single": [((1, 1), 1, [0], "I"), ((1, 1), 3, [0], "I")],
    "sequence": [((4, 1), 1, [0, 1, 2, 3], "IIII"), ((1, 1), 2, [0], "I"), ((2, 1), 2, [0, 1], "II")],
    "category": [((1, 1), 4, [0], "I")],
    "pairs": [((1, 2), 1, [0, 1], "IA"), ((1, 2), 3, [0, 1], "IA")],
    "annotations": [((1, 2), 3, [0, 1], "IA")],  # of more than one, the order is drawn: see below
    "interleaved": [
        ((3, 2), 1, [0, 1, 2, 3, 4, 5], "IAIAIA"),
        ((2, 3), 2, [0, 1, 2, 3, 4, 5], "IAAIAA"),
    ],
    "separated": [((3, 2), 1, [0, 2, 4, 1, 3, 5], "IIIAAA"), ((2, 3), 2, [0, 3, 1, 4, 2, 5], "IIAAAA")],
    "two_sequences": [((3, 2), 1, [0, 2, 4, 1, 3, 5], "IIIIII")],
}
CASES = [(kind, *case) for kind, cases in LAYOUTS.items() for case in cases]


def test_every_kind_is_tested():
    assert list(LAYOUTS) == list(KINDS)


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize(("kind", "sample", "shots", "order", "roles"), CASES)
def test_the_layout_of_a_sentence(kind, sample, shots, order, roles, specials):
    frames, channels = sample
    shapes = {"other": SINGLE, "task": (8, 2, frames, channels)}
    config = SentencesConfig(kinds={"task": kind}, shots={"task": shots}, per_class=2, specials=specials)
    form = tiny_forms(shapes, config)["task"]
    ends = 2 * specials
    assert (form.images, form.length) == (shots * len(order), shots * len(order) * TOKENS + ends)
    expected = [{"I": IMAGE, "A": ANNOTATION}[role] for role in roles * shots for _ in range(TOKENS)]
    assert form.roles.tolist() == [SPECIAL] * specials + expected + [SPECIAL] * specials
    assert form.roles.dtype == torch.int8

    shapes = {"task": shapes["task"]}
    classes = {"task": [0, 1, 2, 3] * 2}
    dataset = tiny_dataset(
        shapes,
        classes=classes,
        kinds={"task": kind},
        shots={"task": shots},
        per_class=2,
        specials=specials,
    )
    for sentence in epoch_of(dataset):
        drawn = samples_of(sentence, len(order))
        assert len({number for number, _ in drawn}) == shots
        assert sentence == [
            *([BOS] * specials),
            *(code_of(0, *shot, picture, token) for shot in drawn for picture in order for token in range(2)),
            *([EOS] * specials),
        ]


def test_roles_have_their_values():
    assert (SPECIAL, IMAGE, ANNOTATION, IGNORED) == (0, 1, 2, -100)


def test_annotation_kinds_come_in_an_order_drawn_for_each_sentence():
    dataset = tiny_dataset({"task": (12, 2, 1, 4)}, pairs=3)
    orders = Counter()
    for epoch in range(6):
        for sentence in epoch_of(dataset, epoch):
            pictures = [picture for *_, picture in pictures_of(sentence)]
            image, *annotations = first = pictures[:4]
            assert image == 0
            assert pictures == first * 3  # the same in every shot
            assert len({sample for sample, _ in samples_of(sentence, 4)}) == 3
            orders[tuple(annotations)] += 1
    assert set(orders) == set(itertools.permutations((1, 2, 3)))
    assert dataset.sentences_per_epoch * 6 == orders.total() == 48
    form = tiny_forms({"task": (12, 2, 1, 4)}, SentencesConfig(pairs=3))["task"]
    assert form.image_roles.tolist() == [IMAGE, ANNOTATION, ANNOTATION, ANNOTATION] * 3


@pytest.mark.parametrize(
    ("sample", "config", "kind", "shots"),
    [
        ((1, 1), {}, "single", 1),
        ((3, 1), {}, "sequence", 1),
        ((1, 2), {}, "pairs", 5),
        ((1, 3), {}, "annotations", 5),
        ((3, 2), {}, "interleaved", 1),
        ((1, 1), {"kinds": {"task": "category"}}, "category", 16),
        ((1, 1), {"kinds": {"task": "sequence"}}, "sequence", 1),
        ((1, 2), {"kinds": {"task": "annotations"}, "shots": {"task": 2}}, "annotations", 2),
        ((3, 2), {"shots": {"task": 2}}, "interleaved", 2),
    ],
)
def test_a_task_has_the_kind_that_its_samples_are(sample, config, kind, shots):
    form = tiny_forms({"task": (8, 1, *sample)}, SentencesConfig(pairs=5, **config))["task"]
    assert (form.kind, form.shots) == (kind, shots)


# --- category


@pytest.mark.parametrize("per_class", [1, 2, 4])
@pytest.mark.parametrize("members", [4, 5, 6])
def test_samples_of_a_class_stand_together(members, per_class):
    labels = np.random.default_rng(0).permutation(np.repeat([3, 8, 5], members))
    shots = 3 * per_class
    dataset = tiny_dataset(
        {"task": (len(labels), 3, 1, 1)},
        classes={"task": labels},
        kinds={"task": "category"},
        shots={"task": shots},
        per_class=per_class,
    )
    assert dataset.sentences_per_epoch == len(labels) * 3 // shots
    groups = Counter()
    for epoch in range(3):
        for sentence in epoch_of(dataset, epoch):
            samples = [sample for sample, _ in samples_of(sentence, 1)]
            found = labels[samples].reshape(-1, per_class)
            assert (found == found[:, :1]).all()
            assert sorted(found[:, 0].tolist()) == [3, 5, 8]  # each class once
            assert len(set(samples)) == shots  # no photograph twice
            groups[tuple(found[:, 0].tolist())] += 1
    assert len(groups) > 1  # the classes come in any order


def test_a_category_with_few_classes_repeats_classes():
    labels = np.array([0, 1] * 8)
    dataset = tiny_dataset(
        {"task": (16, 1, 1, 1)}, classes={"task": labels}, kinds={"task": "category"}, per_class=4
    )
    for epoch in range(3):
        for sentence in epoch_of(dataset, epoch):
            found = labels[[sample for sample, _ in samples_of(sentence, 1)]].reshape(4, 4)
            assert (found == found[:, :1]).all()
            assert Counter(found[:, 0].tolist()) == {0: 2, 1: 2}


def test_a_small_class_repeats_samples():
    labels = np.array([0] * 6 + [1])
    dataset = tiny_dataset(
        {"task": (7, 2, 1, 1)},
        classes={"task": labels},
        kinds={"task": "category"},
        shots={"task": 6},
        per_class=3,
    )
    for sentence in epoch_of(dataset):
        samples = [sample for sample, _ in samples_of(sentence, 1)]
        assert samples.count(6) == 3
        assert len(set(samples)) == 4


# --- what an epoch shows

LONG_TAIL = {"head": (16, 1, 1, 2), "tail": (4, 4, 1, 2)}


def _plan(**config):
    samples = {task: shape[0] for task, shape in LONG_TAIL.items()}
    return plan(samples, dict.fromkeys(samples, 2 * TOKENS), BalanceConfig(**config))


def _shown(dataset, epoch=0):
    """How often an epoch shows each (task, sample, view) of pairs."""
    return Counter(place[:3] for sentence in epoch_of(dataset, epoch) for place in pictures_of(sentence)[::2])


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_augmenting_shows_every_view_once_an_epoch(pairs):
    dataset = tiny_dataset(LONG_TAIL, plans=_plan(strategy="augment"), pairs=pairs)
    assert dataset.sentences_per_epoch == 32 // pairs
    every = {(0, sample, 0) for sample in range(16)} | {(1, s, v) for s in range(4) for v in range(4)}
    for epoch in range(3):
        assert _shown(dataset, epoch) == Counter(every)


def test_resampling_repeats_every_sample_as_often():
    dataset = tiny_dataset(LONG_TAIL, plans=_plan(strategy="resample"))
    expected = {(0, sample, 0): 1 for sample in range(16)} | {(1, sample, 0): 4 for sample in range(4)}
    assert _shown(dataset) == Counter(expected)


def test_a_mixture_draws_a_fraction_of_a_round():
    # 16 samples once and 10 of them twice; 4 samples five times and 3 of them a sixth
    plans = {"head": TaskPlan(16, 1, 26, 1, 1, 2), "tail": TaskPlan(4, 1, 23, 1, 1, 6)}
    dataset = tiny_dataset(LONG_TAIL, plans=plans, pairs=1)
    assert dataset.sentences_per_epoch == 26 + 23
    twice = set()
    for epoch in range(3):
        shown = _shown(dataset, epoch)
        head = {sample: times for (task, sample, _), times in shown.items() if task == 0}
        tail = {sample: times for (task, sample, _), times in shown.items() if task == 1}
        assert sorted(head.values()) == [1] * 6 + [2] * 10
        assert sorted(tail.values()) == [5, 6, 6, 6]
        twice.add(tuple(sample for sample, times in sorted(head.items()) if times == 2))
    assert len(twice) == 3  # others each epoch


def test_draws_that_do_not_fill_a_sentence_wait():
    dataset = tiny_dataset({"task": (7, 1, 1, 2)}, pairs=3)
    left_out = set()
    for epoch in range(8):
        shown = _shown(dataset, epoch)
        assert sorted(shown.values()) == [1] * 6
        left_out |= set(range(7)) - {sample for _, sample, _ in shown}
    assert len(left_out) > 2


@given(
    samples=st.integers(1, 20),
    views=st.integers(1, 4),
    more=st.floats(0, 3),
    shots=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@laws
def test_no_sample_stands_twice_in_a_sentence(samples, views, more, shots, seed):
    shots = min(shots, samples)
    draws = samples * views if views > 1 else samples + int(more * samples)
    plans = {"task": TaskPlan(samples, views, draws, 1.0, 1.0, 9)}
    dataset = tiny_dataset({"task": (samples, views, 1, 1)}, plans=plans, shots={"task": shots}, seed=seed)
    sentences = epoch_of(dataset)
    assert len(sentences) == draws // shots
    for sentence in sentences:
        assert len({sample for sample, _ in samples_of(sentence, 1)}) == shots


def test_a_task_smaller_than_a_sentence_starts_again():
    dataset = tiny_dataset({"task": (2, 1, 1, 2)}, pairs=5)
    (sentence,) = epoch_of(dataset)
    samples = [sample for sample, _ in samples_of(sentence, 2)]
    assert samples in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])


def test_epochs_pair_anew():
    dataset = tiny_dataset({"task": PAIRS})
    epochs = [{frozenset(samples_of(sentence, 2)) for sentence in epoch_of(dataset, e)} for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_tasks_are_mixed_and_a_sentence_has_one():
    dataset = tiny_dataset({"one": (8, 1, 1, 2), "two": (8, 1, 1, 2)})
    tasks = []
    for sentence in epoch_of(dataset):
        (task,) = {task for task, *_ in pictures_of(sentence)}
        tasks.append(task)
    assert Counter(tasks) == {0: 4, 1: 4}
    assert tasks != sorted(tasks)


# --- held-out sentences


def test_validation_is_fixed_and_real():
    shapes = {"pairs": PAIRS, "film": FILM, "many": (6, 2, 1, 4)}
    config = SentencesConfig(pairs=3, validation=4)
    store, forms = tiny_store(shapes), tiny_forms(shapes, config)
    held = validation_sentences(store, forms, config, 0)
    assert {task: tuple(rows.shape) for task, rows in held.items()} == {
        "pairs": (4, 14),
        "film": (4, 14),
        "many": (4, 26),
    }
    again, other = (validation_sentences(store, forms, config, seed) for seed in (0, 1))
    for index, (task, rows) in enumerate(held.items()):
        assert rows.dtype == torch.int64
        assert torch.equal(rows, again[task])
        assert not torch.equal(rows, other[task])
        picks = validation_picks(forms[task], shapes[task][0], 4, 0, index)
        assert (picks.shape, picks.dtype) == ((4, forms[task].images, 3), np.int64)
        for row, sentence in zip(rows.tolist(), picks.tolist(), strict=True):
            assert (row[0], row[-1]) == (BOS, EOS)
            assert pictures_of(row) == [(index, *place) for place in sentence]
            assert all(view == 0 for _, view, _ in sentence)  # the sample, none of its augmentations
            assert len({sample for sample, _, _ in sentence}) == forms[task].shots


def test_validation_of_a_category():
    labels = np.repeat([0, 1, 2], 4)
    shapes = {"task": (12, 1, 1, 1)}
    config = SentencesConfig(kinds={"task": "category"}, shots={"task": 4}, per_class=2, validation=10)
    store, forms = tiny_store(shapes, {"task": labels}), tiny_forms(shapes, config)
    for row in validation_sentences(store, forms, config, 0)["task"].tolist():
        found = labels[[sample for sample, _ in samples_of(row, 1)]]
        assert found[0] == found[1] != found[2] == found[3]


def test_validation_shows_every_sample_equally_often():
    form = tiny_forms({"task": PAIRS}, SentencesConfig())["task"]
    picks = validation_picks(form, 5, 10, 3, 0)
    assert Counter(picks[:, ::2, 0].reshape(-1).tolist()) == dict.fromkeys(range(5), 4)
    assert (picks[:, ::2, 2] == 0).all()
    assert (picks[:, 1::2, 2] == 1).all()


# --- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pairs": 0}, "pairs: 0 must be at least 1"),
        ({"validation": 0}, "validation: 0 must be at least 1"),
        ({"per_class": -1}, "per_class: -1 must be at least 1"),
        ({"kinds": {"pose": "pair"}}, f"kinds.pose: 'pair' is unknown; choices: {', '.join(KINDS)}"),
        ({"shots": {"pose": 0}}, "shots.pose: 0 must be at least 1"),
        ({"length": 1}, "length: 1 must be 0 (a sentence) or at least 2"),
        ({"length": -4096}, "length: -4096 must be 0 (a sentence) or at least 2"),
        ({"boundaries": "cut"}, "boundaries: 'cut' is unknown; choices: stop, run_on"),
        ({"supervise": "images"}, "supervise: 'images' is unknown; choices: all, annotations"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        SentencesConfig(**values)
    assert str(error.value) == message


def test_the_edges_of_the_ranges_are_possible():
    config = SentencesConfig(pairs=1, validation=1, per_class=1, length=2, shots={"task": 1})
    assert row_length(config, tiny_forms({"task": PAIRS}, config)) == 2


@pytest.mark.parametrize(
    ("sample", "values", "message"),
    [
        ((1, 2), {"kinds": {"poses": "pairs"}}, "sentences.kinds.poses: no such task; tasks: pose"),
        ((1, 2), {"shots": {"poses": 2}}, "sentences.shots.poses: no such task; tasks: pose"),
        (
            (1, 2),
            {"kinds": {"pose": "single"}},
            "sentences.kinds.pose: 'single' does not take samples of 1 x 2 pictures (frames x image and"
            " annotations); choices: pairs, annotations",
        ),
        (
            (3, 1),
            {"kinds": {"pose": "category"}},
            "sentences.kinds.pose: 'category' does not take samples of 3 x 1 pictures (frames x image and"
            " annotations); choices: sequence",
        ),
        (
            (3, 2),
            {"kinds": {"pose": "pairs"}},
            "sentences.kinds.pose: 'pairs' does not take samples of 3 x 2 pictures (frames x image and"
            " annotations); choices: interleaved, separated, two_sequences",
        ),
        (
            (1, 1),
            {"kinds": {"pose": "category"}, "shots": {"pose": 6}},
            "sentences.per_class: 4 does not divide the 6 shots of tasks.pose",
        ),
        (
            (3, 2),
            {"kinds": {"pose": "two_sequences"}, "supervise": "annotations"},
            "sentences.supervise: 'annotations', but tasks.pose has none in sentences of kind"
            " 'two_sequences'",
        ),
        (
            (1, 1),
            {"supervise": "annotations"},
            "sentences.supervise: 'annotations', but tasks.pose has none in sentences of kind 'single'",
        ),
    ],
)
def test_kinds_that_do_not_fit_the_samples(sample, values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        tiny_forms({"pose": (8, 1, *sample)}, SentencesConfig(**values))
    assert str(error.value) == message


# --- special ids


def test_special_ids_follow_the_codes_or_are_given():
    assert SentencesConfig().ends(8192) == (8192, 8193)
    assert SentencesConfig(bos=8290, eos=8200).ends(8192) == (8290, 8200)
    assert SentencesConfig(eos=9000).ends(8192) == (8192, 9000)
    assert SentencesConfig(specials=False, bos=5).ends(8192) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bos": 8191}, "sentences.bos: 8191 is a code, there are 8192"),
        ({"eos": 0}, "sentences.eos: 0 is a code, there are 8192"),
        ({"eos": 8192}, "sentences.bos, sentences.eos: both are 8192"),
    ],
)
def test_special_ids_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SentencesConfig(**values).ends(8192)


def test_sentences_have_the_special_ids_that_are_given():
    config = SentencesConfig(validation=3, bos=BOS + 7, eos=BOS + 3)
    store, forms = tiny_store({"task": PAIRS}), tiny_forms({"task": PAIRS}, config)
    usual = validation_sentences(store, forms, SentencesConfig(validation=3), 0)["task"]
    found = validation_sentences(store, forms, config, 0)["task"]
    assert torch.equal(found[:, 1:-1], usual[:, 1:-1])
    assert set(found[:, 0].tolist()) == {BOS + 7}
    assert set(found[:, -1].tolist()) == {BOS + 3}
    row = tiny_dataset({"task": PAIRS}, bos=BOS + 7, eos=BOS + 3)[0]["tokens"]
    assert (int(row[0]), int(row[-1])) == (BOS + 7, BOS + 3)
