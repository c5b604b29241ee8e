"""A page in the browser: choose or drop solved pairs and a query, and watch the annotation being drawn.

    python -m delvm.demo runs/quickstart
    python -m delvm.demo lvm-7b --tokenizer vqgan --port 8000
    python -m delvm.demo runs/jsd runs/quickstart/teacher --tokenizer runs/quickstart/tokenizer

The folder of a run shows its teacher and student side by side, that of a model this one. The page is served
to this machine alone, and nothing is asked of any other.
"""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from delvm.errors import UserError, exit_status

HOST, PORT = "127.0.0.1", 7860
MOST_SHOTS = 8  # pairs that the page has room for


def find_models(folder: Path, teacher: Path | None) -> dict[str, Path]:
    """Folders of the models to be shown, by name: the teacher, if there is one, then the student.

    A folder in which no role is found stands for a model.
    """
    roles = ("teacher", "student")
    found = {role: folder / role for role in roles if (folder / role / "config.json").is_file()}
    found = found or {"student" if teacher else folder.absolute().name: folder}
    if teacher is None:
        return found
    return {"teacher": teacher} | {name: path for name, path in found.items() if name != "teacher"}


def check_port(port: int) -> None:
    """Raises UserError for one that is taken, or none."""
    if not 0 < port < 65536:
        raise UserError(f"--port: {port}, must be in 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port: {port} cannot be had ({error.strerror}); give another") from error


def serve(options: argparse.Namespace) -> None:
    """Load, show, and wait for Ctrl-C. Raises UserError before anything is served."""
    check_port(options.port)
    if find_spec("gradio") is None:
        raise UserError('gradio is missing: pip install -e ".[demo]"')

    # imported here, so that --help and what is above answer at once
    from delvm import student
    from delvm.demo.examples import write_examples
    from delvm.demo.prompt import Model

    folders = find_models(options.folder, options.teacher)
    models = {
        name: Model(student.load(folder, options.tokenizer), folder, options.tokenizer)
        for name, folder in folders.items()
    }
    for model in models.values():
        if not model.student.max_shots():
            raise UserError(
                f"{model.folder}: its positions hold {model.student.room} pictures, not a pair, a query and"
                " its annotation"
            )
    shots = min(MOST_SHOTS, *(model.student.max_shots() for model in models.values()))
    size = max(model.student.tokenizer.image_size for model in models.values())
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is reported home
    from delvm.demo import page

    with TemporaryDirectory() as folder:
        shown = page.build(models, write_examples(Path(folder), options.folder, size), shots)
        try:
            page.launch(shown, HOST, options.port)
            print(f"{', '.join(models)}: http://{HOST}:{options.port}/ (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        finally:
            shown.close(verbose=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments in, a page out, until Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_OR_MODEL", help="a run's folder, or a model's")
    add("teacher", type=Path, nargs="?", help="the folder of a model to be shown beside it")
    add("--tokenizer", type=Path, metavar="DIR", help="default: tokenizer/ in a model's folder, or beside it")
    add("--port", type=int, default=PORT, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    return exit_status(lambda: serve(options))


if __name__ == "__main__":
    sys.exit(main())
