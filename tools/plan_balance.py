"""A recipe's tasks under every balance strategy: views, draws, tokens, disk; printed, and drawn as bars.

    python tools/plan_balance.py recipes/quickstart.yaml
    python tools/plan_balance.py recipes/quickstart.yaml balance.alpha=0.5 balance.max_views=8 --out plan.png

Every file is read once, nothing is written but the picture.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageColor, ImageDraw

from delvm import recipe as recipes
from delvm.console import console, table
from delvm.errors import UserError
from delvm.given import Given
from delvm.material import Material, list_samples
from delvm.tokens import balance
from delvm.tokens.store import code_dtype

WIDTH, BAR, GAP, MARGIN = 640, 26, 10, 90  # pixels of the bars, of one bar, between two, left of them


def plans(material: Material) -> dict[str, dict[str, balance.TaskPlan]]:
    """The plan of every strategy with the recipe's other balance settings, `{strategy: {task: plan}}`."""
    samples = {task: entry["train"] for task, entry in material.manifest.items()}
    tokens = {
        task: entry["pictures"] * material.given.num_tokens for task, entry in material.manifest.items()
    }
    config = material.recipe.balance
    return {
        strategy: balance.plan(samples, tokens, dataclasses.replace(config, strategy=strategy))
        for strategy in balance.STRATEGIES
    }


def show(material: Material, found: dict[str, dict[str, balance.TaskPlan]]) -> None:
    """Print one table a strategy, the epoch's size, the disk that its grids take and what the cap costs."""
    bytes_a_code = code_dtype(material.given.num_codes).itemsize
    for strategy, tasks in found.items():
        rows, disk, total = [], 0, 0
        for task, plan in tasks.items():
            tokens = material.manifest[task]["pictures"] * material.given.num_tokens
            views = 1 if material.recipe.balance.online or task in material.given.token_tasks else plan.views
            grid = (plan.samples * views + material.manifest[task]["validation"]) * tokens * bytes_a_code
            disk, total = disk + grid, total + plan.draws * tokens
            rows.append((task, plan.samples, plan.views, plan.draws, plan.draws * tokens,
                         f"{plan.target:.1%}", f"{plan.share:.1%}", f"{grid / 1e6:,.2f} MB"))  # fmt: skip
        columns = ["task", "samples", "views", "drawn", "tokens", "target", "share", "disk"]
        used = " (the recipe's)" if strategy == material.recipe.balance.strategy else ""
        table(f"{strategy}{used}: {total:,} tokens an epoch, {disk / 1e6:,.2f} MB", columns, rows)
        for task, (target, share) in balance.shortfalls(tasks).items():
            console.print(
                f"{task}: {tasks[task].wanted} views wanted, cut by balance.max_views:"
                f" {share:.1%} of the tokens, {target:.1%} asked for"
            )


def draw(found: dict[str, dict[str, balance.TaskPlan]]) -> Image.Image:
    """A bar a strategy, each task's share of the tokens in its colour."""
    tasks = list(next(iter(found.values())))
    colours = [ImageColor.getrgb(f"hsl({360 * i // len(tasks)}, 55%, 60%)") for i in range(len(tasks))]
    canvas = Image.new("RGB", (MARGIN + WIDTH + GAP, GAP + len(found) * (BAR + GAP) + BAR), "white")
    pen = ImageDraw.Draw(canvas)
    for line, (strategy, plan) in enumerate(found.items()):
        top, left = GAP + line * (BAR + GAP), float(MARGIN)
        pen.text((GAP, top + 7), strategy, fill="black")
        for task, colour in zip(tasks, colours, strict=True):
            right = left + plan[task].share * WIDTH
            pen.rectangle((left, top, right, top + BAR), fill=colour)
            if right - left > 40:
                pen.text((left + 4, top + 7), f"{plan[task].share:.0%}", fill="black")
            left = right
    left = float(MARGIN)
    for task, colour in zip(tasks, colours, strict=True):
        top = GAP + len(found) * (BAR + GAP)
        pen.rectangle((left, top + 4, left + 10, top + 14), fill=colour)
        pen.text((left + 14, top + 3), task, fill="black")
        left += 30 + pen.textlength(task)
    return canvas


def main() -> int:
    """Arguments in, tables (and a PNG) out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    if options.out and options.out.suffix.lower() not in (".png", ".jpg"):
        parser.error(f"--out: '{options.out}' must end in .png or .jpg")
    try:
        given = Given(recipes.load(options.recipe, options.overrides))
        with TemporaryDirectory() as folder:
            material = list_samples(given, Path(folder), Path(folder))
        found = plans(material)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(material, found)
    if options.out:
        draw(found).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
