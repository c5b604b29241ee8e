"""Visual sentences and a teacher -> a student: CE on the labels plus KD on the teacher's distribution."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM

from delvm.distill.agreement import agreement, by_group, sparse_agreement
from delvm.distill.divergences import DIVERGENCES, Divergence, make_divergence
from delvm.distill.fused import fused_cross_entropy, fused_kd_loss, fused_sparse_kd_loss
from delvm.distill.layers import LAYERS
from delvm.distill.on_policy import (
    OnPolicyConfig,
    confidence,
    continue_pictures,
    last_picture,
    on_policy_step,
)
from delvm.distill.teacher import PRECISIONS, Hidden, Live, Signal, serves
from delvm.errors import UserError
from delvm.pretrain import IGNORED, Pretrain, PretrainConfig, Step, forward_flops
from delvm.tokens.sentences import ANNOTATION

COURSES = ("linear", "cosine")
STARTS = ("random", "slice", "embedding", "checkpoint")


@dataclass
class DistillConfig(PretrainConfig):
    """A student and its training: `ce_weight * CE + kd_weight * T² * divergence` (DeLVM: 1, 1, T 1).

    A weight with an `_end` goes from the one at the first step to the other at the last.
    """

    size: str = "80m"
    start: str = "random"
    """Its first weights: `random`; of the teacher, what fits into it (`slice`) or embedding and head alone
    (`embedding`); or another model's of its size (`checkpoint`)."""
    start_folder: str = ""
    """checkpoint: a transformers folder."""
    start_layers: str = "greedy"
    """slice: the teacher's layers that stay, where the student has fewer: those without which its loss rises
    most (`greedy`), or evenly spaced ones (`even`), which takes no time."""
    start_tokens: int = 12_000
    """slice, embedding: tokens of training rows that the teacher is observed on."""
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    ce_weight_end: float | None = None
    kd_weight_end: float | None = None
    course: str = "linear"
    """How weights, and taid's blend, go to their ends: `linear` or `cosine`."""
    divergence: str = "forward_kl"
    """A name from `delvm.distill.divergences.DIVERGENCES`."""
    divergence_settings: dict[str, float] = field(default_factory=dict)
    """`beta` of jsd, `alpha` of skew_kl and skew_reverse_kl; else the papers'."""
    blend: float = 0.4
    """taid: the teacher's part in its target at the first step; it ends at `blend_end`."""
    blend_end: float = 1.0
    temperature: float = 1.0
    kd_on: str = "all"
    """The tokens that learn from the teacher: `all`, or those of `annotations` alone."""
    task_ce_weights: dict[str, float] = field(default_factory=dict)
    """By task, times `ce_weight`; 1 where none is given."""
    task_kd_weights: dict[str, float] = field(default_factory=dict)
    """By task, times `kd_weight`."""
    task_temperatures: dict[str, float] = field(default_factory=dict)
    """By task, in place of `temperature`."""
    teacher_precision: str = "auto"
    """Of a live teacher: `32`, `bf16`, or `auto`, bf16 where training is bf16-mixed."""
    teacher_sharded: bool = False
    """Share a live teacher's layers among the processes (FSDP): less memory, slower. One process has all."""
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, choices in (
            ("start", STARTS),
            ("start_layers", LAYERS),
            ("course", COURSES),
            ("kd_on", ("all", "annotations")),
            ("teacher_precision", ("auto", *PRECISIONS)),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")
        if bool(self.start_folder) != (self.start == "checkpoint"):
            raise ValueError(
                f"start_folder: '{self.start_folder}' with start '{self.start}'; start: checkpoint needs one,"
                " no other takes one"
            )
        if self.start != "random" and self.embedding != "learned":
            raise ValueError(
                f"embedding: '{self.embedding}' with start '{self.start}', which has an embedding; choose"
                " embedding: learned or start: random"
            )
        if self.start_tokens < 1:
            raise ValueError(f"start_tokens: {self.start_tokens} must be at least 1")
        temperatures = {"temperature": self.temperature} | _named(self, "task_temperatures")
        for key, value in temperatures.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{key}: {value} must be above 0 and finite")
        ends = {key: getattr(self, key) for key in ("ce_weight_end", "kd_weight_end")}
        weights = {"ce_weight": self.ce_weight, "kd_weight": self.kd_weight}
        weights |= {key: value for key, value in ends.items() if value is not None}
        weights |= _named(self, "task_ce_weights") | _named(self, "task_kd_weights")
        for key, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{key}: {value} must be at least 0 and finite")
        if not (self.ce_weight or self.kd_weight or self.ce_weight_end or self.kd_weight_end):
            raise ValueError("ce_weight, kd_weight: both are 0, nothing would be learnt")
        for key in ("blend", "blend_end"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1")
        if "blend" in self.divergence_settings:
            raise ValueError("divergence_settings.blend: it changes by the step; give blend and blend_end")
        self.make_divergence(0.0)
        if self.on_policy.share and not self.learns_from_teacher:
            raise ValueError("on_policy.share: of its own pictures a student learns by kd_weight, which is 0")

    @property
    def learns_from_teacher(self) -> bool:
        """Whether any step has a KD term."""
        return bool(self.kd_weight or self.kd_weight_end)

    def without_effect(self) -> list[str]:
        """What is set otherwise than by default and changes nothing, a line each."""
        taid = self.divergence == "taid"
        changes = taid or self.ce_weight_end is not None or self.kd_weight_end is not None
        of_teacher = ["divergence", "divergence_settings", "temperature", "kd_on", "task_kd_weights",
                      "task_temperatures", "teacher_precision", "teacher_sharded"]  # fmt: skip
        needs = [  # settings, whether they have an effect, what they need
            (["decay"], self.schedule == "wsd", "schedule: wsd"),
            (["blend", "blend_end"], taid, "divergence: taid"),
            (["course"], changes, "a weight with an end, or taid"),
            (["start_layers"], self.start == "slice", "start: slice"),
            (["start_tokens"], self.start in ("slice", "embedding"), "start: slice or embedding"),
            (of_teacher, self.learns_from_teacher, "kd_weight"),
        ]
        usual = DistillConfig()
        found = [
            f"{key}: {getattr(self, key)} has no effect without {need}"
            for keys, effective, need in needs
            for key in keys
            if not effective and getattr(self, key) != getattr(usual, key)
        ]
        if not self.on_policy.share and self.on_policy != usual.on_policy:
            found.append("on_policy: has no effect without on_policy.share")
        return found

    def make_divergence(self, progress: float) -> Divergence:
        """The divergence at `progress` in 0..1 of the training. Raises ValueError for wrong settings."""
        settings = dict(self.divergence_settings)
        if self.divergence == "taid":
            settings["blend"] = scheduled(self.blend, self.blend_end, progress, self.course)
        try:
            return make_divergence(self.divergence, **settings)
        except ValueError as error:
            where = "" if self.divergence not in DIVERGENCES else "divergence_settings."
            raise ValueError(f"{where}{error}") from error


def scheduled(start: float, end: float | None, progress: float, course: str) -> float:
    """What goes from `start` to `end` as progress goes from 0 to 1; `start` all along where `end` is None."""
    if end is None:
        return start
    part = 0.5 * (1 - math.cos(math.pi * progress)) if course == "cosine" else progress
    return start + (end - start) * part


class Distill(Pretrain):
    """The student's training.

    Batches as `Pretrain`'s; with `tasks`, `roles` and `places` where a setting or what is told goes by them,
    and with what a cached signal reads.

    Args:
        model: the student.
        signal: where the teacher's distribution comes from.
        config: objective and optimizer.
        tasks: their names, by the index that `tasks` of a batch has.
        num_codes: ids from here up are no codes; 0 for none.

    Raises:
        UserError: student and teacher have different vocabularies; the signal does not serve the objective.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        signal: Signal,
        config: DistillConfig,
        tasks: Sequence[str] = (),
        num_codes: int = 0,
    ) -> None:
        super().__init__(model, config, config.steps, tasks)
        if model.config.vocab_size != signal.vocabulary:
            raise UserError(
                f"student: vocabulary of {model.config.vocab_size} ids, the teacher's has"
                f" {signal.vocabulary}; both must speak the codes of one tokenizer"
            )
        serves(signal.kind, config.divergence)
        for temperature in (config.temperature, *config.task_temperatures.values()):
            if signal.temperature not in (None, temperature):
                raise UserError(
                    f"temperature: {temperature}, the teacher's cache was written at {signal.temperature}"
                )
        if config.on_policy.share and signal.kind != "live":
            raise UserError("on_policy: the student's own pictures need a live teacher, there is a cache")
        self.distill, self.signal = config, signal
        self.num_codes = num_codes or model.config.vocab_size

    def on_fit_start(self) -> None:
        if self.distill.learns_from_teacher:  # else it never runs
            self.signal.to(self.device)

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return min(1.0, self.global_step / max(1, self.steps - 1))

    def count(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        counts, step = super().count(batch), Step.of(batch)
        if self.distill.kd_on == "annotations":
            counts["num_kd_targets"] = int((step.valid & (step.of_targets("roles") == ANNOTATION)).sum())
        if self.distill.on_policy.share:
            valid = step.valid.view(step.inputs.shape)
            picture = last_picture(batch["places"])
            own = valid[:, picture.start - 1 : picture.stop - 1]  # labels stand one further left
            counts["num_true_targets"] = int(valid.sum() - own.sum())
        return counts

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self.distill.on_policy
        if not on_policy_step(self.global_step, own.share):
            return super().training_step(batch)
        # of step and micro-batch alone, so that a run that stops and goes on draws the same
        seed = self.global_step * 1_000_003 + int(batch["tokens"].sum())
        parts = super().training_step(
            continue_pictures(
                self.model, batch, temperature=own.temperature, num_codes=self.num_codes, seed=seed
            )
        )
        self._seen = batch  # what is told of a training is told of true rows
        return parts

    def losses(self, step: Step, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        config, head = self.distill, self.model.lm_head.weight
        ce_weight = scheduled(config.ce_weight, config.ce_weight_end, self.progress, config.course)
        kd_weight = scheduled(config.kd_weight, config.kd_weight_end, self.progress, config.course)
        ce_weights = self.by_task(
            step, ce_weight, {k: ce_weight * v for k, v in config.task_ce_weights.items()}
        )
        num_targets = step.batch.get("num_targets")
        if not config.learns_from_teacher:  # the teacher would run for nothing
            loss, parts = fused_cross_entropy(
                hidden, head, step.labels, ce_weight=ce_weights, num_targets=num_targets
            )
            return {"loss": loss, **parts}
        only = config.kd_on == "annotations"
        options: dict[str, Any] = {
            "divergence": config.make_divergence(self.progress),
            "temperature": self.by_task(step, config.temperature, config.task_temperatures),
            "ce_weight": ce_weights,
            "kd_weight": self.by_task(
                step, kd_weight, {k: kd_weight * v for k, v in config.task_kd_weights.items()}
            ),
            "num_targets": num_targets,
            "kd_mask": step.of_targets("roles") == ANNOTATION if only else None,
            "num_kd_targets": step.batch.get("num_kd_targets") if only else num_targets,
        }
        target = self.signal.targets(step.batch)
        drawn = step.of_targets("drawn") if "drawn" in step.batch else None
        if drawn is not None:
            assert isinstance(target, Hidden)
            options["ce_weight"] = ce_weights * ~drawn  # no code is the true one there
            if config.on_policy.confidence:
                sure = confidence(target.hidden, target.head) >= config.on_policy.confidence
                options["kd_weight"] = options["kd_weight"] * (sure | ~drawn)
        if isinstance(target, Hidden):
            loss, parts = fused_kd_loss(hidden, head, target.hidden, target.head, step.labels, **options)
        else:
            loss, parts = fused_sparse_kd_loss(
                hidden, head, target.ids, target.probabilities, step.labels, tail=target.tail, **options
            )
        if drawn is not None:  # its curve is that of true codes, as any other model's
            true, num_true = step.labels.masked_fill(drawn, IGNORED), step.batch.get("num_true_targets")
            parts |= fused_cross_entropy(hidden.detach(), head.detach(), true, num_targets=num_true)[1]
        return {"loss": loss, **parts}

    def by_task(self, step: Step, value: float, values: Mapping[str, float]) -> float | torch.Tensor:
        """`value` for all tokens, or (tokens,) where some tasks have one of their own."""
        if not values:
            return value
        table = torch.tensor([values.get(task, value) for task in self.tasks], device=step.labels.device)
        return table[step.of_targets("tasks")]

    @property
    def flops_per_token(self) -> float:
        if not (isinstance(self.signal, Live) and self.distill.learns_from_teacher):
            return super().flops_per_token
        return super().flops_per_token + forward_flops(self.signal.model, self.row_length)

    @torch.no_grad()
    def diagnose(self) -> dict[str, float]:
        """`loss/TASK`; and by task and part of the picture how far student and teacher agree.

        A live teacher tells `agreement`'s scores, a cache what `sparse_agreement` gets of it.
        """
        found, batch = super().diagnose(), self._seen
        # no question of what is labelled here: of a sharded teacher all processes must ask
        if batch is None or "tasks" not in batch or not self.distill.learns_from_teacher:
            return found
        step, target = Step.of(batch), self.signal.targets(batch)
        student = self.hidden(step), self.model.lm_head.weight
        if isinstance(target, Hidden):
            scores = agreement(*student, target.hidden, target.head)
        else:
            assert self.signal.temperature is not None
            scores = sparse_agreement(
                *student, target.ids, target.probabilities, tail=target.tail,
                temperature=self.signal.temperature,
            )  # fmt: skip
        tasks, places = step.of_targets("tasks"), step.of_targets("places")
        return found | by_group(scores, tasks, places, step.valid, self.tasks)


def _named(config: DistillConfig, key: str) -> dict[str, float]:
    return {f"{key}.{task}": value for task, value in getattr(config, key).items()}
