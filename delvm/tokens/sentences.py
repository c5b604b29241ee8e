"""Token grids -> visual sentences of fixed length.

A sentence is `BOS image annotation image annotation ... EOS`, all pairs from one task (Bai et al. 2023). The
ids of BOS and EOS follow the codes: `num_codes` and `num_codes + 1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from delvm.tokens.balance import TaskPlan
from delvm.tokens.store import TokenStore

SPECIAL, IMAGE, ANNOTATION = 0, 1, 2


@dataclass
class SentencesConfig:
    """How pairs become sentences."""

    pairs: int = 2
    """Pairs in a sentence."""
    validation: int = 128
    """Held-out sentences for each task, composed once from the seed."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs: {self.pairs} must be at least 1")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation} must be at least 1")


def sentence_length(pairs: int, tokens_per_image: int) -> int:
    """Tokens of a sentence, BOS and EOS included."""
    return 2 + pairs * 2 * tokens_per_image


def roles(pairs: int, tokens_per_image: int) -> torch.Tensor:
    """(length,) int8: what each position of a sentence is: SPECIAL, IMAGE or ANNOTATION."""
    body = torch.tensor([IMAGE, ANNOTATION] * pairs, dtype=torch.int8).repeat_interleave(tokens_per_image)
    ends = torch.tensor([SPECIAL], dtype=torch.int8)
    return torch.cat([ends, body, ends])


def compose(grid: np.ndarray, picks: np.ndarray, num_codes: int) -> torch.Tensor:
    """One sentence from the pairs `picks`.

    Args:
        grid: (samples, views, 2, tokens) unsigned.
        picks: (pairs, 2) integers, (sample, view) of each pair.
        num_codes: codes of the tokenizer; BOS and EOS are the next two ids.

    Returns:
        (2 + pairs * 2 * tokens,) int64.
    """
    body = grid[picks[:, 0], picks[:, 1]].reshape(-1).astype(np.int64)
    return torch.from_numpy(np.concatenate([[num_codes], body, [num_codes + 1]]))


def rounds_of(num_samples: int, rounds: int, pairs: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Permutations of the samples; one after the other, cut into sentences, they repeat none in a sentence.

    With fewer samples than `pairs` that is impossible, and they do repeat.
    """
    order: list[np.ndarray] = []
    for number in range(rounds):
        samples = rng.permutation(num_samples)
        if begun := number * num_samples % pairs:  # samples of the sentence that the last round left open
            taken = np.isin(samples, order[-1][-begun:])
            samples = samples[np.argsort(taken, kind="stable")]
        order.append(samples)
    return order


def shuffled_pairs(entry: TaskPlan, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Every (sample, view) of a task `repeats` times in random order: (entry.pairs, 2) int64.

    In rounds over the samples, so that the `pairs` neighbours that become one sentence are different samples:
    two views of one photograph in a sentence would teach copying.
    """
    offsets = rng.integers(entry.views, size=entry.samples)
    order = rounds_of(entry.samples, entry.views * entry.repeats, pairs, rng)
    picks = [
        np.stack([samples, (offsets[samples] + r) % entry.views], axis=1) for r, samples in enumerate(order)
    ]
    return np.concatenate(picks)


class TrainingSentences(Dataset):
    """`num_sentences` training sentences; each epoch pairs the samples anew.

    Item i depends on the seed and i alone, so that a run which stops and goes on sees the same sentences.
    Items: `{"tokens": (length,) int64, "task": int}`.
    """

    def __init__(
        self,
        store: TokenStore,
        plans: Mapping[str, TaskPlan],
        config: SentencesConfig,
        *,
        num_sentences: int,
        seed: int,
    ) -> None:
        self.store, self.plans, self.config = store, dict(plans), config
        self.num_sentences, self.seed = num_sentences, seed
        self.tasks = list(plans)
        # a task with fewer pairs than a sentence holds fills its one sentence by starting again
        self._per_epoch = {t: max(1, p.pairs // config.pairs) for t, p in self.plans.items()}
        self.sentences_per_epoch = sum(self._per_epoch.values())
        # the epoch composed last; no lru_cache: spawned workers must be able to pickle this
        self._epoch, self._composed = -1, (np.empty(0, np.int64), np.empty(0, np.int64))

    def _compose_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sentences,) task index and (sentences, pairs, 2) picks of one epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        tasks, picks = [], []
        for index, task in enumerate(self.tasks):
            count = self._per_epoch[task]
            shuffled = shuffled_pairs(self.plans[task], self.config.pairs, rng)
            chosen = np.resize(shuffled, (count, self.config.pairs, 2))
            tasks.append(np.full(count, index))
            picks.append(chosen)
        order = rng.permutation(self.sentences_per_epoch)
        return np.concatenate(tasks)[order], np.concatenate(picks)[order]

    def __len__(self) -> int:
        return self.num_sentences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        epoch, place = divmod(index, self.sentences_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._composed = epoch, self._compose_epoch(epoch)
        tasks, picks = self._composed
        task = int(tasks[place])
        grid = self.store.grids["train"][self.tasks[task]]
        return {"tokens": compose(grid, picks[place], self.store.num_codes), "task": task}


def validation_picks(num_samples: int, config: SentencesConfig, seed: int, task: int) -> np.ndarray:
    """(validation, pairs) int64: samples of the fixed held-out sentences of the task with index `task`."""
    rng = np.random.default_rng([seed, task])
    wanted = config.validation * config.pairs
    rounds = -(-wanted // num_samples)
    samples = np.concatenate(rounds_of(num_samples, rounds, config.pairs, rng))[:wanted]
    return samples.reshape(config.validation, config.pairs)


def validation_sentences(store: TokenStore, config: SentencesConfig, seed: int) -> dict[str, torch.Tensor]:
    """The fixed held-out sentences, `{task: (validation, length) int64}`: real samples, the first view."""
    sentences = {}
    for index, (task, grid) in enumerate(store.grids["validation"].items()):
        samples = validation_picks(len(grid), config, seed, index)
        picks = np.stack([samples, np.zeros_like(samples)], axis=-1)
        sentences[task] = torch.stack([compose(grid, pick, store.num_codes) for pick in picks])
    return sentences
