"""Metrics, curves and pictures -> one self-contained HTML page.

Longer than most files here: the page's template and style stand below the arithmetic, in one place.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1b1d21;--soft:#646a73;--line:#e4e2dd;
--wash:#f2f0eb;
--teacher:#0072b2;--student:#d55e00;--scratch:#7a7f87;--other:#cc79a7;--win:#fdebdd;--mono:ui-monospace,
SFMono-Regular,
Menlo,Consolas,monospace}
@media (prefers-color-scheme:dark){:root{--bg:#131518;--card:#1b1e22;--ink:#e9e7e3;--soft:#9aa0a9;
--line:#2e3238;
--wash:#24282d;--teacher:#56b4e9;--student:#f0863a;--scratch:#9aa0a9;--other:#dd9cc0;--win:#3a2a1d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1000px;margin:0 auto;padding:clamp(20px,5vw,56px) clamp(16px,4vw,32px) 64px}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .6rem;
overflow-wrap:anywhere}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:0 0 .2rem}
h3{font-size:1rem;margin:1.4rem 0 .5rem;overflow-wrap:anywhere}
section{margin-top:clamp(32px,6vw,52px)}
p{margin:.2rem 0 1rem;max-width:68ch}
.note{color:var(--soft);font-size:.9rem}
.facts{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;margin:0;font-size:.9rem}
.facts div{display:flex;gap:.45rem}.facts dt{color:var(--soft)}.facts dd{margin:0;
font-variant-numeric:tabular-nums}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:clamp(16px,3vw,26px)}
.big{font-size:clamp(1.25rem,3.6vw,1.7rem);line-height:1.3;letter-spacing:-.015em;font-weight:600;
margin:0 0 1rem;max-width:none}
.means{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:12px;margin:0 0 1.6rem}
.means div{border-top:3px solid var(--c);padding-top:.45rem}.means dt{color:var(--soft);font-size:.85rem}
.means dd{margin:0;font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.teacher{--c:var(--teacher)}.student{--c:var(--student)}.scratch{--c:var(--scratch)}.other{--c:var(--other)}
.gap{display:grid;grid-template-columns:minmax(84px,150px) 1fr 128px;gap:4px 16px;align-items:center;
padding:.55rem 0;border-top:1px solid var(--line);font-variant-numeric:tabular-nums}
.gap .name{overflow-wrap:anywhere}.gap .sum{text-align:right;font-size:.9rem;color:var(--soft)}
.gap .sum b{color:var(--ink)}
.track{position:relative;height:20px;margin:0 7px}
.track::before{content:"";position:absolute;inset:9px 0;background:var(--line);border-radius:2px}
.track i{position:absolute;top:3px;width:14px;height:14px;margin-left:-7px;background:var(--c);
border:2px solid var(--card)}
.track .scratch{border-radius:2px}.track .student{border-radius:50%}
.track .teacher{transform:rotate(45deg) scale(.82)}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.85rem;color:var(--soft);margin:.9rem 0 0}
.key svg{width:26px;height:10px;margin-right:.4rem;vertical-align:middle}
.key i{display:inline-block;width:10px;height:10px;background:var(--c);margin-right:.4rem}
.key i.student{border-radius:50%}.key i.teacher{transform:rotate(45deg) scale(.85)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap}
th{font-weight:500;color:var(--soft)}th[scope=row],th[scope=rowgroup],.l{text-align:left}
tbody th[scope=rowgroup]{color:var(--ink);font-weight:600;vertical-align:top}
thead th[colspan="3"]{text-align:center;border-bottom:1px solid var(--line)}
tbody tr:first-child>*{border-top:1px solid var(--line)}thead th{padding-top:0}
.flat tbody tr>*{border-top:1px solid var(--line)}
td.best{background:var(--win);font-weight:650;border-radius:4px}
.dot{display:inline-block;width:.62em;height:.62em;border-radius:50%;background:var(--c);margin-right:.5em}
.share{min-width:210px}.bar{display:grid;grid-template-columns:3.2rem 1fr 3rem;gap:.5rem;align-items:center;
font-size:.8rem;
color:var(--soft);line-height:1.35}.bar span{height:7px;border-radius:4px;background:var(--wash);
overflow:hidden}
.bar span i{display:block;height:100%;background:var(--scratch)}.bar.after span i{background:var(--teacher)}
.bar.after b{color:var(--ink)}.bar b{font-weight:500}.bar em{font-style:normal;text-align:left}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}.raw{fill:none;stroke:var(--c);stroke-width:1;opacity:.28}
.smooth{fill:none;stroke:var(--c);stroke-width:2.4;stroke-linejoin:round;stroke-linecap:round}
.smooth.scratch{stroke-dasharray:7 5}.smooth.teacher{stroke-dasharray:1.5 5}
.row{display:flex;gap:9px;padding:.2rem 0 .7rem;width:max-content}
figure{margin:0;width:96px}figure img{display:block;width:96px;height:auto;border-radius:6px;
background:var(--wash)}
.px{image-rendering:pixelated}figcaption{font-size:.78rem;line-height:1.3;color:var(--soft);margin-top:.35rem}
details{border:1px solid var(--line);border-radius:14px;background:var(--card)}
summary{cursor:pointer;padding:.8rem 1.1rem;font-weight:500}
pre{margin:0;padding:0 1.1rem 1.1rem;overflow-x:auto;font:13px/1.5 var(--mono)}
@media (max-width:620px){svg text{font-size:20px}.gap{grid-template-columns:1fr auto}
.gap .track{grid-column:1/-1;grid-row:2}}
@media print{body{background:#fff}.card,details{break-inside:avoid}}
"""

_TEMPLATE = """<!doctype html>
{% macro css(model) %}{{ model if model in models else "other" }}{% endmacro %}
{% macro called(model) %}{{ models.get(model, model) }}{% endmacro %}
{% macro facts(pairs) %}
<dl class="facts">
{% for label, value in pairs %}
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endmacro %}
{% macro gap(name, item) %}
<div class="gap">
<span class="name">{{ name }}</span>
{% if item.gap is none %}
<div class="note">the teacher is no better here</div>
{% else %}
{% set at = place(item.gap) %}
<div class="track" role="img" aria-label="{{ name }}: {{ percent(item.gap) }} of the gap closed">
{% for model in ("scratch", "teacher", "student") %}
<i class="{{ model }}" style="left:{{ at[model] }}%"></i>
{% endfor %}
</div>
{% endif %}
{% set part = "–" if item.gap is none else percent(item.gap) %}
<span class="sum"><b>{{ part }}</b> · {{ signed(-item.gain) }}</span>
</div>
{% endmacro %}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ report.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
{% if report.facts %}
{{ facts(report.facts) }}
{% endif %}
</header>

{% if headline.means %}
<section id="result">
<div class="card">
<p class="big">
{% if headline.gain is none %}
Mean loss over {{ headline.tasks | length }} held-out task{{ "" if headline.tasks | length == 1 else "s" }}
{% elif headline.gain > 0 %}
The distilled student is {{ loss(headline.gain) }} nats a token better than the same student trained from
scratch{% if headline.gap is not none %}: {{ percent(headline.gap) }} of the gap to its teacher{% endif %}.
{% elif headline.gain < 0 %}
Distillation did not help here: the distilled student is {{ loss(-headline.gain) }} nats a token worse than
the same student trained from scratch.
{% else %}
The distilled student and the one trained from scratch have equal loss.
{% endif %}
</p>
<dl class="means">
{% for model, value in headline.means.items() %}
<div class="{{ css(model) }}">
<dt>{{ called(model) }}</dt>
<dd data-mean="{{ model }}">{{ loss(value) }}</dd>
</div>
{% endfor %}
</dl>
<p class="note">
Held-out loss: mean negative log-likelihood of an image code in nats, first over a task's sentences, then over
tasks. Lower is better.
{% if headline.gain is none %}
A comparison needs both the distilled student and the one trained from scratch.
{% endif %}
</p>
{% if headline.gain is not none and "teacher" in headline.means %}
{{ gap("all tasks", headline) }}
{% for task, item in headline.tasks.items() %}
{{ gap(task, item) }}
{% endfor %}
<div class="key">
<span><i class="scratch"></i>from scratch (0%)</span>
<span><i class="student"></i>distilled</span>
<span><i class="teacher"></i>teacher (100%)</span>
<span>right: gap closed · difference to scratch in nats</span>
</div>
{% endif %}
</div>
</section>
{% endif %}

{% if pictures %}
<section id="pictures">
<h2>By prompting</h2>
<p class="note">Each model sees the example pairs and the query and generates the annotation code by code.</p>
{% for task, rows in pictures.items() %}
<h3>{{ task }}</h3>
{% for row in rows %}
<div class="scroll" tabindex="0">
<div class="row">
{% for caption, png, width in row %}
<figure>
<img class="{{ "px" if width <= 128 else "large" }}" alt="{{ task }}: {{ caption }}"
src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</div>
</div>
{% endfor %}
{% endfor %}
</section>
{% endif %}

{% if table %}
<section id="scores">
<h2>By task and model</h2>
<p class="note">
On held-out sentences, given everything before each code. Loss in nats; accuracy: the most likely code is the
true one; perplexity: exp(loss). Shaded: the better of distilled and from scratch.
</p>
<div class="scroll" tabindex="0">
<table>
<thead>
<tr><th colspan="2"></th><th colspan="3">all codes</th><th colspan="3">annotation codes</th></tr>
<tr>
<th class="l" scope="col">task</th>
<th class="l" scope="col">model</th>
{% for label in metrics.values() %}
<th scope="col">{{ label }}</th>
{% endfor %}
</tr>
</thead>
{% for group in table %}
<tbody>
{% for model, row in group.rows.items() %}
<tr>
{% if loop.first %}
<th scope="rowgroup" rowspan="{{ group.rows | length }}">{{ group.name }}</th>
{% endif %}
<th scope="row" class="{{ css(model) }}"><span class="dot"></span>{{ called(model) }}</th>
{% for key in metrics %}
{% set cell = measure(key, row[key]) if key in row else "–" %}
<td{% if group.best[key] == model %} class="best"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
</div>
</section>
{% endif %}

{% if chart %}
<section id="curves">
<h2>Training</h2>
<p class="note">
Cross-entropy of training batches, nats a token.
{% if chart.window > 1 %}
Thin: as logged. Thick: mean of {{ chart.window }} logged values around it (fewer at the ends).
{% endif %}
</p>
<div class="card">
<svg class="chart" viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img" aria-label="loss by step">
{% for at, label in chart.y_ticks %}
<line class="grid" x1="{{ chart.left }}" x2="{{ chart.right }}" y1="{{ at }}" y2="{{ at }}"/>
<text x="{{ chart.left - 10 }}" y="{{ at }}" dy=".35em" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for at, label in chart.x_ticks %}
{% set anchor = "end" if loop.last else "middle" %}
<text x="{{ at }}" y="{{ chart.bottom + 22 }}" text-anchor="{{ anchor }}">{{ label }}</text>
{% endfor %}
<text x="{{ (chart.left + chart.right) / 2 }}" y="{{ chart.height - 4 }}" text-anchor="middle">step</text>
{% if chart.window > 1 %}
{% for line in chart.lines %}
<polyline class="raw {{ css(line.model) }}" points="{{ line.raw }}"/>
{% endfor %}
{% endif %}
{% for line in chart.lines %}
<polyline class="smooth {{ css(line.model) }}" data-model="{{ line.model }}" points="{{ line.smooth }}"/>
{% endfor %}
</svg>
<div class="key">
{% for line in chart.lines %}
<span>
<svg viewBox="0 0 26 10" aria-hidden="true">
<polyline class="smooth {{ css(line.model) }}" points="2,5 24,5"/>
</svg>
{{ called(line.model) }}, {{ loss(line.last[1]) }} at step {{ "{:,}".format(line.last[0]) }}
</span>
{% endfor %}
</div>
</div>
</section>
{% endif %}

{% if balance %}
<section id="balance">
<h2>Balance of the tasks</h2>
<p class="note">Tokens of each task in an epoch, before and after balancing; the bars are shares of all.</p>
<div class="scroll" tabindex="0">
<table class="flat">
<thead>
<tr>
<th class="l" scope="col">task</th>
<th class="l" scope="col">share of tokens</th>
<th scope="col">samples</th>
<th scope="col">views</th>
<th scope="col">tokens before</th>
<th scope="col">tokens after</th>
</tr>
</thead>
<tbody>
{% for row in balance %}
<tr>
<th scope="row">{{ row.task }}</th>
<td class="share">
{% for when in ("before", "after") %}
{% set share = "%.1f%%" % (100 * row[when]) %}
<div class="bar {{ when }}">
<em>{{ when }}</em><span><i style="width:{{ share }}"></i></span><b>{{ share }}</b>
</div>
{% endfor %}
</td>
{% for key in ("samples", "views", "tokens_before", "tokens_after") %}
<td>{{ measure(key, row[key]) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

{% if tokenizer %}
<section id="tokenizer">
<h2>Tokenizer</h2>
{{ facts(tokenizer) }}
</section>
{% endif %}

{% if report.recipe %}
<section id="recipe">
<details><summary>The recipe</summary><pre>{{ report.recipe }}</pre></details>
</section>
{% endif %}
</main>
</body>
</html>
"""


@cache
def _page() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        style=Markup(_STYLE),  # ours: its quotes must not be escaped
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        models=MODELS,
        metrics=METRICS,
        measure=_measure,
        loss=_loss,
        percent=_percent,
        place=_track,
        signed=lambda value: f"{value:+.3f}".replace("-", "−"),
    )
    return environment.from_string(_TEMPLATE)
