"""Plans and results -> tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


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
            f"{entry['tokens_before'] / total_before:.1%}",
            entry["tokens_after"],
            f"{entry['tokens_after'] / total_after:.1%}",
        )
        for task, entry in summary.items()
    ]
    table("balance", ["task", "samples", "views", "repeats", "tokens", "share", "balanced", "share"], rows)


def show_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Held-out loss, accuracy and perplexity of every model, by task and over their mean."""
    columns = ["task", "model", "loss", "accuracy", "perplexity", "ann. loss", "ann. acc.", "ann. ppl."]
    keys = ["loss", "accuracy", "perplexity", "annotation_loss", "annotation_accuracy", "annotation_perplexity"]
    rows: list[list[object]] = []
    for task in next(iter(scores.values())):
        for model, tasks in scores.items():
            rows.append([task, model, *(f"{tasks[task][key]:.3f}" for key in keys)])
    for model, tasks in scores.items():
        means = {key: sum(entry[key] for entry in tasks.values()) / len(tasks) for key in keys}
        shown = [f"{means[key]:.3f}" if "perplexity" not in key else "" for key in keys]
        rows.append(["mean over tasks", model, *shown])
    table("held-out sentences (loss in nats)", columns, rows)
