import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from delvm import llama
from delvm.distill import slice as slicing
from delvm.distill.layers import LAYERS
from delvm.distill.slice import slice_embedding, slice_student
from delvm.distill.teacher import cast
from delvm.errors import UserError

CODES = 24


def configured(**settings):
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }
    return LlamaConfig(
        vocab_size=CODES,
        max_position_embeddings=32,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **shape | settings,
    )


def drawn(config, seed=0, spread=0.15):
    """A model in which nothing is small: biases and norms far from 0 and 1."""
    model = llama.initialise(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.7 * noise).exp() if "norm" in name else spread * noise)
    return model.eval()


def sentences_of(num=6, length=16, seed=0):
    return torch.randint(CODES, (num, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, sentences):
    with torch.no_grad():
        logits = model.eval()(sentences).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), sentences[:, 1:].flatten()).item()


configurations = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 12, 24]),
        "intermediate_size": st.sampled_from([8, 20]),
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([4, 8]),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
        "attn_implementation": st.sampled_from(["sdpa", "eager"]),
    }
)


@settings(max_examples=12, deadline=None)
@given(shape=configurations, shared=st.sampled_from([1, 2]), refit=st.booleans(), seed=st.integers(0, 99))
def test_own_configuration_gives_the_logits_back(shape, shared, refit, seed):
    shape["num_attention_heads"] = shape["num_key_value_heads"] * shared
    teacher = drawn(configured(**shape), seed)
    student = slice_student(teacher, copy.deepcopy(teacher.config), sentences_of(), refit=refit).eval()
    fresh = sentences_of(seed=seed + 1)
    torch.testing.assert_close(student(fresh).logits, teacher(fresh).logits, atol=1e-4, rtol=0)


@settings(max_examples=12, deadline=None)
@given(
    shape=configurations,
    shared=st.sampled_from([1, 2]),
    refit=st.booleans(),
    how=st.sampled_from(LAYERS),
)
def test_any_smaller_student_is_a_plain_model_that_trains(shape, shared, refit, how):
    shape["num_attention_heads"] = shape["num_key_value_heads"] * shared
    teacher = drawn(
        configured(
            attention_bias=shape["attention_bias"],
            mlp_bias=shape["mlp_bias"],
            tie_word_embeddings=not shape["tie_word_embeddings"],
        )
    )
    config = configured(**shape)
    student = slice_student(teacher, config, sentences_of(), layers=how, refit=refit)
    plain = llama.initialise(config, seed=0)
    assert student.config.to_dict() == plain.config.to_dict()
    assert student.training
    assert {k: (v.shape, v.dtype) for k, v in student.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in plain.state_dict().items()
    }
    assert all(p.requires_grad and p.is_leaf and p.isfinite().all() for p in student.parameters())
    batch = sentences_of(seed=1)
    before = loss_of(student, batch)
    optimizer = torch.optim.SGD(student.train().parameters(), 1e-3)
    student(batch, labels=batch).loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    optimizer.step()
    assert loss_of(student, batch) < before


def narrowed(**settings):
    return configured(**{"hidden_size": 12, "intermediate_size": 20, "num_key_value_heads": 1} | settings)


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_to_the_bit_and_nothing_around_is_touched(bias):
    teacher = drawn(configured(attention_bias=bias, mlp_bias=bias)).train()
    config = narrowed(num_attention_heads=2, num_hidden_layers=2, attention_bias=bias, mlp_bias=bias)
    weights = {name: (weight.data_ptr(), weight.clone()) for name, weight in teacher.state_dict().items()}
    modules, random = [*teacher.modules()], torch.random.get_rng_state()
    students = [slice_student(teacher, config, sentences_of()) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), random)
    for key, weight in students[0].state_dict().items():
        assert torch.equal(weight, students[1].state_dict()[key])
    for name, weight in teacher.state_dict().items():
        assert (weight.data_ptr(), True) == (weights[name][0], torch.equal(weight, weights[name][1]))
    assert [*teacher.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert teacher.training
    assert teacher.config.num_hidden_layers == 3
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


# What is kept


def test_a_stream_that_lives_in_few_directions_is_held_whole():
    """The teacher is a narrow model whose stream is turned into more channels: the narrow one comes back."""
    narrow = drawn(narrowed(num_attention_heads=2, attention_bias=True), spread=0.3)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0][:12]
    wide = drawn(
        narrowed(hidden_size=24, num_attention_heads=2, attention_bias=True, rms_norm_eps=5e-6)
    )  # the mean square, over twice the channels, is half as large
    with torch.no_grad():
        for key, weight in narrow.state_dict().items():
            target = wide.state_dict()[key]
            if "norm" in key:
                target.fill_(0.5**0.5)
            elif key.endswith("bias"):
                target.copy_(weight @ turn if "o_proj" in key else weight)
            elif "o_proj" in key or "down_proj" in key:
                target.copy_(turn.T @ weight)
            else:
                reads = key.removesuffix(".weight")
                target.copy_(weight * norm_before(narrow, reads) @ turn)
    student = slice_student(wide, narrow.config, sentences_of(20), refit=False).eval()
    batch = sentences_of(seed=5)
    torch.testing.assert_close(wide(batch).logits, narrow(batch).logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(student(batch).logits, narrow(batch).logits, atol=1e-3, rtol=1e-3)


def norm_before(model, name):
    """The weight of the norm that a linear layer reads; of the embedding none."""
    if name == "lm_head":
        return model.model.norm.weight
    if "self_attn" in name or "mlp" in name:
        layer = model.model.layers[int(name.split(".")[2])]
        return (layer.input_layernorm if "self_attn" in name else layer.post_attention_layernorm).weight
    return 1.0


def test_silent_heads_groups_channels_and_pairs_go():
    """What adds nothing is left out, so that nothing is lost."""
    teacher = drawn(configured(num_attention_heads=6, num_key_value_heads=3, attention_bias=True), spread=0.3)
    with torch.no_grad():
        for layer in teacher.model.layers:
            attention = layer.self_attn
            outputs = attention.o_proj.weight.view(24, 3, 2, 8)
            outputs[:, 1] = 0  # one group of two heads
            outputs[:, 0, 1] = 0  # and of the others one head each
            outputs[:, 2, 0] = 0
            for linear, heads in ((attention.q_proj, 6), (attention.k_proj, 3)):
                linear.weight.view(heads, 2, 4, 24)[:, :, 1::2] = 0  # every second rotary pair
                linear.bias.view(heads, 2, 4)[:, :, 1::2] = 0
            attention.v_proj.weight.view(3, 8, 24)[:, 4:] = 0
            attention.v_proj.bias.view(3, 8)[:, 4:] = 0
            layer.mlp.down_proj.weight[:, ::2] = 0
    config = configured(
        intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, head_dim=4, attention_bias=True
    )
    student = slice_student(teacher, config, sentences_of(20), refit=False).eval()
    batch = sentences_of(seed=7)
    torch.testing.assert_close(student(batch).logits, teacher(batch).logits, atol=1e-4, rtol=1e-4)


# What it is worth


def language(num, length=24, seed=0):
    """Codes that follow each other, nine times in ten, by one of two tables; a sentence has one."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.stack(
        [torch.randperm(CODES - 2, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    )
    table = tables[torch.randint(2, (num,), generator=generator)]
    codes = [torch.randint(CODES - 2, (num,), generator=generator)]
    for _ in range(length - 1):
        follow = table.gather(1, codes[-1][:, None]).squeeze(1)
        stray = torch.randint(CODES - 2, (num,), generator=generator)
        codes.append(torch.where(torch.rand(num, generator=generator) < 0.9, follow, stray))
    return torch.stack(codes, 1)


@pytest.fixture(scope="module")
def trained():
    """A teacher of 32 channels that knows the language."""
    config = configured(hidden_size=32, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=True)
    model = llama.initialise(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 20, (150 - step) / 100)
        batch = language(32, seed=step)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


CALIBRATION, HELD_OUT = language(64, seed=10**6), language(128, seed=10**6 + 1)


def smaller(teacher, **settings):
    config = copy.deepcopy(teacher.config)
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def sliced(teacher, refit=False, **cut):
    return slice_student(teacher, smaller(teacher, **cut), CALIBRATION, refit=refit)


def test_far_below_chance_and_better_the_wider(trained):
    teacher = loss_of(trained, HELD_OUT)
    chance = loss_of(llama.initialise(smaller(trained, hidden_size=16), seed=0), HELD_OUT)
    losses = [
        loss_of(
            slice_student(trained, smaller(trained, hidden_size=width), CALIBRATION, refit=False), HELD_OUT
        )
        for width in (8, 16, 24, 32)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(teacher, abs=1e-4)
    assert losses[1] < teacher + 0.5 * (chance - teacher)


def test_directions_are_better_than_channels(trained, monkeypatch):
    directions = loss_of(sliced(trained, hidden_size=16), HELD_OUT)

    directions_of = slicing._principal

    def channels(moments, num):
        if moments.dim() > 2:  # a head's values
            return directions_of(moments, num)
        strongest = moments.diagonal().topk(num).indices.sort().values
        return torch.eye(len(moments))[:, strongest]

    monkeypatch.setattr(slicing, "_principal", channels)
    assert directions < loss_of(sliced(trained, hidden_size=16), HELD_OUT) - 0.1


@pytest.mark.parametrize(
    "cut",
    [
        {"hidden_size": 16},
        {"num_attention_heads": 2},
        {"intermediate_size": 16},
        {"head_dim": 4},
        {"num_hidden_layers": 1},
    ],
    ids=lambda cut: "-".join(cut),
)
def test_refitting_lowers_the_loss(trained, cut):
    plain, refit = (loss_of(sliced(trained, refit=how, **cut), HELD_OUT) for how in (False, True))
    assert refit < plain


def test_a_teacher_in_bfloat16_gives_nearly_the_same_student_in_float32(trained):
    half = cast(copy.deepcopy(trained), torch.bfloat16)
    cut = {"hidden_size": 16, "num_hidden_layers": 1}
    one, two = (sliced(teacher, refit=True, **cut) for teacher in (trained, half))
    assert {parameter.dtype for parameter in two.parameters()} == {torch.float32}
    assert two.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loss_of(two, HELD_OUT) == pytest.approx(loss_of(one, HELD_OUT), abs=0.05)


# Embedding and head alone


def test_only_embedding_last_norm_and_head_are_the_sliced_ones():
    teacher = drawn(configured())
    config = narrowed(num_attention_heads=2)
    ends = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    sliced = slice_student(teacher, config, sentences_of()).state_dict()
    fresh = llama.initialise(config, seed=4).state_dict()
    random = torch.random.get_rng_state()
    student = slice_embedding(teacher, config, sentences_of(), 4)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert student.training
    for key, weight in student.state_dict().items():
        assert torch.equal(weight, sliced[key] if key in ends else fresh[key]), key


def test_an_embedding_fits_students_of_other_heads_and_more_layers():
    config = narrowed(num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=3, intermediate_size=80)
    student = slice_embedding(drawn(configured()), config, sentences_of(), 0)
    assert len(student.model.layers) == 5
    with pytest.raises(UserError, match="hidden_size: 32 is more than the teacher has; at most 24"):
        slice_embedding(drawn(configured()), narrowed(hidden_size=32), sentences_of(), 0)


# What it takes


def peak_bytes(run):
    """The most that `run` has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [
        event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert changes
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("hidden", [64, 128])
def test_slicing_takes_no_more_than_the_teacher_again(hidden, layers):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    teacher = drawn(configured(hidden_size=128, intermediate_size=336, num_hidden_layers=8, **sizes))
    config = configured(hidden_size=hidden, intermediate_size=160, num_hidden_layers=layers, **sizes)
    weights = sum(parameter.nbytes for parameter in teacher.parameters())
    assert peak_bytes(lambda: slice_student(teacher, config, sentences_of(2, 16))) < weights


def test_the_refit_works_layer_by_layer():
    """Statistics of a layer are gone when the next one's come: depth adds its weights alone."""
    peaks = []
    for depth in (4, 16):
        teacher = drawn(configured(num_hidden_layers=depth, intermediate_size=400))
        config = configured(num_hidden_layers=depth, intermediate_size=200)
        student = sum(parameter.nbytes for parameter in llama.initialise(config, seed=0).parameters())
        peaks.append(
            peak_bytes(lambda t=teacher, c=config: slice_student(t, c, sentences_of(2, 16))) - student
        )
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("how", LAYERS)
def test_packed_rows_are_read_sentence_by_sentence(how):
    teacher = drawn(configured(num_hidden_layers=4)).double()  # or the refit would make much of rounding
    config = configured(hidden_size=12, intermediate_size=20, num_hidden_layers=2)
    sentences = sentences_of(num=8, length=8)
    packed, positions = sentences.view(4, 16), torch.arange(8).repeat(4, 2)
    alone = slice_student(teacher, config, sentences, layers=how)
    together = slice_student(teacher, config, packed, positions=positions, layers=how)
    run_on = slice_student(teacher, config, packed, layers=how)
    fresh = sentences_of(seed=1)
    wanted = alone(fresh).logits
    torch.testing.assert_close(together(fresh).logits, wanted, atol=5e-3, rtol=0)
    assert (run_on(fresh).logits - wanted).abs().max() > 0.05  # which boundaries that are ignored would give
    one, other = (
        slice_embedding(teacher, config, rows, 0, positions=places).model.embed_tokens.weight
        for rows, places in ((sentences, None), (packed, positions))
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
