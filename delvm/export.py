"""A trained model and its tokenizer -> a folder that transformers and diffusers load without delvm."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.evaluate.report import METRICS, MODELS
from delvm.tokenizer.vqgan import Tokenizer

USAGE = '''\
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
'''
"""What a user of the folder runs, with nothing of delvm; it stands in the model card and the tests run it."""


def export(
    model_folder: Path, tokenizer_folder: Path, out_folder: Path, *, num_codes: int, card: Mapping[str, Any]
) -> None:
    """Writes the model (safetensors, plain LlamaForCausalLM), tokenizer/ (a diffusers.VQModel) and README.md.

    The weights are untouched, so logits are equal. Generation settings: greedy, no id from `num_codes` up, no
    end but the length, which is one picture. Writes straight into out_folder: hand over a new one, rename it.

    card: {"name": str, "metrics": model -> task -> metrics as evaluate/likelihood.py gives them, "recipe":
    YAML text, "data": one line a task}; optionally "role", the exported model's name in metrics (default: its
    last).

    Raises UserError for a folder that cannot be read and for a model and a tokenizer that do not fit; OSError
    where the disk is full.
    """
    model = llama.load(model_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.num_codes != num_codes:
        raise UserError(
            f"{tokenizer_folder}: has {tokenizer.num_codes} codes; the model was trained on {num_codes}"
        )
    if vocab_size < num_codes:
        raise UserError(
            f"{model_folder}: has a vocabulary of {vocab_size}; its tokenizer has {num_codes} codes"
        )
    model.config.use_cache = True  # off while training
    model.generation_config = GenerationConfig(
        suppress_tokens=list(range(num_codes, vocab_size)) or None,
        max_new_tokens=min(tokenizer.num_tokens, positions - 1),
        do_sample=False,
        use_cache=True,
        bos_token_id=model.config.bos_token_id,
        # None: only the length ends a picture; with an end, generation would pad and stop early
        eos_token_id=None,
        pad_token_id=None,
    )
    out_folder.mkdir(parents=True, exist_ok=True)
    llama.save(model, out_folder)
    tokenizer.save(out_folder / "tokenizer")
    (out_folder / "README.md").write_text(model_card(model, tokenizer, card), encoding="utf-8")


def model_card(model: LlamaForCausalLM, tokenizer: Tokenizer, card: Mapping[str, Any]) -> str:
    """README.md of the exported folder: what it is, results, usage, data, recipe. See export for `card`."""
    config, metrics = model.config, card["metrics"]
    role = card.get("role") or next(reversed(metrics), None)
    trained = {
        "student": "distilled from a larger teacher (cross-entropy and KL divergence to its predictions)",
    }.get(str(role), "trained by next-token prediction")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = tokenizer.grid
    data = "\n".join(f"- {line.strip()}" for line in str(card["data"]).splitlines() if line.strip())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", card["recipe"])), default=0))
    return f"""---
library_name: transformers
pipeline_tag: image-to-image
tags: [autoregressive-vision, visual-prompting, vq-tokens]
---

# {_line(card["name"])}

An autoregressive vision model, {trained}.
It continues visual sentences, `image annotation image annotation ...`, written in the codes of the VQ
tokenizer beside it: shown example pairs of a task and a query, it draws the query's annotation.

- model: `LlamaForCausalLM`, {parameters / 1e6:,.2f}M parameters, {config.num_hidden_layers} layers of width \
{config.hidden_size}, {config.max_position_embeddings} positions
- tokens: {tokenizer.num_codes} codes; beginning {_special(config.bos_token_id)}, \
end {_special(config.eos_token_id)}
- pictures: {tokenizer.image_size} × {tokenizer.image_size} pixels, {rows} × {columns} = \
{tokenizer.num_tokens} codes each

## Measured

On held-out sentences, given everything before each code; loss in nats, perplexity = exp(loss).\
{f" This folder holds **{_cell(MODELS.get(role, role))}**." if role else ""}

{_table(metrics)}

## Use

With `pip install torch transformers diffusers pillow`, in this folder:

```python
{USAGE}```

Greedy by default; `do_sample=True, temperature=..., top_p=...` draws. `generation_config.json` keeps special
ids out.

## Data

{data or "not described"}

## Recipe

{fence}yaml
{str(card["recipe"]).rstrip()}
{fence}
"""


def _table(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    models = sorted(metrics, key=lambda model: list(MODELS).index(model) if model in MODELS else len(MODELS))
    lines = ["| task | model | " + " | ".join(key.replace("_", " ") for key in METRICS) + " |"]
    lines.append("|---|---|" + "---:|" * len(METRICS))
    for task in dict.fromkeys(task for model in models for task in metrics[model]):
        for model in models:
            row = metrics[model].get(task)
            if row is not None:
                cells = [f"{row[key]:.3f}" if key in row else "–" for key in METRICS]
                lines.append(f"| {_cell(task)} | {_cell(MODELS.get(model, model))} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _special(token: int | None) -> str:
    return "none" if token is None else f"id {token}"


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _cell(text: object) -> str:
    return _line(text).replace("|", "\\|")
