"""Models and pictures of classes -> classifiers of pretrained and of random weights, scored side by side."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from delvm import llama, ranks
from delvm.errors import UserError
from delvm.evaluate.classifiers import Prediction, best_classes
from delvm.evaluate.features import Listing, Pictures, list_pictures
from delvm.evaluate.probe import by_class, right
from delvm.finetune.classifier import Classifier, Form, Predictor, Read
from delvm.finetune.earlier import check_earlier, go_on, is_classifier
from delvm.finetune.training import RANDOM, Finetune, FinetuneConfig
from delvm.finetune.views import Views
from delvm.stages import write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokens.encoder import TokensConfig
from delvm.training import (
    TrainerConfig,
    discard_checkpoint,
    leave_stopping_to_us,
    plain_errors,
    set_up_model,
    train,
)

METRICS = "metrics.json"


@dataclass(frozen=True)
class Arm:
    """One classifier to train: a row of the table."""

    name: str
    folder: Path
    """Of the model whose weights, or whose architecture alone, it takes."""
    start: str


def list_splits(config: FinetuneConfig) -> dict[str, Listing]:
    """The pictures by split, unread.

    Raises:
        UserError: no folder, no class, a class without pictures or one that train has not.
    """
    train = list_pictures(config.train, "finetune.train", samples=config.samples)
    validation = list_pictures(
        config.validation, "finetune.validation", classes=train.classes, samples=config.validation_samples
    )
    return {"train": train, "validation": validation}


def list_arms(models: Mapping[str, Path], starts: Sequence[str]) -> list[Arm]:
    """The rows of the table: each model as it is pretrained, then the last one's architecture at random."""
    arms = [Arm(name, folder, "pretrained") for name, folder in models.items() if "pretrained" in starts]
    if RANDOM in starts:
        arms.append(Arm(RANDOM, list(models.values())[-1], RANDOM))
    return arms


def finetune(
    models: Mapping[str, Path],
    tokenizer: Tokenizer | None,
    config: FinetuneConfig,
    out: Path,
    *,
    trainer: TrainerConfig,
    tensorboard: Path,
    tokens: TokensConfig | None = None,
    seed: int = 0,
) -> dict:
    """Train a classifier for each arm and score it; all processes of a run do it together.

    A classifier has a folder of its own, whole once its metrics.json is there: a stopped run goes on with the
    one that it was at.

    Args:
        models: folders that `delvm.llama.load` takes, or classifiers that go on, by name.
        tokenizer: of the models' codes; None for patches.
        config: pictures and training; its `averaging` stands for that of `trainer`.
        out: folder for the classifiers' folders, which `delvm.finetune.load` takes, and `metrics.json`.
        tensorboard: folder of the event files.
        tokens: how views are encoded.
        seed: of the order of the pictures, their views, and of weights that no model gives.

    Returns:
        `train`, `validation`, `classes`: how many. `models`, by name: `top1` and `top5` with their binomial
        standard errors `top1_error` and `top5_error`, `parameters`. metrics.json has `by_class`, too.

    Raises:
        UserError: pictures or models that cannot be read, a model of other codes, a classifier that
            contradicts the settings, steps that processes and micro-batches cannot share; `Interrupted` and
            `NotFinite` as `delvm.training.train`.
    """
    listings = list_splits(config)
    check_earlier(models, tokenizer, config, listings["train"].classes)
    work = _Work(tokenizer, config, listings, trainer, tensorboard, tokens, seed)
    found = {arm.name: work.arm(arm, out / arm.name) for arm in list_arms(models, config.starts)}
    result: dict = {split: len(listing) for split, listing in listings.items()}
    result |= {"classes": len(listings["train"].classes)}
    if ranks.is_first():
        write_atomic(out / METRICS, json.dumps({**result, "models": found}, indent=2) + "\n")
        with SummaryWriter(str(tensorboard / "finetune")) as writer:
            for name, numbers in found.items():
                for key in ("top1", "top5"):
                    writer.add_scalar(f"{key}/{name}", numbers[key], 0)
    plain = {name: {k: v for k, v in each.items() if k != "by_class"} for name, each in found.items()}
    return {**result, "models": plain}


def form_of(config: FinetuneConfig, tokenizer: Tokenizer | None, classes: Sequence[str]) -> Form:
    """What the classifiers are; whether something stands before the picture is each model's own."""
    size, grid = config.image_size, config.image_size // config.patch_size
    num_codes = 0
    if config.input == "tokens":
        assert tokenizer is not None
        size, grid, num_codes = tokenizer.image_size, tokenizer.grid[0], tokenizer.num_codes
    return Form(
        tuple(classes), size, grid, input=config.input, num_codes=num_codes, mask=config.mask,
        readout=config.readout,
    )  # fmt: skip


def start_weights(arm: Arm, form: Form, *, seed: int) -> Classifier:
    """An arm's classifier before its first step.

    Where a classifier is to go on it is this, for pictures of the form's size.

    Raises:
        UserError: a model that cannot be read, or reads other codes than there are.
    """
    codes = form.num_codes or None
    try:
        if is_classifier(arm.folder):
            return go_on(arm.folder, form)
        if arm.start == RANDOM:
            model = llama.initialise(llama.load_config(arm.folder, num_codes=codes), seed=seed)
        else:
            model = llama.load(arm.folder, num_codes=codes)
        if codes is not None:
            llama.check_codes(model.config, codes)
    except UserError as error:
        raise UserError(f"finetune: {arm.name}: {error}") from error
    return Classifier.of(model, replace(form, begins=model.config.bos_token_id is not None), seed=seed)


class _Work:
    """The rows of the table: each is trained, saved and scored."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: FinetuneConfig,
        listings: Mapping[str, Listing],
        trainer: TrainerConfig,
        tensorboard: Path,
        tokens: TokensConfig | None,
        seed: int,
    ) -> None:
        self.tokenizer, self.config, self.listings, self.seed = tokenizer, config, listings, seed
        self.trainer, self.tensorboard, self.tokens = trainer, tensorboard, tokens
        self.form = form_of(config, tokenizer, listings["train"].classes)

    def arm(self, arm: Arm, folder: Path) -> dict:
        """Train what is not trained yet in the arm's folder, and return what its metrics.json says."""
        if not ranks.on_first((folder / METRICS).is_file):
            ranks.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
            classifier = self._train(arm, folder)
            if ranks.is_first():
                self._conclude(Predictor(classifier, self.tokenizer, self.tokens), folder)
        return ranks.on_first(lambda: json.loads((folder / METRICS).read_text()))

    def _train(self, arm: Arm, folder: Path) -> Classifier:
        config, listing = self.config, self.listings["train"]
        classifier, steps = start_weights(arm, self.form, seed=self.seed), config.steps(len(listing))
        set_up_model(classifier.blocks, self.trainer)
        views = Views(
            listing, self.form.image_size, config.views, steps * config.batch_size, seed=self.seed,
            num_draws=2 * len(classifier.blocks.layers),
        )  # fmt: skip
        read = Read(self.form, self.tokenizer, self.tokens)
        pl.seed_everything(self.seed, verbose=False)
        curve = train(
            Finetune(classifier, read, config, steps, start=arm.start), views, name=f"finetune-{arm.name}",
            steps=steps, batch_size=config.batch_size, clip=config.clip, folder=folder,
            config=replace(self.trainer, averaging=config.averaging), tensorboard=self.tensorboard,
        )  # fmt: skip
        if ranks.is_first():
            write_atomic(folder / "curve.json", json.dumps(curve))
        return classifier

    def _conclude(self, predictor: Predictor, folder: Path) -> None:
        """Save a classifier and write what it is worth; last of all the file that says it is whole."""
        listing, trainer = self.listings["validation"], self.trainer
        predictor.classifier.to(trainer.device())
        ranked = predict(predictor, listing, batch_size=self.config.batch_size, trainer=trainer)
        weights = predictor.classifier.parameters()
        numbers = {**score(ranked, listing), "parameters": sum(weight.numel() for weight in weights)}
        predictor.save(folder)
        write_atomic(folder / METRICS, json.dumps(numbers, indent=2) + "\n")
        discard_checkpoint(folder)


def predict(predictor: Predictor, listing: Listing, *, batch_size: int, trainer: TrainerConfig) -> np.ndarray:
    """(pictures, up to 5) int64: the likeliest classes of each, best first.

    Raises:
        UserError: a picture that cannot be read.
    """
    device = next(predictor.classifier.parameters()).device
    pictures = Pictures(listing, predictor.classifier.form.image_size, mirrored=False)
    loader = DataLoader(
        pictures, batch_size, num_workers=trainer.num_workers, worker_init_fn=leave_stopping_to_us
    )
    mixed = trainer.precision == "bf16-mixed"
    found = []
    with plain_errors(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        for batch in tqdm(loader, desc="held-out pictures", unit="batch"):
            found.append(best_classes(predictor(batch[:, 0].to(device))))
    return np.concatenate(found)


def score(ranked: np.ndarray, listing: Listing) -> dict:
    """Accuracies of (pictures, up to 5) classes, best first, with binomial standard errors, JSON-ready."""
    labels, numbers = listing.labels, {}
    for top in (1, 5):
        share = float(right(ranked, labels, top).mean())
        numbers[f"top{top}"] = share
        numbers[f"top{top}_error"] = math.sqrt(share * (1 - share) / len(labels))
    shares = by_class([Prediction(ranked)], labels, len(listing.classes))
    return {**numbers, "by_class": dict(zip(listing.classes, shares, strict=True))}
