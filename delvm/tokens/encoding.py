"""Views of samples, and lines of codes -> a token store."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from delvm import ranks
from delvm.images.sources import SPLITS, Views
from delvm.images.tasks import TOKEN_SOURCES, TaskConfig
from delvm.tokenizer import Tokenizer
from delvm.tokenizer.training import to_pictures
from delvm.tokens import lines
from delvm.tokens.store import Layout, code_dtype, write_manifest
from delvm.training import leave_stopping_to_us, plain_errors

BATCH = 128  # pictures


def encode(
    tokenizer: Tokenizer, batches: Iterable[torch.Tensor], progress: Callable[[int], object] = lambda _: None
) -> Iterator[np.ndarray]:
    """Pictures -> codes, batch by batch, on the tokenizer's device.

    batches: uint8 (batch, images, H, W, 3). Yields (batch, images, tokens) integers and tells `progress` how
    many.
    """
    for batch in batches:
        codes = encode_pictures(tokenizer, batch.to(tokenizer.codebook.device))
        progress(len(batch))
        yield codes.cpu().numpy()


def encode_pictures(tokenizer: Tokenizer, pictures: torch.Tensor) -> torch.Tensor:
    """(batch, images, H, W, 3) uint8 -> (batch, images, tokens) int64, so many at a time that they fit."""
    with torch.inference_mode():
        parts = [tokenizer.encode(to_pictures(part)) for part in pictures.flatten(0, 1).split(BATCH)]
        return torch.cat(parts).view(*pictures.shape[:2], -1)


def write_store(
    folder: Path,
    tokenizer: Tokenizer,
    tasks: Mapping[str, TaskConfig],
    data: Mapping[str, Mapping],
    views: Mapping[str, Mapping[str, Views]],
    *,
    seed: int,
    num_workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
) -> None:
    """Write the shards that are not there yet, and the manifest once all are.

    Args:
        folder: of the store; whole shards in it are kept.
        tokenizer: what encodes, on the device that it is on.
        tasks: every task; those of `TOKEN_SOURCES` are read as lines of codes.
        data: the manifest of `images.sources.index_data`: samples by split, pictures of a sample.
        views: the other tasks' views, `views[split][task]`.
        seed: of the splits.
        num_workers: processes that read and augment.
        rank, world: this process and how many there are; None: as `delvm.ranks` knows them. Each writes every
            `world`-th shard, and the first the manifest when all have.

    Raises:
        UserError: shards of other processes are missing.
    """
    rank, world = ranks.rank() if rank is None else rank, ranks.world() if world is None else world
    dtype = code_dtype(tokenizer.num_codes)
    layouts = {}
    for task in tasks:
        for split in SPLITS:
            num_views = views[split][task].num_views if task in views[split] else 1
            shape = (data[task][split], num_views, data[task]["pictures"], tokenizer.num_tokens)
            layouts[task, split] = Layout.plan(folder / f"{task}.{split}", shape, dtype)
    todo = {place: layout.missing(rank, world) for place, layout in layouts.items()}
    total = sum(len(layouts[p].samples(n)) * layouts[p].shape[1] for p, found in todo.items() for n in found)
    with tqdm(total=total, desc="tokens", unit="view", disable=rank > 0) as bar:
        for (task, split), numbers in todo.items():
            if not numbers:
                continue
            layout = layouts[task, split]
            if tasks[task].source in TOKEN_SOURCES:
                mine = set(numbers)
                rows = lines.rows(tasks[task], split, seed, layout.shape[2:])
                layout.write_all(numbers, (row for n, row in enumerate(rows) if n // layout.shard in mine))
                bar.update(sum(len(layout.samples(number)) for number in numbers))
                continue
            part = views[split][task]
            if tasks[task].source == "classes" and rank == 0:
                layout.write_classes(part.classes())
            ranges = [np.arange(layout.shard * part.num_views) + layout.samples(n).start * part.num_views
                      for n in numbers]  # fmt: skip
            items = np.concatenate(ranges)  # an array: there may be millions
            items = items[items < len(part)]  # the last shard is shorter
            loader = DataLoader(
                Subset(part, items),  # type: ignore[arg-type]  # an array indexes as well
                batch_size=max(1, BATCH // layout.shape[2]), num_workers=num_workers,
                worker_init_fn=leave_stopping_to_us,
            )  # fmt: skip
            with plain_errors():
                layout.write_all(numbers, encode(tokenizer, loader, bar.update))
    ranks.barrier()
    ranks.on_first(lambda: _end(folder, tokenizer, tasks, layouts))


def _end(
    folder: Path,
    tokenizer: Tokenizer,
    tasks: Mapping[str, TaskConfig],
    layouts: Mapping[tuple[str, str], Layout],
) -> None:
    """Give a whole store its manifest."""
    for layout in layouts.values():
        layout.check_whole()
    about = {
        task: {"source": config.source, "policy": config.policy, "make": config.make,
               **{split: layouts[task, split].describe() for split in SPLITS}}
        for task, config in tasks.items()
    }  # fmt: skip
    write_manifest(folder, {
        "tokenizer": tokenizer.hash, "num_codes": tokenizer.num_codes,
        "tokens_per_image": tokenizer.num_tokens, "tasks": about,
    })  # fmt: skip
