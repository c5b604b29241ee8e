"""A classifier that an earlier fine-tuning has left -> the first weights of another, for any size."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from delvm.errors import UserError
from delvm.finetune.classifier import CONFIG, TOKENIZER, WEIGHTS, Classifier, Form, load_classifier, load_form
from delvm.finetune.training import RANDOM, FinetuneConfig
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer


def is_classifier(folder: str | Path) -> bool:
    """Whether a folder holds a classifier, and no model that would become one."""
    return (Path(folder) / CONFIG).is_file()


def classifier_hash(folder: Path) -> str:
    """16 hexadecimal digits that change with any weight or setting of a classifier."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:16]


def go_on(folder: Path, form: Form) -> Classifier:
    """The classifier of a folder, for the pictures of a form. Raises UserError if it cannot be read."""
    classifier = load_classifier(folder, replace(form, begins=load_form(folder).begins))
    classifier.goes_on = True
    return classifier.train()


def check_earlier(
    models: Mapping[str, Path], tokenizer: Tokenizer | None, config: FinetuneConfig, classes: Sequence[str]
) -> dict[str, Form]:
    """Of those models that are classifiers what they are, by name; each goes on as just that.

    Args:
        models: folders by name; others than classifiers' are passed over.
        tokenizer: of the codes; None for patches, or while it is not trained yet.
        config: which must say of input, mask, read-out and patches what the classifiers say of themselves.
        classes: of the training pictures.

    Raises:
        UserError: settings, classes or codes that contradict a classifier, a random start or a soft mask
            beside one, one that cannot be read.
    """
    forms = {}
    for name, folder in models.items():
        if is_classifier(folder):
            key = f"finetune.models.{name}"
            try:
                forms[name] = load_form(folder)
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
            _check_settings(f"{key}, '{folder}',", forms[name], config)
            _check_classes(f"{key}, '{folder}',", forms[name].classes, classes, config.train)
            _check_start(key, config)
            if config.input == "tokens":
                _check_codes(key, folder / TOKENIZER, tokenizer)
    return forms


def _check_settings(who: str, form: Form, config: FinetuneConfig) -> None:
    keys = ("input", "mask", "readout", *(["patch_size"] if form.input == "patches" else []))
    for key in keys:
        asked, found = getattr(config, key), getattr(form, key)
        if asked != found:
            raise UserError(
                f"finetune.{key}: {asked}, but {who} is a classifier whose {key} is {found}, which stays; set"
                f" finetune.{key}={found}"
            )


def _check_classes(who: str, found: Sequence[str], classes: Sequence[str], train: str) -> None:
    if tuple(found) != tuple(classes):
        alone = sorted(set(found) ^ set(classes))
        where = f"only one of them has '{alone[0]}'" if alone else "their orders differ"
        raise UserError(
            f"finetune.train: '{train}' has {len(classes)} classes, {who} is a classifier of {len(found)};"
            f" they must be the same, and {where}"
        )


def _check_start(key: str, config: FinetuneConfig) -> None:
    if RANDOM in config.starts:
        raise UserError(
            f"finetune.starts: {RANDOM} is no control of {key}, a classifier that goes on; set it to"
            f" [pretrained], and add the {RANDOM} of the earlier run to finetune.models"
        )
    if config.anneal:
        raise UserError(
            f"finetune.anneal: {config.anneal} fades into the causal mask, which {key} has learnt already;"
            " set it to 0"
        )


def _check_codes(key: str, folder: Path, tokenizer: Tokenizer | None) -> None:
    # the encoder may differ, as one for larger pictures may: codes mean what their vectors are
    if tokenizer is None or not torch.equal(tokenizer.codebook.cpu(), load_tokenizer(folder).codebook):
        raise UserError(
            f"tokenizer.folder: {key} reads the codes of '{folder}'; give that, or a tokenizer for larger"
            " pictures with the same codebook"
        )
