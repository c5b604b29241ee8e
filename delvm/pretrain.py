"""Visual sentences -> a LLaMA by next-token prediction."""

import math
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import param_groups_weight_decay
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

from delvm.llama import find_size


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1.5e-4
    """Highest learning rate."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    final: float = 0.1
    """Learning rate at the end, as a share of the highest."""
    weight_decay: float = 0.1
    """Not for norms and embeddings."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Norm at which the gradient is clipped."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate} must be above 0 and finite")
        for key in ("warmup", "final"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay} must be at least 0 and finite")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1, 1 excluded")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip: {self.clip} must be above 0 and finite")


@dataclass
class PretrainConfig(OptimizerConfig):
    """A model and its training from labels alone."""

    size: str = "300m"
    """A name from `delvm.llama.SIZES`."""
    steps: int = 40_000
    batch_size: int = 128
    """Sentences a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_size(self.size)
        for key in ("steps", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear rise to 1 over the first `warmup` of the steps, then cosine decay to `final` at the last."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step + 1 - rise) / max(1, steps - rise))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class Pretrain(pl.LightningModule):
    """Next-token prediction; the one training step of teacher, scratch student and distilled student.

    Batches: `{"tokens": (batch, length) int64}`. Every token after BOS is a target.
    """

    def __init__(self, model: LlamaForCausalLM, config: OptimizerConfig, steps: int) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps

    def losses(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss` to minimise, and its parts. inputs, labels: (batch, length - 1) int64, already shifted."""
        ce = token_cross_entropy(self.model(inputs, use_cache=False).logits, labels)
        return {"loss": ce, "ce": ce}

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = batch["tokens"]
        return self.losses(tokens[:, :-1], tokens[:, 1:])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip under a fused optimizer in mixed precision: a gradient scaler, which bf16
        # does not have, would come in between
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        config = self.config
        embeddings = [n for n, _ in self.model.named_parameters() if "embed_tokens" in n]
        groups = param_groups_weight_decay(self.model, config.weight_decay, no_weight_decay_list=embeddings)
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, config.warmup, config.final)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL in nats over the labels that are not -100; 0 with a graph where all are.

    logits: (batch, length, vocab); labels: (batch, length) int64.
    """
    total = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp_min(1)
