import math

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delvm.evaluate.board import scalars, write
from delvm.evaluate.prompting import GAP, LINE, SIDE


def _read(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path):
    metrics = {"evaluate": {"student": {"pose": {"loss": 2.5}}}, "tokenizer": {"codes_used": 252}}
    row = [("truth", np.zeros((8, 8, 3), np.uint8)), ("student", np.full((8, 8, 3), 9, np.uint8))]
    write(tmp_path, {"old": 1.0}, {})
    write(tmp_path, metrics, {"pose": [row, row], "empty": []})
    events = _read(tmp_path)
    assert events.Tags()["scalars"] == [
        "evaluate/student/pose/loss",
        "tokenizer/codes_used",
    ]  # none of before
    (event,) = events.Scalars("evaluate/student/pose/loss")
    assert (event.step, event.value) == (0, 2.5)
    assert events.Tags()["images"] == ["pictures/pose"]
    (image,) = events.Images("pictures/pose")
    assert (image.width, image.height) == (GAP + 2 * (SIDE + GAP), GAP + 2 * (LINE + SIDE + GAP))


def test_scalars_by_hand():
    tree = {"a": {"b": [1, {"c": 2.0}], "text": "x", "yes": True, "none": None}, 3: math.nan, "d": 4}
    assert list(scalars(tree)) == [("a/b/1", 1.0), ("a/b/2/c", 2.0), ("d", 4.0)]
