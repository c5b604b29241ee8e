"""Rows of tokens -> second moments of what a teacher's layers read and give.

And what choosing layers and refitting need as well: rows batch by batch, some of a model's layers as a model.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class Rows:
    """Rows of tokens as the teacher reads them, (num, length) both."""

    tokens: Tensor
    positions: Tensor | None
    """Starting again at 0 with each sentence of a row; None: one a row."""

    def batches(self, device: torch.device) -> Iterator["Rows"]:
        """TOKENS_A_BATCH tokens at a time, on the device."""
        size = max(1, TOKENS_A_BATCH // self.tokens.shape[1])
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            positions = None if self.positions is None else self.positions[rows].to(device)
            yield Rows(self.tokens[rows].to(device), positions)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The same of both."""
        return Rows(change(self.tokens), None if self.positions is None else change(self.positions))


@dataclass
class Seen:
    """Second moments, summed over all tokens: of a batch in float32, over batches in float64."""

    stream: Tensor
    """(width, width) of the states at all norms, each state divided by its root mean square."""
    heads: list[Tensor]
    """By layer: (heads, head size, head size), of the heads' outputs."""
    channels: list[Tensor]
    """By layer: (channels,), of the MLP's activations."""


def observe(teacher: LlamaForCausalLM, layers: list[LlamaDecoderLayer], rows: Rows) -> Seen:
    """One pass over the sentences, of the teacher with these layers alone."""
    config = teacher.config
    zeros = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64, device=teacher.device)
    size = (config.num_attention_heads, config.head_dim, config.head_dim)
    seen = Seen(
        zeros,
        [zeros.new_zeros(size) for _ in layers],
        [zeros.new_zeros(config.intermediate_size) for _ in layers],
    )

    def see_states(module: nn.Module, given: tuple[Tensor]) -> None:
        states = given[0].flatten(0, 1).float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        seen.stream.add_(states.T @ states)

    def see_heads(moments: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(module: nn.Module, given: tuple[Tensor]) -> None:
            outputs = given[0].flatten(0, 1).float().unflatten(-1, size[:2]).transpose(0, 1)
            moments.add_(outputs.mT @ outputs)

        return see

    def see_channels(moments: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(module: nn.Module, given: tuple[Tensor]) -> None:
            moments.add_(given[0].float().pow(2).sum((0, 1)))

        return see

    with ExitStack() as hooks:
        for module, see in [
            (teacher.model.norm, see_states),
            *((layer.input_layernorm, see_states) for layer in layers),
            *((layer.post_attention_layernorm, see_states) for layer in layers),
            *((layer.self_attn.o_proj, see_heads(m)) for layer, m in zip(layers, seen.heads, strict=True)),
            *((layer.mlp.down_proj, see_channels(m)) for layer, m in zip(layers, seen.channels, strict=True)),
        ]:
            hooks.callback(module.register_forward_pre_hook(see).remove)
        model = part_of(teacher, layers)
        for batch in rows.batches(teacher.device):
            model(batch.tokens, position_ids=batch.positions, use_cache=False)
    return seen


def part_of(
    model: LlamaForCausalLM, layers: list[LlamaDecoderLayer], *, norm: nn.Module | None = None
) -> LlamaModel:
    """Some layers as a model that shares its modules with `model`: nothing is copied."""
    config = copy.copy(model.config)
    config.num_hidden_layers = 0
    with torch.device("meta"):
        part = LlamaModel(config)
    part.config.num_hidden_layers = len(layers)
    part.embed_tokens, part.rotary_emb = model.model.embed_tokens, model.model.rotary_emb
    part.layers, part.norm = nn.ModuleList(layers), norm or model.model.norm
    return part


@contextmanager
def evaluating(model: LlamaForCausalLM) -> Iterator[None]:
    """Without dropout; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
