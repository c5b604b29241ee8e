"""Features on disk: the same bytes whatever stopped, of what they say they are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from delvm.errors import UserError
from delvm.evaluate.features import Pictures, encode, extract, list_pictures
from delvm.evaluate.readers import TokenCounts
from delvm.tokenizer import training
from delvm.tokenizer.training import to_pictures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 4 and 4 pictures, 12x8."""
    return write_classes(tmp_path / "pictures", {"ant": 5, "bee": 4, "cat": 4})


def write_classes(folder, sizes):
    rng = np.random.default_rng(0)
    for name, number in sizes.items():
        (folder / name).mkdir(parents=True)
        for place in range(number):
            pixels = rng.integers(256, size=(8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")
    return folder


class Means:
    """The mean colour of the left half of a picture, and of all of it."""

    layers = ("left", "all")

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        pictures = to_pictures(batch)
        return torch.stack([pictures[..., : pictures.shape[-1] // 2].mean((2, 3)), pictures.mean((2, 3))], 1)


def read(folder, place, reader=None, *, mirrored=False, made_of=None, **how):
    """The features of a folder of classes, written to `place`."""
    listing = list_pictures(str(folder), "probe.train")
    settings = {"device": torch.device("cpu"), "batch_size": 2, **how}
    pictures = Pictures(listing, 8, mirrored=mirrored)
    return extract(reader or Means(), pictures, listing.labels, place, made_of or {"of": "means"}, **settings)


def values(features):
    return np.concatenate([shard[:, 0] for shard in features.shards])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- pictures


def test_a_listing_mixes_the_classes_and_is_always_the_same(folder):
    one, two = (list_pictures(str(folder), "probe.train") for _ in range(2))
    assert one.classes == ("ant", "bee", "cat")
    assert one.files == two.files
    assert one.hash == two.hash
    assert len(set(one.files)) == len(one) == 13
    for file, label in zip(one.files, one.labels, strict=True):
        assert f"/{one.classes[label]}/" in file
    assert one.labels.tolist() != sorted(one.labels)


def test_a_listing_of_some_takes_the_first_of_each_class(folder):
    some = list_pictures(str(folder), "probe.train", samples=7)
    assert np.bincount(some.labels).tolist() == [3, 2, 2]
    assert {file.rpartition("/")[2] for file in some.files} == {"0.png", "1.png", "2.png"}


def test_the_hash_changes_with_a_file(folder):
    before = list_pictures(str(folder), "probe.train").hash
    Image.new("RGB", (9, 9)).save(folder / "ant" / "0.png")
    assert list_pictures(str(folder), "probe.train").hash != before


def test_labels_are_those_of_the_training_classes(folder, tmp_path):
    other = write_classes(tmp_path / "other", {"cat": 2})
    listing = list_pictures(str(other), "probe.validation", classes=("ant", "bee", "cat"))
    assert listing.labels.tolist() == [2, 2]


def refused(*arguments, **settings):
    with pytest.raises(UserError) as caught:
        list_pictures(*arguments, **settings)
    return str(caught.value)


def test_what_is_no_folder_of_classes(folder, tmp_path):
    assert refused(f"{tmp_path}/none", "probe.train") == f"probe.train: no folder '{tmp_path}/none'"
    assert refused(f"{folder}/ant", "probe.train") == f"probe.train: no folder of a class in '{folder}/ant'"
    said = refused(str(folder), "probe.validation", classes=("ant", "cat"))
    assert said == f"probe.validation: '{folder}' has class 'bee', which the training pictures have not"
    (folder / "dog").mkdir()
    said = refused(str(folder), "probe.train")
    assert said == f"probe.train: no pictures (.jpg, .jpeg, .png) in '{folder}/dog'"


def test_pictures_are_cut_to_a_square_and_mirrored(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    listing = list_pictures(str(tmp_path), "probe.train")
    both = Pictures(listing, 8, mirrored=True)[0]
    assert torch.equal(both[0], torch.from_numpy(pixels[:, 2:10]))
    assert torch.equal(both[1], both[0].flip(1))
    assert torch.equal(Pictures(listing, 8, mirrored=False)[0], both[:1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_is_named_in_one_line(folder, tmp_path, num_workers):
    (folder / "bee" / "1.png").write_bytes(b"\x89PNG of nothing")
    with pytest.raises(UserError) as caught:
        read(folder, tmp_path / "features", num_workers=num_workers)
    assert str(caught.value) == f"{folder}/bee/1.png: unreadable picture (not a picture)"


# --- on disk


def test_features_are_what_the_reader_reads(folder, tmp_path):
    features = read(folder, tmp_path / "features")
    listing = list_pictures(str(folder), "probe.train")
    pictures = torch.cat([Pictures(listing, 8, mirrored=False)[n] for n in range(13)])
    expected = Means()(pictures).numpy().astype(np.float16)
    assert np.array_equal(values(features), expected)
    assert features.layers == ("left", "all")
    assert (len(features), features.width) == (13, 3)
    assert np.array_equal(np.load(tmp_path / "features" / "classes.npy"), listing.labels)
    places, blocks = zip(*features.blocks(), strict=True)
    assert np.concatenate(places).tolist() == list(range(13))
    assert np.array_equal(torch.cat(blocks).numpy(), expected.reshape(13, 6).astype(np.float32))


def test_features_with_the_mirror_image_are_those_of_the_mirror_image(folder, tmp_path):
    plain = values(read(folder, tmp_path / "plain", dtype="float32"))
    both = values(read(folder, tmp_path / "both", mirrored=True, dtype="float32"))
    for file in folder.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file))[:, ::-1]).save(file)
    other = values(read(folder, tmp_path / "other", mirrored=True, dtype="float32"))
    np.testing.assert_allclose(other, both, atol=1e-6)
    np.testing.assert_allclose(both[:, 1], plain[:, 1], atol=1e-6)  # of the whole picture
    assert not np.allclose(both[:, 0], plain[:, 0], atol=1e-2)


def test_features_do_not_depend_on_batches(folder, tmp_path):
    one = values(read(folder, tmp_path / "one", batch_size=1, dtype="float32"))
    many = values(read(folder, tmp_path / "many", batch_size=13, dtype="float32"))
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_a_stopped_extraction_goes_on_to_the_same_shards(folder, tmp_path):
    shards = {"shard_bytes": 5 * 12}  # of 5, 5 and 3 pictures: 3, 3 and 2 batches
    whole = read(folder, tmp_path / "whole", **shards)
    assert [len(shard) for shard in whole.shards] == [5, 5, 3]
    stopped = Means(stop_after=6)  # one for the shape; then in the last batch of the second shard
    with pytest.raises(KeyboardInterrupt):
        read(folder, tmp_path / "again", stopped, **shards)
    assert sorted(contents(tmp_path / "again")) == ["00000.npy", "begun.json"]
    rest = Means()
    read(folder, tmp_path / "again", rest, **shards)
    assert rest.calls == 1 + 3 + 2
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_what_is_written_is_found(folder, tmp_path):
    first = read(folder, tmp_path / "features")
    found = Means()
    second = read(folder, tmp_path / "features", found)
    assert found.calls == 1
    assert np.array_equal(values(second), values(first))


def test_features_of_something_else_are_made_anew(folder, tmp_path):
    read(folder, tmp_path / "features")
    anew = Means()
    read(folder, tmp_path / "features", anew, made_of={"of": "other means"})
    assert anew.calls == 1 + 7
    assert json.loads((tmp_path / "features" / "manifest.json").read_text())["of"] == "other means"


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    with pytest.raises(UserError, match=r"ant: holds something else than features; move it away$"):
        read(folder, folder / "ant")
    assert len(list((folder / "ant").iterdir())) == 5


def test_a_damaged_shard_is_named(folder, tmp_path):
    read(folder, tmp_path / "features")
    shard = tmp_path / "features" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"00000\.npy: unreadable array"):
        read(folder, tmp_path / "features")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, "float16", "features exceed float16; say probe.dtype=float32"),
        (float("nan"), "float32", "features are not finite"),
    ],
)
def test_values_that_cannot_be_kept(folder, tmp_path, value, dtype, message):
    class Extreme(Means):
        def __call__(self, batch):
            return super().__call__(batch) * 0 + value

    with pytest.raises(UserError, match=message):
        read(folder, tmp_path / "features", Extreme(), dtype=dtype)


# --- codes


def test_codes_are_the_tokenizers(folder, tmp_path, tokenizer, monkeypatch):
    listing = list_pictures(str(folder), "probe.train")
    pictures = Pictures(listing, 8, mirrored=True)
    monkeypatch.setattr(training, "PASS_PICTURES", 3)
    sizes, whole = [], tokenizer.encode
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda images: sizes.append(len(images)) or whole(images))
        codes = encode(tokenizer, pictures, tmp_path / "codes", {}, batch_size=4, num_workers=0)
    assert sizes == [3, 3, 2] * 3 + [2]  # passes of the network as for a store, whatever the batch
    for number in (0, 12):
        expected = tokenizer.encode(to_pictures(pictures[number]))
        assert torch.equal(codes[number], expected)
    assert len(codes) == 13
    counts = extract(
        TokenCounts(16), codes, listing.labels, tmp_path / "counts", {}, device=torch.device("cpu")
    )
    both = torch.stack([codes[number] for number in range(13)])
    shares = torch.nn.functional.one_hot(both, 16).float().mean((1, 2))
    np.testing.assert_allclose(values(counts)[:, 0], shares.numpy(), atol=1e-3)
