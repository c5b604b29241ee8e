import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from delvm import fit, llama, training
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Live
from delvm.embedding import EMBEDDINGS, CodebookEmbedding, count_trained, fold
from delvm.pretrain import Pretrain, PretrainConfig, Step
from delvm.tokenizer import Tokenizer
from delvm.training import CHECKPOINT, Interrupted, TrainerConfig, set_up_model, train
from tests.processes import together
from tests.tiny_store import CODES, Repeated, Stopped, random_rows
from tools import compare_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH, CODE_DIM, WIDTH = CODES + 2, 14, 4, 32
TABLE, PROJECTION = "model.embed_tokens.weight", "model.embed_tokens.projection.weight"
SPECIALS = "model.embed_tokens.specials"
PLAIN = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))


def _codebook(scale=1.0, seed=0):
    return scale * torch.randn(CODES, CODE_DIM, generator=torch.Generator().manual_seed(seed))


def _config(tied=False, vocab=VOCAB):
    config = llama.configuration("micro", vocab, LENGTH)
    config.tie_word_embeddings = tied
    return config


def _model(embedding="codebook", seed=0, *, tied=False, vocab=VOCAB):
    return llama.initialise(_config(tied, vocab), seed=seed, embedding=embedding, codebook=_codebook())


def _sharp(seed=0):
    """One whose logits depend much on what it reads."""
    model = _model(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _tokens(num=4):
    """Codes and, in places, both special ids."""
    return torch.randint(0, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(0))


# --- what is read ---


def test_a_row_is_the_vector_through_the_projection_or_the_special_ids_own():
    embedding, codebook = CodebookEmbedding(_codebook(), PLAIN), _codebook()
    with torch.no_grad():
        embedding.projection.weight.copy_(torch.arange(WIDTH * CODE_DIM).view(WIDTH, CODE_DIM) / 100)
        embedding.specials.copy_(torch.tensor([[1.0], [2.0]]).expand(2, WIDTH))
    found = embedding(torch.tensor([[3, CODES + 1], [CODES, 0]]))
    projection = np.arange(WIDTH * CODE_DIM).reshape(WIDTH, CODE_DIM) / 100
    for code, place in ((3, (0, 0)), (0, (1, 1))):
        expected = projection @ codebook[code].double().numpy()
        np.testing.assert_allclose(found[place].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found[0, 1].tolist() == [2.0] * WIDTH
    assert found[1, 0].tolist() == [1.0] * WIDTH
    assert embedding.weight.shape == (VOCAB, WIDTH)
    assert torch.equal(found, embedding.weight[torch.tensor([[3, CODES + 1], [CODES, 0]])])


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_first_rows_have_one_scale_whatever_the_codebooks(scale):
    torch.manual_seed(0)
    codebook, plain = scale * torch.randn(200, 8), torch.randn(300, 256)
    table = CodebookEmbedding(codebook, plain, std=0.05).weight
    assert table[:200].square().mean().sqrt().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(table[200:], plain[200:])


def test_a_codebook_of_zeros_and_one_without_special_ids():
    flat = CodebookEmbedding(torch.zeros(3, 2), torch.ones(5, 8)).weight
    assert flat.tolist() == [[0.0] * 8] * 3 + [[1.0] * 8] * 2
    exact = CodebookEmbedding(_codebook(), torch.zeros(CODES, WIDTH))
    assert exact.specials.shape == (0, WIDTH)
    assert exact(torch.arange(CODES)).shape == (CODES, WIDTH)


def test_the_residual_stream_begins_in_float32_under_autocast():
    embedding, ids = CodebookEmbedding(_codebook(), PLAIN), torch.arange(VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, embedding(ids))


def test_the_callers_codebook_is_left_alone():
    codebook = _codebook().requires_grad_()
    embedding = CodebookEmbedding(codebook, PLAIN)
    embedding(torch.arange(VOCAB)).sum().backward()
    assert codebook.grad is None
    embedding.vectors.zero_()
    assert torch.equal(codebook, _codebook())


# --- a fresh model ---


def test_all_other_weights_are_those_of_the_learned_one():
    models = {kind: dict(_model(kind).named_parameters()) for kind in EMBEDDINGS}
    for kind in ("codebook", "codebook_start"):
        for name, weight in models["learned"].items():
            assert name == TABLE or torch.equal(models[kind][name], weight), name
    assert set(models["codebook"]) - set(models["learned"]) == {PROJECTION, SPECIALS}
    assert models["codebook_start"].keys() == models["learned"].keys()
    # the one starts where the other does
    assert torch.equal(models["codebook_start"][TABLE], _model("codebook").model.embed_tokens.weight)


def test_a_start_from_the_codebook_leaves_a_tied_head_tied():
    model = _model("codebook_start", tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    codes = model.lm_head.weight[:CODES].detach()
    assert torch.linalg.matrix_rank(codes) == CODE_DIM
    module = Pretrain(model, PretrainConfig(size="micro"), 10)
    module.training_step({"tokens": _tokens()})["loss"].backward()
    assert model.lm_head.weight.grad.abs().min() > 0  # of all ids, as they are read and as they are said


def test_delvms_scheme_draws_the_projection():
    config = llama.configuration("tiny", 300, 16)
    config.tie_word_embeddings = False
    codebook = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    drawn = {
        kind: llama.initialise(config, seed=3, scheme="delvm", embedding=kind, codebook=codebook)
        for kind in EMBEDDINGS
    }
    embedding = drawn["codebook"].model.embed_tokens
    assert embedding.projection.weight.std().item() == pytest.approx(0.0052, rel=0.03)
    assert embedding.specials.std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["codebook"].lm_head.weight.std().item() == pytest.approx(0.0052, rel=0.03)
    for name, weight in drawn["learned"].named_parameters():
        assert name == TABLE or torch.equal(drawn["codebook"].get_parameter(name), weight), name
    assert torch.equal(drawn["codebook_start"].model.embed_tokens.weight, embedding.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding": "none"}, "embedding: 'none' is unknown; choices: learned, codebook, codebook_start"),
        ({"embedding": "codebook"}, "codebook: missing, embedding 'codebook' starts from one"),
        (
            {"embedding": "codebook_start", "codebook": torch.zeros(VOCAB + 1, 2)},
            "codebook: 13 codes, the model has 12 ids",
        ),
    ],
)
def test_impossible_embeddings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        llama.initialise(_config(), **settings)


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match=r"^embedding: 'codebook' is none to tie the head to; set tie_w"):
        _model("codebook", tied=True)


# --- its training ---


class Gathered(torch.nn.Module):
    """The reference: the vectors of the ids themselves, projected, each special id's row put in its place."""

    def __init__(self, projection, specials):
        super().__init__()
        self.projection, self.specials = torch.nn.Parameter(projection), torch.nn.Parameter(specials)

    def forward(self, ids):
        vectors = _codebook().double()[ids.clamp(max=CODES - 1)]
        own = self.specials[(ids - CODES).clamp(min=0)]
        return torch.where((ids < CODES)[..., None], vectors @ self.projection.T, own)


def _reference():
    """`_sharp()` in float64, and how it reads."""
    model = _sharp().double()
    read = model.model.embed_tokens
    model.model.embed_tokens = Gathered(read.projection.weight.detach(), read.specials.detach())
    return model


def test_loss_and_gradients_are_those_of_float64():
    model, tokens = _sharp(), _tokens()
    module = Pretrain(model, PretrainConfig(size="micro"), 10)
    found = module.training_step({"tokens": tokens})["loss"]
    found.backward()
    reference = _reference()
    loss = cross_entropy(reference(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    read, expected = model.model.embed_tokens, reference.model.embed_tokens
    for one, two in (
        (read.projection.weight.grad, expected.projection.grad),
        (read.specials.grad, expected.specials.grad),
        (model.lm_head.weight.grad, reference.lm_head.weight.grad),
    ):
        assert two.norm() > 0.01  # else the test would see nothing
        assert ((one - two).norm() / two.norm()).item() < 1e-4
    assert read.vectors.grad is None
    assert not read.vectors.requires_grad


def test_a_student_that_reads_a_codebook_learns_by_the_formula():
    model, tokens = _sharp(), _tokens()
    teacher = llama.build("micro", VOCAB, LENGTH, seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3.0)
    module = Distill(model, Live(teacher), DistillConfig(size="micro", steps=10))
    found = module.training_step({"tokens": tokens})
    found["loss"].backward()
    reference = _reference()
    student = reference(tokens[:, :-1]).logits.flatten(0, 1)
    with torch.no_grad():
        said = teacher.double()(tokens[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    kd = (said.exp() * (said - student.log_softmax(-1))).sum(-1).mean()
    (cross_entropy(student, tokens[:, 1:].flatten()) + kd).backward()
    assert found["kd"].item() == pytest.approx(kd.item(), rel=1e-4)
    one, two = model.model.embed_tokens.projection.weight.grad, reference.model.embed_tokens.projection.grad
    assert ((one - two).norm() / two.norm()).item() < 1e-3


def test_the_optimizer_has_the_projection_and_not_the_codebook():
    module = Pretrain(_model(), PretrainConfig(size="micro", weight_decay=0.3), 10)
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert (decay[PROJECTION], decay[SPECIALS], decay["lm_head.weight"]) == (0.0, 0.0, 0.3)
    assert sum(p.numel() for n, p in module.named_parameters() if "embed_tokens" in n) == count_trained(
        module.model.config, CODES, CODE_DIM
    )
    assert count_trained(module.model.config, CODES, CODE_DIM) == (CODE_DIM + 2) * WIDTH


def _fit(folder, model, rows, steps=6, **settings):
    """(module, curve)."""
    folder.mkdir(exist_ok=True)
    module = Pretrain(model, PretrainConfig(size="micro", steps=steps, learning_rate=1e-2), steps)
    config = TrainerConfig(**{"accelerator": "cpu", "log_every": 1} | settings)
    set_up_model(model, config)
    curve = train(
        module, rows, name="teacher", steps=steps, batch_size=4, clip=1.0, config=config, folder=folder,
        tensorboard=folder / "tensorboard",
    )  # fmt: skip
    return module, curve


def _logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("settings", [{}, {"averaging": 0.5}, {"precision": "bf16-mixed"}])
def test_what_is_saved_is_plain_and_says_the_same(tmp_path, settings):
    module, curve = _fit(tmp_path / "run", _model(), random_rows(24), **settings)
    model, tokens = module.model, _tokens()
    read, before = model.model.embed_tokens, _logits(model, tokens)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert torch.equal(read.vectors, _codebook())
    started = _model().model.embed_tokens
    for name in ("projection.weight", "specials"):  # both have learnt
        assert (read.get_parameter(name) - started.get_parameter(name)).abs().max() > 1e-3
    llama.save(model, tmp_path / "saved", num_codes=CODES)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    plain = dict(llama.initialise(_config(), seed=0).named_parameters())
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in plain.items()}
    table = torch.cat([_codebook().double() @ read.projection.weight.double().T, read.specials.double()])
    np.testing.assert_allclose(weights[TABLE].numpy(), table.detach().numpy(), rtol=1e-5, atol=1e-7)
    again = llama.load(tmp_path / "saved")
    assert not again.config.tie_word_embeddings
    assert (_logits(again, tokens) - before).abs().max().item() <= 1e-6
    assert torch.equal(_logits(model, tokens), before)  # folded in place
    assert fold(model) is model  # nothing more to fold


def test_a_run_that_stops_goes_on_to_the_same_model(tmp_path):
    rows = random_rows(24)
    whole, curve = _fit(tmp_path / "whole", _model(), rows)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        _fit(tmp_path / "parts", _model(), Stopped(rows, 2 * 4))
    checkpoint = torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)
    assert {name for name in checkpoint["state_dict"] if "embed_tokens" in name} == {
        f"model.{PROJECTION}", f"model.{SPECIALS}"
    }  # fmt: skip
    # another start: all but the codebook must come from the checkpoint
    second, again = _fit(tmp_path / "parts", _model(seed=2), rows)
    assert again == curve
    for name, weight in fold(whole.model).state_dict().items():
        assert torch.equal(fold(second.model).state_dict()[name], weight), name


@pytest.mark.parametrize("specials", [True, False])
def test_two_processes_train_as_one(tmp_path, specials):
    rows = random_rows(12, length=7, specials=specials)  # cut rows: many have no special id

    def work(folder, **trainer):
        module, curve = _fit(folder, _model(vocab=VOCAB if specials else CODES), rows, steps=3, **trainer)
        return curve, fold(module.model).model.embed_tokens.weight.detach().numpy()

    curve, table = work(tmp_path / "one")
    for found, mine in together(lambda: work(tmp_path / "two", accumulate=2)):
        for one, two in zip(curve, found, strict=True):
            assert two == {key: pytest.approx(value, rel=1e-5) for key, value in one.items()}
        np.testing.assert_allclose(mine, table, atol=1e-5)


@pytest.mark.parametrize("settings", [{"checkpointing": True}, {"compile": True}, {"attention": "eager"}])
def test_the_models_settings_change_no_result(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(training, "COMPILE_BACKEND", "eager")
    rows = Repeated(random_rows(4), [0, 1, 2, 3] * 3)
    _, curve = _fit(tmp_path / "plain", _model(), rows, steps=3)
    _, found = _fit(tmp_path / "set", _model(), rows, steps=3, **settings)
    for one, two in zip(curve, found, strict=True):
        assert two == {key: pytest.approx(value, rel=1e-5) for key, value in one.items()}


def test_states_of_rows_are_those_of_the_folded_model():
    model, tokens = _sharp(), _tokens()
    module = Pretrain(model, PretrainConfig(size="micro"), 10)
    with torch.no_grad():
        before = module.hidden(Step.of({"tokens": tokens}))
        fold(model)
        assert torch.equal(module.hidden(Step.of({"tokens": tokens})), before)


# --- through the chain ---


def test_a_run_whose_models_read_the_codebook(micro, capsys):
    run_dir = micro.parent / "run"
    overrides = [f"run_dir={run_dir}", "teacher.embedding=codebook_start", "student.embedding=codebook",
                 "trainer.averaging=0.5", "sentences.validation=2", "prompting.queries=0",
                 "prompting.pictures=1"]  # fmt: skip
    assert fit.run(micro, overrides, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "teacher: its embedding starts from the codebook, 16 vectors of 4 numbers" in said
    line = (
        "student: reads the codebook, 16 vectors of 4 numbers, frozen; instead of 576 parameters its"
        " embedding trains 192"
    )
    assert line in said.splitlines()
    assert fit.run(micro, overrides) == 0
    note = (
        "student.embedding: size 'micro' ties its head to the embedding; one that reads the codebook leaves"
        " it a head of its own"
    )
    assert note in capsys.readouterr().out.splitlines()
    codebook = Tokenizer.load(run_dir / "tokenizer").codebook.detach()
    for role in ("scratch", "student"):
        model = llama.load(run_dir / role)
        assert not model.config.tie_word_embeddings
        table = model.model.embed_tokens.weight.detach()
        # a product with the codebook still, to the last of its dimensions
        fitted = codebook @ torch.linalg.lstsq(codebook, table[:16]).solution
        torch.testing.assert_close(fitted, table[:16], rtol=1e-4, atol=1e-6)
    teacher = llama.load(run_dir / "teacher")
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert teacher.config.num_codes == 16
    # another embedding: student and control anew
    assert fit.run(micro, [*overrides, "student.embedding=learned"]) == 0
    said = capsys.readouterr().out
    made = [name for name in ("teacher", "scratch", "student") if f"{name}: done in" in said]
    assert made == ["scratch", "student"]
    assert llama.load(run_dir / "student").config.tie_word_embeddings


def test_perplexities_of_a_fresh_model_are_near_uniform():
    for kind in EMBEDDINGS:
        module = Pretrain(_model(kind), PretrainConfig(size="micro"), 10)
        loss = module.training_step({"tokens": _tokens()})["loss"].item()
        assert loss == pytest.approx(math.log(VOCAB), abs=0.1), kind


# --- what it is worth ---


def test_the_table_of_embeddings(micro, monkeypatch, capsys):
    root = micro.parent / "run"
    arms = ["learned", "codebook", "codebook_start"]
    arguments = [micro, f"run_dir={root}", "sentences.validation=2", "student.steps=2", "tokenizer.steps=1"]
    monkeypatch.setattr(llama, "SIZES", dict(llama.SIZES))  # the tool adds sizes with a head of their own
    monkeypatch.setattr(compare_embeddings, "RATE", 1e-2)
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments), "--seeds", "1", "2", "--arms", *arms])
    assert compare_embeddings.main() == 0
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["embedding", *arms]
    # tied: 2 layers of 32 channels and the table, which says as well; else projection, special rows and head
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32
    assert [row[1] for row in rows[1:]] == [
        f"{layers + number:,}" for number in (18 * 32, (4 + 2) * 32 + 18 * 32, 18 * 32)
    ]
    scores = json.loads((root / "embeddings.json").read_text())
    assert list(scores) == ["1", "2"]
    for number, arm in enumerate(arms, start=1):
        for place, task in enumerate(("segmentation", "pose", "grey")):
            one, two = (scores[seed][arm][task] for seed in scores)
            expected = f"{(one + two) / 2:.3f} ({min(one, two):.3f}-{max(one, two):.3f})"
            assert rows[number][3 + place] == expected
    means = [[np.mean(list(scores[seed][arm].values())) for seed in scores] for arm in arms]
    gaps = np.subtract(means[0], means[1])
    assert rows[2][-1] == f"{gaps.mean():+.3f} ({gaps[0]:+.3f}, {gaps[1]:+.3f})"
    # its best rate on the seed apart is between two that are worse
    rate = float(rows[1][2])
    tried = {
        float(path.name.split("-", 1)[1].rsplit("-", 1)[0]): np.mean(
            list(json.loads(path.read_text()).values())
        )
        for path in (root / "seed100" / "embeddings" / "arms").glob("learned-*.json")
    }
    assert tried[rate] == min(tried.values())
    assert {rate / 2, rate * 2} < set(tried)
    # again: nothing is trained, the table is the same
    assert compare_embeddings.main() == 0
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert again == [line for line in said.splitlines() if line.startswith("| ")]
