import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.tokens.balance import STRATEGIES, BalanceConfig, TaskPlan, plan, summary

laws = settings(max_examples=50, deadline=None)
counts = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 100_000), min_size=1)
ratios = st.floats(0.01, 100.0)
QUICKSTART = {"segmentation": 850, "deraining": 100, "pose": 50}


@st.composite
def cases(draw):
    """Samples by task, and a configuration's shares, head_views and max_views."""
    samples = draw(counts)
    shares = draw(st.dictionaries(st.sampled_from(sorted(samples)), ratios))
    head_views = draw(st.integers(1, 5))
    return samples, {
        "shares": shares,
        "head_views": head_views,
        "max_views": draw(st.integers(head_views, 40)),
    }


def _free(config):
    return config | {"max_views": 10**9}


def _head(samples, shares):
    return max(samples, key=lambda task: samples[task] / shares.get(task, 1.0))


def test_the_quickstart_numbers():
    # 850 / 100 = 8.5 is a tie and goes to the even number
    plans = plan(QUICKSTART, BalanceConfig())
    assert {task: entry.views for task, entry in plans.items()} == {
        "segmentation": 1,
        "deraining": 8,
        "pose": 17,
    }
    assert {task: entry.pairs for task, entry in plans.items()} == {
        "segmentation": 850,
        "deraining": 800,
        "pose": 850,
    }
    assert all(entry.repeats == 1 for entry in plans.values())


def test_two_views_of_the_head_double_everything():
    plans = plan(QUICKSTART, BalanceConfig(head_views=2))
    assert {task: entry.views for task, entry in plans.items()} == {
        "segmentation": 2,
        "deraining": 17,
        "pose": 32,
    }
    assert plans["pose"].wanted == 34  # cut by max_views


def test_shares_of_three_to_one():
    plans = plan({"head": 600, "tail": 50}, BalanceConfig(shares={"head": 3.0}))
    assert plans["tail"] == TaskPlan(samples=50, views=4, repeats=1, wanted=4)  # 600 : 200
    plans = plan({"head": 600, "tail": 50}, BalanceConfig(shares={"tail": 2.0}))
    assert plans["tail"].views == 24  # 600 : 1200


def test_a_small_share_can_make_the_smaller_task_the_head():
    # 50 samples for a share of 0.05 stand for 1000 at a share of 1, more than 600
    plans = plan({"large": 600, "small": 50}, BalanceConfig(shares={"small": 0.05}))
    assert (plans["large"].views, plans["small"].views) == (2, 1)


@laws
@given(cases(), st.sampled_from(STRATEGIES))
def test_no_task_loses_samples(case, strategy):
    samples, config = case
    plans = plan(samples, BalanceConfig(strategy, **config))
    assert list(plans) == list(samples)
    for task, entry in plans.items():
        assert entry.samples == samples[task]
        assert entry.views >= 1
        assert entry.repeats >= 1
        assert entry.pairs >= samples[task]


@laws
@given(cases(), st.sampled_from(STRATEGIES))
def test_the_head_has_its_views(case, strategy):
    samples, config = case
    head = plan(samples, BalanceConfig(strategy, **config))[_head(samples, config["shares"])]
    views = config["head_views"]
    assert head.wanted == views
    assert (head.views, head.repeats) == {"none": (1, 1), "resample": (1, views), "augment": (views, 1)}[
        strategy
    ]


@laws
@given(cases())
def test_every_task_comes_nearest_to_its_share(case):
    samples, config = case
    shares = config["shares"]
    plans = plan(samples, BalanceConfig(**_free(config)))
    head = _head(samples, shares)
    for task, entry in plans.items():
        target = plans[head].pairs * shares.get(task, 1.0) / shares.get(head, 1.0)
        miss = abs(entry.pairs - target)
        for other in (entry.views - 1, entry.views + 1):
            if other >= 1:
                assert miss <= abs(other * entry.samples - target) + 1e-6 * target


@laws
@given(cases())
def test_the_cap_cuts_and_says_what_was_wanted(case):
    samples, config = case
    free = plan(samples, BalanceConfig(**_free(config)))
    for task, entry in plan(samples, BalanceConfig(**config)).items():
        assert entry.views == min(free[task].views, config["max_views"])
        assert entry.wanted == free[task].views


@laws
@given(cases())
def test_strategies_differ_only_in_what_is_shown_again(case):
    samples, config = case
    none, resample, augment = (plan(samples, BalanceConfig(name, **config)) for name in STRATEGIES)
    for task in samples:
        assert (none[task].views, none[task].repeats) == (1, 1)
        assert resample[task].views == 1
        assert augment[task].repeats == 1
        assert resample[task].pairs == augment[task].pairs
        assert none[task].wanted == resample[task].wanted == augment[task].wanted


@laws
@given(cases(), st.integers(-6, 6))
def test_only_the_ratios_of_the_shares_count(case, power):
    samples, config = case
    shares = {task: config["shares"].get(task, 1.0) for task in samples}
    # a power of two scales without rounding: equal, not nearly equal
    scaled = {task: share * 2.0**power for task, share in shares.items()}
    assert plan(samples, BalanceConfig(**config | {"shares": scaled})) == plan(
        samples, BalanceConfig(**config)
    )


@laws
@given(st.integers(1, 10_000), st.lists(st.integers(1, 10), min_size=1, max_size=4))
def test_whole_ratios_are_met_exactly(tail, multiples):
    samples = {str(i): tail * multiple for i, multiple in enumerate([*multiples, math.lcm(*multiples)])}
    pairs = {entry.pairs for entry in plan(samples, BalanceConfig(max_views=10**9)).values()}
    assert pairs == {tail * math.lcm(*multiples)}


def test_summary_counts_tokens():
    assert summary(plan(QUICKSTART, BalanceConfig("resample")), 128)["deraining"] == {
        "samples": 100,
        "views": 1,
        "repeats": 8,
        "tokens_before": 12_800,
        "tokens_after": 102_400,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "oversample"}, "strategy: 'oversample' is unknown; choices: none, resample, augment"),
        ({"head_views": 0}, "head_views: 0 must be at least 1"),
        ({"max_views": 0}, "max_views: 0 must be at least head_views (1)"),
        ({"head_views": 4, "max_views": 3}, "max_views: 3 must be at least head_views (4)"),
        ({"shares": {"pose": 0.0}}, "shares.pose: 0.0 must be above 0"),
        ({"shares": {"pose": -1.0}}, "shares.pose: -1.0 must be above 0"),
        ({"shares": {"pose": math.nan}}, "shares.pose: nan must be above 0"),
        ({"shares": {"pose": math.inf}}, "shares.pose: inf must be above 0"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        BalanceConfig(**values)


def test_an_empty_task():
    with pytest.raises(ValueError, match=r"^tasks\.pose: no training samples$"):
        plan({"edges": 3, "pose": 0}, BalanceConfig())


def test_a_share_for_no_task():
    with pytest.raises(ValueError, match=r"^balance\.shares\.pse: no such task; tasks: edges, pose$"):
        plan({"edges": 3, "pose": 2}, BalanceConfig(shares={"pse": 2.0}))
