"""Views to train on: what an item depends on, and what mixing does to pixels and labels."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from delvm.errors import UserError
from delvm.evaluate.features import list_pictures
from delvm.finetune.views import Views, ViewsConfig, seeded

STILL = {"crop": 1.0, "mirror": False, "smoothing": 0.0}


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    """Six noisy pictures of two classes, 16x16."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for number in range(3):
            pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return list_pictures(str(root), "finetune.train")


@pytest.fixture
def halves(tmp_path):
    """A black and a white picture: a pixel says of whom it is."""
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / name / "0.png")
    return list_pictures(str(tmp_path), "finetune.train")


def views(listing, number=12, seed=0, **settings):
    return Views(listing, 8, ViewsConfig(**settings), number, seed=seed, num_draws=4)


def same(one, two):
    return all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


# --- items


def test_an_item_is_a_view_and_its_class(listing):
    item = views(listing)[0]
    assert (item["pictures"].shape, item["pictures"].dtype) == ((8, 8, 3), torch.uint8)
    assert item["draws"].shape == (4,)
    assert item["labels"] in (0, 1)


def test_an_item_depends_on_the_seed_and_its_index_alone(listing):
    how = {"augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5}
    data = views(listing, **how)
    first = [data[index] for index in range(12)]
    again = views(listing, **how)
    assert all(same(again[index], first[index]) for index in (11, 3, 0, 7))
    other = views(listing, seed=1, **how)
    assert not all(same(other[index], first[index]) for index in range(12))
    draws = torch.stack([item["draws"] for item in first])
    assert len(draws.unique(dim=0)) == 12


def test_drawing_leaves_the_random_states_alone(listing):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    data, before = views(listing, augment="rand-m9-mstd0.5-inc1", mixup=1.0), state()
    data.collate([data[0], data[1]])
    assert state() == before
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(1 // 0)
    assert state() == before


def test_every_epoch_has_every_picture_in_another_order(listing):
    data = views(listing, **STILL)
    shown = [data[index]["pictures"].numpy().tobytes() for index in range(12)]
    assert len(set(shown[:6])) == len(set(shown[6:])) == 6
    assert set(shown[:6]) == set(shown[6:])
    assert shown[:6] != shown[6:]


def test_views_of_a_picture_differ(halves, listing):
    data = views(listing, crop=0.3)
    assert len({data[index]["pictures"].numpy().tobytes() for index in range(12)}) == 12
    erased = [views(halves, erasing=1.0)[index] for index in range(2)]
    white = next(item["pictures"] for item in erased if item["labels"])
    assert 0.02 <= float((white == 0).float().mean()) <= 0.5  # a rectangle of 2% to 33%, in whole pixels


def test_a_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.png").write_bytes(b"no picture")
    listing = list_pictures(str(tmp_path), "finetune.train")
    with pytest.raises(UserError, match=r"ant/0\.png: unreadable picture \(not a picture\)$"):
        views(listing)[0]


# --- batches


def test_labels_are_smoothed(listing):
    data = views(listing, smoothing=0.1)
    items = [data[index] for index in range(6)]
    batch = data.collate(items)
    assert batch["labels"].tolist() == [item["labels"] for item in items]
    expected = torch.tensor([[0.95, 0.05] if label == 0 else [0.05, 0.95] for label in batch["labels"]])
    torch.testing.assert_close(batch["targets"], expected)
    assert torch.equal(batch["pictures"], torch.stack([item["pictures"] for item in items]))
    torch.testing.assert_close(views(listing, **STILL).collate(items)["targets"], expected.round())


@pytest.mark.parametrize("seed", range(5))
def test_blended_pixels_are_the_labels_shares(halves, seed):
    data = views(halves, seed=seed, mixup=1.0, **STILL)
    batch = data.collate([data[0], data[1]])
    for picture, target in zip(batch["pictures"], batch["targets"], strict=True):
        assert len(picture.unique()) == 1
        assert int(picture[0, 0, 0]) == round(255 * float(target[1]))
    # each has the share of itself that the other has of itself
    assert batch["targets"][0].tolist() == pytest.approx(batch["targets"][1].tolist()[::-1])


@pytest.mark.parametrize("seed", range(5))
def test_exchanged_areas_are_the_labels_shares(halves, seed):
    data = views(halves, seed=seed, cutmix=1.0, **STILL)
    batch = data.collate([data[0], data[1]])
    white = (batch["pictures"] == 255).float().mean((1, 2, 3))
    assert set(batch["pictures"].unique().tolist()) <= {0, 255}
    torch.testing.assert_close(batch["targets"][:, 1], white)
    assert float(white.sum()) == pytest.approx(1)


def test_pairs_are_mixed_alike_however_a_step_is_shared(listing):
    data = views(listing, mixup=0.8, cutmix=1.0, augment="rand-m9-mstd0.5-inc1")
    items = [data[index] for index in range(12)]
    whole = data.collate(items)
    parts = [data.collate(items[place : place + 4]) for place in (0, 4, 8)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts]))
    assert len(whole["targets"].unique()) > 4  # pairs of two classes, each with shares of its own
    torch.testing.assert_close(whole["targets"].sum(1), torch.ones(12))


def test_a_pair_is_mixed_by_chance(halves):
    data = views(halves, 120, mixup=1.0, mixing=0.25, **STILL)  # an epoch is a black and a white picture
    batch = data.collate([data[index] for index in range(120)])
    pure = (batch["targets"].max(1).values == 1).float().mean()
    assert 0.6 < float(pure) < 0.9


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0.0}, "views.crop: 0.0 must lie in 0..1, 0 excluded"),
        ({"colour": 2.0}, "views.colour: 2.0 must lie in 0..1"),
        ({"erasing": -1.0}, "views.erasing: -1.0 must lie in 0..1"),
        ({"mixing": 1.5}, "views.mixing: 1.5 must lie in 0..1"),
        ({"smoothing": 1.0}, "views.smoothing: 1.0 must lie in 0..1, 1 excluded"),
        ({"mixup": -0.1}, "views.mixup: -0.1 must be at least 0 and finite"),
        ({"cutmix": float("inf")}, "views.cutmix: inf must be at least 0 and finite"),
        (
            {"augment": "much"},
            "views.augment: 'much' is no RandAugment of timm, such as rand-m9-mstd0.5-inc1",
        ),
        (
            {"augment": "rand-x9"},
            "views.augment: 'rand-x9' is no RandAugment of timm, such as rand-m9-mstd0.5-inc1",
        ),
    ],
)
def test_an_impossible_setting(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ViewsConfig(**settings)
