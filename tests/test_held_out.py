"""What is measured of models on held-out sentences, over a store and pictures small enough to check."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from delvm import llama
from delvm.evaluate import held_out, likelihood
from delvm.evaluate.held_out import HeldOut, ceilings, measure, shown
from delvm.evaluate.prompting import PromptingConfig
from delvm.evaluate.scores import Scored, score
from delvm.generation import complete
from delvm.images.sources import Views
from delvm.images.tasks import TaskConfig
from delvm.tokens.sentences import SentencesConfig, find_forms, validation_sentences
from delvm.tokens.store import Grid, TokenStore

MSE = partial(score, "difference")
CONFIG = SentencesConfig(pairs=2, validation=12)
SHAPES = {"shade": (1, 2), "film": (3, 3), "alone": (1, 1)}  # frames, pictures of a sample
TOKENS = 4  # of a picture of 8 px


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Models this small only lose by more."""


@pytest.fixture(scope="module")
def samples():
    """Ten pairs: blocks of colour, and the same in grey."""
    blocks = np.random.default_rng(0).integers(256, size=(10, 2, 2, 3)).astype(np.uint8)
    images = blocks.repeat(4, axis=1).repeat(4, axis=2)
    return [[image, image.mean(axis=-1, keepdims=True).repeat(3, -1).astype(np.uint8)] for image in images]


@pytest.fixture(scope="module")
def held(samples, tokenizer):
    """`shade` has pictures and their codes, `film` and `alone` random codes."""
    codes = np.stack([tokenizer.encode(pixels(sample)).numpy() for sample in samples])[:, None]
    rng = np.random.default_rng(1)
    grids = {
        "shade": codes,
        "film": rng.integers(16, size=(6, 1, 3, TOKENS)),
        "alone": rng.integers(16, size=(5, 1, 1, TOKENS)),
    }
    validation = {task: Grid([grid.astype(np.uint16)]) for task, grid in grids.items()}
    manifest = {"num_codes": 16, "tokens_per_image": TOKENS}
    store = TokenStore(manifest, {"validation": validation}, {"validation": {}})
    config = TaskConfig(images="images", annotations="annotations")
    views = {"shade": Views(samples, "shade", config, size=8, num_views=1, seed=0)}
    return HeldOut(store, tokenizer, find_forms(CONFIG, SHAPES, TOKENS), CONFIG, views, seed=3)


@pytest.fixture(scope="module")
def model():
    model = llama.build("micro", 18, 60, bos=16, eos=17, seed=0).eval()
    with torch.no_grad():  # a fresh model is nearly uniform
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def pixels(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def as_pictures(decoded):
    return (decoded.permute(0, 2, 3, 1) * 255).round().byte().numpy()


def mse(one, other):
    return float((((one.astype(float) - other) / 255) ** 2).mean())


def test_the_sentences_are_the_fixed_held_out_ones(held):
    expected = validation_sentences(held.store, held.forms, CONFIG, 3)
    assert list(held.sentences) == ["shade", "film", "alone"]
    for task, ids in expected.items():
        assert torch.equal(held.sentences[task], ids)
        picks = held.picks(task)
        codes = held.store.grids["validation"][task].gather(*np.moveaxis(picks, -1, 0))
        np.testing.assert_array_equal(codes.reshape(len(ids), -1), ids[:, 1:-1])
    assert held.prompted == ["shade", "film"]  # before a single picture stands nothing


def test_scores_are_those_of_the_likelihood(held, model):
    found = measure(model, held, PromptingConfig(pictures=1))
    roles = {task: form.roles for task, form in held.forms.items()}
    assert found.scores == likelihood.evaluate(model, held.sentences, roles)
    assert "annotation_loss" in found.scores["shade"]
    assert "annotation_loss" not in found.scores["film"]
    assert list(found.places) == list(found.examples) == ["shade"]
    grid = np.array(found.places["shade"])
    assert grid.shape == (2, 2)
    assert grid.mean() == pytest.approx(found.scores["shade"]["annotation_loss"])
    assert list(found.examples["shade"]) == [0, 1]  # two pairs
    assert found.drawn == {}


def test_annotations_after_more_examples(held, model):
    seen: list[int] = []
    found = measure(model, held, PromptingConfig(pictures=1), examples=7, progress=seen.append)
    # BOS, 7 pairs of 8 tokens and EOS are 58 of the model's 60 positions
    assert list(found.examples["shade"]) == list(range(7))
    assert sum(seen) == 4 * 12
    longer = held.with_examples(7, 60)
    assert longer.forms["shade"].shots == 7
    assert longer.forms["film"] == held.forms["film"]
    ids, roles = longer.sentences["shade"], longer.forms["shade"].roles
    annotations = [likelihood.score_tokens(model, ids[:, :end], first=end - 4) for end in range(9, 58, 8)]
    for number, scores in enumerate(annotations):
        assert found.examples["shade"][number]["loss"] == pytest.approx(scores.nll.mean().item(), rel=1e-5)
    whole = likelihood.evaluate(model, {"shade": ids}, {"shade": roles})["shade"]["annotation_loss"]
    mean = np.mean([entry["loss"] for entry in found.examples["shade"].values()])
    assert mean == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("most", "positions", "shots"),
    [(7, 1000, 8), (3, 1000, 4), (30, 1000, 10), (7, 41, 4), (1, 30, 2), (7, 19, 2)],
)
def test_how_many_examples_there_are_room_for(held, most, positions, shots):
    assert held.with_examples(most, positions).forms["shade"].shots == shots


def test_pictures_are_what_the_model_continues(held, model):
    found = measure(model, held, PromptingConfig(pictures=3))
    assert list(found.pictures) == ["shade", "film"]
    for task, end in (("shade", 1 + 3 * TOKENS), ("film", 1 + 2 * TOKENS)):
        codes = complete(model, held.sentences[task][:3, :end], TOKENS, 16, seed=3)
        np.testing.assert_array_equal(found.pictures[task], as_pictures(held.tokenizer.decode(codes)))


def test_drawn_pictures_are_scored_against_truth_and_reconstruction(held, model, samples):
    drawing = PromptingConfig(pictures=2, queries=10, temperature=1.0)
    scorers = {"shade": MSE, "film": MSE, "alone": MSE}
    found = measure(model, held, drawing, scorers=scorers)
    assert list(found.drawn) == ["shade", "film"]
    assert list(found.drawn["film"]) == ["reconstruction"]  # tokens alone
    # ten prompts, eight side by side
    prompts = held.sentences["shade"][:10, : 1 + 3 * TOKENS]
    codes = [
        complete(model, part, TOKENS, 16, temperature=1.0, seed=3 + number)
        for number, part in enumerate(prompts.split(8))
    ]
    drawn = as_pictures(held.tokenizer.decode(torch.cat(codes)))
    np.testing.assert_array_equal(found.pictures["shade"], drawn[:2])
    truth = np.stack([samples[sample][1] for sample in held.picks("shade")[:10, -1, 0]])
    kept = as_pictures(held.tokenizer(pixels(truth)))
    assert found.drawn["shade"]["truth"] == pytest.approx({"mse": mse(drawn, truth)})
    assert found.drawn["shade"]["reconstruction"] == pytest.approx({"mse": mse(drawn, kept)}, abs=1e-4)
    best = ceilings(held, 10, scorers)
    assert list(best) == ["shade"]
    assert best["shade"] == pytest.approx({"mse": mse(kept, truth)}, abs=1e-4)
    assert len({mse(drawn, truth), mse(drawn, kept), mse(kept, truth)}) == 3


def test_what_is_no_number_is_left_out(held, model):
    def scorer(generated, truth, labels=None):
        return Scored({"oks": math.nan, "pck": 0.5}, np.zeros(len(truth)), True)

    found = measure(model, held, PromptingConfig(pictures=1, queries=1), scorers={"shade": scorer})
    assert found.drawn == {"shade": {"truth": {"pck": 0.5}, "reconstruction": {"pck": 0.5}}}


def test_every_task_has_a_scorer():
    found = held_out.scorers_of(
        {
            "shapes": TaskConfig(scene="segmentation", samples=1, validation_samples=1),
            "rain": TaskConfig("lvm", "x"),
        },
        {},
    )
    truth = np.zeros((1, 4, 4, 3), np.uint8)
    truth[:, :2] = (255, 0, 0)
    almost = truth.copy()
    almost[:, :2] = (200, 40, 0)  # nearest to red, of black and the colours of all shapes
    assert found["shapes"](almost, truth).metrics["miou"] == 1.0
    assert found["rain"](truth, truth).metrics == {"mse": 0.0}


def test_a_recipe_says_how_a_task_is_scored():
    shapes = TaskConfig(scene="segmentation", samples=1, validation_samples=1)
    found = held_out.scorers_of({"shapes": shapes, "lines": TaskConfig(images="a", annotations="b")},
                                {"shapes": "foreground", "lines": "edges"})  # fmt: skip
    truth = np.zeros((1, 4, 4, 3), np.uint8)
    truth[:, :2] = (255, 0, 0)
    blue = np.flip(truth, axis=-1)  # of another class, and as much of it
    assert found["shapes"](blue, truth).metrics["foreground_iou"] == 1.0
    line = np.zeros((1, 9, 9, 3), np.uint8)
    line[:, 4] = 255
    beside = np.roll(line, 3, axis=1)  # farther off than a pixel
    assert found["lines"](line, line).metrics["boundary_f"] == 1.0
    assert found["lines"](beside, line).metrics["boundary_f"] == 0.0


def test_what_is_shown_of_a_sentence(held, samples):
    rows = shown(held, 2)
    assert list(rows) == ["shade", "film"]
    assert [caption for caption, _ in rows["shade"][0]] == ["example", "annotation", "query", "truth"]
    assert [caption for caption, _ in rows["film"][1]] == ["image", "image", "truth"]
    for row, picks in zip(rows["shade"], held.picks("shade"), strict=False):
        for (_, picture), (sample, _, place) in zip(row, picks, strict=True):
            np.testing.assert_array_equal(picture, samples[sample][place])
    assert len(rows["shade"]) == len(rows["film"]) == 2


def test_several_models(held, model, tmp_path):
    other = llama.build("micro", 18, 60, bos=16, eos=17, seed=1)
    for name, saved in (("teacher", model), ("student", other)):
        llama.save(saved, tmp_path / name)
    scores, pictures, scored = held_out.evaluate(
        {name: tmp_path / name for name in ("teacher", "student")}, held.store, held.tokenizer, held.forms,
        CONFIG, PromptingConfig(pictures=2), views=held.views, seed=3, device=torch.device("cpu"),
        scorers={"shade": MSE},
    )  # fmt: skip
    assert {task: list(models) for task, models in scored.items()} == {"shade": ["teacher", "student"]}
    of_last = [
        float((((row[-1][1].astype(float) - dict(row)["truth"]) / 255) ** 2).mean())
        for row in pictures["shade"]
    ]
    assert scored["shade"]["student"].by_picture[:2] == pytest.approx(of_last)
    mean = scores["student"]["shade"]["pictures"]["truth"]["mse"]
    assert scored["shade"]["student"].by_picture.mean() == pytest.approx(mean)
    assert list(scores) == ["teacher", "student"]
    found = measure(model, held, PromptingConfig(pictures=2))
    assert scores["teacher"]["film"] == found.scores["film"]  # no annotations
    shade = scores["teacher"]["shade"]
    assert shade["examples"] == {"0": found.examples["shade"][0], "1": found.examples["shade"][1]}
    assert shade["places"] == found.places["shade"]
    assert {key: shade[key] for key in found.scores["shade"]} == found.scores["shade"]
    assert scores["student"]["shade"]["loss"] != scores["teacher"]["shade"]["loss"]
    assert [caption for caption, _ in pictures["film"][1]] == [
        "image",
        "image",
        "truth",
        "teacher",
        "student",
    ]
    expected = measure(other, held, PromptingConfig(pictures=2)).pictures["shade"]
    np.testing.assert_array_equal([row[-1][1] for row in pictures["shade"]], expected)
