"""Token grids on disk, memory-mapped, in shards.

A store is a folder: `manifest.json` and, for each task and split, a folder `TASK.SPLIT` with shards
`00000.npy`, `00001.npy`, ... of shape (samples, views, images, tokens), uint16 (uint32 beyond 65,536 codes),
and `classes.npy` where the samples have classes. A shard is whole or not there, so that many processes write
side by side and a killed one is gone on from.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from delvm.errors import UserError

SPLITS = ("train", "validation")
SHARD_BYTES = 256 << 20


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

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """The shards that process `rank` of `world` has yet to write."""
        return [number for number in range(rank, self.num_shards, world) if not self.path(number).exists()]

    def write(self, number: int, codes: np.ndarray) -> None:
        """Write a shard whole or not at all. codes: (samples, views, images, tokens) integers."""
        shape = (len(self.samples(number)), *self.shape[1:])
        assert codes.shape == shape, (codes.shape, shape)
        _save(self.path(number), codes.astype(self.dtype))

    def write_all(self, numbers: Sequence[int], rows: Iterable[np.ndarray]) -> None:
        """Write these shards from rows in their order, each (any number of views, images, tokens)."""
        views = self.shape[1]
        rows, held = iter(rows), np.empty((0, *self.shape[2:]), self.dtype)
        for number in numbers:
            wanted = len(self.samples(number)) * views
            parts, have = [held], len(held)
            while have < wanted:
                batch = next(rows, None)
                assert batch is not None, "fewer rows than samples"
                parts.append(batch.astype(self.dtype))
                have += len(batch)
            codes = np.concatenate(parts)
            self.write(number, codes[:wanted].reshape(-1, *self.shape[1:]))
            held = codes[wanted:]
        assert len(held) == 0, "more rows than samples"
        assert next(rows, None) is None, "more rows than samples"

    def write_classes(self, classes: np.ndarray) -> None:
        """Write the class of every sample, (samples,) integers."""
        assert classes.shape == self.shape[:1], (classes.shape, self.shape)
        _save(self.folder / "classes.npy", classes)

    def describe(self) -> dict:
        """The grid's part of the manifest, checksums read from the files; every shard must be there."""
        digests = [_digest(self.path(number)) for number in range(self.num_shards)]
        return {"shape": list(self.shape), "shard": self.shard, "sha256": digests}


def _save(file: Path, array: np.ndarray) -> None:
    """Write an array whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # named by process: a second writer of the same file would write the same
    partial = file.with_name(f".{file.stem}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as data:
            np.lib.format.write_array_header_1_0(data, np.lib.format.header_data_from_array_1_0(array))
            # not np.save, nor a memory map: where the disk is full by the last few bytes, the one says
            # nothing, and the other kills the process
            data.write(np.ascontiguousarray(array).data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


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
        split: {task: _open_grid(layout) for task, layout in parts.items()}
        for split, parts in layouts.items()
    }
    classes = {
        split: {
            task: _load(layout.folder / "classes.npy", layout.shape[:1])
            for task, layout in parts.items()
            if (layout.folder / "classes.npy").exists()
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
                raise UserError(f"{path}: unreadable token grid ({error.strerror})") from error
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
        raise UserError(f"{file}: unreadable token grid ({error})") from error
    if array.shape != shape or array.dtype != (dtype or array.dtype) or array.dtype.kind not in "iu":
        wanted = f"{dtype or 'integers'} {list(shape)}"
        raise UserError(f"{file}: {array.dtype} {list(array.shape)}, the manifest says {wanted}")
    return array


def _open_grid(layout: Layout) -> Grid:
    return Grid(
        [
            _load(layout.path(number), (len(layout.samples(number)), *layout.shape[1:]), layout.dtype)
            for number in range(layout.num_shards)
        ]
    )
