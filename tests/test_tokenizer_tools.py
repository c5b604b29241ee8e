"""The scripts about tokenizers: what they compare and what they draw."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from delvm.tokenizer import Tokenizer
from delvm.tokenizer.measures import psnr
from delvm.tokenizer.quantizers import QUANTIZERS
from tools import compare_quantizers, show_reconstructions

pytestmark = pytest.mark.usefixtures("one_thread")


def run_tool(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


@pytest.fixture
def photos(micro, pairs):
    """A recipe of one task, ten photographs, some of them held out; its tokenizer takes six steps."""
    file = micro.parent / "photos.yaml"
    file.write_text(
        f"data: {{image_size: 16}}\nrun_dir: {micro.parent / 'photos'}\n"
        f"tasks: {{photos: {{source: pictures, images: {pairs / 'images'}, validation_fraction: 0.4}}}}\n"
        "tokenizer: {num_codes: 16, code_dim: 4, channels: 32, steps: 6, batch_size: 4}\n"
        "trainer: {accelerator: cpu}\n"
    )
    return file


def kept_by(run):
    """What a run says of its tokenizer."""
    return json.loads((run / "tokenizer" / "stage.json").read_text())["metrics"]


def rows_of(text):
    return {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}


def test_the_table_of_quantizers(photos, monkeypatch, capsys):
    arguments = [photos, "--seeds", 1, 2, "--arms", "ema", "learned, no restart", "--rates", "1e-3", "1e-6"]
    assert run_tool(compare_quantizers, monkeypatch, *arguments) == 0
    first = capsys.readouterr().out
    rows = rows_of(first)
    assert list(rows) == ["quantizer", "ema", "learned, no restart"]
    root = photos.parent / "photos"
    scores = json.loads((root / "quantizers.json").read_text())
    assert list(scores) == ["1", "2"]
    values = [scores[seed]["ema"]["psnr"] for seed in scores]
    mean, low, high = sum(values) / 2, min(values), max(values)
    assert low < high
    # its best rate on the seed apart, and the mean and range of the others
    tried = {
        rate: kept_by(root / "seed100" / f"ema-{rate:g}")["psnr"] for rate in (1e-3, 1e-6)
    }  # fmt: skip
    rate = max(tried, key=tried.get)
    assert tried[1e-3] != tried[1e-6]
    assert rows["ema"].startswith(f"| ema | {rate:g} | {mean:.2f} ({low:.2f}-{high:.2f}) | ")
    assert re.search(r"\| \d+\.\d% \(\d+\.\d%-\d+\.\d%\) \| \d+ \(\d+-\d+\) \|$", rows["ema"])
    runs = sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("recipe.yaml"))
    assert {f"seed1/ema-{rate:g}", f"seed2/ema-{rate:g}", "seed100/ema-0.001", "seed100/ema-1e-06"} < {*runs}
    assert len(runs) == 8
    # what the table says is what the saved tokenizer keeps
    metrics = kept_by(root / "seed1" / f"ema-{rate:g}")
    assert metrics["psnr"] == scores["1"]["ema"]["psnr"]
    assert scores["1"]["ema"]["codes"] == metrics["codes_used"] / 16
    # again: nothing is trained, the table is the same
    times = [path.stat().st_mtime_ns for path in sorted(root.rglob("*.safetensors"))]
    assert run_tool(compare_quantizers, monkeypatch, *arguments) == 0
    assert rows_of(capsys.readouterr().out) == rows
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*.safetensors"))] == times


def test_every_quantizer_is_an_arm_and_the_seed_apart_is_in_no_table():
    assert set(QUANTIZERS) < set(compare_quantizers.ARMS)
    assert compare_quantizers.TUNING_SEED not in (10, 11, 12)


def test_comparing_without_a_recipe(tmp_path, monkeypatch, capsys):
    assert run_tool(compare_quantizers, monkeypatch, tmp_path / "none.yaml") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: no such recipe\n"


def test_the_reconstructions_of_a_run(photos, tmp_path, monkeypatch):
    assert run_tool(compare_quantizers, monkeypatch, photos, "--seeds", 1, "--arms", "ema") == 0
    run = photos.parent / "photos" / "seed1" / "ema-0.001"  # the default's rate
    out, folder = tmp_path / "kept.png", tmp_path / "kept"
    found = ["--pictures", 2, "--folder", folder]
    assert run_tool(show_reconstructions, monkeypatch, run, out, *found) == 0
    files = {name: sorted((folder / name).iterdir()) for name in ("originals", "reconstructions")}
    one, two = (np.stack([np.asarray(Image.open(file)) for file in files[name]]) for name in files)
    assert [file.name for file in files["originals"]] == [file.name for file in files["reconstructions"]]
    # they are the tokenizer's, and the run's PSNR is that of the folders
    tokenizer = Tokenizer.load(run / "tokenizer")
    pictures, kept = (torch.from_numpy(values).permute(0, 3, 1, 2) / 255 for values in (one, two))
    torch.testing.assert_close(tokenizer(pictures), kept, atol=0.6 / 255, rtol=0)
    assert psnr(kept, pictures).mean().item() == pytest.approx(kept_by(run)["psnr"], abs=0.05)
    # the sheet: two columns, the first and the last held-out picture over what is kept of them
    side, gap = 128, show_reconstructions.GAP
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (gap + 2 * (side + gap), gap + 2 * (side + gap), 3)
    for column, place in ((0, 0), (1, -1)):
        left = gap + column * (side + gap)
        for top, values in ((gap, one), (2 * gap + side, two)):
            square = drawn[top : top + side : 8, left : left + side : 8]
            np.testing.assert_array_equal(square, values[place])


def test_what_is_kept_of_a_picture_of_ones_own(photos, tmp_path, monkeypatch, capsys):
    assert run_tool(compare_quantizers, monkeypatch, photos, "--seeds", 1, "--arms", "ema") == 0
    run = photos.parent / "photos" / "seed1" / "ema-0.001"
    out, mine = tmp_path / "kept.png", tmp_path / "mine.png"
    size = 16
    blocks = np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8)
    Image.fromarray(np.kron(blocks, np.ones((2, 2, 1), np.uint8))).save(mine)  # twice the size
    assert run_tool(show_reconstructions, monkeypatch, run, out, "--query", mine, mine) == 0
    side, gap = 128, show_reconstructions.GAP
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (gap + 2 * (side + gap), gap + 2 * (side + gap), 3)
    np.testing.assert_array_equal(drawn[gap : gap + side : 8, gap : gap + side : 8], blocks)
    pixels = torch.from_numpy(blocks).permute(2, 0, 1)[None] / 255
    kept = Tokenizer.load(run / "tokenizer")(pixels)[0].permute(1, 2, 0)
    below = torch.from_numpy(drawn[2 * gap + side :: 8, gap : gap + side : 8][:size].copy()) / 255
    torch.testing.assert_close(below, kept, atol=0.6 / 255, rtol=0)
    # the run's own pictures are not asked for, only where all of them are to be written
    (folder := tmp_path / "kept").mkdir()
    (folder / "old.png").write_bytes(b"")
    capsys.readouterr()
    assert run_tool(show_reconstructions, monkeypatch, run, out, "--folder", folder) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: not empty")
    assert run_tool(show_reconstructions, monkeypatch, run, out, "--folder", folder / "old.png") == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / 'old.png'}: a file")
    # what the run was made of may have gone
    photos.unlink()
    shutil.rmtree(run / "data")
    assert run_tool(show_reconstructions, monkeypatch, run, out, "--query", mine) == 0
    capsys.readouterr()
    mine.write_bytes(b"no picture")
    assert run_tool(show_reconstructions, monkeypatch, run, out, "--query", mine) == 2
    assert capsys.readouterr().err.startswith(f"error: {mine}: unreadable picture")


def test_every_task_is_shown_whatever_number_of_pictures_a_sample_has():
    datasets = [
        [torch.full((number, 2, 2, 3), 10 * task + place, dtype=torch.uint8) for place in range(5)]
        for task, number in enumerate((1, 2, 3))
    ]
    shown = show_reconstructions.some(torch.utils.data.ConcatDataset(datasets), 10)
    assert shown[:, 0, 0, 0].tolist() == [0, 2, 4, 10, 10, 20, 20, 20]
    # a task of few samples among large ones, and more tasks than fit
    few = [datasets[0] * 40, datasets[1][:1], datasets[2] * 40]
    for number in (10, 2):
        shown = show_reconstructions.some(torch.utils.data.ConcatDataset(few), number)
        assert {*(shown[:, 0, 0, 0] // 10).tolist()} == {0, 1, 2}
    shown = show_reconstructions.some(torch.utils.data.ConcatDataset(datasets[:1]), 3)
    assert shown[:, 0, 0, 0].tolist() == [0, 2, 4]


def test_the_reconstructions_of_no_run(tmp_path, monkeypatch, capsys):
    assert run_tool(show_reconstructions, monkeypatch, tmp_path, tmp_path / "out.png") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/recipe.yaml: no such recipe\n"
    assert not (tmp_path / "out.png").exists()
