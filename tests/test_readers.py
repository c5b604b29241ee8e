"""Readers: what they give is what the model, the codes or the pixels hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate.readers import (
    READOUTS,
    CodebookVectors,
    HiddenStates,
    Pixels,
    Timm,
    TokenCounts,
    load_timm,
)

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (4, 4)


@pytest.fixture(scope="module")
def model():
    """A micro model of 16 codes, with BOS."""
    return llama.build("micro", 18, 40, bos=16, eos=17, seed=0).eval()


def codes(number=5, tokens=16):
    return torch.randint(16, (number, tokens), generator=torch.Generator().manual_seed(1))


# --- read-outs


def test_readouts_of_a_small_grid():
    torch.testing.assert_close(READOUTS["mean"](1, 2), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(READOUTS["last"](1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    quarters = READOUTS["quadrants"](2, 4)
    expected = torch.tensor(
        [
            [0.5, 0.5, 0, 0, 0, 0, 0, 0],
            [0, 0, 0.5, 0.5, 0, 0, 0, 0],
            [0, 0, 0, 0, 0.5, 0.5, 0, 0],
            [0, 0, 0, 0, 0, 0, 0.5, 0.5],
        ]
    )
    torch.testing.assert_close(quarters, expected)


@given(rows=st.integers(2, 9), columns=st.integers(2, 9), name=st.sampled_from(sorted(READOUTS)))
@settings(max_examples=30, deadline=None)
def test_every_region_is_an_average(rows, columns, name):
    weights = READOUTS[name](rows, columns)
    assert weights.shape[1] == rows * columns
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    if name == "quadrants":
        assert ((weights > 0).sum(0) == 1).all()  # each token in one of them


# --- a model's hidden states


@torch.no_grad()
def test_hidden_states_are_those_of_transformers(model):
    batch = codes()
    whole = model(torch.nn.functional.pad(batch, (1, 0), value=16), output_hidden_states=True).hidden_states
    read = HiddenStates(model, GRID)(batch)
    assert read.shape == (5, 2, 4 * 32)
    for layer in (1, 2):
        tokens = whole[layer][:, 1:].unflatten(1, GRID)
        quarters = [tokens[:, a : a + 2, b : b + 2].mean((1, 2)) for a in (0, 2) for b in (0, 2)]
        torch.testing.assert_close(read[:, layer - 1], torch.cat(quarters, 1), atol=1e-5, rtol=1e-5)
    last = HiddenStates(model, GRID, layers=[2], readout="last")(batch)
    torch.testing.assert_close(last[:, 0], whole[2][:, -1], atol=1e-5, rtol=1e-5)
    every = HiddenStates(model, GRID, every_token=True)(batch)
    torch.testing.assert_close(every, (whole[1] + whole[2])[:, 1:] / 2, atol=1e-5, rtol=1e-5)


def test_layers_are_named_and_chosen_in_their_order(model):
    assert HiddenStates(model, GRID).layers == ("1", "2")
    both, second = HiddenStates(model, GRID), HiddenStates(model, GRID, layers=[2])
    assert second.layers == ("2",)
    with torch.no_grad():
        torch.testing.assert_close(second(codes())[:, 0], both(codes())[:, 1])


@torch.no_grad()
def test_a_model_without_bos_reads_the_codes_alone():
    model = llama.build("micro", 16, 16, seed=0).eval()
    whole = model(codes(), output_hidden_states=True).hidden_states
    read = HiddenStates(model, GRID, readout="mean")(codes())
    torch.testing.assert_close(read[:, 0], whole[1].mean(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_they_do_not_depend_on_the_batch(model):
    reader = HiddenStates(model, GRID)
    batch = codes(7)
    alone = torch.cat([reader(row[None]) for row in batch])
    torch.testing.assert_close(reader(batch), alone, atol=2e-6, rtol=1e-5)


def test_no_hook_is_left(model):
    def hooks():
        return [len(module._forward_hooks) for module in model.modules()]

    with torch.no_grad():
        model(codes(), output_hidden_states=True)  # transformers leaves some of its own
        before = hooks()
        HiddenStates(model, GRID)(codes())
    assert hooks() == before


def test_what_a_model_has_not(model):
    with pytest.raises(UserError, match=r"^layers: 3, the model has 1 to 2$"):
        HiddenStates(model, GRID, layers=[1, 3])
    with pytest.raises(UserError, match=r"^a picture has 49 tokens, the model takes 40$"):
        HiddenStates(model, (7, 7))


# --- controls


def test_token_counts():
    read = TokenCounts(4)(torch.tensor([[0, 0, 3, 0], [1, 2, 1, 2]]))
    assert read.tolist() == [[[0.75, 0, 0, 0.25]], [[0, 0.5, 0.5, 0]]]


def test_codebook_vectors_stand_in_their_places():
    codebook = torch.tensor([[0.0, 10.0], [1.0, 20.0]])
    read = CodebookVectors(codebook, (1, 2))(torch.tensor([[1, 0]]))
    assert read.tolist() == [[[1.0, 0.0, 20.0, 10.0]]]  # channel by channel


def test_codebook_vectors_of_a_large_grid_are_averaged():
    batch = torch.zeros(1, 16, 16, dtype=torch.int64)
    batch[0, 0, :2] = 1  # half of the first of 8x8 places
    read = CodebookVectors(torch.tensor([[0.0], [1.0]]), (16, 16))(batch.flatten(1))
    assert read.shape == (1, 1, 64)
    assert read[0, 0, 0] == 0.5
    assert read.sum() == 0.5


def test_pixels():
    picture = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    picture[0, :2, :2, 1] = torch.tensor([[255, 0], [0, 255]], dtype=torch.uint8)
    read = Pixels()(picture)
    assert read.shape == (1, 1, 3 * 256)
    assert read[0, 0, 256] == 0.5  # green, the first of 16x16
    assert read.sum() == 0.5


def test_a_model_of_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    reader = Timm(model)
    batch = torch.randint(256, (2, reader.size, reader.size, 3), dtype=torch.uint8)
    config = model.default_cfg
    normal = (batch.permute(0, 3, 1, 2) / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(
        config["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        read = reader(batch)
        torch.testing.assert_close(read, model(normal)[:, None], atol=1e-5, rtol=1e-5)
    assert read.shape == (2, 1, model.num_features)


def test_no_such_model_of_timm():
    with pytest.raises(UserError, match=r"^probe\.timm: 'resnet_of_nobody' cannot be had: ") as caught:
        load_timm("resnet_of_nobody")
    assert "\n" not in str(caught.value)
