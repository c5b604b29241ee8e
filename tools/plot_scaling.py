"""Held-out loss and perplexity of many runs by model size, real samples and views, as one SVG.

    python tools/plot_scaling.py runs/size-* scaling.svg
    python tools/plot_scaling.py runs/samples-* scaling.svg --model student

A panel for everything that differs between the runs: parameters of the model, real samples of the task,
views of a sample. A point is the mean of the runs that differ in their seed alone, its bar their range. A
line joins the points of a task; where two would share a place, the other two axes tell lines apart. Compare
runs that differ in nothing else.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from delvm.console import table
from delvm.errors import UserError
from delvm.evaluate.charts import Line, chart, short
from delvm.evaluate.runs import grouped, num_parameters, read
from delvm.stages import write_atomic

AXES = {"parameters": "parameters", "samples": "real samples", "views": "views of a sample"}
MEASURES = {"loss": "loss (nats)", "perplexity": "perplexity"}
WIDTH, HEIGHT, KEY = 480, 320, 24  # of a panel, of a line of the key
COLOURS = ("#0072b2", "#d55e00", "#00805d", "#b0568c", "#b07d00", "#2f8fc4")
DASHES = ("none", "7 5", "2 5", "12 4 2 4")  # of the lines of one task
STYLE = """
svg{background:#fff;color:#646a73;font-family:system-ui,sans-serif}text{fill:currentColor;font-size:14px}
.grid{stroke:#e4e2dd}.smooth{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}
.range{stroke:var(--c);stroke-width:5;opacity:.3;stroke-linecap:round}circle{fill:var(--c)}
"""


@dataclass(frozen=True)
class Point:
    """One task of runs that differ in their seed alone."""

    task: str
    parameters: int
    samples: int
    views: int
    scores: dict[str, list[float]]
    """measure -> its value in each run."""


def points(folders: list[Path], model: str) -> list[Point]:
    """Every task of every group of runs.

    Raises:
        UserError: no run, or one without that model's scores.
    """
    found = []
    for runs in grouped(folders):
        recipe = read(runs[0])[0]
        parameters = num_parameters(runs[0], recipe, model)
        metrics = [read(run)[1] for run in runs]
        for run, each in zip(runs, metrics, strict=True):
            if model not in each.get("evaluate", {}) or parameters is None:
                choices = ", ".join(each.get("evaluate", {})) or "none"
                raise UserError(f"{run}: has no scores of '{model}'; models: {choices}")
        for task in metrics[0]["evaluate"][model]:
            entries = [each["evaluate"][model][task] for each in metrics]
            scores = {measure: [entry[measure] for entry in entries] for measure in MEASURES}
            plan = metrics[0]["balance"][task]
            found.append(Point(task, parameters, plan["samples"], plan["views"], scores))
    return found


def series(found: list[Point], axis: str) -> dict[tuple[str, str], list[Point]]:
    """(task, which of its lines) -> points, ascending by `axis`.

    A task has one line, or lines apart by as few of the other axes as leave the fewest points at one place.
    """
    others = [name for name in AXES if name != axis]
    lines: dict[tuple[str, str], list[Point]] = {}
    for task in dict.fromkeys(point.task for point in found):
        points = sorted((p for p in found if p.task == task), key=lambda point: getattr(point, axis))
        ways = ([], others[:1], others[1:], others)
        apart = max(ways, key=lambda way: len({_at(point, [axis, *way]) for point in points}))  # the first
        for point in points:
            which = ", ".join(f"{name} {short(getattr(point, name))}" for name in apart)
            lines.setdefault((task, which), []).append(point)
    return lines


def _at(point: Point, axes: list[str]) -> tuple[int, ...]:
    return tuple(getattr(point, axis) for axis in axes)


def panel(lines: dict[tuple[str, str], list[Point]], axis: str, measure: str, tasks: list[str]) -> Markup:
    """One measure by one axis."""
    drawn = []
    for (task, rest), members in lines.items():
        places = [getattr(point, axis) for point in members]
        values = [point.scores[measure] for point in members]
        means = [sum(each) / len(each) for each in values]
        ranges = [(x, min(y), max(y)) for x, y in zip(places, values, strict=True) if len(y) > 1]
        style = _style(lines, task, rest, tasks)
        name = ", ".join(filter(None, [task, rest]))
        drawn.append(Line(name, style, list(zip(places, means, strict=True)), ranges=ranges, dots=True))
    return chart(drawn, AXES[axis], MEASURES[measure], log_x=True, width=WIDTH, height=HEIGHT)


def _style(lines: dict[tuple[str, str], list[Point]], task: str, rest: str, tasks: list[str]) -> str:
    """A colour a task, a dash a line of it."""
    dash = [key for key in lines if key[0] == task].index((task, rest))
    return f"c{tasks.index(task) % len(COLOURS)} d{dash % len(DASHES)}"


def draw(found: list[Point]) -> str:
    """The SVG: a column an axis on which the runs differ, a row a measure, a key under each column.

    Raises:
        UserError: runs that differ in none.
    """
    tasks = list(dict.fromkeys(point.task for point in found))
    axes = [
        axis for axis in AXES
        if any(len({getattr(p, axis) for p in found if p.task == task}) > 1 for task in tasks)
    ]  # fmt: skip
    if not axes:
        raise UserError(f"the runs differ in none of {', '.join(AXES.values())}")
    columns = [series(found, axis) for axis in axes]
    width, top = len(axes) * (WIDTH + 20), len(MEASURES) * HEIGHT
    height = top + 20 + KEY * max(map(len, columns))
    colours = "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(COLOURS))
    dashes = "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}">\n<style>{STYLE}{colours}{dashes}.range{{stroke-dasharray:none}}</style>'
    ]
    for column, (axis, lines) in enumerate(zip(axes, columns, strict=True)):
        left = column * (WIDTH + 20)
        for row, measure in enumerate(MEASURES):
            svg = panel(lines, axis, measure, tasks)
            place = f'<svg x="{left}" y="{row * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(str(svg).replace("<svg ", place, 1))
        for number, (task, rest) in enumerate(lines):
            y, style = top + 20 + number * KEY, _style(lines, task, rest, tasks)
            name = escape(", ".join(filter(None, [task, rest])))
            parts.append(f'<polyline class="smooth {style}" points="{left + 58},{y} {left + 88},{y}"/>')
            parts.append(f'<text x="{left + 98}" y="{y}" dy=".35em">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(arguments: list[str] | None = None) -> int:
    """Run folders in, SVG and a table out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument(
        "--model", default="teacher", help="teacher, scratch or student; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        found = points(options.runs, options.model)
        write_atomic(options.out, draw(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for p in found:
        losses = p.scores["loss"]
        spread = f" ({min(losses):.3f}-{max(losses):.3f})" if len(losses) > 1 else ""
        said = f"{sum(losses) / len(losses):.3f}{spread}"
        rows.append((p.task, p.parameters, p.samples, p.views, len(losses), said))
    table(f"{options.model}: loss, mean (range) of runs", ["task", *AXES, "runs", "loss"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
