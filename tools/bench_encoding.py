"""Images a second of encoding, plain fp32 against bf16, channels last and compiled: tools/bench_encoding.py

A random VQGAN of the published size (f16, 8192 codes, pictures of 256 px), or a trained tokenizer and
photographs. The rounds are interleaved: a busy machine slows all alike, and a ratio is the median of those
within one round. What a way changes is told beside it: the share of the codes that are not those of fp32.
On a CPU one thread is measured, unless --threads says otherwise, and bf16 is judged by one thread alone:
several gain less. --photos: a folder and all folders in it.

    python -m tools.bench_encoding
    python -m tools.bench_encoding --tokenizer runs/quickstart/tokenizer --photos photos --pictures 256
    python -m tools.bench_encoding --device cuda --pictures 256 --peak-tflops 989
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from delvm.errors import UserError
from delvm.images.augment import view
from delvm.images.files import SUFFIXES, read_picture
from delvm.images.folders import is_picture
from delvm.tokenizer import Tokenizer, load
from delvm.tokenizer.training import TokenizerConfig, build
from delvm.tokens.encoder import Encoder, TokensConfig
from tools.bench_step import markdown

PUBLISHED = TokenizerConfig(
    num_codes=8192, code_dim=64, patch=1, channels=128, channel_multipliers=[1, 2, 2, 4, 6], layers=2
)
BAR = 4.0
"""How many times as fast as in plain fp32 one thread of a processor with bfloat16 has to be in it."""


class Way(NamedTuple):
    """One way to encode."""

    config: TokensConfig
    channels_last: bool


MIXED = "bf16-mixed"
PLAIN, WANTED = "fp32", "bf16, channels last"
WAYS = {
    PLAIN: Way(TokensConfig(), False),
    "fp32, channels last": Way(TokensConfig(), True),
    "fp32, compiled": Way(TokensConfig(compile=True), False),
    "bf16": Way(TokensConfig(MIXED), False),
    WANTED: Way(TokensConfig(MIXED), True),
    "bf16, channels last, compiled": Way(TokensConfig(MIXED, compile=True), True),
}


class Finding(NamedTuple):
    """Of one way."""

    images_per_second: float
    faster: float
    """How many times as fast as plain fp32."""
    changed: float
    """Share of the codes that are not those of plain fp32."""


def encoder_of(tokenizer: Tokenizer, way: Way) -> Encoder:
    """A copy of the tokenizer that encodes this way."""
    encoder = Encoder(copy.deepcopy(tokenizer), way.config)
    encoder.tokenizer.to(memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
    return encoder


def flops(tokenizer: Tokenizer) -> int:
    """Floating-point operations for one picture, two for a multiplication and its addition."""
    vqgan = copy.deepcopy(tokenizer.vqgan).to("meta")
    side = tokenizer.image_size // tokenizer.patch
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vqgan.encode(torch.zeros(1, 3 * tokenizer.patch**2, side, side, device="meta"))
    return int(counter.get_total_flops())


def photographs(folder: Path, size: int, number: int) -> Tensor:
    """(number, 1, size, size, 3) uint8: the folder's pictures, from the first again where they are too few.

    Raises:
        UserError: it has none, or one cannot be read.
    """
    files = sorted(file for file in folder.expanduser().rglob("*") if is_picture(file.name))[:number]
    if not files:
        raise UserError(f"--photos: no {', '.join(SUFFIXES)} in '{folder}'")
    pictures = [
        view([read_picture(file)], [False], policy="none", size=size, nearest=False, seed=[0])[0]
        for file in files
    ]
    return torch.from_numpy(np.stack([pictures[n % len(pictures)] for n in range(number)]))[:, None]


def smooth_noise(size: int, number: int) -> Tensor:
    """(number, 1, size, size, 3) uint8: random colours that run into each other."""
    coarse = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(coarse, (size, size), mode="bilinear").mul(255).byte()
    return pictures.permute(0, 2, 3, 1)[:, None].contiguous()


def compare(tokenizer: Tokenizer, pictures: Tensor, names: list[str], rounds: int) -> dict[str, Finding]:
    """Time the ways round by round; one round more, the first, warms up and compiles. PLAIN is the first."""
    pictures = pictures.to(tokenizer.codebook.device)
    encoders = {name: encoder_of(tokenizer, WAYS[name]) for name in names}
    for encoder in encoders.values():  # a compiled pass is filled up
        encoder.pass_pictures = min(encoder.pass_pictures, len(pictures))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    codes = {}
    for number in range(rounds + 1):
        for name, encoder in encoders.items():
            begun = time.perf_counter()
            codes[name] = encoder(pictures).cpu()  # there, so all work is done
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return {
        name: Finding(
            len(pictures) / statistics.median(taken),
            statistics.median(a / b for a, b in zip(seconds[PLAIN], taken, strict=True)),
            (codes[name] != codes[PLAIN]).double().mean().item(),
        )
        for name, taken in seconds.items()
    }


def has_bfloat16(device: str) -> bool:
    """Whether the device has instructions for it; a processor that has none computes it in float32."""
    capabilities = torch.cpu.get_capabilities()
    return device != "cpu" or any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def verdict(found: dict[str, Finding], device: str, threads: int) -> tuple[str, bool]:
    """One line on the bar, and whether it is missed."""
    wanted = f"wanted: at least {BAR:.1f} times as fast as {PLAIN} in {WANTED} on one thread"
    if device != "cpu":
        return f"not judged, no processor; {wanted}", False
    if not has_bfloat16(device):
        return f"not judged, this processor has no instructions for bfloat16; {wanted}", False
    if threads != 1:
        return f"not judged, {threads} threads; {wanted}", False
    if WANTED not in found:
        return f"not measured; {wanted}", False
    missed = found[WANTED].faster < BAR
    return f"{'missed' if missed else 'held'}: {found[WANTED].faster:.2f}; {wanted}", missed


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of a trained one")
    parser.add_argument("--size", type=int, default=256, help="side in pixels of the random one's pictures")
    parser.add_argument("--photos", type=Path, help="folder of photographs; without it smooth noise")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; what is asked of bf16 is of one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[], help="beside plain fp32")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="the card's in bf16, dense")
    return parser.parse_args()


def main() -> int:
    """Arguments in, table and verdict out. Returns 1 where the bar is missed, 2 for wrong arguments."""
    options = parse()
    torch.set_num_threads(options.threads)
    able = has_bfloat16(options.device)
    ways = options.ways or [name for name in WAYS if able or not name.startswith("bf16")]
    if not (able or options.ways):
        print("bf16: left out, this processor has no instructions for it (--ways measures it even so)\n")
    names = [PLAIN, *(name for name in ways if name != PLAIN)]
    try:
        if options.tokenizer:
            tokenizer = load(options.tokenizer)
        else:
            torch.manual_seed(0)
            tokenizer = build(PUBLISHED, options.size).eval()
        size = tokenizer.image_size
        pictures = (
            photographs(options.photos, size, options.pictures)
            if options.photos
            else smooth_noise(size, options.pictures)
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = compare(tokenizer.to(options.device), pictures, names, options.rounds)
    per_image = flops(tokenizer)
    print(
        f"{'trained' if options.tokenizer else 'random'} tokenizer, {per_image / 1e9:.3g} GFLOP a picture of"
        f" {size} px, {tokenizer.num_codes} codes; {options.pictures} pictures, {options.rounds} rounds,"
        f" {options.device}, {options.threads} threads\n"
    )
    rows = []
    for name, about in found.items():
        tflops = about.images_per_second * per_image / 1e12
        share = f"{tflops / options.peak_tflops:.1%}" if options.peak_tflops else ""
        rows.append(
            [name, f"{about.images_per_second:.3g}", f"{about.faster:.2f}", f"{about.changed:.3%}",
             f"{tflops:.3g}", share]
        )  # fmt: skip
    line, missed = verdict(found, options.device, options.threads)
    columns = ["", "images/s", "times fp32", "codes changed", "TFLOP/s", "of peak"]
    print(markdown(columns, rows), line, sep="\n\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
