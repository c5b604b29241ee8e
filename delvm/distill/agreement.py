"""Hidden states of student and teacher -> how far they agree, token by token."""

from collections.abc import Sequence

import torch

from delvm.distill.divergences import forward_kl

BANDS = 4
"""Parts of a picture, from its first tokens in raster order to its last, that scores are told for."""


@torch.no_grad()
def agreement(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    chunk_size: int = 512,
) -> dict[str, torch.Tensor]:
    """Scores of every token at temperature 1, in float32.

    Args:
        student_hidden, teacher_hidden: (tokens, width), each of its own width.
        student_head, teacher_head: (codes, width).
        chunk_size: tokens whose logits are held at once.

    Returns:
        (tokens,) each: `kl`, KL(teacher || student) in nats; `agreement`, 1 where both find the same code the
        likeliest; `student_entropy` and `teacher_entropy` in nats.
    """
    parts = []
    for one, two in zip(student_hidden.split(chunk_size), teacher_hidden.split(chunk_size), strict=True):
        student, teacher = (one @ student_head.T).float(), (two @ teacher_head.T).float()
        parts.append(
            torch.stack(
                [
                    forward_kl(student, teacher),
                    (student.argmax(-1) == teacher.argmax(-1)).float(),
                    _entropy(student),
                    _entropy(teacher),
                ]
            )
        )
    names = ("kl", "agreement", "student_entropy", "teacher_entropy")
    return dict(zip(names, torch.cat(parts, dim=1), strict=True))


def by_group(
    scores: dict[str, torch.Tensor],
    tasks: torch.Tensor,
    places: torch.Tensor,
    valid: torch.Tensor,
    names: Sequence[str],
) -> dict[str, float]:
    """Means of scores over labelled tokens, by task and by place in the picture.

    Args:
        scores: (tokens,) each.
        tasks: (tokens,) index into `names`.
        places: (tokens,) where in its picture a token stands, -1 for none.
        valid: (tokens,) bool.
        names: of the tasks.

    Returns:
        `SCORE/TASK`, and `SCORE/part N` for the N-th of BANDS parts of a picture; groups that have no token
        are left out.
    """
    size = int(places.max()) + 1
    groups = {name: tasks == index for index, name in enumerate(names)}
    for band in range(BANDS):
        groups[f"part {band + 1}"] = (places >= 0) & (places * BANDS // max(1, size) == band)
    groups = {name: chosen & valid for name, chosen in groups.items()}
    return {
        f"{score}/{name}": values[chosen].mean().item()
        for score, values in scores.items()
        for name, chosen in groups.items()
        if chosen.any()
    }


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
