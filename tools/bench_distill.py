"""Time and memory of distillation, chunk by chunk against full logits: python -m tools.bench_distill

Two tables and a verdict on every bar: the loss alone, from hidden states and heads to the student's
gradients; and whole training steps of a small student, its rows, and what a cache says of them, read within
the step. The rounds of all variants of a table are interleaved: a busy machine slows all alike, and a ratio
is the median of those within one round. Memory is what is there at a pass's peak, in a process of its own: of
the loss on top of its inputs, of a step with weights, gradients, AdamW's state and a live teacher. Variants
of one objective must find the loss and the gradient's norm that full logits find. Liger is
`LigerFusedLinearJSDLoss` of liger-kernel, where that is installed.
"""

import argparse
import ctypes
import functools
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import LlamaConfig

from delvm.distill.fused import fused_cross_entropy, fused_kd_loss, fused_sparse_kd_loss
from delvm.distill.teacher import Hidden, Live, Sparse, Target
from tools.bench_step import LOSSES, VARIANTS, Loss, Pass, Steps, Variant, markdown, random_model

Builds = dict[str, Callable[[], Variant]]
"""Name, `PRECISION OBJECTIVE, WAY`, -> what makes its inputs and models."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""By precision, how far a variant's loss and gradient norm may be from those of full logits, relative."""


class Bar(NamedTuple):
    """`variant` takes at most `limit` times the `quantity` of `against`."""

    variant: str
    quantity: str
    limit: float
    against: str


LOSS_BARS = [
    Bar("bf16 live, fused", "time", 0.55, "bf16 live, full logits"),
    Bar("bf16 live, fused", "memory", 0.25, "bf16 live, full logits"),
    Bar("bf16 live, fused", "time", 1.0, "bf16 live, Liger compiled"),
    Bar("fp32 live, fused, bf16 teacher", "time", 0.45, "fp32 live, full logits"),
    Bar("fp32 live, fused", "time", 1.0, "fp32 live, Liger compiled"),
]
STEP_BARS = [
    Bar("bf16 live, fused", "time", 0.35, "fp32 live, full logits"),
    Bar("bf16 live, fused", "time", 0.80, "bf16 live, full logits"),
    *(
        Bar(f"{precision} {objective}, fused", "time", 1.10, f"{precision} CE, {way}")
        for precision in PRECISIONS
        for objective in ("top-64", "12 drawn")
        for way in ("full logits", "fused")
    ),
]


def reference(name: str) -> str:
    """The variant that has the same objective from full logits."""
    return f"{name.split(',')[0]}, full logits"


# --- what is measured ---


class Inputs:
    """Hidden states and heads of both models, and labels."""

    def __init__(self, arguments: argparse.Namespace, student: torch.dtype, teacher: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        tokens, codes = arguments.tokens, arguments.codes

        def normal(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(rows, width, generator=self.generator)
            return drawn.to(arguments.device, dtype)

        self.hidden = normal(tokens, arguments.student, student).requires_grad_()
        self.head = normal(codes, arguments.student, student, arguments.student**-0.5).requires_grad_()
        hidden = normal(tokens, arguments.teacher, teacher)
        self.teacher = Hidden(hidden, normal(codes, arguments.teacher, teacher, arguments.teacher**-0.5))
        self.labels = torch.randint(codes, (tokens,), generator=self.generator).to(arguments.device)

    def target(self, objective: str) -> Target | None:
        """All that the teacher says, what a cache would have kept of it, or nothing."""
        if objective in ("live", "CE"):
            return self.teacher if objective == "live" else None
        device = self.labels.device
        found: list[tuple[Tensor, Tensor]] = []
        for hidden in self.teacher.hidden.split(256):
            p = torch.softmax(hidden.float() @ self.teacher.head.T.float(), -1).cpu()
            if objective == "top-64":
                likeliest = p.topk(64)
                found.append((likeliest.values, likeliest.indices))
            else:
                drawn = p.multinomial(12, replacement=True, generator=self.generator)
                found.append((torch.full(drawn.shape, 1 / 12), drawn))
        probabilities, ids = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
        return Sparse(ids, probabilities, tail=objective == "top-64")


def fused(hidden: Tensor, head: Tensor, target: Target | None, labels: Tensor, *, chunk_size: int) -> Tensor:
    """The package's loss."""
    if target is None:
        return fused_cross_entropy(hidden, head, labels, chunk_size=chunk_size)[0]
    if isinstance(target, Hidden):
        return fused_kd_loss(hidden, head, target.hidden, target.head, labels, chunk_size=chunk_size)[0]
    ids, probabilities = target.ids, target.probabilities
    return fused_sparse_kd_loss(
        hidden, head, ids, probabilities, labels, tail=target.tail, chunk_size=chunk_size
    )[0]


def loss_variants(arguments: argparse.Namespace) -> Builds:
    """The losses alone; variants of one precision share their inputs."""
    make = functools.cache(functools.partial(Inputs, arguments))
    losses: dict[str, Loss] = {**LOSSES, "fused": functools.partial(fused, chunk_size=arguments.chunk_size)}

    @functools.cache
    def target_of(objective: str, student: torch.dtype, teacher: torch.dtype) -> Target | None:
        return make(student, teacher).target(objective)

    def build(objective: str, way: str, student: torch.dtype, teacher: torch.dtype) -> Variant:
        inputs, loss = make(student, teacher), losses[way]
        target = target_of(objective, student, teacher)

        def run() -> Pass:
            value = loss(inputs.hidden, inputs.head, target, inputs.labels)
            gradients = torch.autograd.grad(value, (inputs.hidden, inputs.head))
            return Pass(value.item(), gradients)

        return Variant(run)

    found: Builds = {
        f"{precision} {objective}, {way}": functools.partial(build, objective, way, dtype, dtype)
        for precision, dtype in PRECISIONS.items()
        for objective, way in VARIANTS
    }
    mixed = functools.partial(build, "live", "fused", torch.float32, torch.bfloat16)
    return {**found, "fp32 live, fused, bf16 teacher": mixed}


def step_variants(arguments: argparse.Namespace, caches: Path) -> Builds:
    """Whole steps; `caches` is empty, or those that this has written before."""
    student, teacher = (
        LlamaConfig(
            vocab_size=arguments.codes,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=arguments.length,
            bos_token_id=None,
            eos_token_id=None,
        )
        for width, layers in (arguments.step_student, arguments.step_teacher)
    )

    @functools.cache
    def live(precision: str) -> Live:
        return Live(random_model(teacher, seed=1), precision=precision)

    steps = Steps(
        student, live, caches, length=arguments.length, rows=arguments.rows,
        device=torch.device(arguments.device),
    )  # fmt: skip
    if not any(caches.iterdir()):
        steps.write_caches("32")
    return {
        f"{precision} {objective}, {way}": functools.partial(
            steps.variant, objective, way, mixed=precision == "bf16"
        )
        for precision in PRECISIONS
        for objective, way in VARIANTS
    }


# --- measuring ---


class Finding(NamedTuple):
    """What a variant computes."""

    loss: float
    norm: float
    """Of the gradient."""


def find(variant: Variant) -> Finding:
    """Run it once."""
    found = variant.run()
    return Finding(found.loss, float(get_total_norm(found.gradients)))


def check(findings: Mapping[str, Finding]) -> dict[str, float]:
    """By name, how far a loss is from that of full logits, relative.

    Raises:
        AssertionError: too far, or the gradient's norm is.
    """
    apart = {}
    for name, found in findings.items():
        wanted = findings[reference(name)]
        tolerance = TOLERANCES["bf16" if "bf16" in name else "fp32"]
        apart[name], norms_apart = (abs(a - b) / b for a, b in zip(found, wanted, strict=True))
        agree = apart[name] <= tolerance and norms_apart <= tolerance
        assert agree, f"{name}: {found}, {reference(name)}: {wanted}"
    return apart


def measure_peak(variant: Variant, device: str) -> float:
    """MB at the peak of a pass, on top of what was there before it; with what the variant holds."""
    variant.run()  # loads libraries and kernels, and makes the optimizer's state
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.run()
        peak = torch.cuda.max_memory_allocated()
    else:
        # what was freed goes back to the system, else a pass could take it unseen; and the peak starts anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        variant.run()
        peak = _resident("VmHWM")
    return (peak - before + variant.held()) / 2**20


def _resident(key: str) -> int:
    """Bytes of memory that the system says this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure_times(variants: Mapping[str, Variant], rounds: int, device: str) -> dict[str, list[float]]:
    """By name, the seconds of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            _finish(device)
            begun = time.perf_counter()
            variant.run()
            _finish(device)
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def measure(
    builds: Builds, bars: list[Bar], peaks: Mapping[str, float], arguments: argparse.Namespace
) -> None:
    """Check and time all variants; print the table and the verdicts."""
    torch.compiler.reset()  # or Liger would be compiled anew for the shapes of both tables
    variants = {name: build() for name, build in builds.items()}
    findings = {name: find(variant) for name, variant in variants.items()}  # warms up as well
    apart = check(findings)
    seconds = measure_times(variants, arguments.rounds, arguments.device)

    def ratio(quantity: str, name: str, against: str) -> float | None:
        if quantity == "memory":
            return peaks[name] / peaks[against] if peaks.keys() >= {name, against} else None
        if not seconds.keys() >= {name, against}:
            return None
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))

    def cells(name: str) -> list[str]:
        full = f"{name[:4]} live, full logits"
        times, memory = ratio("time", name, full), ratio("memory", name, full)
        return [
            name,
            f"{1e3 * statistics.median(seconds[name]):.1f}",
            f"{times:.2f}",
            f"{peaks[name]:.0f}" if name in peaks else "",
            "" if memory is None else f"{memory:.2f}",
            f"{findings[name].loss:.5f}",
            f"{apart[name]:.0e}",
        ]

    print(
        markdown(
            ["variant", "ms", "x full", "MB", "x full", "loss", "off by"], [cells(name) for name in variants]
        )
    )
    print()
    for bar in bars:
        found = ratio(bar.quantity, bar.variant, bar.against)
        verdict = "not measured" if found is None else "held" if found <= bar.limit else "missed"
        value = "" if found is None else f" {found:.2f}"
        print(
            f"{verdict}: {bar.variant}: {bar.quantity}{value} of {bar.against};"
            f" wanted: at most {bar.limit:.2f}"
        )


def shape(text: str) -> tuple[int, int]:
    """`512x8` -> width, layers."""
    width, layers = map(int, text.split("x"))
    return width, layers


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["loss", "step"], help="one of the two tables")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096, help="of the loss alone")
    parser.add_argument("--student", type=int, default=512, help="width, in the loss alone")
    parser.add_argument("--teacher", type=int, default=2048, help="width, in the loss alone")
    parser.add_argument("--chunk-size", type=int, default=512, help="of the loss alone")
    parser.add_argument("--step-student", type=shape, default="256x6", metavar="WIDTHxLAYERS")
    parser.add_argument("--step-teacher", type=shape, default="512x8", metavar="WIDTHxLAYERS")
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--length", type=int, default=1024, help="of a row, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="what computes in bf16; by default where the processor has instructions for it",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled Liger"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # table, variant, folder of the caches
    return parser.parse_args()


def left_out(arguments: argparse.Namespace) -> list[str]:
    """What is in the names of variants that are not measured; says why."""
    capabilities = torch.cpu.get_capabilities()
    able = arguments.device != "cpu" or any(capabilities.get(x) for x in ("amx_bf16", "avx512_bf16"))
    if arguments.bf16 is None and not able:
        print("bf16: left out, this processor has no instructions for it (--bf16 measures it all the same)")
    found = [] if (able if arguments.bf16 is None else arguments.bf16) else ["bf16"]
    if importlib.util.find_spec("liger_kernel") is None:
        print("Liger: left out, liger-kernel is not installed")
        found.append("Liger")
    return found if arguments.compile else [*found, "compiled"]


def main() -> None:
    """Arguments in, tables out."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        table, name, folder = arguments.peak
        builds = loss_variants(arguments) if table == "loss" else step_variants(arguments, Path(folder))
        print(measure_peak(builds[name](), arguments.device))
        return
    skipped = left_out(arguments)

    def peak(table: str, name: str, build: Callable[[], Variant], caches: str) -> float:
        if torch.device(arguments.device).type == "cuda":
            return measure_peak(build(), arguments.device)
        # a process of its own: what others have left in this one would be taken unseen
        command = [sys.executable, "-m", "tools.bench_distill", *sys.argv[1:], "--peak", table, name, caches]
        root = Path(__file__).parents[1]
        return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root).stdout)

    titles = {
        "loss": "loss alone: {tokens} tokens, {codes} codes, student {student} wide, teacher {teacher} wide",
        "step": "whole step: {rows} rows of {length} tokens, {codes} codes, student {step_student[0]} wide x"
        " {step_student[1]} layers, teacher {step_teacher[0]} x {step_teacher[1]}",
    }
    with TemporaryDirectory() as caches:
        for table in [arguments.only] if arguments.only else titles:
            if table == "loss":
                found, bars = loss_variants(arguments), LOSS_BARS
            else:
                found, bars = step_variants(arguments, Path(caches)), STEP_BARS
            builds = {
                name: build for name, build in found.items() if not any(part in name for part in skipped)
            }
            print(f"\n{titles[table].format(**vars(arguments))}\n")
            peaks = {}
            if arguments.memory:
                peaks = {name: peak(table, name, build, caches) for name, build in builds.items()}
            measure(builds, bars, peaks, arguments)


if __name__ == "__main__":
    main()
