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
    Step,
    forward_flops,
    hidden_states,
    learning_rate_factor,
)

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = 12, 14


def _tokens(num, seed=0):
    return torch.randint(0, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(seed))


def _logits(model, rows, positions=None):
    return model.lm_head(hidden_states(model, rows, positions))


def _module(size="micro", **settings):
    config = PretrainConfig(**{"size": size, "steps": 10, "learning_rate": 1e-3} | settings)
    return Pretrain(llama.build(size, VOCAB, LENGTH, seed=0), config, config.steps)


# --- the schedule ---


def test_warm_up_peak_and_end():
    config = OptimizerConfig(warmup=4 / 14, final=0.1)
    factors = [learning_rate_factor(step, 14, config) for step in range(14)]
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
    config = OptimizerConfig(warmup=warmup, final=final)
    assert learning_rate_factor(step, steps, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "decay", "final", "expected"),
    [
        (0, 0.4, 0.1, 0.5),  # two steps of warm-up
        (1, 0.4, 0.1, 1.0),
        (5, 0.4, 0.1, 1.0),  # the last of the stable ones
        (6, 0.4, 0.1, 0.1 + 0.9 * (1 - math.sqrt(0.25))),
        (7, 0.4, 0.1, 0.1 + 0.9 * (1 - math.sqrt(0.5))),
        (9, 0.4, 0.1, 0.1),
        (10, 0.4, 0.1, 0.1),  # asked for once more when training ends
        (8, 0.0, 0.0, 1.0),  # a decay of one step, the last
        (9, 0.0, 0.0, 0.0),
        (2, 0.8, 0.0, 1 - math.sqrt(1 / 8)),  # no stable step
    ],
)
def test_warm_up_stable_decay(step, decay, final, expected):
    config = OptimizerConfig(schedule="wsd", warmup=0.2, decay=decay, final=final)
    assert learning_rate_factor(step, 10, config) == pytest.approx(expected, abs=1e-12)


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
    expected = [0.02 * learning_rate_factor(step, 6, module.config) for step in range(6)]
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
    one, two = (module.hidden(Step.of({"tokens": t})) for t in (tokens, other))
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


# --- packed rows: several sentences in one, each with positions of its own

SIZES = (5, 1, 8)
CLOSE = {"sdpa": 1e-9, "eager": 1e-5}  # transformers' eager attention takes its softmax in float32


def _packed(vocab=VOCAB):
    """A row of sentences end to end, its labels without the sentences' first tokens, its positions."""
    generator = torch.Generator().manual_seed(3)
    sentences = [torch.randint(0, vocab, (size,), generator=generator) for size in SIZES]
    labels = torch.cat([torch.cat([torch.tensor([-100]), sentence[1:]]) for sentence in sentences])
    positions = torch.cat([torch.arange(size) for size in SIZES])
    row = {"tokens": torch.cat(sentences), "labels": labels, "positions": positions}
    return {key: value[None] for key, value in row.items()}, sentences


def _sharp(attention, seed=0):
    """A model whose logits depend much on what it sees, in double precision."""
    model = llama.build("micro", VOCAB, LENGTH, seed=seed).double()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_teaches_what_its_sentences_teach_alone(attention):
    row, sentences = _packed()
    config = PretrainConfig(size="micro", steps=10)
    packed, alone = (Pretrain(_sharp(attention), config, 10) for _ in range(2))
    found = packed.training_step(row)["loss"]
    found.backward()
    total, targets = 0.0, 0
    for sentence in sentences:
        if len(sentence) > 1:
            loss = alone.training_step({"tokens": sentence[None]})["loss"] * (len(sentence) - 1)
            total, targets = total + loss, targets + len(sentence) - 1
    (total / targets).backward()
    assert targets == 4 + 7
    assert found.item() == pytest.approx((total / targets).item(), rel=1e-6)  # CE is taken in float32
    for (name, one), two in zip(packed.model.named_parameters(), alone.model.parameters(), strict=True):
        close = max(1e-6, CLOSE[attention])
        torch.testing.assert_close(one.grad, two.grad, rtol=100 * close, atol=close, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_stops_where_positions_start_again(attention):
    row, sentences = _packed()
    model, tokens, positions = _sharp(attention), row["tokens"], row["positions"]
    other = tokens.clone()
    other[:, : SIZES[0]] = (tokens[:, : SIZES[0]] + 1) % VOCAB
    with torch.no_grad():
        apart, changed = (_logits(model, rows, positions) for rows in (tokens, other))
        through, changed_through = (_logits(model, rows) for rows in (tokens, other))
        alone = [_logits(model, sentence[None]) for sentence in sentences]
    close = CLOSE[attention]
    torch.testing.assert_close(apart, torch.cat(alone, dim=1), rtol=close, atol=close)
    assert torch.equal(apart[:, SIZES[0] :], changed[:, SIZES[0] :])
    assert (apart[:, : SIZES[0]] - changed[:, : SIZES[0]]).abs().max() > 0.1
    # without positions the row runs on: later sentences see the first
    assert (through[:, SIZES[0] :] - changed_through[:, SIZES[0] :]).abs().amax(-1).min() > 1e-3


def test_rows_of_a_batch_are_packed_each_in_its_own_way():
    row, _ = _packed()
    tokens = row["tokens"].repeat(3, 1)
    positions = torch.stack(
        [row["positions"][0], torch.arange(LENGTH), torch.cat([torch.arange(2), torch.arange(LENGTH - 2)])]
    )
    model = _sharp("sdpa")
    with torch.no_grad():
        together = _logits(model, tokens, positions)
        for index in range(3):
            alone = _logits(model, tokens[index, None], positions[index, None])
            torch.testing.assert_close(together[index, None], alone, rtol=1e-9, atol=1e-9)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_both_kinds_of_attention_agree():
    row, _ = _packed()
    with torch.no_grad():
        one, two = (
            _logits(_sharp(attention), row["tokens"], row["positions"]) for attention in ("sdpa", "eager")
        )
    torch.testing.assert_close(one, two, rtol=CLOSE["eager"], atol=CLOSE["eager"])


def test_labels_choose_the_targets():
    module, tokens = _module(), _tokens(2)
    labels = tokens.clone()
    labels[:, 3:9] = -100
    labels[0, 12] = -100
    with torch.no_grad():
        logits = module.model(tokens[:, :-1]).logits
    kept = labels[:, 1:] != -100
    expected = cross_entropy(logits[kept], tokens[:, 1:][kept])
    found = module.training_step({"tokens": tokens, "labels": labels})
    assert int(kept.sum()) == 2 * 13 - 2 * 6 - 1
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    everything = module.training_step({"tokens": tokens})["loss"].item()
    assert abs(found["loss"].item() - everything) > 1e-3
    # labels equal to the tokens leave nothing out
    same = module.training_step({"tokens": tokens, "labels": tokens})["loss"]
    assert same.item() == everything


def test_the_first_label_of_a_row_is_no_target():
    # nothing stands before it: whether it is ignored changes nothing
    row, _ = _packed()
    module, labels = _module(), row["labels"].clone()
    labels[:, 0] = row["tokens"][:, 0]
    assert torch.equal(
        module.training_step(row)["loss"], module.training_step({**row, "labels": labels})["loss"]
    )


def test_code_0_is_a_target():
    module, tokens = _module(), _tokens(2)
    tokens[:, 5] = 0
    assert module.count({"tokens": tokens}) == {"num_targets": 2 * (LENGTH - 1)}
    one = module.training_step({"tokens": tokens})["loss"]
    labels = tokens.masked_fill(tokens == 0, -100)
    assert one.item() != module.training_step({"tokens": tokens, "labels": labels})["loss"].item()


def test_counts_leave_out_first_and_ignored_labels():
    row, _ = _packed()
    assert _module().count(row) == {"num_targets": 4 + 0 + 7}
    labels = row["labels"].clone()
    labels[0, 0] = 3  # the first of a row is no target
    assert _module().count({**row, "labels": labels}) == {"num_targets": 11}


def test_labels_that_are_all_ignored_give_0_with_a_graph():
    module, tokens = _module(), _tokens(2)
    found = module.training_step({"tokens": tokens, "labels": torch.full_like(tokens, -100)})["loss"]
    found.backward()
    assert found.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_a_loss_is_divided_by_the_count_of_the_step():
    module, tokens = _module(), _tokens(2)
    alone = module.training_step({"tokens": tokens})
    shared = module.training_step({"tokens": tokens, "num_targets": torch.tensor(6.5)})
    for key, value in alone.items():
        assert shared[key].item() == pytest.approx(value.item() * 2 * (LENGTH - 1) / 6.5, rel=1e-6)


def test_code_0_weighs_as_any_other_in_the_formula():
    module, tokens = _module(), torch.zeros(1, LENGTH, dtype=torch.int64)
    with torch.no_grad():
        expected = -module.model(tokens[:, :-1]).logits.double().log_softmax(-1)[..., 0].mean()
    assert module.training_step({"tokens": tokens})["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


# --- what is told of a training


def test_diagnose_gives_the_loss_of_each_task():
    module, tokens = _module(), _tokens(4)
    assert module.diagnose() == {}
    module.tasks = ["one", "two", "three"]
    tasks = torch.tensor([0, 0, 1, 1])[:, None].expand(4, LENGTH).clone()
    tasks[3, 9:] = 0  # a row may hold several
    module.training_step({"tokens": tokens, "tasks": tasks})
    with torch.no_grad():
        logits = module.model(tokens[:, :-1]).logits
    losses = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    found = module.diagnose()
    assert list(found) == ["loss/one", "loss/two"]
    for index, key in enumerate(found):
        assert found[key] == pytest.approx(losses[tasks[:, 1:] == index].mean().item(), rel=1e-5)


def test_forward_flops_are_two_a_weight_and_those_of_attention():
    model = llama.build("micro", 258, 512, seed=0)  # 32 wide, 96 inside, 2 layers
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 258 * 32
    attention = 4 * 2 * 32 * 512  # scores and sums over all positions: two multiply-adds each
    assert forward_flops(model, 512) == 2 * weights + attention
    assert forward_flops(model, 128) == 2 * weights + attention / 4


def test_a_step_takes_the_flops_of_its_rows():
    module = _module()
    assert module.flops_per_token == 3 * forward_flops(module.model, LENGTH)  # before the first
    module.training_step({"tokens": _tokens(2)[:, :9]})
    assert module.flops_per_token == 3 * forward_flops(module.model, 9)


def test_clipping_keeps_the_norm_from_before():
    module = _module()
    module.training_step({"tokens": _tokens(2)})["loss"].backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in module.parameters()])).item()
    module.configure_gradient_clipping(None, 0.5 * norm)
    assert module.gradient_norm.item() == pytest.approx(norm, rel=1e-5)
    clipped = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in module.parameters()])).item()
    assert clipped == pytest.approx(0.5 * norm, rel=1e-4)


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
        ({"decay": 1.2}, "decay: 1.2 must lie in 0..1"),
        ({"schedule": "linear"}, "schedule: 'linear' is unknown; choices: cosine, wsd"),
        (
            {"schedule": "wsd", "warmup": 0.6, "decay": 0.5},
            "warmup, decay: 0.6 \\+ 0.5 are more than all steps",
        ),
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
        ({"init": "normal"}, "^init: 'normal' is unknown; choices: default, delvm"),
        (
            {"embedding": "frozen"},
            "^embedding: 'frozen' is unknown; choices: learned, codebook, codebook_start",
        ),
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
