import math

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from delvm import llama
from delvm.errors import UserError
from delvm.generation import complete, complete_by_token, complete_queries, complete_sequences
from tools import bench_generation

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_CODES = 16


@pytest.fixture
def model():
    model = llama.build("micro", NUM_CODES + 2, 64, bos=NUM_CODES, eos=NUM_CODES + 1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


@pytest.fixture
def prompts():
    codes = torch.randint(0, NUM_CODES, (3, 20), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.full((3, 1), NUM_CODES), codes], 1)


def _naive(model, prompts, num_tokens):
    """The whole sentence through the model for every token; no cache."""
    ids = prompts
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1, :NUM_CODES].argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :]


def test_greedy_equals_the_naive_loop(model, prompts):
    found = complete(model, prompts, 32, NUM_CODES)
    assert found.shape == (3, 32)
    assert found.dtype == torch.int64
    assert torch.equal(found, _naive(model, prompts, 32))
    assert len({tuple(row.tolist()) for row in found}) > 1  # the prompts matter


CONFIGS = {
    "tied": {"tie_word_embeddings": True},
    "grouped keys": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "one key head, wide": {"num_key_value_heads": 1, "head_dim": 16},
    "stretched positions": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "eager": {"attn_implementation": "eager", "rms_norm_eps": 1e-2},
}


@pytest.fixture(params=CONFIGS)
def other(request):
    """A model of another shape than ours have."""
    settings = {"vocab_size": NUM_CODES + 2, "hidden_size": 32, "intermediate_size": 48, "bos_token_id": None}
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = LlamaConfig(**settings, **shape, eos_token_id=None, **CONFIGS[request.param])
    model = llama.initialise(config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # biases begin at 0, where a forgotten one would not show
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            parameter.mul_(5.0)
    return model


def _generated(model, prompts, num_tokens):
    """By transformers' own loop."""
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, suppress_tokens=[NUM_CODES, NUM_CODES + 1], use_cache=True
    )
    attended = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=attended, generation_config=settings)[:, prompts.shape[1] :]


@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_equals_transformers_generate(other, batch):
    prompts = torch.randint(0, NUM_CODES, (batch, 24), generator=torch.Generator().manual_seed(batch))
    expected = _generated(other, prompts, 40)
    assert torch.equal(complete(other, prompts, 40, NUM_CODES), expected)
    assert torch.equal(
        complete_queries(other, prompts[0, :9], prompts[:, 9:], 40, NUM_CODES)[0, 0], expected[0]
    )
    assert expected.unique().numel() > 2


def test_batched_equals_one_by_one(model, prompts):
    together = complete(model, prompts, 16, NUM_CODES)
    apart = torch.cat([complete(model, row[None], 16, NUM_CODES) for row in prompts])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_special_ids_are_never_generated_even_when_most_likely(model, prompts, temperature):
    # an untied head that always prefers the specials
    head = torch.nn.Linear(32, NUM_CODES + 2)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.arange(NUM_CODES + 2) * 10.0
    model.lm_head = head
    found = complete(model, prompts, 24, NUM_CODES, temperature=temperature)
    assert int(found.max()) < NUM_CODES
    assert int(found.min()) >= 0
    if temperature == 0:
        assert (found == NUM_CODES - 1).all()


def test_a_code_that_ends_texts_elsewhere_does_not_end_a_picture(model, prompts):
    expected = complete(model, prompts, 24, NUM_CODES)
    stops = int(expected[0, 2])
    model.config.eos_token_id = model.generation_config.eos_token_id = stops
    model.generation_config.repetition_penalty = 5.0
    assert torch.equal(complete(model, prompts, 24, NUM_CODES), expected)
    assert model.generation_config.eos_token_id == stops  # and they are left as they were


def test_sampling_depends_on_the_seed_alone(model, prompts):
    torch.manual_seed(1)
    first = complete(model, prompts, 24, NUM_CODES, temperature=1.0, seed=7)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = complete(model, prompts, 24, NUM_CODES, temperature=1.0, seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, complete(model, prompts, 24, NUM_CODES, temperature=1.0, seed=8))


def test_sampling_narrows_to_greedy(model, prompts):
    greedy = complete(model, prompts, 24, NUM_CODES)
    assert torch.equal(complete(model, prompts, 24, NUM_CODES, temperature=1e-4), greedy)
    assert torch.equal(complete(model, prompts, 24, NUM_CODES, temperature=1.0, top_p=1e-6), greedy)


def test_sampling_follows_the_models_probabilities(model, prompts):
    many = prompts[:1].expand(4000, -1)
    found = complete(model, many, 1, NUM_CODES, temperature=2.0)[:, 0]
    with torch.no_grad():
        expected = torch.softmax(model(prompts[:1]).logits[0, -1, :NUM_CODES] / 2.0, -1)
    shares = torch.bincount(found, minlength=NUM_CODES) / 4000
    assert (shares - expected).abs().max() < 0.03  # four standard errors


@pytest.mark.parametrize("top_p", [0.4, 0.75])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(model, prompts, top_p):
    many = prompts[:1].expand(4000, -1)
    found = complete(model, many, 1, NUM_CODES, temperature=3.0, top_p=top_p)[:, 0]
    with torch.no_grad():
        p = torch.softmax(model(prompts[:1]).logits[0, -1, :NUM_CODES] / 3.0, -1)
    kept = []
    for code in p.argsort(descending=True).tolist():
        kept.append(code)
        if p[kept].sum() >= top_p:
            break
    assert 1 < len(kept) < NUM_CODES
    assert set(found.tolist()) == set(kept)
    shares = torch.bincount(found, minlength=NUM_CODES)[kept] / 4000
    assert (shares - p[kept] / p[kept].sum()).abs().max() < 0.03


def test_a_draw_does_not_depend_on_the_rows_beside_it(model, prompts):
    three = complete(model, prompts, 24, NUM_CODES, temperature=2.0, seed=3)
    two = complete(model, prompts[:2], 24, NUM_CODES, temperature=2.0, seed=3)
    assert torch.equal(three[:2], two)
    same = complete(model, prompts[:1].expand(2, -1), 24, NUM_CODES, temperature=2.0, seed=3)
    assert not torch.equal(same[0], same[1])  # and yet rows do not share their draws


def test_a_longer_draw_begins_as_the_shorter(model, prompts):
    short = complete(model, prompts, 8, NUM_CODES, temperature=2.0)
    assert torch.equal(complete(model, prompts, 24, NUM_CODES, temperature=2.0)[:, :8], short)


def test_token_by_token_is_the_same(model, prompts):
    drawn = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    read = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: read.append(inputs[0].shape))
    found = []
    for code in complete_by_token(model, prompts, 10, NUM_CODES, **drawn):
        found.append(code)
        assert len(read) == len(found)  # nothing is drawn before it is asked for
        assert torch.is_grad_enabled()
    assert torch.equal(torch.stack(found, 1), complete(model, prompts, 10, NUM_CODES, **drawn))


# --- queries after one prefix ---


@pytest.fixture
def queries():
    return torch.randint(0, NUM_CODES, (5, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_shared_prefix_changes_nothing(model, prompts, queries, temperature, batch_size):
    whole = torch.cat([prompts[:1].expand(5, -1), queries], 1)
    expected = complete(model, whole, 30, NUM_CODES, temperature=temperature, top_p=0.9, seed=2)
    found = complete_queries(
        model, prompts[0], queries, 30, NUM_CODES,
        temperature=temperature, top_p=0.9, seed=2, batch_size=batch_size,
    )  # fmt: skip
    assert torch.equal(found, expected[:, None])


def test_the_prefix_is_read_once(model, prompts, queries):
    read = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: read.append(inputs[0].shape))
    complete_queries(model, prompts[0], queries, 2, NUM_CODES, candidates=2, temperature=1.0, batch_size=4)
    # prefix; two queries, their four sentences; two more; the last
    assert read == [(1, 21), (2, 7), (4, 1), (2, 7), (4, 1), (1, 7), (2, 1)]


def test_candidates_differ_and_the_first_stays(model, prompts, queries):
    settings = {"temperature": 1.5, "seed": 4}
    one = complete_queries(model, prompts[0], queries, 16, NUM_CODES, **settings)
    three = complete_queries(model, prompts[0], queries, 16, NUM_CODES, candidates=3, **settings)
    assert three.shape == (5, 3, 16)
    assert torch.equal(three[:, :1], one)
    rows = {tuple(row.tolist()) for row in three.flatten(0, 1)}
    assert len(rows) == 15


# --- sequences ---


@pytest.fixture
def frames():
    """Two sequences of three pictures of 9 codes; the model's 64 positions hold 7, with BOS 7 as well."""
    return torch.randint(0, NUM_CODES, (2, 3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bos", [None, NUM_CODES])
@pytest.mark.parametrize("number", [1, 4, 7])  # the last slides over three pictures
def test_a_sequence_slides_beyond_the_context(model, frames, bos, number):
    found = complete_sequences(model, frames, number, NUM_CODES, bos=bos)
    assert found.shape == (2, number, 9)
    begin = torch.tensor([[] if bos is None else [bos]], dtype=torch.int64).expand(2, -1)
    shown = frames
    for _ in range(number):  # picture by picture, each after at most six
        context = torch.cat([begin, shown[:, -6:].flatten(1)], 1)
        shown = torch.cat([shown, _naive(model, context, 9)[:, None]], 1)
    assert torch.equal(found, shown[:, 3:])


def test_more_pictures_than_fit_are_cropped_to_the_last(model, frames):
    long = torch.cat([frames, frames.flip(1), (frames + 1) % NUM_CODES], 1)
    assert torch.equal(
        complete_sequences(model, long, 2, NUM_CODES), complete_sequences(model, long[:, 3:], 2, NUM_CODES)
    )


def test_a_sampled_sequence_draws_on_where_a_window_ends(model, frames):
    found = complete_sequences(model, frames, 7, NUM_CODES, temperature=1.5, seed=1)
    fewer = complete_sequences(model, frames, 2, NUM_CODES, temperature=1.5, seed=1)
    assert torch.equal(found[:, :2], fewer)
    prompts = frames.flatten(1)
    assert torch.equal(
        complete(model, prompts, 36, NUM_CODES, temperature=1.5, seed=1), found[:, :4].flatten(1)
    )
    assert not torch.equal(found[0, 4], found[0, 3])


# --- the model as it is ---


def test_a_compiled_model_generates_uncompiled(model, prompts):
    def compile(graph, inputs):
        raise AssertionError("it compiles")

    expected = complete(model, prompts, 4, NUM_CODES)
    for part in (model.model, *model.model.layers):
        part.compile(backend=compile)
    assert torch.equal(complete(model, prompts, 4, NUM_CODES), expected)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="it compiles"):
        model(prompts)


def test_training_mode_is_left_and_does_not_matter(model, prompts):
    expected = complete(model, prompts, 24, NUM_CODES)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert torch.equal(complete(model, prompts, 24, NUM_CODES), expected)
    assert model.training


def test_mixed_precision(model, prompts):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = complete(model, prompts, 1, NUM_CODES)
        expected = model(prompts).logits[:, -1, :NUM_CODES].argmax(-1)
        drawn = complete(model, prompts, 24, NUM_CODES, temperature=1.0)
    assert torch.equal(found[:, 0], expected)
    assert drawn.unique().numel() > 2


def test_a_model_without_numbers(model, prompts, tmp_path):
    model.model.norm.weight.data.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"^the model: its logits are no numbers \(nan\)$"):
            complete(model, prompts, 2, NUM_CODES, temperature=temperature)
    llama.save(model, tmp_path / "burst")
    with pytest.raises(UserError, match=f"^{tmp_path}/burst: its logits are no numbers"):
        complete(llama.load(tmp_path / "burst"), prompts, 2, NUM_CODES)


def test_the_last_position_can_be_filled(model, prompts):
    assert complete(model, prompts, 64 - 21, NUM_CODES).shape == (3, 43)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 44}, r"num_tokens: 44 after a prompt of 21, .* 64 positions"),
        ({"num_tokens": 0}, "num_tokens: 0"),
        ({"num_codes": 19}, r"num_codes: 19, must be in 1\.\.18"),
        ({"num_codes": 0}, "num_codes: 0"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.inf}, "temperature: inf, must be .* finite"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"prompts": torch.zeros(0, 4, dtype=torch.int64)}, r"prompts: shape \(0, 4\)"),
        ({"prompts": torch.full((1, 4), 18)}, r"prompts: ids 18\.\.18, must be in 0\.\.17"),
    ],
)
def test_impossible_settings(model, prompts, changes, message):
    settings = {"prompts": prompts, "num_tokens": 4, "num_codes": NUM_CODES} | changes
    with pytest.raises(ValueError, match=message):
        complete(model, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 37}, r"num_tokens: 37 after a prompt of 28, .* 64 positions"),
        ({"candidates": 0}, "candidates: 0, must be at least 1"),
        ({"candidates": 2}, "candidates: 2 would be equal at temperature 0"),
        ({"batch_size": 0}, "batch_size: 0, must be at least 1"),
        ({"prefix": torch.zeros(0, dtype=torch.int64)}, r"prefix: shape \(1, 0\)"),
        (
            {"prefix": torch.zeros(1, 4, dtype=torch.int64)},
            r"prefix: shape \(1, 4\), must be \(at least 1,\)",
        ),
        ({"prefix": torch.full((4,), 18)}, r"prefix: ids 18\.\.18"),
        ({"queries": torch.zeros(0, 4, dtype=torch.int64)}, r"queries: shape \(0, 4\)"),
    ],
)
def test_impossible_queries(model, prompts, queries, changes, message):
    settings = {"prefix": prompts[0], "queries": queries, "num_tokens": 4, "num_codes": NUM_CODES} | changes
    with pytest.raises(ValueError, match=message):
        complete_queries(model, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pictures": 0}, "num_pictures: 0, must be at least 1"),
        ({"pictures": torch.zeros(2, 9, dtype=torch.int64)}, r"pictures: shape \(2, 9\)"),
        ({"pictures": torch.zeros(1, 1, 33, dtype=torch.int64)}, "33 after a prompt of 33, .* 64 positions"),
        ({"bos": 18}, r"pictures: ids 0\.\.18, must be in 0\.\.17"),
    ],
)
def test_impossible_sequences(model, frames, changes, message):
    settings = {"pictures": frames * 0, "num_pictures": 2, "num_codes": NUM_CODES} | changes
    with pytest.raises(ValueError, match=message):
        complete_sequences(model, **settings)


# --- its benchmark ---


def test_the_benchmark_compares_the_same_tokens(monkeypatch, capsys):
    small = ["--width", "64", "--layers", "2", "--prompt", "24", "--tokens", "8", "--batch", "1", "3"]
    monkeypatch.setattr("sys.argv", ["bench", *small, "--rounds", "1", "--precision", "fp32"])
    status = bench_generation.main()
    printed = capsys.readouterr().out
    assert status == int("missed: " in printed)
    assert printed.startswith("0.6M parameters, 24 + 8 tokens, 1 rounds\n")
    for batch in (1, 3):  # whatever this machine's times are
        (row,) = (line for line in printed.splitlines() if line.startswith(f"| fp32, batch {batch} |"))
        assert row.endswith("| 100.0% | 100.0% |")
        assert f": fp32, batch {batch}: " in printed


@pytest.mark.parametrize(
    ("faster", "equal", "precision", "status", "verdict"),
    [
        (1.5, 1.0, "fp32", 0, "generate; wanted: at least 1.5, with equal tokens\n"),
        (1.49, 1.0, "fp32", 1, "missed: fp32, batch 1: 1.49 times as fast"),
        (9.0, 0.99, "fp32", 1, "missed: fp32, batch 1: 9.00 times as fast"),
        (1.8, 0.99, "bf16", 0, "held: bf16, batch 1: 1.80 times as fast as generate; wanted: at least 1.8\n"),
        (1.79, 1.0, "bf16", 1, "missed: bf16, batch 1: 1.79 times as fast"),
    ],
)  # fmt: skip
def test_the_verdict_of_the_benchmark(monkeypatch, capsys, faster, equal, precision, status, verdict):
    found = bench_generation.Finding([1.0, 1 / faster, 0.1], [1.0, faster, 10.0], [1.0, equal, 1.0])
    monkeypatch.setattr(bench_generation, "compare", lambda *_: found)
    small = ["--width", "64", "--layers", "1", "--prompt", "24", "--tokens", "8", "--batch", "1"]
    monkeypatch.setattr("sys.argv", ["bench", *small, "--threads", "1", "--precision", precision])
    assert bench_generation.main() == status
    assert verdict in capsys.readouterr().out
