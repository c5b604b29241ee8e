"""The scripts beside the package: what they decide and what they draw."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from delvm import fit
from delvm.tokens.balance import STRATEGIES
from tools import (
    check_store,
    claims,
    compare_balance,
    compare_distill,
    compare_steps,
    picture,
    plan_balance,
    show_augment,
)

TASKS = ["segmentation", "deraining", "pose"]


def scores(**changes):
    """One seed's arms, every gate held by 0.01; `arm_task=difference` moves one loss."""
    losses = {
        "none": (2.0, 3.5, 2.8), "resample": (2.3, 3.6, 2.95), "augment": (2.19, 3.19, 2.64),
        "teacher": (2.0, 3.0, 2.0), "scratch": (2.4, 3.6, 2.8), "distilled": (2.36, 3.49, 2.76),
    }  # fmt: skip
    arms = {a: {t: {"loss": x} for t, x in zip(TASKS, row, strict=True)} for a, row in losses.items()}
    for key, difference in changes.items():
        arm, task = key.split("_")
        arms[arm][task]["loss"] += difference
    return arms


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"augment_segmentation": 0.02}, False),  # the head pays more than 0.20
        ({"none_deraining": -0.02}, False),
        ({"none_pose": -0.02}, False),
        ({"resample_segmentation": -0.02}, False),
        ({"resample_deraining": -0.02}, False),
        ({"resample_pose": -0.02}, False),
        ({"scratch_segmentation": -0.02}, False),
        ({"scratch_deraining": -0.02}, False),
        ({"distilled_pose": 0.02}, False),
        ({"augment_pose": -1.0}, True),
    ],
)
def test_every_gate_counts(changes, held):
    assert claims.report({0: scores(**changes)}, TASKS) is held


def test_the_mean_counts_and_the_teacher_must_help_in_every_seed():
    # +0.02 in one of two seeds is +0.01 in the mean, and just holds
    assert claims.report({0: scores(none_pose=0.05), 1: scores(none_pose=-0.02)}, TASKS)
    better, worse = scores(distilled_pose=-0.2), scores(distilled_pose=0.05)
    assert not claims.report({0: better, 1: worse}, TASKS)  # better in the mean, worse in seed 1


def test_claims_without_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", str(tmp_path / "none.yaml")])
    assert claims.main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: no such recipe\n"


def test_the_picture_of_a_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["picture.py", str(finished / "run"), str(tmp_path / "out.png")])
    assert picture.main() == 0
    found = np.asarray(Image.open(tmp_path / "out.png"))
    side, gap, line = picture.SIDE, picture.GAP, picture.LINE
    assert found.shape == (gap + 3 * (side + 2 * line + gap), gap + 7 * (side + gap), 3)
    # the third picture of the first row is the query of the first task, 16 pixels a side
    left, top = gap + 2 * (side + gap), gap + 2 * line
    drawn = found[top : top + side : side // 16, left : left + side : side // 16]
    saved = finished / "run" / "evaluate" / "pictures" / "segmentation" / "000-02-query.png"
    np.testing.assert_array_equal(drawn, np.asarray(Image.open(saved)))


def test_ones_own_query_is_completed_as_in_the_report(finished, tmp_path, monkeypatch):
    # the first held-out query of the run, given as a file of one's own
    for task in TASKS[::2]:
        folder = finished / "run" / "evaluate" / "pictures" / task
        rows = picture.complete_queries(finished / "run", [folder / "000-02-query.png"])
        assert [caption for caption, _ in rows[task][0]] == ["query", "teacher", "scratch", "student"]
        for caption, found in rows[task][0][1:]:
            place = {"teacher": 4, "scratch": 5, "student": 6}[caption]
            saved = np.asarray(Image.open(folder / f"000-{place:02}-{caption}.png"))
            np.testing.assert_allclose(found.astype(int), saved.astype(int), atol=1)


def test_the_picture_of_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path), str(tmp_path / "out.png")])
    assert picture.main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/recipe.yaml: no such recipe\n"
    assert not (tmp_path / "out.png").exists()


def test_the_recipe_of_the_claims_has_their_tasks():
    recipe = claims.load(claims.Path("recipes/claims.yaml"))
    assert list(recipe.tasks) == TASKS
    assert all(set(least) == set(TASKS) for _, _, least in claims.GATES)
    assert claims.TUNING_SEED not in (10, 11, 12)
    assert json.dumps(claims.GRID)


def run_tool(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def test_the_plan_of_every_strategy(micro, tmp_path, monkeypatch, capsys):
    before = sorted(micro.parent.rglob("*"))
    out = tmp_path.parent / f"{tmp_path.name}-plan.png"
    assert run_tool(plan_balance, monkeypatch, micro, "balance.max_views=2", "--out", out) == 0
    said = capsys.readouterr().out
    # 12, 4 and 8 samples of 2 pictures of 16 tokens
    assert "augment (the recipe's): 1,152 tokens an epoch, 0.00 MB" in " ".join(said.split())
    assert re.search(r"pose +│ +4 │ +2 │ +8 │ +256 │ +33.3% │ +22.2% │", said)
    assert "pose: 3 views wanted, cut by balance.max_views: 22.2% of the tokens, 33.3%" in " ".join(
        said.split()
    )
    assert [name for name in STRATEGIES if re.search(rf"^{name}", said, re.MULTILINE)] == list(STRATEGIES)
    # the bar of `none`: the tasks' shares of the samples, in pixels
    bar = np.asarray(Image.open(out))[plan_balance.GAP + 2, plan_balance.MARGIN + 1 :]
    widths = [int((bar == bar[place]).all(axis=-1).sum()) for place in (5, 400)]
    assert widths[0] == pytest.approx(plan_balance.WIDTH * 12 / 24, abs=2)
    assert widths[1] == pytest.approx(plan_balance.WIDTH * 4 / 24, abs=2)
    assert sorted(micro.parent.rglob("*")) == before


def test_the_views_of_every_task(micro, tmp_path, monkeypatch):
    out = tmp_path.parent / f"{tmp_path.name}-views.png"
    policies = ["--policies", "none", "restoration"]
    assert run_tool(show_augment, monkeypatch, micro, out, "--views", 3, *policies) == 0
    side, gap, line = show_augment.SIDE, show_augment.GAP, show_augment.LINE
    found = np.asarray(Image.open(out))
    # restoration goes neither with segmentation's labels nor with skeletons: four rows of two pictures
    assert found.shape == (4 * (line + 2 * (side + gap) + gap), gap + 3 * (side + gap), 3)
    # under `none` every view is the sample itself
    first, second = (found[line : line + side, left : left + side] for left in (gap, 2 * gap + side))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first)) > 10


def test_bad_input_to_the_tools(tmp_path, monkeypatch, capsys):
    for tool, more in ((plan_balance, []), (show_augment, [tmp_path / "out.png"]), (compare_balance, [])):
        assert run_tool(tool, monkeypatch, tmp_path / "none.yaml", *more) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: no such recipe\n"
    assert not list(tmp_path.iterdir())


def test_the_comparison_of_strategies(capsys):
    losses = {"none": 3.0, "resample": 2.9, "mixture": 2.8, "augment": 2.5}
    scores = {
        seed: {strategy: {"a": loss + 0.1 * seed, "b": 1.0} for strategy, loss in losses.items()}
        for seed in (0, 1)
    }
    compare_balance.report(scores)
    said = " ".join(capsys.readouterr().out.split())
    assert "augment │ 2.550 (2.500-2.600) │ 1.000 (1.000-1.000)" in said
    assert "augment below none on a: +0.500 (+0.500, +0.500), beyond the seeds' spread of 0.000" in said
    scores[1]["none"]["a"] = 4.2
    compare_balance.report(scores)
    said = " ".join(capsys.readouterr().out.split())
    assert "augment below none on a: +1.050 (+0.500, +1.600), within the seeds' spread of 1.100" in said
    assert compare_balance.TUNING_SEED not in (0, 1, 2)
    assert set(compare_balance.CHOSEN) == set(STRATEGIES)


def test_a_store_is_checked(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished / "run" / "tokens", tmp_path / "tokens")
    shards = sorted(folder.rglob("0*.npy"))
    assert run_tool(check_store, monkeypatch, folder) == 0
    size = sum(path.stat().st_size for path in shards)
    assert capsys.readouterr().out == f"{folder}: {size:,} bytes of tokens, all as they were written\n"
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    assert run_tool(check_store, monkeypatch, folder) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith(f"error: {shards[-1]}: damaged, its content is not what was")


def test_the_comparison_of_objectives(micro, tmp_path, monkeypatch, capsys):
    where = f"run_dir={tmp_path / 'run'}"
    arms = ["--arms", "scratch", "forward_kl", "cached, sampled 12", "slice, labels alone"]
    assert run_tool(compare_distill, monkeypatch, micro, where, "--seeds", "3", *arms) == 2
    assert "has no weight and rate for scratch, forward_kl" in capsys.readouterr().err
    assert run_tool(compare_distill, monkeypatch, micro, where, "--tune", *arms) == 0
    chosen = json.loads((tmp_path / "run" / "distill-tuned.json").read_text())
    # plain KL first
    assert [entry["arm"] for entry in chosen.values()] == [
        "forward_kl",
        *[a for a in arms[1:] if a != "forward_kl"],
    ]
    arm_folder = tmp_path / "run" / "seed100" / "distill" / "arms"
    for entry in chosen.values():
        arm, weight, rate = entry["arm"], entry["weight"], entry["rate"]
        # its two neighbours were tried as well, and are worse
        name = arm.replace(" ", "_").replace(",", "")
        scores = [
            sum(json.loads(file.read_text()).values())
            for x in (rate, rate / 2, rate * 2)
            for file in arm_folder.glob(f"{name}-{weight:g}-{x:g}-*.json")
        ]
        assert len(scores) == 3
        assert scores[0] == min(scores)
    capsys.readouterr()
    assert run_tool(compare_distill, monkeypatch, micro, where, "--seeds", "3", *arms) == 0
    said = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "run" / "distill-micro-6.json").read_text())
    scores, operations = written["losses"]["3"], written["operations"]
    # the teacher learnt for 8 steps, and says a third of that in each of the student's 6
    assert operations["forward_kl"] - operations["scratch"] == pytest.approx(
        operations["teacher"] / 3 * 6 / 8
    )
    assert operations["slice, labels alone"] == operations["scratch"]
    assert set(scores) == {"teacher", *arms[1:]}
    loss = scores["forward_kl"]["pose"]
    assert f"{loss:.3f} ({loss:.3f}-{loss:.3f})" in said
    # neither weights and rates nor scores of another recipe are taken for this one's
    before = set((tmp_path / "run" / "seed100").rglob("arms/*.json"))
    longer = [where, "student.steps=7"]
    assert run_tool(compare_distill, monkeypatch, micro, *longer, "--seeds", "3", "--arms", "scratch") == 2
    assert "no weight and rate for scratch under these settings" in capsys.readouterr().err
    assert run_tool(compare_distill, monkeypatch, micro, *longer, "--tune", "--arms", "scratch") == 0
    assert len(set((tmp_path / "run" / "seed100").rglob("arms/*.json")) - before) >= 3
    # a teacher read from memory is the teacher: the same student as a recipe's own run
    plain = next(entry for entry in chosen.values() if entry["arm"] == "forward_kl")
    own = {"kd_weight": plain["weight"], "learning_rate": plain["rate"]}
    overrides = [f"student.{key}={value}" for key, value in own.items()]
    assert fit.run(micro, ["seed=3", f"run_dir={tmp_path / 'own'}", *overrides]) == 0
    metrics = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert metrics["evaluate"]["student"]["pose"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_gap_that_an_arm_closes():
    entry = {"scratch": {"a": 3.0}, "teacher": {"a": 2.0}, "good": {"a": 2.25}, "better": {"a": 1.9}}
    found = [compare_distill.gap_closed(entry, arm, "a") for arm in ("scratch", "good", "teacher", "better")]
    assert found == pytest.approx([0.0, 0.75, 1.0, 1.1])


def test_steps_are_read_off_a_curve_between_its_lengths():
    curve = {100: 3.0, 400: 2.0, 1600: 1.5}
    assert compare_steps.steps_to(2.5, curve) == pytest.approx(200)  # half way down, half way in log steps
    assert compare_steps.steps_to(2.0, curve) == pytest.approx(400)
    assert compare_steps.steps_to(1.75, curve) == pytest.approx(800)
    assert compare_steps.steps_to(3.0, curve) == 0
    assert compare_steps.steps_to(1.4, curve) == math.inf
    said = [compare_steps.bounded(x, [100, 400, 1600], ".1f", 1 / 200) for x in (0, 300, math.inf)]
    assert said == ["<0.5", "1.5", ">8.0"]


def test_a_teacher_is_paid_back_by_so_many_students():
    assert compare_steps.pays_from(teacher=10, student=1, scratch=4) == 4  # three save 9, four save 12
    assert compare_steps.pays_from(teacher=9, student=1, scratch=4) == 4  # three only break even
    assert compare_steps.pays_from(teacher=2, student=1, scratch=4) == 1
    assert compare_steps.pays_from(teacher=2, student=4, scratch=4) == math.inf
    assert compare_steps.pays_from(teacher=2, student=1, scratch=math.inf) == 1


def test_the_comparison_of_lengths(micro, tmp_path, monkeypatch, capsys):
    where = f"run_dir={tmp_path / 'run'}"
    arms = ["--steps", "6", "3", "--arms", "scratch", "slice, labels alone"]
    assert run_tool(compare_steps, monkeypatch, micro, where, "--seeds", "3", *arms) == 2
    assert "has no rate for scratch, 3 steps, under these settings; run" in capsys.readouterr().err
    assert run_tool(compare_steps, monkeypatch, micro, where, "--tune", *arms[:-1], "slice") == 2
    assert "has no weight for slice; run tools.compare_distill --tune first" in capsys.readouterr().err
    assert run_tool(compare_steps, monkeypatch, micro, where, "--tune", *arms) == 0
    chosen = json.loads((tmp_path / "run" / "steps-tuned.json").read_text()).values()
    rates = {(entry["arm"], entry["steps"]): entry["rate"] for entry in chosen}
    assert list(rates) == [(arm, steps) for arm in ("scratch", "slice, labels alone") for steps in (3, 6)]
    # another recipe has rates of its own
    other = [where, "teacher.steps=9"]
    assert run_tool(compare_steps, monkeypatch, micro, *other, "--seeds", "3", *arms) == 2
    assert "under these settings" in capsys.readouterr().err
    capsys.readouterr()
    picture = tmp_path / "steps.svg"
    assert run_tool(compare_steps, monkeypatch, micro, where, "--seeds", "3", *arms, "--out", picture) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "steps.json").read_text())
    losses, operations = written["losses"]["3"], written["operations"]
    assert operations["6"]["scratch"] == 2 * operations["3"]["scratch"]
    for steps in ("3", "6"):
        loss = losses[steps]["scratch"]["pose"]
        line = f"| scratch | {steps} | {rates['scratch', int(steps)]:g} |"
        [found] = [row for row in said.splitlines() if row.startswith(line)]
        assert f"{loss:.3f} ({loss:.3f}-{loss:.3f})" in found
    # scratch may be followed for longer than the others
    own = ["--steps", "3", "--scratch-steps", "3", "6", "--arms", "scratch", "slice, labels alone"]
    assert run_tool(compare_steps, monkeypatch, micro, where, "--seeds", "3", *own) == 0
    shown = [row for row in said.splitlines() if row.startswith(("| scratch", "| slice"))]
    assert capsys.readouterr().out.count("| slice, labels alone | 6 |") == 0 < len(shown)
    # with its rate, an arm at the recipe's own steps is that of the other comparison
    rate = rates["scratch", 6]
    seed = compare_distill.Seed(micro, [where], 3)
    assert seed.loss("scratch", compare_distill.WEIGHT, rate) == losses["6"]["scratch"]
    drawn = picture.read_text()
    assert drawn.startswith("<svg ")
    assert drawn.count('class="smooth') >= 3
    assert all(f">{name}</text>" in drawn for name in ("scratch", "slice, labels alone", "teacher"))


def test_the_table_tells_what_is_closed_in_the_mean_and_at_least(capsys):
    first = {"teacher": {"a": 2.0}, "scratch": {"a": 3.0}, "slice": {"a": 2.5}}
    second = {"teacher": {"a": 2.0}, "scratch": {"a": 4.0}, "slice": {"a": 2.5}}
    compare_distill.report({0: first, 1: second}, ["scratch", "slice"])
    assert "| slice | 2.500 (2.500-2.500) | 62%; 50% |" in capsys.readouterr().out
