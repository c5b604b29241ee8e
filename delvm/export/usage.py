"""How an exported folder is used: with nothing of delvm. It stands in the folder's README.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Of one format."""

    library: str
    """By the name that model cards have for it."""
    packages: str
    """What pip is asked for."""
    code: str
    """A script that runs in the folder; the tests run it."""
    notes: str
    """What stands below it."""


TRANSFORMERS = Usage(
    library="transformers",
    packages="torch transformers diffusers pillow",
    code='''\
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image, ImageOps
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoModelForCausalLM

folder = Path(".")  # this folder
examples = [("image-1.png", "annotation-1.png")]  # one or more solved pairs of one task
query, result = "query.png", "result.png"

model = AutoModelForCausalLM.from_pretrained(folder).eval()
vqgan = VQModel.from_pretrained(folder / "tokenizer").eval()
settings = json.loads((folder / "tokenizer" / "delvm_tokenizer.json").read_text())
size, patch, (low, high) = settings["image_size"], settings["patch"], settings["pixel_range"]
side = size // patch // 2 ** (len(vqgan.config.block_out_channels) - 1)  # codes along one side


def encode(path):
    """A picture file -> (1, side * side) codes."""
    picture = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 * (high - low) + low
    return vqgan.quantize(vqgan.encode(pixel_unshuffle(pixels, patch)).latents)[2][2].view(1, -1)


def decode(codes):
    """(1, side * side) codes -> a picture."""
    shape = (1, side, side, vqgan.config.vq_embed_dim)
    pixels = pixel_shuffle(vqgan.decode(codes, force_not_quantize=True, shape=shape).sample, patch)
    pixels = ((pixels[0] - low) / (high - low)).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


with torch.no_grad():
    parts = [encode(path) for pair in examples for path in pair] + [encode(query)]
    if model.config.bos_token_id is not None:
        parts.insert(0, torch.tensor([[model.config.bos_token_id]]))
    prompt = torch.cat(parts, dim=1)
    sentence = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=side**2)
    decode(sentence[:, prompt.shape[1] :]).save(result)
''',
    notes="""\
Greedy by default; `do_sample=True, temperature=..., top_p=...` draws. `generation_config.json` keeps special
ids out.""",
)

ONNX = Usage(
    library="onnx",
    packages="onnxruntime numpy pillow",
    code='''\
import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps

folder = Path(".")  # this folder
examples = [("image-1.png", "annotation-1.png")]  # one or more solved pairs of one task
query, result = "query.png", "result.png"

settings = json.loads((folder / "delvm_onnx.json").read_text())
model, encoder, decoder = (InferenceSession(folder / settings[x]) for x in ("model", "encoder", "decoder"))
size = settings["image_size"]


def encode(path):
    """A picture file -> (1, tokens_per_picture) codes."""
    picture = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
    return encoder.run(None, {"pixels": pixels})[0]


def decode(codes):
    """(1, tokens_per_picture) codes -> a picture."""
    pixels = decoder.run(None, {"codes": codes})[0][0]
    return Image.fromarray((pixels * 255).round().astype(np.uint8).transpose(1, 2, 0))


parts = [encode(path) for pair in examples for path in pair] + [encode(query)]
if settings["bos_token_id"] is not None:
    parts.insert(0, np.array([[settings["bos_token_id"]]]))
prompt = tokens = np.concatenate(parts, axis=1)
past = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32) for x in model.get_inputs()[1:]}
codes = []
for _ in range(settings["tokens_per_picture"]):
    logits, *present = model.run(None, {"input_ids": tokens, **past})
    past = dict(zip(past, present))
    tokens = logits[:, : settings["num_codes"]].argmax(-1, keepdims=True)  # special ids are no picture
    codes.append(tokens)
decode(np.concatenate(codes, axis=1)).save(result)
''',
    notes="""\
`model.onnx` reads tokens after those whose keys and values it is handed: none before a prompt, all before the
next token. It gives the logits of the last one, and the keys and values of all. A prompt and its picture take
at most `positions` tokens (`delvm_onnx.json`); the tokenizer any number of pictures, `image_size` square.""",
)
