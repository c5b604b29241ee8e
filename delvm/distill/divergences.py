"""Two sets of logits -> how far the student's distribution is from the teacher's, token by token.

Pure functions; `mean_divergence` adds temperature, mask and mean. Every divergence

- takes student and teacher logits (..., codes) of any float type and computes in float32, or in float64 for
  float64 logits; log-probabilities over fewer buckets, say k codes and all the rest, do as well as logits;
- gives (...) in nats, at least 0 up to rounding, and 0 where both distributions are equal;
- sends its gradient into the student alone: the teacher's side is a constant;
- is finite, and so is its gradient, where either side rules codes out by logits of -inf.

In the formulas p is the teacher's distribution and q the student's.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q): the student covers what the teacher does (Hinton et al. 2015; DeLVM, Guo et al. 2024)."""
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(q || p): the student keeps to the teacher's modes (MiniLLM, Gu et al. 2024).

    A teacher's probability below the type's smallest normal number counts as that (float32: 1e-38, 87 nats).
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    # unlike forward KL's, its gradient grows with -log p: one code that the teacher rules out would drown all
    return _kl(log_q, log_p.clamp_min(math.log(torch.finfo(log_p.dtype).tiny)))


def jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, beta: float = 0.5) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024).

    Jensen and Shannon's divergence, at most ln 2, for beta 0.5. It fades to 0 at either end of beta; only
    divided by beta (1 - beta) does it go to forward KL for beta -> 0 and to reverse KL for beta -> 1.

    Raises:
        ValueError: beta is not above 0 and below 1.
    """
    _check_parameter("beta", beta)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    log_m = _log_mixture(beta, log_p, log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, alpha: float = 0.1
) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q), at most -ln alpha (DistiLLM, Ko et al. 2024).

    It goes to forward KL for alpha -> 0.

    Raises:
        ValueError: alpha is not above 0 and below 1.
    """
    _check_parameter("alpha", alpha)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_p, _log_mixture(alpha, log_p, log_q))


def skew_reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, alpha: float = 0.1
) -> torch.Tensor:
    """KL(q || alpha q + (1 - alpha) p), at most -ln alpha (DistiLLM, Ko et al. 2024).

    It goes to reverse KL for alpha -> 0.

    Raises:
        ValueError: alpha is not above 0 and below 1.
    """
    _check_parameter("alpha", alpha)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_q, _log_mixture(alpha, log_q, log_p))


def total_variation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Half the sum of |p - q|, at most 1 (Wen et al. 2023). Codes where p = q give no gradient."""
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def taid(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, blend: float = 1.0) -> torch.Tensor:
    """KL(r || q) with r the softmax of (1 - blend) student + blend teacher logits (TAID, Shing et al. 2025).

    r is a constant like p. Training raises blend: 0 teaches nothing, 1 is forward KL.

    Raises:
        ValueError: blend is not in 0..1.
    """
    _check_parameter("blend", blend)
    # finite before the product: 0 times -inf would be NaN
    student, teacher = _finite(_upcast(student_logits.detach())), _finite(_upcast(teacher_logits))
    return forward_kl(student_logits, (1 - blend) * student + blend * teacher)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "taid": taid,
}


def make_divergence(name: str, **parameters: float) -> Divergence:
    """The divergence of that name, with its parameters bound: `make_divergence("jsd", beta=0.1)`.

    Raises:
        ValueError: an unknown name, a parameter that this divergence does not take or that is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: '{name}' is unknown; choices: {', '.join(DIVERGENCES)}")
    divergence = DIVERGENCES[name]
    arguments = inspect.signature(divergence).parameters.values()
    choices = [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    for key, value in parameters.items():
        if key not in choices:
            raise ValueError(f"{key}: {name} does not take it; choices: {', '.join(choices) or 'none'}")
        _check_parameter(key, value)
    return partial(divergence, **parameters) if parameters else divergence


def check_temperature(temperature: float | torch.Tensor) -> None:
    """Refuse one for all tokens that is not above 0; those by token are not looked at.

    Raises:
        ValueError: it is not.
    """
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        return
    if not temperature > 0:
        raise ValueError(f"temperature: {float(temperature)} must be above 0")


def mean_divergence(
    divergence: Divergence,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The mean over labelled tokens of T² times `divergence` at temperature T.

    T² keeps the gradient's size as T grows (Hinton et al. 2015).

    Args:
        student_logits, teacher_logits: (..., codes), the logits that predict `labels`.
        labels: (...) int64, already shifted; `ignore_index` leaves a token out.
        temperature: T above 0, for all tokens or (...) float, one for each label.

    Returns:
        A scalar; 0 with a graph where every label is ignored.

    Raises:
        ValueError: another number of codes on either side, or of temperatures than of labels; a temperature
            for all tokens that is not above 0.
    """
    check_temperature(temperature)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"vocabulary: the student has {student_logits.shape[-1]} ids,"
            f" the teacher {teacher_logits.shape[-1]}"
        )
    valid = labels != ignore_index
    ignored = ~valid.unsqueeze(-1)
    divisor = temperature
    if isinstance(temperature, torch.Tensor):
        if temperature.shape != labels.shape:
            raise ValueError(
                f"temperature: shape {tuple(temperature.shape)}, the labels have {tuple(labels.shape)}"
            )
        divisor = temperature.unsqueeze(-1).masked_fill(ignored, 1.0)
    # ignored logits go before anything is computed from them: 0 times NaN would still be NaN in the gradient
    student, teacher = (
        _upcast(logits.masked_fill(ignored, 0.0)) / divisor for logits in (student_logits, teacher_logits)
    )
    # mean over labelled tokens: padding would dilute the KD term
    per_token = divergence(student, teacher).masked_fill(~valid, 0.0)
    if isinstance(divisor, torch.Tensor):
        total = (divisor.squeeze(-1) ** 2 * per_token).sum()
    else:
        total = divisor**2 * per_token.sum()
    return total / valid.sum().clamp_min(1)


def _check_parameter(key: str, value: float) -> None:
    if key == "blend":
        if not 0 <= value <= 1:
            raise ValueError(f"blend: {value} must be in 0..1")
    elif not 0 < value < 1:
        ends = {"beta": "jsd is 0 at both", "alpha": "0 is the plain KL, at 1 all is 0"}
        raise ValueError(
            f"{key}: {value} must be above 0 and below 1 ({ends[key]}); choices there: forward_kl, reverse_kl"
        )


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_mixture(weight: float, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """log(weight p + (1 - weight) q), without leaving log space: small probabilities do not underflow."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _log_probabilities(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log q, log p), both finite, the teacher's a constant."""
    log_q, log_p = (
        _finite(torch.log_softmax(_upcast(logits), dim=-1))
        for logits in (student_logits, teacher_logits.detach())
    )
    return log_q, log_p


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """-inf as a number so low that its probability is exactly 0, so that 0 log 0 is 0 and never NaN.

    A root of the type's largest number: a sum over any number of such tokens stays finite as well.
    """
    return logits.clamp_min(-(torch.finfo(logits.dtype).max ** 0.5))


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: a bf16 logsumexp is off in the third digit."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
