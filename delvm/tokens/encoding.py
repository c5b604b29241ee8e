"""Views of samples, and lines of codes -> a token store."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from delvm import ranks
from delvm.errors import UserError
from delvm.images.sources import SPLITS, Views
from delvm.images.tasks import TOKEN_SOURCES, TaskConfig
from delvm.tokenizer import Tokenizer
from delvm.tokens import lines
from delvm.tokens.encoder import Encoder, TokensConfig
from delvm.tokens.journal import Journal
from delvm.tokens.store import CLASSES, SHARD_BYTES, Layout, code_dtype, write_manifest
from delvm.training import leave_stopping_to_us, plain_errors

SHARDS, SHARD_BLOCKS = 64, 8  # shards of a grid, so that many processes have work; the least blocks of one


@dataclass(frozen=True)
class Part:
    """What is to be encoded of one shard."""

    layout: Layout
    number: int
    views: Views
    step: int
    """Views of a block."""
    begun: int
    """Views that its journal has."""

    @property
    def num_rows(self) -> int:
        """Views of the whole shard."""
        return len(self.layout.samples(self.number)) * self.layout.shape[1]

    @property
    def num_images(self) -> int:
        """Pictures of the whole shard."""
        return self.num_rows * self.layout.shape[2]


class Blocks(Dataset):
    """The views of parts in the order in which they are written, some at a time.

    Items: the number of the part, and (views, images, size, size, 3) uint8 of it. Blocks begin anew with each
    shard: what the network sees at a time depends neither on who makes it nor on how often that was stopped.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(-(-(part.num_rows - part.begun) // part.step) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        first = part.begun + (index - int(self.starts[number])) * part.step
        offset = part.layout.samples(part.number).start * part.layout.shape[1]
        rows = range(offset + first, offset + min(first + part.step, part.num_rows))
        return number, torch.stack([part.views[row] for row in rows])


class Writer(BasePredictionWriter):
    """Codes of `Blocks` -> shards, each block as it comes."""

    def __init__(self, parts: Sequence[Part], bar: tqdm) -> None:
        super().__init__(write_interval="batch")
        self.parts, self.bar = parts, bar
        self._journal: Journal | None = None

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, batch_indices: Any,
        batch: tuple[int, Tensor], batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        part = self.parts[batch[0]]
        if self._journal is None:
            self._journal = part.layout.journal(part.number)
            if self._journal.num_rows != part.begun:
                raise UserError(f"{self._journal.file}: another run writes it at the same time")
        self._journal.append(prediction.cpu().numpy())
        self.bar.update(prediction.shape[0] * prediction.shape[1])
        if self._journal.num_rows == part.num_rows:
            part.layout.end_journal(part.number, self._journal)
            self._journal = None

    # not in `teardown`, which Lightning calls only if all went well
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._journal is not None:
            self._journal.close()


def write_store(
    folder: Path,
    tokenizer: Tokenizer,
    tasks: Mapping[str, TaskConfig],
    data: Mapping[str, Mapping],
    views: Mapping[str, Mapping[str, Views]],
    *,
    seed: int,
    config: TokensConfig | None = None,
    num_workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
) -> None:
    """Write what is not there yet, and the manifest once all is.

    What a process has written stays when it is killed: at most one block is encoded again, of as many
    pictures as a pass of the network has. The shards are the same to the byte, whoever writes them.

    Args:
        folder: of the store; whole shards in it, and begun ones, are kept.
        tokenizer: what encodes, on the device that it is on.
        tasks: every task; those of `TOKEN_SOURCES` are read as lines of codes.
        data: the manifest of `images.sources.index_data`: samples by split, pictures of a sample.
        views: the other tasks' views, `views[split][task]`.
        seed: of the splits.
        config: how pictures are encoded.
        num_workers: processes that read and augment.
        rank, world: this process and how many there are; None: as `delvm.ranks` knows them. Each writes every
            `world`-th of all shards, and the first the manifest when all have.

    Raises:
        UserError: a picture cannot be read; another run writes here; shards of other processes are missing.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    rank, world = ranks.rank() if rank is None else rank, ranks.world() if world is None else world
    config = config or TokensConfig()
    encoder = Encoder(tokenizer, config)
    layouts = {}
    for task in tasks:
        for split in SPLITS:
            num_views = views[split][task].num_views if task in views[split] else 1
            shape = (data[task][split], num_views, data[task]["pictures"], tokenizer.num_tokens)
            dtype = code_dtype(tokenizer.num_codes)
            layouts[task, split] = _plan(folder / f"{task}.{split}", shape, dtype, encoder.step(shape[2]))
    parts = []
    for (task, split), numbers in _deal(layouts, rank, world).items():
        layout = layouts[task, split]
        if tasks[task].source in TOKEN_SOURCES:
            _write_lines(layout, numbers, lines.rows(tasks[task], split, seed, layout.shape[2:]))
            continue
        part = views[split][task]
        if tasks[task].source == "classes" and rank == 0 and not (layout.folder / CLASSES).exists():
            layout.write_classes(part.classes())
        step = encoder.step(layout.shape[2])
        parts += [Part(layout, number, part, step, layout.num_begun(number)) for number in numbers]
    for done in [part for part in parts if part.begun == part.num_rows]:  # killed before it was made a shard
        done.layout.end_journal(done.number, done.layout.journal(done.number))
    parts = [part for part in parts if part.begun < part.num_rows]
    if parts:
        _encode(encoder, parts, num_workers, show=rank == 0)
    ranks.barrier()
    ranks.on_first(lambda: _end(folder, tokenizer, config, tasks, layouts))


def _plan(folder: Path, shape: tuple[int, int, int, int], dtype: np.dtype, step: int) -> Layout:
    """Shards of a grid, by its shape alone: enough for many processes, none of but a few blocks."""
    samples = max(-(-shape[0] // SHARDS), -(-SHARD_BLOCKS * step // shape[1]))
    return Layout.plan(
        folder, shape, dtype, min(SHARD_BYTES, samples * math.prod(shape[1:]) * dtype.itemsize)
    )


def _deal(
    layouts: Mapping[tuple[str, str], Layout], rank: int, world: int
) -> dict[tuple[str, str], list[int]]:
    """The shards that process `rank` of `world` has yet to write, of each grid."""
    shards = [(place, number) for place, layout in layouts.items() for number in range(layout.num_shards)]
    todo: dict[tuple[str, str], list[int]] = {place: [] for place in layouts}
    for place, number in shards[rank::world]:
        if not layouts[place].path(number).exists():
            todo[place].append(number)
    return todo


def _write_lines(layout: Layout, numbers: Sequence[int], rows: Iterable[np.ndarray]) -> None:
    """Write these shards of rows that are codes already; rows: of every sample of the grid."""
    mine = set(numbers)
    if mine:
        layout.write_all(numbers, (row for place, row in enumerate(rows) if place // layout.shard in mine))


def _encode(encoder: Encoder, parts: Sequence[Part], num_workers: int, *, show: bool) -> None:
    """Encode parts and write their shards, through Lightning's predict loop.

    Each process has a Trainer of its own: they have nothing to tell each other, and one that is done waits at
    no collective for others that have hours to go.
    """
    device = encoder.tokenizer.codebook.device
    gpu = device.type == "cuda"
    loader = DataLoader(
        Blocks(parts), batch_size=None, num_workers=num_workers, worker_init_fn=leave_stopping_to_us,
        pin_memory=gpu,
    )  # fmt: skip
    with (
        tqdm(
            total=sum(part.num_images for part in parts),
            initial=sum(part.begun * part.layout.shape[2] for part in parts),
            desc="tokens", unit="image", disable=not show,
        ) as bar,
        plain_errors(),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # advice on workers that the recipe already decides
        trainer = pl.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=[device.index] if gpu else 1,
            plugins=[LightningEnvironment()],  # whatever the variables of a launcher say
            callbacks=[Writer(parts, bar)],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        try:
            trainer.predict(encoder, loader, return_predictions=False)
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt(f"tokens: stopped at image {bar.n} of {bar.total}") from error
        finally:
            encoder.to(device)  # Lightning leaves it on the CPU


def _end(
    folder: Path,
    tokenizer: Tokenizer,
    config: TokensConfig,
    tasks: Mapping[str, TaskConfig],
    layouts: Mapping[tuple[str, str], Layout],
) -> None:
    """Give a whole store its manifest."""
    for layout in layouts.values():
        layout.check_whole()
        layout.discard_journals()
    about = {
        task: {"source": entry.source, "policy": entry.policy, "make": entry.make,
               **{split: layouts[task, split].describe() for split in SPLITS}}
        for task, entry in tasks.items()
    }  # fmt: skip
    write_manifest(folder, {
        "tokenizer": tokenizer.hash, "num_codes": tokenizer.num_codes,
        "tokens_per_image": tokenizer.num_tokens, "precision": config.precision, "tasks": about,
    })  # fmt: skip
