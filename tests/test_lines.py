import hashlib
import re

import numpy as np
import pytest

from delvm.errors import UserError
from delvm.images.sources import held_out
from delvm.images.tasks import TaskConfig
from delvm.tokens.formats import write_delvm, write_lvm
from delvm.tokens.lines import index_lines, rows, split_lines

TOKENS = 4  # of a picture


def _lines(num, pictures=2, codes=16):
    return [np.random.default_rng(i).integers(codes, size=pictures * TOKENS) for i in range(num)]


def _index(config, **changes):
    return index_lines("t", config, **{"tokens_per_image": TOKENS, "num_codes": 16, "seed": 0} | changes)


def is_held_out(line, fraction):
    """By what the line holds: the same line twice falls on one side."""
    return held_out(hashlib.sha256(line.astype("<i8").tobytes()).hexdigest(), fraction, 0)


def _refused(*arguments, **changes):
    with pytest.raises(UserError) as caught:
        _index(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source", ["delvm", "lvm"])
def test_lines_are_split_by_their_number_and_reshaped(tmp_path, source):
    lines, place = _lines(20), tmp_path / "tokens"
    (write_delvm if source == "delvm" else write_lvm)(place, lines)
    config = TaskConfig(source=source, images=str(place), validation_fraction=0.3)
    held = [is_held_out(line, 0.3) for line in lines]
    found = _index(config)
    assert (found["train"], found["validation"]) == (20 - sum(held), sum(held))
    assert (found["pictures"], found["skipped"], found["dropped"]) == (2, [], [])
    for split, side in (("train", False), ("validation", True)):
        expected = [line.reshape(2, TOKENS) for line, h in zip(lines, held, strict=True) if h == side]
        read = list(rows(config, split, 0, (2, TOKENS)))
        assert all(row.shape == (1, 2, TOKENS) for row in read)
        np.testing.assert_array_equal(np.concatenate(read), expected)


def test_a_file_of_its_own_and_limits(tmp_path):
    write_lvm(tmp_path / "train.jsonl", _lines(9))
    write_lvm(tmp_path / "held.jsonl", _lines(5))
    config = TaskConfig(
        source="lvm", images=str(tmp_path / "train.jsonl"), validation_images=str(tmp_path / "held.jsonl"),
        samples=7, validation_samples=3,
    )  # fmt: skip
    assert {key: _index(config)[key] for key in ("train", "validation")} == {"train": 7, "validation": 3}
    places = [place for place, _ in split_lines(config, "validation", 0)]
    assert places == [f"{tmp_path}/held.jsonl, line {number}" for number in (1, 2, 3)]


def test_what_is_refused(tmp_path):
    file = tmp_path / "lines.jsonl"
    config = TaskConfig(source="lvm", images=str(file), validation_fraction=0.5)
    whole = _lines(8)
    first = next(n for n in range(1, 9) if not is_held_out(whole[n - 1], 0.5))
    later = next(n for n in range(first + 1, 9) if not is_held_out(whole[n - 1], 0.5))

    def wrong(number, tokens):
        write_lvm(file, [tokens if n == number else line for n, line in enumerate(whole, 1)])
        return f"{file}, line {number}: "

    place = wrong(first, np.arange(7))
    assert _refused(config) == f"{place}7 tokens, no multiple of a picture's 4"
    place = wrong(first, np.arange(0))
    assert _refused(config) == f"{place}0 tokens, no multiple of a picture's 4"
    place = wrong(later, np.arange(12))
    assert _refused(config) == f"{place}3 pictures, the lines before it have 2"
    place = wrong(later, np.array([0, 1, 2, 3, 4, 5, 6, 16]))
    assert _refused(config) == f"{place}code 16, the tokenizer has 16"
    write_lvm(file, whole[:0])
    assert _refused(config) == f"tasks.t: no train samples in '{file}'"
    write_lvm(file, whole)
    config.frames = 4
    assert _refused(config) == "tasks.t.frames: 4 does not divide the 2 pictures of a line"
    assert re.fullmatch(r".*no such.*|.*nowhere.*", _refused(TaskConfig(source="lvm", images="nowhere")))
