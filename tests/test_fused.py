import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from delvm import ranks
from delvm.distill.divergences import DIVERGENCES, forward_kl, make_divergence, mean_divergence
from delvm.distill.fused import fused_cross_entropy, fused_kd_loss, fused_sparse_kd_loss
from tests.processes import together

pytestmark = pytest.mark.usefixtures("one_thread")
laws = settings(max_examples=30, deadline=None)

CODES, STUDENT, TEACHER = 23, 6, 9
IGNORED = -100


def _draw(tokens, seed=0, dtype=torch.float64, codes=CODES):
    """Student's hidden states and head, teacher's, labels with every third token ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(codes, (tokens,), generator=generator)
    labels[2::3] = IGNORED
    return (
        normal(tokens, STUDENT),
        normal(codes, STUDENT),
        normal(tokens, TEACHER),
        normal(codes, TEACHER),
        labels,
    )


def _leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _plain(hidden, head, teacher_logits, labels, divergence=forward_kl, temperature=1.0, ce=1.0, kd=1.0):
    """The loss and its gradients from full logits in float64."""
    hidden, head = _leaves(hidden.double(), head.double())
    logits = hidden @ head.T
    loss = ce * cross_entropy(logits, labels, reduction="sum") / (labels != IGNORED).sum().clamp_min(1)
    if teacher_logits is not None:
        teacher_logits = teacher_logits.double()
        loss = loss + kd * mean_divergence(
            divergence, logits, teacher_logits, labels, temperature=temperature
        )
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def _gradients(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _relative(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def _assert_near(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert _relative(one, other) <= tolerance


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_kd_loss_is_the_plain_one_in_value_and_gradients(name, temperature, dtype, tolerance):
    # chunks that divide the 12 or 8 labelled tokens, that do not, fewer tokens than a chunk, one token
    for tokens, chunk in ((12, 4), (12, 5), (7, 64), (1, 64), (1, 1)):
        hidden, head, teacher_hidden, teacher_head, labels = _draw(tokens, seed=tokens, dtype=dtype)
        wanted = _plain(
            hidden,
            head,
            teacher_hidden.double() @ teacher_head.double().T,
            labels,
            DIVERGENCES[name],
            temperature,
            0.3,
            0.7,
        )
        hidden, head = _leaves(hidden, head)
        loss, _ = fused_kd_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            divergence=name,
            temperature=temperature,
            ce_weight=0.3,
            kd_weight=0.7,
            chunk_size=chunk,
        )
        assert loss.dtype == dtype
        _assert_near(_gradients(loss, hidden, head), wanted, tolerance)


def test_forward_kl_against_torch_itself():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(9)
    labels = labels.clamp_min(0)  # nothing is ignored
    logits, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    ce = cross_entropy(logits, labels)
    kd = 4 * kl_div(
        torch.log_softmax(logits / 2, -1),
        torch.log_softmax(teacher / 2, -1),
        reduction="batchmean",
        log_target=True,
    )
    loss, parts = fused_kd_loss(
        hidden, head, teacher_hidden, teacher_head, labels, temperature=2.0, ce_weight=3.0, kd_weight=5.0
    )
    torch.testing.assert_close(parts["ce"], ce)
    torch.testing.assert_close(parts["kd"], kd)
    torch.testing.assert_close(loss, 3 * ce + 5 * kd)


def test_a_divergence_with_parameters():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(6)
    divergence = make_divergence("jsd", beta=0.2)
    wanted = _plain(hidden, head, teacher_hidden @ teacher_head.T, labels, divergence)
    hidden, head = _leaves(hidden, head)
    loss, _ = fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, divergence=divergence)
    _assert_near(_gradients(loss, hidden, head), wanted, 1e-12)


@laws
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 13), st.sampled_from([0.5, 1.0, 3.0]))
def test_no_way_to_cut_and_mask_changes_the_loss(seed, tokens, chunk, temperature):
    hidden, head, teacher_hidden, teacher_head, labels = _draw(tokens, seed)
    labels[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.4] = IGNORED
    wanted = _plain(hidden, head, teacher_hidden @ teacher_head.T, labels, temperature=temperature)
    hidden, head = _leaves(hidden, head)
    loss, _ = fused_kd_loss(
        hidden, head, teacher_hidden, teacher_head, labels, temperature=temperature, chunk_size=chunk
    )
    for one, other in zip(_gradients(loss, hidden, head), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_cross_entropy_alone():
    hidden, head, _, _, labels = _draw(11)
    wanted = _plain(hidden, head, None, labels)
    leaves = _leaves(hidden, head)
    loss, parts = fused_cross_entropy(*leaves, labels, chunk_size=3)
    assert list(parts) == ["ce"]
    assert not parts["ce"].requires_grad
    _assert_near(_gradients(loss, *leaves), wanted, 1e-12)
    half, parts = fused_cross_entropy(*leaves, labels, ce_weight=0.5, num_targets=100)
    torch.testing.assert_close(parts["ce"], wanted[0] * 8 / 100)  # 8 of 11 tokens are labelled
    torch.testing.assert_close(half, 0.5 * parts["ce"])


def test_a_sure_students_cross_entropy_keeps_its_digits():
    # -log p = log(1 + 22 exp(-12)); logsumexp less logit would be a multiple of 6e-5, float32's step at 1000
    head = torch.full((CODES, 1), 988.0)
    head[4] = 1000.0
    loss, _ = fused_cross_entropy(torch.ones(1, 1), head, torch.tensor([4]))
    assert loss.item() == pytest.approx(1.35162e-4, rel=5e-3)


def test_weights_and_temperatures_by_token():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(10)
    valid = labels != IGNORED
    ce_weight, kd_weight, temperature = (
        torch.rand(10, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    ce_weight[0] = kd_weight[0] = 0.0  # this token weighs nothing at all
    temperature = temperature + 0.5
    kd_mask = torch.arange(10) % 4 != 1  # labelled, but without a teacher: 1 (5 is ignored), 9
    plain = _leaves(hidden, head)
    logits = plain[0] @ plain[1].T
    ce = cross_entropy(logits, labels, reduction="none")
    divided = [x / temperature.unsqueeze(-1) for x in (logits, teacher_hidden @ teacher_head.T)]
    kd = temperature**2 * forward_kl(*divided)
    taught = valid & kd_mask
    wanted = (ce_weight * ce)[valid].sum() / valid.sum() + (kd_weight * kd)[taught].sum() / taught.sum()

    fused = _leaves(hidden, head)
    # whatever stands where there is no teacher
    teacher_hidden = teacher_hidden.masked_fill(~kd_mask.unsqueeze(-1), torch.nan)
    temperature, kd_weight = (
        temperature.masked_fill(~kd_mask, 0.0),
        kd_weight.masked_fill(~kd_mask, torch.inf),
    )
    loss, parts = fused_kd_loss(
        *fused,
        teacher_hidden,
        teacher_head,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        kd_mask=kd_mask,
        chunk_size=4,
    )
    torch.testing.assert_close(parts["ce"], ce[valid].mean().detach())
    torch.testing.assert_close(parts["kd"], kd[taught].mean().detach())
    _assert_near(_gradients(loss, *fused), _gradients(wanted, *plain), 1e-12)


def test_uneven_micro_batches_over_given_denominators_are_one_batch():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(12)
    kd_mask = torch.arange(12) > 4
    leaves = _leaves(hidden, head)
    whole, _ = fused_kd_loss(*leaves, teacher_hidden, teacher_head, labels, kd_mask=kd_mask)
    wanted = _gradients(whole, *leaves)
    losses = [
        fused_kd_loss(
            leaves[0][part],
            leaves[1],
            teacher_hidden[part],
            teacher_head,
            labels[part],
            kd_mask=kd_mask[part],
            num_targets=(labels != IGNORED).sum(),
            num_kd_targets=float(((labels != IGNORED) & kd_mask).sum()),
        )[0]
        for part in (slice(0, 2), slice(2, 3), slice(3, 12))
    ]
    _assert_near(_gradients(sum(losses), *leaves), wanted, 1e-12)


def _codes(teacher_logits, k, temperature=1.0):
    probabilities, ids = torch.softmax(teacher_logits / temperature, -1).topk(k)
    return ids, probabilities


def _buckets(log_probabilities, ids):
    known = log_probabilities.gather(-1, ids)
    rest = log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([known, rest], -1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_top_codes_and_a_tail_are_the_divergence_over_their_buckets(name, temperature, dtype, tolerance):
    for tokens, chunk, k in ((12, 5, 4), (7, 64, 1), (1, 1, 8)):
        hidden, head, teacher_hidden, teacher_head, labels = _draw(tokens, seed=tokens, dtype=dtype)
        teacher = teacher_hidden.double() @ teacher_head.double().T
        ids, probabilities = _codes(teacher, k, temperature)
        plain = _leaves(hidden.double(), head.double())
        logits = plain[0] @ plain[1].T
        valid = labels != IGNORED
        coarse = _buckets(torch.log_softmax(logits / temperature, -1), ids)
        teacher = _buckets(torch.log_softmax(teacher / temperature, -1), ids)
        kd = temperature**2 * DIVERGENCES[name](coarse, teacher)[valid].mean()
        wanted = _gradients(cross_entropy(logits, labels) + 0.5 * kd, *plain)
        fused = _leaves(hidden, head)
        loss, parts = fused_sparse_kd_loss(
            *fused,
            ids.int(),
            probabilities.to(dtype),
            labels,
            tail=True,
            divergence=name,
            temperature=temperature,
            kd_weight=0.5,
            chunk_size=chunk,
        )
        assert _relative(parts["kd"], kd.detach()) <= tolerance
        _assert_near(_gradients(loss, *fused), wanted, tolerance)


def test_a_tail_is_summed_and_not_what_is_left_of_one():
    # the student gives all but 2e-9 to code 0, the teacher half: in float32, 1 less that probability is 0
    head = torch.zeros(CODES, 1)
    head[0] = 23.0
    loss, parts = fused_sparse_kd_loss(
        torch.ones(1, 1),
        head,
        torch.tensor([[0]]),
        torch.tensor([[0.5]]),
        torch.tensor([0]),
        tail=True,
        ce_weight=0.0,
    )
    # 1/2 log(1/2) + 1/2 (log(1/2) - log(22 exp(-23)))
    wanted = torch.log(torch.tensor(0.5)) - 0.5 * (torch.log(torch.tensor(22.0)) - 23.0)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(parts["kd"], wanted)


def test_a_tail_of_nothing():
    # all codes known, the last one impossible, and a sum that a cache's rounding has brought above 1
    hidden, head, teacher_hidden, teacher_head, labels = _draw(5)
    teacher = teacher_hidden @ teacher_head.T
    teacher[:, -1] = -torch.inf
    ids, probabilities = _codes(teacher, CODES)
    wanted = _plain(hidden, head, teacher, labels)
    for scale in (1.0, 1.001):
        leaves = _leaves(hidden, head)
        loss, _ = fused_sparse_kd_loss(*leaves, ids, scale * probabilities, labels, tail=True)
        _assert_near(_gradients(loss, *leaves), wanted, 1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_codes_are_a_cross_entropy_on_them(temperature):
    hidden, head, _, _, labels = _draw(10)
    ids = torch.randint(4, (10, 6), generator=torch.Generator().manual_seed(0))  # of 4 codes, 6: some repeat
    weights = torch.rand(10, 6, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    plain = _leaves(hidden, head)
    logits = plain[0] @ plain[1].T
    log_probabilities = torch.log_softmax(logits / temperature, -1)
    drawn = -(weights * log_probabilities.gather(-1, ids)).sum(-1)
    loss = cross_entropy(logits, labels) + temperature**2 * drawn[labels != IGNORED].mean()
    fused = _leaves(hidden, head)
    found, _ = fused_sparse_kd_loss(
        *fused, ids, weights, labels, tail=False, temperature=temperature, chunk_size=3
    )
    _assert_near(_gradients(found, *fused), _gradients(loss, *plain), 1e-12)


def test_drawn_codes_give_forward_kls_gradient_on_average():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(5)
    probabilities = torch.softmax(teacher_hidden @ teacher_head.T, -1)
    leaves = _leaves(hidden, head)
    full, parts = fused_kd_loss(*leaves, teacher_hidden, teacher_head, labels, ce_weight=0.0)
    ids = torch.arange(CODES).expand(5, CODES)  # every draw, as often as it comes
    drawn, drawn_parts = fused_sparse_kd_loss(*leaves, ids, probabilities, labels, tail=False, ce_weight=0.0)
    _assert_near(_gradients(drawn, *leaves)[1:], _gradients(full, *leaves)[1:], 1e-12)
    entropy = -(probabilities * probabilities.log()).sum(-1)[labels != IGNORED].mean()
    torch.testing.assert_close(drawn_parts["kd"], parts["kd"] + entropy)


def _three(hidden, head, teacher_hidden, teacher_head, labels, **options):
    """The loss of each of the three functions."""
    ids, probabilities = _codes(torch.nan_to_num(teacher_hidden) @ teacher_head.T, 3)
    ids[labels == options.get("ignore_index", IGNORED)] = -1  # no id at all
    return [
        fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **options)[0],
        fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, divergence="jsd", **options)[0],
        fused_sparse_kd_loss(hidden, head, ids, probabilities, labels, tail=True, **options)[0],
        fused_sparse_kd_loss(hidden, head, ids, probabilities, labels, tail=False, **options)[0],
        fused_cross_entropy(hidden, head, labels, **options)[0],
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_tokens_do_not_matter_whatever_they_hold(value):
    hidden, head, teacher_hidden, teacher_head, labels = _draw(8)
    leaves = _leaves(hidden, head)
    clean = [_gradients(loss, *leaves) for loss in _three(*leaves, teacher_hidden, teacher_head, labels)]
    ignored = labels == IGNORED
    hidden[ignored] = teacher_hidden[ignored] = value
    leaves = _leaves(hidden, head)
    found = [_gradients(loss, *leaves) for loss in _three(*leaves, teacher_hidden, teacher_head, labels)]
    for one, other in zip(found, clean, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert (one[1][ignored] == 0).all()
        assert (one[1][~ignored] != 0).any(-1).all()


def test_an_all_ignored_batch_is_0_with_a_graph():
    *tensors, labels = _draw(4)
    for tensor in tensors:
        tensor[:] = torch.nan
    leaves = _leaves(*tensors[:2])
    for options in ({}, {"num_targets": 0}, {"num_targets": torch.tensor(0)}):
        for loss in _three(*leaves, *tensors[2:], torch.full_like(labels, IGNORED), **options):
            assert loss.item() == 0
            for gradient in torch.autograd.grad(loss, leaves):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_ignore_index():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(6)
    labels[labels == CODES - 1] = 0
    wanted = _three(hidden, head, teacher_hidden, teacher_head, labels)
    labels[labels == IGNORED] = CODES - 1
    found = _three(hidden, head, teacher_hidden, teacher_head, labels, ignore_index=CODES - 1)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))


def test_what_comes_after_the_loss_scales_its_gradient():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(8)
    leaves = _leaves(hidden, head)
    for loss in _three(*leaves, teacher_hidden, teacher_head, labels):
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(3 * loss, leaves)  # the graph was kept, and so were its gradients
        for one, three in zip(once, again, strict=True):
            torch.testing.assert_close(3 * one, three)


def test_a_tied_head_gets_both_gradients():
    _, head, *_, labels = _draw(6)
    inputs = torch.arange(6)
    (embedding,) = _leaves(head)
    plain = cross_entropy(embedding[inputs] @ embedding.T, labels)
    (wanted,) = torch.autograd.grad(plain, embedding)
    (found,) = torch.autograd.grad(fused_cross_entropy(embedding[inputs], embedding, labels)[0], embedding)
    torch.testing.assert_close(found, wanted)


FORWARD = 2 * CODES * (STUDENT + TEACHER)  # of a token: its logits, student's and teacher's


def _flops(tokens, hidden_wanted, head_wanted, **options):
    hidden, head, teacher_hidden, teacher_head, labels = _draw(tokens)
    hidden.requires_grad_(hidden_wanted)
    head.requires_grad_(head_wanted)
    # the counter knows addmm, not its in-place form
    known = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        loss, _ = fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **options)
        if loss.requires_grad:
            loss.backward()
    assert (hidden.grad is not None) == (hidden_wanted and loss.requires_grad)
    assert (head.grad is not None) == (head_wanted and loss.requires_grad)
    return counter.get_total_flops()


def test_only_gradients_that_are_wanted_are_made_and_only_labelled_tokens_cost():
    one = 2 * CODES * STUDENT  # of a token: either gradient
    labelled = 8  # of 12
    for options in ({"chunk_size": 3}, {"divergence": "jsd"}, {"temperature": 2.0}):
        assert _flops(12, True, True, **options) == labelled * (FORWARD + 2 * one)
        assert _flops(12, True, False, **options) == labelled * (FORWARD + one)
        assert _flops(12, False, True, **options) == labelled * (FORWARD + one)
        assert _flops(12, False, False, **options) == labelled * FORWARD
        with torch.no_grad():
            assert _flops(12, True, True, **options) == labelled * FORWARD


def test_the_value_is_the_same_without_gradients():
    tensors = _draw(8)
    leaves = _leaves(*tensors[:2])
    wanted = _three(*leaves, *tensors[2:])
    for switch in (torch.no_grad, torch.inference_mode):
        with switch():
            found = _three(*leaves, *tensors[2:])
        for one, other in zip(found, wanted, strict=True):
            assert not one.requires_grad
            torch.testing.assert_close(one, other.detach(), rtol=1e-14, atol=0)


class _Largest(TorchDispatchMode):
    """Notes the most elements that a tensor of codes in its last dimension is made with."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == CODES:
                self.rows = max(self.rows, tensor.numel() // CODES)
        return result


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_of_more_than_a_chunk_never_exist(name):
    hidden, head, teacher_hidden, teacher_head, labels = _draw(60)
    ids, probabilities = _codes(teacher_hidden @ teacher_head.T, 3)
    leaves = _leaves(hidden, head)
    options = {"divergence": name, "chunk_size": 7, "temperature": 2.0}
    with _Largest() as largest:
        fused_kd_loss(*leaves, teacher_hidden, teacher_head, labels, **options)[0].backward()
        fused_sparse_kd_loss(*leaves, ids, probabilities, labels, tail=True, **options)[0].backward()
    # one head's transpose has codes last as well
    assert 7 <= largest.rows <= max(STUDENT, TEACHER)


def test_autocast_rounds_matmuls_alone():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(40, dtype=torch.float32)
    wanted = _plain(hidden, head, teacher_hidden @ teacher_head.T, labels)
    hidden, head = _leaves(hidden.bfloat16(), head)  # as the last norm under autocast may give them
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, chunk_size=6)
    assert loss.dtype == parts["ce"].dtype == parts["kd"].dtype == torch.float32
    found = _gradients(loss, hidden, head)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
    _assert_near(found, wanted, 2e-2)
    assert _relative(found[2], wanted[2]) > 1e-5  # bf16 was at work
    # with the very logits that bf16 matmuls give, everything after them is as exact as in float32
    rounded = [
        (x.detach().bfloat16() @ y.detach().bfloat16().T).double()
        for x, y in ((hidden, head), (teacher_hidden, teacher_head))
    ]
    exact = cross_entropy(rounded[0], labels) + mean_divergence(forward_kl, *rounded, labels)
    assert _relative(loss, exact) < 1e-6


def test_autocast_leaves_float64_alone():
    tensors = _draw(8)
    wanted = _three(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = _three(*tensors)
    assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_a_bf16_teacher_of_a_float32_student():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(30, dtype=torch.float32)
    teacher_logits = teacher_hidden.bfloat16() @ teacher_head.bfloat16().T
    wanted = _plain(hidden, head, teacher_logits, labels)
    for states in (teacher_hidden, teacher_hidden.bfloat16()):
        leaves = _leaves(hidden, head)
        loss, _ = fused_kd_loss(*leaves, states, teacher_head.bfloat16(), labels, chunk_size=30)
        # the student's side is float32 through and through
        _assert_near(_gradients(loss, *leaves), wanted, 1e-5)


def test_a_bf16_student_gets_gradients_summed_in_float32():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(3000, dtype=torch.bfloat16)
    wanted = _plain(hidden, head, teacher_hidden.float() @ teacher_head.float().T, labels)
    leaves = _leaves(hidden, head)
    loss, _ = fused_kd_loss(*leaves, teacher_hidden, teacher_head, labels, chunk_size=10)
    found = _gradients(loss, *leaves)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert _relative(found[0], wanted[0]) < 1e-3
    # 200 chunks summed in bf16 would be off by several percent
    assert _relative(found[2], wanted[2]) < 6e-3


class _Toy(torch.nn.Module):
    """A student whose loss is part of its forward pass; its head is tied or not."""

    def __init__(self, tied):
        super().__init__()
        self.embed = torch.nn.Embedding(CODES, STUDENT)
        self.body = torch.nn.Linear(STUDENT, STUDENT)
        self.head = torch.nn.Linear(STUDENT, CODES, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens, teacher_hidden, teacher_head, labels, count=None):
        hidden = torch.tanh(self.body(self.embed(tokens)))
        options = {"chunk_size": 4, "num_targets": count, "num_kd_targets": count}
        return fused_kd_loss(hidden, self.head.weight, teacher_hidden, teacher_head, labels, **options)[0]


def _toy_gradients(toy, wrap, batch):
    model = wrap(toy)
    loss = model(*batch)
    loss.backward()
    return loss.detach(), *(parameter.grad for parameter in toy.parameters())


@pytest.fixture
def toys():
    """An untied and a tied student, and a batch."""
    _, _, teacher_hidden, teacher_head, labels = _draw(10, dtype=torch.float32)
    torch.manual_seed(0)
    return (_Toy(False), _Toy(True)), (torch.arange(10), teacher_hidden, teacher_head, labels)


def _assert_wrapped_is_the_same(toys, wrap):
    for toy in toys[0]:
        wanted = [x.clone() for x in _toy_gradients(toy, lambda model: model, toys[1])]
        toy.zero_grad()
        found = _toy_gradients(toy, wrap, toys[1])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(getattr(one, "full_tensor", lambda one=one: one)(), other)


def test_in_a_compiled_model(toys):
    counter = CompileCounterWithBackend("aot_eager")
    _assert_wrapped_is_the_same(toys, lambda model: torch.compile(model, backend=counter))
    (compiled,) = counter.graphs  # for both; what comes before the loss, which is not traced
    operations = [node.target for node in compiled.graph.nodes if node.op == "call_function"]
    assert operations == [torch.nn.functional.embedding, torch._C._nn.linear, torch.tanh]


def _replicated(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def _sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


@pytest.mark.parametrize("wrap", [_replicated, _sharded])
def test_two_processes_with_uneven_labels_are_one(toys, wrap):
    def half(toy):
        """This process' tokens: 4 and 6, of which 3 and 4 are labelled; both divide by the mean count."""
        rows = slice(0, 4) if ranks.rank() == 0 else slice(4, 10)
        tokens, teacher_hidden, teacher_head, labels = toys[1]
        batch = tokens[rows], teacher_hidden[rows], teacher_head, labels[rows], 7 / 2
        loss, *gradients = _toy_gradients(toy, wrap, batch)
        # as lists: a tensor would be sent by a file that this process takes with it
        return loss.item(), [getattr(one, "full_tensor", lambda one=one: one)().tolist() for one in gradients]

    for toy in toys[0]:
        loss, *wanted = [x.clone() for x in _toy_gradients(toy, lambda model: model, toys[1])]
        toy.zero_grad()
        found = together(half, toy)
        assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-5)
        for _, gradients in found:
            for one, other in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(torch.tensor(one), other)


def test_what_does_not_fit_is_refused():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(6)
    ids, probabilities = _codes(teacher_hidden @ teacher_head.T, 3)

    def kd(teacher_hidden=teacher_hidden, teacher_head=teacher_head, labels=labels, **options):
        fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **options)

    def sparse(ids=ids, probabilities=probabilities, tail=True, **options):
        fused_sparse_kd_loss(hidden, head, ids, probabilities, labels, tail=tail, **options)

    with pytest.raises(ValueError, match=r"^vocabulary: the student has 23 ids, the teacher 22$"):
        kd(teacher_head=teacher_head[:-1])
    with pytest.raises(ValueError, match=r"^teacher_hidden: 5 tokens, the labels have 6$"):
        kd(teacher_hidden=teacher_hidden[:-1])
    with pytest.raises(ValueError, match=r"^hidden: 6 tokens, the labels have 5$"):
        kd(teacher_hidden=teacher_hidden[:-1], labels=labels[:-1])
    with pytest.raises(ValueError, match=r"^kd_weight: 2 tokens, the labels have 6$"):
        kd(kd_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"^kd_mask: 2 tokens, the labels have 6$"):
        kd(kd_mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^temperature: 0.0 must be above 0$"):
        kd(temperature=0.0)
    with pytest.raises(ValueError, match=r"^chunk_size: 0 must be at least 1$"):
        kd(chunk_size=0)
    with pytest.raises(ValueError, match=r"^divergence: 'kl' is unknown; choices: forward_kl, "):
        kd(divergence="kl")
    with pytest.raises(ValueError, match=r"^ids: shape \(6, 3\), the probabilities have \(6, 2\)$"):
        sparse(probabilities=probabilities[:, :2])
    with pytest.raises(ValueError, match=r"^ids: 5 tokens, the labels have 6$"):
        sparse(ids[:-1], probabilities[:-1])
    with pytest.raises(ValueError, match=r"^divergence: codes drawn .* forward_kl alone$"):
        sparse(tail=False, divergence="jsd")


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_small_divergence_over_many_codes_keeps_its_digits(offset):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 16), (8192, 16), (8192, 16)
    hidden, head, noise = (torch.randn(shape, generator=generator) for shape in shapes)
    head /= 4
    # one more channel that all of a model's logits have alike: no softmax sees it, rounding does
    hidden = torch.cat([hidden, torch.ones(6, 1)], 1)
    teacher_head = torch.cat([head + 0.01 * noise, torch.full((8192, 1), offset)], 1)
    head = torch.cat([head, torch.zeros(8192, 1)], 1)
    plain = forward_kl(hidden.double() @ head.double().T, hidden.double() @ teacher_head.double().T).mean()
    labels = torch.zeros(6, dtype=torch.long)
    found = fused_kd_loss(hidden, head, hidden, teacher_head, labels, ce_weight=0.0)[1]["kd"].double()
    assert 1e-4 < plain < 1e-2
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=0)


def test_a_given_denominator_is_that_of_both_terms():
    hidden, head, teacher_hidden, teacher_head, labels = _draw(6)
    labels = labels.clamp_min(0)
    once, twice = (
        fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, num_targets=number)
        for number in (None, 12)
    )
    for name in ("ce", "kd"):
        torch.testing.assert_close(twice[1][name], once[1][name] / 2)
    torch.testing.assert_close(twice[0], once[0] / 2)
    mask = torch.tensor([True, False] * 3)
    masked = [
        fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, num_targets=number, kd_mask=mask)
        for number in (None, 12)
    ]
    torch.testing.assert_close(masked[1][1]["kd"], masked[0][1]["kd"])  # other tokens: their own number
