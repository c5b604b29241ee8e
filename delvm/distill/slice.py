"""A teacher's weights -> a smaller student's first weights.

After SliceGPT (Ashkboos et al. 2024): RMSNorm's weights are folded into the layers that read it, and what is
left of it does not see a rotation of the residual stream. So the stream is projected onto the directions in
which its normalised states are largest over a few sentences. Unlike there one projection serves all layers
and skip connections, for the student is a plain Llama. Its heads, MLP channels and layers are the teacher's
that contribute most, as in structured pruning (Minitron: Muralidharan et al. 2024).
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from delvm.distill.fused import fused_cross_entropy
from delvm.errors import UserError
from delvm.llama import initialise

LAYERS = ("greedy", "even")
"""How layers are chosen: see `choose_layers`."""
TOKENS_A_BATCH = 4096
IGNORED = -100  # a label
GREEDY_TOKENS = 8192
"""What greedy asks the loss of, many times: of more sentences it takes some, spread evenly."""
RIDGE = 1e-3
"""Of the refit, as a share of the inputs' mean square; from 1e-4 to 1e-2 the loss is the same."""


@torch.no_grad()
def slice_student(
    teacher: LlamaForCausalLM,
    config: LlamaConfig,
    sentences: Tensor,
    *,
    positions: Tensor | None = None,
    layers: str = "greedy",
    refit: bool = True,
) -> LlamaForCausalLM:
    """A student of `config` that starts from what it can hold of the teacher.

    Nothing is drawn at random: the same arguments on the same device give the same weights. With the
    teacher's own configuration its logits come back. Runs on the teacher's device and in its precision, sums
    over batches in float64: one pass over the sentences, with `refit` a second one, and less than two of the
    student; `greedy` before them one of part of the sentences for every layer that might go. Beside the
    teacher it holds the student and a batch; `refit` also all sentences' states at one layer, a few times.

    Where something must go, what stays is

    - of the width, the principal directions of the states that the norms see, all layers together, each state
      divided by its root mean square; the norms' weights make good for the fewer channels and lost variance;
    - of heads, those with the largest output, of key-value groups those with the largest sum over these;
    - of a head's channels, the rotary pairs that turn exactly as the student's do; of its values the
      principal directions;
    - of the MLP's channels, those with the largest output;
    - of layers, what `choose_layers` says.

    Args:
        teacher: left as it is.
        config: at most as large as the teacher in everything, see `check`.
        sentences: (num, length) int64, to observe the teacher on; about 12,000 tokens are enough.
        positions: (num, length) int64, where several sentences are packed into a row: they start again at 0
            with each. None: one sentence a row.
        layers: `greedy` or `even`, where the student has fewer.
        refit: fit the output projections of attention and MLP anew, by least squares, layer by layer, so that
            the student's stream follows the projected one of the whole teacher.

    Returns:
        In float32, on the CPU, in training mode, as of `llama.build`.

    Raises:
        UserError: a configuration that cannot be cut from the teacher, impossible sentences.
        ValueError: an unknown way to choose layers.
    """
    check(teacher.config, config)
    _check_sentences(sentences, config.vocab_size)
    rows = _Rows(sentences, positions)
    with _evaluating(teacher):
        chosen = choose_layers(teacher, config.num_hidden_layers, sentences, layers, positions=positions)
        sources = [teacher.model.layers[number] for number in chosen]
        seen = _observe(teacher, sources, rows)
        basis = _principal(seen.stream, config.hidden_size)
        student = initialise(config, seed=0).to(teacher.device)  # every weight is overwritten
        _slice_ends(teacher, student, seen.stream, basis)
        gain = _gain(seen.stream, basis)
        for number, (source, layer) in enumerate(zip(sources, student.model.layers, strict=True)):
            layer.input_layernorm.weight.fill_(gain)
            layer.post_attention_layernorm.weight.fill_(gain)
            _slice_attention(source, layer, config, seen.heads[number], basis)
            _slice_mlp(source, layer, seen.channels[number], basis)
        if refit and any(getattr(config, key) != getattr(teacher.config, key) for key in _CUT):
            _refit(teacher, chosen, student, rows, basis)
    return student.to("cpu").train()


@torch.no_grad()
def slice_embedding(
    teacher: LlamaForCausalLM,
    config: LlamaConfig,
    sentences: Tensor,
    seed: int,
    *,
    positions: Tensor | None = None,
) -> LlamaForCausalLM:
    """A fresh student, save that embedding, last norm and head are as of `slice_student`.

    Args, Returns, Raises: as there; the teacher may be of any depth, and of any heads and MLP. `seed` draws
    the rest, as in `llama.build`.
    """
    check_ends(teacher.config, config)
    _check_sentences(sentences, config.vocab_size)
    with _evaluating(teacher):
        stream = _observe(teacher, list(teacher.model.layers), _Rows(sentences, positions)).stream
    student = initialise(config, seed=seed)
    _slice_ends(teacher, student, stream, _principal(stream, config.hidden_size))
    return student


_AT_MOST = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_CUT = (*_AT_MOST, "head_dim")


def check(teacher: LlamaConfig, student: LlamaConfig) -> None:
    """Refuse a student that cannot be cut from the teacher, from their configurations alone.

    Raises:
        UserError: the key, its value and what the teacher allows.
    """
    check_ends(teacher, student)
    for key in _AT_MOST:
        most = getattr(teacher, key)
        if getattr(student, key) > most:
            raise UserError(f"{key}: {getattr(student, key)} is more than the teacher has; at most {most}")
    shared, most = (c.num_attention_heads // c.num_key_value_heads for c in (student, teacher))
    if shared > most:
        raise UserError(
            f"num_key_value_heads: {student.num_key_value_heads} would serve {shared} heads each,"
            f" the teacher's serve {most}; at least {-(-student.num_attention_heads // most)}"
        )
    if teacher.head_dim % student.head_dim:
        raise UserError(f"head_dim: {student.head_dim} must divide the teacher's, {teacher.head_dim}")
    if student.hidden_act != teacher.hidden_act:
        raise UserError(f"hidden_act: '{student.hidden_act}' must be the teacher's, '{teacher.hidden_act}'")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(teacher, key) and not getattr(student, key):
            raise UserError(f"{key}: false would drop the teacher's biases; must be true")
    one, two = LlamaRotaryEmbedding(teacher), LlamaRotaryEmbedding(student)
    kept = one.inv_freq[:: teacher.head_dim // student.head_dim]
    if not torch.allclose(kept, two.inv_freq, rtol=1e-4) or one.attention_scaling != two.attention_scaling:
        raise UserError(
            f"rope_parameters: {student.rope_parameters} must turn heads as the teacher's do,"
            f" {teacher.rope_parameters}"
        )


def check_ends(teacher: LlamaConfig, student: LlamaConfig) -> None:
    """`check` of what `slice_embedding` asks for: one vocabulary, and no more width than the teacher has.

    Raises:
        UserError: the key, its value and what the teacher allows.
    """
    if student.vocab_size != teacher.vocab_size:
        raise UserError(f"vocab_size: {student.vocab_size} must be the teacher's, {teacher.vocab_size}")
    if student.hidden_size > teacher.hidden_size:
        raise UserError(
            f"hidden_size: {student.hidden_size} is more than the teacher has; at most {teacher.hidden_size}"
        )


def _check_sentences(sentences: Tensor, vocab_size: int) -> None:
    if sentences.dim() != 2 or sentences.dtype != torch.int64 or len(sentences) < 1 or sentences.shape[1] < 2:
        raise UserError(
            f"sentences: {tuple(sentences.shape)} {sentences.dtype}, must be (num, length) int64,"
            " at least (1, 2)"
        )
    if sentences.min() < 0 or sentences.max() >= vocab_size:
        raise UserError(f"sentences: ids must lie in 0..{vocab_size - 1}")


@dataclass(frozen=True)
class _Rows:
    """Rows of tokens as the teacher reads them, (num, length) both."""

    tokens: Tensor
    positions: Tensor | None
    """Starting again at 0 with each sentence of a row; None: one a row."""

    def batches(self, device: torch.device) -> Iterator["_Rows"]:
        """TOKENS_A_BATCH tokens at a time, on the device."""
        size = max(1, TOKENS_A_BATCH // self.tokens.shape[1])
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            positions = None if self.positions is None else self.positions[rows].to(device)
            yield _Rows(self.tokens[rows].to(device), positions)

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Rows":
        """The same of both."""
        return _Rows(change(self.tokens), None if self.positions is None else change(self.positions))


@dataclass
class _Seen:
    """Second moments, summed over all tokens: of a batch in float32, over batches in float64."""

    stream: Tensor
    """(width, width) of the states at all norms, each state divided by its root mean square."""
    heads: list[Tensor]
    """By layer: (heads, head size, head size), of the heads' outputs."""
    channels: list[Tensor]
    """By layer: (channels,), of the MLP's activations."""


def _observe(teacher: LlamaForCausalLM, layers: list[LlamaDecoderLayer], rows: _Rows) -> _Seen:
    """One pass over the sentences, of the teacher with these layers alone."""
    config = teacher.config
    zeros = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64, device=teacher.device)
    size = (config.num_attention_heads, config.head_dim, config.head_dim)
    seen = _Seen(
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
        model = _part(teacher, layers)
        for batch in rows.batches(teacher.device):
            model(batch.tokens, position_ids=batch.positions, use_cache=False)
    return seen


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
    few = _Rows(sentences, positions).map(lambda x: x[:: -(-x.numel() // GREEDY_TOKENS)])
    while len(kept) > num_layers:
        shorter = [kept[:place] + kept[place + 1 :] for place in range(len(kept))]
        kept = min(shorter, key=lambda numbers: _loss(teacher, numbers, few))
    return kept


@torch.no_grad()
def _loss(teacher: LlamaForCausalLM, numbers: list[int], rows: _Rows) -> float:
    """Summed over tokens; a packed sentence's first, which nothing predicts, counts for nothing."""
    model, total = _part(teacher, [teacher.model.layers[number] for number in numbers]), 0.0
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


def _part(
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
def _evaluating(model: LlamaForCausalLM) -> Iterator[None]:
    """Without dropout; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _principal(moments: Tensor, num: int) -> Tensor:
    """(..., n, n) second moments -> (..., n, num) orthonormal in float32, the largest directions first.

    All n directions are left as they are: to rotate them would gain nothing.
    """
    size = moments.shape[-1]
    if num == size:
        return torch.eye(size, device=moments.device).expand_as(moments)
    vectors = torch.linalg.eigh(moments.double())[1].flip(-1)[..., :num]
    # an eigenvector's sign is nobody's choice: its largest entry is positive
    return (vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()).float()


def _gain(stream: Tensor, basis: Tensor) -> float:
    """The weight of the student's norms: what they give is then the projection of what the teacher's give.

    Their mean square is taken over fewer channels, which keep a share of the sum of squares.
    """
    share = float((basis * (stream.float() @ basis)).sum() / stream.trace())
    return math.sqrt(share * basis.shape[0] / basis.shape[1])


def _slice_ends(teacher: LlamaForCausalLM, student: LlamaForCausalLM, stream: Tensor, basis: Tensor) -> None:
    """Embedding, last norm and head."""
    last = teacher.model.norm.weight.float()
    gain = _gain(stream, basis)
    student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight.float() @ basis)
    if student.config.tie_word_embeddings:
        # The norm's weight cannot go into an embedding. Rotated, it is a matrix; its diagonal comes nearest.
        student.model.norm.weight.copy_(gain * (basis.pow(2) * last[:, None]).sum(0))
    else:
        student.model.norm.weight.fill_(gain)
        student.lm_head.weight.copy_((teacher.lm_head.weight.float() * last) @ basis)


def _slice_attention(
    source: LlamaDecoderLayer, layer: LlamaDecoderLayer, config: LlamaConfig, moments: Tensor, basis: Tensor
) -> None:
    old, new = source.self_attn, layer.self_attn
    size, (groups, heads) = old.head_dim, (config.num_key_value_heads, config.num_attention_heads)
    norm = source.input_layernorm.weight.float()
    # (groups, heads of a group, head size, width and perhaps a bias); keys and values have one head a group
    queries, keys, values = (
        _reader(linear, norm, basis).unflatten(0, (old.k_proj.out_features // size, -1, size))
        for linear in (old.q_proj, old.k_proj, old.v_proj)
    )
    outputs = (basis.T @ old.o_proj.weight.float()).unflatten(1, queries.shape[:3]).permute(1, 2, 3, 0)
    moments = moments.float().unflatten(0, queries.shape[:2])

    energy = ((moments @ outputs) * outputs).sum((-2, -1))
    best = energy.topk(heads // groups, dim=1)
    group = best.values.sum(1).topk(groups).indices.sort().values[:, None]
    head = best.indices[group[:, 0]].sort(1).values
    queries, outputs, moments = queries[group, head], outputs[group, head], moments[group, head]
    keys, values = keys[group[:, 0]], values[group[:, 0]]

    # Rotary pair i of a head is channels i and i + size / 2. Every n-th of them turns just as the pairs of a
    # head n times smaller: stronger or mixed pairs at frequencies nearby are worse. Attention divides its
    # logits by the root of the head's size, which is smaller now.
    pair = torch.arange(0, size // 2, size // config.head_dim, device=basis.device)
    pair = torch.cat([pair, pair + size // 2])
    scale = (config.head_dim / size) ** 0.25
    _write(new.q_proj, scale * queries[:, :, pair].flatten(0, 2))
    _write(new.k_proj, scale * keys[:, :, pair].flatten(0, 2))
    axes = _principal(moments.sum(1), config.head_dim)[:, None]
    _write(new.v_proj, (axes.mT @ values).flatten(0, 2))
    _write(new.o_proj, (axes.mT @ outputs).flatten(0, 2).T, _projected(old.o_proj.bias, basis))


def _slice_mlp(source: LlamaDecoderLayer, layer: LlamaDecoderLayer, moments: Tensor, basis: Tensor) -> None:
    old, new = source.mlp, layer.mlp
    norm = source.post_attention_layernorm.weight.float()
    outputs = basis.T @ old.down_proj.weight.float()
    energy = moments * outputs.pow(2).sum(0)
    kept = energy.topk(new.down_proj.in_features).indices.sort().values
    _write(new.gate_proj, _reader(old.gate_proj, norm, basis)[kept])
    _write(new.up_proj, _reader(old.up_proj, norm, basis)[kept])
    _write(new.down_proj, outputs[:, kept], _projected(old.down_proj.bias, basis))


def _reader(linear: nn.Linear, norm: Tensor, basis: Tensor) -> Tensor:
    """The weight that reads the projected stream, the norm's folded in; a bias is its last column."""
    weight = (linear.weight.float() * norm) @ basis
    return weight if linear.bias is None else torch.cat([weight, linear.bias.float()[:, None]], 1)


def _projected(bias: Tensor | None, basis: Tensor) -> Tensor | None:
    return None if bias is None else bias.float() @ basis


def _write(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Sets weight and bias, which may be the weight's last column; a bias that is not given is 0."""
    if weight.shape[1] > linear.in_features:
        weight, bias = weight[:, :-1], weight[:, -1]
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_() if bias is None else linear.bias.copy_(bias)


def _refit(
    teacher: LlamaForCausalLM,
    chosen: list[int],
    student: LlamaForCausalLM,
    rows: _Rows,
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
        above = _part(teacher, layers[bounds[place] : bounds[place + 1]], norm=nn.Identity())
        below = _part(student, [layer], norm=nn.Identity())
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
