"""How good is a policy?

Three steps. `sample_answers` draws K answers to each of N problems. A function per
question (`pass_at_k`, `maj_at_k`, `best_of_n`, or plain `answers.correct.mean(1)`)
turns them into one number per problem. `bootstrap`, of minialign/intervals.py, turns
those into an `Estimate`: the mean with its 95 % interval.

    answers = sample_answers(model, tokenizer, problems, samples=8, generator=generator)
    print(bootstrap(pass_at_k(answers.correct, 4)))  # such as 0.871 [0.852, 0.889]

Accuracy is half of the story. `measured_kl` says how far the policy moved from the base
to get there, and `frontier` which accuracy that distance could buy at best.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minialign.checks import check_rows
from minialign.intervals import Estimate, bootstrap, check_numbers
from minialign.logprobs import (
    Model,
    exact_kl,
    masked_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import (
    STYLES,
    Problem,
    extract_answer,
    is_formatted,
    style_of,
    verify,
)
from minialign.sampling import Rollout, generate
from minialign.tokenizer import Tokenizer

# --- drawing answers ----------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """K answers to each of N problems, judged; every field but the first is (N, K).

    An answer that did not end is wrong, without format or vote, and of style "other".
    """

    problems: Sequence[Problem]
    texts: list[list[str]]  # up to EOS
    correct: np.ndarray  # bool
    formatted: np.ndarray  # bool: holds an answer, right or wrong
    truncated: np.ndarray  # bool: no EOS within the budget
    lengths: np.ndarray  # int64: tokens, EOS and forced ones included
    styles: list[list[str]]  # one of STYLES, "skill" or "other"
    votes: list[list[Fraction | str | None]]  # what it says, for maj_at_k


def sample_answers(
    model: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    samples: int,
    *,
    temperature: float = 1.0,
    greedy: bool = False,
    first_token: str | None = None,
    max_new_tokens: int = 128,
    batch_rows: int = 1024,
    generator: torch.Generator | None = None,
) -> Answers:
    """Draw `samples` answers to each problem and judge them.

    `first_token` is text that every answer is made to begin with, and counts in texts,
    lengths and budget. It must be cut as the tokenizer cuts real answers: "<<" forces
    work and "#### ", with its space, forbids it. About `batch_rows` answers are in the
    making at a time. On a terminal, a progress bar shows after two seconds.

    Raises: ValueError for no problems, samples or batch_rows below 1, several greedy
        samples, a first_token that leaves no budget; and what `generate` raises.
    """
    if not problems or samples < 1 or batch_rows < 1:
        raise ValueError(
            f"sample_answers: got {len(problems)} problems, samples {samples} and "
            f"batch_rows {batch_rows}; each must be at least 1"
        )
    if greedy and samples != 1:
        raise ValueError(
            f"sample_answers: greedy answers are all alike; ask for 1, not {samples}"
        )
    forced = [] if first_token is None else tokenizer.encode(first_token)
    if first_token is not None and not 0 < len(forced) < max_new_tokens:
        raise ValueError(
            f"sample_answers: first_token {first_token!r} is {len(forced)} tokens; a "
            f"budget of {max_new_tokens} allows 1 to {max_new_tokens - 1}"
        )
    drawn: list[list[_Judged]] = []  # (N, K)
    step = max(1, batch_rows // samples)
    starts = range(0, len(problems), step)
    for start in tqdm(starts, "answers", delay=2, leave=False, disable=None):
        batch = problems[start : start + step]
        rollout = generate(
            model,
            [tokenizer.encode_prompt(problem.question) + forced for problem in batch],
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_new_tokens=max_new_tokens - len(forced),
            samples=samples,
            temperature=temperature,
            greedy=greedy,
            generator=generator,
        )
        responses = rollout.responses()
        truncated = rollout.truncated.tolist()
        for index, problem in enumerate(batch):
            judged = []
            for row in range(index * samples, (index + 1) * samples):
                ids = forced + responses[row]
                judged.append(_judge(tokenizer, problem, ids, truncated[row]))
            drawn.append(judged)

    def column(field: str) -> list[list]:
        return [[getattr(answer, field) for answer in answers] for answers in drawn]

    return Answers(
        problems,
        texts=column("text"),
        correct=np.array(column("correct")),
        formatted=np.array(column("formatted")),
        truncated=np.array(column("truncated")),
        lengths=np.array(column("length")),
        styles=column("style"),
        votes=column("vote"),
    )


@dataclass(frozen=True)
class _Judged:
    """One answer: what stands at its place in each table of `Answers`."""

    text: str
    correct: bool
    formatted: bool
    truncated: bool
    length: int
    style: str
    vote: Fraction | str | None


def _judge(
    tokenizer: Tokenizer, problem: Problem, ids: list[int], truncated: bool
) -> _Judged:
    text = tokenizer.decode_response(ids)
    if truncated:
        return _Judged(
            text,
            correct=False,
            formatted=False,
            truncated=True,
            length=len(ids),
            style="other",
            vote=None,
        )
    # The second skill's answers, whose gold is a str, vote with their whole text.
    is_skill = isinstance(problem.gold, str)
    return _Judged(
        text,
        correct=verify(problem, text),
        formatted=is_formatted(problem, text),
        truncated=False,
        length=len(ids),
        style=style_of(problem, text),
        vote=text.strip() if is_skill else extract_answer(text),
    )


# --- one number per problem ---------------------------------------------------------


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that k answers hold a right one: 1 - C(n - c, k) / C(n, k), unbiased.

    The average over all subsets of k among the n answers, of which c are right.

    Shapes: (N, n) bool -> (N,). Raises: TypeError, ValueError unless 1 <= k <= n.
    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    correct = _right_or_wrong("pass_at_k", correct)
    n = correct.shape[1]
    _check_k("pass_at_k: k", k, n)
    by_count = [1 - Fraction(comb(n - c, k), comb(n, k)) for c in range(n + 1)]
    return np.array(by_count, dtype=float)[correct.sum(1)]


def maj_at_k(
    votes: Sequence[Sequence[Hashable]], gold: Sequence[Hashable], k: int
) -> np.ndarray:
    """How often the most frequent of k answers is right (self-consistency).

    None abstains; without any vote the result is wrong; a tie goes to the answer seen
    first. Averaged over every run of k neighbours among the n answers, wrapping round:
    each run is k independent draws, so the average is unbiased, and needs no seed.

    Shapes: votes (N, n), gold (N,) -> (N,). Raises: ValueError unless 1 <= k <= n.
    Source: Wang et al. 2022 (arXiv 2203.11171).
    """
    lengths = {len(row) for row in votes}
    if len(votes) != len(gold) or len(lengths) != 1:
        raise ValueError(
            f"maj_at_k: votes must be (N, n) and gold (N,), got {len(votes)} rows of "
            f"lengths {sorted(lengths)} and {len(gold)} gold answers"
        )
    n = lengths.pop()
    _check_k("maj_at_k: k", k, n)
    share = []
    for row, right in zip(votes, gold, strict=True):
        # Small numbers for the answers, from 1 on: a Fraction hashes slowly.
        known = {None: None}
        ring = [known.setdefault(vote, len(known)) for vote in row] * 2
        wanted = known.get(right, 0)  # nobody's number, where nobody is right
        wins = 0
        for start in range(n):
            wins += _winner(ring[start : start + k]) == wanted
        share.append(wins / n)
    return np.array(share)


def _winner(votes: Sequence[int | None]) -> int | None:
    # Counter keeps the order of first appearance, and max the first of equals.
    counts = Counter(vote for vote in votes if vote is not None)
    return max(counts, key=counts.get) if counts else None


def best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the answer with the highest score among n, unbiased.

    The average over all subsets of n among the K answers: with scores in rising order
    the i-th is the best of C(i - 1, n - 1) out of C(K, n). Equal scores share evenly.
    `values` may be `correct`, or `scores` again for the expected maximum.

    Shapes: (N, K), (N, K) -> (N,). Units: of values.
    Raises: ValueError unless shapes agree, all is finite and 1 <= n <= K.
    """
    scores = check_numbers("best_of_n: scores", scores, 2)
    values = check_numbers("best_of_n: values", values, 2)
    if scores.shape != values.shape:
        raise ValueError(f"best_of_n: scores {scores.shape}, values {values.shape}")
    K = scores.shape[1]
    _check_k("best_of_n: n", n, K)
    # The chance that a whole subset lies among the i lowest.
    below = np.array([Fraction(comb(i, n), comb(K, n)) for i in range(K + 1)], float)
    expected = []
    for row, worth in zip(scores, values, strict=True):
        _, group, size = np.unique(row, return_inverse=True, return_counts=True)
        top = size.cumsum()
        weight = (below[top] - below[top - size]) / size  # (distinct scores,)
        expected.append(weight[group] @ worth)
    return np.array(expected)


# --- what answers are like ---------------------------------------------------------


def summary(answers: Answers, *, seed: int = 0) -> dict[str, Estimate]:
    """The headline numbers: accuracy, format, truncated, length, share of each style.

    Units: length in tokens, all else shares in [0, 1]. Raises: as `bootstrap`.
    """
    tables = {
        "accuracy": answers.correct,
        "format": answers.formatted,
        "truncated": answers.truncated,
        "length": answers.lengths,
    }
    styles = np.array(answers.styles)  # (N, K)
    tables |= {style: styles == style for style in (*STYLES, "skill", "other")}
    return {name: bootstrap(x.mean(1), seed=seed) for name, x in tables.items()}


def style_shares(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
    """Share of each style among answers: text i answers problem i. Units: [0, 1].

    "other" is all else, second-skill answers too: the shares sum to 1.
    """
    if not texts or len(texts) != len(problems):
        found = f"{len(texts) or 'no'} texts for {len(problems)} problems"
        raise ValueError(f"style_shares: {found}; there must be one for each")
    pairs = zip(problems, texts, strict=True)
    counts = Counter(style_of(problem, text) for problem, text in pairs)
    counts["other"] += counts["skill"]
    names = (*STYLES, "other")
    return {f"style_{name}": counts[name] / len(texts) for name in names}


def answer_metrics(
    problems: Sequence[Problem], rollout: Rollout, rewards: Tensor, tokenizer: Tokenizer
) -> dict[str, float]:
    """What every algorithm reports of the answers it drew, before learning from them.

    reward          mean over answers
    truncated       share of answers that did not end
    length          mean tokens of an answer, its end included
    entropy         nats per token, of the policy that drew: mean −log π of its tokens
    style_<name>    share of answers; what was cut is "other"

    Shapes: P problems, a rollout of P x K answers, rewards of as many.
    Raises: ValueError for other numbers of either.
    """
    counts = {"problems": len(problems) * rollout.samples, "rewards": rewards.numel()}
    for name, count in counts.items():
        if count != len(rollout.tokens):
            answers = f"{count} answers; the rollout has {len(rollout.tokens)}"
            raise ValueError(f"answer_metrics: {name} of {answers}")
    texts = []
    for ids, cut in zip(rollout.responses(), rollout.truncated.tolist(), strict=True):
        texts.append("" if cut else tokenizer.decode_response(ids))
    nats = -rollout.logprobs.double().sum()
    tokens = rollout.mask.sum()
    return {
        "reward": rewards.mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
        "length": rollout.lengths().float().mean().item(),
        "entropy": (nats / tokens).item(),
        **style_shares(rollout.repeated(problems), texts),
    }


def working_of(text: str) -> tuple[str, ...]:
    """The calculations of an answer, in their order: ("3*5=15", "15+12=27").

    Two answers with the same calculations are worked alike, whatever else they say.
    """
    return tuple(re.findall(r"<<([^<>]*)>>", text))


def _right_workings(answers: Answers) -> list[list[tuple[str, ...]]]:
    """For each problem, the workings of its right answers; a terse one has none."""
    found = []
    for texts, correct in zip(answers.texts, answers.correct, strict=True):
        workings = []
        for text, right in zip(texts, correct, strict=True):
            working = working_of(text)
            if right and working:
                workings.append(working)
        found.append(workings)
    return found


def distinct_workings(answers: Answers) -> np.ndarray:
    """How many different workings lead to the right result, among K answers to each.

    Shapes: -> (N,). Units: workings, 0 to K. It grows with K: compare at equal K.
    """
    counts = [len(set(workings)) for workings in _right_workings(answers)]
    return np.array(counts, dtype=float)


def workings_differ(answers: Answers) -> np.ndarray:
    """The chance that two right answers to one problem are worked differently.

    Over all pairs of a problem's right answers that show a working, which is unbiased
    for any number of answers. NaN for a problem with fewer than two of them: draw so
    many answers that hardly any is left out, or those left are the easy ones.

    Shapes: -> (N,). Units: [0, 1], or NaN.
    """
    chances = []
    for workings in _right_workings(answers):
        n = len(workings)
        if n < 2:
            chances.append(math.nan)
            continue
        alike = sum(comb(count, 2) for count in Counter(workings).values())
        chances.append(1 - alike / comb(n, 2))
    return np.array(chances)


def reward_variance_share(rewards: np.ndarray, *, seed: int = 0) -> Estimate:
    """Which share of the rewards' variance lies between problems: between / total.

    within = mean over problems of the variance among K rewards (divisor K - 1);
    between = Var(problem means) - within / K, as a mean of K carries noise of its own.
    Each is unbiased, so the share may come out below 0. Without variance it is 0.

    Shapes: (N, K), both at least 2. Raises: ValueError.
    """
    rewards = check_numbers("reward_variance_share: rewards", rewards, 2)
    N, K = rewards.shape
    if N < 2 or K < 2:
        raise ValueError(
            f"reward_variance_share: rewards of {N} problems x {K} samples; at least "
            "2 problems and 2 samples per problem are needed"
        )
    rewards = rewards - rewards[0, 0]  # equal rewards become exact zeros
    means = rewards.mean(1)  # (N,)

    def share(columns: np.ndarray) -> np.ndarray:
        mean = columns[..., 0]
        square = columns[..., 1]
        within = columns[..., 2]
        between = (square - mean**2) * N / (N - 1) - within / K
        total = between + within
        return np.divide(between, total, out=np.zeros_like(total), where=total > 0)

    columns = np.stack([means, means**2, rewards.var(1, ddof=1)], 1)  # (N, 3)
    return bootstrap(columns, statistic=share, seed=seed)


def policy_gradient(policy: GPT, rollout: Rollout, weights: Tensor) -> Tensor:
    """Mean over answers of weight x ∇ log π(answer), as one long vector.

    Shapes: weights (B,), one per answer of the rollout -> (number of parameters,).
    Raises: ValueError for weights of another shape or not finite.
    """
    check_rows("weights", weights.to(rollout.mask.device).double(), rollout.mask)
    logprobs = token_logprobs(
        policy, rollout.tokens, rollout.mask, rollout.temperature
    )  # (B, S)
    mean = (weights.to(logprobs) * masked_sum(logprobs, rollout.mask)).mean()
    gradients = torch.autograd.grad(mean, list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def signal_to_noise(gradients: Tensor, answers: int) -> float:
    """|E g|² / Var(g) of one answer's policy gradient g, from M independent batches.

    The rows are the mean gradients of batches of `answers` answers each, so their
    variance, summed over weights, is Var(g) / answers. |E g|² is the squared mean less
    what noise adds to it, hence unbiased, and may come out below 0.

    Shapes: gradients (M, weights), M at least 2. Raises: ValueError.
    """
    if not gradients.isfinite().all():
        raise ValueError("signal_to_noise: gradients must be finite")
    if gradients.dim() != 2 or len(gradients) < 2 or answers < 1:
        raise ValueError(
            f"signal_to_noise: gradients must be (M >= 2, weights) and answers >= 1, "
            f"got {tuple(gradients.shape)} and {answers}"
        )
    variance = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - variance / len(gradients)
    return (signal / (variance * answers)).item()


def dead_share(correct: np.ndarray, k: int | None = None, *, seed: int = 0) -> Estimate:
    """Share of groups of k answers (k = n unless given) all right or all wrong.

    (C(c, k) + C(n - c, k)) / C(n, k), mean over problems: within such a group there is
    nothing to compare.

    Shapes: (N, n) bool. Raises: TypeError, ValueError unless 1 <= k <= n.
    """
    correct = _right_or_wrong("dead_share", correct)
    n = correct.shape[1]
    k = n if k is None else k
    _check_k("dead_share: k", k, n)
    ways = [Fraction(comb(c, k) + comb(n - c, k), comb(n, k)) for c in range(n + 1)]
    return bootstrap(np.array(ways, dtype=float)[correct.sum(1)], seed=seed)


# --- accuracy against KL ------------------------------------------------------------


def binary_kl(a: np.ndarray, p: np.ndarray) -> np.ndarray:
    """kl(a ‖ p) = a log(a / p) + (1 - a) log((1 - a) / (1 - p)), limits exact.

    A policy that is right with chance a where the base has p is at least this far from
    it, KL(policy ‖ base) >= kl(a ‖ p): merging answers into right and wrong loses KL.

    Shapes: equal, or one a number. Units: nats; inf where p is 0 or 1 and a is not.
    Raises: ValueError outside [0, 1].
    """
    a = _chances("binary_kl: a", a)
    p = _chances("binary_kl: p", p)
    if a.shape != p.shape and a.ndim and p.ndim:
        raise ValueError(f"binary_kl: a is {a.shape}, p is {p.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0, and 0 x inf
        right = np.where(a > 0, a * (np.log(a) - np.log(p)), 0.0)
        wrong = np.where(a < 1, (1 - a) * (np.log1p(-a) - np.log1p(-p)), 0.0)
    return np.maximum(right + wrong, 0.0)


def smoothed_success(correct: np.ndarray) -> np.ndarray:
    """(c + 1/2) / (n + 1): success rates for `frontier` that are never 0 or 1.

    A rate of 0 or 1 is locked, no KL moves it, and of rates estimated as c / n many are
    0 or 1 by chance alone. Half a success and half a failure unlock them.

    Shapes: (N, n) bool -> (N,). Source: the posterior mean under Jeffreys' prior.
    """
    correct = _right_or_wrong("smoothed_success", correct)
    return (correct.sum(1) + 0.5) / (correct.shape[1] + 1)


def frontier(success: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The best mean accuracy at each mean KL from a base with these success rates.

    Maximise Σ l a_i - kl(a_i ‖ p_i), concave: 0 = l - logit a_i + logit p_i, hence
    a_i = p_i e^l / (p_i e^l + 1 - p_i), one multiplier l for all, as one budget binds.

    That is the policy base x e^(l reward) / Z, the optimum of E[R] - KL / l. Rates of 0
    and 1 stay. Rates are taken as exact; from few samples, c / n as a rule draws the
    curve too low and `smoothed_success` too high. Some 64 per problem bring them close.

    Shapes: (N,) -> mean KL (points,) from 0 to its limit, mean accuracy (points,).
    Units: nats per answer. Raises: ValueError outside [0, 1] or for points < 2.
    """
    success = check_numbers("frontier: success", success, 1)
    success = _chances("frontier: success", success)
    if points < 2:
        raise ValueError(f"frontier: points must be at least 2, got {points}")
    # e^-l falls from 1 to 0; cubed, for an even curve where hard problems give way.
    shrink = np.linspace(1, 0, points)[:, None] ** 3  # (points, 1)
    best = _tilt(success, shrink)  # (points, N)
    kl = binary_kl(best, np.broadcast_to(success, best.shape))  # (points, N)
    return kl.mean(1), best.mean(1)


def frontier_at(success: np.ndarray, kl: float) -> float:
    """The best mean accuracy that a mean KL of `kl` nats can buy, found by bisection.

    Shapes: (N,), scalar -> scalar. Raises: as `frontier`, and for kl < 0 or NaN.
    """
    success = check_numbers("frontier_at: success", success, 1)
    success = _chances("frontier_at: success", success)
    if not kl >= 0:
        raise ValueError(f"frontier_at: kl must be at least 0 nats, got {kl}")
    # l from 0 to 60: e^-60 is beyond what any rate that counts can tell from 0.
    low = 0.0
    high = 60.0
    for _ in range(60):
        middle = (low + high) / 2
        if binary_kl(_tilt(success, np.exp(-middle)), success).mean() <= kl:
            low = middle
        else:
            high = middle
    return float(_tilt(success, np.exp(-low)).mean())


def _tilt(success: np.ndarray, shrink: np.ndarray | float) -> np.ndarray:
    """p / (p + (1 - p) e^-l) with shrink = e^-l in [0, 1]; 0 where p is 0."""
    total = success + (1 - success) * shrink
    return np.divide(success, total, out=np.zeros_like(total), where=success > 0)


@torch.no_grad()
def measured_kl(
    model: Model, reference: Model, rollout: Rollout, rows: int = 128
) -> Tensor:
    """KL(model ‖ reference) of each answer: the exact KL at each choice, summed.

    Σ_s KL(model(. | prefix s) ‖ reference(. | prefix s)) over the prefixes visited. For
    answers sampled from `model` the expectation is the KL of whole answers (chain
    rule), as a rule with less noise than summed log-ratios, and no answer counts less
    than 0.

    Shapes: -> (B,). Units: nats, >= 0, both models at the rollout's temperature.
    Reduction: sum over live tokens, `rows` answers at a time. Gradient: none.
    Raises: ValueError for a greedy rollout: its visits are no samples of the policy.
    """
    if rollout.greedy or rows < 1:
        raise ValueError(
            f"measured_kl: needs sampled answers and rows >= 1, got greedy = "
            f"{rollout.greedy}, rows = {rows}"
        )
    temperature = rollout.temperature
    sums = []
    chunks = zip(rollout.tokens.split(rows), rollout.mask.split(rows), strict=True)
    for tokens, mask in chunks:
        read = tokens[:, :-1]
        logits = model.logits(model(read)[mask]) / temperature  # (live, V)
        ref_logits = reference.logits(reference(read)[mask]) / temperature  # (live, V)
        live = exact_kl(logits, ref_logits)  # (live,)
        kl = torch.zeros(mask.shape, dtype=live.dtype, device=live.device)
        sums.append(kl.masked_scatter(mask, live).sum(1))
    return torch.cat(sums).clamp(min=0.0)  # (B,), rounding aside


# --- what is refused ----------------------------------------------------------------


def _right_or_wrong(where: str, correct: np.ndarray) -> np.ndarray:
    correct = np.asarray(correct)
    if correct.dtype != bool:
        raise TypeError(f"{where}: correct must be bool, got {correct.dtype}")
    check_numbers(f"{where}: correct", correct, 2)
    return correct


def _chances(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=float)
    outside = x[~((x >= 0) & (x <= 1))]
    if outside.size:
        raise ValueError(f"{name} must be in [0, 1], got {outside[0]}")
    return x


def _check_k(name: str, k: int, most: int) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"{name} must be 1 to the {most} samples there are, got {k}")
