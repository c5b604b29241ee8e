"""A run -> what is said of it: the plan before it, the page and the numbers after it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from delvm import llama, memory, ranks
from delvm.chain import Run, show_plan
from delvm.console import console, show_scores, table
from delvm.distill.cache import cache_bytes
from delvm.embedding import count_trained
from delvm.evaluate import board, runs
from delvm.evaluate.features import Listing
from delvm.evaluate.report import render
from delvm.finetune import arms
from delvm.given import Given
from delvm.material import list_samples
from delvm.plan import Plan
from delvm.stages import record, stage_key, write_atomic
from delvm.tokenizer.training import num_parameters


def dry_run(run: Run) -> None:
    """Check every input and print plan and sizes; writes nothing, trains nothing.

    Raises:
        UserError: what `Run.fit` would refuse.
    """
    given = run.given
    if not run.recipe.tasks:
        given.check()
        show_classes_plan(given)
        show_stages(run)
        return
    with TemporaryDirectory() as folder:
        material = list_samples(given, Path(folder), run.dir)
    plan = material.plan
    for task, entry in material.manifest.items():
        form = plan.forms[task]
        counts = f"{entry['train']} training, {entry['validation']} held-out samples"
        console.print(f"{task}: {counts}; {form.kind}: {form.images} pictures, {form.length} tokens")
    show_plan(material)
    rows: list[tuple[object, ...]] = []
    for role in given.models:
        config = given.training_config(role)
        parameters = llama.count_parameters(given.model_config(role, plan.positions))
        if role == "teacher" and given.teacher:
            rows.append((role, "given", parameters, "", "", ""))
            continue
        per_step = config.batch_size * plan.length
        rows.append((role, config.size, parameters, config.steps, per_step, per_step * config.steps))
    table("models", ["model", "size", "parameters", "steps", "tokens a step", "tokens"], rows)
    for role in given.models:
        show_embedding(given, role, plan.positions)
    show_memory(given, plan)
    if given.teacher:
        console.print(f"teacher: {given.training_config('teacher').folder}", soft_wrap=True)
    if run.recipe.cache and run.recipe.student:
        show_cache(run, plan.length)
    tokenizer = run.recipe.tokenizer
    if given.tokenizer is None:
        parameters = num_parameters(tokenizer, run.recipe.data.image_size)
        sizes = f"{parameters:,} parameters, {tokenizer.steps} steps of {tokenizer.batch_size} pictures"
        console.print(f"tokenizer: {sizes}")
    else:
        console.print(f"tokenizer: {tokenizer.folder}")
    ends = " and BOS, EOS" if run.recipe.sentences.specials else ""
    console.print(f"rows: {plan.length} tokens, {given.num_codes} codes{ends}")
    show_classes_plan(given)
    show_stages(run)


def show_embedding(given: Given, role: str, positions: int) -> None:
    """Print what a model that reads a codebook trains instead of the table that it is saved with."""
    config = given.model_config(role, positions)
    if given.training_config(role).embedding == "learned" or (role == "teacher" and given.teacher):
        return
    codes = f"{given.num_codes} vectors of {given.code_dim} numbers"
    if given.training_config(role).embedding == "codebook_start":
        console.print(f"{role}: its embedding starts from the codebook, {codes}")
        return
    trained = count_trained(config, given.num_codes, given.code_dim)
    console.print(
        f"{role}: reads the codebook, {codes}, frozen; instead of {config.vocab_size * config.hidden_size:,}"
        f" parameters its embedding trains {trained:,}",
        soft_wrap=True,
    )


def show_classes_plan(given: Given) -> None:
    """Print what a probe and a fine-tuning read and with which models, if there are any."""
    probe, tuning = given.recipe.probe, given.recipe.finetune
    if probe:
        names = [*given.models, *probe.models, *probe.controls, *probe.timm]
        console.print(f"probe: {_count(given.probe_pictures)}; {', '.join(names)}", soft_wrap=True)
    if tuning:
        models = {name: Path(name) for name in [*given.finetune_roles, *tuning.models]}
        names = [arm.name for arm in arms.list_arms(models, tuning.starts)]
        steps = tuning.steps(len(given.finetune_pictures["train"]))
        how = f"{', '.join(names)}, {steps} steps of {tuning.batch_size} pictures each"
        console.print(f"finetune: {_count(given.finetune_pictures)}; {how}", soft_wrap=True)
        for name, found in given.finetune_forms.items():
            now = arms.form_of(tuning, given.tokenizer, found.classes)
            sizes = f"a classifier of {found.image_size} px that goes on at {now.image_size} px"
            places = f"{replace(now, begins=found.begins).places} places a picture, {found.places} before"
            console.print(f"finetune: {name} is {sizes}: {places}", soft_wrap=True)


def _count(pictures: Mapping[str, Listing]) -> str:
    train, validation = pictures.values()
    return f"{len(train)} training, {len(validation)} held-out pictures of {len(train.classes)} classes"


def show_stages(run: Run) -> None:
    """Print which stages are done."""
    keys: dict[str, str] = {}
    for stage in run.stages():
        keys[stage.name] = stage_key(stage, keys)
        done = record(run.dir / stage.name).get("key") == keys[stage.name]
        console.print(f"{stage.name}: {'done, would be reused' if done else 'to do'}")


def show_memory(given: Given, plan: Plan) -> None:
    """Print what the training of each model takes of a GPU, shared by the processes that are here now."""
    trainer, rows = given.recipe.trainer, []
    for role in given.models:
        if role == "teacher" and given.teacher:
            continue
        share = given.training_config(role).batch_size // (ranks.world() * trainer.accumulate)
        shape = {"rows": share, "length": plan.length}
        needs = {role: memory.training(given.model_config(role, plan.positions), trainer, **shape)}
        if role == "student":
            teacher = given.model_config("teacher", plan.positions)
            student = given.recipe.student
            sharing = ranks.world() if student and student.teacher_sharded else 1
            live = memory.live_teacher(teacher, given.teacher_precision, **shape, processes=sharing)
            needs = {"student, live teacher": needs[role] + live, "student, cached teacher": needs[role]}
        micro_batch = f"{share} row{'s' * (share > 1)}"
        rows += [
            (name, micro_batch, *map(_size, (need.weights, need.activations, need.total)))
            for name, need in needs.items()
        ]
    if rows:
        processes = f"{ranks.world()} process{'es' * (ranks.world() > 1)}"
        title = f"memory a GPU (estimates; {processes}, accumulate {trainer.accumulate})"
        table(title, ["model", "micro-batch", "weights", "activations", "total"], rows)


def show_cache(run: Run, length: int) -> None:
    """Print what the teacher's cache takes of the disk that it goes to, and what is free there."""
    config, student = run.recipe.cache, run.recipe.student
    assert config is not None
    assert student is not None
    folder = Path(config.folder or run.dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    rows = config.rows or student.steps * student.batch_size
    takes = cache_bytes(config, run.given.vocabulary, length, rows)
    free = shutil.disk_usage(there).free
    console.print(
        f"cache: {_size(takes)} for {rows} rows; {_size(free)} free on the disk of {there}", soft_wrap=True
    )


def _size(number: int) -> str:
    """Bytes, as they are read."""
    if number >= 2**40:
        return f"{number / 2**40:.1f} TiB"
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def conclude(run: Run) -> None:
    """Write `metrics.json`, `report.html` and the same to TensorBoard of a run that has ended, and print its
    last table."""
    stages = {stage.name: record(run.dir / stage.name) for stage in run.stages()}
    classes: dict[str, dict] = {
        name: run.metrics[name] for name in ("probe", "finetune") if name in run.metrics
    }
    if "probe" in classes:
        show_probe(classes["probe"])
    if "finetune" in classes:
        show_finetune(classes["finetune"])
    result: dict = {}
    if run.recipe.tasks:
        result = {
            "balance": run.material.plan.summary,
            "data": run.metrics["data"],
            "tokenizer": run.metrics["tokenizer"],
            "evaluate": run.metrics.get("evaluate", {}),
        }
    if "questions" in run.metrics:
        show_questions(run.metrics["questions"])
        result["questions"] = run.metrics["questions"]
    result.update(classes, seconds={name: entry["seconds"] for name, entry in stages.items()})
    write_atomic(run.dir / "metrics.json", json.dumps(result, indent=2) + "\n")
    page = run.dir / "report.html"
    shown = runs.report(run.dir)
    write_atomic(page, render(shown))
    board.write(run.dir / "tensorboard" / "report", result, shown.pictures)
    if result.get("evaluate"):
        show_scores(result["evaluate"])
    console.print(f"report: {page}", soft_wrap=True)


def show_questions(asked: dict) -> None:
    """Print how often each model chose the answer, with 95% intervals, and LVM's perplexity."""
    rows = [
        [group, model, found["items"], f"{found['accuracy']:.1%}", f"{found['low']:.1%}-{found['high']:.1%}",
         f"{found['chance']:.0%}"]
        for model, groups in asked.get("choice", {}).items() for group, found in groups.items()
    ]  # fmt: skip
    if rows:
        table("choice by lowest perplexity", ["group", "model", "items", "right", "95%", "by chance"], rows)
    for model, found in asked.get("lvm", {}).items():
        console.print(f"{model}: LVM's perplexity {found['perplexity']:.2f}, {found['examples']} examples")


def show_probe(probed: dict) -> None:
    """Print what every classifier reads from every model's features: mean over the seeds, range, error."""
    rows = [
        [name, kind, f"{found['top1']:.3f}", f"{found['low']:.3f}-{found['high']:.3f}",
         f"{found['error']:.3f}", f"{found['top5']:.3f}"]
        for name, kinds in probed["models"].items() for kind, found in kinds.items()
    ]  # fmt: skip
    title = f"probe: {probed['validation']} held-out pictures of {probed['classes']} classes"
    table(title, ["features of", "classifier", "top-1", "seeds", "standard error", "top-5"], rows)


def show_finetune(tuned: dict) -> None:
    """Print what every classifier has right, with binomial standard errors."""
    rows = [
        [name, found["parameters"],
         *(f"{found[key]:.3f} ± {found[f'{key}_error']:.3f}" for key in ("top1", "top5"))]
        for name, found in tuned["models"].items()
    ]  # fmt: skip
    counts = f"{tuned['validation']} held-out pictures of {tuned['classes']} classes"
    title = f"fine-tuned: {counts}, ± one standard error"
    table(title, ["start", "parameters", "top-1", "top-5"], rows)
