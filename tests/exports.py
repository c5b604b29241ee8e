"""A tiny run to export, and programs that use what was exported without delvm."""

import subprocess
import sys

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image

from delvm import llama
from delvm.tokenizer.vqgan import Tokenizer
from tests.processes import PATIENCE

NUM_CODES, SIZE, PATCH = 24, 16, 4  # 16 codes a picture
NAMES = ("image-1", "annotation-1", "query")
CARD = {
    "name": "small run",
    "metrics": {
        "teacher": {"pose": {"loss": 1.25, "accuracy": 0.5, "perplexity": 3.49}},
        "student": {"pose": {"loss": 1.375, "accuracy": 0.4375, "perplexity": 3.955}},
    },
    "recipe": "seed: 0\nname: small\n",
    "data": "pose: 3 pairs\nrain: 4",
}


def tiny_tokenizer(num_codes=NUM_CODES, *, attention=False, **settings):
    """Of random but sharp weights."""
    torch.manual_seed(0)
    vqgan = VQModel(
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=num_codes,
        vq_embed_dim=8,
        mid_block_add_attention=attention,
    )
    codebook = vqgan.quantize.embedding.weight
    torch.nn.init.normal_(codebook)
    if settings.get("unit_codes"):
        codebook.data = torch.nn.functional.normalize(codebook.data, dim=1)
    return Tokenizer(vqgan, PATCH, SIZE, **settings).eval()


def tiny_run(folder, tokenizer):
    """tokenizer/ and student/, a model of random but sharp weights."""
    tokenizer.save(folder / "tokenizer")
    model = llama.build("micro", NUM_CODES + 2, 128, bos=NUM_CODES, eos=NUM_CODES + 1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    llama.save(model, folder / "student")
    return folder


def draw_pictures(folder):
    """The files that the scripts in README.md ask for."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(folder / f"{name}.png")


def prompt_of(folder, tokenizer):
    """(1, prefix) int64: those pictures behind BOS."""
    pixels = [torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))) for name in NAMES]
    codes = tokenizer.encode(torch.stack(pixels).permute(0, 3, 1, 2) / 255)
    return torch.cat([torch.tensor([[NUM_CODES]]), codes.reshape(1, -1)], 1)


def isolated(code, folder, *missing):
    """Runs code in a fresh interpreter where `missing` cannot be imported, even installed in place."""
    block = (
        "import sys\n"
        f"MISSING = {missing!r}\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in MISSING:\n"
        "            raise ImportError(f'{name} is not here')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "for name in MISSING:\n"
        "    try:\n        __import__(name)\n    except ImportError:\n        pass\n"
        "    else:\n        raise SystemExit(f'{name} was importable')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", block + code],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
