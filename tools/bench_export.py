"""Size and speed of every export format on the CPU: python -m tools.bench_export runs/quickstart/student

Writes each format, reads it back, and lets it complete a prompt of random pictures, greedily. The rounds are
interleaved: a busy machine slows all alike. Load is of files that were just written, so from memory. A
picture is the prompt encoded and read, the result drawn and decoded; tokens a second are those drawn, in the
time that reading the prompt and drawing take. What each graph computes is compared with the model in float32,
on held-out sentences of the model's run or on random codes. Two minutes or so for a quickstart's student:

    python -m tools.bench_export runs/quickstart/student --threads 1 --rounds 5
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.export import FORMATS
from delvm.export.__main__ import write
from delvm.export.folder import RANDOM
from delvm.export.onnx import Graphs
from delvm.export.quality import Sentences, measure, random_sentences
from delvm.export.source import find_source
from delvm.tokenizer import Tokenizer
from tools.bench_step import markdown

SHOWN = 3  # an image, its annotation and a query; fewer where the model has no room


class Program(Protocol):
    """A folder that was read back; as delvm.export.onnx.Graphs."""

    def encode(self, pixels: np.ndarray) -> np.ndarray: ...
    def complete(self, prompts: np.ndarray, num_tokens: int) -> np.ndarray: ...
    def decode(self, codes: np.ndarray) -> np.ndarray: ...


class Transformers:
    """The same of a folder for transformers, which runs by its own `generate`."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = Tokenizer.load(folder / "tokenizer")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self.tokenizer.encode(torch.from_numpy(pixels)).numpy()

    def complete(self, prompts: np.ndarray, num_tokens: int) -> np.ndarray:
        ids = torch.from_numpy(prompts)
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        return found[:, ids.shape[1] :].numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.tokenizer.decode(torch.from_numpy(codes)).numpy()


class Times(NamedTuple):
    """Seconds of one round."""

    load: float
    picture: float
    tokens: float


def read_back(format: str, folder: Path, threads: int) -> Program:
    """The program of a format."""
    return Transformers(folder) if format == "transformers" else Graphs(folder, threads=threads)


def one_round(
    format: str, folder: Path, pixels: np.ndarray, bos: int | None, threads: int
) -> tuple[Times, np.ndarray]:
    """Load, prompt once to warm up, prompt; returns the codes as well."""
    begun = time.perf_counter()
    program = read_back(format, folder, threads)
    load = time.perf_counter() - begun
    for _ in range(2):
        begun = time.perf_counter()
        shown = program.encode(pixels)
        prompt = np.concatenate([[bos] if bos is not None else [], shown.ravel()]).astype(np.int64)[None]
        reading = time.perf_counter()
        codes = program.complete(prompt, shown.shape[1])
        read = time.perf_counter()
        program.decode(codes)
        ended = time.perf_counter()
    return Times(load, ended - begun, read - reading), codes


def size_of(folder: Path, pattern: str = "*") -> int:
    """Bytes on the disk."""
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder in a run, such as student; or any with a Llama")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer/ in MODEL or beside it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> int:
    """Arguments in, tables out. Returns 2 for what the user can mend."""
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench(options, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def bench(options: argparse.Namespace, folder: Path) -> None:
    """Write, time and compare; print both tables."""
    source = find_source(options.model, options.tokenizer)
    for format in FORMATS:
        write(options.model, options.tokenizer, format, folder / format)
    model = llama.load(options.model).float()
    tokenizer = Tokenizer.load(folder / "transformers" / "tokenizer")
    config, size, tokens = model.config, tokenizer.image_size, tokenizer.num_tokens
    shown = min(SHOWN, (config.max_position_embeddings - (config.bos_token_id is not None)) // tokens - 1)
    pixels = np.random.default_rng(0).random((shown, 3, size, size), dtype=np.float32)
    times: dict[str, list[Times]] = {format: [] for format in FORMATS}
    codes = {}
    for _ in range(options.rounds):
        for format, of_format in times.items():
            found, codes[format] = one_round(
                format, folder / format, pixels, config.bos_token_id, options.threads
            )
            of_format.append(found)
    rows = []
    for format, of_format in times.items():
        load, picture, drawing = (statistics.median(of_all) for of_all in zip(*of_format, strict=True))
        whole, of_model = size_of(folder / format), size_of(folder / format, "model.*")
        same = (codes[format] == codes["transformers"]).mean()
        sizes = [f"{num_bytes / 1e6:.2f}" for num_bytes in (whole, of_model)]
        spent = [f"{1000 * seconds:.0f}" for seconds in (load, picture)]
        rows.append([format, *sizes, *spent, f"{tokens / drawing:.0f}", f"{same:.1%}"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"\n{parameters / 1e6:.2f}M parameters, {shown} pictures of {size} px shown, {tokens} codes drawn,"
        f" {options.threads} threads, median of {options.rounds} rounds\n"
    )
    columns = ["", "MB", "model MB", "load ms", "picture ms", "tokens/s", "codes as transformers"]
    print(markdown(columns, rows), "\n")
    length = min(config.max_position_embeddings, 4 * tokens)
    sentences = source.held_out or random_sentences(RANDOM, length, tokenizer.num_codes)
    print(markdown(*compare(model, folder, sentences, options.threads)))


def compare(
    model: LlamaForCausalLM, folder: Path, sentences: Sentences, threads: int
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what every graph computes, against the model."""
    rows = []
    for format in FORMATS:
        if format != "transformers":
            found = measure(model, Graphs(folder / format, threads=threads), sentences)
            for task, x in found.items():
                losses, shares = (x.exact, x.lossy), (x.same_code, x.same_drawn)
                numbers = [str(x.sentences), *(f"{x:.4f}" for x in losses), *(f"{x:.1%}" for x in shares)]
                rows.append([f"{format}, {task}", *numbers])
    return ["", "sentences", "loss of the model", "of the format", "same code", "same code drawn"], rows


if __name__ == "__main__":
    sys.exit(main())
