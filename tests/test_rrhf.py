"""RRHF: what its ranking is not, and training. What each function owes: entries.py."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import minialign.training
from minialign import sampling
from minialign.algorithms import rrhf
from minialign.algorithms.rrhf import (
    ranking_loss,
    rrhf_loss,
)
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close, float64
from tests.toy import (
    always,
    base,
    chance_of_yes,
    judged,
    never,
    new_gpt,
    row_nats,
    stretched,
    yes,
)


def test_the_ranking_is_no_policy_gradient():
    """Once all right answers lead, it is 0, however seldom they are right."""
    logits = torch.zeros(7, 3, dtype=torch.float64)
    logits[0] = float64([0.0, 1.0, 1.0])  # a rare first step ...
    logits[[1, 3, 4]] = float64([0.0, -9.0, -9.0])  # ... and two sure ones after it
    best = world.RESPONSES.index((0, 0, 0))
    rewards = F.one_hot(torch.tensor(best), 15).double()

    def loss(rows, logprobs, mask):
        return rrhf_loss(logprobs, rewards[rows][None], mask, sft_weight=0.0)

    assert world.probabilities(logits)[best] < 0.2
    close(world.expected_gradient(loss, logits, 2), 0.0, atol=0)
    assert world.true_gradient(logits, rewards).norm() > 0.1


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_with_two_answers_it_is_slic(margin):
    """Max(0, δ − p_won + p_lost) of each pair; the paper's own has δ = 0."""
    won, lost = float64([-0.5, -2.0, -1.0]), float64([-1.0, -0.5, -1.2])
    rewards = float64([1.0, 0.0]).expand(3, 2)
    actual = ranking_loss(torch.stack((won, lost), 1), rewards, margin)
    close(actual, (margin - won + lost).relu().mean())


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["rrhf"]
CONFIG = METHOD.config
LONG = METHOD.long
run = METHOD.run


def test_the_ranking_alone_rests_where_the_order_is_right():
    """log p(y) / 2 passes log(1 - p(y)) / 3 at p(y) = 0.57: no pair is violated."""
    policy = base()
    metrics = list(run(policy, **LONG, sft_weight=0.0, lr=1e-3))
    assert metrics[0]["violated"] > 0.8 and metrics[-1]["ranking"] < 0.02
    assert 0.5 < chance_of_yes(policy) < 0.9


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own.

    Of six problems three are learnt from first: the later ones.
    """
    drawn = training.spied_draws(monkeypatch)
    config = replace(
        CONFIG, prompts=6, batch=3, margin=0.2, sft_weight=2.0, temperature=temperature
    )
    policy, reference = stretched(), new_gpt(3)
    twin, state = copy.deepcopy(policy), {}
    metrics = next(run(policy, config, reference=reference, state=state))
    assert state["order"] == [0]

    ((_, rollout),) = drawn
    lengths = torch.tensor([len(ids) for ids in rollout.responses()[12:]])
    rewards = judged(rollout)[12:].tolist()
    nats = row_nats(twin, rollout, temperature)[12:]  # (12,)
    points, found, total, best = nats / lengths, [], 0.0, []
    for first in (0, 4, 8):
        group = range(first, first + 4)
        right = [i for i in group if rewards[i]]
        for a, b in ((a, b) for a in right for b in group if not rewards[b]):
            found.append((points[b] > points[a]).item())
            total = total + torch.relu(0.2 + points[b] - points[a]) / 3
        best += right[:1]
    sft = -nats[best].sum() / lengths[best].sum()
    loss = total + 2 * sft
    right = torch.tensor(rewards) > 0  # (12,)
    rows = right.view(3, 4).tolist()
    expected = {
        "round": 1,
        "completions": 24,
        "tokens_trained": int(lengths.sum()),
        "loss": loss.item(),
        "ranking": total.item(),
        "sft": sft.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": sum(training.row_kl(twin, reference, rollout, temperature)) / 24,
        "violated": sum(found) / len(found),
        "tied": sum(len(set(row)) == 1 for row in rows) / 3,
        "unanswered": sum(not any(row) for row in rows) / 3,
        "mean_logprob_right": points[right].mean().item(),
        "mean_logprob_wrong": points[~right].mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)
    assert metrics["kl"] > 0 and found


def test_ties_and_unanswered_problems_are_counted():
    """All right: imitation alone is left. All wrong: nothing is, and nothing moves."""
    policy = base()
    config = replace(CONFIG, max_new_tokens=9)
    metrics = list(run(policy, config, always))
    assert {row["tied"] for row in metrics} == {1} and metrics[0]["sft"] > 0
    assert {row["violated"] for row in metrics} == {0}
    assert {row["unanswered"] for row in metrics} == {0}
    before = copy.deepcopy(dict(policy.state_dict()))
    metrics = list(run(policy, reward=never))
    assert {row["unanswered"] for row in metrics} == {1}
    assert {row["loss"] for row in metrics} == {row["grad_norm"] for row in metrics}
    assert metrics[0]["loss"] == 0 and metrics[0]["mean_logprob_right"] == 0
    training.assert_same_bits(dict(policy.state_dict()), before)


def test_problems_are_asked_in_order_and_every_batch_is_learnt_from(monkeypatch):
    asked, learnt = [], []

    def spy(problems, texts):
        asked.append("".join(problem.question for problem in problems))
        return yes(problems, texts)

    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    state, metrics = {}, []
    config = replace(CONFIG, samples=2, updates=4)
    for row in run(base(), config, spy, state=state):
        metrics.append(row)
        learnt.append(len(state["order"]))
    assert asked == ["aabb" + "ccdd", "eeaa" + "bbcc"]
    assert [len(rollout.mask) for _, rollout in drawn] == [
        6,
        2,
    ] * 2  # `chunk` at a time
    assert learnt == [1, 0, 1, 0] * 2  # two batches, twice each, in both rounds
    assert [row["completions"] for row in metrics] == [8] * 4 + [16] * 4
    assert [row["update"] for row in metrics] == list(range(1, 9))
    assert [row["round"] for row in metrics] == [1] * 4 + [2] * 4
    rewards = [row["reward"] for row in metrics]
    assert len(set(rewards[:4])) == 1


def test_a_round_begins_with_all_its_batches():
    """What the round before left over is of answers that are gone."""
    state, learnt = {}, []
    for _ in run(base(), CONFIG, updates=3, state=state):
        learnt.append(len(state["order"]))
    assert learnt == [1, 0, 1] * 2


def test_what_is_shown_is_scored_as_what_is_trained():
    """Sums of nats lie below means of the same answers."""
    shown = []
    for likelihood in (rrhf.mean_logprobs, rrhf.summed_logprobs):
        metrics = next(run(base(), CONFIG, likelihood=likelihood))
        shown.append((metrics["mean_logprob_right"], metrics["mean_logprob_wrong"]))
    (right, wrong), (right_sum, wrong_sum) = shown
    assert right_sum < right - 0.1 and wrong_sum < wrong - 0.1


def test_a_round_takes_its_answers_from_the_policy_of_its_start(monkeypatch):
    """Own answers, iterated: the second round's come from a policy that has learnt."""
    drawn = training.spied_draws(monkeypatch)
    metrics = list(run(base(), **LONG | {"updates": 5}))
    assert len(drawn) == 2
    share = [judged(rollout).mean().item() for _, rollout in drawn]
    assert share == pytest.approx([metrics[0]["reward"], metrics[-1]["reward"]])
    assert share[1] > share[0] + 0.2


def test_given_answers_are_learnt_from_and_nothing_is_drawn(monkeypatch):
    """The paper's first strategy: answers from elsewhere, drawn once, as many to a
    problem as there are, whatever config.samples says."""
    state = {}
    list(run(base(), replace(CONFIG, rounds=1, updates=1), state=state))
    given = rrhf.Rollout(**state["rollout"]), state["rewards"]

    monkeypatch.setattr(minialign.training, "generate", None)
    policy = base()
    sizes = LONG | {"updates": 10, "batch": 2, "samples": 1}
    metrics = list(run(policy, problems=[], given=given, **sizes))
    assert chance_of_yes(policy) > 0.9 and len(metrics) == 20
    assert {row["completions"] for row in metrics} == {0}
    assert "reward" not in metrics[0] and metrics[0]["violated"] > 0.5


def test_what_counts_as_success_is_where_the_bar_lies():
    """Rewards and bar lowered alike: the same answers are imitated."""
    rewards = float64([[1.0, 0.0], [0.0, 0.0], [0.5, 0.25]])
    logprobs = -float64([[0.5, 1.0]]).expand(6, 2)
    mask = torch.ones(6, 2, dtype=torch.bool)
    assert rrhf.best_answers(rewards).tolist() == [[1, 0], [0, 0], [1, 0]]
    assert rrhf.best_answers(rewards, 0.5).tolist() == [[1, 0], [0, 0], [0, 0]]
    assert torch.equal(rrhf.best_answers(rewards - 3, -3.0), rrhf.best_answers(rewards))
    counts = (3, 10)
    for threshold, tokens in ((0.0, 4), (0.5, 2), (1.0, 0)):
        loss = rrhf_loss(logprobs, rewards, mask, threshold=threshold, counts=counts)
        free = rrhf_loss(logprobs, rewards, mask, sft_weight=0.0, counts=counts)
        close(loss - free, tokens * 0.75 / 10)
