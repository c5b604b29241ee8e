"""Metrics, curves and pictures of runs -> one self-contained HTML page.

Its template is beside this: `report.html`, `report.css`, `report.js`. One run has a page, and so have any
number of runs side by side: those that differ in their seed alone share a row, with mean and range.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from delvm.evaluate.charts import Curve, Line, chart, finite, mean_curve, smooth, window
from delvm.evaluate.comparison import MODELS, headline, losses_of, mean_losses, ordered, shared_tasks
from delvm.evaluate.gallery import PictureRow, extremes, heat_maps, png
from delvm.evaluate.scores import Scored
from delvm.evaluate.tables import Cell, Path, Table, Tree, measure, say, tables

METRICS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "annotation_loss": "loss",
    "annotation_accuracy": "accuracy",
    "annotation_perplexity": "perplexity",
}
_TOKENIZER = {
    "psnr": "reconstruction PSNR",
    "codes_used": "codes in use",
    "codebook_perplexity": "code perplexity",
}
_TOPICS = {
    "examples": "annotations after so many examples",
    "pictures": "pictures drawn",
    "places": "annotation loss by place in the picture",
}
_BALANCE = ("samples", "views", "tokens_before", "tokens_after")
_COMPARED = {"gain": "below scratch", "gap": "gap closed"}
_COLOURS = 6  # that report.css has for groups
_LONG = 30  # rows from which a table is folded
_FEW_EXAMPLES = 3  # numbers of examples from which their losses are drawn as a curve


@dataclass
class Report:
    """What the page shows of a run. Every number on it comes from here; what is empty is left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """(label, value) pairs under the title: seed, sizes, time."""
    balance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """task -> {"samples", "views", "tokens_before", "tokens_after"}."""
    tokenizer: Mapping[str, float] = field(default_factory=dict)
    """{"psnr" in dB, "codes_used" as a fraction or a count, ...}."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """model -> (step, training cross-entropy in nats), steps ascending."""
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """model -> task -> metrics, those of evaluate/likelihood.py first; what is nested has its own tables."""
    pictures: Mapping[str, Sequence[PictureRow]] = field(default_factory=dict)
    """task -> rows of (caption, (H, W, 3) uint8)."""
    scored: Mapping[str, Mapping[str, Scored]] = field(default_factory=dict)
    """task -> model -> what its pictures are worth, those of `pictures` first."""
    tables: Mapping[str, Tree] = field(default_factory=dict)
    """heading -> numbers nested in any way, see evaluate/tables.py."""
    recipe: str = ""
    """The resolved recipe as YAML."""


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Report]
    settings: Mapping[str, str] = field(default_factory=dict)
    """What the recipes of the groups differ in: key -> this group's value."""


def render(report: Report) -> str:
    """The page of one run. Returns and raises as `render_groups`."""
    return render_groups(report.title, [Group(report.title, [report])])


def render_groups(title: str, groups: Sequence[Group]) -> str:
    """The page of runs side by side.

    Any of teacher, student and scratch may be missing; what cannot be compared is then left out. Pictures,
    balance and recipe are those of a group's first run.

    Args:
        title: of the page.
        groups: at least one, of at least one run each, under different names.

    Returns:
        HTML with its style, script, curves (SVG) and pictures (PNG) inside; it loads nothing from elsewhere.

    Raises:
        ValueError: a picture that is not (H, W, 3) uint8.
    """
    assert groups, "no runs"
    assert len({group.name for group in groups}) == len(groups), "groups of one name"
    runs = [run for group in groups for run in group.runs]
    headings = dict.fromkeys(heading for run in runs for heading in run.tables)
    return _page().render(
        title=title,
        facts=runs[0].facts if len(runs) == 1 else (),
        runs=_facts_table(groups) if len(runs) > 1 else None,
        settings=_settings_table(groups),
        result=_result(groups),
        pictures=_pictures(groups),
        scores=_score_tables(groups),
        examples=_example_charts(groups),
        charts=_charts(groups),
        balance=_balance(groups),
        tokenizer=_sections(groups, lambda run: {_TOKENIZER.get(k, k): v for k, v in run.tokenizer.items()}),
        tables={heading: _sections(groups, _tables_of(heading)) for heading in headings},
        recipes=[(group.name, group.runs[0].recipe) for group in groups if group.runs[0].recipe],
    )


# --- the comparison ---


def _result(groups: Sequence[Group]) -> dict[str, Any]:
    """Each group's comparison, over the tasks that all have, or its own where they share none."""
    judged = [group for group in groups if all(losses_of(run.scores) for run in group.runs)]
    common = shared_tasks(losses_of(run.scores) for group in judged for run in group.runs)
    table, found = Table(()), {}
    for group in judged:
        tasks = common or shared_tasks(losses_of(run.scores) for run in group.runs)
        runs = [losses_of(run.scores, tasks) for run in group.runs]
        whole, seeds = headline(mean_losses(runs)), [headline(run) for run in runs]
        if not whole["means"]:
            continue
        cells = {f"{model} loss": Cell([seed["means"][model] for seed in seeds]) for model in whole["means"]}
        if whole["gain"] is not None:
            cells["gain"] = Cell([seed["gain"] for seed in seeds])
        if whole["gap"] is not None:  # of the means: one seed's may be a part of next to nothing
            cells["gap"] = Cell([whole["gap"]])
        table.rows[(group.name,)] = cells
        spreads = {model: say("loss", cells[f"{model} loss"])[1] for model in whole["means"]}
        found[group.name] = whole | {"spreads": spreads}
    models = ordered(dict.fromkeys(model for entry in found.values() for model in entry["means"]))
    headers = {f"{model} loss": MODELS.get(model, model) for model in models}
    headers |= {key: said for key, said in _COMPARED.items() if key in table.columns}
    return {
        "groups": found,
        "tasks": common,
        "seeds": max(len(group.runs) for group in groups),
        "table": _view(table, ["run"], groups, list(headers), headers),
    }


# --- tables ---


def _view(
    table: Table,
    labels: Sequence[str],
    groups: Sequence[Group],
    columns: Sequence[str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A table and its grids as the template shows them.

    labels: what the first parts of a row's name are; that of the run goes where there is one group.
    """
    if "run" in labels and len(groups) == 1:
        at = list(labels).index("run")
        labels = [label for label in labels if label != "run"]
        rows = {row[:at] + row[at + 1 :]: cells for row, cells in table.rows.items()}
        grids = {row[:at] + row[at + 1 :]: grid for row, grid in table.grids.items()}
        table = Table(table.topic, rows, grids)
    keys = table.columns if columns is None else columns
    depth = max(map(len, table.rows), default=0)
    kinds = [*labels, *[""] * depth][:depth]
    # colours tell runs apart, or the models of one
    styles = {"run": _colours(groups)} if "run" in labels else {"model": {model: model for model in MODELS}}
    cells = {row: [_cell(key, cells.get(key, Cell())) for key in keys] for row, cells in table.rows.items()}
    texts = [all(row[place]["sort"] is None for row in cells.values()) for place in range(len(keys))]
    return {
        "spans": [],
        "topic": " · ".join(_TOPICS.get(key, key.replace("_", " ")) for key in table.topic),
        "labels": kinds,
        "keys": keys,
        "headers": [
            ((headers or {}).get(key, key.replace("_", " ")), "l" if text else "")
            for key, text in zip(keys, texts, strict=True)
        ],
        "rows": [
            {
                "name": row,
                "labels": [
                    {"text": MODELS.get(part, part) if kind == "model" else part,
                     "style": styles[kind].get(part, "other") if kind in styles else ""}
                    for kind, part in zip(kinds, [*row, *[""] * depth], strict=False)
                ],
                "cells": cells[row],
            }
            for row in cells
        ],
        "folded": len(cells) > _LONG,
        "grids": [
            (" · ".join(MODELS.get(part, part) for part in row), png(shades), f"{low:.2f} to {high:.2f}")
            for row, (shades, low, high) in heat_maps(table.grids).items()
        ],
    }  # fmt: skip


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    """A CSS class for each group."""
    return {group.name: f"g{place % _COLOURS}" for place, group in enumerate(groups)}


def _cell(key: str, cell: Cell) -> dict[str, Any]:
    text, spread = say(key, cell)
    if key == "gap" and cell.values:
        text = _percent(cell.mean)
    return {
        "text": text,
        "spread": spread,
        "sort": repr(float(cell.mean)) if cell.values else None,
        "best": False,
    }


def _sections(groups: Sequence[Group], part: Callable[[Report], Tree]) -> list[dict[str, Any]]:
    """Tables of a part of the runs, whatever is in it."""
    found = tables({group.name: [part(run) for run in group.runs] for group in groups})
    return [_view(table, ["run"], groups) for table in found]


def _tables_of(heading: str) -> Callable[[Report], Tree]:
    return lambda run: run.tables.get(heading, {})


def _score_tables(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The likelihoods by task, run and model, then what else the scores hold."""
    runs = [run for group in groups for run in group.runs]
    orders = [
        list(
            dict.fromkeys(task for run in runs for model in ordered(run.scores) for task in run.scores[model])
        ),
        [group.name for group in groups],
        ordered(dict.fromkeys(model for run in runs for model in run.scores)),
    ]

    def arranged(rows: Mapping[Path, Any]) -> dict[Path, Any]:
        """(run, model, task, ...) -> (task, run, model, ...), in the order of each."""
        moved = {(*(row[2:3] or ("",)), *row[:2], *row[3:]): value for row, value in rows.items()}
        places = [{name: place for place, name in enumerate(names)} for names in orders]
        first = {
            row: [place.get(part, -1) for place, part in zip(places, row, strict=False)] for row in moved
        }
        return {row: moved[row] for row in sorted(moved, key=lambda row: first[row])}

    views = []
    for table in tables({group.name: [run.scores for run in group.runs] for group in groups}):
        table = Table(table.topic, arranged(table.rows), arranged(table.grids))
        columns = [*METRICS, *(key for key in table.columns if key not in METRICS)]
        view = _view(table, ["task", "run", "model"], groups, None if table.topic else columns, METRICS)
        if not table.topic:
            view["spans"] = [("all codes", 3), ("annotation codes", 3)] + [("", len(columns) - 6)] * (
                len(columns) > 6
            )
            _mark_better(view)
        views.append(view)
    return views


def _mark_better(view: Mapping[str, Any]) -> None:
    """Mark in each metric the better of student and scratch of a task and run."""
    pairs: dict[Path, dict[str, Any]] = {}
    for row in view["rows"]:
        pairs.setdefault(row["name"][:-1], {})[row["name"][-1]] = row["cells"]
    for pair in pairs.values():
        if {"student", "scratch"} <= set(pair):
            for key, student, scratch in zip(view["keys"], pair["student"], pair["scratch"], strict=True):
                if key in METRICS and None not in (student["sort"], scratch["sort"]):
                    ahead = float(student["sort"]) - float(scratch["sort"])
                    if not key.endswith("accuracy"):
                        ahead = -ahead
                    student["best"], scratch["best"] = ahead > 0, ahead < 0


def _facts_table(groups: Sequence[Group]) -> dict[str, Any]:
    """What the runs are: their seeds together, of everything else what the group's runs say."""
    table = Table(())
    for group in groups:
        facts: dict[str, list[str]] = {}
        for run in group.runs:
            for label, value in run.facts:
                facts.setdefault(label, []).append(value)
        table.rows[(group.name,)] = {
            label: Cell(text=", ".join(dict.fromkeys(values))) for label, values in facts.items()
        }
    return _view(table, ["run"], groups)


def _settings_table(groups: Sequence[Group]) -> dict[str, Any]:
    """What the recipes differ in: a row a setting, a column a group."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    rows: dict[Path, dict[str, Cell]] = {
        (key,): {group.name: Cell(text=group.settings.get(key, "")) for group in groups} for key in keys
    }
    return _view(Table((), rows), ["setting"], groups, headers={group.name: group.name for group in groups})


def _balance(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Balance by group, those that are the same once."""
    found: list[dict[str, Any]] = []
    for group in groups:
        balance = group.runs[0].balance
        same = next((entry for entry in found if entry["balance"] == balance), None)
        if same:
            same["runs"].append(group.name)
        elif balance:
            found.append({"runs": [group.name], "balance": balance, "rows": _shares(balance)})
    return found


def _shares(balance: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    totals = {key: sum(row[key] for row in balance.values()) for key in ("tokens_before", "tokens_after")}
    return [
        {
            "task": task,
            "cells": [_cell(key, Cell([row[key]])) for key in _BALANCE],
            "before": row["tokens_before"] / max(totals["tokens_before"], 1),
            "after": row["tokens_after"] / max(totals["tokens_after"], 1),
        }
        for task, row in balance.items()
    ]


# --- pictures and curves ---


def _pictures(groups: Sequence[Group]) -> dict[str, list[dict[str, Any]]]:
    """task -> an entry a group, with the rows to show and those to fold away."""
    tasks = dict.fromkeys(task for group in groups for task in group.runs[0].pictures)
    return {
        task: [
            {
                "run": group.name,
                "shown": [(name, _figures(row)) for name, row in shown],
                "others": [_figures(row) for row in others],
            }
            for group in groups
            if task in group.runs[0].pictures
            for run in group.runs[:1]
            for shown, others in [extremes(run.pictures[task], run.scored.get(task))]
        ]
        for task in tasks
    }


def _figures(row: PictureRow) -> list[tuple[str, str, int]]:
    return [(MODELS.get(caption, caption), png(picture), picture.shape[1]) for caption, picture in row]


def _charts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The models of one group in one chart; of several groups a chart a model."""
    models = ordered(dict.fromkeys(m for group in groups for run in group.runs for m in run.curves))
    if len(groups) == 1:
        series = {"": [(model, model, groups[0]) for model in models]}
    else:
        series = {model: [(group.name, model, group) for group in groups] for model in models}
    charts = []
    for title, entries in series.items():
        curves = {
            name: [finite(run.curves[model]) for run in group.runs if model in run.curves]
            for name, model, group in entries
        }
        curves = {name: [curve for curve in each if curve] for name, each in curves.items()}
        across = window([curve for each in curves.values() for curve in each])
        styles = (
            _colours(groups) if title else {model: model if model in MODELS else "other" for model in models}
        )
        lines = [_line(name, styles[name], each, across) for name, each in curves.items() if each]
        if lines:
            drawn = chart(lines, "step", title=f"{title} loss by step".strip(), from_zero=True)
            found = {"title": MODELS.get(title, title), "svg": drawn, "key": _key(lines), "window": across}
            charts.append(found)
    return charts


def _example_charts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Annotation loss by how many examples stand before; where those are few, the tables say it.

    A chart a task with the models of one group; of several groups a chart a task and model.
    """
    series: dict[str, dict[str, list[Curve]]] = {}
    for group in groups:
        for run in group.runs:
            for model in ordered(run.scores):
                for task, entry in run.scores[model].items():
                    examples = entry.get("examples") if isinstance(entry, Mapping) else None
                    by_number = losses_of({task: examples or {}})
                    if len(by_number.get(task, ())) >= _FEW_EXAMPLES:
                        name: tuple[str, ...] = (task,)
                        if len(groups) > 1:
                            name = (task, MODELS.get(model, model))
                        curve = [(float(number), loss) for number, loss in by_number[task].items()]
                        of_name = series.setdefault(" · ".join(name), {})
                        of_name.setdefault(model if len(groups) == 1 else group.name, []).append(curve)
    colours = {model: model for model in MODELS} if len(groups) == 1 else _colours(groups)
    charts = []
    for title, curves in series.items():
        lines = []
        for each, of_runs in curves.items():
            points = mean_curve(of_runs)
            values = [dict(curve) for curve in of_runs]
            ranges = [(x, min(v[x] for v in values), max(v[x] for v in values)) for x, _ in points]
            lines.append(
                Line(each, colours.get(each, "other"), points,
                     ranges=ranges if len(of_runs) > 1 else (), dots=True)
            )  # fmt: skip
        drawn = chart(lines, "examples before the query", title=f"{title}: annotation loss", from_zero=True)
        charts.append({"title": title, "svg": drawn, "key": _key(lines)})
    return charts


def _key(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Names and colours of a chart's lines, and where they end."""
    return [
        {"name": MODELS.get(line.name, line.name), "style": line.style, "end": line.points[-1][0],
         "value": line.points[-1][1]}
        for line in lines
    ]  # fmt: skip


def _line(name: str, style: str, curves: Sequence[Curve], across: int) -> Line:
    """A run as logged and smoothed, or several as smoothed and their mean."""
    smoothed = [smooth(curve, across) for curve in curves]
    if len(curves) == 1:
        return Line(name, style, smoothed[0], [curves[0]] if across > 1 else [])
    return Line(name, style, mean_curve(smoothed) or smoothed[0], smoothed)


# --- the page ---


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%".replace("-", "−")


def _track(gap: float) -> dict[str, str]:
    """Where scratch (0), the teacher (1) and the student stand on a track, in per cent of its width."""
    low, high = min(0.0, gap), max(1.0, gap)
    at = {"scratch": 0.0, "teacher": 1.0, "student": gap}
    return {model: f"{100 * (place - low) / (high - low):.1f}" for model, place in at.items()}


@cache
def _page() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = "\n" + _beside("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        style=Markup("\n" + _beside("report.css")),  # ours: quotes must not be escaped, nor in the script
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        models=MODELS,
        loss=lambda value: measure("loss", value),
        percent=_percent,
        place=_track,
        signed=lambda value: f"{value:+.3f}".replace("-", "−"),
    )
    return environment.from_string(_beside("report.html"))


def _beside(name: str) -> str:
    return files("delvm.evaluate").joinpath(name).read_text(encoding="utf-8")
