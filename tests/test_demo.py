"""The page: what its parts do, and the whole of it in a browser that knows no network."""

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from delvm import llama, prompt
from delvm.demo.__main__ import find_models, main
from delvm.demo.examples import SAMPLES, write_examples
from delvm.demo.prompt import Model, Settings, Upload, draw, python_code, read_prompt, shell_code, write_zip
from delvm.errors import UserError
from delvm.evaluate.prompting import save_pictures
from delvm.images.files import read_picture
from delvm.images.scenes import Scenes
from delvm.student import UNDRAWN, Student, load
from tests.processes import PATIENCE

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUM_CODES, SIZE = 16, 8
PAIRS = 2  # that fit into the models' positions


def save_model(folder, seed, positions=1 + 4 * (2 * PAIRS + 2)):
    model = llama.build("micro", NUM_CODES + 2, positions, bos=NUM_CODES, seed=seed)
    with torch.no_grad():  # sharp, so that what it is shown matters
        for parameter in model.parameters():
            parameter.mul_(3.0)
    llama.save(model, folder)


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run's folder: teacher, student and tokenizer, and two rows of held-out pictures of a task `grey`."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    save_model(folder / "teacher", seed=1)
    save_model(folder / "student", seed=2)
    tokenizer.save(folder / "tokenizer")
    captions = ("example", "annotation", "query", "truth", "student")
    rows = [[(name, picture(10 * row + n)) for n, name in enumerate(captions)] for row in range(2)]
    save_pictures(folder / "evaluate" / "pictures", {"grey": rows})
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a user has: two pairs, two queries; a text that says it is a picture, and a smaller picture."""
    folder = tmp_path_factory.mktemp("files")
    names = ["cat.png", "cat edges.png", "owl.png", "owl edges.png", "fox.png", "hen.png"]
    for seed, name in enumerate(names):
        Image.fromarray(picture(seed)).save(folder / name)
    Image.fromarray(picture(0, size=4)).save(folder / "small.png")
    (folder / "broken.png").write_text("no picture")
    return {path.name: path for path in folder.iterdir()}


SETTINGS = Settings(temperature=1.5, top_p=0.9, seed=5, nearest=False)


def prompt_of(files, query="fox.png", settings=SETTINGS, pairs=("cat.png", "cat edges.png")):
    slots = [Upload(files[name], name) for name in pairs]
    return read_prompt(slots, Upload(files[query], query), settings)


def expected(model, files, query="fox.png", *, temperature=1.5, top_p=0.9, seed=5):
    pair = (files["cat.png"], files["cat edges.png"])
    found = load(model).complete([pair], files[query], temperature=temperature, top_p=top_p, seed=seed)
    return np.asarray(found)


# --- drawing ---


def test_models_take_turns_at_the_same_prompt(run, files):
    models = {name: Model(load(run / name), run / name) for name in ("teacher", "student")}
    found = list(draw(models, prompt_of(files)))
    assert [drawing.model for drawing in found] == ["teacher", "student"] * 2  # two rows of codes each
    for place, name in enumerate(models):
        first, last = found[place::2]
        np.testing.assert_array_equal(np.asarray(last.picture), expected(run / name, files))
        lower = np.asarray(first.picture)[SIZE // 2 :]
        np.testing.assert_array_equal(lower, np.broadcast_to(np.uint8(UNDRAWN), lower.shape))
        assert 0 < first.seconds < last.seconds
    assert (np.asarray(found[2].picture) != np.asarray(found[3].picture)).any()


def test_a_models_size_counts_tied_weights_once(run):
    student = load(run / "student")
    numbers = sum(parameter.numel() for parameter in student.model.parameters())
    assert Model(student, run).size == f"{numbers / 1e6:.2f}M parameters, {4 * numbers / 1e6:.1f} MB"
    half = Student(student.model.to(torch.bfloat16), student.tokenizer)
    assert Model(half, run).size.endswith(f", {2 * numbers / 1e6:.1f} MB")


def test_half_a_pair_no_pair_and_no_query_are_refused(files):
    cat, edges = (Upload(files[name], name) for name in ("cat.png", "cat edges.png"))
    with pytest.raises(UserError, match=r"^pair 2: an image without its annotation$"):
        read_prompt([cat, edges, cat, None], cat, SETTINGS)
    with pytest.raises(UserError, match=r"^pair 1: an annotation without its image$"):
        read_prompt([None, edges], cat, SETTINGS)
    with pytest.raises(UserError, match=r"^no pair of an image and its annotation: at least one shows"):
        read_prompt([None, None], cat, SETTINGS)
    with pytest.raises(UserError, match=r"^no query: the picture to be annotated$"):
        read_prompt([cat, edges], None, SETTINGS)


def test_empty_pairs_are_passed_over_and_equal_names_told_apart(files):
    same = [Upload(files[name], "image.png") for name in ("cat.png", "cat edges.png", "fox.png")]
    found = read_prompt([None, None, *same[:2]], same[2], SETTINGS)
    assert [upload.name for upload in found.uploads] == ["image.png", "image-2.png", "image-3.png"]
    assert [upload.path for upload in found.uploads] == [upload.path for upload in same]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"temperature": None}, "temperature: must be a number"),
        ({"top_p": "x"}, "top_p: must be a number"),
        ({"seed": 1.5}, "seed: must be a whole number, at least 0"),
        ({"seed": -1}, "seed: must be a whole number, at least 0"),
        ({"seed": None}, "seed: must be a whole number, at least 0"),
    ],
)
def test_settings_that_are_none_are_refused(wrong, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        Settings(**({"temperature": 1.0, "top_p": 1.0, "seed": 0, "nearest": False} | wrong))


def test_what_cannot_be_shown_is_named_as_the_user_names_it(run, files):
    models = {"student": Model(load(run / "student"), run / "student")}
    for name, line in (
        ("broken.png", r"^broken.png: unreadable picture \(not a picture\)$"),
        ("small.png", "^small.png: 4x4 pixels, its image has 8x8$"),
    ):
        with pytest.raises(UserError, match=line):
            next(draw(models, prompt_of(files, pairs=("cat.png", name))))


# --- code ---


@pytest.fixture
def unpacked(files, tmp_path, monkeypatch):
    """A working folder with the pictures of a prompt, as they are handed out."""
    write_zip(tmp_path / "pictures.zip", prompt_of(files))
    with ZipFile(tmp_path / "pictures.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("said", [True, False])
def test_the_python_code_draws_the_same_again(run, files, unpacked, said):
    tokenizer = run / "tokenizer" if said else None
    names = {}
    code = python_code(Model(load(run / "student"), run / "student", tokenizer), prompt_of(files))
    assert len(code.splitlines()) == 3
    assert (str(tokenizer) in code) == said
    exec(code, names)
    np.testing.assert_array_equal(np.asarray(names["picture"]), expected(run / "student", files))


def test_the_command_draws_the_same_again(run, files, unpacked):
    code = shell_code(
        Model(load(run / "student"), run / "student", run / "tokenizer"), prompt_of(files)
    ).splitlines()
    subprocess.run(["sh", "-e"], input="\n".join(code[:-1]), text=True, check=True)
    python, flag, module, *arguments = shlex.split(code[-1])
    assert (python, flag, module) == ("python", "-m", "delvm.prompt")
    assert prompt.main(arguments) == 0
    np.testing.assert_array_equal(
        read_picture(unpacked / "drawn" / "001-fox-1.png"), expected(run / "student", files)
    )


def test_code_says_when_colours_are_labels(run, files):
    labels = Settings(temperature=0.0, top_p=1.0, seed=0, nearest=True)
    model, shown = Model(load(run / "student"), run / "student"), prompt_of(files, settings=labels)
    assert python_code(model, shown).endswith("seed=0, nearest=True)\n")
    assert shell_code(model, shown).endswith("--seed 0 --nearest\n")


# --- examples ---


def test_a_runs_own_pairs_come_first_and_scenes_are_drawn(run, tmp_path):
    found = write_examples(tmp_path, run, 8)
    assert list(found) == ["grey", "segmentation", "deraining", "pose"]
    assert [image.name for image, _ in found["grey"]] == [f"grey-{n}.png" for n in (1, 2, 3, 4)]
    for files, seeds in zip(found["grey"], ((0, 1), (2, 3), (10, 11), (12, 13)), strict=True):
        for file, seed in zip(files, seeds, strict=True):
            np.testing.assert_array_equal(read_picture(file), picture(seed))
    drawn = Scenes("pose", SAMPLES, "validation", seed=0, size=16)[2]
    for file, scene in zip(found["pose"][2], drawn, strict=True):
        np.testing.assert_array_equal(read_picture(file), scene)
    assert found["pose"][2][1] == tmp_path / "pose-3-annotation.png"


def test_a_task_of_the_run_stands_for_the_scene_of_its_name(tmp_path):
    rows = {"pose": [[("example", picture(0)), ("annotation", picture(1)), ("query", picture(2))]]}
    save_pictures(tmp_path / "run" / "evaluate" / "pictures", rows)
    found = write_examples(tmp_path, tmp_path / "run", 8)
    assert list(found) == ["pose", "segmentation", "deraining"]
    np.testing.assert_array_equal(read_picture(found["pose"][0][1]), picture(1))


# --- the command ---


def test_which_models_a_folder_stands_for(run, tmp_path):
    both = {"teacher": run / "teacher", "student": run / "student"}
    assert list(find_models(run, None).items()) == list(both.items())
    assert find_models(run / "student", None) == {"student": run / "student"}
    assert list(find_models(tmp_path, run / "teacher").items()) == [
        ("teacher", run / "teacher"),
        ("student", tmp_path),
    ]
    assert find_models(run, tmp_path) == {**both, "teacher": tmp_path}


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").rstrip("\n")


def test_what_is_wrong_with_a_folder_ends_in_one_line(run, tmp_path, capsys):
    port = ["--port", free_port()]
    assert refused(capsys, tmp_path / "gone", *port).startswith(f"{tmp_path / 'gone'}: ")
    save_model(tmp_path / "alone", seed=0)
    assert refused(capsys, tmp_path / "alone", *port).startswith(f"{tmp_path / 'alone'}: no tokenizer/ in it")
    save_model(tmp_path / "short", seed=0, positions=13)
    line = refused(capsys, tmp_path / "short", "--tokenizer", run / "tokenizer", *port)
    assert line == (
        f"{tmp_path / 'short'}: its positions hold 3 pictures, not a pair, a query and its annotation"
    )


def test_a_port_that_is_taken_or_none(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(capsys, run, "--port", port) == (
            f"--port: {port} cannot be had (Address already in use); give another"
        )
    assert refused(capsys, run, "--port", 65536) == "--port: 65536, must be in 1..65535"


def test_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refused(capsys, run, "--port", free_port())
    assert line == 'gradio is missing: pip install -e ".[demo]"'


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- in a browser ---


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """Where the program serves the run. It ends quietly by Ctrl-C, having asked nothing of the network."""
    pytest.importorskip("gradio", reason='pip install -e ".[demo]"')
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    with socket.socket() as proxy:  # what asks another machine is sent here
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads")),
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy.getsockname()[1]}",
        }  # fmt: skip
        server = subprocess.Popen(
            [sys.executable, "-m", "delvm.demo", str(run), "--port", str(free_port())],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        try:
            line = server.stdout.readline()
            found = re.fullmatch(r"teacher, student: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
            if not found:
                server.kill()
            assert found, line + server.stderr.read()
            yield found[1]
            server.send_signal(signal.SIGINT)
            assert server.communicate(timeout=PATIENCE) == ("", "")
            assert server.returncode == 130
            proxy.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody is waiting
                proxy.accept()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page for another user; afterwards nothing may have been asked of other machines."""
    contexts, asked = [], []

    def opened(**options):
        context = browser.new_context(**options)
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        page = context.new_page()
        page.goto(address)
        page.locator("#draw").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def give(page, slot, file):
    """Put a file in the place of what a slot shows."""
    place = page.locator(f"#{slot}")
    if place.locator("img").count():
        place.get_by_label("Remove Image").click()
    place.locator("input[type=file]").set_input_files(file)


def give_prompt(page, files, query="fox.png"):
    """The cat's pair and a query, in place of the examples; drawn from the seed 5."""
    give(page, "image-1", files["cat.png"])
    give(page, "annotation-1", files["cat edges.png"])
    for slot in ("image-2", "annotation-2"):
        page.locator(f"#{slot}").get_by_label("Remove Image").click()
    give(page, "query", files[query])
    page.get_by_label("temperature").fill("1.5")
    page.get_by_label("seed").fill("5")
    for slot in ("image-1", "annotation-1", "query"):
        page.locator(f"#{slot} img").wait_for()


def shown(page, place):
    """The picture of a slot or a result, as the browser has it."""
    source = page.locator(f"#{place} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def wait_until_drawn(page):
    page.get_by_text("The same in code (student)").wait_for()


def test_uploads_are_completed_by_both_models(open_page, run, files):
    page = open_page()
    give_prompt(page, files)
    page.locator("#draw").click()
    wait_until_drawn(page)
    for name in ("teacher", "student"):
        np.testing.assert_array_equal(shown(page, f"drawn-{name}"), expected(run / name, files))
        said = page.get_by_text(re.compile(rf"^{name} · ")).inner_text()
        assert re.fullmatch(rf"{name} · 0\.03M parameters, 0\.1 MB · \d+\.\d\d\ss", said)
    page.get_by_text("The same in code (student)").click()
    page.locator(".cm-content").last.wait_for()
    python, shell = page.locator(".cm-content").all_inner_texts()
    given = 'student.complete([("cat.png", "cat edges.png")], "fox.png", temperature=1.5, top_p=0.9, seed=5)'
    assert given in python
    assert "cp 'cat edges.png' pairs/annotations/01.png" in shell
    with page.expect_download() as download:
        page.get_by_text("Download its pictures").click()
    with ZipFile(download.value.path()) as archive:
        assert sorted(archive.namelist()) == ["cat edges.png", "cat.png", "fox.png"]
        assert archive.read("fox.png") == files["fox.png"].read_bytes()


def test_a_bad_file_is_named_and_taken_out(open_page, files):
    page = open_page()
    give(page, "query", files["broken.png"])
    page.get_by_text("broken.png: unreadable picture (not a picture)").wait_for()
    page.locator("#query input[type=file]").wait_for(state="attached")
    page.locator("#draw").click()
    page.get_by_text("no query: the picture to be annotated").wait_for()


def test_an_annotation_of_another_size_is_named(open_page, files):
    page = open_page()
    give_prompt(page, files)
    give(page, "annotation-1", files["small.png"])
    page.locator("#annotation-1 img").wait_for()
    page.locator("#draw").click()
    page.get_by_text("small.png: 4x4 pixels, its image has 8x8").wait_for()
    assert "Traceback" not in page.content()


def test_two_users_at_once_get_their_own(open_page, run, files):
    pages = {query: open_page() for query in ("fox.png", "hen.png")}
    for query, page in pages.items():
        give_prompt(page, files, query)
    for page in pages.values():
        page.locator("#draw").click()
    for query, page in pages.items():
        wait_until_drawn(page)
        np.testing.assert_array_equal(shown(page, "drawn-student"), expected(run / "student", files, query))
    fox, hen = (shown(page, "drawn-student") for page in pages.values())
    assert (fox != hen).any()


def test_a_task_brings_its_examples(open_page):
    page = open_page()
    own = [picture(seed).tobytes() for seed in (0, 2, 10, 12)]
    before = [shown(page, slot).tobytes() for slot in ("image-1", "image-2", "query")]
    assert len(set(before)) == 3  # the run's own task comes first: different pairs, and a query of its own
    assert set(before) <= set(own)
    page.get_by_role("button", name="pose").click()
    scenes = Scenes("pose", SAMPLES, "validation", seed=0, size=16)
    drawn = [scenes[number][0].tobytes() for number in range(SAMPLES)]
    page.wait_for_function("document.querySelector('#query img').src.includes('pose')")
    after = [shown(page, slot).tobytes() for slot in ("image-1", "image-2", "query")]
    assert len(set(after)) == 3
    assert set(after) <= set(drawn)


def test_a_phone_shows_it_without_scrolling_sideways(open_page):
    page = open_page(viewport={"width": 375, "height": 800}, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    tops = [page.locator(f"#{slot}").bounding_box()["y"] for slot in ("image-1", "query", "drawn-student")]
    assert all(upper < lower for upper, lower in pairwise(tops))
