"""A model, its ONNX graph and sentences -> what is lost between them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from delvm.export.onnx import Graphs
from delvm.generation import complete
from delvm.tokens.sentences import IMAGE, SPECIAL

BATCH = 8


class Sentences(NamedTuple):
    """What to compare on, by task."""

    ids: Mapping[str, Tensor]
    """(num, length) int64."""
    roles: Mapping[str, Tensor]
    """(length,), what each token is: tokens/sentences.py."""


class Loss(NamedTuple):
    """Of one task."""

    sentences: int
    exact: float
    """Mean negative log-likelihood of the codes in nats, by the model."""
    lossy: float
    """By its graph."""
    same_code: float
    """Share of the codes, the same standing before them, where both find the same code most likely."""
    same_drawn: float
    """Share of the codes of the last pictures that both draw equal, each after what it drew itself."""


def measure(model: LlamaForCausalLM, graphs: Graphs, sentences: Sentences) -> dict[str, Loss]:
    """Compare on every sentence, greedily. The graph reads token by token, as it does when it draws."""
    return {task: _measure(model, graphs, ids, sentences.roles[task]) for task, ids in sentences.ids.items()}


def random_sentences(num: int, length: int, num_codes: int) -> Sentences:
    """Codes that are drawn at random, where there is nothing else to compare on."""
    ids = np.random.default_rng(0).integers(num_codes, size=(num, length))
    return Sentences({"random codes": torch.from_numpy(ids)}, {"random codes": torch.full((length,), IMAGE)})


@torch.inference_mode()
def _measure(model: LlamaForCausalLM, graphs: Graphs, ids: Tensor, roles: Tensor) -> Loss:
    targets = torch.nonzero(roles[1:] != SPECIAL)[:, 0]
    num_codes = graphs.settings["num_codes"]
    num_tokens = min(graphs.settings["tokens_per_picture"], len(targets))
    begin = int(targets[-1]) + 2 - num_tokens  # of the last picture; the code at target t stands at t + 1
    parts = []
    for batch in ids.split(BATCH):
        exact = model(batch[:, :-1], use_cache=False).logits.float()[:, targets]
        lossy = _logits(graphs, batch[:, :-1])[:, targets]
        expected = batch[:, 1:][:, targets]
        losses = [_nll(logits, expected) for logits in (exact, lossy)]
        same = exact[..., :num_codes].argmax(-1) == lossy[..., :num_codes].argmax(-1)
        drawn = complete(model, batch[:, :begin], num_tokens, num_codes)
        drawn_same = drawn == torch.from_numpy(graphs.complete(batch[:, :begin].numpy(), num_tokens))
        parts.append([*(loss.mean(1) for loss in losses), same.float().mean(1), drawn_same.float().mean(1)])
    means = (torch.cat(of_all).mean().item() for of_all in zip(*parts, strict=True))
    return Loss(len(ids), *means)


def _logits(graphs: Graphs, ids: Tensor) -> Tensor:
    """(rows, length) -> (rows, length, vocabulary) float32."""
    past, found = graphs.begin(len(ids)), []
    for token in ids.numpy().T:
        logits, past = graphs.read(token[:, None], past)
        found.append(logits)
    return torch.from_numpy(np.stack(found, 1))


def _nll(logits: Tensor, expected: Tensor) -> Tensor:
    """(rows, targets, vocabulary), (rows, targets) -> (rows, targets), in nats."""
    return -logits.double().log_softmax(-1).gather(-1, expected[..., None])[..., 0]
