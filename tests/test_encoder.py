import pytest
import torch

from delvm import training
from delvm.tokenizer import training as tokenizer_training
from delvm.tokenizer.training import TokenizerConfig, build
from delvm.tokens.encoder import Encoder, TokensConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer():
    """8 px, 4 tokens a picture, 16 codes; for this test alone, which changes it."""
    torch.manual_seed(0)
    found = build(TokenizerConfig(num_codes=16, code_dim=4, channels=32), 8).eval()
    torch.nn.init.normal_(found.codebook)
    return found


def pictures_of(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (*shape, 8, 8, 3), generator=generator, dtype=torch.uint8)


def sizes_of(tokenizer, monkeypatch):
    """How many pictures each pass has."""
    sizes, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda part: sizes.append(len(part)) or encode(part))
    return sizes


def test_the_codes_of_every_picture(tokenizer):
    pictures = pictures_of(5, 3)
    found = Encoder(tokenizer)(pictures)
    assert found.shape == (5, 3, 4)
    assert found.dtype == torch.int64
    for sample, codes in zip(pictures, found, strict=True):
        assert torch.equal(codes, tokenizer.encode(sample.permute(0, 3, 1, 2).float() / 255))
    assert len(found.unique()) > 4


@pytest.mark.parametrize(
    ("size", "expected"), [(8, 128), (32, 128), (128, 64), (256, 16), (1024, 1), (2048, 1)]
)
def test_a_pass_has_as_many_pictures_as_their_size_allows(tokenizer, size, expected):
    tokenizer.image_size = size
    made = Encoder(tokenizer)
    assert made.pass_pictures == expected
    assert [made.step(images) for images in (1, 2, 500)] == [expected, max(1, expected // 2), 1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clips_are_encoded_in_passes_that_fit(tokenizer, monkeypatch, precision):
    clips, config = pictures_of(2, 7), TokensConfig(precision)
    whole = Encoder(tokenizer, config)(clips)
    monkeypatch.setattr(tokenizer_training, "PASS_PICTURES", 4)
    sizes = sizes_of(tokenizer, monkeypatch)
    assert torch.equal(Encoder(tokenizer, config)(clips), whole)
    assert sizes == [4, 4, 4, 2]


def test_bfloat16_and_channels_last(tokenizer):
    before, pictures = tokenizer.hash, pictures_of(64, 1)
    exact = Encoder(tokenizer)(pictures)
    found = Encoder(tokenizer, TokensConfig("bf16-mixed"))(pictures)
    weight = tokenizer.vqgan.encoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.dtype == torch.float32
    assert tokenizer.hash == before
    images = pictures[:, 0].permute(0, 3, 1, 2) / 255
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        latents = tokenizer.to_latents(images)
    assert latents.dtype == torch.bfloat16
    # the nearest code is looked for in float32
    distances = torch.cdist(latents.float().flatten(2).transpose(1, 2), tokenizer.codebook[None])
    assert torch.equal(found[:, 0], distances.argmin(-1))
    assert 0.9 < (found == exact).float().mean() < 1


def test_the_surroundings_do_not_change_codes(tokenizer):
    pictures = pictures_of(64, 1)
    expected = Encoder(tokenizer)(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Encoder(tokenizer)(pictures), expected)


def test_compiled_passes_have_one_shape(tokenizer, monkeypatch):
    pictures, shapes, names = pictures_of(3, 2), [], set(tokenizer.state_dict())

    def compile_(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[-1] == 2])
        return graph.forward

    expected = Encoder(tokenizer)(pictures)
    monkeypatch.setattr(tokenizer_training, "PASS_PICTURES", 4)
    monkeypatch.setattr(training, "COMPILE_BACKEND", compile_)
    sizes = sizes_of(tokenizer, monkeypatch)
    assert torch.equal(Encoder(tokenizer, TokensConfig(compile=True))(pictures), expected)
    assert sizes == [4, 4]  # for six pictures
    assert len(shapes) == 1
    assert shapes[0] == [(4, 48, 2, 2)]
    assert set(tokenizer.state_dict()) == names


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"^precision: 'bf16' is unknown; choices: 32-true, bf16-mixed$"):
        TokensConfig("bf16")
