"""A training under way -> its bar and curve, its checkpoints, the average of its weights."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from delvm import ranks
from delvm.errors import UserError
from delvm.monitor import ends_step

CHECKPOINT = "last.ckpt"


class NotFinite(UserError):
    """A loss became infinite or no number."""


class Interrupted(Exception):
    """Training was asked to stop and has written its checkpoint."""


class Progress(pl.Callback):
    """Progress bar and curve, shown and logged by the first process for all.

    `training_step` returns a dict of scalars with `loss` among them; each becomes a curve, of its mean over
    micro-batches, processes and `log_every` steps.
    """

    def __init__(self, name: str, steps: int, log_every: int) -> None:
        self.name, self.steps, self.log_every = name, steps, log_every
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._bar: tqdm | None = None

    def state_dict(self) -> dict[str, Any]:
        self._sums = ranks.mean(self._sums)  # all save together, and what is saved is the first process'
        return {"curve": self.curve, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self._sums = state_dict["curve"], state_dict["sums"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(
            total=self.steps, initial=trainer.global_step, desc=self.name, unit="step",
            disable=not ranks.is_first(),
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._bar is not None
        for key, value in outputs.items():
            if key != "loss":  # which Lightning has divided
                value = value / trainer.accumulate_grad_batches
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()
        if not ends_step(trainer, batch_idx):
            return
        self._bar.update()
        step = trainer.global_step
        if step % self.log_every == 0 or step == self.steps:
            point = self._point(step)
            self._bar.set_postfix({"loss": f"{point['loss']:.3f}"}, refresh=False)
            for logger in trainer.loggers:
                logger.log_metrics(point, step)

    def _point(self, step: int) -> dict[str, float]:
        """The curve's next point."""
        num_steps = step - (self.curve[-1]["step"] if self.curve else 0)
        point = {key: float(value) / num_steps for key, value in ranks.mean(self._sums).items()}
        self._sums = {}
        if not all(map(torch.isfinite, map(torch.tensor, point.values()))):
            raise NotFinite(f"{self.name}: not a finite loss at step {step}: {point}; lower learning_rate")
        self.curve.append({"step": step, **point})
        return point

    # not in `teardown`, which Lightning calls only if all went well
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Checkpoints(pl.Callback):
    """Writes what a training goes on from, every so many steps and when it is asked to stop.

    SIGINT or SIGTERM in any process stops all of them at the end of the step. A second SIGINT stops at once
    and leaves the checkpoint that there was. SIGTERM never does: whoever preempts a job signals the launcher
    and its processes alike, and the launcher then signals them again.

    It has to be the last callback: what others do at a step's end is in the checkpoint.
    """

    def __init__(self, name: str, steps: int, every: int, folder: Path) -> None:
        self.name, self.steps, self.every, self.folder = name, steps, every, folder
        self._rng: torch.Tensor | None = None
        self._asked: set[int] = set()
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rng": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng = state_dict["rng"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts micro-batches, of which a step may have had more or fewer before
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            # saved before the end of the last was counted
            counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request_stop)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._asked:
            raise KeyboardInterrupt
        self._asked.add(number)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._rng is not None:  # only now: setting up the restart has drawn random numbers of its own
            torch.set_rng_state(self._rng)
            self._rng = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        # at the last step too: what called train is asked to stop as well
        stop = ranks.any_rank(bool(self._asked))
        if stop or (step % self.every == 0 and step < self.steps):
            partial = self.folder / f".{CHECKPOINT}.partial"
            trainer.save_checkpoint(partial)
            ranks.on_first(lambda: os.replace(partial, self.folder / CHECKPOINT))
        if stop:
            raise Interrupted(f"{self.name}: stopped at step {step} of {self.steps}")

    # not in `teardown`: Lightning calls that after it has put back the signal handlers it found, and only if
    # all went well
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back_handlers()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._put_back_handlers()

    def _put_back_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class Averaging(pl.Callback):
    """An exponential moving average of the weights (Polyak and Juditsky 1992).

    Lightning's own copies the whole module, here with a frozen teacher in it. After step t the decay is
    min(decay, (1 + t) / (10 + t)): a short run must not end on an average of its random start.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.average

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = {
            name: self.average.get(name, weight).detach().to(weight.device, copy=True)
            for name, weight in _trained(pl_module).items()
        }

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update(list(self.average.values()), list(_trained(pl_module).values()), step)

    @torch.no_grad()
    def replace_weights(self, module: pl.LightningModule) -> None:
        """Put the average in the place of the weights."""
        for name, weight in _trained(module).items():
            weight.copy_(self.average[name])


def _trained(module: pl.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
