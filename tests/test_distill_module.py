import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from delvm import llama
from delvm.distill.cache import CacheConfig, Cached, CachedRows, open_cache, write_cache
from delvm.distill.divergences import DIVERGENCES, make_divergence, mean_divergence
from delvm.distill.module import Distill, DistillConfig, scheduled
from delvm.distill.teacher import SERVED, Live
from delvm.errors import UserError
from delvm.pretrain import Pretrain, forward_flops, hidden_states
from delvm.tokens.sentences import ANNOTATION
from delvm.training import CHECKPOINT, Interrupted, TrainerConfig, train
from tests.processes import together
from tests.tiny_store import CODES, LEARNT, Repeated, Stopped, random_rows

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = CODES + 2, 14
UNEVEN = {"length": 4, "supervise": "annotations", "tasks": ["pairs"]}  # cut rows of 0 to 2 labels


def _model(seed, size="micro", vocab=VOCAB):
    model = llama.build(size, vocab, LENGTH, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it so that teacher and student differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _module(teacher=None, **settings):
    return Distill(
        _model(0), Live(teacher or _model(1)), DistillConfig(**{"size": "micro", "steps": 10} | settings)
    )


def _tokens(num=4):
    return torch.randint(0, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(0))


def _batch(num=6, **settings):
    return random_rows(**settings).__getitems__(range(num))


def _logits(model, batch):
    """(tokens, codes) that predict the labels."""
    positions = batch.get("positions")
    shifted = None if positions is None else positions[:, :-1]
    return model.lm_head(hidden_states(model, batch["tokens"][:, :-1], shifted)).flatten(0, 1)


def _labels(batch):
    return batch.get("labels", batch["tokens"])[:, 1:].flatten()


def _of_labels(batch, key):
    return batch[key][:, 1:].flatten()


def _plain(batch, *, divergence="forward_kl", temperature=1.0, ce=1.0, kd=1.0, kd_on=None, settings=()):
    """The loss of `_model(0)` under `_model(1)` from all logits, in float64; and its gradient."""
    student, labels = _model(0).double(), _labels(batch)
    with torch.no_grad():
        teacher = _logits(_model(1).double(), batch)
    logits = _logits(student, batch)
    taught = labels if kd_on is None else labels.masked_fill(~kd_on, -100)
    compare = make_divergence(divergence, **dict(settings))
    loss = kd * mean_divergence(compare, logits, teacher, taught, temperature=temperature)
    (loss + ce * cross_entropy(logits, labels)).backward()
    return (loss + ce * cross_entropy(logits, labels)).item(), _gradient(student)


def _gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _off(found, expected):
    """How far a gradient is off, relative to its size."""
    assert expected.norm() > 0.01
    return ((found - expected).norm() / expected.norm()).item()


def _log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("ce_weight", "kd_weight", "temperature"),
    [(1.0, 1.0, 1.0), (0.1, 0.9, 1.0), (0.5, 2.0, 3.0), (0.0, 1.0, 0.7)],
)
def test_losses_equal_the_formula(ce_weight, kd_weight, temperature):
    module, tokens = _module(ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature), _tokens()
    found = module.training_step({"tokens": tokens})
    with torch.no_grad():
        student, teacher = (
            m(tokens[:, :-1]).logits.double().numpy() for m in (module.model, module.signal.model)
        )
    labels = tokens[:, 1:].numpy()
    ce = -np.take_along_axis(_log_softmax(student), labels[..., None], -1).mean()  # at temperature 1
    s, t = _log_softmax(student / temperature), _log_softmax(teacher / temperature)
    kd = temperature**2 * (np.exp(t) * (t - s)).sum(-1).mean()
    assert set(found) == {"loss", "ce", "kd"}
    assert kd > 0.01  # else the test would see nothing
    assert found["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert found["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert found["loss"].item() == pytest.approx(ce_weight * ce + kd_weight * kd, rel=1e-4)


def test_the_gradient_on_the_student_is_that_of_the_formula():
    module, tokens = _module(temperature=2.0), _tokens()
    module.training_step({"tokens": tokens})["loss"].backward()
    copy = _model(0).double()
    logits = copy(tokens[:, :-1]).logits
    with torch.no_grad():
        teacher = module.signal.model.double()(tokens[:, :-1]).logits
    n = tokens[:, 1:].numel()
    # d CE / d logits = (softmax - one-hot) / n; d T² KL / d logits = T (softmax(s/T) - softmax(t/T)) / n
    slope = logits.softmax(-1) - torch.nn.functional.one_hot(tokens[:, 1:], VOCAB)
    slope = (slope + 2.0 * ((logits / 2).softmax(-1) - (teacher / 2).softmax(-1))) / n
    logits.backward(slope.detach())
    for (name, found), expected in zip(module.model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-6, msg=name)


# --- packed rows: several sentences in one, each with positions of its own

SIZES = (6, 8)


def _packed():
    """A row of two sentences, its labels without their first tokens, its positions; and the sentences."""
    tokens = _tokens(1)
    labels, positions = tokens.clone(), torch.cat([torch.arange(size) for size in SIZES])[None]
    labels[positions == 0] = -100
    return {"tokens": tokens, "labels": labels, "positions": positions}, tokens.split(SIZES, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_teaches_what_its_sentences_teach_alone(attention):
    row, sentences = _packed()
    packed, alone = (_module(temperature=2.0) for _ in range(2))
    for module in (packed, alone):
        module.double()
        module.signal.model.double()
        for model in (module.model, module.signal.model):
            model.set_attn_implementation(attention)
    found = packed.training_step(row)
    found["loss"].backward()
    expected = dict.fromkeys(found, 0.0)
    for sentence in sentences:
        share = (sentence.shape[1] - 1) / (sum(SIZES) - len(SIZES))
        parts = alone.training_step({"tokens": sentence})
        (share * parts["loss"]).backward()
        expected = {key: value + share * parts[key].item() for key, value in expected.items()}
    assert found["kd"].item() > 0.01  # else the test would see nothing
    for key, value in expected.items():  # CE and KD are taken in float32
        assert found[key].item() == pytest.approx(value, rel=1e-5), key
    for (name, one), two in zip(packed.model.named_parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_neither_student_nor_teacher_sees_the_sentence_before():
    row, _ = _packed()
    module = _module(ce_weight=0.0)
    other = row["tokens"].clone()
    other[:, : SIZES[0]] = (other[:, : SIZES[0]] + 1) % VOCAB
    labels = row["labels"].clone()
    labels[:, : SIZES[0]] = -100  # the second sentence alone is learnt
    rows = [{**row, "tokens": tokens, "labels": labels} for tokens in (row["tokens"], other)]
    one, two = (module.training_step(packed)["kd"] for packed in rows)
    assert torch.equal(one, two)
    # run on, and both see it
    for packed in rows:
        del packed["positions"]
    one, two = (module.training_step(packed)["kd"].item() for packed in rows)
    assert abs(one - two) > 1e-3


def test_labels_choose_what_is_learnt_from_label_and_teacher():
    module, tokens = _module(), _tokens()
    labels = tokens.clone()
    labels[:, 5:9] = -100
    found = module.training_step({"tokens": tokens, "labels": labels})
    with torch.no_grad():
        student, teacher = (
            m(tokens[:, :-1]).logits.double().numpy() for m in (module.model, module.signal.model)
        )
    s, t = _log_softmax(student), _log_softmax(teacher)
    kept = (labels[:, 1:] != -100).numpy()
    ce = -np.take_along_axis(s, tokens[:, 1:].numpy()[..., None], -1)[..., 0]
    kd = (np.exp(t) * (t - s)).sum(-1)
    assert kept.sum() == 4 * 9
    assert found["ce"].item() == pytest.approx(ce[kept].mean(), rel=1e-5)
    assert found["kd"].item() == pytest.approx(kd[kept].mean(), rel=1e-4)
    assert abs(kd[kept].mean() - kd.mean()) > 1e-3


def test_without_kd_the_student_learns_as_in_pretraining():
    tokens = _tokens()
    distill = _module(kd_weight=0.0)
    for part in (distill.signal.model, distill.signal.model.model):
        part.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran for nothing"))
    pretrain = Pretrain(_model(0), distill.config, distill.config.steps)
    for module in (distill, pretrain):
        module.training_step({"tokens": tokens})["loss"].backward()
    for (name, one), two in zip(distill.model.named_parameters(), pretrain.model.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_a_teacher_equal_to_the_student_adds_nothing():
    found = _module(teacher=_model(0)).training_step({"tokens": _tokens()})
    assert found["kd"].item() == pytest.approx(0, abs=1e-6)
    assert found["loss"].item() == pytest.approx(found["ce"].item(), abs=1e-6)


def test_the_teacher_stands_in_nothing_that_is_trained_or_saved():
    module = _module()
    teacher = {id(parameter) for parameter in module.signal.model.parameters()}
    student = {id(parameter) for parameter in module.model.parameters()}
    assert {id(parameter) for parameter in module.parameters()} == student
    assert all(id(part) != id(module.signal.model) for part in module.modules())
    assert list(module.state_dict()) == [f"model.{name}" for name in module.model.state_dict()]
    optimizer = module.configure_optimizers()["optimizer"]
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(student)
    assert not teacher & set(trained)


def test_the_teacher_stays_in_evaluation_mode_without_gradient():
    teacher = _model(1).train()
    module = _module(teacher=teacher)
    module.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step({"tokens": _tokens()})["loss"].backward()
    optimizer.step()
    assert module.model.training
    assert not any(part.training for part in module.signal.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in module.signal.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is not None for p in module.model.parameters())


def test_a_teacher_of_another_size():
    module = _module(teacher=_model(1, "tiny"))
    assert torch.isfinite(module.training_step({"tokens": _tokens()})["loss"])


def test_another_vocabulary_is_refused():
    message = (
        r"^student: vocabulary of 12 ids, the teacher's has 13; both must speak the codes of one tokenizer$"
    )
    with pytest.raises(UserError, match=message):
        _module(teacher=_model(1, vocab=13))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "kl"}, "^divergence: 'kl' is unknown; choices: forward_kl"),
        ({"temperature": 0.0}, r"^temperature: 0\.0 must be above 0"),
        ({"temperature": math.nan}, "^temperature: nan must be above 0"),
        ({"temperature": math.inf}, "^temperature: inf must be above 0 and finite"),
        ({"ce_weight": -1.0}, r"^ce_weight: -1\.0 must be at least 0"),
        ({"kd_weight": math.nan}, "^kd_weight: nan must be at least 0"),
        ({"kd_weight": math.inf}, "^kd_weight: inf must be at least 0 and finite"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "^ce_weight, kd_weight: both are 0, nothing would be learnt$"),
        ({"learning_rate": -1.0}, r"^learning_rate: -1\.0 must be above 0"),
        ({"size": "huge"}, "^size: 'huge' is unknown"),
        ({"ce_weight_end": -1.0}, r"^ce_weight_end: -1\.0 must be at least 0"),
        ({"kd_weight_end": math.inf}, "^kd_weight_end: inf must be at least 0 and finite"),
        ({"task_ce_weights": {"pose": -1.0}}, r"^task_ce_weights\.pose: -1\.0 must be at least 0"),
        ({"task_kd_weights": {"pose": math.nan}}, r"^task_kd_weights\.pose: nan must be at least 0"),
        ({"task_temperatures": {"pose": 0.0}}, r"^task_temperatures\.pose: 0\.0 must be above 0"),
        ({"course": "steps"}, "^course: 'steps' is unknown; choices: linear, cosine$"),
        ({"kd_on": "images"}, "^kd_on: 'images' is unknown; choices: all, annotations$"),
        ({"teacher_precision": "16"}, "^teacher_precision: '16' is unknown; choices: auto, 32, bf16$"),
        ({"divergence": "taid", "blend": 2.0}, r"^blend: 2\.0 must lie in 0\.\.1$"),
        ({"blend_end": -0.5}, r"^blend_end: -0\.5 must lie in 0\.\.1$"),
        (
            {"divergence": "taid", "divergence_settings": {"blend": 0.5}},
            r"^divergence_settings\.blend: it changes by the step; give blend and blend_end$",
        ),
        (
            {"divergence": "jsd", "divergence_settings": {"alpha": 0.5}},
            r"^divergence_settings\.alpha: jsd does not take it; choices: beta$",
        ),
        (
            {"divergence": "jsd", "divergence_settings": {"beta": 1.0}},
            r"^divergence_settings\.beta: 1\.0 must be above 0",
        ),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**values)


def test_an_end_alone_is_a_weight():
    DistillConfig(ce_weight=0.0, kd_weight=0.0, kd_weight_end=1.0)


# --- objectives ---


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_the_plain_one(divergence, temperature):
    module = _module(divergence=divergence, temperature=temperature, ce_weight=0.5, kd_weight=2.0).double()
    module.signal.model.double()
    batch = _batch(**UNEVEN)
    found = module.training_step(batch)
    found["loss"].backward()
    settings = {"blend": 0.4} if divergence == "taid" else {}  # taid's part at the first step
    loss, gradient = _plain(
        batch, divergence=divergence, temperature=temperature, ce=0.5, kd=2.0, settings=settings
    )
    assert found["kd"].item() > 0.01
    assert found["loss"].item() == pytest.approx(loss, rel=1e-6)
    assert _off(_gradient(module.model), gradient) < 1e-6


def test_a_divergences_own_settings():
    batch = _batch()
    module = _module(divergence="jsd", divergence_settings={"beta": 0.2})
    found = module.training_step(batch)["loss"].item()
    assert found == pytest.approx(_plain(batch, divergence="jsd", settings={"beta": 0.2})[0], rel=1e-5)
    assert found != pytest.approx(_plain(batch, divergence="jsd")[0], rel=1e-3)


def test_weights_and_temperatures_go_by_task():
    settings = {
        "ce_weight": 0.5, "kd_weight": 2.0, "temperature": 2.0, "task_ce_weights": {"single": 0.25},
        "task_kd_weights": {"pairs": 4.0}, "task_temperatures": {"single": 0.5},
    }  # fmt: skip
    config = DistillConfig(size="micro", **settings)
    module = Distill(_model(0), Live(_model(1)), config, tasks=list(LEARNT))
    batch = _batch(length=7)  # cut rows, of sentences of both tasks
    found = module.training_step(batch)["loss"]
    found.backward()
    assert any(len(set(row)) == 2 for row in batch["tasks"].tolist())
    total, gradient = 0.0, torch.zeros(1)
    for task, (ce, kd, temperature) in enumerate([(0.5, 8.0, 2.0), (0.125, 2.0, 0.5)]):
        here = {**batch, "labels": batch["labels"].masked_fill(batch["tasks"] != task, -100)}
        loss, slope = _plain(here, temperature=temperature, ce=ce, kd=kd)
        # a token of any task weighs the same
        share = (_labels(here) != -100).sum() / (_labels(batch) != -100).sum()
        total, gradient = total + share * loss, gradient + share * slope
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    assert _off(_gradient(module.model), gradient) < 1e-4


@pytest.mark.parametrize("settings", [{}, UNEVEN])
def test_on_annotations_the_teacher_is_heard_there_alone(settings):
    batch = _batch(**settings)
    module = _module(kd_on="annotations", temperature=2.0)
    found = module.training_step(batch)
    found["loss"].backward()
    on = _of_labels(batch, "roles") == ANNOTATION
    loss, gradient = _plain(batch, temperature=2.0, kd_on=on)
    assert found["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert _off(_gradient(module.model), gradient) < 1e-4
    labelled = _labels(batch) != -100
    assert module.count(batch) == {"num_targets": labelled.sum(), "num_kd_targets": (on & labelled).sum()}
    if not settings:
        assert found["loss"].item() != pytest.approx(_plain(batch, temperature=2.0)[0], rel=1e-3)
    assert set(_module().count(batch)) == {"num_targets"}


# --- what changes by the step ---


def test_what_is_scheduled():
    assert [scheduled(1.0, None, progress, "linear") for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert [scheduled(1.0, 3.0, progress, "linear") for progress in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    cosine = [scheduled(2.0, 0.0, progress, "cosine") for progress in (0.0, 0.25, 0.5, 1.0)]
    assert cosine == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 0.0], abs=1e-12)


def _run(folder, module, dataset, steps, **settings):
    folder.mkdir(exist_ok=True)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 1} | settings)
    return train(
        module, dataset, name="student", steps=steps, batch_size=4, clip=1e6, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("course", "parts"),
    [("linear", [0, 0.25, 0.5, 0.75, 1]), ("cosine", [0, 0.146447, 0.5, 0.853553, 1])],
)
def test_weights_go_from_the_first_step_to_the_last(tmp_path, course, parts):
    settings = {"ce_weight": 1.0, "ce_weight_end": 0.5, "kd_weight": 0.0, "kd_weight_end": 2.0}
    curve = _run(tmp_path, _module(steps=5, course=course, **settings), random_rows(20), 5)
    assert len(curve) == len(parts)
    for point, part in zip(curve, parts, strict=True):
        expected = (1 - 0.5 * part) * point["ce"] + 2 * part * point["kd"]
        assert point["loss"] == pytest.approx(expected, rel=1e-5)
        assert point["kd"] > 0.01


def test_the_blend_of_taid_rises(tmp_path):
    # at this learning rate the student stays what it was
    module = _module(divergence="taid", steps=3, blend=0.2, blend_end=1.0, learning_rate=1e-12)
    rows = random_rows(4)
    curve = _run(tmp_path, module, Repeated(rows, [0, 1, 2, 3] * 3), 3)
    batch = rows.__getitems__(range(4))
    for point, blend in zip(curve, (0.2, 0.6, 1.0), strict=True):
        expected = _plain(batch, divergence="taid", settings={"blend": blend}, ce=0.0)[0]
        assert point["kd"] == pytest.approx(expected, rel=1e-4)
    assert curve[0]["kd"] < 0.2 * curve[2]["kd"]
    assert curve[2]["kd"] == pytest.approx(_plain(batch, ce=0.0)[0], rel=1e-4)


# --- a cache in the teacher's place ---


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Make a cache of `_model(1)` at temperature 2: (signal, the rows with what it says of them)."""

    def make(rows, kind="topk", count=VOCAB):
        folder, teacher = tmp_path_factory.mktemp("cache"), Live(_model(1))
        write_cache(folder, rows, teacher, CacheConfig(kind, count), temperature=2.0, seed=3, batch_size=4,
                    device=torch.device("cpu"), teacher_hash="t", tokenizer_hash="k")  # fmt: skip
        cache = open_cache(folder)
        return Cached(cache), CachedRows(rows, cache)

    return make


@pytest.mark.parametrize("divergence", SERVED["topk"])
def test_a_cache_of_all_codes_is_the_teacher(caches, divergence):
    signal, rows = caches(random_rows(6, **UNEVEN))
    batch = rows.__getitems__(range(6))
    config = DistillConfig(size="micro", divergence=divergence, temperature=2.0, ce_weight=0.5)
    cached = Distill(_model(0), signal, config)
    found = cached.training_step(batch)
    found["loss"].backward()
    loss, gradient = _plain(batch, divergence=divergence, temperature=2.0, ce=0.5)
    assert found["kd"].item() > 0.01
    assert found["loss"].item() == pytest.approx(loss, rel=1e-3)  # probabilities come rounded by 0.02%
    assert _off(_gradient(cached.model), gradient) < 2e-3


def test_a_cache_of_a_few_codes_is_not_quite_the_teacher(caches):
    signal, rows = caches(random_rows(6), count=3)
    batch = rows.__getitems__(range(6))
    cached = Distill(_model(0), signal, DistillConfig(size="micro", temperature=2.0, ce_weight=0.0))
    found = cached.training_step(batch)["kd"].item()
    live = _plain(batch, temperature=2.0, ce=0.0)[0]
    assert 0.3 * live < found < live  # what the rest holds is not told apart


def test_drawn_codes_are_learnt_as_labels_are(caches):
    signal, rows = caches(random_rows(6), "sampled", 5)
    batch = rows.__getitems__(range(6))
    cached = Distill(_model(0), signal, DistillConfig(size="micro", temperature=2.0))
    found = cached.training_step(batch)
    with torch.no_grad():
        logits = _logits(_model(0).double(), batch)
    ids = batch["teacher_ids"].flatten(0, 1).long()
    kd = -4 * (logits / 2).log_softmax(-1).gather(-1, ids).mean()
    assert found["kd"].item() == pytest.approx(kd.item(), rel=1e-5)
    ce = cross_entropy(logits, _labels(batch))
    assert found["loss"].item() == pytest.approx((ce + kd).item(), rel=1e-5)


def test_a_cache_refuses_what_it_cannot_serve(caches):
    drawn, _ = caches(random_rows(2), "sampled", 5)
    with pytest.raises(UserError) as caught:
        Distill(_model(0), drawn, DistillConfig(size="micro", divergence="reverse_kl", temperature=2.0))
    assert str(caught.value) == (
        "divergence: 'reverse_kl' cannot be had from a teacher's cache of kind 'sampled'; choices: forward_kl"
    )
    for settings in ({}, {"temperature": 2.0, "task_temperatures": {"pairs": 1.0}}):
        with pytest.raises(UserError) as caught:
            Distill(_model(0), drawn, DistillConfig(size="micro", **settings))
        assert str(caught.value) == "temperature: 1.0, the teacher's cache was written at 2.0"


# --- micro-batches and processes ---


class Descent(Distill):
    """By plain gradient descent: the weights after a step tell its gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _descend(folder, signal, rows, steps=3, trainer=None, **settings):
    """(curve, weights as arrays) of a student that learns from `rows`."""
    config = DistillConfig(**{"size": "micro", "steps": steps, "temperature": 2.0} | settings)
    module = Descent(_model(0), signal, config, tasks=list(LEARNT), num_codes=CODES)
    curve = _run(folder, module, rows, steps, **(trainer or {}))
    return curve, {name: weight.detach().numpy() for name, weight in module.named_parameters()}


def _step(weights):
    """The gradient of the one step that has led from `_model(0)` to these."""
    before = torch.cat([p.detach().flatten() for p in _model(0).parameters()])
    after = torch.cat([torch.from_numpy(weight).flatten() for weight in weights.values()])
    return (before - after) / 0.1


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"kd_on": "annotations"}])
def test_micro_batches_add_up_to_the_step(tmp_path, accumulate, settings):
    rows = random_rows(4, length=7) if settings else random_rows(4, **UNEVEN)
    batch = rows.__getitems__(range(4))
    trainer = {"accumulate": accumulate}
    curve, weights = _descend(tmp_path, Live(_model(1)), rows, steps=1, trainer=trainer, **settings)
    on = _of_labels(batch, "roles") == ANNOTATION
    labelled = (_labels(batch) != -100).view(4, -1)
    for chosen in (labelled, on.view(4, -1) & labelled):
        assert len(set(chosen.sum(1).tolist())) > 1  # the mean of micro-batches' means is another
    loss, gradient = _plain(batch, temperature=2.0, kd_on=on if settings else None)
    assert curve[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert _off(_step(weights), gradient) < 1e-3


def _close(one, two):
    for mine, other in zip(one[0], two[0], strict=True):
        assert other == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in mine.items()}
    for name, weight in one[1].items():
        np.testing.assert_allclose(two[1][name], weight, atol=1e-5)


@pytest.mark.parametrize("source", ["live", "topk", "sampled"])
def test_two_processes_train_as_one(tmp_path, caches, source):
    rows = random_rows(12, length=7)
    settings = {"kd_on": "annotations", "task_ce_weights": {"single": 0.5}, "kd_weight_end": 0.5}
    counts = [_module(kd_on="annotations").count(rows.__getitems__([row])) for row in range(4)]
    for key in ("num_targets", "num_kd_targets"):
        assert len({count[key] for count in counts}) > 1
    given = (
        (Live(_model(1)), rows)
        if source == "live"
        else caches(rows, source, 12 if source == "sampled" else VOCAB)
    )

    def work(folder, **trainer):
        signal, seen = given
        return _descend(folder, signal, seen, trainer=trainer, **settings)

    alone = work(tmp_path / "one")
    assert alone[0][0]["kd"] > 0.01
    for found in together(lambda: work(tmp_path / "two", accumulate=2)):
        _close(alone, found)
    for name, weight in _model(0).named_parameters():
        assert not np.allclose(alone[1][f"model.{name}"], weight.detach().numpy(), atol=1e-4), name


def test_a_teacher_shared_among_processes_teaches_the_same(tmp_path):
    rows = random_rows(12, **UNEVEN)
    labelled = (rows.__getitems__(range(12))["labels"][:, 1:] != -100).sum(1)
    assert (labelled == 0).any()  # there the teacher is asked all the same, or the others would wait

    def work(sharded):
        signal, trainer = Live(_model(1), sharded=sharded), {"diagnose_every": 1, "accumulate": 2}
        curve, weights = _descend(tmp_path / str(sharded), signal, rows, trainer=trainer)
        return curve, weights, any(isinstance(p, DTensor) for p in signal.model.parameters())

    for one, two in zip(together(work, False), together(work, True), strict=True):
        assert (one[2], two[2]) == (False, True)
        assert one[0][0]["kd"] > 0.01
        _close(one, two)


def test_in_bfloat16_a_step_is_the_formulas_up_to_rounding(tmp_path):
    rows = random_rows(4)
    signal, trainer = Live(_model(1), precision="bf16"), {"precision": "bf16-mixed"}
    curve, weights = _descend(tmp_path, signal, rows, steps=1, trainer=trainer)
    loss, gradient = _plain(rows.__getitems__(range(4)), temperature=2.0)
    # a number is off by up to 2^-9, which two layers and their way back take to about 2^-6; in the loss, a
    # mean over 36 tokens, most of it goes out
    found = abs(curve[0]["loss"] / loss - 1), _off(_step(weights), gradient)
    assert found[0] < 2e-3
    assert found[1] < 3e-2
    assert found[1] > 1e-4  # it was at work


# --- what a training leaves ---


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("live", {"ce_weight_end": 0.5, "kd_weight": 0.0, "kd_weight_end": 2.0}),
        ("live", {"divergence": "taid", "blend": 0.1}),
        ("topk", {"kd_weight_end": 2.0}),
        ("sampled", {}),
    ],
)
def test_a_run_that_stops_goes_on_to_the_same_student(tmp_path, caches, source, settings):
    rows = random_rows(24)
    signal, seen = (Live(_model(1)), rows) if source == "live" else caches(rows, source, 5)
    config = DistillConfig(size="micro", steps=6, temperature=2.0, learning_rate=1e-3, **settings)

    def student(seed=0):
        return Distill(_model(seed), signal, config, tasks=list(LEARNT), num_codes=CODES)

    whole, second = student(), student(seed=2)  # another start: all must come from the checkpoint
    curve = _run(tmp_path / "whole", whole, seen, 6)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        _run(tmp_path / "parts", student(), Stopped(seen, 2 * 4), 6)
    assert _run(tmp_path / "parts", second, seen, 6) == curve
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight)
    assert not torch.equal(whole.model.lm_head.weight, _model(0).lm_head.weight)


def test_the_average_is_the_students_alone(tmp_path):
    weights = []

    class Noted(Distill):
        def on_train_batch_end(self, *_):
            weights.append({name: value.clone() for name, value in self.state_dict().items()})

    teacher, config = _model(1, "tiny"), DistillConfig(size="micro", steps=4, learning_rate=1e-2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = Noted(_model(0), Live(teacher), config)
    average = {name: value.clone() for name, value in module.state_dict().items()}
    _run(tmp_path, module, random_rows(16), 4, averaging=0.3, checkpoint_every=1)
    for decay, current in zip((2 / 11, 3 / 12, 0.3, 0.3), weights, strict=True):
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, average[name])
        assert not torch.allclose(value, weights[-1][name], rtol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["callbacks"]["Averaging"]
    assert list(state) == [name for name, _ in module.named_parameters()]


def test_a_checkpoint_holds_no_teacher(tmp_path):
    module = _module(teacher=_model(1, "tiny"), steps=2)  # 128 wide
    _run(tmp_path, module, random_rows(8), 2, checkpoint_every=1)
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert sorted(checkpoint["state_dict"]) == sorted(f"model.{name}" for name in module.model.state_dict())
    (state,) = checkpoint["optimizer_states"]
    assert len(state["state"]) == len(list(module.model.parameters()))
    sizes = set()

    def walk(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            sizes.update(value.shape)
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)

    walk(checkpoint)
    assert sizes == {VOCAB, 32, 96}  # the student's


# --- what is told of a training ---


def test_the_teacher_costs_a_forward_pass(caches):
    student, teacher, batch = _model(0), _model(1, "tiny"), _batch()
    assert forward_flops(teacher, 10) > forward_flops(student, 10) > forward_flops(student, 9)
    live = Distill(student, Live(teacher), DistillConfig(size="micro"))
    live.training_step(batch)
    assert batch["tokens"].shape[1] == 10  # of the 14 that both could take
    assert live.flops_per_token == 3 * forward_flops(student, 10) + forward_flops(teacher, 10)
    signal, rows = caches(random_rows(2))
    cached = Distill(student, signal, DistillConfig(size="micro", temperature=2.0))
    unheard = Distill(student, Live(teacher), DistillConfig(size="micro", kd_weight=0.0))
    for module, seen in ((cached, rows.__getitems__([0, 1])), (unheard, batch)):
        module.training_step(seen)
        assert module.flops_per_token == 3 * forward_flops(student, 10)


def _told(scores, batch):
    """What is to be told of some scores of every label."""
    tasks, places = _of_labels(batch, "tasks"), _of_labels(batch, "places")
    groups = {"pairs": tasks == 0, "single": tasks == 1}
    # a picture has two tokens: the first and the third of four parts
    groups |= {"part 1": places == 0, "part 3": places == 1}
    groups = {group: chosen & (_labels(batch) != -100) for group, chosen in groups.items()}
    return {
        f"{score}/{group}": values[chosen].mean().item()
        for score, values in scores.items()
        for group, chosen in groups.items()
        if chosen.any() and not (score == "loss" and group.startswith("part"))
    }


def _both(batch, temperature=1.0):
    """Log-probabilities of every label's codes, in float64: the student's, the teacher's."""
    with torch.no_grad():
        return [(_logits(_model(seed).double(), batch) / temperature).log_softmax(-1) for seed in (0, 1)]


def _entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("settings", [{}, UNEVEN])
def test_diagnose_tells_tasks_and_parts_of_the_picture(settings):
    config = DistillConfig(size="micro", temperature=2.0)  # the scores are those at 1
    module = Distill(_model(0), Live(_model(1)), config, tasks=list(LEARNT))
    assert module.diagnose() == {}
    batch = _batch(**settings)
    module.training_step(batch)
    found = module.diagnose()
    one, two = _both(batch)
    scores = {
        "loss": cross_entropy(one, _labels(batch), reduction="none"),
        "kl": (two.exp() * (two - one)).sum(-1),
        "agreement": (one.argmax(-1) == two.argmax(-1)).double(),
        "student_entropy": _entropy(one),
        "teacher_entropy": _entropy(two),
    }
    expected = _told(scores, batch)
    assert ("kl/single" in expected) == (not settings)
    assert found == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items()}


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_cache_tells_what_its_codes_do(caches, kind):
    signal, rows = caches(random_rows(6), kind, 3)
    batch = rows.__getitems__(range(6))
    module = Distill(_model(0), signal, DistillConfig(size="micro", temperature=2.0), tasks=list(LEARNT))
    module.training_step(batch)
    found = module.diagnose()
    (plain, _), (one, two) = _both(batch), _both(batch, 2.0)
    ids = batch["teacher_ids"].flatten(0, 1).long()
    scores = {
        "loss": cross_entropy(plain, _labels(batch), reduction="none"),
        "student_entropy": _entropy(plain),
    }
    if kind == "topk":
        coarse = [x.gather(-1, ids).exp() for x in (one, two)]
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in coarse)
        scores["agreement"] = (one.argmax(-1) == two.argmax(-1)).double()
        scores["bucket_kl"] = (p * (p / q).log()).sum(-1)
        scores["teacher_bucket_entropy"] = _entropy(p.log())
    else:
        scores["drawn_cross_entropy"] = -one.gather(-1, ids).mean(-1)
    expected = _told(scores, batch)
    assert {key.split("/")[1] for key in expected} == {"pairs", "single", "part 1", "part 3"}
    # probabilities come rounded by 0.02%
    assert found == {key: pytest.approx(value, rel=1e-3, abs=1e-6) for key, value in expected.items()}
