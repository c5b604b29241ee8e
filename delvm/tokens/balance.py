"""Samples per task -> views (or repeats) per sample: pure arithmetic.

DeLVM (Guo et al., ICML 2024) balances the long tail of tasks by augmenting the tail instead of showing the
same samples again: more views of a tail sample, each encoded once and used like a sample of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

STRATEGIES = ("none", "resample", "augment")


@dataclass
class BalanceConfig:
    """How the tasks share the training sentences."""

    strategy: str = "augment"
    """`augment` (views), `resample` (the same samples again) or `none` (as the data come)."""
    shares: dict[str, float] = field(default_factory=dict)
    """Target share of the training tokens by task; tasks not named get 1. Only ratios count."""
    head_views: int = 1
    """Views (or repeats) of a sample of the head task, the one with the most samples for its share."""
    max_views: int = 32
    """Most views (or repeats) of one sample."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: '{self.strategy}' is unknown; choices: {', '.join(STRATEGIES)}")
        if self.head_views < 1:
            raise ValueError(f"head_views: {self.head_views} must be at least 1")
        if self.max_views < self.head_views:
            raise ValueError(f"max_views: {self.max_views} must be at least head_views ({self.head_views})")
        for task, share in self.shares.items():
            if not 0 < share < math.inf:
                raise ValueError(f"shares.{task}: {share} must be above 0 and finite")


@dataclass(frozen=True)
class TaskPlan:
    """What one task contributes to an epoch: `samples * views * repeats` pairs."""

    samples: int
    views: int
    repeats: int
    wanted: int
    """Views or repeats that the share asks for; more than `views * repeats` where `max_views` cut it."""

    @property
    def pairs(self) -> int:
        """Pairs an epoch."""
        return self.samples * self.views * self.repeats


def plan(samples: Mapping[str, int], config: BalanceConfig) -> dict[str, TaskPlan]:
    """Views and repeats that bring every task to its share; no task ever loses samples.

    The task with the most samples for its share (the head) has `head_views` and sets the scale. Every
    other task gets the whole number of views that comes nearest to its share, at most `max_views`.

    Args:
        samples: real training samples by task, each at least 1.
        config: strategy, target shares, cap.

    Raises:
        ValueError: an empty task, or a share for a task that does not exist.
    """
    for task, count in samples.items():
        if count < 1:
            raise ValueError(f"tasks.{task}: no training samples")
    for task in config.shares:
        if task not in samples:
            raise ValueError(f"balance.shares.{task}: no such task; tasks: {', '.join(samples)}")
    shares = {task: config.shares.get(task, 1.0) for task in samples}
    scale = max(count / shares[task] for task, count in samples.items())
    plans = {}
    for task, count in samples.items():
        wanted = max(1, round(config.head_views * scale * shares[task] / count))
        times = 1 if config.strategy == "none" else min(wanted, config.max_views)
        views, repeats = (times, 1) if config.strategy == "augment" else (1, times)
        plans[task] = TaskPlan(samples=count, views=views, repeats=repeats, wanted=wanted)
    return plans


def summary(plans: Mapping[str, TaskPlan], tokens_per_pair: int) -> dict[str, dict[str, int]]:
    """The plan in image tokens an epoch: `{task: {samples, views, repeats, tokens_before, tokens_after}}`."""
    return {
        task: {
            "samples": entry.samples,
            "views": entry.views,
            "repeats": entry.repeats,
            "tokens_before": entry.samples * tokens_per_pair,
            "tokens_after": entry.pairs * tokens_per_pair,
        }
        for task, entry in plans.items()
    }
