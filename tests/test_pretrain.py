import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from delvm import llama
from delvm.pretrain import (
    OptimizerConfig,
    Pretrain,
    PretrainConfig,
    learning_rate_factor,
    token_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = 12, 14


def _tokens(num, seed=0):
    return torch.randint(0, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(seed))


def _module(size="micro", **settings):
    config = PretrainConfig(**{"size": size, "steps": 10, "learning_rate": 1e-3} | settings)
    return Pretrain(llama.build(size, VOCAB, LENGTH, seed=0), config, config.steps)


# --- the schedule ---


def test_warm_up_peak_and_end():
    factors = [learning_rate_factor(step, 14, 4 / 14, 0.1) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[8] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down
    assert factors[13] == pytest.approx(0.1)  # the last step has the final rate
    assert all(before > after for before, after in pairwise(factors[3:]))


@pytest.mark.parametrize(
    ("step", "steps", "warmup", "final", "expected"),
    [
        (0, 100, 0.0, 0.0, 1.0),  # no warm-up: the first step is the peak
        (99, 100, 0.0, 0.0, 0.0),
        (0, 100, 0.05, 0.1, 0.2),
        (4, 100, 0.05, 0.1, 1.0),
        (99, 100, 0.05, 0.1, 0.1),
        (100, 100, 0.05, 0.1, 0.1),  # asked for once more when training ends
        (0, 1, 0.05, 0.1, 1.0),
        (9, 10, 1.0, 0.1, 1.0),  # nothing but warm-up
        (50, 100, 0.0, 1.0, 1.0),  # constant
    ],
)
def test_literal_factors(step, steps, warmup, final, expected):
    assert learning_rate_factor(step, steps, warmup, final) == pytest.approx(expected, abs=1e-12)


def test_the_optimizer_follows_the_schedule():
    module = _module(steps=6, learning_rate=0.02, warmup=0.5, final=0.25)
    parts = module.configure_optimizers()
    assert parts["lr_scheduler"]["interval"] == "step"
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    expected = [0.02 * learning_rate_factor(step, 6, 0.5, 0.25) for step in range(6)]
    assert rates == [{rate} for rate in expected]
    assert expected[2] == 0.02
    assert expected[5] == pytest.approx(0.005)


# --- the optimizer ---


@pytest.mark.parametrize("size", ["micro", "lvm-100m", "80m"])
def test_weight_decay_spares_norms_embeddings_and_biases(size):
    with torch.device("meta"):  # the published sizes: an untied head, and biases
        module = _module(size, weight_decay=0.3)
        optimizer = module.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(decay) == sorted(names.values())  # every parameter once
    for name, value in decay.items():
        spared = "norm" in name or "embed_tokens" in name or name.endswith(".bias")
        assert value == (0.0 if spared else 0.3), name
    assert {0.0, 0.3} == set(decay.values())
    assert ("lm_head.weight" in decay) == (size != "micro")


def test_the_optimizer_has_the_betas_of_the_config():
    optimizer = _module(beta1=0.8, beta2=0.9).configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


# --- the loss ---


def test_every_token_after_bos_is_a_target():
    module, tokens = _module(), _tokens(3)
    with torch.no_grad():
        logits = module.model(tokens).logits.double().numpy()
    losses = []
    for b in range(3):
        for t in range(1, LENGTH):
            row = logits[b, t - 1]
            losses.append(np.log(np.exp(row).sum()) - row[tokens[b, t]])
    found = module.training_step({"tokens": tokens})
    assert set(found) == {"loss", "ce"}
    assert found["loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["ce"].item() == found["loss"].item()
    # a fresh model is nearly uniform
    assert found["loss"].item() == pytest.approx(math.log(VOCAB), abs=0.1)


def test_the_last_token_is_no_input():
    module, tokens = _module(), _tokens(2)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    one, two = (module.losses(t[:, :-1], tokens[:, 1:])["loss"] for t in (tokens, other))
    assert torch.equal(one, two)


def test_two_halves_equal_the_whole_batch():
    tokens = _tokens(6)

    def run(parts):
        module = _module()
        losses = []
        for part in parts:
            loss = module.training_step({"tokens": part})["loss"]
            (loss / len(parts)).backward()
            losses.append(loss.item())
        return np.mean(losses), {name: p.grad for name, p in module.model.named_parameters()}

    whole, gradients = run([tokens])
    halves, summed = run(tokens.split(3))
    assert halves == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, atol=1e-7, rtol=1e-4)


def test_token_cross_entropy_leaves_ignored_labels_out():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, -100], [-100, 4, 0]])
    kept = labels != -100
    assert token_cross_entropy(logits, labels).item() == pytest.approx(
        cross_entropy(logits[kept], labels[kept]).item(), rel=1e-6
    )


def test_token_cross_entropy_of_ignored_labels_alone_is_0_with_a_graph():
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(1, 3, 5))


def test_token_cross_entropy_is_computed_in_float32():
    logits = torch.randn(4, 50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(4, 50, dtype=torch.int64)
    found = token_cross_entropy(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(token_cross_entropy(logits.float(), labels).item(), rel=1e-7)


def test_code_0_is_a_target():
    logits = torch.zeros(1, 2, 5)
    logits[..., 0] = 3.0
    labels = torch.zeros(1, 2, dtype=torch.int64)
    assert token_cross_entropy(logits, labels).item() == pytest.approx(
        math.log(1 + 4 * math.exp(-3)), rel=1e-5
    )


# --- configurations ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: 0.0 must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate: nan must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate: inf must be above 0 and finite"),
        ({"warmup": 1.5}, "warmup: 1.5 must lie in 0..1"),
        ({"warmup": -0.1}, "warmup: -0.1 must lie in 0..1"),
        ({"final": 2.0}, "final: 2.0 must lie in 0..1"),
        ({"final": math.nan}, "final: nan must lie in 0..1"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay: nan must be at least 0"),
        ({"beta1": 1.0}, "beta1: 1.0 must lie in 0..1, 1 excluded"),
        ({"beta2": -0.5}, "beta2: -0.5 must lie in 0..1, 1 excluded"),
        ({"clip": 0.0}, "clip: 0.0 must be above 0"),
    ],
)
@pytest.mark.parametrize("config", [OptimizerConfig, PretrainConfig])
def test_impossible_optimizer_values(config, values, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "huge"}, r"^size: 'huge' is unknown; choices: micro, tiny, .*300m"),
        ({"steps": 0}, "^steps: 0 must be at least 1"),
        ({"batch_size": 0}, "^batch_size: 0 must be at least 1"),
    ],
)
def test_impossible_training_values(values, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**values)


def test_the_edges_of_the_ranges_are_possible():
    lowest = PretrainConfig(warmup=0.0, final=0.0, weight_decay=0.0, beta1=0.0, steps=1, batch_size=1)
    assert (lowest.warmup, lowest.final, lowest.steps) == (0.0, 0.0, 1)
    assert PretrainConfig(warmup=1.0, final=1.0).final == 1.0
