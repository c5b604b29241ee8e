"""Plans and results -> tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, markup=False, emoji=False)  # a path may hold [brackets]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table: the first column text, the others right-aligned."""
    out = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        out.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        out.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(out)


def show_plan(summary: Mapping[str, Mapping[str, int | float]]) -> None:
    """The balance plan: image tokens an epoch by task, before and after."""
    total = sum(entry["tokens_before"] for entry in summary.values())
    rows = [
        (
            task,
            entry["samples"],
            entry["views"],
            entry["draws"],
            entry["tokens_before"],
            f"{entry['tokens_before'] / total:.0%}",
            entry["tokens_after"],
            f"{entry['share']:.0%}",
        )
        for task, entry in summary.items()
    ]
    table("balance", ["task", "samples", "views", "drawn", "tokens", "", "after", ""], rows)


def _both(whole: float | None, annotation: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:.3f}" for value in (whole, annotation))


def show_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Held-out loss, accuracy and perplexity of every model by task: all codes / annotation codes."""
    rows: list[list[object]] = []
    for task in next(iter(scores.values())):
        for model, tasks in scores.items():
            entry = tasks[task]
            keys = ("loss", "accuracy", "perplexity")
            rows.append([task, model, *(_both(entry.get(k), entry.get(f"annotation_{k}")) for k in keys)])
    for model, tasks in scores.items():
        means = []
        for key in ("loss", "annotation_loss"):
            values = [entry[key] for entry in tasks.values() if key in entry]
            means.append(sum(values) / len(values) if values else None)
        rows.append(["mean", model, _both(*means), "", ""])
    table(
        "held-out sentences: all codes / annotation codes",
        ["task", "model", "loss", "accuracy", "perplexity"],
        rows,
    )
