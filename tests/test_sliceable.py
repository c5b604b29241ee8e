import pytest
import torch

from delvm import llama
from delvm.distill.slice import slice_embedding, slice_student
from delvm.distill.sliceable import check
from delvm.errors import UserError
from tests.test_slice import CODES, configured, drawn, narrowed, sentences_of, smaller


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({}, {"hidden_size": 32}, "hidden_size: 32 is more than the teacher has; at most 24"),
        ({}, {"intermediate_size": 41}, "intermediate_size: 41 is more than the teacher has; at most 40"),
        ({}, {"num_hidden_layers": 4}, "num_hidden_layers: 4 is more than the teacher has; at most 3"),
        ({}, {"num_attention_heads": 8}, "num_attention_heads: 8 is more than the teacher has; at most 4"),
        ({}, {"num_key_value_heads": 4}, "num_key_value_heads: 4 is more than the teacher has; at most 2"),
        (
            {},
            {"num_key_value_heads": 1},
            "num_key_value_heads: 1 would serve 4 heads each, the teacher's serve 2; at least 2",
        ),
        ({}, {"head_dim": 6}, "head_dim: 6 must divide the teacher's, 8"),
        ({}, {"head_dim": 16}, "head_dim: 16 must divide the teacher's, 8"),
        ({}, {"vocab_size": 25}, "vocab_size: 25 must be the teacher's, 24"),
        ({}, {"hidden_act": "gelu"}, "hidden_act: 'gelu' must be the teacher's, 'silu'"),
        ({"attention_bias": True}, {}, "attention_bias: false would drop the teacher's biases; must be true"),
        ({"mlp_bias": True}, {}, "mlp_bias: false would drop the teacher's biases; must be true"),
        (
            {},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_parameters: .*500000.* must turn heads as the teacher's do, .*10000",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(teacher, student, message):
    config = smaller(llama.initialise(configured(), seed=0), **student)
    with pytest.raises(UserError, match=f"^{message}") as error:
        check(configured(**teacher), config)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"^{message}"):
        slice_student(drawn(configured(**teacher)), config, sentences_of())


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"sentences: \(4,\) torch.int64, must be \(num, length\) int64"),
        (torch.zeros(4, 4), r"sentences: \(4, 4\) torch.float32"),
        (torch.zeros(0, 4, dtype=torch.int64), r"sentences: \(0, 4\)"),
        (torch.zeros(4, 1, dtype=torch.int64), r"sentences: \(4, 1\)"),
        (torch.full((4, 4), CODES), r"sentences: ids must lie in 0\.\.23"),
        (torch.full((4, 4), -1), r"sentences: ids must lie in 0\.\.23"),
    ],
)
def test_impossible_sentences(sentences, message):
    teacher = drawn(configured())
    with pytest.raises(UserError, match=message):
        slice_student(teacher, narrowed(num_attention_heads=2), sentences)
    with pytest.raises(UserError, match=message):
        slice_embedding(teacher, narrowed(num_attention_heads=2), sentences, 0)
