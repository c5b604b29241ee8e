import json
import shutil

import pytest
import torch
from diffusers import VQModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch.nn import functional as F

from delvm.errors import UserError
from delvm.tokenizer import Tokenizer, load
from delvm.tokenizer.vqgan import MODEL_CONFIG, WEIGHTS, WRAPPER_CONFIG

FILES = (MODEL_CONFIG, WEIGHTS, WRAPPER_CONFIG)


def tiny(patch=2, levels=1, image_size=8, seed=0, **wrapper):
    torch.manual_seed(seed)
    vqgan = VQModel(
        in_channels=3 * patch**2, out_channels=3 * patch**2, block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4, num_vq_embeddings=32, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.3)
    return Tokenizer(vqgan, patch, image_size, **wrapper).eval()


def photos(num=3, size=8, seed=1):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def folded_identity(patch=2, image_size=8):
    """A tokenizer whose network passes pixels through: one code for each of 27 colours of a flat patch."""
    tokenizer = tiny(patch, image_size=image_size)
    vqgan = tokenizer.vqgan
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
    codebook = torch.full((32, 4), 99.0)
    codebook[:27, :3], codebook[:27, 3] = colours * 2 - 1, 0.0
    average = torch.zeros(4, 3 * patch**2, 1, 1)
    for channel in range(3):
        average[channel, channel * patch**2 : (channel + 1) * patch**2] = 1 / patch**2

    class Averaged(torch.nn.Module):
        def forward(self, pixels):
            return F.conv2d(pixels, average)

    class Spread(torch.nn.Module):
        def forward(self, latents, _=None):
            return latents[:, :3].repeat_interleave(patch**2, dim=1)

    vqgan.encoder, vqgan.decoder = Averaged(), Spread()
    for convolution in (vqgan.quant_conv, vqgan.post_quant_conv):
        torch.nn.init.dirac_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    vqgan.quantize.embedding.weight.data.copy_(codebook)
    return tokenizer, colours


@pytest.mark.parametrize(
    ("patch", "levels", "size"), [(1, 1, 8), (2, 1, 8), (4, 1, 32), (2, 2, 16), (1, 3, 16)]
)
def test_shapes(patch, levels, size):
    tokenizer = tiny(patch, levels, size)
    side = size // (patch * 2 ** (levels - 1))
    ids = tokenizer.encode(photos(3, size))
    assert tokenizer.grid == (side, side)
    assert tokenizer.num_tokens == side**2
    assert ids.shape == (3, side**2)
    assert ids.dtype == torch.int64
    decoded = tokenizer.decode(ids)
    assert decoded.shape == (3, 3, size, size)
    assert decoded.dtype == torch.float32
    assert 0.0 <= decoded.min() <= decoded.max() <= 1.0


def test_raster_order():
    tokenizer, colours = folded_identity()
    ids = torch.randperm(27, generator=torch.Generator().manual_seed(0))[:16]
    pictures = (
        colours[ids].view(4, 4, 3).permute(2, 0, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)[None]
    )
    assert tokenizer.encode(pictures).tolist() == [ids.tolist()]
    torch.testing.assert_close(tokenizer.decode(ids[None]), pictures)
    torch.testing.assert_close(tokenizer(pictures), pictures)


@pytest.mark.parametrize("levels", [1, 2])
def test_ids_are_the_nearest_codes(levels):
    tokenizer = tiny(levels=levels)
    images = photos(16)
    with torch.no_grad():
        latents = tokenizer.to_latents(images).double().permute(0, 2, 3, 1).reshape(-1, 1, 4)
    distances = (latents - tokenizer.codebook.double()).square().sum(-1)
    ids = tokenizer.encode(images).flatten()
    assert torch.equal(ids, distances.argmin(1))
    assert len(ids.unique()) > 4


def test_decode_is_from_latents_of_the_codebook():
    tokenizer = tiny()
    ids = torch.randint(32, (2, 16))
    with torch.no_grad():
        codes = tokenizer.codebook[ids].view(2, 4, 4, 4).permute(0, 3, 1, 2)
        torch.testing.assert_close(tokenizer.decode(ids), tokenizer.from_latents(codes).clamp(0, 1))


def test_pixel_range():
    plain, shifted = tiny(), tiny(pixel_range=(0.0, 1.0))
    images = photos()
    with torch.no_grad():
        # 0..1 is read as 0..1, so half the contrast about grey 0.5 in the other's units
        torch.testing.assert_close(shifted.to_latents(images), plain.to_latents((images + 1) / 2))
        codes = torch.zeros(1, 4, 4, 4)
        # the network gives the same pixels; read as -1..1 they are (pixels + 1) / 2
        torch.testing.assert_close(plain.from_latents(codes) * 2 - 1, shifted.from_latents(codes))


def test_save_and_load_are_exact(tmp_path):
    tokenizer = tiny(levels=2)
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "deep" / "tokenizer").iterdir()) == sorted(FILES)
    loaded = load(tmp_path / "deep" / "tokenizer")
    assert not loaded.training
    for (name, one), (other_name, other) in zip(
        sorted(tokenizer.state_dict().items()), sorted(loaded.state_dict().items()), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    images = photos()
    assert torch.equal(tokenizer.encode(images), loaded.encode(images))
    assert torch.equal(tokenizer(images), loaded(images))
    assert (loaded.hash, loaded.patch, loaded.image_size, loaded.pixel_range) == (
        tokenizer.hash, 2, 8, (-1.0, 1.0),
    )  # fmt: skip


def test_diffusers_loads_the_folder(tmp_path):
    tokenizer = tiny()
    tokenizer.save(tmp_path)
    vqgan = VQModel.from_pretrained(tmp_path)
    pixels = F.pixel_unshuffle(photos() * 2 - 1, 2)
    with torch.no_grad():
        ids = vqgan.quantize(vqgan.encode(pixels).latents)[2][2].view(3, 16)
        decoded = vqgan.decode(ids, force_not_quantize=True, shape=(3, 4, 4, 4)).sample
    assert torch.equal(ids, tokenizer.encode(photos()))
    torch.testing.assert_close((F.pixel_shuffle(decoded, 2) + 1).clamp(0, 2) / 2, tokenizer.decode(ids))


def test_hash(tmp_path):
    tokenizer = tiny()
    first = tokenizer.hash
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert tiny().hash == first
    tokenizer.save(tmp_path)
    assert load(tmp_path).hash == first
    assert tiny(pixel_range=(0.0, 1.0)).hash != first
    assert tiny(image_size=16).hash != first
    with torch.no_grad():
        tokenizer.codebook[3, 1] += 1e-6
    assert tokenizer.hash != first


def test_a_setting_that_a_later_diffusers_adds_changes_the_hash_only_where_it_is_set():
    class Later(VQModel):
        @register_to_config
        def __init__(self, strides=(2, 2), **settings):
            super().__init__(**settings)

    def later(**changes):
        settings = {key: value for key, value in tokenizer.vqgan.config.items() if not key.startswith("_")}
        vqgan = Later(**settings, **changes)
        vqgan._internal_dict = FrozenDict(item for item in vqgan.config.items() if item[0] != "settings")
        vqgan.load_state_dict(tokenizer.vqgan.state_dict())
        found = Tokenizer(vqgan, 2, 8)
        assert "strides" in found.vqgan.config
        return found

    tokenizer = tiny()
    assert later().hash == later(strides=[2, 2]).hash == tokenizer.hash
    assert later(strides=(2, 1)).hash != tokenizer.hash


def test_the_hash_of_a_tokenizer_outlives_releases():
    tokenizer = tiny()
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(tokenizer.vqgan.state_dict().items())):
            weight.fill_(place / 64)
    assert tokenizer.hash == "7ba0121e4e35ab19"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 10), r"shape \(1, 3, 8, 10\), must be \(batch, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3), "must be"),
        (torch.zeros(3, 8, 8), "must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8, must be floating-point in 0..1"),
        (torch.full((1, 3, 8, 8), 255.0), "to 255, must lie in 0..1"),
        (torch.full((1, 3, 8, 8), float("nan")), "must lie in 0..1"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode(images)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 15, dtype=torch.int64), r"shape \(1, 15\), must be \(batch, 16\)"),
        (torch.zeros(1, 16, dtype=torch.int32), "must be torch.int64"),
        (torch.full((1, 16), 32), r"from 32 to 32, image codes are 0\.\.31"),
        (torch.full((1, 16), -1), "from -1"),
    ],
)
def test_wrong_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        tiny().decode(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0}, "patch: 0, must be a whole number"),
        ({"patch": 4}, r"in_channels: 12, patch 4 needs 3 \* 4\*\*2 = 48"),
        ({"image_size": 9}, "image_size: 9, must be a positive multiple of 2"),
        ({"pixel_range": (1.0, 0.0)}, "pixel_range"),
        ({"pixel_range": (0.0,)}, "pixel_range"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    settings = {"patch": 2, "image_size": 8, "pixel_range": (-1.0, 1.0), **change}
    with pytest.raises(ValueError, match=message):
        Tokenizer(tiny().vqgan, settings["patch"], settings["image_size"], settings["pixel_range"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny().save(folder)
    return folder


def test_no_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere: no such folder; a tokenizer is a folder with config\.json"
    ):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(saved, tmp_path, name):
    shutil.copytree(saved, tmp_path / "t")
    (tmp_path / "t" / name).unlink()
    with pytest.raises(UserError, match=f"t: no {name}; a tokenizer folder has"):
        load(tmp_path / "t")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 50])
def test_corrupted_file(saved, tmp_path, name, keep):
    shutil.copytree(saved, tmp_path / "t")
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=name) as raised:
        load(tmp_path / "t")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WRAPPER_CONFIG, {"patch": 4}, "in_channels: 12, patch 4 needs"),
        (WRAPPER_CONFIG, {"patch": None}, "no key 'patch'"),
        (
            MODEL_CONFIG,
            {"num_vq_embeddings": 64},
            f"{WEIGHTS}: damaged, or not the weights of {MODEL_CONFIG}",
        ),
        (MODEL_CONFIG, {"block_out_channels": [6]}, "the settings describe no tokenizer"),
        (MODEL_CONFIG, {"layers_per_block": 2}, "Missing key"),
    ],
)
def test_settings_of_another_tokenizer(saved, tmp_path, name, change, message):
    shutil.copytree(saved, tmp_path / "t")
    path = tmp_path / "t" / name
    settings = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "t")
    assert "\n" not in str(raised.value)


def test_json_must_be_an_object(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "t")
    (tmp_path / "t" / WRAPPER_CONFIG).write_text("[1, 2]")
    with pytest.raises(UserError, match="must be a JSON object"):
        load(tmp_path / "t")
