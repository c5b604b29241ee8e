"""The whole chain at micro size: what each stage leaves is what the next one and the user find."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from delvm import chain, finetune, fit, llama, plan, recipe, teach
from delvm.distill.on_policy import on_policy_step
from delvm.distill.slice import slice_embedding, slice_student
from delvm.evaluate import choice, likelihood
from delvm.given import ROLES, Given
from delvm.images import augment
from delvm.images.listing import Entries
from delvm.images.sources import held_out
from delvm.material import Material, open_samples
from delvm.stages import stage_key
from delvm.tokenizer import Tokenizer
from delvm.tokens import formats, sentences
from delvm.tokens.store import open_store
from tests.processes import launched
from tests.test_features import write_classes
from tools.check_run import check

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ["segmentation", "pose", "grey"]
STAGES = ["data", "tokenizer", "tokens", "teacher", "scratch", "student", "evaluate", "export"]


@pytest.fixture
def run(finished):
    return finished / "run"


@pytest.fixture
def metrics(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run in a folder of its own, free to be changed: (recipe file, run folder)."""
    shutil.copytree(finished / "run", tmp_path / "copy")
    return finished / "micro.yaml", tmp_path / "copy"


def opened(finished):
    """What the finished run was trained on."""
    return _opened(finished / "micro.yaml", finished / "run")


def _opened(recipe_file, run):
    return open_samples(Given(recipe.load(recipe_file, [f"run_dir={run}"])), run / "data", run)


def again(copy, *overrides, capsys):
    """Run once more; the stages that were made, not reused."""
    capsys.readouterr()
    assert fit.run(copy[0], [f"run_dir={copy[1]}", *overrides]) == 0
    said = capsys.readouterr().out
    stages = [*STAGES[:5], "cache", *STAGES[5:7], "questions", "probe", "finetune", *STAGES[7:]]
    made = [name for name in stages if f"{name}: done in" in said]
    reused = [name for name in stages if f"{name}: unchanged, reused" in said]
    assert not set(made) & set(reused)
    return made


def test_the_run_folder_holds_every_artifact(run):
    names = {path.name for path in run.iterdir()}
    assert names == {*STAGES, "recipe.yaml", "metrics.json", "report.html", "tensorboard"}
    for role in ROLES:
        held = {path.name for path in (run / role).iterdir()}
        assert {"config.json", "model.safetensors", "curve.json", "stage.json"} <= held
        assert "last.ckpt" not in held  # a finished stage needs none


def test_the_saved_recipe_is_the_one_that_ran(finished):
    given = recipe.load(finished / "micro.yaml", [f"run_dir={finished / 'run'}"])
    assert recipe.load(finished / "run" / "recipe.yaml") == given


def test_balance(metrics, run):
    stems = [str(number) for number in range(10) if not held_out(str(number), 0.4, 0)]
    assert [name for name, *_ in Entries(run / "data" / "grey.train")] == stems
    assert json.loads((run / "data" / "manifest.json").read_text())["grey"]["train"] == len(stems)
    # 2 pictures a pair, (16 / 4)**2 tokens a picture
    counts = {"segmentation": 12, "pose": 4, "grey": len(stems)}
    draws = {task: samples * round(12 / samples) for task, samples in counts.items()}
    for task, samples in counts.items():
        assert metrics["balance"][task] == {
            "samples": samples, "views": draws[task] // samples, "draws": draws[task],
            "tokens_before": 32 * samples, "tokens_after": 32 * draws[task],
            "target": pytest.approx(1 / 3), "share": pytest.approx(draws[task] / sum(draws.values())),
        }  # fmt: skip
    assert metrics["data"] == {task: {"skipped": 0, "dropped": 0} for task in TASKS}


def test_the_grids_are_the_codes_of_the_views(finished, run):
    material = opened(finished)
    tokenizer, store = Tokenizer.load(run / "tokenizer"), open_store(run / "tokens")
    assert store.manifest["tokenizer"] == tokenizer.hash
    for split in ("train", "validation"):
        for task, views in material.views(split).items():
            grid = store.grids[split][task]
            assert grid.shape == (len(views.samples), views.num_views, 2, 16)
            picture = views[len(views) - 1].permute(0, 3, 1, 2).float() / 255
            last = grid.gather(np.array(grid.shape[0] - 1), np.array(grid.shape[1] - 1))
            np.testing.assert_array_equal(last, tokenizer.encode(picture).numpy())


def test_scores_are_those_of_the_saved_models_on_held_out_sentences(metrics, run, finished):
    store, forms = open_store(run / "tokens"), opened(finished).plan.forms
    held = sentences.validation_sentences(store, forms, sentences.SentencesConfig(validation=5), 0)
    roles = {task: form.roles for task, form in forms.items()}
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(run / role)
        expected = likelihood.evaluate(model, held, roles)
        assert list(expected) == TASKS
        for task in TASKS:
            found = dict(metrics["evaluate"][role][task])
            assert set(found.pop("pictures")) == {"truth", "reconstruction", "ceiling"}
            after, places = found.pop("examples"), np.array(found.pop("places"))
            assert list(after) == ["0", "1"]
            losses = [entry["loss"] for entry in after.values()]
            assert np.mean(losses) == pytest.approx(expected[task]["annotation_loss"], rel=1e-5)
            assert places.shape == (4, 4)
            assert places.mean() == pytest.approx(expected[task]["annotation_loss"], rel=1e-5)
            assert found == pytest.approx(expected[task], rel=1e-5)
            assert set(expected[task]) >= {"loss", "accuracy", "perplexity", "annotation_loss"}


def test_scratch_and_student_differ_in_the_teacher_alone(run):
    curves = {role: json.loads((run / role / "curve.json").read_text()) for role in ROLES}
    assert [point["step"] for point in curves["student"]] == [2, 4, 6]
    assert [point["step"] for point in curves["teacher"]] == [2, 4, 6, 8]
    assert set(curves["student"][0]) == {"step", "loss", "ce", "kd"}
    assert set(curves["scratch"][0]) == {"step", "loss", "ce"}
    student, scratch = (load_file(run / role / "model.safetensors") for role in ("student", "scratch"))
    assert {n: t.shape for n, t in student.items()} == {n: t.shape for n, t in scratch.items()}
    assert not any(torch.equal(student[name], scratch[name]) for name in student)


def test_without_kd_scratch_and_student_are_one_model(copy, capsys):
    same = ["student.kd_weight=0", "scratch.learning_rate=1e-3", "scratch.warmup=0.05", "student.warmup=0.05"]
    assert again(copy, *same, capsys=capsys) == STAGES[4:]
    student, scratch = (load_file(copy[1] / role / "model.safetensors") for role in ("student", "scratch"))
    assert all(torch.equal(student[name], scratch[name]) for name in student)


def test_reordered_tasks_are_another_run(copy, tmp_path, capsys):
    config = OmegaConf.load(copy[0])
    config.tasks = {task: config.tasks[task] for task in reversed(TASKS)}
    other = tmp_path / "micro.yaml"
    OmegaConf.save(config, other)
    stop = ["student=null", "scratch=null", "teacher=null"]
    assert again((other, copy[1]), *stop, capsys=capsys) == STAGES[:3]


def test_every_training_logs_to_tensorboard(run):
    for stage, key in (("tokenizer", "psnr"), ("teacher", "ce"), ("scratch", "ce"), ("student", "kd")):
        events = EventAccumulator(str(run / "tensorboard" / stage)).Reload()
        curve = json.loads((run / stage / "curve.json").read_text())
        logged = [(scalar.step, scalar.value) for scalar in events.Scalars(key)]
        assert logged == [(point["step"], pytest.approx(point[key], rel=1e-5)) for point in curve]


def test_the_export_has_the_students_logits_and_the_tokenizer(run):
    tokens = torch.randint(16, (2, 40), generator=torch.Generator().manual_seed(0))
    student = llama.load(run / "student")
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, student(tokens).logits)
    assert Tokenizer.load(run / "export" / "tokenizer").hash == Tokenizer.load(run / "tokenizer").hash


def test_the_check_of_a_run_sees_what_is_missing(copy, tmp_path):
    def problem():
        try:
            check(copy[1])
        except (AssertionError, OSError) as error:
            return str(error)
        return ""

    # micro models learn too little: lend this copy the numbers of better ones
    file = copy[1] / "metrics.json"
    good = json.loads(file.read_text())
    good["tokenizer"]["codes_used"] = 15
    for scores in good["evaluate"]["student"].values():
        scores |= {"loss": 0.5, "perplexity": math.exp(0.5)}
    file.write_text(json.dumps(good))
    assert problem() == ""
    file.write_text(json.dumps(good | {"tokenizer": {"codes_used": 14, "psnr": 20.0}}))
    assert "14" in problem()
    worse = good["evaluate"] | {"student": good["evaluate"]["scratch"]}
    file.write_text(json.dumps(good | {"evaluate": worse}))
    assert problem() == "the distilled student is not below scratch"
    file.write_text(json.dumps(good))
    for gone in ("report.html", "student/model.safetensors", "tokens/manifest.json"):
        (copy[1] / gone).rename(tmp_path / "aside")
        assert problem()
        (tmp_path / "aside").rename(copy[1] / gone)
    assert problem() == ""


def test_a_second_run_reuses_everything(copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy[1].rglob("*.safetensors")}
    assert again(copy, capsys=capsys) == []
    assert {path: path.stat().st_mtime_ns for path in copy[1].rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("override", "made"),
    [
        ("prompting.pictures=1", ["evaluate", "export"]),
        ("student.init=delvm", ["scratch", "student", "evaluate", "export"]),
        ("student.embedding=codebook_start", ["scratch", "student", "evaluate", "export"]),
        ("sentences.validation=3", ["evaluate", "export"]),
        ("student.kd_weight=0.5", ["student", "evaluate", "export"]),
        ("scratch.learning_rate=0.003", ["scratch", "evaluate", "export"]),
        ("student.steps=5", ["scratch", "student", "evaluate", "export"]),
        ("teacher.steps=5", ["teacher", "student", "evaluate", "export"]),
        ("balance.max_views=1", STAGES[1:]),
        ("trainer.log_every=3", []),
    ],
)
def test_a_changed_section_makes_anew_what_it_touches(copy, capsys, override, made):
    assert again(copy, override, capsys=capsys) == made


def test_a_changed_picture_is_noticed(micro, pairs, capsys):
    run_dir = micro.parent / "run"
    small = ["student=null", "scratch=null", "teacher=null", "tokenizer.steps=1"]
    assert again((micro, run_dir), *small, capsys=capsys) == STAGES[:3]
    assert again((micro, run_dir), *small, capsys=capsys) == []
    source = pairs / "images" / "3.jpg"
    source.write_bytes((pairs / "images" / "4.jpg").read_bytes())
    assert again((micro, run_dir), *small, capsys=capsys) == STAGES[:3]


def test_the_tokenizer_never_sees_held_out_pictures(finished, tmp_path):
    hashes = set()
    for number in (3, 6):
        run_dir = tmp_path / str(number)
        overrides = [f"tasks.{task}.validation_samples={number}" for task in ("segmentation", "pose")]
        stop = ["student=null", "scratch=null", "teacher=null"]
        assert fit.run(finished / "micro.yaml", [f"run_dir={run_dir}", *overrides, *stop]) == 0
        hashes.add(Tokenizer.load(run_dir / "tokenizer").hash)
    assert hashes == {Tokenizer.load(finished / "run" / "tokenizer").hash}


def test_seeds_differ_and_repeat(finished, tmp_path):
    results = []
    for number, seed in enumerate((1, 1, 0)):
        run_dir = tmp_path / str(number)
        stop = ["student=null", "scratch=null", "sentences.validation=2"]
        assert fit.run(finished / "micro.yaml", [f"run_dir={run_dir}", f"seed={seed}", *stop]) == 0
        results.append(json.loads((run_dir / "metrics.json").read_text())["evaluate"])
    assert results[0] == results[1] != results[2]


def test_a_probe_reads_the_runs_models(copy, tmp_path, capsys):
    write_classes(tmp_path / "train", {"ant": 7, "bee": 7})
    write_classes(tmp_path / "val", {"bee": 3})
    asked = [f"probe.train={tmp_path / 'train'}", f"probe.validation={tmp_path / 'val'}", "probe.seeds=1"]
    asked.append("probe.readout=mean")  # few features: the ridge's time is the cube of their number
    assert again(copy, *asked, capsys=capsys) == ["probe"]
    said = json.loads((copy[1] / "metrics.json").read_text())["probe"]
    assert list(said["models"]) == [*ROLES, "random", "tokens", "pixels", "codebook"]
    assert (said["train"], said["validation"], said["classes"]) == (14, 3, 2)
    assert 0 <= said["models"]["student"]["ridge"]["top1"] <= 1
    shards = list((copy[1] / "features").rglob("0*.npy"))
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    assert again(copy, *asked, capsys=capsys) == []
    # another classifier reads what is there; another picture makes the features anew
    assert again(copy, *asked, "probe.classifiers=[nearest]", capsys=capsys) == ["probe"]
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "bee" / "0.png")
    assert again(copy, *asked, capsys=capsys) == ["probe"]
    assert [s.parent.name for s, t in zip(shards, stamps, strict=True) if s.stat().st_mtime_ns == t] == [
        shard.parent.name for shard in shards if shard.parent.name.endswith(".train")
    ]


def test_questions_are_asked_of_the_runs_models(copy, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)).save(tmp_path / f"{name}.png")
    item = {"context": ["a.png", "b.png"], "candidates": ["c.png", "d.png"]}
    items, examples = tmp_path / "items.jsonl", tmp_path / "lvm.jsonl"
    items.write_text("".join(json.dumps(item | {"answer": n}) + "\n" for n in (0, 1, 0)))
    formats.write_lvm(examples, [rng.integers(16, size=48), rng.integers(16, size=32)])
    asked = [f"prompting.choices={items}", f"prompting.lvm_jsonl={examples}"]
    before = json.loads((copy[1] / "evaluate" / "stage.json").read_text())["inputs"]
    assert not {"shots", "choices", "lvm_jsonl"} & set(before[1])  # as they were before there were such
    assert again(copy, *asked, capsys=capsys) == ["questions"]
    said = json.loads((copy[1] / "metrics.json").read_text())["questions"]
    assert list(said["choice"]) == list(said["lvm"]) == list(ROLES)
    tokenizer = Tokenizer.load(copy[1] / "tokenizer")
    for role in ROLES:
        model = llama.load(copy[1] / role)
        ask = partial(choice.candidate_losses, model, bos=model.config.bos_token_id)
        questions = choice.encode_items(choice.read_items(items), tokenizer)
        right = [int(loss.argmin()) == answer for loss, answer in zip(ask(questions), (0, 1, 0), strict=True)]
        assert said["choice"][role]["all"]["accuracy"] == pytest.approx(np.mean(right))
        losses = [loss.item() for loss in ask(choice.read_lvm_questions(examples, tokenizer))]
        assert said["lvm"][role]["perplexity"] == pytest.approx(np.exp(losses).mean())
    assert "questions" in (copy[1] / "report.html").read_text()
    assert again(copy, *asked, capsys=capsys) == []
    Image.new("RGB", (9, 9)).save(tmp_path / "d.png")
    assert again(copy, *asked, capsys=capsys) == ["questions"]
    long = item | {"context": ["a.png"] * 4, "answer": 0}
    items.write_text(json.dumps(long) + "\n")
    assert fit.run(copy[0], [f"run_dir={copy[1]}", *asked]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {items}, line 1: 81 tokens, the models here take 66"


def test_curves_over_more_examples_than_sentences_have(copy, capsys):
    assert again(copy, "prompting.shots=9", capsys=capsys) == ["evaluate", "export"]
    examples = json.loads((copy[1] / "metrics.json").read_text())["evaluate"]["student"]["segmentation"][
        "examples"
    ]
    assert list(examples) == ["0", "1"]  # no more fit into the model's positions
    # a given teacher that takes more
    wide = llama.build("micro", 18, 130, bos=16, eos=17, seed=0)
    llama.save(wide, copy[1].parent / "wide", num_codes=16)
    alone = ["student=null", "scratch=null", f"teacher.folder={copy[1].parent / 'wide'}"]
    assert again(copy, *alone, "prompting.shots=9", capsys=capsys) == ["teacher", "evaluate", "export"]
    examples = json.loads((copy[1] / "metrics.json").read_text())["evaluate"]["teacher"]["segmentation"][
        "examples"
    ]
    assert list(examples) == ["0", "1", "2", "3"]


def test_a_fine_tuning_takes_the_runs_student(copy, tmp_path, capsys):
    write_classes(tmp_path / "train", {"ant": 7, "bee": 7})
    write_classes(tmp_path / "val", {"bee": 3})
    asked = [f"finetune.train={tmp_path / 'train'}", f"finetune.validation={tmp_path / 'val'}"]
    asked += ["finetune.epochs=1", "finetune.batch_size=7"]
    assert again(copy, *asked, capsys=capsys) == ["finetune"]
    said = json.loads((copy[1] / "metrics.json").read_text())["finetune"]
    assert list(said["models"]) == ["student", "random"]
    assert (said["train"], said["validation"], said["classes"]) == (14, 3, 2)
    assert finetune.load(copy[1] / "finetune" / "student").tokenizer.hash == (
        Tokenizer.load(copy[1] / "tokenizer").hash
    )
    assert again(copy, *asked, capsys=capsys) == []
    assert again(copy, *asked, "finetune.roles=[scratch]", capsys=capsys) == ["finetune"]
    said = json.loads((copy[1] / "metrics.json").read_text())["finetune"]
    assert list(said["models"]) == ["scratch", "random"]
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "bee" / "0.png")
    assert again(copy, *asked, "finetune.roles=[scratch]", capsys=capsys) == ["finetune"]


def test_without_student_the_teacher_is_exported(finished, tmp_path):
    overrides = [f"run_dir={tmp_path / 'run'}", "student=null", "scratch=null", "teacher.steps=2"]
    assert fit.run(finished / "micro.yaml", overrides) == 0
    found = load_file(tmp_path / "run" / "export" / "model.safetensors")
    expected = load_file(tmp_path / "run" / "teacher" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "run" / "student").exists()


def test_what_is_asked_of_a_tokenizer_is_in_no_key(micro):
    """Nor has the default, of which a training made before is found again, its own."""

    def key(*overrides):
        run = chain.Run(recipe.load(micro, [f"run_dir={micro.parent / 'run'}", *overrides]))
        (stage,) = [stage for stage in run.stages() if stage.name == "tokenizer"]
        return stage_key(stage, {"data": ""}), stage, run.recipe

    default = ("tokenizer.min_psnr=18", "tokenizer.min_codes_used=0.5")
    found, stage, asked = key(*default)
    assert found == key("tokenizer.min_psnr=16", "tokenizer.min_codes_used=0.25")[0]
    assert found != key(*default, "tokenizer.steps=7")[0]
    assert found == stage_key(replace(stage, inputs=[asked.tokenizer, *stage.inputs[1:]]), {"data": ""})


def test_a_tokenizer_of_ones_own(finished, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(finished / "run" / "tokenizer", own)
    overrides = [f"run_dir={tmp_path / 'run'}", f"tokenizer.folder={own}", "tokenizer.min_psnr=0",
                 "tokenizer.min_codes_used=0", "student=null", "scratch=null", "teacher=null"]  # fmt: skip
    assert fit.run(finished / "micro.yaml", overrides) == 0
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").hash == Tokenizer.load(own).hash
    for task in TASKS:
        name = f"tokens/{task}.train/00000.npy"
        assert (tmp_path / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()
    # another tokenizer in its place is noticed
    tokenizer = Tokenizer.load(own)
    with torch.no_grad():
        tokenizer.codebook.mul_(0.9)
    tokenizer.save(own)
    assert again((finished / "micro.yaml", tmp_path / "run"), *overrides[1:], capsys=capsys) == STAGES[1:3]
    assert fit.run(finished / "micro.yaml", [*overrides, "data.image_size=32"]) == 2
    assert (
        capsys.readouterr().err == f"error: tokenizer.folder: '{own}' is for 16 px, data.image_size is 32\n"
    )


# --- tasks of every kind in one run ---

MIXED = """
data: {{image_size: 16}}
tasks:
  colour: {{images: {root}/photos, make: colour, validation_fraction: 0.4}}
  classes: {{source: classes, images: {root}/classes, validation_fraction: 0.4}}
  clips: {{source: video, images: {root}/clips, annotations: {root}/masks, frames: 3, stride: 1,
           nearest: true, validation_fraction: 0.5}}
  kinds: {{images: {root}/photos, annotations: {root}/grey, more_annotations: {{dark: {root}/dark}},
          validation_fraction: 0.4}}
tokenizer:
  {{num_codes: 16, code_dim: 4, channels: 32, steps: 2, batch_size: 12, min_codes_used: 0, min_psnr: 0}}
sentences:
  {{pairs: 2, validation: 3, kinds: {{classes: category}}, shots: {{classes: 4}}, per_class: 2, length: 80}}
teacher: {{size: micro, steps: 4, batch_size: 2, learning_rate: 1.0e-3}}
prompting: {{pictures: 1}}
trainer: {{accelerator: cpu}}
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Photographs, classes, clips with masks, two kinds of annotation: `mixed.yaml`, its finished `run`."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)

    def save(name, picture):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((24, 20), 0).save(root / name)

    for number in range(12):
        photo = rng.integers(256, size=(5, 6, 3)).astype(np.uint8)
        save(f"photos/{number}.png", photo)
        save(f"grey/{number}.png", photo.mean(axis=-1).astype(np.uint8))
        save(f"dark/{number}.png", photo // 3)
        save(f"classes/{'ab'[number % 2]}/{number}.png", 255 - photo)
        for frame in range(4):
            moved = rng.integers(256, size=(5, 6, 3)).astype(np.uint8)
            save(f"clips/{number}/{frame}.png", moved)
            save(f"masks/{number}/{frame}.png", (moved > 128).astype(np.uint8) * 255)
    (root / "mixed.yaml").write_text(MIXED.format(root=root))
    assert fit.run(root / "mixed.yaml", [f"run_dir={root / 'run'}"]) == 0
    return root


def test_tasks_of_every_kind_go_through_one_run(mixed):
    run = mixed / "run"
    found = _opened(mixed / "mixed.yaml", run).plan
    # 16 tokens a picture, BOS and EOS; 3 frames with a mask each; 2 samples of 3 pictures
    assert {task: (form.kind, form.length) for task, form in found.forms.items()} == {
        "colour": ("pairs", 66), "classes": ("category", 66), "clips": ("interleaved", 98),
        "kinds": ("annotations", 98),
    }  # fmt: skip
    assert found.length == 80
    metrics = json.loads((run / "metrics.json").read_text())
    scores = metrics["evaluate"]["teacher"]
    assert "annotation_loss" not in scores["classes"]
    assert all("annotation_loss" in scores[task] for task in ("colour", "clips", "kinds"))
    pictures = {path.name: sorted(p.stem[7:] for p in path.iterdir()) for path in
                (run / "evaluate" / "pictures").iterdir()}  # fmt: skip
    assert pictures["colour"] == sorted(["example", "annotation", "query", "truth", "teacher"])
    assert pictures["classes"] == sorted(["image"] * 3 + ["truth", "teacher"])
    assert pictures["clips"] == sorted(["example", "annotation"] * 2 + ["query", "truth", "teacher"])
    assert len(pictures["kinds"]) == 7
    assert llama.load(run / "teacher").config.max_position_embeddings == 98


def test_made_annotations_reach_the_grid(mixed):
    run = mixed / "run"
    tokenizer, store = Tokenizer.load(run / "tokenizer"), open_store(run / "tokens")
    name = Entries(run / "data" / "colour.validation")[0][0]
    picture = np.asarray(Image.open(mixed / "photos" / f"{name}.png"))
    # the photograph scaled and cut to its centre is the annotation of view 0
    (centre,) = augment.view([picture], (False,), policy="none", size=16, nearest=False, seed=(0,))
    codes = tokenizer.encode(torch.from_numpy(centre).permute(2, 0, 1)[None] / 255)
    zero = np.array(0)
    np.testing.assert_array_equal(store.grids["validation"]["colour"].gather(zero, zero)[1], codes[0])


def test_sentences_of_several_lengths_need_rows(mixed, capsys):
    assert fit.run(mixed / "mixed.yaml", ["sentences.length=0", f"run_dir={mixed / 'other'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: sentences.length: needed, the tasks' sentences differ in length:"
        " colour 66, classes 66, clips 98, kinds 98"
    )
    assert not (mixed / "other").exists()


def test_a_stopped_encoding_goes_on_from_its_whole_shards(mixed, tmp_path, capsys):
    shutil.copytree(mixed / "run", tmp_path / "run")
    tokens, partial = tmp_path / "run" / "tokens", tmp_path / "run" / ".tokens.partial"
    expected = {path.relative_to(tokens): path.read_bytes() for path in tokens.rglob("*.npy")}
    tokens.rename(partial)
    (partial / "manifest.json").unlink()
    (partial / "kinds.train" / "00000.npy").unlink()
    record = json.loads((partial / "stage.json").read_text())
    del record["metrics"]
    (partial / "stage.json").write_text(json.dumps(record))
    written = (partial / "colour.train" / "00000.npy").stat().st_mtime_ns
    assert fit.run(mixed / "mixed.yaml", [f"run_dir={tmp_path / 'run'}"]) == 0
    assert "teacher: unchanged, reused" in capsys.readouterr().out
    found = {path.relative_to(tokens): path.read_bytes() for path in tokens.rglob("*.npy")}
    assert found == expected
    assert (tokens / "colour.train" / "00000.npy").stat().st_mtime_ns == written


TOKENS = """
data: {{image_size: 16}}
tasks:
  pairs: {{source: delvm, images: {root}/delvm, validation_fraction: 0.4}}
  clips: {{source: lvm, images: {root}/lvm.jsonl, validation_images: {root}/held.jsonl}}
tokenizer: {{folder: {tokenizer}}}
sentences: {{pairs: 2, validation: 3, specials: false, length: 64, boundaries: run_on}}
teacher: {{size: micro, steps: 2, batch_size: 2, learning_rate: 1.0e-3}}
prompting: {{pictures: 1}}
trainer: {{accelerator: cpu}}
"""


def test_tokens_of_other_projects_train_without_pictures(mixed, tmp_path, capsys):
    lines = np.random.default_rng(0).integers(16, size=(12, 2 * 16))
    formats.write_delvm(tmp_path / "delvm", list(lines))
    formats.write_lvm(
        tmp_path / "lvm.jsonl", [np.concatenate(pair) for pair in zip(lines, lines, strict=True)]
    )
    formats.write_lvm(tmp_path / "held.jsonl", [np.concatenate(lines[:2])])
    file = tmp_path / "tokens.yaml"
    file.write_text(TOKENS.format(root=tmp_path, tokenizer=mixed / "run" / "tokenizer"))
    assert fit.run(file, [f"run_dir={tmp_path / 'run'}"]) == 0
    assert "tasks.pairs: tokens have no views, shown 2 times instead" in capsys.readouterr().out
    store = open_store(tmp_path / "run" / "tokens")
    held = [held_out(hashlib.sha256(line.astype("<i8").tobytes()).hexdigest(), 0.4, 0) for line in lines]
    for split, side in (("train", False), ("validation", True)):
        rows = lines[np.array(held) == side]
        places = np.arange(len(rows))
        np.testing.assert_array_equal(
            store.grids[split]["pairs"].gather(places, 0 * places).reshape(len(rows), -1), rows
        )
    assert store.grids["validation"]["clips"].shape == (1, 1, 4, 16)
    model = llama.load(tmp_path / "run" / "teacher")
    assert (model.config.vocab_size, model.config.bos_token_id) == (16, None)
    shown = sorted(path.name for path in (tmp_path / "run" / "evaluate" / "pictures" / "clips").iterdir())
    assert shown == ["000-00-image.png", "000-01-image.png", "000-02-image.png", "000-03-truth.png",
                     "000-04-teacher.png"]  # fmt: skip


def test_tokens_need_their_tokenizer(mixed, tmp_path, capsys):
    formats.write_lvm(tmp_path / "lvm.jsonl", [np.full(64, 16)] * 9)
    file = tmp_path / "tokens.yaml"
    text = TOKENS.format(root=tmp_path, tokenizer=mixed / "run" / "tokenizer")
    file.write_text("\n".join(line for line in text.splitlines() if "  pairs:" not in line))
    assert fit.run(file, [f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/lvm.jsonl, line 1: code 16, the tokenizer has 16\n"
    assert fit.run(file, [f"run_dir={tmp_path / 'run'}", "tokenizer.folder=''"]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}: tasks.clips.source: 'lvm' are tokens; give their tokenizer as tokenizer.folder\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sentences.kinds={grey: sequence}",
            "sentences.kinds.grey: 'sequence' does not take samples of 1 x 2",
        ),
        ("sentences.shots={grey: 3}", "sentences.length: needed, the tasks' sentences differ in length"),
        ("balance.floor=0.5", "balance.floor: 0.5 must be at most 1 / tasks"),
    ],
)
def test_an_impossible_plan_is_told_before_all_is_read(micro, pairs, capsys, override, message):
    (pairs / "images" / "9.jpg").write_bytes(b"no picture")  # what would be told after reading
    assert fit.run(micro, [f"run_dir={micro.parent / 'run'}", override]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (micro.parent / "run").exists()


def test_special_ids_of_ones_own(micro):
    few = ["student=null", "scratch=null", "teacher.size=micro", "teacher.steps=1", "tokenizer.steps=1"]
    run_dir = micro.parent / "run"
    assert fit.run(micro, [f"run_dir={run_dir}", *few, "sentences.bos=115", "sentences.eos=20"]) == 0
    config = llama.load(run_dir / "teacher").config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (116, 115, 20)


def test_what_is_special_is_said_and_not_too_much(micro, pairs, capsys):
    for number in range(10):
        write = Image.fromarray(np.full((20, 24, 3), 20 * number, np.uint8))
        for copy in range(2):  # flat pictures, each twice: what is held out is left out
            write.save(pairs / "images" / f"{number}-{copy}.png")
            write.save(pairs / "annotations" / f"{number}-{copy}.png")
    few = ["student=null", "scratch=null", "teacher=null", "sentences.length=40", "tasks.pose.samples=1",
           "tokenizer.steps=1"]  # fmt: skip
    assert fit.run(micro, [f"run_dir={micro.parent / 'run'}", *few]) == 0
    said = capsys.readouterr().out
    manifest = json.loads((micro.parent / "run" / "data" / "manifest.json").read_text())
    dropped = manifest["grey"]["dropped"]
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert lines[: plan.MOST_SAID] == [f"left out: {message}" for message in dropped[: plan.MOST_SAID]]
    assert "is nearly" in dropped[0]
    assert "tasks.pose: 1 training samples, a sentence shows 2: they repeat" in said
    assert "tasks.grey: sentences of 66 tokens, cut into rows of 40" in said


# --- several processes ---


def test_two_processes_make_one_run(micro, capfd):
    run_dir = micro.parent / "run"
    assert launched(lambda: fit.run(micro, [f"run_dir={run_dir}"])) == [0, 0]
    said = capfd.readouterr().out
    for name in STAGES:
        assert said.count(f"{name}: done in") == 1
    assert said.count("report: ") == 1
    assert {path.name for path in run_dir.iterdir()} == {
        *STAGES, "recipe.yaml", "metrics.json", "report.html", "tensorboard"
    }  # fmt: skip
    tokenizer, store = Tokenizer.load(run_dir / "tokenizer"), open_store(run_dir / "tokens")
    for task, views in _opened(micro, run_dir).views("train").items():
        picture = views[len(views) - 1].permute(0, 3, 1, 2).float() / 255
        grid = store.grids["train"][task]
        last = grid.gather(np.array(grid.shape[0] - 1), np.array(grid.shape[1] - 1))
        np.testing.assert_array_equal(last, tokenizer.encode(picture).numpy())
    # one process takes the run over; what it trains anew comes out the same
    curves = {role: json.loads((run_dir / role / "curve.json").read_text()) for role in ROLES}
    for role in ROLES:
        shutil.rmtree(run_dir / role)
    assert fit.run(micro, [f"run_dir={run_dir}"]) == 0
    said = capfd.readouterr().out
    assert [name for name in STAGES if f"{name}: done in" in said] == ["teacher", "scratch", "student"]
    _same_curves(run_dir, curves)
    # two that share the teacher's layers: the same stage, the same student
    shutil.rmtree(run_dir / "student")
    overrides = [f"run_dir={run_dir}", "student.teacher_sharded=true"]
    assert launched(lambda: fit.run(micro, overrides)) == [0, 0]
    said = capfd.readouterr().out
    assert [name for name in STAGES if f"{name}: done in" in said] == ["student"]
    _same_curves(run_dir, curves)


def _same_curves(run_dir, curves):
    for role, curve in curves.items():
        again = json.loads((run_dir / role / "curve.json").read_text())
        for one, two in zip(again, curve, strict=True):
            assert one == {key: pytest.approx(value, rel=1e-5) for key, value in two.items()}


def test_micro_batches_and_averaging_through_the_chain(copy, capsys):
    before = json.loads((copy[1] / "teacher" / "curve.json").read_text())
    assert again(copy, "trainer.accumulate=2", capsys=capsys) == []  # the result is the same
    shutil.rmtree(copy[1] / "teacher")
    assert again(copy, "trainer.accumulate=2", capsys=capsys) == ["teacher"]
    after = json.loads((copy[1] / "teacher" / "curve.json").read_text())
    for one, two in zip(before, after, strict=True):
        assert two == {key: pytest.approx(value, rel=1e-5) for key, value in one.items()}
    last = load_file(copy[1] / "teacher" / "model.safetensors")
    assert again(copy, "trainer.averaging=0.5", capsys=capsys) == STAGES[3:]
    average = load_file(copy[1] / "teacher" / "model.safetensors")
    assert average.keys() == last.keys()
    assert not any(torch.equal(average[name], last[name]) for name in last)


def test_the_models_settings_change_no_result(copy, capsys):
    before = json.loads((copy[1] / "student" / "curve.json").read_text())
    shutil.rmtree(copy[1] / "student")
    assert again(copy, "trainer.checkpointing=true", "trainer.attention=eager", capsys=capsys) == ["student"]
    after = json.loads((copy[1] / "student" / "curve.json").read_text())
    for one, two in zip(before, after, strict=True):
        assert two == {key: pytest.approx(value, rel=1e-5) for key, value in one.items()}


# --- where the teacher comes from ---


def test_students_learn_from_a_cache(copy, capsys):
    live = json.loads((copy[1] / "student" / "curve.json").read_text())
    everything = "cache={kind: topk, count: 18}"  # all codes, BOS and EOS
    assert again(copy, everything, capsys=capsys) == ["cache", "student", "evaluate", "export"]
    cached = json.loads((copy[1] / "student" / "curve.json").read_text())
    for one, two in zip(live, cached, strict=True):
        assert two == {key: pytest.approx(value, rel=2e-3) for key, value in one.items()}
    manifest = json.loads((copy[1] / "cache" / "manifest.json").read_text())
    # 6 steps of 4 rows of 66 tokens
    assert {key: manifest[key] for key in ("kind", "count", "temperature", "rows", "length")} == {
        "kind": "topk", "count": 18, "temperature": 1.0, "rows": 24, "length": 66,
    }  # fmt: skip
    # a student of another size has the same rows
    student = [everything, "student.size=tiny", "scratch=null"]
    assert again(copy, *student, capsys=capsys) == ["student", "evaluate", "export"]
    assert llama.load_config(copy[1] / "student").hidden_size == 128
    # at another temperature the teacher says something else
    warmer = [*student, "student.temperature=2"]
    assert again(copy, *warmer, capsys=capsys) == ["cache", "student", "evaluate", "export"]
    assert json.loads((copy[1] / "cache" / "manifest.json").read_text())["temperature"] == 2.0
    # drawn codes, of a few rows that come over and over
    drawn = [*warmer, "cache={kind: sampled, count: 5, rows: 8}"]
    assert again(copy, *drawn[1:], capsys=capsys) == ["cache", "student", "evaluate", "export"]
    assert json.loads((copy[1] / "cache" / "manifest.json").read_text())["rows"] == 8
    assert all(point["kd"] > 0 for point in json.loads((copy[1] / "student" / "curve.json").read_text()))
    scores = json.loads((copy[1] / "metrics.json").read_text())["evaluate"]
    assert list(scores) == ["teacher", "student"]


def test_runs_share_a_cache(copy, tmp_path, capsys):
    given = [f"{stage}.folder={copy[1] / stage}" for stage in ("tokenizer", "teacher")]
    said = f"cache={{kind: sampled, count: 5, folder: {tmp_path / 'said'}}}"
    curves = []
    for name, own in (("one", []), ("two", []), ("smaller", ["student.size=tiny"])):
        run_dir = tmp_path / name
        assert fit.run(copy[0], [*given, said, *own, "scratch=null", f"run_dir={run_dir}"]) == 0
        assert {path.name for path in (run_dir / "cache").iterdir()} == {"stage.json"}
        found = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "said").iterdir()}
        if name == "one":
            written = found
        assert found == written
        curves.append(json.loads((run_dir / "student" / "curve.json").read_text()))
    assert set(written) == {"manifest.json", "00000.npy"}
    assert curves[0] == curves[1] != curves[2]
    # it is gone: the student has it written again
    shutil.rmtree(tmp_path / "said")
    overrides = [*given, said, "scratch=null", f"run_dir={tmp_path / 'two'}", "student.learning_rate=2e-4"]
    assert fit.run(copy[0], overrides) == 0
    assert {path.name for path in (tmp_path / "said").iterdir()} == set(written)
    # another order of the sentences
    overrides = [*given, said, "seed=1", f"run_dir={tmp_path / 'other'}"]
    capsys.readouterr()
    assert fit.run(copy[0], overrides) == 2
    assert "said: holds a teacher's cache with seed 0, wanted is 1; choose" in capsys.readouterr().err


def test_a_teacher_of_another_run(copy, finished, tmp_path, capsys):
    own, other = tmp_path / "own", tmp_path / "other"
    llama.save(llama.build("micro", 18, 66, seed=7), own)
    overrides = [f"teacher.folder={own}", "scratch=null"]
    learnt = load_file(copy[1] / "student" / "model.safetensors")
    assert again(copy, *overrides, capsys=capsys) == ["teacher", "student", "evaluate", "export"]
    found, expected = (load_file(folder / "model.safetensors") for folder in (copy[1] / "teacher", own))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (copy[1] / "teacher" / "curve.json").exists()
    taught = load_file(copy[1] / "student" / "model.safetensors")
    assert not any(torch.equal(taught[name], learnt[name]) for name in learnt)
    page = (copy[1] / "report.html").read_text()
    assert str(own) in page
    # other weights in its place
    llama.save(llama.build("micro", 18, 66, seed=8), own)
    assert again(copy, *overrides, capsys=capsys) == ["teacher", "student", "evaluate", "export"]
    found, expected = (load_file(folder / "model.safetensors") for folder in (copy[1] / "teacher", own))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # another vocabulary, or too short: nothing is written, neither in a new folder nor in one that is there
    def snapshot():
        return {path: path.read_bytes() for path in copy[1].rglob("*") if path.is_file()}

    before = snapshot()
    of_other_codes = llama.build("micro", 18, 66, seed=7)
    of_other_codes.config.num_codes = 12
    for model, message in (
        (of_other_codes, "was trained on 12 codes, the tokenizer here has 16"),
        (llama.build("micro", 19, 66, seed=7), "has 19 ids, codes and special ids here are 18"),
        (llama.build("micro", 18, 65, seed=7), "takes 65 tokens, rows and sentences here have up to 66"),
    ):
        llama.save(model, other)
        for run_dir in (copy[1], tmp_path / "new"):
            assert fit.run(copy[0], [f"run_dir={run_dir}", f"teacher.folder={other}", "scratch=null"]) == 2
            said = capsys.readouterr().err.splitlines()
            assert said[-1] == f"error: teacher.folder: '{other}' {message}"
    assert not (tmp_path / "new").exists()
    assert snapshot() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.kind=topk", "cache.count: 64, codes and special ids here are 18"),
        ("cache={count: 9, rows: 25}", "cache.rows: 25, the student sees 24"),
        ("teacher.folder=nowhere", "nowhere: no such folder; expected a transformers folder with a Llama"),
        (
            "student.on_policy.share=0.5; sentences.length=50",
            "student.on_policy.share: a row must be a whole sentence; leave sentences.length at 0",
        ),
    ],
)
def test_what_a_student_cannot_learn_from_is_told_first(finished, micro, capsys, override, message):
    for run_dir in (finished / "run", micro.parent / "run"):  # the list of data is reused, or not there yet
        assert fit.run(finished / "micro.yaml", [f"run_dir={run_dir}", *override.split("; ")]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not (micro.parent / "run").exists()


def test_a_student_learns_from_its_own_pictures(copy, capsys):
    before = json.loads((copy[1] / "student" / "curve.json").read_text())
    own = ["student.on_policy={share: 0.5, confidence: 0.01}", "scratch=null"]
    assert again(copy, *own, capsys=capsys) == ["student", "evaluate", "export"]
    after = json.loads((copy[1] / "student" / "curve.json").read_text())
    first = next(step for step in range(6) if on_policy_step(step, 0.5))  # its loss is one of step first + 1
    for one, two in zip(before, after, strict=True):
        assert (one["kd"] == two["kd"]) == (one["step"] <= first)
    assert before[-1]["step"] > first
    assert all(0 < point["kd"] < math.inf for point in after)


def _first(curve):
    return json.loads((curve / "student" / "curve.json").read_text())[0]


def test_a_student_starts_from_its_teacher(copy, tmp_path, capsys):
    recipe_file, run = copy
    random = _first(run)
    # of the teacher's own size it is the teacher
    sliced = ["student.start=slice", "student.size=tiny", "trainer.log_every=1", "scratch=null"]
    assert again(copy, *sliced, capsys=capsys) == ["student", "evaluate", "export"]
    assert _first(run)["step"] == 1
    assert abs(_first(run)["kd"]) < 1e-6 < random["kd"]
    learnt = load_file(run / "student" / "model.safetensors")
    # of another: what the functions make of the training sentences
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    teacher, pieces = llama.load(run / "teacher"), []
    for start in ("slice", "embedding"):
        settings = [f"student.start={start}", "student.start_tokens=200", f"run_dir={tmp_path}"]
        material = Material(Given(recipe.load(recipe_file, settings)), manifest, run / "data", run)
        rows = teach.rows_of(material, "student").__getitems__(range(4))["tokens"]  # of 66 tokens
        config = material.given.model_config("student", 66)
        pieces.append(teach.first_weights(material).state_dict())
        cut = slice_student if start == "slice" else partial(slice_embedding, seed=1)
        expected = cut(teacher, config, rows).state_dict()
        assert all(torch.equal(pieces[-1][name], weight) for name, weight in expected.items())
    assert not torch.equal(*(piece["model.layers.0.mlp.up_proj.weight"] for piece in pieces))
    # from where another student ended
    other = tmp_path / "other"
    shutil.copytree(run / "student", other)
    overrides = ["student.start=checkpoint", f"student.start_folder={other}", *sliced[1:]]
    overrides.append("student.learning_rate=1e-12")
    assert again(copy, *overrides, capsys=capsys) == ["student", "evaluate", "export"]
    found = load_file(run / "student" / "model.safetensors")
    assert all(torch.allclose(found[name], weight, atol=1e-8) for name, weight in learnt.items())
    llama.save(llama.build("tiny", 18, 66, seed=7), other)  # another checkpoint under its name
    assert again(copy, *overrides, capsys=capsys) == ["student", "evaluate", "export"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["student.start=slice", "student.size=tiny-192"],
            "student.start: 'slice' of this teacher: hidden_size: 192 is more than the teacher has; at most"
            " 128",
        ),
        (
            ["student.start=embedding", "student.size=tiny-192"],
            "student.start: 'embedding' of this teacher: hidden_size: 192 is more than the teacher has; at"
            " most 128",
        ),
        (
            ["student.start=checkpoint", "student.start_folder=RUN/teacher"],
            "student.start_folder: 'RUN/teacher' has hidden_size 128, the student here 32",
        ),
        (
            ["student.start=checkpoint", "student.start_folder=nowhere"],
            "nowhere: no such folder; expected a transformers folder with a Llama",
        ),
    ],
)
def test_a_start_that_cannot_be_is_told_first(finished, micro, capsys, overrides, message):
    run = str(finished / "run")
    for run_dir in (run, micro.parent / "run"):
        given = [override.replace("RUN", run) for override in overrides]
        assert fit.run(finished / "micro.yaml", [f"run_dir={run_dir}", *given]) == 2
        assert capsys.readouterr().err == f"error: {message.replace('RUN', run)}\n"
    assert not (micro.parent / "run").exists()


def test_a_shared_cache_lies_outside_of_the_run(micro, capsys):
    run_dir = micro.parent / "run"
    assert fit.run(micro, [f"run_dir={run_dir}", f"cache={{count: 5, folder: {run_dir / 'cache'}}}"]) == 2
    assert capsys.readouterr().err == (
        f"error: cache.folder: '{run_dir / 'cache'}' lies in run_dir, whose stages replace each other;"
        " choose a folder elsewhere, or leave it empty for a cache of this run alone\n"
    )
    assert not run_dir.exists()


def test_a_step_that_cannot_be_shared_is_told_first(micro, capsys):
    overrides = [f"run_dir={micro.parent / 'run'}", "trainer.accumulate=3"]
    assert fit.run(micro, overrides) == 2
    assert capsys.readouterr().err == (
        "error: teacher.batch_size: 4 a step must divide by processes * trainer.accumulate = 1 * 3\n"
    )
    assert not (micro.parent / "run").exists()
