import math

import numpy as np
import pytest
import torch

from delvm import llama
from delvm.distill.module import Distill, DistillConfig
from delvm.errors import UserError
from delvm.pretrain import Pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = 12, 14


def _model(seed, size="micro", vocab=VOCAB):
    model = llama.build(size, vocab, LENGTH, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it so that teacher and student differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _module(teacher=None, **settings):
    return Distill(
        _model(0), teacher or _model(1), DistillConfig(**{"size": "micro", "steps": 10} | settings)
    )


def _tokens(num=4):
    return torch.randint(0, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(0))


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
        student, teacher = (m(tokens[:, :-1]).logits.double().numpy() for m in (module.model, module.teacher))
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
        teacher = module.teacher.double()(tokens[:, :-1]).logits
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
        module.teacher.double()
        for model in (module.model, module.teacher):
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
        student, teacher = (m(tokens[:, :-1]).logits.double().numpy() for m in (module.model, module.teacher))
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
    distill.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran for nothing"))
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
    teacher = {id(parameter) for parameter in module.teacher.parameters()}
    student = {id(parameter) for parameter in module.model.parameters()}
    assert {id(parameter) for parameter in module.parameters()} == student
    assert all(id(part) != id(module.teacher) for part in module.modules())
    assert list(module.state_dict()) == [f"model.{name}" for name in module.model.state_dict()]
    optimizer = module.configure_optimizers()["optimizer"]
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(student)
    assert not teacher & set(trained)


def test_the_teacher_stays_in_evaluation_mode_without_gradient():
    teacher = _model(1).train()
    module = _module(teacher=teacher)
    module.train()
    assert module.model.training
    assert not any(part.training for part in module.teacher.modules())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step({"tokens": _tokens()})["loss"].backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
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
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**values)
