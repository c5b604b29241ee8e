"""What a user can do wrong, as one line."""

import sys
from collections.abc import Callable

USAGE_ERROR, STOPPED = 2, 130


class UserError(ValueError):
    """A mistake in a recipe, a file or a folder, in one line: key or file, what is wrong, the choices.

    Entry points print the message without a traceback and exit with status 2.
    """


def exit_status(command: Callable[[], object]) -> int:
    """Run a command; what the user can mend, and what the disk refuses, becomes one line on stderr.

    Returns:
        The exit status: 0, 2 after such a line, 130 after Ctrl-C.
    """
    try:
        command()
    except UserError as error:
        why: object = error
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else error
    except KeyboardInterrupt:
        return STOPPED
    else:
        return 0
    print(f"error: {why}", file=sys.stderr)
    return USAGE_ERROR
