"""A model and sentences -> loss, token accuracy and perplexity: by task, by example pairs, by place."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.tokens.sentences import ANNOTATION, SPECIAL


class TokenScores(NamedTuple):
    """How well each token of some sentences was predicted; on the CPU."""

    nll: Tensor
    """(sentences, targets) float32: negative log-likelihood in nats."""
    hits: Tensor
    """(sentences, targets) bool: it is the most likely of the whole vocabulary."""

    def of(self, targets: Tensor) -> "TokenScores":
        """The same of some targets; targets: (targets,) bool."""
        return TokenScores(self.nll[:, targets], self.hits[:, targets])


@torch.inference_mode()
def score_tokens(
    model: LlamaForCausalLM,
    sentences: Tensor,
    *,
    first: int = 1,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> TokenScores:
    """How well `model` predicts each token from all that stands before it (teacher forcing).

    sentences: (num, length) int64. The targets are the tokens from place `first`, at least 1, to the last.
    Every id is scored against the full vocabulary, special ids included, in float32. progress is called with
    the number of sentences done since its last call.

    Raises:
        UserError: the model's logits are no numbers.
    """
    assert first >= 1, "nothing stands before the first token"
    was_training = model.training
    model.eval()
    shape = len(sentences), sentences.shape[1] - first
    scores = TokenScores(torch.empty(shape), torch.empty(shape, dtype=torch.bool))
    try:
        for places in torch.arange(len(sentences)).split(batch_size):
            ids = sentences[places].to(model.device)
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, first - 1 :]
            # the head sentence by sentence: a whole batch of float32 logits is gigabytes at 8192 codes
            for place, row, expected in zip(places.tolist(), hidden, ids[:, first:], strict=True):
                logits = model.lm_head(row).float()
                scores.nll[place] = functional.cross_entropy(logits, expected, reduction="none")
                scores.hits[place] = logits.argmax(-1) == expected
            if scores.nll[places].isnan().any():
                raise UserError(f"{llama.called(model)}: its logits are no numbers (nan)")
            if progress is not None:
                progress(len(places))
    finally:
        model.train(was_training)
    return scores


def evaluate(
    model: LlamaForCausalLM,
    sentences: Mapping[str, Tensor],
    roles: Mapping[str, Tensor],
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, float]]:
    """`summarise` of every task's sentences.

    sentences: task -> (num, length) int64. roles: task -> (length,), what each position of its sentences is
    (tokens/sentences.py). The rest is as in `score_tokens`.

    Raises ValueError for sentences that do not fit the roles or the vocabulary.
    """
    check(model, sentences, roles)
    return {
        task: summarise(score_tokens(model, ids, batch_size=batch_size, progress=progress), roles[task])
        for task, ids in sentences.items()
    }


def summarise(scores: TokenScores, roles: Tensor) -> dict[str, float]:
    """Whole sentences in numbers: {"loss", "accuracy", "perplexity", "loss_se", "accuracy_se"}.

    And the same of annotations alone, as `annotation_loss` and so on, where a sentence has any. Mean negative
    log-likelihood in nats, the fraction of codes that are the most likely, exp(loss), and the standard errors
    of both means over sentences (left out of a single one; sentences that share samples are taken for
    independent). Means are over all targets with a role other than SPECIAL, so EOS does not count.

    scores: of the targets 1..length-1. roles: (length,).
    """
    annotation = roles[1:] == ANNOTATION
    found = _means(scores.of(roles[1:] != SPECIAL))
    if annotation.any():
        found |= {f"annotation_{key}": value for key, value in _means(scores.of(annotation)).items()}
    return found


def by_examples(scores: TokenScores, roles: Tensor, examples: Tensor) -> dict[int, dict[str, float]]:
    """Annotations after no, one, two ... solved examples: {number: as in `summarise`}.

    One pass shows them all: in a sentence of 8 pairs, the n-th annotation has n - 1 pairs before it.

    scores: of the targets 1..length-1. roles: (length,). examples: (length,) integers, how many solved
    examples of its sentence stand before each token.
    """
    annotation = roles[1:] == ANNOTATION
    return {
        number: _means(scores.of(annotation & (examples[1:] == number)))
        for number in examples[1:][annotation].unique().tolist()
    }


def by_place(scores: TokenScores, roles: Tensor, places: Tensor) -> Tensor:
    """(tokens,) float64: mean loss in nats of the annotations' codes at each place of a picture.

    scores: of the targets 1..length-1. roles: (length,). places: (length,), where in its picture each token
    stands; the annotations are there.
    """
    annotation = roles[1:] == ANNOTATION
    places, nll = places[1:][annotation], scores.nll[:, annotation].double().mean(0)
    totals = torch.zeros(int(places.max()) + 1, dtype=torch.float64).index_add_(0, places, nll)
    return totals / places.bincount()


def mean_perplexity(losses: Sequence[float]) -> dict[str, float]:
    """LVM's perplexity (Bai et al., CVPR 2024): exp(mean loss) of each example, then their mean.

    losses: mean nats a token of each example. Returns {"perplexity", "perplexity_se", "examples"}, the
    standard error over examples (left out of a single one).
    """
    perplexities = torch.tensor(losses, dtype=torch.float64).exp()
    return {**_mean("perplexity", perplexities), "examples": len(losses)}


def check(model: LlamaForCausalLM, sentences: Mapping[str, Tensor], roles: Mapping[str, Tensor]) -> None:
    """Raises ValueError for sentences that do not fit the roles or the vocabulary."""
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


def _means(scores: TokenScores) -> dict[str, float]:
    loss, accuracy = (
        _mean(key, values.double().mean(1))
        for key, values in (("loss", scores.nll), ("accuracy", scores.hits))
    )
    mean = loss["loss"]
    return loss | accuracy | {"perplexity": math.exp(mean) if mean < 700 else math.inf}


def _mean(key: str, values: Tensor) -> dict[str, float]:
    """The mean, and its standard error where there are several. values: (n,) float64."""
    found = {key: values.mean().item()}
    if len(values) > 1:
        found[f"{key}_se"] = values.std().item() / math.sqrt(len(values))
    return found
