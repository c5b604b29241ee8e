"""A trained model and its tokenizer -> a folder that other programs load without delvm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.export import onnx, quality
from delvm.export.card import model_card
from delvm.export.quality import Sentences
from delvm.export.usage import ONNX, TRANSFORMERS, Usage
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer

RANDOM = 8
"""Sentences of random codes, on which a lossy format is measured where none are held out."""


def write_transformers(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model (safetensors, plain LlamaForCausalLM) and tokenizer/ (a diffusers.VQModel).

    The weights are untouched, so logits are equal. Generation settings: greedy, no id beyond the codes, no
    end but the length, which is one picture.
    """
    config = model.config
    config.use_cache = True  # off while training
    model.generation_config = GenerationConfig(
        suppress_tokens=list(range(tokenizer.num_codes, config.vocab_size)) or None,
        max_new_tokens=min(tokenizer.num_tokens, config.max_position_embeddings - 1),
        do_sample=False,
        use_cache=True,
        bos_token_id=config.bos_token_id,
        # None: only the length ends a picture; with an end, generation would pad and stop early
        eos_token_id=None,
        pad_token_id=None,
    )
    llama.save(model, folder, num_codes=tokenizer.num_codes)
    tokenizer.save(folder / "tokenizer")


@dataclass(frozen=True)
class Format:
    """What an exported folder consists of."""

    write: Callable[[LlamaForCausalLM, Tokenizer, Path], None]
    usage: Usage
    lossy: bool = False
    """Whether it computes something else than the model, and how much else has to be said."""


FORMATS: dict[str, Format] = {
    "transformers": Format(write_transformers, TRANSFORMERS),
    "onnx": Format(onnx.write, ONNX),
    "onnx-int8": Format(onnx.write_int8, ONNX, lossy=True),
}


def export(
    model_folder: Path,
    tokenizer_folder: Path,
    out_folder: Path,
    *,
    card: Mapping[str, Any],
    num_codes: int | None = None,
    format: str = "transformers",
    held_out: Sentences | None = None,
) -> None:
    """Writes a model and its tokenizer in one of FORMATS, and README.md. Nothing of their folders is run.

    Writes straight into out_folder: hand over a new one, rename it.

    Args:
        card: {"name": str, "metrics": model -> task -> metrics as evaluate/likelihood.py gives them,
            "recipe": YAML text, "data": one line a task}; each may be empty. Optionally "role", the exported
            model's name in metrics (default: its last).
        num_codes: what the model was trained on, where that is known.
        held_out: what a lossy format is measured on; default: random codes.

    Raises UserError for a folder that cannot be read, a model and a tokenizer that do not fit, and a model
    that the format has no way to write; OSError where the disk is full.
    """
    if format not in FORMATS:
        raise UserError(f"format: '{format}' is unknown; choices: {', '.join(FORMATS)}")
    form = FORMATS[format]
    model, tokenizer = llama.load(model_folder), load_tokenizer(tokenizer_folder)
    _check_codes(model, model_folder, tokenizer, tokenizer_folder, num_codes)
    out_folder.mkdir(parents=True, exist_ok=True)
    form.write(model, tokenizer, out_folder)
    measured: dict[str, Any] = {}
    if form.lossy:
        length = min(model.config.max_position_embeddings, 4 * tokenizer.num_tokens)
        sentences = held_out or quality.random_sentences(RANDOM, length, tokenizer.num_codes)
        measured["losses"] = quality.measure(model, onnx.Graphs(out_folder), sentences)
        measured["num_bytes"] = sum(file.stat().st_size for file in out_folder.glob(f"{onnx.MODEL}*"))
    text = model_card(model, tokenizer, card, form.usage, **measured)
    (out_folder / "README.md").write_text(text, encoding="utf-8")


def _check_codes(
    model: LlamaForCausalLM, folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path, num_codes: int | None
) -> None:
    """Refuse a tokenizer of another codebook."""
    codes = tokenizer.num_codes
    if num_codes is not None and codes != num_codes:
        raise UserError(f"{tokenizer_folder}: has {codes} codes; the model was trained on {num_codes}")
    if model.config.vocab_size < codes or not (num_codes or llama.codes_fit(model.config, codes)):
        raise UserError(f"{folder}: {llama.what_it_reads(model.config)}; its tokenizer has {codes} codes")
    for key in ("bos", "eos"):
        special = getattr(model.config, f"{key}_token_id")
        if special is not None and min(special if isinstance(special, list) else [special]) < codes:
            raise UserError(
                f"{tokenizer_folder}: has {codes} codes; the model's {key}_token_id, {special}, would be one"
            )
