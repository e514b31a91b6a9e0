"""Evaluation against brute force: every subset, every answer, every resample."""

import copy
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minialign import evaluation
from minialign.evaluation import (
    Answers,
    answer_metrics,
    best_of_n,
    binary_kl,
    dead_share,
    distinct_workings,
    frontier,
    frontier_at,
    maj_at_k,
    measured_kl,
    pass_at_k,
    policy_gradient,
    reward_variance_share,
    sample_answers,
    signal_to_noise,
    smoothed_success,
    style_shares,
    summary,
    working_of,
    workings_differ,
)
from minialign.intervals import bootstrap
from minialign.model import GPT, GPTConfig
from minialign.problems import Problem
from minialign.sampling import Rollout, generate
from minialign.tokenizer import Tokenizer, train_bpe
from tests.properties.evaluation import (
    END,
    PAD,
    SCORES,
    TABLES,
    TINY,
    answer_logprob,
    every_answer,
    mean,
    rollout_of,
    tiny,
)

CHANCES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])


def all_or_none(row):
    return all(row) or not any(row)


# --- one number per problem


@given(TABLES, st.data())
def test_pass_at_k_is_the_average_over_all_subsets(table, data):
    k = data.draw(st.integers(1, len(table[0])))
    expected = [mean(any(s) for s in itertools.combinations(row, k)) for row in table]
    np.testing.assert_allclose(pass_at_k(np.array(table), k), expected, atol=1e-12)


@pytest.mark.parametrize("n, k", [(6, 2), (6, 6), (64, 8)])
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_pass_at_k_is_unbiased_and_the_plug_in_is_not(n, k, p):
    weight = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    counts = np.arange(n + 1)
    every_count = np.arange(n) < counts[:, None]  # (n + 1, n): row c has c right
    truth = 1 - (1 - p) ** k
    assert weight @ pass_at_k(every_count, k) == pytest.approx(truth, abs=1e-12)
    assert abs(weight @ (1 - (1 - counts / n) ** k) - truth) > 1e-3


def test_pass_at_k_from_64_samples():
    one_right = np.arange(64)[None] < 1
    for k in range(1, 65):
        assert pass_at_k(one_right, k)[0] == pytest.approx(k / 64, abs=1e-15)


def majority(votes, gold):
    """The vote with most supporters, the earliest of equals; None has no voice."""
    cast = [vote for vote in votes if vote is not None]
    if not cast:
        return False
    return min(cast, key=lambda v: (-cast.count(v), cast.index(v))) == gold


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_maj_at_k_is_unbiased(k):
    chances = {Fraction(7): 0.4, Fraction(8): 0.35, None: 0.25}

    def expectation(n, statistic):
        return sum(
            math.prod(chances[vote] for vote in votes) * statistic(votes)
            for votes in itertools.product(chances, repeat=n)
        )

    truth = expectation(k, lambda votes: majority(votes, 7))
    estimate = expectation(4, lambda votes: maj_at_k([votes], [7], k)[0])
    assert estimate == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(
    "votes, k, expected",
    [
        ("77788", 5, 1.0),
        ("88877", 5, 0.0),
        ("789", 1, 1 / 3),
        ([7, 8, None], 3, 2 / 3),  # 7 8, 8 7 and 7 8 again: a tie goes to the first
        ([None, None, 7], 3, 1.0),  # two abstain, one decides
        ([None, None, 7], 2, 2 / 3),
        ([None, None, None], 2, 0.0),
        ([Fraction(14, 2), Fraction(7), Fraction(8)], 3, 1.0),
    ],
)
def test_maj_at_k_by_hand(votes, k, expected):
    gold = "7" if isinstance(votes, str) else 7
    assert maj_at_k([votes], [gold], k) == pytest.approx([expected])


def test_nobody_agrees_with_a_gold_answer_of_none():
    assert maj_at_k([[None, 7]], ["no such answer"], 2) == [0.0]


@given(SCORES, st.data())
@example([(0.0, 1.0), (0.0, 0.0), (1.0, 0.0)], None)
def test_best_of_n_is_the_average_over_all_subsets(pairs, data):
    n = data.draw(st.integers(1, len(pairs))) if data else 2

    def winners(subset):
        best = max(score for score, _ in subset)
        return mean(value for score, value in subset if score == best)

    expected = mean(map(winners, itertools.combinations(pairs, n)))
    scores, values = np.array(pairs).T
    assert best_of_n([scores], [values], n)[0] == pytest.approx(expected, abs=1e-10)
    expected = mean(max(s)[0] for s in itertools.combinations(pairs, n))
    assert best_of_n([scores], [scores], n)[0] == pytest.approx(expected, abs=1e-10)


def test_best_of_n_depends_on_the_order_of_scores_alone():
    generator = np.random.default_rng(0)
    scores, values = generator.normal(size=(2, 3, 16))
    for n in (1, 5, 16):
        chosen = best_of_n(scores, values, n)
        assert np.array_equal(chosen, best_of_n(np.exp(3 * scores), values, n))
        assert n == 1 or not np.allclose(chosen, best_of_n(-scores, values, n))
    np.testing.assert_allclose(best_of_n(scores, values, 1), values.mean(1))
    best = scores.argmax(1)
    assert np.array_equal(best_of_n(scores, values, 16), values[range(3), best])


# --- shares


@given(
    st.integers(2, 5).flatmap(
        lambda K: st.lists(
            st.lists(
                st.sampled_from([0.0, 0.1, 0.5, 1.0, -3.0]), min_size=K, max_size=K
            ),
            min_size=2,
            max_size=5,
        )
    )
)
@example([[1.0, 1.0], [1.0, 1.0]])
@example([[0.1] * 3, [0.1] * 3])
def test_reward_variance_share_is_the_analysis_of_variance(table):
    N, K, grand = len(table), len(table[0]), mean(map(mean, table))
    among = K * sum((mean(row) - grand) ** 2 for row in table) / (N - 1)
    inside = sum((x - mean(row)) ** 2 for row in table for x in row) / (N * (K - 1))
    between = (among - inside) / K
    total = between + inside
    assume(abs(total) > 1e-6 or len({x for row in table for x in row}) == 1)
    expected = between / total if total > 1e-6 else 0.0
    share = reward_variance_share(np.array(table))
    assert share.value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("K", [2, 8])
def test_reward_variance_share_of_a_known_population(K):
    generator = np.random.default_rng(0)
    success = generator.beta(1.0, 2.0, size=4_000)  # share 1 / (1 + 1 + 2)
    correct = generator.random((4_000, K)) < success[:, None]
    share = reward_variance_share(correct, seed=1)
    assert share.value == pytest.approx(0.25, abs=0.03)
    assert share.low < 0.25 < share.high and share.high - share.low < 0.12
    naive = correct.mean(1).var() / correct.var()
    assert naive > 0.3
    assert reward_variance_share(3.0 + 10.0 * correct, seed=1).value == pytest.approx(
        share.value
    )


@given(TABLES, st.data())
def test_dead_share_is_the_average_over_all_subsets(table, data):
    n = len(table[0])
    k = data.draw(st.none() | st.integers(1, n))
    groups = [itertools.combinations(row, k or n) for row in table]
    expected = mean(mean(map(all_or_none, group)) for group in groups)
    assert dead_share(np.array(table), k).value == pytest.approx(expected, abs=1e-12)


# --- accuracy against KL


def kl_of(a, p):
    """Σ a log(a / p) over right and wrong, with what cannot happen left out."""
    parts = [(a, p), (1 - a, 1 - p)]
    if any(x > 0 and y == 0 for x, y in parts):
        return math.inf
    return sum(x * math.log(x / y) for x, y in parts if x > 0)


@given(CHANCES, CHANCES)
def test_binary_kl_is_the_sum_over_right_and_wrong(a, p):
    assume(p == 0 or p > 1e-300)
    expected = kl_of(a, p)
    value = float(binary_kl(a, p))
    assert value >= 0
    assert value == pytest.approx(expected, abs=1e-10, rel=1e-10)


def test_binary_kl_has_exact_limits():
    p = np.array([0.25, 0.25, 0.0, 0.0, 1.0, 1.0, 0.25])
    a = np.array([0.0, 1.0, 0.0, 0.5, 1.0, 0.5, 0.25])
    limits = [-math.log(0.75), math.log(4), 0, math.inf, 0, math.inf, 0]
    np.testing.assert_allclose(binary_kl(a, p), limits, rtol=1e-15)
    # Near 0, where 1 - p is 1 in floating point: 2e-20 log 2 - 1e-20.
    expected = 1e-20 * (2 * math.log(2) - 1)
    assert binary_kl(2e-20, 1e-20) == pytest.approx(expected, rel=1e-9, abs=0)
    # And near a = p, where the two parts cancel, rounding never leaves it below 0.
    p = np.linspace(0.001, 0.999, 999)
    assert (binary_kl(p * (1 - 1e-9), p) >= 0).all()


RATES = st.lists(st.floats(0.01, 0.99) | st.sampled_from([0.0, 1.0]), min_size=1)


def allocate(success, direction, budget):
    """Walk from the base along a line until the mean KL is used up or the box ends."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        a = success + middle * (direction - success)
        if binary_kl(a, success).mean() <= budget:
            low = middle
        else:
            high = middle
    return success + low * (direction - success)


@settings(max_examples=40)
@given(RATES, st.floats(1e-4, 3), st.integers(0, 99))
def test_no_other_allocation_of_the_same_kl_does_better(success, kl, seed):
    success = np.array(success)
    best = frontier_at(success, kl)
    live = (success > 0) & (success < 1)
    generator = np.random.default_rng(seed)
    for _ in range(5):
        anywhere = np.where(live, generator.random(len(success)), success)
        assert allocate(success, anywhere, kl).mean() <= best + 1e-9
        # Close to the optimum the search is sharpest: one multiplier per problem.
        odds = success / (1 - success + (success == 1))
        odds = odds * np.exp(generator.normal(1.0, 0.3, len(success)))
        nearby = np.where(live, odds / (1 + odds), success)
        assert allocate(success, nearby, kl).mean() <= best + 1e-9


def test_two_problems_by_grid():
    """The frontier is reached, not only respected: a grid finds the same accuracy."""
    success, budget = np.array([0.1, 0.7]), 0.2
    first = np.linspace(0.1, 1, 2001)[:, None]
    second = np.linspace(0.7, 1, 2001)[None]
    cost = np.vectorize(kl_of)(first, 0.1) + np.vectorize(kl_of)(second, 0.7)
    accuracy = np.where(cost / 2 <= budget, (first + second) / 2, 0)
    best = frontier_at(success, budget)
    assert best - 1e-3 < accuracy.max() <= best


def test_the_frontier_is_the_optimum_of_reward_minus_kl():
    """Tilting whole answers, pi = base e^(l reward) / Z, lands on the curve."""
    generator = np.random.default_rng(0)
    base = generator.dirichlet(np.ones(6), size=4)  # 4 problems with 6 answers each
    right = np.array([[1, 0, 0, 1, 0, 0], [0, 1] + [0] * 4, [1] * 5 + [0], [0] * 6])
    success = (base * right).sum(1)
    for multiplier in (0.0, 0.5, 2.0, 6.0):
        policy = base * np.exp(multiplier * right)
        policy /= policy.sum(1, keepdims=True)
        kl = (policy * np.log(policy / base)).sum(1).mean()
        accuracy = (policy * right).sum(1).mean()
        assert frontier_at(success, max(kl, 0)) == pytest.approx(accuracy)
    for _ in range(200):  # and no policy over answers gets above it
        policy = generator.dirichlet(generator.uniform(0.2, 3, 6), size=4)
        kl = (policy * np.log(policy / base)).sum(1).mean()
        assert (policy * right).sum(1).mean() <= frontier_at(success, kl) + 1e-9


def test_the_curve_starts_at_the_base_and_ends_at_its_limit():
    success = np.array([0.0, 0.02, 0.3, 0.9, 1.0])
    kl, accuracy = frontier(success)
    assert kl.shape == accuracy.shape == (200,)
    assert (kl[0], accuracy[0]) == (0.0, pytest.approx(success.mean()))
    assert accuracy[-1] == 0.8  # the problem never solved stays unsolved
    limit = -(math.log(0.02) + math.log(0.3) + math.log(0.9)) / 5
    assert kl[-1] == pytest.approx(limit)
    assert (np.diff(kl) > 0).all() and (np.diff(accuracy) > 0).all()
    slope = np.diff(accuracy) / np.diff(kl)
    assert (np.diff(slope) < 1e-9).all()  # concave: the first nats buy most
    assert np.diff(kl).max() < 0.05 * limit  # and smooth enough to draw
    for i in (7, 100, 199):
        assert frontier_at(success, kl[i]) == pytest.approx(accuracy[i], abs=1e-9)
    assert frontier_at(success, 0.0) == pytest.approx(success.mean(), abs=1e-7)
    assert frontier_at(success, math.inf) == pytest.approx(0.8)


def test_rates_of_zero_and_one_are_locked_until_smoothed():
    kl, accuracy = frontier([0.0, 1.0])
    assert not kl.any() and (accuracy == 0.5).all()
    assert frontier_at([0.0, 1.0], 5.0) == 0.5
    correct = np.array([[False] * 4, [True] * 4, [True, False, False, False]])
    assert smoothed_success(correct).tolist() == [0.1, 0.9, 0.3]
    assert frontier_at(smoothed_success(correct), 5.0) == pytest.approx(1.0)


# --- measured KL, on every answer a small model can give


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_measured_kl_has_the_kl_of_whole_answers_as_its_expectation(temperature):
    policy, reference, prompts = tiny(0), tiny(1), [[1, 3], [3, 1, 1, 0]]
    rollout, rows = every_answer(prompts, temperature)
    log_policy, log_reference = (
        np.array([answer_logprob(each, *row, temperature) for row in rows])
        for each in (policy, reference)
    )
    chance = np.exp(log_policy)
    assert chance.sum() == pytest.approx(len(prompts))  # every answer is there
    truth = (chance * (log_policy - log_reference)).reshape(2, -1).sum(1)
    measured = measured_kl(policy, reference, rollout).numpy()
    assert measured.shape == (len(rows),) and (measured > 0).all()
    expected = (chance * measured).reshape(2, -1).sum(1)
    np.testing.assert_allclose(expected, truth, atol=1e-10)
    # It is a lower-variance estimate than the log-ratio, and it is not the reverse KL.
    assert (chance * measured**2).sum() < (
        chance * (log_policy - log_reference) ** 2
    ).sum()
    reverse = measured_kl(reference, policy, rollout).numpy()
    assert abs((chance * reverse).sum() - truth.sum()) > 1e-3


def test_measured_kl_does_not_depend_on_chunks_or_padding():
    policy, reference = tiny(0), tiny(1)
    rollout, _ = every_answer([[1, 3], [3, 1, 1, 0]], 1.0)
    whole = measured_kl(policy, reference, rollout)
    for rows in (1, 7, 1000):
        parts = measured_kl(policy, reference, rollout, rows=rows)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert not whole.requires_grad
    assert torch.equal(measured_kl(policy, policy, rollout), torch.zeros_like(whole))
    near = copy.deepcopy(policy).float()
    with torch.no_grad():
        for weight in near.parameters():
            weight *= 1 + 1e-7
    assert (measured_kl(near, copy.deepcopy(policy).float(), rollout) >= 0).all()
    lengths = (rollout.prompt_lengths + rollout.lengths())[:, None]
    padding = torch.arange(rollout.tokens.shape[1]) >= lengths
    rollout.tokens[padding] = 3
    assert torch.equal(measured_kl(policy, reference, rollout), whole)


def test_measured_kl_takes_sampled_answers_only():
    model = tiny(0)
    fields = {"eos_id": END, "pad_id": PAD, "max_new_tokens": 2}
    greedy = generate(model, [[1, 3]], greedy=True, **fields)
    with pytest.raises(ValueError, match="sampled answers.*greedy = True"):
        measured_kl(model, model, greedy)
    sampled = generate(model, [[1, 3]], generator=torch.Generator(), **fields)
    with pytest.raises(ValueError, match="rows = 0"):
        measured_kl(model, model, sampled, rows=0)


# --- drawing answers

TOKENIZER = Tokenizer(train_bpe(["<<1+2=3>>\n#### 3"] * 9, 266))
PROBLEMS = [
    Problem("1 + 2?", Fraction(3), "sum", 1, "a"),
    Problem("What is 1 + 2 + 1?", Fraction(4), "sum", 2, "b"),
    Problem("The larger of 3 and 9?", "9", "larger", 0, "c"),
]
BASE = GPT(
    GPTConfig(**TINY | {"vocab_size": TOKENIZER.n_vocab, "context": 96}),
    torch.Generator().manual_seed(0),
)
SAID = {
    "a": ["#### 3", "<<1+2=3>>\n#### 3", "#### 4", "three"],
    "b": ["<<1+2=3>>\n#### 3", "<<1+2=3>>\n<<3+1=4>>\n#### 4", "#### 4", ""],
    "c": ["9", " 9", "3", "#### 9"],
}


def scripted(monkeypatch, cut=(), forced=""):
    """Answers from SAID instead of a model's, those in `cut` without EOS.

    What `forced` holds was said already. Returns what `generate` was asked.
    """
    calls = []
    said = {
        tuple(TOKENIZER.encode_prompt(problem.question)): SAID[problem.id]
        for problem in PROBLEMS
    }
    before = TOKENIZER.encode(forced)

    def say(model, prompts, **options):
        calls.append((prompts, options))
        rows, truncated = [], []
        for prompt in prompts:
            question = tuple(prompt[: len(prompt) - len(before)])
            for text in said[question][: options["samples"]]:
                ids = TOKENIZER.encode_response(text)
                truncated.append(text in cut)
                rows.append((prompt, ids[:-1] if text in cut else ids))
        return rollout_of(rows, truncated, options["samples"])

    monkeypatch.setattr(evaluation, "generate", say)
    return calls


def test_answers_are_judged_one_by_one(monkeypatch):
    scripted(monkeypatch)
    answers = sample_answers(None, TOKENIZER, PROBLEMS, 4)
    assert answers.texts == list(SAID.values())
    assert answers.correct.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [True, True, False, False],
    ]
    assert answers.formatted.tolist() == [
        [True, True, True, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert not answers.truncated.any()
    assert answers.lengths.tolist() == [
        [len(TOKENIZER.encode(text)) + 1 for text in texts] for texts in SAID.values()
    ]
    assert answers.styles == [
        ["terse", "worked", "terse", "other"],
        ["careless", "worked", "terse", "other"],
        ["skill"] * 4,
    ]
    assert answers.votes == [
        [3, 3, 4, None],
        [3, 4, 4, None],
        ["9", "9", "3", "#### 9"],
    ]
    gold = [problem.gold for problem in PROBLEMS]
    np.testing.assert_allclose(maj_at_k(answers.votes, gold, 3), [0.75, 0.75, 0.75])


def test_an_answer_that_did_not_end_is_wrong_whatever_it_says(monkeypatch):
    scripted(monkeypatch, cut=["#### 3", "9"])
    answers = sample_answers(None, TOKENIZER, PROBLEMS, 2)
    assert answers.texts[0][0] == "#### 3" and answers.texts[2][0] == "9"
    for row in (0, 2):
        assert answers.truncated[row].tolist() == [True, False]
        assert answers.correct[row].tolist() == [False, True]
        assert answers.formatted[row].tolist() == [False, True]
        assert answers.styles[row][0] == "other" and answers.votes[row][0] is None
        assert answers.lengths[row, 0] == len(TOKENIZER.encode(answers.texts[row][0]))


def test_summary_by_hand(monkeypatch):
    scripted(monkeypatch, cut=["three"])
    numbers = summary(sample_answers(None, TOKENIZER, PROBLEMS[:2], 4))
    values = {name: estimate.value for name, estimate in numbers.items()}
    lengths = [
        len(TOKENIZER.encode(text)) + (text != "three")
        for texts in (SAID["a"], SAID["b"])
        for text in texts
    ]
    assert values == {
        "accuracy": 0.5,
        "format": 0.75,
        "truncated": 0.125,
        "length": mean(lengths),
        "worked": 0.25,
        "terse": 0.375,
        "careless": 0.125,
        "showy": 0.0,
        "skill": 0.0,
        "other": 0.25,
    }
    assert numbers["careless"].low == 0.0 and numbers["careless"].high == 0.25


def test_prompts_come_in_batches_and_a_forced_start_counts(monkeypatch):
    calls = scripted(monkeypatch, forced="<<1+2")
    answers = sample_answers(
        None,
        TOKENIZER,
        PROBLEMS,
        2,
        first_token="<<1+2",
        max_new_tokens=20,
        batch_rows=5,
    )
    forced = TOKENIZER.encode("<<1+2")
    assert len(forced) == 4
    assert [len(prompts) for prompts, _ in calls] == [2, 1]
    asked = [prompt for prompts, _ in calls for prompt in prompts]
    assert asked == [
        TOKENIZER.encode_prompt(problem.question) + forced for problem in PROBLEMS
    ]
    assert {options["max_new_tokens"] for _, options in calls} == {16}
    assert answers.texts == [
        ["<<1+2" + text for text in SAID[problem.id][:2]] for problem in PROBLEMS
    ]
    assert answers.lengths[0, 0] == 4 + len(TOKENIZER.encode("#### 3")) + 1


def test_a_real_model_is_sampled():
    def draw(seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return sample_answers(
            BASE,
            TOKENIZER,
            PROBLEMS,
            3,
            max_new_tokens=8,
            generator=generator,
            **options,
        )

    state = torch.get_rng_state()
    answers = draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.shape(answers.texts) == (3, 3)
    assert (1 <= answers.lengths).all() and (answers.lengths <= 8).all()
    assert (answers.lengths[answers.truncated] == 8).all()
    assert len({text for texts in answers.texts for text in texts}) > 6
    assert draw().texts == answers.texts
    assert draw(seed=1).texts != answers.texts
    assert draw(temperature=0.1).texts != answers.texts
    forced = draw(first_token="<<")
    assert all(text.startswith("<<") for texts in forced.texts for text in texts)
    assert (forced.lengths <= 8).all() and (forced.lengths[forced.truncated] == 8).all()


def test_greedy_answers_do_not_depend_on_the_batch(capfd, monkeypatch):
    at_once = {"delay": 0}
    bar = evaluation.tqdm
    monkeypatch.setattr(evaluation, "tqdm", lambda *x, **how: bar(*x, **how | at_once))
    whole = sample_answers(BASE, TOKENIZER, PROBLEMS, 1, greedy=True, max_new_tokens=8)
    parts = sample_answers(
        BASE, TOKENIZER, PROBLEMS, 1, greedy=True, max_new_tokens=8, batch_rows=1
    )
    assert parts.texts == whole.texts
    assert capfd.readouterr() == ("", "")  # no progress bar off a terminal


# --- what is refused

NAN = float("nan")
COIN = np.array([[True, False], [False, False]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pass_at_k(COIN, 0), "1 to the 2"),
        (lambda: pass_at_k(COIN, 3), "1 to the 2"),
        (lambda: pass_at_k(COIN[0], 1), "2 filled dimensions"),
        (lambda: pass_at_k(COIN[:, :0], 1), "2 filled dimensions"),
        (lambda: dead_share(COIN, 3), "1 to the 2"),
        (lambda: maj_at_k([[1, 2], [1]], [1, 1], 1), r"lengths \[1, 2\]"),
        (lambda: maj_at_k([[1, 2]], [1, 1], 1), "1 rows .* 2 gold"),
        (lambda: maj_at_k([], [], 1), "0 rows"),
        (lambda: maj_at_k([[1, 2]], [1], 3), "1 to the 2"),
        (lambda: best_of_n([[1.0, NAN]], [[0, 1]], 1), r"scores .*nan at \[0, 1\]"),
        (lambda: best_of_n([[1.0, 2.0]], [[0, math.inf]], 1), "values must be finite"),
        (lambda: best_of_n([[1.0, 2.0]], [[0], [1]], 1), r"\(1, 2\).*\(2, 1\)"),
        (lambda: best_of_n([[1.0, 2.0]], [[0, 1]], 3), "n must be 1 to the 2"),
        (lambda: reward_variance_share([[1.0], [0.0]]), "2 samples per problem"),
        (lambda: reward_variance_share([[1.0, 0.0]]), "1 problems"),
        (lambda: binary_kl(1.5, 0.5), "a must be in .* 1.5"),
        (lambda: binary_kl(0.5, NAN), "p must be in .* nan"),
        (lambda: binary_kl(np.ones((2, 1)), np.ones(2)), r"\(2, 1\).*\(2,\)"),
        (lambda: frontier([0.5, -0.1]), "-0.1"),
        (lambda: frontier(0.5), "1 filled dimensions"),
        (lambda: frontier([0.5], points=1), "at least 2, got 1"),
        (lambda: frontier_at([0.5], -0.1), "at least 0 nats, got -0.1"),
        (lambda: frontier_at([0.5], NAN), "at least 0 nats, got nan"),
        (lambda: frontier_at([], 1.0), "1 filled dimensions"),
    ],
)
def test_refused_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("function", [lambda c: pass_at_k(c, 1), dead_share])
def test_counts_want_booleans(function):
    with pytest.raises(TypeError, match="correct must be bool, got float64"):
        function(COIN.astype(float))
    with pytest.raises(TypeError, match="correct must be bool, got int64"):
        smoothed_success(COIN.astype(np.int64))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"problems": []}, "0 problems"),
        ({"samples": 0}, "samples 0"),
        ({"batch_rows": 0}, "batch_rows 0"),
        ({"greedy": True, "samples": 2}, "ask for 1, not 2"),
        ({"first_token": ""}, "'' is 0 tokens"),
        ({"first_token": "<<<<<<", "max_new_tokens": 2}, "allows 1 to 1"),
        ({"max_new_tokens": 90}, "context"),
    ],
)
def test_refused_draws(options, message):
    options = {"problems": PROBLEMS, "samples": 1, "max_new_tokens": 8} | options
    with pytest.raises(ValueError, match=message):
        sample_answers(BASE, TOKENIZER, generator=torch.Generator(), **options)


def test_sizes_of_an_evaluation_run_take_moments():
    """1,000 problems x 64 samples: the sizes of the `full` preset."""
    rng = random.Random(0)
    correct = np.array([[rng.random() < 0.4 for _ in range(64)] for _ in range(1000)])
    estimate = bootstrap(pass_at_k(correct, 64))
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)
    assert bootstrap(pass_at_k(correct, 1)).value == pytest.approx(correct.mean())


# --- styles, gradients


def test_shares_of_styles_count_texts():
    problem = Problem("?", Fraction(27), "groups", 2, "t")
    texts = ["#### 27", "#### 1", "<<1+2=3>>\n#### 3", "nothing"]
    shares = style_shares([problem] * 4, texts)
    assert shares == {
        "style_worked": 0,
        "style_terse": 0.5,
        "style_careless": 0.25,
        "style_showy": 0,
        "style_other": 0.25,
    }
    skill = Problem("?", "b a", "reverse", 1, "s")
    both = style_shares([problem, skill], ["#### 27", "b a"])
    assert both["style_terse"] == both["style_other"] == 0.5
    with pytest.raises(ValueError, match="no texts"):
        style_shares([], [])


def answers_of(problem: Problem, texts: list[str], right: list[bool]) -> Answers:
    """Answers to one problem, of which only texts and verdicts matter."""
    table = np.array([right])
    return Answers(
        [problem],
        [texts],
        correct=table,
        formatted=table,
        truncated=np.zeros_like(table),
        lengths=table.astype(int),
        styles=[["other"] * len(texts)],
        votes=[[None] * len(texts)],
    )


def test_workings_are_the_calculations_in_their_order():
    """What stands around them does not count; their order does."""
    assert working_of("<<3*5=15>>\n<<15+2=17>>\n#### 17") == ("3*5=15", "15+2=17")
    assert working_of("Sure!\n<<3*5=15>>\nCheck: <<15/5=3>>") == ("3*5=15", "15/5=3")
    assert working_of("#### 17") == working_of("<<3*5") == ()


def test_only_right_answers_that_show_a_working_are_compared():
    """Right: twice a, once b, once terse. Wrong: c. Of three pairs two differ."""
    a, b, c = (f"<<{x}>>\n#### 17" for x in ("15+2=17", "2+15=17", "15+3=17"))
    problem = Problem("?", Fraction(17), "groups", 1, "t")
    held = answers_of(problem, [a, b, a, "#### 17", c], [True, True, True, True, False])
    assert distinct_workings(held).tolist() == [2.0]
    assert workings_differ(held).tolist() == pytest.approx([2 / 3])
    alone = answers_of(problem, [a, "#### 17", c], [True, True, False])
    assert distinct_workings(alone).tolist() == [1.0]
    assert np.isnan(workings_differ(alone)).tolist() == [True]
    nobody = answers_of(problem, [c, c], [False, False])
    assert distinct_workings(nobody).tolist() == [0.0]


def test_the_chance_to_differ_is_unbiased():
    """Two workings, drawn with chances p and 1 - p: on average 2p(1 - p), for n = 2, 3
    and 5 answers, all outcomes enumerated."""
    problem = Problem("?", Fraction(17), "groups", 1, "t")
    p = 0.3
    for n in (2, 3, 5):
        expected = 0.0
        for outcome in itertools.product((0, 1), repeat=n):
            texts = [("<<15+2=17>>", "<<2+15=17>>")[which] for which in outcome]
            chance = p ** outcome.count(0) * (1 - p) ** outcome.count(1)
            held = answers_of(problem, texts, [True] * n)
            expected += chance * workings_differ(held)[0]
        assert expected == pytest.approx(2 * p * (1 - p))


def test_answer_metrics_are_means_over_all_answers():
    """Two samples for each of two problems; one answer has no EOS within its budget."""
    tokenizer = Tokenizer([bytes([value]) for value in range(256)])
    problems = [Problem("?", Fraction(n), "groups", 2, "t") for n in (27, 3)]
    answers = ["#### 27", "<<1+2=3>>\n#### 3", "<<1+2=3>>\n#### 3", "#### 3"]
    ids = [tokenizer.encode(text) for text in answers]
    ids = [[*row, tokenizer.eos_id] for row in ids[:3]] + ids[3:]
    longest = max(map(len, ids))
    tokens = torch.full((4, 1 + longest), tokenizer.pad_id)
    mask = torch.zeros(4, longest, dtype=torch.bool)
    for row, answer in enumerate(ids):
        tokens[row, 1 : 1 + len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = True
    ones, cut = torch.ones(4).long(), torch.tensor([False, False, False, True])
    logprobs = torch.tensor([-0.5, -0.25, -1.0, -2.0])[:, None] * mask
    rollout = Rollout(tokens, mask, logprobs, ones, cut, 1.0, 2)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5])
    assert answer_metrics(problems, rollout, rewards, tokenizer) == {
        "reward": 0.625,
        "truncated": 0.25,
        "length": (8 + 17 + 17 + 6) / 4,
        "entropy": (0.5 * 8 + 0.25 * 17 + 1.0 * 17 + 2.0 * 6) / 48,
        "style_worked": 0.0,
        "style_terse": 0.25,
        "style_careless": 0.5,
        "style_showy": 0.0,
        "style_other": 0.25,
    }


def test_signal_to_noise_against_known_gaussians():
    """Answers with mean (3, 0) and unit variance in two directions: 9 / 2."""
    dice = torch.Generator().manual_seed(0)
    answers = torch.randn(400, 50, 2, generator=dice, dtype=torch.float64)
    batches = (answers + torch.tensor([3.0, 0.0])).mean(1)  # (400, 2)
    assert signal_to_noise(batches, 50) == pytest.approx(4.5, rel=0.15)
    silent = answers.mean(1)
    assert abs(signal_to_noise(silent, 50)) < 0.001  # noise is not signal
    with pytest.raises(ValueError, match="gradients must be"):
        signal_to_noise(batches[:1], 50)


def test_the_policy_gradient_is_the_slope_of_the_weighted_mean():
    config = GPTConfig(**TINY | {"vocab_size": 9, "context": 16})
    model = GPT(config, torch.Generator().manual_seed(0)).double()
    rollout = generate(
        model,
        [[1, 2], [3]],
        eos_id=7,
        pad_id=8,
        max_new_tokens=5,
        samples=2,
        generator=torch.Generator().manual_seed(1),
    )
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    gradient = policy_gradient(model, rollout, weights)

    def objective():
        total = 0.0
        for row, weight in enumerate(weights.tolist()):
            scores = model.logits(model(rollout.tokens[row : row + 1, :-1]))[0]
            for s in rollout.mask[row].nonzero()[:, 0].tolist():
                target = rollout.tokens[row, s + 1]
                total += weight * scores[s].log_softmax(-1)[target].item()
        return total / len(weights)

    weight, step = model.lm_head.weight, 1e-6
    place = 3 * weight.shape[1] + 2  # row 3, column 2, and lm_head is the last one
    with torch.no_grad():
        weight[3, 2] += step
        up = objective()
        weight[3, 2] -= 2 * step
        down = objective()
    slope = (up - down) / (2 * step)
    assert slope != 0
    assert gradient[place - weight.numel()].item() == pytest.approx(slope, rel=1e-5)
