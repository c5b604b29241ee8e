"""Write a model and its tokenizer as a folder that other programs load.

    python -m delvm.export runs/quickstart/student --format onnx --out student-onnx
    python -m delvm.export lvm-300m --tokenizer vqgan --format transformers --out lvm

transformers: safetensors for transformers and diffusers. onnx: float32 graphs for onnxruntime, compared with
PyTorch before anything is left. onnx-int8: the same with the layers' matrices in int8. README.md in the
folder says what was measured, and has a script that prompts the model without delvm. Of MODEL and DIR nothing
is run.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from delvm.errors import UserError, exit_status
from delvm.export.folder import FORMATS, export
from delvm.export.source import find_source


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments in, a folder out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="a folder in a run, such as student; or any folder with a Llama")
    add("--tokenizer", type=Path, metavar="DIR", help="default: tokenizer/ in MODEL or beside it")
    add("--format", choices=FORMATS, default="transformers", help="default: transformers")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write(options.model, options.tokenizer, options.format, options.out))


def write(model: Path, tokenizer: Path | None, format: str, out: Path) -> None:
    """Export `model` to `out`, which appears when it is whole. Raises as `folder.export`."""
    if out.exists():
        raise UserError(f"--out: '{out}' is there already; name a new folder")
    source = find_source(model, tokenizer)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    try:
        export(
            model, source.tokenizer, partial, card=source.card, num_codes=source.num_codes, format=format,
            held_out=source.held_out,
        )  # fmt: skip
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {format}, {size / 1e6:,.2f} MB; README.md says how it is used")


if __name__ == "__main__":
    sys.exit(main())
