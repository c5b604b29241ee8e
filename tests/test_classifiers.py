"""Classifiers: the numbers of scikit-learn, from shards, without a look at the labels that are asked for."""

import numpy as np
import pytest
import torch

from delvm.errors import UserError
from delvm.evaluate import classifiers
from delvm.evaluate.classifiers import FOLDS, in_fold, moments, nearest, ridge
from delvm.evaluate.features import Features

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CLASSES, LAYERS, WIDTH = 6, 2, 5


def features(number, seed, shards=1):
    """Layers of noisy class means, far from 0 and of different scales; one feature never changes."""
    means = np.random.default_rng(0).normal(size=(CLASSES, LAYERS, WIDTH))
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=number)
    x = means[labels] + rng.normal(size=(number, LAYERS, WIDTH))
    x = x * np.logspace(-2, 2, WIDTH) + 30
    x[:, 0, 3] = 7
    parts = np.array_split(x[:, None].astype(np.float32), shards)
    return Features(parts, labels.astype(np.int64), tuple(map(str, range(1, LAYERS + 1))))


def flat(found):
    return np.concatenate([shard for shard in found.shards]).reshape(len(found), -1).astype(np.float64)


@pytest.fixture(scope="module")
def train():
    return features(403, 1, shards=3)


@pytest.fixture(scope="module")
def validation():
    return features(150, 2)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 pictures."""
    monkeypatch.setattr("delvm.evaluate.features.BLOCK_BYTES", 7 * 4 * LAYERS * WIDTH)


def outside(found, fold):
    rest = ~in_fold(np.arange(len(found)), fold)
    return flat(found)[rest], found.labels[rest]


def fitted(found, fold, strength, columns=slice(None)):
    """scikit-learn's scores of any pictures."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x, labels = outside(found, fold)
    scaler = preprocessing.StandardScaler().fit(x[:, columns])
    model = linear_model.Ridge(alpha=strength * len(x)).fit(
        scaler.transform(x[:, columns]), np.eye(CLASSES)[labels]
    )
    return lambda other: model.predict(scaler.transform(flat(other)[:, columns]))


def test_folds_part_the_pictures():
    places = np.arange(25)
    assert sum(in_fold(places, fold).astype(int) for fold in range(FOLDS)).tolist() == [1] * 25
    assert np.flatnonzero(in_fold(places, 3)).tolist() == [3, 13, 23]


def test_ridge_scores_are_those_of_scikit_learn(train, validation, small_blocks):
    parts, shift = classifiers._sums(train, CLASSES, 2, CPU)
    for columns in (slice(0, 10), slice(5, 10)):
        fit = classifiers.Ridge(parts[0] + parts[2], shift, columns)
        strengths = [1e-4, 0.03, 10.0]
        found = list(fit.scores(torch.from_numpy(flat(validation)), strengths))
        for strength, scores in zip(strengths, found, strict=True):
            expected = fitted(train, 0, strength, columns)(validation)
            np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_ridge_predicts_with_the_strength_that_is_best_on_its_fold(train, validation, small_blocks):
    strengths = (1e-4, 0.1, 1e4)
    predictions = ridge(train, validation, CLASSES, 3, CPU, strengths)
    assert len(predictions) == 3
    for fold, found in enumerate(predictions):
        inside = in_fold(np.arange(len(train)), fold)
        accuracies = []
        for strength in strengths:
            guesses = fitted(train, fold, strength)(train).argmax(1)
            accuracies.append((guesses == train.labels)[inside].mean())
        best = max(range(3), key=lambda n: (accuracies[n], n))
        assert found.chosen == {"strength": strengths[best], "accuracy": pytest.approx(accuracies[best])}
        expected = np.argsort(-fitted(train, fold, strengths[best])(validation), axis=1)[:, :5]
        assert np.array_equal(found.ranks, expected)
    assert len({prediction.ranks.tobytes() for prediction in predictions}) > 1


def test_by_layer_is_the_ridge_of_that_layer_alone(train, validation):
    whole = ridge(train, validation, CLASSES, 1, CPU)[0]
    assert set(whole.by_layer) == {"1", "2"}
    for number, layer in enumerate(("1", "2")):
        one, other = (
            Features([shard[:, :, number : number + 1] for shard in found.shards], found.labels, (layer,))
            for found in (train, validation)
        )
        alone = ridge(one, other, CLASSES, 1, CPU)[0]
        assert np.array_equal(alone.ranks, whole.by_layer[layer])
        assert alone.by_layer == {}


def test_shards_and_blocks_make_no_difference(train, validation, small_blocks):
    joined = Features([np.concatenate(train.shards)], train.labels, train.layers)
    one, other = (ridge(found, validation, CLASSES, 2, CPU) for found in (train, joined))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.ranks, b.ranks)
        assert a.chosen == b.chosen
    a, b = (nearest(found, validation, CLASSES, 1, CPU, most=20) for found in (train, joined))
    assert np.array_equal(a.ranks, b.ranks)


def test_the_labels_that_are_asked_for_are_not_read(train, validation):
    blind = Features(validation.shards, np.full(len(validation), -1), validation.layers)
    for classify in (
        lambda found: ridge(train, found, CLASSES, 1, CPU)[0],
        lambda found: nearest(train, found, CLASSES, 0, CPU),
    ):
        assert np.array_equal(classify(blind).ranks, classify(validation).ranks)


def test_too_many_features_for_a_ridge(train, validation, monkeypatch):
    monkeypatch.setattr(classifiers, "MOST_FEATURES", 9)
    message = r"^probe\.layers: 2 layers of 5 features, the ridge takes 9 in all; choose fewer layers"
    with pytest.raises(UserError, match=message):
        ridge(train, validation, CLASSES, 1, CPU)


def test_moments_are_of_what_is_outside_the_fold(train, small_blocks):
    mean, deviation = moments(train, 4, CPU)
    x, _ = outside(train, 4)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    expected = x.std(0)
    assert expected[3] == 0
    expected[3] = 1
    np.testing.assert_allclose(deviation, expected, rtol=1e-4)


@pytest.mark.parametrize("most", [10, 4096])
def test_nearest_votes_as_scikit_learn_does(train, validation, small_blocks, most):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, labels = outside(train, 2)
    mean, deviation = x.mean(0), x.std(0)
    deviation[3] = 1
    model = neighbors.KNeighborsClassifier(
        n_neighbors=11, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit((x - mean) / deviation, labels)
    votes = model.predict_proba((flat(validation) - mean) / deviation)
    found = nearest(train, validation, CLASSES, 2, CPU, neighbours=11, most=most)
    assert np.array_equal(found.ranks[:, 0], votes.argmax(1))
    several = (votes > 0).sum(1) >= 2  # the others are tied at no vote
    assert np.array_equal(found.ranks[several, 1], np.argsort(-votes, axis=1)[several, 1])
    assert several.sum() > 50
