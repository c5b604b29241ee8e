"""Published tokenizers: checkpoints in each true layout, against networks written here from their papers."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import VQModel
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch.nn import functional as F

from delvm.errors import UserError
from delvm.tokenizer import Tokenizer, load, published
from delvm.tokenizer.vqgan import WEIGHTS, WRAPPER_CONFIG
from tools import convert_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURE = Path(__file__).parents[2] / "shared" / "fixtures" / "muse_vqgan"
WIDTHS, LAYERS, Z, DIM, CODES, SIDE = (32, 64, 32), 2, 6, 4, 24, 16
FACTOR = 2 ** (len(WIDTHS) - 1)


class Names:
    """What open-muse and taming (`llamagen=False`) or LlamaGen call the parts of a network."""

    def __init__(self, llamagen=False):
        self.llamagen = llamagen
        self.middle = (
            ("mid.0", "mid.1", "mid.2") if llamagen else ("mid.block_1", "mid.attn_1", "mid.block_2")
        )

    def level(self, half, level):
        if not self.llamagen:
            return f"{half}.{'down' if half == 'encoder' else 'up'}.{level}"
        return f"{half}.conv_blocks.{level if half == 'encoder' else len(WIDTHS) - 1 - level}"

    def block(self, half, level, number):
        return f"{self.level(half, level)}.{'res' if self.llamagen else 'block'}.{number}"


def checkpoint(names, attending=(), middle=True, layers=LAYERS, seed=0):
    """The tensors of a random network; `attending`: its levels with attention, 0 the finest."""
    random, state = torch.Generator().manual_seed(seed), {}

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=random)

    def convolution(name, out, into, side=3):
        state[f"{name}.weight"] = draw(out, into, side, side, scale=(into * side**2) ** -0.5)
        state[f"{name}.bias"] = draw(out, scale=0.1)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width, scale=0.1), draw(width, scale=0.1)

    def residual(name, into, out):
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out)
        if into != out:
            convolution(f"{name}.nin_shortcut", out, into, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", width, width, 1)

    def between(half):
        residual(f"{half}.{names.middle[0]}", WIDTHS[-1], WIDTHS[-1])
        if middle:
            attention(f"{half}.{names.middle[1]}", WIDTHS[-1])
        residual(f"{half}.{names.middle[2]}", WIDTHS[-1], WIDTHS[-1])

    def levels(half, order, into, blocks, move):
        for level in order:
            for number in range(blocks):
                residual(names.block(half, level, number), into, WIDTHS[level])
                into = WIDTHS[level]
                if level in attending:
                    attention(f"{names.level(half, level)}.attn.{number}", into)
            if level != order[-1]:
                convolution(f"{names.level(half, level)}.{move}.conv", into, into)

    order = list(range(len(WIDTHS)))
    convolution("encoder.conv_in", WIDTHS[0], 3)
    levels("encoder", order, WIDTHS[0], layers, "downsample")
    between("encoder")
    norm("encoder.norm_out", WIDTHS[-1])
    convolution("encoder.conv_out", Z, WIDTHS[-1])
    convolution("quant_conv", DIM, Z, 1)
    convolution("post_quant_conv", Z, DIM, 1)
    convolution("decoder.conv_in", WIDTHS[-1], Z)
    between("decoder")
    levels("decoder", order[::-1], WIDTHS[-1], layers + 1, "upsample")
    norm("decoder.norm_out", WIDTHS[0])
    convolution("decoder.conv_out", 3, WIDTHS[0])
    # rows of very different lengths, so that the nearest is seldom the one of the same direction
    state["quantize.embedding.weight"] = draw(CODES, DIM) * torch.linspace(0.2, 1.5, CODES)[:, None]
    return state


class Reference:
    """The network of a checkpoint, in float64: (encode) 0..1 -> ids, (decode) ids -> 0..1."""

    def __init__(self, state, names, low, unit=False):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.names, self.low, self.unit = names, low, unit
        codes = self.state["quantize.embedding.weight"]
        self.codes = codes / codes.norm(dim=1, keepdim=True) if unit else codes

    def convolution(self, name, x, stride=1):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2 if stride == 1 else 0)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def residual(self, name, x):
        inner = self.convolution(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        inner = self.convolution(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", inner)))
        shortcut = f"{name}.nin_shortcut"
        return inner + (self.convolution(shortcut, x) if f"{shortcut}.weight" in self.state else x)

    def attention(self, name, x):
        if f"{name}.q.weight" not in self.state:
            return x
        inner = self.norm(f"{name}.norm", x)
        q, k, v = (self.convolution(f"{name}.{part}", inner).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
        return x + self.convolution(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def level(self, half, level, x):
        number = 0
        while f"{(block := self.names.block(half, level, number))}.conv1.weight" in self.state:
            x = self.attention(f"{self.names.level(half, level)}.attn.{number}", self.residual(block, x))
            number += 1
        return x

    def middle(self, half, x):
        first, attention, last = (f"{half}.{part}" for part in self.names.middle)
        return self.residual(last, self.attention(attention, self.residual(first, x)))

    def latents(self, images):
        x = self.convolution("encoder.conv_in", self.low + (1 - self.low) * images.double())
        for level in range(len(WIDTHS)):
            x = self.level("encoder", level, x)
            if level < len(WIDTHS) - 1:
                below = f"{self.names.level('encoder', level)}.downsample.conv"
                x = self.convolution(below, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.convolution("quant_conv", self.convolution("encoder.conv_out", x))

    def encode(self, images):
        latents = self.latents(images).flatten(2).transpose(1, 2)
        if self.unit:
            return (latents @ self.codes.T).argmax(-1)  # the smallest angle
        return (latents[:, :, None] - self.codes).square().sum(-1).argmin(-1)

    def decode(self, ids, rows, columns):
        x = self.codes[ids].transpose(1, 2).reshape(len(ids), DIM, rows, columns)
        x = self.convolution("decoder.conv_in", self.convolution("post_quant_conv", x))
        x = self.middle("decoder", x)
        for level in reversed(range(len(WIDTHS))):
            x = self.level("decoder", level, x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.convolution(f"{self.names.level('decoder', level)}.upsample.conv", x)
        x = self.convolution("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))
        return ((x - self.low) / (1 - self.low)).clamp(0, 1)


def pictures(num=6, height=SIDE, width=SIDE, seed=1):
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(seed))


def agrees(tokenizer, reference, rows=SIDE // FACTOR, columns=SIDE // FACTOR):
    """Ids equal, pixels close, of pictures of that many codes."""
    images, grid = pictures(6, rows * FACTOR, columns * FACTOR), (rows, columns)
    expected = reference.encode(images)
    assert len(expected.unique()) > 4
    assert torch.equal(tokenizer.encode(images, grid), expected)
    decoded = reference.decode(expected, rows, columns)
    assert 0.1 < decoded.mean() < 0.9
    torch.testing.assert_close(tokenizer.decode(expected, grid), decoded.float(), atol=1e-5, rtol=0)
    return True


MUSE = {
    "_class_name": "VQGANModel", "_version": "0.0.1", "resolution": SIDE, "num_channels": 3,
    "hidden_channels": 32, "channel_mult": [1, 2, 1], "num_res_blocks": LAYERS, "z_channels": Z,
    "num_embeddings": CODES, "quantized_embed_dim": DIM, "resample_with_conv": True, "dropout": 0.0,
    "commitment_cost": 0.25, "no_attn_mid_block": False, "attn_resolutions": [4],
}  # fmt: skip


def write_muse(folder, state=None, **changes):
    folder.mkdir()
    state = checkpoint(Names(), attending=(2,)) if state is None else state
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**MUSE, **changes}))
    return folder


@pytest.mark.parametrize("attending", [(), (2,), (1, 2)])
@pytest.mark.parametrize("middle", [True, False])
def test_open_muse(tmp_path, attending, middle):
    state = checkpoint(Names(), attending, middle)
    tokenizer = load(write_muse(tmp_path / "muse", state, no_attn_mid_block=not middle))
    assert agrees(tokenizer, Reference(state, Names(), low=0.0))
    assert not tokenizer.training
    assert (tokenizer.num_codes, tokenizer.grid, tokenizer.num_tokens) == (CODES, (4, 4), 16)
    assert (tokenizer.image_size, tokenizer.pixel_range, tokenizer.unit_codes) == (SIDE, (0.0, 1.0), False)


def test_open_muse_as_safetensors_is_the_same_tokenizer(tmp_path):
    folder = write_muse(tmp_path / "muse")
    first = load(folder)
    (folder / "pytorch_model.bin").unlink()
    save_file(checkpoint(Names(), attending=(2,)), folder / "model.safetensors")
    assert load(folder).hash == load(folder / "model.safetensors").hash == first.hash


TAMING = {
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": DIM,
            "n_embed": CODES,
            "ddconfig": {
                "double_z": False, "z_channels": Z, "resolution": SIDE, "in_channels": 3, "out_ch": 3,
                "ch": 32, "ch_mult": [1, 2, 1], "num_res_blocks": LAYERS, "attn_resolutions": [4],
                "dropout": 0.0,
            },
        },
    }
}  # fmt: skip


def write_taming(file, state, **parts):
    """As Lightning of 2020 writes it: callbacks by their class, the discriminator among the tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    training = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    torch.save(
        {
            "epoch": 3,
            "callbacks": {
                ModelCheckpoint: {"best_model_score": torch.zeros(()), "best_model_path": "a.ckpt"}
            },
            "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": []}],
            "state_dict": {**state, **training},
            **parts,
        },
        file,
    )
    return file


@pytest.mark.parametrize("layers", [1, 2])
def test_taming(tmp_path, layers):
    # attention on two levels, and of one block a level: taming uses it, unlike open-muse
    state = checkpoint(Names(), attending=(1, 2), layers=layers)
    file = write_taming(tmp_path / "run" / "checkpoints" / "last.ckpt", state)
    reference = Reference(state, Names(), low=-1.0)
    bare = load(file)
    assert agrees(bare, reference)
    assert (bare.image_size, bare.pixel_range, bare.num_codes) == (256, (-1.0, 1.0), CODES)
    assert load(tmp_path / "run").hash == load(tmp_path / "run" / "checkpoints").hash == bare.hash
    settings = json.loads(json.dumps(TAMING))
    settings["model"]["params"]["ddconfig"]["num_res_blocks"] = layers
    (tmp_path / "run" / "configs").mkdir()
    (tmp_path / "run" / "configs" / "model.yaml").write_text(yaml.safe_dump(settings))
    told = load(tmp_path / "run")
    assert told.image_size == SIDE
    assert torch.equal(told.encode(pictures()), reference.encode(pictures()))


def test_the_config_of_a_taming_checkpoint(tmp_path):
    file = write_taming(tmp_path / "a.ckpt", checkpoint(Names(), attending=(2,)))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(TAMING))
    (tmp_path / "b.yaml").write_text("model: 5")
    assert load(file).image_size == SIDE  # that of its name
    (tmp_path / "a.yaml").unlink()
    refused(file, r"b\.yaml: not the settings of a taming-transformers VQGAN")
    (tmp_path / "c.yaml").write_text("model: 5")
    assert load(file).image_size == 256  # none of two others
    # nor does a config.json of another program make it open-muse's, whose pixels are 0..1
    (tmp_path / "config.json").write_text('{"model_type": "vqgan"}')
    assert load(file).pixel_range == (-1.0, 1.0)
    # and where nothing else says that it is taming's, it is refused
    torch.save(checkpoint(Names(), attending=(2,)), file)
    refused(file, r"a\.ckpt: needs open-muse's config\.json or taming's \.yaml beside it")


def write_llamagen(file, state, **parts):
    whole = {**state, "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": whole, "steps": 9, "args": argparse.Namespace(lr=1e-4), **parts}, file)
    return file


def test_llamagen(tmp_path):
    state = checkpoint(Names(llamagen=True), attending=(2,))
    tokenizer = load(write_llamagen(tmp_path / "vq.pt", state))
    reference = Reference(state, Names(llamagen=True), low=-1.0, unit=True)
    assert agrees(tokenizer, reference)
    # the lengths of the rows matter: without them other codes are the nearest
    longer = Reference(state, Names(llamagen=True), low=-1.0)
    assert not torch.equal(longer.encode(pictures()), reference.encode(pictures()))
    assert (tokenizer.image_size, tokenizer.pixel_range, tokenizer.unit_codes) == (256, (-1.0, 1.0), True)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(CODES))
    torch.testing.assert_close(tokenizer.to_latents(pictures(), (4, 4)).norm(dim=1), torch.ones(6, 4, 4))


def test_llamagen_averages_come_first(tmp_path):
    first, second = (checkpoint(Names(llamagen=True), attending=(2,), seed=seed) for seed in (0, 1))
    wanted = load(write_llamagen(tmp_path / "a.pt", first)).hash
    assert load(write_llamagen(tmp_path / "b.pt", second, ema=first)).hash == wanted
    torch.save({"state_dict": first}, tmp_path / "c.pt")
    assert load(tmp_path / "c.pt").hash == wanted


def tiny_diffusers(**changes):
    torch.manual_seed(0)
    vqgan = VQModel(**{
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "latent_channels": 4,
        "num_vq_embeddings": CODES, "norm_num_groups": 4, "sample_size": 8, **changes,
    })  # fmt: skip
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.3)
    return vqgan.eval()


@torch.no_grad()
def diffusers_ids(vqgan, pixels):
    return vqgan.quantize(vqgan.encode(pixels).latents)[2][2].view(len(pixels), -1)


def test_diffusers(tmp_path):
    vqgan = tiny_diffusers()
    vqgan.save_pretrained(tmp_path / "t")
    tokenizer, images = load(tmp_path / "t"), pictures(height=8, width=8)
    ids = diffusers_ids(vqgan, images * 2 - 1)
    assert len(ids.unique()) > 4
    assert torch.equal(tokenizer.encode(images), ids)
    with torch.no_grad():
        decoded = vqgan.decode(vqgan.quantize.get_codebook_entry(ids.flatten(), (6, 4, 4, 4)), True).sample
    torch.testing.assert_close(tokenizer.decode(ids), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)
    assert tokenizer.image_size == 8
    assert torch.equal(
        load(tmp_path / "t", pixel_range=(0.0, 1.0)).encode(images), diffusers_ids(vqgan, images)
    )


def test_diffusers_of_2022(tmp_path):
    vqgan = tiny_diffusers()
    vqgan.save_pretrained(tmp_path / "t")
    (weights,) = (tmp_path / "t").glob("*.safetensors")
    weights.unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile("|".join(map(re.escape, old)))
    state = {pattern.sub(lambda at: old[at[0]], name): value for name, value in vqgan.state_dict().items()}
    torch.save(state, tmp_path / "t" / "diffusion_pytorch_model.bin")
    tokenizer = load(tmp_path / "t")
    for name, value in vqgan.state_dict().items():
        assert torch.equal(tokenizer.vqgan.state_dict()[name], value), name


def test_amused_reads_other_pixels(tmp_path):
    vqgan = tiny_diffusers(sample_size=32)
    vqgan.save_pretrained(tmp_path / "amused" / "vqvae")
    (tmp_path / "amused" / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    tokenizer = load(tmp_path / "amused" / "vqvae")
    assert (tokenizer.pixel_range, tokenizer.image_size) == ((0.0, 1.0), 256)
    images = pictures(height=8, width=8)
    assert torch.equal(tokenizer.encode(images, (4, 4)), diffusers_ids(vqgan, images))


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs files that open-muse wrote")
def test_what_open_muse_wrote(tmp_path):
    pixels, ids, latents, decoded = (
        torch.from_numpy(np.load(FIXTURE / f"{name}.npy"))
        for name in ("pixels", "indices", "latents", "decoded")
    )
    tokenizer = load(FIXTURE)
    assert (tokenizer.num_codes, tokenizer.grid, tokenizer.image_size) == (64, (4, 4), 64)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.to_latents(pixels), latents, atol=1e-5, rtol=0)
    assert torch.equal(tokenizer.encode(pixels), ids)
    torch.testing.assert_close(tokenizer.decode(ids), decoded.clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("factors", "z", "dim", "codes", "lowest", "tensors", "parameters"),
    [
        ([1, 2, 2, 4, 6], 64, 64, 8192, False, 277, 146.2e6),  # vqgan-f16-8192-laion
        ([1, 1, 2, 2, 4], 256, 8, 16384, True, None, 71.9e6),  # LlamaGen VQ-16
    ],
)
def test_the_published_sizes(factors, z, dim, codes, lowest, tensors, parameters):
    network = published._network({
        "num_channels": 3, "hidden_channels": 128, "channel_mult": factors, "num_res_blocks": 2,
        "z_channels": z, "num_embeddings": codes, "quantized_embed_dim": dim, "no_attn_mid_block": not lowest,
        "attention": [(False, False)] * 4 + [(lowest, lowest)],
    })  # fmt: skip
    assert tensors in (None, len(network.state_dict()))
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(parameters, abs=5e4)


# -- sizes ---------------------------------------------------------------------------------------------------


def test_pictures_of_other_sizes(tmp_path):
    state = checkpoint(Names(), attending=(2,))
    folder, reference = write_muse(tmp_path / "muse", state), Reference(state, Names(), low=0.0)
    tokenizer = load(folder)
    assert agrees(tokenizer, reference, rows=6, columns=3)
    images = pictures(2, 24, 12)
    assert torch.equal(tokenizer(images, (6, 3)), tokenizer.decode(tokenizer.encode(images, (6, 3)), (6, 3)))
    with pytest.raises(ValueError, match=r"images: shape \(2, 3, 24, 12\), must be \(batch, 3, 16, 16\)"):
        tokenizer.encode(images)
    with pytest.raises(ValueError, match=r"must be \(batch, 3, 12, 24\)"):
        tokenizer.encode(images, (3, 6))
    with pytest.raises(ValueError, match=r"ids: shape \(2, 18\), must be \(batch, 16\)"):
        tokenizer.decode(torch.zeros(2, 18, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"grid: \(0, 3\), must be rows and columns"):
        tokenizer.encode(images, (0, 3))
    larger = load(folder, image_size=24)
    assert (larger.grid, larger.pixel_range) == ((6, 6), (0.0, 1.0))
    assert torch.equal(larger.encode(pictures(2, 24, 24)), tokenizer.encode(pictures(2, 24, 24), (6, 6)))
    with pytest.raises(ValueError, match="image_size: 25, must be a positive multiple of 4"):
        load(folder, image_size=25)


def test_our_own_folder_keeps_its_settings(tmp_path):
    own = Tokenizer(tiny_diffusers(), 1, 8, (0.0, 1.0))
    own.save(tmp_path)
    settings = {"patch": 1, "image_size": 8, "pixel_range": [0.0, 1.0]}
    assert json.loads((tmp_path / WRAPPER_CONFIG).read_text()) == settings  # and no more: hashes stay
    assert load(tmp_path).hash == load(tmp_path / WEIGHTS).hash == own.hash
    other = load(tmp_path, image_size=16)
    assert (other.image_size, other.pixel_range) == (16, (0.0, 1.0))
    (tmp_path / WRAPPER_CONFIG).write_text(json.dumps({**settings, "unit_codes": 1}))
    refused(tmp_path, "unit_codes: 1, must be true or false")


# -- what is refused -----------------------------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(UserError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def without(state, pattern):
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "MaskGitVQGAN"},
            r"config\.json: a MaskGitVQGAN: MaskGitVQGAN pads and pools otherwise",
        ),
        ({"_class_name": "PaellaVQModel"}, "a PaellaVQModel: expected open-muse's VQGANModel"),
        ({"resample_with_conv": False}, "without a convolution"),
        ({"num_embeddings": 64}, r"config\.json: num_embeddings: 64, the weights beside it have 24"),
        ({"channel_mult": [1, 2, 2]}, r"channel_mult: \[1, 2, 2\], the weights beside it have \[1, 2, 1\]"),
        ({"no_attn_mid_block": True}, "no_attn_mid_block: True, the weights beside it have False"),
        ({"resolution": 30}, "image_size: 30, must be a positive multiple of 4"),
    ],
)
def test_open_muse_settings(tmp_path, changes, message):
    refused(write_muse(tmp_path / "muse", **changes), message)


def test_attention_that_open_muse_leaves_out(tmp_path):
    state = checkpoint(Names(), attending=(2,), layers=1)
    refused(
        write_muse(tmp_path / "muse", state, num_res_blocks=1),
        "cannot represent it: open-muse leaves out the encoder's attention where num_res_blocks is 1",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "quantize.proj.weight": torch.zeros(1)}, "a Gumbel quantizer"),
        (lambda state: {**state, "quantize.used": torch.zeros(1)}, "renumbered"),
        (lambda state: renamed(state, "upsample.conv", "upsample_conv"), "MaskGitVQGAN"),
        (lambda state: renamed(state, "nin_shortcut", "conv_shortcut"), "3 x 3 convolutions"),
        (lambda state: without(state, "sample"), "without a convolution"),
        (lambda state: without(state, "quantize"), "no tensor 'quantize.embedding.weight'"),
        (lambda state: without(state, r"\.bias"), r"\d+ tensors missing \(first: decoder.conv_in.bias\)"),
        (lambda state: {**state, "extra.weight": torch.zeros(1)}, r"1 tensors unknown \(first: extra.weight"),
        (
            lambda state: {**state, "decoder.conv_out.bias": torch.zeros(1)},
            r"1 tensors of another shape \(first: decoder.conv_out.bias\)",
        ),
        (
            lambda state: renamed(state, "decoder.up.0.block.2", "decoder.mid.extra_mid_res_blocks.0"),
            "extra residual blocks",
        ),
        (
            lambda state: without(state, r"decoder\.up\.\d\.block\.2"),
            "the decoder has other widths or numbers of residual blocks",
        ),
        (
            lambda state: {**state, "encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)},
            "the finest level has 32 channels, the first convolution 64",
        ),
        (
            lambda state: {**state, "encoder.conv_in.weight": torch.zeros(32, 9, 3, 3),
                           "decoder.conv_out.weight": torch.zeros(9, 32, 3, 3),
                           "decoder.conv_out.bias": torch.zeros(9)},
            "in_channels: 9, patch 1 needs",
        ),
    ],
)  # fmt: skip
def test_networks_that_are_no_vqmodel(tmp_path, change, message):
    state = checkpoint(Names(), attending=(2,))
    refused(write_taming(tmp_path / "last.ckpt", change(state)), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "spatial", "block_out_channels": (32, 32)}, "MoVQ"),
        ({"in_channels": 4, "out_channels": 4}, "in_channels is 4"),
    ],
)
def test_diffusers_networks_that_are_no_tokenizer(tmp_path, changes, message):
    tiny_diffusers(**changes).save_pretrained(tmp_path / "t")
    refused(tmp_path / "t", message)


def test_another_network_of_diffusers(tmp_path):
    tiny_diffusers().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    refused(tmp_path, "a AutoencoderKL of diffusers; expected a VQModel")
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    refused(tmp_path, r"\d+ tensors missing")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, r"no config\.json; a diffusers.VQModel is a folder with it")


def test_settings_of_another_taming_checkpoint(tmp_path):
    file = write_taming(tmp_path / "last.ckpt", checkpoint(Names(), attending=(2,)))
    settings = json.loads(json.dumps(TAMING))
    settings["model"]["params"]["n_embed"] = 1024
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    refused(file, r"model\.yaml: n_embed: 1024, the weights beside it have 24")


class Payload:
    """An object whose unpickling would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Stranger:
    pass


def test_a_pickle_is_never_run(tmp_path):
    state, trace = checkpoint(Names(), attending=(2,)), tmp_path / "trace"
    file = write_taming(tmp_path / "last.ckpt", state, extra=Payload(trace))
    refused(
        file, r"last\.ckpt: refused: its pickle asks for \w+\.mkdir, which no tensor needs; nothing was run"
    )
    assert not trace.exists()
    write_taming(file, state, extra=Stranger())
    refused(file, r"its pickle asks for \S*Stranger")
    folder = write_muse(tmp_path / "muse", {**state, "extra": Payload(trace)})
    refused(folder, "refused: its pickle asks for")
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_damaged_file(tmp_path, keep):
    file = write_taming(tmp_path / "last.ckpt", checkpoint(Names()))
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, r"last\.ckpt: unreadable weights")


def test_folders_without_a_tokenizer(tmp_path):
    refused(
        tmp_path / "nowhere",
        r"nowhere: no such folder; a tokenizer is a folder with config\.json and weights",
    )
    refused(tmp_path, "holds no tokenizer: none of")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    refused(tmp_path, r"a\.pt: holds no tokenizer of diffusers, .* its tensors: a, ")
    torch.save([1, 2], tmp_path / "a.pt")
    refused(tmp_path, "holds no tensors by name")
    torch.save(checkpoint(Names()), tmp_path / "a.pt")
    refused(tmp_path, r"needs open-muse's config\.json or taming's \.yaml beside it")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.ckpt")
    refused(tmp_path, r"several files of weights; name one: \S*a\.pt, \S*b\.ckpt")


# -- the tool ------------------------------------------------------------------------------------------------


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert_tokenizer.py", *map(str, arguments)])
    return convert_tokenizer.main()


def test_tool(tmp_path, monkeypatch, capsys):
    state = checkpoint(Names(llamagen=True), attending=(2,))
    source, out = write_llamagen(tmp_path / "vq.pt", state), tmp_path / "out"
    assert run_tool(monkeypatch, source, out, "--image-size", SIDE) == 0
    tokenizer = load(out)
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".json", ".safetensors"]
    assert agrees(tokenizer, Reference(state, Names(llamagen=True), low=-1.0, unit=True))
    assert (tokenizer.image_size, tokenizer.unit_codes) == (SIDE, True)
    assert tokenizer.hash == load(source, image_size=SIDE).hash
    assert capsys.readouterr().out == (
        f"{out}: {CODES} codes, 16 a picture of {SIDE} px; its network reads -1..1; hash {tokenizer.hash}\n"
    )
    # diffusers alone finds the same codes in it
    images = pictures()
    assert torch.equal(diffusers_ids(VQModel.from_pretrained(out), images * 2 - 1), tokenizer.encode(images))


def test_tool_writes_all_or_nothing(tmp_path, monkeypatch, capsys):
    source = write_muse(tmp_path / "muse")
    (tmp_path / "there").mkdir()
    assert run_tool(monkeypatch, source, tmp_path / "there") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'there'}: is there already; name a new folder\n"
    assert run_tool(monkeypatch, tmp_path / "nowhere", tmp_path / "out") == 2
    assert run_tool(monkeypatch, source, tmp_path / "out", "--pixel-range", 1, 0) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["muse", "there"]

    def fails(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", fails)
        assert run_tool(monkeypatch, source, tmp_path / "out") == 2
    assert "no space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["muse", "there"]
    assert run_tool(monkeypatch, source, tmp_path / "out", "--pixel-range", -1, 1) == 0
    assert load(tmp_path / "out").pixel_range == (-1.0, 1.0)
