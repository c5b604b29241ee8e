"""Any number of runs side by side in one HTML page.

    python -m delvm.report runs/quickstart
    python -m delvm.report runs/quickstart runs/quickstart-seed1 runs/jsd --out compared.html

Runs that differ in their seed alone share a row, with mean and range; others are named by what their recipes
differ in.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from delvm.errors import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run folders in, a page out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run that has ended"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: compare(options.runs, options.out))


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write the page of these runs. Raises UserError for a folder that is none."""
    # imported here, so that --help answers at once
    from delvm.console import console
    from delvm.evaluate.report import render_groups
    from delvm.evaluate.runs import groups
    from delvm.stages import write_atomic

    found = groups(runs)
    title = " · ".join(dict.fromkeys(run.title for group in found for run in group.runs))
    write_atomic(out, render_groups(title, found))
    console.print(f"report: {out}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
