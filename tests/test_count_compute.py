import json
import math
import sys

import pytest

from tools import count_compute
from tools.count_compute import read, steps_to, students_to_pay


def test_steps_between_two_follow_their_logarithm():
    curve = {100: 3.0, 400: 2.0, 1600: 1.5}
    assert steps_to(curve, 2.5) == pytest.approx(200)
    assert steps_to(curve, 2.0) == pytest.approx(400)
    assert steps_to(curve, 3.5) == 100
    assert steps_to(curve, 1.4) == math.inf


@pytest.mark.parametrize(
    ("scratch", "taught", "students"), [(3.0, 1.0, 5), (2.0, 1.9, 100), (2.0, 2.0, math.inf)]
)
def test_students_whose_savings_cover_the_teacher(scratch, taught, students):
    assert students_to_pay(10.0, scratch, taught) == students


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["count_compute", *map(str, arguments)])
    return count_compute.main()


def test_the_table(tmp_path, monkeypatch, capsys):
    for steps, scratch, sliced in ((100, 3.0, 2.5), (400, 2.0, 1.6)):
        seeds = {
            str(seed): {"teacher": {"a": 1.5, "b": 1.5}, "scratch": {"a": scratch - 1, "b": scratch + 1},
                        "slice": {"a": sliced, "b": sliced}}
            for seed in (0, 1)
        }  # fmt: skip
        operations = {"teacher": 1e6, "scratch": 1e3 * steps, "slice": 1.5e3 * steps}
        written = {"losses": seeds, "operations": operations}
        (tmp_path / f"distill-tiny-{steps}.json").write_text(json.dumps(written))
    (tmp_path / "distill-tiny-256-100.json").write_text("{}")  # another size
    losses, operations = read(tmp_path, "tiny")
    assert losses == {"teacher": {0: 1.5}, "scratch": {100: 3.0, 400: 2.0}, "slice": {100: 2.5, 400: 1.6}}
    assert operations["slice"] == {100: 1.5e5, 400: 6e5}
    assert run(monkeypatch, tmp_path, "tiny") == 0
    lines = capsys.readouterr().out.splitlines()
    # 200 steps of scratch, 2e5 operations, are what 100 of the arm, 1.5e5, replace
    assert "| 100 | 2.500 | 3.000 | 200 | 2.0 | 20 |" in lines
    assert "| 400 | 1.600 | 2.000 | > 400 | > 1.0 | not known |" in lines
    assert run(monkeypatch, tmp_path, "tiny", "--arm", "jsd") == 2
    assert "--arm: 'jsd' was not run; choices:" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, "micro") == 2
    assert "no distill-micro-STEPS.json" in capsys.readouterr().err
