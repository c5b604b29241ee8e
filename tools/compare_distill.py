"""One student under every objective and signal, several seeds: a table of held-out losses by task.

    python tools/compare_distill.py recipes/claims.yaml --tune
    python tools/compare_distill.py recipes/claims.yaml --seeds 10 11 12 [--arms scratch forward_kl jsd]

All arms of a seed share tokenizer, sentences, teacher, start and steps. --tune finds, on a seed apart, the
KD weight of every arm and then its learning rate, until the best lies between two that are worse, and writes
them down; the tables use them. What is done is kept: the same command goes on where it was stopped.

The teacher's hidden states are the same in every arm: they are computed once a seed and kept in memory, so
that a live teacher costs an arm nothing here. That changes no number.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from delvm import chain, llama
from delvm import recipe as recipes
from delvm.console import console, table
from delvm.distill.cache import CacheConfig, Cached, CachedRows, open_cache, weights_hash, write_cache
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.on_policy import OnPolicyConfig
from delvm.distill.teacher import Hidden, Live
from delvm.errors import UserError
from delvm.evaluate import likelihood
from delvm.stages import write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokens import sentences
from delvm.tokens.store import open_store
from delvm.training import Interrupted, NotFinite, discard_checkpoint, train

TUNING_SEED = 100  # never one of the table's
WEIGHT, RATE = 4.0, 5e-3  # where --tune starts; WEIGHT goes in steps of 4, RATE of 2
DENSE = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "taid")
ARMS: dict[str, dict[str, Any]] = {
    "scratch": {"kd_weight": 0.0},
    **{name: {"divergence": name} for name in DENSE},
    **{f"{name}, T 2": {"divergence": name, "temperature": 2.0} for name in DENSE},
    "forward_kl, annotations alone": {"kd_on": "annotations"},
    "forward_kl, weight falls to 0": {"kd_weight_end": 0.0},
    "cached, topk 64": {"cache": CacheConfig("topk", 64)},
    "cached, sampled 12": {"cache": CacheConfig("sampled", 12)},
    "on-policy 0.25": {"on_policy": OnPolicyConfig(share=0.25)},
    "on-policy 0.25, confidence 0.5": {"on_policy": OnPolicyConfig(share=0.25, confidence=0.5)},
}


class Remembered(Live):
    """A live teacher that says the same rows again from memory."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.said: dict[bytes, torch.Tensor] = {}

    def targets(self, batch: dict[str, torch.Tensor]) -> Hidden:
        key = batch["tokens"].cpu().numpy().tobytes()
        if "drawn" in batch:  # rows of one arm alone
            return super().targets(batch)
        if key not in self.said:
            self.said[key] = super().targets(batch).hidden
        return Hidden(self.said[key], self.model.lm_head.weight)


class Seed:
    """Data, tokenizer, tokens and teacher of one seed, and the arms' results."""

    def __init__(self, recipe_file: Path, overrides: list[str], seed: int) -> None:
        root = Path(recipes.load(recipe_file, overrides).run_dir)
        self.dir = root / f"seed{seed}" / "distill"
        own = [f"seed={seed}", f"run_dir={self.dir}", "scratch=null"]
        self.run = chain.Run(recipes.load(recipe_file, [*overrides, *own]))
        self.dir.mkdir(parents=True, exist_ok=True)
        stages = {stage.name: stage for stage in self.run.stages()}
        self.run.run(stages["data"])
        self.run.open_data(json.loads((self.dir / "data" / "manifest.json").read_text()), self.dir / "data")
        for name in ("tokenizer", "tokens", "teacher"):
            self.run.run(stages[name])
        write_atomic(self.dir / "recipe.yaml", recipes.to_yaml(self.run.recipe))
        self.live = Remembered(llama.load(self.dir / "teacher"))
        tokenizer = Tokenizer.load(self.dir / "tokenizer")
        self.tokenizer_hash = tokenizer.hash
        recipe, store = self.run.recipe, open_store(self.dir / "tokens", tokenizer=tokenizer.hash)
        self.held_out = sentences.validation_sentences(
            store, self.run.plan.forms, recipe.sentences, recipe.seed
        )
        self.device = recipe.trainer.device()

    def loss(self, arm: str, weight: float, rate: float) -> dict[str, float]:
        """Held-out loss by task of one arm."""
        recipe = self.run.recipe
        assert recipe.student is not None
        # of all that a score depends on: a recipe that changed must not meet the scores of the old one
        made_of = [self.run.keys["teacher"], asdict(recipe.sentences), asdict(recipe.student), str(ARMS[arm])]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{arm.replace(' ', '_').replace(',', '')}-{weight:g}-{rate:g}-{key}"
        result = self.dir / "arms" / f"{name}.json"
        if not result.exists():
            console.print(f"{recipe.seed}: {arm}, weight {weight:g}, rate {rate:g}")
            result.parent.mkdir(exist_ok=True)
            write_atomic(result, json.dumps(self._score(self._student(arm, weight, rate, name))))
        return json.loads(result.read_text())

    def teacher_loss(self) -> dict[str, float]:
        """That of the teacher."""
        return self._score(self.live.model)

    def _student(self, arm: str, weight: float, rate: float, name: str) -> Any:
        run, settings = self.run, dict(ARMS[arm])
        cache_config, base = settings.pop("cache", None), run.recipe.student
        assert base is not None
        settings = {"kd_weight": weight, "learning_rate": rate, **settings}
        config: DistillConfig = replace(base, **settings)
        seed = run.recipe.seed + 1
        rows: Any = run.rows(config.steps * config.batch_size, seed)
        signal: Any = self.live
        if cache_config:
            folder = self.dir / "cache" / cache_config.kind
            folder.mkdir(parents=True, exist_ok=True)
            hashes = {"teacher": weights_hash(self.dir / "teacher"), "tokenizer": self.tokenizer_hash}
            if not (folder / "manifest.json").exists():
                write_cache(
                    folder, rows, self.live, cache_config, temperature=config.temperature, seed=seed,
                    batch_size=config.batch_size, device=self.device,
                    teacher_hash=hashes["teacher"], tokenizer_hash=hashes["tokenizer"],
                )  # fmt: skip
            cache = open_cache(folder, **hashes, temperature=config.temperature)
            rows, signal = CachedRows(rows, cache), Cached(cache)
        model = run.new_model("student", seed)
        module = Distill(model, signal, config, run.tasks, run.num_codes)
        pl.seed_everything(seed, verbose=False)
        folder = self.dir / "arms" / name
        folder.mkdir(exist_ok=True)
        train(
            module, rows, name=name, steps=config.steps, batch_size=config.batch_size, clip=config.clip,
            config=run.recipe.trainer, folder=folder, tensorboard=self.dir / "tensorboard",
        )  # fmt: skip
        discard_checkpoint(folder)
        folder.rmdir()
        return module.model

    def _score(self, model: Any) -> dict[str, float]:
        roles = {task: form.roles for task, form in self.run.plan.forms.items()}
        scores = likelihood.evaluate(model.to(self.device), self.held_out, roles)
        return {task: entry["loss"] for task, entry in scores.items()}


def bracket(score: Callable[[float], float], start: float, factor: float) -> float:
    """The value with the lowest score among start * factor**n, its two neighbours tried and worse."""
    tried: dict[float, float] = {}
    best = start
    while missing := [x for x in (best, best / factor, best * factor) if x not in tried]:
        tried[missing[0]] = score(missing[0])
        best = min(tried, key=lambda x: tried[x])
    return best


def tune(seed: Seed, arms: list[str], chosen: dict[str, list[float]]) -> None:
    """Add weight and rate of every arm to `chosen`."""

    def mean(arm: str, weight: float, rate: float) -> float:
        try:
            return statistics.mean(seed.loss(arm, weight, rate).values())
        except NotFinite as error:
            console.print(str(error))
            return math.inf

    rows = []
    for arm in arms:
        weight = WEIGHT
        if arm != "scratch":
            weight = bracket(lambda x, arm=arm: mean(arm, x, RATE), WEIGHT, 4.0)  # type: ignore[misc]
        rate = bracket(lambda x, arm=arm, weight=weight: mean(arm, weight, x), RATE, 2.0)  # type: ignore[misc]
        chosen[arm] = [weight, rate]
        rows.append((arm, f"{weight:g}", f"{rate:g}", f"{mean(arm, weight, rate):.3f}"))
    table(f"tuning, seed {TUNING_SEED}", ["arm", "KD weight", "rate", "mean loss"], rows)


def report(scores: dict[int, dict[str, dict[str, float]]], arms: list[str]) -> None:
    """Print mean and range by arm and task, and how far each arm lies below forward KL, as Markdown."""
    tasks = list(next(iter(scores.values()))["teacher"])
    heads = ["arm", *tasks, *(["below forward_kl, mean of tasks"] if "forward_kl" in arms else [])]
    print(f"held-out loss in nats, mean (range) of {len(scores)} seeds\n\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for arm in ["teacher", *arms]:
        cells = [arm]
        for task in tasks:
            losses = [entry[arm][task] for entry in scores.values()]
            cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})")
        if "forward_kl" in arms:
            means = [{a: statistics.mean(entry[a].values()) for a in entry} for entry in scores.values()]
            gaps = [mean["forward_kl"] - mean[arm] for mean in means]
            cells.append(f"{statistics.mean(gaps):+.3f} ({', '.join(f'{gap:+.3f}' for gap in gaps)})")
        print(f"| {' | '.join(cells)} |")


def main() -> int:
    """Arguments in, tables out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--tune", action="store_true", help="weight and rate of every arm, on a seed apart")
    options = parser.parse_intermixed_args()
    try:
        root = Path(recipes.load(options.recipe, options.overrides).run_dir)
        file = root / "distill-tuned.json"
        chosen = json.loads(file.read_text()) if file.exists() else {}
        if options.tune:
            tune(Seed(options.recipe, options.overrides, TUNING_SEED), options.arms, chosen)
            write_atomic(file, json.dumps(chosen, indent=1) + "\n")
            return 0
        if unknown := [arm for arm in options.arms if arm not in chosen]:
            raise UserError(f"{file}: has no weight and rate for {', '.join(unknown)}; run --tune first")
        scores: dict[int, dict[str, dict[str, float]]] = {}
        for number in options.seeds:
            seed = Seed(options.recipe, options.overrides, number)
            scores[number] = {"teacher": seed.teacher_loss()}
            scores[number] |= {arm: seed.loss(arm, *chosen[arm]) for arm in options.arms}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    write_atomic(root / "distill.json", json.dumps(scores, indent=1) + "\n")
    report(scores, options.arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
