import pytest
import torch

from delvm.distill import layers
from delvm.distill.moments import Rows, part_of
from tests.test_slice import configured, drawn, loss_of, sentences_of


def test_a_part_holds_the_teachers_own_weights():
    teacher = drawn(configured())
    part = part_of(teacher, list(teacher.model.layers[1:]))
    assert {p.data_ptr() for p in part.parameters()} < {p.data_ptr() for p in teacher.parameters()}
    assert not any(parameter.is_meta for parameter in part.parameters())


def test_a_part_is_the_model_it_says():
    teacher, batch = drawn(configured(attn_implementation="eager")), sentences_of()
    shallow = drawn(configured(num_hidden_layers=2, attn_implementation="eager"))
    state = {
        k.replace("layers.2", "layers.1"): v for k, v in teacher.state_dict().items() if "layers.1" not in k
    }
    shallow.load_state_dict(state)
    part = part_of(teacher, [teacher.model.layers[0], teacher.model.layers[2]])
    assert torch.equal(part(batch).last_hidden_state, shallow.model(batch).last_hidden_state)
    expected = loss_of(shallow, batch) * batch[:, 1:].numel()
    assert layers._loss(teacher, [0, 2], Rows(batch, None)) == pytest.approx(expected, rel=1e-5)
