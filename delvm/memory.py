"""A model's configuration and a micro-batch -> the memory that training takes on a GPU, estimated.

Counted from what autograd keeps of transformers' Llama, what AdamW holds and the fused losses buffer; summed,
though not all of it is there at once. Left out: what CUDA takes for itself, what the allocator cannot use,
the masks of packed rows, a cached teacher's few codes, and what compilation, and an embedding that reads a
codebook, save.
"""

from dataclasses import dataclass

from transformers import LlamaConfig

from delvm.distill.fused import CHUNK
from delvm.llama import count_parameters
from delvm.training import TrainerConfig

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    """Whatever rows there are: weights, and of a trained model gradients and the optimizer's state."""
    activations: int
    """With the rows: activations, and the buffers of the loss."""

    @property
    def total(self) -> int:
        return self.weights + self.activations

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.weights + other.weights, self.activations + other.activations)


def training(config: LlamaConfig, trainer: TrainerConfig, *, rows: int, length: int) -> Memory:
    """A model in training: from labels alone, or from a cache of its teacher. Add a `live_teacher`.

    rows, length: of one micro-batch of one process; tokens of a row.
    """
    tokens, low = rows * length, _low(trainer)
    # weights, gradients and AdamW's two moments, all in float32; the moving average
    number = 4 + (trainer.averaging > 0)
    weights = number * FP32 * count_parameters(config) + cast_weights(config, trainer)
    # the last hidden states, and the gradients that the loss makes of them and the head and backward scales
    loss = 3 * FP32 * tokens * config.hidden_size + 2 * FP32 * config.vocab_size * config.hidden_size
    # logits and probabilities; what the matmuls write and read, where that is not the same
    chunk = min(CHUNK, tokens) * config.vocab_size * (2 * FP32 + _copy(low))
    passing = _passing(config, low) * tokens  # gradients on their way through a layer
    kept = activations(config, trainer, rows=rows, length=length)
    return Memory(weights, kept + loss + chunk + passing)


def live_teacher(
    config: LlamaConfig, precision: str, *, rows: int, length: int, processes: int = 1
) -> Memory:
    """A frozen teacher that runs beside the student.

    precision: `32` or `bf16`. processes: how many share its layers; each holds one whole that runs, and one
    that is on its way.
    """
    tokens, size = rows * length, FP32 if precision == "32" else BF16
    logits = min(CHUNK, tokens) * config.vocab_size * (FP32 + _copy(size))
    states = tokens * config.hidden_size * size
    layer = _layer_parameters(config)
    shared = layer * config.num_hidden_layers
    held = count_parameters(config) - shared + shared // processes + (2 * layer if processes > 1 else 0)
    return Memory(size * held, _passing(config, size) * tokens + states + logits)


def activations(config: LlamaConfig, trainer: TrainerConfig, *, rows: int, length: int) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, up to the last norm."""
    layer, layers = layer_activations(config, trainer, length), config.num_hidden_layers
    # checkpointed: of every layer its input, and the whole of the one that is made again
    others = FP32 * config.hidden_size if trainer.checkpointing else layer
    return rows * length * (layer + (layers - 1) * others + _norm(config))


def layer_activations(config: LlamaConfig, trainer: TrainerConfig, length: int) -> int:
    """`activations` of one decoder layer, its input included, for each token of rows of `length`."""
    low, mixed = _low(trainer), trainer.precision == "bf16-mixed"
    queries, keys = _widths(config)
    # what the projections read, of attention and of the MLP: under autocast every one casts it for itself
    inputs = (3 + 2) * BF16 * config.hidden_size if mixed else (1 + 1) * FP32 * config.hidden_size
    # queries, keys, values, and the result, which the output projection reads too
    attention = 2 * (queries + keys) * low
    if trainer.attention == "eager":  # the softmax, and its cast copy
        attention += config.num_attention_heads * length * (FP32 + _copy(low))
    else:  # the softmax' logarithmic sums alone
        attention += config.num_attention_heads * FP32
    # the gate, its activation, the way up, their product
    mlp = 4 * config.intermediate_size * low
    return 2 * _norm(config) + inputs + attention + mlp


def cast_weights(config: LlamaConfig, trainer: TrainerConfig) -> int:
    """Bytes of the copies in bfloat16 of the layers' matrices that autocast makes and autograd keeps."""
    if trainer.precision != "bf16-mixed":
        return 0
    # checkpointed: nobody keeps a layer's before the backward pass makes them again
    layers = 1 if trainer.checkpointing else config.num_hidden_layers
    return BF16 * layers * _layer_parameters(config)


def _layer_parameters(config: LlamaConfig) -> int:
    """Those of a layer's matrices; of its norms and biases there are few."""
    queries, keys = _widths(config)
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def _norm(config: LlamaConfig) -> int:
    """Kept of an RMSNorm for each token: what it reads, the same normalised, the factor; all in float32."""
    return FP32 * (2 * config.hidden_size + 1)


def _passing(config: LlamaConfig, size: int) -> int:
    """A token's share of what passes through a layer, at its widest, the MLP; kept by nobody."""
    return (3 * config.intermediate_size + 2 * config.hidden_size) * size


def _widths(config: LlamaConfig) -> tuple[int, int]:
    """Channels of the queries, and of keys or values."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head


def _copy(size: int) -> int:
    """Bytes of a float32's copy for matmuls in numbers of this size: none where they are the same."""
    return size if size < FP32 else 0


def _low(trainer: TrainerConfig) -> int:
    """Bytes of a number that a matmul gives."""
    return BF16 if trainer.precision == "bf16-mixed" else FP32
