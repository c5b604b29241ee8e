"""A size's name -> transformers' LlamaForCausalLM: build, count, save, load."""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from delvm import published
from delvm.embedding import EMBEDDINGS, CodebookEmbedding, fold
from delvm.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Size:
    """The shape of one LLaMA: everything but the vocabulary, the length and the special ids.

    `vocab_size` and `positions` are those that the size is published with; they serve to count and print.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    attention_bias: bool = False  # as in transformers: on q, k, v and the output projection
    tie_embeddings: bool = False
    rms_eps: float = 1e-5
    vocab_size: int = 8192
    positions: int = 2048


def _paper(hidden: int, heads: int) -> Size:
    # DeLVM (InternLM): the width of the MLP is int(H * 8/3), rounded up to a multiple of 256.
    intermediate = -(-int(hidden * 8 / 3) // 256) * 256
    return Size(hidden, intermediate, layers=22, heads=heads, attention_bias=True)


def _lvm(hidden: int, intermediate: int, layers: int, heads: int) -> Size:
    return Size(hidden, intermediate, layers, heads, rms_eps=1e-6, vocab_size=8292, positions=4096)


def _tiny(hidden: int, layers: int, heads: int) -> Size:
    # H * 8/3 rounded down to a multiple of 32. Tied: at this width a second table would be waste. Heads are
    # 32 channels wide in every tiny size, so that a student can take over a wider teacher's heads whole.
    intermediate = hidden * 8 // 3 // 32 * 32
    return Size(hidden, intermediate, layers, heads, tie_embeddings=True, vocab_size=258, positions=512)


SIZES: dict[str, Size] = {
    # for tests (35 thousand parameters) and for experiments of minutes on a CPU, with 256 codes
    "micro": Size(32, 96, layers=2, heads=2, tie_embeddings=True, vocab_size=258, positions=512),
    "tiny": _tiny(128, layers=4, heads=4),  # 0.79M
    "tiny-192": _tiny(192, layers=4, heads=6),  # 1.82M
    "tiny-256": _tiny(256, layers=4, heads=8),  # 3.18M
    "tiny-256-deep": _tiny(256, layers=8, heads=8),  # 6.29M
    "tiny-256-flat": _tiny(256, layers=1, heads=8),  # 0.84M
    "tiny-384": _tiny(384, layers=6, heads=12),  # 10.72M
    # DeLVM. The paper's text fixes 300M (299.5M) and 1B (1.164B); its 80M is nowhere specified: ours goes on
    # halving the width and the heads, which gives 83M.
    "80m": _paper(512, heads=4),
    "300m": _paper(1024, heads=8),
    "1b": _paper(2048, heads=16),
    # LVM (Bai et al. 2024), as in its published checkpoints: bias-free, 8192 codes and 100 specials
    "lvm-100m": _lvm(640, 1664, 22, 10),
    "lvm-300m": _lvm(1024, 2688, 22, 8),
    "lvm-600m": _lvm(1536, 4096, 22, 16),
    "lvm-1b": _lvm(2048, 5504, 22, 16),
    "lvm-3b": _lvm(3200, 8640, 26, 32),
    "lvm-7b": _lvm(4096, 11008, 32, 32),
}


def find_size(name: str) -> Size:
    """The entry of SIZES called `name`. Raises ValueError with the nearest names and all choices."""
    if name in SIZES:
        return SIZES[name]
    near = difflib.get_close_matches(str(name).lower(), SIZES, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"size: {name!r} is unknown; {hint}choices: {', '.join(SIZES)}")


def codes_fit(config: LlamaConfig, num_codes: int) -> bool:
    """Whether a model reads the codes of a tokenizer that has `num_codes`.

    A model that this project has saved says what it was trained on. Of another one it is taken for granted
    where the ids beyond the codes are few: BOS and EOS, LVM's 100 of 8292.
    """
    trained_on = getattr(config, "num_codes", None)
    if trained_on is not None:
        return bool(trained_on == num_codes)
    return 0 <= config.vocab_size - num_codes <= 2 + num_codes // 64


def what_it_reads(config: LlamaConfig) -> str:
    """What `codes_fit` goes by, in words."""
    trained_on = getattr(config, "num_codes", None)
    if trained_on is not None:
        return f"was trained on {trained_on} codes"
    return f"has a vocabulary of {config.vocab_size}"


def check_codes(config: LlamaConfig, num_codes: int) -> None:
    """Refuse a model for a tokenizer whose codes it does not read. Raises UserError, see `codes_fit`."""
    if not codes_fit(config, num_codes):
        raise UserError(f"{what_it_reads(config)}, the tokenizer has {num_codes} codes")


def configuration(
    size: str, vocab_size: int, max_positions: int, *, bos: int | None = None, eos: int | None = None
) -> LlamaConfig:
    """The transformers configuration of `size`. Raises ValueError for an unknown size, an id out of range."""
    entry = find_size(size)
    for key, value in (("vocab_size", vocab_size), ("max_positions", max_positions)):
        if value < 1:
            raise ValueError(f"{key}: {value}, must be at least 1")
    for key, special in (("bos", bos), ("eos", eos)):
        if special is not None and not 0 <= special < vocab_size:
            raise ValueError(f"{key}: {special}, must be an id of the vocabulary: 0..{vocab_size - 1}")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=entry.hidden,
        intermediate_size=entry.intermediate,
        num_hidden_layers=entry.layers,
        num_attention_heads=entry.heads,
        num_key_value_heads=entry.heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=entry.rms_eps,
        attention_bias=entry.attention_bias,
        mlp_bias=False,
        tie_word_embeddings=entry.tie_embeddings,
        # training never looks at a cache; generation asks for one itself (generation.py)
        use_cache=False,
        # said even when None: Llama's own defaults, 1 and 2, are image codes here
        bos_token_id=bos,
        eos_token_id=eos,
        # no padding id: sentences have one length, and an embedding row named as padding gets no gradient
        pad_token_id=None,
    )


def build(
    size: str,
    vocab_size: int,
    max_positions: int,
    *,
    bos: int | None = None,
    eos: int | None = None,
    seed: int | None = None,
) -> LlamaForCausalLM:
    """A freshly initialised float32 model on the CPU, in training mode.

    Weights are drawn by transformers' own scheme (normal, 0.02). With `seed` they depend on nothing else and
    the global random state is left alone; without it they follow the global state.
    Raises ValueError for an unknown size or an id outside the vocabulary.
    """
    return initialise(configuration(size, vocab_size, max_positions, bos=bos, eos=eos), seed=seed)


def initialise(
    config: LlamaConfig,
    *,
    seed: int | None = None,
    scheme: str = "default",
    embedding: str = "learned",
    codebook: Tensor | None = None,
) -> LlamaForCausalLM:
    """`build` for a configuration, its weights drawn by a scheme of SCHEMES.

    embedding: of EMBEDDINGS; but for `learned` it takes the tokenizer's codebook, (codes, code_dim) float.
    All other weights are those of the `learned` model of the same seed.

    Raises ValueError for an unknown one of either, no codebook, one of more codes than the model has ids, and
    for `codebook` with a tied head: logits would be products with vectors of few and frozen numbers.
    """
    for key, value, choices in (("scheme", scheme, SCHEMES), ("embedding", embedding, EMBEDDINGS)):
        if value not in choices:
            raise ValueError(f"{key}: {value!r} is unknown; choices: {', '.join(choices)}")
    if embedding == "codebook" and config.tie_word_embeddings:
        raise ValueError("embedding: 'codebook' is none to tie the head to; set tie_word_embeddings to False")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if embedding != "learned":
            if codebook is None:
                raise ValueError(f"codebook: missing, embedding '{embedding}' starts from one")
            with torch.random.fork_rng(devices=[]):  # what a scheme draws after it stays the same
                model.model.embed_tokens = CodebookEmbedding(
                    codebook, model.model.embed_tokens.weight, config.initializer_range
                )
        SCHEMES[scheme](model)
    if embedding == "codebook_start":
        fold(model)
    return model.train()


def keep(model: LlamaForCausalLM) -> None:
    """Leave the weights as they have been drawn: normal, 0.02; norms 1, biases 0."""


def draw_as_delvm(model: LlamaForCausalLM) -> None:
    """Draw the matrices anew as DeLVM does (Guo et al., ICML 2024), normal with mean 0, in place.

    Standard deviation, of layer l = 0, 1, ...: queries, keys, values and the MLP's gate 0.006; its way up and
    attention's output projection 0.006 / sqrt(2 (l + 1)); its way down 0.0015; the head 0.0052.
    So has the projection of codebook vectors, where the model reads these, as DeLVM does. A table of its own,
    rows of special ids and a head that is tied keep 0.02.
    """
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj):
            torch.nn.init.normal_(linear.weight, std=0.006)
        for linear in (attention.o_proj, mlp.up_proj):
            torch.nn.init.normal_(linear.weight, std=0.006 / math.sqrt(2 * (number + 1)))
        torch.nn.init.normal_(mlp.down_proj.weight, std=0.0015)
    if not model.config.tie_word_embeddings:
        torch.nn.init.normal_(model.lm_head.weight, std=0.0052)
    if isinstance(model.model.embed_tokens, CodebookEmbedding):
        torch.nn.init.normal_(model.model.embed_tokens.projection.weight, std=0.0052)


SCHEMES: dict[str, Callable[[LlamaForCausalLM], None]] = {"default": keep, "delvm": draw_as_delvm}
"""How weights are drawn, by name."""


def num_parameters(size: str, vocab_size: int | None = None) -> int:
    """Parameters of `size`, tied ones once, counted on the meta device: no memory, no random numbers."""
    entry = find_size(size)
    return count_parameters(configuration(size, vocab_size or entry.vocab_size, entry.positions))


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model of that configuration, as `num_parameters`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: LlamaForCausalLM, folder: str | Path, *, num_codes: int | None = None) -> None:
    """Writes config.json, generation_config.json, model.safetensors. Raises OSError where they do not fit.

    A model that reads a codebook is folded first, in place: what is written is a plain Llama.

    num_codes: of the tokenizer whose codes the model reads, where that is known; config.json says it.
    """
    if num_codes is not None:
        model.config.num_codes = num_codes
    fold(model)
    try:
        _quietly(lambda: model.save_pretrained(folder))
    except SafetensorError as error:  # a full disk reaches us under this name
        raise OSError(f"{folder}: the model could not be written: {_one_line(error)}") from error


def load_config(
    folder: str | Path, *, num_codes: int | None = None, bos: int | None = None, eos: int | None = None
) -> LlamaConfig:
    """The configuration that `load` gives its model. Raises as `load`; reads no weights."""
    return _mend_specials(published.find(folder).config, num_codes, bos=bos, eos=eos)


def load(
    folder: str | Path, *, num_codes: int | None = None, bos: int | None = None, eos: int | None = None
) -> LlamaForCausalLM:
    """A folder that `delvm.published` knows -> the model on the CPU, in evaluation mode.

    In its saved precision; of a checkpoint in InternLM's format, whose embedding is a product, in float32.
    Takes the memory of one copy. Runs nothing of the folder and never asks the network.

    Args:
        folder: of a Llama by transformers (this project's, LVM's), or of DeLVM.
        num_codes: ids below are image codes, and none of them stays a special id: published configurations
            have inherited LLaMA's 1 and 2, and generation would end at code 2. None: of the ids below 3 alone
            that is taken for granted.
        bos, eos: the special ids instead of those in the folder.

    Raises:
        UserError: in one line, a missing folder, one without configuration or weights, another kind of model,
            weights that are damaged, missing or of another shape, a pickle of anything but weights; special
            ids that are image codes or no ids of the model.
    """
    found = published.find(folder)
    config = _mend_specials(found.config, num_codes, bos=bos, eos=eos)
    try:
        with torch.device("meta"):  # shapes alone: the weights' memory is that which they come in
            model = LlamaForCausalLM(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # no weight, so in no file
    except (*_UNREADABLE, ZeroDivisionError, AssertionError) as error:
        raise UserError(
            f"{folder}: {found.config_file.name} describes no model: {_one_line(error)}"
        ) from error
    problems = _fill(model, found.read())
    if problems:
        raise UserError(f"{folder}: the weights do not fit {found.config_file.name}: {'; '.join(problems)}")
    model.name_or_path = str(folder)
    return model.eval()


def called(model: LlamaForCausalLM) -> str:
    """What an error calls a model: the folder that it was loaded from, if any."""
    return model.name_or_path or "the model"


def _fill(model: LlamaForCausalLM, weights: published.Weights) -> list[str]:
    """Give a model without memory its weights; returns what does not fit."""
    expected = dict(model.named_parameters())  # a tied head is none of its own
    missing, misshapen, untyped, unknown = set(expected), [], [], []
    for name, tensor in weights:
        if name.endswith("rotary_emb.inv_freq") or (name == HEAD and HEAD not in expected):
            continue  # written by older transformers, which computed the one and tied the other as well
        missing.discard(name)
        if name not in expected:
            unknown.append(name)
        elif tensor.shape != expected[name].shape:
            misshapen.append(name)
        elif not tensor.is_floating_point():
            untyped.append(name)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    problems = {
        "missing": missing,
        "of another shape": misshapen,
        "that are quantized": untyped,
        "unknown": unknown,
    }
    if not any(problems.values()):  # of several types, the one that holds them all
        common = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
        for parameter in model.parameters():
            parameter.data = parameter.data.to(common)
    return [
        f"{len(names)} tensors {words} (first: {min(names)})" for words, names in problems.items() if names
    ]


def _mend_specials(
    config: LlamaConfig, num_codes: int | None, *, bos: int | None, eos: int | None
) -> LlamaConfig:
    """Take out special ids that are image codes or no ids at all, and put in those given; in place."""
    vocabulary = config.vocab_size
    codes = min(LEAST_CODES, vocabulary) if num_codes is None else num_codes
    if not 0 <= codes <= vocabulary:
        raise UserError(f"num_codes: {codes}, the model has {vocabulary} ids")
    for key, special in (("bos", bos), ("eos", eos), ("pad", None)):
        if special is not None and not codes <= special < vocabulary:
            raise UserError(f"{key}: {special}, must be an id above the codes: {codes}..{vocabulary - 1}")
        found = getattr(config, f"{key}_token_id") if special is None else special
        listed = found if isinstance(found, list) else [found]
        kept = [each for each in listed if isinstance(each, int) and codes <= each < vocabulary]
        setattr(config, f"{key}_token_id", kept if len(kept) > 1 else kept[0] if kept else None)
    return config


HEAD = "lm_head.weight"
LEAST_CODES = 3  # no codebook has fewer
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError)


def _quietly(call: Callable[[], Result]) -> Result:
    """Without transformers' progress bars and its table of misfits: load says the same in one line."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return call()
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
