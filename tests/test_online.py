import copy
import json

import numpy as np
import pytest
import torch

from delvm import fit, llama
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Live
from delvm.images.scenes import Scenes
from delvm.images.sources import Views
from delvm.images.tasks import TaskConfig
from delvm.tokens.balance import TaskPlan
from delvm.tokens.encoder import Encoder, TokensConfig
from delvm.tokens.encoding import write_store
from delvm.tokens.online import Encode, OnlineSentences
from delvm.tokens.rows import IGNORED, TrainingSentences
from delvm.tokens.sentences import SentencesConfig, find_forms
from delvm.tokens.store import open_store
from delvm.training import TrainerConfig, train

TASKS = {
    "pose": TaskConfig(scene="pose", samples=4, validation_samples=2, policy="pose"),
    "rain": TaskConfig(scene="deraining", samples=6, validation_samples=2, policy="restoration"),
}


@pytest.fixture(scope="module")
def parts(tokenizer, tmp_path_factory):
    """Make rows and their views: (TrainingSentences, {task: Views})."""
    folder = tmp_path_factory.mktemp("store")
    views = {
        split: {
            task: Views(Scenes(c.scene, c.samples if split == "train" else 2, split, 0), task, c,
                        size=8, num_views=1, seed=0)
            for task, c in TASKS.items()
        }
        for split in ("train", "validation")
    }  # fmt: skip
    data = {task: {"train": c.samples, "validation": 2, "pictures": 2} for task, c in TASKS.items()}
    write_store(folder, tokenizer, TASKS, data, views, seed=0)

    def make(details=False, **settings):
        config = SentencesConfig(**settings)
        forms = find_forms(config, dict.fromkeys(TASKS, (1, 2)), 4)
        plans = {task: TaskPlan(c.samples, 1, 12, 0.5, 0.5, 3) for task, c in TASKS.items()}
        rows = TrainingSentences(
            open_store(folder), plans, forms, config, num_rows=60, seed=5, details=details
        )
        return rows, views["train"]

    return make


def test_rows_are_those_of_the_store_in_other_views(parts, tokenizer):
    rows, views = parts()
    online, encode = OnlineSentences(rows, views), Encode(rows, tokenizer)
    assert len(online) == 60
    seen: dict[tuple[int, int], list[bytes]] = {}
    for index in range(36):  # three epochs
        item = online[index]
        assert (item["pictures"].shape, item["pictures"].dtype) == ((4, 8, 8, 3), torch.uint8)
        task, picks = rows.picks(index)
        assert item["task"] == task
        for place in (0, 2):
            sample = int(picks[place, 0])
            expected = views[rows.tasks[task]].view(sample, 1 + index)
            np.testing.assert_array_equal(item["pictures"][place : place + 2], expected)
            seen.setdefault((task, sample), []).append(item["pictures"][place].numpy().tobytes())
        # the row's own pictures, encoded, are the row of the store
        stored = torch.stack([views[rows.tasks[task]].view(int(s), 0)[p] for s, _, p in picks])
        batch = encode({"pictures": stored[None], "task": torch.tensor([task])})
        assert batch["tokens"][0].tolist() == rows[index]["tokens"].tolist()
    assert all(len(set(shown)) == len(shown) for shown in seen.values())  # no view twice
    assert max(map(len, seen.values())) >= 6


def test_an_item_depends_on_its_number_alone(parts):
    rows, views = parts()
    one, two = OnlineSentences(rows, views), OnlineSentences(*parts())
    for index in (33, 2, 17):
        assert torch.equal(one[index]["pictures"], two[index]["pictures"])


@pytest.mark.parametrize("specials", [True, False])
def test_batches_are_rows_with_their_labels(parts, tokenizer, specials):
    rows, views = parts(specials=specials, supervise="annotations")
    online = OnlineSentences(rows, views)
    items = [online[index] for index in range(4)]
    batch = Encode(rows, tokenizer)({
        "pictures": torch.stack([item["pictures"] for item in items]),
        "task": torch.tensor([item["task"] for item in items]),
    })  # fmt: skip
    assert batch["tokens"].shape == (4, 16 + 2 * specials)
    for item, tokens, labels in zip(items, batch["tokens"], batch["labels"], strict=True):
        codes = tokenizer.encode(item["pictures"].permute(0, 3, 1, 2) / 255)
        body = tokens[1:-1] if specials else tokens
        assert body.tolist() == codes.flatten().tolist()
        assert [tokens[0], tokens[-1]] == ([16, 17] if specials else [codes[0, 0], codes[-1, -1]])
        annotation = torch.zeros(4, 4, dtype=torch.bool)
        annotation[1::2] = True
        expected = torch.where(annotation, codes, IGNORED).flatten()
        assert (labels[1:-1] if specials else labels).tolist() == expected.tolist()


def test_rows_are_encoded_as_the_store_is(parts, tokenizer):
    rows, _ = parts(specials=False)
    noise = torch.randint(
        256, (50, 4, 8, 8, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    batch = {"pictures": noise, "task": torch.zeros(50, dtype=torch.int64)}
    config, mixed = TokensConfig("bf16-mixed"), copy.deepcopy(tokenizer)  # its weights are laid out otherwise
    found = Encode(rows, mixed, config)(batch)["tokens"]
    assert torch.equal(found.view(50, 4, 4), Encoder(mixed, config)(noise))
    assert 0 < (found != Encode(rows, tokenizer)(batch)["tokens"]).float().mean() < 0.1


def test_cut_rows_are_refused(parts):
    with pytest.raises(ValueError, match=r"^balance.online: a row must be a whole sentence"):
        OnlineSentences(*parts(length=10))


def _train(folder, parts, tokenizer, **settings):
    """The curve of a student that learns the annotations of views of its own from a teacher."""
    rows, views = parts(details=True)
    config = DistillConfig(size="micro", steps=3, kd_on="annotations")
    teacher, model = (llama.build("micro", 18, 18, seed=seed) for seed in (1, 0))
    module = Distill(model, Live(teacher), config, tasks=list(TASKS), num_codes=16)
    told = []

    def prepare(batch):
        found = Encode(rows, tokenizer)(batch)
        told.append((found["num_targets"].item(), found["num_kd_targets"].item(), module.count(found)))
        return found

    module.prepare = prepare
    curve = train(
        module, OnlineSentences(rows, views), name="student", steps=3, batch_size=4, clip=1.0,
        config=TrainerConfig(accelerator="cpu", log_every=1, **settings), folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip
    return curve, told


@pytest.mark.usefixtures("one_thread")
def test_micro_batches_know_the_targets_of_the_step(parts, tokenizer, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole, told = _train(tmp_path / "one", parts, tokenizer)
    # 4 rows of 18 tokens, of which the first is no target; two annotations of 4 tokens in each
    assert told == [(4 * 17, 4 * 8, {"num_targets": 4 * 17, "num_kd_targets": 4 * 8})] * 3
    halves, told = _train(tmp_path / "two", parts, tokenizer, accumulate=2)
    assert told == [(4 * 17, 4 * 8, {"num_targets": 2 * 17, "num_kd_targets": 2 * 8})] * 6
    for one, two in zip(whole, halves, strict=True):
        assert one["kd"] > 0
        assert two == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_views_of_its_own(micro, capsys):
    few = ["student=null", "scratch=null", "teacher.size=micro", "teacher.steps=4", "balance.online=true"]
    losses = []
    for name in ("one", "two"):
        run_dir = micro.parent / name
        assert fit.run(micro, [f"run_dir={run_dir}", *few]) == 0
        losses.append(json.loads((run_dir / "teacher" / "curve.json").read_text()))
        grids = open_store(run_dir / "tokens").grids["train"]
        assert {task: grid.shape[1] for task, grid in grids.items()} == dict.fromkeys(grids, 1)
    assert losses[0] == losses[1]
    assert fit.run(micro, [f"run_dir={run_dir}", *few[:-1]]) == 0
    assert json.loads((run_dir / "teacher" / "curve.json").read_text()) != losses[0]
    assert llama.load(run_dir / "teacher").config.vocab_size == 18
    capsys.readouterr()
    assert fit.run(micro, [f"run_dir={micro.parent / 'three'}", *few, "sentences.length=50"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: balance.online: a row must be a whole sentence; leave sentences.length at 0"
    )
