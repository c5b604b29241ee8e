"""A teacher's weights -> a smaller student's first weights.

After SliceGPT (Ashkboos et al. 2024): RMSNorm's weights are folded into the layers that read it, and what is
left of it does not see a rotation of the residual stream. So the stream is projected onto the directions in
which its normalised states are largest over a few sentences. Unlike there one projection serves all layers
and skip connections, for the student is a plain Llama. Its heads, MLP channels and layers are the teacher's
that contribute most, as in structured pruning (Minitron: Muralidharan et al. 2024).
"""

import math

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from delvm.distill.layers import choose_layers
from delvm.distill.moments import Rows, evaluating, observe
from delvm.distill.refit import refit_outputs
from delvm.distill.sliceable import CUT, check, check_ends, check_sentences
from delvm.llama import initialise


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
    check_sentences(sentences, config.vocab_size)
    rows = Rows(sentences, positions)
    with evaluating(teacher):
        chosen = choose_layers(teacher, config.num_hidden_layers, sentences, layers, positions=positions)
        sources = [teacher.model.layers[number] for number in chosen]
        seen = observe(teacher, sources, rows)
        basis = _principal(seen.stream, config.hidden_size)
        student = initialise(config, seed=0).to(teacher.device)  # every weight is overwritten
        _slice_ends(teacher, student, seen.stream, basis)
        gain = _gain(seen.stream, basis)
        for number, (source, layer) in enumerate(zip(sources, student.model.layers, strict=True)):
            layer.input_layernorm.weight.fill_(gain)
            layer.post_attention_layernorm.weight.fill_(gain)
            _slice_attention(source, layer, config, seen.heads[number], basis)
            _slice_mlp(source, layer, seen.channels[number], basis)
        if refit and any(getattr(config, key) != getattr(teacher.config, key) for key in CUT):
            refit_outputs(teacher, chosen, student, rows, basis)
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
    check_sentences(sentences, config.vocab_size)
    with evaluating(teacher):
        stream = observe(teacher, list(teacher.model.layers), Rows(sentences, positions)).stream
    student = initialise(config, seed=seed)
    _slice_ends(teacher, student, stream, _principal(stream, config.hidden_size))
    return student


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
