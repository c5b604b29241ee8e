"""A frozen teacher and rows of tokens -> its distributions on disk, and back into batches.

One pass writes what the teacher says of every row; any number of students then train without the teacher. A
cache is a folder: `manifest.json` and shards `00000.npy`, `00001.npy`, ... as in `tokens.store`, whole or not
there. Until all are, `begun.json` has the manifest's place. A shard is (rows, 1, 1, bytes) uint8; what the
bytes of a row are `distill.records` tells.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from delvm import published, ranks
from delvm.distill.records import HASH_BYTES, Record, seal, unseal
from delvm.distill.teacher import Live, Sparse
from delvm.errors import UserError
from delvm.stages import RECORD, write_atomic
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.store import Grid, Layout

COUNTS = {"topk": 64, "sampled": 12}
"""By kind, how many codes of a token are stored unless the settings say."""

MANIFEST, BEGUN = "manifest.json", "begun.json"
SHARD_BYTES = 64 << 20
MAX_SHARDS = 512  # each that is open holds a file descriptor, of which a process has perhaps 1,024
CHUNK = 512  # tokens whose distributions are whole in memory at a time
NUM_HASHED = 8  # rows


@dataclass
class CacheConfig:
    """What of the teacher's distribution is stored."""

    kind: str = "topk"
    """`topk`: the likeliest codes and one bucket for the rest. `sampled`: codes drawn from the teacher."""
    count: int = 0
    """Codes a token; 0: 64 for `topk`, 12 for `sampled`."""
    rows: int = 0
    """Rows that are stored, over and over if the student sees more; 0: all that it sees."""
    folder: str = ""
    """Where the cache is; written there if it is not there yet, so that several runs and recipes share it.
    There it may have more rows than are asked for: all are used. Empty: within the run."""

    def __post_init__(self) -> None:
        if self.kind not in COUNTS:
            raise ValueError(f"kind: '{self.kind}' is unknown; choices: {', '.join(COUNTS)}")
        for key in ("count", "rows"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 0")

    @property
    def codes(self) -> int:
        """Codes a token."""
        return self.count or COUNTS[self.kind]


# --- what a cache is written for ---


def row_hashes(batch: dict[str, Tensor]) -> np.ndarray:
    """(rows, 8) uint8, of all that the teacher reads of a row: its tokens and, if it has them, positions."""
    read = torch.cat([batch[key] for key in ("tokens", "positions") if key in batch], dim=1)
    rows = read.cpu().numpy().astype("<i8")
    digests = [hashlib.blake2b(row.tobytes(), digest_size=HASH_BYTES).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, HASH_BYTES)


def rows_hash(rows: TrainingSentences, num_rows: int) -> str:
    """16 hexadecimal digits of `num_rows` rows: other data, another order, another seed change them.

    It looks at a few of them, from the first to the last, whether the student sees that many or not: so it
    can be compared with that of a cache which has more.
    """
    numbers = sorted({place * (num_rows - 1) // (NUM_HASHED - 1) for place in range(NUM_HASHED)})
    return hashlib.sha256(row_hashes(rows.__getitems__(numbers)).tobytes()).hexdigest()[:16]


def weights_hash(folder: Path) -> str:
    """16 hexadecimal digits that change with any weight in a folder that `llama.load` takes."""
    digest = hashlib.sha256()
    for file in sorted(published.find(folder).files):
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]


# --- writing ---


def cache_bytes(
    config: CacheConfig, vocabulary: int, length: int, num_rows: int, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Bytes on disk of a cache, without its manifest of a few hundred.

    Args:
        config: what is stored.
        vocabulary: ids of the teacher.
        length: tokens of a row.
        num_rows: rows that the student sees.
    """
    record = Record(config.kind, config.codes, vocabulary)
    return _plan(Path(), record, length, config.rows or num_rows, shard_bytes).num_bytes


def write_cache(
    folder: Path,
    rows: TrainingSentences,
    teacher: Live,
    config: CacheConfig,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
    device: torch.device,
    teacher_hash: str,
    tokenizer_hash: str,
    rank: int | None = None,
    world: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a cache, or go on with one: the shards that are not there yet, and then the manifest.

    A whole cache of the same settings is left as it is; it may have more rows than are asked for. What is
    written of a row depends on the row, its number and the seed, not on batches or shards; save for how the
    teacher's own arithmetic rounds. All processes of a run call this; each writes every `world`-th shard. One
    run at a time writes into a folder.

    Args:
        folder: of the cache; made if need be.
        rows: what the students will be trained on; the first `config.rows` of them are read.
        teacher: moved to `device`.
        temperature: of the teacher's softmax; the cache serves no other.
        seed: of the draws of `sampled`.
        batch_size: rows that go through the teacher at a time; all that is held of a shard.
        teacher_hash, tokenizer_hash: what `open_cache` will be asked for.
        rank, world: this process and how many there are; None: as `delvm.ranks` knows them.

    Raises:
        UserError: more codes than the vocabulary has, or more rows than there are; the folder holds something
            else, or a cache of other settings; the disk is too small; shards of other processes are missing.
    """
    if config.kind == "topk" and config.codes > teacher.vocabulary:
        raise UserError(f"cache.count: {config.codes}, the teacher's vocabulary has {teacher.vocabulary} ids")
    if config.rows > len(rows):
        raise UserError(f"cache.rows: {config.rows}, the student sees {len(rows)}")
    record = Record(config.kind, config.codes, teacher.vocabulary)

    def settings(num_rows: int) -> dict:
        # what tells most comes first: it is named where a folder has another
        return {
            "tokenizer": tokenizer_hash, "teacher": teacher_hash, "precision": teacher.precision,
            "kind": record.kind, "count": record.count, "temperature": temperature,
            "vocabulary": record.vocabulary, "length": rows.length, "seed": seed, "rows": num_rows,
            "rows_hash": rows_hash(rows, num_rows), "bits_per_id": record.bits,
            "bytes_per_token": record.num_bytes, "bytes_per_row": record.row_bytes(rows.length),
        }  # fmt: skip

    planned = _plan(folder, record, rows.length, config.rows or len(rows), shard_bytes)
    manifest = ranks.on_first(lambda: _begin(planned, settings))
    layout = _layout(folder, manifest)
    rank, world = ranks.rank() if rank is None else rank, ranks.world() if world is None else world
    if todo := layout.missing(rank, world):
        numbers = np.concatenate([np.array(layout.samples(number)) for number in todo])
        teacher.to(device)

        def blocks() -> Iterator[np.ndarray]:
            with tqdm(total=len(numbers), desc="cache", unit="row", disable=rank > 0) as bar:
                for start in range(0, len(numbers), batch_size):
                    chosen = numbers[start : start + batch_size].tolist()
                    stored = _stored(rows, chosen, teacher, record, temperature, seed, device)
                    bar.update(len(chosen))
                    yield stored[:, None]

        layout.write_all(todo, blocks())
    ranks.barrier()
    ranks.on_first(lambda: _end(layout))


def _plan(folder: Path, record: Record, length: int, num_rows: int, shard_bytes: int) -> Layout:
    """How a new cache is cut into shards."""
    row_bytes = record.row_bytes(length)
    shard_bytes = max(shard_bytes, -(-num_rows // MAX_SHARDS) * row_bytes)
    return Layout.plan(folder, (num_rows, 1, 1, row_bytes), np.dtype(np.uint8), shard_bytes)


def _begin(planned: Layout, settings: Callable[[int], dict]) -> dict:
    """The manifest of the cache that the folder has, whole or begun; of a new one if it has none.

    settings: of a cache of so many rows.
    """
    folder, num_rows = planned.folder, planned.shape[0]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, BEGUN):
        if (folder / name).is_file():
            manifest = _read_manifest(folder / name)
            if name == MANIFEST:  # a whole one serves fewer rows, too
                num_rows = max(num_rows, int(manifest["rows"]))
            for key, value in settings(num_rows).items():
                if manifest.get(key) != value:
                    raise UserError(
                        f"{folder}: holds a teacher's cache with {key} {manifest.get(key)}, wanted is"
                        f" {value}; choose another folder, or delete that cache"
                    )
            return manifest
    others = [path.name for path in folder.iterdir() if path.name != RECORD and not path.name.startswith(".")]
    if others:
        raise UserError(f"{folder}: holds '{min(others)}' and no teacher's cache; choose another folder")
    if planned.num_bytes > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: the teacher's cache takes {planned.num_bytes:,} bytes, the disk has {free:,} free;"
            " cache.rows and cache.kind=sampled make it smaller"
        )
    manifest = {**settings(num_rows), "shard": planned.shard}
    write_atomic(folder / BEGUN, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _end(layout: Layout) -> None:
    """Give a whole cache its manifest."""
    layout.check_whole()
    if (layout.folder / BEGUN).exists():
        os.replace(layout.folder / BEGUN, layout.folder / MANIFEST)


@torch.no_grad()
def _stored(
    rows: TrainingSentences,
    numbers: Sequence[int],
    teacher: Live,
    record: Record,
    temperature: float,
    seed: int,
    device: torch.device,
) -> np.ndarray:
    """(rows, bytes of a row) uint8 of the rows of these numbers."""
    batch = rows.__getitems__(numbers)
    target = teacher.targets({key: part.to(device) for key, part in batch.items()})
    # by row, and not on the device: the same in any batch and on any device. The 1 keeps them apart from the
    # rows, which are drawn from [seed, epoch].
    shape = (rows.length - 1, record.count if record.kind == "sampled" else 0)
    below_1 = np.concatenate([np.random.default_rng([seed, number, 1]).random(shape) for number in numbers])
    uniform, head = torch.from_numpy(1 - below_1).to(device), target.head.float()
    tokens = []
    for hidden, numbered in zip(target.hidden.split(CHUNK), uniform.split(CHUNK), strict=True):
        logits = linear(hidden.float(), head) / temperature
        tokens.append(record.write(logits.log_softmax(-1), numbered))
    return seal(row_hashes(batch), np.concatenate(tokens).reshape(len(numbers), -1))


# --- reading ---


@dataclass(frozen=True)
class Cache:
    """An opened cache."""

    manifest: dict
    record: Record
    layout: Layout
    grid: Grid
    """(rows, 1, 1, bytes of a row) uint8."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.layout.folder

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.manifest["length"])

    def read(self, numbers: Sequence[int], hashes: np.ndarray) -> dict[str, Tensor]:
        """`teacher_ids` (rows, length-1, count) int32 and for `topk` `teacher_probabilities`, float32.

        Args:
            numbers: of the rows, below `len(grid)`.
            hashes: the `row_hashes` of the tokens that these go with.

        Raises:
            UserError: a row is not what was written, or was written for other tokens.
        """
        sound, written, records = unseal(self.grid.take(np.asarray(numbers)))
        for passed, problem in (
            (sound, "is damaged, its content is not what was written (another crc32)"),
            ((written == hashes).all(axis=1), "was written for other tokens"),
        ):
            if not passed.all():
                number = numbers[int(passed.argmin())]
                file = self.layout.path(number // self.layout.shard)
                raise UserError(f"{file}: row {number} of the cache {problem}")
        ids, probabilities = self.record.read(records.reshape(-1, self.record.num_bytes))
        shape = (len(numbers), self.length - 1, self.record.count)
        found = {"teacher_ids": torch.from_numpy(ids.reshape(shape))}
        if probabilities is not None:
            found["teacher_probabilities"] = torch.from_numpy(probabilities.reshape(shape))
        return found


def open_cache(
    folder: Path, *, teacher: str = "", tokenizer: str = "", temperature: float | None = None
) -> Cache:
    """Open a cache for reading.

    Args:
        folder: what `write_cache` ended.
        teacher, tokenizer: the hashes that it must have been written with; empty leaves them unchecked.
        temperature: the one that the loss will have; None leaves it unchecked.

    Raises:
        UserError: no manifest or an unreadable one; another teacher, tokenizer or temperature; a shard that
            is missing, cut short or of another shape than the manifest says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: not a teacher's cache (no {MANIFEST})")
    manifest = _read_manifest(path)
    asked = {"teacher": teacher or None, "tokenizer": tokenizer or None, "temperature": temperature}
    for key, value in asked.items():
        if value is not None and value != manifest[key]:
            raise UserError(f"{folder}: written with {key} {manifest[key]}, asked for {value}")
    layout = _layout(folder, manifest)
    return Cache(manifest, _record(manifest), layout, layout.open())


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        record, layout = _record(manifest), _layout(path.parent, manifest)
        if record.kind not in COUNTS or min(*layout.shape, layout.shard, record.count) < 1:
            raise ValueError(f"kind {record.kind}, shape {list(layout.shape)}, shard {layout.shard}")
        if layout.shape[3] != manifest["bytes_per_row"] or manifest["temperature"] <= 0:
            raise ValueError(
                f"bytes_per_row {manifest['bytes_per_row']}, temperature {manifest['temperature']}"
            )
        if not all(isinstance(manifest[key], str) for key in ("teacher", "tokenizer", "rows_hash")):
            raise ValueError("teacher, tokenizer and rows_hash must be text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the manifest of a teacher's cache ({error!r})") from error
    return manifest


def _record(manifest: dict) -> Record:
    return Record(str(manifest["kind"]), int(manifest["count"]), int(manifest["vocabulary"]))


def _layout(folder: Path, manifest: dict) -> Layout:
    row_bytes = _record(manifest).row_bytes(int(manifest["length"]))
    return Layout(
        folder, (int(manifest["rows"]), 1, 1, row_bytes), np.dtype(np.uint8), int(manifest["shard"])
    )


class CachedRows(Dataset):
    """`TrainingSentences`, each row with what the teacher says of it.

    Besides what a row has, items have `teacher_ids` (length-1, count) int32 and for `topk`
    `teacher_probabilities`, float32 of the same shape. Where the cache has fewer rows than are asked for, its
    rows come over and over.

    Raises:
        UserError: the cache was written for rows of another length, or for other tokens; if these differ in
            some rows only, not before one of them is read.
    """

    def __init__(self, rows: TrainingSentences, cache: Cache) -> None:
        self.rows, self.cache = rows, cache
        if rows.length != cache.length:
            raise UserError(
                f"{cache.folder}: written for rows of {cache.length} tokens, these have {rows.length}"
            )
        written, found = cache.manifest["rows_hash"], rows_hash(rows, len(cache.grid))
        if written != found:
            raise UserError(
                f"{cache.folder}: written for rows of hash {written}, these have {found};"
                " their data, order and seed must be the cache's"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: part[0] for key, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        numbers = [index % len(self.cache.grid) for index in indices]
        batch = self.rows.__getitems__(numbers)
        return {**batch, **self.cache.read(numbers, row_hashes(batch))}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch is made at once by `__getitems__`."""
        return batch


class Cached:
    """The signal of a cache: what `CachedRows` has put into the batch."""

    def __init__(self, cache: Cache) -> None:
        self.kind, self.vocabulary = cache.record.kind, cache.record.vocabulary
        self.temperature: float | None = float(cache.manifest["temperature"])

    def to(self, device: torch.device) -> Self:
        """Nothing to move: the batch brings it."""
        return self

    def targets(self, batch: dict[str, Tensor]) -> Sparse:
        """`teacher_ids` and, for `topk`, `teacher_probabilities`, (rows, length-1, count) each."""
        ids = batch["teacher_ids"].flatten(0, 1)
        if self.kind == "sampled":
            shares = torch.full(ids.shape, 1 / ids.shape[1], device=ids.device)
            return Sparse(ids, shares, tail=False)
        return Sparse(ids, batch["teacher_probabilities"].flatten(0, 1), tail=True)
