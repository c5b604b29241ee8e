"""A model's folder as others wrote it -> a Llama's configuration, and its weights by transformers' names.

The files tell what a folder holds:

    config.json, model_type llama      LVM (Bai et al. 2024), this project's models, any LlamaForCausalLM
    config.json, model_type internlm   DeLVM (Guo et al. 2024), its transformers folders
    model_config.pt, model_tp*_pp*.pt  DeLVM as its training leaves it, InternLM's format

Nothing of a folder is run: its pickles are read by unpicklers that know tensors, and one class as a dict.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from delvm.errors import UserError

Weights = Iterator[tuple[str, Tensor]]

CONFIG, DELVM_CONFIG = "config.json", "model_config.pt"
DELVM_WEIGHTS = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")  # of a tensor-parallel and a pipeline part
DELVM_POSITIONS = 2048
"""Tokens of DeLVM's rows; its checkpoints do not say."""


@dataclass(frozen=True)
class Published:
    """A folder that was recognised, of whose weights nothing is read yet."""

    layout: str
    """What it is, in words."""
    config: LlamaConfig
    """With the special ids as published, which may be image codes."""
    config_file: Path
    """Where that stands."""
    files: list[Path]
    """Those that the weights are in."""
    read: Callable[[], Weights]
    """Yields the name and the tensor of every weight, each in memory of its own, and keeps none: who keeps
    them all has one copy. Raises UserError for a file that cannot be read."""


def find(folder: str | Path) -> Published:
    """What a folder holds, from its configuration and the names of its files.

    Raises:
        UserError: no such folder, an unknown layout, a file that is missing or a configuration that cannot be
            read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a transformers folder with a Llama")
    if (folder / CONFIG).is_file():
        return _transformers(folder)
    if (folder / DELVM_CONFIG).is_file():
        return _internlm(folder)
    raise UserError(
        f"{folder}: has no {CONFIG} and no {DELVM_CONFIG}; expected a transformers folder with a Llama, or a"
        " checkpoint of DeLVM"
    )


# --- transformers' folders ---

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights, the first that is there counts; in shards, NAME.index.json lists them."""
MODELS = {"llama": "Llama", "internlm": "DeLVM"}
"""The `model_type`s that can be read, and whose they are."""
NOT_LLAMAS = ("bias", "auto_map", "architectures")
"""Keys of config.json that mean nothing in a Llama's, or would have a reader run the folder's code."""


def _transformers(folder: Path) -> Published:
    file = folder / CONFIG
    found = _read_json(file)
    kind = found.get("model_type")
    if kind not in MODELS:
        choices = " or ".join(repr(name) for name in MODELS)
        raise UserError(f"{folder}: holds a model of type {kind!r}; expected {choices}")
    if kind == "internlm":  # a Llama, with biases in attention where `bias` says so
        found |= {"model_type": "llama", "attention_bias": found.get("bias", True), "mlp_bias": False}
    config = _config(file, {key: value for key, value in found.items() if key not in NOT_LLAMAS})
    files = _weight_files(folder)
    layout = f"{MODELS[kind]}, a transformers folder ({_count(len(files), 'file')} of weights)"
    return Published(layout, config, file, files, lambda: _read_files(files))


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: has no {' and no '.join(WEIGHTS)}, whole or in shards")


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: has no weight_map, which says where each tensor is")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is no file of this folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent}: has no {name}, which {index.name} names")
        files.append(index.parent / name)
    return files


def _read_files(files: Sequence[Path]) -> Weights:
    for file in files:
        for name, tensor in _tensors(file):
            yield name, tensor.clone()  # out of the file, which is mapped into memory


def _tensors(file: Path) -> Weights:
    """Of one file, mapped into memory."""
    if file.suffix != ".safetensors":
        yield from _load_pickle(file).items()
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- no mapping
                yield name, opened.get_tensor(name)
    except Exception as error:
        raise _unreadable(file, error) from error


# --- InternLM's format ---

TOKENIZER = "embedding.vq_model."  # what the names of the whole frozen VQGAN begin with
CODEBOOK, PROJECTION = f"{TOKENIZER}quantize.embedding.weight", "embedding.embed_proj.weight"
OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
QUERIES_KEYS_VALUES = re.compile(r"mixer\.Wqkv\.(weight|bias)")

# what a tensor is called in transformers, and the axis along which its tensor-parallel parts are put
# together; None: every part has the whole, or the first alone
WHOLE_MODEL: dict[str, tuple[str, int | None]] = {
    "norm.weight": ("model.norm.weight", None),
    "head.weight": ("lm_head.weight", 0),
}
BLOCK: dict[str, tuple[str, int | None]] = {
    "mixer.out_proj.weight": ("self_attn.o_proj.weight", 1),
    "mixer.out_proj.bias": ("self_attn.o_proj.bias", None),  # added once, to the sum of the parts' products
    "norm1.weight": ("input_layernorm.weight", None),
    "norm2.weight": ("post_attention_layernorm.weight", None),
    "mlp.w1.weight": ("mlp.gate_proj.weight", 0),
    "mlp.w2.weight": ("mlp.up_proj.weight", 0),
    "mlp.w3.weight": ("mlp.down_proj.weight", 1),
}


def _internlm(folder: Path) -> Published:
    file = folder / DELVM_CONFIG
    found = _read_internlm_config(file)
    try:
        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        settings = {
            "vocab_size": found["vocab_size"],
            "hidden_size": hidden,
            # rounded up to a multiple of 256
            "intermediate_size": -(-int(hidden * found.get("mlp_ratio", 8 / 3)) // 256) * 256,
            "num_hidden_layers": found["num_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "rms_norm_eps": found.get("layer_norm_epsilon", 1e-5),
        }
    except KeyError as error:
        raise UserError(f"{file}: does not say {error.args[0]}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise _unreadable(file, error) from error
    config = _config(
        file,
        settings
        | {"attention_bias": True, "mlp_bias": False, "max_position_embeddings": DELVM_POSITIONS}
        | {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    grid = _parts(folder)
    layout = (
        f"DeLVM, a checkpoint in InternLM's format ({_count(len(grid[0]), 'tensor-parallel part')},"
        f" {_count(len(grid), 'pipeline part')})"
    )
    return Published(
        layout, config, file, [part for stage in grid for part in stage], lambda: _read_internlm(grid)
    )


def _parts(folder: Path) -> list[list[Path]]:
    """Pipeline part -> tensor-parallel part -> file."""
    found = [match for path in folder.iterdir() if (match := DELVM_WEIGHTS.fullmatch(path.name))]
    if not found:
        raise UserError(f"{folder}: has a {DELVM_CONFIG} and no model_tp0_pp0.pt")
    tensor, pipeline = (1 + max(int(match[group]) for match in found) for group in (1, 2))
    grid = [[folder / f"model_tp{t}_pp{p}.pt" for t in range(tensor)] for p in range(pipeline)]
    for file in (file for stage in grid for file in stage):
        if not file.is_file():
            raise UserError(
                f"{folder}: has no {file.name}; the others are of {tensor} tensor-parallel and {pipeline}"
                " pipeline parts"
            )
    return grid


def _read_internlm(grid: Sequence[Sequence[Path]]) -> Weights:
    layers = 0
    for files in grid:
        parts = [{key.removeprefix("model."): t for key, t in _load_pickle(file).items()} for file in files]
        yield from _as_llama(files, parts, layers)
        # each pipeline part counts its layers from 0
        layers += len({block[1] for key in parts[0] if (block := OF_BLOCK.fullmatch(key))})


def _as_llama(files: Sequence[Path], parts: Sequence[Mapping[str, Tensor]], layers_before: int) -> Weights:
    """The tensor-parallel parts of one pipeline part -> its weights, whole.

    In float32: stored are float16, but their product, codebook times projection, is more than that.
    """

    def join(key: str, axis: int, third: int | None = None) -> Tensor:
        for file, part in zip(files, parts, strict=True):
            if key not in part:
                raise UserError(f"{file}: has no {key}, which {files[0].name} has")
        tensors = [part[key] for part in parts]
        try:
            return torch.cat([t if third is None else t.chunk(3)[third] for t in tensors], axis).float()
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{files[0].parent}: {key}: its parts do not fit: {_shapes(tensors)}") from error

    for key, tensor in parts[0].items():
        block = OF_BLOCK.fullmatch(key)
        prefix, name = (f"model.layers.{layers_before + int(block[1])}.", block[2]) if block else ("", key)
        table = BLOCK if block else WHOLE_MODEL
        if key == PROJECTION:
            yield "model.embed_tokens.weight", _fold(files[0], parts[0].get(CODEBOOK), join(key, 0))
        elif block and (kind := QUERIES_KEYS_VALUES.fullmatch(name)):
            for third, letter in enumerate("qkv"):  # each part has all three of its heads
                yield f"{prefix}self_attn.{letter}_proj.{kind[1]}", join(key, 0, third)
        elif name in table:
            target, axis = table[name]
            whole = tensor.to(torch.float32, copy=True) if axis is None else join(key, axis)
            yield prefix + target, whole
        elif not key.startswith(TOKENIZER):
            yield key, tensor  # unknown: who asked for the weights refuses it by its name


def _fold(file: Path, codebook: Tensor | None, projection: Tensor) -> Tensor:
    """(codes, code_dim), (width, code_dim) -> (codes, width) float32: what the model reads for each code."""
    if codebook is None:
        raise UserError(f"{file}: has no {CODEBOOK}")
    try:
        return codebook.float() @ projection.T
    except RuntimeError as error:
        shapes = _shapes([codebook, projection])
        raise UserError(f"{file}: {CODEBOOK} and {PROJECTION} do not fit: {shapes}") from error


# --- files ---


class _ConfigUnpickler(pickle.Unpickler):
    """Reads plain values, InternLM's configuration as a dict, and types of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("internlm.core.context.parallel_context", "Config"):
            return dict
        if module == "torch" and name in ("float16", "bfloat16", "float32", "float64"):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _read_internlm_config(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:  # as torch.save writes it
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as content:
                found = _ConfigUnpickler(content).load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no settings")
    return found


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save has written, mapped into memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is said below
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file}: holds no table of tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: cannot be read: it holds no settings")
    return found


def _config(file: Path, settings: dict[str, Any]) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(settings)
    except Exception as error:  # transformers checks them with whatever arithmetic it needs
        raise UserError(f"{file}: cannot be read: {_one_line(error)}") from error


def _unreadable(file: Path, error: Exception) -> UserError:
    if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(error))):
        return UserError(
            f"{file}: its pickle asks for {named[1]}, which is no tensor: refused, and never run"
        )
    return UserError(f"{file.parent}: the model cannot be read: {file.name}: {_one_line(error)}")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _one_line(error: BaseException) -> str:
    # torch advises to load without its safeguard before it says what it found
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return text.splitlines()[0][:300]
