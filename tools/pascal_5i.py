"""Segmentation by example on Pascal-5i (Shaban et al., BMVC 2017): a model draws the masks of episodes.

    python tools/pascal_5i.py lvm-7b --tokenizer vqgan --voc VOCdevkit/VOC2012 --shots 5
    python tools/pascal_5i.py runs/masks/export --voc VOCdevkit/VOC2012 --folds 0 --episodes 100

An episode shows pictures of one class with their masks, white on black, and asks for the mask of another one.
Each of the four folds has five classes, and its episodes are drawn from the pictures of VOC's list `val`
that show them: a class, then as many pictures as it takes. What was drawn counts where its brightest channel
is above 127; the border that VOC labels 255 does not. Pictures are resized to the tokenizer's size whatever
their aspect, so that the whole of a mask counts. Each score stands against the true masks and against what
the tokenizer keeps of them, beside what that would have itself: the ceiling.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from delvm import student
from delvm.console import console, table
from delvm.errors import UserError, exit_status
from delvm.evaluate.scores import PASCAL_CLASSES, foreground_masks, pascal_5i
from delvm.generation import complete
from delvm.images.files import read_picture
from delvm.stages import write_atomic
from delvm.student import BATCH, Student

IGNORED = 255
"""The label of the border around an object."""
AGAINST = {"truth": "truth", "reconstruction": "its reconstruction", "ceiling": "at best"}
KEYS = {"miou": "mIoU", "fb_iou": "foreground and background"}


@dataclass(frozen=True)
class Episode:
    """Pictures of one class."""

    number: int
    """The class, 1 to 20."""
    shown: list[str]
    query: str


# --- VOC's files ---


def read_labels(voc: Path, name: str) -> np.ndarray:
    """(H, W) uint8: the class of each pixel, 0 where there is none. Raises UserError."""
    file = voc / "SegmentationClass" / f"{name}.png"
    try:
        with Image.open(file) as picture:
            labels = np.asarray(picture)
    except OSError as error:
        raise UserError(f"{file}: unreadable picture ({error})") from error
    if labels.ndim != 2:
        raise UserError(f"{file}: no picture of labels, it has colours")
    return labels


def pictures_by_class(voc: Path) -> dict[int, list[str]]:
    """The pictures of the list `val` that show each class, in its order. Raises UserError."""
    listing = voc / "ImageSets" / "Segmentation" / "val.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"--voc: {listing} is unreadable; give VOCdevkit's folder VOC2012") from error
    found: dict[int, list[str]] = {number: [] for number in range(1, len(PASCAL_CLASSES) + 1)}
    for name in tqdm(names, desc="labels", unit="picture"):
        for number in np.unique(read_labels(voc, name)).tolist():
            if number in found:
                found[number].append(name)
    return found


def draw_episodes(
    pictures: dict[int, list[str]], fold: int, number: int, shots: int, seed: int
) -> list[Episode]:
    """The same for the same seed. Raises UserError for a class with too few pictures."""
    members = range(5 * fold + 1, 5 * fold + 6)
    for member in members:
        if len(pictures[member]) <= shots:
            raise UserError(
                f"--shots: {shots}, and one to ask for, but {len(pictures[member])} pictures show"
                f" {PASCAL_CLASSES[member - 1]}"
            )
    rng = np.random.default_rng([seed, fold])
    episodes = []
    for _ in range(number):
        member = int(rng.choice(members))
        *shown, query = rng.choice(pictures[member], shots + 1, replace=False).tolist()
        episodes.append(Episode(member, shown, query))
    return episodes


# --- a model's masks ---


def squares(voc: Path, name: str, number: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(side, side, 3) uint8 picture; (side, side) bool: the class, and what does not count."""
    picture = Image.fromarray(read_picture(voc / "JPEGImages" / f"{name}.jpg"))
    labels = Image.fromarray(read_labels(voc, name)).resize((side, side), Image.Resampling.NEAREST)
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    return pixels, np.asarray(labels) == number, np.asarray(labels) == IGNORED


def white(mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a mask (H, W) bool in white on black."""
    return np.repeat(np.uint8(255) * mask[..., None], 3, axis=2)


def score_fold(
    judged: Student, voc: Path, episodes: Sequence[Episode], fold: int, *, temperature: float, top_p: float
) -> dict[str, dict[str, float]]:
    """Let the model draw, and count.

    Returns:
        The metrics of `pascal_5i`: of what is drawn against the "truth", and against the "reconstruction" of
        this by the tokenizer; and the "ceiling", of the reconstruction against the truth.

    Raises:
        UserError: pictures that cannot be read.
    """
    tokenizer, side = judged.tokenizer, judged.tokenizer.image_size
    begin = torch.tensor([] if judged.bos is None else [judged.bos], dtype=torch.int64)
    drawn, kept, truth, ignored = [], [], [], []
    with tqdm(total=len(episodes), desc=f"fold {fold}", unit="episode") as bar:
        for start in range(0, len(episodes), BATCH):
            prompts = []
            for episode in episodes[start : start + BATCH]:
                pictures = []
                for name in episode.shown:
                    picture, mask, _ = squares(voc, name, episode.number, side)
                    pictures += [picture, white(mask)]
                query, mask, border = squares(voc, episode.query, episode.number, side)
                prompts.append(torch.cat([begin, judged.encode([*pictures, query]).flatten()]))
                truth.append(mask)
                ignored.append(border)
            codes = complete(
                judged.model, torch.stack(prompts), tokenizer.num_tokens, tokenizer.num_codes,
                temperature=temperature, top_p=top_p, seed=start,
            )  # fmt: skip
            drawn += [np.asarray(picture) for picture in judged.decode(codes)]
            codes = judged.encode([white(mask) for mask in truth[start:]])
            kept += [np.asarray(picture) for picture in judged.decode(codes)]
            bar.update(len(prompts))
    classes = np.array([episode.number for episode in episodes])
    made, best, true = foreground_masks(np.stack(drawn)), foreground_masks(np.stack(kept)), np.stack(truth)
    pairs = {"truth": (made, true), "reconstruction": (made, best), "ceiling": (best, true)}
    return {
        against: pascal_5i(*pair, classes, fold, np.stack(ignored)).metrics for against, pair in pairs.items()
    }


def run(options: argparse.Namespace) -> None:
    """Read, draw, count. Raises UserError for what the user can mend."""
    for key, least in (("episodes", 1), ("shots", 1), ("seed", 0)):
        if getattr(options, key) < least:
            raise UserError(f"--{key}: {getattr(options, key)} must be at least {least}")
    judged = student.load(options.model, options.tokenizer)
    if options.shots > judged.max_shots():
        raise UserError(f"--shots: {options.shots}, beside a query and its mask {judged.max_shots()} fit")
    pictures = pictures_by_class(options.voc)
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for fold in options.folds:
        episodes = draw_episodes(pictures, fold, options.episodes, options.shots, options.seed)
        metrics[f"fold {fold}"] = score_fold(
            judged, options.voc, episodes, fold, temperature=options.temperature, top_p=options.top_p
        )
    metrics["mean"] = {
        against: {key: float(np.mean([fold[against][key] for fold in metrics.values()])) for key in KEYS}
        for against in AGAINST
    }
    for key, title in KEYS.items():
        lines = [
            [name, *(f"{100 * entry[against][key]:.1f}" for against in AGAINST)]
            for name, entry in metrics.items()
        ]
        table(f"Pascal-5i, {title}, per cent against", ["", *AGAINST.values()], lines)
    if options.out:
        write_atomic(options.out, json.dumps(metrics, indent=2) + "\n")
        console.print(f"numbers: {options.out}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments in, numbers out. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/pascal_5i.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, help="a transformers folder of a Llama, or an export of this project")
    add("--tokenizer", type=Path, metavar="DIR", help="of the model; default: tokenizer/ in it or beside it")
    add("--voc", type=Path, required=True, metavar="DIR", help="VOCdevkit's folder VOC2012")
    add("--folds", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], metavar="N")
    add("--episodes", type=int, default=1000, metavar="N", help="of a fold; default: 1000")
    add("--shots", type=int, default=1, metavar="N", help="pictures with their masks; default: 1")
    add("--temperature", type=float, default=0.0, help="default: 0, the most likely code each time")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest codes that hold this share")
    add("--seed", type=int, default=0, help="of the episodes")
    add("--out", type=Path, metavar="FILE", help="for the numbers as JSON, by class too")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
