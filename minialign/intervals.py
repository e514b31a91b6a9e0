"""How sure can we be of a mean? An estimate, and its 95 % interval.

    bootstrap                 a mean over problems
    difference, gap_closed    two policies, or three, on the same problems
    over_seeds                a mean over training runs

Problems are what is resampled, never single answers: several answers to one problem
share its difficulty and say little about other problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# The 97.5 % quantile of Student's t with 1 to 9 degrees of freedom.
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


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
    Raises: ValueError for fewer than two problems or anything not finite.
    Source: Efron 1979, the percentile interval.
    """
    values = check_numbers("bootstrap: values", values, 1 if statistic is None else 2)
    N = len(values)
    if N < 2 or resamples < 1:
        raise ValueError(
            f"bootstrap: values of {N} problems and {resamples} resamples; at least 2 "
            "and 1 are needed"
        )
    # Measured from the first row, constant data are exact zeros and stay exact.
    centred = values - values[0]
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 100):  # memory: 100 x N numbers at a time
        rows = np.arange(min(100, resamples - start))[:, None]
        drawn = generator.integers(N, size=(len(rows), N)) + N * rows
        times = np.bincount(drawn.ravel(), minlength=N * len(rows)).reshape(-1, N)
        means.append(times @ centred / N)
    value, means = centred.mean(0) + values[0], np.concatenate(means) + values[0]
    if statistic is not None:
        value, means = statistic(value), statistic(means)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of a - b for two policies on the same problems, row by row.

    Resampled in pairs: what makes a problem hard for both cancels.

    Shapes: (N,), (N,). Raises: ValueError when they differ, and as `bootstrap`.
    """
    a, b = check_numbers("difference: a", a, 1), check_numbers("difference: b", b, 1)
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
    names = {"before": before, "after": after, "ceiling": ceiling}
    columns = [check_numbers(f"gap_closed: {name}", x, 1) for name, x in names.items()]
    if len({column.shape for column in columns}) > 1:
        sizes = {name: len(x) for name, x in zip(names, columns, strict=True)}
        raise ValueError(f"gap_closed: sizes differ: {sizes}")
    if columns[2].mean() <= columns[0].mean():
        raise ValueError("gap_closed: ceiling must be above before, on average")

    def share(means: np.ndarray) -> np.ndarray:
        low, now, high = np.moveaxis(means, -1, 0)
        way, none = high - low, np.full_like(low, np.nan)
        return np.divide(now - low, way, out=none, where=way > 0)

    return bootstrap(np.stack(columns, 1), statistic=share, seed=seed)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over training runs ± t s / √n, Student's 95 % interval.

    Three seeds give t = 4.30: wide, and rightly so.

    Raises: ValueError unless there are 2 to 10 finite values.
    """
    values = check_numbers("over_seeds: values", values, 1)
    n = len(values)
    if not 2 <= n <= 10:
        raise ValueError(f"over_seeds: values must be 2 to 10 numbers, got {n}")
    half = STUDENT_T[n - 2] * values.std(ddof=1) / n**0.5
    mean = values.mean()
    return Estimate(float(mean), float(mean - half), float(mean + half))


def check_numbers(name: str, x: np.ndarray, rank: int) -> np.ndarray:
    """x as an array of float64, which has `rank` dimensions, all filled and finite.

    Raises: ValueError naming the argument, and the first number that is not finite.
    """
    x = np.asarray(x, dtype=float)
    if x.ndim != rank or not x.size:
        raise ValueError(f"{name} must have {rank} filled dimensions, got {x.shape}")
    if not np.isfinite(x).all():
        first = np.argwhere(~np.isfinite(x))[0].tolist()
        raise ValueError(f"{name} must be finite, got {x[tuple(first)]} at {first}")
    return x
