"""Folders of pictures, and lists of them -> samples."""

import csv
import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from delvm.errors import UserError
from delvm.images.files import SUFFIXES, Entry, Sample, read_picture


def one_size(sample: Sample, places: Sequence[str]) -> Sample:
    """An image and its annotations, as they come. `places` says where each was read.

    Raises:
        UserError: an annotation that has not the size of its image.
    """
    image = sample[0]
    for picture, place in zip(sample, places, strict=True):
        if picture.shape != image.shape:
            raise UserError(
                f"{place}: {picture.shape[1]}x{picture.shape[0]} pixels,"
                f" its image has {image.shape[1]}x{image.shape[0]}"
            )
    return sample


def read_files(paths: Sequence[str]) -> Sample:
    """An image and its annotations from their files. Raises UserError as `read_picture` and `one_size`."""
    return one_size([read_picture(Path(path)) for path in paths], paths)


class Folder(Mapping[str, Path]):
    """Stem -> file of the pictures right in a folder, sorted by file name; hidden ones are left alone.

    Holds the names alone, some 80 bytes a picture: a million stand in one folder at times.

    Args:
        folder: where they are; `~` is the home folder.
        key: the setting that names the folder in errors.

    Raises:
        UserError: no such folder; two pictures of one stem.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.path = Path(folder).expanduser()
        if not self.path.is_dir():
            raise UserError(f"{key}: no folder '{folder}'")
        with os.scandir(self.path) as files:
            self._names = sorted(file.name for file in files if is_picture(file.name))
        for stem, name in zip(self, self._names, strict=True):
            if (first := self._find(stem)) != name:
                raise UserError(f"{key}: '{first}' and '{name}' have the same stem in {folder}")

    def _find(self, stem: str) -> str | None:
        """The first file name of a stem."""
        begin = f"{stem}."  # whatever begins so stands together: `a.jpg`, but `a.b.jpg` too
        for place in range(bisect_left(self._names, begin), len(self._names)):
            name = self._names[place]
            if not name.startswith(begin):
                break
            if os.path.splitext(name)[0] == stem:
                return name
        return None

    def __getitem__(self, stem: str) -> Path:
        name = self._find(stem)
        if name is None:
            raise KeyError(stem)
        return self.path / name

    def __iter__(self) -> Iterator[str]:
        return (os.path.splitext(name)[0] for name in self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its name."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def list_some(folder: str | Path, key: str) -> Folder:
    """A folder's pictures, and UserError where there is none."""
    found = Folder(folder, key)
    if not found:
        raise UserError(f"{key}: no pictures ({', '.join(SUFFIXES)}) in '{folder}'")
    return found


def list_folders(folder: str | Path, key: str) -> list[Path]:
    """The folders right in a folder, sorted. Raises UserError where there is no such folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}: no folder '{folder}'")
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures and all folders in it: samples of one picture, [name, path].

    The name is the path within the folder, without suffix: `b/2` for `b/2.jpg`.
    """

    images: str
    key: str = field(kw_only=True)
    """The task's setting, for errors: `tasks.NAME`."""

    def entries(self) -> Iterator[Entry]:
        """The folder's own pictures, then folder by folder. Raises UserError where there is none at all."""
        empty = True
        for entry in self._within(Path(self.images).expanduser(), ""):
            empty = False
            yield entry
        if empty:
            raise UserError(f"{self.key}.images: no pictures ({', '.join(SUFFIXES)}) in '{self.images}'")

    def _within(self, folder: Path, prefix: str) -> Iterator[Entry]:
        setting = f"{self.key}.images"
        for stem, file in Folder(folder, setting).items():
            yield [prefix + stem, str(file)]
        for inner in list_folders(folder, setting):
            yield from self._within(inner, f"{prefix}{inner.name}/")

    def read(self, entry: Entry) -> Sample:
        """[picture]."""
        return read_files(entry[1:])


@dataclass(frozen=True)
class Pairs:
    """A folder of images and one of each kind of annotation, matched by stem: [stem, image, annotation, ...].

    Annotations without an image are left alone.
    """

    images: str
    annotations: Sequence[str]
    key: str = field(kw_only=True)

    def __post_init__(self) -> None:
        assert self.annotations, "pictures without annotations are `Pictures`"
        assert not isinstance(self.annotations, str), self.annotations

    def entries(self) -> Iterator[Entry]:
        """Sorted by file name. Raises UserError for a missing folder, no images, one without annotation."""
        images = list_some(self.images, f"{self.key}.images")
        folders = [Folder(folder, f"{self.key}.annotations") for folder in self.annotations]
        for files in folders:
            alone = (stem for stem in images if stem not in files)
            if first := next(alone, None):
                others = sum(1 for _ in alone)
                more = f" (and {others} more)" if others else ""
                raise UserError(f"{self.key}: image without annotation: {images[first]}{more}")
        for stem, image in images.items():
            yield [stem, str(image), *(str(files[stem]) for files in folders)]

    def read(self, entry: Entry) -> Sample:
        """[image, annotation, ...]."""
        return read_files(entry[1:])


@dataclass(frozen=True)
class Classes:
    """A folder with one folder of pictures a class, as ImageNet's: [class/stem, path, class]."""

    images: str
    key: str = field(kw_only=True)

    def classes(self) -> list[str]:
        """The folders' names, sorted. Raises UserError where there is none."""
        folders = list_folders(self.images, f"{self.key}.images")
        if not folders:
            raise UserError(f"{self.key}.images: no folder of a class in '{self.images}'")
        return [folder.name for folder in folders]

    def entries(self) -> Iterator[Entry]:
        """Class by class. Raises UserError for a class without pictures."""
        for name in self.classes():
            folder = Path(self.images).expanduser() / name
            for stem, file in list_some(folder, f"{self.key}.images").items():
                yield [f"{name}/{stem}", str(file), name]

    def read(self, entry: Entry) -> Sample:
        """[picture]."""
        return read_files(entry[1:2])


@dataclass(frozen=True)
class Listed:
    """A list of files, one sample a line: [name, image, annotation, ...].

    `.csv` with a header, or `.jsonl` with one object a line. Columns or keys: `image`; `annotation`,
    `annotation2` and whatever else begins so, in the order of the first line; `name`, by default the image's
    stem. Paths are absolute or start at the list's folder.
    """

    file: str
    key: str = field(kw_only=True)

    def entries(self) -> Iterator[Entry]:
        """Line by line. Raises UserError with file and line for what cannot be understood or is not there."""
        path = Path(self.file).expanduser()
        if path.suffix.lower() not in LISTS:
            raise UserError(f"{self.key}.images: '{self.file}' is no list; choices: {', '.join(LISTS)}")
        if not path.is_file():
            raise UserError(f"{self.key}.images: no file '{self.file}'")
        columns: list[str] = []
        for line, row in LISTS[path.suffix.lower()](path):
            place = f"{path}:{line}"
            columns = columns or check_columns(list(row), place)
            for column in row:
                if column not in (*columns, "name"):
                    raise UserError(
                        f"{place}: unknown column '{column}'; the first line has {', '.join(columns)}"
                    )
            files = []
            for column in columns:
                if not isinstance(row.get(column), str) or not row[column]:
                    raise UserError(f"{place}: no path in column '{column}'")
                files.append(path.parent / row[column])
                if not os.path.isfile(files[-1]):  # never raises, whatever stands in the list
                    raise UserError(f"{place}: no file '{row[column]}'")
            yield [str(row.get("name") or files[0].stem), *map(str, files)]
        if not columns:
            raise UserError(f"{self.key}.images: no samples in '{self.file}'")

    def read(self, entry: Entry) -> Sample:
        """[image, annotation, ...]."""
        return read_files(entry[1:])


def check_columns(names: Sequence[str], place: str) -> list[str]:
    """The columns with a path, image first. Raises UserError for a column that means nothing here."""
    if "image" not in names:
        raise UserError(f"{place}: no column 'image'; it has {', '.join(names)}")
    annotations = [name for name in names if name.startswith("annotation")]
    for name in names:
        if name not in ("image", "name", *annotations):
            raise UserError(
                f"{place}: unknown column '{name}'; choices: image, annotation, annotation..., name"
            )
    return ["image", *annotations]


def text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, and UserError for the first that is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode(
                    "utf-8-sig" if number == 1 else "utf-8"
                )  # spreadsheets write a mark in front
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason})") from error


def csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, column -> field) of every row below the header."""
    reader = csv.reader(text_lines(path), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if not row:
                continue
            if not header:
                header = row
                check_columns(header, place)
                if len(set(header)) < len(header):
                    raise UserError(f"{place}: a column stands twice in {', '.join(header)}")
            elif len(row) != len(header):
                raise UserError(f"{place}: {len(row)} fields, the header has {len(header)}")
            else:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error})") from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not blank."""
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: broken JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not an object with the key 'image'")
        yield number, row


LISTS = {".csv": csv_rows, ".jsonl": jsonl_rows}
