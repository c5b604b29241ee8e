"""Models and held-out sentences -> scores by task, and pictures that the models complete."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from delvm import llama
from delvm.evaluate import likelihood
from delvm.evaluate.prompting import Picture, PromptingConfig
from delvm.evaluate.scores import Scored, kind_of, palette_of, score
from delvm.generation import complete
from delvm.images.sources import Views
from delvm.images.tasks import TaskConfig
from delvm.tokenizer import Tokenizer
from delvm.tokens import sentences
from delvm.tokens.sentences import Form, SentencesConfig
from delvm.tokens.store import TokenStore

BATCH = 8  # prompts, or pictures, side by side

Metrics = dict[str, float]
Scorer = Callable[..., Scored]
"""Generated pictures and what they should be, (n, H, W, 3) uint8 both -> what they are worth; `labels` are
the true pictures where these are reconstructions of them."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out sentences of every task, the same for every model."""

    store: TokenStore
    """The tokens of the held-out samples."""
    tokenizer: Tokenizer
    """Of these tokens."""
    forms: Mapping[str, Form]
    """The sentences of each task."""
    config: SentencesConfig
    views: Mapping[str, Views]
    """The held-out pictures by task; those of other tasks are decoded from their tokens."""
    seed: int
    """Of the sentences and of what is drawn."""

    @cached_property
    def sentences(self) -> dict[str, Tensor]:
        """task -> (config.validation, length) int64."""
        return sentences.validation_sentences(self.store, self.forms, self.config, self.seed)

    @cached_property
    def prompted(self) -> list[str]:
        """The tasks whose sentences have a picture before the last one, which a model can then draw."""
        return [task for task in self.sentences if self.forms[task].images > 1]

    def picks(self, task: str) -> np.ndarray:
        """(config.validation, images, 3) int64: (sample, view, picture) of the pictures of every sentence."""
        index, grid = list(self.store.grids["validation"]).index(task), self.store.grids["validation"][task]
        classes = self.store.classes["validation"].get(task)
        form, count = self.forms[task], self.config.validation
        return sentences.validation_picks(form, len(grid), count, self.seed, index, classes)

    def pictures(self, task: str, picks: np.ndarray) -> list[np.ndarray]:
        """The pictures of (n, 3) picks, (H, W, 3) uint8 each."""
        if task not in self.views:
            return self.reconstructions(task, picks)
        return [self.views[task][int(sample)][picture].numpy() for sample, _, picture in picks]

    def reconstructions(self, task: str, picks: np.ndarray) -> list[np.ndarray]:
        """The same as the tokenizer keeps them."""
        codes = self.store.grids["validation"][task].gather(*picks.T.copy()).astype(np.int64)
        return decoded_pictures(self.tokenizer, torch.from_numpy(codes))

    def with_examples(self, most: int, positions: int) -> "HeldOut":
        """Sentences in which up to `most` examples stand before the last sample of a task.

        Fewer where the model's positions or the held-out samples end; none is shorter than it was. Tasks
        whose sentences are not of images with their annotations keep theirs.
        """
        forms = dict(self.forms)
        for task, form in self.forms.items():
            if form.frames == 1 and sentences.ANNOTATION in form.image_roles:
                room = (positions - 2 * form.specials) // (form.channels * form.tokens)
                shots = min(most + 1, room, len(self.store.grids["validation"][task]))
                forms[task] = replace(form, shots=max(form.shots, shots))
        return replace(self, forms=forms)


@dataclass
class Findings:
    """What is measured of one model; by task."""

    scores: dict[str, Metrics] = field(default_factory=dict)
    """As `likelihood.summarise` gives them."""
    places: dict[str, list[list[float]]] = field(default_factory=dict)
    """(rows, columns): mean loss in nats of the annotations' codes by their place in the picture."""
    examples: dict[str, dict[int, Metrics]] = field(default_factory=dict)
    """Of the annotations by how many examples stand before them, as `likelihood.by_examples`."""
    drawn: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    """Scores of generated pictures against the "truth", and against its "reconstruction" by the tokenizer,
    which is the best that codes can show."""
    scored: dict[str, Scored] = field(default_factory=dict)
    """Of the pictures against the truth, one by one: the first of them are `pictures`."""
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """The last pictures of the first sentences as the model draws them, (H, W, 3) uint8."""

    def by_number(self, task: str) -> dict[str, Metrics]:
        """`examples` of a task as JSON has them."""
        return {str(number): entry for number, entry in self.examples[task].items()}


def measure(
    model: LlamaForCausalLM,
    held: HeldOut,
    prompting: PromptingConfig,
    *,
    examples: int = 0,
    scorers: Mapping[str, Scorer] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Findings:
    """Score a model on the held-out sentences, and let it complete the first of them.

    Args:
        model: on its device.
        held: the sentences; they fit into the model's positions.
        prompting: how pictures are drawn, how many of a task are scored, and how many kept.
        examples: the most that stand before an annotation in `Findings.examples`; 0: as many as the
            sentences have.
        scorers: how they are scored, by task; others are not.
        progress: called with the number of sentences done since its last call.

    Raises:
        UserError: a model whose logits are no numbers.
    """
    found = Findings()
    likelihood.check(model, held.sentences, {task: form.roles for task, form in held.forms.items()})
    longer = held.with_examples(examples, model.config.max_position_embeddings) if examples else held
    for task, ids in held.sentences.items():
        form, more = held.forms[task], longer.forms[task]
        tokens = likelihood.score_tokens(model, ids, progress=progress)
        found.scores[task] = likelihood.summarise(tokens, form.roles)
        if sentences.ANNOTATION not in form.image_roles:
            continue
        places = likelihood.by_place(tokens, form.roles, form.places)
        found.places[task] = places.view(held.tokenizer.grid).tolist()
        if more != form:
            tokens = likelihood.score_tokens(model, longer.sentences[task], progress=progress)
        found.examples[task] = likelihood.by_examples(tokens, more.roles, _examples_before(more))
    for task in held.prompted:
        scorer = (scorers or {}).get(task) if prompting.queries else None
        wanted = max(prompting.pictures, prompting.queries if scorer else 0)
        drawn = _draw(model, held, task, wanted, prompting)
        found.pictures[task] = drawn[: prompting.pictures]
        if scorer:
            found.drawn[task], found.scored[task] = _compare(held, task, drawn[: prompting.queries], scorer)
    return found


def scorers_of(tasks: Mapping[str, TaskConfig], kinds: Mapping[str, str]) -> dict[str, Scorer]:
    """How the generated pictures of every task are scored: as `kinds` has it, or by what its settings say."""
    found: dict[str, Scorer] = {}
    for task, config in tasks.items():
        kind = kinds.get(task) or kind_of(config)
        found[task] = partial(score, kind, palette=palette_of(config) if kind == "segmentation" else None)
    return found


def ceilings(held: HeldOut, queries: int, scorers: Mapping[str, Scorer]) -> dict[str, Metrics]:
    """What `Findings.drawn` could be at best: the tokenizer's reconstruction scored against the truth.

    By task, of those of `scorers` that have pictures.
    """
    found = {}
    for task in held.prompted:
        if queries and task in scorers and task in held.views:
            picks = held.picks(task)[:queries, -1]
            found[task] = _finite(
                _score(scorers[task], held.reconstructions(task, picks), held.pictures(task, picks))
            )
    return found


def shown(held: HeldOut, number: int) -> dict[str, list[list[Picture]]]:
    """The pictures of the first held-out sentences, captioned; the last one is to be generated."""
    rows: dict[str, list[list[Picture]]] = {}
    for task in held.prompted:
        captions = _captions((held.forms[task].image_roles == sentences.ANNOTATION).tolist())
        rows[task] = [
            list(zip(captions, held.pictures(task, picks), strict=True))
            for picks in held.picks(task)[:number]
        ]
    return rows


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
    scorers: Mapping[str, Scorer] | None = None,
) -> tuple[dict[str, dict[str, dict]], dict[str, list[list[Picture]]], dict[str, dict[str, Scored]]]:
    """Score every model on the same sentences, and let it complete the first of them.

    Args:
        models: transformers folders by name; one is in memory at a time.
        tokenizer: on `device`.
        store, forms, config, views, seed: see `HeldOut`.
        scorers: see `measure`.

    Returns:
        Scores by model and task as `likelihood.evaluate` gives them, with those of the generated pictures as
        "pictures": against the "truth", against its "reconstruction", and the "ceiling", see `ceilings`; of
        annotations "examples" and "places", see `Findings`. And rows of captioned pictures by task: what a
        sentence shows, the truth, and each model's own. And what these are worth one
        by one, by task and model.

    Raises:
        UserError: as `measure`.
    """
    held = HeldOut(store, tokenizer, forms, config, views, seed)
    pictures, scores = shown(held, prompting.pictures), dict[str, dict[str, dict]]()
    best = ceilings(held, prompting.queries, scorers or {})
    by_picture: dict[str, dict[str, Scored]] = {}
    total = len(models) * len(held.sentences) * config.validation
    with tqdm(total=total, desc="evaluate", unit="sentence") as bar:
        for name, folder in models.items():
            model = llama.load(folder).to(device)
            found = measure(
                model, held, prompting, examples=prompting.shots, scorers=scorers, progress=bar.update
            )
            scores[name] = {task: dict(entry) for task, entry in found.scores.items()}
            for task, places in found.places.items():
                scores[name][task] |= {"examples": found.by_number(task), "places": places}
            for task, drawn in found.drawn.items():
                ceiling = {"ceiling": best[task]} if task in best else {}
                scores[name][task]["pictures"] = drawn | ceiling
            for task, scored in found.scored.items():
                by_picture.setdefault(task, {})[name] = scored
            add_drawn(pictures, name, found)
    return scores, pictures, by_picture


def add_drawn(rows: Mapping[str, list[list[Picture]]], name: str, found: Findings) -> None:
    """Put what a model has drawn at the end of the rows of `shown`, under its name."""
    for task, drawn in found.pictures.items():
        for row, picture in zip(rows[task], drawn, strict=True):
            row.append((name, picture))


def decoded_pictures(tokenizer: Tokenizer, codes: Tensor) -> list[np.ndarray]:
    """(n, tokens) int64 codes -> n pictures (H, W, 3) uint8."""
    found: list[np.ndarray] = []
    for part in codes.split(BATCH):
        with torch.inference_mode():
            decoded = tokenizer.decode(part.to(tokenizer.codebook.device)).cpu()
        found.extend((decoded.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
    return found


def _draw(
    model: LlamaForCausalLM, held: HeldOut, task: str, number: int, prompting: PromptingConfig
) -> list[np.ndarray]:
    """The last pictures of the first sentences, as the model continues what stands before them."""
    tokens = held.store.tokens_per_image
    end = held.forms[task].length - held.config.specials - tokens
    codes = [
        complete(
            model, prompts, tokens, held.store.num_codes, temperature=prompting.temperature,
            top_p=prompting.top_p, seed=held.seed + batch,
        )
        for batch, prompts in enumerate(held.sentences[task][:number, :end].split(BATCH))
    ]  # fmt: skip
    return decoded_pictures(held.tokenizer, torch.cat(codes))


def _compare(
    held: HeldOut, task: str, drawn: list[np.ndarray], scorer: Scorer
) -> tuple[dict[str, Metrics], Scored]:
    """Scores of the drawn pictures against what they should be; of tasks of tokens there is no truth.

    And against the first of these picture by picture.
    """
    picks = held.picks(task)[: len(drawn), -1]
    kept = held.reconstructions(task, picks)
    if task not in held.views:
        of_kept = _score(scorer, drawn, kept, labels=np.stack(kept))
        return {"reconstruction": _finite(of_kept)}, of_kept
    truth = held.pictures(task, picks)
    of_truth, of_kept = _score(scorer, drawn, truth), _score(scorer, drawn, kept, labels=np.stack(truth))
    return {"truth": _finite(of_truth), "reconstruction": _finite(of_kept)}, of_truth


def _score(
    scorer: Scorer, generated: list[np.ndarray], truth: list[np.ndarray], **settings: np.ndarray
) -> Scored:
    return scorer(np.stack(generated), np.stack(truth), **settings)


def _finite(scored: Scored) -> Metrics:
    """The metrics that are numbers: where the truth shows nothing to score, some are not."""
    return {key: value for key, value in scored.metrics.items() if math.isfinite(value)}


def _examples_before(form: Form) -> Tensor:
    """(length,) int64: how many whole samples stand before that of each token; -1: SPECIAL."""
    samples = np.arange(form.shots).repeat(form.frames * form.channels * form.tokens)
    return torch.from_numpy(np.pad(samples, int(form.specials), constant_values=-1))


def _captions(annotated: list[bool]) -> list[str]:
    """What each picture of a sentence is."""
    captions = ["annotation" if drawn else "example" if any(annotated) else "image" for drawn in annotated]
    captions[-1] = "truth"
    if annotated[-1] and not annotated[-2]:
        captions[-2] = "query"
    return captions
