"""Frozen models and pictures of classes -> how well the classes can be read from them, beside controls.

A number by itself says little: what codes and pixels give without any model stands in the same table.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaForCausalLM

from delvm import llama
from delvm.distill.cache import weights_hash
from delvm.errors import UserError
from delvm.evaluate import classifiers, heads
from delvm.evaluate.classifiers import FOLDS, Prediction
from delvm.evaluate.features import Codes, Listing, Pictures, encode, extract, list_pictures
from delvm.evaluate.readers import (
    READOUTS,
    CodebookVectors,
    HiddenStates,
    Pixels,
    Reader,
    Timm,
    TokenCounts,
    load_timm,
)
from delvm.stages import write_atomic
from delvm.tokenizer import Tokenizer

SPLITS = ("train", "validation")
CLASSIFIERS = ("ridge", "nearest", "linear", "attentive")
CONTROLS = ("tokens", "pixels", "codebook", "random")


@dataclass
class ProbeConfig:
    """On which pictures, with which models and classifiers."""

    train: str = ""
    """Folder with one folder of pictures a class, as ImageNet's."""
    validation: str = ""
    """The same for the pictures that are scored; their labels serve for nothing else."""
    samples: int = 0
    """The first training pictures, of every class as even as they go; 0: all."""
    validation_samples: int = 0
    models: dict[str, str] = field(default_factory=dict)
    """Further models by name: folders that `delvm.llama.load` takes, for the run's tokenizer."""
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    """`tokens`: how often each code stands in a picture. `pixels`: 16x16. `codebook`: the codes' vectors by
    position. `random`: the last model's architecture with fresh weights."""
    timm: list[str] = field(default_factory=list)
    """Pretrained models of timm by name, on pictures of their own size."""
    layers: list[int] = field(default_factory=list)
    """Whose hidden states are read, from 1; empty: all."""
    readout: str = "quadrants"
    """Of a layer's tokens: the means of the picture's `quadrants`, the `mean` of all, or the `last` one."""
    mirrored: bool = True
    """Average the features of a picture and of its mirror image."""
    classifiers: list[str] = field(default_factory=lambda: ["ridge", "nearest"])
    """`ridge`: closed form. `nearest`: neighbours. `linear`: by SGD, layers x learning_rates. `attentive`: as
    AIM; for it every token is stored."""
    seeds: int = 3
    """Up to 10. Each leaves out another tenth of the training pictures, chooses there, learns of the rest."""
    neighbours: int = 20
    epochs: int = 30
    """Of the linear and the attentive probes."""
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1])
    """Of the linear probes, for a batch of 256; a hundredth of these for the attentive ones, by AdamW."""
    batch_size: int = 32
    """Pictures that go through a model at a time, with their mirror images."""
    dtype: str = "float16"
    """Of features on disk: `float16` or `float32`."""
    folder: str = ""
    """Where features are kept, so that runs share them; empty: `features` in the run."""

    def __post_init__(self) -> None:
        for key in ("train", "validation"):
            if not getattr(self, key):
                raise ValueError(f"{key}: missing, give a folder with one folder of pictures a class")
        if self.train == self.validation:
            raise ValueError(f"validation: '{self.validation}' is train; it must hold other pictures")
        tables = {"readout": [*READOUTS], "dtype": ["float16", "float32"]}
        for key, choices in tables.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")
        for key, table in (("classifiers", CLASSIFIERS), ("controls", CONTROLS)):
            for name in getattr(self, key):
                if name not in table:
                    raise ValueError(f"{key}: '{name}' is unknown; choices: {', '.join(table)}")
        if not self.classifiers:
            raise ValueError(f"classifiers: none; choices: {', '.join(CLASSIFIERS)}")
        for key in ("seeds", "neighbours", "epochs", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        for key in ("samples", "validation_samples"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 0")
        if self.seeds > FOLDS:
            raise ValueError(f"seeds: {self.seeds} must be at most {FOLDS}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates: {self.learning_rates} must be one or more above 0")
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=1) < 1:
            raise ValueError(f"layers: {self.layers} must be different, from 1 on")
        # names of rows, and of folders of features
        taken = [*CONTROLS, "codes", *(name.replace("/", "-") for name in self.timm)]
        for name in self.models:
            if name in taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"models.{name}: a name may hold letters, digits, '_' and '-', and be none of"
                    f" {', '.join(taken)}"
                )

    @property
    def pooled(self) -> list[str]:
        """The classifiers that read a few features of a picture, not each of its tokens."""
        return [kind for kind in self.classifiers if kind != "attentive"]


def list_splits(config: ProbeConfig) -> dict[str, Listing]:
    """The pictures by split, unread.

    Raises:
        UserError: no folder, no class, a class without pictures or one that train has not; fewer training
            pictures than folds.
    """
    train = list_pictures(config.train, "probe.train", samples=config.samples)
    if len(train) < FOLDS:
        raise UserError(f"probe.train: {len(train)} pictures in '{config.train}', must be {FOLDS} at least")
    validation = list_pictures(
        config.validation, "probe.validation", classes=train.classes, samples=config.validation_samples
    )
    return {"train": train, "validation": validation}


def probe(
    models: Mapping[str, Path],
    tokenizer: Tokenizer,
    config: ProbeConfig,
    out: Path,
    *,
    features: Path,
    seed: int = 0,
    device: torch.device | None = None,
    precision: str = "32-true",
    num_workers: int = 0,
    tensorboard: Path | None = None,
) -> dict:
    """Probe models and controls on the same pictures, with the same classifiers.

    Args:
        models: folders that `delvm.llama.load` takes, by name; one is in memory at a time.
        tokenizer: of the models' codes.
        out: folder for `metrics.json`.
        features: folder for what is read of the pictures; what is there already is used.
        seed: of the weights of `random`.
        device: None: the CPU.
        precision: of the models, `32-true` or `bf16-mixed`.
        num_workers: processes that read pictures.
        tensorboard: folder for accuracies, those by layer with the layer for a step.

    Returns:
        `train`, `validation`, `classes`: how many. `models`, by name and then by classifier: `top1` and
        `top5`, means over the seeds; `low` and `high`, top1 over the seeds; `error`, its binomial standard
        error; `chosen`, settings of each seed; `by_layer`, top1. metrics.json has `by_class`, too.

    Raises:
        UserError: pictures or models that cannot be read; a model of other codes or with fewer layers.
    """
    device = torch.device("cpu") if device is None else device
    work = _Work(tokenizer.to(device), config, features, num_workers, device)
    rows: dict[str, dict[str, list[Prediction]]] = {}
    model: LlamaForCausalLM | None = None
    for name, folder in models.items():
        with _about(name):
            model = llama.load(folder, num_codes=tokenizer.num_codes)
            llama.check_codes(model.config, tokenizer.num_codes)
        rows[name] = work.model(name, model, weights_hash(folder), precision)
    if "random" in config.controls and model is not None:
        drawn = llama.initialise(model.config, seed=seed).eval()
        made_of = f"{json.dumps(model.config.to_dict(), sort_keys=True, default=str)} {seed}"
        rows["random"] = work.model("random", drawn, made_of, precision)
    if config.pooled:  # an attentive probe has nothing to look for in these
        rows |= {name: work.control(name) for name in config.controls if name != "random"}
        rows |= {name: work.timm(name) for name in config.timm}

    validation = work.listings["validation"]
    classes = validation.classes
    result: dict = {split: len(listing) for split, listing in work.listings.items()}
    result |= {"classes": len(classes), "models": {}}
    whole: dict = {**result, "models": {}}
    for name, found in rows.items():
        result["models"][name] = {kind: summary(each, validation.labels) for kind, each in found.items()}
        whole["models"][name] = {
            kind: {
                **result["models"][name][kind],
                "by_class": dict(zip(classes, by_class(each, validation.labels, len(classes)), strict=True)),
            }
            for kind, each in found.items()
        }
    write_atomic(out / "metrics.json", json.dumps(whole, indent=2) + "\n")
    if tensorboard:
        _log(result, tensorboard)
    return result


def right(prediction: np.ndarray, labels: np.ndarray, top: int = 1) -> np.ndarray:
    """(pictures,) bool: whether the class is among the `top` likeliest of (pictures, at least top)."""
    return (prediction[:, :top] == labels[:, None]).any(axis=1)


def summary(predictions: Sequence[Prediction], labels: np.ndarray) -> dict:
    """One classifier's numbers over its seeds, JSON-ready: see `probe`."""
    first = [float(right(each.ranks, labels).mean()) for each in predictions]
    top1 = float(np.mean(first))
    numbers: dict = {
        "top1": top1,
        "low": min(first),
        "high": max(first),
        "error": math.sqrt(top1 * (1 - top1) / len(labels)),
        "top5": float(np.mean([right(each.ranks, labels, 5).mean() for each in predictions])),
        "chosen": [each.chosen for each in predictions],
    }
    if predictions[0].by_layer:
        numbers["by_layer"] = {
            layer: float(np.mean([right(each.by_layer[layer], labels).mean() for each in predictions]))
            for layer in predictions[0].by_layer
        }
    return numbers


def by_class(predictions: Sequence[Prediction], labels: np.ndarray, num_classes: int) -> list[float | None]:
    """Accuracy of each class, the mean over the seeds; None of a class without pictures."""
    mean = np.mean([right(each.ranks, labels) for each in predictions], axis=0)
    counts = np.bincount(labels, minlength=num_classes)
    totals = np.bincount(labels, weights=mean, minlength=num_classes)
    return [float(total / count) if count else None for total, count in zip(totals, counts, strict=True)]


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Say of which model an error speaks."""
    try:
        yield
    except UserError as error:
        raise UserError(f"probe: {name}: {error}") from error


class _Work:
    """The rows of the table: each is read of the pictures once, then classified."""

    def __init__(
        self, tokenizer: Tokenizer, config: ProbeConfig, folder: Path, num_workers: int, device: torch.device
    ) -> None:
        self.tokenizer, self.config, self.folder, self.device = tokenizer, config, folder, device
        self.tokenizer_hash = tokenizer.hash
        self.listings = list_splits(config)
        self.how = {"batch_size": config.batch_size, "num_workers": num_workers}

    def model(
        self, name: str, model: LlamaForCausalLM, made_of: str, precision: str
    ) -> dict[str, list[Prediction]]:
        """A LLaMA that reads the pictures' codes. made_of: what tells its weights from others."""
        config, what = self.config, {"model": made_of, "precision": precision}
        model = model.to(self.device)

        def hidden(every_token: bool) -> HiddenStates:
            with _about(name):
                return HiddenStates(
                    model, self.tokenizer.grid, layers=config.layers, readout=config.readout,
                    every_token=every_token, precision=precision,
                )  # fmt: skip

        found: dict[str, list[Prediction]] = {}
        if config.pooled:
            source = {split: self._codes(split, config.mirrored) for split in SPLITS}
            found = self._read(
                name, hidden(False), source, {**what, "readout": config.readout}, config.pooled
            )
        if "attentive" in config.classifiers:  # at its own place each token of a mirror image is another's
            source = {split: self._codes(split, False) for split in SPLITS}
            found |= self._read(f"{name}-every-token", hidden(True), source, what, ["attentive"])
        return found

    def control(self, name: str) -> dict[str, list[Prediction]]:
        """What the pictures give without a model."""
        tokenizer, kinds = self.tokenizer, self.config.pooled
        if name == "pixels":
            return self._read(name, Pixels(), self._pictures(tokenizer.image_size), {}, kinds)
        readers: dict[str, Reader] = {
            "tokens": TokenCounts(tokenizer.num_codes),
            "codebook": CodebookVectors(tokenizer.codebook, tokenizer.grid),
        }
        source = {split: self._codes(split, self.config.mirrored) for split in SPLITS}
        return self._read(name, readers[name], source, {}, kinds)

    def timm(self, name: str) -> dict[str, list[Prediction]]:
        """A pretrained model of another kind."""
        reader = Timm(load_timm(name).to(self.device))
        kinds = self.config.pooled
        return self._read(name.replace("/", "-"), reader, self._pictures(reader.size), {"model": name}, kinds)

    def _pictures(self, size: int) -> dict[str, Pictures]:
        mirrored = self.config.mirrored
        return {split: Pictures(self.listings[split], size, mirrored=mirrored) for split in SPLITS}

    def _codes(self, split: str, mirrored: bool) -> Codes:
        """Of the pictures, and with `mirrored` of their mirror images; written once for all models."""
        pictures = self._pictures(self.tokenizer.image_size)[split]
        made_of = {"tokenizer": self.tokenizer_hash, "listing": self.listings[split].hash}
        written = encode(self.tokenizer, pictures, self.folder / f"codes.{split}", made_of, **self.how)
        return Codes(written.shards, mirrored=mirrored)

    def _read(
        self,
        name: str,
        reader: Reader,
        source: Mapping[str, Codes | Pictures],
        made_of: Mapping[str, str],
        kinds: Sequence[str],
    ) -> dict[str, list[Prediction]]:
        """Extract the features of one row and let each kind of classifier predict, once for each seed."""
        config, classes = self.config, len(self.listings["train"].classes)
        train, validation = (
            extract(
                reader, source[split], self.listings[split].labels, self.folder / f"{name}.{split}",
                {**made_of, "tokenizer": self.tokenizer_hash, "listing": self.listings[split].hash,
                 "mirrored": config.mirrored},
                device=self.device, dtype=config.dtype, **self.how,
            ) for split in SPLITS
        )  # fmt: skip
        place, seeds, device = (train, validation, classes), range(config.seeds), self.device
        rates, epochs = config.learning_rates, config.epochs
        slower = [rate / 100 for rate in rates]
        run: dict[str, Callable[[], list[Prediction]]] = {
            "ridge": lambda: classifiers.ridge(*place, config.seeds, device),
            "nearest": lambda: [
                classifiers.nearest(*place, seed, device, neighbours=config.neighbours) for seed in seeds
            ],
            "linear": lambda: [
                heads.linear(*place, seed, device, rates=rates, epochs=epochs) for seed in seeds
            ],
            "attentive": lambda: [
                heads.attentive(*place, seed, device, rates=slower, epochs=epochs) for seed in seeds
            ],
        }
        return {kind: run[kind]() for kind in kinds}


def _log(result: Mapping, folder: Path) -> None:
    """Accuracies for TensorBoard."""
    with SummaryWriter(folder) as writer:
        for name, found in result["models"].items():
            for kind, numbers in found.items():
                writer.add_scalar(f"{kind}/{name}", numbers["top1"], 0)
                for layer, top1 in numbers.get("by_layer", {}).items():
                    writer.add_scalar(f"{kind}_by_layer/{name}", top1, int(layer))
