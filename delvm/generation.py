"""A prompt of tokens -> its continuation."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from delvm import llama
from delvm.errors import UserError


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continues every prompt by `num_tokens` image codes (visual prompting: Bai et al. 2024, section 4.4).

    prompts: (n, prefix) int64, without padding. Returns (n, num_tokens) int64 in 0..num_codes-1 on the CPU;
    ids from `num_codes` up (BOS, EOS, padding) are never generated, and only the length ends a sentence.
    temperature 0 takes the most likely code each time; above 0 draws from the smallest set of codes that
    holds `top_p` of the probability. A draw depends on `seed` and the prompt's place among the others alone;
    the global random state is left as it was. The model's own generation settings are ignored: what ends a
    text there is an image code here. A compiled model runs uncompiled, and one in training mode without its
    dropout.

    Raises ValueError for settings out of range and for prompts that leave no room in the model's positions,
    UserError for a model whose logits are no numbers.
    """
    codes = _begin(model, prompts, num_tokens, num_codes, temperature, top_p, seed)
    return torch.stack([*codes], 1).cpu()


@torch.inference_mode()
def complete_by_token(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """What `complete` returns, token by token while it is drawn: `num_tokens` times (n,) int64 on the CPU."""
    for code in _begin(model, prompts, num_tokens, num_codes, temperature, top_p, seed):
        yield code.cpu()


@torch.inference_mode()
def complete_queries(
    model: LlamaForCausalLM,
    prefix: Tensor,
    queries: Tensor,
    num_tokens: int,
    num_codes: int,
    *,
    candidates: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> Tensor:
    """Continues one prefix, such as solved pairs of a task, and each query after it: as `complete`, but the
    prefix is read once.

    prefix: (prefix,) int64; queries: (n, query) int64; both at least one token. Returns (n, candidates,
    num_tokens) int64 in 0..num_codes-1 on the CPU. A draw depends on `seed`, the query's place and the
    candidate's alone, so the first candidate is what `complete` draws of the whole prompts. At most
    `batch_size` sentences (at least the candidates of one query) are written side by side.

    Raises ValueError as `complete`, and for several candidates without a temperature: they would be equal.
    """
    if prefix.dim() != 1:
        raise ValueError(f"prefix: shape {tuple(prefix.shape)}, must be (at least 1,)")
    _check_prompts("prefix", prefix[None], model)
    _check_prompts("queries", queries, model)
    length = len(prefix) + queries.shape[1]
    _check_settings(model, length, num_tokens, num_codes, temperature, top_p)
    for key, value in (("candidates", candidates), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{key}: {value}, must be at least 1")
    if candidates > 1 and temperature == 0:
        raise ValueError(f"candidates: {candidates} would be equal at temperature 0")
    shared = _Reader(model, len(prefix))
    shared.read(prefix[None].to(model.device))
    found = []
    for places in torch.arange(len(queries)).split(max(1, batch_size // candidates)):
        draws = _draws(seed, places.tolist(), candidates, num_tokens)
        reader = shared.repeated(len(places), length + num_tokens)
        logits = reader.read(queries[places].to(model.device))
        if candidates > 1:
            reader = reader.repeated(candidates, length + num_tokens)
            logits = logits.repeat_interleave(candidates, dim=0)
        codes = torch.stack([*_continue(reader, logits, draws, num_codes, temperature, top_p)], 1)
        found.append(codes.cpu().unflatten(0, (len(places), candidates)))
    return torch.cat(found)


@torch.inference_mode()
def complete_sequences(
    model: LlamaForCausalLM,
    pictures: Tensor,
    num_pictures: int,
    num_codes: int,
    *,
    bos: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continues sequences of pictures by `num_pictures` more (sequential prompting: Bai et al. 2024).

    Each new picture is drawn after the last pictures that leave it room in the model's positions: 15 of
    LVM's 16. So a sequence may grow beyond them; what slid out is forgotten.

    pictures: (n, pictures, tokens) int64, the codes of each; bos: the id that every context begins with.
    Returns (n, num_pictures, tokens) int64 in 0..num_codes-1 on the CPU. The rest, errors too, is as in
    `complete`.
    """
    if pictures.dim() != 3:
        raise ValueError(f"pictures: shape {tuple(pictures.shape)}, must be (n, pictures, tokens)")
    if num_pictures < 1:
        raise ValueError(f"num_pictures: {num_pictures}, must be at least 1")
    tokens = pictures.shape[2]
    begin = torch.tensor([] if bos is None else [bos], dtype=torch.int64).expand(len(pictures), -1)
    _check_prompts("pictures", torch.cat([begin, pictures.flatten(1)], 1), model)
    _check_settings(model, begin.shape[1] + tokens, tokens, num_codes, temperature, top_p)
    held = (model.config.max_position_embeddings - begin.shape[1]) // tokens  # pictures, at once
    draws = _draws(seed, range(len(pictures)), 1, num_pictures * tokens)
    shown, wanted = pictures.cpu(), pictures.shape[1] + num_pictures
    while shown.shape[1] < wanted:
        context = shown[:, 1 - held :]
        length = min(held - context.shape[1], wanted - shown.shape[1]) * tokens
        reader = _Reader(model, begin.shape[1] + context[0].numel() + length)
        logits = reader.read(torch.cat([begin, context.flatten(1)], 1).to(model.device))
        codes = [*_continue(reader, logits, draws[:, :length], num_codes, temperature, top_p)]
        drawn = torch.stack(codes, 1).cpu().unflatten(1, (-1, tokens))
        shown, draws = torch.cat([shown, drawn], 1), draws[:, length:]
    return shown[:, pictures.shape[1] :]


class _Reader:
    """A model, and the keys and values of what it has read, in memory that is taken once.

    Grown by concatenation, as transformers does it, they would be copied for every token. What a layer is
    made of is called, and not the layer: so nothing is compiled, which every token would ask for again.
    """

    def __init__(self, model: LlamaForCausalLM, room: int) -> None:
        """room: tokens of a sentence, at most."""
        self.model, self.room, self.length = model, room, 0
        # by layer, keys and values (rows, key heads, room, channels). In float32 keys lie in memory as (rows,
        # key heads, channels, room): so the product of one query and all of them goes through it once, from
        # end to end. In fewer bits that product is slow, and the fused kernel is the fastest.
        self.past: list[tuple[Tensor, Tensor]] = []

    def read(self, tokens: Tensor) -> Tensor:
        """(rows, n) int64, what comes next in each sentence -> (rows, vocabulary), the logits after it."""
        model, (rows, count) = self.model.model, tokens.shape
        start, end = self.length, self.length + count
        hidden = model.embed_tokens(tokens)
        cos, sin = model.rotary_emb(hidden, torch.arange(start, end, device=tokens.device)[None])
        for number, layer in enumerate(model.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                project(x).view(rows, count, -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            keys, values = self._remember(number, key, value)
            if number == len(model.layers) - 1:  # from here on nobody looks at the tokens before the last
                query, hidden = query[:, :, -1:], hidden[:, -1:]
            seen = _attend(query, keys, values, attention.scaling)
            hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length = end
        return self.model.lm_head(model.norm(hidden[:, -1]))

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens so far, with those of the tokens that are being read."""
        rows, heads, count, channels = value.shape
        if not self.length:
            room = value.new_empty(rows, heads, self.room, channels)
            turned = value.new_empty(rows, heads, channels, self.room).mT
            self.past.append((turned if value.dtype == torch.float32 else torch.empty_like(room), room))
        end = self.length + count
        keys, values = (past[:, :, :end] for past in self.past[layer])
        keys[:, :, self.length :], values[:, :, self.length :] = key, value
        return keys, values

    def repeated(self, times: int, room: int) -> "_Reader":
        """Another reader of the same, every row `times` times in a row; with room for more."""
        other = _Reader(self.model, room)
        for keys, values in self.past:
            other._remember(
                len(other.past),
                keys[:, :, : self.length].repeat_interleave(times, dim=0),
                values[:, :, : self.length].repeat_interleave(times, dim=0),
            )
        other.length = self.length
        return other


def _attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """What the last n tokens see of all so far, themselves included.

    query: (rows, heads, n, channels), the result as well; keys, values: (rows, key heads, length, channels).
    """
    (rows, heads, count, channels), (_, key_heads, length, _) = query.shape, values.shape
    if count == 1 and values.dtype == torch.float32:
        scores = (query * scaling).view(rows, key_heads, -1, channels) @ keys.mT
        return (scores.softmax(-1) @ values).view(query.shape)
    mask = None  # one sees all; several are causal without anything before, else each as far as it is
    if length > count > 1:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    return scaled_dot_product_attention(
        query, keys.contiguous() if values.dtype == torch.float32 else keys, values, mask,
        is_causal=length == count, scale=scaling, enable_gqa=heads > key_heads,
    )  # fmt: skip


def _draws(seed: int, prompts: Iterable[int], candidates: int, num_tokens: int) -> Tensor:
    """(prompts * candidates, num_tokens) float32 in 0..1: what decides between codes, one stream a row."""
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng([seed, prompt, candidate]).random(num_tokens, dtype=np.float32)
                for prompt in prompts
                for candidate in range(candidates)
            ]
        )
    )


def _begin(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[Tensor]:
    """Checks, reads the prompts, and gives what follows: (n,) int64, `num_tokens` times."""
    _check_prompts("prompts", prompts, model)
    _check_settings(model, prompts.shape[1], num_tokens, num_codes, temperature, top_p)
    draws = _draws(seed, range(len(prompts)), 1, num_tokens)
    reader = _Reader(model, prompts.shape[1] + num_tokens)
    logits = reader.read(prompts.to(model.device))
    return _continue(reader, logits, draws, num_codes, temperature, top_p)


def _continue(
    reader: _Reader, logits: Tensor, draws: Tensor, num_codes: int, temperature: float, top_p: float
) -> Iterator[Tensor]:
    """What follows, (rows,) int64 for each draw. logits: (rows, vocabulary); draws: (rows, num_tokens)."""
    if logits[:, :num_codes].isnan().any():
        raise UserError(f"{llama.called(reader.model)}: its logits are no numbers (nan)")
    code = None
    for draw in draws.to(logits.device).T:
        if code is not None:
            logits = reader.read(code[:, None])
        code = _choose(logits[:, :num_codes], draw, temperature, top_p)
        yield code


def _choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """(rows, codes) logits -> (rows,) int64; draw: (rows,) in 0..1, of the cumulated probability."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:  # nucleus sampling (Holtzman et al. 2020)
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= top_p
        p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    cumulated = p.cumsum(-1)
    found = torch.searchsorted(cumulated, draw[:, None] * cumulated[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)  # rounding may leave the last a little short


def _check_prompts(name: str, prompts: Tensor, model: LlamaForCausalLM) -> None:
    vocab_size = model.config.vocab_size
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(prompts.shape)}, must be (at least 1, at least 1)")
    low, high = int(prompts.min()), int(prompts.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name}: ids {low}..{high}, must be in 0..{vocab_size - 1}")


def _check_settings(
    model: LlamaForCausalLM, length: int, num_tokens: int, num_codes: int, temperature: float, top_p: float
) -> None:
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if not 1 <= num_codes <= vocab_size:
        raise ValueError(f"num_codes: {num_codes}, must be in 1..{vocab_size}, the model's vocabulary")
    if num_tokens < 1 or length + num_tokens > positions:
        raise ValueError(
            f"num_tokens: {num_tokens} after a prompt of {length}, must be at least 1 and end "
            f"within the model's {positions} positions"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: {temperature}, must be 0 (most likely) or more, and finite")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}, must be above 0 and at most 1")
