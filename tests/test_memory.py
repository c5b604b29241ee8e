import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from delvm import llama
from delvm.memory import Memory, activations, cast_weights, live_teacher, training
from delvm.pretrain import hidden_states
from delvm.training import TrainerConfig, set_up_model

ROWS, LENGTH = 3, 40
LAYERS = 4
PRECISIONS = ("32-true", "bf16-mixed")


def _config(**settings):
    shape = {
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True,
        "max_position_embeddings": LENGTH, "use_cache": False,
    }  # fmt: skip
    return LlamaConfig(**shape | settings)


def _trainer(**settings):
    return TrainerConfig(accelerator="cpu", **settings)


def _kept(config, trainer):
    """Bytes of the storages that autograd keeps from a forward pass, each once, without the parameters'."""
    model = LlamaForCausalLM(config)
    set_up_model(model, trainer)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, or another tensor could get its place
        return tensor

    tokens = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % config.vocab_size
    mixed = trainer.precision == "bf16-mixed"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False),  # as Lightning does
    ):
        states = hidden_states(model, tokens)
    assert states.requires_grad
    return sum(storage.nbytes() for place, storage in storages.items() if place not in parameters)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("shape", "attention"),
    [
        ({}, "sdpa"),
        ({}, "eager"),
        ({"num_key_value_heads": 2}, "sdpa"),
        ({"head_dim": 32, "attention_bias": False}, "sdpa"),
        ({"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1}, "sdpa"),
    ],
)
def test_the_estimate_is_what_autograd_keeps(shape, attention, precision):
    config, trainer = _config(**shape), _trainer(precision=precision, attention=attention)
    estimate = activations(config, trainer, rows=ROWS, length=LENGTH) + cast_weights(config, trainer)
    # what is left out: the ids, and one cosine and sine for each position and channel of a head
    assert _kept(config, trainer) == pytest.approx(estimate, rel=0.015)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpointed_model_keeps_the_inputs_of_its_layers_and_makes_one_again(precision):
    trainer, plain = _trainer(precision=precision, checkpointing=True), _trainer(precision=precision)
    # what the backward pass makes again, where the hooks do not see it: one layer's share of a plain pass
    layer = _kept(_config(), plain) - _kept(_config(num_hidden_layers=LAYERS - 1), plain)
    its_input = 4 * ROWS * LENGTH * 64  # which is there already
    estimate = activations(_config(), trainer, rows=ROWS, length=LENGTH)
    cast = cast_weights(_config(), trainer)  # of that layer; the others' are in nobody's graph
    assert LAYERS * cast == cast_weights(_config(), plain)
    assert _kept(_config(), trainer) + layer - its_input == pytest.approx(estimate + cast, rel=0.015)
    assert estimate < 0.5 * activations(_config(), plain, rows=ROWS, length=LENGTH)


def test_weights_gradients_and_moments_take_16_bytes_a_parameter():
    config = llama.configuration("1b", 8192, 2048)
    size, shape = 1_164_191_744, {"rows": 1, "length": 16}
    matrices = 22 * (4 * 2048**2 + 3 * 2048 * 5632)
    assert training(config, _trainer(), **shape).weights == 16 * size
    assert training(config, _trainer(averaging=0.999), **shape).weights == 20 * size
    mixed = training(config, _trainer(precision="bf16-mixed"), **shape)
    assert mixed.weights == 16 * size + 2 * matrices
    checkpointed = training(config, _trainer(precision="bf16-mixed", checkpointing=True), **shape)
    assert checkpointed.weights == 16 * size + 2 * matrices / 22
    assert live_teacher(config, "bf16", **shape).weights == 2 * size
    assert live_teacher(config, "32", **shape).weights == 4 * size
    # of eight processes each holds an eighth of the layers, and two whole
    shared = size - matrices + matrices // 8 + 2 * matrices // 22
    assert live_teacher(config, "32", **shape, processes=8).weights == 4 * shared


@pytest.mark.parametrize(("rows", "chunk"), [(3, 120), (20, 512)])
def test_the_losss_part_of_the_activations(rows, chunk):
    config = _config(vocab_size=8192)
    kept = activations(config, _trainer(), rows=rows, length=LENGTH)
    need = training(config, _trainer(), rows=rows, length=LENGTH)
    hidden, head, logits = 4 * rows * LENGTH * 64, 4 * 8192 * 64, 4 * chunk * 8192
    passing = 4 * rows * LENGTH * (3 * 192 + 2 * 64)
    assert need.activations == kept + 3 * hidden + 2 * head + 2 * logits + passing
    teacher = live_teacher(config, "32", rows=rows, length=LENGTH)
    assert teacher.activations == logits + passing + hidden
    # in bfloat16 all is half as large; the logits are float32, and what the matmul gives comes on top
    low = live_teacher(config, "bf16", rows=rows, length=LENGTH)
    assert low.activations == 1.5 * logits + (passing + hidden) / 2


def test_activations_go_by_rows_and_weights_do_not():
    config, trainer = _config(), _trainer(precision="bf16-mixed")
    one, two, three = (training(config, trainer, rows=rows, length=LENGTH) for rows in (20, 21, 22))
    assert one.weights == two.weights == three.weights
    assert three.activations - two.activations == two.activations - one.activations > 0
    assert one + two == Memory(2 * one.weights, one.activations + two.activations)
    assert one.total == one.weights + one.activations
