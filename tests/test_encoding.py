import json
from pathlib import Path

import numpy as np
import pytest
import torch

from delvm.errors import UserError
from delvm.images.scenes import Scenes
from delvm.images.sources import SPLITS, Views
from delvm.images.tasks import TaskConfig
from delvm.tokens import encoding, store
from delvm.tokens.encoding import encode, encode_pictures, write_store
from delvm.tokens.formats import write_lvm
from delvm.tokens.store import open_store

TASKS = {
    "pose": TaskConfig(scene="pose", samples=5, validation_samples=2, policy="pose"),
    "rain": TaskConfig(scene="deraining", samples=7, validation_samples=3, policy="restoration"),
}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two samples in three views."""
    plan = store.Layout.plan
    monkeypatch.setattr(store.Layout, "plan", classmethod(lambda cls, *about: plan(*about, 100)))


def views_of(tasks, num_views=3):
    return {
        split: {
            task: Views(
                Scenes(config.scene, getattr(config, "samples" if split == "train" else "validation_samples"),
                       split, 0),
                task, config, size=8, num_views=num_views if split == "train" else 1, seed=0,
            )
            for task, config in tasks.items()
        }
        for split in SPLITS
    }  # fmt: skip


def data_of(tasks):
    return {
        task: {"train": c.samples, "validation": c.validation_samples, "pictures": 2}
        for task, c in tasks.items()
    }


def files(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_store_holds_the_codes_of_every_view(tmp_path, tokenizer):
    views = views_of(TASKS)
    write_store(tmp_path, tokenizer, TASKS, data_of(TASKS), views, seed=0)
    found = open_store(tmp_path, tokenizer=tokenizer.hash)
    for split, parts in views.items():
        for task, part in parts.items():
            assert found.grids[split][task].shape == (len(part.samples), part.num_views, 2, 4)
            for index in range(len(part)):
                place = map(np.array, divmod(index, part.num_views))
                expected = tokenizer.encode(part[index].permute(0, 3, 1, 2) / 255)
                np.testing.assert_array_equal(found.grids[split][task].gather(*place), expected)
    assert found.manifest["tasks"]["rain"]["policy"] == "restoration"


@pytest.mark.usefixtures("small_shards")
def test_workers_and_ranks_write_what_one_process_writes(tmp_path, tokenizer):
    write_store(tmp_path / "one", tokenizer, TASKS, data_of(TASKS), views_of(TASKS), seed=0)
    assert len(list((tmp_path / "one" / "rain.train").glob("*.npy"))) == 4
    write_store(
        tmp_path / "workers", tokenizer, TASKS, data_of(TASKS), views_of(TASKS), seed=0, num_workers=2
    )
    assert files(tmp_path / "workers") == files(tmp_path / "one")

    def write_part(rank):
        write_store(
            tmp_path / "ranks", tokenizer, TASKS, data_of(TASKS), views_of(TASKS), seed=0, rank=rank, world=2
        )

    with pytest.raises(UserError, match=r"pose\.train: 2 of 3 shards are missing, the first 00000"):
        write_part(1)  # of two that are no run together
    assert not (tmp_path / "ranks" / "manifest.json").exists()
    write_part(0)
    assert files(tmp_path / "ranks") == files(tmp_path / "one")


@pytest.mark.usefixtures("small_shards")
def test_what_is_there_is_kept(tmp_path, tokenizer):
    tasks = {**TASKS, "lines": TaskConfig(source="lvm", images=str(tmp_path / "a.jsonl"),
                                          validation_images=str(tmp_path / "b.jsonl"))}  # fmt: skip
    lines = np.random.default_rng(0).integers(16, size=(40, 8))
    write_lvm(tmp_path / "a.jsonl", lines)
    write_lvm(tmp_path / "b.jsonl", lines[::-1][:3])
    data = {**data_of(TASKS), "lines": {"train": 40, "validation": 3, "pictures": 2}}
    folder = tmp_path / "store"
    write_store(folder, tokenizer, tasks, data, views_of(TASKS), seed=0)
    expected = files(folder)
    every = np.arange(40)
    found = open_store(folder).grids["train"]["lines"].gather(every, 0 * every)
    np.testing.assert_array_equal(found.reshape(40, 8), lines)
    # shards in the middle are gone, one is of other hands: only the missing ones are made
    for name in ("rain.train/00001.npy", "lines.train/00002.npy", "lines.train/00004.npy", "manifest.json"):
        (folder / name).unlink()
    kept = folder / "pose.train" / "00000.npy"
    np.save(kept, np.zeros_like(np.load(kept)))
    write_store(folder, tokenizer, tasks, data, views_of(TASKS), seed=0)
    again = files(folder)
    different = {str(name) for name in expected if again[name] != expected[name]}
    assert different == {"pose.train/00000.npy", "manifest.json"}  # its checksum
    assert json.loads((folder / "manifest.json").read_text())["tasks"]["lines"]["source"] == "lvm"


def test_clips_are_encoded_in_parts_that_fit(tokenizer, monkeypatch):
    clips = torch.randint(256, (2, 7, 8, 8, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    whole = encode_pictures(tokenizer, clips)
    sizes = []
    encode_one = tokenizer.encode
    monkeypatch.setattr(encoding, "BATCH", 4)
    monkeypatch.setattr(tokenizer, "encode", lambda part: sizes.append(len(part)) or encode_one(part))
    assert torch.equal(encode_pictures(tokenizer, clips), whole)
    assert sizes == [4, 4, 4, 2]


def test_encode_gives_the_codes_of_every_picture(tokenizer):
    pictures = torch.randint(
        256, (5, 3, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    sizes = []
    rows = list(encode(tokenizer, pictures.split(2), sizes.append))
    assert sizes == [2, 2, 1]
    found = np.concatenate(rows)
    assert found.shape == (5, 3, 4)
    for sample, codes in zip(pictures, found, strict=True):
        expected = tokenizer.encode(sample.permute(0, 3, 1, 2).float() / 255)
        np.testing.assert_array_equal(codes, expected.numpy())
    assert len(np.unique(found)) > 4
