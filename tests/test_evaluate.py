"""python -m delvm.evaluate: any model folder, with and without a recipe."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import chain, llama, recipe
from delvm.evaluate import choice
from delvm.evaluate.__main__ import load_recipe, main
from delvm.evaluate.held_out import HeldOut, ceilings, measure, scorers_of
from delvm.evaluate.prompting import load_pictures
from delvm.given import Given
from delvm.material import open_samples
from delvm.tokens.formats import read_lvm, write_lvm
from tests.conftest import write_pairs

RECIPE = """
data: {{image_size: 8}}
tasks:
  shapes: {{scene: segmentation, samples: 5, validation_samples: 6, policy: segmentation, nearest: true}}
  grey: {{images: {pairs}/images, annotations: {pairs}/annotations, validation_fraction: 0.4}}
sentences: {{pairs: 2, validation: 5}}
teacher: {{size: tiny, steps: 8, folder: gone}}
student: {{size: micro, steps: 6}}
prompting: {{pictures: 2}}
trainer: {{accelerator: cpu}}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Models this small only lose by more."""


@pytest.fixture
def root(tmp_path, tokenizer):
    """`model`, 4 tokens a picture and 16 codes, `tokenizer` beside it, `mine.yaml` over scenes and pairs."""
    tokenizer.save(tmp_path / "tokenizer")
    llama.save(llama.build("micro", 18, 40, bos=16, eos=17, seed=0), tmp_path / "model")
    write_pairs(tmp_path / "pairs")
    (tmp_path / "mine.yaml").write_text(
        RECIPE.format(pairs=tmp_path / "pairs") + f"run_dir: {tmp_path / 'run'}\n"
    )
    return tmp_path


def run(root, *more):
    """Exit status, and metrics.json."""
    status = main([str(root / "model"), *map(str, more), "--out", str(root / "out")])
    return status, json.loads((root / "out" / "metrics.json").read_text())


def expected(root, run_dir, *more):
    """What is measured of the model on the recipe's held-out samples, listed and encoded in `run_dir`, and
    the ceilings."""
    settings = [
        *more,
        f"tokenizer.folder={root / 'tokenizer'}",
        "teacher=null",
        "student=null",
        f"run_dir={run_dir}",
    ]
    found = recipe.load(root / "mine.yaml", settings)
    material = open_samples(Given(found), run_dir / "data", run_dir)
    tokenizer = material.given.tokenizer
    held = HeldOut(
        material.store(tokenizer.hash), tokenizer, material.plan.forms, found.sentences,
        material.views("validation"), found.seed,
    )  # fmt: skip
    scorers = scorers_of(found.tasks, {})
    measured = measure(llama.load(root / "model"), held, found.prompting, examples=7, scorers=scorers)
    return measured, ceilings(held, found.prompting.queries, scorers)


def encode(root):
    """The recipe's run as far as its tokens, in its own run folder."""
    settings = [f"tokenizer.folder={root / 'tokenizer'}", "teacher=null", "student=null"]
    chain.Run(recipe.load(root / "mine.yaml", settings)).fit(until="tokens")


def test_held_out_samples_of_a_recipe_that_never_ran(root, tokenizer, capsys):
    status, metrics = run(root, "--recipe", root / "mine.yaml", "prompting.queries=2")
    assert status == 0
    assert not (root / "run").exists()
    # training samples are not encoded, but for one a task
    manifest = json.loads((root / "out" / "tokens" / "manifest.json").read_text())
    assert [entry["train"]["shape"][:2] for entry in manifest["tasks"].values()] == [[1, 1], [1, 1]]
    encode(root)
    found, best = expected(root, root / "run", "prompting.queries=2")
    assert metrics["likelihood"] == {task: pytest.approx(entry) for task, entry in found.scores.items()}
    # BOS, 4 pairs of 8 tokens and EOS of 40 positions; the pairs have fewer held-out samples than 7
    examples = {task: {str(n): entry for n, entry in some.items()} for task, some in found.examples.items()}
    assert list(examples["shapes"]) == ["0", "1", "2", "3"]
    for task, some in examples.items():
        assert metrics["examples"][task] == {n: pytest.approx(entry) for n, entry in some.items()}
    assert np.array(metrics["places"]["grey"]).shape == (2, 2)
    assert list(metrics["pictures"]) == ["shapes", "grey"]
    for task, drawn in metrics["pictures"].items():
        against = {**found.drawn[task], "ceiling": best[task]}
        assert drawn == {key: pytest.approx(entry) for key, entry in against.items()}
    saved = load_pictures(root / "out" / "pictures")
    truth, made = (np.stack([row[place][1] for row in saved["grey"]]) / 255 for place in (3, 4))
    assert metrics["pictures"]["grey"]["truth"]["mse"] == pytest.approx(((made - truth) ** 2).mean())
    kept = tokenizer.decode(tokenizer.encode(torch.from_numpy(truth).float().permute(0, 3, 1, 2)))
    kept = (kept.permute(0, 2, 3, 1) * 255).round().numpy() / 255
    assert metrics["pictures"]["grey"]["ceiling"]["mse"] == pytest.approx(((kept - truth) ** 2).mean())
    assert metrics["pictures"]["grey"]["reconstruction"]["mse"] == pytest.approx(((made - kept) ** 2).mean())
    assert [caption for caption, _ in saved["grey"][1]] == [
        "example",
        "annotation",
        "query",
        "truth",
        "model",
    ]
    np.testing.assert_array_equal(saved["grey"][1][-1][1], found.pictures["grey"][1])
    events = EventAccumulator(str(root / "out" / "tensorboard")).Reload()
    (point,) = events.Scalars("likelihood/grey/loss")
    assert point.value == pytest.approx(metrics["likelihood"]["grey"]["loss"])
    assert events.Tags()["images"] == ["pictures/shapes", "pictures/grey"]
    page = (root / "out" / "report.html").read_text()
    assert "evaluation of model" in page
    assert f"{metrics['likelihood']['grey']['loss']:.3f}" in page
    said = capsys.readouterr().out
    assert "data: done" in said
    assert re.search(r"grey +│ +miou|shapes +│ +miou", said)


def test_samples_and_tokens_of_the_run_are_used(root, capsys):
    encode(root)
    capsys.readouterr()
    status, metrics = run(root, "--recipe", root / "mine.yaml", "prompting.queries=0")
    assert status == 0
    assert f"samples and tokens: those of {root / 'run'}" in capsys.readouterr().out
    assert sorted(path.name for path in (root / "out").iterdir()) == [
        "metrics.json",
        "pictures",
        "report.html",
        "tensorboard",
    ]
    assert metrics["pictures"] == {}
    ours = {
        task: pytest.approx(entry)
        for task, entry in expected(root, root / "run", "prompting.queries=0")[0].scores.items()
    }
    assert metrics["likelihood"] == ours
    # of other samples they are not
    status, other = run(root, "seed=1", "--recipe", root / "mine.yaml", "prompting.queries=0")
    assert status == 0
    assert "data: done" in capsys.readouterr().out
    assert other["likelihood"] != metrics["likelihood"]
    # and tokens that some other tokenizer has written are not either
    record = json.loads((root / "run" / "tokens" / "manifest.json").read_text())
    (root / "run" / "tokens" / "manifest.json").write_text(json.dumps(record | {"tokenizer": "0" * 16}))
    status, again = run(root, "--recipe", root / "mine.yaml", "prompting.queries=0")
    assert "data: done" in capsys.readouterr().out
    assert again["likelihood"] == ours
    # nor those of a run that was stopped between listing and encoding anew
    (root / "run" / "tokens" / "manifest.json").write_text(json.dumps(record))
    stage = root / "run" / "tokens" / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"key": "0" * 16}))
    run(root, "--recipe", root / "mine.yaml", "prompting.queries=0")
    assert "data: unchanged, reused" in capsys.readouterr().out


def write_questions(root):
    """`items.jsonl`, three times the same two candidates, and `lvm.jsonl`, two examples of tokens."""
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)).save(root / f"{name}.png")
    item = {"context": ["a.png", "b.png"], "candidates": ["c.png", "d.png"]}
    (root / "items.jsonl").write_text("".join(json.dumps(item | {"answer": n}) + "\n" for n in (0, 1, 0)))
    write_lvm(root / "lvm.jsonl", [rng.integers(16, size=12), rng.integers(16, size=20)])


def test_questions_need_no_recipe(root, capsys):
    write_questions(root)
    status, metrics = run(root, "--choices", root / "items.jsonl", "--lvm-jsonl", root / "lvm.jsonl")
    assert status == 0
    assert set(metrics) == {"model", "tokenizer", "choice", "lvm"}
    right = metrics["choice"]["all"]["accuracy"]  # it chooses the same of equal questions
    assert right in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert metrics["choice"]["all"]["items"] == 3
    assert metrics["lvm"]["examples"] == 2
    model = llama.load(root / "model")
    perplexities = []
    for tokens in read_lvm(root / "lvm.jsonl"):
        ids = torch.tensor([[16, *tokens]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        nll = [-logs[place - 1, ids[0, place]].item() for place in range(ids.shape[1] - 4, ids.shape[1])]
        perplexities.append(np.exp(np.mean(nll)))
    assert metrics["lvm"]["perplexity"] == pytest.approx(np.mean(perplexities), rel=1e-5)
    said = capsys.readouterr().out
    assert f"LVM's perplexity: {np.mean(perplexities):.2f}" in said
    assert "choice by lowest perplexity" in said


def test_a_recipe_that_also_asks_of_its_own_models(root):
    sections = "".join(
        f"{name}: {{{setting}, train: gone, validation: away}}\n"
        for name, setting in (("probe", "seeds: 1"), ("finetune", "roles: [student]"))
    )
    with (root / "mine.yaml").open("a") as file:
        file.write(sections)
    found = load_recipe(root / "mine.yaml", ["seed=3"], root / "tokenizer")
    assert (found.student, found.probe, found.finetune, found.seed) == (None, None, None, 3)


def test_a_model_without_specials(root):
    llama.save(llama.build("micro", 16, 40, seed=0), root / "model")
    arguments = ["--recipe", root / "mine.yaml", "prompting.queries=0"]
    status, metrics = run(root, "sentences.specials=false", *arguments)
    assert status == 0
    assert metrics["likelihood"]["grey"]["loss"] > 0


# --- what cannot be evaluated ---


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err.splitlines()
    return said[-1]


def test_refusals(root, capsys):
    model, choices = root / "model", root / "items.jsonl"
    mine = ("--recipe", root / "mine.yaml")
    choices.write_text('{"context": 3}\n')
    said = refused(capsys, model)
    assert said == "error: nothing to evaluate on: give --recipe, --choices or --lvm-jsonl"
    assert refused(capsys, model, "seed=1", "--choices", choices) == "error: 'seed=1': goes with --recipe"
    assert refused(capsys, model, *mine, "--shots", 0) == "error: --shots: 0 must be at least 1"
    said = refused(capsys, model, *mine, "prompting.queries=-1")
    assert said.endswith("prompting.queries: -1 must be at least 0")
    assert refused(capsys, model, *mine, "--out", choices) == f"error: --out: '{choices}' is a file"
    assert refused(capsys, model, *mine, "--out", model).endswith("is the folder of a model; choose another")
    said = refused(capsys, model, "--choices", choices)
    assert said == f"error: {choices}, line 1: context: 3 must be a list of paths"
    said = refused(capsys, model, "--lvm-jsonl", root / "none")
    assert said == f"error: {root / 'none'}: unreadable (No such file or directory)"
    assert refused(capsys, model, "--recipe", root / "none") == f"error: {root / 'none'}: no such recipe"
    llama.save(llama.build("micro", 18, 17, bos=16, eos=17, seed=0), root / "short")
    assert refused(capsys, root / "short", *mine) == (
        f"error: {root / 'short'}: takes 17 tokens, sentences of tasks.shapes have 18;"
        " give less than the 2 of sentences.pairs, or of sentences.shots"
    )
    said = refused(capsys, model, "data.image_size=16", *mine)
    assert said.endswith("is for 8 px, data.image_size is 16")
    said = refused(capsys, model, "tasks.grey.images=gone", *mine, "--out", root / "new")
    assert "tasks.grey" in said
    assert not (root / "new").exists()
    llama.save(llama.build("micro", 16, 40, seed=0), model)
    said = refused(capsys, model, *mine)
    assert "has a vocabulary of 16, BOS and EOS of the sentences are 16 and 17" in said


def test_a_place_that_cannot_be_written_to_is_found_first(root, capsys, monkeypatch):
    write_questions(root)
    monkeypatch.setattr(choice, "candidate_losses", lambda *_, **__: pytest.fail("measured"))
    (root / "file").write_text("")
    said = refused(capsys, root / "model", "--choices", root / "items.jsonl", "--out", root / "file" / "out")
    assert said == f"error: {root / 'file' / 'out' / '.pictures.partial'}: Not a directory"


def test_a_model_without_numbers(root, capsys):
    model = llama.load(root / "model")
    model.model.norm.weight.data.fill_(math.nan)
    llama.save(model, root / "burst")
    said = f"error: {root / 'burst'}: its logits are no numbers (nan)"
    assert refused(capsys, root / "burst", "--recipe", root / "mine.yaml") == said
    write_questions(root)
    assert refused(capsys, root / "burst", "--choices", root / "items.jsonl") == said
    assert refused(capsys, root / "burst", "--lvm-jsonl", root / "lvm.jsonl") == said
    assert not (root / "evaluation-burst" / "metrics.json").exists()


def test_models_and_tokenizers_that_do_not_belong_together(root, capsys):
    mine = ("--recipe", root / "mine.yaml")
    llama.save(llama.build("micro", 258, 40, seed=0), root / "large")
    said = refused(capsys, root / "large", *mine)
    assert re.search(r"tokenizer: has 16 codes; \S+large has a vocabulary of 258$", said)
    (root / "tokenizer").rename(root / "elsewhere")
    assert "no tokenizer/" in refused(capsys, root / "model", *mine)
    assert refused(capsys, root / "none", *mine).startswith(f"error: {root / 'none'}: ")
    assert (
        main(
            [
                str(root / "model"),
                "--tokenizer",
                str(root / "elsewhere"),
                *map(str, mine),
                "prompting.queries=0",
            ]
        )
        == 0
    )
    assert (root / "evaluation-model" / "metrics.json").is_file()
