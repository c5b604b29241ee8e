"""Published checkpoints: each in its true layout, written here or by the project itself, read exactly."""

import ctypes
import gc
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from delvm import fit, llama, published
from delvm.errors import UserError
from tools import convert_model

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs files that DeLVM wrote")

HIDDEN, HEADS, LAYERS, MLP, CODES, CODE_DIM = 32, 4, 3, 256, 40, 8
IDS = torch.randint(CODES, (2, 20), generator=torch.Generator().manual_seed(9))


# --- DeLVM as its training leaves it ---


def delvm_state(num_codes=CODES, hidden=HIDDEN, mlp=MLP, seed=0):
    """The weights of one checkpoint, by InternLM's names, whole, in float16; large enough to matter."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.vq_model.quantize.embedding.weight": (num_codes, CODE_DIM),
        "embedding.vq_model.encoder.conv_in.weight": (4, 3, 3, 3),
        "embedding.embed_proj.weight": (hidden, CODE_DIM),
    }
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        shapes |= {
            f"{block}.mixer.Wqkv.weight": (3 * hidden, hidden),
            f"{block}.mixer.Wqkv.bias": (3 * hidden,),
            f"{block}.mixer.out_proj.weight": (hidden, hidden),
            f"{block}.mixer.out_proj.bias": (hidden,),
            f"{block}.norm1.weight": (hidden,),
            f"{block}.norm2.weight": (hidden,),
            f"{block}.mlp.w1.weight": (mlp, hidden),
            f"{block}.mlp.w2.weight": (mlp, hidden),
            f"{block}.mlp.w3.weight": (hidden, mlp),
        }
    shapes |= {"norm.weight": (hidden,), "head.weight": (num_codes, hidden)}
    return {
        name: (torch.randn(shape, generator=draw) * 0.2 + ("norm" in name)).half()
        for name, shape in shapes.items()
    }


def delvm_logits(state, ids, eps=1e-5, embedding=None):
    """What InternLM's blocks compute of these weights: (batch, length) ids -> (batch, length, codes) float32.

    Written from the description of the format, with nothing of transformers.
    """
    state = {name: tensor.float() for name, tensor in state.items()}
    (batch, length), hidden = ids.shape, len(state["norm.weight"])
    dim = hidden // HEADS

    def norm(states, weight):
        return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(states):  # (batch, length, heads, dim): channel i and i + dim / 2 are one complex number
        turns = torch.outer(torch.arange(length), 10_000 ** (-torch.arange(dim // 2) / (dim // 2)))
        turned = (
            torch.complex(*states.split(dim // 2, -1)) * torch.polar(torch.ones_like(turns), turns)[:, None]
        )
        return torch.cat([turned.real, turned.imag], -1)

    if embedding is None:
        codes = state["embedding.vq_model.quantize.embedding.weight"][ids]
        states = codes @ state["embedding.embed_proj.weight"].T
    else:
        states = embedding.float()[ids]
    future = torch.ones(length, length).triu(1).bool()
    for layer in range(LAYERS):
        own = {
            n.removeprefix(f"blocks.{layer}."): t
            for n, t in state.items()
            if n.startswith(f"blocks.{layer}.")
        }
        read = norm(states, own["norm1.weight"])
        read = read @ own["mixer.Wqkv.weight"].T + own["mixer.Wqkv.bias"]
        queries, keys, values = read.view(batch, length, 3, HEADS, dim).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(queries), rotate(keys)) / dim**0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, length, hidden)
        states = states + mixed @ own["mixer.out_proj.weight"].T + own["mixer.out_proj.bias"]
        read = norm(states, own["norm2.weight"])
        gate, up = read @ own["mlp.w1.weight"].T, read @ own["mlp.w2.weight"].T
        states = states + (F.silu(gate) * up) @ own["mlp.w3.weight"].T
    return norm(states, state["norm.weight"]) @ state["head.weight"].T


def part_of(name, whole, part, parts):
    """What tensor-parallel process `part` holds; None: nothing."""

    def rows(tensor):
        return tensor.view(parts, -1, *tensor.shape[1:])[part]

    if "Wqkv" in name:  # its heads of queries, of keys, of values
        return torch.cat([rows(third) for third in whole.view(3, -1, *whole.shape[1:])])
    if name.endswith(("w1.weight", "w2.weight", "head.weight", "embed_proj.weight")):
        return rows(whole)
    if name.endswith(("out_proj.weight", "w3.weight")):
        return rows(whole.T.contiguous()).T
    return None if name.endswith("out_proj.bias") and part else whole


class Config(dict):
    """As DeLVM's, which is pickled by the name of its module."""


Config.__module__ = "internlm.core.context.parallel_context"


def write_config(folder, monkeypatch, **changes):
    settings = {
        "num_attention_heads": HEADS, "vocab_size": CODES, "hidden_size": HIDDEN, "num_layers": LAYERS,
        "mlp_ratio": 8 / 3, "dtype": torch.float16, "norm_type": "rmsnorm", "layer_norm_epsilon": 1e-5,
        "lvm_config": Config(enable=True),
    }  # fmt: skip
    with monkeypatch.context() as patch:  # pickle looks the class up in its module
        names = Config.__module__.split(".")
        for depth in range(1, len(names) + 1):
            patch.setitem(sys.modules, ".".join(names[:depth]), ModuleType(names[depth - 1]))
        sys.modules[Config.__module__].Config = Config
        torch.save(Config(settings | changes), folder / "model_config.pt")


def write_delvm(folder, state, monkeypatch, *, tensor=1, pipeline=(LAYERS,), **changes):
    """A checkpoint of so many tensor-parallel parts, and of pipeline parts with so many layers each."""
    folder.mkdir()
    write_config(folder, monkeypatch, **changes)
    first = 0
    for stage, layers in enumerate(pipeline):
        own = {}
        for name, whole in state.items():
            kind, number, *rest = name.split(".", 2)
            if kind == "blocks" and first <= int(number) < first + layers:
                own[f"blocks.{int(number) - first}.{rest[0]}"] = whole
            elif (kind == "embedding" and stage == 0) or (
                kind in ("norm", "head") and stage == len(pipeline) - 1
            ):
                own[name] = whole
        first += layers
        for part in range(tensor):
            pieces = {f"model.{name}": part_of(name, whole, part, tensor) for name, whole in own.items()}
            torch.save(
                {name: piece.clone() for name, piece in pieces.items() if piece is not None},
                folder / f"model_tp{part}_pp{stage}.pt",
            )
    return folder


@torch.no_grad()
def logits(model, ids=IDS):
    return model.float()(ids).logits


@pytest.fixture
def delvm(tmp_path, monkeypatch):
    return write_delvm(tmp_path / "delvm", delvm_state(), monkeypatch)


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(1, (3,)), (2, (3,)), (4, (3,)), (1, (2, 1)), (1, (1, 1, 1)), (2, (1, 2))]
)
def test_a_checkpoint_of_delvm_computes_what_internlms_blocks_do(tmp_path, monkeypatch, tensor, pipeline):
    state = delvm_state()
    folder = write_delvm(tmp_path / "delvm", state, monkeypatch, tensor=tensor, pipeline=pipeline)
    model = llama.load(folder)
    assert not model.training
    expected = delvm_logits(state, IDS)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 2048)
    stages = f"{len(pipeline)} pipeline part{'s' if len(pipeline) > 1 else ''}"
    assert stages in published.find(folder).layout
    assert len(published.find(folder).files) == tensor * len(pipeline)


def test_every_weight_of_the_block_counts(delvm):
    """The comparison above would see a wrong place: no two of these may change and leave the logits."""
    state = delvm_state()
    expected = delvm_logits(state, IDS)
    for name in state:
        if "vq_model.encoder" not in name:
            changed = {**state, name: state[name].flip(0)}
            assert (delvm_logits(changed, IDS) - expected).abs().max() > 1e-2, name


def test_the_embedding_is_folded_in_float32(delvm):
    state = delvm_state()
    codebook, projection = (
        state["embedding.vq_model.quantize.embedding.weight"],
        state["embedding.embed_proj.weight"],
    )
    weight = llama.load(delvm).model.embed_tokens.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, codebook.float() @ projection.float().T)
    assert not torch.equal(weight, weight.half().float())


def test_the_epsilon_and_the_width_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    state = delvm_state(mlp=512)
    folder = write_delvm(tmp_path / "delvm", state, monkeypatch, layer_norm_epsilon=1e-2, mlp_ratio=9.0)
    model = llama.load(folder)
    assert model.config.intermediate_size == 512  # 288, rounded up
    torch.testing.assert_close(logits(model), delvm_logits(state, IDS, eps=1e-2), atol=1e-4, rtol=0)
    assert (logits(model) - delvm_logits(state, IDS)).abs().max() > 1e-3


# --- DeLVM's transformers folders ---

NAMES = {
    "mixer.out_proj": "self_attn.o_proj", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj",
}  # fmt: skip
AUTO = {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"}


def write_delvm_hf(folder, state, **changes):
    """As DeLVM's own converter does: folded in float16, with the rotary frequencies."""
    codebook, projection = (
        state["embedding.vq_model.quantize.embedding.weight"],
        state["embedding.embed_proj.weight"],
    )
    tensors = {
        "model.embed_tokens.weight": codebook.mm(projection.T),
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for name, tensor in state.items():
        kind, number, *rest = name.split(".", 2)
        if kind != "blocks":
            continue
        prefix, (key, leaf) = f"model.layers.{number}", rest[0].rsplit(".", 1)
        if key == "mixer.Wqkv":
            for letter, third in zip("qkv", tensor.split(HIDDEN), strict=True):
                tensors[f"{prefix}.self_attn.{letter}_proj.{leaf}"] = third.clone()
        else:
            tensors[f"{prefix}.{NAMES[key]}.{leaf}"] = tensor
        tensors[f"{prefix}.self_attn.rotary_emb.inv_freq"] = torch.full((HIDDEN // HEADS // 2,), 7.0)
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        "architectures": ["InternLMForCausalLM"], "auto_map": AUTO, "bias": True, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "max_position_embeddings": 2048, "model_type": "internlm", "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "pad_token_id": 0, "rms_norm_eps": 1e-6, "torch_dtype": "float16",
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": CODES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder, tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_a_transformers_folder_of_delvm_keeps_its_epsilon_and_biases(tmp_path, eps):
    state = delvm_state()
    folder, embedding = write_delvm_hf(tmp_path / "hf", state, rms_norm_eps=eps)
    model = llama.load(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None,) * 3
    assert model.generation_config.eos_token_id is None
    assert model.dtype == torch.float16
    expected = delvm_logits(state, IDS, eps=eps, embedding=embedding)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_what_is_written_again_names_no_code_of_the_folder(tmp_path):
    folder, _ = write_delvm_hf(tmp_path / "hf", delvm_state())
    model = llama.load(folder)
    llama.save(model, tmp_path / "plain")
    assert "modeling_internlm" not in (tmp_path / "plain" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(again) is LlamaForCausalLM
    assert torch.equal(logits(again), logits(model))


@fixtures
@pytest.mark.parametrize("name", ["delvm_internlm", "delvm_hf"])
def test_the_files_that_delvm_wrote(name):
    ids, expected = (
        torch.from_numpy(np.load(FIXTURES / name / f"{file}.npy")) for file in ("input_ids", "logits")
    )
    torch.testing.assert_close(logits(llama.load(FIXTURES / name), ids), expected, atol=1e-4, rtol=0)


# --- LVM, and any other Llama ---

LVM = LlamaConfig(
    vocab_size=CODES + 6, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    rms_norm_eps=1e-6, max_position_embeddings=64,
)  # fmt: skip
OTHERS = {
    "grouped keys": {"num_key_value_heads": 2},
    "rotation of its own": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "tied, MLP with biases": {"tie_word_embeddings": True, "mlp_bias": True},
    "heads of their own width": {"head_dim": 12, "attention_bias": True},
}


def llama_of(config, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def to_bin(folder, *, zipped=True):
    """Turn shards of safetensors into those that torch.save writes, or wrote before it zipped them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        name = file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / name, _use_new_zipfile_serialization=zipped)
        for tensor, where in index["weight_map"].items():
            if where == file.name:
                index["weight_map"][tensor] = name
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture
def lvm(tmp_path):
    """A folder as LVM's: shards, and LLaMA's special ids, which are codes 1 and 2."""
    llama_of(LVM).save_pretrained(tmp_path / "lvm", max_shard_size="20KB")
    config = json.loads((tmp_path / "lvm" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    return tmp_path / "lvm"


@pytest.mark.parametrize("kind", ["safetensors", "zipped", "old"])
def test_shards_of_lvm(lvm, kind):
    if kind != "safetensors":
        to_bin(lvm, zipped=kind == "zipped")
    found = published.find(lvm)
    assert len(found.files) > 2
    assert {file.suffix for file in found.files} == {".safetensors" if kind == "safetensors" else ".bin"}
    assert found.layout == f"Llama, a transformers folder ({len(found.files)} files of weights)"
    assert torch.equal(logits(llama.load(lvm)), logits(llama_of(LVM)))


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_any_llama(tmp_path, changes):
    expected = llama_of(LlamaConfig(**LVM.to_diff_dict() | changes)).to(torch.bfloat16)
    expected.save_pretrained(tmp_path / "model")
    model = llama.load(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(model), logits(reference))


def test_mixed_precisions_become_the_one_that_holds_both(lvm):
    file = next(lvm.glob("*.safetensors"))
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    model = llama.load(lvm)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_special_ids_that_are_codes_are_taken_out_and_others_put_in(lvm):
    config = llama.load_config(lvm)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    model = llama.load(lvm, num_codes=CODES, bos=CODES, eos=CODES + 5)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (CODES, CODES + 5)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (CODES, CODES + 5)
    found = json.loads((lvm / "config.json").read_text())
    found |= {"bos_token_id": CODES - 1, "eos_token_id": [2, CODES, CODES + 1], "pad_token_id": CODES + 6}
    (lvm / "config.json").write_text(json.dumps(found))
    for num_codes, bos, eos in (
        (None, CODES - 1, [CODES, CODES + 1]),
        (CODES, None, [CODES, CODES + 1]),
        (CODES + 1, None, CODES + 1),
        (CODES + 2, None, None),
    ):
        config = llama.load_config(lvm, num_codes=num_codes)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (bos, eos, None), num_codes


def test_generation_goes_past_code_2(lvm):
    model = llama.load(lvm)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all codes are as likely, and greedy takes the first that may be
    drawn = model.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, suppress_tokens=[0, 1])
    assert drawn[0, 4:].tolist() == [2] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos": 2}, r"eos: 2, must be an id above the codes: 3\.\.45"),
        ({"bos": 39, "num_codes": CODES}, r"bos: 39, must be an id above the codes: 40\.\.45"),
        ({"eos": 46}, "eos: 46"),
        ({"num_codes": 8192}, "num_codes: 8192, the model has 46 ids"),
    ],
)
def test_impossible_special_ids(lvm, settings, message):
    with pytest.raises(UserError, match=message):
        llama.load(lvm, **settings)


def peak_growth(work):
    """Bytes by which this process' highest memory grew over what it had before, and the result."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but held would be taken again, unseen
    except (AttributeError, OSError):
        pytest.skip("the highest memory cannot be measured here")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    except OSError:
        pytest.skip("the highest memory cannot be measured here")

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result


@pytest.mark.parametrize("pickled", [False, True])
def test_loading_shards_takes_the_memory_of_one_copy(tmp_path, pickled):
    config = LlamaConfig(
        **LVM.to_diff_dict()
        | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "head_dim": 128}
    )
    size = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * 4
    assert size > 70e6
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="13MB")
    if pickled:
        to_bin(tmp_path)
    files = published.find(tmp_path).files
    assert len(files) >= 6
    growth, model = peak_growth(lambda: llama.load(tmp_path))
    assert sum(p.numel() for p in model.parameters()) * 4 == size
    # one copy, and the pages of the shard that is being read
    assert growth < 1.5 * size

    def at_once():
        read = dict(published.find(tmp_path).read())
        return read, {name: tensor.clone() for name, tensor in read.items()}

    growth, _ = peak_growth(at_once)
    assert growth > 1.9 * size  # two copies are seen


# --- what cannot be read ---


class Foreign:
    """Runs a program where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("file", ["model_config.pt", "model_tp0_pp0.pt", "pytorch_model.bin"])
def test_a_pickle_of_anything_else_is_refused_and_never_run(tmp_path, delvm, file):
    marker = tmp_path / "was-run"
    folder = delvm if (delvm / file).exists() else write_delvm_hf(tmp_path / "hf", delvm_state())[0]
    torch.save({"hidden_size": Foreign(marker)}, folder / file)
    with pytest.raises(UserError) as caught:
        llama.load(folder)
    expected = (
        f"{folder / file}: its pickle asks for posix.system, which is no tensor: refused, and never run"
    )
    assert str(caught.value) == expected
    assert not marker.exists()
    torch.load(folder / file, weights_only=False)
    assert marker.exists()  # it would have


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _resave(file, change):
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-200])


BLOCK, CODEBOOK = "model.blocks.1", "model.embedding.vq_model.quantize.embedding.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "delvm: no such folder"),
        (
            lambda f: (f / "model_config.pt").unlink(),
            "has no config.json and no model_config.pt; expected a transf",
        ),
        (lambda f: _cut(f / "model_config.pt"), "the model cannot be read: model_config.pt: "),
        (lambda f: torch.save([1], f / "model_config.pt"), "model_config.pt: holds no settings"),
        (lambda f: torch.save({}, f / "model_config.pt"), "model_config.pt: does not say hidden_size"),
        (lambda f: (f / "model_tp0_pp0.pt").unlink(), "has a model_config.pt and no model_tp0_pp0.pt"),
        (lambda f: _cut(f / "model_tp0_pp0.pt"), "the model cannot be read: model_tp0_pp0.pt: "),
        (lambda f: (f / "model_tp0_pp0.pt").write_bytes(b""), "the model cannot be read: model_tp0_pp0.pt: "),
        (
            lambda f: torch.save([torch.ones(1)], f / "model_tp0_pp0.pt"),
            "model_tp0_pp0.pt: holds no table of tens",
        ),
        (
            lambda f: shutil.copy(f / "model_tp0_pp0.pt", f / "model_tp1_pp1.pt"),
            "has no model_tp1_pp0.pt; the others are of 2 tensor-parallel and 2 pipeline parts",
        ),
        (
            lambda f: _resave(f / "model_tp0_pp0.pt", lambda t: t.pop(f"{BLOCK}.mlp.w2.weight")),
            r"do not fit model_config.pt: 1 tensors missing \(first: model.layers.1.mlp.up_proj.weight\)",
        ),
        (
            lambda f: _resave(
                f / "model_tp0_pp0.pt", lambda t: t.update({f"{BLOCK}.mlp.w2.bias": torch.ones(3)})
            ),
            r"1 tensors unknown \(first: blocks.1.mlp.w2.bias\)",
        ),
        (
            lambda f: _resave(
                f / "model_tp0_pp0.pt", lambda t: t.update({f"{BLOCK}.norm1.weight": torch.ones(3)})
            ),
            r"1 tensors of another shape \(first: model.layers.1.input_layernorm.weight\)",
        ),
        (
            lambda f: _resave(f / "model_tp0_pp0.pt", lambda t: t.pop(CODEBOOK)),
            "model_tp0_pp0.pt: has no embedding.vq_model.quantize.embedding.weight",
        ),
        (
            lambda f: _resave(f / "model_tp0_pp0.pt", lambda t: t.update({CODEBOOK: torch.ones(40, 9)})),
            r"embed_proj.weight do not fit: \(40, 9\), \(32, 8\)",
        ),
        (
            lambda f: _resave(
                f / "model_tp0_pp0.pt", lambda t: t.update({f"{BLOCK}.mixer.Wqkv.bias": torch.tensor(1.0)})
            ),
            r"blocks.1.mixer.Wqkv.bias: its parts do not fit: \(\)",
        ),
    ],
)
def test_a_damaged_checkpoint_of_delvm_is_one_line(delvm, damage, message):
    damage(delvm)
    with pytest.raises(UserError, match=message) as caught:
        llama.load(delvm)
    assert "\n" not in str(caught.value)
    assert str(delvm) in str(caught.value)


def test_parts_of_two_checkpoints_are_refused(tmp_path, monkeypatch):
    folder = write_delvm(tmp_path / "delvm", delvm_state(), monkeypatch, tensor=2)
    file = folder / "model_tp1_pp0.pt"
    _resave(file, lambda tensors: tensors.pop(f"{BLOCK}.mlp.w1.weight"))
    with pytest.raises(
        UserError, match=r"tp1_pp0.pt: has no blocks.1.mlp.w1.weight, which model_tp0_pp0.pt has"
    ):
        llama.load(folder)
    _resave(file, lambda tensors: tensors.update({f"{BLOCK}.mlp.w1.weight": torch.ones(128, 5)}))
    with pytest.raises(
        UserError, match=r"blocks.1.mlp.w1.weight: its parts do not fit: \(128, 32\), \(128, 5\)"
    ):
        llama.load(folder)


def _first_shard(folder):
    return min(folder.glob("*-0*"))


def _to_int(folder):
    file = next(f for f in folder.glob("*.bin") if "lm_head.weight" in torch.load(f))
    _resave(
        file, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: _edit(f / "config.json", model_type="internlm2"),
            "type 'internlm2'; expected 'llama' or 'internlm'",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: cannot be read: it holds no settings"),
        (
            lambda f: _first_shard(f).unlink(),
            "has no pytorch_model-00001-of-0000[0-9]+.bin, which pytorch_model.bin.index",
        ),
        (lambda f: _cut(_first_shard(f)), "the model cannot be read: pytorch_model-00001"),
        (
            lambda f: _edit(f / "pytorch_model.bin.index.json", weight_map={"a": "../other.bin"}),
            r"names '\.\./other.bin', which is no file of this folder",
        ),
        (lambda f: _edit(f / "pytorch_model.bin.index.json", weight_map=[]), "has no weight_map"),
        (
            lambda f: (f / "pytorch_model.bin.index.json").unlink(),
            "has no model.safetensors and no pytorch_model.bin, whole or in shards",
        ),
        (_to_int, r"1 tensors that are quantized \(first: lm_head.weight\)"),
        (lambda f: _edit(f / "config.json", num_attention_heads=0), "config.json"),
    ],
)
def test_a_damaged_transformers_folder_is_one_line(lvm, damage, message):
    to_bin(lvm)
    damage(lvm)
    with pytest.raises(UserError, match=message) as caught:
        llama.load(lvm)
    assert "\n" not in str(caught.value)
    assert str(lvm) in str(caught.value)


# --- the tool, and a teacher ---


def convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_model.py", *map(str, arguments)])
    return convert_model.main()


def test_the_tool_says_what_it_found_and_writes_a_plain_folder(delvm, lvm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert convert(monkeypatch, delvm, out / "delvm") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{delvm}: DeLVM, a checkpoint in InternLM's format (1 tensor-parallel part, 1 pipeline part)",
        f"{out / 'delvm'}: LlamaForCausalLM, 0.09M parameters in float32, 40 ids, 2048 positions",
    ]
    again = AutoModelForCausalLM.from_pretrained(out / "delvm").eval()
    torch.testing.assert_close(logits(again), delvm_logits(delvm_state(), IDS), atol=1e-4, rtol=0)

    assert convert(monkeypatch, lvm, out / "lvm", "--codes", CODES, "--bos", CODES) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "bos_token_id: 40 instead of 1",
        "eos_token_id: None instead of 2",
    ]
    config = json.loads((out / "lvm" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (CODES, None)
    generation = json.loads((out / "lvm" / "generation_config.json").read_text())
    assert generation.get("eos_token_id") is None
    assert sorted(path.name for path in out.iterdir()) == ["delvm", "lvm"]


def test_the_tool_refuses_in_one_line_and_leaves_nothing(delvm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "model"
    _cut(delvm / "model_tp0_pp0.pt")
    assert convert(monkeypatch, delvm, out) == 2
    assert capsys.readouterr().err.startswith(f"error: {delvm}: the model cannot be read: model_tp0_pp0.pt: ")
    assert not out.parent.exists()
    assert convert(monkeypatch, delvm, tmp_path) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: is there already; give a new folder\n"


def write_teacher(kind, folder, monkeypatch):
    """A checkpoint over the 16 codes of the finished run; returns what the recipe says besides its folder."""
    if kind == "delvm":
        write_delvm(folder, delvm_state(num_codes=16), monkeypatch, tensor=2, pipeline=(1, 2), vocab_size=16)
        return ["sentences.specials=false"]
    settings = {"vocab_size": 20, "max_position_embeddings": 128}
    llama_of(LlamaConfig(**LVM.to_diff_dict() | settings)).save_pretrained(folder, max_shard_size="20KB")
    to_bin(folder)
    return ["sentences.bos=16", "sentences.eos=19"]


@pytest.mark.parametrize("kind", ["delvm", "lvm"])
def test_a_published_teacher_distils(finished, tmp_path, monkeypatch, kind):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    own = write_teacher(kind, tmp_path / "teacher", monkeypatch)
    overrides = [f"run_dir={run}", f"teacher.folder={tmp_path / 'teacher'}", "scratch=null", *own]
    assert fit.run(finished / "micro.yaml", overrides) == 0
    teacher = llama.load(run / "teacher")
    assert torch.equal(logits(teacher, IDS % 16), logits(llama.load(tmp_path / "teacher"), IDS % 16))
    student = llama.load(run / "student")
    assert student.config.vocab_size == teacher.config.vocab_size
    curve = json.loads((run / "student" / "curve.json").read_text())
    assert all(0 < point["kd"] < 100 for point in curve)


def test_a_bare_pickle_is_refused_without_a_warning_and_not_run(lvm, tmp_path, recwarn):
    to_bin(lvm)
    (lvm / "pytorch_model.bin.index.json").unlink()
    ran = tmp_path / "ran"

    class Foreign:
        def __reduce__(self):
            return ran.touch, ()

    (lvm / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Foreign()}, protocol=4))
    with pytest.raises(UserError, match=r"^[^\n]*the model cannot be read: pytorch_model\.bin: [^\n]*$"):
        llama.load(lvm)
    assert not ran.exists()
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]
