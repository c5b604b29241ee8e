import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delvm.evaluate.tables import MANY, Cell, measure, say, tables


def _values(table):
    return {row: {key: cell.values for key, cell in cells.items()} for row, cells in table.rows.items()}


def test_a_mapping_of_numbers_is_a_row_and_its_mappings_are_topics():
    tree = {
        "student": {"pose": {"loss": 2.0, "loss_se": 0.1, "scores": {"pck": {"truth": 0.5, "ceiling": 0.9}}}},
        "teacher": {"pose": {"loss": 1.0}},
    }
    plain, scores = tables({"a": [tree]})
    assert plain.topic == ()
    assert _values(plain) == {
        ("a", "student", "pose"): {"loss": [2.0]},
        ("a", "teacher", "pose"): {"loss": [1.0]},
    }
    assert plain.rows["a", "student", "pose"]["loss"].error == 0.1
    assert scores.topic == ("scores",)
    assert scores.columns == ["truth", "ceiling"]
    assert _values(scores) == {("a", "student", "pose", "pck"): {"truth": [0.5], "ceiling": [0.9]}}


def test_runs_of_a_group_share_a_cell_and_groups_have_rows_apart():
    runs = {"a": [{"x": {"loss": 1.0}}, {"x": {"loss": 2.0}}], "b": [{"x": {"loss": 3.0}, "y": {"acc": 1}}]}
    (table,) = tables(runs)
    assert _values(table) == {
        ("a", "x"): {"loss": [1.0, 2.0]}, ("b", "x"): {"loss": [3.0]}, ("b", "y"): {"acc": [1]},
    }  # fmt: skip
    assert table.columns == ["loss", "acc"]


def test_lists_texts_and_nothing():
    tree = {
        "top1": 0.3,
        "chosen": [{"rate": 0.1}, {"rate": 0.2, "layer": "4"}],
        "by_layer": [1.0, 2.0],
        "no": None,
    }
    plain, chosen, by_layer = tables({"a": [tree]})
    assert plain.columns == ["top1"]
    assert _values(chosen) == {("a", "1"): {"rate": [0.1]}, ("a", "2"): {"rate": [0.2], "layer": []}}
    assert chosen.rows["a", "2"]["layer"].text == "4"
    assert _values(by_layer) == {("a",): {"1": [1.0], "2": [2.0]}}


def test_a_rectangle_is_a_grid_and_grids_of_runs_are_averaged():
    (table,) = tables({"a": [{"pose": {"places": [[1, 2], [3, 4]]}}, {"pose": {"places": [[3, 2], [3, 0]]}}]})
    assert table.topic == ("places",)
    assert np.array_equal(table.grids["a", "pose"], [[2, 2], [3, 2]])
    assert tables({"a": [{"places": [[1, 2]]}, {"places": [[1], [2]]}]}) == []  # of two shapes: no mean
    (ragged,) = tables({"a": [{"x": [[1, 2], [3]]}]})
    assert _values(ragged) == {("a", "x", "1"): {"1": [1], "2": [2]}, ("a", "x", "2"): {"1": [3]}}


def test_many_numbers_stand_below_each_other():
    (wide,) = tables({"a": [{str(i): i for i in range(MANY)}]})
    assert len(wide.columns) == MANY
    (long,) = tables({"a": [{str(i): i for i in range(MANY + 1)}]})
    assert long.columns == ["value"]
    assert _values(long)["a", "7"] == {"value": [7]}


NUMBERS = st.floats(allow_nan=True) | st.integers() | st.none() | st.booleans() | st.text(max_size=5)
TREES = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=5), TREES, max_size=4))
def test_no_tree_is_refused_and_no_number_is_lost(tree):
    def count(value):
        if isinstance(value, dict):
            # the one number that has no cell of its own: a standard error beside its mean
            errors = [k for k in value if k.endswith("_se") and k.removesuffix("_se") in value]
            return sum(count(item) for key, item in value.items() if key not in errors)
        if isinstance(value, list):
            return sum(map(count, value))
        return isinstance(value, int | float) and not isinstance(value, bool)

    found = tables({"a": [tree]})
    cells = [cell for table in found for cells in table.rows.values() for cell in cells.values()]
    grids = [grid for table in found for grid in table.grids.values()]
    numbers = sum(len(cell.values) for cell in cells) + sum(grid.size for grid in grids)
    assert numbers >= count(tree)  # more where True and False stand in a grid
    assert all(isinstance(text, str) for cell in cells for text in say("x", cell))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("loss", 2.0, "2.000"), ("annotation_accuracy", 0.4321, "43.2%"), ("perplexity", 9.876, "9.88"),
        ("code perplexity", 141.2, "141.2"), ("reconstruction PSNR", 24.31, "24.3 dB"),
        ("codes in use", 252, "252"),
        ("codes in use", 0.984, "98.4%"), ("samples", 108800, "108,800"), ("seconds", 12345.6, "12,346"),
        ("seconds", 123.456, "123.5"),
        ("seconds", -12.345, "-12.35"), ("loss", 12.3456, "12.346"), ("x", 0.0, "0.000"),
        ("strength", 1e-5, "1.00e-05"), ("x", math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_of_their_key(key, value, text):
    assert measure(key, value) == text


def test_what_is_said_of_a_cell():
    assert say("loss", Cell()) == ("–", "")
    assert say("loss", Cell(text="greedy")) == ("greedy", "")
    assert say("loss", Cell([2.0])) == ("2.000", "")
    assert say("loss", Cell([2.0], error=0.0123)) == ("2.000", "± 0.012")
    assert say("loss", Cell([2.0, 4.0, 3.3])) == ("3.100", "2.000–4.000")
    assert say("views", Cell([8, 8])) == ("8", "")
    assert say("views", Cell([8, 9])) == ("8.500", "8–9")
