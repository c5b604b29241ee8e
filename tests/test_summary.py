"""What is said of a run: the plan before it, the page after it."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import fit, llama
from delvm.evaluate import runs
from delvm.evaluate.report import render


def test_a_dry_run_says_plan_and_sizes_and_writes_nothing(micro, capsys):
    before = sorted(micro.parent.rglob("*"))
    run_dir = micro.parent / "run"
    assert fit.run(micro, [f"run_dir={run_dir}"], dry_run=True) == 0
    assert sorted(micro.parent.rglob("*")) == before
    said = capsys.readouterr().out
    assert "segmentation: 12 training, 6 held-out samples; pairs: 4 pictures, 66 tokens" in said
    assert re.search(r"pose +│ +4 │ +3 │ +12 │ +128 │ +\d+% │ +384 │", said)
    # 2 pairs of 2 pictures of 16 tokens, BOS and EOS: 66 tokens a sentence, 4 sentences a step
    assert "rows: 66 tokens, 16 codes and BOS, EOS" in said
    assert re.search(r"tokenizer: [\d,]+ parameters, 6 steps of 8 pictures", said)
    parameters = llama.num_parameters("micro", 18)
    assert re.search(rf"student │ +micro │ +{parameters:,} │ +6 │ +264 │ +1,584", said)
    assert [line for line in said.splitlines() if line.endswith(": to do")] == [
        f"{name}: to do"
        for name in ("data", "tokenizer", "tokens", "teacher", "scratch", "student", "evaluate", "export")
    ]


def test_a_dry_run_says_what_would_be_reused(finished, capsys):
    overrides = [f"run_dir={finished / 'run'}", "student.kd_weight=2"]
    assert fit.run(finished / "micro.yaml", overrides, dry_run=True) == 0
    said = capsys.readouterr().out
    for name in ("data", "tokenizer", "tokens", "teacher", "scratch"):
        assert f"{name}: done, would be reused" in said
    for name in ("student", "evaluate", "export"):
        assert f"{name}: to do" in said


def test_a_dry_run_says_where_the_teacher_comes_from(finished, capsys):
    folder = finished / "run" / "teacher"
    overrides = [f"run_dir={finished / 'run'}", f"teacher.folder={folder}", "cache={kind: sampled}"]
    assert fit.run(finished / "micro.yaml", overrides, dry_run=True) == 0
    said = capsys.readouterr().out
    parameters = llama.count_parameters(llama.load_config(folder))
    assert re.search(rf"│ teacher +│ given +│ +{parameters:,} │ +│ +│ +│", said)
    assert f"\nteacher: {folder}\n" in said
    stages = ["teacher", "scratch", "cache", "student"]
    lines = [line.partition(": ") for line in said.splitlines()]
    said_of = {name: what for name, _, what in lines if what in ("to do", "done, would be reused")}
    assert [name for name in said_of if name in stages] == stages  # in the order of the data flow
    assert [said_of[name] for name in stages] == ["to do", "done, would be reused", "to do", "to do"]


def test_the_numbers_of_a_run(finished):
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert set(metrics) == {"balance", "data", "tokenizer", "evaluate", "seconds"}
    assert {"psnr", "codes_used"} <= set(metrics["tokenizer"])
    stages = {"data", "tokenizer", "tokens", "teacher", "scratch", "student", "evaluate", "export"}
    assert set(metrics["seconds"]) == stages

    def numbers(tree):
        if isinstance(tree, dict):
            return all(map(numbers, tree.values()))
        if isinstance(tree, list):  # losses by place
            return all(map(numbers, tree))
        return isinstance(tree, int | float) and not isinstance(tree, bool)

    assert numbers(metrics)


def test_the_page_shows_what_the_folder_holds(finished):
    run_dir = finished / "run"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    found = runs.report(run_dir)
    assert found.title == "micro"
    assert found.scores == metrics["evaluate"]
    assert found.balance == metrics["balance"]
    curve = json.loads((run_dir / "student" / "curve.json").read_text())
    assert found.curves["student"] == [(point["step"], point["ce"]) for point in curve]
    captions = ["example", "annotation", "query", "truth", "teacher", "scratch", "student"]
    assert list(found.pictures) == ["segmentation", "pose", "grey"]
    for rows in found.pictures.values():
        assert [[caption for caption, _ in row] for row in rows] == [captions, captions]
    page = (run_dir / "report.html").read_text()
    assert page == render(found)
    assert page.count("data:image/png") >= 3 * 2 * 7


def test_tensorboard_has_the_numbers_and_pictures_of_the_page(finished):
    run_dir = finished / "run"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    events = EventAccumulator(str(run_dir / "tensorboard" / "report"), {"scalars": 0, "images": 0}).Reload()
    loss = metrics["evaluate"]["student"]["grey"]["pictures"]["ceiling"]["mse"]
    assert events.Scalars("evaluate/student/grey/pictures/ceiling/mse")[0].value == pytest.approx(loss)
    assert set(events.Tags()["images"]) == {"pictures/segmentation", "pictures/pose", "pictures/grey"}
