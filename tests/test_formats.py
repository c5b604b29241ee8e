import base64
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.errors import UserError
from delvm.tokens.formats import join, read_delvm, read_lvm, write_delvm, write_lvm

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs files that DeLVM and LVM wrote")
laws = settings(max_examples=40, deadline=None)

# code 0, the last of 8192 codes, LVM's first special id; one token; none; the largest int32
SENTENCES = [[0, 8191, 8192], [7], [], [0, 2**31 - 1]]

LINES = b"""\
{"tokens": [0, 8191, 8192]}
{"tokens": [7]}
{"tokens": []}
{"tokens": [0, 2147483647]}
"""
# format 1.0, a header of 118 bytes, then the eight numbers
META = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<i8', 'fortran_order': False, 'shape': (4, 2), }".ljust(117)
    + b"\n"
    + b"".join(number.to_bytes(8, "little") for number in (0, 3, 28, 1, 44, 0, 59, 2))
)
# 8191 is 1f ff, 8192 is 20 00: little-endian and 4 bytes each
LVM = b"""\
{"tokens": "AAAAAP8fAAAAIAAA"}
{"tokens": "BwAAAA=="}
{"tokens": ""}
{"tokens": "AAAAAP///38="}
"""


def _sentences(lists=SENTENCES, dtype="int64") -> list[np.ndarray]:
    return [np.array(tokens, dtype) for tokens in lists]


def _lists(sentences) -> list[list[int]]:
    """The sentences as lists, each found to be a 1-D int64 array that its reader may change."""
    found = list(sentences)
    assert all(tokens.dtype == np.int64 and tokens.ndim == 1 and tokens.flags.writeable for tokens in found)
    return [tokens.tolist() for tokens in found]


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _delvm(folder: Path, lines: bytes = LINES, meta: bytes = META) -> Path:
    (folder / "train.bin").write_bytes(lines)
    (folder / "train.bin.meta").write_bytes(meta)
    return folder


def _lvm(folder: Path, lines: bytes = LVM) -> Path:
    (folder / "data.jsonl").write_bytes(lines)
    return folder / "data.jsonl"


# --- the exact bytes


def test_delvm_bytes_are_read(tmp_path):
    assert _lists(read_delvm(_delvm(tmp_path))) == SENTENCES


def test_delvm_bytes_are_written(tmp_path):
    write_delvm(tmp_path / "new" / "folder", _sentences())
    assert _files(tmp_path / "new" / "folder") == {"train.bin": LINES, "train.bin.meta": META}


def test_lvm_bytes_are_read(tmp_path):
    assert _lists(read_lvm(_lvm(tmp_path))) == SENTENCES


def test_lvm_bytes_are_written(tmp_path):
    write_lvm(tmp_path / "new" / "folder" / "data.jsonl", _sentences())
    assert _files(tmp_path / "new" / "folder") == {"data.jsonl": LVM}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", ">i4", "<u4", "int64", ">u8"])
def test_any_integer_type_is_written_alike(tmp_path, dtype):
    sentences = _sentences([[0, 127, 5]], dtype)
    write_delvm(tmp_path, sentences)
    write_lvm(tmp_path / "data.jsonl", sentences)
    assert (tmp_path / "train.bin").read_bytes() == b'{"tokens": [0, 127, 5]}\n'
    assert (tmp_path / "data.jsonl").read_bytes() == b'{"tokens": "AAAAAH8AAAAFAAAA"}\n'


def test_no_sentences(tmp_path):
    write_delvm(tmp_path, [])
    write_lvm(tmp_path / "data.jsonl", [])
    files = _files(tmp_path)
    assert files["train.bin"] == files["data.jsonl"] == b""
    meta = np.load(tmp_path / "train.bin.meta")
    assert (meta.shape, meta.dtype) == ((0, 2), np.int64)
    assert list(read_delvm(tmp_path)) == list(read_lvm(tmp_path / "data.jsonl")) == []


def test_the_meta_tells_where_a_line_starts_and_what_it_holds(tmp_path):
    # 12 lines: the header's number of lines grows by a digit over the one that was put there first
    sentences = [np.arange(length) for length in range(12)]
    write_delvm(tmp_path, sentences)
    data = (tmp_path / "train.bin").read_bytes()
    meta = np.load(tmp_path / "train.bin.meta")
    assert meta.shape == (12, 2)
    for (start, count), tokens in zip(meta.tolist(), sentences, strict=True):
        assert json.loads(data[start:].splitlines()[0])["tokens"] == tokens.tolist()
        assert count == len(tokens)


@given(st.lists(st.lists(st.one_of(st.integers(0, 8191), st.integers(0, 2**63 - 1)), max_size=40)))
@laws
def test_delvm_reads_what_it_wrote(lists):
    with TemporaryDirectory() as folder:
        write_delvm(Path(folder), _sentences(lists))
        assert _lists(read_delvm(Path(folder))) == lists


@given(st.lists(st.lists(st.one_of(st.integers(0, 8191), st.integers(0, 2**31 - 1)), max_size=40)))
@laws
def test_lvm_reads_what_it_wrote(lists):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        write_lvm(file, _sentences(lists))
        assert _lists(read_lvm(file)) == lists


# --- what DeLVM and LVM wrote


@fixtures
@pytest.mark.parametrize("name", ["pairs", "sentence_4"])
def test_delvm_files_are_read_and_written_again_alike(tmp_path, name):
    folder = FIXTURES / "delvm_tokens" / name
    sentences = list(read_delvm(folder))
    source = np.load(FIXTURES / "delvm_tokens" / "tokens.npy")
    np.testing.assert_array_equal(np.concatenate(sentences), source.reshape(-1))
    write_delvm(tmp_path, sentences)
    assert _files(tmp_path) == _files(folder)


@fixtures
def test_join_makes_delvms_sentences(tmp_path):
    write_delvm(tmp_path, join(read_delvm(FIXTURES / "delvm_tokens" / "pairs"), 4))
    assert [len(tokens) for tokens in read_delvm(tmp_path)] == [2048, 2048, 1024]
    assert _files(tmp_path) == _files(FIXTURES / "delvm_tokens" / "sentence_4")


@fixtures
def test_lvm_files_are_read_and_written_again_alike(tmp_path):
    file = FIXTURES / "lvm_jsonl" / "dataset.jsonl"
    sentences = list(read_lvm(file))
    assert [len(tokens) for tokens in sentences] == np.load(file.with_name("lengths.npy")).tolist()
    source = np.load(file.with_name("tokens.npy"))
    np.testing.assert_array_equal(np.concatenate(sentences), source.reshape(-1))
    write_lvm(tmp_path / "data.jsonl", sentences)
    assert (tmp_path / "data.jsonl").read_bytes() == file.read_bytes()


# --- join


def test_join_keeps_the_short_rest():
    sentences = _sentences([[1, 2], [3], [4, 5], [6], [7]])
    assert _lists(join(sentences, 2)) == [[1, 2, 3], [4, 5, 6], [7]]
    assert _lists(join(sentences, 5)) == _lists(join(sentences, 9)) == [[1, 2, 3, 4, 5, 6, 7]]
    assert _lists(join(sentences, 1)) == [[1, 2], [3], [4, 5], [6], [7]]
    assert list(join([], 3)) == []


@pytest.mark.parametrize("lines", [0, -2])
def test_join_of_no_lines(lines):
    with pytest.raises(ValueError, match=f"^lines: {lines} must be at least 1$"):
        next(join(_sentences(), lines))


# --- line by line


class Counted:
    """200 sentences of 50 tokens, and how many of those given out were ever held at once."""

    def __init__(self) -> None:
        self.given, self.most_held = 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        held: list[weakref.ref] = []
        for number in range(200):
            tokens = np.full(50, number)
            held.append(weakref.ref(tokens))
            self.given += 1
            yield tokens
            del tokens
            self.most_held = max(self.most_held, sum(one() is not None for one in held))


@pytest.mark.parametrize("name", ["delvm", "lvm"])
def test_writing_holds_one_sentence_at_a_time(tmp_path, name):
    source = Counted()
    if name == "delvm":
        write_delvm(tmp_path, source)
    else:
        write_lvm(tmp_path / "data.jsonl", source)
    assert source.given == 200
    assert source.most_held == 1


def test_join_takes_only_what_it_needs():
    source = Counted()
    sentences = join(source, 3)
    assert source.given == 0
    for number in (1, 2):
        assert len(next(sentences)) == 150
        assert source.given == 3 * number


def test_reading_stops_where_its_reader_does(tmp_path):
    _delvm(tmp_path, LINES.replace(b"2147483647]", b"damaged!!!]"))
    sentences = read_delvm(tmp_path)
    assert [next(sentences).tolist() for _ in range(3)] == SENTENCES[:3]
    with pytest.raises(UserError, match="line 4"):
        next(sentences)
    sentences = read_lvm(_lvm(tmp_path, LVM.replace(b"38=", b"38")))
    assert [next(sentences).tolist() for _ in range(3)] == SENTENCES[:3]
    with pytest.raises(UserError, match="line 4"):
        next(sentences)


# --- whole or not at all


def _failing() -> Iterator[np.ndarray]:
    yield np.array([1, 2, 3])
    raise RuntimeError("no more")


def test_a_failure_leaves_what_was_there(tmp_path):
    for call in (write_delvm, lambda folder, sentences: write_lvm(folder / "data.jsonl", sentences)):
        with pytest.raises(RuntimeError, match="no more"):
            call(tmp_path, _failing())
    assert _files(tmp_path) == {}
    _delvm(tmp_path)
    before = _files(_lvm(tmp_path).parent)
    for call in (write_delvm, lambda folder, sentences: write_lvm(folder / "data.jsonl", sentences)):
        with pytest.raises(RuntimeError, match="no more"):
            call(tmp_path, _failing())
    assert _files(tmp_path) == before


def test_files_can_be_written_over_while_they_are_read(tmp_path):
    write_delvm(tmp_path, join(read_delvm(_delvm(tmp_path)), 3))
    assert _lists(read_delvm(tmp_path)) == [[0, 8191, 8192, 7], [0, 2**31 - 1]]
    file = _lvm(tmp_path)
    write_lvm(file, join(read_lvm(file), 3))
    assert _lists(read_lvm(file)) == [[0, 8191, 8192, 7], [0, 2**31 - 1]]
    assert sorted(_files(tmp_path)) == ["data.jsonl", "train.bin", "train.bin.meta"]


# --- what is refused


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        (np.zeros((2, 3), int), r"sentence 2 is int64 of shape \(2, 3\), not 1-D integers"),
        (np.array(5), r"sentence 2 is int64 of shape \(\), not 1-D integers"),
        (np.array([1.0]), r"sentence 2 is float64 of shape \(1,\), not 1-D integers"),
        (np.array([True]), r"sentence 2 is bool of shape \(1,\), not 1-D integers"),
        (np.array([1], "m8[s]"), r"sentence 2 is timedelta64\[s\] of shape \(1,\), not 1-D integers"),
        (np.array([3, -1, -2]), r"sentence 2 has token -1, not of 0\.\.\d+"),
        (np.array([2**63], np.uint64), r"sentence 2 has token 9223372036854775808, not of 0\.\.\d+"),
    ],
)
def test_what_is_no_sentence_is_not_written(tmp_path, sentence, message):
    with pytest.raises(UserError, match=rf"train\.bin: {message}$"):
        write_delvm(tmp_path, [np.array([1]), sentence])
    with pytest.raises(UserError, match=rf"data\.jsonl: {message}$"):
        write_lvm(tmp_path / "data.jsonl", [np.array([1]), sentence])
    assert _files(tmp_path) == {}


def test_lvm_has_no_room_beyond_int32(tmp_path):
    with pytest.raises(UserError, match=r"sentence 1 has token 2147483648, not of 0\.\.2147483647$"):
        write_lvm(tmp_path / "data.jsonl", [np.array([2**31])])


LINE = b'{"tokens": [0, 8191, 8192]}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"tokens": [7}\n', r"not JSON \(Expecting ',' delimiter\)"),
        (b"\n", r"not JSON \(Expecting value\)"),
        (b'{"tokens": [\xff]}\n', r"not JSON \('utf-8' codec"),
        (b"[7]\n", 'not an object with "tokens"'),
        (b'{"token": [7]}\n', 'not an object with "tokens"'),
        (b'{"tokens": 7}\n', "tokens: not a list, but 7"),
        (b'{"tokens": "BwAAAA=="}\n', "tokens: not a list, but 'BwAAAA=='"),
        (b'{"tokens": [7.0]}\n', r"tokens: 7\.0 is not an integer of 0\.\.9223372036854775807"),
        (b'{"tokens": [NaN]}\n', "tokens: nan is not an integer"),
        (b'{"tokens": [1, true]}\n', "tokens: True is not an integer"),
        (b'{"tokens": [null]}\n', "tokens: None is not an integer"),
        (b'{"tokens": [[7]]}\n', r"tokens: \[7\] is not an integer"),
        (b'{"tokens": [3, -1]}\n', "tokens: -1 is not an integer of 0"),
        (b'{"tokens": [9223372036854775808]}\n', "tokens: 9223372036854775808 is not an integer of 0"),
    ],
)
def test_a_damaged_line_of_delvm(tmp_path, line, message):
    _delvm(tmp_path, LINE + line)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/train\.bin, line 2: {message}"):
        list(read_delvm(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"tokens": "BwAA\n', r"not JSON \(Invalid control character at\)"),
        (b"\n", r"not JSON \(Expecting value\)"),
        (b'"BwAAAA=="\n', 'not an object with "tokens"'),
        (b'{"tokens": [7]}\n', r"tokens: not base64 text, but \[7\]"),
        (b'{"tokens": "BwAAAA"}\n', r"tokens: not base64 \("),
        (b'{"tokens": "BwA*AAA=="}\n', r"tokens: not base64 \("),
        ('{"tokens": "é"}\n'.encode(), r"tokens: not base64 \("),
        (b'{"tokens": "BwAAAAA="}\n', "tokens: 5 bytes do not make whole int32"),
        (b'{"tokens": "BwAAAP////8="}\n', "tokens: -1 is below 0"),
    ],
)
def test_a_damaged_line_of_lvm(tmp_path, line, message):
    file = _lvm(tmp_path, LVM.splitlines(keepends=True)[0] + line)
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}, line 2: {message}"):
        list(read_lvm(file))


def test_a_line_from_elsewhere(tmp_path):
    # other keys, other spacing, no end of the last line: no token is in doubt
    sentence = base64.b64encode(np.array([5, 0], "<i4").tobytes()).decode()
    file = _lvm(tmp_path, f'{{"tokens":"{sentence}"}}\r\n{{"id": 3, "tokens": "{sentence}"}}'.encode())
    assert _lists(read_lvm(file)) == [[5, 0], [5, 0]]
    _delvm(tmp_path, LINES[:-1])
    assert _lists(read_delvm(tmp_path)) == SENTENCES


# cut in the last line, between two lines, to nothing
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (-2, r"line 4: not JSON"),
        (59, r"train\.bin: ends after line 3; train\.bin\.meta says 4 lines$"),
        (0, r"train\.bin: ends after line 0; train\.bin\.meta says 4 lines$"),
    ],
)
def test_lines_cut_short(tmp_path, size, message):
    _delvm(tmp_path, LINES[:size])
    with pytest.raises(UserError, match=message):
        list(read_delvm(tmp_path))


def test_lines_other_than_the_meta_says(tmp_path):
    _delvm(tmp_path, LINES + LINE)
    with pytest.raises(UserError, match=r"train\.bin, line 5: train\.bin\.meta ends after 4 lines$"):
        list(read_delvm(tmp_path))
    _delvm(tmp_path, LINES.replace(b"[7]", b"[7, 8]"))
    message = r"train\.bin, line 2: 2 tokens from byte 28; train\.bin\.meta says 1 from byte 28$"
    with pytest.raises(UserError, match=message):
        list(read_delvm(tmp_path))
    _delvm(tmp_path, LINES.replace(b"8192]", b"819]"))  # as many tokens, all later lines one byte early
    message = r"train\.bin, line 2: 1 tokens from byte 27; train\.bin\.meta says 1 from byte 28$"
    with pytest.raises(UserError, match=message):
        list(read_delvm(tmp_path))


# in the numbers, in the header, in the magic string, empty
@pytest.mark.parametrize("size", [-1, 150, 60, 9, 3, 0])
def test_a_meta_cut_short(tmp_path, size):
    _delvm(tmp_path, meta=META[:size])
    with pytest.raises(UserError, match=r"train\.bin\.meta: unreadable \.npy file \("):
        list(read_delvm(tmp_path))


@pytest.mark.parametrize(
    "meta",
    [
        np.zeros((4, 2), np.int32),
        np.zeros((4, 2), ">i8"),
        np.zeros((4, 3), np.int64),
        np.zeros(8, np.int64),
        np.zeros((), np.int64),
    ],
)
def test_a_meta_of_another_shape(tmp_path, meta):
    _delvm(tmp_path)
    with (tmp_path / "train.bin.meta").open("wb") as file:
        np.save(file, meta)
    message = rf"train\.bin\.meta: {meta.dtype} of shape {re.escape(str(meta.shape))}, not int64 of shape"
    with pytest.raises(UserError, match=message):
        list(read_delvm(tmp_path))


def test_a_meta_of_objects_is_not_unpickled(tmp_path):
    _delvm(tmp_path)
    with (tmp_path / "train.bin.meta").open("wb") as file:
        np.save(file, np.array([[{}, {}]]), allow_pickle=True)
    with pytest.raises(UserError, match=r"train\.bin\.meta: unreadable \.npy file \(.*Python objects"):
        list(read_delvm(tmp_path))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a folder of DeLVM's tokens \(no train\.bin\)$"):
        list(read_delvm(tmp_path / "nowhere"))
    (_delvm(tmp_path) / "train.bin.meta").unlink()
    with pytest.raises(UserError, match=r": not a folder of DeLVM's tokens \(no train\.bin\.meta\)$"):
        list(read_delvm(tmp_path))
    with pytest.raises(UserError, match=r"data\.jsonl: unreadable \(No such file or directory\)$"):
        list(read_lvm(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=r": unreadable \(Is a directory\)$"):
        list(read_lvm(tmp_path))
