"""Other projects' token files <-> sentences: 1-D int64 arrays of tokens, one a line.

DeLVM (Guo et al., ICML 2024): `train.bin`, lines of `{"tokens": [5, 0, ...]}`, and `train.bin.meta`, an .npy
of int64 (lines, 2): the byte at which a line starts, its number of tokens. A line holds one pair, or one
picture without annotation; `join` makes a sentence of several.

LVM (Bai et al., CVPR 2024): lines of `{"tokens": "BQAAAAAAAAA="}`, base64 of little-endian int32.

Both are read and written line by line, and written byte for byte as these projects write them.
"""

import base64
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from delvm.errors import UserError

DELVM_LINES = "train.bin"
DELVM_META = "train.bin.meta"
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def read_delvm(folder: Path) -> Iterator[np.ndarray]:
    """(length,) int64 of every line of `train.bin`, checked against `train.bin.meta`.

    A missing meta is an error: DeLVM needs it, and without it a file cut between two lines would look whole.
    Keys of a line other than `tokens` are left out.

    Raises:
        UserError: when the reading comes to it: a missing file, a damaged line, lines that differ from the
            meta in place, length or number.
    """
    for name in (DELVM_LINES, DELVM_META):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a folder of DeLVM's tokens (no {name})")
    file = folder / DELVM_LINES
    meta = _open_meta(folder / DELVM_META)
    number = 0
    for number, (offset, tokens) in enumerate(_read_lines(file, _from_list), 1):
        if number > len(meta):
            raise UserError(f"{file}, line {number}: {DELVM_META} ends after {len(meta)} lines")
        start, count = meta[number - 1].tolist()
        if (offset, len(tokens)) != (start, count):
            raise UserError(
                f"{file}, line {number}: {len(tokens)} tokens from byte {offset}; "
                f"{DELVM_META} says {count} from byte {start}"
            )
        yield tokens
    if number < len(meta):
        raise UserError(f"{file}: ends after line {number}; {DELVM_META} says {len(meta)} lines")


def write_delvm(folder: Path, sentences: Iterable[np.ndarray]) -> None:
    """Write `train.bin` and `train.bin.meta`; old ones are replaced once both new ones are whole.

    Args:
        sentences: (length,) of any integer type, tokens of 0..2^63-1.

    Raises:
        UserError: another shape or type, a token out of range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _when_whole(folder / DELVM_LINES, folder / DELVM_META) as (lines, meta):
        _write_meta_header(meta, 0)
        offset = num_lines = 0
        for tokens in _checked(sentences, folder / DELVM_LINES, INT64_MAX):
            meta.write(struct.pack("<qq", offset, len(tokens)))
            offset += lines.write(_line(tokens.tolist()))
            num_lines += 1
        meta.seek(0)
        _write_meta_header(meta, num_lines)


def read_lvm(file: Path) -> Iterator[np.ndarray]:
    """(length,) int64 of every line.

    A file that was cut between two lines looks whole. Keys of a line other than `tokens` are left out.

    Raises:
        UserError: when the reading comes to it: a missing file, a damaged line.
    """
    for _, tokens in _read_lines(file, _from_base64):
        yield tokens


def write_lvm(file: Path, sentences: Iterable[np.ndarray]) -> None:
    """Write LVM's lines; an old file is replaced once the new one is whole.

    Args:
        sentences: (length,) of any integer type, tokens of 0..2^31-1.

    Raises:
        UserError: another shape or type, a token out of range.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _when_whole(file) as (lines,):
        for tokens in _checked(sentences, file, INT32_MAX):
            lines.write(_line(base64.b64encode(tokens.astype("<i4").tobytes()).decode()))


def join(sentences: Iterable[np.ndarray], lines: int) -> Iterator[np.ndarray]:
    """Every `lines` sentences in a row as one, as DeLVM joins pairs; a rest of fewer is kept as the last.

    Raises:
        ValueError: `lines` below 1.
    """
    if lines < 1:
        raise ValueError(f"lines: {lines} must be at least 1")
    rest = iter(sentences)
    while parts := list(islice(rest, lines)):
        yield np.concatenate(parts)


def _read_lines(file: Path, parse: Callable[[Any], np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(byte at which it starts, tokens) of every line; a ValueError of `parse` gets the file and the line.

    The last line may lack its end: a line of valid JSON has lost no token.
    """
    offset = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    tokens = parse(_value(line))
                except ValueError as error:
                    raise UserError(f"{file}, line {number}: {error}") from error
                yield offset, tokens
                offset += len(line)
    except OSError as error:
        raise UserError(f"{file}: unreadable ({error.strerror})") from error


def _value(line: bytes) -> Any:
    """What a line has under `tokens`."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        # not str(error) of a JSONDecodeError: its "line 1" would be taken for the file's
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(document, dict) or "tokens" not in document:
        raise ValueError('not an object with "tokens"')
    return document["tokens"]


def _from_list(value: Any) -> np.ndarray:
    if not isinstance(value, list):
        raise ValueError(f"tokens: not a list, but {value!r:.40}")
    for token in value:
        if type(token) is not int or not 0 <= token <= INT64_MAX:  # isinstance would take true for 1
            raise ValueError(f"tokens: {token!r:.40} is not an integer of 0..{INT64_MAX}")
    return np.array(value, np.int64)


def _from_base64(value: Any) -> np.ndarray:
    if not isinstance(value, str):
        raise ValueError(f"tokens: not base64 text, but {value!r:.40}")
    try:
        data = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError(f"tokens: not base64 ({error})") from error
    if len(data) % 4:
        raise ValueError(f"tokens: {len(data)} bytes do not make whole int32")
    tokens = np.frombuffer(data, "<i4").astype(np.int64)
    if (tokens < 0).any():
        raise ValueError(f"tokens: {tokens.min()} is below 0")
    return tokens


def _line(value: list[int] | str) -> bytes:
    return json.dumps({"tokens": value}).encode() + b"\n"


def _checked(sentences: Iterable[np.ndarray], file: Path, largest: int) -> Iterator[np.ndarray]:
    """The sentences, each found to be 1-D integers of 0..largest."""
    for number, sentence in enumerate(sentences, 1):
        tokens = np.asarray(sentence)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UserError(
                f"{file}: sentence {number} is {tokens.dtype} of shape {tokens.shape}, not 1-D integers"
            )
        outside = tokens[(tokens < 0) | (tokens > largest)]
        if len(outside):
            raise UserError(f"{file}: sentence {number} has token {outside[0]}, not of 0..{largest}")
        yield tokens


def _open_meta(file: Path) -> np.ndarray:
    try:
        meta = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise UserError(f"{file}: unreadable .npy file ({error})") from error
    if meta.dtype != "<i8" or meta.ndim != 2 or meta.shape[1] != 2:
        raise UserError(f"{file}: {meta.dtype} of shape {meta.shape}, not int64 of shape (lines, 2)")
    return meta


def _write_meta_header(meta: BinaryIO, num_lines: int) -> None:
    # NumPy pads it to one length for any number of lines, so that it can be written again over itself
    header = {"descr": "<i8", "fortran_order": False, "shape": (num_lines, 2)}
    np.lib.format.write_array_header_1_0(meta, header)


@contextmanager
def _when_whole(*files: Path) -> Iterator[list[BinaryIO]]:
    """Files to write, which get their names when the block ends, and vanish where it fails."""
    partials = [file.with_name(f".{file.name}.partial") for file in files]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(partial.open("wb")) for partial in partials]
        for partial, file in zip(partials, files, strict=True):
            os.replace(partial, file)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
