"""One model under every embedding, several seeds: a table of held-out losses by task.

    python -m tools.compare_embeddings recipes/claims.yaml --seeds 10 11 12
    python -m tools.compare_embeddings recipes/claims.yaml student.steps=100 --arms learned codebook_start

The model is the recipe's student, learning from labels alone. All arms of a seed share tokenizer, sentences,
steps, and first weights but for the embedding. Each has the learning rate that is best on a seed apart,
between two that are worse. What is done is kept: the same command goes on where it was stopped.

`codebook` leaves a tied head its own weights, so `learned, own head` is its control.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl

from delvm import chain, llama, teach
from delvm import recipe as recipes
from delvm.console import console
from delvm.errors import UserError
from delvm.evaluate import likelihood
from delvm.given import Given
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.stages import write_atomic
from delvm.tokens import sentences
from delvm.training import Interrupted, NotFinite, discard_checkpoint, train
from tools.compare_distill import TUNING_SEED, bracket, hashed

RATE = 5e-3  # where tuning starts; it goes in steps of 2
ARMS = {
    "learned": ("learned", False),
    "learned, own head": ("learned", True),
    "codebook": ("codebook", True),
    "codebook_start": ("codebook_start", False),
}
"""Of PretrainConfig.embedding, and whether a tied head is untied."""


class Seed:
    """Data, tokenizer and tokens of one seed, and the arms' results."""

    def __init__(self, recipe_file: Path, overrides: list[str], seed: int) -> None:
        root = Path(recipes.load(recipe_file, overrides).run_dir)
        self.dir = root / f"seed{seed}" / "embeddings"
        own = [f"seed={seed}", f"run_dir={self.dir}", "scratch=null"]
        run = chain.Run(recipes.load(recipe_file, [*overrides, *own]))
        run.fit(until="tokens")
        self.recipe, self.material, self.tokens_key = run.recipe, run.material, run.keys["tokens"]
        store = self.material.store(self.material.tokenizer().hash)
        self.forms = self.material.plan.forms
        self.held_out = sentences.validation_sentences(store, self.forms, self.recipe.sentences, seed)

    def config(self, arm: str, rate: float) -> PretrainConfig:
        """What an arm trains: the student's model and schedule."""
        student = self.recipe.student
        if student is None:
            raise UserError("student: missing, it says what is trained")
        embedding, untied = ARMS[arm]
        size = student.size
        if untied and llama.SIZES[size].tie_embeddings:
            size = f"{student.size}-own-head"
            llama.SIZES[size] = replace(llama.SIZES[student.size], tie_embeddings=False)
        return PretrainConfig(
            size=size, init=student.init, embedding=embedding, steps=student.steps,
            batch_size=student.batch_size, learning_rate=rate, schedule=student.schedule,
            warmup=student.warmup, decay=student.decay, final=student.final,
            weight_decay=student.weight_decay, beta1=student.beta1, beta2=student.beta2, clip=student.clip,
        )  # fmt: skip

    def loss(self, arm: str, rate: float) -> dict[str, float]:
        """Held-out loss by task of one arm."""
        config = self.config(arm, rate)
        key = hashed(self.tokens_key, str(config), str(self.recipe.sentences), str(self.recipe.trainer))
        result = self.dir / "arms" / f"{arm.replace(' ', '_').replace(',', '')}-{rate:g}-{key}.json"
        if not result.exists():
            console.print(f"{self.recipe.seed}: {arm}, rate {rate:g}")
            result.parent.mkdir(exist_ok=True)
            write_atomic(result, json.dumps(self._score(self._model(config, result.with_suffix("")))))
        return json.loads(result.read_text())

    def parameters(self, arm: str) -> int:
        """Those that an arm trains."""
        return sum(weight.numel() for weight in self._fresh(self.config(arm, RATE)).parameters())

    def _fresh(self, config: PretrainConfig) -> llama.LlamaForCausalLM:
        recipe = replace(self.recipe, teacher=config, student=None)
        return teach.new_model(replace(self.material, given=Given(recipe)), "teacher")

    def _model(self, config: PretrainConfig, folder: Path) -> llama.LlamaForCausalLM:
        recipe, trainer = self.recipe, self.recipe.trainer
        module = Pretrain(self._fresh(config), config, config.steps, self.material.tasks)
        rows = self.material.rows(config.steps * config.batch_size, recipe.seed)
        pl.seed_everything(recipe.seed, verbose=False)
        folder.mkdir(exist_ok=True)
        train(
            module, rows, name=folder.name, steps=config.steps, batch_size=config.batch_size,
            clip=config.clip, config=trainer, folder=folder, tensorboard=self.dir / "tensorboard",
        )  # fmt: skip
        discard_checkpoint(folder)
        folder.rmdir()
        return module.model

    def _score(self, model: llama.LlamaForCausalLM) -> dict[str, float]:
        roles = {task: form.roles for task, form in self.forms.items()}
        scores = likelihood.evaluate(model.to(self.recipe.trainer.device()), self.held_out, roles)
        return {task: entry["loss"] for task, entry in scores.items()}


def tune(seed: Seed, arm: str) -> float:
    """The learning rate of an arm."""

    def mean(rate: float) -> float:
        try:
            return statistics.mean(seed.loss(arm, rate).values())
        except NotFinite as error:
            console.print(str(error))
            return math.inf

    return bracket(mean, RATE, 2.0)


def report(
    scores: dict[int, dict[str, dict[str, float]]], rates: dict[str, float], sizes: dict[str, int]
) -> None:
    """Print, as Markdown, mean and range by arm and task, and how far each arm lies below the first."""
    first = next(iter(rates))
    tasks = list(next(iter(scores.values()))[first])
    heads = ["embedding", "trained parameters", "rate", *tasks, f"below {first}, mean of tasks"]
    print(f"held-out loss in nats, mean (range) of {len(scores)} seeds\n")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for arm, rate in rates.items():
        cells = [arm, f"{sizes[arm]:,}", f"{rate:g}"]
        for task in tasks:
            losses = [entry[arm][task] for entry in scores.values()]
            cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})")
        means = [{a: statistics.mean(losses.values()) for a, losses in e.items()} for e in scores.values()]
        gaps = [mean[first] - mean[arm] for mean in means]
        each = ", ".join(f"{gap:+.3f}" for gap in gaps)
        cells.append(f"{statistics.mean(gaps):+.3f} ({each})" if arm != first else "")
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
    options = parser.parse_intermixed_args()
    given = options.recipe, options.overrides
    try:
        recipe = recipes.load(*given)
        apart = Seed(*given, TUNING_SEED)
        rates = {arm: tune(apart, arm) for arm in options.arms}
        sizes = {arm: apart.parameters(arm) for arm in options.arms}
        scores: dict[int, dict[str, dict[str, float]]] = {}
        for number in options.seeds:
            seed = Seed(*given, number)
            scores[number] = {arm: seed.loss(arm, rate) for arm, rate in rates.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    write_atomic(Path(recipe.run_dir) / "embeddings.json", json.dumps(scores, indent=1) + "\n")
    report(scores, rates, sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
