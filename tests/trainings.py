"""Small trainings for tests, of items that depend on their index alone."""

import math
import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from delvm import ranks
from delvm.training import Interrupted, TrainerConfig, train

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


def run(folder, module, dataset, seed=0, **settings):
    """The curve. Twelve steps of four items, a point of the curve every five."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 5} | settings)
    return train(
        module, dataset, name="tiny", steps=STEPS, batch_size=BATCH, clip=1.0, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip


def send(number):
    return lambda: os.kill(os.getpid(), number)


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Targets(Noisy):
    """A linear layer over tokens of which some are no targets: the mean over all of a step's targets."""

    def count(self, batch):
        return {"num_targets": int((batch["labels"] >= 0).sum())}

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        wrong = ((self.net(batch["x"]) - 1) ** 2).sum(-1)
        # gradients are the mean over micro-batches and processes of these
        share = (wrong * (batch["labels"] >= 0)).sum() / batch["num_targets"]
        loss = self.trainer.accumulate_grad_batches * share
        return {"loss": loss, "mean": loss.detach()}


class Sentences8(Items):
    """(8, 3) inputs, of which item i has 1 + i % 7 labelled: no two micro-batches have as many."""

    def __getitem__(self, index):
        super().__getitem__(index)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(index))
        return {"index": index, "x": x, "labels": (torch.arange(8) <= index % 7).long() - 1}


def train_targets(folder, at=None, action=None, seed=0, rank=None, **settings):
    """(weights, curve, items seen) or, where it is stopped, (what it says, items seen)."""
    dataset = Sentences8(at, action) if rank in (None, ranks.rank()) else Sentences8()
    module = Targets(seed)
    try:
        curve = run(folder, module, dataset, **settings)
    except Interrupted as error:
        return str(error), module.seen
    return {name: value.numpy() for name, value in module.state_dict().items()}, curve, module.seen


def assert_close(one, two):
    for name, value in one[0].items():
        np.testing.assert_allclose(two[0][name], value, atol=1e-5)
    assert len(one[1]) == len(two[1]) == 3
    for mine, others in zip(one[1], two[1], strict=True):
        assert others == {key: pytest.approx(value, rel=1e-5) for key, value in mine.items()}
