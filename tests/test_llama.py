import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delvm import llama
from delvm.errors import UserError

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def micro():
    return llama.build("micro", 258, 64, bos=256, eos=257, seed=0)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        # by hand: V*H (twice when untied) + layers * (4 H^2 [+ 4 H] + 3 H I + 2 H) + H
        ("micro", 258 * 32 + 2 * (4 * 32**2 + 3 * 32 * 96 + 64) + 32),
        ("tiny", 258 * 128 + 4 * (4 * 128**2 + 3 * 128 * 320 + 2 * 128) + 128),
        ("tiny-192", 258 * 192 + 4 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 192),
        ("tiny-256", 258 * 256 + 4 * (4 * 256**2 + 3 * 256 * 672 + 2 * 256) + 256),
        ("tiny-256-deep", 258 * 256 + 8 * (4 * 256**2 + 3 * 256 * 672 + 2 * 256) + 256),
        ("tiny-256-flat", 258 * 256 + 1 * (4 * 256**2 + 3 * 256 * 672 + 2 * 256) + 256),
        ("tiny-384", 258 * 384 + 6 * (4 * 384**2 + 3 * 384 * 1024 + 2 * 384) + 384),
        ("80m", 2 * 8192 * 512 + 22 * (4 * 512**2 + 4 * 512 + 3 * 512 * 1536 + 2 * 512) + 512),
        ("300m", 299_504_640),  # "299.5M" in the reference's own files
        ("1b", 1_164_191_744),  # "1.164B"
        ("lvm-100m", 2 * 8292 * 640 + 22 * (4 * 640**2 + 3 * 640 * 1664 + 2 * 640) + 640),
        ("lvm-300m", 2 * 8292 * 1024 + 22 * (4 * 1024**2 + 3 * 1024 * 2688 + 2 * 1024) + 1024),
        ("lvm-600m", 2 * 8292 * 1536 + 22 * (4 * 1536**2 + 3 * 1536 * 4096 + 2 * 1536) + 1536),
        ("lvm-1b", 2 * 8292 * 2048 + 22 * (4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048),
        ("lvm-3b", 2 * 8292 * 3200 + 26 * (4 * 3200**2 + 3 * 3200 * 8640 + 2 * 3200) + 3200),
        ("lvm-7b", 2 * 8292 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096),
    ],
)
def test_parameters_of_every_size(size, parameters):
    assert llama.num_parameters(size) == parameters


def test_every_size_is_counted_above():
    counted = {args[0] for args in test_parameters_of_every_size.pytestmark[0].args[1]}
    assert counted == set(llama.SIZES)


def test_count_on_the_meta_device_equals_the_built_model_and_follows_the_vocabulary(micro):
    assert llama.num_parameters("micro", 258) == sum(p.numel() for p in micro.parameters())
    assert llama.num_parameters("300m", 8194) - llama.num_parameters("300m") == 2 * 2 * 1024


@pytest.mark.parametrize("name", list(llama.SIZES))
def test_sizes_are_consistent(name):
    size = llama.SIZES[name]
    assert size.hidden % size.heads == 0
    assert (size.hidden // size.heads) % 2 == 0  # rotary halves


def test_paper_sizes():
    for name, shape in {
        "80m": (512, 1536, 22, 4),
        "300m": (1024, 2816, 22, 8),
        "1b": (2048, 5632, 22, 16),
    }.items():
        size = llama.SIZES[name]
        assert (size.hidden, size.intermediate, size.layers, size.heads) == shape
        assert (size.attention_bias, size.tie_embeddings, size.rms_eps) == (True, False, 1e-5)
        assert (size.vocab_size, size.positions) == (8192, 2048)


@pytest.mark.parametrize(("name", "near"), [("300M", "300m"), ("tinny", "tiny"), ("lvm-1B", "lvm-1b")])
def test_unknown_size_names_the_nearest_and_all(name, near):
    message = f"size: '{name}' is unknown; nearest: .*{near}.*; choices: micro, tiny,"
    with pytest.raises(ValueError, match=message):
        llama.build(name, 258, 64)


def test_size_like_no_other_gets_no_hint():
    with pytest.raises(ValueError, match="size: 'huge!' is unknown; choices: micro"):
        llama.find_size("huge!")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"max_positions": 0}, "max_positions: 0"),
        ({"bos": 258}, r"bos: 258, must be an id of the vocabulary: 0\.\.257"),
        ({"eos": -1}, "eos: -1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        llama.build("micro", **{"vocab_size": 258, "max_positions": 8} | settings)


def test_configuration_holds_our_specials_and_never_llamas_own(micro):
    config = micro.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, None)
    assert (config.use_cache, config.vocab_size, config.max_position_embeddings) == (False, 258, 64)
    assert micro.model.embed_tokens.padding_idx is None
    bare = llama.build("micro", 256, 64).config
    assert (bare.bos_token_id, bare.eos_token_id) == (None, None)


def test_biases_follow_the_size():
    config = llama.configuration("300m", 8192, 2048)
    assert config.attention_bias
    assert not config.mlp_bias
    with torch.device("meta"):
        layer = llama.LlamaForCausalLM(config).model.layers[0]
    assert layer.self_attn.o_proj.bias.shape == (1024,)
    assert layer.mlp.gate_proj.bias is None


def test_seed_alone_decides_the_weights_and_the_global_state_is_left():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = llama.build("micro", 258, 64, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second, third = llama.build("micro", 258, 64, seed=3), llama.build("micro", 258, 64, seed=4)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert first.training
    assert first.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_without_a_seed_the_global_state_decides():
    torch.manual_seed(5)
    first = llama.build("micro", 258, 64)
    second = llama.build("micro", 258, 64)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_delvms_scheme_has_its_standard_deviations(monkeypatch):
    monkeypatch.setitem(llama.SIZES, "untied", llama.Size(128, 384, 3, 4, attention_bias=True))
    config = llama.configuration("untied", 300, 16)
    default, drawn = (llama.initialise(config, seed=7, scheme=scheme) for scheme in ("default", "delvm"))
    expected = {"lm_head.weight": 0.0052, "model.embed_tokens.weight": 0.02}
    for layer, rising in enumerate((0.0042426, 0.003, 0.0024495)):  # 0.006 / sqrt(2), sqrt(4), sqrt(6)
        block = f"model.layers.{layer}"
        for name, std in {
            "self_attn.q_proj": 0.006,
            "self_attn.k_proj": 0.006,
            "self_attn.v_proj": 0.006,
            "self_attn.o_proj": rising,
            "mlp.gate_proj": 0.006,
            "mlp.up_proj": rising,
            "mlp.down_proj": 0.0015,
        }.items():
            expected[f"{block}.{name}.weight"] = std
    weights = dict(drawn.named_parameters())
    for name, std in expected.items():
        # of 16 thousand numbers or more: four standard errors are 2.3%
        assert weights[name].std().item() == pytest.approx(std, rel=0.023), name
        assert abs(weights[name].mean().item()) < 4 * std / weights[name].numel() ** 0.5, name
    for name, weight in default.named_parameters():  # embedding, norms and biases are as ever
        assert torch.equal(weight, weights[name]) == (name not in expected or "embed" in name), name
    again = llama.initialise(config, seed=7, scheme="delvm")
    assert torch.equal(again.lm_head.weight, drawn.lm_head.weight)
    assert drawn.training


def test_delvms_scheme_leaves_a_tied_head_with_the_embedding(micro):
    drawn = llama.initialise(micro.config, seed=0, scheme="delvm")
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight
    assert torch.equal(drawn.lm_head.weight, micro.lm_head.weight)
    assert drawn.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(0.0015, rel=0.06)


def test_an_unknown_scheme_is_refused_with_the_choices(micro):
    with pytest.raises(ValueError, match="scheme: 'xavier' is unknown; choices: default, delvm"):
        llama.initialise(micro.config, scheme="xavier")


@given(st.integers(0, 2**31), st.sampled_from(["micro"]))
def test_any_seed_builds_finite_weights(seed, size):
    model = llama.build(size, 10, 8, seed=seed)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_saved_and_loaded_gives_equal_logits(micro, tmp_path):
    llama.save(micro, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    again = llama.load(tmp_path / "model")
    assert not again.training
    assert again.config.eos_token_id == 257
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(micro.eval()(IDS).logits, again(IDS).logits)


def test_untied_model_with_biases_round_trips(tmp_path, monkeypatch):
    small = llama.Size(32, 96, 1, 2, attention_bias=True)
    monkeypatch.setitem(llama.SIZES, "micro-bias", small)
    model = llama.build("micro-bias", 20, 16, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    llama.save(model, tmp_path)
    again = llama.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS % 20).logits, again(IDS % 20).logits)


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: _edit(f, model_type="gpt2"), "holds a model of type 'gpt2'; expected 'llama'"),
        (_pickle, "the weights do not fit config.json: 20 tensors missing"),
        (_truncate, "the model cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "the model cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 500), "the model cannot be read"),
        (lambda f: _edit(f, num_hidden_layers=3), "the weights do not fit config.json: 9 tensors missing"),
        (lambda f: _edit(f, num_hidden_layers=1), "9 tensors unknown"),
        (
            lambda f: _edit(f, vocab_size=300),
            r"1 tensors of another shape \(first: model.embed_tokens.weight\)",
        ),
        (lambda f: _edit(f, hidden_size="wide"), "config.json: cannot be read"),
    ],
)
def test_damaged_folder_is_one_line(micro, tmp_path, damage, message):
    llama.save(micro, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        llama.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder_is_never_looked_up_elsewhere(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        llama.load(tmp_path / "openai-community")


def test_disk_full_is_an_os_error(micro):
    with pytest.raises(OSError, match=r"/dev/full"):
        llama.save(micro, "/dev/full/model")


def test_a_saved_model_says_which_codes_it_reads_and_others_are_judged_by_their_vocabulary(tmp_path):
    model = llama.build("micro", 116, 64, bos=115, eos=20, seed=0)
    llama.save(model, tmp_path / "ours", num_codes=16)
    config = llama.load_config(tmp_path / "ours")
    assert (config.num_codes, config.vocab_size) == (16, 116)
    assert [codes for codes in range(1, 130) if llama.codes_fit(config, codes)] == [16]
    assert llama.what_it_reads(config) == "was trained on 16 codes"
    published = llama.configuration("micro", 8292, 64)  # LVM's
    fitting = [codes for codes in (4096, 8162, 8163, 8292, 8293) if llama.codes_fit(published, codes)]
    assert fitting == [8163, 8292]
    assert llama.what_it_reads(published) == "has a vocabulary of 8292"
