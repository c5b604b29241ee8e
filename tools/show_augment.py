"""A recipe's tasks under their policies -> one picture: a row of images and a row of annotations each.

    python tools/show_augment.py recipes/quickstart.yaml views.png
    python tools/show_augment.py recipes/pairs.yaml views.png --policies crops geometric \\
        tasks.edges.images=photos tasks.edges.annotations=drawings

On the left the sample itself, then views of it, as the tokenizer and the models see them. Look whether every
annotation still fits its image.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw

from delvm import recipe as recipes
from delvm.errors import UserError
from delvm.given import Given
from delvm.images.augment import POLICIES
from delvm.images.sources import Views, open_sources
from delvm.material import Material, list_samples

SIDE, GAP, LINE = 96, 4, 16  # pixels of a picture, between two, of a line of text


def rows(material: Material, policies: list[str], views: int, sample: int) -> list[tuple[str, np.ndarray]]:
    """(caption, pictures of one sample's views: (views, pictures, H, W, 3) uint8), by task and policy."""
    recipe, found = material.recipe, []
    sources = open_sources(
        material.manifest, material.given.image_tasks, "train", recipe.seed, material.listed
    )
    for task, source in sources.items():
        for policy in policies or [recipe.tasks[task].policy]:
            try:
                config = dataclasses.replace(recipe.tasks[task], policy=policy)
            except ValueError:  # a policy that mixes colours, for labels
                continue
            shown = Views(
                source, task, config, size=recipe.data.image_size, num_views=views, seed=recipe.seed
            )
            place = sample % len(source)
            pictures = np.stack([shown.view(place, number).numpy() for number in range(views)])
            found.append((f"{task}: {policy}, sample {place}", pictures))
    return found


def sheet(found: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Every row under its caption; a column is a view, the sample itself first."""
    heights = [LINE + len(pictures[0]) * (SIDE + GAP) + GAP for _, pictures in found]
    width = GAP + max(len(pictures) for _, pictures in found) * (SIDE + GAP)
    canvas = Image.new("RGB", (width, sum(heights)), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for (caption, pictures), height in zip(found, heights, strict=True):
        pen.text((GAP, top + 2), caption, fill="black")
        for column, view in enumerate(pictures):
            for line, picture in enumerate(view):
                scaled = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                canvas.paste(scaled, (GAP + column * (SIDE + GAP), top + LINE + line * (SIDE + GAP)))
        top += height
    return canvas


def main() -> int:
    """Arguments in, PNG out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=[])
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--sample", type=int, default=0)
    options = parser.parse_intermixed_args()
    try:
        given = Given(recipes.load(options.recipe, options.overrides))
        with TemporaryDirectory() as folder:
            material = list_samples(given, Path(folder), Path(folder))
            found = rows(material, options.policies, options.views, options.sample)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sheet(found).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
