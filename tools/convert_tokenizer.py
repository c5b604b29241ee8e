"""A published tokenizer -> a folder of this project: config.json, safetensors, delvm_tokenizer.json.

    python tools/convert_tokenizer.py vqgan-f16-8192-laion tokenizers/laion
    python tools/convert_tokenizer.py vq_ds16_c2i.pt tokenizers/llamagen --image-size 384

What it reads: delvm/tokenizer/published.py. The folder is for `tokenizer.folder` of a recipe, and
diffusers.VQModel loads it too.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from delvm.tokenizer import Tokenizer, load


def convert(source: Path, out: Path, image_size: int | None, pixel_range: list[float] | None) -> Tokenizer:
    """Load `source` and write it to `out`, a new folder, which appears when it is whole.

    Raises:
        ValueError: `out` is there already; `source` is no tokenizer; impossible settings.
        OSError: `out` cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out}: is there already; name a new folder")
    tokenizer = load(source, image_size=image_size, pixel_range=pixel_range)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    try:
        tokenizer.save(partial)
        partial.rename(out)
    except SafetensorError as error:  # a full disk reaches us under this name
        raise OSError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tokenizer


def main() -> int:
    """Arguments in, what was written out in one line; status 2 where nothing was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder or file of a tokenizer")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--image-size", type=int, help="side of the pictures (default: what the source says)")
    parser.add_argument(
        "--pixel-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="what the network reads for black and white (default: its kind's)",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        tokenizer = convert(arguments.source, arguments.out, arguments.image_size, arguments.pixel_range)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    low, high = tokenizer.pixel_range
    print(
        f"{arguments.out}: {tokenizer.num_codes} codes, {tokenizer.num_tokens} a picture of"
        f" {tokenizer.image_size} px; its network reads {low:g}..{high:g}; hash {tokenizer.hash}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
