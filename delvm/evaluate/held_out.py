"""Models and held-out sentences -> scores by task, and pictures that the models complete."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from delvm import llama
from delvm.evaluate import likelihood
from delvm.evaluate.prompting import Picture, PromptingConfig
from delvm.generation import complete
from delvm.images.sources import Views
from delvm.tokenizer import Tokenizer
from delvm.tokens import sentences
from delvm.tokens.sentences import Form, SentencesConfig
from delvm.tokens.store import TokenStore


def evaluate(
    models: Mapping[str, Path],
    store: TokenStore,
    tokenizer: Tokenizer,
    forms: Mapping[str, Form],
    config: SentencesConfig,
    prompting: PromptingConfig,
    *,
    views: Mapping[str, Views],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, list[list[Picture]]]]:
    """Score every model on the same sentences, and let it complete the first of them.

    Args:
        models: transformers folders by name; one is in memory at a time.
        store: the tokens of the held-out samples.
        tokenizer: of these tokens, on `device`.
        forms: the sentences of each task.
        views: the held-out pictures by task; those of other tasks are decoded from their tokens.
        seed: of the sentences and of what is drawn.

    Returns:
        Scores by model as `likelihood.evaluate` gives them, and rows of captioned pictures by task: what a
        sentence shows, the truth, and each model's own.
    """
    held_out = sentences.validation_sentences(store, forms, config, seed)
    roles = {task: form.roles for task, form in forms.items()}
    pictures = _shown(store, tokenizer, forms, config, prompting.pictures, views, seed)
    scores = {}
    total = len(models) * len(held_out) * config.validation
    with tqdm(total=total, desc="evaluate", unit="sentence") as bar:
        for name, folder in models.items():
            model = llama.load(folder).to(device)
            scores[name] = likelihood.evaluate(model, held_out, roles, progress=bar.update)
            for task, rows in pictures.items():
                end = forms[task].length - config.specials - store.tokens_per_image
                codes = complete(
                    model, held_out[task][: len(rows), :end], store.tokens_per_image, store.num_codes,
                    temperature=prompting.temperature, top_p=prompting.top_p, seed=seed,
                )  # fmt: skip
                for row, picture in zip(rows, decoded_pictures(tokenizer, codes), strict=True):
                    row.append((name, picture))
    return scores, pictures


def _shown(
    store: TokenStore,
    tokenizer: Tokenizer,
    forms: Mapping[str, Form],
    config: SentencesConfig,
    number: int,
    views: Mapping[str, Views],
    seed: int,
) -> dict[str, list[list[Picture]]]:
    """The pictures of the first held-out sentences, captioned; the last one is to be generated."""
    rows: dict[str, list[list[Picture]]] = {}
    for index, (task, form) in enumerate(forms.items()):
        if form.images == 1:  # nothing stands before it
            continue
        classes, grid = store.classes["validation"].get(task), store.grids["validation"][task]
        picks = sentences.validation_picks(form, len(grid), config.validation, seed, index, classes)
        captions = _captions((form.image_roles == sentences.ANNOTATION).tolist())
        rows[task] = []
        for sentence in picks[:number]:
            if task in views:
                shown = [views[task][int(sample)][picture].numpy() for sample, _, picture in sentence]
            else:
                codes = grid.gather(*sentence.T.copy()).astype(np.int64)
                shown = decoded_pictures(tokenizer, torch.from_numpy(codes))
            rows[task].append(list(zip(captions, shown, strict=True)))
    return rows


def _captions(annotated: list[bool]) -> list[str]:
    """What each picture of a sentence is."""
    captions = ["annotation" if drawn else "example" if any(annotated) else "image" for drawn in annotated]
    captions[-1] = "truth"
    if annotated[-1] and not annotated[-2]:
        captions[-2] = "query"
    return captions


def decoded_pictures(tokenizer: Tokenizer, codes: torch.Tensor) -> list[np.ndarray]:
    """(n, tokens) int64 codes -> n pictures (H, W, 3) uint8."""
    with torch.inference_mode():
        decoded = tokenizer.decode(codes.to(tokenizer.codebook.device)).cpu()
    return list((decoded.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
