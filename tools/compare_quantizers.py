"""One tokenizer under every quantizer, several seeds: a table of what its codes keep of held-out pictures.

    python tools/compare_quantizers.py recipes/vqgan_64.yaml tasks.photos.images=DIR --seeds 10 11 12
    python tools/compare_quantizers.py ... --rates 5e-4 1e-3 2e-3 [--arms ema rotation]

All arms of a seed share pictures, their split by name, first weights and steps. With several --rates each arm
has the one of the highest PSNR on a seed apart. Every tokenizer is a run of its own under the recipe's run
folder: what is done is kept, and the same command goes on where it was stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from delvm import chain
from delvm import recipe as recipes
from delvm.errors import UserError
from delvm.stages import write_atomic
from delvm.tokenizer.quantizers import QUANTIZERS
from delvm.training import Interrupted

TUNING_SEED = 100  # never one of the table's
ARMS: dict[str, list[str]] = {
    **{name: [f"quantizer={name}"] for name in QUANTIZERS},
    "ema, no restart": ["quantizer=ema", "restart_below=0"],
    "learned, no restart": ["quantizer=learned", "restart_below=0"],
}
COLUMNS = {"psnr": ("PSNR, dB", ".2f"), "ssim": ("SSIM", ".3f"), "codes": ("codes in use", ".1%"),
           "codebook_perplexity": ("perplexity", ".0f")}  # fmt: skip
Scores = dict[int, dict[str, dict[str, float]]]
"""Seed -> arm -> metric -> value."""


def score(recipe_file: Path, overrides: list[str], seed: int, arm: str, rate: float) -> dict[str, float]:
    """What the tokenizer of one arm keeps of the held-out pictures; trained if it is not there yet."""
    root = Path(recipes.load(recipe_file, overrides).run_dir)
    run_dir = root / f"seed{seed}" / f"{arm.replace(', ', '-').replace(' ', '_')}-{rate:g}"
    own = [f"seed={seed}", f"run_dir={run_dir}", f"tokenizer.learning_rate={rate}"]
    # an arm that collapses is a result
    own += ["tokenizer.min_psnr=0", "tokenizer.min_codes_used=0"]
    own += [f"tokenizer.{setting}" for setting in ARMS[arm]]
    run = chain.Run(recipes.load(recipe_file, [*overrides, *own]))
    run.fit(until="tokenizer")
    found = run.metrics["tokenizer"]
    return {**found, "codes": found["codes_used"] / run.recipe.tokenizer.num_codes}


def report(scores: Scores, rates: dict[str, float]) -> None:
    """Print mean and range of the seeds by arm and metric, as Markdown."""
    print(f"held-out pictures, mean (range) of {len(scores)} seeds\n")
    print(f"| quantizer | rate | {' | '.join(head for head, _ in COLUMNS.values())} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for arm, rate in rates.items():
        cells = [arm, f"{rate:g}"]
        for key, (_, form) in COLUMNS.items():
            values = [entry[arm][key] for entry in scores.values()]
            low, mean, high = (f(values) for f in (min, statistics.mean, max))
            cells.append(f"{mean:{form}} ({low:{form}}-{high:{form}})")
        print(f"| {' | '.join(cells)} |")


def main() -> int:
    """Arguments in, a table out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", type=float, nargs="+", help="default: the recipe's")
    options = parser.parse_intermixed_args()
    given = options.recipe, options.overrides
    try:
        recipe = recipes.load(*given)
        candidates = options.rates or [recipe.tokenizer.learning_rate]
        rates = dict.fromkeys(options.arms, candidates[0])
        if len(candidates) > 1:
            for arm in options.arms:
                tried = {rate: score(*given, TUNING_SEED, arm, rate)["psnr"] for rate in candidates}
                rates[arm] = max(tried, key=lambda rate: tried[rate])
        scores: Scores = {
            seed: {arm: score(*given, seed, arm, rate) for arm, rate in rates.items()}
            for seed in options.seeds
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    write_atomic(Path(recipe.run_dir) / "quantizers.json", json.dumps(scores, indent=1) + "\n")
    report(scores, rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
