"""Two sets of logits -> how far the student's distribution is from the teacher's, token by token.

Pure functions: logits in, one number a token out; `mean_divergence` adds temperature, mask and mean.
"""

from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats (Hinton et al. 2015; DeLVM, Guo et al. 2024).

    Args:
        student_logits: (..., codes) float; the gradient flows into these.
        teacher_logits: (..., codes) float; -inf marks a code that the teacher rules out.

    Returns:
        (...) float32, or float64 for float64 logits; at least 0 up to rounding.
    """
    log_student = _log_softmax(student_logits)
    log_teacher = _log_softmax(teacher_logits)
    # a code of teacher probability 0 adds nothing (0 log 0); without the mask 0 times -inf turns into NaN
    ruled_out = log_teacher == -torch.inf
    # a student's -inf under a live teacher would make the loss infinite and its gradient NaN
    # (a root, so that the sum over any number of such tokens stays finite as well)
    floor = -(torch.finfo(log_student.dtype).max ** 0.5)
    difference = (log_teacher - log_student.clamp_min(floor)).masked_fill(ruled_out, 0.0)
    return (log_teacher.exp() * difference).sum(-1)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl}


def mean_divergence(
    divergence: Divergence,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """T² times the mean over labelled tokens of `divergence` at temperature T.

    T² keeps the gradient's size as T grows (Hinton et al. 2015).

    Args:
        student_logits, teacher_logits: (..., codes), the logits that predict `labels`.
        labels: (...) int64, already shifted; `ignore_index` leaves a token out.

    Returns:
        A scalar; 0 with a graph where every label is ignored.

    Raises:
        ValueError: another number of codes on either side.
    """
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"vocabulary: the student has {student_logits.shape[-1]} ids,"
            f" the teacher {teacher_logits.shape[-1]}"
        )
    valid = labels != ignore_index
    # ignored logits go before anything is computed from them: 0 times NaN would still be NaN in the gradient
    ignored = ~valid.unsqueeze(-1)
    student, teacher = (
        _upcast(logits.masked_fill(ignored, 0.0)) / temperature for logits in (student_logits, teacher_logits)
    )
    # mean over labelled tokens: padding would dilute the KD term
    per_token = divergence(student, teacher).masked_fill(~valid, 0.0)
    return temperature**2 * per_token.sum() / valid.sum().clamp_min(1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(_upcast(logits), dim=-1)


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: a bf16 logsumexp is off in the third digit."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
