"""Rows of tokens -> the teacher's distribution of every next one, as the losses take it.

A `Signal` gives it, and who trains a student does not ask from where: `Live` runs the teacher in every step,
`distill.cache.Cached` reads what one pass of the teacher has written.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel

from delvm import ranks
from delvm.distill.divergences import DIVERGENCES
from delvm.errors import UserError
from delvm.training import compile_layers

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}

SERVED: dict[str, list[str]] = {
    "live": list(DIVERGENCES),
    # With all codes that are left out in one bucket, these are the divergence of two coarser distributions,
    # never above that of the whole ones. Not so taid: it mixes student and teacher code by code, and what the
    # mixture has in the bucket does not follow from what both have there.
    "topk": [name for name in DIVERGENCES if name != "taid"],
    # Drawn codes tell the mean of what is linear in the teacher's probabilities; no other gradient is.
    "sampled": ["forward_kl"],
}
"""By a signal's kind: the divergences that it can serve."""


@dataclass(frozen=True)
class Hidden:
    """All of the distribution, as the factors of its logits: `hidden @ head.T`, at temperature 1."""

    hidden: Tensor
    """(tokens, width) float, without gradient."""
    head: Tensor
    """(codes, width) of the same type."""


@dataclass(frozen=True)
class Sparse:
    """A few codes a token instead of all, at the signal's temperature."""

    ids: Tensor
    """(tokens, k) integers."""
    probabilities: Tensor
    """(tokens, k) float32."""
    tail: bool
    """True: distinct ids with the teacher's probabilities, what they leave of 1 belongs to all other codes.
    False: ids drawn from the teacher, any of them perhaps several times, with weights that sum to 1."""


Target = Hidden | Sparse


class Signal(Protocol):
    """Where the teacher's distribution comes from."""

    kind: str
    """A key of SERVED."""
    vocabulary: int
    """Number of the teacher's codes."""
    temperature: float | None
    """The one temperature that it can serve; None: any."""

    def targets(self, batch: dict[str, Tensor]) -> Target:
        """The distributions that predict tokens 1..length-1 of each row, row after row.

        batch: `tokens` (rows, length) int64 and what else the signal reads, on the signal's device.
        """

    def to(self, device: torch.device) -> Self:
        """Go to a device, as a module would."""


def serves(kind: str, divergence: str) -> None:
    """Refuse a divergence that a kind of signal cannot serve, before anything runs.

    Raises:
        UserError: it needs more of the teacher's distribution than the signal has.
    """
    choices = SERVED[kind]
    if divergence not in choices:
        raise UserError(
            f"divergence: '{divergence}' cannot be had from a teacher's cache of kind '{kind}';"
            f" choices: {', '.join(choices)}"
        )


class Live:
    """A frozen teacher that runs in every step, at any temperature.

    No nn.Module: what holds it has the teacher in no optimizer and no checkpoint.

    Args:
        model: taken over; frozen, and cast to `precision` in place.
        precision: `32` or `bf16`, of weights and activations. An autocast around does not reach in.
        compile: run the layers under torch.compile; the first batch of a shape then takes a minute.
        sharded: each process keeps its part of every layer from `to` on, and has the others' parts only while
            the layer runs: less memory, slower, the same values. All processes must ask for targets equally
            often. Of one process the part is the whole: it changes nothing there.

    Raises:
        ValueError: an unknown precision.
    """

    kind = "live"
    temperature: float | None = None

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        precision: str = "32",
        compile: bool = False,
        sharded: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: '{precision}' is unknown; choices: {', '.join(PRECISIONS)}")
        self.model = cast(model.requires_grad_(False).eval(), PRECISIONS[precision])
        self.precision = precision
        self.vocabulary: int = model.config.vocab_size
        self._to_share = sharded and ranks.world() > 1
        if compile:
            compile_layers(model)  # one by one, so that shared ones may come and go in between

    def to(self, device: torch.device) -> Self:
        """Move the teacher's weights; those to be shared are shared now, layer by layer."""
        if self._to_share:  # before the rest moves: no device ever holds all layers
            shard_layers(self.model.model, device)
            self._to_share = False
        self.model.to(device)
        return self

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> Hidden:
        """The last hidden states of `tokens`; in packed rows, of sentences that start where `positions` do.

        tokens, positions: (rows, length) int64; the last of each row predicts nothing and is not read.
        """
        tokens, positions = batch["tokens"], batch.get("positions")
        self.model.eval()  # whoever else holds it may have trained it on
        with torch.autocast(tokens.device.type, enabled=False):
            states = self.model.model(
                tokens[:, :-1],
                position_ids=None if positions is None else positions[:, :-1],
                use_cache=False,
            ).last_hidden_state
        return Hidden(states.flatten(0, 1), self.model.lm_head.weight)


def cast(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model's weights in another floating type, in place; its rotary frequencies stay float32.

    `model.to(dtype)` rounds them as well: in bfloat16 positions are then off by up to 0.8 rad at token 1,800.
    """
    for parameter in model.parameters():  # tied ones come, and are cast, once
        parameter.data = parameter.data.to(dtype)
    rotary = model.model.rotary_emb
    # made anew: they may have come rounded
    model.model.rotary_emb = type(rotary)(model.config).to(rotary.inv_freq.device)
    return model


def shard_layers(model: LlamaModel, device: torch.device) -> None:
    """Leave this process its part of every decoder layer, on `device` (FSDP: Zhao et al. 2023), in place.

    Embedding and last norm stay whole: the loss reads the embedding where the head is tied to it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # nothing of the model around them is shared, but it knows their order: on a GPU the next one's weights
    # come while a layer runs
    whole = {*model.embed_tokens.parameters(), *model.norm.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=whole)
