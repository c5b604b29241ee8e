"""tools/pascal_5i.py, over a folder as VOC's."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from delvm import llama, student
from delvm.evaluate import scores
from tools import pascal_5i
from tools.pascal_5i import Episode, draw_episodes, pictures_by_class, score_fold, squares

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"2007_{number:06}" for number in range(6)]


@pytest.fixture
def voc(tmp_path):
    """Six pictures of 16 x 8 px; the upper half is of classes 1 to 5 in turn, 6 beside it, and a border."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for place, name in enumerate(NAMES):
        pixels = rng.integers(256, size=(8, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        labels = np.zeros((8, 16), np.uint8)
        labels[:4, :8], labels[:4, 8:], labels[4] = 1 + place % 2, 6, 255
        picture = Image.fromarray(labels, mode="P")
        picture.putpalette(rng.integers(256, size=768).astype(np.uint8).tobytes())
        picture.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(NAMES) + "\n")
    return root


@pytest.fixture
def model(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    llama.save(llama.build("micro", 18, 40, bos=16, eos=17, seed=0), tmp_path / "model")
    return tmp_path / "model"


def test_which_pictures_show_a_class(voc):
    found = pictures_by_class(voc)
    assert found[1] == NAMES[::2]
    assert found[2] == NAMES[1::2]
    assert found[6] == NAMES
    assert found[3] == []
    assert set(found) == set(range(1, 21))


def test_episodes_are_of_the_fold_and_never_show_the_query():
    pictures = {number: [f"{number}-{n}" for n in range(4)] for number in range(1, 21)}
    episodes = draw_episodes(pictures, 2, 200, 3, seed=0)
    assert {episode.number for episode in episodes} == {11, 12, 13, 14, 15}
    for episode in episodes:
        assert sorted([*episode.shown, episode.query]) == pictures[episode.number]
    assert len({episode.query for episode in episodes}) == 20
    assert episodes == draw_episodes(pictures, 2, 200, 3, seed=0)
    assert episodes != draw_episodes(pictures, 2, 200, 3, seed=1)


def test_masks_keep_all_of_the_picture(voc):
    picture, mask, border = squares(voc, NAMES[0], 1, 8)
    assert picture.shape == (8, 8, 3)
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(border, np.repeat(np.arange(8) == 4, 8).reshape(8, 8))


def test_a_fold_is_what_the_model_draws_of_its_episodes(voc, model):
    judged = student.load(model)
    episodes = [Episode(1, [NAMES[0]], NAMES[2]), Episode(2, [NAMES[1], NAMES[3]][:1], NAMES[5])]
    found = score_fold(judged, voc, episodes, 0, temperature=0.0, top_p=1.0)
    of_truth = found["truth"]
    ious, both, outside = [], [0, 0], [0, 0]
    for episode in episodes:
        shown, mask, _ = squares(voc, episode.shown[0], episode.number, 8)
        query, truth, border = squares(voc, episode.query, episode.number, 8)
        white = np.where(mask[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
        drawn = np.asarray(judged.complete([(shown, white)], query)).max(axis=-1) > 127
        hits, union = (drawn & truth & ~border).sum(), ((drawn | truth) & ~border).sum()
        ious.append(hits / union)
        both = [both[0] + hits, both[1] + union]
        outside[0] += (~drawn & ~truth & ~border).sum()
        outside[1] += ((~drawn | ~truth) & ~border).sum()
    assert of_truth["iou_aeroplane"] == pytest.approx(ious[0])
    assert of_truth["iou_bicycle"] == pytest.approx(ious[1])
    assert of_truth["miou"] == pytest.approx(np.mean(ious))
    assert of_truth["fb_iou"] == pytest.approx((both[0] / both[1] + outside[0] / outside[1]) / 2)


def test_what_the_tokenizer_keeps_of_a_mask_is_the_ceiling(voc, model):
    judged = student.load(model)
    episodes = [Episode(1 + n % 2, [NAMES[n]], NAMES[n + 2]) for n in range(4)]
    found = score_fold(judged, voc, episodes, 0, temperature=0.0, top_p=1.0)
    made, best, true, border = [], [], [], []
    for episode in episodes:
        shown, mask, _ = squares(voc, episode.shown[0], episode.number, 8)
        query, truth, ignored = squares(voc, episode.query, episode.number, 8)
        masks = [
            np.where(part[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2) for part in (mask, truth)
        ]
        made.append(np.asarray(judged.complete([(shown, masks[0])], query)))
        best.append(np.asarray(judged.decode(judged.encode(masks[1:]))[0]))
        true.append(truth)
        border.append(ignored)
    made, best = (np.stack(pictures).max(axis=-1) > 127 for pictures in (made, best))
    classes = np.array([episode.number for episode in episodes])
    rest = (classes, 0, np.stack(border))
    assert found == {
        "truth": scores.pascal_5i(made, np.stack(true), *rest).metrics,
        "reconstruction": scores.pascal_5i(made, best, *rest).metrics,
        "ceiling": scores.pascal_5i(best, np.stack(true), *rest).metrics,
    }
    assert found["truth"] != found["reconstruction"] != found["ceiling"]


def test_the_command(voc, model, tmp_path, capsys):
    for place, name in enumerate(NAMES):  # all five classes of the second fold in every picture
        labels = np.tile(np.repeat(np.arange(6, 11, dtype=np.uint8), 3), (8, 1))
        Image.fromarray(np.roll(labels, place, axis=1)).save(voc / "SegmentationClass" / f"{name}.png")
    out = tmp_path / "numbers.json"
    command = [str(model), "--voc", str(voc), "--folds", "1", "--episodes", "9", "--out", str(out)]
    assert pascal_5i.main(command) == 0
    metrics = json.loads(out.read_text())
    assert list(metrics) == ["fold 1", "mean"]
    said = capsys.readouterr().out
    assert list(metrics["mean"]) == ["truth", "reconstruction", "ceiling"]
    for against, mean in metrics["mean"].items():
        assert mean == {key: metrics["fold 1"][against][key] for key in ("miou", "fb_iou")}
    for key in ("miou", "fb_iou"):
        line = " +│ +".join(f"{100 * mean[key]:.1f}" for mean in metrics["mean"].values())
        assert re.search(f"mean +│ +{line} ", said)


def test_what_it_refuses(voc, model, tmp_path, capsys):
    def refused(*more, folder=voc):
        assert pascal_5i.main([str(model), "--voc", str(folder), *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert refused("--episodes", "0") == "error: --episodes: 0 must be at least 1"
    assert refused("--shots", "9") == "error: --shots: 9, beside a query and its mask 3 fit"
    assert re.search(r"--voc: .*val\.txt is unreadable", refused(folder=tmp_path))
    said = refused("--folds", "3")
    assert said == "error: --shots: 1, and one to ask for, but 0 pictures show pottedplant"
    (voc / "SegmentationClass" / f"{NAMES[3]}.png").write_bytes(b"no picture")
    assert re.search(rf"{NAMES[3]}\.png: unreadable picture", refused())
    Image.new("RGB", (4, 4)).save(voc / "SegmentationClass" / f"{NAMES[3]}.png")
    assert refused().endswith(f"{NAMES[3]}.png: no picture of labels, it has colours")
