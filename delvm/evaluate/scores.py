"""Generated pictures and the true ones -> scores.

Pictures are (n, H, W, 3) uint8. Where there is nothing to find and nothing was found, IoU and F are 1.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.morphology import thin
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from delvm.evaluate.pose import compare, distance_to, has_discs
from delvm.images.coco import Coco
from delvm.images.degrade import RESTORED
from delvm.images.scenes import SHAPES
from delvm.images.tasks import TaskConfig


@dataclass(frozen=True)
class Scored:
    """What pictures of one kind are worth."""

    metrics: dict[str, float]
    """Over the data set; the first is the main one."""
    by_picture: np.ndarray
    """(n,) float64: the main metric of each picture alone. Its mean need not be that of the data set, which
    may count pixels over all pictures. NaN where the truth shows nothing to score."""
    higher_is_better: bool


def save(scored: Mapping[str, Mapping[str, Scored]], file: Path) -> None:
    """What models' pictures are worth, task -> model -> scores, as JSON; NaN becomes null."""

    def plain(each: Scored) -> Any:
        found = asdict(each) | {"by_picture": each.by_picture.tolist()}
        return json.loads(json.dumps(found), parse_constant=lambda _: None)

    text = {task: {name: plain(each) for name, each in models.items()} for task, models in scored.items()}
    file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def load(file: Path) -> dict[str, dict[str, Scored]]:
    """What `save` wrote; empty for a file that is not there."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        task: {
            name: Scored(each["metrics"], np.array(each["by_picture"], np.float64), each["higher_is_better"])
            for name, each in models.items()
        }
        for task, models in found.items()
    }


def score(
    kind: str,
    generated: np.ndarray,
    truth: np.ndarray,
    palette: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Scored:
    """One of `SCORES`, of all pictures.

    Args:
        kind: a name from `SCORES`; see `kind_of`.
        generated, truth: (n, H, W, 3) uint8, at least one picture.
        palette: (colours, 3), for segmentation alone; see `palette_of`.
        labels: as generated: what `truth` is a reconstruction of, or itself where nothing else is left;
            segmentation takes its colours from there, edges thin such a truth.

    Raises:
        ValueError: an unknown kind; pictures of other shapes or types; a palette for another kind.
    """
    if kind not in SCORES:
        raise ValueError(f"score: '{kind}' is unknown; choices: {', '.join(SCORES)}")
    for name, pictures in (("generated", generated), ("truth", truth)):
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or not len(pictures) or pictures.dtype != np.uint8:
            raise ValueError(f"{name}: {pictures.dtype} {pictures.shape}, must be uint8 (n, H, W, 3), n > 0")
    if generated.shape != truth.shape:
        raise ValueError(f"generated: {generated.shape}, must be as truth: {truth.shape}")
    if kind == "segmentation":
        return segmentation(generated, truth, palette, labels)
    if palette is not None:
        raise ValueError(f"palette: score '{kind}' has none; segmentation has")
    if kind == "edges":
        return edges(generated, truth, labels)
    return SCORES[kind](generated, truth)


# -- segmentation


def segmentation(
    generated: np.ndarray,
    truth: np.ndarray,
    palette: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Scored:
    """Labels by colour: each pixel is the palette's nearest one (Euclidean in RGB, the first of equal ones).

    With a palette, a colour is a class: `miou` is the mean IoU of the classes that the truth shows, black too
    if the palette has it, pixels counted over all pictures, as for Pascal VOC (Everingham et al., IJCV 2010).

    Without, a colour means nothing beyond its picture (the segments of BSDS or SA-1B), and the palette is
    that of each true picture. `miou` is the mean of the pictures' own; `covering` (Arbelaez et al., TPAMI
    2011) is the mean over true segments, by area, of the IoU with the generated one that fits best, of any
    colour. Such a palette flatters: a colour that it does not have, a wrong class's too, becomes one that it
    has. So `miou` says how well segments lie and whether their colours are told apart, not whether some were
    added in other colours. Where colours are random, nothing can know them: read `covering` there.

    Args:
        palette: (colours, 3), 0..255; without one, of each truth `colours_of` it.
        labels: as truth, to take these from: what a tokenizer keeps of labels has colours that are none.
    """
    confusions = []
    for made, true, flat in zip(generated, truth, truth if labels is None else labels, strict=True):
        colours = colours_of(flat) if palette is None else palette
        confusions.append(confusion(nearest(made, colours), nearest(true, colours), len(colours)))
    by_picture = np.array([mean_iou(counts) for counts in confusions])
    if palette is None:
        covered = float(np.mean([covering(counts) for counts in confusions]))
        metrics = {"miou": float(by_picture.mean()), "covering": covered}
    else:
        metrics = {"miou": mean_iou(np.sum(confusions, axis=0))}
    hits = sum(int(counts.trace()) for counts in confusions)
    return Scored(metrics | {"pixel_accuracy": hits / truth[..., 0].size}, by_picture, True)


def colours_of(pictures: np.ndarray, most: int = 256) -> np.ndarray:
    """(colours, 3) uint8: the colours of (..., 3) uint8 pixels, the most frequent first, at most so many."""
    red, green, blue = np.moveaxis(pictures.astype(np.int64), -1, 0)
    packed, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    packed = packed[np.argsort(-counts, kind="stable")[:most]]
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def nearest(picture: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) int64: the place in the palette of the colour nearest to each pixel."""
    colours = palette.astype(np.float32)
    # |pixel|^2 is the same for every colour; whole numbers of this size are exact in float32
    apart = (colours**2).sum(axis=-1) - 2 * picture.astype(np.float32) @ colours.T
    return np.asarray(apart.argmin(axis=-1))


def confusion(generated: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes) int64: pixels by [true, generated] class."""
    counts = np.bincount((truth * num_classes + generated).ravel(), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def mean_iou(confusion: np.ndarray) -> float:
    """The mean IoU of the classes that the truth shows.

    A class that was generated alone lowers the IoU of those whose pixels it took, and is no class of its own:
    with the 92 colours of COCO's masks, a few mixed pixels would else decide the mean.
    """
    hits, true = confusion.diagonal(), confusion.sum(axis=1)
    union = true + confusion.sum(axis=0) - hits
    return float((hits[true > 0] / union[true > 0]).mean())


def covering(confusion: np.ndarray) -> float:
    """The mean over true segments, by area, of the IoU with the generated segment that fits best."""
    true, made = confusion.sum(axis=1), confusion.sum(axis=0)
    iou = confusion / np.maximum(true[:, None] + made - confusion, 1)
    return float(true @ iou.max(axis=1) / true.sum())


# -- masks of one thing


def foreground(generated: np.ndarray, truth: np.ndarray) -> Scored:
    """IoU of what is not black.

    `foreground_iou` counts pixels over all pictures, `fb_iou` is its mean with the background's, and
    `picture_iou` the mean of the pictures' own.
    """
    counts = mask_counts(foreground_masks(generated), foreground_masks(truth))
    by_picture = ratio(counts[:, 0], counts[:, 1])
    both = fb_iou(counts)
    metrics = {"foreground_iou": both[0], "fb_iou": sum(both) / 2, "picture_iou": float(by_picture.mean())}
    return Scored(metrics, by_picture, True)


def foreground_masks(pictures: np.ndarray, threshold: int = 127) -> np.ndarray:
    """(..., H, W) bool: where the brightest channel is above the threshold, of 255."""
    return np.asarray(pictures.max(axis=-1) > threshold)


PASCAL_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""Pascal VOC's, 1 to 20 in its files; fold f of Pascal-5i has the five of row f here."""


def pascal_5i(
    generated: np.ndarray,
    truth: np.ndarray,
    classes: np.ndarray,
    fold: int,
    ignored: np.ndarray | None = None,
) -> Scored:
    """One fold of Pascal-5i (Shaban et al., BMVC 2017): episodes, each one class against all else.

    `miou` is the mean over the fold's classes of the foreground's IoU, pixels counted over all episodes of a
    class. One without episodes is left out; `iou_CLASS` shows which are there. `fb_iou` is the mean IoU of
    foreground and background over all episodes, whatever their class (Rakelly et al., ICLR workshop 2018).

    Args:
        generated, truth: (n, H, W) bool masks; of generated pictures, `foreground_masks`.
        classes: (n,) int, 1 to 20 as in `PASCAL_CLASSES`, all of the fold.
        fold: 0 to 3.
        ignored: (n, H, W) bool, pixels that do not count: the border that VOC labels 255.

    Raises:
        ValueError: an unknown fold, a class of another fold, arrays that do not fit.
    """
    if fold not in range(4):
        raise ValueError(f"fold: {fold} is unknown; choices: 0, 1, 2, 3")
    members = range(5 * fold + 1, 5 * fold + 6)
    if not set(classes.tolist()) <= set(members):
        others = sorted(set(classes.tolist()) - set(members))
        raise ValueError(f"classes: {others} not in fold {fold}, which has {members[0]} to {members[-1]}")
    if generated.shape != truth.shape or classes.shape != truth.shape[:1] or not len(truth):
        raise ValueError(f"masks {generated.shape}, {truth.shape} and classes {classes.shape} do not fit")
    counts = mask_counts(generated, truth, ignored)
    iou = {}
    for number in members:
        if (episodes := classes == number).any():
            hits, union, *_ = counts[episodes].sum(axis=0)
            iou[f"iou_{PASCAL_CLASSES[number - 1]}"] = float(ratio(hits, union))
    metrics = {"miou": sum(iou.values()) / len(iou), "fb_iou": sum(fb_iou(counts)) / 2, **iou}
    return Scored(metrics, ratio(counts[:, 0], counts[:, 1]), True)


def mask_counts(generated: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """(n, 4) int64 of (n, H, W) bool masks: pixels in both, in either; outside both, outside either."""
    counted = np.ones_like(truth) if ignored is None else ~ignored
    parts = (generated & truth, generated | truth, ~(generated | truth), ~(generated & truth))
    return np.stack([(part & counted).sum(axis=(1, 2)) for part in parts], axis=-1)


def fb_iou(counts: np.ndarray) -> tuple[float, float]:
    """IoU of the foreground and of the background, over all of `mask_counts`."""
    inside, either, outside, not_both = counts.sum(axis=0)
    return float(ratio(inside, either)), float(ratio(outside, not_both))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 1 where whole is 0: nothing to find, and nothing found."""
    return np.where(whole > 0, part / np.maximum(whole, 1e-12), 1.0)


# -- poses


def pose(generated: np.ndarray, truth: np.ndarray) -> Scored:
    """PCK and OKS of skeletons in the colours of `annotate.LIMBS`; see `delvm.evaluate.pose`.

    `pck_0.1` and `pck_0.2` are the shares of all true joints, `oks` the mean over people; a picture has the
    share of its own. All are NaN where no skeleton can be found in the truth.
    """
    discs = has_discs(truth)
    figures = [compare(*pair, discs=discs) for pair in zip(generated, truth, strict=True)]
    shares = [weighted([(f.joints, f.pck_10) for f in found]) for found in figures]
    everyone = [figure for found in figures for figure in found]
    metrics = {
        "pck_0.1": weighted([(f.joints, f.pck_10) for f in everyone]),
        "pck_0.2": weighted([(f.joints, f.pck_20) for f in everyone]),
        "oks": weighted([(1, f.oks) for f in everyone]),
    }
    return Scored(metrics, np.array(shares), True)


def weighted(values: list[tuple[int, float]]) -> float:
    """The mean of (weight, value); NaN of none."""
    total = sum(weight for weight, _ in values)
    return sum(weight * value for weight, value in values) / total if total else math.nan


# -- pictures


HIGHEST_PSNR = 100.0
"""Of an exact picture, in dB: means stay finite."""
SSIM_WINDOW = 11


def restoration(generated: np.ndarray, truth: np.ndarray) -> Scored:
    """PSNR in dB and SSIM (Wang et al., TIP 2004), means over pictures, of RGB.

    PSNR is at most `HIGHEST_PSNR`. SSIM has Gaussian windows of 11 pixels, sigma 1.5, that lie within the
    picture, and is left out for pictures smaller than one.
    """
    psnr, ssim = [], []
    with_ssim = min(truth.shape[1:3]) >= SSIM_WINDOW
    for made, true in zip(map(channels_first, generated), map(channels_first, truth), strict=True):
        psnr.append(min(HIGHEST_PSNR, peak_signal_noise_ratio(made, true, data_range=255.0).item()))
        if with_ssim:
            border = SSIM_WINDOW // 2
            # torchmetrics reflects pictures at their border; the paper's windows do not leave them
            _, map_bchw = structural_similarity_index_measure(
                made, true, data_range=255.0, return_full_image=True
            )
            ssim.append(map_bchw[..., border:-border, border:-border].mean().item())
    metrics = {"psnr": float(np.mean(psnr))} | ({"ssim": float(np.mean(ssim))} if ssim else {})
    return Scored(metrics, np.array(psnr), True)


def channels_first(picture: np.ndarray) -> Tensor:
    """(1, 3, H, W) float64 of a (H, W, 3) uint8 picture."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].double()


def difference(generated: np.ndarray, truth: np.ndarray) -> Scored:
    """`mse`, the mean squared difference of values from 0 to 1: for colours, depth and all else."""
    apart = (generated.astype(np.float64) - truth) / 255
    by_picture = (apart**2).mean(axis=(1, 2, 3))
    return Scored({"mse": float(by_picture.mean())}, by_picture, False)


# -- edges


THRESHOLDS = np.arange(16, 256, 16)
FAINTEST = 16
"""Of 255: what is darker in a true picture is what resampling leaves beside a line. One of nine annotators of
BSDS draws 28."""


def edges(
    generated: np.ndarray, truth: np.ndarray, labels: np.ndarray | None = None, tolerance: float = 0.0075
) -> Scored:
    """Boundary F-measure at the best threshold of the data set (ODS), after Martin et al. (TPAMI 2004).

    A pixel's strength is its brightest channel. What is generated is cut at each of `THRESHOLDS` and thinned
    to lines of one pixel. `precision` is the share of its pixels with a true one near, `recall` the share of
    the truth with a generated pixel near, each true pixel weighed by its strength: where that is the share of
    annotators who drew it, as in BSDS, recall is the mean of theirs by length. `boundary_f` is their harmonic
    mean, pixels counted over all pictures, at the one `threshold` where it is highest; a picture has its own
    there.

    Near is told by distance transforms, not by BSDS's one-to-one matching: a generated pixel may answer for
    several true ones, so dotted lines get more than there; thick ones do not, they are thinned.

    Args:
        labels: what the truth is a tokenizer's reconstruction of. Its lines are blurred, and thinned as those
            that are generated: it scores 1 against itself.
        tolerance: the farthest that is near, as a fraction of the diagonal (BSDS's); at least one pixel.
    """
    reach = max(1.0, tolerance * math.hypot(*truth.shape[1:3]))
    counts = np.array(
        [
            edge_counts(made.max(axis=-1), true.max(axis=-1), reach, thinned=labels is not None)
            for made, true in zip(generated, truth, strict=True)
        ]
    )
    precision, recall = precision_recall(counts.sum(axis=0))
    f_measure = harmonic(precision, recall)
    best = int(f_measure.argmax())
    metrics = {
        "boundary_f": float(f_measure[best]),
        "precision": float(precision[best]),
        "recall": float(recall[best]),
        "threshold": float(THRESHOLDS[best]),
    }
    return Scored(metrics, harmonic(*precision_recall(counts[:, best])), True)


def edge_counts(
    generated: np.ndarray, truth: np.ndarray, reach: float, *, thinned: bool = False
) -> np.ndarray:
    """(thresholds, 4) float64 of two (H, W) uint8 pictures: generated pixels near the truth, and all of them;
    the true strength near what is generated, and all of it. thinned: of true lines the middle alone."""
    drawn = truth >= FAINTEST
    weights = np.where(thin(drawn) if thinned else drawn, truth / 255, 0.0)
    near_truth = distance_to(weights > 0) <= reach
    counts = []
    for threshold in THRESHOLDS:
        lines = thin(generated >= threshold)
        reached = weights[distance_to(lines) <= reach].sum()
        counts.append([(lines & near_truth).sum(), lines.sum(), reached, weights.sum()])
    return np.array(counts, np.float64)


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `edge_counts`, or a sum of them: (..., 4)."""
    return ratio(counts[..., 0], counts[..., 1]), ratio(counts[..., 2], counts[..., 3])


def harmonic(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Their harmonic mean, F; 0 where both are 0."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


# -- which task has which


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], Scored]] = {
    "segmentation": segmentation,
    "foreground": foreground,
    "pose": pose,
    "restoration": restoration,
    "difference": difference,
    "edges": edges,
}


def kind_of(config: TaskConfig) -> str:
    """The score of a task unless its recipe says otherwise; the first of these that holds:

    skeletons (the scene `pose`, `coco` with `draw: skeletons`, the policy `pose`): `pose`; `make: edges`:
    `edges`; `make: colour`: `difference`; any other `make`, the scene `deraining`, the policy `restoration`:
    `restoration`; colours that are labels (`nearest`, the scene `segmentation`, `sa1b`, other drawings of
    `coco`): `segmentation`; all else: `difference`. That a folder's masks have one foreground, or that its
    pictures show edges, `prompting.scores` says.
    """
    coco = config.draw if config.source == "coco" else ""
    if config.scene == "pose" or coco == "skeletons" or config.policy == "pose":
        return "pose"
    if config.make == "edges":
        return "edges"
    if config.make == "colour":
        return "difference"
    if config.make in RESTORED or config.scene == "deraining" or config.policy == "restoration":
        return "restoration"
    if config.nearest or config.scene == "segmentation" or config.source == "sa1b" or coco:
        return "segmentation"
    return "difference"


def palette_of(config: TaskConfig) -> np.ndarray | None:
    """(colours, 3) uint8: black and the classes of a task that has a palette of its own; else None.

    Those are the scene `segmentation` and COCO's masks and boxes.
    """
    if config.scene == "segmentation":
        classes = list(SHAPES.values())
    elif config.source == "coco" and kind_of(config) == "segmentation":
        classes = Coco(config.images, config.annotations, config.draw, key="").palette
    else:
        return None
    return np.array([(0, 0, 0), *classes], np.uint8)
