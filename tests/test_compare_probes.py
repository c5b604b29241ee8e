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
