"""Entries of samples -> a list on disk that any process opens and reads line by line.

One JSON line a sample in `FILE.jsonl`, the lines' offsets in `FILE.npy`, and a thumbnail of each sample's
photograph in `FILE.thumbnails`: a million samples take no memory.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from delvm.images import duplicates
from delvm.images.files import Entry, Sample, Storage

SUFFIXES = (".jsonl", ".npy", ".thumbnails")


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)  # with_suffix would cut `.train` off


class ListWriter:
    """Lists samples one by one; leaving the `with` block makes the list ready for `Entries`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines = _beside(file, ".jsonl").open("wb")
        self._thumbnails = _beside(file, ".thumbnails").open("wb")
        self._offsets = array("q", [0])

    def __enter__(self) -> "ListWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._thumbnails.close()
        if kind is None:
            np.save(_beside(self.file, ".npy"), np.frombuffer(self._offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, entry: Entry, thumbnail: np.ndarray) -> None:
        """Append a sample."""
        line = json.dumps(entry).encode() + b"\n"  # ASCII: a file's name need not be valid Unicode
        self._offsets.append(self._offsets[-1] + self._lines.write(line))
        self._thumbnails.write(thumbnail.tobytes())


class Entries(Sequence[Entry]):
    """What `ListWriter` wrote; a line is read when it is asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offsets = np.load(_beside(file, ".npy"), mmap_mode="r")

    def __reduce__(self) -> tuple[type["Entries"], tuple[Path]]:
        return Entries, (self.file,)  # another process opens the list; nothing of it is copied

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin, end = self._offsets[index : index + 2].tolist()
        with _beside(self.file, ".jsonl").open("rb") as lines:
            lines.seek(begin)
            return json.loads(lines.read(end - begin))

    def __iter__(self) -> Iterator[Entry]:
        with _beside(self.file, ".jsonl").open("rb") as lines:
            yield from map(json.loads, lines)

    def thumbnails(self) -> np.ndarray:
        """(samples, 256) uint8 as `duplicates.thumbnail` makes them, memory-mapped."""
        file, shape = _beside(self.file, ".thumbnails"), (len(self), duplicates.SIDE**2)
        return np.memmap(file, np.uint8, "r", shape=shape) if len(self) else np.empty(shape, np.uint8)


class Stored(Sequence[Sample]):
    """Listed samples, read from their storage."""

    def __init__(self, storage: Storage, entries: Entries) -> None:
        self.storage, self.entries = storage, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        return self.storage.read(self.entries[index])


def rename(old: Path, new: Path) -> None:
    """Move a list, over one that is there."""
    for suffix in SUFFIXES:
        _beside(old, suffix).replace(_beside(new, suffix))
