"""Losses of teacher, student and the student from scratch -> what the teacher was worth."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODELS = {"teacher": "teacher", "student": "distilled", "scratch": "from scratch"}
"""The models that are known by name, in the order they are shown, and how they are called."""

Losses = Mapping[str, Mapping[str, float]]
"""model -> task -> held-out loss in nats."""


def gap_closed(scratch: float, student: float, teacher: float) -> float | None:
    """How far the student is on the way from scratch's loss (0) to the teacher's (1).

    Negative where it is worse than scratch, above 1 where it beats the teacher; None where the teacher is no
    better than scratch, so that there is no gap to close.
    """
    return (scratch - student) / (scratch - teacher) if teacher < scratch else None


def headline(losses: Losses) -> dict[str, Any]:
    """The comparison in short, over the tasks that all models have.

    Returns {"means": model -> mean loss, "gain": scratch's mean loss minus the student's or None, "gap": the
    part of the gap closed or None, "tasks": task -> {"gain", "gap", "losses"}}.
    """
    tasks = shared_tasks([losses])
    if not tasks:
        return {"means": {}, "gain": None, "gap": None, "tasks": {}}
    models = ordered(losses)
    rows = {task: {model: losses[model][task] for model in models} for task in tasks}
    means = {model: sum(row[model] for row in rows.values()) / len(rows) for model in models}
    return {
        "means": means,
        **_compare(means),
        "tasks": {task: _compare(row) | {"losses": row} for task, row in rows.items()},
    }


def _compare(losses: Mapping[str, float]) -> dict[str, float | None]:
    if not {"student", "scratch"} <= set(losses):
        return {"gain": None, "gap": None}
    scratch, student = losses["scratch"], losses["student"]
    gap = gap_closed(scratch, student, losses["teacher"]) if "teacher" in losses else None
    return {"gain": scratch - student, "gap": gap}


def shared_tasks(runs: Iterable[Losses]) -> list[str]:
    """The tasks that all models of all runs have, as the first has them."""
    every = [list(tasks) for losses in runs for tasks in losses.values()]
    return [task for task in every[0] if all(task in tasks for tasks in every)] if every else []


def losses_of(scores: Mapping[str, Any], tasks: Iterable[str] | None = None) -> Losses:
    """The losses in metrics by model and task, of these tasks or all; models without any are left out."""
    found = {
        model: {
            task: entry["loss"]
            for task, entry in by_task.items()
            if isinstance(entry, Mapping) and "loss" in entry and (tasks is None or task in tasks)
        }
        for model, by_task in scores.items()
    }
    return {model: losses for model, losses in found.items() if losses}


def mean_losses(runs: Sequence[Losses]) -> Losses:
    """The mean over runs, of the models and tasks that all have."""
    tasks = shared_tasks(runs)
    models = [model for model in runs[0] if all(model in run for run in runs)]
    return {m: {t: sum(run[m][t] for run in runs) / len(runs) for t in tasks} for m in models}


def ordered(models: Iterable[str]) -> list[str]:
    """Those of MODELS in its order, then the others as they come."""
    names = list(models)
    return [name for name in MODELS if name in names] + [name for name in names if name not in MODELS]
