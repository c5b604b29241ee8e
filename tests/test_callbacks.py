import os
import signal
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import llama, ranks
from delvm.callbacks import CHECKPOINT, Interrupted, NotFinite
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Live
from delvm.pretrain import Pretrain, PretrainConfig
from delvm.training import discard_checkpoint
from tests.processes import together
from tests.trainings import (
    BATCH,
    STEPS,
    Items,
    Noisy,
    assert_close,
    assert_equal,
    run,
    send,
    train_targets,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and curve of a run that nothing disturbed."""
    module = Noisy()
    curve = run(tmp_path_factory.mktemp("whole"), module, Items())
    assert module.seen == torch.arange(STEPS * BATCH).view(STEPS, BATCH).tolist()  # in order, each once
    return weights_of(module), curve


@pytest.fixture(scope="module")
def targets_at_once(tmp_path_factory):
    return train_targets(tmp_path_factory.mktemp("once"))


# --- the curve ---


def test_the_curve_is_the_mean_between_its_points(tmp_path):
    values = []

    class Recorder(Noisy):
        def training_step(self, batch):
            outputs = super().training_step(batch)
            values.append({key: value.item() for key, value in outputs.items()})
            return outputs

    curve = run(tmp_path, Recorder(), Items())
    assert [point["step"] for point in curve] == [5, 10, 12]  # the last step has a point as well
    for point, part in zip(curve, (values[:5], values[5:10], values[10:]), strict=True):
        assert set(point) == {"step", "loss", "noise"}
        for key in ("loss", "noise"):
            assert point[key] == pytest.approx(np.mean([value[key] for value in part]), rel=1e-5)


def test_tensorboard_has_the_curve(tmp_path):
    curve = run(tmp_path, Noisy(), Items())
    assert list((tmp_path / "tensorboard" / "tiny").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tiny")).Reload()
    for key in ("loss", "noise"):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        assert points == [(point["step"], pytest.approx(point[key], rel=1e-6)) for point in curve]


def test_the_bar_is_closed_when_training_stops(tmp_path, capfd):
    with pytest.raises(Interrupted):
        run(tmp_path, Noisy(), Items(9 * BATCH, send(signal.SIGTERM)))
    lines = capfd.readouterr().err
    assert "10/12" in lines
    assert lines.endswith("\n")  # what is said next starts on a line of its own


# --- stop and go on ---


def test_the_checkpoint_stays_until_the_result_is_saved(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    run(tmp_path, Noisy(), Items(), checkpoint_every=5)
    # killed here, before its caller has saved the weights: it goes on from step 10 of 12
    again = Noisy(seed=1)
    assert run(tmp_path, again, Items(), checkpoint_every=5, seed=99) == curve
    assert len(again.seen) == 2
    assert_equal(weights_of(again), weights)
    discard_checkpoint(tmp_path)
    discard_checkpoint(tmp_path)  # none there: nothing to do
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
# in the first step, between two points of the curve, at a point, in the last step but one, in the last
@pytest.mark.parametrize("step", [1, 7, 10, 11, 12])
def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, uninterrupted, number, step):
    weights, curve = uninterrupted
    first = Noisy()
    with pytest.raises(Interrupted, match=f"^tiny: stopped at step {step} of 12$"):
        run(tmp_path, first, Items((step - 1) * BATCH + 1, send(number)))
    assert len(first.seen) == step  # the step in which the signal came is finished
    assert (tmp_path / CHECKPOINT).is_file()
    assert not (tmp_path / f".{CHECKPOINT}.partial").exists()
    # another start and another random state: all must come from the checkpoint
    second = Noisy(seed=1)
    assert run(tmp_path, second, Items(), seed=99) == curve
    assert second.seen == torch.arange(step * BATCH, STEPS * BATCH).view(-1, BATCH).tolist()
    assert_equal(weights_of(second), weights)


def test_a_run_stopped_twice(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    for seed, item in enumerate((9, 30)):
        with pytest.raises(Interrupted):
            run(tmp_path, Noisy(seed), Items(item, send(signal.SIGTERM)), seed=seed)
    module = Noisy(seed=7)
    assert run(tmp_path, module, Items(), seed=7) == curve
    assert_equal(weights_of(module), weights)


def test_a_killed_run_goes_on_from_its_last_regular_checkpoint(tmp_path, uninterrupted):
    weights, curve = uninterrupted

    def die():
        raise RuntimeError("killed")

    first = Noisy()
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, first, Items(9 * BATCH + 2, die), checkpoint_every=4)
    assert len(first.seen) == 9
    second = Noisy(seed=1)
    assert run(tmp_path, second, Items(), seed=99, checkpoint_every=4) == curve
    assert second.seen[0] == list(range(8 * BATCH, 9 * BATCH))  # from step 8
    assert_equal(weights_of(second), weights)


def test_checkpoints_and_their_cadence_change_nothing(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    module = Noisy()
    assert run(tmp_path, module, Items(), checkpoint_every=1) == curve
    assert_equal(weights_of(module), weights)


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
    curve = run(tmp_path / "whole", whole, Sentences(), **settings)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", module(0), Sentences(7 * BATCH), **settings)
    second = module(1)
    assert run(tmp_path / "parts", second, Sentences(), **settings) == curve
    assert set(curve[0]) == {"step", "loss", "ce"} | ({"kd"} if kind == "distill" else set())
    assert_equal(weights_of(second), weights_of(whole))
    assert not torch.equal(whole.model.model.norm.weight, torch.ones(32))  # it did learn


def test_a_students_checkpoint_holds_no_teacher(tmp_path):
    student, teacher = llama.build("micro", 12, 8, seed=0), llama.build("tiny", 12, 8, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = Distill(student, Live(teacher), DistillConfig(size="micro", steps=STEPS))
    with pytest.raises(Interrupted):
        run(tmp_path, module, Sentences(2 * BATCH))
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


def test_workers_change_nothing_over_a_restart(tmp_path, uninterrupted):
    weights, curve = uninterrupted
    with pytest.raises(Interrupted):
        run(tmp_path, Noisy(), Items(20, lambda: os.kill(os.getppid(), signal.SIGTERM)), num_workers=2)
    module = Noisy(seed=1)
    assert run(tmp_path, module, Items(), seed=99, num_workers=2) == curve
    assert_equal(weights_of(module), weights)


# --- stop and go on, with micro-batches and processes ---


@pytest.mark.parametrize("step", [1, 7, 10, 12])
def test_going_on_amid_micro_batches(tmp_path, step):
    whole = train_targets(tmp_path / "whole", accumulate=2)
    at = (step - 1) * BATCH + 1
    said, seen = train_targets(tmp_path / "parts", at, send(signal.SIGTERM), accumulate=2)
    assert said == f"tiny: stopped at step {step} of 12"
    assert len(seen) == 2 * step  # no step is left half done
    again = train_targets(tmp_path / "parts", seed=1, accumulate=2)
    assert again[1] == whole[1]
    assert again[2] == torch.arange(step * BATCH, STEPS * BATCH).view(-1, BATCH // 2).tolist()
    for name, value in whole[0].items():
        np.testing.assert_array_equal(again[0][name], value)


@pytest.mark.parametrize("step", [1, 7, 12])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_going_on_with_other_micro_batches(tmp_path, targets_at_once, accumulate, step):
    at = (step - 1) * BATCH + 1
    said, _ = train_targets(tmp_path, at, send(signal.SIGTERM), accumulate=2)
    assert said == f"tiny: stopped at step {step} of 12"
    again = train_targets(tmp_path, seed=1, accumulate=accumulate)
    assert_close(targets_at_once, again)
    assert again[2] == torch.arange(step * BATCH, STEPS * BATCH).view(-1, BATCH // accumulate).tolist()


def test_going_on_with_other_micro_batches_again_and_again(tmp_path, targets_at_once):
    for seed, (step, accumulate) in enumerate([(3, 4), (6, 1), (7, 2)]):
        at = (step - 1) * BATCH + 1
        said, _ = train_targets(tmp_path, at, send(signal.SIGTERM), seed=seed, accumulate=accumulate)
        assert said == f"tiny: stopped at step {step} of 12"
    assert_close(targets_at_once, train_targets(tmp_path, seed=9, accumulate=4))


@pytest.mark.parametrize("rank", [0, 1])  # who is asked to stop
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_stop_at_the_same_step_and_go_on(tmp_path, rank, accumulate):
    whole, _ = together(lambda: train_targets(tmp_path / "whole", accumulate=accumulate))
    at = 6 * BATCH + rank * BATCH // 2
    stop = lambda: train_targets(  # noqa: E731
        tmp_path / "parts", at, send(signal.SIGTERM), rank=rank, accumulate=accumulate
    )
    (said, seen), (other_said, other_seen) = together(stop)
    assert said == other_said == "tiny: stopped at step 7 of 12"
    assert len(seen) == len(other_seen) == 7 * accumulate
    for found in together(lambda: train_targets(tmp_path / "parts", seed=1, accumulate=accumulate)):
        for mine, others in zip(whole[1], found[1], strict=True):  # its sums were rounded once more
            assert others == {key: pytest.approx(value, rel=1e-6) for key, value in mine.items()}
        for name, value in whole[0].items():
            np.testing.assert_array_equal(found[0][name], value)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_one_process_goes_on_where_two_stopped(tmp_path, targets_at_once, accumulate):
    stopped = together(lambda: train_targets(tmp_path, 6 * BATCH, send(signal.SIGTERM), rank=0))
    assert {said for said, _ in stopped} == {"tiny: stopped at step 7 of 12"}
    found = train_targets(tmp_path, seed=1, accumulate=accumulate)
    assert_close(targets_at_once, found)
    assert found[2][0] == list(range(7 * BATCH, 7 * BATCH + BATCH // accumulate))


# --- averaging ---


def _average_by_hand(decay):
    """The moving average of a plain run's weights after each step."""
    weights = []

    class Recorder(Noisy):
        def on_train_batch_end(self, *_):
            weights.append(weights_of(self))

    return Recorder, weights


def test_the_average_is_what_training_ends_with(tmp_path):
    recorder, weights = _average_by_hand(0.6)
    curve = run(tmp_path, module := recorder(), Items(), averaging=0.6)
    average = weights_of(Noisy())
    for step, current in enumerate(weights, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    assert (1 + 12) / (10 + 12) < 0.6 < 1  # the warm-up is all that this short run sees
    for name, value in average.items():
        torch.testing.assert_close(module.state_dict()[name], value)
        assert not torch.allclose(weights[-1][name], value)
    plain = tmp_path / "plain"
    assert run(plain, Noisy(), Items()) == curve  # what is trained is not touched


def test_the_decay_ends_at_what_is_asked_for(tmp_path):
    recorder, weights = _average_by_hand(0.3)
    run(tmp_path, module := recorder(), Items(), averaging=0.3)
    average = weights_of(Noisy())
    for decay, current in zip([2 / 11, 3 / 12, 4 / 13, *[0.3] * 9], weights, strict=True):
        decay = min(decay, 0.3)
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    for name, value in average.items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 7, 12])
def test_the_average_outlives_a_stop(tmp_path, step, accumulate):
    settings = {"averaging": 0.9, "accumulate": accumulate}
    whole = train_targets(tmp_path / "whole", **settings)
    at = (step - 1) * BATCH
    assert len(train_targets(tmp_path / "parts", at, send(signal.SIGTERM), **settings)) == 2
    again = train_targets(tmp_path / "parts", seed=1, **settings)
    assert again[1] == whole[1]
    for name, value in whole[0].items():
        np.testing.assert_array_equal(again[0][name], value)


def test_the_average_of_two_processes(tmp_path):
    one = train_targets(tmp_path / "one", averaging=0.9)
    for found in together(lambda: train_targets(tmp_path / "two", averaging=0.9)):
        assert_close(one, found)


# --- signals ---


@pytest.mark.parametrize("outcome", ["whole", "stopped", "failed"])
def test_signal_handlers_are_put_back(tmp_path, outcome):
    def die():
        raise RuntimeError("broken")

    action = {"whole": int, "stopped": send(signal.SIGTERM), "failed": die}[outcome]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = lambda number, frame: None  # noqa: E731
    try:
        for number in handlers:
            signal.signal(number, mine)
        try:
            run(tmp_path, Noisy(), Items(5, action))
        except (Interrupted, RuntimeError):
            assert outcome != "whole"
        assert [signal.getsignal(number) for number in handlers] == [mine, mine]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _in_turn(*numbers):
    def ask():
        for number in numbers:
            send(number)()
            time.sleep(0.1)

    return ask


@pytest.mark.parametrize("before", [[], [signal.SIGTERM]])
def test_asked_twice_by_ctrl_c_it_stops_at_once(tmp_path, before):
    module = Noisy()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, module, Items(2 * BATCH, _in_turn(signal.SIGINT, *before, signal.SIGINT)))
    assert len(module.seen) == 2  # the step was not finished
    assert not (tmp_path / CHECKPOINT).exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_sent_more_than_once(tmp_path, first):
    module = Noisy()
    with pytest.raises(Interrupted, match=r"^tiny: stopped at step 3 of 12$"):
        run(tmp_path, module, Items(2 * BATCH, _in_turn(first, signal.SIGTERM, signal.SIGTERM)))
    assert len(module.seen) == 3
    assert (tmp_path / CHECKPOINT).is_file()


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
            send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Slow(), Items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_worker_processes_outlive_ctrl_c(tmp_path, number):
    def ctrl_c():  # in the worker, while training waits for its data: a terminal's Ctrl-C reaches both
        os.kill(os.getppid(), number)
        os.kill(os.getpid(), number)
        time.sleep(0.3)

    with pytest.raises(Interrupted):
        run(tmp_path, Noisy(), Items(5, ctrl_c), num_workers=1)
    assert (tmp_path / CHECKPOINT).is_file()


# --- losses that are not finite ---


# at once, within the first point, after the last regular point
@pytest.mark.parametrize(("step", "noticed"), [(0, 5), (2, 5), (7, 10), (11, 12)])
def test_a_loss_that_is_not_finite(tmp_path, step, noticed):
    message = rf"^tiny: not a finite loss at step {noticed}: .*nan.*; lower learning_rate$"
    with pytest.raises(NotFinite, match=message):
        run(tmp_path, Noisy(fail_at=[step]), Items())


def test_a_loss_that_is_not_finite_in_a_run_shorter_than_log_every(tmp_path):
    with pytest.raises(NotFinite, match="not a finite loss at step 12"):
        run(tmp_path, Noisy(fail_at=[3]), Items(), log_every=100)


def test_all_processes_see_a_loss_that_is_not_finite(tmp_path):
    def work():
        return run(tmp_path, Noisy(fail_at=[7] if ranks.rank() else []), Items())

    first, second = together(work)
    assert str(first).startswith("tiny: not a finite loss at step 10")
    assert type(second) is ranks.Ended
