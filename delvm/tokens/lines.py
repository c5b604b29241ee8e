"""Token files of other projects -> a task's samples as rows of codes, split like those of pictures."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from delvm.errors import UserError
from delvm.images.sources import SPLITS, held_out
from delvm.images.tasks import TaskConfig
from delvm.tokens.formats import read_delvm, read_lvm

READERS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {"delvm": read_delvm, "lvm": read_lvm}
"""By `source`. What a task's `images` names: a folder with `train.bin`, or a JSONL file."""


def index_lines(task: str, config: TaskConfig, *, tokens_per_image: int, num_codes: int, seed: int) -> dict:
    """Read every line once: the task's part of the manifest, as `images.sources.index_task` gives it.

    A line is a sample; all have the same number of pictures.

    Raises:
        UserError: with file and line, what a reader refuses; a line that is no whole number of pictures, or
            of another number than the first; a code that the tokenizer does not have; a split without lines.
    """
    counts, pictures = dict.fromkeys(SPLITS, 0), 0
    for split in SPLITS:
        for place, tokens in split_lines(config, split, seed):
            number, rest = divmod(len(tokens), tokens_per_image)
            if rest or not number:
                raise UserError(
                    f"{place}: {len(tokens)} tokens, no multiple of a picture's {tokens_per_image}"
                )
            if pictures not in (0, number):
                raise UserError(f"{place}: {number} pictures, the lines before it have {pictures}")
            if (largest := int(tokens.max())) >= num_codes:
                raise UserError(f"{place}: code {largest}, the tokenizer has {num_codes}")
            counts[split], pictures = counts[split] + 1, number
        if not counts[split]:
            raise UserError(f"tasks.{task}: no {split} samples in '{config.images}'")
    frames = config.num_frames(pictures)
    if pictures % frames:
        raise UserError(f"tasks.{task}.frames: {frames} does not divide the {pictures} pictures of a line")
    return {**counts, "pictures": pictures, "skipped": [], "dropped": []}


def num_pictures(config: TaskConfig, tokens_per_image: int, seed: int) -> int:
    """Pictures of a line, by the first line of any split."""
    first = next((tokens for split in SPLITS for _, tokens in split_lines(config, split, seed)), None)
    return 1 if first is None else max(1, len(first) // tokens_per_image)


def split_lines(config: TaskConfig, split: str, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(file and line, tokens) of one split, read one by one, at most `samples` or `validation_samples`.

    Lines are held out by what they hold: equal ones fall on the same side.
    """
    apart = bool(config.validation_images)
    file = config.validation_images if apart and split == "validation" else config.images
    limit = config.validation_samples if split == "validation" else config.samples
    lines = (
        (f"{file}, line {number}", tokens)
        for number, tokens in enumerate(READERS[config.source](Path(file).expanduser()), 1)
        if apart or SPLITS[held_out(_digest(tokens), config.validation_fraction, seed)] == split
    )
    return islice(lines, limit or None)


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def rows(config: TaskConfig, split: str, seed: int, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """(1, pictures, tokens) of every sample of a split. shape: (pictures, tokens)."""
    for _, tokens in split_lines(config, split, seed):
        yield tokens.reshape(1, *shape)
