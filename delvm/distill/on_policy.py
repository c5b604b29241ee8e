"""Rows -> rows whose last picture is the student's own, for the teacher to judge (Agarwal et al. 2024).

A student that has only seen true rows meets its own mistakes for the first time when it draws a picture. On
its own pictures there is no true code to learn, only the teacher's distribution after each of the student's
codes. Where the teacher itself is unsure on such pictures its distribution misleads: a gate leaves those
tokens out.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from delvm.generation import complete


@dataclass
class OnPolicyConfig:
    """Off by default: a picture is drawn code by code, which costs many times a step."""

    share: float = 0.0
    """Probability that a row's last picture is the student's own."""
    temperature: float = 1.0
    """At which it is drawn."""
    confidence: float = 0.0
    """The teacher's highest probability has to reach this for a token of such a picture to count."""

    def __post_init__(self) -> None:
        for key in ("share", "confidence"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"on_policy.{key}: {getattr(self, key)} must lie in 0..1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"on_policy.temperature: {self.temperature} must be above 0 and finite")


def continue_pictures(
    model: LlamaForCausalLM,
    batch: dict[str, torch.Tensor],
    config: OnPolicyConfig,
    num_codes: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The batch with the last picture of some rows drawn by `model`.

    Args:
        model: the student.
        batch: `tokens` and `places`, (rows, length) int64; every row is one sentence.
        config: how many rows, and how they are drawn.
        num_codes: ids from here up are never drawn.
        seed: of both.

    Returns:
        The batch, another dict, with new `tokens` and with `drawn` (rows, length) bool: the tokens that the
        student has drawn.
    """
    tokens, places = batch["tokens"], batch["places"][0]
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(len(tokens), generator=generator) < config.share).to(tokens.device)
    drawn = torch.zeros_like(tokens, dtype=torch.bool)
    if not chosen.any():
        return {**batch, "drawn": drawn}
    start, size = int(torch.nonzero(places == 0)[-1]), int(places.max()) + 1
    picture = slice(start, start + size)
    codes = complete(
        model, tokens[chosen, :start], size, num_codes, temperature=config.temperature, seed=seed
    )
    tokens = tokens.clone()
    tokens[chosen, picture] = codes.to(tokens.device)
    drawn[chosen, picture] = True
    labels = {}
    if "labels" in batch:  # what was to be learnt there now is the new code
        labels["labels"] = torch.where(drawn & (batch["labels"] >= 0), tokens, batch["labels"])
    return {**batch, **labels, "tokens": tokens, "drawn": drawn}


@torch.no_grad()
def confidence(hidden: torch.Tensor, head: torch.Tensor, *, chunk_size: int = 512) -> torch.Tensor:
    """(tokens,) float32: the highest probability at each. hidden: (tokens, width), head: (codes, width)."""
    return torch.cat([(part @ head.T).float().softmax(-1).amax(-1) for part in hidden.split(chunk_size)])
