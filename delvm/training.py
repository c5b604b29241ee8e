"""A LightningModule and a data set -> the trained module: the one set-up of Lightning's Trainer.

Every stage that trains runs here, so that all of them show one progress bar, log to TensorBoard, stop cleanly
on Ctrl-C and SIGTERM, and go on from their last checkpoint to the result that an uninterrupted run has.
A step is the same items, however many processes (`ranks`) and micro-batches share them.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, Sampler

from delvm import ranks
from delvm.callbacks import CHECKPOINT, Averaging, Checkpoints, Progress
from delvm.callbacks import Interrupted as Interrupted  # which `train` raises
from delvm.callbacks import NotFinite as NotFinite
from delvm.errors import UserError
from delvm.monitor import Monitor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOICES = {
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("32-true", "bf16-mixed"),
    "attention": ("sdpa", "eager"),
}
COMPILE_BACKEND: str | Callable[..., Any] = "inductor"


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
    """Micro-batches that each process makes of its share of a step, one after the other: less memory. It may
    change, as the number of processes may, where a training goes on."""
    averaging: float = 0.0
    """Decay of the weights' moving average, which is then what is saved, such as 0.999; 0 takes none."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third slower."""
    compile: bool = False
    """Compile the model's layers: a minute or so at the start, faster steps on a GPU."""
    attention: str = "sdpa"
    """`sdpa`, PyTorch's fused kernels, or `eager`, matrix by matrix."""

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


def set_up_model(model: "PreTrainedModel", config: TrainerConfig) -> None:
    """Set a model's attention, checkpointing and compilation, in place; its weights keep names and values."""
    model.set_attn_implementation(config.attention)
    if config.checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_layers(model)


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Let a model keep the input of each layer alone and compute the rest again (Chen et al. 2016)."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode alone


def compile_layers(model: "PreTrainedModel") -> None:
    """Compile a model's layers, in place; what they share is compiled once.

    Around them transformers chooses the attention mask. Traced, that choice would be one mask of
    (rows, 1, length, length) for whole rows as well, which SDPA's fastest kernels do not take.
    """
    for layer in model.base_model.layers:
        layer.compile(backend=COMPILE_BACKEND)


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
    """Batches, each told what the whole step counts.

    A step is `accumulate` batches; what `module.count(batch)` says, a dict of whole numbers, is summed over
    them, and its mean over the processes put into each as float32 scalars. A loss divides by it: the mean
    over a step's tokens is not the mean of its batches' means, and gradients are the mean over processes.
    A module without `count` gets the batches as they are.

    The processes meet there, on the CPU: each asks for a step's first batch when it has finished the step
    before, for Lightning fetches nothing ahead from a loader that has a length.
    """

    def __init__(self, *args: Any, module: pl.LightningModule, accumulate: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.accumulate, self.count = accumulate, getattr(module, "count", None)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        with plain_errors():
            if self.count is None:
                yield from batches
                return
            while step := list(islice(batches, self.accumulate)):
                counts = list(map(self.count, step))
                sums = {key: torch.tensor(float(sum(count[key] for count in counts))) for key in counts[0]}
                totals = ranks.mean(sums)
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


def leave_stopping_to_us(worker: int) -> None:
    """For worker processes: the main process decides when to stop, and ends them when it does."""
    # Ctrl-C, and the SIGTERM of whoever preempts a job, reach every process; a worker that dies of it would
    # spoil the clean stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    # A process that leaves while its loader is alive, in the frames of a traceback, sends its workers SIGTERM
    # and then waits for them, for ever if they ignored it
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Give a UserError from a worker process the words that it was raised with.

    PyTorch raises it once more in the main process, with the worker's whole traceback for its message.
    """
    try:
        yield
    except UserError as error:
        kind = type(error)
        _, worker, said = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
        if not worker:
            raise
        raise kind(said.rstrip("\n")) from error


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
        KeyboardInterrupt: SIGINT came twice, or before the first step.
        NotFinite: the loss is not finite.
        UserError: processes and micro-batches cannot share `batch_size` evenly.
    """
    check_batch_size(f"{name}.batch_size", batch_size, config.accumulate)
    progress, averaging = Progress(name, steps, config.log_every), Averaging(config.averaging)
    callbacks: list[pl.Callback] = [
        progress,
        *([averaging] if config.averaging else []),
        Monitor(config.log_every, config.diagnose_every),
        Checkpoints(name, steps, config.checkpoint_every, folder),
    ]
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
            default_root_dir=folder,  # in a SLURM job Lightning looks for checkpoints there as well
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
    if ranks.world() == 1:  # whatever the variables of a SLURM job say
        return {"devices": 1, "plugins": [LightningEnvironment()]}
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
