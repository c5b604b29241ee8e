"""A model's folder -> its tokenizer and what is known of it, from the run that made it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delvm import recipe as recipes
from delvm.errors import UserError
from delvm.export.quality import Sentences
from delvm.given import Given
from delvm.material import MANIFEST, Material
from delvm.plan import make_plan
from delvm.stages import record
from delvm.tokenizer import load as load_tokenizer
from delvm.tokens.sentences import validation_sentences
from delvm.tokens.store import open_store

HELD_OUT = 32
"""Sentences of a task that a lossy format is measured on, at most."""
EXPORT = "export"  # the run's own, of its last model


@dataclass(frozen=True)
class Source:
    """What is exported."""

    tokenizer: Path
    card: dict[str, Any]
    """See `folder.export`."""
    num_codes: int | None = None
    """What the model was trained on, where that is known."""
    held_out: Sentences | None = None


def find_source(model: Path, tokenizer: Path | None = None) -> Source:
    """What goes with a model: of its run, where it is in one that has evaluated it, else nothing.

    tokenizer: default: tokenizer/ in the model's folder, or beside it.

    Raises UserError where there is no tokenizer, for one whose codes the model was not trained on, and for a
    run's files that are damaged.
    """
    if not model.is_dir():
        raise UserError(f"{model}: no such folder; a model is a transformers folder with a Llama")
    run = model.resolve().parent
    found = [folder for folder in (model / "tokenizer", run / "tokenizer") if folder.is_dir()]
    if tokenizer is None and not found:
        raise UserError(f"{model}: has no tokenizer/, in it or beside it; say --tokenizer DIR")
    tokenizer = tokenizer or found[0]
    metrics = record(run / "evaluate").get("metrics", {})
    if not (run / "recipe.yaml").is_file() or model.resolve().name not in (*metrics, EXPORT):
        return Source(tokenizer, {"name": model.resolve().name, "metrics": {}, "recipe": "", "data": ""})
    return _of_run(run, model.resolve().name, metrics, tokenizer)


def _of_run(run: Path, name: str, metrics: dict[str, Any], folder: Path) -> Source:
    recipe, tokenizer = recipes.load(run / "recipe.yaml"), load_tokenizer(folder)
    store = open_store(run / "tokens", tokenizer=tokenizer.hash)
    try:
        manifest = json.loads((run / "data" / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'data' / MANIFEST}: cannot be read: {error}") from error
    sizes = {"num_tokens": tokenizer.num_tokens, "num_codes": tokenizer.num_codes}
    forms = make_plan(recipe, manifest, **sizes).forms
    sentences = validation_sentences(store, forms, recipe.sentences, recipe.seed)
    return Source(
        folder,
        {
            "name": recipe.name,
            "metrics": metrics,
            "recipe": recipes.to_yaml(recipe),
            "data": Material(Given(recipe), manifest, run / "data", run).describe(),
            "role": None if name == EXPORT else name,
        },
        store.num_codes,
        Sentences(
            {task: ids[:HELD_OUT] for task, ids in sentences.items()},
            {task: form.roles for task, form in forms.items()},
        ),
    )
