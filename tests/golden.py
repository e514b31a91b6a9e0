"""Golden vectors: every loss, advantage, KL and selection once more, in plain Python.

Nothing here knows torch, numpy or minialign. Each function is written from its equation
with lists and loops, on `Number`s: 60 decimal digits, and the slope in every input. So
what it expects is right to the last bit of a float64, and the same on every machine,
which `math.exp` is not.

    python -m tests.golden    # writes data/golden/*.json; README.md there explains them

`@vectors` names the function of the library that is meant, how its cases are drawn, and
the arguments `by` which it is differentiated: no other has a gradient. The docstring is
the equation, and goes into the file. "Live" is a slot where mask is true; null is None.
"""

import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden"
PRECISION = Context(prec=60)  # digits: k3 of d = 1e-9 cancels 18 of them
JUNK = (1000.0, -1000.0, 12345.0)  # what lies in masked slots: JSON has no nan
UPSTREAM = (1.0, -0.5, 2.0, 0.25, -1.5)  # unequal weights, if the output is no scalar


# Statistics: of lists, for people.
STATISTICS = ("intervals.", "evaluation.", "rejection_sampling.best_of_n")
# A function that changes its room keeps its cases: they are drawn by its first name.
FIRST_NAMES = {
    "intervals.difference": "evaluation.difference",
    "intervals.gap_closed": "evaluation.gap_closed",
    "intervals.over_seeds": "evaluation.over_seeds",
    "rrhf.mean_logprobs": "rrhf.scores",
    "rrhf.summed_logprobs": "rrhf.summed_scores",
}

# Numbers that know their slopes


class Number:
    """A value, and its slope in every input: the chain rule, written forwards."""

    def __init__(self, value, slopes=None):
        self.value, self.slopes = Decimal(value), slopes or {}

    def __add__(self, other):
        other = number(other)
        return chain(self.value + other.value, (self, 1), (other, 1))

    def __mul__(self, other):
        other = number(other)
        product = self.value * other.value
        return chain(product, (self, other.value), (other, self.value))

    def __truediv__(self, other):
        other = number(other)
        ratio = self.value / other.value
        return chain(ratio, (self, 1 / other.value), (other, -ratio / other.value))

    def __pow__(self, times: int):
        power = ONE
        for _ in range(times):
            power = power * self
        return power

    def __neg__(self):
        return chain(-self.value, (self, -1))

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return number(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other):
        return self.value < number(other).value

    def __gt__(self, other):
        return self.value > number(other).value


def number(x) -> Number:
    return x if isinstance(x, Number) else Number(x)


def chain(value, *parts) -> Number:
    """A new value that moves with each (number, slope in that number)."""
    slopes = {}
    for part, by in parts:
        for leaf, slope in part.slopes.items():
            slopes[leaf] = slopes.get(leaf, 0) + by * slope
    return Number(value, slopes)


def exp(x: Number) -> Number:
    value = x.value.exp()
    return chain(value, (x, value))


def log(x: Number) -> Number:
    return chain(x.value.ln(), (x, 1 / x.value))


def sqrt(x: Number) -> Number:
    root = x.value.sqrt()
    return chain(root, (x, 1 / (2 * root) if root else Decimal(0)))


ZERO, ONE = Number(0), Number(1)

# The kinks. Where the slope is a matter of choice, this is the choice.


def larger(a: Number, b: Number) -> Number:
    """max(a, b); of equals, half the slope of each."""
    return a if b < a else b if a < b else (a + b) / 2


def smaller(a: Number, b: Number) -> Number:
    """min(a, b); of equals, half the slope of each."""
    return -larger(-a, -b)


def clamp(x: Number, low: Number, high: Number) -> Number:
    """Slope 1 inside and *on* the border, 0 outside."""
    if x < low:
        return low
    return min(x, high)


def hinge(x: Number) -> Number:
    """max(0, x); at 0 the slope is 0."""
    return x if x > 0 else ZERO


# Lists


def along(*rows):
    return zip(*rows, strict=True)


def slots(f, mask, *arrays, empty=ZERO):
    """f at live slots, `empty` at masked ones: (B, S)."""
    return [
        [f(*xs) if on else empty for on, *xs in along(*rows)]
        for rows in along(mask, *arrays)
    ]


def alive(x, mask):
    """The live values of each row."""
    return [[v for v, on in along(*rows) if on] for rows in along(x, mask)]


def where(mask):
    return [(b, s) for b, row in enumerate(mask) for s, on in enumerate(row) if on]


def answers(mask) -> int:
    """Rows with a live slot."""
    return sum(map(any, mask))


def flat(rows):
    return [x for row in rows for x in row]


def total(xs) -> Number:
    return sum(xs, ZERO)


def mean(xs) -> Number:
    return total(xs) / len(xs)


def variance(xs, less: int = 0) -> Number:
    centre = mean(xs)
    return total((x - centre) ** 2 for x in xs) / (len(xs) - less)


def alike(xs) -> bool:
    return not min(xs) < max(xs)


# The register, and how cases are drawn


class Vectors(NamedTuple):
    equation: str
    oracle: Callable
    draw: Callable  # Random -> [(note, inputs)]
    by: list[str]


VECTORS: dict[str, Vectors] = {}


def vectors(name: str, draw: Callable, by: str = ""):
    """Register what follows as the oracle of module.function."""

    def register(oracle):
        if oracle.__name__ in globals():
            raise NameError(f"{name}: there is a {oracle.__name__} here already")
        equation = " ".join(oracle.__doc__.split())
        VECTORS[name] = Vectors(equation, oracle, draw, by.split())
        return oracle

    return register


def always(*cases):
    """These cases: nothing is drawn."""
    return lambda dice: list(cases)


NOTHING = always()


def table(names: str, *rows):
    """Cases written out: a note, then the arguments in this order."""
    return always(*((row[0], dict(along(names.split(), row[1:]))) for row in rows))


# x: live, .: masked; a word is a row of S = T - 1 slots.
LAYOUTS = {
    "T = 2, one choice": "x",
    "one row, all live": "xxxx",
    "one row, one live token": "..x.",
    "prompts, answers, padding": ".xxx.. ...xxx ..x...",
    "an all-masked row": "xx.. .... .xxx",
    "one live token in the batch": "... .x. ...",
    "holes in the mask": "x.x.x .xx.x",
    "equal lengths": "xx xx xx",
    "lengths 1 to 4": "x... xx.. xxx. xxxx",
    "one token beside a long answer": "x..... xxxxxx",
    "first and last slot": "x...x",
    "one token each": ".x x.",
}
ODD = {
    "extreme numbers": ".xxx xxxx xx..",
    "everything equal": "xxx. ..xx",
    "differences of 1e-9": ".xxx xx..",
}


def grid(layout: str) -> list[list[bool]]:
    return [[letter == "x" for letter in row] for row in layout.split()]


def draw_nats(dice, odd: str, first: float | None = None) -> float:
    """A log-probability, not too far from the slot's first."""
    if odd == "extreme numbers":
        return dice.choice((0.0, -1e-9, -0.5, -30.0, -79.0))
    if odd == "everything equal":
        return -0.7
    if first is None:
        return round(dice.uniform(-5, 0), 3) + 0.0  # no -0.0
    if odd:
        return first - 1e-9 * dice.randint(0, 3)
    return min(round(first + dice.uniform(-0.7, 0.7), 3), 0.0)


def draw_signed(dice, odd: str) -> float:
    if odd == "extreme numbers":
        return dice.choice((-100.0, -1e-9, 0.0, 0.5, 100.0))
    if odd == "everything equal":
        return 0.5
    return 0.25 + 1e-9 * dice.randint(0, 3) if odd else round(dice.uniform(-2, 2), 3)


def draw_share(dice, odd: str) -> float:
    if odd == "extreme numbers":
        return dice.choice((0.0, 1e-9, 0.5, 100.0))
    return 0.25 if odd else round(dice.uniform(0, 0.5), 3) + 0.0


def draw_row(dice, odd: str) -> float:
    if odd == "extreme numbers":
        return dice.choice((-100.0, 1e-9, 100.0))
    return 0.0 if odd == "everything equal" else dice.choice((-1.0, 0.0, 0.1, 0.5, 1.0))


@dataclass(frozen=True)
class Batches:
    """(B, S) arguments: all layouts, then odd numbers, then what is `extra`.

    What it says of a function, tests/entries.py reads too. Options take turns.
    """

    nats: str = ""  # names of the (B, S) arguments that are log-probabilities
    signed: str = ""  # names of those that are any numbers
    shares: str = ""  # names of those that are 0 or more
    rows: str = ""  # names of the (B,) arguments: one number a row
    options: Sequence[dict] = ({},)
    dead: bool = True  # False: every row has a live slot
    odd: Iterable[str] = tuple(ODD)
    extra: Callable = NOTHING

    def layouts(self) -> list[tuple[str, str, str]]:
        """(note, layout, which odd numbers) of every case."""
        found = [(note, layout, "") for note, layout in LAYOUTS.items()]
        if self.nats or self.signed:
            found += [(note, ODD[note], note) for note in self.odd]
        if not self.dead:
            found = [each for each in found if all(map(any, grid(each[1])))]
        return found

    def __call__(self, dice):
        cases = []
        nats, signed = self.nats.split(), self.signed.split()
        shares = self.shares.split()
        for i, (note, layout, regime) in enumerate(self.layouts()):
            mask, first = grid(layout), {}
            inputs = {"mask": mask} | self.options[i % len(self.options)]
            for name in nats + signed + shares:
                filled = [[dice.choice(JUNK) for _ in row] for row in mask]
                for b, s in where(mask):
                    if name in signed:
                        filled[b][s] = draw_signed(dice, regime)
                    elif name in shares:
                        filled[b][s] = draw_share(dice, regime)
                    else:
                        filled[b][s] = draw_nats(dice, regime, first.get((b, s)))
                        first.setdefault((b, s), filled[b][s])
                inputs[name] = filled
            for name in self.rows.split():
                inputs[name] = [
                    draw_row(dice, regime) if any(row) else dice.choice(JUNK)
                    for row in mask
                ]
            cases.append((note, inputs))
        return cases + self.extra(dice)


GROUPS = {
    "K = 2": [[1.0, 0.0]],
    "K = 2, a tie": [[0.5, 0.5]],
    "one right of four": [[1.0, 0.0, 0.0, 0.0]],
    "two right of four": [[1.0, 0.0, 0.0, 1.0]],
    "seven times 0.1: exactly 0": [[0.1] * 7],
    "all right beside all wrong": [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
    "all equal beside unequal": [[0.3, 0.3, 0.3], [1.0, 0.0, 0.3]],
    "below 0": [[-1.0, -0.5, -2.0, -0.5]],
    "far from 0": [[100.1, 100.2, 100.4]],
    "differences of 1e-9": [[0.5, 0.500000001, 0.500000003]],
    "large": [[1e6, -1e6, 5e5], [1.0, 2.0, 4.0]],
}


@dataclass(frozen=True)
class Groups:
    """(P, K) rewards; `beside` draws the other arguments that go with them."""

    options: Sequence[dict] = ({},)
    beside: Callable = lambda dice, rewards: {}
    extra: Callable = NOTHING

    def __call__(self, dice):
        drawn = dict(GROUPS)
        for P, K in ((2, 2), (3, 4), (2, 6)):
            drawn[f"{P} problems, K = {K}"] = decimals(dice, P, K, low=-2, high=2)
        cases = []
        for i, (note, rewards) in enumerate(drawn.items()):
            inputs = {"rewards": rewards} | self.options[i % len(self.options)]
            cases.append((note, inputs | self.beside(dice, rewards)))
        return cases + self.extra(dice)


def decimals(dice, *shape: int, low: float, high: float):
    """Nested lists of short numbers."""
    if not shape:
        return round(dice.uniform(low, high), 3) + 0.0
    return [decimals(dice, *shape[1:], low=low, high=high) for _ in range(shape[0])]


def ids(dice, *shape: int, below: int):
    if not shape:
        return dice.randrange(below)
    return [ids(dice, *shape[1:], below=below) for _ in range(shape[0])]


COUNTS = ({"count": None}, {"count": 10}, {"count": None})
BETAS = ({"beta": 0.1}, {"beta": 0.0}, {"beta": 2.5})


# logprobs

LOGITS = {  # note: shape with V last, size of the logits, temperature
    "one position, two words": ((1, 2), 3, 1.0),
    "a vocabulary of one word": ((3, 1), 3, 1.0),
    "three positions": ((3, 4), 3, 0.5),
    "(B, S, V)": ((2, 3, 3), 3, 2.0),
    "near 0": ((2, 3), 0.01, 1.0),
    "sure": ((2, 4), 40, 1.0),
    "logits of hundreds": ((2, 3), 700, 1.0),
    "logits of ten thousand": ((1, 3), 1e4, 3.0),
    "nine words": ((2, 9), 3, 0.7),
    "one row of one position": ((1, 1, 3), 3, 1.0),
}


def scored(dice):
    cases = []
    for note, (shape, size, heat) in LOGITS.items():
        logits = decimals(dice, *shape, low=-size, high=size)
        targets = ids(dice, *shape[:-1], below=shape[-1])
        inputs = {"logits": logits, "targets": targets, "temperature": heat}
        cases.append((note, inputs))
    hand = table(
        "logits targets temperature",
        ("equal logits: log V", [[0.3] * 5, [-7.0] * 5], [2, 0], 1.0),
        ("a tie of the best", [[2.0, 2.0, -1.0]] * 2, [0, 1], 1.0),
        ("nearly greedy", [[0.5, 0.25, 0.0]] * 2, [0, 1], 0.01),
        ("nearly uniform", [[5.0, 0.0, -5.0]] * 2, [0, 2], 1000.0),
    )
    return cases + hand(dice)


def log_softmax(logits, temperature=ONE):
    scaled = [x / temperature for x in logits]
    size = log(total(exp(x) for x in scaled))
    return [x - size for x in scaled]


@vectors("logprobs.logprobs_from_logits", scored, by="logits")
def logprobs_from_logits(logits, targets, temperature):
    """log softmax(logits / temperature)[target], over the last axis"""
    if isinstance(targets, int):
        return log_softmax(logits, temperature)[targets]
    both = along(logits, targets)
    return [logprobs_from_logits(*pair, temperature) for pair in both]


def read(dice):
    cases = []
    for i, (note, layout) in enumerate(LAYOUTS.items()):
        mask, V = grid(layout), (3, 2, 4)[i % 3]
        B, T = len(mask), len(mask[0]) + 1
        logits = decimals(dice, B, T, V, low=-3, high=3)
        inputs = {"logits": logits, "tokens": ids(dice, B, T, below=V), "mask": mask}
        cases.append((note, inputs | {"temperature": (1.0, 0.5, 1.7)[i % 3]}))
    return cases


@vectors("logprobs.token_logprobs", read, by="logits")
def token_logprobs(logits, tokens, mask, temperature):
    """out[b, s] = log softmax(logits[b, s] / temperature)[tokens[b, s + 1]] if live,
    else 0; logits[b, t] is what a model says after reading tokens[b, 0 .. t]"""
    out = [[ZERO for _ in row] for row in mask]
    for b, s in where(mask):
        out[b][s] = log_softmax(logits[b][s], temperature)[tokens[b][s + 1]]
    return out


@vectors("logprobs.masked_sum", Batches(signed="x"), by="x")
def masked_sum(x, mask):
    """sum of x over the live slots of each row"""
    return [total(row) for row in alive(x, mask)]


@vectors("logprobs.masked_mean", Batches(signed="x"), by="x")
def masked_mean(x, mask):
    """mean of x over the live slots of each row; 0 for a row without any"""
    return [mean(row) if row else ZERO for row in alive(x, mask)]


@vectors("logprobs.token_mean", Batches(signed="x", options=COUNTS), by="x")
def token_mean(x, mask, count):
    """sum of x over live slots / count; null: the number of live slots"""
    live = flat(alive(x, mask))
    return total(live) / (count or len(live))


@vectors("logprobs.sequence_mean", Batches(signed="x", options=COUNTS), by="x")
def sequence_mean(x, mask, count):
    """sum over rows of the mean of x over live slots / count; null: the number of rows
    with a live slot"""
    rows = [row for row in alive(x, mask) if row]
    return total(mean(row) for row in rows) / (count or len(rows))


@vectors("logprobs.sequence_sum", Batches(signed="x", options=COUNTS), by="x")
def sequence_sum(x, mask, count):
    """sum of x over live slots / count; null: the number of rows with a live slot"""
    return total(flat(alive(x, mask))) / (count or answers(mask))


KL = Batches(nats="logprobs ref_logprobs")
KL_TERM = Batches(nats="logprobs old ref")


@vectors("logprobs.kl_k1", KL, by="logprobs")
def kl_k1(logprobs, ref_logprobs, mask):
    """log π − log π_ref"""
    return slots(lambda p, q: p - q, mask, logprobs, ref_logprobs)


@vectors("logprobs.kl_k2", KL, by="logprobs")
def kl_k2(logprobs, ref_logprobs, mask):
    """(log π − log π_ref)² / 2"""
    return slots(lambda p, q: (p - q) ** 2 / 2, mask, logprobs, ref_logprobs)


@vectors("logprobs.kl_k3", KL, by="logprobs")
def kl_k3(logprobs, ref_logprobs, mask):
    """exp(d) − 1 − d, d = log π_ref − log π"""
    return slots(lambda p, q: exp(q - p) - 1 - (q - p), mask, logprobs, ref_logprobs)


@vectors(
    "logprobs.kl_ratio_k3",
    Batches(nats="logprobs old_logprobs ref_logprobs"),
    by="logprobs",
)
def kl_ratio_k3(logprobs, old_logprobs, ref_logprobs, mask):
    """π / π_old · (exp(d) − 1 − d), d = log π_ref − log π; both factors move"""
    k3 = kl_k3(logprobs, ref_logprobs, mask)
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    return slots(lambda a, b: a * b, mask, ratio, k3)


FAR = [[-700.0, -0.5, 1000.0]], [[-0.25, -79.5, -1000.0]], [[True, True, False]]


@vectors(
    "logprobs.probability_ratio",
    Batches(
        nats="logprobs old_logprobs",
        extra=table("logprobs old_logprobs mask", ("1e-304 and 1e34", *FAR)),
    ),
    by="logprobs",
)
def probability_ratio(logprobs, old_logprobs, mask):
    """exp(log π − log π_old); 1 at masked slots"""
    return slots(lambda p, o: exp(p - o), mask, logprobs, old_logprobs, empty=ONE)


@vectors("grpo.k1_term", KL_TERM, by="logprobs")
def k1_term(logprobs, old, ref, mask):
    """log π − log π_ref"""
    return kl_k1(logprobs, ref, mask)


@vectors("grpo.k2_term", KL_TERM, by="logprobs")
def k2_term(logprobs, old, ref, mask):
    """(log π − log π_ref)² / 2"""
    return kl_k2(logprobs, ref, mask)


@vectors("grpo.k3_term", KL_TERM, by="logprobs")
def k3_term(logprobs, old, ref, mask):
    """exp(d) − 1 − d, d = log π_ref − log π"""
    return kl_k3(logprobs, ref, mask)


def two_policies(dice):
    cases = []
    for note, (shape, size, _) in LOGITS.items():
        both = decimals(dice, 2, *shape, low=-size, high=size)
        cases.append((note, {"logits": both[0], "ref_logits": both[1]}))
    same = decimals(dice, 2, 4, low=-3, high=3)
    hand = table(
        "logits ref_logits",
        ("policy is the reference", same, same),
        ("shifted by a constant", same, [[x + 2.5 for x in row] for row in same]),
        ("uniform reference", same, [[0.0] * 4] * 2),
        ("uniform policy", [[0.0] * 4] * 2, same),
        ("nearly disjoint", [[40.0, 0.0, 0.0]], [[0.0, 40.0, 0.0]]),
    )
    return cases + hand(dice)


@vectors("logprobs.exact_kl", two_policies, by="logits")
def exact_kl(logits, ref_logits):
    """Σ_v π(v) (log π(v) − log π_ref(v)), π = softmax(logits), over the last axis"""
    if isinstance(logits[0], list):
        return [exact_kl(*pair) for pair in along(logits, ref_logits)]
    both = along(log_softmax(logits), log_softmax(ref_logits))
    return total(exp(p) * (p - q) for p, q in both)


# sft, reinforce, rloo


@vectors("sft.sft_loss", Batches(nats="logprobs", options=COUNTS), by="logprobs")
def sft_loss(logprobs, mask, count):
    """−(1/N) Σ log π over live slots, N = count; null: their number"""
    return -token_mean(logprobs, mask, count)


BASELINE = table(
    "rewards memory",
    ("one answer", [1.0], 0.25),
    ("one right of four", [1.0, 0.0, 0.0, 0.0], 0.0),
    ("two right of four", [1.0, 0.0, 0.0, 1.0], 0.7),
    ("all right", [1.0, 1.0, 1.0], 1.0),
    ("all wrong", [0.0, 0.0], 0.5),
    ("seven times 0.1", [0.1] * 7, 0.1),
    ("both signs", [-1.0, 0.25, 2.0], -1.0),
    ("two answers", [0.3, 0.7], 0.5),
    ("large", [1e6, -1e6, 5e5], 1e5),
    ("far from 0", [100.1, 100.2, 100.4], 99.5),
    ("ties among unequal", [0.5, 0.5, 1.0, -0.5, 1.0], 0.4),
    ("tiny", [1e-9, 0.0, 3e-9], 2e-9),
)


@vectors("reinforce.no_baseline", BASELINE)
def no_baseline(rewards, memory):
    """b = 0"""
    return ZERO


@vectors("reinforce.moving_average", BASELINE)
def moving_average(rewards, memory):
    """b = memory"""
    return memory


@vectors("reinforce.batch_mean", BASELINE, by="rewards")
def batch_mean(rewards, memory):
    """b = mean of the rewards"""
    return mean(rewards)


SHAPED = Batches(nats="logprobs ref_logprobs", rows="rewards", options=BETAS)
WEIGHED = Batches(nats="logprobs", rows="advantages", options=COUNTS)


@vectors("reinforce.shape_rewards", SHAPED)
@vectors("rloo.shape_rewards", SHAPED)
def shape_rewards(rewards, logprobs, ref_logprobs, mask, beta):
    """R = r − β Σ_s (log π − log π_ref) over the live slots of a row; a constant"""
    nats = masked_sum(kl_k1(logprobs, ref_logprobs, mask), mask)
    return [r - beta * k1 for r, k1 in along(rewards, nats)]


@vectors("reinforce.reinforce_loss", WEIGHED, by="logprobs")
@vectors("rloo.rloo_loss", WEIGHED, by="logprobs")
def reinforce_loss(logprobs, advantages, mask, count):
    """−(1/B) Σ_b A_b Σ_s log π[b, s] over live slots, B = count; null: the number of
    rows with a live slot"""
    nats = masked_sum(logprobs, mask)
    return -total(A * x for A, x in along(advantages, nats)) / (count or answers(mask))


@vectors("rloo.leave_one_out", Groups())
@vectors("trpo.leave_one_out", Groups())
def leave_one_out(rewards):
    """A_i = r_i − mean of the other K − 1 of its row"""
    return [
        [r - mean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)] for row in rewards
    ]


# trpo


@vectors(
    "trpo.surrogate_loss",
    Batches(nats="logprobs old_logprobs", rows="advantages", options=COUNTS),
    by="logprobs",
)
def surrogate_loss(logprobs, old_logprobs, advantages, mask, count):
    """−(1/B) Σ_b A_b Σ_s ρ[b, s] over live slots, ρ = π / π_old, B = count; null: the
    number of rows with a live slot"""
    ratio = slots(lambda a, b: exp(a - b), mask, logprobs, old_logprobs)
    sums = masked_sum(ratio, mask)
    return -total(A * x for A, x in along(advantages, sums)) / (count or answers(mask))


def two_tables(dice):
    """Logs of chances, and not always of ones that add up to 1."""
    cases = []
    for note, (shape, size, _) in LOGITS.items():
        if len(shape) == 2:
            both = decimals(dice, 2, *shape, low=-size, high=0)
            cases.append((note, {"old": both[0], "new": both[1]}))
    same = decimals(dice, 2, 4, low=-3, high=0)
    hand = table(
        "old new",
        ("nothing moved", same, same),
        ("one choice", [[-0.5, -1.5]], [[-1.5, -0.5]]),
        ("certain before", [[0.0, -40.0, -40.0]], [[-1.1, -1.1, -1.1]]),
        ("certain after", [[-1.1, -1.1, -1.1]], [[0.0, -40.0, -40.0]]),
    )
    return cases + hand(dice)


@vectors("trpo.choice_kl", two_tables, by="new")
def choice_kl(old, new):
    """Σ_v π_old(v) (log π_old(v) − log π(v)) of each row"""
    return [
        total(exp(p) * (p - q) for p, q in along(*rows)) for rows in along(old, new)
    ]


STEPS = table(
    "direction bent delta",
    ("no curvature but 1", [1.0, -2.0, 0.5], [1.0, -2.0, 0.5], 0.01),
    ("far along what is cheap", [100.0, 1.0], [0.01, 1.0], 0.01),
    ("one weight", [-3.0], [-12.0], 0.5),
    ("a bend that is not along x", [1.0, 0.0], [0.5, 7.0], 2.0),
    ("nowhere to go", [0.0, 0.0], [0.0, 0.0], 0.01),
    ("tiny", [1e-6, -1e-6], [1e-7, -1e-7], 1e-4),
    ("damped", [3.0, -1.0, 2.0], [0.3, -0.1, 0.2], 0.005),
    ("partly against the bend", [2.0, 1.0], [3.0, -1.0], 0.01),
    ("four weights", [0.5, 0.25, -1.5, 2.0], [1.0, 0.5, -0.75, 8.0], 0.02),
    ("a weight of 0", [0.0, -2.0], [5.0, -1.0], 0.01),
    ("large", [1e6, -2e6], [1e3, -1e3], 1.0),
    ("a bound of a nat", [1.0, 1.0], [0.5, 0.25], 1.0),
)


@vectors("trpo.step_within", STEPS)
def step_within(direction, bent, delta):
    """√(2 delta / Σ_i x_i (H x)_i) · x; 0 for x = 0"""
    curvature = total(x * hx for x, hx in along(direction, bent))
    if not curvature > 0:
        return [ZERO for _ in direction]
    return [sqrt(2 * delta / curvature) * x for x in direction]


# remax


def greedy_too(dice, rewards):
    return {"greedy_rewards": [dice.choice((row[0], 0.0, 1.0)) for row in rewards]}


ALONE = ("K = 1", {"rewards": [[1.0], [0.0], [0.5]], "greedy_rewards": [0.0, 1.0, 0.5]})


@vectors("remax.remax_advantages", Groups(beside=greedy_too, extra=always(ALONE)))
def remax_advantages(rewards, greedy_rewards):
    """A = r − r of the greedy answer to the same problem"""
    return [[r - g for r in row] for row, g in along(rewards, greedy_rewards)]


BEYOND = [5.0, -5.0, 5.25, -7.0], [[0.5, 0.25]] * 4, [[True, True]] * 4, 0.5
PAID = Batches(
    signed="k1",
    rows="advantages",
    options=BETAS,
    extra=table("advantages k1 mask beta", ("±5 and beyond", *BEYOND)),
)


@vectors("remax.whole_answer", PAID)
def whole_answer(advantages, k1, mask, beta):
    """A_b − β Σ_s k1[b, s] at every live slot of row b, 0 at masked ones"""
    paid = [A - beta * x for A, x in along(advantages, masked_sum(k1, mask))]
    return [[R if on else ZERO for on in row] for R, row in along(paid, mask)]


@vectors("remax.code_returns", PAID)
def code_returns(advantages, k1, mask, beta):
    """0.99^n clamp(A_b, −5, 5) − β k1[b, s] at live slots, 0 at masked ones; n: live
    slots of row b from s to the end, s included"""
    out = [[ZERO for _ in row] for row in mask]
    for b, s in where(mask):
        clipped = clamp(advantages[b], Number(-5), Number(5))
        out[b][s] = Number("0.99") ** sum(mask[b][s:]) * clipped - beta * k1[b][s]
    return out


@vectors("remax.code_weights", PAID)
def code_weights(advantages, k1, mask, beta):
    """code_returns · rows with a live slot / live slots"""
    scale = number(answers(mask)) / len(where(mask))
    returns = code_returns(advantages, k1, mask, beta)
    return [[scale * x for x in row] for row in returns]


@vectors(
    "remax.remax_loss",
    Batches(nats="logprobs", signed="weights", options=COUNTS),
    by="logprobs",
)
def remax_loss(logprobs, weights, mask, count):
    """−(1/B) Σ weights · log π over live slots, B = count; null: the number of rows
    with a live slot"""
    each = slots(lambda p, w: -p * w, mask, logprobs, weights)
    return sequence_sum(each, mask, count)


# grpo


@vectors("grpo.centred_advantages", Groups())
def centred_advantages(rewards):
    """A = r − mean of its row"""
    return [[r - mean(row) for r in row] for row in rewards]


EPSILONS = ({"epsilon": 1e-4}, {"epsilon": 0.0}, {"epsilon": 1e-4}, {"epsilon": 0.5})


@vectors("grpo.group_advantages", Groups(EPSILONS))
def group_advantages(rewards, epsilon):
    """A = (r − mean) / (std + epsilon) of its row, std with divisor K − 1; 0 if all r
    of the row are equal"""
    advantages = []
    for row in rewards:
        scale = sqrt(variance(row, 1)) + epsilon
        dead = alike(row)
        advantages.append([ZERO if dead else (r - mean(row)) / scale for r in row])
    return advantages


WEIGHTS = Batches(options=({"max_new_tokens": 4}, {"max_new_tokens": 128}))


@vectors("grpo.per_sequence", WEIGHTS)
def per_sequence(mask, max_new_tokens):
    """1 / (B · live slots of the row) at live slots, B = rows with a live slot"""
    B = answers(mask)
    return [[ONE / B / sum(row) if on else ZERO for on in row] for row in mask]


@vectors("grpo.by_constant", WEIGHTS)
def by_constant(mask, max_new_tokens):
    """1 / (B · max_new_tokens) at live slots, B = rows with a live slot"""
    return slots(lambda: ONE / answers(mask) / max_new_tokens, mask)


@vectors("grpo.per_token", WEIGHTS)
def per_token(mask, max_new_tokens):
    """1 / live slots of the batch at live slots"""
    return slots(lambda: ONE / len(where(mask)), mask)


CLIPS = (
    {"eps_low": 0.2, "eps_high": 0.2},
    {"eps_low": 0.1, "eps_high": 0.4},
    {"eps_low": 1.0, "eps_high": 1e9},
)
# log 1.2 = 0.18232156 and log 0.8 = -0.22314355: inside, outside, inside, outside.
CORNERS = [-1 - gap for gap in (0.182321, 0.182322, -0.223143, -0.223144)]
AT_CORNERS = {
    "logprobs": [[-1.0] * 4] * 2,
    "old_logprobs": [CORNERS, CORNERS],
    "mask": [[True] * 4] * 2,
    "count": None,
} | CLIPS[0]
CORNER_NOTE = "5e-7 inside and outside each corner, A > 0 and A < 0"


@vectors(
    "grpo.clipped_loss",
    Batches(
        nats="logprobs old_logprobs",
        rows="advantages",
        options=CLIPS,
        extra=always((CORNER_NOTE, AT_CORNERS | {"advantages": [1.5, -0.5]})),
    ),
    by="logprobs",
)
def clipped_loss(logprobs, old_logprobs, advantages, mask, eps_low, eps_high):
    """−min(ρ A_b, clip(ρ, 1 − eps_low, 1 + eps_high) A_b) at live slots, ρ = π / π_old;
    gradient −ρ A_b, 0 where A > 0 and ρ > 1 + eps_high or A < 0 and ρ < 1 − eps_low"""
    spread = [[A for _ in row] for A, row in along(advantages, mask)]
    arrays = logprobs, old_logprobs, spread
    return slots(partial(clipped, eps_low, eps_high), mask, *arrays)


def clipped(eps_low, eps_high, logprob, old_logprob, A) -> Number:
    ratio = exp(logprob - old_logprob)
    return -smaller(ratio * A, clamp(ratio, 1 - eps_low, 1 + eps_high) * A)


PENALTIES = (
    {"eps_low": 0.2, "eps_high": 0.2, "beta": 0.04, "kl_term": "k3_term"},
    {"eps_low": 0.1, "eps_high": 0.4, "beta": 2.5, "kl_term": "k2_term"},
    {"eps_low": 0.2, "eps_high": 0.28, "beta": 0.0, "kl_term": "k3_term"},
    {"eps_low": 1.0, "eps_high": 1e9, "beta": 0.5, "kl_term": "k1_term"},
)


def by_sequence(dice):
    """Cases without weights; beta 0 takes turns with the others, and needs no ref."""
    options = [option | {"weights": None} for option in PENALTIES]
    nats = "logprobs old_logprobs ref_logprobs"
    cases = Batches(nats, rows="advantages", options=options)(dice)
    for _, inputs in cases:
        if inputs["beta"] == 0:
            inputs["ref_logprobs"] = None
    return [(f"{note}; no weights", inputs) for note, inputs in cases]


@vectors(
    "grpo.grpo_loss",
    Batches(
        nats="logprobs old_logprobs ref_logprobs",
        shares="weights",
        rows="advantages",
        options=PENALTIES,
        extra=by_sequence,
    ),
    by="logprobs",
)
def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    weights,
    eps_low,
    eps_high,
    beta,
    ref_logprobs,
    kl_term,
):
    """Σ w (−min(ρ A_b, clip(ρ, 1 − eps_low, 1 + eps_high) A_b) + β KL) over live slots,
    ρ = π / π_old; weights null: w = 1 / (rows with a live slot · live slots of the
    row); KL by kl_term, d = log π_ref − log π: k1_term −d, k2_term d² / 2, k3_term
    exp(d) − 1 − d"""
    terms = {
        "k1_term": lambda d: -d,
        "k2_term": lambda d: d**2 / 2,
        "k3_term": lambda d: exp(d) - 1 - d,
    }
    loss = ZERO
    for b, s in where(mask):
        ratio = exp(logprobs[b][s] - old_logprobs[b][s])
        bounded = clamp(ratio, 1 - eps_low, 1 + eps_high)
        each = -smaller(ratio * advantages[b], bounded * advantages[b])
        if beta > 0:
            each = each + beta * terms[kl_term](ref_logprobs[b][s] - logprobs[b][s])
        w = ONE / answers(mask) / sum(mask[b]) if weights is None else weights[b][s]
        loss = loss + w * each
    return loss


# ppo


@vectors(
    "ppo.shape_token_rewards",
    Batches("logprobs ref_logprobs", rows="rewards", options=BETAS, dead=False),
)
def shape_token_rewards(rewards, logprobs, ref_logprobs, mask, beta):
    """−β (log π − log π_ref) at live slots, and r_b besides on the last of row b"""
    out = slots(lambda p, q: -beta * (p - q), mask, logprobs, ref_logprobs)
    for b, row in enumerate(mask):
        last = max(s for s, on in enumerate(row) if on)
        out[b][last] = out[b][last] + rewards[b]
    return out


DECAYS = (
    {"gamma": 1.0, "lam": 0.95},
    {"gamma": 0.9, "lam": 0.5},
    {"gamma": 1.0, "lam": 1.0},
    {"gamma": 1.0, "lam": 0.0},
    {"gamma": 0.0, "lam": 0.95},
)
STEPS = [[0.0, 0.0, 1.0]], [[0.2, 0.5, 0.8]], [[True] * 3], 1.0, 0.95


@vectors(
    "ppo.gae",
    Batches(
        signed="token_rewards values",
        options=DECAYS,
        extra=table(
            "token_rewards values mask gamma lam", ("0.7655, 0.49, 0.2", *STEPS)
        ),
    ),
)
def gae(token_rewards, values, mask, gamma, lam):
    """A_t = Σ_{j ≥ t} (gamma lam)^(j − t) δ_j, δ_j = r_j + gamma V_{j+1} − V_j; t
    counts the live slots of a row, V = 0 after the last; 0 at masked slots"""
    out = [[ZERO for _ in row] for row in mask]
    for b, row in enumerate(mask):
        steps = [s for s, on in enumerate(row) if on]
        r = [token_rewards[b][s] for s in steps]
        V = [values[b][s] for s in steps] + [ZERO]
        delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(len(r))]
        for t, s in enumerate(steps):
            out[b][s] = total((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))
    return out


@vectors("ppo.whiten", Batches(signed="x"))
def whiten(x, mask):
    """(x − mean) / √(variance + 1e-8) over live slots, variance with divisor N; 0 if
    all are equal"""
    live = flat(alive(x, mask))
    centre, scale = mean(live), sqrt(variance(live) + Number("1e-8"))
    return slots(lambda v: ZERO if alike(live) else (v - centre) / scale, mask, x)


SPREAD = {"advantages": [[1.5] * 4, [-0.5] * 4]}


@vectors(
    "ppo.policy_loss",
    Batches(
        nats="logprobs old_logprobs",
        signed="advantages",
        options=[a | b for a, b in along(CLIPS, COUNTS)],
        extra=always((CORNER_NOTE, AT_CORNERS | SPREAD)),
    ),
    by="logprobs",
)
def policy_loss(logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count):
    """−(1/B) Σ min(ρ A, clip(ρ, 1 − eps_low, 1 + eps_high) A) over live slots, ρ = π /
    π_old, B = count; null: the number of rows with a live slot"""
    arrays = logprobs, old_logprobs, advantages
    each = slots(partial(clipped, eps_low, eps_high), mask, *arrays)
    return sequence_sum(each, mask, count)


VALUE_CLIPS = (
    {"clip": None, "count": None},
    {"clip": 0.25, "count": None},
    {"clip": 1.0, "count": 10},
)
ONE_VALUE = table(
    "values old_values returns mask clip count",
    *(
        (note, [[V]], [[0.0]], [[R]], [[True]], 0.25, None)
        for note, V, R in (
            ("kink: moved by just the clip; V − R, as inside", 0.25, 1.0),
            ("kink: as far beyond R as clipped before it; half of V − R", 1.0, 0.625),
            ("moved by more than the clip, towards R: flat", 0.5, 1.0),
            ("moved by more than the clip, away from R: not flat", 0.5, -1.0),
        )
    ),
)


@vectors(
    "ppo.value_loss",
    Batches(signed="values old_values returns", options=VALUE_CLIPS, extra=ONE_VALUE),
    by="values",
)
def value_loss(values, old_values, returns, mask, clip, count):
    """½ mean over live slots of max((V − R)², (V_old + clamp(V − V_old, ±clip) − R)²),
    clip null: none; the mean divides by count, null: the number of live slots"""

    def worse(V, old, R):
        near = V if clip is None else old + clamp(V - old, -clip, clip)
        return larger((V - R) ** 2, (near - R) ** 2) / 2

    return token_mean(slots(worse, mask, values, old_values, returns), mask, count)


MIX_WEIGHTS = (
    {"weight": 1.0, "count": None},
    {"weight": 0.25, "count": None},
    {"weight": 27.8, "count": 10},
    {"weight": 0.0, "count": None},
)


@vectors(
    "ppo.pretraining_loss",
    Batches(nats="logprobs", options=MIX_WEIGHTS),
    by="logprobs",
)
def pretraining_loss(logprobs, mask, weight, count):
    """−weight · (1/N) Σ over live slots, N = count; null: the number of rows with a
    live slot"""
    return -weight * sequence_sum(logprobs, mask, count)


GUESSES = table(
    "values returns mask",
    ("a perfect guess: 1", [[0.5, 2.0, 1e3]], [[0.5, 2.0, 0.0]], [[True, True, False]]),
    ("worse than none: below 0", [[3.0, -3.0]], [[0.0, 1.0]], [[True, True]]),
)


@vectors(
    "ppo.explained_variance",  # without 1e-9: the variance would be one of roundings
    Batches(signed="values returns", odd=tuple(ODD)[:2], extra=GUESSES),
)
def explained_variance(values, returns, mask):
    """1 − Var(R − V) / Var(R) over live slots; 0 if all R are equal"""
    R, V = flat(alive(returns, mask)), flat(alive(values, mask))
    if alike(R):
        return ZERO
    return 1 - variance([r - v for r, v in along(R, V)]) / variance(R)


@vectors(
    "ppo.adapt_beta",
    table(
        "beta kl target horizon completions",
        ("on target: unchanged", 0.1, 6.0, 6.0, 10000.0, 256),
        ("a little above", 0.1, 6.6, 6.0, 10000.0, 256),
        ("a little below", 0.1, 5.5, 6.0, 10000.0, 256),
        ("far above: as 20 %", 0.1, 60.0, 6.0, 10000.0, 256),
        ("far below: as -20 %", 0.1, 0.0, 6.0, 10000.0, 256),
        ("an estimate below 0", 0.1, -1.0, 6.0, 10000.0, 256),
        ("20 % above", 0.5, 6.0, 5.0, 100.0, 10),
        ("20 % below", 0.5, 4.0, 5.0, 100.0, 10),
        ("beta 0 stays 0", 0.0, 9.0, 6.0, 10000.0, 256),
        ("the whole horizon at once", 0.2, 6.3, 6.0, 256.0, 256),
        ("one completion", 0.2, 6.3, 6.0, 10000.0, 1),
        ("a tiny target", 0.01, 1e-4, 1e-3, 1000.0, 64),
        ("a large beta", 50.0, 3.0, 2.75, 500.0, 64),
    ),
)
def adapt_beta(beta, kl, target, horizon, completions):
    """β (1 + clamp(kl / target − 1, ±0.2) · completions / horizon)"""
    fifth = ONE / 5
    return beta * (1 + clamp(kl / target - 1, -fifth, fifth) * completions / horizon)


# dpo

GAPS = {
    "policy is the reference": [0.0],
    "told apart": [1.0],
    "the wrong way round": [-1.0],
    "both ways": [0.5, -0.5],
    "four pairs": [2.125, -0.75, 0.001, 13.5],
    "far apart": [60.0, -60.0],
    "farther than exp reaches": [1e4, -1e4],
    "tiny": [1e-9, -1e-9, 0.0],
}


def gaps(*options):
    return lambda dice: [
        (f"{note}; β = {option['beta']}", {"h": h} | option)
        for option in options
        for note, h in GAPS.items()
    ]


def softplus(x: Number) -> Number:
    """log(1 + e^x) = −log σ(−x)."""
    return log(1 + exp(x))


@vectors("dpo.logistic", gaps({"beta": 0.1}, {"beta": 1.0}), by="h")
def logistic(h, beta):
    """−log σ(β h) of each h"""
    return [softplus(-beta * x) for x in h]


@vectors(
    "dpo.conservative",
    gaps({"beta": 0.1, "smoothing": 0.1}, {"beta": 1.0, "smoothing": 0.25}),
    by="h",
)
def conservative(h, beta, smoothing):
    """−(1 − smoothing) log σ(β h) − smoothing log σ(−β h) of each h"""
    straight, swapped = logistic(h, beta), logistic([-x for x in h], beta)
    both = along(straight, swapped)
    return [(1 - smoothing) * a + smoothing * b for a, b in both]


@vectors(
    "dpo.robust",
    gaps({"beta": 0.1, "flipped": 0.1}, {"beta": 1.0, "flipped": 0.2}),
    by="h",
)
def robust(h, beta, flipped):
    """[−(1 − flipped) log σ(β h) + flipped log σ(−β h)] / (1 − 2 flipped) of each h"""
    straight, swapped = logistic(h, beta), logistic([-x for x in h], beta)
    both = along(straight, swapped)
    return [((1 - flipped) * a - flipped * b) / (1 - 2 * flipped) for a, b in both]


@vectors("dpo.ipo", gaps({"beta": 0.1}, {"beta": 0.5}), by="h")
def ipo(h, beta):
    """(h − 1/(2 β))² of each h"""
    return [(x - 1 / (2 * beta)) ** 2 for x in h]


FOUR = "chosen_logprobs rejected_logprobs ref_chosen_logprobs ref_rejected_logprobs"


def preferences(dice):
    cases = []
    for note, B, size, apart, beta, count in (
        ("one pair", 1, 20, 3, 0.1, None),
        ("two pairs", 2, 20, 3, 1.0, None),
        ("five pairs", 5, 50, 5, 0.5, 8),
        ("policy is the reference", 2, 20, 0, 0.1, None),
        ("sums of hundreds of nats", 2, 900, 30, 1.0, None),
    ):
        for kind in ("logistic", "conservative", "ipo"):
            own = decimals(dice, 2, B, low=-size, high=0)
            moved = [
                [min(round(x + dice.uniform(-apart, apart), 3), 0.0) for x in row]
                for row in own
            ]
            inputs = dict(along(FOUR.split(), own + moved))
            inputs |= {"beta": beta, "count": count, "per_pair": kind}
            cases.append((note, inputs))
    hand = table(
        f"{FOUR} beta count per_pair",
        ("the minimum: h = 1/(2 β)", [0.0], [-1.0], [0.0], [0.0], 0.5, None, "ipo"),
        ("sure of both", [0.0], [0.0], [0.0], [0.0], 0.5, None, "logistic"),
    )
    return cases + hand(dice)


@vectors("dpo.dpo_loss", preferences, by="chosen_logprobs rejected_logprobs")
def dpo_loss(
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    beta,
    count,
    per_pair,
):
    """(1/B) Σ_b per_pair(h_b, β), h = (log π − log π_ref)(chosen) − the same of the
    rejected; B = count, null: the number of pairs; conservative with smoothing 0.1"""
    chosen = [a - b for a, b in along(chosen_logprobs, ref_chosen_logprobs)]
    rejected = [a - b for a, b in along(rejected_logprobs, ref_rejected_logprobs)]
    h = [w - v for w, v in along(chosen, rejected)]
    smoothed = partial(conservative, smoothing=Number(0.1))
    kinds = {"logistic": logistic, "conservative": smoothed, "ipo": ipo}
    return total(kinds[per_pair](h, beta)) / (count or len(h))


SIX = [[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [0.3, 0.1, 0.6, 0.2, 0.5, 0.4]]


@vectors(
    "dpo.make_pairs",
    table(
        "rewards most",
        ("K = 2", [[0.0, 1.0]], 1),
        ("K = 2, a tie: no pair", [[1.0, 1.0]], 1),
        ("K = 2, in order", [[1.0, 0.0]], 4),
        ("K = 3: the middle one is in no pair", [[0.0, 2.0, 1.0]], 4),
        ("K = 4, two pairs", [[0.1, 0.9, 0.5, 0.7]], 4),
        ("at most one", [[0.1, 0.9, 0.5, 0.7]], 1),
        ("the middle two tie: one pair", [[3.0, 1.0, 0.0, 1.0]], 4),
        ("all equal: none", [[0.5] * 5], 2),
        ("three problems", [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], 2),
        ("below 0 too", [[-1.0, -3.0, -2.0, -5.0]], 4),
        ("1e-9 apart", [[0.5, 0.500000001]], 1),
        ("K = 6, two problems", SIX, 2),
        ("K = 5, as many as there are", [[0.4, -0.2, 0.1, 0.3, 0.0]], 9),
    ),
)
def make_pairs(rewards, most):
    """[chosen, rejected] rows of the P · K answers: per problem the best with the
    worst, the second with the second last ..., at most `most`, and none of equals. Only
    cases in which lots decide nothing"""
    pairs = []
    for p, row in enumerate(rewards):
        K = len(row)
        order = sorted(range(K), key=lambda i, row=row: -row[i].value)
        for rank in range(min(K // 2, most)):
            high, low = order[rank], order[-1 - rank]
            if row[low] < row[high]:
                pairs.append([p * K + high, p * K + low])
    return pairs


# reward_model


def comparisons(dice):
    cases = []
    for note, N, apart, margin, label, weighed, count in (
        ("one pair", 1, 2, 0.0, 1.0, False, None),
        ("two pairs", 2, 2, 0.0, 1.0, False, None),
        ("a margin", 3, 2, 0.5, 1.0, False, None),
        ("labels that are right with chance 0.8", 3, 2, 0.0, 0.8, False, None),
        ("of a larger batch", 4, 3, 0.0, 1.0, False, 10),
        ("the pairs of two rankings", 4, 3, 0.0, 1.0, True, 2),
        ("all at once", 5, 4, 1.5, 0.9, True, 3),
        ("told apart", 2, 50, 0.0, 1.0, False, None),
    ):
        chosen, rejected = decimals(dice, 2, N, low=-apart, high=apart)
        weights = [1.0] + [1 / 4] * (N - 1) if weighed else None
        inputs = {"chosen": chosen, "rejected": rejected, "margin": margin}
        inputs |= {"label": label, "weights": weights, "count": count}
        cases.append((note, inputs))
    hand = table(
        "chosen rejected margin label weights count",
        ("a tie: log 2", [0.3], [0.3], 0.0, 1.0, None, None),
        ("farther than exp reaches", [1e4, -1e4], [0.0, 0.0], 0.0, 1.0, None, None),
        ("differences of 1e-9", [0.5, 0.500000001], [0.5, 0.5], 0.0, 1.0, None, None),
        ("a label that says nothing", [1.0], [-1.0], 0.0, 0.5, None, None),
        ("a pair that does not count", [1.0, 2.0], [3.0, 0.0], 0.0, 1.0, [0.0, 1.0], 1),
        ("each its label", [0.5, 2.0], [-0.25, 0.5], 0.0, [0.875, 0.25], None, None),
    )
    return cases + hand(dice)


@vectors("reward_model.pairwise_loss", comparisons, by="chosen rejected")
def of_comparisons(chosen, rejected, margin, label, weights, count):
    """(1/N) Σ_n w_n [p log(1 + e^−d_n) + (1 − p) log(1 + e^d_n)], d = chosen − rejected
    − margin; p = label, or p_n = label_n; w: weights, null: 1; N = count, null: the
    number of pairs"""
    losses = []
    for n, (w, v) in enumerate(along(chosen, rejected)):
        d = w - v - margin
        p = label[n] if isinstance(label, list) else label
        lack = p * softplus(-d) + (1 - p) * softplus(d)
        losses.append(lack if weights is None else weights[n] * lack)
    return total(losses) / (count or len(losses))


# rrhf

LIVING = Batches(nats="logprobs", dead=False)


@vectors("rrhf.summed_logprobs", LIVING, by="logprobs")
def summed_logprobs(logprobs, mask):
    """Σ log π over the live slots of a row"""
    return masked_sum(logprobs, mask)


@vectors("rrhf.mean_logprobs", LIVING, by="logprobs")
def mean_logprobs(logprobs, mask):
    """mean of log π over the live slots of a row"""
    return masked_mean(logprobs, mask)


def likelihoods(dice, rewards):
    return {
        "mean_logprobs": decimals(dice, len(rewards), len(rewards[0]), low=-3, high=0)
    }


RANKS = table(
    "mean_logprobs rewards margin count",
    ("by hand: 0.4", [[-0.9, -0.5, -1.2]], [[2.0, 1.0, 0.0]], 0.0, None),
    ("K = 1: no pair", [[-0.5]], [[1.0]], 0.0, None),
    ("in order: 0", [[-0.25, -0.75]], [[1.0, 0.0]], 0.0, None),
    ("kink: equal scores, slope 0", [[-0.5, -0.5]], [[1.0, 0.0]], 0.0, None),
    ("kink: a lead of the margin, slope 0", [[-0.25, -0.75]], [[1.0, 0.0]], 0.5, None),
)
MARGINS = ({"margin": 0.0, "count": None}, {"margin": 0.5, "count": 10})


@vectors(
    "rrhf.ranking_loss",
    Groups(MARGINS, beside=likelihoods, extra=RANKS),
    by="mean_logprobs",
)
def ranking_loss(mean_logprobs, rewards, margin, count):
    """(1/P) Σ_problems Σ_{r_i < r_j} max(0, margin + p_i − p_j), P = count; null: the
    number of problems"""
    lack = ZERO
    for p, r in along(mean_logprobs, rewards):
        for i in range(len(p)):
            for j in range(len(p)):
                if r[i] < r[j]:
                    lack = lack + hinge(margin + p[i] - p[j])
    return lack / (count or len(mean_logprobs))


@vectors("rrhf.best_answers", Groups())
def best_answers(rewards):
    """the first of the largest rewards of each row, if above 0"""
    best = []
    for row in rewards:
        first = max(range(len(row)), key=lambda i, row=row: row[i].value)
        best.append([i == first and r > 0 for i, r in enumerate(row)])
    return best


JUDGED = {  # note: rows of answers, their rewards
    "K = 2, one right": ("xx. xxx", [[1.0, 0.0]]),
    "K = 2, both right: the first": ("xx. xxx", [[1.0, 1.0]]),
    "K = 2, both wrong: none": ("xx. xxx", [[0.0, 0.0]]),
    "K = 1, one live token": ("..x", [[1.0]]),
    "T = 2, K = 1, wrong": ("x", [[0.0]]),
    "two problems": (".xxx. .xx.. ..xxx ..x..", [[0.0, 1.0], [1.0, 0.0]]),
    "one of two unanswered": (".xx .x. xxx x..", [[0.0, 0.0], [0.0, 1.0]]),
    "K = 4, graded": ("x... xx.. xxx. xxxx", [[0.1, 0.7, 0.3, 0.5]]),
    "rewards below 0: none": ("xx .x x.", [[-1.0, -0.5, -2.0]]),
    "one token each": ("x. .x", [[1.0, 0.0]]),
    "holes in the mask": ("x.x.x .xx.x", [[0.5, 0.25]]),
    "ties of the best": ("xx xx xx", [[0.5, 1.0, 1.0]]),
    "three problems": ("xx. x.. .xx xxx x.x xx.", [[1.0, 0.0], [0.5, 0.7], [0.0, 0.1]]),
    "extreme numbers": ("xxx xx. .xx ..x", [[1.0, 0.0, 0.5, 0.25]]),
    "everything equal": ("xx. xxx", [[0.0, 1.0]]),
}


def judged(options):
    def draw(dice):
        cases = []
        for i, (note, (layout, rewards)) in enumerate(JUDGED.items()):
            mask, odd = grid(layout), note if note in ODD else ""
            logprobs = [
                [draw_nats(dice, odd) if on else dice.choice(JUNK) for on in row]
                for row in mask
            ]
            inputs = {"logprobs": logprobs, "rewards": rewards, "mask": mask}
            cases.append((note, inputs | options[i % len(options)]))
        return cases

    return draw


@vectors("rrhf.sft_loss", judged(COUNTS), by="logprobs")
def best_loss(logprobs, rewards, mask, count):
    """−(1/N) Σ log π over the live slots of the best answers, the first of the largest
    rewards of each problem, if above 0; rows are problem by problem; N = count, null:
    the number of these slots; 0 where no problem has one"""
    best = flat(best_answers(rewards))
    live = [x for keep, row in along(best, alive(logprobs, mask)) for x in row if keep]
    return -total(live) / (count or max(len(live), 1))


TERMS = (
    {
        "likelihood": "mean_logprobs",
        "sft_weight": 1.0,
        "margin": 0.0,
        "counts": [None, None],
    },
    {
        "likelihood": "mean_logprobs",
        "sft_weight": 100.0,
        "margin": 0.5,
        "counts": [4, 9],
    },
    {
        "likelihood": "summed_logprobs",
        "sft_weight": 0.0,
        "margin": 0.25,
        "counts": [2, 5],
    },
    {
        "likelihood": "summed_logprobs",
        "sft_weight": 2.0,
        "margin": 1.0,
        "counts": [None, 5],
    },
)


@vectors("rrhf.rrhf_loss", judged(TERMS), by="logprobs")
def rrhf_loss(logprobs, rewards, mask, sft_weight, margin, likelihood, counts):
    """ranking_loss(likelihood(logprobs, mask), rewards, margin, counts[0]) +
    sft_weight · sft_loss(logprobs, rewards, mask, counts[1])"""
    named = {"mean_logprobs": mean_logprobs, "summed_logprobs": summed_logprobs}
    points = named[likelihood](logprobs, mask)
    K = len(rewards[0])
    points = [points[i : i + K] for i in range(0, len(points), K)]
    sft = best_loss(logprobs, rewards, mask, counts[1])
    return ranking_loss(points, rewards, margin, counts[0]) + sft_weight * sft


# rejection_sampling

CHANCES = table(
    "p n",
    ("n = 1: the policy itself", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999], 1),
    ("n = 2", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999], 2),
    ("n = 8", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999], 8),
    ("never and always", [0.0, 1.0], 4),
    ("rare", [1e-9, 1e-6], 8),
    ("nearly always", [0.999999], 8),
    ("a half", [0.5], 64),
    ("a number, no list", 0.3, 5),
    ("n of a thousand", [0.001, 0.01], 1000),
    ("two rows", [[0.12, 0.5, 0.9], [0.4, 0.77, 0.03]], 3),
    ("one chance", [0.2], 16),
    ("dyadic", [0.125, 0.75], 4),
)


@vectors("rejection_sampling.best_of_n_accuracy", CHANCES)
def best_of_n_accuracy(p, n):
    """1 − (1 − p)^n"""
    if isinstance(p, list):
        return [best_of_n_accuracy(x, n) for x in p]
    return 1 - (1 - p) ** n


@vectors("rejection_sampling.best_of_n_kl", CHANCES)
def best_of_n_kl(p, n):
    """a log(a / p) + (1 − a) log((1 − a) / (1 − p)), a = 1 − (1 − p)^n, 0 log 0 = 0"""
    if isinstance(p, list):
        return [best_of_n_kl(x, n) for x in p]
    return binary_kl(best_of_n_accuracy(p, n), p)


@vectors(
    "rejection_sampling.likelihood_loss",
    Batches(nats="logprobs", rows="weights", options=COUNTS),
    by="logprobs",
)
def likelihood_loss(logprobs, weights, mask, count):
    """−(1/count) Σ_b weights_b Σ_s log π[b, s] over live slots; null: the number of
    rows with a live slot"""
    return reinforce_loss(logprobs, weights, mask, count)


RIGHT_OR_WRONG = {
    "nothing above 0": [[0.0, 0.0], [-1.0, 0.0]],
    "one right answer to each": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    "one problem unanswered": [[0.0, 0.0], [0.25, 1.0]],
    "1e-9 apart": [[0.5, 0.500000001]],
    "one answer, right": [[1.0]],
}


def drawn(hand):
    """Rewards by hand, distinct ones, and more by hand; lengths of any size."""

    def draw(dice):
        tables = dict(RIGHT_OR_WRONG)
        for P, K in ((1, 1), (1, 2), (2, 2), (3, 2), (2, 4), (3, 3), (4, 5)):
            grades = iter(dice.sample(range(-9, 31), P * K))
            rewards = [[next(grades) / 10 for _ in range(K)] for _ in range(P)]
            tables[f"{P} problems, K = {K}"] = rewards
        cases = []
        for note, rewards in (tables | hand).items():
            lengths = [[dice.randint(1, 9) for _ in row] for row in rewards]
            cases.append((note, {"rewards": rewards, "lengths": lengths}))
        return cases

    return draw


@vectors(
    "rejection_sampling.select_right",
    drawn({"ties": [[1.0, 0.0, 1.0], [0.5, 0.5, 0.0]], "all right": [[1.0, 1.0]] * 2}),
)
def select_right(rewards, lengths):
    """every answer of reward above 0"""
    return [[r > 0 for r in row] for row in rewards]


@vectors(
    "rejection_sampling.select_best",
    drawn({"ties below the best": [[1.0, 0.5, 0.5], [0.25, 0.0, 0.0]]}),
)
def select_best(rewards, lengths):
    """the best answer to each problem, if above 0. Only cases in which lots decide
    nothing"""
    return [[r > 0 and not r < max(row) for r in row] for row in rewards]


@vectors(
    "rejection_sampling.select_top",
    drawn(
        {"both of one": [[1.0, 0.75], [0.5, 0.25]], "ties": [[1.0, 1.0], [0.5, 0.0]]}
    ),
)
def select_top(rewards, lengths):
    """the P best of all P · K answers, if above 0. Only cases in which lots decide
    nothing"""

    def ahead(r):
        return sum(r < other for other in flat(rewards))

    return [[r > 0 and ahead(r) < len(rewards) for r in row] for row in rewards]


def by_lot(dice):
    """Lots decide which, but not how many: equal lengths, or all or none is right."""
    cases = []
    for P, K, right, length in (
        (1, 2, 1, 3),
        (1, 4, 2, 1),
        (2, 2, 3, 7),
        (2, 4, 0, 2),
        (2, 4, 8, 2),
        (3, 3, 4, 5),
        (1, 1, 1, 9),
        (1, 1, 0, 9),
        (4, 4, 7, 1),
    ):
        wins = dice.sample([1.0] * right + [0.0] * (P * K - right), P * K)
        rewards = [wins[i : i + K] for i in range(0, P * K, K)]
        inputs = {"rewards": rewards, "lengths": [[length] * K for _ in range(P)]}
        cases.append((f"{right} right of {P * K}, equal lengths", inputs))
    uneven = [[3, 1], [9, 2]]
    for note, win in (("all right", 1.0), ("none right", 0.0), ("all below 0", -1.0)):
        inputs = {"rewards": [[win, win], [win, win]], "lengths": uneven}
        cases.append((f"{note}, any lengths", inputs))
    return cases


@vectors("rejection_sampling.select_random", by_lot)
def select_random(rewards, lengths):
    """how many answers are kept: drawn by lot until they hold as many tokens as the
    answers of reward above 0. Only cases in which lots do not decide that"""
    right = sum(n for r, n in along(flat(rewards), flat(lengths)) if r > 0)
    kept, tokens = 0, 0
    for n in flat(lengths):  # in any order
        if tokens < right:
            kept, tokens = kept + 1, tokens + n
    return kept


# intervals

COLUMNS = table(
    "before after ceiling",
    ("nothing changed", [0.5, 0.25], [0.5, 0.25], [1.0, 1.0]),
    ("all the way", [0.0, 0.5, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ("worse than before", [0.5, 0.5], [0.0, 0.25], [1.0, 0.75]),
    ("beyond", [0.1, 0.2], [1.0, 1.0], [0.6, 0.4]),
)


def columns(dice):
    cases = COLUMNS(dice)
    sizes = (2, 1), (3, 1), (5, 1), (8, 1), (2, 0.01), (4, 1e4), (6, 2), (10, 1), (4, 9)
    for N, size in sizes:
        names = "before", "after", "ceiling"
        drawn = decimals(dice, 3, N, low=0, high=size)
        drawn[2] = [round(x + size, 3) for x in drawn[0]]
        cases.append((f"{N} problems", dict(along(names, drawn))))
    return cases


def two_columns(dice):
    return [
        (note, {"a": inputs["after"], "b": inputs["before"]})
        for note, inputs in columns(dice)
    ]


@vectors("intervals.difference", two_columns)
def difference(a, b):
    """mean of a − b (the value; its interval is drawn)"""
    return mean([x - y for x, y in along(a, b)])


@vectors("intervals.gap_closed", columns)
def gap_closed(before, after, ceiling):
    """(mean after − mean before) / (mean ceiling − mean before) (the value; its
    interval is drawn)"""
    return (mean(after) - mean(before)) / (mean(ceiling) - mean(before))


def seeds(dice):
    drawn = {f"{n} seeds": decimals(dice, n, low=0, high=1) for n in range(2, 11)}
    drawn |= {"all equal: no width": [0.25] * 3, "below 0": [-1.0, -2.5]}
    drawn |= {"large": [1e6, 2e6, 4e6]}
    return [(note, {"values": values}) for note, values in drawn.items()]


# Two-sided 95 %, as tables print it, from 1 degree of freedom to 9.
STUDENT = [
    "12.7062",
    "4.3027",
    "3.1824",
    "2.7764",
    "2.5706",
    "2.4469",
    "2.3646",
    "2.3060",
    "2.2622",
]


@vectors("intervals.over_seeds", seeds)
def over_seeds(values):
    """[mean, mean − t s / √n, mean + t s / √n], s with divisor n − 1, t for n = 2 to
    10: 12.7062 4.3027 3.1824 2.7764 2.5706 2.4469 2.3646 2.3060 2.2622"""
    n, centre = len(values), mean(values)
    half = Number(STUDENT[n - 2]) * sqrt(variance(values, 1)) / sqrt(number(n))
    return [centre, centre - half, centre + half]


def rows_of_seeds(dice):
    cases = [("all alike: no width", [[0.25, 0.5]] * 3), ("large", [[1e6], [3e6]])]
    for n in range(2, 11):
        cases.append((f"{n} seeds", decimals(dice, n, 4, low=-1, high=1)))
    cases.append(("one problem", decimals(dice, 3, 1, low=-1, high=1)))
    cases.append(("close to 0", decimals(dice, 3, 4, low=-0.05, high=0.05)))
    return [(note, {"differences": rows}) for note, rows in cases]


@vectors("intervals.verdict", rows_of_seeds)
def verdict(differences):
    """[mean, mean − t s / √n, mean + t s / √n] of the mean of each of n rows, a row a
    seed, as over_seeds (the word follows from the last two; of one row the interval is
    drawn)"""
    return over_seeds([mean(row) for row in differences])


# evaluation

TABLES = {  # note: N problems, n answers, k, chance of a right one
    "one answer": (2, 1, 1, 0.5),
    "k = n": (2, 3, 3, 0.5),
    "k = 1": (3, 4, 1, 0.5),
    "all right": (2, 4, 2, 1.0),
    "all wrong": (2, 4, 2, 0.0),
    "mostly wrong": (4, 6, 2, 0.2),
    "mostly right": (4, 6, 2, 0.8),
    "two answers": (5, 2, 2, 0.5),
    "k = 3 of 5": (3, 5, 3, 0.5),
    "k = 4 of 8": (3, 8, 4, 0.5),
    "k = 2 of 12": (2, 12, 2, 0.3),
    "k = 6 of 12": (2, 12, 6, 0.3),
    "n - 1 of n": (3, 5, 4, 0.5),
}


def tables(dice):
    cases = []
    for note, (N, n, k, chance) in TABLES.items():
        correct = [[dice.random() < chance for _ in range(n)] for _ in range(N)]
        cases.append((note, {"correct": correct, "k": k}))
    return cases


def share(holds, row, k) -> Number:
    """Of all k among the row's answers, the share of which this holds."""
    subsets = list(combinations(row, k))
    return number(sum(map(holds, subsets))) / len(subsets)


@vectors("evaluation.pass_at_k", tables)
def pass_at_k(correct, k):
    """per problem: of all subsets of k answers, the share with a right one"""
    return [share(any, row, k) for row in correct]


@vectors("evaluation.dead_share", tables)
def dead_share(correct, k):
    """of all subsets of k answers, the share all right or all wrong; mean over problems
    (the value; its interval is drawn)"""
    return mean([share(lambda c: all(c) == any(c), row, k) for row in correct])


@vectors("evaluation.smoothed_success", tables)
def smoothed_success(correct):
    """(right + 1/2) / (n + 1) per problem"""
    return [(number(sum(row)) + ONE / 2) / (len(row) + 1) for row in correct]


VOTES = table(
    "votes gold k",
    ("one vote", [["7"], ["8"]], ["7", "7"], 1),
    ("all agree", [["7", "7", "7"]], ["7"], 3),
    ("k = 1: the share of right ones", [["7", "8", "7", "9"]], ["7"], 1),
    ("a tie goes to the first", [["7", "8"], ["8", "7"]], ["7", "7"], 2),
    ("nobody votes", [[None, None, None]], ["7"], 2),
    ("who abstains does not count", [[None, "7", None]], ["7"], 3),
    ("... and leaves a tie", [["8", None, "7"]], ["7"], 3),
    ("the majority is wrong", [["8", "8", "7"]], ["7"], 3),
    ("runs wrap round", [["7", "8", "8", "7"]], ["7"], 2),
    ("nobody is right", [["8", "9", "8"]], ["7"], 2),
)


def votes(dice):
    cases = VOTES(dice)
    for n, k in ((5, 3), (6, 4), (8, 5), (7, 7)):
        said = "7", "7", "8", "9", None
        drawn = [[dice.choice(said) for _ in range(n)] for _ in range(2)]
        cases.append((f"{k} of {n}", {"votes": drawn, "gold": ["7", "8"], "k": k}))
    return cases


@vectors("evaluation.maj_at_k", votes)
def maj_at_k(votes, gold, k):
    """per problem: of the n runs of k neighbours, wrapping round, the share whose most
    frequent vote is gold; null abstains, a tie goes to the vote seen first"""
    shares = []
    for row, right in along(votes, gold):
        wins, n = 0, len(row)
        for start in range(n):
            run = [row[(start + i) % n] for i in range(k)]
            cast = [vote for vote in run if vote is not None]
            most = max(Counter(cast).values(), default=0)
            first = [vote for vote in cast if cast.count(vote) == most][:1]
            wins += first == [right]
        shares.append(number(wins) / n)
    return shares


def bests(dice):
    cases = []
    for note, K, n, pool in (
        ("one answer", 1, 1, None),
        ("n = 1: the mean", 4, 1, (0.1, 0.2, 0.3)),
        ("n = K: the best", 4, 4, None),
        ("all scores equal: the mean", 4, 2, (0.5,)),
        ("n = 2 of 4", 4, 2, None),
        ("n = 2 of 4, ties", 4, 2, (0.0, 1.0)),
        ("n = 3 of 5", 5, 3, None),
        ("n = 3 of 5, ties", 5, 3, (-1.0, 0.0, 1.0)),
        ("n = 4 of 8", 8, 4, None),
        ("n = 4 of 8, ties", 8, 4, (0.0, 0.5, 1.0)),
        ("n = 2 of 10", 10, 2, None),
        ("n = K - 1", 6, 5, None),
        ("K = 2", 2, 2, None),
    ):
        values, scores = decimals(dice, 2, 2, K, low=-2, high=2)
        if pool:
            scores = [[dice.choice(pool) for _ in row] for row in scores]
        cases.append((note, {"scores": scores, "values": values, "n": n}))
    return cases


@vectors("evaluation.best_of_n", bests)
def best_of_n(scores, values, n):
    """per problem: mean over all subsets of n answers of the value of the highest
    score, of equal scores the mean value"""

    def winner(chosen):
        top = max(score for score, _ in chosen)
        return mean([value for score, value in chosen if not score < top])

    every = [combinations(list(along(*rows)), n) for rows in along(scores, values)]
    return [mean([winner(chosen) for chosen in subsets]) for subsets in every]


VARIED = table(
    "rewards",
    ("all equal: 0", [[0.5, 0.5], [0.5, 0.5]]),
    ("only between problems: 1", [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    ("only within problems: below 0", [[1.0, 0.0], [0.0, 1.0]]),
    ("graded", [[0.1, 0.9, 0.35], [2.0, -1.0, 0.5]]),
    ("far from 0", [[100.1, 100.4], [100.2, 100.7]]),
)


def spreads(dice):
    cases = VARIED(dice)
    for N, K in ((2, 2), (2, 4), (3, 2), (4, 4), (3, 8), (6, 3), (2, 8), (5, 5)):
        rewards = [[float(dice.random() < 0.5) for _ in range(K)] for _ in range(N)]
        rewards[0][0], rewards[0][1] = 0.0, 1.0  # not all equal
        cases.append((f"{N} problems, K = {K}, right or wrong", {"rewards": rewards}))
    return cases


@vectors("evaluation.reward_variance_share", spreads)
def reward_variance_share(rewards):
    """between / (between + within): within = mean over problems of Var (divisor K − 1),
    between = Var of the problems' means (divisor N − 1) − within / K; 0 if all are
    equal (the value; its interval is drawn)"""
    if alike(flat(rewards)):
        return ZERO
    within = mean([variance(row, 1) for row in rewards])
    between = variance([mean(row) for row in rewards], 1) - within / len(rewards[0])
    return between / (between + within)


NOISE = table(
    "gradients answers",
    ("opposite: below 0", [[1.0, -1.0], [-1.0, 1.0]], 4),
    ("one weight is still", [[1.0, 0.0], [2.0, 0.0]], 4),
    ("a strong signal", [[10.0, 10.0], [10.0, 10.5]], 1),
)


def noises(dice):
    cases = NOISE(dice)
    for M, W, size, count in (
        (2, 1, 1, 1),
        (2, 3, 1, 8),
        (3, 2, 1, 4),
        (4, 4, 1, 64),
        (8, 2, 1, 1),
        (3, 5, 0.1, 256),
        (2, 2, 100, 2),
        (5, 3, 1, 16),
        (6, 1, 1, 32),
    ):
        rows = decimals(dice, M, W, low=-0.5 * size, high=size)
        inputs = {"gradients": rows, "answers": count}
        cases.append((f"{M} batches of {count}, {W} weights", inputs))
    return cases


@vectors("evaluation.signal_to_noise", noises)
def signal_to_noise(gradients, answers):
    """(|mean row|² − v / M) / (v · answers), v = Σ over columns of Var (divisor M − 1)
    of the M rows"""
    turned = list(along(*gradients))
    v = total(variance(column, 1) for column in turned)
    signal = total(mean(column) ** 2 for column in turned) - v / len(gradients)
    return signal / (v * answers)


@vectors(
    "evaluation.binary_kl",
    table(
        "a p",
        ("equal: 0", [0.3, 0.5], [0.3, 0.5]),
        ("three", [0.123, 0.5, 0.98], [0.4, 0.777, 0.2]),
        ("numbers, no lists", 0.7, 0.2),
        ("one p for all", [0.1, 0.4, 0.95], 0.4),
        ("one a for all", 0.6, [0.25, 0.61, 0.9]),
        ("a = 0 and a = 1", [0.0, 1.0], [0.25, 0.25]),
        ("0 from 0, 1 from 1", [0.0, 1.0], [0.0, 1.0]),
        ("out of reach: inf", [0.5, 0.5, 1.0], [0.0, 1.0, 0.0]),
        ("rare", [1e-6, 1e-3], [1e-9, 1e-9]),
        ("nearly sure", [0.999999], [0.5]),
        ("a little more", [0.51], [0.5]),
        ("two rows", [[0.1, 0.9], [0.5, 0.2]], [[0.2, 0.8], [0.25, 0.75]]),
    ),
)
def binary_kl(a, p):
    """a log(a / p) + (1 − a) log((1 − a) / (1 − p)), 0 log 0 = 0"""
    if isinstance(a, list) or isinstance(p, list):
        n = len(a if isinstance(a, list) else p)
        both = [x if isinstance(x, list) else [x] * n for x in (a, p)]
        return [binary_kl(*pair) for pair in along(*both)]
    nats = ZERO
    for mine, theirs in ((a, p), (1 - a, 1 - p)):
        if mine > 0:
            if not theirs > 0:
                return Number("Infinity")
            nats = nats + mine * log(mine / theirs)
    return nats


SUCCESS = {
    "one problem": [0.5],
    "hard and easy": [0.1, 0.9],
    "equal": [0.3, 0.3, 0.3],
    "rates of 0 and 1 stay": [0.0, 1.0, 0.4],
    "three": [0.2, 0.55, 0.75],
    "rare": [0.001, 0.01],
    "nearly solved": [0.99, 0.999],
}


def tilted(p: Number, shrink: Number) -> Number:
    return p / (p + (1 - p) * shrink) if p > 0 else ZERO


def bought(success, shrink):
    """(mean KL, mean accuracy) of the policy base x e^(l reward) / Z, shrink = e^-l."""
    best = [tilted(p, shrink) for p in success]
    return mean([binary_kl(*pair) for pair in along(best, success)]), mean(best)


def curves(dice):
    cases = [(note, {"success": p, "points": 5}) for note, p in SUCCESS.items()]
    for n in (2, 3, 4, 7, 9):
        success = decimals(dice, 4, low=0.05, high=0.95)
        cases.append((f"{n} points", {"success": success, "points": n}))
    return cases


@vectors("evaluation.frontier", curves)
def frontier(success, points):
    """[mean KL, mean accuracy], means over problems, at steps i = 0 .. points − 1: a =
    p / (p + (1 − p) e), e = (1 − i / (points − 1))³, a = 0 where p = 0, KL = a log(a /
    p) + (1 − a) log((1 − a) / (1 − p))"""
    steps = [(1 - number(i) / (points - 1)) ** 3 for i in range(points)]
    return [list(column) for column in along(*(bought(success, e) for e in steps))]


BUDGETS = table(
    "success kl",
    ("more than all can use", [0.5, 0.2, 0.0], 50.0),
    ("nothing can move", [0.0, 1.0], 1.0),
)


def budgets(dice):
    cases = BUDGETS(dice)
    nats = 0.1, 0.3, 0.05, 0.2, 0.5, 1.0, 0.001
    for (note, success), kl in along(SUCCESS.items(), nats):
        cases.append((f"{note}, {kl} nats", {"success": success, "kl": kl}))
    for kl in (0.01, 0.1, 0.4):
        success = decimals(dice, 4, low=0.05, high=0.95)
        cases.append((f"four, {kl} nats", {"success": success, "kl": kl}))
    return cases


@vectors("evaluation.frontier_at", budgets)
def frontier_at(success, kl):
    """mean of a at the largest l ≥ 0 with mean KL ≤ kl, means over problems, a = p / (p
    + (1 − p) e^−l), a = 0 where p = 0, KL = a log(a / p) + (1 − a) log((1 − a) / (1 −
    p))"""
    low, high = ZERO, Number(60)
    for _ in range(80):  # halvings: 60 / 2^80 is nothing, and so is e^-60
        middle = (low + high) / 2
        over = kl < bought(success, exp(-middle))[0]
        low, high = (low, middle) if over else (middle, high)
    return bought(success, exp(-low))[1]


# From cases to files


def lifted(x, path, leaf: bool):
    """Floats as Numbers, each of slope 1 in itself if it is a leaf."""
    if isinstance(x, list):
        return [lifted(y, (*path, i), leaf) for i, y in enumerate(x)]
    if isinstance(x, float):
        return Number(x, {path: Decimal(1)} if leaf else None)
    return x


def plain(x):
    """Numbers as floats, rounded once; infinity as text, for JSON has none."""
    if isinstance(x, list):
        return [plain(y) for y in x]
    if not isinstance(x, Number):
        return x
    return float(x.value) + 0.0 if x.value.is_finite() else "inf"  # + 0.0: no -0.0


def holds_numbers(x) -> bool:
    """And not choices or counts, which no gradient passes."""
    while isinstance(x, list) and x:
        x = x[0]
    return isinstance(x, Number)


def weights_like(dice, x):
    if isinstance(x, list):
        return [weights_like(dice, y) for y in x]
    return dice.choice(UPSTREAM)


def weighed(weights, output) -> Number:
    if isinstance(output, list):
        return total(weighed(*pair) for pair in along(weights, output))
    return Number(weights) * output


def slopes_like(x, path, slopes):
    if isinstance(x, list):
        return [slopes_like(y, (*path, i), slopes) for i, y in enumerate(x)]
    return float(slopes.get(path, 0)) + 0.0


def evaluated(dice, name: str, note: str, inputs: dict) -> dict:
    """A case with what is expected of it."""
    oracle, by = VECTORS[name].oracle, VECTORS[name].by
    inputs = {each: inputs[each] for each in inspect.signature(oracle).parameters}
    call = {each: lifted(x, (each,), each in by) for each, x in inputs.items()}
    output = oracle(**call)
    case = {"note": note, "inputs": inputs, "expected": plain(output)}
    differentiable = not name.startswith(STATISTICS)
    if differentiable and isinstance(output, list) and holds_numbers(output):
        # Where no argument has a gradient too: weighed evenly, slopes that leak through
        # a sum of 0, such as that of centred advantages, would cancel unseen.
        case["upstream"] = weights_like(dice, output)
    if by and "upstream" in case:
        output = weighed(case["upstream"], output)
    gradients = {each: slopes_like(inputs[each], (each,), output.slopes) for each in by}
    return case | {"gradients": gradients}


def cases(name: str) -> list[dict]:
    """All cases of module.function, the same on every machine."""
    dice = random.Random(f"golden/{FIRST_NAMES.get(name, name)}")
    with localcontext(PRECISION):
        return [evaluated(dice, name, *drawn) for drawn in VECTORS[name].draw(dice)]


def as_json(x) -> str:
    return json.dumps(x, ensure_ascii=False, allow_nan=False)


def files() -> dict[str, str]:
    """File name -> text: one file a module, one case a line."""
    modules = {}
    for name, vectors_of_one in VECTORS.items():
        module, function = name.split(".")
        head = as_json({"function": function, "equation": vectors_of_one.equation})
        lines = ",\n".join(map(as_json, cases(name)))
        entry = f'{head[:-1]}, "cases": [\n{lines}\n]}}'
        modules.setdefault(module, []).append(entry)
    texts = {}
    for module, entries in modules.items():
        every = ",\n".join(entries)
        texts[f"{module}.json"] = (
            f'{{"module": "{module}", "functions": [\n{every}\n]}}\n'
        )
    return texts


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{FOLDER / name}: {len(text.encode()):,} bytes")
