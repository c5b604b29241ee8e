import math
import os
import signal
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import llama, ranks
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.training import (
    CHECKPOINT,
    Interrupted,
    Shuffled,
    TrainerConfig,
    check_batch_size,
    checkpoint_activations,
    choose_attention,
    discard_checkpoint,
    set_up_model,
    train,
)
from tests.processes import together

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 12, 4


class Noisy(pl.LightningModule):
    """A linear layer whose step draws from torch's global random state; optimizer, schedule have theirs."""

    def __init__(self, seed=0, fail_at=()):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
        self.fail_at, self.seen = fail_at, []

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        noise = torch.randn(2)
        loss = ((self.net(batch["x"]) + noise - 1) ** 2).mean()
        if self.global_step in self.fail_at:
            loss = loss * math.nan
        return {"loss": loss, "noise": noise.mean()}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Items(torch.utils.data.Dataset):
    """Item i depends on i alone; reading item `at` does something as well."""

    def __init__(self, at=None, action=None):
        self.at, self.action = at, action

    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        if index == self.at:
            self.action()
        return {"index": index, "x": torch.randn(3, generator=torch.Generator().manual_seed(index))}


class Sentences(torch.utils.data.Dataset):
    def __init__(self, at=None):
        self.at = at

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {
            "tokens": torch.randint(0, 12, (8,), generator=torch.Generator().manual_seed(index)),
            "task": 0,
        }

    def __len__(self):
        return STEPS * BATCH


def _run(folder, module, dataset, seed=0, **settings):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 5} | settings)
    return train(
        module, dataset, name="tiny", steps=STEPS, batch_size=BATCH, clip=1.0, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip


def _send(number):
    return lambda: os.kill(os.getpid(), number)


def _weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def _assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and curve of a run that nothing disturbed."""
    module = Noisy()
    curve = _run(tmp_path_factory.mktemp("whole"), module, Items())
    assert module.seen == torch.arange(STEPS * BATCH).view(STEPS, BATCH).tolist()  # in order, each once
    return _weights(module), curve


# --- the curve ---


def test_the_curve_is_the_mean_between_its_points(tmp_path):
    values = []

    class Recorder(Noisy):
        def training_step(self, batch):
            outputs = super().training_step(batch)
            values.append({key: value.item() for key, value in outputs.items()})
            return outputs

    curve = _run(tmp_path, Recorder(), Items())
    assert [point["step"] for point in curve] == [5, 10, 12]  # the last step has a point as well
    for point, part in zip(curve, (values[:5], values[5:10], values[10:]), strict=True):
        assert set(point) == {"step", "loss", "noise"}
        for key in ("loss", "noise"):
            assert point[key] == pytest.approx(np.mean([value[key] for value in part]), rel=1e-5)


def test_training_equals_a_plain_loop(tmp_path):
    """One optimizer step a batch on its gradient, clipped to the norm, and the schedule's step after it."""
    curve = _run(tmp_path, module := Noisy(), Items())
    plain = Noisy()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    torch.manual_seed(0)
    losses = []
    for step in range(STEPS):
        items = [Items()[step * BATCH + i]["x"] for i in range(BATCH)]
        noise = torch.randn(2)
        loss = ((plain.net(torch.stack(items)) + noise - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        optimizer.step()
        losses.append(loss.item())
    assert curve[0]["loss"] == pytest.approx(np.mean(losses[:5]), rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_tensorboard_has_the_curve(tmp_path):
    curve = _run(tmp_path, Noisy(), Items())
    assert list((tmp_path / "tensorboard" / "tiny").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tiny")).Reload()
    for key in ("loss", "noise"):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        assert points == [(point["step"], pytest.approx(point[key], rel=1e-6)) for point in curve]


def test_the_checkpoint_stays_until_the_result_is_saved(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    _run(tmp_path, Noisy(), Items(), checkpoint_every=5)
    # killed here, before its caller has saved the weights: it goes on from step 10 of 12
    again = Noisy(seed=1)
    assert _run(tmp_path, again, Items(), checkpoint_every=5, seed=99) == curve
    assert len(again.seen) == 2
    _assert_equal(_weights(again), weights)
    discard_checkpoint(tmp_path)
    discard_checkpoint(tmp_path)  # none there: nothing to do
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_a_new_run_has_curves_of_its_own(tmp_path):
    for _ in range(2):
        _run(tmp_path, Noisy(), Items())
        discard_checkpoint(tmp_path)
    assert len(list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))) == 1


# --- stop and go on ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
# in the first step, between two points of the curve, at a point, in the last step but one, in the last
@pytest.mark.parametrize("step", [1, 7, 10, 11, 12])
def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, uninterrupted, number, step):
    weights, curve = uninterrupted
    first = Noisy()
    with pytest.raises(Interrupted, match=f"^tiny: stopped at step {step} of 12$"):
        _run(tmp_path, first, Items((step - 1) * BATCH + 1, _send(number)))
    assert len(first.seen) == step  # the step in which the signal came is finished
    assert (tmp_path / CHECKPOINT).is_file()
    assert not (tmp_path / f".{CHECKPOINT}.partial").exists()
    # another start and another random state: all must come from the checkpoint
    second = Noisy(seed=1)
    assert _run(tmp_path, second, Items(), seed=99) == curve
    assert second.seen == torch.arange(step * BATCH, STEPS * BATCH).view(-1, BATCH).tolist()
    _assert_equal(_weights(second), weights)


def test_a_run_stopped_twice(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    for seed, item in enumerate((9, 30)):
        with pytest.raises(Interrupted):
            _run(tmp_path, Noisy(seed), Items(item, _send(signal.SIGTERM)), seed=seed)
    module = Noisy(seed=7)
    assert _run(tmp_path, module, Items(), seed=7) == curve
    _assert_equal(_weights(module), weights)


def test_a_killed_run_goes_on_from_its_last_regular_checkpoint(tmp_path, uninterrupted):
    weights, curve = uninterrupted

    def die():
        raise RuntimeError("killed")

    first = Noisy()
    with pytest.raises(RuntimeError, match="killed"):
        _run(tmp_path, first, Items(9 * BATCH + 2, die), checkpoint_every=4)
    assert len(first.seen) == 9
    second = Noisy(seed=1)
    assert _run(tmp_path, second, Items(), seed=99, checkpoint_every=4) == curve
    assert second.seen[0] == list(range(8 * BATCH, 9 * BATCH))  # from step 8
    _assert_equal(_weights(second), weights)


def test_checkpoints_and_their_cadence_change_nothing(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    module = Noisy()
    assert _run(tmp_path, module, Items(), checkpoint_every=1) == curve
    _assert_equal(_weights(module), weights)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("kind", ["pretrain", "distill"])
def test_language_models_go_on_to_the_same_weights(tmp_path, kind, settings):
    def module(seed):
        model = llama.build("micro", 12, 8, seed=seed)
        if kind == "pretrain":
            return Pretrain(model, PretrainConfig(size="micro", steps=STEPS, learning_rate=1e-2), STEPS)
        config = DistillConfig(size="micro", steps=STEPS, learning_rate=1e-2)
        return Distill(model, Live(llama.build("micro", 12, 8, seed=5)), config)

    whole = module(0)
    curve = _run(tmp_path / "whole", whole, Sentences(), **settings)
    with pytest.raises(Interrupted):
        _run(tmp_path / "parts", module(0), Sentences(7 * BATCH), **settings)
    second = module(1)
    assert _run(tmp_path / "parts", second, Sentences(), **settings) == curve
    assert set(curve[0]) == {"step", "loss", "ce"} | ({"kd"} if kind == "distill" else set())
    _assert_equal(_weights(second), _weights(whole))
    assert not torch.equal(whole.model.model.norm.weight, torch.ones(32))  # it did learn


def test_a_students_checkpoint_holds_no_teacher(tmp_path):
    student, teacher = llama.build("micro", 12, 8, seed=0), llama.build("tiny", 12, 8, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = Distill(student, Live(teacher), DistillConfig(size="micro", steps=STEPS))
    with pytest.raises(Interrupted):
        _run(tmp_path, module, Sentences(2 * BATCH))
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert sorted(checkpoint["state_dict"]) == sorted(f"model.{name}" for name in student.state_dict())
    shapes = set()

    def walk(value):
        if isinstance(value, torch.Tensor):
            shapes.add(tuple(value.shape))
        for part in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        ):
            walk(part)

    walk(checkpoint)
    own = {tuple(value.shape) for value in student.state_dict().values()}
    random_state = tuple(torch.get_rng_state().shape)
    assert own <= shapes <= own | {(), random_state}
    (state,) = checkpoint["optimizer_states"]
    assert len(state["state"]) == len(list(student.parameters()))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


# --- micro-batches and processes ---


class Targets(Noisy):
    """A linear layer over tokens of which some are no targets: the mean over all of a step's targets."""

    def count(self, batch):
        return {"num_targets": int((batch["labels"] >= 0).sum())}

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        wrong = ((self.net(batch["x"]) - 1) ** 2).sum(-1)
        # gradients are the mean over micro-batches and processes of these
        share = ranks.mean({"n": batch["num_targets"].double()})["n"]
        loss = self.trainer.accumulate_grad_batches * (wrong * (batch["labels"] >= 0)).sum() / share
        return {"loss": loss, "mean": loss.detach()}


class Sentences8(Items):
    """(8, 3) inputs, of which item i has 1 + i % 7 labelled: no two micro-batches have as many."""

    def __getitem__(self, index):
        super().__getitem__(index)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(index))
        return {"index": index, "x": x, "labels": (torch.arange(8) <= index % 7).long() - 1}


def _train_targets(folder, at=None, action=None, seed=0, rank=None, **settings):
    """(weights, curve, items seen) or, where it is stopped, (what it says, items seen)."""
    dataset = Sentences8(at, action) if rank in (None, ranks.rank()) else Sentences8()
    module = Targets(seed)
    try:
        curve = _run(folder, module, dataset, **settings)
    except Interrupted as error:
        return str(error), module.seen
    return {name: value.numpy() for name, value in module.state_dict().items()}, curve, module.seen


@pytest.fixture(scope="module")
def targets_at_once(tmp_path_factory):
    return _train_targets(tmp_path_factory.mktemp("once"))


def _assert_close(one, two):
    for name, value in one[0].items():
        np.testing.assert_allclose(two[0][name], value, atol=1e-5)
    assert len(one[1]) == len(two[1]) == 3
    for mine, others in zip(one[1], two[1], strict=True):
        assert others == {key: pytest.approx(value, rel=1e-5) for key, value in mine.items()}


def test_the_loss_is_the_mean_over_the_steps_targets(targets_at_once):
    plain, losses, counts = Noisy(), [], set()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    for step in range(STEPS):
        rows = [Sentences8()[step * BATCH + i] for i in range(BATCH)]
        inputs = torch.cat([row["x"][row["labels"] >= 0] for row in rows])
        counts.add(len(inputs))
        loss = ((plain.net(inputs) - 1) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        optimizer.step()
        losses.append(loss.item())
    assert len(counts) > 1
    weights, curve, _ = targets_at_once
    means = [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    assert [point["loss"] for point in curve] == pytest.approx(means, rel=1e-5)
    assert [point["mean"] for point in curve] == pytest.approx(means, rel=1e-5)
    for name, value in plain.state_dict().items():
        np.testing.assert_allclose(weights[name], value.numpy(), atol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing(tmp_path, targets_at_once, accumulate):
    found = _train_targets(tmp_path, accumulate=accumulate)
    _assert_close(targets_at_once, found)
    assert found[2] == torch.arange(STEPS * BATCH).view(-1, BATCH // accumulate).tolist()


def test_every_micro_batch_is_told_the_targets_of_the_step(tmp_path):
    told = []

    class Told(Targets):
        def training_step(self, batch):
            told.append((self.count(batch)["num_targets"], batch["num_targets"]))
            return super().training_step(batch)

    _run(tmp_path, Told(), Sentences8(), accumulate=2)
    assert len(told) == 2 * STEPS
    for (one, all_of_one), (two, all_of_two) in zip(told[::2], told[1::2], strict=True):
        assert all_of_one.dtype == torch.int64
        assert (int(all_of_one), int(all_of_two)) == (one + two, one + two)
    assert any(one != two for (one, _), (two, _) in zip(told[::2], told[1::2], strict=True))


def test_a_module_that_counts_no_targets_is_told_none(tmp_path):
    class Keys(Noisy):
        def training_step(self, batch):
            assert set(batch) == {"index", "x"}
            return super().training_step(batch)

    assert len(_run(tmp_path, Keys(), Items())) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_change_nothing(tmp_path, targets_at_once, accumulate):
    first, second = together(lambda: _train_targets(tmp_path, accumulate=accumulate))
    _assert_close(targets_at_once, first)
    assert second[1] == first[1]  # the curve is that of all
    for name, value in first[0].items():
        np.testing.assert_array_equal(second[0][name], value)
    rows = torch.arange(STEPS * BATCH).view(STEPS, 2, -1, BATCH // 2 // accumulate)
    assert [first[2], second[2]] == [rows[:, rank].flatten(0, 1).tolist() for rank in (0, 1)]
    assert len(list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))) == 1


def test_four_processes(tmp_path, targets_at_once):
    for found in together(lambda: _train_targets(tmp_path), num=4):
        _assert_close(targets_at_once, found)


@pytest.mark.parametrize("step", [1, 7, 10, 12])
def test_going_on_amid_micro_batches(tmp_path, step):
    whole = _train_targets(tmp_path / "whole", accumulate=2)
    at = (step - 1) * BATCH + 1
    said, seen = _train_targets(tmp_path / "parts", at, _send(signal.SIGTERM), accumulate=2)
    assert said == f"tiny: stopped at step {step} of 12"
    assert len(seen) == 2 * step  # no step is left half done
    again = _train_targets(tmp_path / "parts", seed=1, accumulate=2)
    assert again[1] == whole[1]
    assert again[2] == torch.arange(step * BATCH, STEPS * BATCH).view(-1, BATCH // 2).tolist()
    for name, value in whole[0].items():
        np.testing.assert_array_equal(again[0][name], value)


@pytest.mark.parametrize("rank", [0, 1])  # who is asked to stop
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_stop_at_the_same_step_and_go_on(tmp_path, rank, accumulate):
    whole, _ = together(lambda: _train_targets(tmp_path / "whole", accumulate=accumulate))
    at = 6 * BATCH + rank * BATCH // 2
    stop = lambda: _train_targets(  # noqa: E731
        tmp_path / "parts", at, _send(signal.SIGTERM), rank=rank, accumulate=accumulate
    )
    (said, seen), (other_said, other_seen) = together(stop)
    assert said == other_said == "tiny: stopped at step 7 of 12"
    assert len(seen) == len(other_seen) == 7 * accumulate
    for found in together(lambda: _train_targets(tmp_path / "parts", seed=1, accumulate=accumulate)):
        for mine, others in zip(whole[1], found[1], strict=True):  # its sums were rounded once more
            assert others == {key: pytest.approx(value, rel=1e-6) for key, value in mine.items()}
        for name, value in whole[0].items():
            np.testing.assert_array_equal(found[0][name], value)


def test_one_process_goes_on_where_two_stopped(tmp_path, targets_at_once):
    stopped = together(lambda: _train_targets(tmp_path, 6 * BATCH, _send(signal.SIGTERM), rank=0))
    assert {said for said, _ in stopped} == {"tiny: stopped at step 7 of 12"}
    found = _train_targets(tmp_path, seed=1)
    _assert_close(targets_at_once, found)
    assert found[2][0] == list(range(7 * BATCH, 8 * BATCH))


def test_all_processes_see_a_loss_that_is_not_finite(tmp_path):
    def work():
        return _run(tmp_path, Noisy(fail_at=[7] if ranks.rank() else []), Items())

    first, second = together(work)
    assert str(first).startswith("tiny: not a finite loss at step 10")
    assert type(second) is ranks.Ended


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 3), (3, 2), (2, 4)])
def test_a_step_that_cannot_be_shared(batch_size, accumulate):
    with pytest.raises(UserError, match=rf"^student.batch_size: {batch_size} a step must divide by"
                       rf" processes \* trainer.accumulate = 1 \* {accumulate}$"):  # fmt: skip
        check_batch_size("student.batch_size", batch_size, accumulate)
    check_batch_size("student.batch_size", 6 * accumulate, accumulate)


def test_a_step_that_processes_cannot_share(tmp_path):
    said = "tiny.batch_size: 4 a step must divide by processes * trainer.accumulate = 3 * 1"
    first, *others = together(lambda: _run(tmp_path, Noisy(), Items()), num=3)
    assert str(first) == said
    assert {type(other) for other in others} == {ranks.Ended}


# --- averaging ---


def _average_by_hand(decay):
    """The moving average of a plain run's weights after each step."""
    weights = []

    class Recorder(Noisy):
        def on_train_batch_end(self, *_):
            weights.append(_weights(self))

    return Recorder, weights


def test_the_average_is_what_training_ends_with(tmp_path):
    recorder, weights = _average_by_hand(0.6)
    curve = _run(tmp_path, module := recorder(), Items(), averaging=0.6)
    average = _weights(Noisy())
    for step, current in enumerate(weights, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    assert (1 + 12) / (10 + 12) < 0.6 < 1  # the warm-up is all that this short run sees
    for name, value in average.items():
        torch.testing.assert_close(module.state_dict()[name], value)
        assert not torch.allclose(weights[-1][name], value)
    plain = tmp_path / "plain"
    assert _run(plain, Noisy(), Items()) == curve  # what is trained is not touched


def test_the_decay_ends_at_what_is_asked_for(tmp_path):
    recorder, weights = _average_by_hand(0.3)
    _run(tmp_path, module := recorder(), Items(), averaging=0.3)
    average = _weights(Noisy())
    for decay, current in zip([2 / 11, 3 / 12, 4 / 13, *[0.3] * 9], weights, strict=True):
        decay = min(decay, 0.3)
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    for name, value in average.items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 7, 12])
def test_the_average_outlives_a_stop(tmp_path, step, accumulate):
    settings = {"averaging": 0.9, "accumulate": accumulate}
    whole = _train_targets(tmp_path / "whole", **settings)
    at = (step - 1) * BATCH
    assert len(_train_targets(tmp_path / "parts", at, _send(signal.SIGTERM), **settings)) == 2
    again = _train_targets(tmp_path / "parts", seed=1, **settings)
    assert again[1] == whole[1]
    for name, value in whole[0].items():
        np.testing.assert_array_equal(again[0][name], value)


def test_the_average_of_two_processes(tmp_path):
    one = _train_targets(tmp_path / "one", averaging=0.9)
    for found in together(lambda: _train_targets(tmp_path / "two", averaging=0.9)):
        _assert_close(one, found)


# --- the model's settings ---


def _gradients(model):
    tokens = torch.randint(0, 12, (2, 8), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_checkpointing_computes_the_same_gradients_twice_over():
    model = llama.build("micro", 12, 8, seed=0)
    plain = _gradients(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model.eval())
    gradients = _gradients(model)
    assert len(calls) == 2  # forward, and again in the backward pass
    for name, value in plain.items():
        torch.testing.assert_close(gradients[name], value)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_is_asked_for(attention):
    plain = _gradients(model := llama.build("micro", 12, 8, seed=0))
    set_up_model(model, TrainerConfig(accelerator="cpu", attention=attention), 8)
    assert model.config._attn_implementation == attention
    for name, value in _gradients(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


def test_attention_that_is_chosen():
    set_up_model(model := llama.build("micro", 12, 8, seed=0), TrainerConfig(accelerator="cpu"), 8)
    assert model.config._attn_implementation == choose_attention(torch.device("cpu"), 8) == "sdpa"
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def test_a_compiled_model_is_saved_as_any_other(tmp_path):
    model = llama.build("micro", 12, 8, seed=0)
    names, plain = set(model.state_dict()), _gradients(model)
    set_up_model(model, TrainerConfig(accelerator="cpu", compile=True, checkpointing=True), 8)
    assert model.model._compiled_call_impl is not None
    assert set(model.state_dict()) == names
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        for name, value in _gradients(model).items():
            torch.testing.assert_close(value, plain[name])
    llama.save(model, tmp_path)
    _assert_equal(_weights(llama.load(tmp_path)), _weights(model))


# --- signals ---


@pytest.mark.parametrize("outcome", ["whole", "stopped", "failed"])
def test_signal_handlers_are_put_back(tmp_path, outcome):
    def die():
        raise RuntimeError("broken")

    action = {"whole": int, "stopped": _send(signal.SIGTERM), "failed": die}[outcome]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = lambda number, frame: None  # noqa: E731
    try:
        for number in handlers:
            signal.signal(number, mine)
        try:
            _run(tmp_path, Noisy(), Items(5, action))
        except (Interrupted, RuntimeError):
            assert outcome != "whole"
        assert [signal.getsignal(number) for number in handlers] == [mine, mine]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_asked_twice_it_stops_at_once(tmp_path):
    def twice():
        _send(signal.SIGINT)()
        _send(signal.SIGINT)()

    module = Noisy()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, module, Items(2 * BATCH, twice))
    assert len(module.seen) == 2  # the step was not finished
    assert not (tmp_path / CHECKPOINT).exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a process started in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_before_the_first_step(tmp_path):
    class Slow(Noisy):
        def setup(self, stage):
            _send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, Slow(), Items())


def test_the_bar_is_closed_when_training_stops(tmp_path, capfd):
    with pytest.raises(Interrupted):
        _run(tmp_path, Noisy(), Items(9 * BATCH, _send(signal.SIGTERM)))
    lines = capfd.readouterr().err
    assert "10/12" in lines
    assert lines.endswith("\n")  # what is said next starts on a line of its own


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_worker_processes_outlive_ctrl_c(tmp_path, number):
    def ctrl_c():  # in the worker, while training waits for its data: a terminal's Ctrl-C reaches both
        os.kill(os.getppid(), number)
        os.kill(os.getpid(), number)
        time.sleep(0.3)

    with pytest.raises(Interrupted):
        _run(tmp_path, Noisy(), Items(5, ctrl_c), num_workers=1)
    assert (tmp_path / CHECKPOINT).is_file()


def test_workers_change_nothing_over_a_restart(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    with pytest.raises(Interrupted):
        _run(tmp_path, Noisy(), Items(20, lambda: os.kill(os.getppid(), signal.SIGTERM)), num_workers=2)
    module = Noisy(seed=1)
    assert _run(tmp_path, module, Items(), seed=99, num_workers=2) == curve
    _assert_equal(_weights(module), weights)


# --- losses that are not finite ---


# at once, within the first point, after the last regular point
@pytest.mark.parametrize(("step", "noticed"), [(0, 5), (2, 5), (7, 10), (11, 12)])
def test_a_loss_that_is_not_finite(tmp_path, step, noticed):
    message = rf"^tiny: not a finite loss at step {noticed}: .*nan.*; lower learning_rate$"
    with pytest.raises(UserError, match=message):
        _run(tmp_path, Noisy(fail_at=[step]), Items())


def test_a_loss_that_is_not_finite_in_a_run_shorter_than_log_every(tmp_path):
    with pytest.raises(UserError, match="not a finite loss at step 12"):
        _run(tmp_path, Noisy(fail_at=[3]), Items(), log_every=100)


# --- Shuffled ---


def test_each_epoch_is_a_permutation():
    shuffled = Shuffled(list("abcdefghij"), 35, 0)
    assert len(shuffled) == 35
    epochs = ["".join(shuffled[10 * e + i] for i in range(10)) for e in range(3)]
    assert all(sorted(epoch) == list("abcdefghij") for epoch in epochs)
    assert len({*epochs, "abcdefghij"}) == 4
    assert len({shuffled[30 + i] for i in range(5)}) == 5  # part of an epoch


def test_an_item_depends_on_seed_and_index_alone():
    one, two, other = (Shuffled(range(10), 50, seed) for seed in (0, 0, 1))
    in_order = [one[index] for index in range(50)]
    backwards = [two[index] for index in reversed(range(50))]
    assert backwards[::-1] == in_order
    assert [other[index] for index in range(50)] != in_order


# --- configuration ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accelerator": "tpu"}, "^accelerator: 'tpu' is unknown; choices: auto, cpu, gpu$"),
        ({"precision": "16"}, "^precision: '16' is unknown; choices: 32-true, bf16-mixed$"),
        ({"num_workers": -1}, "^num_workers: -1 must be at least 0$"),
        ({"log_every": 0}, "^log_every: 0 must be at least 1$"),
        ({"checkpoint_every": 0}, "^checkpoint_every: 0 must be at least 1$"),
        ({"diagnose_every": -1}, "^diagnose_every: -1 must be at least 0$"),
        ({"accumulate": 0}, "^accumulate: 0 must be at least 1$"),
        ({"averaging": 1.0}, r"^averaging: 1\.0 must lie in 0\.\.1, 1 excluded$"),
        ({"attention": "flash"}, "^attention: 'flash' is unknown; choices: auto, sdpa, eager$"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"^accelerator: 'gpu' asked for, but torch sees none; choices: auto, cpu$"
    ):
        TrainerConfig(accelerator="gpu")
    assert TrainerConfig().device() == torch.device("cpu")
