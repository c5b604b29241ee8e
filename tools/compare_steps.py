"""What a start is worth in steps and in compute: one student's held-out loss by the length of its training.

    python -m tools.compare_steps recipes/claims.yaml --tune
    python -m tools.compare_steps recipes/claims.yaml --seeds 10 11 12 --out steps.svg
    python -m tools.compare_steps recipes/claims.yaml ... --steps 100 200 --scratch-steps 200 400 800

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
from tools.compare_distill import ARMS, TUNED_AS, TUNING_SEED, WEIGHT, Seed, bracket, keep, tuned_key
from tools.plot_scaling import STYLE

LENGTHS = [100, 200, 400, 800, 1600]
SHOWN = ["scratch", "forward_kl", "slice", "slice, labels alone"]
COLOURS = ("#646a73", "#d55e00", "#0072b2", "#00805d", "#b0568c", "#b07d00")
Rates = dict[tuple[str, int], float]
"""Of arm and steps."""
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
    """How many students of one teacher cost less than as many from scratch; infinity where none do.

    One where `scratch` is infinite: it never gets there.
    """
    return math.floor(teacher / (scratch - student)) + 1 if scratch > student else math.inf


def tune(given: tuple[Path, list[str]], lengths: dict[str, list[int]], file: Path) -> None:
    """Write down the best rate of every arm at every length; the next length starts from there."""
    chosen = json.loads(file.read_text()) if file.exists() else {}
    weights = weights_of(*given, list(lengths))
    for arm in lengths:
        rate = 5e-3
        for length in lengths[arm]:
            key = rate_key(*given, arm, length)
            if key not in chosen:
                seed = Seed(*at(*given, length), TUNING_SEED)

                def mean(rate: float, arm: str = arm, seed: Seed = seed) -> float:
                    try:
                        return statistics.mean(seed.loss(arm, weights[arm], rate).values())
                    except NotFinite as error:
                        console.print(str(error))
                        return math.inf

                chosen[key] = {"arm": arm, "steps": length, "rate": bracket(mean, rate, 2.0)}
                keep(file, {key: chosen[key]})
            rate = chosen[key]["rate"]


def at(recipe_file: Path, overrides: list[str], length: int) -> tuple[Path, list[str]]:
    """The recipe with a student of so many steps."""
    return recipe_file, [*overrides, f"student.steps={length}"]


def rate_key(recipe_file: Path, overrides: list[str], arm: str, length: int) -> str:
    """Of the file of rates: of all that the best one depends on but the seed."""
    return f"{arm}, {length} steps, {tuned_key(recipes.load(*at(recipe_file, overrides, length)), arm)}"


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
    given: tuple[Path, list[str]], lengths: dict[str, list[int]], rates: Rates, number: int
) -> tuple[Losses, dict[int, dict[str, float]]]:
    """Losses, and operations by steps and arm, of one seed; both have the teacher's at 0."""
    losses: Losses = {}
    operations: dict[int, dict[str, float]] = {}
    weights = weights_of(*given, list(lengths))
    for length in sorted({length for own in lengths.values() for length in own}):
        seed = Seed(*at(*given, length), number)
        if 0 not in losses:
            losses[0] = {"teacher": seed.teacher_loss()}
            operations[0] = {"teacher": seed.operations("teacher")}
        arms = [arm for arm, own in lengths.items() if length in own]
        losses[length] = {arm: seed.loss(arm, weights[arm], rates[arm, length]) for arm in arms}
        operations[length] = {arm: seed.operations(arm) for arm in arms}
    return losses, operations


def mean_of(entry: dict[str, float]) -> float:
    """Of the tasks."""
    return statistics.mean(entry.values())


def report(seeds: dict[int, Losses], operations: dict[int, dict[str, float]], rates: Rates) -> None:
    """Print both tables as Markdown."""
    first = next(iter(seeds.values()))
    tasks = list(first[0]["teacher"])
    heads = ["arm", "steps", "rate", *tasks, "mean of tasks"]
    print(f"held-out loss in nats, mean (range) of {len(seeds)} seeds\n")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    print(row(["teacher", "", ""], [losses[0]["teacher"] for losses in seeds.values()]))
    lengths = lengths_in(first)
    for arm, own in lengths.items():
        for length in own:
            entries = [losses[length][arm] for losses in seeds.values()]
            print(row([arm, str(length), f"{rates[arm, length]:g}"], entries))
    if "scratch" not in lengths:
        return
    print("\nsteps of scratch to the same mean loss, and students from which on the teacher is paid back\n")
    print("| arm | steps | scratch takes, by seed | times | pays from |\n|---|---|---|---|---|")
    known = lengths.pop("scratch")
    curves = {n: {k: mean_of(losses[k]["scratch"]) for k in known} for n, losses in seeds.items()}
    per_step, teacher = operations[known[0]]["scratch"] / known[0], operations[0]["teacher"]
    for arm, own in lengths.items():
        for length in own:
            needed = [steps_to(mean_of(losses[length][arm]), curves[n]) for n, losses in seeds.items()]
            cost = operations[length][arm]
            pays = [pays_from(teacher, cost, x * per_step) for x in needed]
            said = ", ".join("never" if number == math.inf else str(number) for number in pays)
            steps, times = (
                ", ".join(bounded(x, known, form, scale) for x in needed)
                for form, scale in ((".0f", 1.0), (".1f", 1 / length))
            )
            print(f"| {arm} | {length} | {steps} | {times} | {said} |")
    print(f"\nthe teacher's training: as many operations as {teacher / per_step:,.0f} steps of scratch")


def lengths_in(losses: Losses) -> dict[str, list[int]]:
    """Arm -> the lengths that it was trained for, ascending."""
    arms = dict.fromkeys(arm for length in sorted(losses, reverse=True) if length for arm in losses[length])
    return {arm: [length for length in sorted(losses) if length and arm in losses[length]] for arm in arms}


def bounded(value: float, lengths: Sequence[int], form: str, scale: float = 1.0) -> str:
    """A number of steps, where the curve says it: else below the shortest or above the longest."""
    if value == 0:
        return f"<{lengths[0] * scale:{form}}"
    return f">{lengths[-1] * scale:{form}}" if value == math.inf else f"{value * scale:{form}}"


def row(cells: list[str], entries: list[dict[str, float]]) -> str:
    """One line of the first table."""
    columns = [[entry[task] for entry in entries] for task in entries[0]]
    columns.append([mean_of(entry) for entry in entries])
    cells += [f"{statistics.mean(c):.3f} ({min(c):.3f}-{max(c):.3f})" for c in columns]
    return f"| {' | '.join(cells)} |"


def draw(seeds: dict[int, Losses]) -> str:
    """The SVG: the mean loss of the tasks by steps, an arm a line, bars from seed to seed."""
    lengths = lengths_in(next(iter(seeds.values())))
    lines = []
    for number, (arm, own) in enumerate(lengths.items()):
        values = {float(k): [mean_of(losses[k][arm]) for losses in seeds.values()] for k in own}
        means = [(k, statistics.mean(v)) for k, v in values.items()]
        ranges = [(k, min(v), max(v)) for k, v in values.items()]
        lines.append(Line(arm, f"c{number}", means, ranges=ranges, dots=True))
    teacher = statistics.mean(mean_of(losses[0]["teacher"]) for losses in seeds.values())
    ends = [end(own) for end in (min, max) for own in lengths.values()]
    lines.append(Line("teacher", "teacher", [(float(k), teacher) for k in (min(ends), max(ends))]))
    svg = chart(lines, "steps", "loss (nats)", log_x=True, width=640, height=380)
    svg = str(svg).replace("<svg ", '<svg x="0" y="0" width="640" height="380" ', 1)
    names = [line.name for line in lines]
    key = "".join(
        f'<line x1="70" x2="100" y1="{396 + 22 * i}" y2="{396 + 22 * i}" class="smooth {line.style}"/>'
        f'<text x="110" y="{401 + 22 * i}">{Markup.escape(name)}</text>'
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
    parser.add_argument("--scratch-steps", type=int, nargs="+", help="scratch's own; default: the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=SHOWN, metavar="ARM")
    parser.add_argument(
        "--tune", action="store_true", help="the rate of every arm and length, on a seed apart"
    )
    parser.add_argument("--out", type=Path, help="SVG of loss by steps")
    options = parser.parse_intermixed_args()
    given = options.recipe, options.overrides
    lengths = {arm: sorted(options.steps) for arm in options.arms}
    if "scratch" in lengths and options.scratch_steps:
        lengths["scratch"] = sorted(options.scratch_steps)
    try:
        root = Path(recipes.load(*given).run_dir)
        file = root / "steps-tuned.json"
        if options.tune:
            tune(given, lengths, file)
            return 0
        chosen = json.loads(file.read_text()) if file.exists() else {}
        keys = {(arm, length): rate_key(*given, arm, length) for arm in lengths for length in lengths[arm]}
        for (arm, length), key in keys.items():
            if key not in chosen:
                raise UserError(
                    f"{file}: has no rate for {arm}, {length} steps, under these settings; run --tune first"
                )
        rates = {place: chosen[key]["rate"] for place, key in keys.items()}
        seeds: dict[int, Losses] = {}
        operations: dict[int, dict[str, float]] = {}
        for number in options.seeds:
            seeds[number], operations = measure(given, lengths, rates, number)
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
