import base64
import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from delvm.evaluate.report import HEIGHT, WIDTH, Report, gap_closed, headline, render, smooth, ticks

VOID = {"meta", "br", "img", "line", "polyline", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects the elements, checks that they nest, and joins each element's own text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attrs):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e["attrs"].get(k) == v for k, v in attrs.items())
        ]

    def texts(self, tag, **attrs):
        return [" ".join(e["text"].split()) for e in self.all(tag, **attrs)]


def _metrics(loss):
    return {
        "loss": loss,
        "accuracy": 0.5 - loss / 20,
        "perplexity": math.exp(loss),
        "annotation_loss": loss - 1,
        "annotation_accuracy": 0.6 - loss / 20,
        "annotation_perplexity": math.exp(loss - 1),
    }


LOSSES = {
    "teacher": {"segmentation": 2.0, "pose": 3.0},
    "student": {"segmentation": 2.5, "pose": 3.1},
    "scratch": {"segmentation": 3.0, "pose": 3.2},
}
SCORES = {model: {task: _metrics(loss) for task, loss in row.items()} for model, row in LOSSES.items()}
BALANCE = {
    "segmentation": {"samples": 850, "views": 1, "tokens_before": 108800, "tokens_after": 108800},
    "pose": {"samples": 50, "views": 17, "tokens_before": 6400, "tokens_after": 108800},
}


def _picture(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _curve(num, seed=0):
    rng = np.random.default_rng(seed)
    return [(10 * i + 10, 2.9 + 2.6 * math.exp(-i / 9) + rng.normal(0, 0.1)) for i in range(num)]


@pytest.fixture
def report():
    pictures = [("query", _picture(0)), ("truth", _picture(1)), ("student", _picture(2))]
    return Report(
        title="quickstart",
        facts=[("seed", "0"), ("student", "tiny, 0.79M")],
        balance=BALANCE,
        tokenizer={"psnr": 24.31, "codes_used": 0.984, "codebook_perplexity": 141.2},
        curves={"teacher": _curve(40), "student": _curve(25, 1), "scratch": _curve(25, 2)},
        scores=SCORES,
        pictures={"segmentation": [pictures, pictures[:2]], "pose": [pictures]},
        recipe="seed: 0\ntasks: {pose: {scene: pose}}\n",
    )


def test_table_holds_every_metric_in_order(report):
    page = Page(render(report))
    cells = page.texts("td")
    expected = []
    for task in ("segmentation", "pose"):
        for model in ("teacher", "student", "scratch"):
            for key, value in SCORES[model][task].items():
                if key.endswith("accuracy"):
                    expected.append(f"{100 * value:.1f}%")
                else:
                    expected.append(f"{value:.{2 if key.endswith('perplexity') else 3}f}")
    start = cells.index(expected[0])
    assert cells[start : start + 36] == expected
    assert page.texts("th", scope="rowgroup") == ["segmentation", "pose"]


def test_the_better_of_distilled_and_scratch_is_marked():
    scores = {
        "teacher": {"a": {"loss": 1.0, "accuracy": 0.9}},
        "student": {"a": {"loss": 2.0, "accuracy": 0.25, "annotation_loss": 1.5}},
        "scratch": {"a": {"loss": 2.5, "accuracy": 0.75, "annotation_loss": 1.5}},
    }
    best = Page(render(Report("x", scores=scores))).texts("td", **{"class": "best"})
    assert best == ["2.000", "75.0%"]  # never the teacher; a tie marks neither


def test_headline_by_hand():
    result = headline(SCORES)
    assert result["means"] == pytest.approx({"teacher": 2.5, "student": 2.8, "scratch": 3.1})
    assert result["gain"] == pytest.approx(0.3)
    assert result["gap"] == pytest.approx(0.5)
    assert result["tasks"]["segmentation"]["gain"] == pytest.approx(0.5)
    assert result["tasks"]["pose"]["gap"] == pytest.approx(0.5)


def test_headline_on_the_page(report):
    page = Page(render(report))
    sentence = page.texts("p", **{"class": "big"})[0]
    assert "0.300 nats a token better" in sentence
    assert "50% of the gap to its teacher" in sentence
    for model, value in {"teacher": "2.500", "student": "2.800", "scratch": "3.100"}.items():
        assert page.texts("dd", **{"data-mean": model}) == [value]
    assert page.texts("span", **{"class": "sum"}) == ["50% · −0.300", "50% · −0.500", "50% · −0.100"]


def test_a_student_worse_than_scratch_is_said_plainly():
    scores = SCORES | {"student": {"segmentation": _metrics(3.2), "pose": _metrics(3.25)}}
    page = Page(render(Report("x", scores=scores)))
    assert "did not help here" in page.texts("p", **{"class": "big"})[0]
    assert "0.125 nats a token worse" in page.texts("p", **{"class": "big"})[0]
    assert page.texts("span", **{"class": "sum"})[0] == "−21% · +0.125"


def test_a_teacher_no_better_than_scratch_leaves_no_gap():
    scores = SCORES | {"teacher": {"segmentation": _metrics(3.5), "pose": _metrics(3.0)}}
    page = Page(render(Report("x", scores=scores)))
    assert "of the gap" not in page.texts("p", **{"class": "big"})[0]
    assert page.texts("span", **{"class": "sum"}) == ["– · −0.300", "– · −0.500", "50% · −0.100"]


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_gap_has_its_fixed_points(scratch, student, teacher):
    gap = gap_closed(scratch, student, teacher)
    if teacher >= scratch:
        assert gap is None
    else:
        assert gap_closed(scratch, scratch, teacher) == 0
        assert gap_closed(scratch, teacher, teacher) == 1
        assert (gap < 0) == (student > scratch)


@pytest.mark.parametrize(
    "models", [["student"], ["teacher", "student"], ["student", "scratch"], ["mine"], []]
)
def test_models_may_be_missing(report, models):
    report.scores = {model: SCORES.get(model, SCORES["student"]) for model in models}
    report.curves = {model: _curve(10) for model in models}
    html = render(report)
    page = Page(html)
    assert len(page.all("dd", **{"data-mean": models[0]})) == 1 if models else "data-mean" not in html
    assert ("of the gap" in html) == ({"teacher", "student", "scratch"} <= set(models))
    assert ("nats a token better" in html) == ({"student", "scratch"} <= set(models))


def test_tasks_that_a_model_lacks_are_not_in_the_mean():
    scores = SCORES | {"teacher": {"pose": _metrics(3.0)}}
    assert headline(scores)["means"] == pytest.approx({"teacher": 3.0, "student": 3.1, "scratch": 3.2})


def test_an_empty_report_is_a_page():
    assert Page(render(Report("nothing yet"))).texts("h1") == ["nothing yet"]


def test_balance_table_and_bars(report):
    page = Page(render(report))
    cells = page.texts("td")
    for row in (["850", "1", "108,800", "108,800"], ["50", "17", "6,400", "108,800"]):
        assert any(cells[i : i + 4] == row for i in range(len(cells)))
    widths = [e["attrs"]["style"] for e in page.all("i") if "width" in e["attrs"].get("style", "")]
    assert widths == ["width:94.4%", "width:50.0%", "width:5.6%", "width:50.0%"]
    facts = page.texts("dd")
    assert {"24.3 dB", "98.4%", "141.2", "0", "tiny, 0.79M"} <= set(facts)


def _points(line):
    return [tuple(map(float, point.split(","))) for point in line["attrs"]["points"].split()]


def test_curves_stay_in_the_view_box_and_run_forward(report):
    page = Page(render(report))
    assert page.all("svg", **{"class": "chart"})[0]["attrs"]["viewbox"] == f"0 0 {WIDTH} {HEIGHT}"
    lines = [e for e in page.all("polyline") if e["attrs"].get("data-model") or "raw" in e["attrs"]["class"]]
    assert len(lines) == 6 or len(lines) == 3  # raw and smooth, or smooth alone where nothing is smoothed
    for line in lines:
        points = _points(line)
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
        assert all(a[0] < b[0] for a, b in pairwise(points))
    for text in page.all("text"):
        assert 0 <= float(text["attrs"]["x"]) <= WIDTH
        assert 0 <= float(text["attrs"]["y"]) <= HEIGHT


def test_curve_coordinates_agree_with_the_axes():
    curve = [
        (step, 6 - step / 25) for step in range(0, 101, 10)
    ]  # a line from 6 to 2; too short to be smoothed
    page = Page(render(Report("x", curves={"student": curve})))
    (line,) = page.all("polyline", **{"data-model": "student"})
    labels = {t["text"]: t["attrs"] for t in page.all("text")}
    (x0, y0), (x1, y1) = _points(line)[0], _points(line)[-1]
    assert (x0, x1) == (float(labels["0"]["x"]), float(labels["100"]["x"]))
    assert (y0, y1) == (float(labels["6"]["y"]), float(labels["2"]["y"]))
    assert "distilled, 2.000 at step 100" in " ".join(" ".join(page.texts("span")).split())


def test_long_curves_are_thinned_but_end_where_they_end(report):
    report.curves = {"student": [(step, 3.0 + 1 / step) for step in range(1, 50_001)]}
    html = render(report)
    (line,) = Page(html).all("polyline", **{"data-model": "student"})
    assert len(_points(line)) <= 402
    assert "at step 50,000" in html
    assert "mean of 2001 logged values" in " ".join(html.split())


def test_odd_curves_do_not_break_the_page():
    curves = {"a": [], "b": [(0, 1.0)], "c": [(1, math.nan), (2, math.inf)], "d": [(5, 2.0), (9, 2.0)]}
    page = Page(render(Report("x", curves=curves)))
    assert [e["attrs"]["data-model"] for e in page.all("polyline") if "data-model" in e["attrs"]] == [
        "b",
        "d",
    ]


def test_smoothing_by_hand():
    points = [(i, float(v)) for i, v in enumerate([1, 2, 6, 3, 8])]
    assert np.array(smooth(points, 1)) == pytest.approx(np.array(points))
    assert [value for _, value in smooth(points, 3)] == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])
    straight = [(i, 2.0 * i) for i in range(20)]
    assert np.array(smooth(straight, 7)[3:-3]) == pytest.approx(np.array(straight[3:-3]))  # no lag


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_range(low, span):
    found = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), abs(low + span), 1e-3)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 8
    assert all(a < b for a, b in pairwise(found))


def test_ticks_by_hand():
    assert ticks(0, 250) == [0, 50, 100, 150, 200, 250]
    assert ticks(2.85, 5.5) == [2, 3, 4, 5, 6]
    assert ticks(3, 3.02) == pytest.approx([3, 3.005, 3.01, 3.015, 3.02])


def test_pictures_decode_to_the_same_pixels(report):
    page = Page(render(report))
    images = page.all("img")
    expected = [_picture(i) for i in (0, 1, 2, 0, 1, 0, 1, 2)]
    assert len(images) == len(expected)
    for image, pixels in zip(images, expected, strict=True):
        head, _, data = image["attrs"]["src"].partition(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
        assert image["attrs"]["class"] == "px"
    assert page.texts("figcaption")[:3] == ["query", "truth", "distilled"]


def test_large_pictures_are_not_pixelated():
    page = Page(render(Report("x", pictures={"a": [[("query", _picture(0, 256))]]})))
    assert page.all("img")[0]["attrs"]["class"] == "large"


@pytest.mark.parametrize(
    "picture", [_picture(0).astype(np.float32), _picture(0)[..., 0], _picture(0)[..., :2]]
)
def test_pictures_of_another_kind_are_refused(picture):
    with pytest.raises(ValueError, match=r"pictures: .*, must be uint8 \(H, W, 3\)"):
        render(Report("x", pictures={"a": [[("query", picture)]]}))


def test_nothing_is_loaded_from_elsewhere(report):
    html = render(report)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", html))
    page = Page(html)
    assert not page.all("script") + page.all("link") + page.all("iframe")
    for element in page.elements:
        for name in ("src", "href"):
            assert element["attrs"].get(name, "data:").startswith("data:")
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["attrs"]["content"].startswith("default-src 'none'; ")


def test_text_is_escaped():
    evil = "<script>alert('x')</script>&\""
    row = {"samples": 1, "views": 1, "tokens_before": 1, "tokens_after": 1}
    report = Report(
        title=evil,
        facts=[(evil, evil)],
        balance={evil: row},
        tokenizer={evil: 1.0},
        curves={evil: _curve(3)},
        scores={"student": {evil: _metrics(1.0)}, evil: {evil: _metrics(2.0)}},
        pictures={evil: [[(evil, _picture(0))]]},
        recipe=f"name: {evil}</pre>",
    )
    page = Page(render(report))
    assert not page.all("script")
    assert page.texts("h1") == [evil]
    assert page.texts("pre") == [f"name: {evil}</pre>"]
    assert page.texts("figcaption") == [evil]
    assert page.all("img")[0]["attrs"]["alt"] == f"{evil}: {evil}"


def test_style_reaches_the_browser_unescaped(report):
    (style,) = Page(render(report)).all("style")
    assert 'system-ui,-apple-system,"Segoe UI"' in style["text"]
    assert "prefers-color-scheme:dark" in style["text"]
    assert "image-rendering:pixelated" in style["text"]


def test_a_number_of_codes_and_a_fraction_are_told_apart():
    assert "98.4%" in render(Report("x", tokenizer={"codes_used": 0.984}))
    assert "<dd>252</dd>" in render(Report("x", tokenizer={"codes_used": 252}))
