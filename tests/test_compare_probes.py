"""tools/compare_probes.py: differences to the control over seeds."""

import json
import math

import pytest

from tools import compare_probes


@pytest.fixture
def runs(tmp_path):
    """Three seeds: the student is 0.02, 0.03 and 0.04 above scratch, the sliced one 0.09, 0.0 and -0.06."""
    folders = []
    for seed, scratch in enumerate((0.40, 0.42, 0.38)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        top1 = {
            "scratch": scratch, "student": scratch + 0.02 + 0.01 * seed,
            "sliced": scratch + (0.09, 0.0, -0.06)[seed],
        }  # fmt: skip
        models = {name: {"ridge": {"top1": value, "top5": 0.9}} for name, value in top1.items()}
        models["scratch"]["nearest"] = {"top1": 0.3}
        (folder / "recipe.yaml").write_text(f"name: probe\nseed: {seed}\n")
        (folder / "metrics.json").write_text(json.dumps({"probe": {"models": models}}))
        folders.append(folder)
    return folders


def test_differences_are_taken_within_a_seed(runs):
    rows = {(row.classifier, row.model): row for row in compare_probes.compare(runs, "scratch")}
    assert set(rows) == {
        ("ridge", "scratch"),
        ("ridge", "student"),
        ("ridge", "sliced"),
        ("nearest", "scratch"),
    }
    student, sliced = rows["ridge", "student"], rows["ridge", "sliced"]
    assert student.top1 == pytest.approx([0.42, 0.45, 0.42])
    assert student.beyond == pytest.approx([0.02, 0.03, 0.04])
    assert student.error == pytest.approx(0.01 / math.sqrt(3))  # deviation 0.01 of three
    assert student.shown
    assert sliced.error == pytest.approx(math.sqrt((0.08**2 + 0.01**2 + 0.07**2) / 2 / 3))
    assert not sliced.shown
    one = compare_probes.compare(runs[:1], "scratch")[1]
    assert math.isnan(one.error)
    assert not one.shown


def test_a_difference_below_zero(runs, capsys):
    assert compare_probes.main([*map(str, runs), "--against", "student"]) == 0
    said = capsys.readouterr().out
    assert "-0.0300 ± 0.0058, below" in said
    assert "-0.0200 ± 0.0493 " in said


def test_runs_that_are_no_seeds_of_one_recipe(runs, capsys):
    def refused(*folders):
        assert compare_probes.main([*map(str, folders)]) == 2
        return capsys.readouterr().err.strip()

    assert refused(*[runs[1]] * 3) == f"error: {runs[1]}: seed 1, as {runs[1]}; each seed counts once"
    (runs[2] / "recipe.yaml").write_text("name: probe\nseed: 0\n")
    assert refused(*runs) == f"error: {runs[2]}: seed 0, as {runs[0]}; each seed counts once"
    for place, folder in enumerate(runs):  # a probe of given models: those are the seeds
        (folder / "recipe.yaml").write_text(
            f"name: probe\nseed: 0\nprobe: {{readout: mean, models: {{student: runs/{place}/student}}}}\n"
        )
    assert compare_probes.main([*map(str, runs)]) == 0
    capsys.readouterr()
    (runs[2] / "recipe.yaml").write_text(
        "name: probe\nseed: 2\nprobe: {readout: last, models: {student: s}}\n"
    )
    said = f"{runs[2]}: probe.readout is last, of {runs[0]} mean; only seeds are compared"
    assert refused(*runs) == f"error: {said}"


def test_the_command(runs, capsys):
    assert compare_probes.main([*map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "+0.0300 ± 0.0058, shown" in said
    assert "+0.0100 ± 0.0436 " in said
    assert "0.4200-0.4500" in said
    assert compare_probes.main([*map(str, runs), "--against", "timm"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("probe has no 'timm' to compare with; it has: scratch, student, sliced")
    (runs[0] / "metrics.json").write_text("{}")
    assert compare_probes.main([*map(str, runs)]) == 2
    assert capsys.readouterr().err.strip().endswith("it has: no probe")
