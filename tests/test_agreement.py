import math

import pytest
import torch

from delvm.distill.agreement import BANDS, agreement, by_group, sparse_agreement

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["kl", "agreement", "student_entropy", "teacher_entropy"]


def _draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 512])
def test_scores_are_those_of_whole_logits(chunk_size):
    one, two = _draw(7, 6, seed=0), _draw(7, 9, seed=1)  # each of its own width
    student_head, teacher_head = _draw(23, 6, seed=2), _draw(23, 9, seed=3)
    student_head[0], teacher_head[0] = 4 * one[0], 4 * two[0]  # code 0 is for both the likeliest at token 0
    found = agreement(one, student_head, two, teacher_head, chunk_size=chunk_size)
    q, p = (
        (hidden.double() @ head.double().T).log_softmax(-1)
        for hidden, head in ((one, student_head), (two, teacher_head))
    )
    assert list(found) == NAMES
    assert {(score.dtype, tuple(score.shape)) for score in found.values()} == {(torch.float32, (7,))}
    expected = {
        "kl": (p.exp() * (p - q)).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "student_entropy": -(q.exp() * q).sum(-1),
        "teacher_entropy": -(p.exp() * p).sum(-1),
    }
    assert expected["agreement"][0] == 1 > expected["agreement"].mean()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=1e-5)


def test_scores_of_known_distributions():
    even, sure = torch.zeros(1, 4), torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    same = agreement(sure, torch.eye(4), sure, torch.eye(4))
    assert [same[name].item() for name in NAMES] == pytest.approx([0, 1, 0, 0], abs=1e-6)
    apart = agreement(even, torch.eye(4), sure, torch.eye(4))
    assert [apart[name].item() for name in NAMES] == pytest.approx([math.log(4), 1, math.log(4), 0], abs=1e-6)


def test_no_graph_is_kept():
    hidden, head = _draw(3, 4, seed=0).requires_grad_(), _draw(5, 4, seed=1).requires_grad_()
    assert not any(score.requires_grad for score in agreement(hidden, head, hidden, head).values())
    given = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    for tail in (True, False):
        scores = sparse_agreement(hidden, head, *given, tail=tail, temperature=1.0)
        assert not any(score.requires_grad for score in scores.values())


# --- a few codes in the teacher's place ---


def _pair(temperature=1.0):
    """Student's states and head; both sides' float64 log-probabilities, the student's at 1 as well."""
    hidden, head, logits = _draw(30, 6, seed=0), _draw(23, 6, seed=2), 2 * _draw(30, 23, seed=1).double()
    logits[:4] = hidden[:4].double() @ head.double().T  # of some tokens they find the same
    student = hidden.double() @ head.double().T
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, logits))
    return hidden, head, log_q, log_p, student.log_softmax(-1)


def _likeliest(log_p, count):
    """Ids and probabilities, float32, the likeliest last."""
    kept, ids = log_p.topk(count)
    return ids.flip(-1).int(), kept.flip(-1).exp().float()


def _close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 512), (2.5, 1), (2.5, 7)])
def test_the_likeliest_codes_and_one_bucket(temperature, chunk_size):
    hidden, head, log_q, log_p, plain = _pair(temperature)
    ids, probabilities = _likeliest(log_p, 5)
    found = sparse_agreement(
        hidden, head, ids, probabilities, tail=True, temperature=temperature, chunk_size=chunk_size
    )
    p, q = log_p.exp(), log_q.exp()
    known_p, known_q = p.gather(-1, ids.long()), q.gather(-1, ids.long())
    rest_p, rest_q = 1 - known_p.sum(-1), 1 - known_q.sum(-1)
    expected = {
        "student_entropy": -(plain.exp() * plain).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "bucket_kl": (known_p * (known_p / known_q).log()).sum(-1) + rest_p * (rest_p / rest_q).log(),
        "teacher_bucket_entropy": -(known_p * known_p.log()).sum(-1) - rest_p * rest_p.log(),
    }
    assert 0 < expected["agreement"].mean() < 0.5
    _close(found, expected)
    # bounds of what all codes would tell
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    for less, whole in ((found["bucket_kl"], kl), (found["teacher_bucket_entropy"], entropy)):
        assert (less <= whole + 1e-5).all()
        assert less.mean() < 0.9 * whole.mean()


def test_all_codes_tell_what_the_teacher_does():
    hidden, head, _, log_p, _ = _pair()
    for scale in (1.0, 1.0001):  # rounded by a cache they may sum to more than 1
        ids, probabilities = _likeliest(log_p, 23)
        found = sparse_agreement(hidden, head, ids, scale * probabilities, tail=True, temperature=1.0)
        live = agreement(hidden, head, log_p.float(), torch.eye(23))
        _close(
            found,
            {
                "student_entropy": live["student_entropy"].double(),
                "agreement": live["agreement"].double(),
                "bucket_kl": live["kl"].double(),
                "teacher_bucket_entropy": live["teacher_entropy"].double(),
            },
        )


@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 512), (2.5, 7)])
def test_drawn_codes(temperature, chunk_size):
    hidden, head, log_q, log_p, plain = _pair(temperature)
    settings = {"tail": False, "temperature": temperature, "chunk_size": chunk_size}
    ids = torch.randint(4, (30, 6), generator=torch.Generator().manual_seed(0))  # of 4 codes, 6: some repeat
    found = sparse_agreement(hidden, head, ids.int(), torch.full((30, 6), 1 / 6), **settings)
    entropy = -(plain.exp() * plain).sum(-1)
    drawn = -log_q.gather(-1, ids).mean(-1)
    _close(found, {"student_entropy": entropy, "drawn_cross_entropy": drawn})
    # every code as often as it comes: KL and the teacher's entropy
    every = torch.arange(23).expand(30, 23)
    found = sparse_agreement(hidden, head, every, log_p.exp().float(), **settings)
    p = log_p.exp()
    both = (p * (log_p - log_q)).sum(-1) - (p * log_p).sum(-1)
    _close(found, {"student_entropy": entropy, "drawn_cross_entropy": both})


# --- means ---


def test_means_by_task_and_by_part_of_the_picture():
    assert BANDS == 4
    # two pictures of eight tokens, one of each task, and what stands around them
    places = torch.tensor([-1, *range(8), *range(8), -1])
    tasks = torch.tensor([0] * 9 + [1] * 9)
    valid = torch.ones(18, dtype=torch.bool)
    valid[[3, 17]] = False
    values = torch.arange(18.0) ** 2
    found = by_group({"kl": values}, tasks, places, valid, ["first", "second", "third"])

    def mean(*tokens):
        return pytest.approx(sum(token**2 for token in tokens) / len(tokens))

    assert found == {
        "kl/first": mean(0, 1, 2, 4, 5, 6, 7, 8),
        "kl/second": mean(*range(9, 17)),
        "kl/part 1": mean(1, 2, 9, 10),
        "kl/part 2": mean(4, 11, 12),
        "kl/part 3": mean(5, 6, 13, 14),
        "kl/part 4": mean(7, 8, 15, 16),
    }


def test_groups_without_a_token_are_left_out():
    places, tasks = torch.tensor([-1, -1]), torch.tensor([1, 1])
    valid = torch.tensor([True, False])
    scores = {"kl": torch.tensor([2.0, 5.0]), "agreement": torch.tensor([1.0, 0.0])}
    assert by_group(scores, tasks, places, valid, ["a", "b"]) == {"kl/b": 2.0, "agreement/b": 1.0}
    assert by_group(scores, tasks, places, ~valid & valid, ["a", "b"]) == {}
