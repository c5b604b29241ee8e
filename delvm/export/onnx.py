"""A model and a tokenizer -> a folder for onnxruntime, checked against both; its weights in int8.

model.onnx              tokens, keys and values of those before -> logits of the last, keys and values
tokenizer/encoder.onnx  pixels -> codes
tokenizer/decoder.onnx  codes -> pixels
delvm_onnx.json         where these are, and the sizes that go with them
"""

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from delvm.errors import UserError
from delvm.export.graphs import OPSET, llama_graph, write_tokenizer
from delvm.tokenizer import Tokenizer
from delvm.tokenizer.vqgan import one_line, read_json

MODEL, ENCODER, DECODER = "model.onnx", "tokenizer/encoder.onnx", "tokenizer/decoder.onnx"
SETTINGS = "delvm_onnx.json"
LARGEST = 2**31 - 2**24
"""Bytes of weights that one file may hold; a protobuf ends at 2 GiB. More go into model.onnx.data."""
TOLERANCE = 1e-4
"""By how much logits and pixels may differ from PyTorch's, of 1 or of the largest where that is more."""

Past = dict[str, np.ndarray]
"""The keys and values of what was read, by the names of the graph's inputs."""


class Graphs:
    """Such a folder in onnxruntime, on the CPU."""

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """threads: 0 for one a core. Raises UserError for missing packages and damaged files."""
        require()
        import onnxruntime

        self.settings: dict[str, Any] = read_json(folder / SETTINGS)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            # the names are ours, and not the file's: those may point anywhere
            self.model, self.encoder, self.decoder = (
                onnxruntime.InferenceSession(str(folder / name), options)
                for name in (MODEL, ENCODER, DECODER)
            )
        except Exception as error:  # onnxruntime's have no class in common
            raise UserError(f"{folder}: no graphs that onnxruntime can read: {one_line(error)}") from error

    def begin(self, rows: int) -> Past:
        """The past of sentences of which nothing was read."""
        states = self.model.get_inputs()[1:]
        return {x.name: np.zeros((rows, x.shape[1], 0, x.shape[3]), np.float32) for x in states}

    def read(self, tokens: np.ndarray, past: Past) -> tuple[np.ndarray, Past]:
        """(rows, n) int64, what comes next -> (rows, vocabulary) float32, the logits after it; its past."""
        logits, *present = self.model.run(None, {"input_ids": tokens, **past})
        return logits, dict(zip(past, present, strict=True))

    def complete(self, prompts: np.ndarray, num_tokens: int) -> np.ndarray:
        """(rows, prefix) int64 -> (rows, num_tokens) int64, the most likely image code each time."""
        tokens, past, codes = prompts, self.begin(len(prompts)), []
        for _ in range(num_tokens):
            logits, past = self.read(tokens, past)
            tokens = logits[:, : self.settings["num_codes"]].argmax(-1, keepdims=True)
            codes.append(tokens)
        return np.concatenate(codes, 1)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(rows, 3, image_size, image_size) float32 in 0..1 -> (rows, tokens) int64."""
        return self.encoder.run(None, {"pixels": pixels})[0]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """(rows, tokens) int64 -> (rows, 3, image_size, image_size) float32 in 0..1."""
        return self.decoder.run(None, {"codes": codes})[0]


def require() -> None:
    """Raises UserError where a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'delvm[onnx]'") from error


def write(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder in float32, and computes with it what the model and the tokenizer compute.

    Both are float32 from then on. Raises UserError for a model that has no such graph, or whose graph
    computes something else.
    """
    require()
    (folder / ENCODER).parent.mkdir(parents=True, exist_ok=True)
    write_model(model, folder / MODEL)
    write_tokenizer(tokenizer, folder / ENCODER, folder / DECODER)
    settings = {
        "opset": OPSET,
        "model": MODEL,
        "encoder": ENCODER,
        "decoder": DECODER,
        "image_size": tokenizer.image_size,
        "tokens_per_picture": tokenizer.num_tokens,
        "num_codes": tokenizer.num_codes,
        "bos_token_id": model.config.bos_token_id,
        "positions": model.config.max_position_embeddings,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    check(Graphs(folder), model.float(), tokenizer)


def write_model(model: LlamaForCausalLM, file: Path) -> None:
    """Writes the model's graph, and beside it FILE.data where one file does not hold the weights."""
    import onnx

    graph = llama_graph(model)
    large = sum(weight.ByteSize() for weight in graph.graph.initializer) > LARGEST
    onnx.save(graph, file, save_as_external_data=large, location=f"{file.name}.data")


def check(graphs: Graphs, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Compare with PyTorch: a prompt and the two tokens after it, noise as codes, and codes as pixels.

    Raises UserError where they differ by more than TOLERANCE.
    """
    rng = np.random.default_rng(0)
    length = min(48, model.config.max_position_embeddings)
    ids = rng.integers(model.config.vocab_size, size=(2, length))
    pixels = rng.random((2, 3, tokenizer.image_size, tokenizer.image_size), dtype=np.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)).logits.numpy()
        codes = tokenizer.encode(torch.from_numpy(pixels))
        latents = tokenizer.to_latents(torch.from_numpy(pixels)).flatten(2).transpose(1, 2)
        # not the codes: of two that are as near, either will do
        distances = [
            (latents - tokenizer.codebook[found]).norm(dim=-1).numpy()
            for found in (torch.from_numpy(graphs.encode(pixels)), codes)
        ]
    past = graphs.begin(2)
    for part in np.split(np.arange(length), [length - 2, length - 1]):
        found, past = graphs.read(ids[:, part], past)
        _compare("logits", found, logits[:, part[-1]])
    _compare("codes", *distances)
    _compare("pixels", graphs.decode(codes.numpy()), tokenizer.decode(codes).numpy())


def _compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    apart = float(abs(found - expected).max())
    if not apart <= TOLERANCE * max(1.0, float(abs(expected).max())):
        raise UserError(f"{what} of the ONNX graph are {apart:.2g} apart from PyTorch's; nothing is written")


def write_int8(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """`write`, then the matrices of the model's layers in int8; see `quantize`."""
    write(model, tokenizer, folder)
    quantize(folder)


def quantize(folder: Path) -> None:
    """Replace the matrices of the layers by int8, each column with a scale of its own, in place.

    What is multiplied by them is rounded to uint8 while the graph runs (dynamic quantization). Embedding,
    head and tokenizer stay float32. Of int8 seven bits are used: with eight, processors without VNNI
    instructions add up two products in 16 bits, which overflow.
    """
    require()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory(dir=folder) as apart:
        for file in list(folder.glob(f"{MODEL}*")):
            file.rename(Path(apart) / file.name)
        exact = Path(apart) / MODEL
        logging.disable(logging.WARNING)  # it advises to fuse first, which onnxruntime does when it loads
        try:
            quantize_dynamic(
                exact, folder / MODEL, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8,
                per_channel=True, reduce_range=True, extra_options={"MatMulConstBOnly": True},
                use_external_data_format=exact.with_name(f"{MODEL}.data").exists(),
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
