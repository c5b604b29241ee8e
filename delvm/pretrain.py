"""Visual sentences -> a LLaMA by next-token prediction."""

import math
from collections.abc import Callable
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

    Batches: `tokens` (batch, length) int64; `labels`, the same with -100 where nothing is to be learnt, else
    every token after the first is a target; `positions` (batch, length) int64, which start again at 0 where
    a sentence begins that must not see what stands before it.
    """

    def __init__(self, model: LlamaForCausalLM, config: OptimizerConfig, steps: int) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps
        self.prepare: Callable[[Any], Any] | None = None
        """What makes such a batch of another, on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.prepare(batch) if self.prepare else batch

    def losses(
        self, inputs: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`loss` to minimise, and its parts.

        inputs, labels, positions: (batch, length - 1) int64, labels already shifted.
        """
        ce = token_cross_entropy(logits_of(self.model, inputs, positions), labels)
        return {"loss": ce, "ce": ce}

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens, positions = batch["tokens"], batch.get("positions")
        labels = batch.get("labels", tokens)
        return self.losses(
            tokens[:, :-1], labels[:, 1:], positions if positions is None else positions[:, :-1]
        )

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


def logits_of(
    model: LlamaForCausalLM, inputs: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, length, vocab) of a forward pass over whole rows.

    Attention stops where positions start again: transformers reads packed sentences off them.
    """
    return model(inputs, position_ids=positions, use_cache=False).logits


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL in nats over the labels that are not -100; 0 with a graph where all are.

    logits: (batch, length, vocab); labels: (batch, length) int64.
    """
    total = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp_min(1)
