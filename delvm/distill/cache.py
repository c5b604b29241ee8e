"""A frozen teacher and rows of tokens -> its distributions on disk, and back into batches.

One pass writes what the teacher says of every row; any number of students then train without the teacher. A
cache is a folder: `manifest.json`, and a folder named by a hash of all settings with shards `00000.npy`,
`00001.npy`, ... as in `tokens.store`, whole or not there. A shard is (rows, 1, 1, bytes) uint8: of each row 8
bytes that tell its tokens from others and then, for each of its tokens but the first,

- `topk`: the k likeliest ids, packed, then the log-probabilities of these and of all others together, uint16;
- `sampled`: ids drawn from the teacher, packed (random sampling KD, Anshumann et al. 2025).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from delvm.distill.teacher import Live, Sparse
from delvm.errors import UserError
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.store import Grid, Layout, write_manifest

COUNTS = {"topk": 64, "sampled": 12}
"""By kind, how many codes of a token are stored unless the settings say."""

SHARD_BYTES = 64 << 20
MAX_SHARDS = 512  # each that is open holds a file descriptor, of which a process has perhaps 1,024
CHUNK = 512  # tokens whose distributions are whole in memory at a time
HASH_BYTES = 8
NUM_HASHED = 8  # rows

# Log-probabilities in 65,536 even steps down to -32. Of 64 among 8,192 codes no probability is then off by
# more than 0.05%, nor is the rest, stored so as not to be a difference of rounded ones; as float16 by 0.4%.
STEP = 32 / 65_535


@dataclass
class CacheConfig:
    """What of the teacher's distribution is stored."""

    kind: str = "topk"
    """`topk`: the likeliest codes and one bucket for the rest. `sampled`: codes drawn from the teacher."""
    count: int = 0
    """Codes a token; 0: 64 for `topk`, 12 for `sampled`."""
    rows: int = 0
    """Rows that are stored, over and over if the student sees more; 0: all that it sees."""

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


# --- a token's bytes ---


def pack(ids: np.ndarray, bits: int) -> np.ndarray:
    """(tokens, count) integers below 2**bits -> (tokens, ceil(count * bits / 8)) uint8, lowest bits first."""
    parts = ids.astype("<u4").view(np.uint8).reshape(*ids.shape, 4)
    kept = np.unpackbits(parts, axis=-1, count=bits, bitorder="little")
    return np.packbits(kept.reshape(len(ids), -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`pack` undone: (tokens, count) int32. bits: at most 25, so that an id lies within 4 bytes."""
    # every id is cut out of the bytes it lies in: ten times faster than by way of single bits
    first, shift = np.divmod(np.arange(count) * bits, 8)
    ids = packed.take(first, axis=1).astype(np.uint32)
    for byte in range(1, (bits + 14) // 8):
        # past the end there is nothing of an id: whatever is read there is cut off
        place = np.minimum(first + byte, packed.shape[1] - 1)
        ids |= packed.take(place, axis=1).astype(np.uint32) << np.uint32(8 * byte)
    ids >>= shift.astype(np.uint32)
    ids &= np.uint32((1 << bits) - 1)
    return ids.view(np.int32)


@dataclass(frozen=True)
class Record:
    """What is stored of one token's distribution."""

    kind: str
    count: int
    vocabulary: int

    @property
    def bits(self) -> int:
        """Of one id."""
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        """Of all ids."""
        return -(-self.count * self.bits // 8)

    @property
    def num_bytes(self) -> int:
        """Of a token."""
        return self.id_bytes + (2 * (self.count + 1) if self.kind == "topk" else 0)

    def write(self, log_probabilities: Tensor, uniform: Tensor) -> np.ndarray:
        """(tokens, vocabulary) float32 -> (tokens, num_bytes) uint8; `sampled` draws by `uniform`."""
        if self.kind == "sampled":
            return pack(draw(log_probabilities, uniform).cpu().numpy(), self.bits)
        kept, ids = log_probabilities.topk(self.count)
        # a sum over the rest: 1 - the sum of those kept has no digits where these are nearly all
        rest = log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        steps = (torch.cat([kept, rest], -1) / -STEP).round().clamp(0, 65_535)
        values = steps.to(torch.int32).cpu().numpy().astype("<u2").view(np.uint8)
        return np.concatenate([pack(ids.cpu().numpy(), self.bits), values], axis=1)

    def read(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens, num_bytes) uint8 -> ids (tokens, count) int32, for `topk` also probabilities, float32.

        The probabilities of a token sum to at most 1.
        """
        ids = unpack(stored[:, : self.id_bytes], self.bits, self.count)
        if self.kind == "sampled":
            return ids, None
        steps = np.ascontiguousarray(stored[:, self.id_bytes :]).view("<u2")
        probabilities = np.exp(steps * np.float32(-STEP))
        total = probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
        # a hair below 1: rounded to float32, those of a token must not sum to more
        return ids, probabilities[:, :-1] * ((1 - 2**-22) / total).astype(np.float32)


def draw(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """`count` ids of each distribution, in which an id's expected share is its probability.

    One is drawn from each of `count` equally likely slices of the distribution: so the shares vary less than
    those of independent draws.

    Args:
        log_probabilities: (tokens, vocabulary).
        uniform: (tokens, count) float64 in 0..1, 0 excluded: so an id of probability 0 is never drawn.

    Returns:
        (tokens, count) int64, ascending.
    """
    count = uniform.shape[1]
    # float64: added up in float32, rare codes would drown
    sums = log_probabilities.double().exp().cumsum(-1)
    points = (torch.arange(count, device=uniform.device) + uniform) / count * sums[:, -1:]
    return torch.searchsorted(sums, points)


# --- writing ---


def row_hashes(batch: dict[str, Tensor]) -> np.ndarray:
    """(rows, 8) uint8, of all that the teacher reads of a row: its tokens and, if it has them, positions."""
    read = torch.cat([batch[key] for key in ("tokens", "positions") if key in batch], dim=1)
    rows = read.cpu().numpy().astype("<i8")
    digests = [hashlib.blake2b(row.tobytes(), digest_size=HASH_BYTES).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, HASH_BYTES)


def rows_hash(rows: TrainingSentences, num_rows: int) -> str:
    """16 hexadecimal digits of the first rows: other data, another order, another seed change them."""
    first = row_hashes(rows.__getitems__(range(min(NUM_HASHED, num_rows))))
    return hashlib.sha256(first.tobytes()).hexdigest()[:16]


def weights_hash(folder: Path) -> str:
    """16 hexadecimal digits that change with any weight in a transformers folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]


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
    rank: int = 0,
    world: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the shards that are not there yet, and the manifest once all are.

    What is written of a row depends on the row, its number and the seed, not on batches or shards; save for
    how the teacher's own arithmetic rounds.

    Args:
        folder: of the cache; whole shards in it that were begun with the same settings are kept.
        rows: what the students will be trained on; the first `config.rows` of them are read.
        teacher: moved to `device`.
        temperature: of the teacher's softmax; the cache serves no other.
        seed: of the draws of `sampled`.
        batch_size: rows that go through the teacher at a time.
        teacher_hash, tokenizer_hash: what `open_cache` will be asked for.
        rank, world: this process and how many there are; each writes every `world`-th shard, and the one that
            finds all of them whole writes the manifest.

    Raises:
        UserError: more codes than the vocabulary has, or more rows than there are.
    """
    if config.kind == "topk" and config.codes > teacher.vocabulary:
        raise UserError(f"cache.count: {config.codes}, the teacher's vocabulary has {teacher.vocabulary} ids")
    if config.rows > len(rows):
        raise UserError(f"cache.rows: {config.rows}, the student sees {len(rows)}")
    num_rows, record = config.rows or len(rows), Record(config.kind, config.codes, teacher.vocabulary)
    row_bytes = HASH_BYTES + (rows.length - 1) * record.num_bytes
    shard = max(1, max(shard_bytes, num_rows * row_bytes // MAX_SHARDS) // row_bytes)
    about = {
        "kind": record.kind, "count": record.count, "temperature": temperature, "seed": seed,
        "vocabulary": record.vocabulary, "bits_per_id": record.bits, "bytes_per_token": record.num_bytes,
        "rows": num_rows, "length": rows.length, "rows_hash": rows_hash(rows, num_rows),
        "teacher": teacher_hash, "precision": teacher.precision, "tokenizer": tokenizer_hash, "shard": shard,
    }  # fmt: skip
    # shards of other settings, left by a run that was killed, are not gone on from
    place = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    layout = Layout(folder / place, (num_rows, 1, 1, row_bytes), np.dtype(np.uint8), shard)
    if todo := layout.missing(rank, world):
        numbers = np.concatenate([np.array(layout.samples(number)) for number in todo])
        starts = range(0, len(numbers), batch_size)
        teacher.to(device)
        with tqdm(total=len(numbers), desc="cache", unit="row", disable=rank > 0) as bar:

            def written(start: int) -> np.ndarray:
                chosen = numbers[start : start + batch_size].tolist()
                stored = _stored(rows, chosen, teacher, record, temperature, seed, device)
                bar.update(len(chosen))
                return stored[:, None]

            layout.write_all(todo, map(written, starts))
    if not layout.missing():  # else other processes are at them
        write_manifest(folder, {**about, "folder": place, "sha256": layout.describe()["sha256"]})


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
    return np.concatenate([row_hashes(batch), np.concatenate(tokens).reshape(len(numbers), -1)], axis=1)


# --- reading ---


@dataclass(frozen=True)
class Cache:
    """An opened cache."""

    folder: Path
    manifest: dict
    record: Record
    grid: Grid
    """(rows, 1, 1, bytes of a row) uint8."""

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
            UserError: a row was written for other tokens.
        """
        stored = self.grid.take(np.asarray(numbers))
        differing = (stored[:, :HASH_BYTES] != hashes).any(axis=1)
        if differing.any():
            number = numbers[int(differing.argmax())]
            raise UserError(f"{self.folder}: row {number} of the cache was written for other tokens")
        tokens = stored[:, HASH_BYTES:].reshape(-1, self.record.num_bytes)
        ids, probabilities = self.record.read(tokens)
        shape = (len(stored), self.length - 1, self.record.count)
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
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a teacher's cache (no manifest.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        record = Record(str(manifest["kind"]), int(manifest["count"]), int(manifest["vocabulary"]))
        row_bytes = HASH_BYTES + (int(manifest["length"]) - 1) * record.num_bytes
        shape = (int(manifest["rows"]), 1, 1, row_bytes)
        layout = Layout(folder / manifest["folder"], shape, np.dtype(np.uint8), int(manifest["shard"]))
        if record.kind not in COUNTS or min(*shape, layout.shard, record.count, manifest["temperature"]) <= 0:
            raise ValueError(f"kind {record.kind}, shape {list(shape)}, shard {layout.shard}")
        written = {key: manifest[key] for key in ("teacher", "tokenizer", "temperature", "rows_hash")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: unreadable manifest ({error!r})") from error
    asked = {"teacher": teacher or None, "tokenizer": tokenizer or None, "temperature": temperature}
    for key, value in asked.items():
        if value is not None and value != written[key]:
            raise UserError(f"{folder}: written with {key} {written[key]}, asked for {value}")
    shards = [_open_shard(layout, number) for number in range(layout.num_shards)]
    return Cache(folder, manifest, record, Grid(shards))


def _open_shard(layout: Layout, number: int) -> np.ndarray:
    file, shape = layout.path(number), (len(layout.samples(number)), *layout.shape[1:])
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # which refuses pickled objects
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise UserError(f"{file}: unreadable shard of a cache ({error})") from error
    if array.shape != shape or array.dtype != layout.dtype:
        found = f"{array.dtype} {list(array.shape)}"
        raise UserError(f"{file}: {found}, the manifest says {layout.dtype} {list(shape)}")
    return array


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
