"""Questions in pictures: read, encoded, answered and counted."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate.choice import (
    Item,
    Question,
    accuracies,
    candidate_losses,
    encode_items,
    read_items,
    read_lvm_questions,
    wilson,
)
from delvm.tokenizer import training
from delvm.tokens.formats import read_lvm, write_lvm
from tools import make_choices


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcde":
        picture = rng.integers(256, size=(4, 6, 3)).astype(np.uint8)
        Image.fromarray(picture).resize((12, 10), 0).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def model():
    return llama.build("micro", 18, 20, bos=16, eos=17, seed=0)


def write(file, *lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


GOOD = {"context": ["a.png", "b.png"], "candidates": ["c.png", "d.png"], "answer": 1, "group": "colour"}


def test_items_of_a_file(folder):
    file = write(folder / "items.jsonl", GOOD, {k: v for k, v in GOOD.items() if k != "group"})
    found = read_items(file)
    context, candidates = [folder / "a.png", folder / "b.png"], [[folder / "c.png"], [folder / "d.png"]]
    assert found == [
        Item(f"{file}, line 1", context, candidates, 1, "colour"),
        Item(f"{file}, line 2", context, candidates, 1, ""),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes)"),
        ("", "not JSON (Expecting value)"),
        ("[1]", "not a JSON object"),
        ({"context": ["a.png"]}, "candidates: None must be a list of paths"),
        ({**GOOD, "context": []}, "context: [] must be a list of paths"),
        ({**GOOD, "context": ["a.png", 3]}, "context: ['a.png', 3] must be a list of paths"),
        ({**GOOD, "context": ["z.png"]}, "context: no file '{folder}/z.png'"),
        ({**GOOD, "candidates": ["c.png"]}, "candidates: 1, must be at least 2"),
        ({**GOOD, "answer": 2}, "answer: 2 must be in 0..1"),
        ({**GOOD, "answer": True}, "answer: True must be in 0..1"),
        ({**GOOD, "answer": None}, "answer: None must be in 0..1"),
        ({**GOOD, "group": 4}, "group: 4 is no text"),
        ({**GOOD, "group": "all"}, "group: 'all' is a name of what is counted; choose another"),
    ],
)
def test_lines_that_are_no_questions(folder, line, message):
    file = folder / "items.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_text(json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(UserError) as error:
        read_items(file)
    assert str(error.value) == f"{file}, line 2: " + message.replace("{folder}", str(folder))


def test_a_line_that_is_nested_too_deeply(tmp_path, tokenizer):
    file = tmp_path / "items.jsonl"
    for text in ("[" * 100_000, '{"tokens": ' + "[" * 100_000):
        file.write_text(text + "\n")
        for read in (
            read_items,
            lambda file: read_lvm_questions(file, tokenizer),
            lambda file: [*read_lvm(file)],
        ):
            with pytest.raises(
                UserError, match=r"^\S+items\.jsonl, line 1: not JSON \(maximum recursion depth"
            ):
                read(file)


def test_files_that_cannot_be_read(folder, tokenizer):
    for read in (read_items, lambda file: read_lvm_questions(file, tokenizer)):
        with pytest.raises(UserError, match=r"none\.jsonl: unreadable \(No such file or directory\)$"):
            read(folder / "none.jsonl")
        with pytest.raises(UserError, match=r"empty\.jsonl: is empty$"):
            read(write(folder / "empty.jsonl"))


def test_pictures_become_the_tokenizers_codes(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(training, "PASS_PICTURES", 3)
    sizes, whole = [], tokenizer.encode
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda images: sizes.append(len(images)) or whole(images))
        (question,) = encode_items(read_items(write(folder / "items.jsonl", GOOD)), tokenizer)
    assert sizes == [3, 1]  # passes of the network as for a store

    def codes(name):  # 8 px, bicubic, whatever the aspect
        picture = Image.open(folder / f"{name}.png").resize((8, 8), Image.Resampling.BICUBIC)
        return tokenizer.encode(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0]

    assert torch.equal(question.context, torch.cat([codes("a"), codes("b")]))
    assert torch.equal(question.candidates, torch.stack([codes("c"), codes("d")]))
    assert not torch.equal(codes("c"), codes("d"))


def test_a_broken_picture_is_named(folder, tokenizer):
    (folder / "c.png").write_bytes(b"no picture")
    items = read_items(write(folder / "items.jsonl", GOOD))
    with pytest.raises(UserError, match=r"c\.png: unreadable picture"):
        encode_items(items, tokenizer)


def test_lvms_examples_of_pictures(folder, tokenizer):
    line = {"input": ["a.png", "b.png", "c.png"], "target": ["d.png", "e.png"]}
    (found,) = read_lvm_questions(write(folder / "lvm.jsonl", line), tokenizer)
    items = [Item("", [folder / f"{n}.png" for n in "abc"], [[folder / "d.png", folder / "e.png"]])]
    (expected,) = encode_items(items, tokenizer)
    assert torch.equal(found.context, expected.context)
    assert torch.equal(found.candidates, expected.candidates)
    assert found.candidates.shape == (1, 8)
    with pytest.raises(UserError, match=r"lvm\.jsonl, line 2: target: None must be a list of paths$"):
        read_lvm_questions(write(folder / "lvm.jsonl", line, {"input": ["a.png"]}), tokenizer)


def test_lvms_examples_of_tokens(tmp_path, tokenizer):
    file = tmp_path / "lvm.jsonl"
    write_lvm(file, [np.arange(12), np.arange(8, 16)])
    found = read_lvm_questions(file, tokenizer)  # 4 tokens a picture
    assert [question.place for question in found] == [f"{file}, line 1", f"{file}, line 2"]
    assert [question.context.tolist() for question in found] == [list(range(8)), [8, 9, 10, 11]]
    assert [question.candidates.tolist() for question in found] == [[[8, 9, 10, 11]], [[12, 13, 14, 15]]]
    for tokens, message in (
        (np.arange(10), "line 1: 10 tokens, must be pictures of 4, two or more"),
        (np.arange(4), "line 1: 4 tokens, must be pictures of 4, two or more"),
        (np.arange(9, 17), "line 1: code 16, the tokenizer has 16"),
    ):
        write_lvm(file, [tokens])
        with pytest.raises(UserError, match=message):
            read_lvm_questions(file, tokenizer)
    file.write_text('{"tokens": "?"}\n')
    with pytest.raises(UserError, match=r"lvm\.jsonl, line 1: tokens: not base64"):
        read_lvm_questions(file, tokenizer)


@pytest.mark.parametrize("bos", [None, 16])
def test_losses_are_those_of_the_whole_sentence(model, bos):
    generator = torch.Generator().manual_seed(0)
    questions = [
        Question("one", *(torch.randint(16, size, generator=generator) for size in ((8,), (3, 4)))),
        Question("two", *(torch.randint(16, size, generator=generator) for size in ((3,), (2, 8)))),
    ]
    seen: list[int] = []
    found = candidate_losses(model, questions, bos=bos, progress=seen.append)
    assert seen == [1, 1]
    assert [loss.shape for loss in found] == [(3,), (2,)]
    for question, losses in zip(questions, found, strict=True):
        begin = question.context if bos is None else torch.cat([torch.tensor([bos]), question.context])
        for candidate, loss in zip(question.candidates, losses, strict=True):
            ids = torch.cat([begin, candidate])
            with torch.no_grad():
                logs = model(ids[None]).logits[0].double().log_softmax(-1)
            nll = [-logs[place - 1, ids[place]] for place in range(len(begin), len(ids))]
            assert loss.item() == pytest.approx(np.mean(nll), rel=1e-5)


def test_questions_longer_than_the_model(model):
    long = Question("items.jsonl, line 7", torch.zeros(12, dtype=torch.int64), torch.zeros(2, 8).long())
    assert len(candidate_losses(model, [long])) == 1  # 20 positions
    with pytest.raises(UserError, match=r"^items\.jsonl, line 7: 21 tokens, the model takes 20$"):
        candidate_losses(model, [long], bos=16)


def item(answer, group=""):
    return Item("", [], [], answer, group)


def test_the_lowest_loss_is_the_choice():
    items = [item(0, "a"), item(1, "a"), item(1, "b"), item(0, "b")]
    losses = [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([2.0, 1.0]),
        torch.tensor([0.5, 9.0]),
    ]
    found = accuracies(items, losses)
    assert list(found) == ["a", "b", "all"]
    assert [found[group]["accuracy"] for group in found] == [0.5, 1.0, 0.75]
    assert [found[group]["items"] for group in found] == [2, 2, 4]
    assert [found[group]["chance"] for group in found] == pytest.approx([1 / 3, 1 / 2, 5 / 12])
    assert (found["b"]["low"], found["b"]["high"]) == wilson(2, 2)
    assert list(accuracies(items[:2], losses[:2])) == ["a"]
    # those of no group have a line of their own, and are counted once
    found = accuracies([*items, item(1), item(1), item(1)], [*losses, *[torch.tensor([1.0, 2.0])] * 3])
    assert {group: entry["items"] for group, entry in found.items()} == {
        "a": 2, "b": 2, "ungrouped": 3, "all": 7,
    }  # fmt: skip
    assert found["ungrouped"]["accuracy"] == 0
    assert found["all"]["accuracy"] == pytest.approx(3 / 7)


def test_candidates_that_cannot_be_told_apart_are_a_guess():
    found = accuracies(
        [item(0), item(1), item(2)],
        [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([3.0, 3.0, 3.0]), torch.tensor([1.0, 1.0, 2.0])],
    )
    assert found["all"]["accuracy"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)


@pytest.mark.parametrize(("right", "number"), [(0, 10), (10, 10), (5, 10), (126, 300), (1, 1)])
def test_wilsons_interval_is_scipys(right, number):
    expected = binomtest(right, number).proportion_ci(0.95, method="wilson")
    assert wilson(right, number) == pytest.approx((expected.low, expected.high), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(number=st.integers(1, 2000), part=st.floats(0, 1), z=st.floats(0.5, 4))
def test_wilsons_interval_holds_what_is_z_standard_errors_away(number, part, z):
    right = part * number
    low, high = wilson(right, number, z)
    assert 0 <= low <= right / number + 1e-12
    assert right / number - 1e-12 <= high <= 1
    for bound in (low, high):
        away, error = bound - right / number, z**2 * bound * (1 - bound) / number
        assert away**2 == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_wilson_refuses_more_than_all():
    for right, number in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"right: {right} of {number}"):
            wilson(right, number)


# --- tools/make_choices.py ---


def test_the_questions_of_the_tool(tmp_path, monkeypatch, capsys):
    def run(name, *more):
        monkeypatch.setattr("sys.argv", ["make_choices.py", str(tmp_path / name), *more])
        return make_choices.main()

    settings = ("--number", "6", "--side", "24")
    assert run("one", *settings) == run("two", *settings) == run("three", *settings, "--seed", "1") == 0
    items = read_items(tmp_path / "one" / "items.jsonl")
    assert [entry.group for entry in items] == ["colour"] * 6 + ["shape"] * 6 + ["size"] * 6
    assert {len(entry.candidates) for entry in items[:12]} == {3}
    assert {len(entry.candidates) for entry in items[12:]} == {2}
    assert len({entry.answer for entry in items[:12]}) > 1
    for entry in items:
        a, changed, b = (np.asarray(Image.open(path)) for path in entry.context)
        candidates = [np.asarray(Image.open(path)) for (path,) in entry.candidates]
        assert a.shape == (24, 24, 3)
        assert (a != changed).any()
        # B as it is stands among the candidates, is wrong, and nothing stands there twice
        same = [(candidate == b).all() for candidate in candidates]
        assert sum(same) == 1
        assert not same[entry.answer]
        assert len({candidate.tobytes() for candidate in candidates}) == len(candidates)
        assert changed.tobytes() not in {candidate.tobytes() for candidate in candidates}
    files = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")
        }
        for name in ("one", "two", "three")
    }
    assert files["one"] == files["two"]
    assert files["one"] != files["three"]
    assert run("one") == 2
    assert run("four", "--number", "0") == 2
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said == [f"error: {tmp_path / 'one'}: is there already", "error: --number: 0 must be at least 1"]


@pytest.mark.parametrize("attribute", make_choices.ATTRIBUTES)
def test_one_attribute_changes_and_the_answer_follows(attribute):
    for seed in range(30):
        shown, choices, answer = make_choices.question(attribute, np.random.default_rng(seed))
        (a, here), (changed, same), (b, there) = shown
        assert here == same != there
        assert {name for name in a if a[name] != changed[name]} == {attribute}
        assert a[attribute] == b[attribute]
        assert any(a[name] != b[name] for name in a)
        assert choices[answer] == changed[attribute]
        assert sorted(choices) == sorted(make_choices.ATTRIBUTES[attribute])
