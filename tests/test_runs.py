import json

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import LlamaConfig

from delvm import llama, report
from delvm.errors import UserError
from delvm.evaluate import runs

RECIPE = {
    "name": "try", "run_dir": "runs/try", "seed": 0, "data": {"image_size": 16},
    "tasks": {"pose": {"scene": "pose"}},
    "teacher": {"size": "tiny", "steps": 8, "folder": ""}, "scratch": {"learning_rate": 0.1},
    "student": {"size": "micro", "steps": 6, "kd_weight": 1.0},
    "prompting": {"temperature": 0.0, "top_p": 1.0},
}  # fmt: skip
SIZES = {"teacher": 32, "scratch": 16, "student": 16}


def write_run(folder, loss=2.0, **changes):
    """A run folder as `fit` leaves it, without weights."""
    recipe = {**RECIPE, "run_dir": str(folder), **changes}
    (folder / "evaluate" / "pictures" / "pose").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    scores = {"loss": loss, "accuracy": 0.5, "perplexity": 7.0}
    metrics = {
        "balance": {"pose": {"samples": 4, "views": 3, "tokens_before": 128, "tokens_after": 384}},
        "data": {"pose": {"skipped": 0}}, "tokenizer": {"psnr": 20.0},
        "evaluate": {role: {"pose": scores} for role in SIZES}, "seconds": {"data": 1.0, "student": 2.5},
        "probe": {"student": {"top1": 0.3}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for role, width in SIZES.items():
        (folder / role).mkdir()
        config = LlamaConfig(
            vocab_size=18, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        llama.save(llama.LlamaForCausalLM(config), folder / role)
        (folder / role / "curve.json").write_text(json.dumps([{"step": 2, "ce": 3.0, "loss": 4.0}]))
    picture = np.full((8, 8, 3), 7, np.uint8)
    Image.fromarray(picture).save(folder / "evaluate" / "pictures" / "pose" / "000-00-truth.png")
    return folder


def test_a_folder_says_what_the_page_shows(tmp_path):
    found = runs.report(write_run(tmp_path / "run"))
    assert found.title == "try"
    count = {role: llama.count_parameters(llama.load_config(tmp_path / "run" / role)) / 1e6 for role in SIZES}
    assert found.facts == [
        ("seed", "0"),
        ("image size", "16 px"),
        ("teacher", f"tiny: {count['teacher']:.2f}M parameters, 8 steps"),
        ("scratch", f"micro: {count['scratch']:.2f}M parameters, 6 steps"),
        ("student", f"micro: {count['student']:.2f}M parameters, 6 steps"),
        ("annotations", "greedy"),
        ("time", "4 s"),
    ]
    assert found.curves == {role: [(2, 3.0)] for role in SIZES}
    assert found.scores["student"] == {"pose": {"loss": 2.0, "accuracy": 0.5, "perplexity": 7.0}}
    assert found.tables == {
        "seconds by stage": {"data": 1.0, "student": 2.5}, "probe": {"student": {"top1": 0.3}},
    }  # fmt: skip
    ((caption, picture),) = found.pictures["pose"][0]
    assert (caption, picture[0, 0].tolist()) == ("truth", [7, 7, 7])
    assert yaml.safe_load(found.recipe)["tasks"] == {"pose": {"scene": "pose"}}


def test_a_given_teacher_has_no_curve_and_may_be_gone(tmp_path):
    teacher = {"size": "", "steps": 0, "folder": str(tmp_path / "elsewhere")}
    found = runs.report(write_run(tmp_path / "run", teacher=teacher))
    assert dict(found.facts)["teacher"] == str(tmp_path / "elsewhere")
    assert list(found.curves) == ["scratch", "student"]


def test_a_finished_run_is_read(finished):
    found = runs.report(finished / "run")
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert found.scores == metrics["evaluate"]
    assert list(found.pictures) == ["segmentation", "pose", "grey"]
    for task, metric in (("segmentation", "miou"), ("grey", "mse")):
        worth = found.scored[task]["student"]
        of_task = metrics["evaluate"]["student"][task]["pictures"]["truth"]
        assert {key: value for key, value in worth.metrics.items() if value is not None} == of_task
        assert next(iter(worth.metrics)) == metric
        assert len(worth.by_picture) == 5  # held-out sentences, fewer than prompting.queries
    assert [group.name for group in runs.groups([finished / "run"])] == ["micro"]


def _student(**settings):
    return {"student": RECIPE["student"] | settings}


def test_seeds_are_one_group(tmp_path):
    given = {"tokenizer": {"folder": "runs/seed{}/tokenizer"}}

    def folder(seed):
        tokenizer = {"tokenizer": {"folder": given["tokenizer"]["folder"].format(seed)}}
        return write_run(tmp_path / f"seed{seed}", seed=seed, **tokenizer)

    seeds = [folder(seed) for seed in (1, 10)]
    other = write_run(tmp_path / "other", seed=1, tokenizer={"folder": "runs/seed10/tokenizer"})
    assert runs.grouped([*seeds, other, seeds[0]]) == [seeds, [other]]


def test_groups_are_named_by_what_they_differ_in(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", **_student(kd_weight=2.0))
    third = write_run(tmp_path / "third", seed=1, **_student(kd_weight=2.0))
    first, second = runs.groups([one, two, third])
    assert (first.name, second.name) == ("student.kd_weight=1.0", "student.kd_weight=2.0")
    assert [len(group.runs) for group in (first, second)] == [1, 2]
    assert second.settings == {"student.kd_weight": "2.0"}


def test_groups_of_other_recipes_and_with_much_apart(tmp_path):
    one = write_run(tmp_path / "one")
    many = write_run(
        tmp_path / "many", **_student(kd_weight=2.0, size="tiny", steps=9, temperature=1, ce_weight=1)
    )
    other = write_run(tmp_path / "other", name="other", data={"image_size": 8})
    names = [group.name for group in runs.groups([one, many, other])]
    assert names == ["student.size=micro, student.steps=6, student.kd_weight=1.0",
                     "student.size=tiny, student.steps=9, student.kd_weight=2.0", "other"]  # fmt: skip
    more = write_run(
        tmp_path / "more", data={"image_size": 8}, **_student(kd_weight=2.0, size="tiny", steps=9)
    )
    assert [group.name for group in runs.groups([one, more])] == ["one", "more"]


def test_differences_by_hand():
    settings = [
        {"a": {"x": 1, "y": [1, 2]}, "cache": None, "tasks": {"p": {"s": 1}}, "same": {"z": 0}},
        {"a": {"x": 1, "y": [1]}, "cache": {"kind": "topk"}, "tasks": {}, "same": {"z": 0}},
    ]
    assert runs.differences(settings) == {
        "a.y": ["[1, 2]", "[1]"], "cache": ["null", "{…}"], "tasks": ["{…}", "{}"],
    }  # fmt: skip
    assert runs.differences([{"x": 1}, {"x": 1, "y": ""}]) == {"y": ["–", '""']}


def test_the_page_of_many_runs(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", 2.0), write_run(tmp_path / "b", 3.0, seed=1),
        write_run(tmp_path / "c", 4.0, **_student(kd_weight=2.0)),
    ]  # fmt: skip
    out = tmp_path / "page.html"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    page = out.read_text()
    assert "2.500 <small>2.000–3.000</small>" in page
    assert "student.kd_weight=2.0" in page
    assert str(out) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("missing", ["recipe.yaml", "metrics.json"])
def test_a_folder_that_is_no_run(tmp_path, capsys, missing):
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = f"error: {folder}: has no {missing}; give the folder of a run that has ended\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "page.html").exists()


def test_files_that_are_broken(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json: not readable: Expecting"):
        runs.read(folder)
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match=r"metrics\.json: holds no mapping"):
        runs.read(folder)


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert report.main([str(folder), "--out", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
