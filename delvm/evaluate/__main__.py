"""Evaluate any model folder on held-out samples, and on questions that it answers by lowest perplexity.

    python -m delvm.evaluate runs/quickstart/student --recipe recipes/quickstart.yaml
    python -m delvm.evaluate lvm-7b --tokenizer vqgan --recipe recipes/pairs.yaml sentences.specials=false \\
        tasks.edges.images=photos tasks.edges.annotations=drawings --out evaluated
    python -m delvm.evaluate lvm-7b --tokenizer vqgan --choices choices/items.jsonl --lvm-jsonl examples.jsonl

With --recipe (and key=value for it): loss, token accuracy and perplexity of the recipe's held-out sentences
by task, by the number of example pairs and by place in the picture, and scores of pictures that the model
draws. What the recipe's run folder has listed and encoded with this tokenizer is used; else the held-out
samples are listed and encoded in --out. Nothing is trained, and no training sample is evaluated on.

Leaves metrics.json, report.html, pictures/ and tensorboard/ in --out.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from delvm import chain, student
from delvm import recipe as recipes
from delvm.console import console, show_scores, table
from delvm.errors import UserError, exit_status
from delvm.evaluate import board, choice, held_out, likelihood
from delvm.evaluate.choice import Question
from delvm.evaluate.held_out import HeldOut, Metrics
from delvm.evaluate.prompting import Picture, save_pictures
from delvm.evaluate.report import Report, render
from delvm.evaluate.scores import Scored
from delvm.given import ROLES, Given
from delvm.images.sources import SPLITS
from delvm.material import Material, open_samples
from delvm.recipe import Recipe
from delvm.stages import Stage, record, stage_key, write_atomic
from delvm.student import Student
from delvm.tokenizer import Tokenizer
from delvm.tokens.balance import BalanceConfig
from delvm.tokens.encoding import write_store
from delvm.tokens.store import TokenStore


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments in, measurements out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="a transformers folder of a Llama, or an export of this project")
    add("overrides", nargs="*", metavar="key=value", help="for the recipe, such as seed=1")
    add("--tokenizer", type=Path, metavar="DIR", help="of the model; default: tokenizer/ in it or beside it")
    add("--recipe", type=Path, metavar="FILE", help="whose held-out samples are evaluated on")
    add("--shots", type=int, default=7, metavar="N", help="most example pairs before a query; default: 7")
    add(
        "--choices", type=Path, metavar="FILE", help="multiple-choice questions, see delvm/evaluate/choice.py"
    )
    add("--lvm-jsonl", type=Path, metavar="FILE", help="examples of LVM's perplexity: pictures, or tokens")
    add("--out", type=Path, metavar="DIR", help="default: evaluation-MODEL beside the model")
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Read, measure, write. Raises UserError for what the user can mend."""
    model_folder = options.model.absolute()
    name = model_folder.name
    out = options.out or model_folder.parent / f"evaluation-{name}"
    check(options, out)
    items = choice.read_items(options.choices) if options.choices else []
    places = [model_folder / "tokenizer", model_folder.parent / "tokenizer"]
    tokenizer_folder = options.tokenizer or next((place for place in places if place.is_dir()), None)
    judged = student.load(options.model, tokenizer_folder)
    tokenizer = judged.tokenizer
    examples = choice.read_lvm_questions(options.lvm_jsonl, tokenizer) if options.lvm_jsonl else []
    recipe, held = None, None
    if options.recipe:
        assert tokenizer_folder is not None  # else there would be none to load
        recipe = load_recipe(options.recipe, options.overrides, tokenizer_folder)
        held = open_held_out(recipe, tokenizer, out)
        check_held_out(options.model, judged, held)

    questions = choice.encode_items(items, tokenizer)
    begin_pictures(out)  # a place that cannot be written to is found before anything is measured

    metrics: dict[str, Any] = {"model": str(options.model), "tokenizer": tokenizer.hash}
    rows: dict[str, list[list[Picture]]] = {}
    scored: dict[str, Scored] = {}
    if items:
        losses = candidate_losses(judged, questions, "choices")
        metrics["choice"] = choice.accuracies(items, losses)
    if examples:
        losses = candidate_losses(judged, examples, "LVM's examples")
        metrics["lvm"] = likelihood.mean_perplexity([loss.item() for loss in losses])
    if recipe and held:
        found, rows, scored = measure(judged, held, recipe, name, options)
        metrics |= found

    write_pictures(out, rows)
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomic(out / "report.html", render(report(name, metrics, rows, scored, recipe)))
    board.write(out / "tensorboard", {key: metrics[key] for key in MEASURED if key in metrics}, rows)
    show(name, metrics)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def check(options: argparse.Namespace, out: Path) -> None:
    """Refuse, before anything is loaded, what no model can be asked. Raises UserError."""
    if not (options.recipe or options.choices or options.lvm_jsonl):
        raise UserError("nothing to evaluate on: give --recipe, --choices or --lvm-jsonl")
    if options.overrides and not options.recipe:
        raise UserError(f"'{options.overrides[0]}': goes with --recipe")
    if options.shots < 1:
        raise UserError(f"--shots: {options.shots} must be at least 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: '{out}' is a file")
    for file, what in (("recipe.yaml", "run"), ("config.json", "model")):
        if (out / file).exists():
            raise UserError(f"--out: '{out}' is the folder of a {what}; choose another")


# --- the held-out samples ---


def load_recipe(file: Path, overrides: Sequence[str], tokenizer: Path) -> Recipe:
    """A recipe with that tokenizer and without its models: others are judged here."""
    without = [f"{section}=null" for section in (*ROLES, "cache", "probe", "finetune")]
    return recipes.load(file, [*overrides, f"tokenizer.folder={json.dumps(str(tokenizer))}", *without])


def open_held_out(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> HeldOut:
    """The recipe's held-out sentences, of its run folder or else made in `out`."""
    material, store = _of_run(recipe, tokenizer) or _made(recipe, tokenizer, out)
    views = material.views("validation")
    return HeldOut(store, tokenizer, material.plan.forms, recipe.sentences, views, recipe.seed)


def _of_run(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Material, TokenStore] | None:
    """What the recipe's run folder has, if it is of these samples and of this tokenizer."""
    folder = Path(recipe.run_dir)
    key = stage_key(_listing(chain.Run(recipe)), {})
    if record(folder / "data").get("key") != key:
        return None
    for name, need in (("tokenizer", "data"), ("tokens", "tokenizer")):
        done = record(folder / name)
        key = stage_key(Stage(name, done.get("inputs", []), [need], lambda _: {}), {need: key})
        if done.get("key") != key:  # left by a run over other samples
            return None
    material = open_samples(Given(recipe), folder / "data", folder)
    try:
        store = material.store(tokenizer.hash)
    except UserError:  # of another tokenizer
        return None
    console.print(f"samples and tokens: those of {folder}", soft_wrap=True)
    return material, store


def _made(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> tuple[Material, TokenStore]:
    """The held-out samples, listed and encoded in `out`; of training samples one a task: none is shown."""
    recipe = copy.deepcopy(recipe)
    recipe.run_dir, recipe.balance = str(out), BalanceConfig(strategy="none")
    recipe.data.duplicates = "keep"  # it is training samples that are dropped
    for config in recipe.tasks.values():
        config.samples = 1
    work, new = chain.Run(recipe), not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        work.run(_listing(work))
    except UserError:
        shutil.rmtree(out if new else out / ".data.partial")
        raise
    material = open_samples(work.given, out / "data", out)

    def encode(folder: Path) -> dict:
        views = {split: material.views(split) for split in SPLITS}
        write_store(
            folder, tokenizer, recipe.tasks, material.manifest, views,
            seed=recipe.seed, num_workers=recipe.trainer.num_workers,
        )  # fmt: skip
        return {}

    work.run(Stage("tokens", [tokenizer.hash], ["data"], encode))
    return material, material.store(tokenizer.hash)


def _listing(work: chain.Run) -> Stage:
    return next(stage for stage in work.stages() if stage.name == "data")


def check_held_out(folder: Path, judged: Student, held: HeldOut) -> None:
    """Refuse sentences that the model cannot read. Raises UserError."""
    config, ends = judged.model.config, held.config.ends(held.store.num_codes)
    if ends and max(ends) >= config.vocab_size:
        raise UserError(
            f"{folder}: has a vocabulary of {config.vocab_size}, BOS and EOS of the sentences are"
            f" {ends[0]} and {ends[1]}; give sentences.specials=false, or sentences.bos and sentences.eos"
        )
    if (begin := ends[0] if ends else None) != judged.bos:
        console.print(f"sentences begin with {_id(begin)}, the model's own with {_id(judged.bos)}")
    for task, form in held.forms.items():
        if form.length > config.max_position_embeddings:
            raise UserError(
                f"{folder}: takes {config.max_position_embeddings} tokens, sentences of tasks.{task} have"
                f" {form.length}; give less than the {form.shots} of sentences.pairs, or of sentences.shots"
            )


def _id(token: int | None) -> str:
    return "a picture" if token is None else f"id {token}"


# --- measuring ---


def measure(
    judged: Student, held: HeldOut, recipe: Recipe, name: str, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, list[list[Picture]]], dict[str, Scored]]:
    """What metrics.json says of the held-out samples, the pictures to look at, and what these are worth."""
    scorers = held_out.scorers_of(recipe.tasks, recipe.prompting.scores)
    with tqdm(desc="held-out", unit="sentence") as bar:
        found = held_out.measure(
            judged.model, held, recipe.prompting, examples=options.shots, scorers=scorers,
            progress=bar.update,
        )  # fmt: skip
    rows = held_out.shown(held, recipe.prompting.pictures)
    held_out.add_drawn(rows, name, found)
    drawn: dict[str, dict[str, Metrics]] = {task: dict(against) for task, against in found.drawn.items()}
    for task, ceiling in held_out.ceilings(held, recipe.prompting.queries, scorers).items():
        drawn[task]["ceiling"] = ceiling
    examples = {task: found.by_number(task) for task in found.examples}
    metrics = {"likelihood": found.scores, "examples": examples, "places": found.places, "pictures": drawn}
    return metrics, rows, found.scored


def candidate_losses(judged: Student, questions: Sequence[Question], title: str) -> list[Tensor]:
    """`choice.candidate_losses` under a bar."""
    with tqdm(total=len(questions), desc=title, unit="item") as bar:
        return choice.candidate_losses(judged.model, questions, bos=judged.bos, progress=bar.update)


# --- what is said of it ---


def begin_pictures(out: Path) -> Path:
    """An empty folder in `out`, which is made where it is not there."""
    partial = out / ".pictures.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_pictures(out: Path, rows: dict[str, list[list[Picture]]]) -> None:
    """`pictures/`, in place of an old one once it is whole."""
    folder, partial = out / "pictures", begin_pictures(out)
    save_pictures(partial, rows)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def report(
    name: str,
    metrics: dict[str, Any],
    rows: dict[str, list[list[Picture]]],
    scored: dict[str, Scored],
    recipe: Recipe | None,
) -> Report:
    """The page."""
    facts = [("model", metrics["model"])]
    judged = {
        task: entry | {key: metrics[key][task] for key in BY_TASK if task in metrics[key]}
        for task, entry in metrics.get("likelihood", {}).items()
    }
    tables = {title: metrics[key] for key, title in TABLES.items() if key in metrics}
    text = recipes.to_yaml(recipe) if recipe else ""
    scores = {name: judged} if judged else {}
    by_picture = {task: {name: each} for task, each in scored.items()}
    return Report(
        f"evaluation of {name}", facts, scores=scores, pictures=rows, scored=by_picture, tables=tables,
        recipe=text,
    )  # fmt: skip


def show(name: str, metrics: dict[str, Any]) -> None:
    """The numbers as tables."""
    if "likelihood" in metrics:
        show_scores({name: metrics["likelihood"]})
        columns = sorted({number for entry in metrics["examples"].values() for number in entry}, key=int)
        lines = [
            [task, *(_loss(entry[n]) if n in entry else "" for n in columns)]
            for task, entry in metrics["examples"].items()
        ]
        table("annotation loss after so many examples", ["task", *columns], lines)
        lines = [
            [task, metric, *(_number(against.get(key, {}).get(metric)) for key in AGAINST)]
            for task, against in metrics["pictures"].items()
            for metric in dict.fromkeys(key for entry in against.values() for key in entry)
        ]
        if lines:
            table("pictures drawn, against", ["task", "metric", *AGAINST.values()], lines)
    if "choice" in metrics:
        lines = [
            [group, entry["items"], _share(entry), f"{entry['chance']:.0%}"]
            for group, entry in metrics["choice"].items()
        ]
        table("choice by lowest perplexity", ["group", "items", "right (95%)", "by chance"], lines)
    if "lvm" in metrics:
        entry = metrics["lvm"]
        error = f" ± {entry['perplexity_se']:.2f}" if "perplexity_se" in entry else ""
        console.print(f"LVM's perplexity: {entry['perplexity']:.2f}{error}, {entry['examples']} examples")


MEASURED = ("likelihood", "examples", "places", "pictures", "choice", "lvm")
"""What TensorBoard shows."""
BY_TASK = ("examples", "places", "pictures")
"""What the page shows of a task beside its likelihood."""
TABLES = {
    "choice": "choice by lowest perplexity",
    "lvm": "perplexity as LVM's",
}
AGAINST = {"truth": "truth", "reconstruction": "its reconstruction", "ceiling": "at best"}


def _loss(entry: Metrics) -> str:
    error = f" ± {entry['loss_se']:.3f}" if "loss_se" in entry else ""
    return f"{entry['loss']:.3f}{error}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(entry: Metrics) -> str:
    return f"{entry['accuracy']:.1%} ({entry['low']:.1%}-{entry['high']:.1%})"


if __name__ == "__main__":
    sys.exit(main())
