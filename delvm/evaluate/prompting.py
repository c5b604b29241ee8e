"""A prompt of example pairs and a query, as tokens -> the tokens of the query's annotation."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from delvm.images.files import read_picture


@dataclass
class PromptingConfig:
    """How held-out annotations are generated."""

    pictures: int = 4
    """Prompted queries a task, each a row of pictures in the report."""
    temperature: float = 0.0
    """0: the most likely code each time."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"pictures: {self.pictures} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must be above 0 and at most 1")


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continues every prompt by `num_tokens` image codes (visual prompting: Bai et al. 2024, section 4.4).

    prompts: (n, prefix) int64, without padding. Returns (n, num_tokens) int64 in 0..num_codes-1 on the CPU;
    ids from `num_codes` up (BOS, EOS, padding) are never generated, and only the length ends a sentence.
    temperature 0 takes the most likely code each time; above 0 draws from the smallest set of codes that
    holds `top_p` of the probability. The draw depends on `seed` alone; the global random state is left as it
    was. The model's own generation settings are ignored: what ends a text there is an image code here.

    Raises ValueError for settings out of range and for prompts that leave no room in the model's positions.
    """
    _check(model, prompts, num_tokens, num_codes, temperature, top_p)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=temperature > 0,
        suppress_tokens=list(range(num_codes, model.config.vocab_size)) or None,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        use_cache=True,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ids = prompts.to(model.device)
    theirs, was_training = model.generation_config, model.training
    # set, not passed: generate would fill what is None here, eos for one, from the model's own settings
    model.generation_config = settings
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = theirs
        model.train(was_training)
    return out[:, ids.shape[1] :].cpu()


def _check(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    temperature: float,
    top_p: float,
) -> None:
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(f"prompts: shape {tuple(prompts.shape)}, must be (at least 1, at least 1)")
    low, high = int(prompts.min()), int(prompts.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"prompts: ids {low}..{high}, must be in 0..{vocab_size - 1}")
    if not 1 <= num_codes <= vocab_size:
        raise ValueError(f"num_codes: {num_codes}, must be in 1..{vocab_size}, the model's vocabulary")
    if num_tokens < 1 or prompts.shape[1] + num_tokens > positions:
        raise ValueError(
            f"num_tokens: {num_tokens} after a prompt of {prompts.shape[1]}, must be at least 1 and end "
            f"within the model's {positions} positions"
        )
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}, must be 0 (most likely) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}, must be above 0 and at most 1")


Picture = tuple[str, np.ndarray]
"""A caption and a (H, W, 3) uint8 picture."""


def save_pictures(folder: Path, pictures: dict[str, list[list[Picture]]]) -> None:
    """Rows of pictures by task -> `TASK/ROW-PLACE-CAPTION.png`."""
    for task, rows in pictures.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows):
            for place, (caption, picture) in enumerate(row):
                Image.fromarray(picture).save(folder / task / f"{number:03}-{place:02}-{caption}.png")


def load_pictures(folder: Path) -> dict[str, list[list[Picture]]]:
    """What `save_pictures` wrote; empty for a folder that is not there."""
    pictures: dict[str, list[list[Picture]]] = {}
    for task in sorted(path for path in folder.glob("*") if path.is_dir()):
        rows: dict[str, list[Picture]] = {}
        for file in sorted(task.glob("*.png")):
            number, _, caption = file.stem.split("-", 2)
            rows.setdefault(number, []).append((caption, read_picture(file)))
        pictures[task.name] = list(rows.values())
    return pictures
