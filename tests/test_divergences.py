import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.distill.divergences import DIVERGENCES, forward_kl, mean_divergence

pytestmark = pytest.mark.usefixtures("one_thread")
laws = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)


def _logits(seed, *shape, scale=3.0, dtype=torch.float64):
    return (
        scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def _softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _kl(p, q):
    """KL(p || q), from the definition."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def _reference(student, teacher, labels, temperature):
    """The loss and its gradient on the student's logits, in float64 numpy."""
    s, t = _softmax(student.numpy() / temperature), _softmax(teacher.numpy() / temperature)
    valid = labels.numpy() != -100
    num = max(1, valid.sum())
    loss = temperature**2 * (_kl(t, s) * valid).sum() / num
    # d KL(t || softmax(z / T)) / dz = (s - t) / T, and T² is in front
    return loss, temperature * (s - t) * valid[..., None] / num


def _both(student, teacher, labels, temperature=1.0, divergence=forward_kl):
    student = student.clone().requires_grad_()
    loss = mean_divergence(divergence, student, teacher, labels, temperature=temperature)
    loss.backward()
    return loss.detach(), student.grad


# --- forward_kl ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence_and_no_gradient(dtype):
    student = _logits(0, 5, 11, dtype=dtype).requires_grad_()
    value = forward_kl(student, student.detach())
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value))
    assert student.grad.abs().max() < 1e-6
    # a constant added to every logit changes no distribution
    shifted = forward_kl(student.detach().double(), student.detach().double() + 7.0)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted), atol=1e-12, rtol=0)


@laws
@given(seeds, seeds, st.floats(0.01, 30.0))
def test_never_negative(one, two, scale):
    value = forward_kl(_logits(one, 4, 9, scale=scale), _logits(two, 4, 9, scale=scale))
    assert value.shape == (4,)
    assert (value >= -1e-12).all()


def test_literal_value_and_direction():
    teacher, student = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()
    # KL(teacher || student) = .75 ln 1.5 + .25 ln .5; the reverse would be .5 ln(2/3) + .5 ln 2 = .1438
    assert forward_kl(student.log(), teacher.log()).item() == pytest.approx(0.130812, abs=1e-6)
    assert forward_kl(teacher.log(), student.log()).item() == pytest.approx(0.143841, abs=1e-6)


@laws
@given(seeds, seeds)
def test_equals_the_definition(one, two):
    student, teacher = _logits(one, 3, 7), _logits(two, 3, 7)
    expected = _kl(_softmax(teacher.numpy()), _softmax(student.numpy()))
    np.testing.assert_allclose(forward_kl(student, teacher).numpy(), expected, rtol=1e-10, atol=1e-13)


def test_missing_a_code_of_the_teacher_costs_more_than_having_one_too_many():
    # the direction in words: forward KL covers the teacher's modes
    sure, torn = torch.tensor([6.0, 0.0, 0.0]), torch.tensor([6.0, 6.0, 0.0])
    assert forward_kl(sure, torn) > 3 * forward_kl(torn, sure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_half_precision_is_computed_in_float32(dtype, temperature):
    student, teacher = _logits(0, 2, 64, 300, dtype=dtype), _logits(1, 2, 64, 300, dtype=dtype)
    labels = torch.zeros(2, 64, dtype=torch.int64)
    assert forward_kl(student, teacher).dtype == torch.float32
    loss, gradient = _both(student, teacher, labels, temperature)
    expected, expected_gradient = _reference(student.double(), teacher.double(), labels, temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # the gradient itself is stored in the logits' type: one rounding, relative to its size
    assert gradient.dtype == dtype
    error = np.abs(gradient.double().numpy() - expected_gradient)
    assert (error <= torch.finfo(dtype).eps * np.abs(expected_gradient) + 1e-7).all()


def test_mixed_types_on_the_two_sides():
    student, teacher = _logits(0, 4, 20), _logits(1, 4, 20, dtype=torch.bfloat16)
    expected = _kl(_softmax(teacher.double().numpy()), _softmax(student.numpy()))
    np.testing.assert_allclose(forward_kl(student.float(), teacher).numpy(), expected, rtol=1e-5)


# --- -inf: a code that one side rules out ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_that_the_teacher_rules_out(dtype):
    student, teacher = _logits(0, 6, 9, dtype=dtype), _logits(1, 6, 9, dtype=dtype)
    teacher[:, ::2] = -torch.inf
    labels = torch.zeros(6, dtype=torch.int64)
    loss, gradient = _both(student, teacher, labels)
    expected, expected_gradient = _reference(student.double(), teacher.double(), labels, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.bfloat16 else 1e-6)
    np.testing.assert_allclose(gradient.double().numpy(), expected_gradient, rtol=1e-2, atol=1e-6)


def test_codes_that_both_rule_out_count_for_nothing():
    student, teacher = _logits(0, 6, 9), _logits(1, 6, 9)
    student[:, 4], teacher[:, 4] = -torch.inf, -torch.inf
    labels = torch.zeros(6, dtype=torch.int64)
    loss, gradient = _both(student, teacher, labels, 2.0)
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    expected, expected_gradient = _both(student[:, keep], teacher[:, keep], labels, 2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, keep], expected_gradient)
    assert (gradient[:, 4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_code_that_only_the_student_rules_out_stays_finite(dtype, temperature):
    # more tokens than codes: the sum over tokens must not overflow either
    student, teacher = _logits(0, 500, 9, dtype=dtype), _logits(1, 500, 9, dtype=dtype)
    student[:, 4] = -torch.inf
    loss, gradient = _both(student, teacher, torch.zeros(500, dtype=torch.int64), temperature)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    clean, _ = _both(student[:, :4], teacher[:, :4], torch.zeros(500, dtype=torch.int64), temperature)
    assert loss > 100 * clean  # dear, as it should be


def test_far_apart_logits_are_exact_not_clamped():
    student = torch.tensor([[0.0, 3e4]])
    teacher = torch.tensor([[3e4, 0.0]])
    assert forward_kl(student, teacher).item() == 3e4


# --- mean_divergence ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.3])
def test_value_and_gradient_equal_the_formula(temperature):
    student, teacher = _logits(0, 3, 5, 13), _logits(1, 3, 5, 13)
    labels = torch.arange(15).view(3, 5) % 13
    labels[0, 1:] = -100
    labels[2, 4] = -100
    loss, gradient = _both(student, teacher, labels, temperature)
    expected, expected_gradient = _reference(student, teacher, labels, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-14)
    # step by step against the tokens' gradient: (softmax(s/T) - softmax(t/T)) * T / valid tokens
    by_hand = torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1)
    torch.testing.assert_close(gradient[1], by_hand[1] * temperature / 10)


def test_temperature_stands_on_both_sides_and_squared_once():
    student, teacher = _logits(0, 4, 6), _logits(1, 4, 6)
    labels = torch.zeros(4, dtype=torch.int64)
    warm = mean_divergence(forward_kl, student, teacher, labels, temperature=3.0)
    by_hand = 9 * mean_divergence(forward_kl, student / 3, teacher / 3, labels)
    torch.testing.assert_close(warm, by_hand)
    # Hinton's limit: for large T the loss is half the mean squared difference of the centred logits
    hot = mean_divergence(forward_kl, student, teacher, labels, temperature=1e4)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(hot, 0.5 * (difference**2).mean(-1).mean(), rtol=1e-3, atol=0)


def test_the_teacher_gets_no_gradient_from_a_frozen_model():
    student = _logits(0, 4, 6).requires_grad_()
    with torch.no_grad():
        teacher = _logits(1, 4, 6)
    mean_divergence(forward_kl, student, teacher, torch.zeros(4, dtype=torch.int64)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_the_mask_is_that_of_the_labels_given():
    # labels are already shifted: label t belongs to logits t, not t + 1
    student, teacher = _logits(0, 1, 4, 6), _logits(1, 1, 4, 6)
    labels = torch.tensor([[-100, 3, 2, -100]])
    _, gradient = _both(student, teacher, labels)
    assert (gradient[0, [0, 3]] == 0).all()
    assert (gradient[0, [1, 2]].abs().sum(-1) > 0).all()
    loss, _ = _both(student, teacher, labels)
    alone, _ = _both(student[:, 1:3], teacher[:, 1:3], labels[:, 1:3])
    torch.testing.assert_close(loss, alone)


def test_ignored_tokens_do_not_matter_whatever_they_hold():
    student, teacher = _logits(0, 2, 4, 6), _logits(1, 2, 4, 6)
    labels = torch.tensor([[1, 2, -100, -100], [3, -100, 0, -100]])
    loss, gradient = _both(student, teacher, labels)
    ignored = labels == -100
    student[ignored], teacher[ignored] = _logits(7, int(ignored.sum()), 6, scale=1e3), -torch.inf
    student[0, 3], teacher[0, 2] = torch.nan, torch.nan
    again, gradient_again = _both(student, teacher, labels)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


def test_code_0_counts():
    labels = torch.zeros(1, 3, dtype=torch.int64)
    loss, gradient = _both(_logits(0, 1, 3, 6), _logits(1, 1, 3, 6), labels)
    assert loss > 0
    assert (gradient.abs().sum(-1) > 0).all()


@laws
@given(seeds, st.integers(1, 5))
def test_padding_does_not_dilute(seed, padding):
    student, teacher = _logits(seed, 2, 4, 6), _logits(seed + 1, 2, 4, 6)
    labels = torch.ones(2, 4, dtype=torch.int64)
    loss, gradient = _both(student, teacher, labels)
    pad = _logits(seed + 2, 2, padding, 6)
    ignored = torch.full((2, padding), -100)
    padded, padded_gradient = _both(
        torch.cat([student, pad], 1), torch.cat([teacher, -pad], 1), torch.cat([labels, ignored], 1)
    )
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_gradient[:, :4], gradient)
    assert (padded_gradient[:, 4:] == 0).all()


def test_micro_batches_weighted_by_their_tokens_equal_one_batch():
    student, teacher = _logits(0, 4, 5, 6), _logits(1, 4, 5, 6)
    labels = torch.ones(4, 5, dtype=torch.int64)
    labels[0, 1:] = -100
    loss, gradient = _both(student, teacher, labels)
    valid = (labels != -100).sum(-1)
    parts = [_both(student[i], teacher[i], labels[i]) for i in range(4)]
    torch.testing.assert_close(
        loss, sum(n * part for n, (part, _) in zip(valid, parts, strict=True)) / valid.sum()
    )
    by_parts = torch.stack([n / valid.sum() * g for n, (_, g) in zip(valid, parts, strict=True)])
    torch.testing.assert_close(gradient, by_parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_all_ignored_batch_is_0_with_a_graph(dtype):
    labels = torch.full((2, 3), -100)
    loss, gradient = _both(_logits(0, 2, 3, 6, dtype=dtype), _logits(1, 2, 3, 6, dtype=dtype), labels, 2.0)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_ignore_index():
    student, teacher = _logits(0, 1, 3, 6), _logits(1, 1, 3, 6)
    loss = mean_divergence(forward_kl, student, teacher, torch.tensor([[5, 1, 5]]), ignore_index=5)
    torch.testing.assert_close(loss, forward_kl(student[0, 1], teacher[0, 1]))


def test_other_vocabularies_are_refused():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^vocabulary: the student has 6 ids, the teacher 8$"):
        mean_divergence(forward_kl, _logits(0, 2, 3, 6), _logits(1, 2, 3, 8), labels)
    with pytest.raises(ValueError, match=r"^vocabulary: the student has 6 ids, the teacher 1$"):
        mean_divergence(forward_kl, _logits(0, 2, 3, 6), _logits(1, 2, 3, 1), labels)  # would broadcast


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_of_the_table_keeps_the_laws(name):
    divergence = DIVERGENCES[name]
    student, teacher = _logits(0, 5, 7).requires_grad_(), _logits(1, 5, 7)
    value = divergence(student, teacher)
    assert value.shape == (5,)
    assert (value > 0).all()
    same = divergence(student, student.detach())
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(
        lambda s: mean_divergence(divergence, s, teacher, torch.ones(5), temperature=2.0), student
    )
