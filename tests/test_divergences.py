import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.distill.divergences import (
    DIVERGENCES,
    forward_kl,
    jsd,
    make_divergence,
    mean_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("one_thread")
laws = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)
inside = st.floats(0.01, 0.99)


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


def _jsd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _blended(p, q, blend):
    powers = p**blend * q ** (1 - blend)
    return powers / powers.sum(-1, keepdims=True)


# from the definitions, p the teacher's probabilities and q the student's: the value and its derivative by q,
# taken by hand (a constant added to it changes nothing: q sums to 1)
REFERENCES = {
    "forward_kl": (_kl, lambda p, q: -p / q),
    "reverse_kl": (lambda p, q: _kl(q, p), lambda p, q: np.log(q / p)),
    "jsd": (_jsd, lambda p, q, beta=0.5: (1 - beta) * np.log(q / (beta * p + (1 - beta) * q))),
    "skew_kl": (
        lambda p, q, alpha=0.1: _kl(p, alpha * p + (1 - alpha) * q),
        lambda p, q, alpha=0.1: -(1 - alpha) * p / (alpha * p + (1 - alpha) * q),
    ),
    "skew_reverse_kl": (
        lambda p, q, alpha=0.1: _kl(q, alpha * q + (1 - alpha) * p),
        lambda p, q, alpha=0.1: (
            np.log(q / (alpha * q + (1 - alpha) * p)) - alpha * q / (alpha * q + (1 - alpha) * p)
        ),
    ),
    "total_variation": (lambda p, q: 0.5 * np.abs(p - q).sum(-1), lambda p, q: 0.5 * np.sign(q - p)),
    "taid": (
        lambda p, q, blend=1.0: _kl(_blended(p, q, blend), q),
        lambda p, q, blend=1.0: -_blended(p, q, blend) / q,
    ),
}
CASES = [(name, {}) for name in DIVERGENCES] + [
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_kl", {"alpha": 0.6}),
    ("skew_reverse_kl", {"alpha": 0.6}),
    ("taid", {"blend": 0.3}),
]
PARAMETERS = {
    ("jsd", "beta"): 0.5,
    ("skew_kl", "alpha"): 0.1,
    ("skew_reverse_kl", "alpha"): 0.1,
    ("taid", "blend"): 1.0,
}
every_case = pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)


def _divergence_reference(name, student, teacher, **parameters):
    """The divergence and its gradient on the student's logits, in float64 numpy."""
    p, q = _softmax(teacher.double().numpy()), _softmax(student.double().numpy())
    value, derivative = REFERENCES[name]
    by_q = derivative(p, q, **parameters)
    return value(p, q, **parameters), q * (by_q - (q * by_q).sum(-1, keepdims=True))


def _value_and_gradient(divergence, student, teacher):
    student = student.clone().requires_grad_()
    value = divergence(student, teacher)
    value.sum().backward()
    return value.detach(), student.grad


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


# --- every divergence ---


def test_every_divergence_has_a_reference():
    assert list(REFERENCES) == list(DIVERGENCES)


@every_case
@laws
@given(seeds, seeds, st.floats(0.1, 5.0))
def test_value_and_gradient_equal_the_definition(name, parameters, one, two, scale):
    student, teacher = _logits(one, 3, 7, scale=scale), _logits(two, 3, 7, scale=scale)
    value, gradient = _value_and_gradient(make_divergence(name, **parameters), student, teacher)
    expected, expected_gradient = _divergence_reference(name, student, teacher, **parameters)
    if one == two and name == "total_variation":
        expected_gradient = 0.0  # its sign of p - q would be that of rounding
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-6, atol=1e-11)


@every_case
def test_the_gradient_is_that_of_finite_differences(name, parameters):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 5, 7), _logits(1, 5, 7)
    if name == "taid":  # its target is a constant that follows the student: hold it
        blend = parameters.get("blend", 1.0)
        teacher = (1 - blend) * student + blend * teacher
        divergence = forward_kl
    labels = torch.tensor([1, 1, -100, 1, 1])
    assert torch.autograd.gradcheck(
        lambda s: mean_divergence(divergence, s, teacher, labels, temperature=2.0), student.requires_grad_()
    )


@every_case
@laws
@given(seeds, seeds, st.floats(0.01, 30.0))
def test_never_negative(name, parameters, one, two, scale):
    divergence = make_divergence(name, **parameters)
    value = divergence(_logits(one, 4, 9, scale=scale), _logits(two, 4, 9, scale=scale))
    assert value.shape == (4,)
    assert (value >= -1e-12).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence_and_no_gradient(name, parameters, dtype):
    divergence = make_divergence(name, **parameters)
    student = _logits(0, 5, 11, dtype=dtype)
    value, gradient = _value_and_gradient(divergence, student, student)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=5e-7, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    # a constant added to every logit changes no distribution
    shifted = divergence(student.double(), student.double() + 7.0)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted), atol=1e-12, rtol=0)


# by hand; every value differs from the one of the exchanged sides but those of the two symmetric ones
@pytest.mark.parametrize(
    ("name", "parameters", "expected", "exchanged"),
    [
        ("forward_kl", {}, 0.130812, 0.143841),  # .75 ln 1.5 + .25 ln .5; .5 ln 2/3 + .5 ln 2
        ("reverse_kl", {}, 0.143841, 0.130812),
        ("jsd", {}, 0.033822, 0.033822),  # m = (.625, .375)
        ("jsd", {"beta": 0.1}, 0.011831, 0.012752),  # m = (.525, .475)
        ("skew_kl", {}, 0.107043, 0.113137),  # m = (.525, .475)
        ("skew_reverse_kl", {}, 0.113137, 0.107043),  # m = (.725, .275)
        ("total_variation", {}, 0.25, 0.25),
        ("taid", {"blend": 0.5}, 0.036341, 0.032996),  # r in proportion to (√3, 1)
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_literal_value_and_direction(name, parameters, expected, exchanged, dtype):
    teacher, student = torch.tensor([0.75, 0.25], dtype=dtype), torch.tensor([0.5, 0.5], dtype=dtype)
    divergence = make_divergence(name, **parameters)
    assert divergence(student.log(), teacher.log()).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(teacher.log(), student.log()).item() == pytest.approx(exchanged, abs=1e-6)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_divergence_computes_half_precision_in_float32(name, parameters, dtype):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 64, 300, dtype=dtype), _logits(1, 64, 300, dtype=dtype)
    value, gradient = _value_and_gradient(divergence, student, teacher)
    expected, expected_gradient = _divergence_reference(name, student, teacher, **parameters)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5)
    assert gradient.dtype == dtype
    # rounded once, to the logits' type
    error = np.abs(gradient.double().numpy() - expected_gradient)
    assert (error <= torch.finfo(dtype).eps * np.abs(expected_gradient) + 1e-6).all()


@every_case
def test_mixed_types_on_the_two_sides(name, parameters):
    student, teacher = _logits(0, 4, 20, dtype=torch.float32), _logits(1, 4, 20, dtype=torch.bfloat16)
    expected, _ = _divergence_reference(name, student, teacher, **parameters)
    value = make_divergence(name, **parameters)(student, teacher)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5)


@every_case
def test_the_teacher_is_a_constant(name, parameters):
    student, teacher = _logits(0, 4, 6).requires_grad_(), _logits(1, 4, 6).requires_grad_()
    value = make_divergence(name, **parameters)(student, teacher)
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-3
    with torch.no_grad():
        assert not make_divergence(name, **parameters)(student, teacher).requires_grad


# --- every divergence where a side rules codes out with -inf ---


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_that_both_rule_out_are_as_if_not_there(name, parameters, dtype):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 6, 9, dtype=dtype), _logits(1, 6, 9, dtype=dtype)
    student[:, [0, 4]], teacher[:, [0, 4]] = -torch.inf, -torch.inf
    value, gradient = _value_and_gradient(divergence, student, teacher)
    keep = [1, 2, 3, 5, 6, 7, 8]
    expected, expected_gradient = _value_and_gradient(divergence, student[:, keep], teacher[:, keep])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, keep], expected_gradient)
    assert (gradient[:, [0, 4]] == 0).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ruled_out", ["student", "teacher", "each its own", "all but one"])
def test_ruled_out_codes_give_finite_values_and_gradients(name, parameters, dtype, ruled_out):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 500, 9, dtype=dtype), _logits(1, 500, 9, dtype=dtype)
    if ruled_out in ("student", "each its own"):
        student[:, :4] = -torch.inf
    if ruled_out in ("teacher", "each its own"):
        teacher[:, 3:6] = -torch.inf
    if ruled_out == "all but one":  # nothing that both allow
        student[:, 1:], teacher[:, :8] = -torch.inf, -torch.inf
    # more tokens than codes: the sum over tokens must not overflow either
    loss, gradient = _both(student, teacher, torch.zeros(500, dtype=torch.int64), 2.0, divergence)
    assert torch.isfinite(loss)
    assert loss > 0 or (name, ruled_out) == ("taid", "all but one")  # its target may be the student itself
    assert torch.isfinite(gradient).all()
    assert (gradient[student == -torch.inf] == 0).all()


@every_case
def test_codes_that_one_side_rules_out_equal_the_definition(name, parameters):
    student, teacher = _logits(0, 5, 8), _logits(1, 5, 8)
    (student if name == "reverse_kl" else teacher)[:, 2:4] = -torch.inf  # the side where its value is finite
    p, q = _softmax(teacher.numpy()), _softmax(student.numpy())
    value = make_divergence(name, **parameters)(student, teacher)
    np.testing.assert_allclose(value.numpy(), REFERENCES[name][0](p, q, **parameters), rtol=1e-10)


def test_the_bounded_ones_reach_their_bounds_on_disjoint_codes():
    student, teacher = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    assert total_variation(student, teacher).item() == 1.0
    assert jsd(student, teacher).item() == pytest.approx(math.log(2))
    assert jsd(student, teacher, beta=0.1).item() == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))
    assert skew_kl(student, teacher).item() == pytest.approx(math.log(10))
    assert skew_reverse_kl(student, teacher, alpha=0.25).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_kl_of_codes_that_the_teacher_rules_out(dtype):
    student, teacher = _logits(0, 6, 9, dtype=dtype), _logits(1, 6, 9, dtype=dtype)
    teacher[:, ::2] = -torch.inf
    labels = torch.zeros(6, dtype=torch.int64)
    loss, gradient = _both(student, teacher, labels)
    expected, expected_gradient = _reference(student.double(), teacher.double(), labels, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.bfloat16 else 1e-6)
    np.testing.assert_allclose(gradient.double().numpy(), expected_gradient, rtol=1e-2, atol=1e-6)


def test_forward_kl_of_a_code_that_only_the_student_rules_out_is_dear_its_gradient_is_not():
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    value, gradient = _value_and_gradient(forward_kl, student, teacher)
    assert value.item() > 1e18
    # of what the student can still give: (.75 q - p) of the two other codes
    torch.testing.assert_close(gradient, torch.tensor([[0.125, -0.125, 0.0]]))


def test_reverse_kl_takes_a_teachers_0_for_the_smallest_normal_number():
    student = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log()
    value, gradient = _value_and_gradient(reverse_kl, student, teacher)
    smallest = 126 * math.log(2)  # float32's is 2^-126
    # q (1 - q) times the difference of the two logarithms, log q/p of the one and of the other
    expected = [0.25 * smallest, 0.09 * (smallest + math.log(0.1 / 0.9))]
    assert value[0].item() == pytest.approx(0.5 * smallest - math.log(2), rel=1e-6)
    torch.testing.assert_close(gradient[:, 1], torch.tensor(expected))


def test_far_apart_logits_are_exact_but_for_reverse_kl():
    student = torch.tensor([[0.0, 3e4]])
    teacher = torch.tensor([[3e4, 0.0]])
    assert forward_kl(student, teacher).item() == 3e4
    assert forward_kl(student.double(), teacher.double()).item() == 3e4
    assert reverse_kl(student, teacher).item() == pytest.approx(87.3365, rel=1e-5)  # 126 ln 2


# --- the laws of each ---


@laws
@given(seeds, seeds, st.floats(0.1, 20.0), inside)
def test_bounds(one, two, scale, weight):
    student, teacher = _logits(one, 4, 9, scale=scale), _logits(two, 4, 9, scale=scale)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log1p(-weight)
    assert (jsd(student, teacher, beta=weight) <= entropy + 1e-12).all()
    assert (skew_kl(student, teacher, alpha=weight) <= -math.log(weight) + 1e-12).all()
    assert (skew_reverse_kl(student, teacher, alpha=weight) <= -math.log(weight) + 1e-12).all()
    variation = total_variation(student, teacher)
    assert (variation <= 1 + 1e-12).all()
    # Pinsker's inequality, both ways
    for divergence in (forward_kl, reverse_kl):
        assert (variation <= (0.5 * divergence(student, teacher)).clamp_min(0).sqrt() + 1e-7).all()


@laws
@given(seeds, seeds, inside)
def test_exchanging_the_sides(one, two, weight):
    a, b = _logits(one, 4, 9), _logits(two, 4, 9)
    torch.testing.assert_close(reverse_kl(a, b), forward_kl(b, a))
    torch.testing.assert_close(jsd(a, b), jsd(b, a))
    torch.testing.assert_close(jsd(a, b, beta=weight), jsd(b, a, beta=1 - weight))
    torch.testing.assert_close(skew_reverse_kl(a, b, alpha=weight), skew_kl(b, a, alpha=weight))
    torch.testing.assert_close(total_variation(a, b), total_variation(b, a))


@laws
@given(seeds, seeds)
def test_limits(one, two):
    student, teacher = _logits(one, 4, 9, scale=1.0), _logits(two, 4, 9, scale=1.0)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    close = {"rtol": 1e-3, "atol": 1e-8}
    end = 1e-6
    # jsd itself fades at both ends; what is left after the division are the two KLs
    for beta, limit in ((end, forward), (1 - end, reverse)):
        value = jsd(student, teacher, beta=beta)
        assert (value <= 1.01 * end * limit + 1e-12).all()
        torch.testing.assert_close(value / (beta * (1 - beta)), limit, **close)
    torch.testing.assert_close(skew_kl(student, teacher, alpha=end), forward, **close)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, alpha=end), reverse, **close)
    assert (skew_kl(student, teacher, alpha=1 - end) <= 2 * end * (forward + reverse) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_taid_goes_from_nothing_to_forward_kl(dtype):
    student, teacher = _logits(0, 6, 9, dtype=dtype), _logits(1, 6, 9, dtype=dtype)
    student[:, 2], teacher[:, 5] = -torch.inf, -torch.inf
    value, gradient = _value_and_gradient(lambda s, t: taid(s, t, blend=1.0), student, teacher)
    expected, expected_gradient = _value_and_gradient(forward_kl, student, teacher)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    value, gradient = _value_and_gradient(lambda s, t: taid(s, t, blend=0.0), student, teacher)
    assert torch.equal(value, torch.zeros_like(value))
    assert gradient.abs().max() < 1e-6


@laws
@given(seeds, seeds)
def test_taid_asks_for_more_as_blend_rises(one, two):
    student, teacher = _logits(one, 4, 9), _logits(two, 4, 9)
    values = torch.stack([taid(student, teacher, blend=step / 8) for step in range(9)])
    assert (values.diff(dim=0) >= -1e-12).all()


def test_taid_keeps_its_target_fixed():
    # were the target to follow the student, the gradient at blend 0.5 would differ from q - r
    student, teacher = _logits(0, 5, 7), _logits(1, 5, 7)
    _, gradient = _value_and_gradient(lambda s, t: taid(s, t, blend=0.5), student, teacher)
    target = torch.softmax((student + teacher) / 2, -1)
    torch.testing.assert_close(gradient, torch.softmax(student, -1) - target)


def test_forward_covers_and_reverse_seeks_the_modes():
    # a teacher of two modes: the student that keeps to one is right to reverse KL, far off to forward KL
    teacher = torch.tensor([6.0, 6.0, -6.0])
    one_mode, spread = torch.tensor([6.0, -6.0, -6.0]), torch.tensor([0.0, 0.0, 0.0])
    assert forward_kl(one_mode, teacher) > 10 * forward_kl(spread, teacher)
    assert reverse_kl(one_mode, teacher) < 0.2 * reverse_kl(spread, teacher)


# --- coarse distributions: k codes and a bucket for the rest ---


def _coarse(logits, ids):
    """Log-probabilities of `ids` and of the rest."""
    log_probabilities = torch.log_softmax(logits, -1)
    rest = log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(-1, ids), rest], -1)


@every_case
@laws
@given(seeds, seeds, st.integers(1, 11))
def test_coarse_distributions(name, parameters, one, two, k):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(one, 4, 12), _logits(two, 4, 12)
    ids = teacher.topk(k).indices
    student.requires_grad_()
    value = divergence(_coarse(student, ids), _coarse(teacher, ids))
    p, q = _coarse(teacher, ids).exp().numpy(), _coarse(student, ids).detach().exp().numpy()
    expected = REFERENCES[name][0](p, q, **parameters)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-7, atol=1e-10)
    fine = divergence(student, teacher)
    if name != "taid":  # coarser distributions are never further apart; taid's target is made of the buckets
        assert (value <= fine + 1e-10).all()
    if k == 11:  # the rest is a single code
        torch.testing.assert_close(value, fine)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teacher_that_leaves_nothing_to_the_rest(name, parameters, dtype):
    # probabilities of the top codes that sum to 1: the rest is log 0
    teacher = torch.tensor([[0.7, 0.3, 0.0]], dtype=dtype).log()
    student = _coarse(_logits(0, 1, 9, dtype=dtype), torch.tensor([[4, 1]]))
    value, gradient = _value_and_gradient(make_divergence(name, **parameters), student, teacher)
    most = 88 if dtype == torch.float32 else 709  # -ln of the smallest number, for reverse KL
    assert 0 < value.item() < most
    assert torch.isfinite(gradient).all()
    # the student learns to take from the rest
    assert gradient[0, 2] > 0 or name == "taid"


# --- make_divergence ---


def test_make_divergence_binds_parameters():
    student, teacher = _logits(0, 4, 6), _logits(1, 4, 6)
    assert make_divergence("forward_kl") is forward_kl
    made = make_divergence("jsd", beta=0.2)
    assert torch.equal(made(student, teacher), jsd(student, teacher, beta=0.2))
    assert not torch.allclose(made(student, teacher), jsd(student, teacher))
    assert torch.equal(pickle.loads(pickle.dumps(made))(student, teacher), made(student, teacher))


def test_the_papers_defaults():
    defaults = {
        (name, argument.name): argument.default
        for name, divergence in DIVERGENCES.items()
        for argument in inspect.signature(divergence).parameters.values()
        if argument.kind is argument.KEYWORD_ONLY
    }
    assert defaults == PARAMETERS


@pytest.mark.parametrize(
    ("name", "parameters", "line"),
    [
        (
            "kl",
            {},
            "divergence: 'kl' is unknown; choices: forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl,"
            " total_variation, taid",
        ),
        ("jsd", {"alpha": 0.5}, "alpha: jsd does not take it; choices: beta"),
        ("total_variation", {"beta": 0.5}, "beta: total_variation does not take it; choices: none"),
        (
            "jsd",
            {"beta": 0},
            "beta: 0 must be above 0 and below 1 (jsd is 0 at both); choices there: forward_kl, reverse_kl",
        ),
        (
            "skew_kl",
            {"alpha": 1.0},
            "alpha: 1.0 must be above 0 and below 1 (0 is the plain KL, at 1 all is 0);"
            " choices there: forward_kl, reverse_kl",
        ),
        ("taid", {"blend": 1.5}, "blend: 1.5 must be in 0..1"),
    ],
)
def test_refusals(name, parameters, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        make_divergence(name, **parameters)


@pytest.mark.parametrize(("divergence", "key"), PARAMETERS)
def test_a_function_called_by_itself_refuses_the_same(divergence, key):
    with pytest.raises(ValueError, match=f"^{key}: -0.1 must be "):
        DIVERGENCES[divergence](_logits(0, 6), _logits(1, 6), **{key: -0.1})


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 1.1, math.nan, math.inf])
@pytest.mark.parametrize(("divergence", "key"), PARAMETERS)
def test_ranges_of_parameters(divergence, key, value):
    if key == "blend" and value in (0.0, 1.0):
        assert make_divergence(divergence, blend=value).keywords == {"blend": value}
        return
    with pytest.raises(ValueError, match=f"^{key}: {value} must be "):
        make_divergence(divergence, **{key: value})


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_of_half_precision_is_computed_in_float32(dtype, temperature):
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


def test_hot_forward_kl_is_half_the_squared_difference_of_the_centred_logits():
    student, teacher = _logits(0, 4, 6), _logits(1, 4, 6)  # Hinton's limit
    labels = torch.zeros(4, dtype=torch.int64)
    hot = mean_divergence(forward_kl, student, teacher, labels, temperature=1e4)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(hot, 0.5 * (difference**2).mean(-1).mean(), rtol=1e-3, atol=0)


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


def test_temperature_by_token():
    student, teacher = _logits(0, 2, 4, 6), _logits(1, 2, 4, 6)
    labels = torch.tensor([[1, 2, -100, 3], [0, -100, 5, 1]])
    # an ignored token's may be anything
    temperature = torch.tensor([[1.0, 2.0, 0.0, 0.5], [4.0, torch.nan, 1.0, 2.0]])
    places = [tuple(place) for place in (labels != -100).nonzero().tolist()]
    loss, gradient = _both(student, teacher, labels, temperature)
    losses, gradients = zip(
        *(_both(student[at], teacher[at], labels[at], temperature[at].item()) for at in places), strict=True
    )
    torch.testing.assert_close(loss, sum(losses) / 6)
    torch.testing.assert_close(gradient[labels != -100], torch.stack(gradients) / 6)
    assert (gradient[labels == -100] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_one_temperature_for_all_is_that_of_every_token(temperature):
    student, teacher = _logits(0, 3, 5, 6, dtype=torch.float32), _logits(1, 3, 5, 6, dtype=torch.float32)
    labels = torch.ones(3, 5, dtype=torch.int64)
    loss, gradient = _both(student, teacher, labels, temperature)
    by_token, gradient_by_token = _both(student, teacher, labels, torch.full((3, 5), temperature))
    assert by_token.dtype == torch.float32
    torch.testing.assert_close(by_token, loss)
    torch.testing.assert_close(gradient_by_token, gradient)


def test_temperatures_of_another_shape_are_refused():
    student, labels = _logits(0, 2, 3, 6), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^temperature: shape \(3,\), the labels have \(2, 3\)$"):
        mean_divergence(forward_kl, student, student, labels, temperature=torch.ones(3))  # would broadcast


@every_case
def test_every_divergence_has_temperature_on_both_sides_and_squared_once(name, parameters):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 4, 6), _logits(1, 4, 6)
    loss, gradient = _both(student, teacher, torch.zeros(4, dtype=torch.int64), 3.0, divergence)
    value, slope = _divergence_reference(name, student / 3, teacher / 3, **parameters)
    assert loss.item() == pytest.approx(9 * value.mean(), rel=1e-10)
    # T² of the mean's factor, 1/T of the logits'
    np.testing.assert_allclose(gradient.numpy(), 3 * slope / 4, rtol=1e-8, atol=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_of_an_all_ignored_batch_is_0_with_a_graph(name, parameters, dtype):
    divergence = make_divergence(name, **parameters)
    student, teacher = _logits(0, 2, 3, 6, dtype=dtype), _logits(1, 2, 3, 6, dtype=dtype)
    student[0, 0], teacher[1, 1] = torch.nan, -torch.inf
    loss, gradient = _both(student, teacher, torch.full((2, 3), -100), 2.0, divergence)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
