"""A LLaMA, a tokenizer's two halves -> ONNX graphs."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from delvm.errors import UserError
from delvm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnx

OPSET = 18
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
"""Names of a layer's keys and values that go in and come out, as transformers and optimum have them."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on how much is read."""
ACTIVATION = "silu"


class Builder:
    """The nodes and weights of a graph, in the order of their making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def __call__(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node of one output; returns the output's name."""
        from onnx import helper

        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, value: Tensor | np.ndarray) -> str:
        """Adds a constant; of two by one name the first stays."""
        from onnx import numpy_helper

        if name not in self.weights:
            array = value.detach().float().numpy() if isinstance(value, Tensor) else value
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        """Adds (values,) int64."""
        return self.weight(f"integers {values}", np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Adds a float32."""
        return self.weight(f"float {value}", np.array(value, np.float32))


def llama_graph(model: LlamaForCausalLM) -> "onnx.ModelProto":
    """The model in float32, reading on from what it has read: one graph for a prompt and for each next token.

    In: input_ids (batch, sequence) int64, without padding; past_key_values.N.key and .value (batch, key
    heads, past, channels) float32 of every layer N, with past = 0 at the beginning of a sentence.
    Out: logits (batch, vocabulary) float32 after the last token; present.N.key and .value, the past and what
    was read. The head is a product with a transposed embedding, so that a tied one is in the file once.

    Raises UserError for a rotary embedding or an activation outside of ROTATIONS and ACTIVATION.
    """
    from onnx import helper

    config, inner = model.config, model.model
    _check(model)
    names = {module: name for name, module in model.named_modules()}
    add = Builder()

    def linear(x: str, module: nn.Linear) -> str:
        name = names[module]
        product = add("MatMul", x, add.weight(f"{name}.weight", module.weight.T), output=f"{name}.product")
        return (
            product if module.bias is None else add("Add", product, add.weight(f"{name}.bias", module.bias))
        )

    def norm(x: str, module: LlamaRMSNorm) -> str:
        squares = add("ReduceMean", add("Pow", x, add.scalar(2)), add.integers(-1), keepdims=1)
        root = add("Sqrt", add("Add", squares, add.scalar(module.variance_epsilon)))
        return add("Mul", add("Div", x, root), add.weight(f"{names[module]}.weight", module.weight))

    past = add("Shape", PAST.format(0, "key"), start=2, end=3)
    end = add("Add", past, add("Shape", "input_ids", start=1, end=2))
    first, stop, step = (add("Squeeze", number) for number in (past, end, add.integers(1)))
    places = add("Unsqueeze", add("Range", first, stop, step), add.integers(1))  # (sequence, 1)
    read = add("Range", add("Squeeze", add.integers(0)), stop, step)  # (past + sequence,)
    mask = add("Where", add("LessOrEqual", read, places), add.scalar(0), add.scalar(-np.inf))
    rotary = inner.rotary_emb
    half = add("Mul", add("Cast", places, to=1), add.weight("frequencies", rotary.inv_freq[None]))
    angles = add("Concat", half, half, axis=-1)  # (sequence, channels)
    cos, sin = (
        add("Mul", add(kind, angles), add.scalar(rotary.attention_scaling)) for kind in ("Cos", "Sin")
    )

    channels = inner.layers[0].self_attn.head_dim
    key_heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads

    def heads(x: str) -> str:
        """(batch, sequence, heads * channels) -> (batch, heads, sequence, channels)"""
        return add("Transpose", add("Reshape", x, add.integers(0, 0, -1, channels)), perm=[0, 2, 1, 3])

    def rotated(x: str) -> str:
        left = add("Slice", x, add.integers(0), add.integers(channels // 2), add.integers(-1))
        right = add("Slice", x, add.integers(channels // 2), add.integers(channels), add.integers(-1))
        turned = add("Concat", add("Neg", right), left, axis=-1)
        return add("Add", add("Mul", x, cos), add("Mul", turned, sin))

    def for_each_query(x: str) -> str:
        """(batch, key heads, past + sequence, channels), each head once for all queries that share it."""
        if groups == 1:
            return x
        wide = add("Expand", add("Unsqueeze", x, add.integers(2)), add.integers(1, 1, groups, 1, 1))
        return add("Reshape", wide, add.integers(0, key_heads * groups, -1, channels))

    hidden = add("Gather", add.weight("model.embed_tokens.weight", inner.embed_tokens.weight), "input_ids")
    for number, layer in enumerate(inner.layers):
        attention, mlp, x = layer.self_attn, layer.mlp, norm(hidden, layer.input_layernorm)
        query = add("Mul", rotated(heads(linear(x, attention.q_proj))), add.scalar(attention.scaling))
        new = {
            "key": rotated(heads(linear(x, attention.k_proj))),
            "value": heads(linear(x, attention.v_proj)),
        }
        keys, values = (
            add("Concat", PAST.format(number, kind), of, axis=2, output=PRESENT.format(number, kind))
            for kind, of in new.items()
        )
        scores = add("MatMul", query, add("Transpose", for_each_query(keys), perm=[0, 1, 3, 2]))
        weights = add("Softmax", add("Add", scores, mask), axis=-1)
        seen = add("Transpose", add("MatMul", weights, for_each_query(values)), perm=[0, 2, 1, 3])
        merged = add("Reshape", seen, add.integers(0, 0, -1))
        hidden = add("Add", hidden, linear(merged, attention.o_proj))
        x = norm(hidden, layer.post_attention_layernorm)
        gate = linear(x, mlp.gate_proj)
        gated = add("Mul", add("Mul", gate, add("Sigmoid", gate)), linear(x, mlp.up_proj))
        hidden = add("Add", hidden, linear(gated, mlp.down_proj))
    last = add("Gather", hidden, add("Squeeze", add.integers(-1)), axis=1)
    tied = model.lm_head.weight is inner.embed_tokens.weight
    head = add.weight("model.embed_tokens.weight" if tied else "lm_head.weight", model.lm_head.weight)
    add("MatMul", norm(last, inner.norm), add("Transpose", head, perm=[1, 0]), output="logits")

    def states(template: str, length: str) -> "list[onnx.ValueInfoProto]":
        return [
            helper.make_tensor_value_info(
                template.format(number, kind), 1, ["batch", key_heads, length, channels]
            )
            for number in range(len(inner.layers))
            for kind in ("key", "value")
        ]

    graph = helper.make_graph(
        add.nodes,
        "llama",
        [helper.make_tensor_value_info("input_ids", 7, ["batch", "sequence"]), *states(PAST, "past")],
        [
            helper.make_tensor_value_info("logits", 1, ["batch", config.vocab_size]),
            *states(PRESENT, "past + sequence"),
        ],
        list(add.weights.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def _check(model: LlamaForCausalLM) -> None:
    for key, found, choices in (
        ("rope_type", model.model.rotary_emb.rope_type, ROTATIONS),
        ("hidden_act", model.config.hidden_act, (ACTIVATION,)),
    ):
        if found not in choices:
            raise UserError(f"{key}: the model has {found!r}, ONNX here has {', '.join(choices)}")


class Encoder(nn.Module):
    """(batch, 3, image_size, image_size) float32 in 0..1 -> (batch, tokens) int64; as Tokenizer.encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        tokenizer, (low, high) = self.tokenizer, self.tokenizer.pixel_range
        pixels = F.pixel_unshuffle(pixels * (high - low) + low, tokenizer.patch)
        latents = tokenizer.vqgan.encode(pixels).latents
        if tokenizer.unit_codes:
            latents = F.normalize(latents, dim=1)
        vectors = latents.flatten(2).transpose(1, 2)
        # the squared distances but for the vectors' own squares, which are the same for every code
        return (tokenizer.codebook.square().sum(1) - 2 * vectors @ tokenizer.codebook.T).argmin(-1)


class Decoder(nn.Module):
    """(batch, tokens) int64 -> (batch, 3, image_size, image_size) float32 in 0..1; as Tokenizer.decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        tokenizer = self.tokenizer
        vectors = F.embedding(codes, tokenizer.codebook).unflatten(1, tokenizer.grid).permute(0, 3, 1, 2)
        return tokenizer.from_latents(vectors).clamp(0, 1)


def write_tokenizer(tokenizer: Tokenizer, encoder: Path, decoder: Path) -> None:
    """Writes `Encoder` (pixels -> codes) and `Decoder` (codes -> pixels), for any number of pictures.

    In place, the tokenizer is float32 from then on.
    """
    tokenizer = tokenizer.float().eval()
    pixels = torch.zeros(2, 3, tokenizer.image_size, tokenizer.image_size)
    codes = torch.zeros(2, tokenizer.num_tokens, dtype=torch.int64)
    for module, example, names, file in (
        (Encoder(tokenizer), pixels, ("pixels", "codes"), encoder),
        (Decoder(tokenizer), codes, ("codes", "pixels"), decoder),
    ):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own machinery, nothing that a user could change
            program = torch.onnx.export(
                module.eval(), (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=names[:1], output_names=names[1:],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        assert program is not None
        program.save(file)
