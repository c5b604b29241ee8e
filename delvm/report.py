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

USAGE_ERROR = 2


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

    # imported here, so that --help answers at once
    from delvm.console import console
    from delvm.errors import UserError
    from delvm.evaluate.report import render_groups
    from delvm.evaluate.runs import groups
    from delvm.stages import write_atomic

    try:
        found = groups(options.runs)
        title = " · ".join(dict.fromkeys(run.title for group in found for run in group.runs))
        write_atomic(options.out, render_groups(title, found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USAGE_ERROR
    console.print(f"report: {options.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
