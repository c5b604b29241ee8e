import pytest
import torch

from delvm import llama
from delvm.generation import complete

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


def test_a_compiled_model_generates_uncompiled(model, prompts):
    def compile(graph, inputs):
        raise AssertionError("it compiles")

    expected = complete(model, prompts, 4, NUM_CODES)
    model.model.compile(backend=compile)
    assert torch.equal(complete(model, prompts, 4, NUM_CODES), expected)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="it compiles"):
        model(prompts)


def test_the_mode_is_left_as_it_was(model, prompts):
    model.train()
    complete(model, prompts, 2, NUM_CODES)
    assert model.training


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
