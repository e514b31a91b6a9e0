"""ReMax: which KL a token pays for, how far the authors' code is off, and training."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from minialign.algorithms import reinforce, remax
from minialign.algorithms.remax import (
    code_returns,
    code_weights,
    remax_advantages,
    remax_loss,
    whole_answer,
)
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close
from tests.properties.policy_gradients import (
    LOGITS,
    REF_LOGPROBS,
    REFERENCE,
    REWARDS,
    ascent,
)
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    always,
    base,
    base_weights,
    generator,
    judged,
    row_nats,
    stretched,
    yes,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)


def greedy_row(logits):
    """Which of the 15 responses has the likeliest token at every step."""
    said = ()
    while len(said) < world.STEPS and world.END not in said:
        said += (int(logits[world.PREFIXES.index(said)].argmax()),)
    return world.RESPONSES.index(said)


GREEDY = greedy_row(LOGITS)
GRADIENT = world.true_gradient(LOGITS, REWARDS)  # (7, 3), of E[r]
PRICED = world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.3)  # less 0.3 KL


def compared(weigh, beta=0.0, baseline=GREEDY, rewards=REWARDS):
    """The loss of a batch of responses, all to the one prompt there is."""

    def loss(rows, logprobs, mask):
        greedy = rewards[baseline].expand(len(rows))
        advantages = remax_advantages(rewards[rows][:, None], greedy)[:, 0]
        k1 = torch.where(mask, logprobs.detach() - REF_LOGPROBS[rows], 0.0)
        return remax_loss(logprobs, weigh(advantages, k1, mask, beta), mask)

    return loss


def error(actual, expected):
    """The distance, as a share of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


def test_the_greedy_answer_need_not_be_the_likeliest():
    odds = world.probabilities(LOGITS)
    assert world.RESPONSES[GREEDY] == (1, world.END)
    assert odds[GREEDY] < odds.max() - 0.03


def test_learning_from_the_greedy_answer_as_well_is_biased():
    """It was not sampled: its weight is no expectation's."""

    def loss(rows, logprobs, mask):
        row = torch.tensor([GREEDY])
        table = world.token_logprobs(LOGITS)[row]  # of the greedy answer
        drawn = compared(whole_answer, baseline=0)(rows, logprobs, mask)
        same = (rows == row).double()[:, None]  # its gradient, where it was drawn
        weight = (REWARDS[row] - REWARDS[0]) / table.sum().exp()
        return drawn + remax_loss(logprobs, weight * same.expand_as(mask), mask)

    assert error(ascent(loss), GRADIENT) > 0.3


def to_go(advantages, k1, mask, beta):
    """Each token pays for itself and for what comes after it: verl's way."""
    paid = torch.stack([k1[:, s:].sum(1) for s in range(k1.shape[1])], 1)
    return torch.where(mask, advantages[:, None] - beta * paid, 0.0)


def own_token(advantages, k1, mask, beta):
    """Each token pays for itself alone: the authors' code at gamma 1, unclipped."""
    return torch.where(mask, advantages[:, None] - beta * k1, 0.0)


def test_which_kl_a_token_pays_for():
    """That from it on, and the gradient is whole; its own, and a part is gone.

    What is left is E[Σ_s k1_s ∇ log π_s], the KL of each choice where it stands.
    """
    close(ascent(compared(to_go, 0.3)), PRICED)
    assert 0.15 < error(ascent(compared(own_token, 0.3)), PRICED) < 0.25

    def each_choice(logits):
        policy, reference = logits.log_softmax(1), REFERENCE.log_softmax(1)
        kl = (policy.exp() * (policy - reference)).sum(1)  # (7,)
        odds = world.probabilities(LOGITS)  # held: where the policy stands
        visits = torch.zeros_like(kl)
        for state, reached in zip(world.STATES.T, world.MASK.T, strict=True):
            visits = visits.index_add(0, state, odds * reached)
        return (visits * kl).sum()

    left = GRADIENT - 0.3 * world.gradient(each_choice, LOGITS)
    close(ascent(compared(own_token, 0.3)), left)


def test_the_authors_code_is_biased_and_by_how_much(monkeypatch):
    """The bug museum's row: gamma 1 passes, the setting of the code does not."""
    off = error(ascent(compared(code_returns)), GRADIENT)
    assert 0.01 < off < 0.02  # gamma 0.99 over at most three tokens
    assert error(ascent(compared(code_returns, 0.3)), PRICED) > 0.2
    # The token mean of one answer is biased, and worse than the discount.
    alone, pair = (ascent(compared(code_weights), n) for n in (1, 2))
    assert error(alone, GRADIENT) > 0.5
    assert world.cosine(alone, GRADIENT) < world.cosine(pair, GRADIENT) < 0.95
    monkeypatch.setattr(remax, "GAMMA", 1.0)
    close(ascent(compared(code_returns)), GRADIENT)
    close(ascent(compared(code_returns, 0.3)), ascent(compared(own_token, 0.3)))


def test_clipping_the_difference_is_biased_where_rewards_are_large(monkeypatch):
    """Of rewards 10 times as large the gradient is 10 times as long, but for the clip.

    Small differences are not clipped: see the test before.
    """
    monkeypatch.setattr(remax, "GAMMA", 1.0)
    actual = ascent(compared(code_returns, rewards=10 * REWARDS))
    assert error(actual, 10 * GRADIENT) > 0.1


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["remax"]
CONFIG = METHOD.config
run = METHOD.run
LONG = METHOD.long


@torch.no_grad()
def greedy_answer(policy, question, budget=3):
    """Token by token, without a cache: what `generate` should have said."""
    ids = TOKENIZER.encode_prompt(question)
    start = len(ids)
    while len(ids) - start < budget and TOKENIZER.eos_id not in ids[start:]:
        ids.append(int(policy.logits(policy(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[start:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied_draws(monkeypatch)
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    rollout, greedy = (result for _, result in drawn)
    assert greedy.greedy and greedy.samples == 1 and rollout.samples == 2
    asked = [problem.question for problem in (*PROBLEMS, PROBLEMS[0])]
    said = [greedy_answer(twin, question) for question in asked]
    assert greedy.responses() == said  # of the parameters before the step
    bar = torch.tensor([float(TOKENIZER.decode_response(ids) == "y") for ids in said])
    rewards = judged(rollout)  # (12,)
    nats = row_nats(twin, rollout, temperature)  # (12,)
    k1 = (nats - row_nats(reference, rollout, temperature)).detach()
    advantages = rewards - bar.repeat_interleave(2)
    loss = -((advantages - 0.5 * k1) * nats).mean()
    expected = {
        "completions": 18,
        "greedy_reward": bar.mean().item(),
        "ties": (advantages == 0).float().mean().item(),
        "greedy_truncated": sum(TOKENIZER.eos_id not in ids for ids in said) / 6,
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": k1.mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)


def test_without_its_baseline_it_is_reinforce():
    """The duplicates are tied: same draws, same steps, and the same at K = 1."""
    ends = []
    shared = {"updates": 3, "prompts": 6, "max_new_tokens": 3, "lr": 1e-2, "warmup": 3}
    for samples in (1, 2):
        sizes = {**shared, "samples": samples, "micro_batch": 5, "beta": 0.3}
        ours, theirs = base().double(), base().double()
        more = {"reference": base().double()}
        compare = {"compare": lambda rewards, greedy: rewards}
        mine = list(run(ours, remax.RemaxConfig(**sizes), **compare, **more))
        args = theirs, TOKENIZER, PROBLEMS, yes, reinforce.ReinforceConfig(**sizes)
        other = list(reinforce.train(*args, generator=generator(), **more))
        for a, b in zip(mine, other, strict=True):
            assert {k: a[k] for k in a if k in b and k != "completions"} == (
                pytest.approx({k: b[k] for k in b if k in a and k != "completions"})
            )
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        ends.append(mine[-1]["completions"])
    assert ends == [36, 54]  # the greedy answers were drawn and are counted


def test_ties_are_silent():
    """Whatever is said earns the same: no weight moves, nothing is hidden."""
    policy = base()
    metrics = list(run(policy, replace(CONFIG, max_new_tokens=8), always))
    assert [row["ties"] for row in metrics] == [1.0] * 5
    assert [row["grad_norm"] for row in metrics] == [0.0] * 5
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


def test_the_greedy_answers_follow_the_policy_unless_told_otherwise():
    """From the same parameters; a stale greedy policy stays where it was."""
    followed = list(run(base(), **LONG))
    kept = list(run(base(), **LONG, greedy_policy=base()))
    assert [row["greedy_reward"] for row in kept] == [0.0] * 15
    assert followed[0]["greedy_reward"] == 0 and followed[-1]["greedy_reward"] == 1
    # Once sure, it falls silent; or each answer is compared with one of long ago.
    assert followed[0]["ties"] < 0.9 < followed[-1]["ties"]
    assert kept[-1]["ties"] < 0.1


def test_the_greedy_answers_are_deterministic_and_cost_no_draws():
    ends = []
    for _ in range(2):
        draw = generator()
        steps = run(base(), generator=draw)
        next(steps)
        ends.append(draw.get_state())
    alone = generator()
    torch.randint(2**62, (), generator=alone)  # seeds the order of the data
    torch.rand((3, 12), generator=alone, dtype=torch.float64)
    assert torch.equal(*ends) and torch.equal(ends[0], alone.get_state())


def test_a_greedy_answer_that_does_not_end_is_counted_too():
    metrics = training.check_truncation(partial(run, **LONG))
    assert metrics["greedy_truncated"] == 1.0
    assert metrics["greedy_reward"] == 0.0
    assert metrics["ties"] == pytest.approx(metrics["truncated"])


def test_a_headline_run_draws_16384_answers():
    config = remax.RemaxConfig()
    each = config.prompts * (config.samples + 1)
    assert each == 256 and config.updates * each == 16_384
