"""A token store in memory whose codes tell where they come from, for the tests of sentences and rows."""

import itertools
import os
import signal

import numpy as np
import torch
from torch.utils.data import Subset

from delvm.tokens.balance import TaskPlan
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig, find_forms
from delvm.tokens.store import Grid, TokenStore

BOS, EOS = 60_000, 60_001  # above every code
TOKENS = 2  # of a picture

# A task is (samples, views, frames, channels) here. A code tells where it comes from: the first token of the
# first picture of sample 0 is code 0.
PAIRS = (12, 2, 1, 2)
SINGLE = (7, 1, 1, 1)
FILM = (6, 1, 3, 2)
# what models are trained on in seconds
LEARNT = {"pairs": (12, 1, 1, 2), "single": (8, 1, 1, 1)}
CODES = 10


def code_of(task, sample, view, picture, token):
    return task * 20_000 + sample * 1000 + view * 100 + picture * 10 + token


def where(code):
    """(task, sample, view, picture, token) of a code."""
    return code // 20_000, code % 20_000 // 1000, code % 1000 // 100, code % 100 // 10, code % 10


def tiny_grid(task, samples, views, frames, channels):
    """The grid of a task, in shards of four samples."""
    codes = np.fromfunction(
        lambda *place: code_of(task, *place), (samples, views, frames * channels, TOKENS), dtype=int
    ).astype(np.uint16)
    return Grid([codes[start : start + 4] for start in range(0, samples, 4)])


def tiny_store(shapes, classes=None):
    """A store whose validation grids are as the training grids."""
    grids = {task: tiny_grid(index, *shape) for index, (task, shape) in enumerate(shapes.items())}
    manifest = {"num_codes": BOS, "tokens_per_image": TOKENS}
    labels = {task: np.array(found) for task, found in (classes or {}).items()}
    return TokenStore(
        manifest, {"train": grids, "validation": grids}, {"train": labels, "validation": labels}
    )


def tiny_forms(shapes, config):
    return find_forms(config, {t: (frames, frames * c) for t, (_, _, frames, c) in shapes.items()}, TOKENS)


def random_rows(num_rows=12, tasks=tuple(LEARNT), **config):
    """Rows of random codes, with tasks, roles and places; whole ones are BOS, four pictures, EOS."""
    rng, shapes = np.random.default_rng(0), {task: LEARNT[task] for task in tasks}
    grids = {
        task: Grid([rng.integers(CODES, size=(samples, views, frames * channels, TOKENS)).astype(np.uint16)])
        for task, (samples, views, frames, channels) in shapes.items()
    }
    store = TokenStore({"num_codes": CODES, "tokens_per_image": TOKENS}, {"train": grids}, {"train": {}})
    settings = SentencesConfig(shots={"single": 4} if "single" in tasks else {}, **config)
    return TrainingSentences(
        store,
        every_view(shapes),
        tiny_forms(shapes, settings),
        settings,
        num_rows=num_rows,
        seed=0,
        details=True,
    )


class Repeated(Subset):
    """The same rows again and again."""

    collate = staticmethod(TrainingSentences.collate)


class Stopped(Repeated):
    """Rows as they are; reading row `at` asks the process to stop."""

    def __init__(self, rows, at):
        super().__init__(rows, range(len(rows)))
        self.at = at

    def __getitems__(self, indices):
        if self.at in indices:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitems__(indices)


def every_view(shapes):
    """The plan of strategy `augment`: each view of each sample once an epoch."""
    return {task: TaskPlan(n, views, n * views, 1.0, 1.0, views) for task, (n, views, *_) in shapes.items()}


def tiny_dataset(shapes, *, classes=None, plans=None, num_rows=10_000, seed=0, details=False, **config):
    settings = SentencesConfig(**config)
    return TrainingSentences(
        tiny_store(shapes, classes),
        plans or every_view(shapes),
        tiny_forms(shapes, settings),
        settings,
        num_rows=num_rows,
        seed=seed,
        details=details,
    )


def epoch_of(dataset, number=0):
    """The sentences of an epoch, lists of tokens; rows must be sentences."""
    assert dataset.whole
    n = dataset.sentences_per_epoch
    return [dataset[number * n + index]["tokens"].tolist() for index in range(n)]


def pictures_of(sentence):
    """(task, sample, view, picture) of each picture of a sentence; its tokens must be whole and in order."""
    body = [where(code) for code in sentence if code < BOS]
    assert [token for *_, token in body] == list(range(TOKENS)) * (len(body) // TOKENS)
    pictures = [place[:4] for place in body[::TOKENS]]
    assert pictures == [place[:4] for place in body[TOKENS - 1 :: TOKENS]]
    return pictures


def samples_of(sentence, pictures):
    """(sample, view) of each shot of a sentence that shows so many pictures of a sample."""
    shown = [place[1:3] for place in pictures_of(sentence)]
    shots = shown[::pictures]
    assert shown == [shot for shot in shots for _ in range(pictures)]
    return shots


def stream_of(dataset, rows):
    """The tokens of the first rows, one after the other."""
    return torch.cat([dataset[index]["tokens"] for index in range(rows)]).tolist()


def cut_at_bos(stream):
    starts = [place for place, token in enumerate(stream) if token == BOS]
    return [stream[start:end] for start, end in itertools.pairwise([*starts, len(stream)])]
