"""The recipes that train a tokenizer alone: their sizes, and their first steps."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.vgg import cfgs, make_layers

from delvm import chain
from delvm.recipe import load
from delvm.tokenizer import Tokenizer, training
from delvm.tokenizer.training import build, num_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs, some on either side of the split, and a VGG16 that has learnt nothing."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        blocks = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8))
        blocks.resize((320, 272), Image.Resampling.BICUBIC).save(root / "photos" / f"{number}.jpg")
    torch.manual_seed(0)
    torch.save(make_layers(cfgs["D"]).state_dict(prefix="features."), root / "vgg16.pth")
    return root


@pytest.fixture
def watched(monkeypatch):
    """The modules that are trained, each with the weights that it began with."""
    modules = []

    class Watched(training.TokenizerTraining):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            modules.append((self, copy.deepcopy(self.state_dict())))

    monkeypatch.setattr(training, "TokenizerTraining", Watched)
    return modules


def trained(name, folder, *overrides):
    """The folder of the tokenizer that a recipe's first steps make."""
    given = [f"tasks.photos.images={folder / 'photos'}", f"run_dir={folder / name}",
             "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.num_workers=0",
             "trainer.log_every=1", "tokenizer.min_psnr=0", "tokenizer.min_codes_used=0",
             *overrides]  # fmt: skip
    run = chain.Run(load(chain.Path(f"recipes/{name}.yaml"), given))
    run.fit(until="tokenizer")
    return folder / name / "tokenizer"


def test_the_large_one_has_the_shape_of_open_muses():
    given = ["tasks.photos.images=photos", "tokenizer.perceptual_weights=vgg16.pth"]
    recipe = load(chain.Path("recipes/vqgan_256.yaml"), given)
    assert recipe.tokenizer.factor == 16
    assert num_parameters(recipe.tokenizer, 256) == 146_244_675
    with torch.device("meta"):
        network = build(recipe.tokenizer, 256).vqgan
    assert len(network.state_dict()) == 277
    assert network.quantize.embedding.weight.shape == (8192, 64)


def test_the_large_one_takes_steps(folder, watched):
    """At its size of pictures and codes; a network of a quarter of the channels and half the blocks."""
    alone = ["tokenizer.perceptual=0", "tokenizer.perceptual_weights=''"]
    small = ["tokenizer.channels=32", "tokenizer.layers=1", "tokenizer.steps=2", "tokenizer.batch_size=2",
             "tokenizer.adversarial.start=1", "tasks.photos.validation_fraction=0.2"]  # fmt: skip
    found = trained("vqgan_256", folder, *alone, *small)
    first, second = json.loads((found / "curve.json").read_text())
    assert first["discriminator"] == 0 < second["discriminator"]
    assert second["codes_used"] > 100
    assert all(math.isfinite(value) for point in (first, second) for value in point.values())
    assert {"loss", "psnr", "codebook_perplexity", "adversarial", "discriminator"} <= second.keys()
    ((module, before),) = watched
    moved = {name: not torch.equal(value.cpu(), before[name]) for name, value in module.state_dict().items()}
    assert moved["tokenizer.vqgan.quantize.embedding.weight"]
    for part in ("tokenizer.vqgan.encoder.", "tokenizer.vqgan.decoder.", "tokenizer.vqgan.quant_conv.",
                 "tokenizer.vqgan.post_quant_conv.", "discriminator."):  # fmt: skip
        names = [name for name, _ in module.named_parameters() if name.startswith(part)]
        assert names
        assert [name for name in names if not moved[name]] == []
    tokenizer = Tokenizer.load(found)
    assert (tokenizer.grid, tokenizer.num_codes) == ((16, 16), 8192)
    metrics = json.loads((found / "stage.json").read_text())["metrics"]
    assert metrics["psnr"] > 5
    assert -1 < metrics["ssim"] < 1


def test_the_small_one_takes_steps(folder):
    looks = ["tokenizer.perceptual=0.5", f"tokenizer.perceptual_weights={folder / 'vgg16.pth'}"]
    found = trained(
        "vqgan_64",
        folder,
        "tokenizer.steps=4",
        "tokenizer.batch_size=8",
        "tokenizer.adversarial.start=2",
        *looks,
    )
    curve = json.loads((found / "curve.json").read_text())
    assert [point["discriminator"] > 0 for point in curve] == [False] * 2 + [True] * 2
    assert min(point["psnr"] for point in curve) > 15
    tokenizer = Tokenizer.load(found)
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.num_codes) == (64, (16, 16), 512)
