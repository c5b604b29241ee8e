"""Features on disk -> predicted classes by probes that are trained: linear and attentive, a grid at once.

As in `classifiers`, the best of the grid is chosen on the fold, which nobody learns from.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from delvm.evaluate.classifiers import Prediction, best_classes, in_fold, moments
from delvm.evaluate.features import Features


class LinearGrid(nn.Module):
    """A linear classifier for each layer, on standardised features."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Features, num_classes: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.shape = (len(features.layers), features.width)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.weight = nn.Parameter(torch.zeros(*self.shape, num_classes))
        self.bias = nn.Parameter(torch.zeros(self.shape[0], 1, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """(n, layers * width) -> (layers, n, classes)."""
        standard = ((features - self.mean) / self.deviation).unflatten(1, self.shape)
        return standard.transpose(0, 1) @ self.weight + self.bias


class AttentiveProbe(nn.Module):
    """Learned queries that look at a picture's tokens, and a linear classifier of what they find.

    As AIM probes (El-Nouby et al. 2024): batch norm without affine part before it, keys and values without
    bias, queries drawn with deviation 0.02 and averaged after they have looked, a classifier without bias.
    """

    def __init__(self, width: int, num_classes: int, *, heads: int, num_queries: int = 1) -> None:
        """heads: a divisor of `width`."""
        super().__init__()
        self.width, self.heads = width, heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.keys = nn.Linear(width, width, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, num_classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(n, tokens * width) -> (1, n, classes)."""
        tokens = features.unflatten(1, (-1, self.width))
        tokens = self.norm(tokens.transpose(1, 2)).transpose(1, 2)

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        queries = by_head(self.queries).expand(len(tokens), -1, -1, -1)
        found = F.scaled_dot_product_attention(
            queries, by_head(self.keys(tokens)), by_head(self.values(tokens))
        )
        return self.classifier(found.transpose(1, 2).flatten(2).mean(1))[None]


def linear(
    train: Features,
    validation: Features,
    num_classes: int,
    fold: int,
    device: torch.device,
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int = 256,
) -> Prediction:
    """Softmax regressions by SGD, layers x learning rates of them trained together; the fold chooses one.

    Momentum 0.9, a tenth of the rate after 60% and 80% of the steps, rates for a batch of 256 (solo-learn, da
    Costa et al. 2022). They start at zero, so the seed decides on the order alone.
    """
    mean, deviation = moments(train, fold, device)
    probes = [LinearGrid(train, num_classes, mean, deviation).to(device) for _ in rates]
    groups = [{"params": list(probe.parameters()), "lr": rate * batch_size / 256}
              for probe, rate in zip(probes, rates, strict=True)]  # fmt: skip
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def falling(share: float) -> float:
        return 0.1 ** ((share >= 0.6) + (share >= 0.8))

    _train(probes, optimizer, falling, train, fold, device, epochs, batch_size)
    names = [(layer, rate) for rate in rates for layer in train.layers]
    return _choose(probes, names, train, validation, fold, device)


def attentive(
    train: Features,
    validation: Features,
    num_classes: int,
    fold: int,
    device: torch.device,
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int = 256,
    heads: int = 0,
) -> Prediction:
    """Attentive probes by AdamW, one for each learning rate, trained together; the fold chooses one.

    train, validation: each picture's tokens, where the others have layers. heads: 0: of 32 channels or more.
    The rate falls along a cosine, weight decay is 0.05.
    """
    width = train.width
    heads = heads or next(
        n for n in (16, 12, 8, 6, 4, 3, 2, 1) if width % n == 0 and width // n >= min(32, width)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold)
        first = AttentiveProbe(width, num_classes, heads=heads)
    probes = [AttentiveProbe(width, num_classes, heads=heads) for _ in rates]
    for probe in probes:  # one start for all: the rates are compared
        probe.load_state_dict(first.state_dict())
        probe.to(device)
    groups = [
        {"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)

    def cosine(share: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * share))

    _train(probes, optimizer, cosine, train, fold, device, epochs, batch_size)
    return _choose(probes, [("", rate) for rate in rates], train, validation, fold, device)


def _train(
    probes: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[float], float],
    train: Features,
    fold: int,
    device: torch.device,
    epochs: int,
    batch_size: int,
) -> None:
    """Train all probes on the same batches; their losses are added, so none knows of the others.

    Shards come in a new order each epoch, and pictures in a new order within their shard: the listing has
    mixed the classes already.
    """
    starts = np.cumsum([0, *map(len, train.shards)])
    inner = [np.flatnonzero(~in_fold(np.arange(a, b), fold)) for a, b in pairwise(starts)]
    steps = epochs * sum(-(-len(places) // batch_size) for places in inner)
    schedules = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
    for epoch in tqdm(range(epochs), desc="probe", unit="epoch", leave=False):
        rng = np.random.default_rng([fold, epoch])
        for number in rng.permutation(len(train.shards)):
            order = rng.permutation(inner[number])
            for chosen in np.split(order, range(batch_size, len(order), batch_size)):
                rows = np.sort(chosen)  # the disk reads forwards
                batch = torch.from_numpy(train.shards[number][rows].astype(np.float32)).flatten(1).to(device)
                labels = torch.from_numpy(train.labels[starts[number] + rows]).to(device)
                loss = torch.zeros((), device=device)
                for probe in probes:
                    logits = probe(batch)
                    loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(
                        logits
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedules.step()


@torch.no_grad()
def _choose(
    probes: Sequence[nn.Module],
    names: Sequence[tuple[str, float]],
    train: Features,
    validation: Features,
    fold: int,
    device: torch.device,
) -> Prediction:
    """What the best of all probes on the fold, and the best of each layer, say of the held-out pictures."""
    for probe in probes:
        probe.eval()
    right, seen = torch.zeros(len(names), dtype=torch.int64), 0
    for places, block in train.blocks(device):
        inside = in_fold(places, fold)
        if inside.any():
            labels = torch.from_numpy(train.labels[places[inside]]).to(device)
            logits = torch.cat([probe(block[torch.from_numpy(inside).to(device)]) for probe in probes])
            right += (logits.argmax(-1) == labels).sum(1).cpu()
            seen += len(labels)
    layers = list(dict.fromkeys(layer for layer, _ in names))
    best = {
        layer: max((n for n, name in enumerate(names) if name[0] == layer), key=lambda n: int(right[n]))
        for layer in layers
    }
    of_all = max(best.values(), key=lambda n: int(right[n]))
    ranks: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for _, block in validation.blocks(device):
        logits = torch.cat([probe(block) for probe in probes])
        for layer, place in best.items():
            ranks[layer].append(best_classes(logits[place]))
    predicted = {layer: np.concatenate(parts) for layer, parts in ranks.items()}
    layer, rate = names[of_all]
    chosen: dict[str, float | str] = {"rate": rate, "accuracy": int(right[of_all]) / max(1, seen)}
    if len(layers) > 1:
        return Prediction(predicted[layer], {"layer": layer, **chosen}, predicted)
    return Prediction(predicted[layer], chosen)
