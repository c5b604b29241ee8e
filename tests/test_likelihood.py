import math

import numpy as np
import pytest
import torch

from delvm import llama
from delvm.evaluate.likelihood import (
    TokenScores,
    by_examples,
    by_place,
    evaluate,
    mean_perplexity,
    score_tokens,
    summarise,
)
from delvm.tokens.sentences import ANNOTATION, IMAGE, SPECIAL

# BOS image(3) annotation(3) image(3) annotation(3) EOS
ROLES = torch.tensor([SPECIAL] + ([IMAGE] * 3 + [ANNOTATION] * 3) * 2 + [SPECIAL], dtype=torch.int8)
EACH = {"a": ROLES, "b": ROLES, "pose": ROLES, "edges": ROLES}
BOS, EOS = 20, 21


@pytest.fixture
def model():
    model = llama.build("micro", 22, 14, bos=BOS, eos=EOS, seed=0)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it so that differences would show
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def _sentences(num, seed=0):
    codes = torch.randint(0, 20, (num, 12), generator=torch.Generator().manual_seed(seed))
    edge = torch.ones(num, 1, dtype=torch.int64)
    return torch.cat([BOS * edge, codes, EOS * edge], 1)


def _reference(model, ids):
    """The definition, sentence by sentence in float64 numpy."""
    losses, hits = np.zeros((len(ids), 13)), np.zeros((len(ids), 13))
    with torch.no_grad():
        logits = model.double()(ids).logits.numpy()
    model.float()
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            row = logits[b, t - 1]
            log_z = np.log(np.exp(row - row.max()).sum()) + row.max()
            losses[b, t - 1] = log_z - row[ids[b, t]]
            hits[b, t - 1] = row.argmax() == int(ids[b, t])
    found = {}
    for prefix, kept in (("", ROLES[1:] != 0), ("annotation_", ROLES[1:] == 2)):
        for key, values in (("loss", losses), ("accuracy", hits)):
            of_sentences = values[:, kept.numpy()].mean(1)
            found[f"{prefix}{key}"] = of_sentences.mean()
            found[f"{prefix}{key}_se"] = of_sentences.std(ddof=1) / math.sqrt(len(ids))
        found[f"{prefix}perplexity"] = np.exp(found[f"{prefix}loss"])
    return found


def test_equals_the_definition_in_float64(model):
    sentences = {"pose": _sentences(7), "edges": _sentences(5, seed=1)}
    found = evaluate(model, sentences, EACH, batch_size=3)
    assert list(found) == ["pose", "edges"]
    for task, ids in sentences.items():
        expected = _reference(model, ids)
        assert set(found[task]) == set(expected)
        for key, value in expected.items():
            assert found[task][key] == pytest.approx(value, rel=1e-5), (task, key)
            assert type(found[task][key]) is float
    assert found["pose"]["accuracy"] > 0  # else accuracy would not have been tested


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing(model, batch_size):
    ids = _sentences(7)
    whole = evaluate(model, {"a": ids}, EACH, batch_size=7)["a"]
    split = evaluate(model, {"a": ids}, EACH, batch_size=batch_size)["a"]
    assert split == pytest.approx(whole, rel=1e-6)


def test_uniform_model_scores_the_logarithm_of_the_vocabulary(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    metrics = evaluate(model, {"a": _sentences(4)}, EACH)["a"]
    assert metrics["loss"] == pytest.approx(math.log(22), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(22, rel=1e-5)


def test_what_follows_the_last_code_does_not_count(model):
    ids = _sentences(4)
    other = ids.clone()
    other[:, -1] = 3  # instead of EOS
    assert evaluate(model, {"a": ids}, EACH) == evaluate(model, {"a": other}, EACH)


def test_annotation_metrics_see_annotation_targets_alone(model):
    ids = _sentences(4)
    before = evaluate(model, {"a": ids}, EACH)["a"]
    # the last annotation's code: nothing after it counts, so only annotation_* and the totals may move
    other = ids.clone()
    other[:, 12] = (other[:, 12] + 1) % 20
    after = evaluate(model, {"a": other}, EACH)["a"]
    assert after["annotation_loss"] != before["annotation_loss"]
    image_before = 2 * before["loss"] - before["annotation_loss"]
    image_after = 2 * after["loss"] - after["annotation_loss"]
    assert image_after == pytest.approx(image_before, abs=1e-6)


def test_sentences_without_annotations_have_no_annotation_metrics(model):
    roles = torch.where(ROLES == ANNOTATION, IMAGE, ROLES)
    found = evaluate(model, {"a": _sentences(2)}, {"a": roles})["a"]
    assert set(found) == {"loss", "accuracy", "perplexity", "loss_se", "accuracy_se"}


def test_one_sentence_has_no_standard_error(model):
    found = evaluate(model, {"a": _sentences(1)}, EACH)["a"]
    keys = ("loss", "accuracy", "perplexity")
    assert set(found) == {*keys, *(f"annotation_{key}" for key in keys)}


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = torch.random.get_rng_state()
    evaluate(model, {"a": _sentences(2)}, EACH)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())
    model.eval()
    evaluate(model, {"a": _sentences(2)}, EACH)
    assert not model.training


def test_a_bfloat16_model_is_scored_in_float32(model):
    found = evaluate(model.to(torch.bfloat16), {"a": _sentences(8)}, EACH)["a"]
    assert found["loss"] == pytest.approx(_reference(model, _sentences(8))["loss"], rel=0.02)
    # a bfloat16 mean would lie on a grid of 1/64 at this size
    assert found["loss"] * 64 != pytest.approx(round(found["loss"] * 64), abs=1e-6)


def test_progress_counts_sentences(model):
    seen = []
    evaluate(model, {"a": _sentences(5), "b": _sentences(2)}, EACH, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (_sentences(2)[:, :-1], r"sentences\.a: shape \(2, 13\), must be \(at least 1, 14\)"),
        (_sentences(0), r"shape \(0, 14\)"),
        (_sentences(2) + 1, r"sentences\.a: ids 1\.\.22|ids .*\.\.22, must be in 0\.\.21"),
        (_sentences(2) - 1 - 20 * (_sentences(2) == 0), r"sentences\.a: ids -"),
    ],
)
def test_sentences_that_do_not_fit(model, ids, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, {"a": ids}, EACH)


def test_roles_without_a_target(model):
    for roles in ({"a": torch.zeros(14, dtype=torch.int8)}, {"b": ROLES}):
        with pytest.raises(ValueError, match=r"roles\.a: shape"):
            evaluate(model, {"a": _sentences(2)}, roles)


def test_every_task_has_roles_of_its_own(model):
    ids, short = _sentences(3), _sentences(3)[:, :7]  # BOS image annotation
    found = evaluate(model, {"a": ids, "b": short}, {"a": ROLES, "b": ROLES[:7]})
    assert found["a"] == evaluate(model, {"a": ids}, {"a": ROLES})["a"]
    assert found["b"] == evaluate(model, {"b": short}, {"b": ROLES[:7]})["b"]
    assert found["a"]["loss"] != found["b"]["loss"]


# --- the same numbers, cut otherwise ---

# nll of token t of sentence b: t + 100 b, so that every mean is known
NLL = torch.arange(1.0, 14.0) + torch.tensor([[0.0], [100.0]])
KNOWN = TokenScores(NLL, NLL < 10)
EXAMPLES = torch.tensor([-1] + [0] * 6 + [1] * 6 + [-1])
PLACES = torch.tensor([-1, *[0, 1, 2] * 4, -1])


def test_means_and_standard_errors_over_sentences():
    found = summarise(KNOWN, ROLES)
    assert found["loss"] == pytest.approx(56.5)  # codes 1..12, and 101..112
    assert found["loss_se"] == pytest.approx(50.0)  # of 6.5 and 106.5
    assert found["accuracy"] == pytest.approx(9 / 24)
    assert found["annotation_loss"] == pytest.approx(50 + (4 + 5 + 6 + 10 + 11 + 12) / 6)
    assert found["annotation_accuracy"] == pytest.approx(3 / 12)
    assert found["annotation_accuracy_se"] == pytest.approx(0.25)


def test_annotations_by_the_examples_before_them():
    found = by_examples(KNOWN, ROLES, EXAMPLES)
    assert list(found) == [0, 1]
    assert [found[number]["loss"] for number in found] == pytest.approx([55.0, 61.0])
    assert [found[number]["accuracy"] for number in found] == pytest.approx([0.5, 0.0])
    # weighted by their codes they are the whole
    whole = summarise(KNOWN, ROLES)["annotation_loss"]
    assert np.mean([entry["loss"] for entry in found.values()]) == pytest.approx(whole)


def test_annotations_by_their_place_in_the_picture():
    found = by_place(KNOWN, ROLES, PLACES)
    assert found.tolist() == pytest.approx([50 + 7.0, 50 + 8.0, 50 + 9.0])


def test_the_last_tokens_alone(model):
    ids = _sentences(5)
    whole, last = score_tokens(model, ids), score_tokens(model, ids, first=9, batch_size=2)
    assert last.nll.shape == (5, 5)
    torch.testing.assert_close(last.nll, whole.nll[:, 8:])
    assert torch.equal(last.hits, whole.hits[:, 8:])


def test_perplexity_is_averaged_over_examples():
    found = mean_perplexity([math.log(2), math.log(4), math.log(9)])
    assert found == pytest.approx({"perplexity": 5.0, "perplexity_se": math.sqrt(13 / 3), "examples": 3})
    assert mean_perplexity([0.0]) == {"perplexity": 1.0, "examples": 1}
