"""Visual sentences -> a LLaMA by next-token prediction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import param_groups_weight_decay
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

from delvm.distill.fused import fused_cross_entropy
from delvm.embedding import EMBEDDINGS
from delvm.llama import SCHEMES, find_size

IGNORED = -100
SCHEDULES = ("cosine", "wsd")


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up, and decay along a cosine or at the end (WSD)."""

    learning_rate: float = 1.5e-4
    """Highest learning rate."""
    schedule: str = "cosine"
    """`cosine`, or `wsd`: warm-up, stable, decay (Hu et al. 2024)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    decay: float = 0.2
    """wsd: share of the steps, the last, in which it falls."""
    final: float = 0.1
    """Learning rate at the end, as a share of the highest."""
    weight_decay: float = 0.1
    """Not for norms, biases and embeddings."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Norm at which the gradient is clipped."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate} must be above 0 and finite")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: '{self.schedule}' is unknown; choices: {', '.join(SCHEDULES)}")
        for key in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup, decay: {self.warmup} + {self.decay} are more than all steps")
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
    init: str = "default"
    """How the first weights are drawn, from `delvm.llama.SCHEMES`: transformers' `default`, or `delvm`."""
    embedding: str = "learned"
    """What is read for a code: a row of a `learned` table; its vector in the `codebook`, frozen, through a
    learned projection (DeLVM), folded into a table when the model is saved, beside a head that is never tied;
    or a learned row that starts as that (`codebook_start`)."""
    folder: str = ""
    """teacher: a trained model's folder to take instead, this project's or one that `delvm.published` knows;
    the other settings are then ignored."""
    steps: int = 40_000
    batch_size: int = 128
    """Sentences a step, over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_size(self.size)
        for name, choices in (("init", SCHEMES), ("embedding", EMBEDDINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: '{getattr(self, name)}' is unknown; choices: {', '.join(choices)}")
        for key in ("steps", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the highest learning rate that step `step` of 0..steps-1 has.

    A linear rise over the first `warmup` of the steps; then a cosine to `final` at the last step, or 1 until
    the last `decay` of the steps and there down to `final` as 1 - sqrt (Hägele et al. 2024).
    """
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    fall = max(
        1, steps - rise if config.schedule == "cosine" else min(steps - rise, round(config.decay * steps))
    )
    progress = min(1.0, max(0.0, (step + 1 - (steps - fall)) / fall))
    shape = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - math.sqrt(progress)
    )
    return config.final + (1 - config.final) * shape


@dataclass(frozen=True)
class Step:
    """What one micro-batch reads and is to say: rows, shifted by one token."""

    inputs: torch.Tensor
    """(rows, length - 1) int64."""
    labels: torch.Tensor
    """(tokens,) int64, the rows' one after the other; IGNORED where nothing is to be learnt."""
    positions: torch.Tensor | None
    """(rows, length - 1) int64."""
    batch: dict[str, torch.Tensor]

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "Step":
        """Shift a batch of rows."""
        tokens, positions = batch["tokens"], batch.get("positions")
        labels = batch.get("labels", tokens)[:, 1:].flatten()
        return cls(tokens[:, :-1], labels, positions if positions is None else positions[:, :-1], batch)

    def of_targets(self, key: str) -> torch.Tensor:
        """(tokens,): what the batch says under `key` of every label."""
        return self.batch[key][:, 1:].flatten()

    @property
    def valid(self) -> torch.Tensor:
        """(tokens,) bool: the labels to learn from."""
        return self.labels != IGNORED


class Pretrain(pl.LightningModule):
    """Next-token prediction; the one training step of teacher, scratch student and distilled student.

    Batches: `tokens` (rows, length) int64; `labels`, the same with IGNORED where nothing is to be learnt,
    else every token after the first is a target; `positions` (rows, length) int64, which start again at 0
    where a sentence begins that must not see what stands before it; `num_...`, scalars: what `count` found in
    all the micro-batches of the step, the mean over the processes, so that all of them together have the mean
    of one large batch.

    Args:
        model: what is trained.
        config: its optimizer.
        steps: of the whole training.
        tasks: their names, by the index that `tasks` of a batch has.
    """

    def __init__(
        self, model: LlamaForCausalLM, config: OptimizerConfig, steps: int, tasks: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.model, self.config, self.steps, self.tasks = model, config, steps, list(tasks)
        self.prepare: Callable[[Any], Any] | None = None
        """What makes such a batch of another, on the device."""
        self.gradient_norm: torch.Tensor | None = None
        """Of the last step, before clipping."""
        self._seen: dict[str, torch.Tensor] | None = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.prepare(batch) if self.prepare else batch

    def count(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        """How many targets a batch has: what its losses are means over, as `num_...`."""
        return {"num_targets": int(Step.of(batch).valid.sum())}

    def losses(self, step: Step, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss` to minimise, and its parts. hidden: (tokens, width), of the model's last layer."""
        loss, parts = fused_cross_entropy(
            hidden, self.model.lm_head.weight, step.labels, num_targets=step.batch.get("num_targets")
        )
        return {"loss": loss, **parts}

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        step, self._seen = Step.of(batch), batch
        parts = self.losses(step, self.hidden(step))
        # Lightning divides by the number of micro-batches; the mean over all of them is taken already
        return {key: value * self.micro_batches for key, value in parts.items()}

    def hidden(self, step: Step) -> torch.Tensor:
        """(tokens, width): the states that the head turns into logits."""
        return hidden_states(self.model, step.inputs, step.positions).flatten(0, 1)

    @property
    def row_length(self) -> int:
        """Tokens of a row in the last batch; before the first, as many as the model takes."""
        return self._seen["tokens"].shape[1] if self._seen else self.model.config.max_position_embeddings

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.trainer.accumulate_grad_batches if self._trainer is not None else 1

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a training step for each token (Chowdhery et al. 2022, appendix B)."""
        return 3 * forward_flops(self.model, self.row_length)

    @torch.no_grad()
    def diagnose(self) -> dict[str, float]:
        """What the last micro-batch says of each task: `loss/TASK`. Empty before the first."""
        if self._seen is None or "tasks" not in self._seen:
            return {}
        step = Step.of(self._seen)
        hidden, tasks, found = self.hidden(step), step.of_targets("tasks"), {}
        for index, task in enumerate(self.tasks):
            chosen = (tasks == index) & step.valid
            if chosen.any():
                labels = step.labels.masked_fill(~chosen, IGNORED)
                found[f"loss/{task}"] = fused_cross_entropy(hidden, self.model.lm_head.weight, labels)[
                    0
                ].item()
        return found

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip under a fused optimizer in mixed precision: a gradient scaler, which bf16
        # does not have, would come in between
        if gradient_clip_val:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        config = self.config
        embeddings = [n for n, _ in self.model.named_parameters() if "embed_tokens" in n]
        groups = param_groups_weight_decay(self.model, config.weight_decay, no_weight_decay_list=embeddings)
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def hidden_states(
    model: LlamaForCausalLM, inputs: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(rows, length, width) of a forward pass over whole rows, what the head turns into logits.

    Attention stops where positions start again: transformers reads packed sentences off them.
    """
    return model.model(inputs, position_ids=positions, use_cache=False).last_hidden_state


def forward_flops(model: LlamaForCausalLM, length: int) -> float:
    """Floating-point operations of a forward pass for each token of rows of `length`.

    Two for every weight that multiplies, head included, and attention's 4 * layers * width * length.
    """
    config = model.config
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    attention = 2 * config.num_hidden_layers * config.hidden_size * length
    return 2.0 * (weights + config.vocab_size * config.hidden_size + attention)
