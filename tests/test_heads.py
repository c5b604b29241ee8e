"""Probes that are trained: each as if it were alone, each as its formula says."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from delvm.evaluate.classifiers import in_fold, moments
from delvm.evaluate.features import Features
from delvm.evaluate.heads import AttentiveProbe, LinearGrid, attentive, linear

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def features(number, seed, shards=2):
    """3 classes; the second layer tells them, the first is noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=number)
    x = rng.normal(size=(number, 1, 2, 4)).astype(np.float32)
    x[np.arange(number), 0, 1, labels] += 6
    return Features(np.array_split(5 * x + 3, shards), labels.astype(np.int64), ("7", "8"))


def marked_tokens(number, seed):
    """2 classes by the content of one token in six; which of them is marked differs."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=number)
    x = 0.3 * rng.normal(size=(number, 1, 6, 8)).astype(np.float32)
    places = rng.integers(6, size=number)
    x[np.arange(number), 0, places, 0] += 5
    x[np.arange(number), 0, places, 1] += np.where(labels, 5, -5)
    return Features(np.array_split(x, 2), labels.astype(np.int64), tuple(map(str, range(6))))


def accuracy(ranks, found):
    return (ranks[:, 0] == found.labels).mean()


def test_a_linear_grid_is_a_linear_classifier_of_each_standardised_layer():
    train = features(40, 0)
    mean, deviation = moments(train, 0, CPU)
    grid = LinearGrid(train, 3, mean, deviation)
    torch.nn.init.normal_(grid.weight)
    torch.nn.init.normal_(grid.bias)
    batch = torch.from_numpy(train.shards[0]).flatten(1)
    standard = ((batch - mean) / deviation).view(-1, 2, 4)
    for layer in (0, 1):
        expected = standard[:, layer] @ grid.weight[layer] + grid.bias[layer]
        torch.testing.assert_close(grid(batch)[layer], expected)


def test_the_best_layer_and_rate_are_chosen_on_the_fold():
    train, validation = features(300, 0), features(90, 1)
    found = linear(train, validation, 3, 1, CPU, rates=[0.1], epochs=5, batch_size=32)
    assert found.chosen["layer"] == "8"
    assert found.chosen["rate"] == 0.1
    inside = in_fold(np.arange(300), 1)
    assert 0.9 < found.chosen["accuracy"] <= 1
    assert (found.chosen["accuracy"] * inside.sum()) % 1 == pytest.approx(0, abs=1e-9)
    assert accuracy(found.ranks, validation) > 0.9
    assert np.array_equal(found.ranks, found.by_layer["8"])
    assert accuracy(found.by_layer["7"], validation) < 0.6


def test_probes_trained_together_are_those_trained_alone():
    train, validation = features(120, 0), features(40, 1)
    both, one, two = (
        linear(train, validation, 3, 0, CPU, rates=rates, epochs=2, batch_size=16)
        for rates in ([1e-3, 0.3], [1e-3], [0.3])
    )
    alone = max((one, two), key=lambda found: found.chosen["accuracy"])
    assert both.chosen == alone.chosen
    assert np.array_equal(both.ranks, alone.ranks)


def test_a_step_of_the_linear_probe_is_that_of_sgd():
    train = features(10, 0, shards=1)  # nine outside the fold: one batch
    found = linear(train, train, 3, 0, CPU, rates=[256 / 9], epochs=1, batch_size=9)
    rest = ~in_fold(np.arange(10), 0)
    mean, deviation = moments(train, 0, CPU)
    standard = ((torch.from_numpy(train.shards[0]).flatten(1) - mean) / deviation).view(10, 2, 4)
    labels = torch.from_numpy(train.labels)
    for layer, name in enumerate(train.layers):
        weight, bias = torch.zeros(4, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
        F.cross_entropy(standard[rest, layer] @ weight + bias, labels[rest]).backward()
        scores = standard[:, layer] @ -weight.grad - bias.grad
        assert np.array_equal(found.by_layer[name], (scores).topk(3).indices.numpy())


def test_an_attentive_probe_is_attention_of_its_queries():
    torch.manual_seed(0)
    probe = AttentiveProbe(8, 3, heads=2, num_queries=2).eval()
    probe.norm.running_mean.normal_()
    probe.norm.running_var.uniform_(0.5, 2)
    tokens = torch.randn(5, 6, 8)
    normal = (tokens - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
    keys, values = probe.keys(normal), probe.values(normal)
    pooled = torch.zeros(5, 2, 8)
    for head in (slice(0, 4), slice(4, 8)):
        weights = (probe.queries[:, head] @ keys[..., head].transpose(1, 2) / 2).softmax(-1)
        pooled[..., head] = weights @ values[..., head]
    expected = probe.classifier(pooled.mean(1))
    torch.testing.assert_close(probe(tokens.flatten(1)), expected[None])
    names = {name: tuple(parameter.shape) for name, parameter in probe.named_parameters()}
    assert names == {
        "queries": (2, 8), "keys.weight": (8, 8), "values.weight": (8, 8), "classifier.weight": (3, 8)
    }  # fmt: skip


def test_an_attentive_probe_finds_the_token_that_tells():
    train, validation = marked_tokens(400, 0), marked_tokens(100, 1)
    found = attentive(train, validation, 2, 0, CPU, rates=[1e-6, 1e-2], epochs=8, batch_size=32)
    assert found.chosen["rate"] == 1e-2
    assert accuracy(found.ranks, validation) > 0.95
    again = attentive(train, validation, 2, 0, CPU, rates=[1e-6, 1e-2], epochs=8, batch_size=32)
    assert np.array_equal(again.ranks, found.ranks)


def test_the_labels_that_are_asked_for_are_not_read():
    train, validation = marked_tokens(60, 0), marked_tokens(20, 1)
    blind = Features(validation.shards, np.full(20, -1), validation.layers)
    for probe in (linear, attentive):
        one, other = (probe(train, v, 2, 0, CPU, rates=[1e-2], epochs=1) for v in (validation, blind))
        assert np.array_equal(one.ranks, other.ranks)
