"""Time of generation, our loop against transformers' `generate`: python -m tools.bench_generation

Sentences of random codes are continued by both, and by ours after a prefix that all sentences of a batch
share. The rounds are interleaved: a busy machine slows all alike, and a ratio is the median of those within
one round. In fp32 both must write the same tokens. `generate` has its dynamic cache, and what `complete` asks
of it: greedy, no special ids, no end but the length. A minute or so:

    python -m tools.bench_generation --prompt 448 --tokens 64 --batch 1 --rounds 3
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from delvm.distill.teacher import cast
from delvm.generation import complete, complete_queries
from delvm.llama import initialise
from tools.bench_step import markdown

CODES, SPECIALS = 8192, 2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {"fp32": 1.5, "bf16": 1.8}
"""By precision, how many times as fast as `generate` the loop has to be."""


def random_model(width: int, layers: int, positions: int) -> LlamaForCausalLM:
    """Heads of 64 channels, tied embedding; with the defaults, 20.0M parameters."""
    config = LlamaConfig(
        vocab_size=CODES + SPECIALS,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return initialise(config, seed=0).eval()


def generate(model: LlamaForCausalLM, prompts: Tensor, num_tokens: int) -> Tensor:
    """(n, num_tokens) int64, by transformers."""
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        use_cache=True,
        suppress_tokens=list(range(CODES, CODES + SPECIALS)),
    )
    attended = torch.ones_like(prompts)
    found = model.generate(prompts, attention_mask=attended, generation_config=settings)
    return found[:, prompts.shape[1] :].cpu()


class Finding(NamedTuple):
    """Of one precision and batch: `generate`, ours, ours after a shared prefix."""

    seconds: list[float]
    faster: list[float]
    """How many times as fast as `generate`."""
    equal: list[float]
    """Share of the tokens that are those of `generate`."""


def compare(model: LlamaForCausalLM, batch: int, num_prompt: int, num_tokens: int, rounds: int) -> Finding:
    """Time all ways round by round; one round more, the first, warms up."""
    device, shared = model.device, num_prompt - num_tokens
    prompts = torch.randint(CODES, (batch, num_prompt), generator=torch.Generator().manual_seed(batch))
    prompts[:, :shared] = prompts[0, :shared].clone()  # the pairs, before a query each
    prompts = prompts.to(device)
    ways: list[Callable[[], Tensor]] = [
        lambda: generate(model, prompts, num_tokens),
        lambda: complete(model, prompts, num_tokens, CODES),
        lambda: complete_queries(
            model, prompts[0, :shared], prompts[:, shared:], num_tokens, CODES, batch_size=batch
        )[:, 0],
    ]
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        found = []
        for way, of_way in zip(ways, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            found.append(way())  # on the CPU in the end, so all work is done
            if number:
                of_way.append(time.perf_counter() - begun)
    return Finding(
        [statistics.median(of_way) for of_way in times],
        [statistics.median(a / b for a, b in zip(times[0], of_way, strict=True)) for of_way in times],
        [(codes == found[0]).float().mean().item() for codes in found],
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=1792, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=256, help="that are written, and of a query")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=[])
    return parser.parse_args()


def precisions(options: argparse.Namespace) -> list[str]:
    """Those to measure; says what is left out."""
    capabilities = torch.cpu.get_capabilities()
    able = options.device != "cpu" or any(capabilities.get(x) for x in ("amx_bf16", "avx512_bf16"))
    if options.precision or able:
        return options.precision or [*PRECISIONS]
    print("bf16: left out, this processor has no instructions for it (--precision bf16 measures it even so)")
    return ["fp32"]


def main() -> int:
    """Arguments in, table and verdicts out. Returns 1 where a bar is missed or fp32 writes other tokens."""
    options = parse()
    if not 0 < options.tokens < options.prompt:
        print(f"error: --tokens: {options.tokens}, must be in 1..{options.prompt - 1}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    model = random_model(options.width, options.layers, options.prompt + options.tokens).to(options.device)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{millions:.1f}M parameters, {options.prompt} + {options.tokens} tokens, {options.rounds} rounds\n"
    )
    rows, verdicts, missed = [], [], False
    for precision in precisions(options):
        cast(model, PRECISIONS[precision])
        for batch in options.batch:
            found = compare(model, batch, options.prompt, options.tokens, options.rounds)
            name, exact = f"{precision}, batch {batch}", precision == "fp32"
            rows.append(
                [name, *(f"{x:.2f}" for x in (*found.seconds, *found.faster[1:]))]
                + [f"{share:.1%}" for share in found.equal[1:]]
            )
            held = found.faster[1] >= BARS[precision] and (not exact or min(found.equal) == 1)
            missed |= not held
            verdicts.append(
                f"{'held' if held else 'missed'}: {name}: {found.faster[1]:.2f} times as fast as generate;"
                f" wanted: at least {BARS[precision]}{', with equal tokens' if exact else ''}"
            )
    columns = ["", "generate s", "ours s", "shared s", "ours x", "shared x", "ours equal", "shared equal"]
    print(markdown(columns, rows), *verdicts, sep="\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
