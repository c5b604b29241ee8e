import pytest
import torch

from delvm.distill import layers
from delvm.distill.layers import choose_layers
from delvm.distill.moments import Rows
from delvm.distill.slice import slice_student
from tests.test_slice import configured, drawn, sentences_of


def loss_over(teacher, numbers, sentences):
    return layers._loss(teacher, numbers, Rows(sentences, None))


def test_layers_evenly_or_by_what_their_loss_costs():
    teacher, sentences = drawn(configured(num_hidden_layers=5)), sentences_of()
    assert choose_layers(teacher, 5, sentences, "even") == [0, 1, 2, 3, 4]
    assert choose_layers(teacher, 3, sentences, "even") == [0, 2, 4]
    assert choose_layers(teacher, 1, sentences, "even") == [0]
    with torch.no_grad():
        for number in (0, 3):  # these add nothing: without them the loss is what it was
            teacher.model.layers[number].self_attn.o_proj.weight.zero_()
            teacher.model.layers[number].mlp.down_proj.weight.zero_()
    without = {
        place: loss_over(teacher, [n for n in range(5) if n != place], sentences) for place in range(5)
    }
    best = min(without, key=without.get)
    assert best not in choose_layers(teacher, 4, sentences, "greedy")
    assert without[0] == without[3] == loss_over(teacher, list(range(5)), sentences)


def test_an_unknown_way_to_choose_layers():
    with pytest.raises(ValueError, match="layers: 'best' is unknown; choices: greedy, even"):
        slice_student(drawn(configured()), configured(), sentences_of(), layers="best")
