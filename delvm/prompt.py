"""Solved pairs and queries -> the queries' pictures, drawn by a model.

    python -m delvm.prompt runs/quickstart/export --pairs edges --query cat.jpg dog.jpg --out drawn
    python -m delvm.prompt lvm-7b --tokenizer vqgan --pairs seg_prompt --query seg_1.png --out drawn \\
        --temperature 0.1 --top-p 0.75 --candidates 4
    python -m delvm.prompt runs/both/export --pairs edges --pairs depth --query cat.jpg --out drawn
    python -m delvm.prompt runs/films/export --query frame-1.png frame-2.png --next 6 --out drawn

Pairs stand in DIR/images and DIR/annotations under equal names, or as NAME_img.png beside NAME_label.png; the
model sees them sorted by name. With several --pairs it is shown the images that are in all of them, each with
its annotation of every task, and draws all of them for a query. With --next the queries are frames, in that
order, and the model draws those that come next.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from delvm.errors import UserError, exit_status
from delvm.evaluate.prompting import Picture, PromptingConfig, grid
from delvm.images.files import read_picture
from delvm.images.folders import Folder, Pairs
from delvm.student import Student, load

IMAGE, LABEL = "_img", "_label"


@dataclass
class Drawn:
    """What a prompt has come to."""

    rows: list[list[Picture]]
    """Of the grid: what was shown, then what was drawn."""
    files: dict[str, Image.Image]
    """The pictures that were drawn, by name."""


def find_pairs(folder: Path) -> dict[str, list[Path]]:
    """[image, annotation] of every pair in a folder by its name, sorted; nothing is read.

    Raises UserError for a folder without pairs, and for an image without its annotation.
    """
    if (folder / "images").is_dir() or (folder / "annotations").is_dir():
        pairs = Pairs(str(folder / "images"), [str(folder / "annotations")], key="--pairs")
        return {name: [Path(file) for file in files] for name, *files in pairs.entries()}
    files = Folder(folder, "--pairs")
    names = sorted(stem.removesuffix(IMAGE) for stem in files if stem.endswith(IMAGE))
    for name in names:
        if name + LABEL not in files:
            raise UserError(f"--pairs: image without annotation: {files[name + IMAGE]}")
    if not names:
        raise UserError(
            f"--pairs: no pairs in '{folder}'; expected images/ and annotations/,"
            f" or NAME{IMAGE}.png beside NAME{LABEL}.png"
        )
    return {name: [files[name + IMAGE], files[name + LABEL]] for name in names}


def find_examples(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """[image, its annotation in each folder] by name: what `find_pairs` finds in all of them.

    Raises UserError as it, for no common name, and where two folders mean different images by one name.
    """
    tasks = [find_pairs(folder) for folder in folders]
    examples = {}
    for name, (image, annotation) in tasks[0].items():
        others = [task[name] for task in tasks[1:] if name in task]
        if len(others) < len(tasks) - 1:
            continue
        for other, _ in others:
            if not np.array_equal(read_picture(image), read_picture(other)):
                raise UserError(
                    f"--pairs: {other} is not the picture {image}; a query's tasks share an image"
                )
        examples[name] = [image, annotation, *(file for _, file in others)]
    if not examples:
        raise UserError(f"--pairs: no image is in all of {', '.join(map(str, folders))}")
    return examples


def draw_queries(student: Student, options: argparse.Namespace) -> Drawn:
    """--pairs and --query -> the candidates for each query. Raises UserError for what cannot be shown."""
    examples, tasks = find_examples(options.pairs), [folder.name for folder in options.pairs]
    fitting = student.max_shots(len(tasks))
    if options.shots is None and 0 < fitting < len(examples):
        print(f"shown: the first {fitting} of {len(examples)} pairs; no more fit")
    shots = options.shots or fitting or len(examples)
    shown = dict(list(examples.items())[:shots])
    answers = student.complete_many(
        list(shown.values()), options.query, candidates=options.candidates, temperature=options.temperature,
        top_p=options.top_p, seed=options.seed, nearest=options.nearest,
    )  # fmt: skip
    drawn = Drawn([[]], {})
    for name, example in shown.items():
        pictures = student.fit(example, name, nearest=options.nearest)
        drawn.rows[0] += zip([name, *tasks], pictures, strict=True)
    for number, (path, of_query) in enumerate(zip(options.query, answers, strict=True), 1):
        row = [(path.stem, student.fit([path], "query")[0])]
        for candidate, answer in enumerate(of_query, 1):
            for place, (task, picture) in enumerate(zip(tasks, answer, strict=True), 1):
                row.append((f"{task} {candidate}", np.asarray(picture)))
                which = f"{candidate}-{place}" if len(tasks) > 1 else str(candidate)
                drawn.files[f"{number:03}-{path.stem}-{which}"] = picture
        drawn.rows.append(row)
    return drawn


def draw_frames(student: Student, options: argparse.Namespace) -> Drawn:
    """--query and --next -> the candidates for the next frames. Raises UserError for what cannot be shown."""
    if len(options.query) >= student.room > 1:
        print(f"shown: the last {student.room - 1} of {len(options.query)} frames; no more fit")
    sequences = student.continue_frames(
        options.query, options.next, candidates=options.candidates, temperature=options.temperature,
        top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    drawn = Drawn([[(path.stem, student.fit([path], "query")[0]) for path in options.query]], {})
    for number, sequence in enumerate(sequences, 1):
        drawn.rows.append([(f"next {n}", np.asarray(picture)) for n, picture in enumerate(sequence, 1)])
        drawn.files |= {f"{number:03}-next-{n:03}": picture for n, picture in enumerate(sequence, 1)}
    return drawn


def save(pictures: Mapping[str, Image.Image], folder: Path) -> None:
    """Writes NAME.png for every picture, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        partial = folder / f".{name}.png.partial"
        try:
            picture.save(partial, format="PNG")
            os.replace(partial, folder / f"{name}.png")
        finally:
            partial.unlink(missing_ok=True)


def check(options: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot be drawn with any model. Raises UserError."""
    if bool(options.pairs) == (options.next is not None):
        raise UserError("--pairs, --next: give one of them; they say what to draw")
    if options.next is not None and (options.shots is not None or options.nearest):
        raise UserError("--shots, --nearest: go with --pairs, not with --next")
    for key, least in (("shots", 1), ("next", 1), ("candidates", 1), ("seed", 0)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise UserError(f"--{key}: {value} must be at least {least}")
    try:
        PromptingConfig(temperature=options.temperature, top_p=options.top_p)
    except ValueError as error:
        raise UserError(f"--{error}".replace("top_p", "top-p")) from error
    if options.candidates > 1 and options.temperature == 0:
        raise UserError(f"--candidates: {options.candidates} would be equal; set a --temperature above 0")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: '{options.out}' is not a folder")
    for path in options.query:
        read_picture(path)


def run(options: argparse.Namespace) -> None:
    """Read, draw, write. Raises UserError for what the user can mend, before anything is written."""
    check(options)
    student = load(options.model, options.tokenizer)
    drawn = draw_queries(student, options) if options.pairs else draw_frames(student, options)
    save({**drawn.files, "grid": grid(drawn.rows)}, options.out)
    print(f"{options.out}: {len(drawn.files)} pictures and grid.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments in, pictures out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m delvm.prompt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="a transformers folder of a Llama, or an export of this project")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="default: tokenizer/ in the model's folder, or beside it",
    )
    add("--query", type=Path, nargs="+", required=True, metavar="IMAGE")
    add("--pairs", type=Path, action="append", metavar="DIR", help="solved pairs; again for another task")
    add("--shots", type=int, metavar="N", help="show the first N pairs; default: as many as fit")
    add("--nearest", action="store_true", help="the annotations' colours are labels: never mix them")
    add("--next", type=int, metavar="N", help="the queries are frames: draw the N that come next")
    add("--out", type=Path, required=True, metavar="DIR", help="for the pictures and grid.png")
    add("--temperature", type=float, default=0.0, help="default: 0, the most likely code each time")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest codes that hold this share")
    add("--candidates", type=int, default=1, metavar="N", help="answers to each query")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
