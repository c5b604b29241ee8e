"""Exported folders: read back by a process without delvm; and what is refused on the way."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from delvm import llama
from delvm.errors import UserError
from delvm.export import FORMATS, export
from delvm.export.__main__ import main
from delvm.export.source import find_source
from delvm.export.usage import TRANSFORMERS
from delvm.generation import complete
from delvm.tokenizer.vqgan import Tokenizer
from tests.exports import CARD, NUM_CODES, draw_pictures, isolated, prompt_of, tiny_run, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"), tiny_tokenizer())


@pytest.fixture(scope="module")
def exported(run):
    export(run / "student", run / "tokenizer", run / "export", num_codes=NUM_CODES, card=CARD)
    return run / "export"


def test_the_cards_script_runs_without_delvm_and_equals_ours(run, exported, tmp_path):
    draw_pictures(exported)
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    assert snippet[1] == TRANSFORMERS.code
    keep = (
        "\ntorch.save({'prompt': prompt, 'sentence': sentence, 'logits': model(sentence).logits,"
        f" 'kind': type(model).__module__}}, {str(tmp_path / 'out.pt')!r})\n"
    )
    isolated(snippet[1] + keep, exported, "delvm")
    theirs = torch.load(tmp_path / "out.pt")
    assert theirs["kind"].startswith("transformers.")

    tokenizer, model = Tokenizer.load(run / "tokenizer"), llama.load(run / "student")
    prompt = prompt_of(exported, tokenizer)
    assert torch.equal(theirs["prompt"], prompt)
    with torch.no_grad():
        assert torch.equal(theirs["logits"], model(theirs["sentence"]).logits)
    completed = complete(model, prompt, 16, NUM_CODES)
    assert torch.equal(theirs["sentence"][:, prompt.shape[1] :], completed)
    ours = (tokenizer.decode(completed)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.array(Image.open(exported / "result.png")), ours)
    assert ours.std() > 1  # a picture, not a flat colour


def test_files_and_settings(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.suffix != ".png"}
    assert names - {"tokenizer"} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer/config.json",
        "tokenizer/delvm_tokenizer.json",
        "tokenizer/diffusion_pytorch_model.safetensors",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert (config["bos_token_id"], config["eos_token_id"]) == (NUM_CODES, NUM_CODES + 1)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [NUM_CODES, NUM_CODES + 1]
    assert generation.get("eos_token_id") is None
    assert generation["max_new_tokens"] == 16
    assert Tokenizer.load(exported / "tokenizer").hash == Tokenizer.load(exported.parent / "tokenizer").hash


def test_card_tells_what_was_measured_and_how(exported):
    card = (exported / "README.md").read_text()
    assert "# small run\n" in card
    assert "| pose | teacher | 1.250 | 0.500 | 3.490 | – | – | – |" in card
    assert "| pose | distilled | 1.375 | 0.438 | 3.955 | – | – | – |" in card
    assert "holds **distilled**" in card
    assert "- pose: 3 pairs\n- rain: 4\n" in card
    assert "```yaml\nseed: 0\nname: small\n```" in card
    assert "24 codes; beginning id 24, end id 25" in card
    assert "16 × 16 pixels, 4 × 4 = 16 codes each" in card
    assert "0.03M parameters" in card


def test_card_survives_odd_names(run, tmp_path):
    card = CARD | {"metrics": {"student": {"a|b\nc": {"loss": 1.0}}}, "recipe": "name: '```'", "data": ""}
    export(run / "student", run / "tokenizer", tmp_path, num_codes=NUM_CODES, card=card)
    text = (tmp_path / "README.md").read_text()
    assert "| a\\|b c | distilled | 1.000 |" in text
    assert "````yaml\nname: '```'\n````" in text
    assert "not described" in text


def test_card_without_measurements(run, tmp_path):
    export(run / "student", run / "tokenizer", tmp_path, num_codes=NUM_CODES, card=CARD | {"metrics": {}})
    assert "Nothing was measured." in (tmp_path / "README.md").read_text()


def test_what_does_not_fit_together_is_refused_before_anything_is_written(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has 24 codes; the model was trained on 20"):
        export(run / "student", run / "tokenizer", out, num_codes=20, card=CARD)
    llama.save(llama.build("micro", 20, 64), tmp_path / "small")
    with pytest.raises(UserError, match="has a vocabulary of 20; its tokenizer has 24 codes"):
        export(tmp_path / "small", run / "tokenizer", out, num_codes=NUM_CODES, card=CARD)
    with pytest.raises(UserError, match="no such folder"):
        export(tmp_path / "none", run / "tokenizer", out, num_codes=NUM_CODES, card=CARD)
    assert not out.exists()
    tiny_tokenizer(26).save(tmp_path / "more")
    with pytest.raises(UserError, match="has 26 codes; the model's bos_token_id, 24, would be one"):
        export(run / "student", tmp_path / "more", out, card=CARD)
    with pytest.raises(UserError, match=r"format: 'gguf' is unknown; choices: transformers, onnx, onnx-int8"):
        export(run / "student", run / "tokenizer", out, card=CARD, format="gguf")


# --- the command ---


def call(model, out, *options):
    return main([str(model), "--out", str(out), *map(str, options)])


def test_any_folder(run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run / "student", tmp_path / "model")
    assert call(tmp_path / "model", out, "--tokenizer", run / "tokenizer") == 0
    assert re.fullmatch(
        rf"{out}: transformers, \d\.\d\d MB; README.md says how it is used\n", capsys.readouterr().out
    )
    card = (out / "README.md").read_text()
    assert "# model\n\nAn autoregressive vision model.\n" in card
    assert "Nothing was measured." in card
    assert "## Data\n\nnot described\n\n## Recipe\n\nunknown\n" in card
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(llama.load(out)(ids).logits, llama.load(run / "student")(ids).logits)
    assert call(tmp_path / "model", out, "--tokenizer", run / "tokenizer") == 2
    assert capsys.readouterr().err == f"error: --out: '{out}' is there already; name a new folder\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_model_in_its_run_brings_what_is_known_of_it(finished, tmp_path):
    folder = finished / "run"
    assert call(folder / "student", tmp_path / "out", "--format", "onnx-int8") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    theirs = (folder / "export" / "README.md").read_text()
    for section in ("Measured", "Data", "Recipe"):
        found = [re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S) for text in (card, theirs)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][1].strip() == found[1][1].strip()
    assert "This folder holds **distilled**" in card
    metrics = json.loads((folder / "metrics.json").read_text())["evaluate"]["student"]
    for task in ("segmentation", "pose", "grey"):
        row = re.search(rf"^\| {task} \| 5 \| (\S+) \| (\S+) \| (\S+)% \| (\S+)% \|$", card, re.M)
        assert row is not None
        exact, lossy, same, _ = map(float, row.groups())
        assert exact == pytest.approx(metrics[task]["loss"], abs=6e-4)
        assert lossy == pytest.approx(exact, abs=0.05)
        assert same > 80
    size = (tmp_path / "out" / "model.onnx").stat().st_size
    assert f"int8: {size / 1e6:.2f} MB instead of 0.1" in card


def test_the_export_of_a_run_is_its_last_model(finished):
    source = find_source(finished / "run" / "export")
    assert source.tokenizer == finished / "run" / "export" / "tokenizer"
    assert (source.card["role"], list(source.card["metrics"])[-1]) == (None, "student")
    assert find_source(finished / "run" / "teacher").card["role"] == "teacher"
    assert source.held_out is not None
    assert {task: len(ids) for task, ids in source.held_out.ids.items()} == {
        "segmentation": 5, "pose": 5, "grey": 5,
    }  # fmt: skip


def test_another_tokenizer_of_as_many_codes_is_refused_in_a_run(finished, tmp_path, capsys):
    tokenizer = Tokenizer.load(finished / "run" / "tokenizer")
    known = tokenizer.hash
    tokenizer.codebook.data.neg_()
    tokenizer.save(tmp_path / "other")
    assert call(finished / "run" / "student", tmp_path / "out", "--tokenizer", tmp_path / "other") == 2
    error = f"written by tokenizer {known}, this one is {tokenizer.hash}"
    assert capsys.readouterr().err == f"error: {finished / 'run' / 'tokens'}: {error}\n"


# --- what is refused, each in one line that leaves nothing ---


class Foreign:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pickled(folder, old, new):
    """The weights as a pickle that also holds something foreign, which would make `ran`."""
    (folder / old).unlink()
    torch.save({"a": torch.ones(1), "b": Foreign(folder.parent / "ran")}, folder / new)


def points_outside(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


VQ_WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = {
    "damaged weights": (lambda m, t: cut(m / "model.safetensors"), "model.safetensors: "),
    "damaged settings": (lambda m, t: cut(m / "config.json"), "config.json: cannot be read"),
    "damaged tokenizer": (lambda m, t: cut(t / VQ_WEIGHTS), f"{VQ_WEIGHTS}: damaged"),
    "foreign classes": (
        lambda m, t: pickled(m, "model.safetensors", "pytorch_model.bin"),
        r"asks for posix.mkdir, which is no tensor: refused, and never run",
    ),
    "foreign classes in the tokenizer": (
        lambda m, t: ((t / "delvm_tokenizer.json").unlink(), pickled(t, VQ_WEIGHTS, "pytorch_model.bin")),
        r"asks for posix.mkdir, which no tensor needs; nothing was run",
    ),
    "no settings": (lambda m, t: (m / "config.json").unlink(), r"has no config.json and no model_config.pt"),
    "no settings of the tokenizer": (lambda m, t: (t / "config.json").unlink(), r"no config.json"),
    "another codebook": (
        lambda m, t: (shutil.rmtree(t), tiny_tokenizer(200).save(t)),
        "has a vocabulary of 26; its tokenizer has 200 codes",
    ),
    "a file outside of the folder": (
        lambda m, t: points_outside(m),
        r"names '\.\./elsewhere\.safetensors', which is no file of this folder",
    ),
    "no tokenizer": (lambda m, t: shutil.rmtree(t), r"model: has no tokenizer/, in it or beside it; say"),
    "no model": (lambda m, t: shutil.rmtree(m), r"model: no such folder"),
    "no graph": (lambda m, t: edit(m / "config.json", hidden_act="gelu"), "hidden_act: the model has 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_refused(run, tmp_path, capsys, name):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    shutil.copytree(run / "student", model)
    shutil.copytree(run / "tokenizer", tokenizer)
    damage, message = DAMAGES[name]
    damage(model, tokenizer)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert call(model, tmp_path / "out", "--format", "onnx") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was written, nothing ran


def test_the_pickle_would_have_run(tmp_path):
    torch.save(Foreign(tmp_path / "ran"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_code_of_a_folder_is_never_run_and_never_copied(run, tmp_path):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(run / "student", model)
    shutil.copytree(run / "tokenizer", model / "tokenizer")
    for folder in (model, model / "tokenizer"):
        (folder / "code.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Model: pass\n")
        names = {"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
        edit(folder / "config.json", auto_map=names)
    edit(model / "config.json", architectures=["Model"])
    assert call(model, tmp_path / "out") == 0
    assert not ran.exists()
    assert not list((tmp_path / "out").rglob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_every_format_says_how_it_is_used():
    assert list(FORMATS) == ["transformers", "onnx", "onnx-int8"]
    assert [form.lossy for form in FORMATS.values()] == [False, False, True]
    for form in FORMATS.values():
        assert "delvm" not in {
            line.partition("import ")[2].split(".")[0] for line in form.usage.code.split("\n")
        }
        compile(form.usage.code, "README.md", "exec")
