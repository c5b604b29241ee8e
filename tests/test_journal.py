import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.errors import UserError
from delvm.tokens.journal import Journal
from tests.processes import PATIENCE, end

ROW, TYPE = (2, 3), np.dtype(np.uint16)
RECORD = 8 + 2 * 2 * 3  # bytes of a block of one view


def codes_of(views, start=0):
    return np.arange(start, start + views * 6).reshape(views, *ROW)


def written(file):
    with Journal(file, ROW, TYPE) as journal:
        return journal.num_rows, [block.tolist() for block in journal.blocks()]


@given(st.lists(st.integers(1, 5), max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
@settings(max_examples=30, deadline=None)
def test_what_is_appended_is_there_however_often_it_is_opened(tmp_path_factory, sizes, reopened):
    file, blocks = tmp_path_factory.mktemp("journal") / "some" / "journal", []
    journal = Journal(file, ROW, TYPE)
    for size, again in zip(sizes, reopened, strict=False):
        block = codes_of(size, 10_000 + 100 * len(blocks))
        journal.append(block)
        blocks.append(block.tolist())
        assert [found.tolist() for found in journal.blocks()] == blocks
        if again:
            journal.close()
            journal = Journal(file, ROW, TYPE)
        assert journal.num_rows == sum(map(len, blocks))
    journal.close()
    assert written(file) == (sum(map(len, blocks)), blocks)


@given(st.integers(0, 3 * RECORD))
@settings(max_examples=30, deadline=None)
def test_half_a_block_is_cut_off(tmp_path_factory, size):
    file = tmp_path_factory.mktemp("journal") / "journal"
    blocks = [codes_of(1, 6 * number) for number in range(3)]
    with Journal(file, ROW, TYPE) as journal:
        for block in blocks:
            journal.append(block)
    os.truncate(file, size)
    whole = size // RECORD
    assert written(file) == (whole, [block.tolist() for block in blocks[:whole]])
    assert file.stat().st_size == whole * RECORD
    with Journal(file, ROW, TYPE) as journal:
        journal.append(codes_of(2, 50))
        assert journal.num_rows == whole + 2
        assert [len(block) for block in journal.blocks()] == [1] * whole + [2]


@pytest.mark.parametrize("byte", [0, 5, 8, RECORD - 1])
def test_what_a_power_cut_has_left_is_cut_off(tmp_path, byte):
    blocks = [codes_of(1, 6 * number + 1) for number in range(3)]
    with Journal(tmp_path / "journal", ROW, TYPE) as journal:
        for block in blocks:
            journal.append(block)
    bytes_ = bytearray((tmp_path / "journal").read_bytes())
    bytes_[RECORD + byte] ^= 1  # in the second of three
    (tmp_path / "journal").write_bytes(bytes_)
    assert written(tmp_path / "journal") == (1, [blocks[0].tolist()])
    (tmp_path / "journal").write_bytes(bytes_[:RECORD] + bytes(100))  # zeros, as some file systems have it
    assert written(tmp_path / "journal") == (1, [blocks[0].tolist()])


def test_one_process_at_a_time(tmp_path):
    def other():
        with pytest.raises(UserError, match=f"^{tmp_path}/journal: another run writes it at the same time$"):
            Journal(tmp_path / "journal", ROW, TYPE)

    with Journal(tmp_path / "journal", ROW, TYPE) as journal:
        process = multiprocessing.get_context("fork").Process(target=other)
        process.start()
        end(process, after=PATIENCE)
        assert process.exitcode == 0
        journal.append(codes_of(1))
    assert written(tmp_path / "journal")[0] == 1


def test_removed(tmp_path):
    journal = Journal(tmp_path / "journal", ROW, TYPE)
    journal.append(codes_of(1))
    journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 3, 2), (2, 3)])
def test_blocks_of_another_shape_are_our_mistake(tmp_path, shape):
    with Journal(tmp_path / "journal", ROW, TYPE) as journal, pytest.raises(AssertionError):
        journal.append(np.zeros(shape, np.int64))
