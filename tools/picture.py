"""A finished run -> one PNG to show around.

    python tools/picture.py runs/quickstart quickstart.png
    python tools/picture.py runs/pairs mine.png --query photo.jpg another.jpg

Without --query: the run's first held-out query of each task, as in its report. With it: pictures of your own,
each prompted with the run's first held-out pair of a task (not shown) and completed by each of its models.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from delvm import llama
from delvm import recipe as recipes
from delvm.errors import UserError
from delvm.evaluate.prompting import Picture, load_pictures
from delvm.generation import complete
from delvm.given import Given
from delvm.images.augment import view
from delvm.images.files import read_picture
from delvm.material import open_samples
from delvm.tokenizer import Tokenizer
from delvm.tokens.sentences import validation_sentences
from delvm.tokens.store import open_store

SIDE, GAP, LINE = 128, 6, 16  # pixels of a picture, between two, of a line of text


def complete_queries(folder: Path, queries: list[Path]) -> dict[str, list[list[Picture]]]:
    """Rows of (query, the annotation by each model), by task."""
    recipe = recipes.load(folder / "recipe.yaml", ["trainer.accelerator=auto", f"run_dir={folder}"])
    store = open_store(folder / "tokens")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    pictures = [read_picture(path) for path in queries]
    size = recipe.data.image_size
    views = np.stack(
        [view([p], (False,), policy="none", size=size, nearest=False, seed=(0,))[0] for p in pictures]
    )
    with torch.no_grad():
        codes = tokenizer.encode(torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
    given = Given(recipe)
    forms = open_samples(given, folder / "data", folder).plan.forms
    rows: dict[str, list[list[Picture]]] = {}
    for task, sentences in validation_sentences(store, forms, recipe.sentences, recipe.seed).items():
        if forms[task].kind != "pairs":
            continue
        # the first held-out sentence up to the last pair, then a query of one's own
        end = len(sentences[0]) - recipe.sentences.specials - 2 * store.tokens_per_image
        prompts = torch.cat([sentences[:1, :end].expand(len(codes), -1), codes], 1)
        rows[task] = [[("query", picture)] for picture in views]
        for role in given.models:
            found = complete(
                llama.load(folder / role), prompts, store.tokens_per_image, store.num_codes,
                temperature=recipe.prompting.temperature, top_p=recipe.prompting.top_p, seed=recipe.seed,
            )  # fmt: skip
            with torch.no_grad():
                decoded = (tokenizer.decode(found) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            for row, picture in zip(rows[task], decoded, strict=True):
                row.append((role, picture))
    return rows


def sheet(rows: dict[str, list[list[Picture]]]) -> Image.Image:
    """Every row under the name of its task, every picture under its caption, each pixel a square."""
    flat = [(task, row) for task, entry in rows.items() for row in entry]
    width = GAP + max(len(row) for _, row in flat) * (SIDE + GAP)
    canvas = Image.new("RGB", (width, GAP + len(flat) * (SIDE + 2 * LINE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (task, row) in enumerate(flat):
        top = GAP + line * (SIDE + 2 * LINE + GAP)
        draw.text((GAP, top), task, fill="black")
        for place, (caption, picture) in enumerate(row):
            left = GAP + place * (SIDE + GAP)
            draw.text((left, top + LINE), caption, fill="dimgrey")
            scaled = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(scaled, (left, top + 2 * LINE))
    return canvas


def main() -> int:
    """Arguments in, PNG out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--query", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    try:
        if options.query:
            rows = complete_queries(options.run, options.query)
        else:
            tasks = recipes.load(options.run / "recipe.yaml", ["trainer.accelerator=auto"]).tasks
            pictures = load_pictures(options.run / "evaluate" / "pictures")
            rows = {task: pictures[task][:1] for task in tasks}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sheet(rows).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
