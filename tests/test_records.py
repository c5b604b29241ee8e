import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.distill.divergences import forward_kl
from delvm.distill.records import Record, draw, pack, seal, unpack, unseal

pytestmark = pytest.mark.usefixtures("one_thread")
laws = settings(max_examples=40, deadline=None)


def _log_probabilities(tokens, codes, seed, scale=3.0):
    logits = torch.randn(tokens, codes, generator=torch.Generator().manual_seed(seed))
    return (scale * logits).log_softmax(-1)


# --- a token's bytes ---


@given(st.integers(1, 25), st.integers(1, 70), st.integers(1, 4), st.integers(0, 99))
@laws
def test_ids_come_back_from_their_bits(bits, count, tokens, seed):
    ids = np.random.default_rng(seed).integers(1 << bits, size=(tokens, count))
    ids[0, -1] = (1 << bits) - 1
    packed = pack(ids, bits)
    assert (packed.dtype, packed.shape) == (np.uint8, (tokens, -(-count * bits // 8)))
    found = unpack(packed, bits, count)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids)


def test_the_lowest_bits_come_first():
    assert pack(np.array([[1, 0, 7]]), 3).tolist() == [[0b11_000_001, 0b1]]


@pytest.mark.parametrize(
    ("kind", "count", "vocabulary", "bits", "num_bytes"),
    [
        ("sampled", 12, 8192, 13, 20),
        ("sampled", 12, 8193, 14, 21),
        ("sampled", 1, 1, 1, 1),
        ("topk", 64, 8192, 13, 104 + 2 * 65),
    ],
)
def test_bytes_of_a_token(kind, count, vocabulary, bits, num_bytes):
    record = Record(kind, count, vocabulary)
    assert (record.bits, record.num_bytes) == (bits, num_bytes)
    ids = torch.full((3, vocabulary), -torch.inf)
    ids[:, -1] = 0.0
    stored = record.write(ids, torch.ones(3, count, dtype=torch.float64))
    assert (stored.dtype, stored.shape) == (np.uint8, (3, num_bytes))
    assert record.read(stored)[0][:, 0].tolist() == [vocabulary - 1] * 3


@given(st.integers(2, 40), st.data(), st.integers(0, 99), st.sampled_from([0.3, 3.0, 12.0]))
@laws
def test_the_likeliest_codes_keep_their_probabilities(vocabulary, data, seed, scale):
    count = data.draw(st.integers(1, vocabulary))
    log_p = _log_probabilities(6, vocabulary, seed, scale)
    record = Record("topk", count, vocabulary)
    ids, found = record.read(record.write(log_p, torch.empty(6, 0)))
    expected, order = log_p.double().exp().topk(count)
    np.testing.assert_array_equal(ids, order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=6e-4, atol=1e-6)
    total = found.astype(np.float64).sum(1)
    assert (total <= 1).all()
    # what the codes left out have together, too, however little it is
    np.testing.assert_allclose(1 - total, 1 - expected.sum(1), rtol=6e-4, atol=1e-6)


def test_a_code_that_is_ruled_out_has_no_probability():
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    record = Record("topk", 2, 3)
    ids, found = record.read(record.write(log_p, torch.empty(1, 0)))
    assert ids[0, 0] == 0
    assert found[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


# --- draws ---


def _uniform(tokens, count, seed=0):
    return torch.from_numpy(1 - np.random.default_rng(seed).random((tokens, count)))


def test_shares_of_the_draws_are_the_probabilities():
    tokens, count = 20_000, 3
    log_p = _log_probabilities(1, 8, 0, 1.0)
    p = log_p.double().exp()[0]
    drawn = draw(log_p.expand(tokens, -1), _uniform(tokens, count))
    assert (drawn.dtype, drawn.shape) == (torch.int64, (tokens, count))
    found = torch.bincount(drawn.flatten(), minlength=8).double()
    expected = tokens * count * p
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom: 1 in 1,000 independent draws is above


def test_shares_vary_less_than_those_of_independent_draws():
    tokens, count = 4000, 6
    log_p = _log_probabilities(1, 8, 1, 1.0)
    p = log_p.double().exp()[0]
    drawn = torch.nn.functional.one_hot(draw(log_p.expand(tokens, -1), _uniform(tokens, count)), 8)
    shares = drawn.double().mean(1)
    assert shares.var(0).sum() < 0.5 * (p * (1 - p) / count).sum()
    # never off by more than the two slices that a code may share with its neighbours
    assert (shares - p).abs().max() < 2 / count


def test_only_what_is_possible_is_drawn():
    log_p = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(-1).expand(4, -1)
    ends = torch.tensor([[2**-53, 2**-53], [1.0, 1.0], [2**-53, 1.0], [0.5, 0.5]], dtype=torch.float64)
    # the second slice begins where code 1 ends, which is its last point
    assert draw(log_p, ends).tolist() == [[1, 1], [1, 3], [1, 3], [1, 3]]


def test_the_gradient_of_drawn_codes_is_that_of_forward_kl_on_average():
    tokens, count = 20_000, 12
    teacher, student = _log_probabilities(1, 9, 0, 1.5), _log_probabilities(1, 9, 1, 1.5)
    ids = draw(teacher.expand(tokens, -1), _uniform(tokens, count))
    drawn, whole = (student.double().clone().requires_grad_() for _ in range(2))
    (-drawn.log_softmax(-1).expand(tokens, -1).gather(-1, ids).mean()).backward()
    forward_kl(whole, teacher.double()).sum().backward()
    assert whole.grad.abs().max() > 0.1
    torch.testing.assert_close(drawn.grad, whole.grad, atol=2e-3, rtol=0)


# --- rows ---


def test_a_row_begins_with_its_checksum():
    # the check value of CRC-32: that of the digits 1 to 9
    digits = np.frombuffer(b"123456789", np.uint8)
    stored = seal(digits[None, :8], digits[None, 8:])
    assert (stored.dtype, stored.shape) == (np.uint8, (1, 13))
    assert stored[0, :4].tobytes() == (0xCBF43926).to_bytes(4, "little")
    assert stored[0, 4:].tobytes() == b"123456789"


def test_bytes_of_a_row():
    # those that the recipes' rows take: 2,048 tokens
    assert Record("topk", 64, 8192).row_bytes(2048) == 4 + 8 + 2047 * 234
    assert Record("sampled", 12, 8192).row_bytes(2048) == 4 + 8 + 2047 * 20


@given(st.integers(1, 4), st.integers(1, 30), st.data())
@laws
def test_a_changed_bit_is_found_in_its_row(rows, width, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    hashes, records = (rng.integers(256, size=(rows, size), dtype=np.uint8) for size in (8, width))
    stored = seal(hashes, records)
    sound, *parts = unseal(stored)
    assert sound.tolist() == [True] * rows
    np.testing.assert_array_equal(parts[0], hashes)
    np.testing.assert_array_equal(parts[1], records)
    row, place, bit = (data.draw(st.integers(0, size - 1)) for size in (rows, stored.shape[1], 8))
    stored[row, place] ^= 1 << bit
    assert unseal(stored)[0].tolist() == [number != row for number in range(rows)]
