"""Questions of reasoning by analogy, A : A' = B : ?, drawn with coloured shapes, for `delvm.evaluate`.

    python tools/make_choices.py choices
    python -m delvm.evaluate runs/quickstart/student --choices choices/items.jsonl

From A to A' one attribute changes, and B, which has the value that A had, changes likewise. The candidates
are B with each value of that attribute: 300 questions each of colour (3 candidates), shape (3) and size (2),
so that guessing is right in 33, 33 and 50%. B differs from A in another attribute and has a place of its own:
A' itself is never among the candidates.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from delvm.stages import write_atomic

ATTRIBUTES = {
    "colour": ("red", "green", "blue"),
    "shape": ("circle", "square", "triangle"),
    "size": ("small", "large"),
}
RADIUS = {"small": 0.13, "large": 0.26}  # of the picture's side
SHARPER = 4  # drawn so many times larger, then averaged: smooth outlines

Figure = dict[str, str]
"""A value of each attribute."""
Place = tuple[float, float]
"""The figure's centre, in parts of the picture's side."""


def draw(figure: Figure, place: Place, side: int) -> Image.Image:
    """The figure on white, (side, side) RGB."""
    canvas = Image.new("RGB", (SHARPER * side, SHARPER * side), "white")
    x, y = (SHARPER * side * at for at in place)
    radius = SHARPER * side * RADIUS[figure["size"]]
    pen = ImageDraw.Draw(canvas)
    if figure["shape"] == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=figure["colour"])
    else:
        corners, turn = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[figure["shape"]]
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        pen.polygon(
            [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=figure["colour"]
        )
    return canvas.resize((side, side), Image.Resampling.BOX)


def question(attribute: str, rng: np.random.Generator) -> tuple[list[tuple[Figure, Place]], list[str], int]:
    """A, A', B with their places, the values that B may change to in random order, and the right one's."""
    values = [str(value) for value in rng.permutation(ATTRIBUTES[attribute])]
    before, after = values[:2]
    others = [name for name in ATTRIBUTES if name != attribute]
    a = {name: str(rng.choice(ATTRIBUTES[name])) for name in others}
    b = dict(a)
    while b == a:
        b = {name: str(rng.choice(ATTRIBUTES[name])) for name in others}
    margin = RADIUS["large"] + 0.02
    here, there = (tuple(rng.uniform(margin, 1 - margin, 2).tolist()) for _ in "ab")
    shown = [
        ({**a, attribute: before}, here),
        ({**a, attribute: after}, here),
        ({**b, attribute: before}, there),
    ]
    choices = [str(value) for value in rng.permutation(values)]
    return shown, choices, choices.index(after)


def make(folder: Path, number: int, side: int, seed: int) -> None:
    """`items.jsonl`, written last, and the pictures of `number` questions an attribute."""
    lines = []
    for index, attribute in enumerate(ATTRIBUTES):
        (folder / attribute).mkdir(parents=True, exist_ok=True)
        for item in tqdm(range(number), desc=attribute, unit="item"):
            shown, choices, answer = question(attribute, np.random.default_rng([seed, index, item]))
            query, place = shown[-1]
            pictures = [*shown, *(({**query, attribute: value}, place) for value in choices)]
            names = [f"{attribute}/{item:03}-{picture}.png" for picture in range(len(pictures))]
            for name, (figure, at) in zip(names, pictures, strict=True):
                draw(figure, at, side).save(folder / name)
            line = {"group": attribute, "context": names[:3], "candidates": names[3:], "answer": answer}
            lines.append(json.dumps(line) + "\n")
    write_atomic(folder / "items.jsonl", "".join(lines))


def main() -> int:
    """Arguments in, a folder out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--number", type=int, default=300, help="questions of each kind; default: 300")
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels; default: 256")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for key, least in (("number", 1), ("side", 8), ("seed", 0)):
        if getattr(options, key) < least:
            print(f"error: --{key}: {getattr(options, key)} must be at least {least}", file=sys.stderr)
            return 2
    if options.out.exists():
        print(f"error: {options.out}: is there already", file=sys.stderr)
        return 2
    make(options.out, options.number, options.side, options.seed)
    print(f"{options.out / 'items.jsonl'}: {len(ATTRIBUTES) * options.number} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
