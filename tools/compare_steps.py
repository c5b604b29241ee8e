"""What a start is worth in steps and in compute: one student's held-out loss by the length of its training.

    python -m tools.compare_steps recipes/claims.yaml --tune [--steps 100 200 400 800 1600]
    python -m tools.compare_steps recipes/claims.yaml --seeds 10 11 12 --out steps.svg

Every training has its own schedule over its own length. The weight of the teacher's term is the one that
`compare_distill --tune` found at the recipe's own steps; --tune brackets the learning rate of every arm at
every length, on a seed apart. Data, tokenizer and teacher are `compare_distill`'s, and what is done is kept.

A table of losses; a table of the steps that scratch takes to each loss, read off between its own lengths on
log steps, with the number of students of one teacher from which on the teacher's whole cost is paid back.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from delvm import recipe as recipes
from delvm.console import console
from delvm.errors import UserError
from delvm.evaluate.charts import Line, chart
from delvm.stages import write_atomic
from delvm.training import Interrupted, NotFinite
from tools.compare_distill import ARMS, TUNED_AS, TUNING_SEED, WEIGHT, Seed, bracket, gap_closed, tuned_key

LENGTHS = [100, 200, 400, 800, 1600]
SHOWN = ["scratch", "forward_kl", "slice", "slice, labels alone"]
COLOURS = ("#646a73", "#d55e00", "#0072b2", "#00805d", "#b0568c", "#b07d00")
STYLE = """
svg{background:#fff;color:#646a73;font-family:system-ui,sans-serif}text{fill:currentColor;font-size:14px}
.grid{stroke:#e4e2dd}.smooth{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}
.range{stroke:var(--c);stroke-width:5;opacity:.3;stroke-linecap:round}circle{fill:var(--c)}
"""
Losses = dict[int, dict[str, dict[str, float]]]
"""Steps -> arm -> task -> loss, of one seed; the teacher's stand at 0."""


def steps_to(loss: float, curve: dict[int, float]) -> float:
    """Steps after which a curve (steps -> loss) is down at `loss`, between two lengths linear in log steps.

    0 where the shortest training is there already, infinity where none is.
    """
    lengths = sorted(curve)
    if curve[lengths[0]] <= loss:
        return 0.0
    for short, long in pairwise(lengths):
        if curve[long] <= loss:
            part = (curve[short] - loss) / (curve[short] - curve[long])
            return short * (long / short) ** part
    return math.inf


def pays_from(teacher: float, student: float, scratch: float) -> float:
    """How many students of one teacher cost less than as many from scratch; infinity where none do."""
    return math.floor(teacher / (scratch - student)) + 1 if scratch > student else math.inf


def tune(given: tuple[Path, list[str]], lengths: Sequence[int], arms: list[str], file: Path) -> None:
    """Write down the best rate of every arm at every length; the next length starts from there."""
    chosen = json.loads(file.read_text()) if file.exists() else {}
    weights = weights_of(*given, arms)
    for arm in arms:
        rate = 5e-3
        for length in lengths:
            key = rate_key(arm, length)
            if key not in chosen:
                seed = Seed(given[0], [*given[1], f"student.steps={length}"], TUNING_SEED)

                def mean(rate: float, arm: str = arm, seed: Seed = seed) -> float:
                    try:
                        return statistics.mean(seed.loss(arm, weights[arm], rate).values())
                    except NotFinite as error:
                        console.print(str(error))
                        return math.inf

                found = bracket(mean, rate, 2.0)
                # another process may have added its own meanwhile
                chosen = json.loads(file.read_text()) if file.exists() else {}
                chosen[key] = found
                write_atomic(file, json.dumps(chosen, indent=1) + "\n")
            rate = chosen[key]


def rate_key(arm: str, length: int) -> str:
    """Of the file of rates."""
    return f"{arm}, {length} steps"


def weights_of(recipe_file: Path, overrides: list[str], arms: list[str]) -> dict[str, float]:
    """The weight of each arm's KD term, as `compare_distill --tune` chose it; scratch's is not used.

    Raises:
        UserError: an arm that was not tuned.
    """
    recipe = recipes.load(recipe_file, overrides)
    file = Path(recipe.run_dir) / "distill-tuned.json"
    chosen = json.loads(file.read_text()) if file.exists() else {}
    weights = {}
    for arm in arms:
        entry = chosen.get(tuned_key(recipe, TUNED_AS.get(arm, arm)))
        if entry is None and ARMS[arm].get("kd_weight") != 0:
            raise UserError(f"{file}: has no weight for {arm}; run tools.compare_distill --tune first")
        weights[arm] = entry["weight"] if entry else WEIGHT
    return weights


def measure(
    given: tuple[Path, list[str]],
    lengths: Sequence[int],
    arms: list[str],
    rates: dict[str, float],
    number: int,
) -> tuple[Losses, dict[int, dict[str, float]]]:
    """Losses, and operations by steps and arm, of one seed; both have the teacher's at 0."""
    losses: Losses = {}
    operations: dict[int, dict[str, float]] = {}
    weights = weights_of(*given, arms)
    for length in lengths:
        seed = Seed(given[0], [*given[1], f"student.steps={length}"], number)
        if 0 not in losses:
            losses[0] = {"teacher": seed.teacher_loss()}
            operations[0] = {"teacher": seed.operations("teacher")}
        losses[length] = {arm: seed.loss(arm, weights[arm], rates[rate_key(arm, length)]) for arm in arms}
        operations[length] = {arm: seed.operations(arm) for arm in arms}
    return losses, operations


def mean_of(entry: dict[str, float]) -> float:
    """Of the tasks."""
    return statistics.mean(entry.values())


def report(
    seeds: dict[int, Losses], operations: dict[int, dict[str, float]], rates: dict[str, float]
) -> None:
    """Print both tables as Markdown."""
    first = next(iter(seeds.values()))
    lengths = [length for length in first if length]
    arms = list(first[lengths[0]])
    tasks = list(first[0]["teacher"])
    heads = ["arm", "steps", "rate", *tasks, "mean of tasks", "gap closed, mean (least of a task and seed)"]
    print(f"held-out loss in nats, mean (range) of {len(seeds)} seeds\n")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    print(row(["teacher", "", ""], [losses[0]["teacher"] for losses in seeds.values()], []))
    for arm in arms:
        for length in lengths:
            entries = [losses[length][arm] for losses in seeds.values()]
            closed = []
            if "scratch" in arms:
                both = [{**losses[0], **losses[length]} for losses in seeds.values()]
                closed = [gap_closed(entry, arm, task) for entry in both for task in tasks]
            print(row([arm, str(length), f"{rates[rate_key(arm, length)]:g}"], entries, closed))
    if "scratch" not in arms:
        return
    print("\nsteps of scratch to the same mean loss, and students from which on the teacher is paid back\n")
    print("| arm | steps | scratch takes, by seed | times | pays from |\n|---|---|---|---|---|")
    curves = {n: {k: mean_of(losses[k]["scratch"]) for k in lengths} for n, losses in seeds.items()}
    for arm in arms:
        for length in lengths if arm != "scratch" else []:
            needed = [steps_to(mean_of(losses[length][arm]), curves[n]) for n, losses in seeds.items()]
            per_step = operations[length]["scratch"] / length
            cost = operations[length][arm]
            pays = [pays_from(operations[0]["teacher"], cost, steps * per_step) for steps in needed]
            said = [", ".join(bounded(x, lengths, ".0f") for x in needed)]
            said.append(", ".join(bounded(x, lengths, ".1f", 1 / length) for x in needed))
            said.append(", ".join(payback(p, x, lengths) for p, x in zip(pays, needed, strict=True)))
            print(f"| {arm} | {length} | {' | '.join(said)} |")
    teacher, per = operations[0]["teacher"], operations[lengths[-1]]["scratch"] / lengths[-1]
    print(f"\nthe teacher's training: as many operations as {teacher / per:,.0f} steps of scratch")


def bounded(value: float, lengths: Sequence[int], form: str, scale: float = 1.0) -> str:
    """A number of steps, where the curve says it: else below the shortest or above the longest."""
    if value == 0:
        return f"<{lengths[0] * scale:{form}}"
    return f">{lengths[-1] * scale:{form}}" if value == math.inf else f"{value * scale:{form}}"


def payback(students: float, needed: float, lengths: Sequence[int]) -> str:
    """A number of students; where scratch never gets there, one is enough."""
    if needed == math.inf:
        return "1"
    return "never" if students == math.inf else f"{students:.0f}"


def row(cells: list[str], entries: list[dict[str, float]], closed: list[float]) -> str:
    """One line of the first table."""
    columns = [[entry[task] for entry in entries] for task in entries[0]]
    columns.append([mean_of(entry) for entry in entries])
    cells += [f"{statistics.mean(c):.3f} ({min(c):.3f}-{max(c):.3f})" for c in columns]
    closed = [share + 0.0 for share in closed]  # no -0%
    cells.append(f"{statistics.mean(closed):.0%} ({min(closed):.0%})" if closed else "")
    return f"| {' | '.join(cells)} |"


def draw(seeds: dict[int, Losses]) -> str:
    """The SVG: the mean loss of the tasks by steps, an arm a line, bars from seed to seed."""
    first = next(iter(seeds.values()))
    lengths = [length for length in first if length]
    lines = []
    for number, arm in enumerate(first[lengths[0]]):
        values = {k: [mean_of(losses[k][arm]) for losses in seeds.values()] for k in lengths}
        means = [(float(k), statistics.mean(v)) for k, v in values.items()]
        ranges = [(float(k), min(v), max(v)) for k, v in values.items()]
        lines.append(Line(arm, f"c{number}", means, ranges=ranges, dots=True))
    teacher = statistics.mean(mean_of(losses[0]["teacher"]) for losses in seeds.values())
    lines.append(Line("teacher", "teacher", [(float(k), teacher) for k in (lengths[0], lengths[-1])]))
    svg = chart(lines, "steps", "loss (nats)", log_x=True, width=640, height=380)
    names = [line.name for line in lines]
    key = "".join(
        f'<line x1="70" x2="100" y1="{390 + 22 * i}" y2="{390 + 22 * i}" class="smooth {line.style}"/>'
        f'<text x="110" y="{395 + 22 * i}">{Markup.escape(name)}</text>'
        for i, (name, line) in enumerate(zip(names, lines, strict=True))
    )
    colours = "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(COLOURS))
    height = 400 + 22 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}">'
        f"<style>{STYLE}{colours}.teacher{{--c:#1c1e21;stroke-dasharray:7 5}}</style>{svg}{key}</svg>\n"
    )


def main() -> int:
    """Arguments in, tables and a picture out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=SHOWN, metavar="ARM")
    parser.add_argument(
        "--tune", action="store_true", help="the rate of every arm and length, on a seed apart"
    )
    parser.add_argument("--out", type=Path, help="SVG of loss by steps")
    options = parser.parse_intermixed_args()
    given, lengths = (options.recipe, options.overrides), sorted(options.steps)
    try:
        root = Path(recipes.load(*given).run_dir)
        file = root / "steps-tuned.json"
        if options.tune:
            tune(given, lengths, options.arms, file)
            return 0
        rates = json.loads(file.read_text()) if file.exists() else {}
        wanted = [rate_key(arm, length) for arm in options.arms for length in lengths]
        if missing := [key for key in wanted if key not in rates]:
            raise UserError(f"{file}: has no rate for {missing[0]}; run --tune first")
        seeds: dict[int, Losses] = {}
        operations: dict[int, dict[str, float]] = {}
        for number in options.seeds:
            seeds[number], operations = measure(given, lengths, options.arms, rates, number)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    write_atomic(
        root / "steps.json", json.dumps({"losses": seeds, "operations": operations}, indent=1) + "\n"
    )
    report(seeds, operations, rates)
    if options.out:
        write_atomic(options.out, draw(seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
