"""Storage kinds -> samples: a task's (image, annotation) pairs and their views, read when asked for."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from delvm.errors import UserError
from delvm.images.augment import JOINT_COLOUR, POLICIES, view
from delvm.images.scenes import SCENES, Scenes

Pair = tuple[np.ndarray, np.ndarray]
SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "validation")


@dataclass
class DataConfig:
    """What holds for the pictures of every task."""

    image_size: int = 256
    """Side of the square pictures that the tokenizer sees, in pixels."""
    unreadable: str = "stop"
    """A picture that cannot be read: `stop`, or `skip` its pair and report it."""

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(f"image_size: {self.image_size} must be at least 8")
        if self.unreadable not in ("stop", "skip"):
            raise ValueError(f"unreadable: '{self.unreadable}' is unknown; choices: stop, skip")


@dataclass
class TaskConfig:
    """Where a task's pairs come from: `images` and `annotations` (folders), or `scene` (drawn)."""

    images: str = ""
    """Folder of jpg and png pictures."""
    annotations: str = ""
    """Folder of annotations, one a picture, matched by stem."""
    validation_images: str = ""
    """Folder of held-out pictures; without it `validation_fraction` splits `images`."""
    validation_annotations: str = ""
    validation_fraction: float = 0.2
    """Share of the stems held out. A stem falls on the same side in every task with this share."""
    scene: str = ""
    """A name from `delvm.images.scenes.SCENES`: exact annotations over photographs, made on the spot."""
    samples: int = 0
    """Training samples of a scene; with folders, use only the first so many (0: all)."""
    validation_samples: int = 0
    """Held-out samples of a scene; with folders as `samples`."""
    policy: str = "crops"
    """How views are made; a name from `delvm.images.augment.POLICIES`."""
    nearest: bool = False
    """The annotation's colours are labels: resample it to the nearest pixel, never mix."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: '{self.policy}' is unknown; choices: {', '.join(POLICIES)}")
        if self.nearest and self.policy in JOINT_COLOUR:
            others = ", ".join(name for name in POLICIES if name not in JOINT_COLOUR)
            raise ValueError(
                f"policy: '{self.policy}' changes the colours that nearest keeps as labels; choices: {others}"
            )
        for key in ("samples", "validation_samples"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 0")
        folders = ("images", "annotations", "validation_images", "validation_annotations")
        if self.scene:
            if any(getattr(self, key) for key in folders):
                raise ValueError(f"scene: '{self.scene}' and folders exclude each other")
            if self.scene not in SCENES:
                raise ValueError(f"scene: '{self.scene}' is unknown; choices: {', '.join(SCENES)}")
            for key in ("samples", "validation_samples"):
                if getattr(self, key) < 1:
                    raise ValueError(f"{key}: a scene needs at least 1")
            return
        for key in ("images", "annotations"):
            if not getattr(self, key):
                raise ValueError(f"{key}: missing; a task needs images and annotations (folders), or a scene")
        if bool(self.validation_images) != bool(self.validation_annotations):
            raise ValueError("validation_images, validation_annotations: give both or neither")
        if not self.validation_images and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: {self.validation_fraction} must lie between 0 and 1, or give"
                " validation_images and validation_annotations"
            )


class Source(Protocol):
    """Samples of one task and split; pictures in their stored size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def name(self, index: int) -> str: ...


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned upright where the camera says so.

    Raises:
        UserError: missing, truncated or not a picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # I;16, I, F: Pillow would make 255 of everything above it
                raise ValueError("more than 8 bits a channel; save it with 8")
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"{path}: unreadable picture ({error})") from error


class PairedFolders:
    """Pairs of files. files: (name, image path, annotation path) each."""

    def __init__(self, files: Sequence[Sequence[str]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The stem of the pair's files."""
        return self.files[index][0]

    def __getitem__(self, index: int) -> Pair:
        _, image_path, annotation_path = self.files[index]
        image, annotation = read_picture(Path(image_path)), read_picture(Path(annotation_path))
        if image.shape != annotation.shape:
            raise UserError(
                f"{annotation_path}: {annotation.shape[1]}x{annotation.shape[0]} pixels,"
                f" its image has {image.shape[1]}x{image.shape[0]}"
            )
        return image, annotation


def list_pictures(folder: str, key: str) -> dict[str, Path]:
    """Stem -> file of the pictures right in a folder, sorted. `key` names the setting in errors."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}: no folder '{folder}'")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            if file.stem in found:
                raise UserError(
                    f"{key}: '{found[file.stem].name}' and '{file.name}' have the same stem in {folder}"
                )
            found[file.stem] = file
    return found


def match_pairs(images: str, annotations: str, task: str, prefix: str = "") -> list[tuple[str, str, str]]:
    """(stem, image, annotation) of two folders, sorted by file name; spare annotations are left alone.

    Raises:
        UserError: a missing or empty folder, or an image without annotation.
    """
    image_files = list_pictures(images, f"tasks.{task}.{prefix}images")
    annotation_files = list_pictures(annotations, f"tasks.{task}.{prefix}annotations")
    if not image_files:
        raise UserError(f"tasks.{task}.{prefix}images: no pictures ({', '.join(SUFFIXES)}) in '{images}'")
    alone = [stem for stem in image_files if stem not in annotation_files]
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise UserError(f"tasks.{task}: image without annotation: {image_files[alone[0]]}{more}")
    return [(stem, str(file), str(annotation_files[stem])) for stem, file in image_files.items()]


def held_out(stem: str, fraction: float, seed: int) -> bool:
    """Whether a stem is for validation: by its hash, so that every task holds out the same photographs."""
    digest = hashlib.sha256(f"{seed}/{stem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def index_task(task: str, config: TaskConfig, seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """A folder task's files by split, unread.

    Raises:
        UserError: as `match_pairs`, or a split that is empty.
    """
    files = match_pairs(config.images, config.annotations, task)
    if config.validation_images:
        held = match_pairs(config.validation_images, config.validation_annotations, task, "validation_")
        split = {"train": files, "validation": held}
    else:
        split = {"train": [], "validation": []}
        for entry in files:
            side = "validation" if held_out(entry[0], config.validation_fraction, seed) else "train"
            split[side].append(entry)
    limits = {"train": config.samples, "validation": config.validation_samples}
    split = {name: entries[: limits[name] or None] for name, entries in split.items()}
    for name, entries in split.items():
        if not entries:
            raise UserError(f"tasks.{task}: no {name} samples ({len(files)} pairs in '{config.images}')")
    return split


def check_files(
    files: Sequence[tuple[str, str, str]], unreadable: str
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Decode every file once: (readable pairs, messages of skipped ones). `stop` raises the first message."""
    source = PairedFolders(files)

    def problem(index: int) -> str:
        try:
            source[index]
        except UserError as error:
            if unreadable == "stop":
                raise UserError(f"{error}; data.unreadable=skip leaves such pairs out") from error
            return str(error)
        return ""

    with ThreadPoolExecutor(max_workers=4) as pool:
        numbers = range(len(files))
        problems = list(tqdm(pool.map(problem, numbers), total=len(files), desc="data", unit="pair"))
    kept = [entry for entry, message in zip(files, problems, strict=True) if not message]
    return kept, [message for message in problems if message]


def index_data(tasks: Mapping[str, TaskConfig], data: DataConfig, seed: int) -> dict:
    """All samples of all tasks, every file decoded once: a JSON-ready manifest for `open_sources`.

    Returns:
        `{task: {"train": ..., "validation": ..., "skipped": [message]}}`; a split is a list of files, or the
        number of scenes.

    Raises:
        UserError: what is wrong with the first bad folder or picture; a task left without samples; a picture
            that is trained on in one place and held out in another.
    """
    manifest: dict[str, dict] = {}
    for task, config in tasks.items():
        if config.scene:
            manifest[task] = {"train": config.samples, "validation": config.validation_samples, "skipped": []}
            continue
        entry: dict = {"skipped": []}
        for split, files in index_task(task, config, seed).items():
            entry[split], skipped = check_files(files, data.unreadable)
            entry["skipped"] += skipped
            if not entry[split]:
                raise UserError(f"tasks.{task}: no readable {split} samples, {len(skipped)} skipped")
        manifest[task] = entry
    refuse_leaks(manifest)
    return manifest


def refuse_leaks(manifest: Mapping[str, dict]) -> None:
    """Raises UserError for a picture that one task, or another, trains on and holds out."""
    files = {
        split: {
            Path(image).resolve(): task
            for task, entry in manifest.items()
            if not isinstance(entry[split], int)
            for _, image, _ in entry[split]
        }
        for split in SPLITS
    }
    for image, task in files["validation"].items():
        if image in files["train"]:
            raise UserError(
                f"tasks.{task}: held out, but tasks.{files['train'][image]} trains on it: {image}"
            )


def open_sources(
    manifest: Mapping[str, dict], tasks: Mapping[str, TaskConfig], split: str, seed: int
) -> dict:
    """`{task: Source}` of one split of a manifest."""
    return {
        task: Scenes(config.scene, manifest[task][split], split, seed)
        if config.scene
        else PairedFolders(manifest[task][split])
        for task, config in tasks.items()
    }


def fingerprint(tasks: Mapping[str, TaskConfig]) -> str:
    """Changes when a file of a folder task is added, removed or written again (name, size, time)."""
    digest = hashlib.sha256()
    for task, config in tasks.items():
        for key in ("images", "annotations", "validation_images", "validation_annotations"):
            if folder := getattr(config, key):
                for file in list_pictures(folder, f"tasks.{task}.{key}").values():
                    facts = file.stat() if file.exists() else file.lstat()  # a link to nothing
                    digest.update(f"{file}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Views(Dataset):
    """Views of a source's pairs at the tokenizer's size: item `sample * num_views + view`.

    View 0 is the pair itself, scaled and cropped to the centre; the others come from the task's policy and
    depend on (seed, task, sample, view) alone. Items: (2, size, size, 3) uint8, (image, annotation).
    """

    def __init__(
        self, source: Source, task: str, config: TaskConfig, *, size: int, num_views: int, seed: int
    ) -> None:
        self.source, self.config = source, config
        self.size, self.num_views, self.seed = size, num_views, (seed, zlib.crc32(task.encode()))

    def __len__(self) -> int:
        return len(self.source) * self.num_views

    def __getitem__(self, index: int) -> torch.Tensor:
        sample, number = divmod(index, self.num_views)
        image, annotation = self.source[sample]
        policy = self.config.policy if number else "none"
        pair = view(
            image,
            annotation,
            policy=policy,
            size=self.size,
            nearest=self.config.nearest,
            seed=(*self.seed, sample, number),
        )
        return torch.from_numpy(np.stack(pair))
