import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from delvm.evaluate.report import Group, Report, render, render_groups

VOID = {"meta", "br", "img", "line", "polyline", "circle", "link", "hr", "input"}


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
    names = [name for name in page.texts("th", scope="row", **{"class": "name"}) if name in LOSSES["teacher"]]
    assert names[:6] == ["segmentation"] * 3 + ["pose"] * 3


def test_the_better_of_distilled_and_scratch_is_marked():
    scores = {
        "teacher": {"a": {"loss": 1.0, "accuracy": 0.9}},
        "student": {"a": {"loss": 2.0, "accuracy": 0.25, "annotation_loss": 1.5}},
        "scratch": {"a": {"loss": 2.5, "accuracy": 0.75, "annotation_loss": 1.5}},
    }
    best = Page(render(Report("x", scores=scores))).texts("td", **{"class": "best"})
    assert best == ["2.000", "75.0%"]  # never the teacher; a tie marks neither


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


def test_an_empty_report_is_a_page():
    assert Page(render(Report("nothing yet"))).texts("h1") == ["nothing yet"]


def test_balance_table_and_bars(report):
    page = Page(render(report))
    cells = page.texts("td")
    for row in (["850", "1", "108,800", "108,800"], ["50", "17", "6,400", "108,800"]):
        assert any(cells[i : i + 4] == row for i in range(len(cells)))
    widths = [e["attrs"]["style"] for e in page.all("i") if "width" in e["attrs"].get("style", "")]
    assert widths == ["width:94.4%", "width:50.0%", "width:5.6%", "width:50.0%"]
    assert {"0", "tiny, 0.79M"} <= set(page.texts("dd"))
    at = cells.index("24.3 dB")
    assert cells[at : at + 3] == ["24.3 dB", "98.4%", "141.2"]


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
    assert not page.all("link") + page.all("iframe")
    for element in page.elements:
        for name in ("src", "href"):
            assert element["attrs"].get(name, "data:").startswith("data:")
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["attrs"]["content"].startswith("default-src 'none'; ")


def test_the_policy_lets_our_script_run_and_no_other(report):
    page = Page(render(report))
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["attrs"]["content"]


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
    report.scores["student"][evil]["more"] = {evil: {evil: 1.0}}
    report.tables = {evil: {evil: {evil: evil, "x": 1.0}}}
    page = Page(render_groups(evil, [Group(evil, [report, report], {evil: evil}), Group("b", [report])]))
    assert len(page.all("script")) == 1  # ours
    assert evil not in page.all("script")[0]["text"]
    assert page.texts("h1") == [evil]
    assert page.texts("pre") == [f"name: {evil}</pre>"] * 2
    assert page.texts("figcaption") == [evil] * 2
    assert page.all("img")[0]["attrs"]["alt"] == f"{evil}: {evil}"


def test_style_reaches_the_browser_unescaped(report):
    (style,) = Page(render(report)).all("style")
    assert 'system-ui,-apple-system,"Segoe UI"' in style["text"]
    assert "prefers-color-scheme:dark" in style["text"]
    assert "image-rendering:pixelated" in style["text"]


def test_a_number_of_codes_and_a_fraction_are_told_apart():
    for value, said in ((0.984, "98.4%"), (252, "252")):
        assert said in Page(render(Report("x", tokenizer={"codes_used": value}))).texts("td")


def test_curves_of_every_model(report):
    page = Page(render(report))
    assert [e["attrs"]["data-line"] for e in page.all("polyline") if "data-line" in e["attrs"]] == [
        "teacher", "student", "scratch",
    ]  # fmt: skip
    assert "mean" not in page.all("section", id="curves")[0]["text"]  # 40 points are too few to smooth
    report.curves = {"student": [(step, 3.0 + 1 / step) for step in range(1, 50_001)]}
    text = " ".join(Page(render(report)).all("section", id="curves")[0]["text"].split())
    assert "distilled, 3.000 at step 50,000" in text
    assert "mean of 2001 logged values" in text


# --- what the scores hold beside likelihoods, and other tables ---


def _table(page, *header):
    """The rows of the table that has this header, as texts."""
    rows = []
    for element in page.elements:
        if element["tag"] == "table":
            rows.append(None)
        elif element["tag"] == "tr":
            rows.append([])
        elif element["tag"] in ("th", "td"):
            rows[-1].append(" ".join(element["text"].split()))
    start = rows.index(list(header)) + 1
    return rows[start : [*rows, None].index(None, start)]


def test_nested_scores_have_tables_of_their_own(report):
    report.scores = {m: {t: dict(e) for t, e in tasks.items()} for m, tasks in SCORES.items()}
    report.scores["student"]["pose"] |= {
        "annotation_loss_se": 0.0123,
        "pck": 0.25,
        "scores": {"miou": {"truth": 0.5, "ceiling": 0.875}},
        "places": [[1.0, 2.0], [3.0, 4.0]],
    }
    page = Page(render(report))
    assert _table(page, "task", "model", "", "truth", "ceiling") == [
        ["pose", "distilled", "miou", "0.500", "0.875"]
    ]
    assert "2.100 ± 0.012" in page.texts("td")
    metrics = ["loss", "accuracy", "perplexity"]
    rows = _table(page, "task", "model", *metrics, *metrics, "pck")
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (task, model, "0.250" if (task, model) == ("pose", "distilled") else "–")
        for task in ("segmentation", "pose")
        for model in ("teacher", "distilled", "from scratch")
    ]
    (heat,) = [e for e in page.all("img") if " of pose · distilled" in e["attrs"]["alt"]]
    named = "annotation loss by place in the picture of pose · distilled, 1.00 to 4.00"
    assert heat["attrs"]["alt"] == named


def _after_examples(*losses):
    return {str(number): _metrics(loss) for number, loss in enumerate(losses)}


def test_losses_after_examples_are_a_curve():
    few, many = _after_examples(2.5, 2.0), _after_examples(2.5, 2.0, 1.75)
    scores = {
        "teacher": {"pose": {**_metrics(2), "examples": many}, "edges": {**_metrics(2), "examples": few}},
        "student": {"pose": {**_metrics(3), "examples": _after_examples(3.5, 3.0, 2.9)}},
    }
    page = Page(render(Report("run", scores=scores)))
    texts = " ".join(page.texts("span"))
    assert "teacher, 1.750 after 2" in texts
    assert "distilled, 2.900 after 2" in texts
    drawn = {line["attrs"]["data-line"]: line["attrs"]["points"].split() for line in
             page.all("polyline") if "data-line" in line["attrs"]}  # fmt: skip
    assert {name: len(points) for name, points in drawn.items()} == {"teacher": 3, "student": 3}
    heights = [float(point.split(",")[1]) for point in drawn["teacher"]]
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.3)
    assert "edges" not in page.texts("h3")  # two numbers stand in the table
    # two seeds: the mean, and a bar from one to the other
    runs = [Report("run", scores={"teacher": {"pose": {**_metrics(2), "examples": _after_examples(*losses)}}})
            for losses in ((2.5, 2.0, 1.5), (2.5, 2.2, 1.7))]  # fmt: skip
    page = Page(render_groups("seeds", [Group("a", runs)]))
    assert "teacher, 1.600 after 2" in " ".join(page.texts("span"))
    assert len(page.all("line", **{"class": "range teacher"})) == 3


def test_other_tables_are_shown_as_they_come():
    probe = {
        "models": {"student": {"ridge": {"top1": 0.338, "by_layer": {"1": 0.3, "2": 0.25}}}},
        "classes": 10,
    }
    page = Page(render(Report("x", tables={"probe": probe, "nothing": {}})))
    assert page.texts("h2") == ["probe"]
    assert _table(page, "classes") == [["10"]]
    assert _table(page, "", "", "top1") == [["student", "ridge", "0.338"]]
    assert _table(page, "", "", "1", "2") == [["student", "ridge", "0.300", "0.250"]]
    assert page.texts("h3") == ["models", "models · by layer"]


@pytest.mark.parametrize(
    "scores",
    [
        {"student": {}}, {"student": {"loss": 1.0}}, {"student": {"pose": {"miou": 0.1}}},
        {"student": {"loss": 1.0, "pose": {"loss": 1.0, "deep": {"er": {"still": [1, 2]}}}}},
        {"student": {"pose": {"loss": math.nan}}, "scratch": {"pose": {"loss": 1.0}}},
        {"ceiling": {"pose": {"scores": {"miou": 0.5}}}, **SCORES},
    ],
)  # fmt: skip
def test_scores_of_any_form_make_a_page(scores):
    page = Page(render(Report("x", scores=scores)))
    assert page.texts("h1") == ["x"]
    other = Report("y", scores=SCORES)
    assert Page(render_groups("z", [Group("a", [Report("x", scores=scores)] * 2), Group("b", [other])]))


# --- runs side by side ---


def _shifted(by):
    return {m: {t: _metrics(loss + by) for t, loss in tasks.items()} for m, tasks in LOSSES.items()}


@pytest.fixture
def groups():
    seeds = [
        Report("run", [("seed", str(seed)), ("size", "tiny")], BALANCE, scores=_shifted(by), curves={
            "student": [(step, 3.0 + by) for step in range(10, 1000, 10)]})
        for seed, by in ((0, -0.1), (1, 0.0), (2, 0.4))
    ]  # fmt: skip
    other = Report("run", [("seed", "0")], BALANCE, scores=_shifted(1.0), curves={"student": _curve(99)})
    return [
        Group("kd=1", seeds, {"student.kd_weight": "1.0"}),
        Group("kd=2", [other], {"student.kd_weight": "2.0"}),
    ]


def test_seeds_share_a_row_with_mean_and_range(groups):
    page = Page(render_groups("compared", groups))
    assert page.texts("h1") == ["compared"]
    header = ["run", "teacher", "distilled", "from scratch", "below scratch", "gap closed"]
    assert _table(page, *header) == [
        ["kd=1", "2.600 2.400–2.900", "2.900 2.700–3.200", "3.200 3.000–3.500", "0.300", "50%"],
        ["kd=2", "3.500", "3.800", "4.100", "0.300", "50%"],
    ]
    metrics = ["loss", "accuracy", "perplexity"]
    rows = _table(page, "task", "run", "model", *metrics, *metrics)
    assert [row[:4] for row in rows][:6] == [
        ["segmentation", "kd=1", "teacher", "2.100 1.900–2.400"],
        ["segmentation", "kd=1", "distilled", "2.600 2.400–2.900"],
        ["segmentation", "kd=1", "from scratch", "3.100 2.900–3.400"],
        ["segmentation", "kd=2", "teacher", "3.000"],
        ["segmentation", "kd=2", "distilled", "3.500"],
        ["segmentation", "kd=2", "from scratch", "4.000"],
    ]
    assert _table(page, "run", "seed", "size") == [["kd=1", "0, 1, 2", "tiny"], ["kd=2", "0", "–"]]
    assert _table(page, "setting", "kd=1", "kd=2") == [["student.kd_weight", "1.0", "2.0"]]


def test_seeds_of_one_group_keep_the_headline(groups):
    page = Page(render_groups("run", groups[:1]))
    assert "0.300 nats a token better" in page.texts("p", **{"class": "big"})[0]
    assert page.texts("dd", **{"class": "spread"}) == ["2.400–2.900", "2.700–3.200", "3.000–3.500"]
    assert page.texts("span", **{"class": "sum"}) == ["50% · −0.300", "50% · −0.500", "50% · −0.100"]


def test_curves_of_groups_are_the_mean_of_their_seeds(groups):
    page = Page(render_groups("x", groups))
    lines = [e["attrs"] for e in page.all("polyline")]
    assert [line["data-line"] for line in lines if "data-line" in line] == ["kd=1", "kd=2"]
    assert sum(line["class"] == "raw g0" for line in lines) == 3  # a thin one a seed
    assert "kd=1, 3.100 at step 990" in " ".join(page.texts("span"))


def test_means_are_over_the_tasks_that_all_groups_have(groups):
    groups[1].runs[0].scores = {
        m: {"pose": t["pose"], "depth": _metrics(9.0)} for m, t in _shifted(1.0).items()
    }
    page = Page(render_groups("x", groups))
    assert [row[1] for row in _table(page, "run", "teacher", "distilled", "from scratch", "below scratch",
                                     "gap closed")] == ["3.100 2.900–3.400", "4.000"]  # fmt: skip
    assert "Tasks that all runs have: pose." in " ".join(page.all("section", id="result")[0]["text"].split())
    groups[1].runs[0].scores = {m: {"depth": _metrics(9.0)} for m in LOSSES}
    text = " ".join(Page(render_groups("x", groups)).all("section", id="result")[0]["text"].split())
    assert "no task in common" in text
    assert "9.000" in text


def test_the_same_balance_is_shown_once(groups):
    def count():
        return sum(e["attrs"].get("class") == "share" for e in Page(render_groups("x", groups)).all("td"))

    assert count() == 2
    groups[1].runs[0].balance = {"pose": BALANCE["pose"]}
    assert count() == 3


def test_pictures_best_median_and_worst_of_each_group(report):
    def row(value):
        return [("truth", np.zeros((8, 8, 3), np.uint8)), ("student", np.full((8, 8, 3), value, np.uint8))]

    report.pictures = {"pose": [row(value) for value in (30, 10, 200, 20)]}
    page = Page(render_groups("x", [Group("a", [report]), Group("b", [Report("y")])]))
    assert [text.split(",")[0] for text in page.texts("p", **{"class": "rank"})] == [
        "best",
        "median",
        "worst",
    ]
    assert "1 more" in page.texts("summary")
    first = page.all("img", alt="pose: distilled")[0]["attrs"]["src"].partition(",")[2]
    assert np.array(Image.open(io.BytesIO(base64.b64decode(first))))[0, 0, 0] == 10
