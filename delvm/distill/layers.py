"""A teacher and sentences -> those of its layers that a student of fewer takes: LAYERS."""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from delvm.distill.fused import fused_cross_entropy
from delvm.distill.moments import Rows, part_of

LAYERS = ("greedy", "even")
"""How layers are chosen: see `choose_layers`."""
IGNORED = -100  # a label
GREEDY_TOKENS = 8192
"""What greedy asks the loss of, many times: of more sentences it takes some, spread evenly."""


def choose_layers(
    teacher: LlamaForCausalLM,
    num_layers: int,
    sentences: Tensor,
    how: str,
    *,
    positions: Tensor | None = None,
) -> list[int]:
    """The teacher's layers that a student of `num_layers` takes, in their order.

    `even`: spread evenly, with the first and the last. `greedy`: as long as there are too many, the one goes
    without which the loss on the sentences is lowest; a pass a candidate, over GREEDY_TOKENS tokens.
    Raises ValueError for another way.
    """
    if how not in LAYERS:
        raise ValueError(f"layers: '{how}' is unknown; choices: {', '.join(LAYERS)}")
    kept = list(range(len(teacher.model.layers)))
    if how == "even" and num_layers < len(kept):
        step = (len(kept) - 1) / max(1, num_layers - 1)
        return [round(number * step) for number in range(num_layers)]
    few = Rows(sentences, positions).map(lambda x: x[:: -(-x.numel() // GREEDY_TOKENS)])
    while len(kept) > num_layers:
        shorter = [kept[:place] + kept[place + 1 :] for place in range(len(kept))]
        kept = min(shorter, key=lambda numbers: _loss(teacher, numbers, few))
    return kept


@torch.no_grad()
def _loss(teacher: LlamaForCausalLM, numbers: list[int], rows: Rows) -> float:
    """Summed over tokens; a packed sentence's first, which nothing predicts, counts for nothing."""
    model, total = part_of(teacher, [teacher.model.layers[number] for number in numbers]), 0.0
    for batch in rows.batches(teacher.device):
        read, labels = batch.map(lambda x: x[:, :-1]), batch.tokens[:, 1:]
        if batch.positions is not None:
            labels = labels.masked_fill(batch.positions[:, 1:] == 0, IGNORED)
        states = model(read.tokens, position_ids=read.positions, use_cache=False).last_hidden_state
        total += float(
            fused_cross_entropy(
                states.flatten(0, 1), teacher.lm_head.weight, labels.flatten(), num_targets=1
            )[0]
        )
    return total
