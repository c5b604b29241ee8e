"""Samples and tokens per task -> views and draws per task: pure arithmetic.

DeLVM (Guo et al., ICML 2024) balances the long tail of tasks by augmenting the tail instead of showing the
same samples again: more views of a tail sample, each encoded once and used like a sample of its own.

What is balanced are image tokens. A task's target share goes by `tokens ** alpha`, as in multilingual models
(Arivazhagan et al. 2019, alpha = 1 / temperature). The head, the task with the most tokens for its target,
sets the scale, and the others are brought up to it: no task ever loses samples.

Strategies differ in how many draws make an epoch. They still compare fairly: the length of a training is
counted in sentences (steps x batch size), never in epochs, so every strategy is given the same number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

STRATEGIES = ("none", "resample", "augment", "mixture")
SMALLEST, LARGEST = 1e-6, 1e6  # of a factor in `shares`: far beyond any use, far within a float


@dataclass
class BalanceConfig:
    """How the tasks share the training sentences."""

    strategy: str = "augment"
    """`augment` (views), `resample` (the same samples again, every one as often), `mixture` (the same samples
    again, drawn in the target's proportions) or `none` (as the data come; ignores every key but `online`,
    head_views too, so that a recipe is switched off with this one)."""
    alpha: float = 0.0
    """Target shares go by tokens ** alpha: from 0 (equal) to 1 (as the data come); 1/T of a temperature T."""
    floor: float = 0.0
    """Least target share of any task, 0 to 1 / tasks, taken from the others in proportion."""
    shares: dict[str, float] = field(default_factory=dict)
    """Factor on a task's target share, before the floor; tasks not named get 1. Only ratios count."""
    head_views: int = 1
    """Views (or repeats) of a sample of the head task, the one with the most tokens for its target share."""
    max_views: int = 32
    """Most views (or repeats, on average in a mixture) of one sample."""
    online: bool = False
    """Every time a sample is drawn, a new view of it, encoded while the model trains; none is stored."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: '{self.strategy}' is unknown; choices: {', '.join(STRATEGIES)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} must be from 0 (equal) to 1 (as the data come)")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: {self.floor} must be from 0 to 1 / tasks")
        if self.head_views < 1:
            raise ValueError(f"head_views: {self.head_views} must be at least 1")
        if self.max_views < self.head_views:
            raise ValueError(f"max_views: {self.max_views} must be at least head_views ({self.head_views})")
        for task, factor in self.shares.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"shares.{task}: {factor} must be above 0 and finite")
            if not SMALLEST <= factor <= LARGEST:
                raise ValueError(f"shares.{task}: {factor} must be from {SMALLEST:g} to {LARGEST:g}")


@dataclass(frozen=True)
class TaskPlan:
    """What one task contributes to an epoch."""

    samples: int
    """Real training samples."""
    views: int
    """Stored views of a sample, the sample itself included."""
    draws: int
    """Samples, of any view, that an epoch shows; at least `samples`."""
    target: float
    """Share of the image tokens that was asked for, 0 to 1."""
    share: float
    """Share of the image tokens that the plan gives, 0 to 1."""
    wanted: int
    """Views (or repeats, rounded up) that the target asks for; more than given where `max_views` cut it."""


def target_shares(
    samples: Mapping[str, int], tokens: Mapping[str, int], config: BalanceConfig
) -> dict[str, float]:
    """Share of the image tokens that every task is to have, `{task: 0..1}`; they sum to 1.

    Args:
        samples: real training samples by task, each at least 1.
        tokens: image tokens of one sample by task: of two pictures for a pair, of every frame for a clip.
        config: alpha, factors and floor; strategy `none` asks for what the data have.

    Raises:
        ValueError: an empty task, a factor for a task that does not exist, a floor above an equal share.
    """
    assert samples
    for task, count in samples.items():
        if count < 1:
            raise ValueError(f"tasks.{task}: no training samples")
    for task in config.shares:
        if task not in samples:
            raise ValueError(f"balance.shares.{task}: no such task; tasks: {', '.join(samples)}")
    if config.floor > 1 / len(samples):
        most = f"{1 / len(samples):.4g} for {len(samples)}"
        raise ValueError(f"balance.floor: {config.floor} must be at most 1 / tasks, {most}")
    if config.strategy == "none":
        config = BalanceConfig(alpha=1.0)
    totals = {task: count * tokens[task] for task, count in samples.items()}
    largest = max(totals.values())
    weights = {
        task: config.shares.get(task, 1.0) * (total / largest) ** config.alpha
        for task, total in totals.items()
    }
    raised: set[str] = set()
    while True:  # the floor of one task can push the next below it: at most once a task
        rest = math.fsum(weight for task, weight in weights.items() if task not in raised)
        left = 1 - config.floor * len(raised)
        targets = {
            task: config.floor if task in raised else left * weight / rest for task, weight in weights.items()
        }
        below = {task for task, target in targets.items() if target < config.floor}
        if not below:
            return targets
        raised |= below


def plan(samples: Mapping[str, int], tokens: Mapping[str, int], config: BalanceConfig) -> dict[str, TaskPlan]:
    """Views and draws that bring every task to its target share; no task ever loses samples.

    The head has `head_views` (repeats under `resample`, `samples * head_views` draws under `mixture`). Every
    other task gets, under `augment` and `resample`, the whole number of views or repeats that comes nearest
    to its target; under `mixture`, the nearest whole number of draws. No task gets more than
    `samples * max_views` draws. `none` draws every sample once.

    Args and errors: those of `target_shares`.
    """
    targets = target_shares(samples, tokens, config)
    totals = {task: count * tokens[task] for task, count in samples.items()}
    head = max(samples, key=lambda task: totals[task] / targets[task])
    asked: dict[str, int] = {}
    for task, count in samples.items():
        # whole numbers first, for which equal targets leave the exact quotient: 8.5 stays a tie
        times = config.head_views * totals[head] / totals[task] * (targets[task] / targets[head])
        match config.strategy:
            case "none":
                asked[task] = count
            case "mixture":
                asked[task] = round(count * times)
            case _:
                asked[task] = count * round(times)
    draws = {task: min(asked[task], count * config.max_views) for task, count in samples.items()}
    total = sum(draws[task] * tokens[task] for task in samples)
    return {
        task: TaskPlan(
            samples=count,
            views=draws[task] // count if config.strategy == "augment" else 1,
            draws=draws[task],
            target=targets[task],
            share=draws[task] * tokens[task] / total,
            wanted=math.ceil(asked[task] / count),
        )
        for task, count in samples.items()
    }


def shortfalls(plans: Mapping[str, TaskPlan]) -> dict[str, tuple[float, float]]:
    """The tasks that `max_views` cut: `{task: (target, share)}`, the share asked for and the share given."""
    return {
        task: (entry.target, entry.share)
        for task, entry in plans.items()
        if entry.wanted > math.ceil(entry.draws / entry.samples)
    }


def summary(plans: Mapping[str, TaskPlan], tokens: Mapping[str, int]) -> dict[str, dict[str, int | float]]:
    """The plan in image tokens an epoch, before and after, given the tokens of one sample by task.

    `{task: {samples, views, draws, tokens_before, tokens_after, target, share}}`.
    """
    return {
        task: {
            "samples": entry.samples,
            "views": entry.views,
            "draws": entry.draws,
            "tokens_before": entry.samples * tokens[task],
            "tokens_after": entry.draws * tokens[task],
            "target": entry.target,
            "share": entry.share,
        }
        for task, entry in plans.items()
    }
