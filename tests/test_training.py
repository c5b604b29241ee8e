import multiprocessing
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from delvm import llama, ranks, training
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.pretrain import hidden_states
from delvm.training import (
    Shuffled,
    TrainerConfig,
    check_batch_size,
    checkpoint_activations,
    compile_layers,
    discard_checkpoint,
    set_up_model,
)
from tests.processes import PATIENCE, together
from tests.trainings import (
    BATCH,
    STEPS,
    Items,
    Noisy,
    Sentences8,
    Targets,
    assert_close,
    assert_equal,
    run,
    train_targets,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def targets_at_once(tmp_path_factory):
    return train_targets(tmp_path_factory.mktemp("once"))


def test_training_equals_a_plain_loop(tmp_path):
    """One optimizer step a batch on its gradient, clipped to the norm, and the schedule's step after it."""
    curve = run(tmp_path, module := Noisy(), Items())
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


def test_a_new_run_has_curves_of_its_own(tmp_path):
    for _ in range(2):
        run(tmp_path, Noisy(), Items())
        discard_checkpoint(tmp_path)
    assert len(list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))) == 1


def test_the_variables_of_a_slurm_job_change_nothing(tmp_path, monkeypatch):
    curve = run(tmp_path / "alone", Noisy(), Items())
    job = {"JOB_ID": 17, "JOB_NAME": "train", "JOB_NUM_NODES": 2, "JOB_NODELIST": "node[1-2]", "NTASKS": 8,
           "PROCID": 0, "LOCALID": 0, "NODEID": 0}  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("another program's")
    handler, seen = signal.getsignal(signal.SIGUSR1), set()

    class Asked(Noisy):
        def training_step(self, batch):
            seen.add(signal.getsignal(signal.SIGUSR1))
            return super().training_step(batch)

    assert run(tmp_path / "job", Asked(), Items()) == curve
    assert seen == {handler}  # nobody but us says what a signal does
    first, second = together(lambda: run(tmp_path / "processes", Noisy(), Items()))
    assert first == second


# --- micro-batches and processes ---


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
    found = train_targets(tmp_path, accumulate=accumulate)
    assert_close(targets_at_once, found)
    assert found[2] == torch.arange(STEPS * BATCH).view(-1, BATCH // accumulate).tolist()


def _told(folder, **settings):
    """For every micro-batch: how many targets it has, how many it is told."""
    told = []

    class Told(Targets):
        def training_step(self, batch):
            told.append((self.count(batch)["num_targets"], batch["num_targets"].item()))
            return super().training_step(batch)

    run(folder, Told(), Sentences8(), **settings)
    return torch.tensor(told).view(STEPS, -1, 2)


def test_every_micro_batch_is_told_the_targets_of_the_step(tmp_path):
    counts, told = _told(tmp_path, accumulate=2).unbind(-1)
    assert torch.equal(told, counts.sum(1, keepdim=True).expand(-1, 2))
    assert (counts[:, 0] != counts[:, 1]).any()


def test_processes_are_told_the_mean_of_their_targets(tmp_path):
    one, two = together(lambda: _told(tmp_path, accumulate=2).numpy())
    counts = np.stack([one, two])[..., 0]
    mean = counts.sum((0, 2)) / 2
    for found in (one, two):
        np.testing.assert_array_equal(found[..., 1], np.stack([mean, mean], 1))
    assert (mean % 1).any()
    assert (one[..., 0].sum(1) != two[..., 0].sum(1)).any()


def test_a_module_that_counts_no_targets_is_told_none(tmp_path):
    class Keys(Noisy):
        def training_step(self, batch):
            assert set(batch) == {"index", "x"}
            return super().training_step(batch)

    assert len(run(tmp_path, Keys(), Items())) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_change_nothing(tmp_path, targets_at_once, accumulate):
    first, second = together(lambda: train_targets(tmp_path, accumulate=accumulate))
    assert_close(targets_at_once, first)
    assert second[1] == first[1]  # the curve is that of all
    for name, value in first[0].items():
        np.testing.assert_array_equal(second[0][name], value)
    rows = torch.arange(STEPS * BATCH).view(STEPS, 2, -1, BATCH // 2 // accumulate)
    assert [first[2], second[2]] == [rows[:, rank].flatten(0, 1).tolist() for rank in (0, 1)]
    assert len(list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))) == 1


def test_four_processes(tmp_path, targets_at_once):
    for found in together(lambda: train_targets(tmp_path), num=4):
        assert_close(targets_at_once, found)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 3), (3, 2), (2, 4)])
def test_a_step_that_cannot_be_shared(batch_size, accumulate):
    with pytest.raises(UserError, match=rf"^student.batch_size: {batch_size} a step must divide by"
                       rf" processes \* trainer.accumulate = 1 \* {accumulate}$"):  # fmt: skip
        check_batch_size("student.batch_size", batch_size, accumulate)
    check_batch_size("student.batch_size", 6 * accumulate, accumulate)


def test_a_step_that_processes_cannot_share(tmp_path):
    said = "tiny.batch_size: 4 a step must divide by processes * trainer.accumulate = 3 * 1"
    first, *others = together(lambda: run(tmp_path, Noisy(), Items()), num=3)
    assert str(first) == said
    assert {type(other) for other in others} == {ranks.Ended}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("module", [Noisy, Targets])
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, module, num_workers):
    def refuse():
        try:
            (tmp_path / "there is none").read_bytes()
        except OSError as error:
            raise UserError("photos/3.jpg: cannot be read: no such file") from error

    with pytest.raises(UserError, match=r"^photos/3\.jpg: cannot be read: no such file$"):
        run(tmp_path, module(), Sentences8(6, refuse), num_workers=num_workers)


def test_a_worker_ends_by_a_signal_of_its_parent_alone():
    def work(pipe):
        training.leave_stopping_to_us(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(0.2)
        pipe.send("alive")
        time.sleep(600)

    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sending,))
    worker.start()
    try:
        assert receiving.recv() == "alive"
        worker.terminate()
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    finally:
        worker.kill()


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
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        checkpoint_activations(model.eval())
    gradients = _gradients(model)
    assert len(calls) == 2  # forward, and again in the backward pass
    for name, value in plain.items():
        torch.testing.assert_close(gradients[name], value)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_is_asked_for(attention):
    plain = _gradients(model := llama.build("micro", 12, 8, seed=0))
    set_up_model(model, TrainerConfig(accelerator="cpu", attention=attention))
    assert model.config._attn_implementation == attention
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    for name, value in _gradients(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


# --- compiled models ---


@pytest.fixture
def graphs(monkeypatch):
    """What has been compiled, by a backend that takes no minute."""
    compiled, backend = [], torch._dynamo.lookup_backend("aot_eager")

    def compile(graph, inputs):
        compiled.append(graph)
        return backend(graph, inputs)

    monkeypatch.setattr(training, "COMPILE_BACKEND", compile)
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


def _attention(graph):
    """(has a mask, is causal) of the only attention in a graph."""
    (node,) = (n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target))
    return node.kwargs["attn_mask"] is not None, node.kwargs["is_causal"]


def test_layers_share_one_graph_with_the_causal_kernel(graphs):
    shape = llama.configuration("micro", 12, 8)
    shape.num_hidden_layers = 10  # more than PyTorch compiles variants of
    model, plain = (llama.initialise(shape, seed=0) for _ in range(2))
    compile_layers(model)
    tokens = torch.randint(0, 12, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hidden_states(model, tokens), hidden_states(plain, tokens))
    assert list(map(_attention, graphs)) == [(False, True)]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1)
    torch.testing.assert_close(hidden_states(model, tokens, packed), hidden_states(plain, tokens, packed))
    assert list(map(_attention, graphs)) == [(False, True), (True, False)]


def test_a_compiled_model_is_saved_as_any_other(tmp_path, graphs):
    model = llama.build("micro", 12, 8, seed=0)
    names, plain = set(model.state_dict()), _gradients(model)
    set_up_model(model, TrainerConfig(accelerator="cpu", compile=True, checkpointing=True))
    assert set(model.state_dict()) == names
    for name, value in _gradients(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    llama.save(model, tmp_path)
    assert_equal(weights_of(llama.load(tmp_path)), weights_of(model))


class Rows(torch.utils.data.Dataset):
    """Rows of two tasks; packed ones hold two sentences."""

    def __init__(self, packed):
        self.packed = packed

    def __getitem__(self, index):
        tokens = torch.randint(0, 12, (8,), generator=torch.Generator().manual_seed(index))
        row = {"tokens": tokens, "tasks": torch.full((8,), index % 2), "places": torch.zeros(8).long()}
        return row | ({"positions": torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])} if self.packed else {})

    def __len__(self):
        return STEPS * BATCH


@pytest.mark.parametrize(
    ("packed", "settings"),
    [
        (False, {}),
        (False, {"checkpointing": True}),
        (True, {"checkpointing": True}),
        (False, {"precision": "bf16-mixed"}),
    ],
)
def test_a_compiled_student_learns_what_any_other_learns(tmp_path, graphs, packed, settings):
    found = []
    for compile in (False, True):
        config = DistillConfig(size="micro", steps=STEPS, learning_rate=1e-2)
        student, teacher = (llama.build("micro", 12, 8, seed=seed) for seed in (0, 5))
        set_up_model(student, TrainerConfig(accelerator="cpu", compile=compile, **settings))
        module = Distill(student, Live(teacher), config, ["one", "two"])
        curve = run(
            tmp_path / str(compile), module, Rows(packed), compile=compile, diagnose_every=2, **settings
        )
        found.append((weights_of(module), curve))
    assert len(graphs) == 1  # none for what is told of the training, outside of its precision
    (plain, curve), (compiled, other) = found
    close = 1e-5 if not settings.get("precision") else 2e-2
    for mine, others in zip(curve, other, strict=True):
        assert others == {key: pytest.approx(value, rel=close) for key, value in mine.items()}
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=close, msg=name)


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
        ({"attention": "flash"}, "^attention: 'flash' is unknown; choices: sdpa, eager$"),
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
