"""Pictures of classes -> features of frozen models, on disk, memory-mapped.

A folder of features is a `manifest.json` (what they were made of, checksums), the pictures' `classes.npy` and
shards `00000.npy`, ... of shape (pictures, 1, layers, width). Shards are whole or not there: a stopped
extraction goes on to the same bytes, for no batch reaches over the end of a shard.
"""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from delvm.errors import UserError
from delvm.evaluate.readers import Reader
from delvm.images.augment import view
from delvm.images.files import read_picture
from delvm.images.folders import list_folders, list_some
from delvm.images.sources import deal
from delvm.stages import write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokens.encoder import Encoder
from delvm.tokens.store import Layout, code_dtype
from delvm.training import leave_stopping_to_us, plain_errors

MANIFEST, BEGUN = "manifest.json", "begun.json"
SHARD_BYTES = 64 << 20
BLOCK_BYTES = 32 << 20  # what is read of a shard at a time, as float32


# --- pictures ---


@dataclass(frozen=True)
class Listing:
    """Pictures of classes, in one fixed order that mixes these: any run of them is a fair sample."""

    files: Sequence[str]
    labels: np.ndarray
    """(pictures,) int64, places in `classes`."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that change when a file is added, removed or written again (size, time)."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            facts = os.stat(file)
            line = f"{file}|{label}|{facts.st_size}|{facts.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]


def list_pictures(folder: str, key: str, *, classes: Sequence[str] = (), samples: int = 0) -> Listing:
    """The pictures of a folder with one folder a class, as ImageNet's.

    Args:
        folder: `~` is the home folder.
        key: the setting that names it in errors.
        classes: that the folder may have, in the order of their labels; none: those it has.
        samples: the first of every class, as even as they go; 0: all.

    Raises:
        UserError: no folder, no class, a class without pictures, one that is not in `classes`.
    """
    found = {inner.name: list_some(inner, key) for inner in list_folders(folder, key)}
    if not found:
        raise UserError(f"{key}: no folder of a class in '{folder}'")
    classes = tuple(classes or found)
    if strange := sorted(set(found) - set(classes)):
        raise UserError(f"{key}: '{folder}' has class '{strange[0]}', which the training pictures have not")
    sizes = Counter({("", name): len(pictures) for name, pictures in found.items()})
    room = deal(sizes, samples or sizes.total())
    pictures = [
        (str(file), classes.index(name))
        for name, inner in found.items()
        for _, file in zip(range(room["", name]), inner.values(), strict=False)
    ]
    order = np.random.default_rng(0).permutation(len(pictures)).tolist()
    labels = np.array([pictures[place][1] for place in order], np.int64)
    return Listing([pictures[place][0] for place in order], labels, classes)


class Pictures(Dataset):
    """(views, size, size, 3) uint8 of every picture: scaled and cropped to its centre, then perhaps mirrored.

    Raises UserError, one line, for a picture that cannot be read.
    """

    def __init__(self, listing: Listing, size: int, *, mirrored: bool) -> None:
        self.files, self.size, self.mirrored = listing.files, size, mirrored

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        picture = read_picture(Path(self.files[index]))
        seen = view([picture], (False,), policy="none", size=self.size, nearest=False, seed=(0,))[0]
        views = [seen, seen[:, ::-1]] if self.mirrored else [seen]
        return torch.from_numpy(np.stack(views))


class Codes(Dataset):
    """(views, tokens) int64 of every picture, from the shards that `encode` has written.

    mirrored: with those of the mirror images.
    """

    def __init__(self, shards: Sequence[np.ndarray], *, mirrored: bool) -> None:
        self.shards, self.views = shards, 1 + mirrored

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __getitem__(self, index: int) -> Tensor:
        number, row = divmod(index, len(self.shards[0]))
        return torch.from_numpy(self.shards[number][row, 0, : self.views].astype(np.int64))


# --- on disk ---


@dataclass(frozen=True)
class Features:
    """Features of pictures, memory-mapped."""

    shards: Sequence[np.ndarray]
    """Each (pictures, 1, layers, width), all but the last as long."""
    labels: np.ndarray
    """(pictures,) int64."""
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Features of one layer."""
        return int(self.shards[0].shape[3])

    def blocks(self, device: torch.device | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """In order, a bounded number at a time: the pictures' places, and (n, layers * width) float32."""
        size = max(1, BLOCK_BYTES // (4 * len(self.layers) * self.width))
        begin = 0
        for shard in self.shards:
            for start in range(0, len(shard), size):
                block = torch.from_numpy(shard[start : start + size].astype(np.float32)).flatten(1)
                yield np.arange(begin + start, begin + start + len(block)), block.to(device)
            begin += len(shard)


def encode(
    tokenizer: Tokenizer, pictures: Pictures, folder: Path, made_of: Mapping[str, Any], **how: Any
) -> Codes:
    """Write the codes of pictures and of their mirror images, or go on, or find them; how: as `extract`."""
    device = tokenizer.codebook.device
    shape = (len(pictures), 1, 1 + pictures.mirrored, tokenizer.num_tokens)
    layout = Layout.plan(folder, shape, code_dtype(tokenizer.num_codes), SHARD_BYTES)

    encoder = Encoder(tokenizer)  # the same codes whatever the batch

    def work(batch: Tensor) -> np.ndarray:
        return encoder(batch.to(device)).cpu().numpy()

    return Codes(_fill(layout, made_of, pictures, work, **how), mirrored=pictures.mirrored)


def extract(
    reader: Reader,
    pictures: Pictures | Codes,
    labels: np.ndarray,
    folder: Path,
    made_of: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: str = "float16",
    batch_size: int = 32,
    num_workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Features:
    """Write the features of pictures, or go on with what was stopped, or find them written.

    Features of a picture's views (the picture, its mirror image) are averaged.

    Args:
        reader: model or control.
        pictures: what it reads: items (views, ...).
        labels: (pictures,) int64, written beside the features.
        folder: of these features alone; those that were made of something else are made anew.
        made_of: what tells them from others, JSON-ready: hashes of model, tokenizer and listing, settings.
        device: where the reader is.
        dtype: `float16` or `float32`, on disk.
        batch_size: pictures at a time, with their views.
        num_workers: processes that read pictures.

    Raises:
        UserError: a picture that cannot be read; a folder that holds something else; a disk that is too
            small; values that float16 does not hold.
    """
    stored = np.dtype(dtype)
    largest = torch.finfo(torch.float16).max if stored == np.float16 else math.inf

    @torch.inference_mode()
    def work(batch: Tensor) -> np.ndarray:
        read = reader(batch.to(device).flatten(0, 1))
        read = read.unflatten(0, batch.shape[:2]).float().mean(1)
        if not bool((read.abs() <= largest).all()):  # false of NaN, too
            bound = "are not finite" if stored == np.float32 else "exceed float16; say probe.dtype=float32"
            raise UserError(f"{folder.name}: features {bound}")
        return read.cpu().numpy().astype(stored)

    _, layers, width = work(pictures[0][None]).shape
    layout = Layout.plan(folder, (len(labels), 1, layers, width), stored, shard_bytes)
    what = {**made_of, "dtype": stored.name, "layers": list(reader.layers), "batch_size": batch_size}
    shards = _fill(layout, what, pictures, work, batch_size=batch_size, num_workers=num_workers)
    layout.write_classes(labels)
    return Features(shards, labels, reader.layers)


def _fill(
    layout: Layout,
    made_of: Mapping[str, Any],
    pictures: Dataset,
    work: Callable[[Tensor], np.ndarray],
    *,
    batch_size: int,
    num_workers: int,
) -> Sequence[np.ndarray]:
    """The shards of a layout, written where they are missing."""
    folder, what = layout.folder, {**made_of, "shape": list(layout.shape), "shard": layout.shard}
    if not _same(folder / MANIFEST, what):
        _begin(layout, what)
        numbers = layout.missing()
        batches = [
            list(range(start, min(start + batch_size, here.stop)))
            for here in map(layout.samples, numbers)
            for start in range(here.start, here.stop, batch_size)
        ]
        loader = DataLoader(
            pictures, batch_sampler=batches, num_workers=num_workers, worker_init_fn=leave_stopping_to_us
        )
        with plain_errors(), tqdm(total=sum(map(len, batches)), desc=folder.name, unit="picture") as bar:

            def blocks() -> Iterator[np.ndarray]:
                for batch in loader:
                    yield work(batch)
                    bar.update(len(batch))

            layout.write_all(numbers, blocks())
        write_atomic(folder / MANIFEST, json.dumps({**what, **layout.describe()}, indent=2) + "\n")
        (folder / BEGUN).unlink()
    return _open(layout)


def _open(layout: Layout) -> Sequence[np.ndarray]:
    """Map all shards. Raises UserError for one that is missing, cut short or of another shape or type."""
    shards = []
    for number in range(layout.num_shards):
        file = layout.path(number)
        try:
            shard = np.lib.format.open_memmap(file, mode="r")  # which refuses pickled objects
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: unreadable array ({error}); delete its folder") from error
        if shard.shape != layout.shard_shape(number) or shard.dtype != layout.dtype:
            raise UserError(
                f"{file}: {shard.dtype} {list(shard.shape)}, not what was written; delete its folder"
            )
        shards.append(shard)
    return shards


def _begin(layout: Layout, what: Mapping[str, Any]) -> None:
    """A folder for new shards; what was begun for the same is kept, other features are removed."""
    folder = layout.folder
    if folder.exists() and not _same(folder / BEGUN, what):
        if not any((folder / name).is_file() for name in (MANIFEST, BEGUN)):
            raise UserError(f"{folder}: holds something else than features; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = len(layout.missing())
    needs, free = layout.num_bytes * missing // layout.num_shards, shutil.disk_usage(folder).free
    if needs > free:
        raise UserError(
            f"{folder}: features of {needs:,} bytes, the disk has {free:,} free; probe.layers chooses fewer"
        )
    write_atomic(folder / BEGUN, json.dumps(what, indent=2) + "\n")


def _same(manifest: Path, what: Mapping[str, Any]) -> bool:
    """Whether a manifest says that its folder was made of this."""
    try:
        written = json.loads(manifest.read_text(encoding="utf-8"))
        return {key: written.get(key) for key in what} == dict(what)
    except (OSError, ValueError, AttributeError):
        return False
