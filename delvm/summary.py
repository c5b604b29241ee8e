"""A run -> what is said of it: the plan before it, the page and the numbers after it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from delvm import llama
from delvm import recipe as recipes
from delvm.chain import Run
from delvm.console import console, show_scores, table
from delvm.evaluate.prompting import load_pictures
from delvm.evaluate.report import Report, render
from delvm.stages import record, stage_key, write_atomic
from delvm.tokenizer.training import num_parameters


def dry_run(run: Run) -> None:
    """Check every input and print plan and sizes; writes nothing, trains nothing.

    Raises:
        UserError: what `Run.fit` would refuse.
    """
    with TemporaryDirectory() as folder:
        run.open_data(run.index(Path(folder)), Path(folder))
    for task, entry in run.manifest.items():
        form, counts = (
            run.plan.forms[task],
            f"{entry['train']} training, {entry['validation']} held-out samples",
        )
        console.print(f"{task}: {counts}; {form.kind}: {form.images} pictures, {form.length} tokens")
    run.show_plan()
    rows = []
    for role in run.models:
        config = run.model_config(role)
        per_step = config.batch_size * run.plan.length
        parameters = llama.num_parameters(config.size, run.vocabulary)
        rows.append((role, config.size, parameters, config.steps, per_step, per_step * config.steps))
    table("models", ["model", "size", "parameters", "steps", "tokens a step", "tokens"], rows)
    tokenizer = run.recipe.tokenizer
    if run.given_tokenizer is None:
        parameters = num_parameters(tokenizer, run.recipe.data.image_size)
        sizes = f"{parameters:,} parameters, {tokenizer.steps} steps of {tokenizer.batch_size} pictures"
        console.print(f"tokenizer: {sizes}")
    else:
        console.print(f"tokenizer: {tokenizer.folder}")
    ends = " and BOS, EOS" if run.recipe.sentences.specials else ""
    console.print(f"rows: {run.plan.length} tokens, {run.num_codes} codes{ends}")
    keys: dict[str, str] = {}
    for stage in run.stages():
        keys[stage.name] = stage_key(stage, keys)
        done = record(run.dir / stage.name).get("key") == keys[stage.name]
        console.print(f"{stage.name}: {'done, would be reused' if done else 'to do'}")


def conclude(run: Run) -> None:
    """Write `metrics.json` and `report.html` of a run that has ended, and print its last table."""
    stages = {stage.name: record(run.dir / stage.name) for stage in run.stages()}
    result = {
        "balance": run.plan.summary,
        "data": run.metrics["data"],
        "tokenizer": run.metrics["tokenizer"],
        "evaluate": run.metrics.get("evaluate", {}),
        "seconds": {name: entry["seconds"] for name, entry in stages.items()},
    }
    write_atomic(run.dir / "metrics.json", json.dumps(result, indent=2) + "\n")
    page = run.dir / "report.html"
    write_atomic(page, render(report(run, result)))
    if result["evaluate"]:
        show_scores(result["evaluate"])
    console.print(f"report: {page}", soft_wrap=True)


def report(run: Run, result: dict) -> Report:
    """What the page shows, read back from the run folder."""
    curves = {}
    facts = [("seed", str(run.recipe.seed)), ("image size", f"{run.recipe.data.image_size} px")]
    for role in run.models:
        points = json.loads((run.dir / role / "curve.json").read_text())
        curves[role] = [(point["step"], point["ce"]) for point in points]
        config = run.model_config(role)
        parameters = llama.num_parameters(config.size, run.vocabulary)
        facts.append((role, f"{config.size}: {parameters / 1e6:.2f}M parameters, {config.steps} steps"))
    pictures = load_pictures(run.dir / "evaluate" / "pictures")
    drawn = run.recipe.prompting
    how = "greedy" if drawn.temperature == 0 else f"temperature {drawn.temperature:g}, top-p {drawn.top_p:g}"
    facts.append(("annotations", how))
    facts.append(("time", f"{sum(result['seconds'].values()):.0f} s in all stages"))
    return Report(
        title=run.recipe.name,
        facts=facts,
        balance=result["balance"],
        tokenizer=result["tokenizer"],
        curves=curves,
        scores=result["evaluate"],
        pictures={task: pictures[task] for task in run.recipe.tasks if task in pictures},
        recipe=recipes.to_yaml(run.recipe),
    )
