"""The probe as a whole: its table, its settings, and what it refuses."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate.classifiers import Prediction
from delvm.evaluate.probe import ProbeConfig, by_class, list_splits, probe, right, summary

pytestmark = pytest.mark.usefixtures("one_thread")


def write_colours(folder, number):
    """Classes that are colours, with noise; 8 px."""
    rng = np.random.default_rng(number)
    for place, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for picture in range(number):
            pixels = rng.integers(120, size=(8, 8, 3), dtype=np.uint8)
            pixels[..., place] += 100
            Image.fromarray(pixels).save(folder / name / f"{picture}.png")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 20)
    write_colours(root / "val", 7)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A micro model of the tokenizer's 16 codes."""
    folder = tmp_path_factory.mktemp("model")
    llama.save(llama.build("micro", 18, 16, bos=16, eos=17, seed=3), folder)
    return folder


@pytest.fixture
def run(colours, tokenizer, tmp_path):
    """Probes with these settings, in tmp_path."""

    def call(models=(), **settings):
        given = {"train": f"{colours}/train", "validation": f"{colours}/val", "seeds": 2, **settings}
        return probe(
            dict(models), tokenizer, ProbeConfig(**given), tmp_path, features=tmp_path / "features",
            tensorboard=tmp_path / "tensorboard",
        )  # fmt: skip

    return call


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ""}, "train: missing, give a folder with one folder of pictures a class"),
        ({"readout": "first"}, "readout: 'first' is unknown; choices: quadrants, mean, last"),
        ({"dtype": "int8"}, "dtype: 'int8' is unknown; choices: float16, float32"),
        (
            {"classifiers": ["svm"]},
            "classifiers: 'svm' is unknown; choices: ridge, nearest, linear, attentive",
        ),
        ({"classifiers": []}, "classifiers: none; choices: ridge, nearest, linear, attentive"),
        ({"controls": ["sift"]}, "controls: 'sift' is unknown; choices: tokens, pixels, codebook, random"),
        ({"seeds": 11}, "seeds: 11 must be at most 10"),
        ({"epochs": 0}, "epochs: 0 must be at least 1"),
        ({"samples": -1}, "samples: -1 must be at least 0"),
        ({"learning_rates": []}, "learning_rates: [] must be one or more above 0"),
        ({"layers": [0]}, "layers: [0] must be different, from 1 on"),
        ({"layers": [2, 2]}, "layers: [2, 2] must be different, from 1 on"),
        (
            {"models": {"pixels": "a"}},
            "models.pixels: a name may hold letters, digits, '_' and '-', and be none of tokens, pixels,"
            " codebook, random, codes",
        ),
        (
            {"models": {"codes": "a"}},
            "models.codes: a name may hold letters, digits, '_' and '-', and be none of tokens, pixels,"
            " codebook, random, codes",
        ),
        (
            {"models": {"timm-x": "a"}, "timm": ["timm/x"]},
            "models.timm-x: a name may hold letters, digits, '_' and '-', and be none of tokens, pixels,"
            " codebook, random, codes, timm-x",
        ),
    ],
)
def test_an_impossible_setting(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ProbeConfig(**{"train": "a", "validation": "b", **settings})


def test_too_few_pictures_to_leave_some_out(colours, tmp_path):
    config = ProbeConfig(train=f"{colours}/train", validation=f"{colours}/val", samples=9)
    with pytest.raises(UserError, match=r"^probe\.train: 9 pictures in '.*/train', must be 10 at least$"):
        list_splits(config)


# --- numbers


def test_a_summary_of_two_seeds():
    labels = np.array([0, 1, 2, 0])
    ranks = [[[0, 1], [1, 0], [0, 2], [2, 1]], [[0, 1], [0, 1], [1, 0], [1, 2]]]  # 2 and 1 right; 3 and 2
    found = [
        Prediction(np.array(each), {"strength": number}, {"4": np.array(each)})
        for number, each in enumerate(ranks)
    ]
    numbers = summary(found, labels)
    assert numbers == {
        "top1": 0.375, "low": 0.25, "high": 0.5, "top5": 0.625,
        "error": pytest.approx(math.sqrt(0.375 * 0.625 / 4)),
        "chosen": [{"strength": 0}, {"strength": 1}], "by_layer": {"4": 0.375},
    }  # fmt: skip
    assert by_class(found, labels, 4) == [0.5, 0.5, 0.0, None]
    assert right(found[0].ranks, labels, 2).tolist() == [True, True, True, False]


def test_what_can_be_read_of_colours(run, model, tmp_path):
    result = run({"student": model}, classifiers=["ridge", "nearest", "linear", "attentive"], epochs=3)
    assert (result["train"], result["validation"], result["classes"]) == (60, 21, 3)
    rows = result["models"]
    assert list(rows) == ["student", "random", "tokens", "pixels", "codebook"]
    assert set(rows["student"]) == {"ridge", "nearest", "linear", "attentive"}
    assert set(rows["pixels"]) == {"ridge", "nearest", "linear"}
    for kind in ("ridge", "nearest", "linear"):
        assert rows["pixels"][kind]["top1"] > 0.9
        assert rows["pixels"][kind]["low"] <= rows["pixels"][kind]["top1"] <= rows["pixels"][kind]["high"]
    assert rows["pixels"]["ridge"]["top5"] == 1  # of three classes
    assert set(rows["student"]["ridge"]["by_layer"]) == {"1", "2"}
    assert len(rows["student"]["ridge"]["chosen"]) == 2
    written = json.loads((tmp_path / "metrics.json").read_text())
    for name, kinds in rows.items():
        for kind, numbers in kinds.items():
            whole = written["models"][name][kind]
            assert {key: whole[key] for key in numbers} == numbers
            assert list(whole["by_class"]) == ["blue", "green", "red"]
            assert np.mean(list(whole["by_class"].values())) == pytest.approx(numbers["top1"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("ridge/pixels")[0].value == pytest.approx(rows["pixels"]["ridge"]["top1"])
    points = events.Scalars("ridge_by_layer/student")
    assert [(p.step, p.value) for p in points] == [
        (int(layer), pytest.approx(top1)) for layer, top1 in rows["student"]["ridge"]["by_layer"].items()
    ]


def test_a_second_probe_reads_the_features_that_are_there(run, model, tmp_path):
    first = run({"student": model})
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("0*.npy")}
    assert len(stamps) == 2 * 6  # student, random, tokens, pixels, codebook, and the codes
    assert run({"student": model}) == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_random_weights_are_of_the_seed(run, model, tmp_path, colours, tokenizer):
    config = ProbeConfig(train=f"{colours}/train", validation=f"{colours}/val", seeds=1, controls=["random"])
    both = [
        probe({"student": model}, tokenizer, config, tmp_path, features=tmp_path / "f", seed=seed)["models"]
        for seed in (3, 3, 4)
    ]
    assert both[0] == both[1]
    # the student was drawn from seed 3, and by the same scheme
    assert both[0]["random"] == both[0]["student"]
    drawn = llama.initialise(llama.load_config(model), seed=4)
    assert not torch.equal(drawn.model.embed_tokens.weight, llama.load(model).model.embed_tokens.weight)


# --- what it refuses


def test_a_model_that_does_not_fit(run, tmp_path):
    llama.save(llama.build("micro", 8, 16), tmp_path / "few")
    with pytest.raises(UserError, match=r"^probe: few: num_codes: 16, the model has 8 ids$"):
        run({"few": tmp_path / "few"})
    llama.save(llama.build("micro", 258, 16), tmp_path / "many", num_codes=256)
    with pytest.raises(
        UserError, match=r"^probe: many: was trained on 256 codes, the tokenizer has 16 codes$"
    ):
        run({"many": tmp_path / "many"})
    llama.save(llama.build("micro", 258, 16), tmp_path / "unsaid")
    with pytest.raises(
        UserError, match=r"^probe: unsaid: has a vocabulary of 258, the tokenizer has 16 codes$"
    ):
        run({"unsaid": tmp_path / "unsaid"})
    llama.save(llama.build("micro", 16, 16), tmp_path / "shallow")
    with pytest.raises(UserError, match=r"^probe: shallow: layers: 9, the model has 1 to 2$"):
        run({"shallow": tmp_path / "shallow"}, layers=[9])


def test_a_broken_picture(run, model, tmp_path, tokenizer):
    write_colours(tmp_path / "own", 4)
    (tmp_path / "own" / "red" / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        run({"student": model}, train=str(tmp_path / "own"))
    assert str(caught.value) == f"{tmp_path}/own/red/2.png: unreadable picture (not a picture)"
