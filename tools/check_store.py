"""Check that a token store's files are what was written: python tools/check_store.py FOLDER."""

import argparse
import sys
from pathlib import Path

from delvm.errors import UserError
from delvm.tokens.store import verify


def main() -> int:
    """Argument in, one line out; status 2 where a file is damaged or missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run's tokens: RUN_DIR/tokens")
    folder = parser.parse_args().folder
    try:
        total = verify(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {total:,} bytes of tokens, all as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
