import pytest
from hypothesis import given
from hypothesis import strategies as st

from delvm.evaluate.comparison import gap_closed, headline, losses_of, mean_losses, ordered, shared_tasks

LOSSES = {
    "teacher": {"segmentation": 2.0, "pose": 3.0},
    "student": {"segmentation": 2.5, "pose": 3.1},
    "scratch": {"segmentation": 3.0, "pose": 3.2},
}


def test_headline_by_hand():
    result = headline(LOSSES)
    assert result["means"] == pytest.approx({"teacher": 2.5, "student": 2.8, "scratch": 3.1})
    assert result["gain"] == pytest.approx(0.3)
    assert result["gap"] == pytest.approx(0.5)
    assert result["tasks"]["segmentation"]["gain"] == pytest.approx(0.5)
    assert result["tasks"]["pose"]["gap"] == pytest.approx(0.5)


def test_tasks_that_a_model_lacks_are_not_in_the_mean():
    losses = LOSSES | {"teacher": {"pose": 3.0}}
    assert headline(losses)["means"] == pytest.approx({"teacher": 3.0, "student": 3.1, "scratch": 3.2})
    assert headline({"student": {"a": 1.0}, "scratch": {"b": 1.0}})["means"] == {}
    assert headline({})["gain"] is None


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_gap_has_its_fixed_points(scratch, student, teacher):
    gap = gap_closed(scratch, student, teacher)
    if teacher >= scratch:
        assert gap is None
    else:
        assert gap_closed(scratch, scratch, teacher) == 0
        assert gap_closed(scratch, teacher, teacher) == 1
        assert (gap < 0) == (student > scratch)


def test_losses_are_found_among_other_numbers():
    scores = {
        "student": {"pose": {"loss": 2.0, "miou": 1.0}, "note": 3.0, "depth": {"mse": 1.0}},
        "other": {"x": 1},
    }
    assert losses_of(scores) == {"student": {"pose": 2.0}}
    assert losses_of(LOSSES_SCORES, ["pose"])["teacher"] == {"pose": 3.0}


LOSSES_SCORES = {m: {t: {"loss": loss} for t, loss in tasks.items()} for m, tasks in LOSSES.items()}


def test_the_mean_of_runs_is_of_what_all_have():
    runs = [LOSSES, {"student": {"pose": 3.3, "segmentation": 2.7}, "teacher": {"pose": 2.0}}]
    assert shared_tasks(runs) == ["pose"]
    assert mean_losses(runs) == {"teacher": {"pose": 2.5}, "student": {"pose": pytest.approx(3.2)}}


def test_known_models_come_first():
    assert ordered(["mine", "scratch", "teacher"]) == ["teacher", "scratch", "mine"]
