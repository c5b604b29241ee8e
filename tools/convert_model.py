"""A published checkpoint -> a transformers folder of a plain Llama.

    python tools/convert_model.py DeLVM-1B teachers/delvm-1b
    python tools/convert_model.py LVM-7B teachers/lvm-7b --codes 8192

SOURCE is a checkpoint of DeLVM in InternLM's format, a transformers folder of DeLVM or of LVM, or of any
LlamaForCausalLM over image codes, whole or in shards; its files tell which, and one line says so. Nothing of
it is run. teacher.folder takes SOURCE as well: what is written here is for other programs.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from delvm import llama, published
from delvm.errors import UserError


def convert(source: Path, out: Path, *, num_codes: int | None, bos: int | None, eos: int | None) -> None:
    """Write `out`, whole or not at all, and print what came in, what is left out and what went out.

    Raises:
        UserError: as `llama.load`; `out` is there already.
        OSError: it cannot be written.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    found = published.find(source)
    print(f"{source}: {found.layout}")
    model = llama.load(source, num_codes=num_codes, bos=bos, eos=eos)
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        before, after = getattr(found.config, key), getattr(config, key)
        if before != after:
            print(f"{key}: {after} instead of {before}")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        llama.save(model, partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"{out}: LlamaForCausalLM, {parameters / 1e6:,.2f}M parameters in {dtype}, {config.vocab_size} ids,"
        f" {config.max_position_embeddings} positions"
    )


def main() -> int:
    """Arguments in, a folder out; status 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codes", type=int, help="of the tokenizer; no id below is kept as a special one")
    parser.add_argument("--bos", type=int, help="the id that begins a sentence, instead of the folder's")
    parser.add_argument("--eos", type=int, help="the id that ends one")
    options = parser.parse_args()
    try:
        convert(options.source, options.out, num_codes=options.codes, bos=options.bos, eos=options.eos)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
