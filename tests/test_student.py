"""Pictures through a model, against prompts that are put together by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import delvm
from delvm import llama
from delvm.errors import UserError
from delvm.export import export
from delvm.generation import complete, complete_sequences
from delvm.images.augment import view
from delvm.student import BATCH, UNDRAWN, Student, load

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_CODES, TOKENS, SIZE = 16, 4, 8


def build(positions=64, vocab_size=NUM_CODES + 2, bos=NUM_CODES):
    model = llama.build("micro", vocab_size, positions, bos=bos, seed=0)
    with torch.no_grad():  # sharp, so that what it is shown matters
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


@pytest.fixture
def student(tokenizer):
    return Student(build(), tokenizer)


def draw(count, *, size=(SIZE, SIZE), seed=0):
    return list(np.random.default_rng(seed).integers(256, size=(count, *size, 3)).astype(np.uint8))


@pytest.fixture
def pairs():
    drawn = draw(6)
    return [(drawn[0], drawn[1]), (drawn[2], drawn[3]), (drawn[4], drawn[5])]


@pytest.fixture
def queries():
    return draw(2, seed=1)


def prompt_of(tokenizer, *pictures):
    """(1, tokens): BOS and the codes of the pictures."""
    codes = tokenizer.encode(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255)
    return torch.cat([torch.tensor([[NUM_CODES]]), codes.reshape(1, -1)], 1)


def decoded(tokenizer, codes):
    """(n, 8, 8, 3) uint8."""
    return (tokenizer.decode(codes) * 255).round().byte().permute(0, 2, 3, 1).numpy()


# --- by example ---


def test_a_query_is_completed_after_bos_and_the_pairs(student, tokenizer, pairs, queries):
    prompt = prompt_of(tokenizer, *(picture for pair in pairs for picture in pair), queries[0])
    expected = decoded(tokenizer, complete(student.model, prompt, TOKENS, NUM_CODES))[0]
    found = student.complete(pairs, queries[0])
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert expected.std() > 1
    assert (np.asarray(student.complete(pairs, queries[1])) != expected).any()
    assert (np.asarray(student.complete(pairs[1:], queries[0])) != expected).any()


def test_a_model_without_bos_begins_with_the_pairs(tokenizer, pairs, queries):
    student = Student(build(vocab_size=NUM_CODES, bos=None), tokenizer)
    prompt = prompt_of(tokenizer, *pairs[0], queries[0])[:, 1:]
    expected = decoded(tokenizer, complete(student.model, prompt, TOKENS, NUM_CODES))[0]
    np.testing.assert_array_equal(np.asarray(student.complete(pairs[:1], queries[0])), expected)


def test_paths_images_and_arrays_are_the_same_pictures(student, pairs, queries, tmp_path):
    def saved(picture, name):
        Image.fromarray(picture).save(tmp_path / name)
        return tmp_path / name

    files = [(saved(a, f"{n}.png"), str(saved(b, f"{n}-b.png"))) for n, (a, b) in enumerate(pairs)]
    images = [(Image.fromarray(a), Image.fromarray(b)) for a, b in pairs]
    expected = np.asarray(student.complete(pairs, queries[0], temperature=1.0, seed=3))
    for given_pairs, query in (
        (files, saved(queries[0], "q.png")),
        (images, Image.fromarray(queries[0])),
        ([files[0], images[1], pairs[2]], queries[0]),
    ):
        found = student.complete(given_pairs, query, temperature=1.0, seed=3)
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_images_are_upright_rgb(student):
    grey = Image.fromarray(draw(1)[0][..., 0])
    (found,) = student.fit([grey], "query")
    np.testing.assert_array_equal(found, np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    turned = Image.fromarray(draw(1)[0])
    turned.getexif()[274] = 3  # upside down
    np.testing.assert_array_equal(student.fit([turned], "query")[0], draw(1)[0][::-1, ::-1])


def test_larger_pictures_are_seen_as_in_training(student):
    pair = draw(2, size=(40, 24))
    found = student.fit(pair, "pairs[0]")
    expected = view(pair, [False, True], policy="none", size=SIZE, nearest=False, seed=(0,))
    np.testing.assert_array_equal(found, expected)
    halves = np.zeros((40, 24, 3), np.uint8)
    halves[20:] = 255  # the middle is kept: what is below stays below, in equal parts
    (seen,) = student.fit([halves], "query")
    assert (seen[:3] == 0).all()
    assert (seen[5:] == 255).all()


def test_labels_are_never_mixed_with_nearest(student):
    stripes = np.repeat(255 * (np.indices((24, 24)).sum(0) % 5 > 1)[..., None], 3, 2).astype(np.uint8)
    mixed = student.fit([stripes, stripes], "pairs[0]")
    kept = student.fit([stripes, stripes], "pairs[0]", nearest=True)
    np.testing.assert_array_equal(mixed[0], kept[0])  # the image is averaged in both
    assert set(mixed[1].ravel()) & set(range(40, 216))
    assert set(kept[1].ravel()) == {0, 255}


def test_nearest_reaches_the_prompt(student, tokenizer, queries):
    rng = np.random.default_rng(5)
    labels = (255 * rng.integers(2, size=(23, 23, 1)).repeat(3, 2)).astype(np.uint8)
    shown = student.fit([labels, labels], "pairs[0]", nearest=True)
    assert (tokenizer.encode(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255).diff(dim=0)).any()
    expected = student.complete([shown], queries[0])
    for found in (
        student.complete([(labels, labels)], queries[0], nearest=True),
        student.complete_many([(labels, labels)], queries[:1], nearest=True)[0][0][0],
        [*student.complete_by_row([(labels, labels)], queries[0], nearest=True)][-1],
    ):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_many_queries_are_completed_as_each_alone(student, pairs):
    queries = draw(10, seed=2)
    found = student.complete_many(pairs, queries)
    assert [[len(answer) for answer in of_query] for of_query in found] == [[1]] * 10
    for query, [[picture]] in zip(queries, found, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(student.complete(pairs, query)))
    assert len({picture.tobytes() for [[picture]] in found}) > 1


def test_candidates_differ_and_the_first_is_the_only_one(student, pairs, queries):
    drawn = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    found = student.complete_many(pairs, queries, candidates=3, **drawn)
    assert [len(of_query) for of_query in found] == [3, 3]
    np.testing.assert_array_equal(
        np.asarray(found[0][0][0]), np.asarray(student.complete(pairs, queries[0], **drawn))
    )
    assert len({picture.tobytes() for of_query in found for [picture] in of_query}) == 6


def test_two_tasks_at_once(student, tokenizer, queries):
    a, b, c, d, e, f = draw(6)
    prompt = prompt_of(tokenizer, a, b, c, d, e, f, queries[0])
    codes = complete(student.model, prompt, 2 * TOKENS, NUM_CODES)
    [[answer]] = student.complete_many([(a, b, c), (d, e, f)], queries[:1])
    np.testing.assert_array_equal(answer, decoded(tokenizer, codes.view(2, TOKENS)))
    assert answer[0].tobytes() != answer[1].tobytes()
    # the second task is done after what the first has drawn
    after = torch.cat([prompt, codes[:, :TOKENS]], 1)
    second = decoded(tokenizer, complete(student.model, after, TOKENS, NUM_CODES))[0]
    np.testing.assert_array_equal(np.asarray(answer[1]), second)


@settings(max_examples=30, deadline=None)
@given(positions=st.integers(1, 80), annotations=st.integers(1, 4), bos=st.booleans())
def test_as_many_examples_as_fit(tokenizer, positions, annotations, bos):
    student = Student(build(positions, bos=NUM_CODES if bos else None), tokenizer)
    shots = student.max_shots(annotations)

    def length(shots):
        return bos + (shots + 1) * (1 + annotations) * TOKENS

    assert length(shots) <= positions or shots == 0
    assert length(shots + 1) > positions


# --- row by row ---


def test_rows_end_in_the_whole_picture(student, tokenizer, pairs, queries):
    drawn = {"temperature": 2.0, "top_p": 0.9, "seed": 1}
    first, last = student.complete_by_row(pairs, queries[0], **drawn)  # a grid of two rows
    np.testing.assert_array_equal(np.asarray(last), np.asarray(student.complete(pairs, queries[0], **drawn)))
    prompt = prompt_of(tokenizer, *(picture for pair in pairs for picture in pair), queries[0])
    codes = complete(student.model, prompt, TOKENS, NUM_CODES, **drawn)[:, :2]
    upper = (tokenizer.decode(codes, (1, 2)) * 255).round().byte().permute(0, 2, 3, 1).numpy()[0]
    np.testing.assert_array_equal(np.asarray(first)[:4], upper)
    assert (np.asarray(first)[4:] == UNDRAWN).all()


def test_rows_come_while_the_picture_is_drawn(student, pairs, queries):
    read = []
    student.model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: read.append(out))
    rows = student.complete_by_row(pairs, queries[0])
    next(rows)
    assert len(read) == 2  # the prompt and the first code; the second code is of the first row as well
    next(rows)
    assert len(read) == 4


# --- in sequence ---


def test_the_next_frames(student, tokenizer):
    frames = draw(3)
    shown = prompt_of(tokenizer, *frames)[:, 1:].view(1, 3, TOKENS)
    codes = complete_sequences(student.model, shown, 4, NUM_CODES, bos=NUM_CODES)
    [found] = student.continue_frames(frames, 4)
    np.testing.assert_array_equal(found, decoded(tokenizer, codes[0]))
    assert student.continue_frames(frames[1:], 1)[0][0].tobytes() != found[0].tobytes()


def test_frames_slide_beyond_the_positions(tokenizer):
    student = Student(build(positions=13), tokenizer)  # BOS and three pictures
    frames = draw(4)
    [first, second] = student.continue_frames([*frames[:2], "not there.png", *frames[2:]][3:], 2)[0]
    [again] = student.continue_frames(["slides out unread.png", *frames[2:]], 1)[0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(first))
    prompt = prompt_of(tokenizer, frames[3])
    codes = complete(student.model, prompt_of(tokenizer, *frames[2:]), TOKENS, NUM_CODES)
    codes = torch.cat([prompt, codes], 1)
    expected = decoded(tokenizer, complete(student.model, codes, TOKENS, NUM_CODES))[0]
    np.testing.assert_array_equal(np.asarray(second), expected)


def test_candidates_of_frames(student):
    frames = draw(2)
    found = student.continue_frames(frames, 2, candidates=3, temperature=2.0, seed=1)
    assert [len(sequence) for sequence in found] == [2, 2, 2]
    assert len({sequence[0].tobytes() for sequence in found}) == 3
    [one] = student.continue_frames(frames, 2, temperature=2.0, seed=1)
    assert [picture.tobytes() for picture in one] == [picture.tobytes() for picture in found[0]]


# --- pictures and codes ---


def test_pictures_are_encoded_and_decoded_in_parts(student, tokenizer):
    pictures = draw(BATCH + 3)
    codes = student.encode(pictures)
    assert torch.equal(codes, prompt_of(tokenizer, *pictures)[0, 1:].view(-1, TOKENS))
    np.testing.assert_array_equal(student.decode(codes), decoded(tokenizer, codes))


# --- from folders ---


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run's folders."""
    llama.save(build(), tmp_path / "student")
    tokenizer.save(tmp_path / "tokenizer")
    card = {"name": "x", "metrics": {}, "recipe": "", "data": ""}
    export(tmp_path / "student", tmp_path / "tokenizer", tmp_path / "export", num_codes=NUM_CODES, card=card)
    return tmp_path


def test_what_a_run_leaves_can_be_prompted(run, student, pairs, queries, monkeypatch):
    llama.save(build(), run / "elsewhere" / "model")
    expected = np.asarray(student.complete(pairs, queries[0]))
    monkeypatch.chdir(run / "student")
    for found in (
        delvm.load(run / "export"),
        delvm.load(str(run / "student")),
        delvm.load(run / "elsewhere" / "model", tokenizer=run / "tokenizer"),
        load("."),  # its tokenizer is beside where it lies
    ):
        np.testing.assert_array_equal(np.asarray(found.complete(pairs, queries[0])), expected)


def test_codes_of_lvm_are_no_special_ids(run, tokenizer, pairs, queries):
    model = build()
    model.config.bos_token_id, model.config.eos_token_id = 5, 6
    llama.save(model, run / "lvm")
    student = load(run / "lvm")
    assert student.bos is None
    expected = Student(build(bos=None), tokenizer).complete(pairs, queries[0])
    np.testing.assert_array_equal(np.asarray(student.complete(pairs, queries[0])), np.asarray(expected))


def test_the_package_imports_nothing_heavy():
    code = "import sys, delvm; assert callable(delvm.load); print([*{'torch', 'numpy'} & {*sys.modules}])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# --- what a user can do wrong ---


@pytest.mark.parametrize("vocab_size", [15, 19, 34])
def test_a_tokenizer_of_other_codes(run, vocab_size):
    llama.save(build(vocab_size=vocab_size, bos=None), run / "other")
    with pytest.raises(UserError) as caught:
        load(run / "other")
    assert str(caught.value) == f"{run}/tokenizer: has 16 codes; {run}/other has a vocabulary of {vocab_size}"


def test_folders_that_cannot_be_loaded(run, tmp_path):
    with pytest.raises(UserError, match="none: no such folder"):
        load(tmp_path / "none")
    llama.save(build(), run / "alone" / "model")
    with pytest.raises(UserError, match=r"alone/model: no tokenizer/ in it or beside it; name the folder"):
        load(run / "alone" / "model")
    with pytest.raises(UserError, match=f"^{run / 'nothing'}: "):
        load(run / "student", tokenizer=run / "nothing")


A, B = draw(2)
WIDE = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("pairs", "query", "message"),
    [
        ([], A, "pairs: none; at least one shows the task"),
        ((A, B), A, "pairs[0]: one picture, must be an image and its annotation"),
        (("a.png", "b.png"), A, "pairs[0]: one picture, must be an image and its annotation"),
        ([(A, B), (A,)], A, "pairs[1]: one picture, must be an image and its annotation"),
        ([(A, B), (A, B, B)], A, "pairs[1]: 3 pictures, pairs[0] has 2"),
        ([(A, B, B)], A, "pairs[0]: 3 pictures, must be two; complete_many draws several"),
        ([(A, B)] * 7, A, "pairs: 7, but beside a query and its result 6 fit into the model's 64 positions"),
        ([(A, WIDE)], A, "pairs[0][1]: 9x8 pixels, its image has 8x8"),
        ([(A, B), (A, "gone.png")], A, "gone.png: unreadable picture"),
        ([(A, B)], "gone.png", "gone.png: unreadable picture"),
        ([(A, A / 255)], A, "pairs[0][1]: float64 (8, 8, 3), must be uint8 (H, W, 3)"),
        ([(A, B[..., 0])], A, "pairs[0][1]: uint8 (8, 8), must be uint8 (H, W, 3)"),
        ([(A, B)], torch.zeros(3, 8, 8), "quer"),
        ([(A, B)], Image.new("I;16", (8, 8)), "quer"),
    ],
)
def test_one_line_for_each_mistake(student, pairs, query, message):
    for call in (student.complete, student.complete_by_row):
        with pytest.raises(UserError) as caught:
            call(pairs, query)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_mistakes_with_many_and_with_frames(student, tokenizer):
    short = Student(build(positions=8), tokenizer)
    for call, message in (
        (lambda: student.complete_many([(A, B)], []), "queries: none"),
        (lambda: student.complete_many([(A, B)], [A, A / 2]), "queries[1]: float64 (8, 8, 3), must be"),
        (lambda: student.complete_many([(A, B)], [A], candidates=2), "candidates: 2 would be equal"),
        (lambda: student.complete([(A, B)], A, temperature=-1), "temperature: -1, must be"),
        (lambda: student.continue_frames([], 1), "frames: none; at least one is continued"),
        (lambda: student.continue_frames([A, "gone.png"], 1), "gone.png: unreadable picture"),
        (lambda: student.continue_frames([A], 0), "num_pictures: 0, must be at least 1"),
        (lambda: student.continue_frames([A], 1, candidates=0), "candidates: 0, must be at least 1"),
        (lambda: student.continue_frames([A], 1, candidates=2), "candidates: 2 would be equal at temperat"),
        (lambda: short.continue_frames([A], 1), "frames: the model's positions hold 1 pictures, not one"),
    ):
        with pytest.raises(ValueError, match=r"^\w+.*: ") as caught:
            call()
        assert str(caught.value).startswith(message)
