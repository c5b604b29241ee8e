"""Losses by steps, as tools/compare_distill.py left them -> what each costs, and when a teacher pays.

    python -m tools.count_compute runs/claims tiny [--arm "slice"]

For each number of steps of the arm: how many scratch needs for the same mean loss (between two that were run,
along the logarithm of steps), and how many students must share the teacher until its own training is paid for
by what they save. Costs are floating-point operations of training.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

from delvm.errors import UserError

Curve = dict[int, float]
"""Steps -> a number."""


def read(root: Path, size: str) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Losses, means of tasks and seeds, and operations: arm -> steps -> number. The teacher's steps are 0.

    Raises:
        UserError: there are none.
    """
    losses: dict[str, Curve] = {}
    operations: dict[str, Curve] = {}
    for file in root.glob(f"distill-{size}-*.json"):
        if not (found := re.fullmatch(rf"distill-{re.escape(size)}-(\d+)", file.stem)):
            continue
        written = json.loads(file.read_text())
        for arm, cost in written["operations"].items():
            means = [statistics.mean(entry[arm].values()) for entry in written["losses"].values()]
            steps = 0 if arm == "teacher" else int(found[1])
            losses.setdefault(arm, {})[steps] = statistics.mean(means)
            operations.setdefault(arm, {})[steps] = cost
    if "scratch" not in losses:
        raise UserError(
            f"{root}: no distill-{size}-STEPS.json with scratch; tools/compare_distill.py writes them"
        )
    return losses, operations


def steps_to(curve: Curve, loss: float) -> float:
    """How many steps lead to `loss`: infinite where none of the curve's do, its first where all do."""
    points = sorted(curve.items())
    if points[0][1] <= loss:
        return points[0][0]
    for (fewer, above), (more, below) in itertools.pairwise(points):
        if below <= loss:
            return fewer * (more / fewer) ** ((above - loss) / (above - below))
    return math.inf


def students_to_pay(teacher: float, scratch: float, taught: float) -> float:
    """The least whole number of students whose savings cover the teacher; infinite where none saves."""
    return math.ceil(teacher / (scratch - taught)) if scratch > taught else math.inf


def report(losses: dict[str, Curve], operations: dict[str, Curve], arm: str) -> None:
    """Print the table as Markdown."""
    teacher, scratch = operations["teacher"][0], losses["scratch"]
    longest = max(scratch)
    a_step = operations["scratch"][longest] / longest
    print(f"teacher: loss {losses['teacher'][0]:.3f}, {teacher:.3g} operations\n")
    print(
        f"| steps | {arm} | scratch | scratch's steps to that loss | times | students to pay |\n{'|---' * 6}|"
    )
    for steps, loss in sorted(losses[arm].items()):
        needed = steps_to(scratch, loss)
        never = needed == math.inf  # what scratch has spent until then is the least that it would need
        needed = min(needed, longest)
        paid = students_to_pay(teacher, needed * a_step, operations[arm][steps])
        cells = [
            str(steps), f"{loss:.3f}", f"{scratch[steps]:.3f}" if steps in scratch else "",
            f"{'> ' * never}{needed:.0f}", f"{'> ' * never}{needed / steps:.1f}",
            f"{'at most ' * never}{paid}" if paid < math.inf else "not known" if never else "no number",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def main() -> int:
    """Arguments in, table out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run_dir of the comparison")
    parser.add_argument("size", help="of the students")
    parser.add_argument("--arm", default="slice")
    options = parser.parse_args()
    try:
        losses, operations = read(options.folder, options.size)
        if options.arm not in losses:
            raise UserError(f"--arm: '{options.arm}' was not run; choices: {', '.join(losses)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(losses, operations, options.arm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
