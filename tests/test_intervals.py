"""Intervals against brute force, theory, and what is known by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minialign.intervals import (
    STUDENT_T,
    Estimate,
    Verdict,
    bootstrap,
    difference,
    gap_closed,
    over_seeds,
    verdict,
)

NAN = float("nan")
COIN = np.array([[True, False], [False, False]])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# Over problems


def test_the_bootstrap_of_five_values_is_that_of_all_3125_resamples():
    values = [0.0, 0.0, 4.0, 4.0, 4.0]
    means = sorted(map(mean, itertools.product(values, repeat=5)))
    # The 2.5 % points lie well inside a step of this distribution: chance has no say.
    for low in (0.012, 0.025, 0.038):
        assert means[int(low * 3125)] == 0.8
        assert means[int((1 - low) * 3125)] == 4.0
    estimate = bootstrap(values)
    assert estimate.low == pytest.approx(0.8) and estimate.high == pytest.approx(4.0)
    assert estimate.value == pytest.approx(2.4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(0, 99))
def test_the_interval_holds_the_estimate(values, seed):
    estimate = bootstrap(values, resamples=500, seed=seed)
    assert estimate.value == pytest.approx(mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= estimate.low <= estimate.value + 1e-9
    assert estimate.value - 1e-9 <= estimate.high <= max(values) + 1e-9
    assert (
        len(set(values)) < 2
        or max(values) - min(values) < 1e-6
        or (estimate.low < estimate.high)
    )


@given(st.floats(-1e6, 1e6), st.integers(2, 50))
@example(0.1, 3)
def test_constant_data_have_an_interval_of_width_zero(value, N):
    estimate = bootstrap([value] * N, resamples=50)
    assert (estimate.low, estimate.value, estimate.high) == (value, value, value)


def test_a_seed_fixes_the_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    state = np.random.get_state()[1].tolist()
    bootstrap(values)
    assert np.random.get_state()[1].tolist() == state


def test_the_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).random(1000) < 0.3
    estimate = bootstrap(values)
    half = 1.96 * values.std() / 1000**0.5
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_95_percent_of_intervals_hold_the_truth_and_resampled_answers_fail():
    """Problems are the units: K answers to one problem are not K problems."""
    generator = np.random.default_rng(0)
    held, held_by_answers = 0, 0
    for _ in range(400):
        success = generator.beta(0.5, 0.5, size=100)  # mean 0.5
        correct = generator.random((100, 8)) < success[:, None]
        estimate = bootstrap(correct.mean(1), resamples=400)
        held += estimate.low <= 0.5 <= estimate.high
        estimate = bootstrap(correct.ravel(), resamples=400)
        held_by_answers += estimate.low <= 0.5 <= estimate.high
    assert 0.91 < held / 400 < 0.98
    assert held_by_answers / 400 < 0.75


def test_an_estimate_prints_with_its_interval():
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_the_difference_is_resampled_in_pairs():
    generator = np.random.default_rng(0)
    hard = generator.random(200)
    a, b = hard + 0.01 * generator.normal(size=200), hard
    paired = difference(a, b)
    assert paired.value == pytest.approx((a - b).mean())
    assert paired.high - paired.low < 0.1 * (bootstrap(a).high - bootstrap(a).low)
    assert difference(b, a).value == pytest.approx(-paired.value)
    shifted = difference(np.round(b, 3) + 1, np.round(b, 3))
    assert shifted.low == pytest.approx(1) and shifted.high == pytest.approx(1)


def test_the_table_of_t_holds_95_percent_between_plus_and_minus():
    for freedom, quantile in enumerate(STUDENT_T, start=1):
        t = np.linspace(-quantile, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale /= math.sqrt(freedom * math.pi)
        density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        area = (density[1:] + density[:-1]).sum() / 2 * (t[1] - t[0])
        assert area == pytest.approx(0.95, abs=1e-5)


def test_over_seeds_by_hand():
    estimate = over_seeds([1.0, 2.0, 3.0])  # s = 1, n = 3
    half = 4.3027 / math.sqrt(3)
    assert (estimate.value, estimate.low) == (2.0, pytest.approx(2 - half))
    assert estimate.high == pytest.approx(2 + half)
    assert over_seeds([0.5] * 10) == Estimate(0.5, 0.5, 0.5)
    pair = over_seeds([0.0, 1.0])
    assert pair.high - 0.5 == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2))


# The way to the ceiling


def test_the_gap_closed_is_the_ratio_of_the_means():
    before, after, ceiling = np.array([[0, 0.5, 0.1], [0.5, 1, 0.3], [1, 1, 0.7]])
    # means 0.2, 0.6, 0.9
    assert gap_closed(before, after, ceiling).value == pytest.approx(0.4 / 0.7)
    assert gap_closed(before, before, ceiling).value == 0
    assert gap_closed(before, ceiling, ceiling).value == pytest.approx(1)
    rng = np.random.default_rng(0)
    noise = rng.random((3, 200)) * 0.2
    found = gap_closed(noise[0], noise[1] + 0.4, noise[2] + 0.8)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "after, ceiling, message",
    [
        (np.zeros(3), np.ones(2), "sizes differ"),
        (np.ones(2), np.zeros(2), "ceiling must be above"),
    ],
)
def test_a_gap_that_is_none_is_refused(after, ceiling, message):
    with pytest.raises(ValueError, match=message):
        gap_closed(np.zeros(2), after, ceiling)


def test_resampled_sets_without_a_gap_say_nothing_of_it():
    """Twice the second problem: nowhere to go. Twice the first: 0. Both: -1."""
    found = gap_closed(np.array([0, 1]), np.zeros(2), np.ones(2))
    assert (found.value, found.low, found.high) == (-1, -1, 0)


# Verdicts. With three seeds the half width is 4.3027 s / √3 = 2.48417 s


def rows(*means, width=0.5):
    """A row a seed: two problems, as far above the seed's mean as below it."""
    return [[mean - width, mean + width] for mean in means]


@pytest.mark.parametrize(
    "means, printed",
    [
        # s = 0.1: ± 0.24842
        ([0.1, 0.2, 0.3], "+0.200 [-0.048, +0.448] over 3 seeds: undecided"),
        # s = 0.01: ± 0.02484
        ([0.19, 0.2, 0.21], "+0.200 [+0.175, +0.225] over 3 seeds: apart"),
        ([-0.21, -0.2, -0.19], "-0.200 [-0.225, -0.175] over 3 seeds: apart"),
        ([0.03, 0.04, 0.05], "+0.040 [+0.015, +0.065] over 3 seeds: apart"),
        ([0.01, 0.02, 0.03], "+0.020 [-0.005, +0.045] over 3 seeds: equal"),
        ([-0.02, -0.01, 0.0], "-0.010 [-0.035, +0.015] over 3 seeds: equal"),
        # s = 0.002: ± 0.00497
        (
            [0.028, 0.03, 0.032],
            "+0.030 [+0.025, +0.035] over 3 seeds: apart by less than 0.05",
        ),
        (
            [-0.032, -0.03, -0.028],
            "-0.030 [-0.035, -0.025] over 3 seeds: apart by less than 0.05",
        ),
        # two seeds: s / √2 is half their distance; 12.7062 x 0.05, and x 0.01
        ([0.1, 0.2], "+0.150 [-0.485, +0.785] over 2 seeds: undecided"),
        ([0.3, 0.32], "+0.310 [+0.183, +0.437] over 2 seeds: apart"),
        # four: s = √(0.0005 / 3) = 0.012910; 3.1824 s / 2 = 0.020542
        ([0.0, 0.01, 0.02, 0.03], "+0.015 [-0.006, +0.036] over 4 seeds: equal"),
    ],
)
def test_verdicts_by_hand(means, printed):
    found = verdict(rows(*means))
    assert str(found) == printed
    assert found.seeds == len(means) and printed.endswith(f": {found.word}")
    assert str(verdict(rows(*means, width=3.0))) == printed  # problems are averaged


def test_a_verdict_holds_the_interval_over_the_seeds():
    found = verdict(rows(0.1, 0.2, 0.3))
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert found.estimate.value == pytest.approx(0.2)
    assert found.estimate.low == pytest.approx(0.2 - half)
    assert found.estimate.high == pytest.approx(0.2 + half)


@pytest.mark.parametrize(
    "low, high, word",
    [
        (0.0, 0.2, "undecided"),  # an interval holds its ends: 0 is not excluded
        (-0.2, 0.0, "undecided"),
        (1e-9, 0.2, "apart"),
        (-0.2, -1e-9, "apart"),
        (0.0, 0.0, "equal"),
        (-0.01, 0.05, "undecided"),  # and "less than 0.05" is less
        (-0.05, 0.01, "undecided"),
        (-0.05 + 1e-9, 0.05 - 1e-9, "equal"),
        (0.01, 0.05, "apart"),
        (-0.05, -0.01, "apart"),
        (0.01, 0.05 - 1e-9, "apart by less than 0.05"),
        (0.05, 0.05, "apart"),
        (-1.0, 1.0, "undecided"),
        (-1.0, 0.01, "undecided"),
    ],
)
def test_on_a_bound_nothing_is_claimed(low, high, word):
    estimate = Estimate((low + high) / 2, low, high)
    assert Verdict(estimate, seeds=3).word == word
    inside = -0.05 < low and high < 0.05
    assert Verdict(estimate, seeds=1).word == ("equal" if inside else "undecided")


def test_seeds_that_touch_a_bound():
    assert verdict([[0.05], [0.05]]).estimate == Estimate(0.05, 0.05, 0.05)
    assert verdict([[0.05], [0.05]]).word == "apart"
    assert verdict([[0.0, 0.0]] * 3).word == "equal"


@pytest.mark.parametrize(
    "row, printed",
    [
        # the interval of these five is worked out above
        ([0, 0, 4, 4, 4], "+2.400 [+0.800, +4.000], one seed: undecided"),
        ([0.2] * 9, "+0.200 [+0.200, +0.200], one seed: undecided"),
        ([-0.2] * 9, "-0.200 [-0.200, -0.200], one seed: undecided"),
        ([0.02] * 9, "+0.020 [+0.020, +0.020], one seed: equal"),
        ([0.0] * 9, "+0.000 [+0.000, +0.000], one seed: equal"),
    ],
)
def test_one_seed_is_printed_as_one(row, printed):
    assert str(verdict([row])) == printed
    assert verdict([row]).seeds == 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.integers(0, 9))
@example([1.0] * 20, 0)
def test_one_seed_is_never_called_apart(row, seed):
    found = verdict([row], seed=seed)
    assert found.word in ("equal", "undecided")
    assert found.estimate == bootstrap(row, seed=seed)


def test_many_problems_do_not_stand_in_for_seeds():
    """Three runs that disagree, each very sure of itself."""
    row = np.zeros(300)
    runs = [row + 0.1, row + 0.2, row + 0.3]
    assert bootstrap(np.concatenate(runs)).low > 0.19
    assert verdict(runs).word == "undecided"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_equal_methods_are_called_apart_once_in_twenty(seeds):
    """Whatever the number of seeds: two of them are no easier to believe."""
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(2000):
        luck = generator.normal(size=(seeds, 1))  # of the run
        noise = generator.normal(size=(seeds, 5))  # of the problem
        called += verdict(luck + noise).word == "apart"
    assert 0.035 < called / 2000 < 0.065


# What is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bootstrap([1.0]), "1 problems"),
        (lambda: bootstrap([]), "1 filled dimensions"),
        (lambda: bootstrap([0.5, NAN]), "nan"),
        (lambda: bootstrap(COIN), "1 filled dimensions"),
        (lambda: bootstrap([0.0, 1.0], resamples=0), "0 resamples"),
        (lambda: difference([1.0, 2.0], [1.0]), "a has 2 problems, b has 1"),
        (lambda: difference([[1.0], [2.0]], [1.0, 2.0]), "1 filled dimensions"),
        (lambda: over_seeds([0.5]), "got 1"),
        (lambda: over_seeds([0.5] * 11), "got 11"),
        (lambda: over_seeds([0.5, math.inf]), "inf"),
        (lambda: verdict([0.1, 0.2, 0.3]), "differences must have 2 filled dim"),
        (lambda: verdict([]), "differences must have 2 filled dimensions"),
        (lambda: verdict([[0.5, NAN]] * 3), r"differences must be finite.*\[0, 1\]"),
        (lambda: verdict([[0.5]]), "1 seeds on 1 problems; .* at least 2 problems"),
        (lambda: verdict([[0.5, 0.5]] * 11), "11 seeds on 2 problems; at most 10"),
    ],
)
def test_refused_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: verdict([[0.1, 0.2], [0.1]]),
        lambda: verdict("words"),
        lambda: bootstrap([object()]),
        lambda: over_seeds(["a", "b"]),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(call):
    with pytest.raises(TypeError, match=": (differences|values) must be numbers"):
        call()
