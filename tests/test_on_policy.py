import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from delvm import llama
from delvm.distill.cache import CacheConfig, Cached, open_cache, write_cache
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.on_policy import OnPolicyConfig, confidence, continue_pictures, on_policy_step
from delvm.distill.teacher import Live
from delvm.errors import UserError
from delvm.generation import complete
from delvm.images.tasks import TaskConfig
from delvm.plan import check_plan, make_plan
from delvm.pretrain import PretrainConfig
from delvm.recipe import Recipe
from delvm.tokens.sentences import SentencesConfig
from delvm.training import Interrupted, TrainerConfig, train
from tests.processes import together
from tests.tiny_store import CODES, LEARNT, Repeated, Stopped, random_rows

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = CODES + 2, 10
LAST = slice(7, 9)  # BOS, four pictures of two tokens, EOS
LABELLED = {"supervise": "annotations", "tasks": ["pairs"]}


def _model(seed):
    model = llama.build("micro", VOCAB, LENGTH, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it so that teacher and student differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _batch(num=6, **settings):
    return random_rows(num, **settings).__getitems__(range(num))


def _continue(batch, *, temperature=1.0, num_codes=CODES, seed=0):
    return continue_pictures(_model(0), batch, temperature=temperature, num_codes=num_codes, seed=seed)


# --- steps ---


def test_a_share_of_the_steps():
    assert not any(on_policy_step(step, 0.0) for step in range(1000))
    assert all(on_policy_step(step, 1.0) for step in range(1000))
    chosen = [on_policy_step(step, 0.25) for step in range(1000)]
    assert 195 <= sum(chosen) <= 305  # four standard deviations around 250
    assert chosen == [on_policy_step(step, 0.25) for step in range(1000)]
    again = sum(one and two for one, two in itertools.pairwise(chosen))
    assert 34 <= again <= 91  # of 1 in 16, as steps that know nothing of each other


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
    one, two, other = (_continue(batch, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["tokens"], other["tokens"])


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


class Recorded(Distill):
    """Keeps what it learns from, as lists: tokens, labels, which of them are drawn, and its loss."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.learnt = []

    def losses(self, step, hidden):
        tokens = step.batch["tokens"]
        drawn = step.batch.get("drawn", torch.zeros_like(tokens, dtype=torch.bool))
        labels = step.batch.get("labels", tokens)
        self.learnt.append([part.tolist() for part in (tokens, labels, drawn)])
        return super().losses(step, hidden)


def _distill(share=1.0, *, sampling=1.0, sure=0.0, **settings):
    on_policy = OnPolicyConfig(share, sampling, sure)
    config = DistillConfig(**{"size": "micro", "steps": 10, "on_policy": on_policy} | settings)
    return Recorded(_model(0), Live(_model(1)), config, tasks=list(LEARNT), num_codes=CODES)


def _read(learnt):
    """Some micro-batches as one. Of every label: itself, whether it is drawn; logits of both, in float64."""
    tokens, labels, drawn = (
        torch.tensor(list(itertools.chain(*parts))) for parts in zip(*learnt, strict=True)
    )
    with torch.no_grad():
        logits, teacher = (_model(seed).double()(tokens[:, :-1]).logits.flatten(0, 1) for seed in (0, 1))
    return labels[:, 1:].flatten(), drawn[:, 1:].flatten(), logits, teacher


def _expected(learnt, *, temperature=1.0, sure=0.0, ce=1.0, kd=1.0):
    """What a training's curves tell of `_model(0)` at some micro-batches of a step."""
    labels, drawn, logits, teacher = _read(learnt)
    valid, entropy = labels != -100, cross_entropy(logits, labels, reduction="none")
    q, p = ((x / temperature).log_softmax(-1) for x in (logits, teacher))
    kl = temperature**2 * (p.exp() * (p - q)).sum(-1)
    true, heard = valid & ~drawn, teacher.softmax(-1).amax(-1) >= sure
    loss = ce * entropy[true].sum() + kd * kl[true | (valid & drawn & heard)].sum()
    return {
        "loss": (loss / valid.sum()).item(),  # no token weighs more for another's sake
        "ce": entropy[true].mean().item(),
        "kd": kl[valid].mean().item(),
    }


def _near(found, expected):
    assert {key: float(torch.as_tensor(found[key]).detach()) for key in expected} == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("settings", [{}, LABELLED])
@pytest.mark.parametrize(("sampling", "temperature"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.5, 2.0)])
def test_own_codes_are_learnt_from_the_teacher_alone(settings, sampling, temperature):
    module = _distill(sampling=sampling, temperature=temperature, ce_weight=0.5, kd_weight=2.0)
    batch = _batch(12, **settings)
    found = module.training_step(batch)
    _near(found, _expected(module.learnt, temperature=temperature, ce=0.5, kd=2.0))
    # each temperature has its own work: one draws, the other compares
    ((tokens, _, _),) = module.learnt
    seed = int(batch["tokens"].sum())
    assert tokens == _continue(batch, temperature=sampling, seed=seed)["tokens"].tolist()
    assert tokens != _continue(batch, temperature=3.5 - sampling, seed=seed)["tokens"].tolist()
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_other_steps_are_as_if_there_were_none():
    batch = _batch()
    share = 0.63  # of step 0
    assert not on_policy_step(0, share)
    assert on_policy_step(0, share + 0.01)
    modules = [_distill(value) for value in (share, 0.0, share + 0.01, 1.0)]
    losses = [module.training_step(batch)["loss"].item() for module in modules]
    assert losses[0] == losses[1] != losses[2] == losses[3]
    learnt = [module.learnt for module in modules]
    assert learnt[0] == learnt[1] != learnt[2] == learnt[3]
    assert learnt[0][0][0] == batch["tokens"].tolist()


def test_where_the_teacher_is_unsure_it_is_not_heard():
    batch = _batch(12)
    everywhere = _distill()
    loss = everywhere.training_step(batch)["loss"].item()
    _, drawn, _, teacher = _read(everywhere.learnt)
    median = teacher.softmax(-1).amax(-1)[drawn].median().item() + 1e-4
    for sure in (median, 1.0):  # the last: of true codes alone it is heard, however unsure
        module = _distill(sure=sure)
        found = module.training_step(batch)
        assert module.learnt == everywhere.learnt
        _near(found, _expected(module.learnt, sure=sure))
        assert found["loss"].item() < loss - 1e-3
        loss = found["loss"].item()


def test_what_is_told_is_told_of_true_rows():
    batch, told = _batch(), []
    for share in (0.0, 1.0):
        module = _distill(share)
        module.training_step(batch)
        told.append(module.diagnose())
    assert told[0] == told[1]
    assert "kl/pairs" in told[0]


# --- trainings ---


def _run(folder, module, dataset, steps, **settings):
    folder.mkdir(exist_ok=True)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 1} | settings)
    return train(
        module, dataset, name="student", steps=steps, batch_size=4, clip=1e6, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip


STILL = {"learning_rate": 1e-12}
"""The student stays what it was."""


def test_every_step_draws_anew_and_every_run_the_same(tmp_path):
    modules = [_distill(0.7, steps=6, **STILL) for _ in range(2)]
    rows = Repeated(random_rows(4), [0, 1, 2, 3] * 6)
    curves = [_run(tmp_path / str(number), module, rows, 6) for number, module in enumerate(modules)]
    assert curves[0] == curves[1]
    assert modules[0].learnt == modules[1].learnt
    own = [step for step in range(6) if on_policy_step(step, 0.7)]
    assert 1 < len(own) < 6
    for step, learnt in enumerate(modules[0].learnt):
        assert any(map(any, learnt[2])) == (step in own)
        _near(curves[0][step], _expected([learnt]))
    assert len({str(modules[0].learnt[step][0]) for step in own}) == len(own)


class Uneven(Repeated):
    """Row i has no labels in its first i % 4 pictures: the mean of micro-batches' means is another."""

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        labels = batch["tokens"].clone()
        for row, index in enumerate(indices):
            labels[row, : 1 + index % 4 * 2] = -100
        return {**batch, "labels": labels}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_curves_are_those_of_one_batch(tmp_path, accumulate):
    module, rows = _distill(steps=2, **STILL), Uneven(random_rows(8), range(8))
    curve = _run(tmp_path, module, rows, 2, accumulate=accumulate)
    assert len(module.learnt) == 2 * accumulate
    for step, point in enumerate(curve):  # of what these micro-batches have drawn, each for itself
        _near(point, _expected(module.learnt[step * accumulate : (step + 1) * accumulate]))


def _weights(module):
    return {name: weight.detach().numpy() for name, weight in module.named_parameters()}


def test_two_processes_draw_and_learn_as_two_micro_batches(tmp_path):
    def work(folder, **trainer):
        module = _distill(0.7, steps=6, learning_rate=1e-3)
        curve = _run(folder, module, Uneven(random_rows(24), range(24)), 6, **trainer)
        return curve, _weights(module), [tokens for tokens, _, _ in module.learnt]

    curve, weights, learnt = work(tmp_path / "one", accumulate=2)
    found = together(lambda: work(tmp_path / "two"))
    for rank, (others, theirs, tokens) in enumerate(found):
        assert tokens == learnt[rank::2]
        for mine, point in zip(curve, others, strict=True):
            assert point == pytest.approx(mine, rel=1e-5)
        for name, weight in weights.items():
            np.testing.assert_allclose(theirs[name], weight, atol=1e-5)
    for name, weight in _model(0).named_parameters():
        assert not np.allclose(weights[f"model.{name}"], weight.detach().numpy(), atol=1e-4), name


def test_a_run_that_stops_goes_on_to_draw_the_same(tmp_path):
    settings = {"steps": 6, "learning_rate": 1e-3}
    rows, whole = random_rows(24), _distill(0.7, **settings)
    curve = _run(tmp_path / "whole", whole, rows, 6)
    first, second = (_distill(0.7, **settings) for _ in range(2))
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        _run(tmp_path / "parts", first, Stopped(rows, 2 * 4), 6)
    with torch.no_grad():
        for parameter in second.parameters():  # another start: all must come from the checkpoint
            parameter.mul_(0.5)
    assert _run(tmp_path / "parts", second, rows, 6) == curve
    assert first.learnt + second.learnt == whole.learnt
    assert on_policy_step(3, 0.7)  # after the stop
    for name, weight in _weights(whole).items():
        np.testing.assert_array_equal(_weights(second)[name], weight)


class Descent(Distill):
    """By plain gradient descent: the weights after a step tell its gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_drawing_leaves_every_weight_its_gradient(tmp_path, precision):
    config = DistillConfig(size="micro", steps=1, on_policy=OnPolicyConfig(1.0))
    module = Descent(_model(0), Live(_model(1)), config, tasks=list(LEARNT), num_codes=CODES)
    _run(tmp_path, module, random_rows(4), 1, precision=precision)
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
    write_cache(tmp_path, random_rows(2), Live(_model(1)), CacheConfig("topk", 5), temperature=1.0, seed=0,
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
