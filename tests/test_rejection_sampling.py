"""Rejection sampling: what a step follows, the law of best-of-n, and training.

What each function owes: entries.py.
"""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minialign.training
from minialign import evaluation, sampling
from minialign.algorithms import rejection_sampling as rs
from minialign.algorithms.rejection_sampling import (
    best_of_n_accuracy,
    best_of_n_kl,
    keep_all,
    keep_latest,
    likelihood_loss,
    select_best,
    select_right,
    select_top,
)
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close
from tests.toy import (
    TOKENIZER,
    always,
    base,
    base_weights,
    generator,
    judged,
    never,
    row_nats,
    stretched,
)

# What one step follows, over 15 responses (tests/enumeration.py)

LOGITS = world.random_logits(0)
RIGHT = (torch.arange(15) % 4 == 1).double()  # (15,) 0 or 1, of all lengths
PAID = world.random_logits(2).flatten()[:15].abs()  # (15,) any numbers above 0
CHANCE = (world.probabilities(LOGITS) * RIGHT).sum()  # of a right answer


def ascent(weigh, samples=1, count=None, **more):
    """(7, 3): -E[∇ loss], where weigh(rows) gives the weights."""

    def loss(rows, logprobs, mask):
        return likelihood_loss(logprobs, weigh(rows), mask, count)

    return -world.expected_gradient(loss, LOGITS, samples, **more)


def kept_by(select, rewards=RIGHT):
    """Weights of one group: 1 for kept."""

    def weigh(rows):
        lengths = world.LENGTHS[rows][None]
        return select(rewards[rows][None], lengths, generator())[0].double()

    return weigh


@pytest.mark.parametrize("samples", [1, 2])
def test_all_right_answers_are_reinforce_and_the_best_weighs_problems(samples):
    """Divided by K, by 1: ∇p, and (1 - (1 - p)^K) / p ∇p. One direction a problem."""
    slope = world.true_gradient(LOGITS, RIGHT)
    close(ascent(kept_by(select_right), samples), slope)
    some = 1 - (1 - CHANCE) ** samples
    close(ascent(kept_by(select_best), samples, count=1), some / CHANCE * slope)


def test_what_turns_the_gradient():
    """Negative controls: dividing by tokens, learning from an old policy's answers."""
    expected = world.true_gradient(LOGITS, RIGHT)

    def token_mean(rows, logprobs, mask):
        count = int(mask.sum())
        return likelihood_loss(logprobs, RIGHT[rows], mask, count)

    actual = -world.expected_gradient(token_mean, LOGITS)
    assert world.cosine(actual, expected) < 0.99
    stale = ascent(lambda rows: RIGHT[rows], behaviour=world.random_logits(5))
    assert world.cosine(stale, expected) < 0.9


def test_random_answers_teach_nothing_in_expectation():
    """Σ π ∇ log π = 0: the control moves by noise (and by its length rule) alone."""
    close(ascent(lambda rows: torch.ones(len(rows)).double(), 2), 0.0)


def test_rejection_sampling_to_the_end_is_best_of_n():
    """SFT on kept answers: stationary exactly where the policy is the kept law.

    RAFT(K) is SFT on best-of-K. The law of the kept, as a policy, is its optimum.
    """
    law = best_law(PAID, 2)
    logits = world.logits_of(law)

    def loss(rows, logprobs, mask):
        return likelihood_loss(logprobs, kept_by(select_best, PAID)(rows), mask, 1)

    slope = world.expected_gradient(loss, logits, 2, behaviour=LOGITS)
    close(slope, 0.0)
    away = world.expected_gradient(loss, LOGITS, 2, behaviour=LOGITS)
    assert away.norm() > 0.05


# The law of best-of-n


def best_law(rewards, n, seed=0):
    """(15,): distribution of what `select_best` takes, over all n-tuples, one call."""
    rows = torch.tensor(list(itertools.product(range(15), repeat=n)))  # (15^n, n)
    chance = world.probabilities(LOGITS)[rows].prod(1)  # (15^n,)
    kept = select_best(rewards[rows], world.LENGTHS[rows], generator(seed))
    picked = torch.where(kept, rows, 0).sum(1)
    law = torch.zeros(15, dtype=torch.float64)
    return law.index_add(0, picked[kept.any(1)], chance[kept.any(1)])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_without_ties(n):
    """BON-1, BON-2, BON-3: F_i^n - F_(i-1)^n; n = 1 is the policy itself."""
    law, odds = best_law(PAID, n), world.probabilities(LOGITS)
    order = PAID.argsort()
    steps = torch.cat((torch.zeros(1).double(), odds[order].cumsum(0))) ** n
    close(law[order], steps.diff())
    kl = (law * (law / odds).log()).sum()
    assert kl <= math.log(n) - (n - 1) / n + 1e-12
    assert kl <= -odds[PAID.argmax()].log()
    wins = law @ ((PAID[:, None] > PAID).double() + 0.5 * torch.eye(15)) @ odds
    assert wins <= n / (n + 1) + 1e-12
    assert (law @ PAID) >= (best_law(PAID, max(n - 1, 1)) @ PAID)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_with_ties_has_the_exact_kl(n):
    """Ties by lot: each right answer keeps its share among the right. All enumerated.

    Over tuples *and* lots: of the tied, each is taken with the same chance.
    """
    odds = world.probabilities(LOGITS)
    law = torch.zeros(15, dtype=torch.float64)
    for rights in range(n + 1):  # how many of n are right
        chance = math.comb(n, rights) * CHANCE**rights * (1 - CHANCE) ** (n - rights)
        tied = RIGHT if rights else 1 - RIGHT
        law += chance * odds * tied / (odds * tied).sum()
    close(law.sum(), 1.0)
    kl = (law * (law / odds).log()).sum().item()
    p = CHANCE.item()
    assert best_of_n_accuracy(p, n) == pytest.approx((law @ RIGHT).item(), abs=1e-12)
    assert best_of_n_kl(p, n) == pytest.approx(kl, abs=1e-12)
    if n < 4:  # `select_best` on every tuple, one set of lots: close, if not exact
        taken = best_law(RIGHT, n)
        close(taken.sum(), (law * RIGHT).sum())
        close(taken, law * RIGHT, atol=0.01)


@settings(max_examples=30)
@given(st.floats(0, 1), st.integers(1, 64))
def test_the_law_of_best_of_n(p, n):
    """BON-2: the famous formula bounds the KL, and is far from it for 0/1 rewards."""
    accuracy, kl = best_of_n_accuracy(p, n), best_of_n_kl(p, n)
    assert accuracy == pytest.approx(1 - math.pow(1 - p, n), abs=1e-12)
    assert -1e-12 <= kl <= math.log(n) - (n - 1) / n + 1e-9
    assert p == 0 or kl <= -math.log(p) + 1e-9
    assert best_of_n_accuracy(p, n + 1) >= accuracy
    assert best_of_n_kl(p, 1) == pytest.approx(0, abs=1e-9)


def test_best_of_n_by_hand():
    """p = 1/2, n = 2: 3/4, and 3/4 log 3/2 + 1/4 log 1/2, of which the famous bound is
    half as much again; 0 at p = 0, 1."""
    p = np.array([0.0, 0.5, 1.0])
    assert best_of_n_accuracy(p, 2).tolist() == [0.0, 0.75, 1.0]
    kl = best_of_n_kl(p, 2)
    assert kl == pytest.approx(np.array([0.0, 0.130812, 0.0]), abs=1e-6)
    bound = math.log(2) - 1 / 2
    assert 1.4 * kl[1] < bound < 1.6 * kl[1]


def test_best_of_n_is_on_the_frontier_of_its_own_problem():
    """On one problem no policy is as right for less KL: best-of-n buys at the limit."""
    for p, n in ((0.3, 2), (0.3, 8), (0.05, 16)):
        kl, accuracy = float(best_of_n_kl(p, n)), float(best_of_n_accuracy(p, n))
        assert evaluation.frontier_at(np.array([p]), kl) == pytest.approx(accuracy)


def test_the_estimate_of_best_of_n_is_unbiased():
    """BON-5: from 5 answers, the mean over all outcomes is the law, for each n <= 5."""
    p = 0.3
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=5)))  # (32, 5)
    chance = np.where(outcomes > 0, p, 1 - p).prod(1)
    for n in range(1, 6):
        estimate = evaluation.best_of_n(outcomes, outcomes, n)
        assert chance @ estimate == pytest.approx(best_of_n_accuracy(p, n))


# Selections, side by side


def test_easy_problems_fill_the_top_and_not_the_best():
    """Two problems: 7 right of 8, and 1 right of 8."""
    rewards = torch.tensor([[1.0] * 7 + [0.0], [1.0] + [0.0] * 7])
    lengths = torch.ones_like(rewards, dtype=torch.int64)
    hard = {select_best: 0, select_top: 0}
    for select in hard:
        for seed in range(200):
            hard[select] += int(select(rewards, lengths, generator(seed))[1].sum())
    assert hard[select_best] == 200
    assert 20 < hard[select_top] < 90  # 2 of 8 right answers: 1/4 of 200, 6 sigma


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["rejection_sampling"]
CONFIG = METHOD.config
run = METHOD.run
RIGHT_TOKENS = 2  # "y" and its end


@pytest.mark.parametrize(
    "temperature, learning_temperature, chunk",
    [(1.0, 1.0, 128), (0.7, 0.7, 1), (0.7, 1.0, 128)],
)
def test_one_update_by_hand(monkeypatch, temperature, learning_temperature, chunk):
    """Every metric from the rollout, row by row, against code of its own.

    Right answers have 2 tokens each, so a batch of 2 x their number holds each once.
    """
    rooms = sampling, minialign.training
    chunks, joined = (training.spied(monkeypatch, x, "generate") for x in rooms)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    config = replace(
        CONFIG,
        temperature=temperature,
        learning_temperature=learning_temperature,
        chunk=chunk,
    )
    first = next(run(copy.deepcopy(policy), config))
    config = replace(config, batch_tokens=RIGHT_TOKENS * first["pool"])
    chunks.clear(), joined.clear()
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = joined
    parts = [part for _, part in chunks or joined]  # as drawn
    assert len(parts) == math.ceil(3 / chunk)
    answers = rollout.responses()
    assert answers == [ids for part in parts for ids in part.responses()]
    cut = [each for part in parts for each in part.truncated.tolist()]
    assert rollout.truncated.tolist() == cut
    kept = (judged(rollout) > 0).tolist()
    nats = [row_nats(twin, part, learning_temperature) for part in parts]
    ours = torch.cat(nats)  # (18,)
    loss = -ours[torch.tensor(kept)].sum() / (RIGHT_TOKENS * sum(kept))
    groups = [kept[i : i + 6] for i in range(0, 18, 6)]
    expected = {
        "round": 1,
        "completions": 18,
        "kept": sum(kept) / 18,
        "unanswered": sum(not any(group) for group in groups) / 3,
        "pool": sum(kept),
        "kl": sum(training.row_kl(twin, reference, rollout, temperature)) / 18,
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "tokens_trained": RIGHT_TOKENS * sum(kept),
    }
    training.assert_metrics(metrics, rollout, expected)
    assert any(name.startswith("kept_style_") for name in metrics)


def test_the_draw_is_reported_until_the_next():
    """Its metrics are those of the policy before the round; steps count on."""
    metrics = list(run(base(), reference=base()))
    assert [row["update"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["round"] for row in metrics] == [1, 1, 1, 2, 2, 2]
    assert [row["completions"] for row in metrics] == [18, 18, 18, 36, 36, 36]
    assert [row["tokens_trained"] for row in metrics] == [10] * 6
    step = {"update", "loss", "grad_norm", "tokens_trained", "steps", "guarded"}
    for rows in (metrics[:3], metrics[3:]):
        draws = [{k: x for k, x in row.items() if k not in step} for row in rows]
        assert draws[0] == draws[1] == draws[2]
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[3]["kl"]
    assert metrics[0]["entropy"] != metrics[3]["entropy"]
    assert min(row["entropy"] for row in metrics) > 0
    assert "kl" not in next(run(base()))


def test_pools_of_rounds(monkeypatch):
    """`keep_all` learns from old answers too; `keep_latest` from new ones alone."""
    for keep, expected in ((keep_latest, "second"), (keep_all, "sum")):
        state = {}
        metrics = list(run(base(), keep=keep, state=state))
        sizes = [round(row["kept"] * 18) for row in metrics[::3]]
        second = sizes[1] if expected == "second" else sum(sizes)
        assert [row["pool"] for row in metrics] == [sizes[0]] * 3 + [second] * 3
        assert len(state["pool"]) == second and min(sizes) > 0


def test_batches_go_through_the_pool_and_again(monkeypatch):
    """Every kept answer once before any comes twice, whatever the batches' borders."""
    collated = training.spied(monkeypatch, rs, "collate")
    config = replace(CONFIG, rounds=1, updates=8, micro_batch=1, lr=0.0)
    state = {}
    metrics = list(run(base(), config, always, state=state))
    rows = [row for (examples, _), _ in collated for row in examples]
    used, pool = (
        [(tuple(prompt), tuple(response)) for prompt, response in each]
        for each in (rows, state["pool"])
    )
    assert len(pool) < len(used) and set(used) == set(pool)
    times = {row: used.count(row) / pool.count(row) for row in set(pool)}
    rounds = len(used) / len(pool)
    assert all(math.floor(rounds) <= x <= math.ceil(rounds) for x in times.values())
    sizes = [row["tokens_trained"] for row in metrics]
    assert all(10 <= size < 13 for size in sizes)  # answers have at most 3 tokens


def test_an_answer_that_does_not_end_is_not_kept():
    state = {}
    metrics = training.check_truncation(partial(run, state=state, prompts=5))
    assert metrics["kept"] == pytest.approx(1 - metrics["truncated"])
    assert all(ids[-1] == TOKENIZER.eos_id for _, ids in state["pool"])


def test_nothing_kept_changes_nothing():
    policy = base()
    metrics = list(run(policy, reward=never))
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))
    for row in metrics:
        assert row["kept"] == row["pool"] == row["loss"] == row["grad_norm"] == 0
        assert row["unanswered"] == 1 and row["tokens_trained"] == 0
    assert metrics[-1]["completions"] == 36


SELECTIONS = [rs.select_right, rs.select_best, rs.select_top, rs.select_random]


@pytest.mark.parametrize("select", SELECTIONS, ids=lambda each: each.__name__)
def test_what_counts_as_success_is_where_the_bar_lies(select):
    """Rewards and bar raised alike: the same answers. The bar raised alone: fewer."""
    rewards = torch.tensor([[0.0, 1.0, 0.5, -1.0], [0.5, 0.5, 0.0, -2.0]])
    lengths = torch.tensor([[3, 2, 4, 1], [2, 2, 5, 1]])
    kept = select(rewards, lengths, generator())
    assert torch.equal(select(rewards - 2, lengths, generator(), -2.0), kept)
    fewer = select(rewards, lengths, generator(), 0.5)
    assert 0 < fewer.sum() < kept.sum()
    assert select(rewards, lengths, generator(), 1.0).sum() == 0
