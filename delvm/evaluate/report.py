"""Metrics, curves and pictures -> one self-contained HTML page (`report.html`, `report.css` beside this)."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

Curve = Sequence[tuple[int, float]]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
PictureRow = Sequence[tuple[str, np.ndarray]]

MODELS = {"teacher": "teacher", "student": "distilled", "scratch": "from scratch"}
"""The models the page knows by name, in the order they are shown; others follow under their own names."""

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


@dataclass
class Report:
    """What the page shows. Every number on it comes from here; what is empty is left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """(label, value) pairs under the title: seed, sizes, time."""
    balance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """task -> {"samples", "views", "tokens_before", "tokens_after"}."""
    tokenizer: Mapping[str, float] = field(default_factory=dict)
    """{"psnr" in dB, "codes_used" as a fraction or a count, ...}."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """model -> (step, training cross-entropy in nats), steps ascending."""
    scores: Scores = field(default_factory=dict)
    """model -> task -> metrics, as evaluate/likelihood.py gives them."""
    pictures: Mapping[str, Sequence[PictureRow]] = field(default_factory=dict)
    """task -> rows of (caption, (H, W, 3) uint8)."""
    recipe: str = ""
    """The resolved recipe as YAML."""


def render(report: Report) -> str:
    """The page: HTML with its style, curves (SVG) and pictures (PNG) inside; it loads nothing from elsewhere.

    Any of teacher, student and scratch may be missing; what cannot be compared is then left out. Raises
    ValueError for a picture that is not (H, W, 3) uint8.
    """
    return _page().render(
        report=report,
        headline=headline(report.scores),
        balance=_balance(report.balance),
        tokenizer=[
            (_TOKENIZER.get(key, key), _measure(key, value)) for key, value in report.tokenizer.items()
        ],
        chart=_chart(report.curves),
        table=_table(report.scores),
        pictures={
            task: [
                [(MODELS.get(caption, caption), _png(picture), picture.shape[1]) for caption, picture in row]
                for row in rows
            ]
            for task, rows in report.pictures.items()
        },
    )


# --- the comparison ---


def gap_closed(scratch: float, student: float, teacher: float) -> float | None:
    """How far the student is on the way from scratch's loss (0) to the teacher's (1).

    Negative where it is worse than scratch, above 1 where it beats the teacher; None where the teacher is no
    better than scratch, so that there is no gap to close.
    """
    return (scratch - student) / (scratch - teacher) if teacher < scratch else None


def headline(scores: Scores) -> dict[str, Any]:
    """The comparison in short.

    Returns {"means": model -> mean loss over the tasks all models have, "gain": scratch's mean loss minus the
    student's or None, "gap": the part of the gap closed or None, "tasks": task -> {"gain", "gap", "losses"}}.
    """
    by_model = {model: {task: m["loss"] for task, m in scores[model].items()} for model in _ordered(scores)}
    tasks = [t for t in next(iter(by_model.values()), {}) if all(t in losses for losses in by_model.values())]
    if not tasks:
        return {"means": {}, "gain": None, "gap": None, "tasks": {}}
    rows = {task: {model: losses[task] for model, losses in by_model.items()} for task in tasks}
    means = {model: sum(losses[task] for task in tasks) / len(tasks) for model, losses in by_model.items()}
    return {
        "means": means,
        **_compare(means),
        "tasks": {t: _compare(row) | {"losses": row} for t, row in rows.items()},
    }


def _compare(losses: Mapping[str, float]) -> dict[str, float | None]:
    if not {"student", "scratch"} <= set(losses):
        return {"gain": None, "gap": None}
    scratch, student = losses["scratch"], losses["student"]
    gap = gap_closed(scratch, student, losses["teacher"]) if "teacher" in losses else None
    return {"gain": scratch - student, "gap": gap}


def _ordered(models: Iterable[str]) -> list[str]:
    names = list(models)
    return [name for name in MODELS if name in names] + [name for name in names if name not in MODELS]


def _table(scores: Scores) -> list[dict[str, Any]]:
    """One group a task: its models' metrics, and which of student and scratch is better in each."""
    models = _ordered(scores)
    groups = []
    for task in dict.fromkeys(task for model in models for task in scores[model]):
        rows = {model: scores[model][task] for model in models if task in scores[model]}
        groups.append({"name": task, "rows": rows, "best": {key: _best(rows, key) for key in METRICS}})
    return groups


def _best(rows: Mapping[str, Mapping[str, float]], key: str) -> str | None:
    pair = [rows[model].get(key) for model in ("student", "scratch") if model in rows]
    if len(pair) < 2 or pair[0] is None or pair[1] is None or pair[0] == pair[1]:
        return None
    return "student" if (pair[0] > pair[1]) == key.endswith("accuracy") else "scratch"


def _balance(balance: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    totals = {key: sum(row[key] for row in balance.values()) for key in ("tokens_before", "tokens_after")}
    return [
        {
            "task": task,
            **row,
            "before": row["tokens_before"] / max(totals["tokens_before"], 1),
            "after": row["tokens_after"] / max(totals["tokens_after"], 1),
        }
        for task, row in balance.items()
    ]


# --- pictures and curves ---


def _png(picture: np.ndarray) -> str:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"pictures: {picture.dtype} {picture.shape}, must be uint8 (H, W, 3)")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


WIDTH, HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 48
_MAX_POINTS = 400  # more do not show on 720 pixels


def _chart(curves: Mapping[str, Curve]) -> dict[str, Any] | None:
    finite = {m: [(s, v) for s, v in curves[m] if math.isfinite(v)] for m in _ordered(curves)}
    finite = {model: points for model, points in finite.items() if points}
    if not finite:
        return None
    window = max(map(len, finite.values())) // 25 // 2 * 2 + 1  # odd: as many values before as after
    steps = [step for points in finite.values() for step, _ in points]
    values = [value for points in finite.values() for _, value in points]
    x_ticks, y_ticks = ticks(0, max(max(steps), 1)), ticks(min(values), max(values))
    x_range, y_range = (0, max(max(steps), x_ticks[-1], 1)), (y_ticks[0], y_ticks[-1])

    def x(step: float) -> float:
        return _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - _TOP - _BOTTOM)

    def line(points: Curve) -> str:
        stride = -(-len(points) // _MAX_POINTS)
        kept = [*points[: len(points) - 1 : stride], points[-1]]
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in kept)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "bottom": HEIGHT - _BOTTOM,
        "window": window,
        "x_ticks": [(f"{x(tick):.1f}", f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(f"{y(tick):.1f}", f"{tick:g}") for tick in y_ticks],
        "lines": [
            {"model": model, "raw": line(points), "smooth": line(mean), "last": mean[-1]}
            for model, points in finite.items()
            for mean in [smooth(points, window)]
        ],
    }


def smooth(points: Curve, window: int) -> list[tuple[int, float]]:
    """Each value replaced by the mean of the `window` (odd) values around it, at the ends of those there are.

    As many before as after, so that a falling curve is not shifted.
    """
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in points])])
    out = []
    for i, (step, _) in enumerate(points):
        first, end = max(0, i - window // 2), min(len(points), i + window // 2 + 1)
        out.append((step, float(sums[end] - sums[first]) / (end - first)))
    return out


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` to `high`; at most `most`+1."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


# --- the page ---


def _measure(key: str, value: float) -> str:
    if key.endswith("loss"):
        return _loss(value)
    if key.endswith("accuracy") or (key == "codes_used" and value <= 1):
        return f"{100 * value:.1f}%"
    if key == "psnr":
        return f"{value:.1f} dB"
    if key == "codebook_perplexity":
        return f"{value:.1f}"
    if key.endswith("perplexity"):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) or float(value).is_integer() else f"{value:.3f}"


def _loss(value: float) -> str:
    return f"{value:.3f}"


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
    environment.globals.update(
        style=Markup("\n" + _beside("report.css")),  # ours: its quotes must not be escaped
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        models=MODELS,
        metrics=METRICS,
        measure=_measure,
        loss=_loss,
        percent=_percent,
        place=_track,
        signed=lambda value: f"{value:+.3f}".replace("-", "−"),
    )
    return environment.from_string(_beside("report.html"))


def _beside(name: str) -> str:
    return files("delvm.evaluate").joinpath(name).read_text(encoding="utf-8")
