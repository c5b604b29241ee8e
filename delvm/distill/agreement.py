"""The student's hidden states and what the teacher says -> how far they agree, token by token."""

import math
from collections.abc import Sequence

import torch

from delvm.distill.comparisons import with_rest
from delvm.distill.divergences import forward_kl
from delvm.distill.fused import CHUNK

BANDS = 4
"""Parts of a picture, from its first tokens in raster order to its last, that scores are told for."""

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""The log-probability of a bucket in which no code is left."""


@torch.no_grad()
def agreement(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    chunk_size: int = CHUNK,
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
    chunks = []
    for one, two in zip(student_hidden.split(chunk_size), teacher_hidden.split(chunk_size), strict=True):
        student, teacher = (one @ student_head.T).float(), (two @ teacher_head.T).float()
        chunks.append(
            {
                "kl": forward_kl(student, teacher),
                "agreement": (student.argmax(-1) == teacher.argmax(-1)).float(),
                "student_entropy": _entropy(student),
                "teacher_entropy": _entropy(teacher),
            }
        )
    return _joined(chunks)


@torch.no_grad()
def sparse_agreement(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    *,
    tail: bool,
    temperature: float,
    chunk_size: int = CHUNK,
) -> dict[str, torch.Tensor]:
    """What a few of the teacher's codes tell of every token, in float32.

    Args:
        student_hidden, student_head: as of `agreement`.
        ids, probabilities: (tokens, k), the teacher's, at `temperature`.
        tail: whether these are its likeliest codes, or drawn ones (`delvm.distill.teacher.Sparse`).
        temperature: of both sides, save where it says otherwise.
        chunk_size: tokens whose logits are held at once.

    Returns:
        (tokens,) each: `student_entropy` in nats at temperature 1, as `agreement` has it; and of

        - the likeliest codes `agreement`, the same as there; `bucket_kl`, KL(teacher || student) over the k
          codes and one bucket for all others, and `teacher_bucket_entropy` over these, in nats: at most, and
          mostly below, what they are over all codes;
        - drawn codes `drawn_cross_entropy` of the student on them, in nats: in the mean over draws the KL and
          the teacher's entropy together.
    """
    chunks = []
    for hidden, codes, given in zip(
        student_hidden.split(chunk_size), ids.split(chunk_size), probabilities.split(chunk_size), strict=True
    ):
        logits, codes = (hidden @ student_head.T).float(), codes.long()
        scores = {"student_entropy": _entropy(logits)}
        log_q = (logits / temperature).log_softmax(-1)
        known = log_q.gather(-1, codes)
        if tail:
            rest = log_q.scatter(-1, codes, -torch.inf).logsumexp(-1, keepdim=True).clamp_min(LEAST)
            log_p = with_rest(given.float()).log()
            likeliest = codes.gather(-1, given.argmax(-1, keepdim=True)).squeeze(-1)
            scores["agreement"] = (logits.argmax(-1) == likeliest).float()
            scores["bucket_kl"] = forward_kl(torch.cat([known, rest], -1), log_p)
            scores["teacher_bucket_entropy"] = _entropy(log_p)
        else:
            scores["drawn_cross_entropy"] = -(given * known).sum(-1)
        chunks.append(scores)
    return _joined(chunks)


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


def _joined(chunks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([scores[name] for scores in chunks]) for name in chunks[0]}


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    log_probabilities = logits.log_softmax(-1)
    return torch.special.entr(log_probabilities.exp()).sum(-1)  # which is 0 where a probability is
