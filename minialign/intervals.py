"""How sure can we be of a mean? An estimate, its 95 % interval, and what may be said.

    bootstrap                 a mean over problems
    difference, gap_closed    two policies, or three, on the same problems
    over_seeds                a mean over training runs
    verdict                   are two policies apart, equal, or is it undecided?

Problems are what is resampled, never single answers: several answers to one problem
share its difficulty and say little about other problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# The 97.5 % quantile of Student's t with 1 to 9 degrees of freedom.
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
MARGIN = 0.05  # of accuracy: a smaller difference changes no reader's choice


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: np.ndarray,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean over problems, and the middle 95 % of the means of resampled problem sets.

    `statistic` maps means of columns (..., M) to (...), for what is no mean itself; nan
    where it has no value, and such resamples are left out.
    Equal values give width zero, which is too sure: after N successes out of N, the
    truth may still be as low as about 1 - 3 / N.

    Shapes: values (N,), or (N, M) with a statistic. Units: of values.
    Raises: ValueError for fewer than two problems, and as `check_numbers`.
    Source: Efron 1979, the percentile interval.
    """
    rank = 1 if statistic is None else 2
    values = check_numbers("bootstrap: values", values, rank)
    N = len(values)
    if N < 2 or resamples < 1:
        raise ValueError(
            f"bootstrap: values of {N} problems and {resamples} resamples; at least 2 "
            "and 1 are needed"
        )
    # Measured from the first row, constant data are exact zeros and stay exact.
    centred = values - values[0]
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 100):  # memory: 100 x N numbers at a time
        count = min(100, resamples - start)
        row = np.arange(count)[:, None]  # (count, 1)
        # Resample r draws among r N to r N + N - 1: one count serves all of them.
        drawn = generator.integers(N, size=(count, N)) + N * row
        times = np.bincount(drawn.ravel(), minlength=N * count).reshape(-1, N)
        parts.append(times @ centred / N)
    value = centred.mean(0) + values[0]
    means = np.concatenate(parts) + values[0]  # (resamples,) or (resamples, M)
    if statistic is not None:
        value = statistic(value)
        means = statistic(means)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of a - b for two policies on the same problems, row by row.

    Resampled in pairs: what makes a problem hard for both cancels.

    Shapes: (N,), (N,). Raises: ValueError when they differ, and as `bootstrap`.
    """
    a = check_numbers("difference: a", a, 1)
    b = check_numbers("difference: b", b, 1)
    if a.shape != b.shape:
        raise ValueError(f"difference: a has {len(a)} problems, b has {len(b)}")
    return bootstrap(a - b, seed=seed)


def gap_closed(
    before: np.ndarray, after: np.ndarray, ceiling: np.ndarray, *, seed: int = 0
) -> Estimate:
    """Which share of the way from `before` to `ceiling` was gone: 1 is all of it.

    (mean after - mean before) / (mean ceiling - mean before), the three resampled
    together, problem by problem. Resampled sets without a gap are left out.

    Shapes: (N,) each, accuracies on the same problems.
    Raises: ValueError when shapes differ or there is no gap, and as `bootstrap`.
    """
    before = check_numbers("gap_closed: before", before, 1)
    after = check_numbers("gap_closed: after", after, 1)
    ceiling = check_numbers("gap_closed: ceiling", ceiling, 1)
    if not len(before) == len(after) == len(ceiling):
        raise ValueError(
            f"gap_closed: sizes differ: before {len(before)}, after {len(after)}, "
            f"ceiling {len(ceiling)}"
        )
    if ceiling.mean() <= before.mean():
        raise ValueError("gap_closed: ceiling must be above before, on average")

    def share(means: np.ndarray) -> np.ndarray:
        low = means[..., 0]
        now = means[..., 1]
        high = means[..., 2]
        way = high - low
        nowhere = np.full_like(low, np.nan)
        return np.divide(now - low, way, out=nowhere, where=way > 0)

    columns = np.stack([before, after, ceiling], axis=1)  # (N, 3)
    return bootstrap(columns, statistic=share, seed=seed)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over training runs ± t s / √n, Student's 95 % interval.

    Three seeds give t = 4.30: wide, and rightly so.

    Raises: ValueError unless there are 2 to 10 values, and as `check_numbers`.
    """
    values = check_numbers("over_seeds: values", values, 1)
    n = len(values)
    if not 2 <= n <= 10:
        raise ValueError(f"over_seeds: values must be 2 to 10 numbers, got {n}")
    half = STUDENT_T[n - 2] * values.std(ddof=1) / n**0.5
    mean = values.mean()
    return Estimate(float(mean), float(mean - half), float(mean + half))


@dataclass(frozen=True)
class Verdict:
    """A difference between two policies, and the word that may be said of it.

    An interval holds its own ends. One that touches 0 does not exclude it, and one that
    touches MARGIN does not lie inside: on a bound, nothing is claimed.
    """

    estimate: Estimate
    seeds: int  # training runs; with one, the interval is over problems

    @property
    def word(self) -> str:
        """One of: apart, equal, apart by less than 0.05, undecided."""
        low = self.estimate.low
        high = self.estimate.high
        excludes_zero = low > 0 or high < 0
        apart = excludes_zero and self.seeds > 1
        equal = low > -MARGIN and high < MARGIN
        if apart and equal:
            return f"apart by less than {MARGIN}"
        if apart:
            return "apart"
        if equal:
            return "equal"
        return "undecided"

    def __str__(self) -> str:
        value = self.estimate.value
        low = self.estimate.low
        high = self.estimate.high
        runs = ", one seed" if self.seeds == 1 else f" over {self.seeds} seeds"
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{runs}: {self.word}"


def verdict(differences: Sequence[np.ndarray], *, seed: int = 0) -> Verdict:
    """Is one policy better than another, are they equal, or can it not be said?

        apart                      the interval excludes 0
        equal                      it lies inside ±0.05
        apart by less than 0.05    both
        undecided                  neither

    The unit is the difference on one problem, averaged within a seed. With several
    seeds the interval is Student's, over their means: what other training runs would
    give on these problems. One seed is bootstrapped over problems, which says how these
    two policies differ and nothing of two others: it is never called apart.

    Two seeds are not refused, for lessons print what they have while seeds come in. Nor
    are they believed too easily: t is 12.7 then, so that their means must lie six times
    closer to each other than to 0.

    Shapes: differences (seeds, N), the same problems for all. Units: of accuracy.
    Raises: ValueError for more than 10 seeds, and for one seed of fewer than two
        problems; and as `check_numbers`, which refuses rows of several lengths.
    Source: Student 1908; for *equal* Schuirmann 1987, two one-sided tests of 2.5 %.
    """
    differences = check_numbers("verdict: differences", differences, 2)
    seeds, N = differences.shape
    most = len(STUDENT_T) + 1
    if seeds > most or (seeds == 1 and N < 2):
        raise ValueError(
            f"verdict: differences of {seeds} seeds on {N} problems; at most {most} "
            "seeds, and at least 2 problems for a single seed, are allowed"
        )
    if seeds == 1:
        return Verdict(bootstrap(differences[0], seed=seed), seeds)
    return Verdict(over_seeds(differences.mean(1)), seeds)


def check_numbers(name: str, x: np.ndarray | Sequence, rank: int) -> np.ndarray:
    """x as an array of float64 with `rank` dimensions, none of them empty, all finite.

    Raises: TypeError for what is no array of numbers; ValueError for another rank, an
        empty array, or naming the first number that is not finite.
    """
    try:
        x = np.asarray(x, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be numbers, in rows of one length: {error}"
        ) from None
    if x.ndim != rank or not x.size:
        raise ValueError(f"{name} must have {rank} filled dimensions, got {x.shape}")
    if not np.isfinite(x).all():
        first = np.argwhere(~np.isfinite(x))[0].tolist()
        raise ValueError(f"{name} must be finite, got {x[tuple(first)]} at {first}")
    return x
