"""A training under way -> its speed, memory and health in TensorBoard."""

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch

from delvm import ranks

PEAK_TFLOPS = {
    # NVIDIA A100 Tensor Core GPU datasheet: 312 in either form
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    # NVIDIA H100 and H200 datasheets, SXM: 1979 with sparsity
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    # NVIDIA L40S datasheet
    "NVIDIA L40S": 362,
    # NVIDIA Ada GPU architecture whitepaper, table of the RTX 4090, with fp32 accumulation
    "NVIDIA GeForce RTX 4090": 165,
}
"""Dense bf16 peak in TFLOP/s by torch's name of the card."""


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Monitor(pl.Callback):
    """Logs every `log_every` steps what the training costs, and every `diagnose_every` what the module finds.

    - `speed/tokens_per_second`: over all processes, since the last point; batches without `tokens` have none.
    - `speed/mfu`: model FLOP/s as a share of the cards' bf16 peak (Chowdhery et al. 2022, PaLM, appendix B),
      if the card is in PEAK_TFLOPS and the module has `flops_per_token`, forward and backward.
    - `memory/peak_gib`: of the first process: on its card since the training began, or, where there is none,
      resident since the process began.
    - `optimizer/learning_rate`, `optimizer/gradient_norm`: of the step; the norm is that before clipping, if
      the module keeps it as `gradient_norm`.
    - `diagnose/...`: what the module's `diagnose()`, if it has one, returns: a dict of floats, or None. All
      processes call it. It takes gradients by `torch.autograd.grad`: DDP takes any `backward` for the step's.
    """

    def __init__(self, log_every: int, diagnose_every: int) -> None:
        self.log_every, self.diagnose_every = log_every, diagnose_every
        self._since, self._tokens, self._rate = 0.0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":  # an earlier training may have taken more
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._since, self._tokens = perf_counter(), 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # at the batch's end it is the next step's

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, dict) and "tokens" in batch:
            self._tokens += batch["tokens"].numel()
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        values: dict[str, float] = {}
        if step % self.log_every == 0:
            values |= self._costs(pl_module)
        if self.diagnose_every and step % self.diagnose_every == 0:
            values |= diagnosis(pl_module)
        if values:
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    def _costs(self, module: pl.LightningModule) -> dict[str, float]:
        now = perf_counter()
        speed = ranks.world() * self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        values = {"memory/peak_gib": peak_memory(module.device), "optimizer/learning_rate": self._rate}
        if speed:
            values["speed/tokens_per_second"] = speed
            flops = getattr(module, "flops_per_token", None)
            if flops and module.device.type == "cuda":
                share = utilization(speed * flops, torch.cuda.get_device_name(module.device), ranks.world())
                if share is not None:
                    values["speed/mfu"] = share
        norm = getattr(module, "gradient_norm", None)
        if norm is not None:
            values["optimizer/gradient_norm"] = float(norm)
        return values


def utilization(flops: float, card: str, num_cards: int) -> float | None:
    """FLOP/s -> share of the peak of `num_cards` such cards, None for a card that is not in PEAK_TFLOPS."""
    return flops / (num_cards * PEAK_TFLOPS[card] * 1e12) if card in PEAK_TFLOPS else None


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used, in GiB: allocated on a GPU since its peak was last reset,
    or resident since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def diagnosis(module: pl.LightningModule) -> dict[str, float]:
    """What the module's `diagnose` finds; the training's random numbers stay as they are.

    It runs uncompiled: the training's graphs do not serve it, and for so few batches none is worth its time.
    """
    diagnose: Callable[[], dict[str, float] | None] | None = getattr(module, "diagnose", None)
    if diagnose is None:
        return {}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        return {f"diagnose/{key}": value for key, value in (diagnose() or {}).items()}
