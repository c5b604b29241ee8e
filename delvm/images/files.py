"""Files -> pictures, and what every storage kind offers: entries to list, samples to read."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from delvm.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")

Sample = list[np.ndarray]
"""The pictures of one sample, frame by frame and in each frame the image before its annotations; (H, W, 3)
uint8 RGB, all of one size."""

Entry = list[Any]
"""What `Storage.read` needs to know of one sample, JSON-ready. The first item is the photograph's name:
samples of one name never fall on both sides of a split."""


class Storage(Protocol):
    """One way in which samples are stored. Picklable: files are opened by the worker that reads them."""

    def entries(self) -> Iterator[Entry]:
        """Every sample in a fixed order, unread; lazily, so that a million of them need no memory."""
        ...

    def read(self, entry: Entry) -> Sample:
        """The pictures of one entry. Raises UserError, one line with file and place, for what is damaged."""
        ...


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned upright where the camera says so.

    Raises:
        UserError: missing, truncated or not a picture.
    """
    return decode_picture(path, str(path))


def decode_picture(file: Path | BytesIO, name: str) -> np.ndarray:
    """As `read_picture`, of a file or what was in one; errors name it `name`."""
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":  # I;16, I, F: Pillow would make 255 of everything above it
                raise ValueError("more than 8 bits a channel; save it with 8")
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        # Pillow would name a buffer by its address, another one in every run
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: unreadable picture ({reason})") from error
