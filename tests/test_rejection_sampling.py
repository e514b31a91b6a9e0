"""Rejection sampling: its expected gradient, best-of-n, selections, loss, training."""

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

from minialign import evaluation, sampling
from minialign.algorithms import rejection_sampling as rs
from minialign.algorithms.reinforce import reinforce_loss
from minialign.algorithms.rejection_sampling import (
    best_of_n_accuracy,
    best_of_n_kl,
    collate,
    keep_all,
    keep_latest,
    likelihood_loss,
    select_best,
    select_random,
    select_right,
    select_top,
)
from minialign.algorithms.sft import sft_loss
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
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

SELECTIONS = [select_right, select_best, select_top, select_random]

# Part 1: what one step follows, over 15 responses (tests/enumeration.py)

LOGITS = world.random_logits(0)
RIGHT = (torch.arange(15) % 4 == 1).double()  # (15,) 0 or 1, of all lengths
PAID = world.random_logits(2).flatten()[:15].abs()  # (15,) any numbers above 0
CHANCE = (world.probabilities(LOGITS) * RIGHT).sum()  # of a right answer


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


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
@pytest.mark.parametrize("rewards", [RIGHT, PAID])
def test_weighted_by_rewards_it_is_reinforce(rewards, samples):
    """One on-policy step has the gradient of E[r], as REINFORCE's has: no bias."""
    expected = world.true_gradient(LOGITS, rewards)
    close(ascent(lambda rows: rewards[rows], samples), expected)
    assert expected.norm() > 0.05

    def same(rows, logprobs, mask):
        ours = likelihood_loss(logprobs, rewards[rows], mask)
        assert torch.equal(ours, reinforce_loss(logprobs, rewards[rows], mask))
        return ours

    close(-world.expected_gradient(same, LOGITS, samples), expected)


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

    X-7: RAFT(K) is SFT on best-of-K. The law of the kept, as a policy, is its optimum.
    """
    law = best_law(PAID, 2)
    logits = world.logits_of(law)

    def loss(rows, logprobs, mask):
        return likelihood_loss(logprobs, kept_by(select_best, PAID)(rows), mask, 1)

    slope = world.expected_gradient(loss, logits, 2, behaviour=LOGITS)
    close(slope, 0.0)
    away = world.expected_gradient(loss, LOGITS, 2, behaviour=LOGITS)
    assert away.norm() > 0.05


# Best of n: its exact law


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
    """BON-1, BON-2, BON-3: F_i^n - F_(i-1)^n; n = 1 is the policy itself (X-7)."""
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
    """p = 1/2, n = 2: 3/4, and 3/4 log 3/2 + 1/4 log 1/2 = 0.130812; 0 at p = 0, 1."""
    p = np.array([[0.0, 0.5], [1.0, 0.5]])
    assert best_of_n_accuracy(p, 2).tolist() == [[0.0, 0.75], [1.0, 0.75]]
    assert best_of_n_kl(p, 2) == pytest.approx(np.array([[0, 0.130812], [0, 0.130812]]),
                                               abs=1e-6)  # fmt: skip
    assert math.log(2) - 1 / 2 > 0.193  # the bound: half as much again


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


@pytest.mark.parametrize("p, n", [(-0.1, 2), (1.1, 2), (math.nan, 2), (0.5, 0)])
def test_best_of_n_refuses(p, n):
    for law in (best_of_n_accuracy, best_of_n_kl):
        with pytest.raises(ValueError, match="best_of_n"):
            law(p, n)


# Part 2: selections

GROUPS = strategies.groups()


def lengths_for(rewards, seed=1):
    return torch.randint(1, 30, rewards.shape, generator=generator(seed))


def chosen(select, rewards, seed=0):
    return select(rewards, lengths_for(rewards), generator(seed))


@settings(max_examples=30)
@given(GROUPS, st.integers(0, 9))
def test_what_is_kept(rewards, seed):
    right, best, top, lots = (chosen(s, rewards, seed) for s in SELECTIONS)
    P = len(rewards)
    for kept in (right, best, top, lots):
        assert kept.shape == rewards.shape and kept.dtype == torch.bool
    assert right.tolist() == [[r > 0 for r in row] for row in rewards.tolist()]
    answered = right.any(1)
    assert torch.equal(best.sum(1), answered.long())  # BON-6: exactly one
    assert (rewards[best] == rewards.amax(1)[answered]).all()
    assert top.sum() == min(P, int(right.sum())) and (rewards[top] > 0).all()
    left = rewards[right & ~top]
    assert not len(left) or not top.any() or left.max() <= rewards[top].min()
    lengths = lengths_for(rewards)
    wanted, held = lengths[right].sum(), lengths[lots].sum()
    assert wanted <= held
    assert not lots.any() or held - lengths[lots].max() < wanted


@settings(max_examples=30)
@given(GROUPS, st.integers(0, 9))
def test_selection_looks_at_ranks_and_at_what_is_above_0(rewards, seed):
    """BON-4, RAFT-2: any increasing map that leaves 0 where it is changes nothing."""
    for select in SELECTIONS:
        expected = chosen(select, rewards, seed)
        for change in (lambda r: r**3, lambda r: 7 * r, lambda r: torch.expm1(r)):
            assert torch.equal(chosen(select, change(rewards), seed), expected)


@settings(max_examples=30)
@given(st.permutations(range(-3, 9)))
def test_selection_does_not_care_who_comes_first(order):
    """RAFT-2: without ties the same answers are kept in any order."""
    rewards = torch.tensor(order).double().view(3, 4)
    for select in (select_right, select_best, select_top):
        kept = select(rewards, lengths_for(rewards), generator())
        again = select(rewards.flip(1), lengths_for(rewards), generator(3))
        assert torch.equal(again.flip(1), kept)
        again = select(rewards.flip(0), lengths_for(rewards), generator(3))
        assert torch.equal(again.flip(0), kept)


@pytest.mark.parametrize("select", [select_best, select_top, select_random])
def test_ties_are_broken_by_lot(select):
    """Of 3 equals in 4,000 groups each is taken as often, within 6 sigma."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(4000, -1)
    lengths = torch.ones_like(rewards, dtype=torch.int64)
    times = select(rewards, lengths, generator()).sum(0).tolist()
    equals = times if select is select_random else times[1:]
    assert equals is times or times[0] == 0
    n, p = sum(times), 1 / len(equals)
    assert n == (12000 if select is select_random else 4000)
    # The numbers taken of each column; their spread is at most binomial.
    assert all(abs(x - n * p) < 6 * math.sqrt(n * p * (1 - p)) for x in equals)
    repeat = select(rewards, lengths, generator()).sum(0).tolist()
    other = select(rewards, lengths, generator(1)).sum(0).tolist()
    assert repeat == times != other


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


def test_nothing_right_keeps_nothing():
    rewards = torch.tensor([[0.0, 0.0], [-1.0, 0.0]])
    for select in SELECTIONS:
        assert not chosen(select, rewards).any()


@pytest.mark.parametrize("select", SELECTIONS)
def test_selections_refuse(select):
    """BON-6: nan compares with nothing; and shapes must be (P, K)."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for bad in (math.nan, math.inf):
        broken = rewards.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match="rewards must be"):
            chosen(select, broken)
    with pytest.raises(ValueError, match="rewards must be"):
        chosen(select, rewards.flatten())
    with pytest.raises(ValueError, match="lengths has shape"):
        select(rewards, lengths_for(rewards)[:, :1], generator())
    with pytest.raises(ValueError, match="rewards is empty"):
        chosen(select, rewards[:0])


def test_selections_are_pure():
    for select in SELECTIONS:
        common.check_pure(
            lambda rewards, lengths, select=select: select(
                rewards, lengths, generator()
            ),
            GROUPS.map(lambda r: {"rewards": r, "lengths": lengths_for(r)}),
        )


def test_pools():
    a, b = [([1], [2])], [([3], [4, 5])]
    assert keep_latest(a, b) == b and keep_all(a, b) == a + b and len(a) == len(b) == 1


def test_collating_by_hand():
    """Slot s scores the choice of token s + 1; EOS is a token like any other."""
    tokens, mask = collate([([5, 6, 7], [8]), ([5], [9, 2])], pad_id=0)
    assert tokens.tolist() == [[5, 6, 7, 8], [5, 9, 2, 0]]
    assert mask.tolist() == [[False, False, True], [True, True, False]]


# Part 3: the loss

float64 = partial(torch.tensor, dtype=torch.float64)
CASES = strategies.batches(logprobs=strategies.logprobs, rows=("weights",))
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "weights": float64([2.0, 1.0]),
    "mask": torch.tensor([[True, True, True], [True, True, False]]),
}


def test_loss_by_hand():
    """-(2 (-0.5 - 1.5 - 2) + (-0.1 - 3)) / 2, and -w / 2 for every live token."""
    leaf = CASE["logprobs"].clone().requires_grad_()
    loss = likelihood_loss(leaf, CASE["weights"], CASE["mask"])
    close(loss, 5.55)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert slope.tolist() == [[-1.0, -1.0, -1.0], [-0.5, -0.5, 0.0]]
    close(likelihood_loss(**CASE, count=5), 2.22)


def test_the_loss_owes_what_every_loss_owes():
    """C-1 to C-12."""
    common.check_mask_is_inert(likelihood_loss, CASES)
    common.check_microbatches(likelihood_loss, CASES, common.live_rows)
    common.check_permutation(likelihood_loss, CASES)
    common.check_shapes_refused(likelihood_loss, CASE)
    common.check_no_gradient_to(likelihood_loss, CASES, ["weights"])
    common.check_gradient_reaches(likelihood_loss, CASE)
    common.check_pure(likelihood_loss, CASES)
    common.check_dtype(likelihood_loss, CASES)
    common.check_duplication(likelihood_loss, CASES)


@pytest.mark.parametrize("keep", [[True, False, True], [True, True, True]])
def test_it_is_sft_on_the_kept_answers(keep):
    """RAFT-1: value and gradient; with one answer, or all, plain SFT."""
    logprobs = float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0], [-1.0, -4.0, -0.2]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True] * 3])
    kept = torch.tensor(keep)

    def filtered(logprobs):
        count = int(mask[kept].sum())
        return likelihood_loss(logprobs, kept.double(), mask, count)

    leaves = [logprobs.clone().requires_grad_() for _ in range(2)]
    values = filtered(leaves[0]), sft_loss(leaves[1][kept], mask[kept])
    close(values[0], values[1].item())
    both = zip(values, leaves, strict=True)
    ours, theirs = (torch.autograd.grad(value, leaf)[0] for value, leaf in both)
    close(ours, theirs)
    assert (ours[~kept] == 0).all() and (ours[mask & kept[:, None]] < 0).all()


def by_multiplication(logprobs, weights, mask, count=None):
    """nan * 0 is nan."""
    rows = mask.any(1).sum() if count is None else count
    return -(logprobs * weights.detach()[:, None] * mask).sum() / rows


def mean_of_kept(logprobs, weights, mask, count=None):
    """Divides by what it finds kept in each micro-batch: a mean of means."""
    kept = (weights.detach() > 0).sum().clamp(min=1)
    live = mask.any(1).sum() if count is None else count
    return likelihood_loss(logprobs, weights, mask, count) * live / kept


def broadcast(logprobs, weights, mask, count=None):
    """(B, 1) weights, or (1, B), or one for all, are as welcome as (B,)."""
    rows = weights.detach().expand(len(mask), -1)[:, 0]
    return likelihood_loss(logprobs, rows, mask, count)


@pytest.mark.parametrize(
    "check, wrong, cases",
    [
        (common.check_mask_is_inert, by_multiplication, CASES),
        (common.check_shapes_refused, broadcast, CASE),
        (
            partial(common.check_microbatches, count=common.live_rows),
            mean_of_kept,
            CASES,
        ),
    ],
)
def test_the_properties_find_wrong_losses(check, wrong, cases):
    assert common.refutes(check, wrong, cases)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "weights"])
def test_the_loss_refuses_what_is_not_finite(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1] = bad
    common.assert_refused(likelihood_loss, case, ValueError, f"{bad}", [name])


def test_the_loss_refuses_impossible_batches_and_bears_extreme_ones():
    case = {**CASE, "logprobs": -CASE["logprobs"]}
    common.assert_refused(likelihood_loss, case, ValueError, "above 0", ["logprobs"])
    case = {**CASE, "mask": torch.zeros_like(CASE["mask"])}
    common.assert_refused(likelihood_loss, case, ValueError, "no live", ["mask"])
    for count in (0, -1, math.nan):
        with pytest.raises(ValueError, match="count"):
            likelihood_loss(**CASE, count=count)
    far = {**CASE, "logprobs": torch.full((2, 3), -1000.0)}
    far["weights"] = far["weights"].float()
    close(likelihood_loss(**far), 1000 * (2 * 3 + 2) / 2)
    close(likelihood_loss(**{**CASE, "weights": 0 * CASE["weights"]}), 0.0)


# Part 4: training, in a world where the answers are "y" and "no"

METHOD = METHODS["rejection_sampling"]
CONFIG = METHOD.config
run = METHOD.run
RIGHT_TOKENS = 2  # "y" and its end


@pytest.mark.parametrize("temperature, chunk", [(1.0, 128), (0.7, 1)])
def test_one_update_by_hand(monkeypatch, temperature, chunk):
    """Every metric from the rollout, row by row, against code of its own.

    Right answers have 2 tokens each, so a batch of 2 x their number holds each once.
    """
    monkeypatch.setattr(rs, "CHUNK", chunk)
    rooms = sampling, rs
    chunks, joined = (training.spied(monkeypatch, x, "generate") for x in rooms)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    config = replace(CONFIG, temperature=temperature)
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
    ours, theirs = (
        torch.cat([row_nats(model, part, temperature) for part in parts])
        for model in (twin, reference)
    )  # (18,) each
    loss = -ours[torch.tensor(kept)].sum() / (RIGHT_TOKENS * sum(kept))
    groups = [kept[i : i + 6] for i in range(0, 18, 6)]
    expected = {
        "round": 1,
        "completions": 18,
        "entropy": -ours.sum().item() / sum(map(len, answers)),
        "kept": sum(kept) / 18,
        "unanswered": sum(not any(group) for group in groups) / 3,
        "pool": sum(kept),
        "kl": (ours - theirs).mean().item(),
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "tokens": RIGHT_TOKENS * sum(kept),
    }
    training.assert_metrics(metrics, rollout, expected)
    assert any(name.startswith("kept_style_") for name in metrics)


def test_the_draw_is_reported_until_the_next():
    """Its metrics are those of the policy before the round; steps count on."""
    metrics = list(run(base(), reference=base()))
    assert [row["update"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["round"] for row in metrics] == [1, 1, 1, 2, 2, 2]
    assert [row["completions"] for row in metrics] == [18, 18, 18, 36, 36, 36]
    assert [row["tokens"] for row in metrics] == [10, 20, 30, 40, 50, 60]
    step = {"update", "loss", "grad_norm", "tokens"}
    for rows in (metrics[:3], metrics[3:]):
        draws = [{k: x for k, x in row.items() if k not in step} for row in rows]
        assert draws[0] == draws[1] == draws[2]
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[3]["kl"]
    assert metrics[0]["entropy"] > metrics[3]["entropy"] > 0
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
    sizes = np.diff([0] + [row["tokens"] for row in metrics])
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
        assert row["unanswered"] == 1 and row["tokens"] == 0
    assert metrics[-1]["completions"] == 36
