import hashlib
import json

import numpy as np
import pytest
import torch

from delvm.errors import UserError
from delvm.tokenizer.training import TokenizerConfig, build
from delvm.tokens.store import code_dtype, encode, open_store, write_grid, write_manifest

SHAPES = {
    "pose": {"train": (5, 3, 2, 4), "validation": (2, 1, 2, 4)},
    "edges": {"train": (7, 1, 2, 4), "validation": (3, 1, 2, 4)},
}


def _write(folder, num_codes=256):
    """A small store; returns its grids."""
    rng = np.random.default_rng(0)
    grids, tasks = {"train": {}, "validation": {}}, {}
    for task, splits in SHAPES.items():
        tasks[task] = {}
        for split, shape in splits.items():
            grid = rng.integers(num_codes, size=shape)
            rows = grid.reshape(-1, *shape[2:])
            checksum = write_grid(
                folder / f"{task}.{split}.npy",
                shape,
                code_dtype(num_codes),
                # uneven batches that do not end where a sample's views end
                (rows[start : start + 2] for start in range(0, len(rows), 2)),
            )
            grids[split][task] = grid
            tasks[task][split] = {"shape": list(shape), "sha256": checksum}
    write_manifest(folder, {"num_codes": num_codes, "tokens_per_image": 4, "tasks": tasks})
    return grids


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(1, "uint16"), (256, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")],
)
def test_the_type_holds_every_code(num_codes, dtype):
    assert code_dtype(num_codes) == np.dtype(dtype)
    assert np.iinfo(code_dtype(num_codes)).max >= num_codes - 1


@pytest.mark.parametrize("num_codes", [256, 65_536, 100_000])
def test_roundtrip(tmp_path, num_codes):
    grids = _write(tmp_path, num_codes)
    store = open_store(tmp_path)
    assert (store.num_codes, store.tokens_per_image) == (num_codes, 4)
    assert list(store.grids["train"]) == ["pose", "edges"]
    for split, parts in grids.items():
        for task, grid in parts.items():
            np.testing.assert_array_equal(store.grids[split][task], grid)


def test_grids_are_plain_memory_mapped_npy_files(tmp_path):
    grids = _write(tmp_path)
    grid = np.load(tmp_path / "pose.train.npy", mmap_mode="r", allow_pickle=False)
    assert isinstance(grid, np.memmap)
    assert (grid.shape, grid.dtype) == ((5, 3, 2, 4), np.uint16)
    np.testing.assert_array_equal(grid, grids["train"]["pose"])
    opened = open_store(tmp_path).grids["train"]["pose"]
    assert isinstance(opened, np.memmap)
    assert not opened.flags.writeable


def test_the_checksum_is_that_of_the_codes(tmp_path):
    grids = _write(tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["tasks"]["edges"]["train"]
    assert entry["sha256"] == hashlib.sha256(grids["train"]["edges"].astype("<u2").tobytes()).hexdigest()


def test_rows_that_do_not_fill_the_shape_are_our_mistake(tmp_path):
    rows = np.zeros((5, 2, 4), np.int64)
    with pytest.raises(AssertionError):
        write_grid(tmp_path / "a.npy", (3, 2, 2, 4), np.dtype(np.uint16), [rows])
    with pytest.raises(AssertionError):
        write_grid(tmp_path / "a.npy", (5, 1, 2, 3), np.dtype(np.uint16), [rows])


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match=r": not a token store \(no manifest\.json\)$"):
        open_store(tmp_path)
    with pytest.raises(UserError, match="not a token store"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_codes": 256}'])
def test_a_damaged_manifest(tmp_path, text):
    _write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: unreadable manifest"):
        open_store(tmp_path)


def test_a_missing_grid(tmp_path):
    _write(tmp_path)
    (tmp_path / "edges.validation.npy").unlink()
    with pytest.raises(UserError, match=r"edges\.validation\.npy: unreadable token grid"):
        open_store(tmp_path)


# 200: in the data; 100: in the header; 3: in the magic string
@pytest.mark.parametrize("size", [200, 100, 3, 0])
def test_a_grid_cut_short(tmp_path, size):
    _write(tmp_path)
    path = tmp_path / "pose.train.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"pose\.train\.npy: unreadable token grid"):
        open_store(tmp_path)


def test_a_grid_of_another_shape(tmp_path):
    _write(tmp_path)
    np.save(tmp_path / "pose.train.npy", np.zeros((5, 2, 2, 4), np.uint16))
    message = r"pose\.train\.npy: shape \[5, 2, 2, 4\], the manifest says \[5, 3, 2, 4\]$"
    with pytest.raises(UserError, match=message):
        open_store(tmp_path)


def test_a_file_of_another_kind(tmp_path):
    _write(tmp_path)
    np.save(tmp_path / "pose.train.npy", np.array([{}]), allow_pickle=True)  # would run code when read
    with pytest.raises(UserError, match=r"pose\.train\.npy: unreadable token grid"):
        open_store(tmp_path)


def test_encode_gives_the_codes_of_image_and_annotation():
    tokenizer = build(TokenizerConfig(num_codes=16, code_dim=4, channels=32), 8).eval()
    torch.nn.init.normal_(tokenizer.codebook, generator=torch.Generator().manual_seed(0))
    pairs = torch.randint(256, (5, 2, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sizes = []
    rows = list(encode(tokenizer, pairs.split(2), sizes.append))
    assert sizes == [2, 2, 1]
    found = np.concatenate(rows)
    assert found.shape == (5, 2, 4)
    for pair, codes in zip(pairs, found, strict=True):
        expected = tokenizer.encode(pair.permute(0, 3, 1, 2).float() / 255)
        np.testing.assert_array_equal(codes, expected.numpy())
    assert len(np.unique(found)) > 4
