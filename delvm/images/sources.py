"""Storage kinds -> samples: a task's pictures and their views, read when asked for."""

import functools
import glob
import hashlib
import itertools
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from delvm.errors import UserError
from delvm.images import duplicates
from delvm.images.augment import JOINT_COLOUR, view
from delvm.images.degrade import MAKERS
from delvm.images.files import Entry, Sample, Storage
from delvm.images.listing import Entries, ListWriter, Stored, rename
from delvm.images.scenes import Scenes
from delvm.images.tasks import DataConfig, TaskConfig, open_storage

SPLITS = ("train", "validation")
READERS = 4  # threads: decoding a picture leaves Python's lock

Group = tuple[str, str]
"""A split, and in it a class; "" where classes are not told apart."""


def held_out(stem: str, fraction: float, seed: int) -> bool:
    """Whether a stem is for validation: by its hash, so that every task holds out the same photographs."""
    name = f"{seed}/{stem}".encode(errors="surrogatepass")  # a file's name need not be valid Unicode
    digest = hashlib.sha256(name).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_samples(task: str, config: TaskConfig, seed: int) -> Iterator[tuple[str, Storage, Entry]]:
    """(split, storage, entry) of a task's samples, unread, at most `samples` and `validation_samples`.

    Those are the first as they are listed; of source `classes` the first of every class, as even as they go.

    Raises:
        UserError: what the storage refuses; a split without samples.
    """
    limits = {"train": config.samples, "validation": config.validation_samples}
    places = {"": SPLITS[:1], "validation_": SPLITS[1:]} if config.validation_images else {"": SPLITS}
    for prefix, splits in places.items():
        storage = open_storage(task, config, seed, prefix)
        even = config.source == "classes" and any(limits[split] for split in splits)
        listing = functools.partial(_list_splits, storage, task, config, seed, prefix)
        room: dict[Group, float] = {(split, ""): limits[split] or math.inf for split in splits}
        if even:  # listed twice: the classes are counted first
            room = _even_room(Counter((split, entry[2]) for split, entry in listing()), limits)
        counts = dict.fromkeys(splits, 0)
        listed = 0
        for split, entry in listing():
            listed += 1
            group = split, entry[2] if even else ""
            if room[group]:
                room[group] -= 1
                counts[split] += 1
                yield split, storage, entry
            elif not even and not any(room.values()):
                break  # the films and tars that follow need not be opened
        for split, count in counts.items():
            if not count:
                where = getattr(config, f"{prefix}images")
                raise UserError(f"tasks.{task}: no {split} samples ({listed} in all in '{where}')")


def _even_room(sizes: Mapping[Group, int], limits: Mapping[str, int]) -> dict[Group, float]:
    """How many to take of each group: `deal` within each split, or all where it has no limit."""
    room: dict[Group, float] = {}
    for split, limit in limits.items():
        own = {group: size for group, size in sizes.items() if group[0] == split}
        room |= deal(own, limit or sum(own.values()))
    return room


def deal(sizes: Mapping[Group, int], total: int) -> dict[Group, int]:
    """How many to take of each class: one of each in turn, in their order, until it is `total` or all.

    sizes: how many there are of each.
    """
    dealt = dict.fromkeys(sizes, 0)
    while total > 0 and (left := [group for group, size in sizes.items() if dealt[group] < size]):
        for group in left[:total]:
            dealt[group] += 1
        total -= len(left)
    return dealt


def num_pictures(task: str, config: TaskConfig, seed: int) -> int:
    """Pictures of a sample, by the first that can be read. Raises UserError where there is none."""
    if config.source == "scene":
        return 2
    first: UserError | None = None
    for _, storage, entry in itertools.islice(split_samples(task, config, seed), 64):
        try:
            return len(storage.read(entry)) + bool(config.make)
        except UserError as error:
            first = first or error
    raise UserError(f"tasks.{task}: none of the first samples can be read, first: {first}")


def _list_splits(
    storage: Storage, task: str, config: TaskConfig, seed: int, prefix: str
) -> Iterator[tuple[str, Entry]]:
    """(split, entry) of all that a storage lists."""
    for entry in _list_entries(storage, task, prefix):
        if config.validation_images:
            held = bool(prefix)
        else:
            held = held_out(str(entry[0]), config.validation_fraction, seed)
        yield SPLITS[held], entry


def _list_entries(storage: Storage, task: str, prefix: str) -> Iterator[Entry]:
    try:
        yield from storage.entries()
    except UserError as error:  # a storage knows its settings without the prefix
        key, message = f"tasks.{task}.", str(error)
        if message.startswith(key):
            message = key + prefix + message.removeprefix(key)
        raise UserError(message) from error


def index_task(task: str, config: TaskConfig, data: DataConfig, seed: int, folder: Path) -> dict:
    """Decode every sample of a task once and list the readable ones, as `TASK.SPLIT` in `folder`.

    Returns:
        The task's part of the manifest: samples by split, pictures of a sample, messages of skipped ones.

    Raises:
        UserError: as `split_samples`; an unreadable sample under `stop`; under `skip` none that is readable.
    """
    samples = split_samples(task, config, seed)
    # the clean photograph, an annotation here: rain hides which one it is
    look = functools.partial(_look, clean=1 if config.policy in JOINT_COLOUR else 0)
    skipped: list[str] = []
    pictures = 0
    with (
        ListWriter(folder / f"{task}.train") as train,
        ListWriter(folder / f"{task}.validation") as validation,
        ThreadPoolExecutor(READERS) as pool,
        tqdm(desc=f"data: {task}", unit="sample") as bar,
    ):
        lists = {"train": train, "validation": validation}
        while chunk := list(itertools.islice(samples, 64 * READERS)):
            for (split, _, entry), seen in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(seen, UserError):
                    if data.unreadable == "stop":
                        raise UserError(f"{seen}; data.unreadable=skip leaves such samples out")
                    # a file's name may be no Unicode, which nothing prints
                    skipped.append(str(seen).encode(errors="backslashreplace").decode())
                    continue
                number, thumbnail = seen
                if config.make and number > 1:
                    raise UserError(
                        f"tasks.{task}.make: '{config.make}' needs single photographs,"
                        f" '{entry[0]}' has {number} pictures"
                    )
                if pictures not in (0, number):
                    raise UserError(
                        f"tasks.{task}: '{entry[0]}' has {number} pictures, the others {pictures}"
                    )
                pictures = number
                lists[split].add(entry, thumbnail)
            bar.update(len(chunk))
        counts = {split: len(entries) for split, entries in lists.items()}
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"tasks.{task}: no readable {split} samples, {len(skipped)} skipped, first: {skipped[0]}"
            )
    return {**counts, "pictures": pictures + bool(config.make), "skipped": skipped}


def _look(item: tuple[str, Storage, Entry], clean: int) -> tuple[int, np.ndarray] | UserError:
    """Read a sample: how many pictures it has, and a thumbnail of its photograph, picture `clean`."""
    _, storage, entry = item
    try:
        sample = storage.read(entry)
    except UserError as error:
        return error
    return len(sample), duplicates.thumbnail(sample[min(clean, len(sample) - 1)])


def index_data(tasks: Mapping[str, TaskConfig], data: DataConfig, seed: int, folder: Path) -> dict:
    """List all samples of all tasks in `folder`, every file decoded once: the manifest for `open_sources`.

    Returns:
        `{task: {"train": n, "validation": n, "pictures": of a sample, "skipped": [...], "dropped": [...]}}`

    Raises:
        UserError: what is wrong with the first bad folder or picture; a task left without samples.
    """
    manifest: dict[str, dict] = {}
    for task, config in tasks.items():
        if config.source == "scene":
            counts = {"train": config.samples, "validation": config.validation_samples}
            manifest[task] = {**counts, "pictures": 2, "skipped": []}
        else:
            manifest[task] = index_task(task, config, data, seed, folder)
    listed = [task for task, config in tasks.items() if config.source != "scene"]
    dropped = drop_duplicates(listed, folder) if data.duplicates == "drop" else {}
    for task, entry in manifest.items():
        entry["dropped"] = dropped.get(task, [])
        entry["train"] -= len(entry["dropped"])
        if not entry["train"]:
            raise UserError(
                f"tasks.{task}: no training samples left, all are held out too: {entry['dropped'][0]}"
            )
    return manifest


def drop_duplicates(tasks: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Take training samples out of the lists whose photograph is nearly a held-out one, of any task.

    Returns `{task: [message]}`, one message a dropped sample.
    """
    held = {task: Entries(folder / f"{task}.validation") for task in tasks}
    places = [(task, number) for task, entries in held.items() for number in range(len(entries))]
    if not places:
        return {}
    thumbnails = np.concatenate([entries.thumbnails() for entries in held.values()])
    dropped: dict[str, list[str]] = {}
    for task in tasks:
        file = folder / f"{task}.train"
        entries, own = Entries(file), Entries(file).thumbnails()
        matches = duplicates.near(own, thumbnails)
        dropped[task] = []
        if (matches < 0).all():
            continue
        kept = folder / f".{task}.kept"
        with ListWriter(kept) as writer:
            for entry, thumbnail, match in zip(entries, own, matches.tolist(), strict=True):
                if match < 0:
                    writer.add(entry, thumbnail)
                else:
                    other, place = places[match]
                    twin = f"'{held[other][place][0]}' held out by tasks.{other}"
                    dropped[task].append(f"tasks.{task}: '{entry[0]}' is nearly {twin}")
        rename(kept, file)
    return dropped


def open_sources(
    manifest: Mapping[str, dict], tasks: Mapping[str, TaskConfig], split: str, seed: int, folder: Path
) -> dict[str, Sequence[Sample]]:
    """`{task: samples}` of one split, listed in `folder` by `index_data`."""
    sources: dict[str, Sequence[Sample]] = {}
    for task, config in tasks.items():
        if config.source == "scene":
            sources[task] = Scenes(config.scene, manifest[task][split], split, seed)
        else:
            prefix = "validation_" if split == "validation" and config.validation_images else ""
            sources[task] = Stored(
                open_storage(task, config, seed, prefix), Entries(folder / f"{task}.{split}")
            )
    return sources


def fingerprint(tasks: Mapping[str, TaskConfig]) -> str:
    """Changes when a file of a task, in any subfolder, is added, removed or written again (size, time).

    Raises:
        UserError: a list, source `list`, that cannot be read.
    """
    digest = hashlib.sha256()
    for task, config in tasks.items():
        for prefix in ("", "validation_"):
            for file in _files_of(task, config, prefix):
                facts = file.stat() if file.exists() else file.lstat()  # a link to nothing
                line = f"{file}|{facts.st_size}|{facts.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _files_of(task: str, config: TaskConfig, prefix: str) -> Iterator[Path]:
    images: str = getattr(config, f"{prefix}images")
    more: dict[str, str] = getattr(config, f"{prefix}more_annotations")
    for place in (images, getattr(config, f"{prefix}annotations"), *more.values()):
        if place:
            yield from _files_below(Path(place).expanduser())
    if images and config.source == "list":  # its pictures lie anywhere
        for entry in _list_entries(open_storage(task, config, 0, prefix), task, prefix):
            yield from map(Path, entry[1:])


def _files_below(place: Path) -> Iterator[Path]:
    """The file itself, those below a folder, those of a pattern; hidden ones belong to no source."""
    if not place.is_dir():
        yield from (place,) if place.exists() else map(Path, sorted(glob.glob(str(place))))
        return
    for root, folders, files in os.walk(place, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def annotation_flags(pictures: int, frames: int) -> tuple[bool, ...]:
    """Which pictures of a sample are annotations: all but the first of each frame."""
    return (False, *[True] * (pictures // frames - 1)) * frames


class Views(Dataset):
    """Views of a task's samples at the tokenizer's size: item `sample * num_views + view`.

    View 0 is the sample itself, scaled and cropped to the centre; the others come from the task's policy and
    depend on (seed, task, sample, view) alone. What a task makes of a photograph is made of each view of it,
    so that rain falls at the same scale in all. Items: (pictures, size, size, 3) uint8.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        task: str,
        config: TaskConfig,
        *,
        size: int,
        num_views: int,
        seed: int,
    ) -> None:
        self.samples, self.config = samples, config
        self.size, self.num_views, self.seed = size, num_views, (seed, zlib.crc32(task.encode()))
        self._place, self._sample = -1, Sample()  # read last: its views are asked for one after the other

    def __len__(self) -> int:
        return len(self.samples) * self.num_views

    def __getitem__(self, index: int) -> torch.Tensor:
        place, number = divmod(index, self.num_views)
        return self.view(place, number)

    def classes(self) -> np.ndarray:
        """(samples,) int64: the class of every sample, of source `classes`; classes sorted by name."""
        assert isinstance(self.samples, Stored)
        return np.unique([entry[2] for entry in self.samples.entries], return_inverse=True)[1]

    def view(self, place: int, number: int) -> torch.Tensor:
        """View `number` of the sample at `place`; there are more than are stored."""
        if place != self._place:
            self._place, self._sample = place, self.samples[place]
        sample = self._sample
        seed = (*self.seed, place, number)
        pictures = view(
            sample,
            annotation_flags(len(sample), self.config.num_frames(len(sample))),
            policy=self.config.policy if number else "none",
            size=self.size,
            nearest=self.config.nearest,
            seed=seed,
        )
        if self.config.make:
            rng = np.random.default_rng((*seed, 1))  # apart from the draws of the view
            ranges = {name: tuple(values) for name, values in self.config.ranges.items()}
            pictures = list(MAKERS[self.config.make](pictures[0], rng, **ranges))
        return torch.from_numpy(np.stack(pictures))
