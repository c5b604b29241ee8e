"""Token grids on disk, memory-mapped, in shards.

A store is a folder: `manifest.json` and, for each task and split, a folder `TASK.SPLIT` with shards
`00000.npy`, `00001.npy`, ... of shape (samples, views, images, tokens), uint16 (uint32 beyond 65,536 codes),
and `classes.npy` where the samples have classes. A shard is whole or not there, so that many processes write
side by side, each its own shards, and a killed one is gone on from: after its last whole shard, or in the
middle of one that has a `Journal`. What is written goes to disk block by block: a shard may be larger than
the memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from mmap import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm.auto import tqdm

from delvm.errors import UserError
from delvm.tokens.journal import Journal

SPLITS = ("train", "validation")
SHARD_BYTES = 256 << 20
CLASSES = "classes.npy"


class Grid:
    """(samples, views, images, tokens) codes of one task and split; every shard but the last is as long."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        samples = sum(len(shard) for shard in self.shards)
        self.shape: tuple[int, int, int, int] = (samples, *self.shards[0].shape[1:])
        # in rows of one picture, and of all pictures of a sample: a row is copied in one piece
        self._rows = {
            run: [np.asarray(shard).reshape(-1, run * self.shape[3]) for shard in self.shards]
            for run in (1, self.shape[2])
        }

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple:
        # for worker processes, which map the files again: pickled, a memory map would be its whole content
        shards = [Path(s.filename) if isinstance(s.base, mmap) else s for s in self.shards]
        return _reopened, (shards,)

    def gather(self, samples: np.ndarray, views: np.ndarray, images: np.ndarray | None = None) -> np.ndarray:
        """The codes of (sample, view) pairs: (..., images, tokens), or (..., tokens) of the `images` named.

        samples, views, images: integers of one shape, or that broadcast to one.
        """
        pairs = self.index(samples, views)
        if images is None:
            return self.take(pairs, self.shape[2]).reshape(*pairs.shape, *self.shape[2:])
        return self.take(pairs * self.shape[2] + images)

    def index(self, samples: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The places of (sample, view) pairs among all of the grid, int64. Raises ValueError outside it."""
        return np.ravel_multi_index((samples, views), self.shape[:2])

    def take(self, places: np.ndarray, run: int = 1) -> np.ndarray:
        """(..., run * tokens): the codes of a picture, or of all pictures of a (sample, view), at each place.

        places: (...) int64 among all pictures (`run` 1) or pairs (`run` the number of images).
        """
        shards = self._rows[run]
        if len(shards) == 1:
            return shards[0].take(places, axis=0)
        numbers, rows = np.divmod(places.reshape(-1), len(shards[0]))
        codes = np.empty((len(rows), shards[0].shape[1]), shards[0].dtype)
        if len(rows) < 16 * len(shards):  # few of each shard: going through the shards takes longer
            for place, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
                codes[place] = shards[number][row]
        else:
            for number, shard in enumerate(shards):
                here = np.flatnonzero(numbers == number)
                codes[here] = shard.take(rows[here], axis=0)
        return codes.reshape(*places.shape, codes.shape[1])


def _reopened(shards: Sequence[Path | np.ndarray]) -> Grid:
    return Grid([np.load(s, mmap_mode="r", allow_pickle=False) if isinstance(s, Path) else s for s in shards])


@dataclass(frozen=True)
class TokenStore:
    """An opened store: its manifest and its grids, `grids[split][task]`."""

    manifest: dict
    grids: dict[str, dict[str, Grid]]
    classes: dict[str, dict[str, np.ndarray]]
    """The class of every sample, (samples,) integers, of tasks that have classes: `classes[split][task]`."""

    @property
    def num_codes(self) -> int:
        """Codes of the tokenizer that wrote the store."""
        return int(self.manifest["num_codes"])

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one picture."""
        return int(self.manifest["tokens_per_image"])


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest unsigned type that holds every code."""
    return np.dtype(np.uint16 if num_codes <= 65_536 else np.uint32)


@dataclass(frozen=True)
class Layout:
    """How one grid is cut into shards of `shard` samples, the last one shorter."""

    folder: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    shard: int

    @classmethod
    def plan(
        cls, folder: Path, shape: tuple[int, int, int, int], dtype: np.dtype, shard_bytes: int = SHARD_BYTES
    ) -> "Layout":
        """Shards of about `shard_bytes`, at least one sample each."""
        return cls(folder, shape, dtype, max(1, shard_bytes // (int(np.prod(shape[1:])) * dtype.itemsize)))

    @property
    def num_shards(self) -> int:
        """Shards of the whole grid."""
        return -(-self.shape[0] // self.shard)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05}.npy"

    def samples(self, number: int) -> range:
        """The samples of a shard."""
        return range(number * self.shard, min((number + 1) * self.shard, self.shape[0]))

    def shard_shape(self, number: int) -> tuple[int, int, int, int]:
        """The shape of a shard."""
        return (len(self.samples(number)), *self.shape[1:])

    @property
    def num_bytes(self) -> int:
        """What all shards' files take."""
        headers = (len(_header(self.shard_shape(number), self.dtype)) for number in range(self.num_shards))
        return math.prod(self.shape) * self.dtype.itemsize + sum(headers)

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """The shards that process `rank` of `world` has yet to write."""
        return [number for number in range(rank, self.num_shards, world) if not self.path(number).exists()]

    def check_whole(self) -> None:
        """Refuse to end what is not all there: asked once every process has written its own shards.

        Raises:
            UserError: shards are missing.
        """
        if missing := self.missing():
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.num_shards} shards are missing, the first"
                f" {self.path(missing[0]).name}; other processes should have written them, do all machines"
                " share the folder? The same command goes on from here"
            )

    def write_all(self, numbers: Sequence[int], blocks: Iterable[np.ndarray]) -> None:
        """Write these shards, each whole or not at all, from blocks of any length that follow one another.

        Blocks need not end where shards do. Never more than two are held, no shard is.

        Args:
            numbers: of the shards, in the order in which the blocks come.
            blocks: (any number of views, images, tokens) integers.
        """
        blocks, block = iter(blocks), np.empty((0, *self.shape[2:]), self.dtype)
        for number in numbers:
            shape = self.shard_shape(number)
            left = shape[0] * shape[1]
            with _whole(self.path(number)) as file:
                file.write(_header(shape, self.dtype))
                while left:
                    if not len(block):
                        following = next(blocks, None)
                        assert following is not None, "fewer rows than samples"
                        block = following
                        assert block.shape[1:] == self.shape[2:], (block.shape, self.shape)
                    part, block = block[:left], block[left:]
                    file.write(np.ascontiguousarray(part, self.dtype).data)
                    left -= len(part)
        assert not len(block), "more rows than samples"
        assert not any(map(len, blocks)), "more rows than samples"

    def journal(self, number: int) -> Journal:
        """The journal of a shard, open, with what a process before has left in it.

        Raises:
            UserError: another run has it open.
        """
        return Journal(self._journal_path(number), self.shape[2:], self.dtype)

    def end_journal(self, number: int, journal: Journal) -> None:
        """Make a shard of a journal that has all of it."""
        self.write_all([number], journal.blocks())
        journal.remove()

    def _journal_path(self, number: int) -> Path:
        return self.folder / f".{number:05}.journal"

    def num_begun(self, number: int) -> int:
        """How many (sample, view) pairs a shard's journal has; 0 where there is none."""
        if not self._journal_path(number).exists():
            return 0
        with self.journal(number) as journal:
            return journal.num_rows

    def discard_journals(self) -> None:
        """Remove what a process left that was killed between a shard and the end of its journal."""
        for file in self.folder.glob(".*.journal"):
            file.unlink(missing_ok=True)

    def write_classes(self, classes: np.ndarray) -> None:
        """Write the class of every sample, (samples,) integers."""
        assert classes.shape == self.shape[:1], (classes.shape, self.shape)
        with _whole(self.folder / CLASSES) as file:
            file.write(_header(classes.shape, classes.dtype))
            file.write(np.ascontiguousarray(classes).data)

    def describe(self) -> dict:
        """The grid's part of the manifest, checksums read from the files; every shard must be there."""
        digests = [_digest(self.path(number)) for number in range(self.num_shards)]
        return {"shape": list(self.shape), "shard": self.shard, "sha256": digests}

    def open(self) -> Grid:
        """Map all shards.

        Raises:
            UserError: one that is missing, cut short or of another shape or type.
        """
        shapes = map(self.shard_shape, range(self.num_shards))
        return Grid([_load(self.path(n), shape, self.dtype) for n, shape in enumerate(shapes)])


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """What is written to here becomes the file when it is whole, and nothing otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.stem}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    partial = file.with_name(f".{file.stem}.{os.getpid()}.partial")
    try:
        # not np.save, nor a memory map: where the disk is full by the last few bytes, the one says nothing,
        # and the other kills the process
        with partial.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        try:
            os.replace(partial, file)
        except FileNotFoundError as error:  # taken for one that was left
            raise UserError(f"{file}: another run writes it at the same time") from error
    finally:
        partial.unlink(missing_ok=True)


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands before the data of an `.npy` file."""
    header = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest.json`, the last file of a store."""
    partial = folder / f".manifest.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "manifest.json")


def open_store(folder: Path, *, tokenizer: str = "") -> TokenStore:
    """Open a store for reading. Its codes are not read, so not compared with what was written: see `verify`.

    Args:
        folder: what `write_manifest` ended.
        tokenizer: the hash of the tokenizer that the codes will be read with; empty leaves it unchecked.

    Raises:
        UserError: no manifest or an unreadable one; another tokenizer; a shard that is missing, cut short or
            of another shape than the manifest says.
    """
    manifest, layouts = _read_manifest(folder)
    written = manifest["tokenizer"]
    if tokenizer and tokenizer != written:
        raise UserError(f"{folder}: written by tokenizer {written}, this one is {tokenizer}")
    grids = {
        split: {task: layout.open() for task, layout in parts.items()} for split, parts in layouts.items()
    }
    classes = {
        split: {
            task: _load(layout.folder / CLASSES, layout.shape[:1])
            for task, layout in parts.items()
            if (layout.folder / CLASSES).exists()
        }
        for split, parts in layouts.items()
    }
    return TokenStore(manifest=manifest, grids=grids, classes=classes)


def verify(folder: Path) -> int:
    """Compare every shard of a store with its checksum in the manifest; all files are read once.

    `classes.npy` has no checksum.

    Returns:
        How many bytes were found as they were written.

    Raises:
        UserError: no manifest or an unreadable one; the first shard that is missing or not what was written.
    """
    manifest, layouts = _read_manifest(folder)
    shards: list[tuple[Path, str]] = []
    for split, parts in layouts.items():
        for task, layout in parts.items():
            digests = manifest["tasks"][task][split].get("sha256")
            if not isinstance(digests, list) or len(digests) != layout.num_shards:
                place = f"tasks.{task}.{split}.sha256"
                raise UserError(
                    f"{folder / 'manifest.json'}: {place} must be a list of {layout.num_shards} checksums"
                )
            shards += zip(map(layout.path, range(layout.num_shards)), digests, strict=True)
    total = 0
    with tqdm(shards, desc="verify", unit="shard") as bar:
        for path, written in bar:
            try:
                found, size = _digest(path), path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: unreadable array ({error.strerror})") from error
            if found != written:
                raise UserError(f"{path}: damaged, its content is not what was written (another sha256)")
            total += size
    return total


def _read_manifest(folder: Path) -> tuple[dict, dict[str, dict[str, Layout]]]:
    """A store's manifest, and how its grids are cut, `layouts[split][task]`."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a token store (no manifest.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _, dtype = manifest["tokenizer"], code_dtype(int(manifest["num_codes"]))
        layouts = {
            split: {
                task: _layout(folder / f"{task}.{split}", entry[split], dtype)
                for task, entry in manifest["tasks"].items()
            }
            for split in SPLITS
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: unreadable manifest ({error!r})") from error
    return manifest, layouts


def _layout(folder: Path, entry: dict, dtype: np.dtype) -> Layout:
    samples, views, images, tokens = map(int, entry["shape"])
    layout = Layout(folder, (samples, views, images, tokens), dtype, int(entry["shard"]))
    if min(*layout.shape, layout.shard) < 1:
        raise ValueError(f"{folder.name}: shape {list(layout.shape)}, shard {layout.shard}")
    return layout


def _load(file: Path, shape: tuple[int, ...], dtype: np.dtype | None = None) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # which refuses pickled objects
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise UserError(f"{file}: unreadable array ({error})") from error
    if array.shape != shape or array.dtype != (dtype or array.dtype) or array.dtype.kind not in "iu":
        wanted = f"{dtype or 'integers'} {list(shape)}"
        raise UserError(f"{file}: {array.dtype} {list(array.shape)}, the manifest says {wanted}")
    return array
