import math

import pytest
import torch

from delvm.distill.agreement import BANDS, agreement, by_group

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
