import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from delvm.evaluate.gallery import extremes, heat_maps, png, psnr
from delvm.evaluate.scores import Scored


def _flat(value):
    return np.full((4, 4, 3), value, np.uint8)


def _row(student, **others):
    return [("query", _flat(0)), ("truth", _flat(100)), *((k, _flat(v)) for k, v in others.items()),
            ("student", _flat(student))]  # fmt: skip


def test_psnr_by_hand():
    assert psnr(_flat(110), _flat(100)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(_flat(5), _flat(5)) == math.inf


def test_rows_are_named_by_how_close_the_student_comes():
    rows = [_row(130, teacher=100), _row(101, teacher=0), _row(255, teacher=100), _row(110, teacher=100)]
    shown, others = extremes(rows)
    assert [name.split(",")[0] for name, _ in shown] == ["best", "median", "worst"]
    assert [row for _, row in shown] == [rows[1], rows[3], rows[2]]
    assert shown[1][0] == f"median, {20 * math.log10(25.5):.1f} dB"
    assert others == [rows[0]]


def test_a_teacher_alone_is_judged():
    rows = [[("truth", _flat(9)), ("teacher", _flat(value))] for value in (30, 10, 20)]
    assert [row[1][1][0, 0, 0] for _, row in extremes(rows)[0]] == [10, 20, 30]


def test_a_model_of_any_name_is_judged():
    rows = [[("truth", _flat(9)), ("lvm-7b", _flat(value))] for value in (30, 10, 20)]
    assert [row[1][1][0, 0, 0] for _, row in extremes(rows)[0]] == [10, 20, 30]
    alone = [[("query", _flat(1)), ("truth", _flat(9))]] * 3
    assert extremes(alone) == ([("", row) for row in alone], [])


def test_rows_are_ranked_by_the_tasks_own_score():
    rows = [_row(100 + value) for value in (0, 1, 2, 3)]  # by PSNR in this order
    worth = np.array([0.2, 0.5, math.nan, 0.9, 1.0])  # of one more that is not shown
    shown, others = extremes(rows, {"student": Scored({"foreground_iou": 0.6, "x": 1.0}, worth, True)})
    assert shown == [
        ("best, foreground iou 0.900", rows[3]),
        ("median, foreground iou 0.500", rows[1]),
        ("worst, foreground iou 0.200", rows[0]),
    ]
    assert others == [rows[2]]
    (best, row), *_ = extremes(rows, {"student": Scored({"mse": 0.1}, worth, False)})[0]
    assert (best, row) == ("best, mse 0.200", rows[0])
    # of another model, of fewer pictures, of too few that show something: by PSNR
    for name, values in (
        ("teacher", worth),
        ("student", worth[:3]),
        ("student", worth * [1, 1, 1, math.nan, 1]),
    ):
        assert extremes(rows, {name: Scored({"mse": 0.1}, values, False)}) == extremes(rows)


def test_rows_that_cannot_be_compared_stay_as_they_are():
    few = [_row(1), _row(2)]
    assert extremes(few) == ([("", few[0]), ("", few[1])], [])
    without = [[("query", _flat(0)), ("student", _flat(1))]] * 3
    assert extremes(without) == ([("", row) for row in without], [])
    assert extremes([]) == ([], [])


def test_pictures_decode_to_the_same_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(png(picture))))
    assert np.array_equal(np.array(decoded), picture)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (1, 4, 4, 3)])
def test_pictures_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pictures: uint8 .*, must be uint8 \(H, W, 3\)"):
        png(np.zeros(shape, np.uint8))


def test_heat_maps_share_one_scale():
    found = heat_maps({("a",): np.array([[0.0, 2.0]]), ("b",): np.array([[1.0, math.nan]])})
    (first, low, high), (second, *_) = found["a",], found["b",]
    assert (low, high) == (0.0, 2.0)
    assert first.shape == (8, 16, 3)
    light, dark, middle, missing = (
        p.astype(int) for p in (first[0, 0], first[0, 8], second[0, 0], second[0, 8])
    )
    assert light.sum() > middle.sum() > dark.sum()
    assert missing.tolist() == [255, 255, 255]
    assert heat_maps({}) == {}


def test_a_grid_of_one_value_or_of_none():
    assert heat_maps({("a",): np.ones((2, 2))})["a",][1:] == (1.0, 1.0)
    picture, low, _ = heat_maps({("a",): np.full((1, 1), math.nan)})["a",]
    assert (picture == 255).all()
    assert math.isnan(low)
