"""Configurations of teacher and student, and sentences -> a refusal in one line, or none."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from delvm.errors import UserError

_AT_MOST = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
CUT = (*_AT_MOST, "head_dim")
"""What a student may have less of."""


def check(teacher: LlamaConfig, student: LlamaConfig) -> None:
    """Refuse a student that cannot be cut from the teacher, from their configurations alone.

    Raises:
        UserError: the key, its value and what the teacher allows.
    """
    check_ends(teacher, student)
    for key in _AT_MOST:
        most = getattr(teacher, key)
        if getattr(student, key) > most:
            raise UserError(f"{key}: {getattr(student, key)} is more than the teacher has; at most {most}")
    shared, most = (c.num_attention_heads // c.num_key_value_heads for c in (student, teacher))
    if shared > most:
        raise UserError(
            f"num_key_value_heads: {student.num_key_value_heads} would serve {shared} heads each,"
            f" the teacher's serve {most}; at least {-(-student.num_attention_heads // most)}"
        )
    if teacher.head_dim % student.head_dim:
        raise UserError(f"head_dim: {student.head_dim} must divide the teacher's, {teacher.head_dim}")
    if student.hidden_act != teacher.hidden_act:
        raise UserError(f"hidden_act: '{student.hidden_act}' must be the teacher's, '{teacher.hidden_act}'")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(teacher, key) and not getattr(student, key):
            raise UserError(f"{key}: false would drop the teacher's biases; must be true")
    one, two = LlamaRotaryEmbedding(teacher), LlamaRotaryEmbedding(student)
    kept = one.inv_freq[:: teacher.head_dim // student.head_dim]
    if not torch.allclose(kept, two.inv_freq, rtol=1e-4) or one.attention_scaling != two.attention_scaling:
        raise UserError(
            f"rope_parameters: {student.rope_parameters} must turn heads as the teacher's do,"
            f" {teacher.rope_parameters}"
        )


def check_ends(teacher: LlamaConfig, student: LlamaConfig) -> None:
    """`check` of what `slice_embedding` asks for: one vocabulary, and no more width than the teacher has.

    Raises:
        UserError: the key, its value and what the teacher allows.
    """
    if student.vocab_size != teacher.vocab_size:
        raise UserError(f"vocab_size: {student.vocab_size} must be the teacher's, {teacher.vocab_size}")
    if student.hidden_size > teacher.hidden_size:
        raise UserError(
            f"hidden_size: {student.hidden_size} is more than the teacher has; at most {teacher.hidden_size}"
        )


def check_sentences(sentences: Tensor, vocab_size: int) -> None:
    """Refuse what are no sentences to observe a teacher on. Raises UserError with what they must be."""
    if sentences.dim() != 2 or sentences.dtype != torch.int64 or len(sentences) < 1 or sentences.shape[1] < 2:
        raise UserError(
            f"sentences: {tuple(sentences.shape)} {sentences.dtype}, must be (num, length) int64,"
            " at least (1, 2)"
        )
    if sentences.min() < 0 or sentences.max() >= vocab_size:
        raise UserError(f"sentences: ids must lie in 0..{vocab_size - 1}")
