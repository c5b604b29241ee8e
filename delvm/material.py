"""A recipe and the samples that are listed for it -> pictures, tokens and rows to train on."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from delvm.given import Given
from delvm.images.sources import SPLITS, Views, index_data, open_sources
from delvm.plan import Plan, check_plan, make_plan
from delvm.recipe import Recipe
from delvm.tokenizer import Tokenizer
from delvm.tokens import lines
from delvm.tokens.balance import TaskPlan
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.store import TokenStore, open_store

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Material:
    """All that models are trained on.

    Args:
        given: what the recipe is given.
        manifest: the list of samples, as `images.sources.index_data` makes it.
        listed: the folder of that list.
        run_dir: where `tokenizer` and `tokens` stand once they are made.
    """

    given: Given
    manifest: dict[str, dict]
    listed: Path
    run_dir: Path

    @property
    def recipe(self) -> Recipe:
        """Whose material it is."""
        return self.given.recipe

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of their indices."""
        return list(self.recipe.tasks)

    @cached_property
    def plan(self) -> Plan:
        """What is trained on.

        Raises:
            UserError: samples that do not fit the sentences, or too few of them; sentences that are longer
                than what a given teacher takes.
        """
        given = self.given
        plan = make_plan(self.recipe, self.manifest, num_tokens=given.num_tokens, num_codes=given.num_codes)
        given.check_positions(plan.positions)
        return plan

    def views(self, split: str, *, once: bool = False) -> dict[str, Views]:
        """The pictures of a split by task: training has the planned views, validation the samples alone.

        Tasks that come as tokens have none. `once`: training, too, has the samples alone.
        """
        recipe = self.recipe
        sources = open_sources(self.manifest, self.given.image_tasks, split, recipe.seed, self.listed)
        return {
            task: Views(
                source,
                task,
                recipe.tasks[task],
                size=recipe.data.image_size,
                num_views=self.plan.tasks[task].views if split == "train" and not once else 1,
                seed=recipe.seed,
            )
            for task, source in sources.items()
        }

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.run_dir / "tokenizer")

    def store(self, tokenizer_hash: str) -> TokenStore:
        """The run's tokens, if they are of this tokenizer."""
        return open_store(self.run_dir / "tokens", tokenizer=tokenizer_hash)

    def stored(self, plan: TaskPlan) -> TaskPlan:
        """The plan over what is stored: where views are drawn online, the samples alone."""
        return replace(plan, views=1) if self.recipe.balance.online else plan

    def rows(self, num_rows: int, seed: int) -> TrainingSentences:
        """The rows that a model is trained on, drawn from `seed`."""
        plans = {task: self.stored(plan) for task, plan in self.plan.tasks.items()}
        return TrainingSentences(
            self.store(self.tokenizer().hash), plans, self.plan.forms, self.recipe.sentences,
            num_rows=num_rows, seed=seed, details=True,
        )  # fmt: skip

    def describe(self) -> str:
        """One line a task: where its samples come from and how many there are."""
        said = []
        for task, config in self.recipe.tasks.items():
            origin = f"scenes '{config.scene}'" if config.scene else config.source
            made = f", {config.make}" if config.make else ""
            train, held = (self.manifest[task][split] for split in SPLITS)
            said.append(f"{task}: {origin}{made}, {train} training and {held} held-out samples")
        return "\n".join(said)


def list_samples(given: Given, folder: Path, run_dir: Path) -> Material:
    """List a recipe's samples in `folder`, every file read once.

    Raises:
        UserError: what is wrong with a file, with the sentences, or with the models that are to learn them.
    """
    recipe = given.recipe
    check_plan(recipe, num_tokens=given.num_tokens, num_codes=given.num_codes)
    given.check()
    found = index_data(given.image_tasks, recipe.data, recipe.seed, folder)
    for task, config in given.token_tasks.items():
        found[task] = lines.index_lines(
            task, config, tokens_per_image=given.num_tokens, num_codes=given.num_codes, seed=recipe.seed
        )
    material = Material(given, {task: found[task] for task in recipe.tasks}, folder, run_dir)
    _ = material.plan
    (folder / MANIFEST).write_text(json.dumps(material.manifest, indent=1))
    return material


def open_samples(given: Given, folder: Path, run_dir: Path) -> Material:
    """What `list_samples` has listed in `folder`.

    Raises:
        UserError: as `list_samples`, but for the files.
    """
    given.check()  # nobody has where the list is reused
    material = Material(given, json.loads((folder / MANIFEST).read_text()), folder, run_dir)
    _ = material.plan
    return material
