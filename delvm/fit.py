"""Run a recipe, from images to a distilled, evaluated, exported student.

    python -m delvm.fit recipes/quickstart.yaml
    python -m delvm.fit recipes/pairs.yaml tasks.edges.images=photos tasks.edges.annotations=drawings seed=1
    python -m delvm.fit recipes/quickstart.yaml --dry-run
    torchrun --nproc-per-node 2 -m delvm.fit recipes/quickstart.yaml

Sections of a recipe: data, tasks.NAME, balance, tokenizer, tokens, sentences, teacher, scratch, cache,
student, prompting, probe, finetune, trainer. recipe.yaml in any run folder shows every key with its value;
the Config classes say what they mean.

A recipe's sections are stages. Each leaves a folder under run_dir, whole or not at all; a second run reuses
what is unchanged, makes anew what a changed section touches, and goes on where it was stopped.
"""

import argparse
import errno
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from delvm.errors import STOPPED, USAGE_ERROR, UserError

ENDED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what went wrong into one line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a YAML file; its header says what it does and needs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as seed=1 or student.steps=400"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check every input, print plan and sizes, train nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(options.recipe, options.overrides, dry_run=options.dry_run)
    except KeyboardInterrupt:  # before anything began
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(recipe_file: Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> int:
    """Run a recipe file; returns 0, 2 for what the user can mend, 130 when stopped.

    1 where another of several processes ended the run and said why.
    """
    # imported here, so that --help answers at once
    from delvm import chain, console, ranks, recipe, summary
    from delvm.training import Interrupted

    _quieten()  # after the imports: lightning sets its levels on import

    folder: Path | None = None
    try:
        with ranks.joined():
            console.console.quiet = not ranks.is_first()
            work = chain.Run(recipe.load(recipe_file, overrides))
            ranks.on_first(lambda: recipe.check_run_dir(work.recipe))
            folder = work.dir
            if dry_run:
                ranks.on_first(lambda: summary.dry_run(work))
            else:
                work.fit()
                ranks.on_first(lambda: summary.conclude(work))
        return 0
    except ranks.Ended:
        return ENDED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{str(error) or 'stopped'}; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if folder is not None and disk_full(error, folder):
            why = f"run_dir: no space left on the disk of '{folder}'; free some, the same command goes on"
            print(f"error: {why}", file=sys.stderr)
            return USAGE_ERROR
        if isinstance(error, OSError) and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return USAGE_ERROR
        raise


def disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error means a full disk; torch and safetensors say so only in words or not at all."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        if isinstance(error, RuntimeError) and "write" in str(error).lower():
            existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            return shutil.disk_usage(existing).free < 1 << 20
        error = error.__cause__ or error.__context__
    return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _quieten() -> None:
    """Leave the terminal to our own lines: bars, tables and what went wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("pytorch_lightning", "lightning_fabric"):
        for logger in [name, *(n for n in logging.root.manager.loggerDict if n.startswith(f"{name}."))]:
            logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
