"""One student under every objective, signal and start, several seeds: a table of held-out losses by task.

    python tools/compare_distill.py recipes/claims.yaml --tune
    python tools/compare_distill.py recipes/claims.yaml --seeds 10 11 12 [--arms scratch forward_kl jsd]
    python tools/compare_distill.py recipes/claims.yaml student.steps=800 --arms scratch "slice" [--tune]

All arms of a seed share tokenizer, sentences, teacher and steps. --tune finds, on a seed apart, the KD weight
of every arm and then its learning rate, until the best lies between two that are worse, and writes them down,
for this size and these steps; the tables use them. Arms of TUNED_AS take those of the arm that they vary.
Gap: how much of what the teacher's loss lies below scratch's of equal steps.
What is done is kept: the same command goes on where it was stopped.

The teacher's hidden states are the same in every arm: they are computed once a seed and kept in memory, so
that a live teacher costs an arm next to nothing here. That changes no number.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from delvm import chain, llama, teach
from delvm import recipe as recipes
from delvm.console import console, table
from delvm.distill.cache import CacheConfig
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.on_policy import OnPolicyConfig
from delvm.distill.teacher import Hidden, Live, Signal
from delvm.errors import UserError
from delvm.evaluate import likelihood
from delvm.given import Given
from delvm.pretrain import forward_flops
from delvm.stages import write_atomic
from delvm.tokens import sentences
from delvm.training import Interrupted, NotFinite, discard_checkpoint, train

TUNING_SEED = 100  # never one of the table's
WEIGHT, RATE = 4.0, 5e-3  # where --tune starts; WEIGHT goes in steps of 4, RATE of 2
PLAIN = "forward_kl"
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
    "embedding": {"start": "embedding"},
    "slice": {"start": "slice"},
    "slice, labels alone": {"start": "slice", "kd_weight": 0.0},
    "slice, labels alone, even": {"start": "slice", "kd_weight": 0.0, "start_layers": "even"},
    "slice, even": {"start": "slice", "start_layers": "even"},
}
TUNED_AS: dict[str, str] = {
    # T² keeps the gradients' size; a cache is the same objective from elsewhere
    **{f"{name}, T 2": name for name in DENSE},
    **dict.fromkeys(
        ("forward_kl, annotations alone", "forward_kl, weight falls to 0", "cached, topk 64"), PLAIN
    ),
    **dict.fromkeys(("on-policy 0.25", "on-policy 0.25, confidence 0.5"), PLAIN),
    "slice, even": "slice",
    "slice, labels alone, even": "slice, labels alone",
}
"""Arms that take weight and rate of another one, whose training differs little."""
REMEMBERED = 2**31  # bytes of hidden states


def arm_settings(recipe: recipes.Recipe, arm: str) -> list:
    """What an arm's training depends on, but for seed, data and teacher."""
    machine = [recipe.trainer.precision, recipe.trainer.averaging]
    return [str(ARMS[arm]), str(recipe.sentences), str(recipe.student), *machine]


def tuned_key(recipe: recipes.Recipe, arm: str) -> str:
    """What the best weight and rate of an arm depend on: all but the seed."""
    settings = arm_settings(recipe, TUNED_AS.get(arm, arm))
    return hashed(str(recipe.tasks), str(recipe.tokenizer), str(recipe.teacher), settings)


def hashed(*parts: Any) -> str:
    """8 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


class Remembered(Live):
    """A live teacher that says the same rows again from memory."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.said: dict[bytes, torch.Tensor] = {}

    def targets(self, batch: dict[str, torch.Tensor]) -> Hidden:
        key = batch["tokens"].cpu().numpy().tobytes()
        if "drawn" in batch:  # rows of one arm alone
            return super().targets(batch)
        if key in self.said:
            return Hidden(self.said[key], self.model.lm_head.weight)
        target = super().targets(batch)
        if target.hidden.nbytes * (len(self.said) + 1) <= REMEMBERED:
            self.said[key] = target.hidden
        return target


class Seed:
    """Data, tokenizer, tokens and teacher of one seed, and the arms' results."""

    def __init__(self, recipe_file: Path, overrides: list[str], seed: int) -> None:
        root = Path(recipes.load(recipe_file, overrides).run_dir)
        self.dir = root / f"seed{seed}" / "distill"
        own = [f"seed={seed}", f"run_dir={self.dir}", "scratch=null"]
        run = chain.Run(recipes.load(recipe_file, [*overrides, *own]))
        self.recipe = recipe = run.recipe
        run.fit(until="teacher")
        self.material, self.teacher_key = run.material, run.keys["teacher"]
        self.live = Remembered(llama.load(self.dir / "teacher"))
        self.forms, tokenizer = self.material.plan.forms, self.material.tokenizer()
        store = self.material.store(tokenizer.hash)
        self.held_out = sentences.validation_sentences(store, self.forms, recipe.sentences, recipe.seed)
        self.device = recipe.trainer.device()

    def key(self, arm: str) -> str:
        """Of all that an arm depends on: a recipe that changed must not meet the scores of the old one."""
        return hashed(self.teacher_key, arm_settings(self.recipe, arm))

    def loss(self, arm: str, weight: float, rate: float) -> dict[str, float]:
        """Held-out loss by task of one arm."""
        name = f"{arm.replace(' ', '_').replace(',', '')}-{weight:g}-{rate:g}-{self.key(arm)}"
        result = self.dir / "arms" / f"{name}.json"
        if not result.exists():
            console.print(f"{self.recipe.seed}: {arm}, weight {weight:g}, rate {rate:g}")
            result.parent.mkdir(exist_ok=True)
            write_atomic(result, json.dumps(self._score(self._student(arm, weight, rate, name))))
        return json.loads(result.read_text())

    def teacher_loss(self) -> dict[str, float]:
        """That of the teacher."""
        return self._score(self.live.model)

    def operations(self, arm: str) -> float:
        """Floating-point operations of an arm's training, as if its teacher were asked anew each time, or of
        the `teacher`'s own. Every token is read by each model, and three times as dear where it learns."""
        role = "teacher" if arm == "teacher" else "student"
        config = self.material.given.training_config(role)
        length = teach.rows_of(self.material, role).length
        taught = role == "student" and ARMS[arm].get("kd_weight") != 0
        per_token = 3 * forward_flops(teach.new_model(self.material, role), length)
        per_token += forward_flops(self.live.model, length) if taught else 0
        return per_token * config.steps * config.batch_size * length

    def _student(self, arm: str, weight: float, rate: float, name: str) -> Any:
        base, settings = self.recipe.student, dict(ARMS[arm])
        cache_config = settings.pop("cache", None)
        assert base is not None
        config: DistillConfig = replace(base, **{"kd_weight": weight, "learning_rate": rate, **settings})
        material = replace(self.material, given=Given(replace(self.recipe, student=config)))
        signal: Signal = self.live
        rows: Any = teach.rows_of(material, "student")
        if cache_config:
            folder = self.dir / "cache" / self.key(arm)
            teach.cache_teacher(material, self.live, cache_config, folder)
            signal, rows = teach.cached(material, folder)
        model = teach.first_weights(material)
        module = Distill(model, signal, config, material.tasks, material.given.num_codes)
        pl.seed_everything(teach.seed_of(self.recipe, "student"), verbose=False)
        folder = self.dir / "arms" / name
        folder.mkdir(exist_ok=True)
        train(
            module, rows, name=name, steps=config.steps, batch_size=config.batch_size, clip=config.clip,
            config=self.recipe.trainer, folder=folder, tensorboard=self.dir / "tensorboard",
        )  # fmt: skip
        discard_checkpoint(folder)
        folder.rmdir()
        return module.model

    def _score(self, model: Any) -> dict[str, float]:
        roles = {task: form.roles for task, form in self.forms.items()}
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


def tune(seed: Seed, arms: list[str], chosen: dict[str, dict], kept: Callable[[], None]) -> None:
    """Add weight and rate of every arm to `chosen`; `kept` is called after each."""

    def mean(arm: str, weight: float, rate: float) -> float:
        try:
            return statistics.mean(seed.loss(arm, weight, rate).values())
        except NotFinite as error:
            console.print(str(error))
            return math.inf

    rows = []
    for arm in arms:
        # near which most arms end
        plain = chosen.get(tuned_key(seed.recipe, PLAIN), {"weight": WEIGHT, "rate": RATE})
        weight, rate = plain["weight"], plain["rate"]
        if ARMS[arm].get("kd_weight") != 0:
            weight = bracket(lambda x, arm=arm, rate=rate: mean(arm, x, rate), weight, 4.0)  # type: ignore[misc]
        rate = bracket(lambda x, arm=arm, weight=weight: mean(arm, weight, x), rate, 2.0)  # type: ignore[misc]
        chosen[tuned_key(seed.recipe, arm)] = {"arm": arm, "weight": weight, "rate": rate}
        kept()
        rows.append((arm, f"{weight:g}", f"{rate:g}", f"{mean(arm, weight, rate):.3f}"))
    table(f"tuning, seed {TUNING_SEED}", ["arm", "KD weight", "rate", "mean loss"], rows)


def keep(file: Path, chosen: dict[str, dict]) -> None:
    """Add what was chosen to what the file has: arms may be tuned by several processes at once."""
    found = json.loads(file.read_text()) if file.exists() else {}
    write_atomic(file, json.dumps(found | chosen, indent=1) + "\n")


def report(scores: dict[int, dict[str, dict[str, float]]], arms: list[str]) -> None:
    """Print, as Markdown, mean and range by arm and task, the share of scratch's gap to the teacher that each
    arm closes, and how far each lies below forward KL."""
    tasks = list(next(iter(scores.values()))["teacher"])
    heads = ["arm", *tasks, *(["gap closed, by task; least of all"] if "scratch" in arms else [])]
    heads += [f"below {PLAIN}, mean of tasks"] if PLAIN in arms else []
    print(f"held-out loss in nats, mean (range) of {len(scores)} seeds\n\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for arm in ["teacher", *arms]:
        cells = [arm]
        for task in tasks:
            losses = [entry[arm][task] for entry in scores.values()]
            cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})")
        if "scratch" in arms:
            closed = {task: [gap_closed(entry, arm, task) for entry in scores.values()] for task in tasks}
            means_closed = ", ".join(f"{statistics.mean(shares):.0%}" for shares in closed.values())
            cells.append(f"{means_closed}; {min(map(min, closed.values())):.0%}")
        if PLAIN in arms:
            means = [{a: statistics.mean(entry[a].values()) for a in entry} for entry in scores.values()]
            gaps = [mean[PLAIN] - mean[arm] for mean in means]
            cells.append(f"{statistics.mean(gaps):+.3f} ({', '.join(f'{gap:+.3f}' for gap in gaps)})")
        print(f"| {' | '.join(cells)} |")


def gap_closed(entry: dict[str, dict[str, float]], arm: str, task: str) -> float:
    """1 where the arm's loss is the teacher's, 0 where it is scratch's."""
    return (entry["scratch"][task] - entry[arm][task]) / (entry["scratch"][task] - entry["teacher"][task])


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
        recipe = recipes.load(options.recipe, options.overrides)
        root = Path(recipe.run_dir)
        file = root / "distill-tuned.json"
        chosen = json.loads(file.read_text()) if file.exists() else {}
        if options.tune:
            seed = Seed(options.recipe, options.overrides, TUNING_SEED)
            # plain KL first: the others start from its weight and rate
            arms = sorted(
                {TUNED_AS.get(arm, arm): None for arm in options.arms}, key=lambda arm: arm != PLAIN
            )
            tune(seed, arms, chosen, lambda: keep(file, chosen))
            return 0
        keys = {arm: tuned_key(recipe, arm) for arm in options.arms}
        if unknown := [arm for arm, key in keys.items() if key not in chosen]:
            raise UserError(
                f"{file}: has no weight and rate for {', '.join(unknown)} under these settings;"
                " run --tune first"
            )
        scores: dict[int, dict[str, dict[str, float]]] = {}
        operations: dict[str, float] = {}
        for number in options.seeds:
            seed = Seed(options.recipe, options.overrides, number)
            scores[number] = {"teacher": seed.teacher_loss()}
            operations = {arm: seed.operations(arm) for arm in ("teacher", *options.arms)}
            scores[number] |= {
                arm: seed.loss(arm, chosen[key]["weight"], chosen[key]["rate"]) for arm, key in keys.items()
            }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    assert recipe.student is not None
    name = f"distill-{recipe.student.size}-{recipe.student.steps}.json"
    write_atomic(root / name, json.dumps({"losses": scores, "operations": operations}, indent=1) + "\n")
    report(scores, options.arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
