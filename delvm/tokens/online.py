"""Samples -> rows of views that no row before has shown, encoded while the model trains.

Stored views are encoded once and come back each epoch; here every sentence has views of its own. That costs a
pass of the tokenizer in each step, and reading and augmenting all along: for an accelerator, many workers.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from delvm.images.sources import Views
from delvm.tokenizer import Tokenizer
from delvm.tokens.encoder import Encoder, TokensConfig
from delvm.tokens.rows import TrainingSentences


class OnlineSentences(Dataset):
    """The rows of `TrainingSentences` as pictures, each sample in a view that no other row shows.

    Items: `pictures` (images, size, size, 3) uint8 in the sentence's order, `task`, its index, and the row
    with 0 for every code. Item i depends on the seeds and i alone.

    Raises:
        ValueError: rows that are not whole sentences.
    """

    def __init__(self, rows: TrainingSentences, views: Mapping[str, Views]) -> None:
        if not rows.whole:
            raise ValueError("balance.online: a row must be a whole sentence; leave sentences.length at 0")
        self.rows, self.views = rows, [views[task] for task in rows.tasks]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        task, picks = self.rows.picks(index)
        # view 0 is the sample itself
        seen = {sample: self.views[task].view(sample, 1 + index) for sample in set(picks[:, 0].tolist())}
        pictures = torch.stack([seen[sample][picture] for sample, _, picture in picks.tolist()])
        codes = np.zeros((1, len(picks) * self.rows.tokens_per_image), np.int64)
        row = {key: part[0] for key, part in self.rows.batch(codes, np.array([task])).items()}
        return {"pictures": pictures, "task": task, **row}


class Encode:
    """Batches of `OnlineSentences` -> those of `TrainingSentences`, on the device that they are on."""

    def __init__(
        self, rows: TrainingSentences, tokenizer: Tokenizer, config: TokensConfig | None = None
    ) -> None:
        """config: how pictures are encoded."""
        self.rows, self.encoder = rows, Encoder(tokenizer, config)

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`pictures` (rows, images, size, size, 3) uint8 and `task` (rows,) -> the rows, codes and all."""
        pictures = batch["pictures"]
        codes = self.encoder.to(pictures.device)(pictures).flatten(1)
        rows = self.rows.batch(codes.cpu().numpy(), batch["task"].cpu().numpy())
        others = {key: part for key, part in batch.items() if key not in ("pictures", "task")}
        return others | {key: part.to(pictures.device) for key, part in rows.items()}
