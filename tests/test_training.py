import math
import os
import signal
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import llama
from delvm.distill.module import Distill, DistillConfig
from delvm.errors import UserError
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.training import CHECKPOINT, Interrupted, Shuffled, TrainerConfig, discard_checkpoint, train

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
        return Distill(model, llama.build("micro", 12, 8, seed=5), config)

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
    module = Distill(student, teacher, DistillConfig(size="micro", steps=STEPS))
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
