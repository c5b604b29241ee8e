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


def show_plan(summary: Mapping[str, Mapping[str, int]]) -> None:
    """The balance plan: image tokens an epoch by task, before and after."""
    total_before = sum(entry["tokens_before"] for entry in summary.values())
    total_after = sum(entry["tokens_after"] for entry in summary.values())
    rows = [
        (
            task,
            entry["samples"],
            entry["views"],
            entry["repeats"],
            entry["tokens_before"],
            f"{entry['tokens_before'] / total_before:.0%}",
            entry["tokens_after"],
            f"{entry['tokens_after'] / total_after:.0%}",
        )
        for task, entry in summary.items()
    ]
    table("balance", ["task", "samples", "views", "rep.", "tokens", "", "after", ""], rows)


def show_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Held-out loss, accuracy and perplexity of every model by task: all codes / annotation codes."""
    rows: list[list[object]] = []
    for task in next(iter(scores.values())):
        for model, tasks in scores.items():
            entry = tasks[task]
            both = (
                f"{entry[key]:.3f} / {entry['annotation_' + key]:.3f}"
                for key in ("loss", "accuracy", "perplexity")
            )
            rows.append([task, model, *both])
    for model, tasks in scores.items():
        loss, annotation_loss = (
            sum(entry[key] for entry in tasks.values()) / len(tasks) for key in ("loss", "annotation_loss")
        )
        rows.append(["mean", model, f"{loss:.3f} / {annotation_loss:.3f}", "", ""])
    table(
        "held-out sentences: all codes / annotation codes",
        ["task", "model", "loss", "accuracy", "perplexity"],
        rows,
    )
