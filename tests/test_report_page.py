import math
import shutil

import numpy as np
import pytest

from delvm.evaluate.report import Group, Report, render_groups

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


def _run(by):
    rng = np.random.default_rng(int(100 * by))
    losses = {"teacher": 2.0, "student": 2.5, "scratch": 3.0}
    metrics = ("loss", "perplexity", "annotation_loss", "annotation_perplexity")
    scores = {
        model: {
            task: {
                **dict.fromkeys(metrics, loss + by + shift),
                "accuracy": 0.1,
                "scores": {"miou": {"truth": by}},
            }
            for task, shift in (("segmentation_of_everything", 0.0), ("pose", 1.0), ("edges", -0.5))
        }
        for model, loss in losses.items()
    }
    captions = ("example", "annotation", "query", "truth", "teacher", "scratch", "student")
    row = [(name, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for name in captions]
    return Report(
        "quickstart",
        facts=[("seed", "0"), ("teacher", "/a/long/path/to/" + 8 * "a-teacher-somewhere/" + "teacher")],
        balance={"pose": {"samples": 50, "views": 17, "tokens_before": 6400, "tokens_after": 108800}},
        tokenizer={"psnr": 21.1, "codes_used": 255, "codebook_perplexity": 128.7},
        curves={
            model: [(10 * i, loss + 3 * math.exp(-i / 9)) for i in range(1, 60)]
            for model, loss in losses.items()
        },
        scores=scores,
        pictures={"pose": [row] * 4},
        tables={
            "probe": {"student": {"top1": 0.3, "top5": 0.8, "by_layer": {str(i): i / 9 for i in range(9)}}}
        },
        recipe="name: quickstart\n" + "tasks: {pose: {scene: pose}}  # " + 20 * "and so on " + "\n",
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    groups = [
        Group("student.kd_weight=1.0", [_run(0.0), _run(0.2)], {"student.kd_weight": "1.0"}),
        Group("student.kd_weight=2.0", [_run(0.1)], {"student.kd_weight": "2.0"}),
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_groups("Two weights", groups), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, file):
    """Opens the page; afterwards nothing may have been said on the console or asked of the network."""
    pages = []

    def opened(**options):
        page = browser.new_context(**options).new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        pages.append((page, said, asked))
        return page

    yield opened
    for page, said, asked in pages:
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        page.context.close()


def _column(page, place):
    return page.locator("#result tbody tr").evaluate_all(
        "(rows, place) => rows.map((row) => row.cells[place].firstChild.textContent.trim())", place
    )


def test_a_header_sorts_its_column(open_page):
    page = open_page()
    header = page.locator("#result th[scope=col]", has_text="distilled")
    assert _column(page, 2) == ["2.767", "2.767"]  # as the groups come: mean of 0.0 and 0.2, and 0.1
    scores = page.locator("#scores table").first
    losses = "(rows) => rows.map((row) => row.cells[3].firstChild.textContent.trim())"
    before = scores.locator("tbody tr").evaluate_all(losses)
    scores.locator("th button", has_text="loss").first.click()
    ascending = scores.locator("tbody tr").evaluate_all(losses)
    assert ascending != before
    assert ascending == sorted(before, key=float)
    assert scores.locator("th[aria-sort=ascending]").count() == 1
    scores.locator("th button", has_text="loss").first.click()
    assert scores.locator("tbody tr").evaluate_all(losses) == sorted(before, key=float, reverse=True)
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"


def test_names_sort_as_words(open_page):
    page = open_page()
    scores = page.locator("#scores table").first
    scores.locator("th button", has_text="task").click()
    names = "(rows) => rows.map((row) => row.cells[0].textContent.trim())"
    assert scores.locator("tbody tr").evaluate_all(names) == sorted(
        6 * ["edges", "pose", "segmentation_of_everything"]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(open_page, scheme):
    page = open_page(viewport={"width": 375, "height": 800}, color_scheme=scheme, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    for details in page.locator("details").all():
        details.evaluate("(element) => { element.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(251, 250, 248)") == (scheme == "light")


def test_without_javascript_everything_is_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("th button").count() == 0
    assert page.locator("#result tbody tr").count() == 2
    assert page.locator("#curves svg.chart").count() == 3
    assert page.locator("#result").inner_text().count("2.767") == 2
