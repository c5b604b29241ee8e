"""A LLaMA's blocks as a classifier: who sees what, what it takes over, and back from disk."""

import json
import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from delvm import finetune, llama
from delvm.errors import UserError
from delvm.finetune.classifier import Classifier, Form, Predictor, Read, soft_mask

pytestmark = pytest.mark.usefixtures("one_thread")
FORM = Form(("ant", "bee", "cat"), image_size=8, grid=2, num_codes=16)
PATCHES = Form(("ant", "bee", "cat"), image_size=8, grid=2, input="patches")


def micro(seed=3, **specials):
    return llama.build("micro", 18, 16, **(specials or {"bos": 16, "eos": 17}), seed=seed)


def build(form=FORM, **specials):
    """A classifier whose head says something."""
    made = Classifier.of(micro(**specials), form, seed=0).eval()
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return made


def states(classifier, codes, **how):
    """(n, places, width): what the blocks say of each place."""
    found = []
    handle = classifier.blocks.register_forward_hook(lambda *hook: found.append(hook[2].last_hidden_state))
    with torch.no_grad():
        classifier(codes, **how)
    handle.remove()
    return found[0]


CODES, CHANGED = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])


# --- who sees what


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_code_changes_earlier_places_only_without_the_causal_mask(attention):
    for mask, sees in (("causal", False), ("bidirectional", True)):
        made = build(replace(FORM, mask=mask))
        made.blocks.set_attn_implementation(attention)
        before, after = states(made, CODES)[0], states(made, CHANGED)[0]
        assert len(before) == 6  # BOS, four codes, the class's place
        changed = [not torch.allclose(one, two, atol=1e-6) for one, two in zip(before, after, strict=True)]
        assert changed == [sees, sees, sees, sees, True, True]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_soft_mask_leads_from_all_to_what_stands_before(attention):
    causal, free = build(), build(replace(FORM, mask="bidirectional"))
    for made in (causal, free):
        made.blocks.set_attn_implementation(attention)
    ends = states(causal, CODES), states(free, CODES)
    torch.testing.assert_close(states(causal, CODES, future=1.0), ends[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(states(causal, CODES, future=1e-9), ends[0], atol=1e-5, rtol=0)
    half = states(causal, CODES, future=0.5)
    assert all(not torch.allclose(half, end, atol=1e-4) for end in ends)


def test_a_soft_mask_by_hand():
    half = math.log(0.5)
    expected = torch.tensor([[0, half, half], [0, 0, half], [0, 0, 0]])
    assert torch.equal(soft_mask(3, 0.5), expected[None, None])
    # of equal scores attention is 1 : 1/2 : 1/2 in the first row
    assert soft_mask(3, 0.5)[0, 0].softmax(-1)[0].tolist() == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(("readout", "places"), [("class", [5]), ("last", [4]), ("mean", [1, 2, 3, 4])])
def test_what_the_head_reads(readout, places):
    made = build(replace(FORM, readout=readout))
    seen = states(made, CODES)
    assert seen.shape[1] == 5 + (readout == "class")
    with torch.no_grad():
        torch.testing.assert_close(made(CODES), made.head(seen[:, places].mean(1)))


# --- what it takes over


def test_the_blocks_are_the_models():
    model = micro().eval()
    with torch.no_grad():
        expected = model.model(torch.tensor([[16, 1, 2, 3, 4]])).last_hidden_state
    torch.testing.assert_close(states(build(replace(FORM, readout="last")), CODES), expected)
    model = micro(bos=None).eval()  # sentences without special tokens
    with torch.no_grad():
        expected = model.model(CODES).last_hidden_state
    form = replace(FORM, readout="last", begins=False)
    torch.testing.assert_close(states(build(form, bos=None), CODES), expected)


def test_no_class_comes_first_before_training():
    made = Classifier.of(micro(), FORM, seed=0)
    assert torch.equal(made(CODES), torch.zeros(1, 3))


def test_patches_are_as_large_as_the_codes_vectors():
    made = Classifier.of(micro(), PATCHES, seed=0)
    pixels = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1  # mean square 1/3
    expected = float(micro().model.embed_tokens.weight.detach().std()) * math.sqrt(2 / 3)
    assert float(made.stem(pixels).detach().std()) == pytest.approx(expected, rel=0.1)
    assert made(pixels[:2]).shape == (2, 3)
    assert "stem.weight" not in dict(made.named_parameters())  # no codes


def test_what_no_model_gives_is_of_the_seed():
    one, same, other = (Classifier.of(micro(), PATCHES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.query, same.query)
    assert torch.equal(one.stem.proj.weight, same.stem.proj.weight)
    assert not torch.equal(one.query, other.query)


def test_branches_that_are_left_out():
    made = build().train()
    places = torch.cat([made.begin[None], made.stem(CODES[0]), made.query[None]])[None]
    whole = states(made, CODES)
    made.scales = torch.zeros(1, 4)  # two layers of two branches: the residual stream alone
    torch.testing.assert_close(states(made, CODES), made.blocks.norm(places))
    made.scales = torch.ones(1, 4)
    torch.testing.assert_close(states(made, CODES), whole)
    made.scales = torch.zeros(1, 4)
    torch.testing.assert_close(states(made.eval(), CODES), whole)  # in training alone


@pytest.mark.parametrize("form", [FORM, PATCHES], ids=["tokens", "patches"])
def test_every_parameter_learns(form):
    made = build(form)  # processes that share a step wait for the gradient of each
    inputs = CODES if form is FORM else torch.rand(1, 3, 8, 8)
    made(inputs).square().sum().backward()
    assert [name for name, weight in made.named_parameters() if weight.grad is None] == []


def test_more_places_than_the_model_was_made_for():
    form = replace(PATCHES, image_size=40, grid=5)  # 25 patches, the model has 16 positions
    assert build(form)(torch.rand(1, 3, 40, 40)).shape == (1, 3)


# --- back from disk


def pictures(number=5):
    return torch.randint(256, (number, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_codes_are_the_tokenizers(tokenizer):
    read = Read(FORM, tokenizer)(pictures())
    expected = tokenizer.encode(pictures().permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(read, expected)
    pixels = Read(PATCHES, None)(pictures())
    assert (pixels.min(), pixels.max()) == (-1, 1)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("form", [FORM, PATCHES], ids=["tokens", "patches"])
def test_a_saved_classifier_loads_back_with_equal_logits(form, mask, tokenizer, tmp_path):
    saved = Predictor(build(replace(form, mask=mask)), tokenizer if form is FORM else None)
    saved.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"tokenizer"} == {
        "classifier.json",
        "model.safetensors",
    }
    loaded = finetune.load(tmp_path)
    assert loaded.classes == ("ant", "bee", "cat")
    assert loaded.classifier.form == saved.classifier.form
    assert torch.equal(loaded(pictures()), saved(pictures()))
    assert loaded(pictures()).unique(dim=0).shape[0] == 5


def test_a_saved_classifier_loads_without_a_word(tmp_path, caplog, monkeypatch):
    Predictor(build(PATCHES), None).save(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    finetune.load(tmp_path)
    assert caplog.messages == []


def test_files_are_classified(tmp_path):
    predictor = Predictor(build(PATCHES), None)
    files = []
    for number, picture in enumerate(pictures(3).numpy()):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(files[-1])
    best = predictor(pictures(3)).argmax(1)
    assert predictor.classify(files) == [("ant", "bee", "cat")[int(place)] for place in best]
    with pytest.raises(UserError, match=r"none\.png: unreadable picture"):
        predictor.classify([tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing", "holds no classifier, classifier.json is missing"),
        ("weights", "holds no classifier, model.safetensors is missing"),
        ("cut", "no readable classifier: "),
        ("text", "no readable classifier: "),
        ("classes", "no readable classifier: "),
    ],
)
def test_a_folder_that_holds_none(tmp_path, damage, message):
    Predictor(build(PATCHES), None).save(tmp_path)
    weights, said = tmp_path / "model.safetensors", tmp_path / "classifier.json"
    if damage == "nothing":
        said.unlink()
    elif damage == "weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "text":
        said.write_text("{")
    else:
        form = json.loads(said.read_text())
        form["form"]["classes"] = ["ant"]
        said.write_text(json.dumps(form))
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}: {message}')}") as error:
        finetune.load(tmp_path)
    assert "\n" not in str(error.value)
