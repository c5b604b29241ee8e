"""A model and held-out sentences -> loss, token accuracy and perplexity by task."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from delvm.tokens.sentences import ANNOTATION, SPECIAL


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM,
    sentences: Mapping[str, Tensor],
    roles: Mapping[str, Tensor],
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, float]]:
    """How well `model` predicts each code from all that stands before it (teacher forcing).

    sentences: task -> (num, length) int64. roles: task -> (length,), what each position of its sentences is
    (tokens/sentences.py). progress is called with the number of sentences done since its last call.

    Returns task -> {"loss", "accuracy", "perplexity", "annotation_loss", "annotation_accuracy",
    "annotation_perplexity"}: mean negative log-likelihood in nats, the fraction of codes that are the most
    likely of the whole vocabulary, and exp(loss). Means are over all targets with a role other than SPECIAL
    (so EOS does not count), the annotation's over ANNOTATION targets only; these three are left out where a
    sentence has none.

    Every id is scored against the full vocabulary, special ids included, in float32; sums are float64.
    Raises ValueError for sentences that do not fit the roles or the vocabulary.
    """
    _check(model, sentences, roles)
    was_training = model.training
    model.eval()
    try:
        return {
            task: _metrics(model, ids, roles[task][1:].to(model.device), batch_size, progress)
            for task, ids in sentences.items()
        }
    finally:
        model.train(was_training)


def _metrics(
    model: LlamaForCausalLM,
    sentences: Tensor,
    roles: Tensor,
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> dict[str, float]:
    """roles: (length - 1,), of the targets: position t predicts the code at t + 1."""
    targets = roles != SPECIAL
    annotation = roles[targets] == ANNOTATION
    nll = torch.zeros(int(targets.sum()), dtype=torch.float64, device=targets.device)  # by target position
    hits = torch.zeros_like(nll)
    for batch in sentences.split(batch_size):
        ids = batch.to(model.device)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, targets]
        # the head sentence by sentence: a whole batch of float32 logits is gigabytes at 8192 codes
        for row, expected in zip(hidden, ids[:, 1:][:, targets], strict=True):
            logits = model.lm_head(row).float()
            nll += functional.cross_entropy(logits, expected, reduction="none").double()
            hits += (logits.argmax(-1) == expected).double()
        if progress is not None:
            progress(len(batch))
    means = nll / len(sentences), hits / len(sentences)
    metrics = _triple("", *means)
    if annotation.any():
        metrics |= _triple("annotation_", *(mean[annotation] for mean in means))
    return metrics


def _triple(prefix: str, nll: Tensor, hits: Tensor) -> dict[str, float]:
    loss = nll.mean().item()
    return {
        f"{prefix}loss": loss,
        f"{prefix}accuracy": hits.mean().item(),
        f"{prefix}perplexity": math.exp(loss) if loss < 700 else math.inf,
    }


def _check(model: LlamaForCausalLM, sentences: Mapping[str, Tensor], roles: Mapping[str, Tensor]) -> None:
    for task, ids in sentences.items():
        part = roles.get(task, torch.empty(0))
        if part.dim() != 1 or not (part[1:] != SPECIAL).any():
            raise ValueError(
                f"roles.{task}: shape {tuple(part.shape)}, must be (length,) with a code after the first"
            )
        shape = tuple(ids.shape)
        if len(shape) != 2 or shape[1] != len(part) or shape[0] == 0:
            raise ValueError(f"sentences.{task}: shape {shape}, must be (at least 1, {len(part)})")
        low, high, last = int(ids.min()), int(ids.max()), model.config.vocab_size - 1
        if low < 0 or high > last:
            raise ValueError(f"sentences.{task}: ids {low}..{high}, must be in 0..{last}")
