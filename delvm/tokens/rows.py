"""Visual sentences -> rows of one length to train on.

Sentences are composed when they are read, so that each epoch pairs the samples anew, and laid end to end into
rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from delvm.tokens.balance import TaskPlan
from delvm.tokens.sentences import ANNOTATION, Form, SentencesConfig, framed
from delvm.tokens.store import TokenStore

IGNORED = -100
"""Label of a token that is no target."""


def row_length(config: SentencesConfig, forms: Mapping[str, Form]) -> int:
    """Tokens of a row. Raises ValueError where sentences of several lengths ask for `length`."""
    lengths = {task: form.length for task, form in forms.items()}
    if config.length:
        return config.length
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{task} {length}" for task, length in lengths.items())
        raise ValueError(f"sentences.length: needed, the tasks' sentences differ in length: {found}")
    return next(iter(lengths.values()))


@dataclass(frozen=True)
class Epoch:
    """One epoch's sentences in order, composed but not read."""

    tasks: np.ndarray
    """(sentences,) index of the task."""
    numbers: np.ndarray
    """(sentences,) the sentence's number among its task's."""
    places: list[np.ndarray]
    """By task: (its sentences, images / form.run), where `Grid.take` reads each."""
    ends: np.ndarray
    """(sentences,) where each ends, in tokens from the epoch's first."""


class TrainingSentences(Dataset):
    """`num_rows` rows to train on, cut from an endless stream of sentences; each epoch pairs samples anew.

    Row i depends on the seed and i alone, so that a run which stops and goes on sees the same rows. Items:
    `tokens` (length,) int64; where not all of them are targets also `labels`, the same with IGNORED; where
    boundaries stop inside a row also `positions` (length,) int64, from 0 at the start of every sentence.
    With `details`, for weights and scores by task, role and place in the picture, also `tasks`, `roles` and
    `places`, (length,) int64 each: the task's index, and what `Form` says of the token.
    A list of items (`__getitems__`) is one dict of (rows, length) tensors.
    """

    def __init__(
        self,
        store: TokenStore,
        plans: Mapping[str, TaskPlan],
        forms: Mapping[str, Form],
        config: SentencesConfig,
        *,
        num_rows: int,
        seed: int,
        details: bool = False,
    ) -> None:
        self.num_rows, self.seed, self.length = num_rows, seed, row_length(config, forms)
        self.tasks = list(plans)
        # what stands at a task's index in these is the task's
        self._plans, self._forms = list(plans.values()), [forms[task] for task in plans]
        self._grids = [store.grids["train"][task] for task in plans]
        self._classes = [store.classes["train"].get(task) for task in plans]
        all_targets = config.supervise == "all"
        self._targets = [(form.roles.numpy() == ANNOTATION) | all_targets for form in self._forms]
        self._counts = [max(1, p.draws // f.shots) for p, f in zip(self._plans, self._forms, strict=True)]
        self.sentences_per_epoch = sum(self._counts)
        self.tokens_per_epoch = sum(n * f.length for n, f in zip(self._counts, self._forms, strict=True))
        self.whole = {form.length for form in self._forms} == {self.length}
        """Whether every row is one sentence."""
        self._ends = config.ends(store.num_codes)
        self.tokens_per_image = store.tokens_per_image
        stop = config.boundaries == "stop" and not self.whole
        num_keys = 3 if stop else 1 if all_targets else 2
        self._keys = ("tokens", "labels", "positions")[:num_keys]
        if details:
            self._keys += ("tasks", "roles", "places")
        self._roles = [form.roles.numpy().astype(np.int64) for form in self._forms]
        self._places = [form.places.numpy() for form in self._forms]
        # the last two epochs composed (a row may reach into the next); no lru_cache: workers pickle this
        self._epochs: dict[int, Epoch] = {}

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]  # the one composed first
            self._epochs[number] = self._compose_epoch(number)
        return self._epochs[number]

    def _compose_epoch(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number])
        places = []
        for form, plan, count, classes, grid in zip(
            self._forms, self._plans, self._counts, self._classes, self._grids, strict=True
        ):
            samples, views, pictures = form.picks(plan, count, rng, classes)
            found = grid.index(samples, views)
            if form.run == 1:
                images = pictures.shape[1]
                found = found.repeat(images, axis=1) * images + np.tile(pictures, form.shots)
            places.append(found)
        order = rng.permutation(self.sentences_per_epoch)
        tasks = np.repeat(np.arange(len(self.tasks)), self._counts)[order]
        numbers = np.concatenate([np.arange(count) for count in self._counts])[order]
        lengths = np.array([form.length for form in self._forms])
        return Epoch(tasks, numbers, places, lengths[tasks].cumsum())

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _tensors(self._whole_row(index) if self.whole else self._cut_row(index))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        if self.whole:
            return _tensors(self._whole_rows(np.asarray(indices)))
        rows = [self._cut_row(index) for index in indices]
        return _tensors({key: np.stack([row[key] for row in rows]) for key in rows[0]})

    def _whole_row(self, index: int) -> dict[str, np.ndarray]:
        number, place = divmod(index, self.sentences_per_epoch)
        task, tokens = self._sentence(self._epoch(number), place)
        return self._labelled(tokens, task)

    def _whole_rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """`_whole_row` of many, those of one epoch and task read at once."""
        tokens, body = framed(len(indices), self.length, self._ends)
        tasks = np.empty(len(indices), np.int64)
        numbers, sentences = np.divmod(indices, self.sentences_per_epoch)
        for number in set(numbers.tolist()):
            epoch, rows = self._epoch(number), np.flatnonzero(numbers == number)
            chosen = sentences[rows]
            tasks[rows] = found = epoch.tasks[chosen]
            for task, grid in enumerate(self._grids):
                here = np.flatnonzero(found == task)
                places = epoch.places[task][epoch.numbers[chosen[here]]]
                codes = grid.take(places, self._forms[task].run)
                body[rows[here]] = codes.reshape(len(here), body.shape[1])
        return self._labelled(tokens, tasks)

    def _labelled(self, tokens: np.ndarray, tasks: int | np.ndarray) -> dict[str, np.ndarray]:
        """The item, or batch, of whole rows, each of one task."""
        row = {"tokens": tokens}
        if "labels" in self._keys:
            row["labels"] = np.where(np.stack(self._targets)[tasks], tokens, IGNORED)
        if "tasks" in self._keys:
            row["tasks"] = np.broadcast_to(np.asarray(tasks)[..., None], tokens.shape).copy()
            row["roles"] = np.stack(self._roles)[tasks]
            row["places"] = np.stack(self._places)[tasks]
        return row

    def picks(self, index: int) -> tuple[int, np.ndarray]:
        """The task's index and (images, 3) int64, the (sample, view, picture) that a whole row shows."""
        number, place = divmod(index, self.sentences_per_epoch)
        epoch = self._epoch(number)
        task = int(epoch.tasks[place])
        run, shape = self._forms[task].run, self._grids[task].shape[:3]
        places = (epoch.places[task][epoch.numbers[place], :, None] * run + np.arange(run)).ravel()
        return task, np.stack(np.unravel_index(places, shape), axis=-1)

    def batch(self, codes: np.ndarray, tasks: np.ndarray) -> dict[str, torch.Tensor]:
        """Whole rows of codes that are not in the store, as `__getitems__` gives its own.

        codes: (rows, images * tokens) integers; tasks: (rows,), their indices.
        """
        tokens, body = framed(len(codes), self.length, self._ends)
        body[:] = codes
        return _tensors(self._labelled(tokens, tasks))

    def _cut_row(self, index: int) -> dict[str, np.ndarray]:
        pieces: list[dict[str, np.ndarray]] = []
        filled = 0
        while filled < self.length:
            number, offset = divmod(index * self.length + filled, self.tokens_per_epoch)
            epoch = self._epoch(number)
            place = int(np.searchsorted(epoch.ends, offset, side="right"))
            left = epoch.ends[place] - offset  # tokens of this sentence that no row before has
            task, sentence = self._sentence(epoch, place)
            whole = {
                "tokens": sentence,
                "labels": np.where(self._targets[task], sentence, IGNORED),
                "positions": np.arange(len(sentence)),
                "tasks": np.full(len(sentence), task),
                "roles": self._roles[task],
                "places": self._places[task],
            }
            piece = {key: whole[key][-left:][: self.length - filled] for key in self._keys}
            if "positions" in self._keys:
                piece["positions"] = piece["positions"] - piece["positions"][0]
                piece["labels"][0] = IGNORED  # of a sentence's rest, too: what stood before is out of sight
            pieces.append(piece)
            filled += len(piece["tokens"])
        return {key: np.concatenate([piece[key] for piece in pieces]) for key in self._keys}

    def _sentence(self, epoch: Epoch, place: int) -> tuple[int, np.ndarray]:
        """The task's index and the tokens, (its length,) int64, of a sentence of an epoch."""
        task = epoch.tasks[place]
        form, places = self._forms[task], epoch.places[task][epoch.numbers[place]]
        sentences, body = framed(1, form.length, self._ends)
        body[0] = self._grids[task].take(places, form.run).reshape(-1)
        return task, sentences[0]

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch is made at once by `__getitems__`."""
        return batch


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
