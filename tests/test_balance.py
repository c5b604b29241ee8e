import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.tokens.balance import (
    STRATEGIES,
    BalanceConfig,
    TaskPlan,
    plan,
    shortfalls,
    summary,
    target_shares,
)

laws = settings(max_examples=50, deadline=None)
names = st.lists(st.sampled_from("abcde"), min_size=1, unique=True)
factors = st.floats(0.01, 100.0)
shares_of_one = st.floats(0.0, 1.0)
FREE = {"max_views": 10**9}
QUICKSTART = {"segmentation": 850, "deraining": 100, "pose": 50}
PAIRS = dict.fromkeys(QUICKSTART, 128)


@st.composite
def data(draw):
    """Samples, and image tokens of one sample, by task."""
    tasks = draw(names)
    samples = {task: draw(st.integers(1, 100_000)) for task in tasks}
    return samples, {task: draw(st.integers(1, 4096)) for task in tasks}


@st.composite
def cases(draw):
    """Samples, tokens and the keys of a configuration but for the strategy."""
    samples, tokens = draw(data())
    head_views = draw(st.integers(1, 5))
    return (samples, tokens), {
        "alpha": draw(shares_of_one),
        "floor": draw(shares_of_one) / len(samples),
        "shares": draw(st.dictionaries(st.sampled_from(sorted(samples)), factors)),
        "head_views": head_views,
        "max_views": draw(st.integers(head_views, 40)),
    }


def _pairs(samples, config):
    """The plan where a sample of every task is two pictures of 64 tokens."""
    return plan(samples, dict.fromkeys(samples, 128), config)


def _targets(totals, **config):
    """Target shares of tasks that have these tokens."""
    return target_shares(totals, dict.fromkeys(totals, 1), BalanceConfig(**config))


def _head(samples, tokens, config):
    targets = target_shares(samples, tokens, config)
    return max(samples, key=lambda task: samples[task] * tokens[task] / targets[task])


def _asked(samples, tokens, config):
    """Image tokens an epoch that would meet every target exactly, by task."""
    targets = target_shares(samples, tokens, config)
    head = _head(samples, tokens, config)
    scale = config.head_views * samples[head] * tokens[head] / targets[head]
    return {task: scale * target for task, target in targets.items()}


def test_the_quickstart_numbers():
    # 850 / 100 = 8.5 is a tie and goes to the even number
    plans = plan(QUICKSTART, PAIRS, BalanceConfig())
    third = pytest.approx(1 / 3)
    assert plans == {
        "segmentation": TaskPlan(850, views=1, draws=850, target=third, share=0.34, wanted=1),
        "deraining": TaskPlan(100, views=8, draws=800, target=third, share=0.32, wanted=8),
        "pose": TaskPlan(50, views=17, draws=850, target=third, share=0.34, wanted=17),
    }


def test_two_views_of_the_head_double_everything():
    plans = _pairs(QUICKSTART, BalanceConfig(head_views=2))
    assert {task: entry.views for task, entry in plans.items()} == {
        "segmentation": 2,
        "deraining": 17,
        "pose": 32,
    }
    assert plans["pose"].wanted == 34  # cut by max_views
    assert shortfalls(plans) == {"pose": (pytest.approx(1 / 3), 1600 / (1700 + 1700 + 1600))}


def test_factors_of_three_to_one():
    plans = _pairs({"head": 600, "tail": 50}, BalanceConfig(shares={"head": 3.0}))
    assert plans["tail"] == TaskPlan(50, views=4, draws=200, target=0.25, share=0.25, wanted=4)
    plans = _pairs({"head": 600, "tail": 50}, BalanceConfig(shares={"tail": 2.0}))
    assert plans["tail"].views == 24  # 600 : 1200


def test_a_small_factor_can_make_the_smaller_task_the_head():
    # 50 samples for a share of 0.05 stand for 1000 at a share of 1, more than 600
    plans = _pairs({"large": 600, "small": 50}, BalanceConfig(shares={"small": 0.05}))
    assert (plans["large"].views, plans["small"].views) == (2, 1)


def test_a_clip_of_sixteen_pictures_weighs_eight_pairs():
    samples, tokens = {"pairs": 110, "clips": 5}, {"pairs": 2, "clips": 16}
    # 220 tokens against 80, 2.75 times
    assert plan(samples, tokens, BalanceConfig())["clips"].views == 3
    assert plan(samples, tokens, BalanceConfig("mixture"))["clips"].draws == 14
    # by tokens the task with fewer samples is the head
    assert plan({"pairs": 10, "clips": 5}, tokens, BalanceConfig())["pairs"].views == 4


def test_a_mixture_draws_what_whole_repeats_cannot():
    plans = plan(QUICKSTART, PAIRS, BalanceConfig("mixture"))
    assert {task: (entry.views, entry.draws, entry.wanted) for task, entry in plans.items()} == {
        "segmentation": (1, 850, 1),
        "deraining": (1, 850, 9),  # 8.5 draws of a sample
        "pose": (1, 850, 17),
    }
    assert shortfalls(plans) == {}
    plans = plan(QUICKSTART, PAIRS, BalanceConfig("mixture", max_views=16))
    assert (plans["pose"].draws, plans["pose"].wanted) == (800, 17)
    assert shortfalls(plans) == {"pose": (pytest.approx(1 / 3), 0.32)}


def test_none_takes_the_data_as_they_come():
    config = BalanceConfig("none", alpha=0.5, floor=0.2, shares={"pose": 3.0}, head_views=12)
    plans = plan(QUICKSTART, PAIRS, config)
    assert {task: (e.views, e.draws, e.wanted, e.share) for task, e in plans.items()} == {
        "segmentation": (1, 850, 1, 0.85),
        "deraining": (1, 100, 1, 0.1),
        "pose": (1, 50, 1, 0.05),
    }
    assert all(entry.target == pytest.approx(entry.share) for entry in plans.values())
    assert shortfalls(plans) == {}


def test_targets_by_the_root_of_the_tokens():
    totals = {"head": 900, "tail": 100}
    assert _targets(totals, alpha=0.5) == {"head": 0.75, "tail": 0.25}  # 30 : 10
    assert _pairs(totals, BalanceConfig(alpha=0.5))["tail"].views == 3
    assert _targets(totals, alpha=0.5, shares={"tail": 3.0}) == {"head": 0.5, "tail": 0.5}


def test_a_floor_is_taken_from_the_others_in_proportion():
    totals = {"a": 600, "b": 300, "c": 100}
    assert _targets(totals, alpha=1.0, floor=0.25) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    # b has more than the floor at first, and less once c has it
    totals = {"a": 890, "b": 101, "c": 9}
    assert _targets(totals, alpha=1.0, floor=0.1) == pytest.approx({"a": 0.8, "b": 0.1, "c": 0.1})
    assert _targets(totals, alpha=1.0, floor=1 / 3) == pytest.approx(dict.fromkeys("abc", 1 / 3))


@laws
@given(cases())
def test_targets_sum_to_one_and_none_is_below_the_floor(case):
    (samples, tokens), config = case
    targets = target_shares(samples, tokens, BalanceConfig(**config))
    assert list(targets) == list(samples)
    assert math.fsum(targets.values()) == pytest.approx(1, abs=1e-12)
    assert min(targets.values()) >= config["floor"]


@laws
@given(cases())
def test_what_is_above_the_floor_keeps_its_proportions(case):
    (samples, tokens), config = case
    targets = target_shares(samples, tokens, BalanceConfig(**config))
    free = target_shares(samples, tokens, BalanceConfig(**config | {"floor": 0.0}))
    top = max(free, key=lambda task: free[task])
    for task, target in targets.items():
        assert target == pytest.approx(max(config["floor"], free[task] * targets[top] / free[top]))


@laws
@given(data())
def test_the_ends_of_alpha(case):
    samples, tokens = case
    totals = {task: samples[task] * tokens[task] for task in samples}
    total = sum(totals.values())
    equal = target_shares(samples, tokens, BalanceConfig(alpha=0.0))
    assert equal == dict.fromkeys(samples, 1 / len(samples))
    as_they_come = target_shares(samples, tokens, BalanceConfig(alpha=1.0))
    assert as_they_come == pytest.approx({task: totals[task] / total for task in samples})
    assert target_shares(samples, tokens, BalanceConfig("none")) == as_they_come


@laws
@given(cases(), shares_of_one)
def test_alpha_moves_the_targets_towards_the_larger_tasks(case, other):
    (samples, tokens), config = case
    low, high = sorted([config["alpha"], other])
    config |= {"floor": 0.0}
    less = target_shares(samples, tokens, BalanceConfig(**config | {"alpha": low}))
    more = target_shares(samples, tokens, BalanceConfig(**config | {"alpha": high}))
    order = sorted(samples, key=lambda task: samples[task] * tokens[task])
    for smaller, larger in pairwise(order):
        assert more[larger] / more[smaller] >= less[larger] / less[smaller] * (1 - 1e-9)


@laws
@given(data(), shares_of_one, shares_of_one)
def test_alpha_never_adds_views(case, one, other):
    low, high = (plan(*case, BalanceConfig(alpha=alpha, **FREE)) for alpha in sorted([one, other]))
    for task in low:
        assert high[task].views <= low[task].views


@laws
@given(cases(), st.sampled_from(STRATEGIES))
def test_no_task_loses_samples(case, strategy):
    (samples, tokens), config = case
    plans = plan(samples, tokens, BalanceConfig(strategy, **config))
    assert list(plans) == list(samples)
    for task, entry in plans.items():
        assert entry.samples == samples[task]
        assert samples[task] <= entry.draws <= samples[task] * config["max_views"]
    assert math.fsum(entry.share for entry in plans.values()) == pytest.approx(1)


@laws
@given(cases(), st.sampled_from(STRATEGIES))
def test_the_head_has_its_views(case, strategy):
    (samples, tokens), values = case
    config = BalanceConfig(strategy, **values)
    head = plan(samples, tokens, config)[_head(samples, tokens, config)]
    repeats = 1 if strategy == "none" else config.head_views
    assert head.wanted == repeats
    assert head.draws == head.samples * repeats
    assert head.views == (config.head_views if strategy == "augment" else 1)


@laws
@given(cases())
def test_every_task_comes_nearest_to_its_target(case):
    (samples, tokens), values = case
    config = BalanceConfig(**values | FREE)
    asked = _asked(samples, tokens, config)
    for task, entry in plan(samples, tokens, config).items():
        miss = abs(entry.draws * tokens[task] - asked[task])
        for other in (entry.views - 1, entry.views + 1):
            assert miss <= abs(other * samples[task] * tokens[task] - asked[task]) + 1e-6 * asked[task]


@laws
@given(cases(), st.sampled_from(["augment", "resample", "mixture"]))
def test_an_uncut_share_misses_its_target_by_rounding_alone(case, strategy):
    (samples, tokens), values = case
    config = BalanceConfig(strategy, **values | FREE)
    plans = plan(samples, tokens, config)
    # half a repeat, or half a draw, of every task but the head
    step = {task: tokens[task] * (1 if strategy == "mixture" else samples[task]) for task in samples}
    slack = sum(step.values()) - step[_head(samples, tokens, config)]
    total = sum(entry.draws * tokens[task] for task, entry in plans.items())
    for task, entry in plans.items():
        assert entry.share == entry.draws * tokens[task] / total
        assert abs(entry.share - entry.target) <= (step[task] + entry.target * slack) / 2 / total + 1e-9


@laws
@given(cases(), st.sampled_from(["augment", "resample", "mixture"]))
def test_the_cap_cuts_and_says_what_was_wanted(case, strategy):
    (samples, tokens), config = case
    free = plan(samples, tokens, BalanceConfig(strategy, **config | FREE))
    plans = plan(samples, tokens, BalanceConfig(strategy, **config))
    for task, entry in plans.items():
        assert entry.draws == min(free[task].draws, samples[task] * config["max_views"])
        assert entry.wanted == free[task].wanted
    assert shortfalls(free) == {}
    assert shortfalls(plans) == {
        task: (entry.target, entry.share) for task, entry in plans.items() if entry.draws < free[task].draws
    }


@laws
@given(cases())
def test_strategies_differ_only_in_what_is_shown_again(case):
    (samples, tokens), config = case
    none, resample, augment, mixture = (
        plan(samples, tokens, BalanceConfig(name, **config)) for name in STRATEGIES
    )
    for task in samples:
        assert none[task].views == resample[task].views == mixture[task].views == 1
        assert none[task].draws == samples[task]
        assert resample[task].draws == augment[task].draws == samples[task] * augment[task].views
        assert resample[task].wanted == augment[task].wanted
        assert resample[task].target == augment[task].target == mixture[task].target


@laws
@given(cases(), st.integers(-6, 6))
def test_only_the_ratios_of_the_factors_count(case, power):
    data, config = case
    factors = {task: config["shares"].get(task, 1.0) for task in data[0]}
    # a power of two scales without rounding: equal, not nearly equal
    scaled = {task: factor * 2.0**power for task, factor in factors.items()}
    assert plan(*data, BalanceConfig(**config | {"shares": scaled})) == plan(*data, BalanceConfig(**config))


@laws
@given(cases(), st.integers(1, 1000))
def test_more_of_all_data_leaves_the_views(case, times):
    (samples, tokens), values = case
    config = BalanceConfig(**values)
    plans = plan(samples, tokens, config)
    more = plan({task: count * times for task, count in samples.items()}, tokens, config)
    larger = plan(samples, {task: count * times for task, count in tokens.items()}, config)
    assert larger == plans
    for task, entry in plans.items():
        assert (more[task].views, more[task].wanted) == (entry.views, entry.wanted)
        assert (more[task].target, more[task].share) == (entry.target, entry.share)


@laws
@given(cases(), st.sampled_from(STRATEGIES))
def test_the_order_of_the_tasks_is_no_matter(case, strategy):
    (samples, tokens), values = case
    config = BalanceConfig(strategy, **values)
    turned = dict(reversed(samples.items()))
    assert plan(turned, tokens, config) == plan(samples, tokens, config)


@laws
@given(st.integers(1, 10_000), st.lists(st.integers(1, 10), min_size=1, max_size=4))
def test_whole_ratios_are_met_exactly(tail, multiples):
    samples = {str(i): tail * multiple for i, multiple in enumerate([*multiples, math.lcm(*multiples)])}
    draws = {entry.draws for entry in _pairs(samples, BalanceConfig(**FREE)).values()}
    assert draws == {tail * math.lcm(*multiples)}


def test_summary_counts_tokens():
    assert summary(plan(QUICKSTART, PAIRS, BalanceConfig("resample")), PAIRS)["deraining"] == {
        "samples": 100,
        "views": 1,
        "draws": 800,
        "tokens_before": 12_800,
        "tokens_after": 102_400,
        "target": pytest.approx(1 / 3),
        "share": 0.32,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"strategy": "oversample"},
            "strategy: 'oversample' is unknown; choices: none, resample, augment, mixture",
        ),
        ({"alpha": -0.1}, "alpha: -0.1 must be from 0 (equal) to 1 (as the data come)"),
        ({"alpha": 1.1}, "alpha: 1.1 must be from 0 (equal) to 1 (as the data come)"),
        ({"alpha": math.nan}, "alpha: nan must be from 0 (equal) to 1 (as the data come)"),
        ({"floor": -0.1}, "floor: -0.1 must be from 0 to 1 / tasks"),
        ({"floor": 1.1}, "floor: 1.1 must be from 0 to 1 / tasks"),
        ({"floor": math.nan}, "floor: nan must be from 0 to 1 / tasks"),
        ({"head_views": 0}, "head_views: 0 must be at least 1"),
        ({"max_views": 0}, "max_views: 0 must be at least head_views (1)"),
        ({"head_views": 4, "max_views": 3}, "max_views: 3 must be at least head_views (4)"),
        ({"shares": {"pose": 0.0}}, "shares.pose: 0.0 must be above 0 and finite"),
        ({"shares": {"pose": -1.0}}, "shares.pose: -1.0 must be above 0 and finite"),
        ({"shares": {"pose": math.nan}}, "shares.pose: nan must be above 0 and finite"),
        ({"shares": {"pose": math.inf}}, "shares.pose: inf must be above 0 and finite"),
        ({"shares": {"pose": 1e-320}}, "shares.pose: 1e-320 must be from 1e-06 to 1e+06"),
        ({"shares": {"pose": 1e7}}, "shares.pose: 10000000.0 must be from 1e-06 to 1e+06"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        BalanceConfig(**values)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"floor": 0.6}, "balance.floor: 0.6 must be at most 1 / tasks, 0.5 for 2"),
        ({"shares": {"pse": 2.0}}, "balance.shares.pse: no such task; tasks: edges, pose"),
    ],
)
def test_what_does_not_fit_the_tasks(strategy, values, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        _pairs({"edges": 3, "pose": 2}, BalanceConfig(strategy, **values))


def test_an_empty_task():
    with pytest.raises(ValueError, match=r"^tasks\.pose: no training samples$"):
        _pairs({"edges": 3, "pose": 0}, BalanceConfig())
