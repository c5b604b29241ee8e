import io
import re

import pytest
from rich.console import Console

from delvm import console
from delvm.console import show_plan, show_scores, table
from delvm.tokens.balance import BalanceConfig, plan, summary

QUICKSTART = {"segmentation": 850, "deraining": 100, "pose": 50}
PAIR = dict.fromkeys(QUICKSTART, 2 * 64)  # image tokens of a pair of the quickstart
MODELS = ["teacher", "scratch", "student"]


@pytest.fixture
def printed(monkeypatch):
    """Calls a function and returns the lines that it prints, on a terminal this wide."""

    def lines(function, *arguments, width=100):
        file = io.StringIO()
        monkeypatch.setattr(console, "console", Console(file=file, width=width))
        function(*arguments)
        return file.getvalue().rstrip("\n").split("\n")

    return lines


def _cells(line):
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def _rows(lines):
    """(titles, [cells of a row]): what stands in a printed table."""
    return next(_cells(line) for line in lines if "┃" in line), [
        _cells(line) for line in lines if "│" in line
    ]


def _scores(loss, accuracy, perplexity, annotation_loss, annotation_accuracy, annotation_perplexity):
    return {
        "loss": loss,
        "accuracy": accuracy,
        "perplexity": perplexity,
        "annotation_loss": annotation_loss,
        "annotation_accuracy": annotation_accuracy,
        "annotation_perplexity": annotation_perplexity,
    }


def test_a_table(printed):
    rows = [("teacher", 1_820_544, "tiny"), ("student", 7, 0.5)]
    lines = printed(table, "models", ["model", "parameters", "size"], rows)
    assert lines[0].rstrip() == "models"
    assert _rows(lines) == (
        ["model", "parameters", "size"],
        [["teacher", "1,820,544", "tiny"], ["student", "7", "0.5"]],
    )
    # text to the left, numbers to the right
    assert "│ student │          7 │  0.5 │" in lines


def test_a_table_without_rows(printed):
    assert _rows(printed(table, "models", ["model", "size"], [])) == (["model", "size"], [])


def test_the_plan_of_the_quickstart(printed):
    plans = plan(QUICKSTART, PAIR, BalanceConfig())
    lines = printed(show_plan, summary(plans, PAIR))
    assert lines[0].rstrip() == "balance"
    assert _rows(lines) == (
        ["task", "samples", "views", "drawn", "tokens", "", "after", ""],
        [
            ["segmentation", "850", "1", "850", "108,800", "85%", "108,800", "34%"],
            ["deraining", "100", "8", "800", "12,800", "10%", "102,400", "32%"],
            ["pose", "50", "17", "850", "6,400", "5%", "108,800", "34%"],
        ],
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("resample", ["100", "1", "800", "12,800", "10%", "102,400", "32%"]),
        ("none", ["100", "1", "100", "12,800", "10%", "12,800", "10%"]),
    ],
)
def test_the_plan_of_other_strategies(printed, strategy, expected):
    plans = plan(QUICKSTART, PAIR, BalanceConfig(strategy=strategy))
    assert _rows(printed(show_plan, summary(plans, PAIR)))[1][1] == ["deraining", *expected]


def test_one_task_has_every_token(printed):
    tokens = {"pose": 10}
    plans = plan({"pose": 3}, tokens, BalanceConfig(head_views=4))
    lines = printed(show_plan, summary(plans, tokens))
    assert _rows(lines)[1] == [["pose", "3", "4", "12", "30", "100%", "120", "100%"]]


def test_scores_by_task_and_model(printed):
    scores = {
        "scratch": {
            "pose": _scores(2.5, 0.25, 12.18249, 1.25, 0.5, 3.49034),
            "edges": _scores(4.0, 0.1, 54.59815, 3.0004, 0.2, 20.0936),
        },
        "student": {
            "pose": _scores(2.0, 0.30049, 7.389056, 1.0, 0.55051, 2.718282),
            "edges": _scores(3.0, 0.0, 20.085537, 2.0, 1.0, 7.389056),
        },
    }
    lines = printed(show_scores, scores)
    assert lines[0].rstrip() == "held-out sentences: all codes / annotation codes"
    assert _rows(lines) == (
        ["task", "model", "loss", "accuracy", "perplexity"],
        [
            ["pose", "scratch", "2.500 / 1.250", "0.250 / 0.500", "12.182 / 3.490"],
            ["pose", "student", "2.000 / 1.000", "0.300 / 0.551", "7.389 / 2.718"],
            ["edges", "scratch", "4.000 / 3.000", "0.100 / 0.200", "54.598 / 20.094"],
            ["edges", "student", "3.000 / 2.000", "0.000 / 1.000", "20.086 / 7.389"],
            # every task counts the same; a mean of perplexities would say nothing
            ["mean", "scratch", "3.250 / 2.125", "", ""],
            ["mean", "student", "2.500 / 1.500", "", ""],
        ],
    )


def test_three_tasks_and_three_models_fit_into_80_columns(printed):
    worst = _scores(9.011, 0.123, 8192.0, 9.011, 0.987, 8192.0)  # 8192 codes, nothing learnt
    scores = {model: dict.fromkeys(QUICKSTART, worst) for model in MODELS}
    large = dict.fromkeys(QUICKSTART, 2 * 256)
    plans = {
        strategy: summary(plan(QUICKSTART, large, BalanceConfig(strategy=strategy)), large)
        for strategy in ("augment", "resample")
    }
    for function, argument, num_rows in (
        (show_scores, scores, 12),
        (show_plan, plans["augment"], 3),
        (show_plan, plans["resample"], 3),
    ):
        wide, narrow = (printed(function, argument, width=width) for width in (200, 80))
        assert max(map(len, narrow)) <= 80
        assert _rows(narrow) == _rows(wide)
        assert len(_rows(narrow)[1]) == num_rows
        assert "…" not in "".join(narrow)


def test_paths_are_printed_as_they_are(capsys):
    # to rich, [raw] is a style, [/old] the end of one, :smile: a face
    message = "skipped: photos [raw]/[/old]/10:smile:20.jpg: unreadable picture"
    console.console.print(message, soft_wrap=True)
    assert capsys.readouterr().out == f"{message}\n"
