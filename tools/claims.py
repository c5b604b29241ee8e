"""Variants of one recipe, several seeds, two tables: what balance and what the teacher are worth.

    python tools/claims.py recipes/claims.yaml --seeds 10 11 12
    python tools/claims.py recipes/claims.yaml --tune

Every variant is a run of `delvm.fit` in a folder of its own: a second call goes on where the first stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from delvm.console import table
from delvm.errors import UserError
from delvm.fit import run
from delvm.recipe import load
from delvm.stages import write_atomic

BALANCES = ("none", "resample", "augment")
STEPS, BATCH_SIZE = 600, 8  # of a balance arm: too few hide that re-sampling overfits
LEARNING_RATES = {"none": 1.25e-3, "resample": 6e-4, "augment": 5e-3}  # chosen by --tune, see docs/claims.md
TUNING_SEED = 100  # never one of the table's
GRID = {
    "none": (6e-4, 1.25e-3, 2.5e-3, 5e-3),
    "resample": (3e-4, 6e-4, 1.25e-3, 2.5e-3, 5e-3),  # the lower, the less it overfits
    "augment": (2.5e-3, 5e-3, 1e-2),
    "teacher": (1.5e-3, 3e-3, 6e-3),
    "students": (2.5e-3, 5e-3, 1e-2),
}
KD_WEIGHTS = (1.0, 2.0, 4.0, 8.0)  # CE has 1

CODES_USED = 0.9  # least fraction
# (better arm, worse arm, {task: least difference of the mean loss})
GATES = (
    ("augment", "none", {"segmentation": -0.20, "deraining": 0.30, "pose": 0.15}),
    ("augment", "resample", {"segmentation": 0.10, "deraining": 0.40, "pose": 0.30}),
    ("distilled", "scratch", {"segmentation": 0.03, "deraining": 0.10, "pose": 0.03}),
)


def fit(recipe: Path, overrides: list[str]) -> dict:
    """Run one variant; its scores, `{model: {task: metrics}}`. Ends the program where the run ends badly."""
    if status := run(recipe, overrides):
        sys.exit(status)
    metrics = json.loads((Path(load(recipe, overrides).run_dir) / "metrics.json").read_text())
    used, codes = metrics["tokenizer"]["codes_used"], load(recipe, overrides).tokenizer.num_codes
    if used < CODES_USED * codes:
        sys.exit(f"{used} of {codes} codes in use, {CODES_USED:.0%} are the least")
    return metrics["evaluate"]


def balance_arm(recipe: Path, root: Path, seed: int, strategy: str, learning_rate: float) -> dict:
    """The student's size trained from labels alone under one strategy; `{task: metrics}`."""
    student = load(recipe).student
    assert student is not None
    overrides = [
        f"seed={seed}", f"run_dir={root}/seed{seed}/{strategy}-{learning_rate:g}",
        f"balance.strategy={strategy}", f"tokenizer.folder={root}/seed{seed}/main/tokenizer",
        "student=null", "scratch=null", f"teacher.size={student.size}", f"teacher.steps={STEPS}",
        f"teacher.batch_size={BATCH_SIZE}", f"teacher.learning_rate={learning_rate}", "teacher.warmup=0.3",
    ]  # fmt: skip
    return fit(recipe, overrides)["teacher"]


def teacher_arm(recipe: Path, root: Path, seed: int, learning_rate: float) -> dict:
    """The teacher alone, beside the tokenizer of the main run; `{task: metrics}`."""
    overrides = [
        f"seed={seed}", f"run_dir={root}/seed{seed}/teacher-{learning_rate:g}",
        f"tokenizer.folder={root}/seed{seed}/main/tokenizer", "student=null", "scratch=null",
        f"teacher.learning_rate={learning_rate}",
    ]  # fmt: skip
    return fit(recipe, overrides)["teacher"]


def main_run(recipe: Path, root: Path, seed: int, *overrides: str) -> dict:
    """Tokenizer, teacher, scratch and distilled student under `augment`."""
    return fit(recipe, [f"seed={seed}", f"run_dir={root}/seed{seed}/main", *overrides])


def arms(recipe: Path, root: Path, seed: int) -> dict[str, dict]:
    """Every arm of one seed: `{arm: {task: metrics}}`."""
    scores = main_run(recipe, root, seed)
    result = {s: balance_arm(recipe, root, seed, s, LEARNING_RATES[s]) for s in BALANCES}
    return result | {
        "teacher": scores["teacher"],
        "scratch": scores["scratch"],
        "distilled": scores["student"],
    }


def tune(recipe: Path, root: Path) -> None:
    """Print the held-out loss of every arm at every learning rate or weight, on the tuning seed.

    One teacher serves all rates of the students, which are therefore trained anew in each call.
    """
    found = []
    for rate in GRID["students"]:
        rates = (f"scratch.learning_rate={rate}", f"student.learning_rate={rate}")
        scores = main_run(recipe, root, TUNING_SEED, *rates)
        found += [("scratch", rate, scores["scratch"]), ("distilled", rate, scores["student"])]
    student = load(recipe).student
    assert student is not None
    for weight in KD_WEIGHTS:
        scores = main_run(recipe, root, TUNING_SEED, f"student.kd_weight={weight}")
        found.append((f"distilled, weight {weight:g}", student.learning_rate, scores["student"]))
    for rate in GRID["teacher"]:
        found.append(("teacher", rate, teacher_arm(recipe, root, TUNING_SEED, rate)))
    for strategy in BALANCES:
        for rate in GRID[strategy]:
            found.append((strategy, rate, balance_arm(recipe, root, TUNING_SEED, strategy, rate)))
    rows = []
    for arm, rate, tasks in found:
        losses = [entry["loss"] for entry in tasks.values()]
        rows.append((arm, f"{rate:g}", *(f"{x:.3f}" for x in losses), f"{statistics.mean(losses):.3f}"))
    table("tuning", ["arm", "rate", *load(recipe).tasks, "mean"], rows)


def report(scores: dict[int, dict[str, dict]], tasks: list[str]) -> bool:
    """Print mean and range by arm, then the gates; whether all hold."""
    names = list(next(iter(scores.values())))
    losses = {a: {t: [entry[a][t]["loss"] for entry in scores.values()] for t in tasks} for a in names}
    rows = [
        (
            a,
            *(
                f"{statistics.mean(losses[a][t]):.3f} ({min(losses[a][t]):.3f}-{max(losses[a][t]):.3f})"
                for t in tasks
            ),
        )
        for a in names
    ]
    table(f"held-out loss in nats, mean (range) of {len(scores)} seeds", ["arm", *tasks], rows)
    gates, held = [], True
    for better, worse, least in GATES:
        for task, bar in least.items():
            gaps = [w - b for b, w in zip(losses[better][task], losses[worse][task], strict=True)]
            # distillation must win in every seed; balance in the mean
            holds = statistics.mean(gaps) >= bar and (better != "distilled" or min(gaps) > 0)
            held &= holds
            gates.append((f"{better} below {worse}", task, f"{statistics.mean(gaps):+.3f}", f"{bar:+.2f}",
                          "yes" if holds else "NO"))  # fmt: skip
    table("gates", ["claim", "task", "difference", "at least", "holds"], gates)
    return held


def main() -> int:
    """Run, print, and return 0 if every gate holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--tune", action="store_true", help="choose learning rates on a seed apart")
    options = parser.parse_args()
    try:
        recipe = load(options.recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    root = Path(recipe.run_dir)
    if options.tune:
        tune(options.recipe, root)
        return 0
    scores = {seed: arms(options.recipe, root, seed) for seed in options.seeds}
    write_atomic(root / "claims.json", json.dumps(scores, indent=1) + "\n")
    return 0 if report(scores, list(recipe.tasks)) else 1


if __name__ == "__main__":
    sys.exit(main())
