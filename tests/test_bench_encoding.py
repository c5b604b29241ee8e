"""What the benchmark of encoding computes and prints; how long it takes is not tested."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from delvm import training
from delvm.tokenizer.training import TokenizerConfig, build, num_parameters
from tools import bench_encoding
from tools.bench_encoding import MIXED, PLAIN, PUBLISHED, WANTED, WAYS, Finding, encoder_of, flops, verdict

pytestmark = pytest.mark.usefixtures("one_thread")


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_encoding", *map(str, arguments)])
    return bench_encoding.main()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(256, size=(30, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_the_table(tmp_path, tokenizer, photos, monkeypatch, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.setattr(training, "COMPILE_BACKEND", "eager")
    arguments = ["--tokenizer", tmp_path / "tokenizer", "--photos", photos, "--pictures", 40, "--rounds", 2]
    run_tool(monkeypatch, *arguments, "--ways", *WAYS, "--threads", 1, "--peak-tflops", 1e-3)
    said = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    rows = {first: rest for first, *rest in lines[2:]}
    assert list(rows) == list(WAYS)
    per_image = flops(tokenizer)
    for name, (images, _, changed, tflops, share) in rows.items():
        assert float(images) > 0
        if not name.startswith("bf16"):
            assert changed == "0.000%"
        # rounded to three digits as printed
        assert float(tflops) == pytest.approx(float(images) * per_image / 1e12, rel=0.02)
        assert float(share.rstrip("%")) == pytest.approx(float(tflops) / 1e-3 * 100, rel=0.02, abs=0.06)
    assert rows[PLAIN][1] == "1.00"
    assert f"trained tokenizer, {per_image / 1e9:.3g} GFLOP a picture of 8 px, 16 codes; 40 pictures" in said


def test_ways_are_what_they_are_called(tokenizer):
    for name, way in WAYS.items():
        encoder = encoder_of(tokenizer, way)
        weight = encoder.tokenizer.vqgan.encoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels last" in name)
        assert encoder.mixed == (way.config.precision == MIXED) == ("bf16" in name)
        assert encoder.one_shape == ("compiled" in name)
    assert tokenizer.vqgan.encoder.conv_in.weight.is_contiguous()  # they are copies


def test_operations_of_a_picture():
    """All convolutions of the encoder, counted by hand."""
    tokenizer = build(TokenizerConfig(num_codes=16, code_dim=4, channels=32, layers=1), 16)
    places = 4 * 4
    convolutions = (
        [(48, 32, 9)]  # in
        + [(32, 32, 9)] * 2  # the level's block
        + [(32, 32, 9)] * 4  # the middle's two
        + [(32, 4, 9), (4, 4, 1)]  # out, and to the codes' channels
    )
    assert flops(tokenizer) == 2 * places * sum(a * b * k for a, b, k in convolutions)


@pytest.mark.parametrize(
    ("device", "threads", "able", "faster", "expected"),
    [
        ("cpu", 1, True, 4.1, ("held: 4.10; wanted", False)),
        ("cpu", 1, True, 3.9, ("missed: 3.90; wanted", True)),
        ("cpu", 2, True, 3.9, ("not judged, 2 threads; wanted", False)),
        ("cpu", 1, True, None, ("not measured; wanted", False)),
        ("cpu", 1, False, 0.2, ("not judged, this processor has no instructions for bfloat16; want", False)),
        ("cuda", 1, True, 3.0, ("not judged, no processor; wanted", False)),
    ],
)
def test_the_verdict(monkeypatch, device, threads, able, faster, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able})
    found = {PLAIN: Finding(1.0, 1.0, 0.0)} | ({WANTED: Finding(1.0, faster, 0.02)} if faster else {})
    line, missed = verdict(found, device, threads)
    assert line.startswith(expected[0])
    assert missed == expected[1]


def test_one_thread_is_measured_unless_more_are_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_encoding"])
    assert bench_encoding.parse().threads == 1


def test_photographs_of_all_folders_below(photos):
    top = bench_encoding.photographs(photos, 8, 3)
    (photos / "a" / "b").mkdir(parents=True)
    (photos / "2.png").rename(photos / "a" / "b" / "2.PNG")
    (photos / "a" / ".2.png").write_bytes(b"no picture")
    found = bench_encoding.photographs(photos, 8, 3)
    assert torch.equal(found, top)
    assert len(found.unique(dim=0)) == 3


def test_the_random_one_has_the_published_size():
    assert num_parameters(PUBLISHED, 256) == pytest.approx(146.2e6, rel=1e-3)
    assert PUBLISHED.factor == 16


def test_no_photographs(tmp_path, tokenizer, monkeypatch, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    assert run_tool(monkeypatch, "--tokenizer", tmp_path / "tokenizer", "--photos", tmp_path) == 2
    assert capsys.readouterr().err == f"error: --photos: no .jpg, .jpeg, .png in '{tmp_path}'\n"
