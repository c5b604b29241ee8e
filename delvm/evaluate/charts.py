"""Series of numbers -> line charts as SVG, for a page or a file of their own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

Curve = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 48
_MAX_POINTS = 400  # more do not show on 720 pixels


@dataclass(frozen=True)
class Line:
    """One series of a chart, x ascending; values that are not finite are left out."""

    name: str
    """What `data-line` of its element says."""
    style: str
    """CSS class that sets `--c`, its colour."""
    points: Curve
    thin: Sequence[Curve] = ()
    """Drawn behind it, faint: what it is the mean of."""
    ranges: Sequence[tuple[float, float, float]] = ()
    """(x, lowest, highest): a bar through a point."""
    dots: bool = False
    """Mark every point."""


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str = "",
    *,
    title: str = "",
    from_zero: bool = False,
    log_x: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """An `<svg class="chart">` of `width` x `height` units; empty where no line has a finite point.

    Args:
        lines: later ones over earlier ones.
        x_label, y_label: below and above the axes.
        title: read aloud in its place; default: the labels.
        from_zero: the x axis begins at 0.
        log_x: the x axis is logarithmic; every x is above 0.
    """
    drawn = [Line(line.name, line.style, finite(line.points), [finite(c) for c in line.thin],
                  line.ranges, line.dots) for line in lines]  # fmt: skip
    curves = [curve for line in drawn for curve in (line.points, *line.thin) if curve]
    if not curves:
        return Markup()
    xs = [x for curve in curves for x, _ in curve] + [0.0] * from_zero
    ys = [y for curve in curves for _, y in curve]
    ys += [end for line in drawn for _, *ends in line.ranges for end in ends if math.isfinite(end)]
    end = max(max(xs), min(xs) + 1)
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else [t for t in ticks(min(xs), end) if t <= end]
    y_ticks = ticks(min(ys), max(ys))
    top = _TOP + 20 * bool(y_label)
    scale = math.log if log_x else float
    # a linear axis ends where the data do, a logarithmic one at its ticks
    low_x, high_x = scale(x_ticks[0]), scale(x_ticks[-1] if log_x else end)

    def at(x: float, y: float) -> tuple[str, str]:
        right = (scale(x) - low_x) / (high_x - low_x)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        across = _LEFT + right * (width - _LEFT - _RIGHT)
        return f"{across:.1f}", f"{height - _BOTTOM - up * (height - top - _BOTTOM):.1f}"

    def path(curve: Curve) -> str:
        return " ".join(",".join(at(x, y)) for x, y in thinned(curve))

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(title or f"{y_label} by {x_label}".strip())}">'
    ]
    for tick in y_ticks:
        y = at(x_ticks[0], tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 10}" y="{y}" dy=".35em" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        anchor = "end" if float(x) > width - 2 * _RIGHT else "middle"  # else its label would leave the chart
        label = short(tick)
        parts.append(f'<text x="{x}" y="{height - _BOTTOM + 22}" text-anchor="{anchor}">{label}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text x="{_LEFT - 48}" y="16">{escape(y_label)}</text>')
    for line in drawn:
        parts += [f'<polyline class="raw {line.style}" points="{path(c)}"/>' for c in line.thin if c]
    for line in drawn:
        for place, low, high in line.ranges:
            (across, below), (_, above) = at(place, low), at(place, high)
            parts.append(
                f'<line class="range {line.style}" x1="{across}" x2="{across}" y1="{below}" y2="{above}"/>'
            )
        if line.points:
            name, points = escape(line.name), path(line.points)
            parts.append(f'<polyline class="smooth {line.style}" data-line="{name}" points="{points}"/>')
        for point in line.points if line.dots else ():
            x, y = at(*point)
            parts.append(f'<circle class="{line.style}" cx="{x}" cy="{y}" r="4.5"/>')
    return Markup("\n".join([*parts, "</svg>"]))  # every text in it is escaped


def finite(curve: Curve) -> list[tuple[float, float]]:
    """The points whose value is a number."""
    return [(x, y) for x, y in curve if math.isfinite(y)]


def thinned(curve: Curve, most: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` + 1 of the points, evenly, the last one among them."""
    stride = -(-len(curve) // most)
    return [*curve[: len(curve) - 1 : stride], curve[-1]]


def smooth(points: Curve, window: int) -> list[tuple[float, float]]:
    """Each value replaced by the mean of the `window` (odd) values around it, at the ends of those there are.

    As many before as after, so that a falling curve is not shifted.
    """
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in points])])
    out = []
    for i, (step, _) in enumerate(points):
        first, end = max(0, i - window // 2), min(len(points), i + window // 2 + 1)
        out.append((step, float(sums[end] - sums[first]) / (end - first)))
    return out


def window(curves: Iterable[Curve]) -> int:
    """Values that `smooth` averages for curves of these lengths: 4% of the longest, odd, at least 1."""
    return max(map(len, curves), default=0) // 25 // 2 * 2 + 1


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean by step, of the steps that all curves have."""
    values = [dict(curve) for curve in curves]
    shared = [step for step, _ in curves[0] if all(step in each for each in values)]
    return [(step, sum(each[step] for each in values) / len(values)) for step in shared]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` to `high`; at most `most`+1."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that enclose `low` to `high` on a logarithmic axis: 1, 2, 5 times powers of ten, or these
    powers alone where the first would be more than `most` + 1.
    """
    for factors in ((1, 2, 5), (1,)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        begin = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
        end = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
        steps = steps[begin : max(end, begin + 1) + 1]
        if len(steps) <= most + 1:
            break
    return steps


def short(value: float) -> str:
    """1200 -> 1,200; 790000 -> 790K; 1820736 -> 1.821M; 1500000000 -> 1.5B."""
    for unit, name, least in ((1e9, "B", 1e9), (1e6, "M", 1e6), (1e3, "K", 1e5)):
        if abs(value) >= least:
            return f"{value / unit:.4g}{name}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
