import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from delvm.errors import UserError
from delvm.images.files import read_picture
from delvm.images.scenes import Scenes
from delvm.images.sources import SPLITS, Views
from delvm.images.tasks import TaskConfig
from delvm.tokenizer import training as tokenizer_training
from delvm.tokens import encoding
from delvm.tokens.encoder import TokensConfig
from delvm.tokens.encoding import Blocks, Part, write_store
from delvm.tokens.formats import write_lvm
from delvm.tokens.store import Layout, open_store
from tests.processes import PATIENCE, together

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {
    "pose": TaskConfig(scene="pose", samples=5, validation_samples=2, policy="pose"),
    "rain": TaskConfig(scene="deraining", samples=7, validation_samples=3, policy="restoration"),
}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two samples in three views, passes of two views."""
    monkeypatch.setattr(encoding, "SHARD_BYTES", 100)
    monkeypatch.setattr(tokenizer_training, "PASS_PICTURES", 4)


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
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_workers_and_ranks_write_what_one_process_writes(tmp_path, tokenizer, precision):
    config = TokensConfig(precision)

    def write(name, **settings):
        views, data = views_of(TASKS), data_of(TASKS)
        write_store(tmp_path / name, tokenizer, TASKS, data, views, seed=0, config=config, **settings)
        return files(tmp_path / name)

    one = write("one")
    assert len(list((tmp_path / "one" / "rain.train").glob("*.npy"))) == 4
    assert json.loads(one[Path("manifest.json")])["precision"] == precision
    assert write("workers", num_workers=2) == one
    together(write, "together")
    assert files(tmp_path / "together") == one
    with pytest.raises(UserError, match=r"pose\.train: 2 of 3 shards are missing, the first 00000"):
        write("ranks", rank=1, world=2)  # of two that are no run together
    assert not (tmp_path / "ranks" / "manifest.json").exists()
    assert write("ranks", rank=0, world=2) == one


def test_every_process_has_work(tmp_path, tokenizer):
    # passes of 64 views, and at least 8 of them in a shard; at most 64 shards
    sizes = {"few": (100, 3), "more": (5_000, 1), "many": (640_000, 4)}
    layouts = {
        (name, "train"): encoding._plan(tmp_path, (samples, views, 2, 4), np.dtype(np.uint16), 64)
        for name, (samples, views) in sizes.items()
    }
    assert [(layout.shard, layout.num_shards) for layout in layouts.values()] == [
        (171, 1), (512, 10), (10_000, 64),
    ]  # fmt: skip
    dealt = [encoding._deal(layouts, rank, 8) for rank in range(8)]
    assert {sum(map(len, part.values())) for part in dealt} == {9, 10}  # of 75 shards
    for place, layout in layouts.items():
        assert sorted(n for part in dealt for n in part[place]) == list(range(layout.num_shards))


def test_blocks_begin_anew_with_each_shard(tmp_path):
    views = views_of({"rain": TASKS["rain"]})["train"]["rain"]  # 7 samples in 3 views
    layout = Layout(tmp_path, (7, 3, 2, 4), np.dtype(np.uint16), 3)
    parts = [Part(layout, number, views, 4, begun) for number, begun in ((0, 0), (1, 4), (2, 0))]
    blocks = Blocks(parts)
    found = [blocks[index] for index in range(len(blocks))]
    rows = [
        (0, [0, 1, 2, 3]),
        (0, [4, 5, 6, 7]),
        (0, [8]),
        (1, [13, 14, 15, 16]),
        (1, [17]),
        (2, [18, 19, 20]),
    ]
    for (part, pictures), (number, expected) in zip(found, rows, strict=True):
        assert part == number
        assert torch.equal(pictures, torch.stack([views[row] for row in expected]))


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


# --- stopped, and gone on with ---


class Photographs:
    """Pictures that are files, as samples."""

    def __init__(self, folder: Path, number: int) -> None:
        self.files = [folder / f"{place}.png" for place in range(number)]
        for place, file in enumerate(self.files):
            rng = np.random.default_rng(place)
            Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)).save(file)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> list[np.ndarray]:
        return [read_picture(self.files[place])] * 2


class Many:
    """A task of 60 files in 4 views: 30 blocks of 8 views, and 2 of validation; what is encoded is logged."""

    def __init__(self, folder: Path, tokenizer, monkeypatch) -> None:
        self.folder, self.log, self.tokenizer = folder, folder / "log", tokenizer
        config = TaskConfig(images=str(folder), annotations=str(folder), policy="restoration")
        self.tasks = {"many": config}
        self.data = {"many": {"train": 60, "validation": 10, "pictures": 2}}
        self.photographs = Photographs(folder, 60)
        sources = {"train": self.photographs, "validation": Photographs(folder, 10)}
        self.views = {
            split: {"many": Views(source, "many", config, size=8, num_views=views, seed=0)}
            for (split, source), views in zip(sources.items(), (4, 1), strict=True)
        }
        monkeypatch.setattr(tokenizer_training, "PASS_PICTURES", 16)
        monkeypatch.setattr(encoding, "SHARD_BYTES", 15 * 4 * 2 * 4 * 2)
        encode = tokenizer.encode

        def logged(pictures):
            with self.log.open("ab") as log:
                log.write(b"." * len(pictures))
            return encode(pictures)

        monkeypatch.setattr(tokenizer, "encode", logged)

    def write(self, name: str, num_workers: int = 0) -> dict:
        write_store(
            self.folder / name, self.tokenizer, self.tasks, self.data, self.views, seed=0,
            num_workers=num_workers,
        )  # fmt: skip
        return files(self.folder / name)

    def encoded(self) -> int:
        """Pictures that have been given to the network."""
        return self.log.stat().st_size if self.log.exists() else 0

    def write_and_be_killed(self, name: str, pictures: int, pause: float, num_workers: int = 0) -> None:
        """Write in a process that is killed once it has encoded so many more pictures, and a moment later."""
        goal = self.encoded() + pictures
        process = multiprocessing.get_context("fork").Process(target=self.write, args=(name, num_workers))
        process.start()
        deadline = time.monotonic() + PATIENCE
        while self.encoded() < goal and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(pause)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def many(tmp_path, tokenizer, monkeypatch):
    return Many(tmp_path, tokenizer, monkeypatch)


ALL = 60 * 4 * 2 + 10 * 2  # pictures


def test_killed_ten_times_at_random_moments(many):
    expected = many.write("whole")
    assert many.encoded() == ALL
    many.log.unlink()
    draw = random.Random()  # another moment in each run of the tests
    for _ in range(10):
        many.write_and_be_killed("killed", draw.randrange(48), draw.random() * 0.004)
    assert many.write("killed") == expected
    assert ALL <= many.encoded() <= ALL + 10 * 16


def test_killed_between_a_journal_and_its_shard(many):
    expected = many.write("whole")
    many.log.unlink()
    folder = many.folder / "store" / "many.train"
    layout = Layout(folder, (60, 4, 2, 4), np.dtype(np.uint16), 15)
    codes = np.load(many.folder / "whole" / "many.train" / "00002.npy").reshape(-1, 2, 4)
    with layout.journal(2) as journal:
        journal.append(codes)
    many.write("store")
    assert many.encoded() == ALL - 15 * 4 * 2  # nothing of that shard
    with layout.journal(1) as journal:  # its shard is there already
        journal.append(codes)
    assert many.write("store") == expected


def test_worker_processes_do_not_keep_a_killed_run_from_going_on(many):
    expected = many.write("whole")
    many.write_and_be_killed("killed", 100, 0, num_workers=2)
    assert list((many.folder / "killed" / "many.train").glob(".*.journal"))
    assert many.write("killed", num_workers=1) == expected


@contextmanager
def sigterm_raises():
    """As `delvm.fit` has it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield interrupt
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_says_where_and_goes_on(many, monkeypatch, number):
    expected = many.write("whole")
    many.log.unlink()
    encode = many.tokenizer.encode

    def stopping(pictures):
        if many.encoded() == 5 * 16:  # five blocks are encoded; the sixth is not
            os.kill(os.getpid(), number)
        return encode(pictures)

    with monkeypatch.context() as patch, sigterm_raises() as handler:
        interrupt = signal.getsignal(signal.SIGINT)
        patch.setattr(many.tokenizer, "encode", stopping)
        with pytest.raises(KeyboardInterrupt, match=f"^tokens: stopped at image 80 of {ALL}$"):
            many.write("stopped")
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is interrupt
    assert many.encoded() == 5 * 16
    assert many.write("stopped") == expected
    assert many.encoded() == ALL


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_is_named_and_what_came_before_is_kept(many, num_workers):
    expected = many.write("whole")
    many.log.unlink()
    file = many.photographs.files[21]  # its views, 84 to 87, begin a block
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    with pytest.raises(UserError, match=rf"^{file}: unreadable picture \(.*\)$"):
        many.write("store", num_workers=num_workers)
    assert many.encoded() == 84 * 2
    file.write_bytes(whole)
    assert many.write("store", num_workers=num_workers) == expected
    assert many.encoded() == ALL


def test_two_runs_at_once(many, monkeypatch):
    layout = Layout(many.folder / "store" / "many.train", (60, 4, 2, 4), np.dtype(np.uint16), 15)
    encode, begun = many.tokenizer.encode, []

    def late(pictures):
        if not begun:  # another run has begun the shard since this one looked
            begun.append(1)
            with layout.journal(0) as journal:
                journal.append(np.zeros((3, 2, 4), np.int64))
        return encode(pictures)

    monkeypatch.setattr(many.tokenizer, "encode", late)
    with pytest.raises(UserError, match=r"/\.00000\.journal: another run writes it at the same time$"):
        many.write("store")
