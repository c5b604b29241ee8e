import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from delvm import llama
from delvm.errors import UserError
from delvm.export import USAGE, export
from delvm.generation import complete
from delvm.tokenizer.vqgan import Tokenizer

NUM_CODES, SIZE, PATCH = 24, 16, 4  # 16 codes a picture
METRICS = {
    "teacher": {"pose": {"loss": 1.25, "accuracy": 0.5, "perplexity": 3.49}},
    "student": {"pose": {"loss": 1.375, "accuracy": 0.4375, "perplexity": 3.955}},
}
CARD = {
    "name": "small run",
    "metrics": METRICS,
    "recipe": "seed: 0\nname: small\n",
    "data": "pose: 3 pairs\nrain: 4",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a model and a tokenizer of random but sharp weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vqgan = VQModel(
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=NUM_CODES,
        vq_embed_dim=8,
        mid_block_add_attention=False,
    )
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)
    Tokenizer(vqgan, PATCH, SIZE).save(folder / "tokenizer")
    model = llama.build("micro", NUM_CODES + 2, 128, bos=NUM_CODES, eos=NUM_CODES + 1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    llama.save(model, folder / "student")
    return folder


@pytest.fixture(scope="module")
def exported(run):
    export(run / "student", run / "tokenizer", run / "export", num_codes=NUM_CODES, card=CARD)
    return run / "export"


def _pictures(folder):
    rng = np.random.default_rng(0)
    for name in ("image-1", "annotation-1", "query"):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(folder / f"{name}.png")


def _isolated(code, folder):
    """Runs code in a fresh interpreter where delvm cannot be imported, even installed in place."""
    block = (
        "import sys\n"
        "class NoDelvm:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'delvm':\n"
        "            raise ImportError('delvm is not here')\n"
        "sys.meta_path.insert(0, NoDelvm())\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", block + code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_cards_snippet_runs_without_delvm_and_equals_ours(run, exported, tmp_path):
    _pictures(exported)
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    assert snippet[1] == USAGE
    check = (
        "\ntorch.save({'prompt': prompt, 'sentence': sentence, 'logits': model(sentence).logits,"
        f" 'kind': type(model).__module__}}, {str(tmp_path / 'out.pt')!r})\n"
        "try:\n    import delvm\nexcept ImportError:\n    pass\n"
        "else:\n    raise SystemExit('delvm was importable')\n"
    )
    _isolated(snippet[1] + check, exported)
    theirs = torch.load(tmp_path / "out.pt")
    assert theirs["kind"].startswith("transformers.")

    tokenizer, model = Tokenizer.load(run / "tokenizer"), llama.load(run / "student")
    names = ("image-1", "annotation-1", "query")
    pixels = [torch.from_numpy(np.array(Image.open(exported / f"{name}.png"))) for name in names]
    codes = tokenizer.encode(torch.stack(pixels).permute(0, 3, 1, 2) / 255)
    prompt = torch.cat([torch.tensor([[NUM_CODES]]), codes.reshape(1, -1)], 1)
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
