"""Fine-tuning as a whole: learning rates by layer, what is learnt, after a stop, its stage of a run."""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import finetune, fit, llama
from delvm.errors import STOPPED, USAGE_ERROR, UserError
from delvm.evaluate import runs
from delvm.evaluate.features import Pictures
from delvm.finetune import arms
from delvm.finetune.classifier import Classifier, Form, Read
from delvm.finetune.training import Finetune, FinetuneConfig, branch_scales, layer_groups
from delvm.training import Interrupted, TrainerConfig
from tests.processes import together
from tests.test_probe import write_colours

pytestmark = pytest.mark.usefixtures("one_thread")
FORM = Form(("blue", "green", "red"), image_size=8, grid=2, num_codes=16)
PATCHES = Form(("blue", "green", "red"), image_size=8, grid=2, input="patches")
CPU = {"accelerator": "cpu", "log_every": 2, "checkpoint_every": 100}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that are colours, with noise; 8 px."""
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 10)
    write_colours(root / "val", 4)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A micro model of the tokenizer's 16 codes."""
    folder = tmp_path_factory.mktemp("model")
    llama.save(llama.build("micro", 18, 16, bos=16, eos=17, seed=3), folder)
    return folder


def config(colours, **settings):
    given = {"train": f"{colours}/train", "validation": f"{colours}/val", "epochs": 2, "batch_size": 6,
             "learning_rate": 3e-3}  # fmt: skip
    return FinetuneConfig(**(given | settings))


def tune(colours, model, tokenizer, out, trainer=None, **settings):
    out.mkdir(exist_ok=True)
    return arms.finetune(
        {"student": model}, None if settings.get("input") == "patches" else tokenizer,
        config(colours, **settings), out, trainer=TrainerConfig(**(CPU | (trainer or {}))),
        tensorboard=out / "tensorboard",
    )  # fmt: skip


def weights(out, name="student"):
    return load_file(out / name / "model.safetensors")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- learning rates and masks by hand


@pytest.mark.parametrize("form", [FORM, PATCHES], ids=["tokens", "patches"])
def test_learning_rates_by_layer(form):
    made = Classifier.of(llama.build("micro", 18, 16, bos=16, seed=3), form, seed=0)
    groups = layer_groups(made, rate=0.5, weight_decay=0.1, layer_decay=0.5)
    of = {id(weight): group for group in groups for weight in group["params"]}
    found = {name: (of[id(w)]["lr"], of[id(w)]["weight_decay"]) for name, w in made.named_parameters()}
    assert groups[0]["lr"] == 0.5
    rates = {  # two layers: the head, layer 2 and the norm, layer 1, what is below
        "head.weight": (0.5, 0.1), "head.bias": (0.5, 0), "query": (0.5, 0), "begin": (0.0625, 0),
        "blocks.norm.weight": (0.25, 0),
        "blocks.layers.1.self_attn.q_proj.weight": (0.25, 0.1),
        "blocks.layers.1.mlp.up_proj.weight": (0.25, 0.1),
        "blocks.layers.1.input_layernorm.weight": (0.25, 0),
        "blocks.layers.0.self_attn.o_proj.weight": (0.125, 0.1),
        "blocks.layers.0.post_attention_layernorm.weight": (0.125, 0),
    }  # fmt: skip
    # a patch embedding is as new as the head, codes' vectors are the model's
    rates |= {"stem.weight": (0.0625, 0)} if form is FORM else {"stem.proj.weight": (0.5, 0.1)}
    assert {name: found[name] for name in rates} == rates
    even = layer_groups(made, rate=0.5, weight_decay=0.1, layer_decay=1.0)
    assert {group["lr"] for group in even} == {0.5}


def test_the_optimizer_has_these_rates(colours):
    made = Classifier.of(llama.build("micro", 18, 16, bos=16, seed=3), PATCHES, seed=0)
    settings = config(colours, learning_rate=0.5, random_learning_rate=0.25, layer_decay=0.5, warmup=0.5)

    def rates(start):
        module = Finetune(made, Read(PATCHES, None), settings, steps=10, start=start)
        groups = module.configure_optimizers()["optimizer"].param_groups
        return {round(group["lr"] / 0.2, 6) for group in groups}  # the first of five steps up

    assert rates("pretrained") == {0.5, 0.25, 0.125, 0.0625}
    assert rates("random") == {0.25}  # its lower layers have all to learn


def test_later_places_fade(colours):
    module = Finetune(Classifier.of(llama.build("micro", 18, 16, seed=3), _no_bos(), seed=0),
                      Read(PATCHES, None), config(colours, anneal=0.4), steps=10)  # fmt: skip
    assert [module.future(step) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    module.config.anneal = 0.0
    assert module.future(0) == 0


def _no_bos():
    return Form(PATCHES.classes, 8, 2, input="patches", begins=False)


def test_branches_are_left_out_more_often_above():
    draws = torch.tensor([[0.0, 0.0, 0.1, 0.3, 0.1, 0.7]])  # three layers: chances 0, 0.25, 0.5
    expected = torch.tensor([[1, 1, 0, 4 / 3, 0, 2]])
    torch.testing.assert_close(branch_scales(draws, 0.5), expected)
    assert branch_scales(draws, 0.0) is None


def test_steps_are_whole_epochs(colours):
    assert config(colours, epochs=2, batch_size=6).steps(30) == 10
    assert config(colours, epochs=2, batch_size=7).steps(30) == 9  # the last begins another epoch


# --- what is learnt


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"mask": "bidirectional", "readout": "mean"},
        {"anneal": 0.5, "drop_path": 0.1, "averaging": 0.9},
    ],
    ids=["causal", "bidirectional", "annealed"],
)
def test_classes_that_are_easy_are_learnt(colours, model, tmp_path, how):
    how |= {"input": "patches", "image_size": 8, "patch_size": 4}
    result = tune(colours, model, None, tmp_path, epochs=10, **how)
    assert (result["train"], result["validation"], result["classes"]) == (30, 12, 3)
    assert list(result["models"]) == ["student", "random"]
    listing = arms.list_splits(config(colours))["train"]
    seen = torch.stack([Pictures(listing, 8, mirrored=False)[place][0] for place in range(30)])
    for name in ("student", "random"):
        predictor = finetune.load(tmp_path / name)
        assert (predictor(seen).argmax(1).numpy() == listing.labels).all()
    assert result["models"]["student"]["top1"] >= 0.75
    assert result["models"]["student"]["top5"] == 1  # of three classes


def test_numbers_and_their_errors(colours, model, tokenizer, tmp_path):
    result = tune(colours, model, tokenizer, tmp_path, starts=["pretrained"])
    found = result["models"]["student"]
    labels = arms.list_splits(config(colours))["validation"]
    seen = torch.stack([Pictures(labels, 8, mirrored=False)[place][0] for place in range(12)])
    right = finetune.load(tmp_path / "student")(seen).argmax(1).numpy() == labels.labels
    share = right.mean()
    assert found["top1"] == pytest.approx(share)
    assert found["top1_error"] == pytest.approx(math.sqrt(share * (1 - share) / 12))
    assert (found["top5"], found["top5_error"]) == (1, 0)
    written = json.loads((tmp_path / "metrics.json").read_text())["models"]["student"]
    expected = {name: right[labels.labels == place].mean() for place, name in enumerate(labels.classes)}
    assert written["by_class"] == pytest.approx(expected)
    assert {key: written[key] for key in found} == found
    state = weights(tmp_path)
    assert found["parameters"] == sum(weight.numel() for weight in state.values())
    curve = json.loads((tmp_path / "student" / "curve.json").read_text())
    assert [point["step"] for point in curve] == [2, 4, 6, 8, 10]
    assert {"step", "loss", "accuracy"} == set(curve[0])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune")).Reload()
    assert events.Scalars("top1/student")[0].value == pytest.approx(share)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune-student")).Reload()
    assert [point.step for point in events.Scalars("loss")] == [2, 4, 6, 8, 10]
    assert events.Scalars("optimizer/gradient_norm")[0].value > 0


def test_a_random_start_is_another(colours, model, tokenizer):
    form = arms.form_of(config(colours), tokenizer, FORM.classes)
    pretrained, again, drawn = (
        arms.start_weights(arms.Arm("x", model, start), form, seed=0)
        for start in ("pretrained", "pretrained", "random")
    )
    first = {name: weight for name, weight in pretrained.state_dict().items() if not name.startswith("head")}
    assert equal(pretrained.state_dict(), again.state_dict())
    given = llama.load(model).model
    assert torch.equal(pretrained.stem.weight, given.embed_tokens.weight[:16])
    assert torch.equal(pretrained.begin, given.embed_tokens.weight[16])
    matrices = [name for name, weight in first.items() if weight.ndim == 2]
    assert all(not torch.equal(first[name], drawn.state_dict()[name]) for name in matrices)
    shapes = [
        {name: weight.shape for name, weight in made.state_dict().items()} for made in (pretrained, drawn)
    ]
    assert shapes[0] == shapes[1]


def test_rows_of_the_table():
    models = {"teacher": Path("a"), "student": Path("b")}
    rows = [(arm.name, arm.folder, arm.start) for arm in arms.list_arms(models, ["pretrained", "random"])]
    assert rows == [
        ("teacher", Path("a"), "pretrained"), ("student", Path("b"), "pretrained"),
        ("random", Path("b"), "random"),
    ]  # fmt: skip
    assert [arm.name for arm in arms.list_arms(models, ["random"])] == ["random"]


# --- stopped, shared


class _Stop:
    """A data set's reader that stops the process once, as Ctrl-C does."""

    def __init__(self, monkeypatch, at, number=signal.SIGINT):
        self.left, read = at, arms.Views.__getitem__

        def reading(views, index):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)
            return read(views, index)

        monkeypatch.setattr(arms.Views, "__getitem__", reading)


@pytest.mark.parametrize("at", [20, 75], ids=["first", "second"])
def test_a_stopped_training_goes_on_to_the_same_result(colours, model, tokenizer, tmp_path, monkeypatch, at):
    how = {"views": finetune_views(), "drop_path": 0.2, "averaging": 0.9, "anneal": 0.5}
    whole = tune(colours, model, tokenizer, tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        _Stop(patch, at)
        with pytest.raises(Interrupted):
            tune(colours, model, tokenizer, tmp_path / "parts", **how)
    done = at > 60  # the student's ten steps of six
    assert (tmp_path / "parts" / "student" / "metrics.json").is_file() == done
    assert not (tmp_path / "parts" / "metrics.json").exists()
    stamp = done and (tmp_path / "parts" / "student" / "model.safetensors").stat().st_mtime_ns
    assert tune(colours, model, tokenizer, tmp_path / "parts", **how) == whole
    for name in ("student", "random"):
        assert equal(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
        curves = [
            json.loads((tmp_path / part / name / "curve.json").read_text()) for part in ("whole", "parts")
        ]
        assert curves[0] == curves[1]
        assert not (tmp_path / "parts" / name / "last.ckpt").exists()
    if done:
        assert (tmp_path / "parts" / "student" / "model.safetensors").stat().st_mtime_ns == stamp


def finetune_views():
    from delvm.finetune.views import ViewsConfig

    return ViewsConfig(mixup=0.8, cutmix=1.0, augment="rand-m9-mstd0.5-inc1", erasing=0.2)


def test_processes_and_micro_batches_share_a_step(colours, model, tokenizer, tmp_path):
    how = {"views": finetune_views(), "batch_size": 8, "starts": ["pretrained"], "drop_path": 0.2}
    tune(colours, model, tokenizer, tmp_path / "one", **how)
    alone = weights(tmp_path / "one")

    def work():
        return tune(colours, model, tokenizer, tmp_path / "two", {"accumulate": 2}, **how)

    results = together(work)
    assert results[0] == results[1]
    assert results[0]["models"]["student"]["parameters"] > 0
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, alone[name], atol=1e-4, rtol=0)


def test_in_bfloat16_compiled_and_recomputed(colours, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("delvm.training.COMPILE_BACKEND", "eager")
    how = {"starts": ["pretrained"], "drop_path": 0.2, "anneal": 0.5, "epochs": 1}
    expected = tune(colours, model, tokenizer, tmp_path / "plain", **how)
    tune(colours, model, tokenizer, tmp_path / "lean", {"checkpointing": True, "compile": True}, **how)
    for name, weight in weights(tmp_path / "lean").items():
        torch.testing.assert_close(weight, weights(tmp_path / "plain")[name], atol=1e-4, rtol=0)
    mixed = tune(colours, model, tokenizer, tmp_path / "bf16", {"precision": "bf16-mixed"}, **how)
    assert mixed["models"]["student"].keys() == expected["models"]["student"].keys()
    assert {weight.dtype for weight in weights(tmp_path / "bf16").values()} == {torch.float32}
    assert not equal(weights(tmp_path / "bf16"), weights(tmp_path / "plain"))


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ""}, "train: missing, give a folder with one folder of pictures a class"),
        ({"validation": "a"}, "validation: 'a' is train; it must hold other pictures"),
        ({"input": "pixels"}, "input: 'pixels' is unknown; choices: tokens, patches"),
        ({"mask": "none"}, "mask: 'none' is unknown; choices: causal, bidirectional"),
        ({"readout": "first"}, "readout: 'first' is unknown; choices: class, last, mean"),
        ({"starts": ["warm"]}, "starts: 'warm' is unknown; choices: pretrained, random"),
        ({"starts": []}, "starts: [] must be one or both of pretrained, random"),
        ({"epochs": 0}, "epochs: 0 must be at least 1"),
        (
            {"input": "patches", "image_size": 10, "patch_size": 4},
            "image_size: 10 must be a multiple of patch_size, 4",
        ),
        ({"anneal": 1.5}, "anneal: 1.5 must lie in 0..1"),
        (
            {"anneal": 0.5, "mask": "bidirectional"},
            "anneal: 0.5 fades into the causal mask, but mask is bidirectional",
        ),
        ({"layer_decay": 0.0}, "layer_decay: 0.0 must be above 0"),
        ({"drop_path": 1.0}, "drop_path: 1.0 must lie in 0..1, 1 excluded"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 must be above 0 and finite"),
        ({"random_learning_rate": -1.0}, "random_learning_rate: -1.0 must be at least 0 and finite"),
        (
            {"models": {"random": "x"}},
            "models.random: a name may hold letters, digits, '_' and '-', and not be random",
        ),
    ],
)
def test_an_impossible_setting(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FinetuneConfig(**{"train": "a", "validation": "b", **settings})


def test_a_model_that_reads_fewer_codes(colours, tokenizer, tmp_path):
    llama.save(llama.build("micro", 8, 16, seed=3), tmp_path / "model")
    with pytest.raises(UserError, match=r"^finetune: student: num_codes: 16, the model has 8 ids$"):
        tune(colours, tmp_path / "model", tokenizer, tmp_path / "out")


def test_a_model_of_another_tokenizer(colours, tokenizer, tmp_path):
    llama.save(llama.build("micro", 258, 16, seed=3), tmp_path / "model", num_codes=256)
    message = r"^finetune: student: was trained on 256 codes, the tokenizer has 16 codes$"
    with pytest.raises(UserError, match=message):
        tune(colours, tmp_path / "model", tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=message.replace("student", "random")):
        tune(colours, tmp_path / "model", tokenizer, tmp_path / "out", starts=["random"])
    patches = {"input": "patches", "image_size": 8, "patch_size": 4, "epochs": 1}  # it reads no codes then
    assert tune(colours, tmp_path / "model", tokenizer, tmp_path / "patches", **patches)["models"]


# --- its stage of a run


@pytest.fixture
def recipe(colours, model, tokenizer, tmp_path):
    """The shipped recipe, with overrides that make it one of seconds."""
    tokenizer.save(tmp_path / "tokenizer")
    given = [f"finetune.train={colours}/train", f"finetune.validation={colours}/val",
             f"finetune.models.student={model}", f"tokenizer.folder={tmp_path / 'tokenizer'}",
             "finetune.epochs=1", "finetune.batch_size=6", "trainer.num_workers=0", "trainer.accelerator=cpu",
             "trainer.accumulate=1",
             f"run_dir={tmp_path / 'run'}"]  # fmt: skip

    def call(*more, **how):
        return fit.run(ROOT / "recipes" / "finetune_imagenet.yaml", [*given, *more], **how)

    return call


TOKENS = ["finetune.input=tokens"]
SQUARES = ["finetune.input=patches", "finetune.image_size=8", "finetune.patch_size=4"]


@pytest.mark.parametrize("input", [TOKENS, SQUARES], ids=["tokens", "patches"])
def test_the_recipe_for_imagenet_tunes_on_any_classes(recipe, tmp_path, capfd, input):
    assert recipe(*input, dry_run=True) == 0
    said = capfd.readouterr().out
    counts = "30 training, 12 held-out pictures of 3 classes"
    assert f"finetune: {counts}; student, random, 5 steps of 6 pictures each" in said
    assert "finetune: to do" in said
    assert not (tmp_path / "run").exists()
    assert recipe(*input) == 0
    said = capfd.readouterr().out
    assert "fine-tuned: 12 held-out pictures of 3 classes" in said
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "finetune", "metrics.json", "report.html", "tensorboard"}
    assert {path.name for path in (run / "finetune").iterdir()} == {
        "student", "random", "metrics.json", "stage.json",
    }  # fmt: skip
    top1 = json.loads((run / "metrics.json").read_text())["finetune"]["models"]["student"]["top1"]
    shown = runs.report(run).tables["finetune"]
    assert shown["models"]["student"]["top1"] == top1
    assert "finetune" in (run / "report.html").read_text()
    logits = finetune.load(run / "finetune" / "random")(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert logits.shape == (2, 3)
    assert recipe(*input) == 0
    assert "finetune: unchanged, reused" in capfd.readouterr().out
    assert recipe(*input, "finetune.readout=mean") == 0
    assert "finetune: done in" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("finetune.train=none", "finetune.train: no folder 'none'"),
        ("finetune.models.student=none", "finetune.models.student: none: no such folder"),
        ("finetune.models.student=many", "finetune.models.student: was trained on 256 codes, the tokenizer"
                                         " has 16 codes"),
        ("finetune.batch_size=5", "finetune.batch_size: 5 must divide by 2 * processes * trainer.accumulate"
                                  " = 2: pictures are mixed in pairs; or finetune.views.mixing=0"),
        ("finetune.mask=free", "finetune.mask: 'free' is unknown; choices: causal, bidirectional"),
        ("finetune.roles=[student]", "finetune.roles: 'student' is no model of the run; choices: none, the"
                                     " recipe trains no model"),
        ("finetune.models=null", "finetune.models"),
        ("tokenizer.folder=''", "tokenizer.folder: missing, there are no tasks to train a tokenizer on"),
        ("finetune.views.augment=x", "finetune.views.augment: 'x' is no RandAugment of timm, such as"
                                     " rand-m9-mstd0.5-inc1"),
    ],
)  # fmt: skip
def test_what_cannot_be_ends_in_one_line(recipe, tmp_path, capfd, override, line):
    llama.save(llama.build("micro", 258, 16, seed=3), tmp_path / "many", num_codes=256)
    override = override.replace("many", str(tmp_path / "many"))
    assert recipe("finetune.input=tokens", override) == USAGE_ERROR
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert line in said[0]
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_goes_on(recipe, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        _Stop(patch, 10, signal.SIGTERM)
        assert recipe(*SQUARES) == STOPPED
    assert not (tmp_path / "run" / "finetune").exists()
    assert (tmp_path / "run" / ".finetune.partial" / "student" / "last.ckpt").is_file()
    assert recipe(*SQUARES) == 0
    tuned = json.loads((tmp_path / "run" / "metrics.json").read_text())["finetune"]["models"]
    assert list(tuned) == ["student", "random"]
