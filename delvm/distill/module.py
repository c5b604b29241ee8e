"""Visual sentences and a frozen teacher -> a student: CE on the labels plus KD on the teacher's logits."""

import math
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from delvm.distill.divergences import DIVERGENCES, mean_divergence
from delvm.errors import UserError
from delvm.pretrain import Pretrain, PretrainConfig, logits_of, token_cross_entropy


@dataclass
class DistillConfig(PretrainConfig):
    """A student and its training: `ce_weight * CE + kd_weight * T² * divergence` (DeLVM: 1, 1, T 1)."""

    size: str = "80m"
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    divergence: str = "forward_kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: '{self.divergence}' is unknown; choices: {', '.join(DIVERGENCES)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} must be above 0 and finite")
        for key in ("ce_weight", "kd_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 0 and finite")
        if self.ce_weight == self.kd_weight == 0:
            raise ValueError("ce_weight, kd_weight: both are 0, nothing would be learnt")


class Distill(Pretrain):
    """The student's training.

    The teacher is frozen and hidden from Lightning, so that it stands in no optimizer and no checkpoint.

    Raises:
        UserError: student and teacher have different vocabularies.
    """

    def __init__(self, model: LlamaForCausalLM, teacher: LlamaForCausalLM, config: DistillConfig) -> None:
        super().__init__(model, config, config.steps)
        if model.config.vocab_size != teacher.config.vocab_size:
            raise UserError(
                f"student: vocabulary of {model.config.vocab_size} ids,"
                f" the teacher's has {teacher.config.vocab_size}; both must speak the codes of one tokenizer"
            )
        self.distill = config
        self._hidden = [teacher.eval().requires_grad_(False)]  # a list: nn.Module does not look inside

    @property
    def teacher(self) -> LlamaForCausalLM:
        """The frozen teacher."""
        return self._hidden[0]

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def losses(
        self, inputs: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        config = self.distill
        if config.kd_weight == 0:  # the teacher would run for nothing
            parts = super().losses(inputs, labels, positions)
            return {"loss": config.ce_weight * parts["ce"], "ce": parts["ce"]}
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher, inputs, positions)
        student_logits = logits_of(self.model, inputs, positions)
        ce = token_cross_entropy(student_logits, labels)
        kd = mean_divergence(
            DIVERGENCES[config.divergence],
            student_logits,
            teacher_logits,
            labels,
            temperature=config.temperature,
        )
        return {"loss": config.ce_weight * ce + config.kd_weight * kd, "ce": ce, "kd": kd}
