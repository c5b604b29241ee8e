"""A classifier that an earlier fine-tuning has left: what of it goes on, at which size, what is refused."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from delvm import finetune, fit, llama
from delvm.errors import STOPPED, USAGE_ERROR, UserError
from delvm.finetune import arms
from delvm.finetune.classifier import Classifier, Form, Predictor, load_form
from delvm.finetune.earlier import check_earlier, classifier_hash, go_on, is_classifier
from delvm.finetune.training import FinetuneConfig, layer_groups
from delvm.tokenizer import Tokenizer
from delvm.training import TrainerConfig
from tests.test_probe import write_colours

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
CLASSES = ("blue", "green", "red")
PATCHES = Form(CLASSES, image_size=8, grid=2, input="patches")
CODES = Form(CLASSES, image_size=8, grid=2, num_codes=16)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that are colours, with noise; 8 px."""
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 10)
    write_colours(root / "val", 4)
    return root


def settings(colours, **more):
    """Of a training that goes on, of patches of 4 px."""
    given = {"train": f"{colours}/train", "validation": f"{colours}/val", "epochs": 2, "batch_size": 6,
             "learning_rate": 3e-3, "input": "patches", "image_size": 8, "patch_size": 4,
             "starts": ["pretrained"]}  # fmt: skip
    return FinetuneConfig(**(given | more))


def tune(colours, models, out, tokenizer=None, **more):
    out.mkdir(parents=True, exist_ok=True)
    trainer = TrainerConfig(accelerator="cpu", log_every=1, checkpoint_every=3)
    return arms.finetune(
        models, tokenizer, settings(colours, **more), out, trainer=trainer, tensorboard=out / "tensorboard"
    )


@pytest.fixture(scope="module")
def first(colours, tmp_path_factory):
    """Folders of an earlier run over patches, of 8 px: `model`, `student` and `random`."""
    root = tmp_path_factory.mktemp("first")
    llama.save(llama.build("micro", 18, 8, bos=16, eos=17, seed=3), root / "model")
    both = ["pretrained", "random"]
    tune(colours, {"student": root / "model"}, root, epochs=4, averaging=0.5, starts=both)
    return root


@pytest.fixture(scope="module")
def first_of_codes(tokenizer, tmp_path_factory):
    """A classifier of codes that was not trained, with a head that says something."""
    folder = tmp_path_factory.mktemp("codes")
    made = Classifier.of(llama.build("micro", 18, 8, bos=16, eos=17, seed=3), CODES, seed=0)
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    Predictor(made, tokenizer).save(folder)
    return folder


def pixels(size, number=4):
    drawn = torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0))
    return drawn * 2 - 1


# --- what goes on


def test_at_the_same_size_it_is_the_same_classifier(first):
    form = load_form(first / "student")
    assert form == PATCHES
    going = go_on(first / "student", form)
    assert going.training
    before = finetune.load(first / "student").classifier
    with torch.no_grad():
        logits = before(pixels(8))
        assert torch.equal(going.eval()(pixels(8)), logits)
    assert logits.unique(dim=0).shape[0] == 4


def test_at_twice_the_size_weights_are_equal_and_places_are_four_times_as_many(first):
    before = finetune.load(first / "student").classifier
    # the model was made for 8 tokens; 16 patches, BOS and the class's place are 18
    assert (before.form.places, before.config.max_position_embeddings) == (6, 8)
    going = go_on(first / "student", replace(PATCHES, image_size=16, grid=4)).eval()
    assert (going.form.places, going.form.patch_size) == (18, 4)
    assert going.config.max_position_embeddings == 18
    weights = going.state_dict()
    assert weights.keys() == before.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in before.state_dict().items())
    seen = []
    going.blocks.register_forward_hook(lambda *hook: seen.append(hook[2].last_hidden_state.shape))
    with torch.no_grad():
        assert going(pixels(16)).shape == (4, 3)
    assert seen == [(4, 18, 32)]


def test_the_first_places_of_a_larger_picture_are_what_they_were(first):
    # one patch more a row changes what stands behind the first row alone: causal, and positions from 0 on
    small = go_on(first / "student", PATCHES).eval()
    large = go_on(first / "student", replace(PATCHES, image_size=12, grid=3)).eval()
    seen = []
    for made in (small, large):
        made.blocks.register_forward_hook(lambda *hook: seen.append(hook[2].last_hidden_state))
    picture = pixels(12, 1)
    with torch.no_grad():
        small(picture[..., :8, :8])
        large(picture)
    torch.testing.assert_close(seen[0][:, :3], seen[1][:, :3])  # BOS, two patches of the first row
    assert not torch.allclose(seen[0][:, 3], seen[1][:, 3], atol=1e-3)


@pytest.mark.parametrize("folder", ["student", "random"])
def test_a_step_at_twice_the_size_lowers_the_loss(first, folder):
    going = go_on(first / folder, replace(PATCHES, image_size=16, grid=4))
    seen, labels = pixels(16, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(going.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(going(seen), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_nothing_but_the_head_is_new(first):
    going = go_on(first / "student", PATCHES)
    groups = layer_groups(going, rate=0.5, weight_decay=0.1, layer_decay=0.5)
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    found = {name: rates[id(weight)] for name, weight in going.named_parameters()}
    lowest = {name for name, rate in found.items() if rate == 0.0625}
    assert lowest == {"begin", "query", "stem.proj.weight", "stem.proj.bias"}
    assert {name for name, rate in found.items() if rate == 0.5} == {"head.weight", "head.bias"}


def test_a_training_goes_on_at_another_size(colours, first, tmp_path):
    models = {"student": first / "student", "from_random": first / "random"}
    result = tune(colours, models, tmp_path, image_size=16, epochs=4)
    assert list(result["models"]) == ["student", "from_random"]
    for name in models:
        assert load_form(tmp_path / name) == replace(PATCHES, image_size=16, grid=4)
        curve = json.loads((tmp_path / name / "curve.json").read_text())
        # at the start it tells colours apart already: a new head has log(3) = 1.0986
        assert curve[0]["loss"] < 1.0
        assert sum(point["loss"] for point in curve[-5:]) < sum(point["loss"] for point in curve[:5])
        assert result["models"][name]["top1"] >= 0.75
    before, after = (load_file(root / "student" / "model.safetensors") for root in (first, tmp_path))
    assert {name: weight.shape for name, weight in before.items()} == {
        name: weight.shape for name, weight in after.items()
    }
    assert not torch.equal(before["query"], after["query"])


def test_it_stands_beside_a_model_that_becomes_a_classifier(colours, first, tmp_path):
    models = {"new": first / "model", "student": first / "student"}
    tune(colours, models, tmp_path, epochs=1)
    losses = {name: json.loads((tmp_path / name / "curve.json").read_text())[0]["loss"] for name in models}
    assert losses["new"] == pytest.approx(1.0986, abs=1e-3)  # its head is zero, log(3)
    assert losses["student"] < 1.0


# --- codes


def test_codes_of_larger_pictures_by_a_tokenizer_of_the_same_codebook(
    colours, first_of_codes, tokenizer, tmp_path
):
    larger = Tokenizer(tokenizer.vqgan, tokenizer.patch, 16, tokenizer.pixel_range, tokenizer.unit_codes)
    more = {"input": "tokens", "epochs": 1}
    forms = check_earlier({"student": first_of_codes}, larger, settings(colours, **more), CLASSES)
    assert forms == {"student": CODES}
    result = tune(colours, {"student": first_of_codes}, tmp_path, larger, **more)
    assert result["models"]["student"]["parameters"] > 0
    after = finetune.load(tmp_path / "student")
    assert after.classifier.form == replace(CODES, image_size=16, grid=4)
    assert after.tokenizer.image_size == 16  # the recipe's image_size, 8, is of patches alone


def test_other_codes_are_refused(colours, first_of_codes, tokenizer):
    other = Tokenizer.load(first_of_codes / "tokenizer")
    torch.nn.init.normal_(other.codebook, generator=torch.Generator().manual_seed(9))
    message = (
        f"tokenizer.folder: finetune.models.student reads the codes of '{first_of_codes / 'tokenizer'}';"
        " give that, or a tokenizer for larger pictures with the same codebook"
    )
    config = settings(colours, input="tokens")
    for given in (other, None):  # None: one that the run would train
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            check_earlier({"student": first_of_codes}, given, config, CLASSES)
    check_earlier({"student": first_of_codes}, tokenizer, config, CLASSES)


# --- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"input": "tokens"},
            "finetune.input: tokens, but WHO is a classifier whose input is patches, which stays; set"
            " finetune.input=patches",
        ),
        (
            {"mask": "bidirectional"},
            "finetune.mask: bidirectional, but WHO is a classifier whose mask is causal, which stays; set"
            " finetune.mask=causal",
        ),
        (
            {"readout": "mean"},
            "finetune.readout: mean, but WHO is a classifier whose readout is class, which stays; set"
            " finetune.readout=class",
        ),
        (
            {"patch_size": 2},
            "finetune.patch_size: 2, but WHO is a classifier whose patch_size is 4, which stays; set"
            " finetune.patch_size=4",
        ),
        (
            {"starts": ["pretrained", "random"]},
            "finetune.starts: random is no control of finetune.models.student, a classifier that goes on; set"
            " it to [pretrained], and add the random of the earlier run to finetune.models",
        ),
        (
            {"anneal": 0.1},
            "finetune.anneal: 0.1 fades into the causal mask, which finetune.models.student has learnt"
            " already; set it to 0",
        ),
    ],
)
def test_a_setting_that_contradicts_it(colours, first, more, message):
    message = message.replace("WHO", f"finetune.models.student, '{first / 'student'}',")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_earlier({"student": first / "student"}, None, settings(colours, **more), CLASSES)


@pytest.mark.parametrize(
    ("classes", "end"),
    [
        (("blue", "red"), "has 2 classes, WHO 3; they must be the same, and only one of them has 'green'"),
        (
            ("blue", "green", "rose"),
            "has 3 classes, WHO 3; they must be the same, and only one of them has 'red'",
        ),
        (("red", "green", "blue"), "has 3 classes, WHO 3; they must be the same, and their orders differ"),
    ],
)
def test_classes_must_be_the_same(colours, first, classes, end):
    who = f"finetune.models.student, '{first / 'student'}', is a classifier of"
    message = f"finetune.train: '{colours}/train' {end.replace('WHO', who)}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_earlier({"student": first / "student"}, None, settings(colours), classes)


def test_a_model_is_no_classifier(colours, first):
    assert not is_classifier(first / "model")
    assert not is_classifier(first / "nowhere")
    both = ["pretrained", "random"]
    assert check_earlier({"student": first / "model"}, None, settings(colours, starts=both), CLASSES) == {}


# --- its stage of a run


@pytest.fixture
def recipe(colours, first, tmp_path):
    """The shipped recipe at 16 px, from a copy of the classifier, with overrides for a run of seconds."""
    shutil.copytree(first / "student", tmp_path / "earlier")
    given = [f"finetune.train={colours}/train", f"finetune.validation={colours}/val",
             f"finetune.models.student={tmp_path / 'earlier'}",
             "finetune.patch_size=4", "finetune.image_size=16", "finetune.epochs=1",
             "finetune.batch_size=6", "trainer.num_workers=0", "trainer.accelerator=cpu",
             "trainer.accumulate=1", f"run_dir={tmp_path / 'run'}"]  # fmt: skip

    def call(*more, **how):
        return fit.run(ROOT / "recipes" / "finetune_imagenet_384.yaml", [*given, *more], **how)

    return call


def change(folder):
    state = load_file(folder / "model.safetensors")
    state["head.bias"] = state["head.bias"] + 1
    save_file(state, folder / "model.safetensors")


def test_other_weights_in_the_folder_train_it_anew(recipe, tmp_path, capfd):
    assert recipe(dry_run=True) == 0
    said = capfd.readouterr()
    assert said.err == ""
    goes_on = "student is a classifier of 8 px that goes on at 16 px: 18 places a picture, 6 before"
    assert f"finetune: {goes_on}" in said.out
    assert not (tmp_path / "run").exists()
    assert recipe() == 0
    assert "finetune: done in" in capfd.readouterr().out
    assert finetune.load(tmp_path / "run" / "finetune" / "student").classifier.form.image_size == 16
    assert recipe() == 0
    assert "finetune: unchanged, reused" in capfd.readouterr().out
    before = classifier_hash(tmp_path / "earlier")
    change(tmp_path / "earlier")
    assert classifier_hash(tmp_path / "earlier") != before
    assert recipe() == 0
    assert "finetune: done in" in capfd.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_classifier(recipe, tmp_path, monkeypatch):
    assert recipe(f"run_dir={tmp_path / 'whole'}") == 0
    left, read = 20, arms.Views.__getitem__

    def reading(views, index):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(views, index)

    with monkeypatch.context() as patch:
        patch.setattr(arms.Views, "__getitem__", reading)
        assert recipe() == STOPPED
    assert (tmp_path / "run" / ".finetune.partial" / "student" / "last.ckpt").is_file()
    assert recipe() == 0
    whole, parts = (
        load_file(tmp_path / run / "finetune" / "student" / "model.safetensors") for run in ("whole", "run")
    )
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["finetune.mask=bidirectional"], "finetune.mask: bidirectional, but finetune.models.student, '"),
        (["finetune.image_size=18"], "finetune.image_size: 18 must be a multiple of patch_size, 4"),
        (["finetune.starts=[random]"], "finetune.starts: random is no control of finetune.models.student"),
    ],
)
def test_what_cannot_be_ends_in_one_line(recipe, tmp_path, capfd, more, line):
    assert recipe(*more) == USAGE_ERROR
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert line in said[0]
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_itself(recipe, tmp_path, capfd):
    assert recipe() == 0
    capfd.readouterr()
    own = tmp_path / "run" / "finetune" / "student"
    assert recipe(f"finetune.models.student={own}") == USAGE_ERROR
    assert capfd.readouterr().err == (
        f"error: finetune.models.student: '{own}' lies in run_dir, whose stages replace each other; choose"
        " another run_dir\n"
    )


@pytest.mark.parametrize("damage", ["no weights", "no settings"])
def test_a_damaged_classifier_ends_in_one_line(recipe, tmp_path, capfd, damage):
    if damage == "no weights":
        (tmp_path / "earlier" / "model.safetensors").unlink()
        why = "holds no classifier, model.safetensors is missing"
    else:
        (tmp_path / "earlier" / "classifier.json").write_text("{")
        why = "no readable classifier: "
    assert recipe() == USAGE_ERROR
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"finetune.models.student: {tmp_path / 'earlier'}: {why}" in said[0]
    assert not (tmp_path / "run").exists()
