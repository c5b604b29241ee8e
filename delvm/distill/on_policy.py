"""Rows -> rows whose last picture is the student's own, for the teacher to judge (Agarwal et al. 2024).

A student that has only seen true rows meets its own mistakes for the first time when it draws a picture. On
its own pictures there is no true code to learn, only the teacher's distribution after each of the student's
codes. Where the teacher itself is unsure on such pictures its distribution misleads: a gate leaves those
tokens out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM

from delvm.distill.fused import CHUNK
from delvm.generation import complete


@dataclass
class OnPolicyConfig:
    """Off by default: a picture is drawn code by code, which costs many times a step."""

    share: float = 0.0
    """Of the steps: in these, all rows end in a picture of the student's own."""
    temperature: float = 1.0
    """At which it is drawn; the loss has its own."""
    confidence: float = 0.0
    """The teacher's highest probability has to reach this for a token of such a picture to count."""

    def __post_init__(self) -> None:
        for key in ("share", "confidence"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"on_policy.{key}: {getattr(self, key)} must lie in 0..1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"on_policy.temperature: {self.temperature} must be above 0 and finite")


def on_policy_step(step: int, share: float) -> bool:
    """Whether a step is one of those, with all its rows: one process that draws keeps all of them waiting."""
    return bool(np.random.default_rng(step).random() < share)


def last_picture(places: torch.Tensor) -> slice:
    """Where the last picture of every row stands. places: (rows, length), see `delvm.tokens.rows`."""
    first = places[0]
    start = int(torch.nonzero(first == 0)[-1])
    return slice(start, start + int(first.max()) + 1)


def continue_pictures(
    model: LlamaForCausalLM,
    batch: dict[str, torch.Tensor],
    *,
    temperature: float,
    num_codes: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The batch with the last picture of every row drawn by `model`.

    Args:
        model: the student.
        batch: `tokens` and `places`, (rows, length) int64; every row is one sentence.
        temperature: at which it draws.
        num_codes: ids from here up are never drawn.
        seed: of the draws.

    Returns:
        The batch, another dict, with new `tokens` and with `drawn` (rows, length) bool: the tokens that the
        student has drawn.
    """
    picture, tokens = last_picture(batch["places"]), batch["tokens"].clone()
    drawn = torch.zeros_like(tokens, dtype=torch.bool)
    drawn[:, picture] = True
    size = picture.stop - picture.start
    codes = complete(model, tokens[:, : picture.start], size, num_codes, temperature=temperature, seed=seed)
    tokens[:, picture] = codes.to(tokens.device)
    found = {**batch, "tokens": tokens, "drawn": drawn}
    if "labels" in batch:  # what was to be learnt there now is the new code
        found["labels"] = torch.where(drawn & (batch["labels"] >= 0), tokens, batch["labels"])
    return found


@torch.no_grad()
def confidence(hidden: torch.Tensor, head: torch.Tensor, *, chunk_size: int = CHUNK) -> torch.Tensor:
    """(tokens,) float32: the highest probability at each. hidden: (tokens, width), head: (codes, width)."""
    return torch.cat([(part @ head.T).float().softmax(-1).amax(-1) for part in hidden.split(chunk_size)])
