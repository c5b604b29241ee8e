"""Tokens a second, MFU and memory of students, by where the signal comes from: python -m tools.bench_students

Whole training steps on one GPU, bf16-mixed, of a 1B teacher's 300M and 80M students, with what a cache says
read ahead by worker processes as in training. Printed as one Markdown table. Memory is the most that torch
has allocated: weights, gradients, AdamW's state, a live teacher, and a step. Model FLOPs are those of
`delvm.pretrain.forward_flops`, three times for the student and once for a live teacher. Without a GPU:

    python -m tools.bench_students --sizes micro --teacher micro --device cpu --length 64 --codes 64
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.llama import SIZES, configuration
from delvm.monitor import peak_memory, utilization
from delvm.pretrain import forward_flops
from delvm.training import checkpoint_activations, compile_layers
from tools.bench_step import Steps, markdown, random_model

SIGNALS = {
    "CE alone": ("CE", "fused"),
    "live": ("live", "fused"),
    "cached, top-64": ("top-64", "fused"),
    "cached, 12 drawn": ("12 drawn", "fused"),
    "full logits": ("live", "full logits"),
}
"""By its name in the table: objective and way of `bench_step`."""
TOLERANCE = 5e-2  # as bench_distill's of bf16


class Cost(NamedTuple):
    """Of one student under one signal."""

    tokens_per_second: float
    flops_per_token: float
    memory: float
    """GiB."""
    loss: float


def cost(steps: Steps, teacher: Live, signal: str, arguments: argparse.Namespace) -> Cost:
    """Train for some steps."""
    objective, way = SIGNALS[signal]
    device = steps.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if arguments.checkpointing:
        checkpoint_activations(steps.student)
    if arguments.compile:
        compile_layers(steps.student)
    variant = steps.variant(objective, way, mixed=True)
    loss = variant.run().loss
    for _ in range(arguments.warm_up):
        variant.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(arguments.steps):
        variant.run()  # ends with the loss's value on the host
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    tokens = arguments.steps * arguments.micro_batch * arguments.length
    flops = 3 * forward_flops(steps.student, arguments.length)
    if objective == "live":
        flops += forward_flops(teacher.model, arguments.length)
    return Cost(tokens / (time.perf_counter() - begun), flops, peak_memory(device), loss)


def measure(arguments: argparse.Namespace, caches: Path) -> dict[tuple[str, str], Cost | None]:
    """By student and signal what it costs, None where it does not fit."""
    device = torch.device(arguments.device)
    config = configuration(arguments.teacher, arguments.codes, arguments.length)
    teacher = Live(random_model(config, seed=1), precision="bf16", compile=arguments.compile)

    def make(size: str) -> Steps:
        return Steps(
            configuration(size, arguments.codes, arguments.length), lambda _: teacher, caches,
            length=arguments.length, rows=arguments.micro_batch, device=device, workers=arguments.workers,
        )  # fmt: skip

    make(arguments.sizes[0]).write_caches("bf16")
    costs: dict[tuple[str, str], Cost | None] = {}
    for size in arguments.sizes:
        for signal in SIGNALS:
            teacher.to(torch.device("cpu"))  # it comes where it is needed
            gc.collect()  # the last student
            torch.compiler.reset()  # or the next would count as one more shape of the same model
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                costs[size, signal] = cost(make(size), teacher, signal, arguments)
            except torch.OutOfMemoryError:
                costs[size, signal] = None
        live, full = costs[size, "live"], costs[size, "full logits"]
        if live and full:
            assert abs(live.loss - full.loss) <= TOLERANCE * full.loss, (size, live.loss, full.loss)
    return costs


def table(costs: dict[tuple[str, str], Cost | None], card: str) -> str:
    """The costs as Markdown."""
    rows = []
    for (size, signal), found in costs.items():
        if found is None:
            rows.append([size, signal, "out of memory", "", "", "", ""])
            continue
        share = utilization(found.tokens_per_second * found.flops_per_token, card, 1)
        plain = costs[size, "CE alone"]
        rows.append(
            [
                size,
                signal,
                f"{found.tokens_per_second:,.0f}",
                f"{plain.tokens_per_second / found.tokens_per_second:.2f}" if plain else "",
                "" if share is None else f"{share:.1%}",
                f"{found.memory:.1f}",
                f"{found.loss:.4f}",
            ]
        )
    heads = ["student", "signal", "tokens/s", "time, x CE alone", "MFU", "peak GiB", "first loss"]
    return markdown(heads, rows)


def main() -> int:
    """Arguments in, table out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", choices=SIZES, default="1b", metavar="SIZE")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["300m", "80m"], metavar="SIZE")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=40, help="that are timed")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before these")
    parser.add_argument("--workers", type=int, default=4, help="processes that read ahead")
    parser.add_argument("--checkpointing", action="store_true", help="of the student's activations")
    parser.add_argument("--compile", action="store_true", help="both models")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    try:
        if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
            tiny = "--sizes micro --teacher micro --device cpu --length 64 --codes 64"
            raise UserError(f"--device {arguments.device}: torch sees no GPU; a CPU can run: {tiny}")
        with TemporaryDirectory() as caches:
            costs = measure(arguments, Path(caches))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cuda = torch.device(arguments.device).type == "cuda"
    card = torch.cuda.get_device_name(torch.device(arguments.device)) if cuda else "CPU"
    print(
        f"{card}, torch {torch.__version__}; teacher {arguments.teacher} in bf16, students bf16-mixed,"
        f" {arguments.micro_batch} rows of {arguments.length} tokens a step, {arguments.codes} codes\n"
    )
    print(table(costs, card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
