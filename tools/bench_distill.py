"""Time and memory of a distillation loss, chunk by chunk against full logits: python tools/bench_distill.py

By default the loss alone, from hidden states and heads to the student's gradients; with --step whole steps of
a small teacher and student. The rounds of all variants are interleaved: a busy machine slows all alike, and a
ratio is the median of those within one round. Memory is what a process of its own holds at its peak on
top of its inputs. Liger is `LigerFusedLinearJSDLoss` of liger-kernel, where that is installed: at beta 0 its
JSD is forward KL, so that with both weights at 1 it computes the loss that the others do.
"""

import argparse
import functools
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from delvm.distill.fused import fused_cross_entropy, fused_kd_loss, fused_sparse_kd_loss

Run = Callable[[], float]
"""One forward and backward pass -> the loss."""
FP32, BF16 = torch.float32, torch.bfloat16


class Bar(NamedTuple):
    """`variant` takes at most `limit` times the `quantity` of `against`."""

    variant: str
    quantity: str
    limit: float
    against: str


LOSS_BARS = [
    Bar("bf16 fused", "time", 0.55, "bf16 full logits"),
    Bar("bf16 fused", "memory", 0.25, "bf16 full logits"),
    Bar("bf16 fused", "time", 1.0, "bf16 Liger, compiled"),
    Bar("fp32 fused, bf16 teacher", "time", 0.45, "fp32 full logits"),
    Bar("fp32 fused", "time", 1.0, "fp32 Liger, compiled"),
]
STEP_BARS = [
    Bar("bf16 fused, bf16 teacher", "time", 0.35, "fp32 full logits"),
    Bar("bf16 fused, bf16 teacher", "time", 0.80, "bf16 full logits"),
    Bar("fp32 cached top-64, fused", "time", 1.10, "fp32 CE"),
    Bar("bf16 cached top-64, fused", "time", 1.10, "bf16 CE"),
]


class Inputs:
    """Hidden states and heads of both models, labels, and what a cache of the teacher would hold."""

    def __init__(self, arguments: argparse.Namespace, student: torch.dtype, teacher: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens, codes = arguments.tokens, arguments.codes

        def normal(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            drawn = scale * torch.randn(rows, width, generator=generator)
            return drawn.to(arguments.device, dtype)

        self.hidden = normal(tokens, arguments.student, student).requires_grad_()
        self.head = normal(codes, arguments.student, student, arguments.student**-0.5).requires_grad_()
        self.teacher_hidden = normal(tokens, arguments.teacher, teacher)
        self.teacher_head = normal(codes, arguments.teacher, teacher, arguments.teacher**-0.5)
        self.labels = torch.randint(codes, (tokens,), generator=generator).to(arguments.device)
        self.top_probabilities, self.top_ids = cache(normal(tokens, 64, FP32), codes, generator)
        self.drawn = torch.randint(codes, (tokens, 12), generator=generator).to(arguments.device)

    @property
    def student(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.head, self.labels


def cache(scores: torch.Tensor, codes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (tokens, k) -> (probabilities (tokens, k) that sum to 0.9, distinct ids (tokens, k))."""
    first = torch.randint(codes, (len(scores), 1), generator=generator).to(scores.device)
    # an odd step meets no code twice where the number of codes is a power of two
    ids = (first + 101 * torch.arange(scores.shape[1], device=scores.device)) % codes
    return 0.9 * torch.softmax(scores, -1), ids


def full_logits(inputs: Inputs) -> torch.Tensor:
    logits = (inputs.hidden @ inputs.head.T).float()
    teacher_logits = (inputs.teacher_hidden @ inputs.teacher_head.T).float()
    return cross_entropy(logits, inputs.labels) + kl_div(
        log_softmax(logits, -1), log_softmax(teacher_logits, -1), reduction="batchmean", log_target=True
    )


def fused(inputs: Inputs, chunk: int) -> torch.Tensor:
    hidden, head, labels = inputs.student
    return fused_kd_loss(hidden, head, inputs.teacher_hidden, inputs.teacher_head, labels, chunk_size=chunk)[
        0
    ]


def fused_top(inputs: Inputs, chunk: int) -> torch.Tensor:
    hidden, head, labels = inputs.student
    ids, probabilities = inputs.top_ids, inputs.top_probabilities
    return fused_sparse_kd_loss(hidden, head, ids, probabilities, labels, tail=True, chunk_size=chunk)[0]


def fused_drawn(inputs: Inputs, chunk: int) -> torch.Tensor:
    hidden, head, labels = inputs.student
    weights = torch.full(inputs.drawn.shape, 1 / 12, device=labels.device)
    return fused_sparse_kd_loss(hidden, head, inputs.drawn, weights, labels, tail=False, chunk_size=chunk)[0]


def full_ce(inputs: Inputs) -> torch.Tensor:
    return cross_entropy((inputs.hidden @ inputs.head.T).float(), inputs.labels)


def fused_ce(inputs: Inputs, chunk: int) -> torch.Tensor:
    return fused_cross_entropy(*inputs.student, chunk_size=chunk)[0]


def liger(inputs: Inputs, compiled: bool) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    hidden, head, labels = inputs.student
    return loss(hidden, head, inputs.teacher_hidden, inputs.teacher_head, labels)


def loss_variants(arguments: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Name -> what makes its inputs; those of one precision are shared."""
    make = functools.cache(functools.partial(Inputs, arguments))
    chunk = arguments.chunk_size

    def runner(
        loss: Callable[[Inputs], torch.Tensor], student: torch.dtype, teacher: torch.dtype
    ) -> Callable[[], Run]:
        def build() -> Run:
            inputs = make(student, teacher)

            def run() -> float:
                inputs.hidden.grad = inputs.head.grad = None
                value = loss(inputs)
                value.backward()
                return value.item()

            return run

        return build

    found = {}
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        losses: dict[str, Callable[[Inputs], torch.Tensor]] = {
            "full logits": full_logits,
            "fused": lambda inputs: fused(inputs, chunk),
            "fused top-64": lambda inputs: fused_top(inputs, chunk),
            "fused 12 drawn": lambda inputs: fused_drawn(inputs, chunk),
            "Liger, eager": lambda inputs: liger(inputs, compiled=False),
            "Liger, compiled": lambda inputs: liger(inputs, compiled=True),
            "full CE": full_ce,
            "fused CE": lambda inputs: fused_ce(inputs, chunk),
        }
        found |= {f"{name} {key}": runner(loss, dtype, dtype) for key, loss in losses.items()}
    found["fp32 fused, bf16 teacher"] = runner(lambda inputs: fused(inputs, chunk), FP32, BF16)
    return found


def step_variants(arguments: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Whole steps of a student 256 wide x 6 layers: teacher 512 x 8, 2 sentences of 1,024 tokens, AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    codes, device, length = arguments.codes, arguments.device, 1024
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(codes, (2, length + 1), generator=generator).to(device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    scores = torch.randn(2 * length, 64, generator=generator).to(device)
    probabilities, ids = cache(scores, codes, generator)

    @functools.cache
    def llama(width: int, layers: int, dtype: torch.dtype = FP32) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=codes,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=length,
        )
        model = LlamaForCausalLM(config).to(device)
        frequencies = model.model.rotary_emb.inv_freq.clone()
        model.to(dtype)
        model.model.rotary_emb.inv_freq = (
            frequencies  # in bf16 far positions would be off by most of a radian
        )
        return model

    def hidden_of(model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), model.lm_head.weight

    def full(student: LlamaForCausalLM, teacher_type: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = llama(512, 8, teacher_type)(inputs).logits.flatten(0, 1).float()
        logits = student(inputs).logits.flatten(0, 1).float()
        return cross_entropy(logits, labels) + kl_div(
            log_softmax(logits, -1), log_softmax(teacher_logits, -1), reduction="batchmean", log_target=True
        )

    def chunked(student: LlamaForCausalLM, teacher_type: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            teacher = hidden_of(llama(512, 8, teacher_type))
        return fused_kd_loss(*hidden_of(student), *teacher, labels, chunk_size=arguments.chunk_size)[0]

    def cached(student: LlamaForCausalLM, _: torch.dtype) -> torch.Tensor:
        return fused_sparse_kd_loss(
            *hidden_of(student), ids, probabilities, labels, tail=True, chunk_size=arguments.chunk_size
        )[0]

    def ce(student: LlamaForCausalLM, _: torch.dtype) -> torch.Tensor:
        return cross_entropy(student(inputs).logits.flatten(0, 1).float(), labels)

    student = llama(256, 6)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def runner(
        loss: Callable[[LlamaForCausalLM, torch.dtype], torch.Tensor], teacher: torch.dtype, autocast: bool
    ) -> Callable[[], Run]:
        def run() -> float:
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, BF16, enabled=autocast):
                value = loss(student, teacher)
            value.backward()
            optimizer.step()
            return value.item()

        return lambda: run

    return {
        "fp32 full logits": runner(full, FP32, False),
        "fp32 fused": runner(chunked, FP32, False),
        "fp32 CE": runner(ce, FP32, False),
        "fp32 cached top-64, fused": runner(cached, FP32, False),
        "bf16 full logits": runner(full, FP32, True),
        "bf16 fused, bf16 teacher": runner(chunked, BF16, True),
        "bf16 CE": runner(ce, FP32, True),
        "bf16 cached top-64, fused": runner(cached, FP32, True),
    }


def measure_peak(build: Callable[[], Run], device: str) -> float:
    """MB that one run takes above its inputs at its peak, in a process that has done nothing else."""
    run = build()
    if torch.device(device).type == "cuda":
        run()  # loads the kernels
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # loads the libraries
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def measure_times(
    variants: dict[str, Callable[[], Run]], rounds: int, device: str
) -> Iterator[tuple[str, list[float], float]]:
    """(name, seconds of each round, loss of the first)."""
    runs = {name: build() for name, build in variants.items()}
    losses = {name: run() for name, run in runs.items()}  # warms up as well
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()  # ends with the loss's value on the host
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    for name in runs:
        yield name, seconds[name], losses[name]


def reference(name: str) -> str:
    """What a variant is compared with in the table."""
    return f"{name[:4]} {'full CE' if name.endswith('CE') else 'full logits'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", action="store_true", help="whole training steps")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--student", type=int, default=512, help="width")
    parser.add_argument("--teacher", type=int, default=2048, help="width")
    parser.add_argument("--chunk-size", type=int, default=512)
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
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="of the loss alone"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    variants = (step_variants if arguments.step else loss_variants)(arguments)
    if arguments.peak:
        print(measure_peak(variants[arguments.peak], arguments.device))
        return

    if arguments.bf16 is None:
        capabilities = torch.cpu.get_capabilities()
        arguments.bf16 = arguments.device != "cpu" or any(
            capabilities.get(name) for name in ("amx_bf16", "avx512_bf16")
        )
        if not arguments.bf16:
            print(
                "bf16: left out, this processor has no instructions for it (--bf16 measures it all the same)"
            )
    if not arguments.bf16:
        variants = {name: build for name, build in variants.items() if "bf16" not in name}
    if importlib.util.find_spec("liger_kernel") is None:
        print("Liger: left out, liger-kernel is not installed")
        variants = {name: build for name, build in variants.items() if "Liger" not in name}
    if not arguments.compile:
        variants = {name: build for name, build in variants.items() if "compiled" not in name}

    peaks: dict[str, float] = {}
    if arguments.memory and not arguments.step:
        for name in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
            peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    seconds, losses = {}, {}
    for name, found, loss in measure_times(variants, arguments.rounds, arguments.device):
        seconds[name], losses[name] = found, loss

    def ratio(quantity: str, name: str, against: str) -> float:
        if quantity == "memory":
            return peaks[name] / peaks[against]
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))

    print(f"{'':<28}{'ms':>9}{'x full':>8}{'MB':>8}{'x full':>8}{'loss':>12}")
    for name in variants:
        full = reference(name)
        line = f"{name:<28}{1e3 * statistics.median(seconds[name]):>9.1f}"
        line += f"{ratio('time', name, full):>8.2f}" if full in seconds else f"{'':>8}"
        if name in peaks:
            line += f"{peaks[name]:>8.0f}{ratio('memory', name, full):>8.2f}"
        else:
            line += f"{'':>16}"
        print(f"{line}{losses[name]:>12.5f}")
    for bar in STEP_BARS if arguments.step else LOSS_BARS:
        missing = {bar.variant, bar.against} - set(peaks if bar.quantity == "memory" else seconds)
        found_ratio = "not measured" if missing else f"{ratio(bar.quantity, bar.variant, bar.against):.2f}"
        print(
            f"{bar.variant}: {bar.quantity} {found_ratio} of {bar.against}; wanted: at most {bar.limit:.2f}"
        )


if __name__ == "__main__":
    main()
