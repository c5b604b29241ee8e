import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from delvm import llama, ranks, training
from delvm.distill.divergences import DIVERGENCES
from delvm.distill.teacher import PRECISIONS, SERVED, Hidden, Live, cast, serves
from delvm.errors import UserError
from tests.processes import together

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH = 12, 14


def _model(seed=0):
    model = llama.build("micro", VOCAB, LENGTH, seed=seed)
    with torch.no_grad():  # a fresh model is nearly uniform
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _tokens(num=4, length=LENGTH):
    return torch.randint(0, VOCAB, (num, length), generator=torch.Generator().manual_seed(0))


def _logits(target):
    return target.hidden.float() @ target.head.float().T


# --- Live ---


def test_live_gives_the_factors_of_the_logits_that_predict_the_next_token():
    model, tokens = _model(), _tokens()
    expected = model.eval()(tokens[:, :-1]).logits
    signal = Live(model)
    found = signal.targets({"tokens": tokens})
    assert isinstance(found, Hidden)
    assert (signal.kind, signal.vocabulary, signal.temperature) == ("live", VOCAB, None)
    assert found.hidden.shape == (4 * (LENGTH - 1), model.config.hidden_size)
    assert found.head.shape == (VOCAB, model.config.hidden_size)
    torch.testing.assert_close(_logits(found), expected.flatten(0, 1))
    assert expected.std() > 0.5  # else the test would see nothing


def test_the_last_token_is_not_read():
    signal, tokens = Live(_model()), _tokens()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    one, two = (signal.targets({"tokens": batch}).hidden for batch in (tokens, other))
    assert torch.equal(one, two)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled: graphs are captured as for any backend, and then run as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(training, "COMPILE_BACKEND", counter)
    torch._dynamo.reset()
    return counter


SIZES = (6, 8)
POSITIONS = torch.cat([torch.arange(size) for size in SIZES])[None]


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_sentences_are_read_as_they_are_alone(compiled, graphs):
    signal, tokens = Live(_model(), compile=compiled), _tokens(1)
    packed = _logits(signal.targets({"tokens": tokens, "positions": POSITIONS}))
    first, second = (_logits(Live(_model()).targets({"tokens": part})) for part in tokens.split(SIZES, dim=1))
    torch.testing.assert_close(packed[:5], first)
    torch.testing.assert_close(packed[6:], second)  # between them stands what the first one's end predicts
    run_on = _logits(signal.targets({"tokens": tokens}))
    torch.testing.assert_close(run_on, _logits(Live(_model()).targets({"tokens": tokens})))
    assert (packed[6:] - run_on[6:]).abs().max() > 0.1
    assert graphs.frame_count == (2 if compiled else 0)  # with a mask and without one; both layers share them


def test_the_teacher_is_frozen_and_hidden():
    model = _model().train()
    holder = torch.nn.Module()
    holder.signal = Live(model)
    assert list(holder.parameters()) == []
    assert holder.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    holder.train()
    model.train()  # whoever else holds it
    found = holder.signal.targets({"tokens": _tokens()})
    assert not any(part.training for part in model.modules())
    assert found.hidden.grad_fn is None
    assert not found.head.requires_grad


def test_a_student_beside_it_keeps_its_gradient():
    student, signal = torch.nn.Linear(32, VOCAB), Live(_model())
    found = signal.targets({"tokens": _tokens()})
    (student(found.hidden) - found.hidden @ found.head.T).square().mean().backward()  # no inference tensors
    assert student.weight.grad.abs().max() > 0


def test_an_autocast_around_does_not_reach_the_teacher():
    signal, tokens = Live(_model()), _tokens()
    expected = signal.targets({"tokens": tokens}).hidden
    with torch.autocast("cpu", torch.bfloat16):
        found = signal.targets({"tokens": tokens}).hidden
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_to_goes_where_it_is_sent():
    signal = Live(_model())
    assert signal.to(torch.device("cpu")) is signal
    assert signal.to(torch.device("meta")).model.lm_head.weight.is_meta


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"^precision: 'fp16' is unknown; choices: 32, bf16$"):
        Live(_model(), precision="fp16")


# --- precision ---


def _long_model(positions=2048):
    """Heads 64 wide; attention that looks far back by position, so that wrong phases show."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(10.0 if "q_proj" in name or "k_proj" in name else 1 if "norm" in name else 4.0)
    return model


def test_in_bfloat16_far_positions_stay_where_they_are():
    exact = _long_model()
    frequencies = exact.model.rotary_emb.inv_freq.clone()
    signal, naive = Live(copy.deepcopy(exact), precision="bf16"), copy.deepcopy(exact).to(torch.bfloat16)
    assert {parameter.dtype for parameter in signal.model.parameters()} == {torch.bfloat16}

    def phase_error(model):  # in rad, at position 1792
        return float((1792 * (model.model.rotary_emb.inv_freq.float() - frequencies)).abs().max())

    assert phase_error(signal.model) == 0
    assert phase_error(naive) > 0.5

    tokens = torch.randint(0, 32, (1, 2048), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, rounded = (m(tokens[:, :-1]).logits.float()[0] for m in (exact, naive))
    found = signal.targets({"tokens": tokens})
    assert (found.hidden.dtype, found.head.dtype) == (torch.bfloat16, torch.bfloat16)
    far = slice(1500, None)
    ours, theirs = ((logits - expected)[far].abs().mean().item() for logits in (_logits(found), rounded))
    assert ours < 0.05
    assert theirs > 4 * ours


def test_a_teacher_that_comes_rounded_is_put_right():
    rounded = _model().to(torch.bfloat16)
    for precision, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        model = Live(copy.deepcopy(rounded), precision=precision).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        expected = _model().model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)


def test_a_tied_head_stays_tied():
    model = cast(_model(), torch.bfloat16)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- shared among processes ---


def _parts(signal):
    """(a layer's numbers that are here, all of them); whether what is around the layers is whole."""
    layers = list(signal.model.model.layers.parameters())
    here = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in layers]
    around = [
        signal.model.model.embed_tokens.weight,
        signal.model.model.norm.weight,
        signal.model.lm_head.weight,
    ]
    whole = not any(isinstance(weight, DTensor) for weight in around)
    return sum(part.numel() for part in here), sum(weight.numel() for weight in layers), whole


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"compile": True}])
def test_shared_among_processes_the_teacher_says_the_same(settings, graphs):
    batches = [{"tokens": _tokens()}, {"tokens": _tokens(1), "positions": POSITIONS}]
    precision = settings.get("precision", "32")
    alone = Live(_model(), precision=precision)
    expected = [alone.targets(batch) for batch in batches]

    def work():
        signal = Live(_model(), sharded=True, **settings)
        assert signal.to(torch.device("cpu")).to(torch.device("cpu")) is signal  # shared once
        found, parts = [], [_parts(signal)]
        for batch in reversed(batches) if ranks.rank() else batches:  # each has rows of its own
            target = signal.targets(batch)
            assert (target.hidden.dtype, target.head.dtype) == 2 * (PRECISIONS[precision],)
            found.append(_logits(target).tolist())
        parts.append(_parts(signal))
        frequencies = signal.model.model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        return found, parts, frequencies.tolist(), graphs.frame_count

    for rank, result in enumerate(together(work)):
        found, parts, frequencies, num_graphs = result
        for one, target in zip(found, reversed(expected) if rank else expected, strict=True):
            torch.testing.assert_close(torch.tensor(one), _logits(target), rtol=0, atol=1e-6)
        for here, everywhere, whole in parts:  # before the pass and after it
            assert here == everywhere / 2
            assert whole
        assert frequencies == _model().model.rotary_emb.inv_freq.tolist()
        assert num_graphs == (2 if "compile" in settings else 0)


def test_one_process_has_all_of_a_shared_teacher():
    signal = Live(_model(), sharded=True).to(torch.device("cpu"))
    here, everywhere, whole = _parts(signal)
    assert here == everywhere
    assert whole
    expected = Live(_model()).targets({"tokens": _tokens()}).hidden
    assert torch.equal(signal.targets({"tokens": _tokens()}).hidden, expected)


# --- what a signal serves ---


class _Kind:
    vocabulary, temperature = VOCAB, None

    def __init__(self, kind):
        self.kind = kind


def test_the_teacher_itself_serves_every_divergence():
    for name in DIVERGENCES:
        serves(Live(_model()).kind, name)


@pytest.mark.parametrize(
    ("kind", "divergence", "choices"),
    [
        ("sampled", "reverse_kl", "forward_kl"),
        ("sampled", "taid", "forward_kl"),
        ("topk", "taid", "forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation"),
    ],
)
def test_a_divergence_that_a_cache_cannot_serve_is_refused(kind, divergence, choices):
    message = f"divergence: '{divergence}' cannot be had from a teacher's cache of kind '{kind}'"
    with pytest.raises(UserError, match=f"^{message}; choices: {choices}$"):
        serves(kind, divergence)
    for name in choices.split(", "):
        serves(kind, name)


@pytest.mark.parametrize("divergence", SERVED["topk"])
def test_one_bucket_for_the_rest_never_raises_a_divergence(divergence):
    student, teacher = _pair()
    compare = DIVERGENCES[divergence]
    coarse = compare(_coarse(student, teacher), _coarse(teacher, teacher))
    excess = coarse - compare(student, teacher)
    assert excess.max() < 1e-12
    assert excess.min() < -0.01


def test_what_taid_has_in_the_bucket_does_not_follow_from_it():
    student, teacher = _pair()
    ids = teacher.topk(5).indices
    others = teacher.scatter(-1, ids, torch.inf).argsort(-1)[:, :15]
    shuffled = teacher.scatter(-1, others, teacher.gather(-1, others.roll(1, dims=-1)))
    torch.testing.assert_close(_coarse(shuffled, teacher), _coarse(teacher, teacher))  # the same to a cache
    one, two = (_coarse((student + side) / 2, teacher).exp() for side in (teacher, shuffled))
    assert (one - two).abs().max() > 0.1


def _pair():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(500, 20, generator=generator, dtype=torch.float64) for _ in range(2))


def _coarse(logits, teacher):
    """Log-probabilities of the teacher's five likeliest codes and of all others together."""
    ids, log_p = teacher.topk(5).indices, logits.log_softmax(-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)
