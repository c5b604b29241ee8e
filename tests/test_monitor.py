from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm import monitor, ranks
from delvm.training import TrainerConfig, train
from tests.processes import together

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH, LENGTH = 12, 4, 6


class Model(pl.LightningModule):
    """A linear layer that knows of itself what a monitor may ask."""

    flops_per_token = 18

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.norms = []

    def training_step(self, batch):
        return {"loss": (self.net(batch["tokens"].float()[..., None]) ** 2).mean() + 0 * torch.randn(())}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        self.norms.append(float(self.gradient_norm))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Diagnosed(Model):
    """Draws random numbers to look at itself; finds nothing at step 4."""

    def diagnose(self):
        torch.randn(3)
        return None if self.global_step == 4 else {"step": float(self.global_step)}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        return {"tokens": torch.arange(LENGTH) % 3}


def _train(folder, module, **settings):
    """What TensorBoard has: {key: {step: value}}."""
    torch.manual_seed(0)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 5} | settings)
    train(
        module, Rows(), name="tiny", steps=STEPS, batch_size=BATCH, clip=0.5, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip
    if not ranks.is_first():
        return None
    events = EventAccumulator(str(folder / "tensorboard" / "tiny")).Reload()
    return {
        key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]
    }


def test_what_is_logged(tmp_path):
    module = Model()
    found = _train(tmp_path, module)
    assert set(found) == {
        "loss", "speed/tokens_per_second", "memory/peak_gib", "optimizer/learning_rate",
        "optimizer/gradient_norm",
    }  # fmt: skip
    for key, value in found.items():
        if "/" in key:
            assert list(value) == [5, 10]
    # the rate that the step was taken with
    assert found["optimizer/learning_rate"] == {5: pytest.approx(0.01 / 5), 10: pytest.approx(0.01 / 10)}
    norms = {step: pytest.approx(module.norms[step - 1], rel=1e-6) for step in (5, 10)}
    assert found["optimizer/gradient_norm"] == norms
    assert all(value > 0 for value in found["speed/tokens_per_second"].values())


def test_the_speed_counts_all_tokens(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))  # two seconds between any two looks at it
    monkeypatch.setattr(monitor, "perf_counter", lambda: next(clock))
    expected = {step: 5 * BATCH * LENGTH / 2 for step in (5, 10)}
    for accumulate in (1, 2):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        assert _train(folder, Model(), accumulate=accumulate)["speed/tokens_per_second"] == expected
    (tmp_path / "two").mkdir()
    first, _ = together(lambda: _train(tmp_path / "two", Model()))  # each has half of the rows
    assert first["speed/tokens_per_second"] == expected


def test_the_share_of_the_peak():
    # 3 million tokens a second at 6 FLOPs for each of 110 million parameters, on two cards
    assert monitor.utilization(3e6 * 6 * 110e6, "NVIDIA H200", 2) == pytest.approx(1.98 / (2 * 0.989))
    assert monitor.utilization(156e12, "NVIDIA A100-SXM4-80GB", 1) == pytest.approx(0.5)
    assert monitor.utilization(1e12, "NVIDIA H100 PCIe", 1) is None  # slower than the one that is known


def test_the_peak_of_resident_memory():
    said = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())["VmHWM"]
    assert monitor.peak_memory(torch.device("cpu")) == pytest.approx(int(said.split()[0]) / 2**20, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_peak_on_a_card_is_that_of_the_training(tmp_path):
    torch.empty(1 << 28, device="cuda")  # before it began
    found = _train(tmp_path, Model(), accelerator="gpu")
    assert 0 < found["memory/peak_gib"][5] < 0.1


def test_diagnoses_have_a_stride_of_their_own(tmp_path):
    found = _train(tmp_path, Diagnosed(), diagnose_every=4)
    assert found["diagnose/step"] == {8: 8.0, 12: 12.0}
    assert "diagnose/step" not in _train(tmp_path, Diagnosed(), diagnose_every=0)


def test_a_diagnosis_leaves_the_random_numbers_alone(tmp_path):
    states = []
    for module, folder in ((Model(), "plain"), (Diagnosed(), "diagnosed")):
        (tmp_path / folder).mkdir()
        _train(tmp_path / folder, module, diagnose_every=3)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_all_processes_diagnose_and_one_logs(tmp_path):
    class Together(Model):
        def diagnose(self):
            return {"mean": float(ranks.mean({"rank": torch.tensor(float(ranks.rank()))})["rank"])}

    first, _ = together(lambda: _train(tmp_path, Together(), diagnose_every=6))
    assert first["diagnose/mean"] == {6: 0.5, 12: 0.5}
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
