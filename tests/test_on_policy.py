import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from delvm import llama
from delvm.distill.cache import CacheConfig, Cached, open_cache, write_cache
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.on_policy import OnPolicyConfig, confidence, continue_pictures
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.generation import complete
from delvm.images.tasks import TaskConfig
from delvm.plan import check_plan, make_plan
from delvm.pretrain import PretrainConfig
from delvm.recipe import Recipe
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig
from delvm.tokens.store import Grid, TokenStore
from delvm.training import TrainerConfig, train
from tests.tiny_store import TOKENS, every_view, tiny_forms

pytestmark = pytest.mark.usefixtures("one_thread")
CODES, VOCAB, LENGTH = 10, 12, 10
SHAPES = {"pairs": (12, 1, 1, 2), "single": (8, 1, 1, 1)}  # of tiny_store
LAST = slice(7, 9)  # BOS, four pictures of two tokens, EOS
LABELLED = {"supervise": "annotations", "tasks": ["pairs"]}


def _model(seed):
    model = llama.build("micro", VOCAB, LENGTH, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it so that teacher and student differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _rows(num_rows=40, tasks=tuple(SHAPES), **settings):
    rng, shapes = np.random.default_rng(0), {task: SHAPES[task] for task in tasks}
    grids = {
        task: Grid([rng.integers(CODES, size=(samples, views, frames * channels, TOKENS)).astype(np.uint16)])
        for task, (samples, views, frames, channels) in shapes.items()
    }
    store = TokenStore({"num_codes": CODES, "tokens_per_image": TOKENS}, {"train": grids}, {"train": {}})
    config = SentencesConfig(shots={"single": 4} if "single" in tasks else {}, **settings)
    return TrainingSentences(
        store, every_view(shapes), tiny_forms(shapes, config), config, num_rows=num_rows, seed=0, details=True
    )


def _batch(num=6, **settings):
    return _rows(**settings).__getitems__(range(num))


def _continue(batch, *, share=1.0, seed=0, num_codes=CODES, **settings):
    return continue_pictures(_model(0), batch, OnPolicyConfig(share, **settings), num_codes, seed)


# --- rows ---


def test_the_last_picture_alone_is_the_students():
    batch = _batch(20)
    found = _continue(batch)
    last = torch.zeros(20, LENGTH, dtype=torch.bool)
    last[:, LAST] = True
    assert torch.equal(found["drawn"], last)
    assert torch.equal(found["tokens"][~last], batch["tokens"][~last])
    drawn = complete(_model(0), batch["tokens"][:, : LAST.start], 2, CODES, temperature=1.0, seed=0)
    assert torch.equal(found["tokens"][:, LAST], drawn)
    assert (found["tokens"] != batch["tokens"])[last].float().mean() > 0.5
    for key in ("tasks", "roles", "places"):
        assert found[key] is batch[key]


def test_the_batch_that_is_given_stays_as_it_is():
    batch = _batch(**LABELLED)
    before = {key: part.clone() for key, part in batch.items()}
    _continue(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], part) for key, part in before.items())


def test_nothing_special_is_ever_drawn():
    found = _continue(_batch(40), num_codes=3, temperature=5.0)  # all ids from 3 up are special here
    assert set(found["tokens"][:, LAST].flatten().tolist()) == {0, 1, 2}


def test_the_seed_draws():
    batch = _batch(20)
    state = torch.get_rng_state()
    one, two, other = (_continue(batch, share=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["tokens"], other["tokens"])
    assert not torch.equal(one["drawn"], other["drawn"])


def test_a_share_of_the_rows():
    batch = _batch(40)
    none = _continue(batch, share=0.0)
    assert none["tokens"] is batch["tokens"]
    assert not none["drawn"].any()
    counts = []
    for seed in range(10):
        found = _continue(batch, share=0.25, seed=seed)
        chosen = found["drawn"].any(1)
        assert found["drawn"][chosen].sum() == 2 * chosen.sum()
        assert torch.equal(found["tokens"][~chosen], batch["tokens"][~chosen])
        counts.append(int(chosen.sum()))
    assert 70 <= sum(counts) <= 130  # 100 of 400, four standard deviations
    assert len(set(counts)) > 1


def test_a_low_temperature_draws_the_likeliest_codes():
    batch = _batch(20)
    likeliest = complete(_model(0), batch["tokens"][:, : LAST.start], 2, CODES)
    assert torch.equal(_continue(batch, temperature=1e-4)["tokens"][:, LAST], likeliest)
    assert not torch.equal(_continue(batch)["tokens"][:, LAST], likeliest)


def test_labels_stay_labels():
    batch = _batch(20, **LABELLED)
    batch["labels"][:5] = -100
    found = _continue(batch)
    assert torch.equal(found["labels"] == -100, batch["labels"] == -100)
    kept = (found["labels"] != -100) & found["drawn"]
    assert kept.sum() == 15 * 2
    assert torch.equal(found["labels"][kept], found["tokens"][kept])
    others = ~found["drawn"]
    assert torch.equal(found["labels"][others], batch["labels"][others])
    assert "labels" not in _continue(_batch())


def test_confidence_is_the_highest_probability():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    expected = (hidden @ head.T).double().softmax(-1).max(-1).values
    for chunk_size in (2, 512):
        found = confidence(hidden, head, chunk_size=chunk_size)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


# --- the loss ---


def _distill(share=1.0, sure=0.0, temperature=1.0, **settings):
    on_policy = OnPolicyConfig(share, temperature, sure)
    config = DistillConfig(**{"size": "micro", "steps": 10, "on_policy": on_policy} | settings)
    return Distill(_model(0), Live(_model(1)), config, tasks=list(SHAPES), num_codes=CODES)


def _expected(module, batch):
    """The batch as it is drawn at step 0; of every label: CE, KL and the teacher's confidence, in float64."""
    config = module.distill.on_policy
    drawn = continue_pictures(_model(0), batch, config, CODES, int(batch["tokens"].sum()))
    with torch.no_grad():
        inputs = drawn["tokens"][:, :-1]
        logits, teacher = (_model(seed).double()(inputs).logits.flatten(0, 1) for seed in (0, 1))
    labels = drawn.get("labels", drawn["tokens"])[:, 1:].flatten()
    q, p = logits.log_softmax(-1), teacher.log_softmax(-1)
    ce = cross_entropy(logits, labels, reduction="none")
    own = drawn["drawn"][:, 1:].flatten()
    return labels != -100, own, ce, (p.exp() * (p - q)).sum(-1), p.exp().max(-1).values


@pytest.mark.parametrize("settings", [{}, LABELLED])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_own_codes_are_learnt_from_the_teacher_alone(share, settings):
    module, batch = _distill(share, ce_weight=0.5, kd_weight=2.0), _batch(12, **settings)
    found = module.training_step(batch)
    valid, own, ce, kl, _ = _expected(module, batch)
    assert (valid & own).any()
    total = 0.5 * ce[valid & ~own].sum() + 2 * kl[valid].sum()  # no token weighs more for another's sake
    assert found["loss"].item() == pytest.approx((total / valid.sum()).item(), rel=1e-5)
    assert found["kd"].item() == pytest.approx(kl[valid].mean().item(), rel=1e-5)
    assert found["ce"].item() == pytest.approx(ce[valid & ~own].mean().item(), rel=1e-5)
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_where_the_teacher_is_unsure_it_is_not_heard():
    batch = _batch(12)
    valid, own, ce, kl, sure = _expected(_distill(), batch)
    gate = sure[own].median().item() + 1e-4
    total = ce[valid & ~own].sum() + kl[valid & (~own | (sure >= gate))].sum()
    module = _distill(sure=gate)
    found = module.training_step(batch)["loss"].item()
    assert found == pytest.approx((total / valid.sum()).item(), rel=1e-5)
    assert found < _distill().training_step(batch)["loss"].item() - 1e-3
    # true codes are learnt however unsure it is
    closed = (ce + kl)[valid & ~own].sum() / valid.sum()
    assert _distill(sure=1.0).training_step(batch)["loss"].item() == pytest.approx(closed.item(), rel=1e-5)


class Repeated(Subset):
    """The same rows again and again."""

    collate = staticmethod(TrainingSentences.collate)


def _run(folder, module, dataset, steps, **settings):
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 1} | settings)
    return train(
        module, dataset, name="student", steps=steps, batch_size=4, clip=1e6, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip


def test_every_step_draws_anew_and_every_run_the_same(tmp_path):
    curves = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        module = _distill(steps=3, learning_rate=1e-12)  # the student stays what it was
        rows = Repeated(_rows(4), [0, 1, 2, 3] * 3)
        curves.append(_run(tmp_path / name, module, rows, 3))
    assert curves[0] == curves[1]
    assert len({round(point["kd"], 4) for point in curves[0]}) == 3
    ce = [point["ce"] for point in curves[0]]  # of true codes before the drawn ones, and of EOS after them
    assert ce == pytest.approx([ce[0]] * 3, rel=0.2)


def test_what_is_told_is_told_of_true_rows():
    batch, told = _batch(), []
    for share in (0.0, 1.0):
        module = _distill(share)
        module.training_step(batch)
        told.append(module.diagnose())
    assert told[0] == told[1]
    assert "kl/pairs" in told[0]


class Descent(Distill):
    """By plain gradient descent: the weights after a step tell its gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_drawing_leaves_every_weight_its_gradient(tmp_path, precision):
    config = DistillConfig(size="micro", steps=1, on_policy=OnPolicyConfig(1.0))
    module = Descent(_model(0), Live(_model(1)), config, tasks=list(SHAPES), num_codes=CODES)
    _run(tmp_path, module, _rows(4), 1, precision=precision)
    for (name, after), before in zip(module.model.named_parameters(), _model(0).parameters(), strict=True):
        assert not torch.equal(after, before), name


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "on_policy.share: 1.5 must lie in 0..1"),
        ({"share": math.nan}, "on_policy.share: nan must lie in 0..1"),
        ({"confidence": -0.1}, "on_policy.confidence: -0.1 must lie in 0..1"),
        ({"temperature": 0.0}, "on_policy.temperature: 0.0 must be above 0 and finite"),
        ({"temperature": math.inf}, "on_policy.temperature: inf must be above 0 and finite"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        OnPolicyConfig(**values)
    assert str(caught.value) == message


def test_without_kd_there_is_nothing_to_learn_from_own_pictures():
    with pytest.raises(ValueError, match=r"^on_policy\.share: of its own pictures a student learns by kd_w"):
        DistillConfig(kd_weight=0.0, on_policy=OnPolicyConfig(0.5))
    DistillConfig(kd_weight=0.0, kd_weight_end=1.0, on_policy=OnPolicyConfig(0.5))
    DistillConfig(kd_weight=0.0, on_policy=OnPolicyConfig(0.0))


def test_a_cache_knows_nothing_of_own_pictures(tmp_path):
    write_cache(tmp_path, _rows(2), Live(_model(1)), CacheConfig("topk", 5), temperature=1.0, seed=0,
                batch_size=2, device=torch.device("cpu"), teacher_hash="t", tokenizer_hash="k")  # fmt: skip
    config = DistillConfig(size="micro", on_policy=OnPolicyConfig(0.5))
    with pytest.raises(UserError) as caught:
        Distill(_model(0), Cached(open_cache(tmp_path)), config)
    assert str(caught.value) == (
        "on_policy: the student's own pictures need a live teacher, there is a cache"
    )


def _recipe(share=0.5, task=None, **sentences):
    return Recipe(
        tasks={"pose": task or TaskConfig(scene="pose", samples=5, validation_samples=3)},
        sentences=SentencesConfig(**sentences),
        teacher=PretrainConfig(size="micro"),
        student=DistillConfig(size="micro", on_policy=OnPolicyConfig(share)),
    )


def test_rows_must_be_whole_sentences():
    with pytest.raises(UserError) as caught:
        check_plan(_recipe(length=40), num_tokens=16, num_codes=256)
    assert str(caught.value) == (
        "student.on_policy.share: a row must be a whole sentence; leave sentences.length at 0"
    )
    check_plan(_recipe(share=0.0, length=40), num_tokens=16, num_codes=256)
    check_plan(_recipe(), num_tokens=16, num_codes=256)
    check_plan(_recipe(length=66), num_tokens=16, num_codes=256)  # what a sentence has


def test_a_picture_needs_something_before_it():
    listed = {"pose": {"train": 5, "validation": 3, "pictures": 1, "skipped": [], "dropped": []}}
    photos = TaskConfig(source="pictures", images="photos", make="")
    with pytest.raises(UserError) as caught:
        make_plan(_recipe(task=photos, specials=False), listed, num_tokens=16, num_codes=256)
    assert str(caught.value) == "student.on_policy.share: tasks.pose has one picture, nothing before it"
    make_plan(_recipe(task=photos), listed, num_tokens=16, num_codes=256)  # BOS stands there
