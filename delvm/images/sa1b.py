"""SA-1B's tars, unextracted -> (photograph, painted masks) pairs."""

import functools
import glob
import json
import tarfile
import threading
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np

from delvm.errors import UserError
from delvm.images.annotate import distinct_colours, paint_masks
from delvm.images.coco import DAMAGED, decode_segmentation, reason
from delvm.images.files import Entry, Sample, decode_picture

CROP = 800
"""Side of a crop, in pixels (Guo et al., ICML 2024); the shorter side of a photograph that is smaller."""
NUM_CROPS = 6
PAINTING = threading.Lock()
WHOLE = -1
"""Number of a crop that is the whole photograph."""


class Sa1b:
    """Photographs and masks of SA-1B (Kirillov et al., ICCV 2023), six square crops of each.

    A tar holds `sa_N.jpg` and `sa_N.json`, anywhere and in any order; all else in it is left alone. Nothing
    is extracted: an entry is `[stem, tar, offset and size of the jpg, of the json, number of the crop]`.

    Args:
        tars: a tar file, a folder of `*.tar`, or a pattern such as `sa1b/sa_0000*.tar`.
        key: the task's setting, as errors name it: `tasks.parts`; the tars are its `images`.
        seed: of the colours, which depend on it and the stem alone.
        crops: False for one entry a photograph, the whole of it.
    """

    def __init__(self, tars: str, *, key: str, seed: int = 0, crops: bool = True) -> None:
        self.tars, self.key, self.seed, self.crops = tars, key, seed, crops

    def entries(self) -> Iterator[Entry]:
        """Every crop of every photograph, in the order of sorted tars; of each tar only the headers are read.

        Raises:
            UserError: no tar; one that is broken or compressed; a photograph or JSON without the other.
        """
        for path in self._files():
            waiting: dict[PurePosixPath, dict[str, tuple[int, int]]] = {}
            for member in members(path):
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name.startswith(".") or name.suffix not in (".jpg", ".json"):
                    continue
                found = waiting.setdefault(name.with_suffix(""), {})
                if name.suffix in found:
                    raise UserError(f"{path}: '{name}' is there twice")
                found[name.suffix] = (member.offset_data, member.size)
                if len(found) == 2:
                    del waiting[name.with_suffix("")]
                    for number in range(NUM_CROPS) if self.crops else [WHOLE]:
                        yield [name.stem, str(path), *found[".jpg"], *found[".json"], number]
            for stem, found in waiting.items():
                there, missing = (".jpg", ".json") if ".jpg" in found else (".json", ".jpg")
                raise UserError(f"{path}: '{stem}{there}' without '{stem.name}{missing}'")

    def _files(self) -> list[Path]:
        path = Path(self.tars).expanduser()
        files = path.glob("*.tar") if path.is_dir() else map(Path, glob.glob(str(path)))
        found = [path] if path.is_file() else sorted(file for file in files if file.is_file())
        if not found:
            raise UserError(f"{self.key}.images: no tar file at '{self.tars}'")
        return found

    def read(self, entry: Entry) -> Sample:
        """[photograph, annotation], (H, W, 3) uint8 each: masks in random colours, smaller over larger.

        Raises:
            UserError: an unreadable photograph or JSON, a mask that is damaged or of another size.
        """
        *place, number = entry
        with PAINTING:  # one of several threads paints, the others find it painted
            picture, annotation = paint(*place, seed=self.seed)
        where = (slice(None), slice(None)) if number == WHOLE else crop(picture.shape[:2], number)
        return [picture[where].copy(), annotation[where].copy()]


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, one by one, none of them kept.

    Raises:
        UserError: not a tar, or one that breaks off.
    """
    name = ""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                name = member.name
                yield member
            # a damaged header, or none at all, ends a tar for tarfile; the end's own mark is a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("neither a header nor the end mark follows")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        what = f"breaks off in or after '{name}'" if name else "not an uncompressed tar"
        raise UserError(f"{path}: {what} ({error})") from error


@functools.lru_cache(maxsize=1)  # crops and views of a photograph are mostly read one after the other
def paint(
    stem: str, path: str, jpg_offset: int, jpg_size: int, json_offset: int, json_size: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(photograph, annotation) of two members of a tar, whole; not to be written to.

    Raises:
        UserError: as `Sa1b.read`.
    """
    try:
        with open(path, "rb") as file:
            file.seek(jpg_offset)
            jpg = file.read(jpg_size)
            file.seek(json_offset)
            text = file.read(json_size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    picture = decode_picture(BytesIO(jpg), f"{path}: {stem}.jpg")
    height, width = picture.shape[:2]
    try:
        segmentations = [annotation["segmentation"] for annotation in json.loads(text)["annotations"]]
        rng = np.random.default_rng([seed, zlib.crc32(stem.encode())])
        colours = distinct_colours(len(segmentations), rng)
        masks = (decode_segmentation(segmentation, (height, width)) for segmentation in segmentations)
        return picture, paint_masks(masks, (height, width), colours)
    except (*DAMAGED, RecursionError) as error:
        raise UserError(f"{path}: {stem}.json: {reason(error)}") from error


def crop(size: tuple[int, int], number: int) -> tuple[slice, slice]:
    """Rows and columns of one of DeLVM's six squares, 0 to 5, in a picture of size (H, W).

    A wide or square picture has upper left, right and centre, then lower left, right and centre; a tall one
    has upper left and right, middle left and right, lower left and right.
    """
    height, width = size
    side = min(CROP, height, width)
    middle, bottom = (height - side) // 2, height - side
    centre, right = (width - side) // 2, width - side
    if width >= height:
        corners = [(0, 0), (0, right), (0, centre), (bottom, 0), (bottom, right), (bottom, centre)]
    else:
        corners = [(0, 0), (0, right), (middle, 0), (middle, right), (bottom, 0), (bottom, right)]
    top, left = corners[number]
    return slice(top, top + side), slice(left, left + side)
