"""Nested numbers of several runs -> tables: a row for each path, a column for each key, mean and range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Tree = Mapping[str, Any]
Path = tuple[str, ...]

ERROR = "_se"
"""`loss_se` is the standard error of `loss`."""
MANY = 24
"""Numbers that stand side by side; more of them stand below each other."""


@dataclass
class Cell:
    """What stands under one key: a number of each run that has it, or a text."""

    values: list[float] = field(default_factory=list)
    error: float | None = None
    """Standard error, if the run says it; the last one's where there are several."""
    text: str = ""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass
class Table:
    """Numbers that belong together."""

    topic: Path
    """Where they stand in the trees: the keys that all rows share; () at the top."""
    rows: dict[Path, dict[str, Cell]] = field(default_factory=dict)
    """The name of the group of runs and the keys in which rows differ -> cells by key."""
    grids: dict[Path, np.ndarray] = field(default_factory=dict)
    """Two-dimensional numbers, the mean over the runs: (rows, columns) float64."""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for cells in self.rows.values() for key in cells))


def tables(groups: Mapping[str, Sequence[Tree]]) -> list[Table]:
    """Tables of everything in the trees, whatever it is.

    A mapping's numbers and texts are a row. Mappings beside them are topics of their own; a mapping of
    nothing but mappings adds its keys to the names of the rows. A list is a mapping from "1" on, a rectangle
    of numbers a grid, None nothing.

    groups: runs of the same settings by name; their numbers come together in one cell.
    """
    found: dict[Path, Table] = {}
    grids: dict[tuple[Path, Path], list[np.ndarray]] = {}
    for name, trees in groups.items():
        for tree in trees:
            _read(tree, (), (name,), found, grids)
    for (topic, row), each in grids.items():
        if len({grid.shape for grid in each}) == 1:
            found.setdefault(topic, Table(topic)).grids[row] = np.mean(each, axis=0)
    return list(found.values())


def _read(
    tree: Tree, topic: Path, row: Path, found: dict[Path, Table],
    grids: dict[tuple[Path, Path], list[np.ndarray]],
) -> None:  # fmt: skip
    inner: dict[str, Tree] = {}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key, grid = str(name), _grid(value)
        if grid is not None:
            grids.setdefault(((*topic, key), row), []).append(grid)
        elif isinstance(value, Mapping):
            inner[key] = value
        elif isinstance(value, list | tuple):
            inner[key] = {str(number): item for number, item in enumerate(value, 1)}
        elif value is not None:
            leaves[key] = value
    if len(leaves) > MANY:
        for key, value in leaves.items():
            _add(found, topic, (*row, key), {"value": value})
    elif leaves:
        _add(found, topic, row, leaves)
    for key, value in inner.items():
        place = ((*topic, key), row) if leaves else (topic, (*row, key))
        _read(value, *place, found, grids)


def _add(found: dict[Path, Table], topic: Path, row: Path, leaves: Mapping[str, Any]) -> None:
    cells = found.setdefault(topic, Table(topic)).rows.setdefault(row, {})
    for key, value in leaves.items():
        if key.endswith(ERROR) and key.removesuffix(ERROR) in leaves:
            continue
        cell = cells.setdefault(key, Cell())
        if isinstance(value, int | float) and not isinstance(value, bool):
            cell.values.append(value)
            cell.error = leaves.get(key + ERROR)
        elif str(value) not in cell.text.split(", "):
            cell.text = ", ".join(filter(None, [cell.text, str(value)]))


def _grid(value: Any) -> np.ndarray | None:
    """Rows of numbers of one length."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return None
    if len({len(row) for row in value}) > 1:
        return None
    if not all(isinstance(item, int | float) for row in value for item in row):
        return None
    return np.array(value, dtype=np.float64)


# --- numbers as they are read ---


def measure(key: str, value: float) -> str:
    """A number with the digits and the unit that its key asks for."""
    if key.endswith(("accuracy", "share")) or (key == "codes in use" and value <= 1):
        return f"{100 * value:.1f}%"
    if key.endswith("PSNR"):
        return f"{value:.1f} dB"
    if key == "code perplexity":
        return f"{value:.1f}"
    if key.endswith("perplexity"):
        return f"{value:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or key.endswith("loss"):
        return f"{value:.3f}"
    size = abs(value)
    if 1e-3 <= size < 1e9:
        return f"{value:,.{sum(size < end for end in (10, 100, 1000))}f}"
    return f"{value:.2e}"


def say(key: str, cell: Cell) -> tuple[str, str]:
    """The number, and what is known of its spread: the range of several runs, one's standard error, or ""."""
    if not cell.values:
        return cell.text or "–", ""
    mean = cell.mean
    if len(cell.values) > 1:
        if all(isinstance(value, int) for value in cell.values) and mean.is_integer():
            mean = int(mean)
        low, high = (measure(key, end) for end in (min(cell.values), max(cell.values)))
        return measure(key, mean), "" if low == high else f"{low}–{high}"
    if cell.error is not None:
        return measure(key, cell.values[0]), f"± {measure(key, cell.error)}"
    return measure(key, cell.values[0]), ""
