"""A LightningModule and a data set -> the trained module: the one set-up of Lightning's Trainer.

Every stage that trains runs here, so that all of them show one progress bar, log to TensorBoard, stop cleanly
on Ctrl-C and SIGTERM, and go on from their last checkpoint to the result that an uninterrupted run has.
"""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from delvm.errors import UserError

CHECKPOINT = "last.ckpt"
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass
class TrainerConfig:
    """The machine's side of training; only `precision` changes what is learnt, a little."""

    accelerator: str = "auto"
    """`auto`, `cpu` or `gpu`."""
    precision: str = "32-true"
    """`32-true` or `bf16-mixed`."""
    num_workers: int = 0
    """Processes that read and augment pictures."""
    log_every: int = 10
    """Steps between two points of a curve; a point is the mean over these steps."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for key, choices in (("accelerator", ("auto", "cpu", "gpu")), ("precision", PRECISIONS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("accelerator: 'gpu' asked for, but torch sees none; choices: auto, cpu")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: {self.num_workers} must be at least 0")
        for key in ("log_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")

    def device(self) -> torch.device:
        """The device for work outside the Trainer: encoding, evaluation."""
        gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if gpu else "cpu")


class Interrupted(Exception):
    """Training was asked to stop and has written its checkpoint."""


class InOrder(Sampler[int]):
    """The items of a data set in order, from the batch at which training stands.

    Its length stays that of the whole run: Lightning counts the batches before a restart itself.
    """

    def __init__(self, num_items: int, batch_size: int, module: pl.LightningModule) -> None:
        self.num_items, self.batch_size, self.module = num_items, batch_size, module

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.module.global_step * self.batch_size, self.num_items))

    def __len__(self) -> int:
        return self.num_items


class Shuffled(Dataset):
    """`num_items` items of a data set, epoch after epoch, each in a random order of its own.

    Item i depends on the seed and i alone. Items are stacks of pictures, (number, ...), any number in each.
    """

    def __init__(self, dataset: Sized, num_items: int, seed: int) -> None:
        self.dataset, self.num_items, self.seed = dataset, num_items, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(index, len(self.dataset))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        return self.dataset[int(self._order[place])]  # type: ignore[index]

    @staticmethod
    def collate(items: Sequence[torch.Tensor]) -> torch.Tensor:
        """All pictures of the items, (sum of their numbers, ...)."""
        return torch.cat(list(items))


class Progress(pl.Callback):
    """Progress bar, curve, checkpoints and a clean stop.

    `training_step` returns a dict of scalars with `loss` among them; each becomes a curve.
    """

    def __init__(self, name: str, steps: int, config: TrainerConfig, folder: Path) -> None:
        self.name, self.steps, self.config, self.folder = name, steps, config, folder
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._rng: torch.Tensor | None = None
        self._stop: int | None = None
        self._handlers: dict[int, Any] = {}
        self._bar: tqdm | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "sums": self._sums, "rng": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self._sums, self._rng = state_dict["curve"], state_dict["sums"], state_dict["rng"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(total=self.steps, initial=trainer.global_step, desc=self.name, unit="step")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request_stop)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self._stop = number

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._rng is not None:  # only now: setting up the restart has drawn random numbers of its own
            torch.set_rng_state(self._rng)
            self._rng = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        assert self._bar is not None
        step = trainer.global_step
        for key, value in outputs.items():
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()
        self._bar.update()
        if step % self.config.log_every == 0 or step == self.steps:
            num_steps = step - (self.curve[-1]["step"] if self.curve else 0)
            point = {key: float(value) / num_steps for key, value in self._sums.items()}
            self._sums = {}
            if not all(map(torch.isfinite, map(torch.tensor, point.values()))):
                raise UserError(
                    f"{self.name}: not a finite loss at step {step}: {point}; lower learning_rate"
                )
            self.curve.append({"step": step, **point})
            self._bar.set_postfix({"loss": f"{point['loss']:.3f}"}, refresh=False)
            for logger in trainer.loggers:
                logger.log_metrics(point, step)
        if step % self.config.checkpoint_every == 0 and step < self.steps:
            self._save(trainer)
        if self._stop is not None:  # at the last step too: what called train is asked to stop as well
            self._save(trainer)
            raise Interrupted(f"{self.name}: stopped at step {step} of {self.steps}")

    def _save(self, trainer: pl.Trainer) -> None:
        partial = self.folder / f".{CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        os.replace(partial, self.folder / CHECKPOINT)

    # not in `teardown`: Lightning calls that after it has put back the signal handlers it found, and only if
    # all went well
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def leave_stopping_to_us(worker: int) -> None:
    """For worker processes: the main process decides when to stop."""
    # Ctrl-C reaches every process of the terminal; a worker that dies of it would spoil the clean stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def train(
    module: pl.LightningModule,
    dataset: Dataset,
    *,
    name: str,
    steps: int,
    batch_size: int,
    clip: float,
    config: TrainerConfig,
    folder: Path,
    tensorboard: Path,
) -> list[dict[str, float]]:
    """Train for `steps` steps on `dataset`, item 0 first, and return the curve.

    Args:
        module: its `training_step` returns a dict of scalars.
        dataset: map-style, `steps * batch_size` items; item i depends on i alone. Its `collate`, if
            it has one, makes the batches.
        name: shown on the bar and in TensorBoard.
        clip: norm at which the gradient is clipped.
        folder: where checkpoints go; one that is there is gone on from. `discard_checkpoint` ends it.
        tensorboard: folder of the event files.

    Returns:
        One dict every `log_every` steps and at the last: `step`, and each value's mean since the one before.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint stands in `folder`.
        KeyboardInterrupt: it came twice, or before the first step.
        UserError: the loss is not finite.
    """
    progress = Progress(name, steps, config, folder)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=InOrder(steps * batch_size, batch_size, module),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=leave_stopping_to_us,
        collate_fn=getattr(dataset, "collate", None),  # a data set may make its batches itself
        # its own generator: the loader must not draw from the state that a restart restores
        generator=torch.Generator().manual_seed(0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and loggers that the recipe already decides
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]  # one of PRECISIONS
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=clip,
            logger=TensorBoardLogger(tensorboard, name=name, version=""),
            callbacks=[progress],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        checkpoint = folder / CHECKPOINT
        resume = checkpoint if checkpoint.is_file() else None
        if resume is None:  # the curves of an earlier run would mix with the new ones
            shutil.rmtree(tensorboard / name, ignore_errors=True)
        try:
            trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
    return progress.curve


def discard_checkpoint(folder: Path) -> None:
    """Remove what `train` would go on from: once the result is saved, and not before."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
