"""One recipe under every balance strategy and several seeds: a table of held-out losses by task.

    python tools/compare_balance.py recipes/balance.yaml tasks.colour.images=DIR ... --seeds 0 1 2
    python tools/compare_balance.py recipes/balance.yaml tasks.colour.images=DIR ... --tune

Every strategy trains the same teacher for the same steps, on the tokenizer of strategy `augment` of the
same seed, and is scored on the same held-out sentences. Every run has a folder of its own: a second call goes
on where the first stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from delvm.console import console, table
from delvm.errors import UserError
from delvm.fit import run
from delvm.recipe import load
from delvm.stages import write_atomic
from delvm.tokens.balance import STRATEGIES

TUNING_SEED = 100  # never one of the table's
# where --tune starts, and what it said last
CHOSEN = {"none": 3.125e-4, "resample": 3.125e-4, "mixture": 3.125e-4, "augment": 1.25e-3}
FIRST = "augment"  # trains the tokenizer that the other strategies of its seed take over


def arm(recipe: Path, overrides: list[str], seed: int, strategy: str, rate: float) -> dict[str, float]:
    """Held-out loss by task of one run. Ends the program where the run ends badly."""
    root = Path(load(recipe, overrides).run_dir) / f"seed{seed}"
    folder = root / f"{strategy}-{rate:g}"
    own = [
        f"seed={seed}",
        f"run_dir={folder}",
        f"balance.strategy={strategy}",
        f"teacher.learning_rate={rate}",
    ]
    own += ["student=null", "scratch=null"]
    tokenizer = root / f"{FIRST}-{CHOSEN[FIRST]:g}" / "tokenizer"
    if folder != tokenizer.parent:
        own.append(f"tokenizer.folder={tokenizer}")
    if status := run(recipe, [*overrides, *own]):
        sys.exit(status)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {task: scores["loss"] for task, scores in metrics["evaluate"]["teacher"].items()}


def tune(recipe: Path, overrides: list[str]) -> None:
    """Print the losses of every strategy on the tuning seed, at rates around its best."""
    rows: list[tuple[str, ...]] = []
    tasks: list[str] = []
    for strategy in sorted(STRATEGIES, key=lambda strategy: strategy != FIRST):
        tried: dict[float, dict[str, float]] = {}
        best = CHOSEN[strategy]
        while missing := [rate for rate in (best, best / 2, best * 2) if rate not in tried]:
            tried[missing[0]] = arm(recipe, overrides, TUNING_SEED, strategy, missing[0])
            best = min(tried, key=lambda rate: statistics.mean(tried[rate].values()))
        for rate, losses in sorted(tried.items()):
            tasks = list(losses)
            mean = statistics.mean(losses.values())
            rows.append((strategy, f"{rate:g}", *(f"{x:.3f}" for x in losses.values()), f"{mean:.3f}"))
    table("tuning", ["strategy", "rate", *tasks, "mean"], rows)


def report(scores: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print mean and range by strategy, then how far `augment` lies below the others, seed by seed."""
    tasks = list(next(iter(scores.values()))[FIRST])
    rows = []
    for strategy in STRATEGIES:
        cells = []
        for task in tasks:
            losses = [entry[strategy][task] for entry in scores.values()]
            cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})")
        rows.append((strategy, *cells))
    table(f"held-out loss in nats, mean (range) of {len(scores)} seeds", ["strategy", *tasks], rows)
    for strategy in (name for name in STRATEGIES if name != FIRST):
        for task in tasks:
            gaps = [entry[strategy][task] - entry[FIRST][task] for entry in scores.values()]
            # both arms of a seed share tokenizer and sentences: what counts is how the gap varies
            spread = max(gaps) - min(gaps)
            beyond = "beyond" if abs(statistics.mean(gaps)) > spread else "within"
            each = ", ".join(f"{gap:+.3f}" for gap in gaps)
            console.print(
                f"{FIRST} below {strategy} on {task}: {statistics.mean(gaps):+.3f} ({each}),"
                f" {beyond} the seeds' spread of {spread:.3f}"
            )


def main() -> int:
    """Arguments in, tables out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="every learning rate, on a seed apart")
    options = parser.parse_intermixed_args()
    try:
        recipe = load(options.recipe, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.tune:
        tune(options.recipe, options.overrides)
        return 0
    order = sorted(STRATEGIES, key=lambda strategy: strategy != FIRST)
    scores = {
        seed: {s: arm(options.recipe, options.overrides, seed, s, CHOSEN[s]) for s in order}
        for seed in options.seeds
    }
    write_atomic(Path(recipe.run_dir) / "balance.json", json.dumps(scores, indent=1) + "\n")
    report(scores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
