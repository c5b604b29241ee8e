"""LMDB folders as BasicSR writes them (Rain13K, GoPro) -> samples."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from delvm.errors import UserError
from delvm.images.files import Entry, Sample, decode_picture

META = "meta_info.txt"
LINE = re.compile(r"(.+)\.\w+ \((\d+),(\d+),(\d+)\) \d+")  # NAME.png (height,width,channels) compression
ENVIRONMENTS: dict[Path, tuple[int, Any]] = {}
"""Folder -> the process that opened it, its lmdb.Environment."""
OPENING = threading.Lock()


@dataclass(frozen=True)
class Lmdb:
    """One LMDB of images and one of each kind of annotation, under the same names.

    An LMDB is a folder with a `data.mdb`: encoded png or jpg files under their names without suffix. That of
    the images has a `meta_info.txt` too: for each a line `NAME.png (height,width,channels) compression`, the
    entry [name, LMDB key, height, width].
    """

    images: str
    annotations: Sequence[str]
    key: str = field(kw_only=True)
    """The task's setting, for errors: `tasks.NAME`."""

    def __post_init__(self) -> None:
        assert not isinstance(self.annotations, str), self.annotations

    def entries(self) -> Iterator[Entry]:
        """Line by line. Raises UserError for a missing folder or file, for a bad line with its number."""
        settings = ["images"] + ["annotations"] * len(self.annotations)
        for setting, folder in zip(settings, (self.images, *self.annotations), strict=True):
            path = Path(folder).expanduser()
            if not path.is_dir():
                raise UserError(f"{self.key}.{setting}: no folder '{folder}'")
            for name in ("data.mdb", META) if setting == "images" else ("data.mdb",):
                if not (path / name).is_file():
                    raise UserError(f"{self.key}.{setting}: no {name} in '{folder}'")
        meta = Path(self.images).expanduser() / META
        empty = True
        with meta.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                found = LINE.fullmatch(line.rstrip())
                if not found:
                    raise UserError(f"{meta}:{number}: '{line.rstrip()}' is not 'NAME.png (H,W,C) 1'")
                name, height, width, _ = found.groups()
                empty = False
                yield [name, name, int(height), int(width)]
        if empty:
            raise UserError(f"{self.key}.images: no samples in '{meta}'")

    def read(self, entry: Entry) -> Sample:
        """[image, annotation, ...], each of the size in `meta_info.txt`.

        Raises:
            UserError: a truncated LMDB, a name that it has not, a damaged picture or one of another size.
        """
        _, name, height, width = entry
        sample = []
        for folder in (self.images, *self.annotations):
            path = Path(folder).expanduser()
            picture = decode_picture(BytesIO(fetch(path, name)), f"{path}: '{name}'")
            if picture.shape[:2] != (height, width):
                raise UserError(
                    f"{path}: '{name}': {picture.shape[1]}x{picture.shape[0]} pixels,"
                    f" the images' {META} says {width}x{height}"
                )
            sample.append(picture)
        return sample


def fetch(folder: Path, name: str) -> bytes:
    """What an LMDB holds under a name. Raises UserError where it cannot be read or has no such name."""
    environment = opened(folder.resolve())
    import lmdb

    try:
        with environment.begin() as transaction:
            value = transaction.get(name.encode())
    except lmdb.Error as error:
        raise UserError(f"{folder}: unreadable LMDB ({error})") from error
    if value is None:
        raise UserError(f"{folder}: no picture '{name}' in this LMDB")
    return bytes(value)


def opened(folder: Path) -> Any:
    """A folder's lmdb.Environment, for reading; opened once a process, as LMDB allows no second time."""
    with OPENING:
        process, environment = ENVIRONMENTS.get(folder, (os.getpid(), None))
        if process != os.getpid():  # LMDB wants none from before a fork; closing the copy leaves the parent's
            environment.close()
            environment = None
        if environment is None:
            environment = open_whole(folder)
            ENVIRONMENTS[folder] = os.getpid(), environment
    return environment


def open_whole(folder: Path) -> Any:
    """An lmdb.Environment. Raises UserError where the package is missing or the file is not whole."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError("an LMDB needs a package that is missing: pip install delvm[data]") from error
    try:
        # Without readahead: samples are read in any order, what follows one in the file is rarely the next.
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{folder}: unreadable LMDB ({error})") from error
    # To touch a mapped page behind the end of the file would kill the process.
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if size < expected:
        environment.close()
        raise UserError(f"{folder}/data.mdb: truncated, {size} of {expected} bytes")
    return environment
