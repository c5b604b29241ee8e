"""A sliced student -> the same with output projections fitted to its teacher's stream."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from delvm.distill.moments import Rows, part_of

RIDGE = 1e-3
"""Of the refit, as a share of the inputs' mean square; from 1e-4 to 1e-2 the loss is the same."""


def refit_outputs(
    teacher: LlamaForCausalLM,
    chosen: list[int],
    student: LlamaForCausalLM,
    rows: Rows,
    basis: Tensor,
) -> None:
    """Output projections by ridge regression towards what they are, one after the other.

    What each is to add: the teacher's projected stream behind it, less the student's before it, so that it
    also makes good for what went wrong earlier, and an MLP's for the layers left out behind it.
    """
    batches = list(rows.batches(teacher.device))
    whole = [teacher.model.embed_tokens(batch.tokens) for batch in batches]
    small = [student.model.embed_tokens(batch.tokens) for batch in batches]
    positions = [batch.positions for batch in batches]
    layers, bounds = list(teacher.model.layers), [0, *chosen[1:], len(teacher.model.layers)]
    for place, layer in enumerate(student.model.layers):
        source = layers[chosen[place]]
        above = part_of(teacher, layers[bounds[place] : bounds[place + 1]], norm=nn.Identity())
        below = part_of(student, [layer], norm=nn.Identity())
        middle = []
        for number, states in enumerate(whole):
            with _inputs(source.post_attention_layernorm) as given:
                whole[number] = _run(above, states, positions[number])
            middle.append(given[0].float() @ basis)
        after = [states.float() @ basis for states in whole]
        attend = [functools.partial(_run, below, positions=places) for places in positions]
        small = _fitted(layer.self_attn.o_proj, attend, small, middle)
        think = nn.Sequential(layer.post_attention_layernorm, layer.mlp)
        small = _fitted(layer.mlp.down_proj, [think] * len(small), small, after)


def _fitted(
    linear: nn.Linear, runs: Sequence[Callable[[Tensor], object]], stream: list[Tensor], goals: list[Tensor]
) -> list[Tensor]:
    """Fit `linear`, whose inputs come up while `runs` read the stream, batch by batch, so that adding its
    outputs to the stream comes near the goals. Returns the stream with them."""
    size = linear.in_features + (linear.bias is not None)
    gram = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
    missing = gram.new_zeros(size, linear.out_features)
    inputs = []
    for run, states, goal in zip(runs, stream, goals, strict=True):
        with _inputs(linear) as given:
            run(states)
        inputs.append(given[0])
        error = (goal - states - linear(given[0])).flatten(0, 1)
        padded = nn.functional.pad(given[0], (0, size - linear.in_features), value=1.0).flatten(0, 1)
        gram.add_(padded.T @ padded)
        missing.add_(padded.T @ error)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, missing).T
    linear.weight.add_(change[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.add_(change[:, -1])
    return [states + linear(given) for states, given in zip(stream, inputs, strict=True)]


def _run(part: LlamaModel, states: Tensor, positions: Tensor | None) -> Tensor:
    return part(inputs_embeds=states, position_ids=positions, use_cache=False).last_hidden_state


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is given meanwhile."""
    given: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    try:
        yield given
    finally:
        handle.remove()
