"""The ONNX formats, each read back by onnxruntime in a process that has neither delvm nor torch."""

import builtins
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx as onnx_format
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaConfig

from delvm import llama
from delvm.errors import UserError
from delvm.export import export, onnx
from delvm.export.quality import Sentences, measure, random_sentences
from delvm.export.usage import ONNX
from delvm.generation import complete
from delvm.tokenizer.vqgan import Tokenizer
from delvm.tokens.sentences import IMAGE, SPECIAL
from tests.exports import (
    CARD,
    NUM_CODES,
    PATCH,
    SIZE,
    draw_pictures,
    isolated,
    prompt_of,
    tiny_run,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tokenizer = tiny_tokenizer(attention=True, unit_codes=True, pixel_range=(0.0, 1.0))
    return tiny_run(tmp_path_factory.mktemp("run"), tokenizer)


@pytest.fixture(scope="module")
def exported(run):
    out = run / "onnx"
    export(run / "student", run / "tokenizer", out, num_codes=NUM_CODES, card=CARD, format="onnx")
    draw_pictures(out)
    return out


@pytest.fixture(scope="module")
def int8(exported):
    out = exported.with_name("int8")
    shutil.copytree(exported, out)
    onnx.quantize(out)
    return out


def random_model(seed=0, **changes):
    config = LlamaConfig(
        **{
            "vocab_size": 26, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": None,
            "eos_token_id": None,
        } | changes
    )  # fmt: skip
    model = llama.initialise(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
            else:
                parameter.mul_(3)
    return model


def read(file, parts):
    """What the graph in a file says after each part, (rows, n) int64, of a sentence."""
    session = onnxruntime.InferenceSession(str(file))
    states = session.get_inputs()[1:]
    past = [np.zeros((len(parts[0]), x.shape[1], 0, x.shape[3]), np.float32) for x in states]
    found = []
    for part in parts:
        feed = {x.name: state for x, state in zip(states, past, strict=True)}
        logits, *past = session.run(None, {"input_ids": part, **feed})
        found.append(logits)
    return found


# --- the model's graph ---


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3), key_heads=st.sampled_from([1, 2, 4]), head_dim=st.sampled_from([4, 8, 10]),
    bias=st.booleans(), mlp_bias=st.booleans(), tied=st.booleans(), eps=st.sampled_from([1e-6, 1e-2]),
    rope=st.sampled_from(
        [
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        ]
    ),
    rows=st.integers(1, 3), cuts=st.sets(st.integers(1, 10)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_llama_read_in_any_parts_has_transformers_logits(
    tmp_path_factory, layers, key_heads, head_dim, bias, mlp_bias, tied, eps, rope, rows, cuts, seed
):
    model = random_model(
        seed, num_hidden_layers=layers, num_key_value_heads=key_heads, head_dim=head_dim, rms_norm_eps=eps,
        attention_bias=bias, mlp_bias=mlp_bias, tie_word_embeddings=tied, rope_parameters=rope,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.write_model(model, file)
    ids = np.random.default_rng(seed).integers(26, size=(rows, 11))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    parts = np.split(ids, sorted(cuts), axis=1)
    for logits, end in zip(read(file, parts), [*sorted(cuts), 11], strict=True):
        np.testing.assert_allclose(logits, expected[:, end - 1], atol=1e-4 * max(1, abs(expected).max()))


def test_the_file_is_onnx_of_one_copy_of_the_weights(tmp_path):
    model = random_model(tie_word_embeddings=True)
    onnx.write_model(model, tmp_path / "model.onnx")
    onnx_format.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    graph = onnx_format.load(tmp_path / "model.onnx")
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 18)]
    weights = {x.name: int(np.prod(x.dims)) for x in graph.graph.initializer if x.name.endswith(".weight")}
    assert sum(weights.values()) == sum(p.numel() for p in model.parameters())
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.graph.input
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_key_values.1.value"] == ["batch", 4, "past", 8]


def test_half_precision_becomes_float32(tmp_path):
    model = random_model().half()
    onnx.write_model(model, tmp_path / "model.onnx")
    ids = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(read(tmp_path / "model.onnx", [ids])[0], expected[:, -1], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: the model has 'gelu', ONNX here has silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: the model has 'dynamic', ONNX here has default, linear, llama3, yarn",
        ),
    ],
)
def test_what_has_no_graph_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        onnx.write_model(random_model(**changes), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


# --- int8 ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("largest", [onnx.LARGEST, 0])
def test_int8_is_the_layers_matrices_and_nothing_else(tmp_path, monkeypatch, tied, largest):
    monkeypatch.setattr(onnx, "LARGEST", largest)
    model = random_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied)
    onnx.write_model(model, tmp_path / "model.onnx")
    ids = np.random.default_rng(0).integers(26, size=(2, 12))
    exact = read(tmp_path / "model.onnx", [ids])[0]
    onnx.quantize(tmp_path)
    # what one file does not hold lies beside it
    names = {"model.onnx"} if largest else {"model.onnx", "model.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == names
    graph = onnx_format.load(tmp_path / "model.onnx").graph
    kept = {x.name: x for x in graph.initializer}
    columns = {name for name, x in kept.items() if name.endswith("_quantized") and x.data_type == 3}
    layers = {f"model.layers.{n}.{part}" for n in range(2) for part in ("mlp", "self_attn")}
    assert len(columns) == 14
    assert {name.rsplit(".", 2)[0] for name in columns} == layers
    assert all(abs(onnx_format.numpy_helper.to_array(kept[name])).max() <= 64 for name in columns)  # 7 bits
    embedding = onnx_format.numpy_helper.to_array(kept["model.embed_tokens.weight"])
    assert np.array_equal(embedding, model.model.embed_tokens.weight.detach().numpy())
    assert ("lm_head.weight" in kept) is not tied
    lossy = read(tmp_path / "model.onnx", [ids])[0]
    assert 1e-4 < abs(lossy - exact).max() < 0.1 * abs(exact).max()


# --- whole folders ---


def script_and(folder, out):
    """README.md's script, and what it computed."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    assert snippet[1] == ONNX.code
    keep = f"\nnp.savez({str(out)!r}, prompt=prompt, codes=np.concatenate(codes, axis=1), logits=logits)\n"
    return snippet[1] + keep


def test_the_projects_readme_has_the_script():
    assert f"```python\n{ONNX.code}```" in (Path(__file__).parents[1] / "README.md").read_text()


def test_the_cards_script_runs_without_torch_and_equals_transformers(run, exported, tmp_path):
    isolated(script_and(exported, tmp_path / "out.npz"), exported, "delvm", "torch", "transformers")
    theirs = np.load(tmp_path / "out.npz")
    tokenizer, model = Tokenizer.load(run / "tokenizer"), llama.load(run / "student")
    prompt = prompt_of(exported, tokenizer)
    assert np.array_equal(theirs["prompt"], prompt)
    codes = complete(model, prompt, 16, NUM_CODES)
    assert np.array_equal(theirs["codes"], codes)
    with torch.no_grad():
        logits = model(torch.cat([prompt, codes[:, :-1]], 1)).logits[:, -1].numpy()
    np.testing.assert_allclose(theirs["logits"], logits, atol=1e-4)
    ours = (tokenizer.decode(codes)[0].permute(1, 2, 0) * 255).round().numpy()
    drawn = np.array(Image.open(exported / "result.png"))
    assert abs(drawn - ours).max() <= 1
    assert drawn.std() > 1  # a picture, not a flat colour


def test_the_same_script_runs_int8(run, int8, tmp_path):
    isolated(script_and(int8, tmp_path / "out.npz"), int8, "delvm", "torch", "transformers")
    theirs = np.load(tmp_path / "out.npz")
    prompt = prompt_of(int8, Tokenizer.load(run / "tokenizer"))
    assert np.array_equal(theirs["prompt"], prompt)  # the tokenizer is exact
    assert np.array_equal(theirs["codes"], onnx.Graphs(int8).complete(prompt.numpy(), 16))
    with torch.no_grad():
        sentence = torch.cat([prompt, torch.from_numpy(theirs["codes"][:, :-1])], 1)
        logits = llama.load(run / "student")(sentence).logits[:, -1].numpy()
    assert 1e-4 < abs(theirs["logits"] - logits).max() < 0.1 * abs(logits).max()
    assert (int8 / "model.onnx").stat().st_size < 0.8 * (int8.with_name("onnx") / "model.onnx").stat().st_size


def test_files_and_settings(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.suffix != ".png"}
    assert names - {"tokenizer"} == {
        "README.md",
        "delvm_onnx.json",
        "model.onnx",
        "tokenizer/encoder.onnx",
        "tokenizer/decoder.onnx",
    }
    assert json.loads((exported / "delvm_onnx.json").read_text()) == {
        "opset": 18,
        "model": "model.onnx",
        "encoder": "tokenizer/encoder.onnx",
        "decoder": "tokenizer/decoder.onnx",
        "image_size": SIZE,
        "tokens_per_picture": (SIZE // PATCH) ** 2,
        "num_codes": NUM_CODES,
        "bos_token_id": NUM_CODES,
        "positions": 128,
    }
    assert "library_name: onnx\n" in (exported / "README.md").read_text()


def test_several_pictures_at_once(run, exported):
    tokenizer, graphs = Tokenizer.load(run / "tokenizer"), onnx.Graphs(exported, threads=1)
    pixels = np.random.default_rng(0).random((3, 3, SIZE, SIZE), dtype=np.float32)
    codes = tokenizer.encode(torch.from_numpy(pixels))
    assert len(set(codes.flatten().tolist())) > 2
    assert np.array_equal(graphs.encode(pixels), codes)
    np.testing.assert_allclose(graphs.decode(codes.numpy()), tokenizer.decode(codes), atol=1e-4)


def test_a_graph_of_something_else_is_refused(run, exported):
    graphs, model, other = onnx.Graphs(exported), llama.load(run / "student"), llama.load(run / "student")
    tokenizer, brighter = Tokenizer.load(run / "tokenizer"), Tokenizer.load(run / "tokenizer")
    onnx.check(graphs, model, tokenizer)
    other.model.norm.weight.data.mul_(1.01)
    with pytest.raises(UserError, match=r"^logits of the ONNX graph are \S+ apart from PyTorch's; nothing"):
        onnx.check(graphs, other, tokenizer)
    with pytest.raises(UserError, match="codes of the ONNX graph are"):
        onnx.check(graphs, model, tiny_tokenizer())
    brighter.vqgan.decoder.conv_out.bias.data.add_(0.2)
    with pytest.raises(UserError, match="pixels of the ONNX graph are"):
        onnx.check(graphs, model, brighter)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer/decoder.onnx", "delvm_onnx.json"])
def test_a_damaged_file_is_one_line(exported, tmp_path, name):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes((exported / name).read_bytes()[:-50])
    with pytest.raises(UserError) as caught:
        onnx.Graphs(tmp_path / "copy")
    assert str(caught.value).startswith(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *arguments, **settings):
        if name == "onnxruntime":
            raise ImportError(f"No module named {name!r}", name=name)
        return found(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^ONNX needs onnxruntime: pip install 'delvm\[onnx\]'$"):
        onnx.write(random_model(), tiny_tokenizer(), tmp_path)
    assert not any(tmp_path.iterdir())


# --- what is lost ---


def test_nothing_is_lost_in_float32_and_a_little_in_int8(run, exported, int8):
    model = llama.load(run / "student")
    sentences = random_sentences(10, 64, NUM_CODES)
    exact = measure(model, onnx.Graphs(exported), sentences)["random codes"]
    assert (exact.sentences, exact.same_code, exact.same_drawn) == (10, 1.0, 1.0)
    assert exact.lossy == pytest.approx(exact.exact, abs=1e-5)
    lossy = measure(model, onnx.Graphs(int8), sentences)["random codes"]
    assert lossy.exact == pytest.approx(exact.exact, abs=1e-9)
    assert 1e-6 < abs(lossy.lossy - lossy.exact) < 0.1
    assert 0.8 < lossy.same_code < 1


def test_the_loss_is_that_of_the_codes_alone(run, exported):
    model, graphs = llama.load(run / "student"), onnx.Graphs(exported)
    ids = torch.from_numpy(np.random.default_rng(1).integers(NUM_CODES, size=(3, 34)))
    ids[:, 0], ids[:, -1] = NUM_CODES, NUM_CODES + 1
    roles = torch.full((34,), IMAGE)
    roles[[0, -1]] = SPECIAL
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)
    expected = -sum(log_p[row, t, ids[row, t + 1]].item() for row in range(3) for t in range(32)) / 96
    found = measure(model, graphs, Sentences({"task": ids}, {"task": roles}))["task"]
    assert found.exact == pytest.approx(expected, abs=1e-5)
    assert found.same_drawn == 1.0
