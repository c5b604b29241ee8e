"""Features on disk -> predicted classes: ridge regression and nearest neighbours.

Every classifier leaves out one tenth of the training pictures, its fold: its settings are chosen there and it
learns from the rest. None reads a label of the pictures whose classes it predicts. All of them stream: none
holds the features of more than a few thousand pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from delvm.errors import UserError
from delvm.evaluate.features import Features

FOLDS = 10
RANKS = 5  # classes that are predicted, the likeliest first
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-8, 5))
"""Of the ridge's penalty, times the number of pictures: 1e-4 to 1e2."""
MOST_FEATURES = 16_384  # a Gram matrix of 2 GiB
MOST_CHOSEN = 10_000  # pictures of a fold on which the ridge's strength is chosen
ALL = "all"


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of pictures."""

    ranks: np.ndarray
    """(pictures, up to 5) int64: the likeliest classes, best first."""
    chosen: dict[str, float | str] = field(default_factory=dict)
    """The settings chosen on the fold, and `accuracy`, their share of right classes there."""
    by_layer: dict[str, np.ndarray] = field(default_factory=dict)
    """The same from one layer alone, where that comes for nothing."""


def in_fold(places: np.ndarray, fold: int) -> np.ndarray:
    """Which pictures are left out: every tenth of an order that mixes the classes."""
    return places % FOLDS == fold


def best_classes(scores: Tensor) -> np.ndarray:
    """(..., classes) -> (..., up to 5) int64, the highest first."""
    return scores.topk(min(RANKS, scores.shape[-1]), dim=-1).indices.cpu().numpy()


# --- ridge regression, in closed form ---


@dataclass(frozen=True)
class Sums:
    """Of features x less `shift`: all that a ridge regression needs to know of its pictures."""

    counts: Tensor
    """(classes,) float64."""
    totals: Tensor
    """(classes, width) float64: the sum of x by class."""
    gram: Tensor
    """(width, width) float64: the sum of x x^T."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.counts + other.counts, self.totals + other.totals, self.gram + other.gram)


class Ridge:
    """Least squares from standardised features to one-hot classes, for every strength of the penalty at once.

    The same as scikit-learn's Ridge(alpha=strength * pictures) on a StandardScaler's features. One
    eigendecomposition of the correlations serves all strengths.
    """

    def __init__(self, sums: Sums, shift: Tensor, columns: slice) -> None:
        """columns: of the features that are used."""
        number = sums.counts.sum()
        mean = sums.totals.sum(0)[columns] / number
        scatter = sums.gram[columns, columns] - number * torch.outer(mean, mean)
        deviation = (scatter.diagonal() / number).clamp(min=0).sqrt()
        # a feature that never changes stays what it is, 0 after centring
        deviation = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, 1.0)
        self.columns, self.mean, self.deviation = columns, mean + shift[columns], deviation
        correlations = scatter / (number * torch.outer(deviation, deviation))
        values, self.axes = torch.linalg.eigh(correlations)
        self.values = values.clamp(min=0)
        products = (sums.totals[:, columns] - torch.outer(sums.counts, mean)) / deviation
        self.targets = self.axes.T @ (products.T / number)
        self.prior = sums.counts / number

    def scores(self, features: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
        """(n, all features) float64 -> for each strength (n, classes)."""
        along = ((features[:, self.columns] - self.mean) / self.deviation) @ self.axes
        for strength in strengths:
            yield (along / (self.values + strength)) @ self.targets + self.prior


def ridge(
    train: Features,
    validation: Features,
    num_classes: int,
    folds: int,
    device: torch.device,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Prediction]:
    """A ridge regression for each of the first `folds` folds, on all layers together and on each alone.

    Two passes over the training features, one over those that are predicted, whatever the number of folds.

    Raises:
        UserError: more features than their Gram matrix has memory for.
    """
    layers, width = train.layers, train.width
    if len(layers) * width > MOST_FEATURES:
        raise UserError(
            f"probe.layers: {len(layers)} layers of {width} features, the ridge takes {MOST_FEATURES} in all;"
            " choose fewer layers, or probe.readout=mean"
        )
    subsets = {ALL: slice(0, len(layers) * width)}
    if len(layers) > 1:
        subsets |= {layer: slice(n * width, (n + 1) * width) for n, layer in enumerate(layers)}
    parts, shift = _sums(train, num_classes, folds, device)
    predictions = []
    for fold in range(folds):
        rest = sum((part for n, part in enumerate(parts[1:]) if n != fold), start=parts[0])
        fits = {name: Ridge(rest, shift, columns) for name, columns in subsets.items()}
        right, seen = {name: torch.zeros(len(strengths), dtype=torch.int64) for name in fits}, 0
        for places, block in train.blocks(device):
            inside = in_fold(places, fold)
            if not inside.any() or seen >= MOST_CHOSEN:
                continue
            labels = torch.from_numpy(train.labels[places[inside]]).to(device)
            seen += len(labels)
            left_out = block[torch.from_numpy(inside).to(device)].double()
            for name, fit in fits.items():
                found = [(s.argmax(1) == labels).sum().cpu() for s in fit.scores(left_out, strengths)]
                right[name] += torch.stack(found)
        # of equals the strongest: it trusts the features least
        chosen = {name: max(range(len(strengths)), key=lambda n: (int(r[n]), n)) for name, r in right.items()}
        ranks: dict[str, list[np.ndarray]] = {name: [] for name in fits}
        for _, block in validation.blocks(device):
            for name, fit in fits.items():
                scores = next(fit.scores(block.double(), [strengths[chosen[name]]]))
                ranks[name].append(best_classes(scores))
        predicted = {name: np.concatenate(parts_) for name, parts_ in ranks.items()}
        best = chosen[ALL]
        settings: dict[str, float | str] = {
            "strength": strengths[best],
            "accuracy": int(right[ALL][best]) / max(1, seen),
        }
        predictions.append(Prediction(predicted.pop(ALL), settings, predicted))
    return predictions


def _sums(
    features: Features, num_classes: int, folds: int, device: torch.device
) -> tuple[list[Sums], Tensor]:
    """([of all that is in no fold, of each fold], shift), in one pass."""
    width = len(features.layers) * features.width
    parts: list[Sums] = []
    for _ in range(1 + folds):
        zeros = [torch.zeros(*shape, dtype=torch.float64, device=device)
                 for shape in ((num_classes,), (num_classes, width), (width, width))]  # fmt: skip
        parts.append(Sums(*zeros))
    shift: Tensor | None = None
    for places, block in features.blocks(device):
        block = block.double()
        # near the mean: products of far-off values would lose the digits in which they differ
        shift = block.mean(0) if shift is None else shift
        block = block - shift
        labels = torch.from_numpy(features.labels[places]).to(device)
        group = np.where(places % FOLDS < folds, places % FOLDS + 1, 0)
        for number, part in enumerate(parts):
            inside = torch.from_numpy(group == number).to(device)
            rows, classes = block[inside], labels[inside]
            part.counts.add_(torch.bincount(classes, minlength=num_classes))
            part.totals.index_add_(0, classes, rows)
            part.gram.addmm_(rows.T, rows)
    assert shift is not None, "no features"
    return parts, shift


# --- nearest neighbours ---


def nearest(
    train: Features,
    validation: Features,
    num_classes: int,
    fold: int,
    device: torch.device,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    most: int = 4096,
) -> Prediction:
    """Votes of the most similar training pictures outside the fold (cosine of standardised features).

    A neighbour's vote is exp(similarity / temperature) (Wu et al. 2018). `most`: pictures whose neighbours
    are looked for in one pass over the training features.
    """
    mean, deviation = moments(train, fold, device)
    ranks = []
    for queries in _joined((block for _, block in validation.blocks(device)), most):
        queries = F.normalize((queries - mean) / deviation)
        similar = torch.full((len(queries), 0), 0.0, device=device)
        classes = torch.zeros(len(queries), 0, dtype=torch.int64, device=device)
        for places, block in train.blocks(device):
            outside = ~in_fold(places, fold)
            keys = F.normalize((block[torch.from_numpy(outside).to(device)] - mean) / deviation)
            labels = torch.from_numpy(train.labels[places[outside]]).to(device).expand(len(queries), -1)
            similar, classes = torch.cat([similar, queries @ keys.T], 1), torch.cat([classes, labels], 1)
            similar, order = similar.topk(min(neighbours, similar.shape[1]), dim=1)
            classes = classes.gather(1, order)
        votes = torch.zeros(len(queries), num_classes, device=device)
        votes.scatter_add_(1, classes, (similar / temperature).exp())
        ranks.append(best_classes(votes))
    return Prediction(np.concatenate(ranks))


def _joined(blocks: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    """Blocks put together to at most `most` rows, or one block where that is more."""
    held: list[Tensor] = []
    for block in blocks:
        if held and sum(map(len, held)) + len(block) > most:
            yield torch.cat(held)
            held = []
        held.append(block)
    if held:
        yield torch.cat(held)


def moments(features: Features, fold: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(layers * width,) float32 mean and standard deviation of what is outside the fold; 1 where it is 0."""
    number, total, squares, shift = 0, torch.zeros(()), torch.zeros(()), None
    for places, block in features.blocks(device):
        rows = block[torch.from_numpy(~in_fold(places, fold)).to(device)].double()
        shift = rows.mean(0) if shift is None else shift
        rows = rows - shift
        number += len(rows)
        total, squares = total.to(rows) + rows.sum(0), squares.to(rows) + rows.square().sum(0)
    assert shift is not None, "no features"
    mean = total / number
    deviation = (squares / number - mean.square()).clamp(min=0).sqrt()
    mean = mean + shift
    deviation = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, 1.0)
    return mean.float(), deviation.float()
