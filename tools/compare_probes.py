"""Probes of several seeds -> accuracy by model, and how far each is from the control.

    python tools/compare_probes.py runs/probe-20 runs/probe-21 runs/probe-22 runs/probe-23

A run each seed, of a recipe with `probe:`, with the same models; else the recipes are the same, but for
folders. Differences are taken within a seed, whose models share tokenizer and pictures. One is said to be
shown, or below, where it is farther from zero than two standard errors of its mean over the seeds.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delvm.console import table
from delvm.errors import UserError, exit_status
from delvm.evaluate.runs import ABSENT, OWN, differences, read


@dataclass(frozen=True)
class Row:
    """One model by one classifier."""

    classifier: str
    model: str
    top1: list[float]
    """By seed."""
    beyond: list[float]
    """The same less the control's."""

    @property
    def error(self) -> float:
        """The standard error of the mean difference; NaN of a single seed."""
        if len(self.beyond) < 2:
            return math.nan
        return float(np.std(self.beyond, ddof=1) / math.sqrt(len(self.beyond)))

    @property
    def shown(self) -> bool:
        """Whether the difference is beyond two standard errors."""
        return abs(float(np.mean(self.beyond))) > 2 * self.error

    @property
    def verdict(self) -> str:
        """The same in words, to stand behind the difference."""
        if not self.shown:
            return ""
        return ", shown" if np.mean(self.beyond) > 0 else ", below"


def compare(folders: Sequence[Path], against: str) -> list[Row]:
    """A row for every classifier and model that all runs have.

    Raises:
        UserError: a folder without a probe, or without the control; runs of the same seed, or of other
            settings.
    """
    probes, found = [], [read(folder) for folder in folders]
    for place, folder in enumerate(folders):
        models: dict[str, Any] = found[place][1].get("probe", {}).get("models", {})
        if against not in models:
            choices = ", ".join(models) or "no probe"
            raise UserError(f"{folder}: probe has no '{against}' to compare with; it has: {choices}")
        probes.append(models)
        for other in range(place):
            _check_seeds(folder, found[place][0], folders[other], found[other][0])
    rows = []
    for kind in probes[0][against]:
        for model in probes[0]:
            if all(kind in probe.get(model, {}) and kind in probe[against] for probe in probes):
                top1 = [probe[model][kind]["top1"] for probe in probes]
                control = [probe[against][kind]["top1"] for probe in probes]
                rows.append(Row(kind, model, top1, [a - b for a, b in zip(top1, control, strict=True)]))
    return rows


def _check_seeds(folder: Path, recipe: Mapping, other: Path, others: Mapping) -> None:
    """Refuse two runs that are not the same but for their seed, or whose models are the same."""
    seed, apart = recipe.get("seed", 0), differences([recipe, others])
    given = {key for key in apart if key.startswith("probe.models.") or key.endswith("folder")}
    for key, (mine, theirs) in apart.items():
        # a plain setting that one lacks is most often one that its version of the project did not have
        if key in OWN or key in given or (ABSENT in (mine, theirs) and "{…}" not in (mine, theirs)):
            continue
        raise UserError(f"{folder}: {key} is {mine}, of {other} {theirs}; only seeds are compared")
    if seed == others.get("seed", 0) and not given:
        raise UserError(f"{folder}: seed {seed}, as {other}; each seed counts once")


def show(rows: Sequence[Row], against: str) -> None:
    """The table."""
    lines = []
    for row in rows:
        low, high = min(row.top1), max(row.top1)
        beyond = "" if row.model == against else f"{np.mean(row.beyond):+.4f}"
        if beyond and not math.isnan(row.error):
            beyond += f" ± {row.error:.4f}" + row.verdict
        lines.append([row.classifier, row.model, f"{np.mean(row.top1):.4f}", f"{low:.4f}-{high:.4f}", beyond])
    columns = ["classifier", "model", "mean", "range", f"beyond {against}"]
    table(f"top-1 over {len(rows[0].top1)} seeds", columns, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run folders in, a table out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/compare_probes.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run with a probe")
    parser.add_argument("--against", default="scratch", metavar="MODEL", help="default: scratch")
    options = parser.parse_args(arguments)
    return exit_status(lambda: show(compare(options.runs, options.against), options.against))


if __name__ == "__main__":
    sys.exit(main())
