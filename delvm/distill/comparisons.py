"""A chunk's logits and what the teacher says of its tokens -> divergences and their gradients, in place.

What `delvm.distill.fused` does between a chunk's projection and its gradients on head and hidden states.
"""

from dataclasses import dataclass

import torch

from delvm.distill.divergences import Divergence


@dataclass
class Student:
    """The student's distributions at a chunk's tokens, in buffers: who compares them may overwrite both."""

    logits: torch.Tensor
    """(rows, codes), at the temperature of the comparison."""
    probabilities: torch.Tensor
    """Their softmax; a comparison turns it into (1 - share) probabilities + share dD/dlogits."""
    top: torch.Tensor
    log_sum: torch.Tensor
    """(rows, 1): log-probabilities are logits - top - log_sum; in this order a sure code keeps its digits."""
    share: torch.Tensor | None
    """(rows, 1), the divergence's share of the gradient; None: nobody asks for a gradient."""

    @classmethod
    def of(cls, logits: torch.Tensor, share: torch.Tensor | None, *, out: torch.Tensor) -> "Student":
        """The student with these logits; its probabilities go to `out`."""
        return cls(logits, out, *_softmax(logits, out=out), share)

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, k) int64 -> (rows, k)."""
        return self.logits.gather(-1, ids) - self.top - self.log_sum


def compare_forward_kl(student: Student, teacher_logits: torch.Tensor) -> torch.Tensor:
    """`divergences.forward_kl` of finite logits, (rows,), and its gradient, one exp a code and model.

    teacher_logits: (rows, codes), overwritten.
    """
    # KL(p || q) = sum p (log p - log q): the difference of the logits less that of their normalisers; of the
    # tops before the product, for p sums to 1 no better than it is rounded
    difference = torch.sub(teacher_logits, student.logits, out=student.logits)
    top, log_sum = _softmax(teacher_logits, out=teacher_logits)
    difference.sub_(top - student.top)
    values = difference.mul_(teacher_logits).sum(-1, keepdim=True)
    if student.share is not None:
        student.probabilities.addcmul_(teacher_logits, student.share, value=-1)  # dD/dlogits = q - p
    return (values - (log_sum - student.log_sum)).squeeze(-1)


def compare_logits(divergence: Divergence, student: Student, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Any divergence, (rows,), and its gradient. teacher_logits: (rows, codes)."""
    values, gradient = _differentiate(divergence, student.logits, teacher_logits, student.share is not None)
    if student.share is not None:
        student.probabilities.lerp_(gradient, student.share)
    return values


def compare_buckets(
    divergence: Divergence, student: Student, ids: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """`divergence` over k codes and one bucket for all others, (rows,), and its gradient.

    ids, probabilities: (rows, k), distinct ids and the teacher's probabilities of them.
    """
    known = student.probabilities.gather(-1, ids)
    # the rest is summed: 1 - the known ones would have no digits left where these are nearly all
    rest = student.probabilities.scatter_(-1, ids, 0.0).sum(-1, keepdim=True)
    rest = rest.clamp_min(torch.finfo(rest.dtype).tiny)
    values, gradient = _differentiate(
        divergence,
        torch.cat([student.log_probabilities(ids), rest.log()], -1),
        with_rest(probabilities).log(),
        student.share is not None,
    )
    if student.share is not None:
        keep, share = 1 - student.share, student.share
        # the bucket's gradient reaches its codes by their shares of it
        student.probabilities.mul_(keep + share * gradient[:, -1:] / rest)
        student.probabilities.scatter_(-1, ids, keep * known + share * gradient[:, :-1])
    return values


def compare_drawn(student: Student, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on codes drawn from the teacher, (rows,), and its gradient.

    ids, weights: (rows, k); ids may repeat, weights sum to 1.
    """
    if student.share is not None:
        student.probabilities.scatter_add_(-1, ids, -student.share * weights)
    return -(weights * student.log_probabilities(ids)).sum(-1)


def with_rest(probabilities: torch.Tensor) -> torch.Tensor:
    """(rows, k) probabilities of some codes -> (rows, k + 1), with what they leave of 1 to all others."""
    # rounded by a cache they may sum to a little more than 1
    known = probabilities / probabilities.sum(-1, keepdim=True).clamp_min(1.0)
    return torch.cat([known, (1.0 - known.sum(-1, keepdim=True)).clamp_min(0.0)], -1)


def _differentiate(
    divergence: Divergence, student_logits: torch.Tensor, teacher_logits: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) values and their gradient on the student's logits, (rows, codes) or empty if not `wanted`."""
    if not wanted:
        return divergence(student_logits, teacher_logits), student_logits.new_empty(0)
    with torch.enable_grad():
        student_logits = student_logits.detach().requires_grad_()
        values = divergence(student_logits, teacher_logits)
        (gradient,) = torch.autograd.grad(values.sum(), student_logits)
    return values.detach(), gradient


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax into `out`, which may be `logits`; top and log_sum (rows, 1), see `Student`."""
    top = logits.amax(-1, keepdim=True)
    torch.softmax(logits, -1, out=out)
    return top, -out.amax(-1, keepdim=True).log()  # at the top, log p is -log_sum: no second exp a code
