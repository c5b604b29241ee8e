"""A LightningModule and a data set -> the trained module: the one set-up of Lightning's Trainer.

Every stage that trains runs here, so that all of them show one progress bar, log to TensorBoard, stop cleanly
on Ctrl-C and SIGTERM, and go on from their last checkpoint to the result that an uninterrupted run has.
A step is the same items, however many processes (`ranks`) and micro-batches share them.
"""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from delvm import ranks
from delvm.errors import UserError
from delvm.monitor import Monitor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT = "last.ckpt"
CHOICES = {
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("32-true", "bf16-mixed"),
    "attention": ("auto", "sdpa", "eager"),
}


@dataclass
class TrainerConfig:
    """The machine's side of training; only `precision` and `averaging` change what is learnt, a little."""

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
    diagnose_every: int = 100
    """Steps between two looks at what the losses ask of the model, in TensorBoard; 0 never."""
    accumulate: int = 1
    """Micro-batches that each process makes of its share of a step, one after the other: less memory."""
    averaging: float = 0.0
    """Decay of the weights' moving average, which is then what is saved, such as 0.999; 0 takes none."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third slower."""
    compile: bool = False
    """Compile the model: a minute or more at the start, faster steps on a GPU."""
    attention: str = "auto"
    """`auto`, `sdpa` or `eager`: how attention is computed; `auto` goes by device and length."""

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("accelerator: 'gpu' asked for, but torch sees none; choices: auto, cpu")
        if self.device().type == "cuda" and ranks.local_world() > torch.cuda.device_count():
            raise ValueError(
                f"accelerator: {ranks.local_world()} processes on this machine, but torch sees"
                f" {torch.cuda.device_count()} GPUs; start one for each"
            )
        for key, least in (("num_workers", 0), ("log_every", 1), ("checkpoint_every", 1),
                           ("diagnose_every", 0), ("accumulate", 1)):  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least {least}")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging: {self.averaging} must lie in 0..1, 1 excluded")

    def device(self) -> torch.device:
        """The device for work outside the Trainer: encoding, evaluation."""
        gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if gpu else "cpu")


def check_batch_size(key: str, batch_size: int, accumulate: int) -> None:
    """Refuse a step that processes and micro-batches cannot share evenly.

    Raises:
        UserError: it names `key`.
    """
    if batch_size % (ranks.world() * accumulate):
        shares = f"processes * trainer.accumulate = {ranks.world()} * {accumulate}"
        raise UserError(f"{key}: {batch_size} a step must divide by {shares}")


def choose_attention(device: torch.device, length: int) -> str:
    """transformers' implementation of attention over `length` tokens for training on this device."""
    # measured forward and backward, 4 heads of 32, 322 tokens, 2 CPU threads: eager takes 1.2 times as long
    return "sdpa"


def set_up_model(model: "PreTrainedModel", config: TrainerConfig, length: int) -> None:
    """Set a model's attention, checkpointing and compilation, in place; its weights keep names and values.

    length: tokens of the rows that it is to be trained on.
    """
    automatic = config.attention == "auto"
    model.set_attn_implementation(
        choose_attention(config.device(), length) if automatic else config.attention
    )
    if config.checkpointing:
        checkpoint_activations(model)
    if config.compile:
        model.base_model.compile()  # what all losses run; in place, or the weights' names would change


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Let a model keep the input of each layer alone and compute the rest again (Chen et al. 2016)."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode alone


class NotFinite(UserError):
    """A loss became infinite or no number."""


class Interrupted(Exception):
    """Training was asked to stop and has written its checkpoint."""


class InOrder(Sampler[int]):
    """This process' share of each step's items, in order, from the step at which training stands.

    Its length stays that of the whole run: Lightning counts the batches before a restart itself.
    """

    def __init__(self, steps: int, batch_size: int, module: pl.LightningModule) -> None:
        self.steps, self.batch_size, self.module = steps, batch_size, module
        self.share = batch_size // ranks.world()

    def __iter__(self) -> Iterator[int]:
        for step in range(self.module.global_step, self.steps):
            first = step * self.batch_size + ranks.rank() * self.share
            yield from range(first, first + self.share)

    def __len__(self) -> int:
        return self.steps * self.share


class MicroBatches(DataLoader):
    """Batches, each told what the whole step counts in this process.

    A step is `accumulate` batches; what `module.count(batch)` says, a dict of whole numbers, is summed over
    them and put into each as int64 scalars. A loss divides by it: the mean over a step's tokens is not the
    mean of its batches' means. A module without `count` gets the batches as they are.
    """

    def __init__(self, *args: Any, module: pl.LightningModule, accumulate: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.accumulate, self.count = accumulate, getattr(module, "count", None)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        if self.count is None:
            yield from batches
            return
        while step := list(islice(batches, self.accumulate)):
            counts = list(map(self.count, step))
            totals = {key: torch.tensor(sum(count[key] for count in counts)) for key in counts[0]}
            yield from ({**batch, **totals} for batch in step)


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
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
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


class Progress(pl.Callback):
    """Progress bar, curve, checkpoints and a clean stop, of the first process for all.

    `training_step` returns a dict of scalars with `loss` among them; each becomes a curve, of its mean over
    micro-batches, processes and steps.
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
        self._bar = tqdm(
            total=self.steps, initial=trainer.global_step, desc=self.name, unit="step",
            disable=not ranks.is_first(),
        )  # fmt: skip
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
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._bar is not None
        step = trainer.global_step
        for key, value in outputs.items():
            if key != "loss":  # which Lightning has divided
                value = value / self.config.accumulate
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()
        if (batch_idx + 1) % self.config.accumulate:
            return
        self._bar.update()
        if step % self.config.log_every == 0 or step == self.steps:
            num_steps = step - (self.curve[-1]["step"] if self.curve else 0)
            point = {key: float(value) / num_steps for key, value in ranks.mean(self._sums).items()}
            self._sums = {}
            if not all(map(torch.isfinite, map(torch.tensor, point.values()))):
                raise NotFinite(
                    f"{self.name}: not a finite loss at step {step}: {point}; lower learning_rate"
                )
            self.curve.append({"step": step, **point})
            self._bar.set_postfix({"loss": f"{point['loss']:.3f}"}, refresh=False)
            for logger in trainer.loggers:
                logger.log_metrics(point, step)
        if step % self.config.checkpoint_every == 0 and step < self.steps:
            self._save(trainer)
        # at the last step too: what called train is asked to stop as well
        if ranks.any_rank(self._stop is not None):
            self._save(trainer)
            raise Interrupted(f"{self.name}: stopped at step {step} of {self.steps}")

    def _save(self, trainer: pl.Trainer) -> None:
        self._sums = ranks.mean(self._sums)  # the checkpoint is the first process'
        partial = self.folder / f".{CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        ranks.on_first(lambda: os.replace(partial, self.folder / CHECKPOINT))

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
        module: its `training_step` returns a dict of scalars. The step's gradient is that of `loss`, in the
            mean over micro-batches and processes; see `MicroBatches` for one that weighs all tokens alike.
        dataset: map-style, `steps * batch_size` items; item i depends on i alone. Its `collate`, if
            it has one, makes the batches.
        name: shown on the bar and in TensorBoard.
        batch_size: items a step, over all processes and micro-batches.
        clip: norm at which the gradient is clipped.
        folder: where checkpoints go; one that is there is gone on from. `discard_checkpoint` ends it.
        tensorboard: folder of the event files.

    Returns:
        One dict every `log_every` steps and at the last: `step`, and each value's mean since the one before.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint stands in `folder`.
        KeyboardInterrupt: it came twice, or before the first step.
        NotFinite: the loss is not finite.
        UserError: processes and micro-batches cannot share `batch_size` evenly.
    """
    check_batch_size(f"{name}.batch_size", batch_size, config.accumulate)
    progress = Progress(name, steps, config, folder)
    averaging = Averaging(config.averaging)
    callbacks: list[pl.Callback] = [progress, Monitor(config.log_every, config.diagnose_every)]
    if config.averaging:
        callbacks.insert(0, averaging)  # before what saves it
    loader = MicroBatches(
        dataset,
        module=module,
        accumulate=config.accumulate,
        batch_size=batch_size // (ranks.world() * config.accumulate),
        sampler=InOrder(steps, batch_size, module),
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
            **_processes(),
            precision=config.precision,  # type: ignore[arg-type]  # one of CHOICES
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=clip,
            logger=TensorBoardLogger(tensorboard, name=name, version=""),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        checkpoint = folder / CHECKPOINT
        resume = checkpoint if ranks.on_first(checkpoint.is_file) else None
        if resume is None and ranks.is_first():  # the curves of an earlier run would mix with the new ones
            shutil.rmtree(tensorboard / name, ignore_errors=True)
        try:
            trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
    if config.averaging:
        averaging.replace_weights(module)
    return progress.curve


def _processes() -> dict[str, Any]:
    """Lightning's Trainer's settings for the processes that there are."""
    if ranks.world() == 1:
        return {"devices": 1}
    return {
        "devices": ranks.local_world(),
        "num_nodes": ranks.world() // ranks.local_world(),
        "strategy": DDPStrategy(gradient_as_bucket_view=True),
        "plugins": [TorchElasticEnvironment()],  # the processes are there: it reads torchrun's variables
        "use_distributed_sampler": False,  # InOrder is one
    }


def discard_checkpoint(folder: Path) -> None:
    """Remove what `train` would go on from: once the result is saved, and not before."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
