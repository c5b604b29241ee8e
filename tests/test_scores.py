import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from delvm.evaluate.scores import (
    PASCAL_CLASSES,
    SCORES,
    THRESHOLDS,
    Scored,
    colours_of,
    confusion,
    covering,
    difference,
    edge_counts,
    edges,
    foreground,
    foreground_masks,
    kind_of,
    load,
    mean_iou,
    nearest,
    palette_of,
    pascal_5i,
    pose,
    restoration,
    save,
    score,
    segmentation,
)
from delvm.images.annotate import skeleton
from delvm.images.degrade import MAKERS
from delvm.images.degrade import edges as canny
from delvm.images.scenes import SCENES, SHAPES, photograph, stand
from delvm.images.tasks import TaskConfig

BLACK, RED, GREEN, BLUE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
PALETTE = np.array([BLACK, RED, GREEN, BLUE], np.uint8)


def painted(*labels: list[list[int]]) -> np.ndarray:
    """(n, H, W, 3) uint8: each label's colour of PALETTE."""
    return PALETTE[np.array(labels)]


def photographs(num: int = 3, size: int = 48) -> np.ndarray:
    names = ("astronaut", "coffee", "chelsea")[:num]
    return np.stack([photograph(name)[100 : 100 + size, 120 : 120 + size] for name in names])


# -- segmentation


def test_segmentation_by_hand():
    truth = painted([[0, 0, 1, 1]], [[0, 2, 2, 2]])
    made = painted([[0, 1, 1, 1]], [[0, 0, 2, 3]])
    found = segmentation(made, truth, PALETTE)
    # over both pictures: black 2 of 4, red 2 of 3, green 1 of 3; blue is in no truth
    assert found.metrics == pytest.approx({"miou": (2 / 4 + 2 / 3 + 1 / 3) / 3, "pixel_accuracy": 5 / 8})
    np.testing.assert_allclose(found.by_picture, [(1 / 2 + 2 / 3) / 2, (1 / 2 + 1 / 3) / 2])
    assert found.higher_is_better


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
def test_mean_iou_is_that_of_scikit_learn(seed, classes):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    truth, made = rng.integers(0, classes, (2, 3, 4, 5))
    truth[truth == rng.integers(classes)] = 0
    counts = sum(confusion(*pair, classes) for pair in zip(made, truth, strict=True))
    np.testing.assert_array_equal(
        counts, metrics.confusion_matrix(truth.ravel(), made.ravel(), labels=range(classes))
    )
    expected = metrics.jaccard_score(truth.ravel(), made.ravel(), labels=np.unique(truth), average="macro")
    assert mean_iou(counts) == pytest.approx(expected)


def test_each_pixel_is_the_nearest_colour():
    picture = np.array([[(200, 60, 60), (120, 0, 0), (128, 0, 0), (0, 90, 250), (128, 128, 0)]], np.uint8)
    assert nearest(picture, PALETTE).tolist() == [[1, 0, 1, 3, 1]]  # of equal ones the first
    noisy = np.clip(
        painted([[0, 1, 2, 3]]).astype(int) + np.random.default_rng(0).integers(-60, 61, 3), 0, 255
    )
    assert segmentation(noisy.astype(np.uint8), painted([[0, 1, 2, 3]]), PALETTE).metrics["miou"] == 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nearest_is_the_least_squared_distance(seed):
    rng = np.random.default_rng(seed)
    picture, palette = rng.integers(256, size=(4, 5, 3)), rng.integers(256, size=(7, 3))
    expected = ((picture[..., None, :] - palette) ** 2).sum(axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(nearest(picture.astype(np.uint8), palette.astype(np.uint8)), expected)


def test_without_a_palette_each_truth_has_its_own():
    truth = painted([[0, 0, 0, 0, 1, 1]], [[2, 2, 2, 3, 3, 3]])
    made = painted([[0, 0, 0, 1, 1, 1]], [[3, 3, 3, 2, 2, 2]])
    found = segmentation(made, truth)
    np.testing.assert_allclose(found.by_picture, [(3 / 4 + 2 / 3) / 2, 0])
    assert found.metrics["miou"] == pytest.approx(found.by_picture.mean())
    # black is covered by 3 of 4, red by 2 of 3; the other picture's segments have each other's colour
    assert found.metrics["covering"] == pytest.approx(((4 * 3 / 4 + 2 * 2 / 3) / 6 + 1) / 2)
    assert found.metrics["pixel_accuracy"] == pytest.approx(5 / 12)
    # what the truth's palette cannot tell: blue is nearest to black, which was right
    assert segmentation(painted([[3, 3, 1]]), painted([[0, 0, 1]])).metrics["miou"] == 1
    assert segmentation(painted([[3, 3, 1]]), painted([[0, 0, 1]]), PALETTE).metrics["miou"] == 0.5


def test_covering_by_hand():
    # segments of 4 and 2 pixels; the first is cut in halves, one of which has the second too
    assert covering(np.array([[2, 2], [0, 2]])) == pytest.approx((4 * 2 / 4 + 2 * 2 / 4) / 6)


def test_colours_come_by_frequency_and_are_bounded():
    pictures = painted([[3, 1, 3], [1, 3, 2]])
    assert colours_of(pictures).tolist() == [list(BLUE), list(RED), list(GREEN)]
    assert colours_of(pictures[0], most=2).tolist() == [list(BLUE), list(RED)]
    photo = photographs(1)
    assert len(colours_of(photo)) == 256
    assert segmentation(photo, photo).metrics == {"miou": 1, "covering": 1, "pixel_accuracy": 1}


# -- masks


def test_foreground_by_hand():
    truth = painted([[0, 0, 1, 2]], [[0, 0, 0, 3]])
    made = np.array(
        [[[(0, 0, 0), (0, 128, 0), (90, 128, 0), (127, 127, 127)]], [[(127, 0, 0)] * 3 + [(0, 0, 0)]]]
    )
    assert foreground_masks(made).tolist() == [[[False, True, True, False]], [[False] * 4]]
    found = foreground(made.astype(np.uint8), truth)
    # in both 1, in either 4; outside both 4, outside either 7
    assert found.metrics == pytest.approx(
        {"foreground_iou": 1 / 4, "fb_iou": (1 / 4 + 4 / 7) / 2, "picture_iou": 1 / 6}
    )
    np.testing.assert_allclose(found.by_picture, [1 / 3, 0])
    nothing = np.zeros((1, 2, 2, 3), np.uint8)
    assert foreground(nothing, nothing).metrics["foreground_iou"] == 1


def test_pascal_5i_by_hand():
    truth = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 1, 1]]], bool)
    made = np.array([[[1, 0, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 1, 1]]], bool)
    found = pascal_5i(made, truth, np.array([6, 6, 10]), fold=1)
    # bus: 1 + 1 of 2 + 3, where the mean of the episodes would be 5/12; cow: all
    assert found.metrics == pytest.approx(
        {"miou": (2 / 5 + 1) / 2, "fb_iou": (4 / 7 + 5 / 8) / 2, "iou_bus": 2 / 5, "iou_cow": 1}
    )
    np.testing.assert_allclose(found.by_picture, [1 / 2, 1 / 3, 1])
    ignored = np.zeros_like(truth)
    ignored[:, :, 1] = True  # what was missed of the first and half of what was added to the second
    without = pascal_5i(made, truth, np.array([6, 6, 10]), fold=1, ignored=ignored)
    assert without.metrics == pytest.approx(
        {"miou": (2 / 3 + 1) / 2, "fb_iou": (4 / 5 + 4 / 5) / 2, "iou_bus": 2 / 3, "iou_cow": 1}
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), fold=st.integers(0, 3))
def test_pascal_5i_is_that_of_scikit_learn(seed, fold):
    jaccard = pytest.importorskip("sklearn.metrics").jaccard_score
    rng = np.random.default_rng(seed)
    truth, made = rng.random((2, 12, 4, 5)) < 0.4
    classes = rng.integers(5 * fold + 1, 5 * fold + 6, 12)
    metrics = pascal_5i(made, truth, classes, fold).metrics
    for number in set(classes.tolist()):
        episodes = classes == number
        expected = jaccard(truth[episodes].ravel(), made[episodes].ravel())
        assert metrics[f"iou_{PASCAL_CLASSES[number - 1]}"] == pytest.approx(expected)
    assert metrics["fb_iou"] == pytest.approx(jaccard(truth.ravel(), made.ravel(), average="macro"))
    assert metrics["miou"] == pytest.approx(np.mean([v for name, v in metrics.items() if name[:4] == "iou_"]))


def test_pascal_5i_refuses_what_does_not_fit():
    mask = np.ones((2, 3, 3), bool)
    with pytest.raises(ValueError, match=r"classes: \[5, 11\] not in fold 1, which has 6 to 10"):
        pascal_5i(mask, mask, np.array([11, 5]), fold=1)
    with pytest.raises(ValueError, match="fold: 4 is unknown; choices: 0, 1, 2, 3"):
        pascal_5i(mask, mask, np.array([1, 1]), fold=4)
    with pytest.raises(ValueError, match=r"masks \(2, 3, 3\), \(2, 3, 3\) and classes \(1,\) do not fit"):
        pascal_5i(mask, mask, np.array([1]), fold=0)


# -- poses


def test_pose_counts_joints_over_pictures():
    first, second = (stand(np.random.default_rng(seed), 64) for seed in (0, 1))
    half = {name: at for name, at in second.items() if "ankle" not in name and "knee" not in name}
    empty = np.zeros((64, 64, 3), np.uint8)
    truth = np.stack([skeleton(first, (64, 64), 4), skeleton(half, (64, 64), 4), empty])
    made = np.stack([truth[0], empty, truth[0]])
    found = pose(made, truth)
    assert found.metrics == pytest.approx({"pck_0.1": 14 / 24, "pck_0.2": 14 / 24, "oks": 1 / 2})
    np.testing.assert_array_equal(found.by_picture, [1, 0, math.nan])
    assert math.isnan(pose(truth[2:], truth[2:]).metrics["oks"])


# -- pictures


@pytest.mark.parametrize("sigma", [2, 25])
def test_psnr_and_ssim_are_those_of_scikit_image(sigma):
    truth = photographs()
    noise = np.random.default_rng(0).normal(0, sigma, truth.shape)
    made = np.clip(truth + noise, 0, 255).astype(np.uint8)
    found = restoration(made, truth)
    psnr = [peak_signal_noise_ratio(*pair) for pair in zip(truth, made, strict=True)]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    ssim = [structural_similarity(*pair, **settings) for pair in zip(truth, made, strict=True)]
    np.testing.assert_allclose(found.by_picture, psnr, rtol=1e-6)
    assert found.metrics == pytest.approx({"psnr": np.mean(psnr), "ssim": np.mean(ssim)}, rel=1e-6)


def test_restoration_of_exact_and_of_small_pictures():
    truth = photographs()
    assert restoration(truth, truth).metrics == pytest.approx({"psnr": 100, "ssim": 1})
    made = truth[:1, :10, :10] // 2 * 2 + 1  # off by one where even
    found = restoration(made, truth[:1, :10, :10])
    share = float((truth[:1, :10, :10] % 2 == 0).mean())
    assert found.metrics == pytest.approx({"psnr": 10 * math.log10(255**2 / share)})


def test_difference_by_hand():
    truth = np.zeros((2, 2, 2, 3), np.uint8)
    made = truth.copy()
    made[0, 0, 0] = (255, 51, 0)
    found = difference(made, truth)
    np.testing.assert_allclose(found.by_picture, [(1 + 0.04) / 12, 0])
    assert found.metrics == pytest.approx({"mse": 1.04 / 24})
    assert difference(truth, made).metrics == found.metrics
    assert not found.higher_is_better


# -- on disk


def test_scores_of_pictures_are_saved_and_loaded(tmp_path):
    scored = {
        "pose": {"student": Scored({"pck_0.1": math.nan, "oks": 0.5}, np.array([0.25, math.nan]), True)},
        "grey": {"a": Scored({"mse": 0.1}, np.array([0.0, 0.2]), False)},
    }
    save(scored, tmp_path / "worth.json")
    assert "NaN" not in (tmp_path / "worth.json").read_text()
    found = load(tmp_path / "worth.json")
    np.testing.assert_array_equal(found["pose"]["student"].by_picture, [0.25, math.nan])
    assert next(iter(found["pose"]["student"].metrics)) == "pck_0.1"  # the main one
    assert found["grey"]["a"].metrics == {"mse": 0.1}
    assert (found["pose"]["student"].higher_is_better, found["grey"]["a"].higher_is_better) == (True, False)
    assert load(tmp_path / "none.json") == {}


# -- edges


def lines(size: int, columns: dict[int, int]) -> np.ndarray:
    """(size, size, 3) uint8: upright lines by column and strength."""
    picture = np.zeros((size, size, 3), np.uint8)
    for column, strength in columns.items():
        picture[2:-2, column] = strength
    return picture


def test_edges_are_near_or_not():
    truth = np.stack([lines(200, {50: 255, 150: 255})])  # 0.0075 of the diagonal: 2.1 px
    for shift, expected in ((0, 1.0), (2, 1.0), (3, 0.0)):
        made = np.stack([lines(200, {50 + shift: 255, 150 - shift: 255})])
        assert edges(made, truth).metrics["boundary_f"] == expected
    wider = edges(np.stack([lines(200, {53: 255, 147: 255})]), truth, tolerance=0.011)
    assert wider.metrics["boundary_f"] == 1
    one = edges(np.stack([lines(200, {50: 255})]), truth)
    assert one.metrics == pytest.approx({"boundary_f": 2 / 3, "precision": 1, "recall": 0.5, "threshold": 16})
    nine = lines(200, dict.fromkeys([*range(46, 55), *range(146, 155)], 255))
    assert edges(nine[None], truth).metrics["precision"] > 0.95  # thinned to their middle


def test_edges_take_one_threshold_for_all_pictures():
    truth = np.stack([lines(64, {20: 255}), lines(64, {40: 255})])
    made = np.stack([lines(64, {20: 100, 50: 60}), lines(64, {40: 200, 10: 150})])
    found = edges(made, truth)
    # up to 96 the first line is there, above 64 its neighbour is not; the second's wrong one stays until 144
    assert found.metrics == pytest.approx(
        {"boundary_f": 0.8, "precision": 2 / 3, "recall": 1, "threshold": 64}
    )
    np.testing.assert_allclose(found.by_picture, [1, 2 / 3])


def test_edges_weigh_the_truth_by_its_strength():
    truth = np.stack([lines(64, {20: 204, 40: 51, 60: 15})])  # four annotators of five, one, and a shadow
    found = edges(np.stack([lines(64, {20: 255})]), truth)
    assert found.metrics["recall"] == pytest.approx(0.8)
    assert found.metrics["precision"] == 1
    assert edges(np.stack([lines(64, {40: 255})]), truth).metrics["recall"] == pytest.approx(0.2)
    assert edges(np.stack([lines(64, {60: 255})]), truth).metrics["boundary_f"] == 0


def test_blurred_edges_score_one_against_themselves():
    truth = np.stack([lines(64, {20: 255, 44: 255}), lines(64, {30: 255})])
    profile = [0.1, 0.4, 1.0, 0.5, 0.2]  # of a line as a tokenizer keeps it
    kept = sum(np.roll(truth * weight, place - 2, axis=2) for place, weight in enumerate(profile))
    kept = kept.astype(np.uint8)
    expected = {"boundary_f": 1, "precision": 1, "recall": 1, "threshold": THRESHOLDS[0]}
    assert score("edges", kept, kept, labels=truth).metrics == expected
    assert edges(kept, kept, truth).by_picture.tolist() == [1, 1]
    assert edges(kept, kept).metrics["recall"] < 1  # of a true picture, every pixel is the truth


def test_edges_where_there_are_none():
    empty, some = np.zeros((1, 32, 32, 3), np.uint8), lines(32, {10: 255})[None]
    assert edges(empty, empty).metrics["boundary_f"] == 1
    assert edges(some, empty).metrics["boundary_f"] == 0
    assert edges(empty, some).metrics["boundary_f"] == 0


def test_edges_of_canny_score_one_against_themselves():
    truth = np.stack([canny(picture) for picture in photographs()])
    assert truth.any(axis=(1, 2, 3)).all()
    expected = {"boundary_f": 1, "precision": 1, "recall": 1, "threshold": THRESHOLDS[0]}
    assert edges(truth, truth).metrics == expected


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_edge_counts_are_those_of_all_distances(seed):
    rng = np.random.default_rng(seed)
    made, truth = np.zeros((2, 12, 14), np.uint8)
    made[rng.integers(12, size=6), np.arange(0, 12, 2)] = 255  # apart: nothing to thin
    truth[rng.integers(12, size=7), np.arange(0, 14, 2)] = rng.integers(16, 256, 7)
    reach = rng.uniform(1, 4)
    at, true = np.argwhere(made), np.argwhere(truth)
    near = np.hypot(*(at[:, None] - true).transpose(2, 0, 1)) <= reach
    strength = truth[tuple(true.T)] / 255
    expected = [near.any(axis=1).sum(), len(at), strength[near.any(axis=0)].sum(), strength.sum()]
    counts = edge_counts(made, truth, reach)
    np.testing.assert_allclose(counts, [expected] * len(THRESHOLDS))


# -- the table


@pytest.mark.parametrize("kind", SCORES)
def test_the_truth_scores_best_against_itself(kind):
    truth = np.stack([skeleton(stand(np.random.default_rng(seed), 64), (64, 64), 4) for seed in range(3)])
    if kind == "edges":  # lines of one pixel: what is thinned stays as it is
        truth = np.stack([lines(64, {column: 255}) for column in (20, 30, 40)])
    best = score(kind, truth, truth)
    worse = score(kind, np.roll(truth, 12, axis=2), truth)
    name = next(iter(best.metrics))
    assert best.by_picture.shape == (3,)
    assert best.by_picture.dtype == np.float64
    ideal = {"mse": 0, "psnr": 100}.get(name, 1)
    assert best.metrics[name] == pytest.approx(ideal)
    np.testing.assert_allclose(best.by_picture, ideal)
    assert (worse.metrics[name] < ideal) == best.higher_is_better
    assert ((worse.by_picture < ideal) == best.higher_is_better).all()


def test_score_takes_a_palette_for_segmentation_alone():
    made, truth = painted([[3, 3, 1]]), painted([[0, 0, 1]])
    assert score("segmentation", made, truth, PALETTE).metrics["miou"] == 0.5
    assert score("segmentation", made, truth).metrics["miou"] == 1
    with pytest.raises(ValueError, match="palette: score 'edges' has none; segmentation has"):
        score("edges", made, truth, PALETTE)


def test_score_refuses_what_it_cannot_score():
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(
        ValueError, match="score: 'beauty' is unknown; choices: segmentation, foreground, pose"
    ):
        score("beauty", picture, picture)
    with pytest.raises(ValueError, match=r"generated: \(1, 4, 2, 3\), must be as truth: \(1, 4, 4, 3\)"):
        score("difference", picture[:, :, :2], picture)
    with pytest.raises(
        ValueError, match=r"truth: float64 \(1, 4, 4, 3\), must be uint8 \(n, H, W, 3\), n > 0"
    ):
        score("difference", picture, picture.astype(float))
    with pytest.raises(ValueError, match=r"generated: uint8 \(0, 4, 4, 3\)"):
        score("difference", picture[:0], picture[:0])


KINDS = [
    ("segmentation", {"scene": "segmentation", "samples": 1, "validation_samples": 1}),
    ("restoration", {"scene": "deraining", "samples": 1, "validation_samples": 1}),
    ("pose", {"scene": "pose", "samples": 1, "validation_samples": 1}),
    ("pose", {"source": "coco", "images": "i", "annotations": "a", "nearest": True}),
    ("segmentation", {"source": "coco", "images": "i", "annotations": "a", "draw": "masks"}),
    ("segmentation", {"source": "coco", "images": "i", "annotations": "a", "draw": "boxes"}),
    ("segmentation", {"source": "sa1b", "images": "i", "policy": "segmentation", "nearest": True}),
    ("restoration", {"source": "lmdb", "images": "i", "annotations": "a", "policy": "restoration"}),
    ("pose", {"images": "i", "annotations": "a", "policy": "pose", "nearest": True}),
    ("segmentation", {"images": "i", "annotations": "a", "nearest": True}),
    ("difference", {"images": "i", "annotations": "a"}),
    ("difference", {"images": "i", "annotations": "a", "policy": "segmentation"}),
    ("difference", {"images": "i"}),
    ("difference", {"source": "lvm", "images": "i"}),
    ("edges", {"images": "i", "make": "edges"}),
    ("difference", {"images": "i", "make": "colour"}),
    *[
        ("restoration", {"images": "i", "make": make})
        for make in ("rain", "blur", "noise", "low_light", "inpainting")
    ],
]


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_a_task_has_its_kind_of_score(kind, task):
    assert kind_of(TaskConfig(**task)) == kind


def test_every_scene_and_maker_has_its_kind():
    assert {task.get("make") for _, task in KINDS} - {None} == set(MAKERS)
    assert {task.get("scene") for _, task in KINDS} - {None} == set(SCENES)
    assert {kind for kind, _ in KINDS} | {"foreground"} == set(SCORES)


def test_palettes_are_those_that_were_painted_with():
    scene = TaskConfig(scene="segmentation", samples=1, validation_samples=1)
    assert palette_of(scene).tolist() == [[0, 0, 0], *map(list, SHAPES.values())]
    masks = {"source": "coco", "images": "i", "annotations": "a"}
    coco = palette_of(TaskConfig(**masks, draw="masks"))
    assert coco.shape == (92, 3)
    assert coco.dtype == np.uint8
    assert len(np.unique(coco, axis=0)) == 92
    assert coco[0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(palette_of(TaskConfig(**masks, draw="boxes")), coco)
    for task in (
        masks,
        {"images": "i", "annotations": "a", "nearest": True},
        {"source": "sa1b", "images": "i"},
    ):
        assert palette_of(TaskConfig(**task)) is None


def test_a_reconstruction_of_labels_takes_its_colours_from_them():
    rng = np.random.default_rng(0)
    labels = np.zeros((1, 32, 32, 3), np.uint8)
    labels[:, :, 10:] = (200, 30, 30)
    labels[:, 20:, :] = (30, 30, 200)
    kept, made = (np.clip(labels + rng.normal(0, 6, labels.shape), 0, 255).astype(np.uint8) for _ in "ab")
    assert score("segmentation", made, kept, labels=labels).metrics == {
        "miou": 1.0, "covering": 1.0, "pixel_accuracy": 1.0
    }  # fmt: skip
    assert score("segmentation", made, kept).metrics["miou"] < 0.5  # its own colours are noise
