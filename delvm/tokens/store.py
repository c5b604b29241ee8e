"""Token grids on disk, memory-mapped.

A store is a folder: `manifest.json` and, for each task and split, `TASK.SPLIT.npy` of shape
(samples, views, 2, tokens), uint16 (uint32 beyond 65,536 codes); the axis of 2 is (image, annotation).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from delvm.errors import UserError
from delvm.tokenizer import Tokenizer
from delvm.tokenizer.training import to_pictures

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenStore:
    """An opened store: its manifest and its memory-mapped grids, `grids[split][task]`."""

    manifest: dict
    grids: dict[str, dict[str, np.ndarray]]

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


def encode(
    tokenizer: Tokenizer, batches: Iterable[torch.Tensor], progress: Callable[[int], object] = lambda _: None
) -> Iterator[np.ndarray]:
    """Pairs -> codes, batch by batch, on the tokenizer's device.

    batches: uint8 (batch, 2, H, W, 3). Yields (batch, 2, tokens) integers and tells `progress` how many.
    """
    for batch in batches:
        with torch.inference_mode():
            codes = tokenizer.encode(to_pictures(batch.to(tokenizer.codebook.device)))
        progress(len(batch))
        yield codes.reshape(len(batch), 2, -1).cpu().numpy()


def write_grid(
    path: Path, shape: tuple[int, int, int, int], dtype: np.dtype, rows: Iterable[np.ndarray]
) -> str:
    """Write one grid row by row, each row (any number of pairs, 2, tokens); returns the sha256 of the data.

    Plain writes, not a writable memory map: on a full disk these raise OSError, a map would kill the process.
    """
    digest = hashlib.sha256()
    pairs = 0
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            assert row.shape[1:] == shape[2:], (row.shape, shape)
            data = np.ascontiguousarray(row, dtype=dtype).tobytes()
            digest.update(data)
            file.write(data)
            pairs += len(row)
    assert pairs == shape[0] * shape[1], (pairs, shape)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest.json`, the last file of a store."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def open_store(folder: Path) -> TokenStore:
    """Open a store for reading.

    Raises:
        UserError: no manifest or an unreadable one; a grid that is missing, cut short or of another shape
            than the manifest says.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a token store (no manifest.json)")
    try:
        manifest = json.loads(path.read_text())
        shapes = {
            task: {split: entry[split]["shape"] for split in SPLITS}
            for task, entry in manifest["tasks"].items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: unreadable manifest ({error!r})") from error
    grids: dict[str, dict[str, np.ndarray]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for task, shape in shapes.items():
            file = folder / f"{task}.{split}.npy"
            try:
                grid = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
                raise UserError(f"{file}: unreadable token grid ({error})") from error
            if list(grid.shape) != shape[split]:
                raise UserError(f"{file}: shape {list(grid.shape)}, the manifest says {shape[split]}")
            grids[split][task] = grid
    return TokenStore(manifest=manifest, grids=grids)
