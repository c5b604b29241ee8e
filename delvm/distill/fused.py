"""Hidden states and heads -> the loss over a batch, chunk by chunk, without the logits of the batch.

With codes by the thousand, the logits of both models and their gradients are the largest tensors of a step.
Here a chunk of tokens is projected, compared and differentiated before the next one takes over its buffers
(as in Liger Kernel, Hsu et al. 2024); the backward pass only scales gradients that the forward pass has made.
Values and gradients are those of the plain losses: cross-entropy and `divergences.mean_divergence`. Logits
must be finite, as those of finite states and heads are; the plain losses take -inf too.

The arguments that all three losses share:

    hidden: (tokens, width) float, what the head is applied to.
    head: (codes, width) float, a weight without bias; tied, free, or frozen (no gradient, no work for one).
    labels: (tokens,) int64 in 0..codes-1, already shifted; `ignore_index` leaves a token out. What its row of
        any other argument holds does not matter, and it costs nothing.
    ce_weight, kd_weight, temperature: a number, or (tokens,) float, one for each token.
    chunk_size: tokens whose logits are held at a time.
    num_targets, num_kd_targets: what the sums over tokens are divided by, a number or a scalar tensor: the
        tokens of all ranks and micro-batches where a step has several. None: those found here, at least 1;
        of the divergence num_targets, where no kd_mask makes them others.

A head's matmuls run in autocast's type where autocast is on, else in the head's own; all else is float32 (or
float64 for float64 inputs), and so are the sums over chunks. A gradient has the type of what it belongs to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.function import once_differentiable

from delvm.distill.comparisons import (
    Student,
    compare_buckets,
    compare_drawn,
    compare_forward_kl,
    compare_logits,
)
from delvm.distill.divergences import Divergence, check_temperature, forward_kl, make_divergence

CHUNK = 512
"""Tokens whose logits are held at a time, unless a caller says."""

Number = float | torch.Tensor
Rows = slice | torch.Tensor
"""The tokens of a chunk: a slice, or (chunk,) int64 where ignored tokens lie in between."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A compiled model breaks its graph here: gradients made early in shared buffers are not for tracing."""
    return torch.compiler.disable(function)


@_eager
def fused_kd_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    labels: torch.Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    ce_weight: Number = 1.0,
    kd_weight: Number = 1.0,
    ignore_index: int = -100,
    chunk_size: int = CHUNK,
    num_targets: Number | None = None,
    kd_mask: torch.Tensor | None = None,
    num_kd_targets: Number | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ce_weight` CE + `kd_weight` T² divergence at temperature T, from a teacher's hidden states.

    Args, beside those at the top of this file:
        teacher_hidden, teacher_head: (tokens, its width), (codes, its width); constants, of any float type.
        divergence: a name of `divergences.DIVERGENCES`, or such a function.
        kd_mask: (tokens,) bool, False keeps a labelled token out of the divergence.

    Returns:
        The loss, a scalar (0 with a graph where every label is ignored), and its parts `ce` and `kd` (T²
        included) without weights and without a graph.

    Raises:
        ValueError: another number of codes on either side, of tokens in any argument; an unknown divergence.
    """
    terms = _Terms(
        ignore_index, chunk_size, ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature,
        num_targets=num_targets, kd_mask=kd_mask, num_kd_targets=num_kd_targets,
    )  # fmt: skip
    if len(student_head) != len(teacher_head):
        raise ValueError(
            f"vocabulary: the student has {len(student_head)} ids, the teacher {len(teacher_head)}"
        )
    _check_length("teacher_hidden", teacher_hidden, labels)
    chosen = make_divergence(divergence) if isinstance(divergence, str) else divergence
    dtype = _working_dtype(student_hidden, student_head)
    project = _Projection(teacher_head, min(chunk_size, len(labels)), dtype)

    def compare(student: Student, rows: Rows, temperature: torch.Tensor | None) -> torch.Tensor:
        hidden = teacher_hidden.detach()[rows]
        if kd_mask is not None:  # these rows may hold anything, and 0 times NaN would be NaN
            hidden = hidden.masked_fill(~kd_mask[rows].unsqueeze(-1), 0.0)
        logits = project(hidden)
        if temperature is not None:
            logits.div_(temperature)
        if chosen is forward_kl:
            return compare_forward_kl(student, logits)
        return compare_logits(chosen, student, logits)

    return _fused(student_hidden, student_head, labels, terms, compare)


@_eager
def fused_sparse_kd_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    *,
    tail: bool,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    ce_weight: Number = 1.0,
    kd_weight: Number = 1.0,
    ignore_index: int = -100,
    chunk_size: int = CHUNK,
    num_targets: Number | None = None,
    kd_mask: torch.Tensor | None = None,
    num_kd_targets: Number | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`fused_kd_loss` from a few codes of the teacher's instead of all, as a cache holds them.

    Args, beside those at the top of this file and of `fused_kd_loss`:
        ids: (tokens, k) integers in 0..codes-1.
        probabilities: (tokens, k) float, of these codes at `temperature`.
        tail: True: a token's ids are distinct, say the k likeliest. What their probabilities leave of 1 is
            one more bucket, and the divergence is one over k+1 buckets; without it the student would learn
            that no other code is possible.
            False: the ids are drawn from the teacher and may repeat, the probabilities are weights that sum
            to 1. The term is the student's cross-entropy on them: forward KL plus the teacher's entropy in
            expectation, so that the gradient is unbiased (random sampling KD, Anshumann et al. 2025).

    Returns, Raises:
        As `fused_kd_loss`, save that ids are not looked at; ValueError also for another divergence than
        forward_kl where tail is False.
    """
    terms = _Terms(
        ignore_index, chunk_size, ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature,
        num_targets=num_targets, kd_mask=kd_mask, num_kd_targets=num_kd_targets,
    )  # fmt: skip
    if ids.shape != probabilities.shape:
        raise ValueError(
            f"ids: shape {tuple(ids.shape)}, the probabilities have {tuple(probabilities.shape)}"
        )
    _check_length("ids", ids, labels)
    chosen = make_divergence(divergence) if isinstance(divergence, str) else divergence
    if not tail and chosen is not forward_kl:
        raise ValueError("divergence: codes drawn from the teacher (tail=False) serve forward_kl alone")
    ids, probabilities = ids.long(), probabilities.detach().to(_working_dtype(student_hidden, student_head))
    if kd_mask is not None:  # these rows may hold anything, even what is no id
        ids, probabilities = (x.masked_fill(~kd_mask.unsqueeze(-1), 0) for x in (ids, probabilities))

    def compare(student: Student, rows: Rows, temperature: torch.Tensor | None) -> torch.Tensor:
        if tail:
            return compare_buckets(chosen, student, ids[rows], probabilities[rows])
        return compare_drawn(student, ids[rows], probabilities[rows])

    return _fused(student_hidden, student_head, labels, terms, compare)


@_eager
def fused_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    *,
    ce_weight: Number = 1.0,
    ignore_index: int = -100,
    chunk_size: int = CHUNK,
    num_targets: Number | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ce_weight` CE, and its part `ce` without weights and graph. Args: see the top of this file."""
    terms = _Terms(ignore_index, chunk_size, ce_weight=ce_weight, num_targets=num_targets)
    loss, parts = _fused(hidden, head, labels, terms)
    return loss, {"ce": parts["ce"]}


@dataclass(frozen=True)
class _Terms:
    """What the public functions are asked for, as at the top of this file."""

    ignore_index: int
    chunk_size: int
    ce_weight: Number
    kd_weight: Number = 0.0
    temperature: Number = 1.0
    num_targets: Number | None = None
    kd_mask: torch.Tensor | None = None
    num_kd_targets: Number | None = None

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size: {self.chunk_size} must be at least 1")
        check_temperature(self.temperature)


Comparison = Callable[[Student, Rows, torch.Tensor | None], torch.Tensor]
"""The student at some rows and their temperature, (rows, 1) or None for 1 -> the divergence D, (rows,)."""


class _Projection:
    """A head, and the buffers that every chunk's logits go through: fresh ones are page faults each time."""

    def __init__(self, head: torch.Tensor, rows: int, dtype: torch.dtype) -> None:
        device = head.device.type
        autocast = head.dtype != torch.float64 and torch.is_autocast_enabled(device)
        self.head = head.detach().to(torch.get_autocast_dtype(device) if autocast else head.dtype)
        self.logits = self.head.new_empty(rows, len(head), dtype=dtype)
        # what matmuls of fewer bits write to and read from
        self.low = None if self.head.dtype == dtype else torch.empty_like(self.logits, dtype=self.head.dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, width) -> logits (rows, codes) in the buffer."""
        hidden, logits = hidden.to(self.head.dtype), self.logits[: len(hidden)]
        if self.low is None:
            return torch.mm(hidden, self.head.t(), out=logits)
        return logits.copy_(torch.mm(hidden, self.head.t(), out=self.low[: len(hidden)]))

    def lower(self, gradient: torch.Tensor) -> torch.Tensor:
        """(rows, codes) in the type of the matmuls."""
        return gradient if self.low is None else self.low[: len(gradient)].copy_(gradient)


@dataclass
class _Objective:
    """Logits of some rows -> their losses and gradient. Of every token, (tokens, 1) each, it knows:"""

    compare: Comparison | None
    labels: torch.Tensor
    ce_weight: torch.Tensor
    kd_weight: torch.Tensor
    """Relative to the CE's denominator, by which all is divided in the end."""
    temperature: torch.Tensor | None
    """None: 1 everywhere, and one softmax serves both terms."""
    kd_scale: torch.Tensor
    """T², 0 where a token is kept out of the divergence."""
    weight: torch.Tensor
    """Of a token's whole gradient; put on its products with head and hidden, which have fewer columns."""
    share: torch.Tensor
    """The divergence's share of that weight, 0..1."""
    buffers: tuple[torch.Tensor, ...]
    """(chunk, codes): probabilities at temperature 1, and at T unless it is 1."""

    def __call__(
        self, logits: torch.Tensor, rows: Rows, wanted: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (rows, codes), overwritten -> CE and T² D (rows, 1); the gradient, divided by the weight."""
        labels, share = self.labels[rows], self.share[rows]
        result, *warm = (buffer[: len(logits)] for buffer in self.buffers)
        student = Student.of(logits, share if wanted else None, out=result)
        ce = -student.log_probabilities(labels)
        if self.compare is None:
            kd = torch.zeros_like(ce)
        elif self.temperature is None:
            kd = self.compare(student, rows, None).unsqueeze(-1)
        else:
            temperature = self.temperature[rows]
            logits.div_(temperature)
            student = Student.of(logits, torch.ones_like(share) if wanted else None, out=warm[0])
            kd = self.compare(student, rows, temperature).unsqueeze(-1)
            if wanted:
                result.lerp_(warm[0], share)
        if wanted:
            # CE's gradient: the probabilities, 1 less at the label
            result.scatter_add_(-1, labels, share - 1)
        return ce, kd * self.kd_scale[rows], result


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, head) -> sums over tokens of the weighted loss, CE and T² D."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        chunks: list[Rows],
        project: _Projection,
        objective: _Objective,
    ) -> tuple[torch.Tensor, ...]:
        dtype = project.logits.dtype
        hidden_wanted, head_wanted, *_ = ctx.needs_input_grad
        wanted = hidden_wanted or head_wanted
        # zeros: no chunk writes the rows of ignored tokens
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if hidden_wanted else None
        grad_head = torch.zeros_like(head, dtype=dtype) if head_wanted else None
        low_head = torch.empty_like(project.head) if head_wanted and project.low is not None else None
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)
        for rows in chunks:
            inputs = hidden[rows]
            ce, kd, gradient = objective(project(inputs), rows, wanted)
            loss = objective.ce_weight[rows] * ce + objective.kd_weight[rows] * kd
            sums += torch.cat([loss, ce, kd], -1).sum(0)
            if not wanted:
                continue
            gradient, weight = project.lower(gradient), objective.weight[rows]
            if grad_hidden is not None:
                grad_hidden[rows] = weight * torch.mm(gradient, project.head)
            if grad_head is not None:
                inputs = (weight * inputs).to(project.head.dtype)
                if low_head is None:
                    grad_head.addmm_(gradient.t(), inputs)
                else:
                    grad_head += torch.mm(gradient.t(), inputs, out=low_head)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden.dtype, head.dtype
        loss, ce, kd = (total.clone() for total in sums)
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = (
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)


def _fused(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    terms: _Terms,
    compare: Comparison | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The engine of all three: weights by token, rows by chunk, one pass over them."""
    _check_length("hidden", hidden, labels)
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    dtype, device = _working_dtype(hidden, head), hidden.device

    def scalar(value: Number) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).detach()

    def per_token(name: str, value: Number) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return scalar(value).expand(len(labels), 1)
        _check_length(name, value, labels)
        return value.detach().to(dtype).unsqueeze(-1)

    valid = labels != terms.ignore_index
    num_valid = int(valid.sum())
    chunks: list[Rows] = [slice(i, i + terms.chunk_size) for i in range(0, len(labels), terms.chunk_size)]
    if num_valid < len(labels):
        chunks = list(valid.nonzero().squeeze(-1).split(terms.chunk_size)) if num_valid else []

    taught = valid
    if terms.kd_mask is not None:
        _check_length("kd_mask", terms.kd_mask, labels)
        taught = valid & terms.kd_mask
    excluded = ~taught.unsqueeze(-1)
    num_kd_targets = terms.num_kd_targets
    if num_kd_targets is None and terms.kd_mask is None:
        num_kd_targets = terms.num_targets
    # 0 where a whole optimizer step has no target: 0 / 0 would be NaN
    ce_count, kd_count = (
        count.masked_fill(count == 0, 1.0)
        for count in (
            scalar(num_valid if terms.num_targets is None else terms.num_targets),
            scalar(taught.sum() if num_kd_targets is None else num_kd_targets),
        )
    )
    ce_weights = per_token("ce_weight", terms.ce_weight)
    kd_weights = per_token("kd_weight", terms.kd_weight).masked_fill(excluded, 0.0) * (ce_count / kd_count)
    kd_scale, slope, temperatures = (~excluded).to(dtype), kd_weights, None
    if isinstance(terms.temperature, torch.Tensor) or terms.temperature != 1:
        temperatures = per_token("temperature", terms.temperature).masked_fill(excluded, 1.0)
        kd_scale = kd_scale * temperatures**2
        slope = slope * temperatures  # T² in front, 1/T from logits / T
    weight = ce_weights + slope
    project = _Projection(head, min(terms.chunk_size, max(1, num_valid)), dtype)
    objective = _Objective(
        compare=compare,
        labels=labels.unsqueeze(-1),
        ce_weight=ce_weights,
        kd_weight=kd_weights,
        temperature=temperatures,
        kd_scale=kd_scale,
        weight=weight,
        share=(slope / weight).masked_fill(weight == 0, 0.0),
        buffers=tuple(torch.empty_like(project.logits) for _ in range(1 if temperatures is None else 2)),
    )
    with torch.autocast(device.type, enabled=False):
        loss, ce, kd = _ChunkedLoss.apply(hidden, head, chunks, project, objective)
    return loss / ce_count, {"ce": ce / ce_count, "kd": kd / kd_count}


def _working_dtype(hidden: torch.Tensor, head: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)


def _check_length(name: str, given: torch.Tensor, labels: torch.Tensor) -> None:
    if len(given) != len(labels):
        raise ValueError(f"{name}: {len(given)} tokens, the labels have {len(labels)}")
