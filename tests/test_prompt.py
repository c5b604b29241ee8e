"""Pairs and queries from files, through a model, to pictures."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from delvm import llama, prompt
from delvm.errors import UserError
from delvm.evaluate.prompting import GAP, LINE, SIDE, grid
from delvm.generation import complete, complete_sequences
from delvm.images.files import read_picture
from delvm.prompt import find_examples, find_pairs
from delvm.student import Student

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_CODES, TOKENS, SIZE = 16, 4, 8


def build(positions=64, vocab_size=NUM_CODES + 2, bos=NUM_CODES):
    model = llama.build("micro", vocab_size, positions, bos=bos, seed=0)
    with torch.no_grad():  # sharp, so that what it is shown matters
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


@pytest.fixture
def folders(tmp_path, tokenizer):
    """`model`, `tokenizer`, three pairs in `pairs` and two queries, some not square."""
    llama.save(build(), tmp_path / "model")
    tokenizer.save(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    for name in ("images", "annotations"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
    for name, shape in (("b", (8, 8)), ("a", (10, 8)), ("c", (16, 24))):
        for kind in ("images", "annotations"):
            write(tmp_path / "pairs" / kind / f"{name}.png", rng.integers(256, size=(*shape, 3)))
    for name in ("one", "two"):
        write(tmp_path / f"{name}.png", rng.integers(256, size=(8, 8, 3)))
    return tmp_path


def write(path, picture):
    Image.fromarray(np.asarray(picture, np.uint8)).save(path)


def beside(folders):
    """The same pairs as NAME_img beside NAME_label."""
    out = folders / "beside"
    out.mkdir()
    for kind, suffix in (("images", "img"), ("annotations", "label")):
        for file in (folders / "pairs" / kind).iterdir():
            (out / f"{file.stem}_{suffix}.png").write_bytes(file.read_bytes())
    return out


def call(folders, *more, model="model", tokenizer="tokenizer", out="out"):
    tokenizers = ["--tokenizer", str(folders / tokenizer)] if tokenizer else []
    arguments = [str(folders / model), *tokenizers, "--out", str(folders / out), *map(str, more)]
    return prompt.main(arguments)


def usual(folders):
    return ["--pairs", folders / "pairs", "--query", folders / "one.png", folders / "two.png"]


def encoded(tokenizer, *pictures):
    return tokenizer.encode(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255)


def decoded(tokenizer, codes):
    with torch.no_grad():
        return (tokenizer.decode(codes) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def expected_prompts(folders, tokenizer):
    """BOS, the pairs in order of their names, one query."""
    student, shown = Student(build(), tokenizer), []
    for name in "abc":
        shown += student.fit([folders / "pairs" / k / f"{name}.png" for k in ("images", "annotations")], name)
    pairs = encoded(tokenizer, *shown).reshape(1, -1)
    queries = encoded(tokenizer, *(read_picture(folders / f"{name}.png") for name in ("one", "two")))
    return torch.cat([torch.tensor([[NUM_CODES]] * 2), pairs.expand(2, -1), queries], 1)


# --- results ---


@pytest.mark.parametrize("layout", ["folders", "beside"])
def test_queries_are_completed_after_the_pairs_in_order_of_names(folders, tokenizer, layout, capsys):
    pairs = folders / "pairs" if layout == "folders" else beside(folders)
    assert call(folders, "--pairs", pairs, "--query", folders / "one.png", folders / "two.png") == 0
    prompts = expected_prompts(folders, tokenizer)
    expected = decoded(tokenizer, complete(build(), prompts, TOKENS, NUM_CODES))
    for number, name in enumerate(("001-one-1", "002-two-1")):
        np.testing.assert_array_equal(read_picture(folders / "out" / f"{name}.png"), expected[number])
    assert expected[0].std() > 1
    assert (expected[0] != expected[1]).any()
    assert sorted(os.listdir(folders / "out")) == ["001-one-1.png", "002-two-1.png", "grid.png"]
    assert capsys.readouterr().out == f"{folders / 'out'}: 2 pictures and grid.png\n"


def test_candidates_are_drawn_from_the_seed(folders, tokenizer):
    sampled = [*usual(folders), "--temperature", 1.5, "--top-p", 0.9, "--candidates", 2]
    assert call(folders, *sampled, "--seed", 3) == 0
    assert call(folders, *sampled, "--seed", 3, out="again") == 0
    assert call(folders, *sampled, "--seed", 4, out="other") == 0
    names = ["001-one-1.png", "001-one-2.png", "002-two-1.png", "002-two-2.png"]
    assert sorted(os.listdir(folders / "out")) == [*names, "grid.png"]
    found, again, other = ([read_picture(folders / o / n) for n in names] for o in ("out", "again", "other"))
    np.testing.assert_array_equal(found, again)
    assert np.any(np.array(found) != other)
    prompts = expected_prompts(folders, tokenizer)
    codes = complete(build(), prompts, TOKENS, NUM_CODES, temperature=1.5, top_p=0.9, seed=3)
    np.testing.assert_array_equal(found[::2], decoded(tokenizer, codes))


def test_the_grid_shows_the_pairs_then_each_query_with_its_results(folders, tokenizer):
    assert call(folders, *usual(folders), "--shots", 2) == 0
    student, kinds = Student(build(), tokenizer), ("images", "annotations")
    shown = [student.fit([folders / "pairs" / k / f"{name}.png" for k in kinds], name) for name in "ab"]
    rows = [[("a", shown[0][0]), ("pairs", shown[0][1]), ("b", shown[1][0]), ("pairs", shown[1][1])]]
    for number, name in enumerate(("one", "two"), 1):
        result = read_picture(folders / "out" / f"{number:03}-{name}-1.png")
        rows.append([(name, read_picture(folders / f"{name}.png")), ("pairs 1", result)])
    np.testing.assert_array_equal(read_picture(folders / "out" / "grid.png"), np.asarray(grid(rows)))


def test_labels_are_never_mixed_with_nearest(folders):
    stripes = np.zeros((24, 24, 3)) + 255 * (np.indices((24, 24)).sum(0) % 5 > 1)[..., None]
    for kind in ("images", "annotations"):
        write(folders / "pairs" / kind / "a.png", stripes)
    shown = []
    for more in ([], ["--nearest"]):
        assert call(folders, *usual(folders), *more) == 0
        row = read_picture(folders / "out" / "grid.png")[GAP + LINE :][:SIDE]
        shown += [set(row[:, left:][:, :SIDE].ravel()) for left in (GAP, GAP + SIDE + GAP)]
    mixed = shown[0]
    assert mixed & set(range(40, 216))
    assert shown == [mixed, mixed, mixed, {0, 255}]


@pytest.fixture
def depth(folders):
    """The images `b` and `c` once more, with another task's annotations, and one of its own."""
    rng = np.random.default_rng(1)
    for kind in ("images", "annotations"):
        (folders / "depth" / kind).mkdir(parents=True)
        write(folders / "depth" / kind / "d.png", rng.integers(256, size=(8, 8, 3)))
    for name in "bc":
        picture = read_picture(folders / "pairs" / "images" / f"{name}.png")
        write(folders / "depth" / "images" / f"{name}.png", picture)
        write(folders / "depth" / "annotations" / f"{name}.png", rng.integers(256, size=picture.shape))
    return folders / "depth"


def test_two_tasks_at_once(folders, tokenizer, depth):
    arguments = ["--pairs", folders / "pairs", "--pairs", depth, "--query", folders / "one.png"]
    assert call(folders, *arguments) == 0
    assert sorted(os.listdir(folders / "out")) == ["001-one-1-1.png", "001-one-1-2.png", "grid.png"]
    places = (("pairs", "images"), ("pairs", "annotations"), ("depth", "annotations"))
    examples = [[folders / task / kind / f"{name}.png" for task, kind in places] for name in "bc"]
    [[expected]] = Student(build(), tokenizer).complete_many(examples, [folders / "one.png"])
    for place, picture in enumerate(expected, 1):
        found = read_picture(folders / "out" / f"001-one-1-{place}.png")
        np.testing.assert_array_equal(found, np.asarray(picture))
    assert read_picture(folders / "out" / "grid.png").shape[1] == GAP + 6 * (SIDE + GAP)


def test_tasks_share_their_images(folders, depth):
    assert [*find_examples([folders / "pairs", depth])] == ["b", "c"]
    for kind in ("images", "annotations"):
        write(depth / kind / "c.png", np.zeros((16, 24, 3)))
    with pytest.raises(UserError, match=rf"--pairs: {depth}/images/c.png is not the picture {folders}/pairs"):
        find_examples([folders / "pairs", depth])
    for name in "bc":
        (depth / "images" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=f"--pairs: no image is in all of {folders}/pairs, {depth}$"):
        find_examples([folders / "pairs", depth])


def test_as_many_pairs_are_shown_as_fit(folders, capsys):
    llama.save(build(positions=25), folders / "short")  # BOS and six pictures: two pairs, query, result
    assert call(folders, *usual(folders), model="short") == 0
    assert capsys.readouterr().out.startswith("shown: the first 2 of 3 pairs; no more fit\n")
    assert call(folders, *usual(folders), "--shots", 2, out="two") == 0
    assert "no more fit" not in capsys.readouterr().out
    for name in ("001-one-1.png", "002-two-1.png"):
        assert (folders / "out" / name).read_bytes() == (folders / "two" / name).read_bytes()


def test_the_next_frames(folders, tokenizer, capsys):
    frames = ["--query", folders / "one.png", folders / "two.png"]
    assert call(folders, *frames, "--next", 3, "--temperature", 1.0, "--candidates", 2) == 0
    names = [f"{candidate:03}-next-{number:03}.png" for candidate in (1, 2) for number in (1, 2, 3)]
    assert sorted(os.listdir(folders / "out")) == [*names, "grid.png"]
    shown = encoded(tokenizer, *(read_picture(path) for path in frames[1:]))
    codes = complete_sequences(build(), shown.expand(2, -1, -1), 3, NUM_CODES, bos=NUM_CODES, temperature=1.0)
    found = [read_picture(folders / "out" / name) for name in names]
    np.testing.assert_array_equal(found, decoded(tokenizer, codes.flatten(0, 1)))
    assert read_picture(folders / "out" / "grid.png").shape[1] == GAP + 3 * (SIDE + GAP)
    assert "no more fit" not in capsys.readouterr().out


def test_more_frames_than_fit(folders, capsys):
    llama.save(build(positions=13), folders / "short")  # BOS and three pictures
    frames = [folders / name for name in ("one.png", "two.png", "one.png", "two.png")]
    assert call(folders, "--query", *frames, "--next", 2, model="short") == 0
    assert "shown: the last 2 of 4 frames; no more fit\n" in capsys.readouterr().out
    assert call(folders, "--query", *frames[2:], "--next", 2, model="short", out="last") == 0
    for name in ("001-next-001.png", "001-next-002.png"):
        assert (folders / "out" / name).read_bytes() == (folders / "last" / name).read_bytes()


def test_an_export_brings_its_tokenizer(folders, tokenizer):
    from delvm.export import export

    card = {"name": "x", "metrics": {}, "recipe": "", "data": ""}
    export(folders / "model", folders / "tokenizer", folders / "export", num_codes=NUM_CODES, card=card)
    assert call(folders, *usual(folders), model="export", tokenizer=None) == 0
    assert call(folders, *usual(folders), out="plain") == 0
    for name in ("001-one-1.png", "002-two-1.png"):
        assert (folders / "out" / name).read_bytes() == (folders / "plain" / name).read_bytes()


# --- what a user can do wrong ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "{0}/none"], "--pairs: no folder '{0}/none'"),
        (["--pairs", "{0}/empty"], "--pairs: no pairs in '{0}/empty'; expected images/ and annotations/, or"),
        (["--query", "{0}/none.png"], "{0}/none.png: unreadable picture"),
        (["--query", "{0}/broken.png"], "{0}/broken.png: unreadable picture"),
        (["--pairs", "{0}/damaged"], "{0}/damaged/x_label.png: unreadable picture"),
        (["--pairs", "{0}/lonely"], "--pairs: image without annotation: {0}/lonely/x_img.png"),
        (["--pairs", "{0}/uneven"], "{0}/uneven/x_label.png: 9x9 pixels, its image has 8x8"),
        (["--next", "2"], "--pairs, --next: give one of them; they say what to draw"),
        (["--shots", "0"], "--shots: 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature: -1.0 must be at least 0"),
        (["--top-p", "0"], "--top-p: 0.0 must be above 0 and at most 1"),
        (["--candidates", "2"], "--candidates: 2 would be equal; set a --temperature above 0"),
        (["--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--out", "{0}/one.png"], "--out: '{0}/one.png' is not a folder"),
        (["--tokenizer", "{0}/none"], "{0}/none: "),
    ],
)
def test_one_line_for_each_mistake(folders, capsys, arguments, message):
    picture = (folders / "one.png").read_bytes()
    for name in ("empty", "damaged", "lonely", "uneven"):
        (folders / name).mkdir()
        if name != "empty":
            (folders / name / "x_img.png").write_bytes(picture)
    (folders / "broken.png").write_bytes(picture[:60])
    (folders / "damaged" / "x_label.png").write_bytes(picture[:60])
    write(folders / "uneven" / "x_label.png", np.zeros((9, 9, 3)))
    given = [argument.format(folders) for argument in arguments]
    others = usual(folders)[2:] if "--pairs" in given else usual(folders)  # twice would be two tasks
    assert call(folders, *others, *given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(folders)}")
    assert error.count("\n") == 1
    assert not (folders / "out").exists()


FEWER = "pairs: 3, but beside a query and its result {} fit into the model's {} positions"


@pytest.mark.parametrize(
    ("shape", "more", "message"),
    [
        ({"vocab_size": 34}, [], "{0}/tokenizer: has 16 codes; {0}/other has a vocabulary of 34"),
        ({"vocab_size": 15, "bos": 14}, [], "{0}/tokenizer: has 16 codes; {0}/other has a vocabulary of 15"),
        ({"positions": 32}, ["--shots", 3], FEWER.format(2, 32)),
        ({"positions": 16}, [], FEWER.format(0, 16)),
    ],
)
def test_a_model_that_does_not_fit(folders, capsys, shape, more, message):
    llama.save(build(**shape), folders / "other")
    assert call(folders, *usual(folders), *more, model="other") == 2
    assert capsys.readouterr().err == f"error: {message.format(folders)}\n"
    assert not (folders / "out").exists()


def test_a_model_without_tokenizer(folders, capsys):
    llama.save(build(), folders / "alone" / "model")
    assert call(folders, *usual(folders), model="alone/model", tokenizer=None) == 2
    assert capsys.readouterr().err == (
        f"error: {folders}/alone/model: no tokenizer/ in it or beside it; name the folder of its tokenizer\n"
    )
    assert call(folders, *usual(folders), model="none", tokenizer=None) == 2
    assert capsys.readouterr().err.startswith(f"error: {folders}/none: no such folder")


def test_mistakes_with_frames(folders, capsys):
    frames = ["--query", folders / "one.png"]
    for more, message in (
        ([], "--pairs, --next: give one of them"),
        (["--next", 0], "--next: 0 must be at least 1"),
        (["--next", 1, "--nearest"], "--shots, --nearest: go with --pairs"),
        (["--next", 1, "--shots", 1], "--shots, --nearest: go with --pairs"),
    ):
        assert call(folders, *frames, *more) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    llama.save(build(positions=8), folders / "short")
    assert call(folders, *frames, "--next", 1, model="short") == 2
    assert capsys.readouterr().err == (
        "error: frames: the model's positions hold 1 pictures, not one and the next\n"
    )


def test_what_is_written_is_whole(folders, monkeypatch, capsys):
    assert call(folders, *usual(folders)) == 0
    before = (folders / "out" / "grid.png").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device", str(source))

    monkeypatch.setattr(os, "replace", full)
    assert call(folders, *usual(folders), "--temperature", 1) == 2
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert (folders / "out" / "grid.png").read_bytes() == before
    assert sorted(os.listdir(folders / "out")) == ["001-one-1.png", "002-two-1.png", "grid.png"]


def test_names_decide_the_order(tmp_path):
    for name in ("2_img", "2_label", "10_img", "10_label", "1_img", "1_label", "0_label"):
        write(tmp_path / f"{name}.png", np.zeros((2, 2, 3)))
    found = find_pairs(tmp_path)
    assert [*found] == ["1", "10", "2"]
    assert found["10"] == [tmp_path / "10_img.png", tmp_path / "10_label.png"]
    with pytest.raises(UserError, match="no folder"):
        find_pairs(tmp_path / "none")
