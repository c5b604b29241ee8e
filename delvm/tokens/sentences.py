"""Token grids -> visual sentences: what stands in them, and those held out.

A sentence is `BOS image annotation image annotation ... EOS`, or another of the KINDS, over samples of one
task (Bai et al. 2023, Guo et al. 2024).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from delvm.tokens.balance import TaskPlan
from delvm.tokens.store import Grid, TokenStore

SPECIAL, IMAGE, ANNOTATION = 0, 1, 2

Order = Callable[[int, int], list[int]]


def as_stored(frames: int, channels: int) -> list[int]:
    """Frame by frame, in each the image and then its annotations."""
    return list(range(frames * channels))


def by_channel(frames: int, channels: int) -> list[int]:
    """All images, then all annotations."""
    return [frame * channels + channel for channel in range(channels) for frame in range(frames)]


@dataclass(frozen=True)
class Kind:
    """What samples a kind of sentence takes, and in which order it shows the pictures of each."""

    frames: range
    channels: range
    order: Order = as_stored
    annotated: bool = True
    """Whether the channels after the first are annotations, or images as the first."""
    shuffled: bool = False
    """The annotation kinds come in an order drawn for each sentence, the same in all its samples."""
    grouped: bool = False
    """The samples come class by class."""


ONE, TWO, SEVERAL, ANY = range(1, 2), range(2, 3), range(2, 1 << 30), range(1, 1 << 30)
KINDS: dict[str, Kind] = {
    "single": Kind(ONE, ONE),
    "sequence": Kind(ANY, ONE),  # frames of a film, views of an object
    "category": Kind(ONE, ONE, grouped=True),
    "pairs": Kind(ONE, TWO),
    "annotations": Kind(ONE, SEVERAL, shuffled=True),
    "interleaved": Kind(SEVERAL, SEVERAL),  # frame, its annotation, the next frame ...
    "separated": Kind(SEVERAL, SEVERAL, by_channel),
    "two_sequences": Kind(SEVERAL, TWO, by_channel, annotated=False),  # such as two cameras
}


@dataclass
class SentencesConfig:
    """How samples become sentences, and sentences rows."""

    pairs: int = 2
    """Samples in a sentence of `pairs` or `annotations`."""
    validation: int = 128
    """Held-out sentences for each task, composed once from the seed."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Kind by task, of KINDS; else what the task's samples are: `pairs`, `single`, `sequence`, `interleaved`,
    `annotations`."""
    shots: dict[str, int] = field(default_factory=dict)
    """Samples in a sentence by task; else `pairs`, 16 for `category` and 1 for the other kinds."""
    per_class: int = 4
    """Samples of one class that stand together in a sentence of kind `category`."""
    specials: bool = True
    """BOS and EOS around each sentence; DeLVM has none."""
    bos: int = -1
    """Their ids, above every code; -1: the two that follow the codes."""
    eos: int = -1
    length: int = 0
    """Tokens of a row; sentences lie in it end to end, cut where it ends. 0: a row is one whole sentence."""
    boundaries: str = "stop"
    """Where a sentence ends inside a row, attention and positions `stop`, or they `run_on` (DeLVM, LVM)."""
    supervise: str = "all"
    """Targets of training: `all` tokens, or those of `annotations` alone."""

    def ends(self, num_codes: int) -> tuple[int, int] | None:
        """The ids of BOS and EOS, or None. Raises ValueError where one of them is a code, or both are one."""
        if not self.specials:
            return None
        bos, eos = (
            (num_codes if self.bos == -1 else self.bos),
            (num_codes + 1 if self.eos == -1 else self.eos),
        )
        for key, special in (("bos", bos), ("eos", eos)):
            if special < num_codes:
                raise ValueError(f"sentences.{key}: {special} is a code, there are {num_codes}")
        if bos == eos:
            raise ValueError(f"sentences.bos, sentences.eos: both are {bos}")
        return bos, eos

    def __post_init__(self) -> None:
        for key in ("pairs", "validation", "per_class"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        for task, kind in self.kinds.items():
            if kind not in KINDS:
                raise ValueError(f"kinds.{task}: '{kind}' is unknown; choices: {', '.join(KINDS)}")
        for task, shots in self.shots.items():
            if shots < 1:
                raise ValueError(f"shots.{task}: {shots} must be at least 1")
        if self.length != 0 and self.length < 2:
            raise ValueError(f"length: {self.length} must be 0 (a sentence) or at least 2")
        for key, choices in (("boundaries", ("stop", "run_on")), ("supervise", ("all", "annotations"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")


@dataclass(frozen=True)
class Form:
    """The sentences of one task: `shots` samples of `frames * channels` pictures."""

    kind: str
    frames: int
    channels: int
    shots: int
    per_class: int
    tokens: int
    """Of one picture."""
    specials: bool
    """Whether BOS and EOS stand around it."""

    @property
    def images(self) -> int:
        """Pictures of a sentence."""
        return self.shots * self.frames * self.channels

    @property
    def length(self) -> int:
        """Tokens of a sentence."""
        return self.images * self.tokens + 2 * self.specials

    @cached_property
    def order(self) -> np.ndarray:
        """(frames * channels,) int64: the pictures of a sample as the sentence shows them."""
        return np.array(KINDS[self.kind].order(self.frames, self.channels))

    @cached_property
    def run(self) -> int:
        """Pictures that are read at once: all of a sample, where a sentence shows them as stored, or 1."""
        stored = not KINDS[self.kind].shuffled and (self.order[1:] > self.order[:-1]).all()
        return len(self.order) if stored else 1

    @cached_property
    def image_roles(self) -> np.ndarray:
        """(images,) int8: IMAGE or ANNOTATION, for each picture of a sentence."""
        annotated = (self.order % self.channels > 0) & KINDS[self.kind].annotated
        return np.tile(np.where(annotated, ANNOTATION, IMAGE), self.shots).astype(np.int8)

    @cached_property
    def roles(self) -> torch.Tensor:
        """(length,) int8: what each token of a sentence is: SPECIAL, IMAGE or ANNOTATION."""
        body = self.image_roles.repeat(self.tokens)
        return torch.from_numpy(np.pad(body, int(self.specials), constant_values=SPECIAL))

    @cached_property
    def places(self) -> torch.Tensor:
        """(length,) int64: where in its picture each token of a sentence stands, -1 for SPECIAL."""
        body = np.tile(np.arange(self.tokens), self.images)
        return torch.from_numpy(np.pad(body, int(self.specials), constant_values=-1))

    def picks(
        self, plan: TaskPlan, count: int, rng: np.random.Generator, classes: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands in each of `count` sentences: `plan.draws` samples, each with its views in turn.

        classes: (samples,), for `category` alone.

        Returns:
            samples and views, (count, shots), and the order of a sample's pictures, (count or 1, pictures),
            all int64.
        """
        kind = KINDS[self.kind]
        if kind.grouped:
            assert classes is not None
            samples, views = drawn_by_class(plan, classes, self.per_class, self.shots, count, rng)
        else:
            samples, views = drawn_in_rounds(plan, self.shots, rng)
        order = self.order[None]
        if kind.shuffled:
            annotations = np.tile(np.arange(1, self.channels), (count, 1))
            order = np.pad(rng.permuted(annotations, axis=1), ((0, 0), (1, 0)))
        # a task with fewer samples than a sentence shows fills its one sentence by starting again
        shape = (count, self.shots)
        return np.resize(samples, shape), np.resize(views, shape), order


def find_forms(
    config: SentencesConfig, samples: Mapping[str, tuple[int, int]], tokens: int
) -> dict[str, Form]:
    """The form of every task's sentences.

    Args:
        config: kinds, shots.
        samples: (frames, pictures) of a sample, by task.
        tokens: of one picture.

    Raises:
        ValueError: a key for a task that does not exist; a kind that does not take the task's samples;
            shots that do not fill its classes; annotations to supervise where there are none.
    """
    for key in ("kinds", "shots"):
        for task in getattr(config, key):
            if task not in samples:
                raise ValueError(f"sentences.{key}.{task}: no such task; tasks: {', '.join(samples)}")
    forms = {}
    for task, (frames, pictures) in samples.items():
        channels = pictures // frames
        fitting = [n for n, k in KINDS.items() if frames in k.frames and channels in k.channels]
        natural = ("single", "sequence") if channels == 1 else ("pairs", "annotations", "interleaved")
        kind = config.kinds.get(task, next(name for name in natural if name in fitting))
        if kind not in fitting:
            raise ValueError(
                f"sentences.kinds.{task}: '{kind}' does not take samples of {frames} x {channels} pictures"
                f" (frames x image and annotations); choices: {', '.join(fitting)}"
            )
        usual = {"pairs": config.pairs, "annotations": config.pairs, "category": 16}.get(kind, 1)
        shots = config.shots.get(task, usual)
        if kind == "category" and shots % config.per_class:
            raise ValueError(
                f"sentences.per_class: {config.per_class} does not divide the {shots} shots of tasks.{task}"
            )
        form = Form(kind, frames, channels, shots, config.per_class, tokens, config.specials)
        if config.supervise == "annotations" and ANNOTATION not in form.image_roles:
            raise ValueError(
                f"sentences.supervise: 'annotations', but tasks.{task} has none in sentences of kind '{kind}'"
            )
        forms[task] = form
    return forms


def rounds_of(num_samples: int, rounds: int, shots: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Permutations of the samples; one after the other, cut into sentences, they repeat none in a sentence.

    With fewer samples than `shots` that is impossible, and they do repeat.
    """
    order: list[np.ndarray] = []
    for number in range(rounds):
        samples = rng.permutation(num_samples)
        if begun := number * num_samples % shots:  # samples of the sentence that the last round left open
            taken = np.isin(samples, order[-1][-begun:])
            samples = samples[np.argsort(taken, kind="stable")]
        order.append(samples)
    return order


def drawn_in_rounds(plan: TaskPlan, shots: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples and views of an epoch, (draws,) int64, in random order, each sample with its views in turn.

    In rounds over the samples, so that the `shots` neighbours that become one sentence are different samples:
    two views of one photograph in a sentence would teach copying.
    """
    offsets = rng.integers(plan.views, size=plan.samples)
    rounds = rounds_of(plan.samples, -(-plan.draws // plan.samples), shots, rng)
    samples = np.concatenate(rounds)[: plan.draws]
    return samples, (offsets[samples] + np.arange(plan.draws) // plan.samples) % plan.views


def drawn_by_class(
    plan: TaskPlan, classes: np.ndarray, per_class: int, shots: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Samples and views of `count` sentences, (count * shots,) int64, `per_class` of a class together.

    A sentence has different classes as long as there are enough, and different samples of each as long as
    the class has enough. classes: (samples,) integers.
    """
    members = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    groups = count * shots // per_class
    runs = rounds_of(len(members), -(-groups // len(members)), shots // per_class, rng)
    wanted = np.concatenate(runs)[:groups]
    samples = np.empty((groups, per_class), np.int64)
    for label, those in enumerate(members):
        here = np.flatnonzero(wanted == label)
        rounds = rounds_of(len(those), -(-len(here) * per_class // len(those)), per_class, rng)
        if rounds:
            samples[here] = those[np.concatenate(rounds)[: len(here) * per_class]].reshape(-1, per_class)
    return samples.reshape(-1), rng.integers(plan.views, size=samples.size)


def compose(grid: Grid, form: Form, picks: np.ndarray, ends: tuple[int, int] | None) -> np.ndarray:
    """Sentences of one task from what stands in them.

    picks: (sentences, images, 3) int64, the (sample, view, picture) of every picture. ends: ids of BOS, EOS.

    Returns:
        (sentences, form.length) int64.
    """
    codes = grid.gather(picks[..., 0], picks[..., 1], picks[..., 2])
    sentences, body = framed(len(picks), form.length, ends)
    body[:] = codes.reshape(len(picks), -1)
    return sentences


def framed(count: int, length: int, ends: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """(count, length) int64 sentences, and the part of them that codes are to be written to.

    That is what stands between `ends`, BOS and EOS; all of it, where there are none.
    """
    sentences = np.empty((count, length), np.int64)
    if ends is None:
        return sentences, sentences
    sentences[:, 0], sentences[:, -1] = ends
    return sentences, sentences[:, 1:-1]


def validation_picks(
    form: Form, num_samples: int, count: int, seed: int, task: int, classes: np.ndarray | None = None
) -> np.ndarray:
    """(count, images, 3) int64: (sample, view, picture) of the held-out sentences of the `task`-th task."""
    rng = np.random.default_rng([seed, task])
    draws = count * form.shots
    samples, views, pictures = form.picks(TaskPlan(num_samples, 1, draws, 1.0, 1.0, 1), count, rng, classes)
    picks = np.broadcast_arrays(samples[..., None], views[..., None], pictures[:, None])
    return np.stack(picks, axis=-1).reshape(count, form.images, 3)


def validation_sentences(
    store: TokenStore, forms: Mapping[str, Form], config: SentencesConfig, seed: int
) -> dict[str, torch.Tensor]:
    """The fixed held-out sentences, `{task: (config.validation, length) int64}`: real samples, view 0."""
    ends, sentences = config.ends(store.num_codes), {}
    for index, (task, grid) in enumerate(store.grids["validation"].items()):
        classes = store.classes["validation"].get(task)
        picks = validation_picks(forms[task], len(grid), config.validation, seed, index, classes)
        sentences[task] = torch.from_numpy(compose(grid, forms[task], picks, ends))
    return sentences
