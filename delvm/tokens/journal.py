"""Blocks of codes -> a file that a process killed at any moment leaves to be gone on with."""

import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from delvm.errors import UserError


class Journal:
    """A shard under way, block by block, for a process that may be killed at any moment.

    Each block is a record: its crc32 and its number of bytes, then its codes. The first record that is not as
    it was written ends the journal, and is cut off when that is opened again. So a killed process loses none
    that `append` has returned from; a power cut may take the last of them, for nothing waits for the disk.
    """

    HEAD = struct.Struct("<II")

    def __init__(self, file: Path, row: tuple[int, int], dtype: np.dtype) -> None:
        """file: made if it is not there; row: pictures of a (sample, view) pair, tokens of a picture."""
        self.file, self.row, self.dtype = file, row, dtype
        file.parent.mkdir(parents=True, exist_ok=True)
        self._opened = file.open("a+b", buffering=0)
        if not _lock(self._opened):
            self._opened.close()
            raise UserError(f"{file}: another run writes it at the same time")
        self.num_rows, end = 0, 0
        for block in self.blocks():
            self.num_rows, end = self.num_rows + len(block), end + self.HEAD.size + block.nbytes
        self._opened.truncate(end)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, block: np.ndarray) -> None:
        """Add (views, images, tokens) integers, of one view or more."""
        assert len(block)
        assert block.shape[1:] == self.row, (block.shape, self.row)
        codes = block.astype(self.dtype).tobytes()
        record = memoryview(self.HEAD.pack(zlib.crc32(codes), len(codes)) + codes)
        while record:
            record = record[self._opened.write(record) :]
        self.num_rows += len(block)

    def blocks(self) -> Iterator[np.ndarray]:
        """What has been appended, as it was."""
        self._opened.seek(0)
        while len(head := self._opened.read(self.HEAD.size)) == self.HEAD.size:
            crc, size = self.HEAD.unpack(head)
            codes = self._opened.read(size)
            if not size or len(codes) < size or zlib.crc32(codes) != crc:
                return
            yield np.frombuffer(codes, self.dtype).reshape(-1, *self.row)

    def close(self) -> None:
        """Leave it to be gone on with."""
        self._opened.close()

    def remove(self) -> None:
        """Close it, and leave nothing of it."""
        self.close()
        self.file.unlink()


def _lock(opened: FileIO) -> bool:
    """Keep other processes from a file as long as this one has it open; False where another has it."""
    try:
        import fcntl  # not on Windows

        # not flock, which worker processes would share, and they may outlive this one by seconds
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        pass  # a system, or a disk, without locks
    return True
