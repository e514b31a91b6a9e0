"""ReMax: its expected gradient by enumeration, its returns and loss, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minialign.algorithms import reinforce, remax
from minialign.algorithms.remax import (
    code_returns,
    code_weights,
    remax_advantages,
    remax_loss,
    whole_answer,
)
from minialign.logprobs import token_mean
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
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

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do


def greedy_row(logits):
    """Which of the 15 responses has the likeliest token at every step."""
    said = ()
    while len(said) < world.STEPS and world.END not in said:
        said += (int(logits[world.PREFIXES.index(said)].argmax()),)
    return world.RESPONSES.index(said)


GREEDY = greedy_row(LOGITS)


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def compared(weigh, beta=0.0, baseline=GREEDY, rewards=REWARDS):
    """The loss of a batch of responses, all to the one prompt there is."""

    def loss(rows, logprobs, mask):
        greedy = rewards[baseline].expand(len(rows))
        advantages = remax_advantages(rewards[rows][:, None], greedy)[:, 0]
        k1 = torch.where(mask, logprobs.detach() - REF_LOGPROBS[rows], 0.0)
        return remax_loss(logprobs, weigh(advantages, k1, mask, beta), mask)

    return loss


def ascent(loss, samples=1):
    """(7, 3): what the policy moves along, in expectation: -E[∇ loss]."""
    return -world.expected_gradient(loss, LOGITS, samples)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("samples", [1, 2])
def test_the_greedy_baseline_costs_no_bias(samples):
    """PG-1: the expected gradient is the gradient of E[r]."""
    actual = ascent(compared(whole_answer), samples)
    close(actual, world.true_gradient(LOGITS, REWARDS))


def test_the_greedy_answer_need_not_be_the_likeliest():
    odds = world.probabilities(LOGITS)
    assert world.RESPONSES[GREEDY] == (1, world.END)
    assert odds[GREEDY] < odds.max() - 0.03


@pytest.mark.parametrize("row", range(0, world.COUNT, 4))
def test_a_stale_greedy_answer_costs_no_bias_either(row):
    """Whoever's answer it was: it did not look at this one. It costs noise."""
    actual = ascent(compared(whole_answer, baseline=row))
    close(actual, world.true_gradient(LOGITS, REWARDS))


def test_a_baseline_that_looks_at_the_sampled_answer_is_biased():
    """PG-1, the negative control: the better of two answers, itself and another."""

    def loss(rows, logprobs, mask):
        best = REWARDS[rows].maximum(REWARDS[0])
        advantages = remax_advantages(REWARDS[rows][:, None], best)[:, 0]
        return remax_loss(logprobs, advantages[:, None].expand_as(mask), mask)

    assert error(ascent(loss), world.true_gradient(LOGITS, REWARDS)) > 0.4


def test_learning_from_the_greedy_answer_as_well_is_biased():
    """It was not sampled: its weight is no expectation's."""

    def loss(rows, logprobs, mask):
        row = torch.tensor([GREEDY])
        table = world.token_logprobs(LOGITS)[row]  # of the greedy answer
        drawn = compared(whole_answer, baseline=0)(rows, logprobs, mask)
        same = (rows == row).double()[:, None]  # its gradient, where it was drawn
        weight = (REWARDS[row] - REWARDS[0]) / table.sum().exp()
        return drawn + remax_loss(logprobs, weight * same.expand_as(mask), mask)

    assert error(ascent(loss), world.true_gradient(LOGITS, REWARDS)) > 0.3


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_the_kl_of_the_whole_answer_has_the_gradient_of_the_objective(beta):
    """PG-7: that of E[r] - beta KL(policy ‖ reference)."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, beta)
    close(ascent(compared(whole_answer, beta)), expected)
    assert beta == 0 or error(expected, world.true_gradient(LOGITS, REWARDS)) > 0.05


def to_go(advantages, k1, mask, beta):
    """Each token pays for itself and for what comes after it: verl's way."""
    paid = torch.stack([k1[:, s:].sum(1) for s in range(k1.shape[1])], 1)
    return torch.where(mask, advantages[:, None] - beta * paid, 0.0)


def own_token(advantages, k1, mask, beta):
    """Each token pays for itself alone: the authors' code at gamma 1, unclipped."""
    return torch.where(mask, advantages[:, None] - beta * k1, 0.0)


def test_which_kl_a_token_pays_for():
    """KL-9: that from it on, and the gradient is whole; its own, and a part is gone.

    What is left is E[Σ_s k1_s ∇ log π_s], the KL of each choice where it stands.
    """
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.3)
    close(ascent(compared(to_go, 0.3)), expected)
    assert 0.15 < error(ascent(compared(own_token, 0.3)), expected) < 0.25

    def each_choice(logits):
        policy, reference = logits.log_softmax(1), REFERENCE.log_softmax(1)
        kl = (policy.exp() * (policy - reference)).sum(1)  # (7,)
        odds = world.probabilities(LOGITS)  # held: where the policy stands
        visits = torch.zeros_like(kl)
        for state, reached in zip(world.STATES.T, world.MASK.T, strict=True):
            visits = visits.index_add(0, state, odds * reached)
        return (visits * kl).sum()

    missing = world.true_gradient(LOGITS, REWARDS) - 0.3 * world.gradient(
        each_choice, LOGITS
    )
    close(ascent(compared(own_token, 0.3)), missing)


def test_the_authors_code_is_biased_and_by_how_much(monkeypatch):
    """The bug museum's row: gamma 1 passes, the setting of the code does not."""
    plain = world.true_gradient(LOGITS, REWARDS)
    off = error(ascent(compared(code_returns)), plain)
    assert 0.01 < off < 0.02  # gamma 0.99 over at most three tokens
    # The token mean of one answer is its own: PG-5, and worse than the discount.
    assert error(ascent(compared(code_weights)), plain) > 0.5
    alone, pair = (ascent(compared(code_weights), n) for n in (1, 2))
    assert world.cosine(alone, plain) < world.cosine(pair, plain) < 0.95
    priced = world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.3)
    assert error(ascent(compared(code_returns, 0.3)), priced) > 0.2
    monkeypatch.setattr(remax, "GAMMA", 1.0)
    close(ascent(compared(code_returns)), plain)
    close(ascent(compared(code_returns, 0.3)), ascent(compared(own_token, 0.3)))


def test_clipping_the_difference_is_biased_where_rewards_are_large(monkeypatch):
    monkeypatch.setattr(remax, "GAMMA", 1.0)
    for scale, biased in ((1.0, False), (10.0, True)):
        rewards = scale * REWARDS
        actual = ascent(compared(code_returns, rewards=rewards))
        off = error(actual, world.true_gradient(LOGITS, rewards))
        assert (off > 0.1) == biased and (off < 1e-12) != biased


def test_nothing_moves_at_the_optimum():
    """X-1: at reference exp(r / beta) / Z all weights are beta log Z - r(greedy)."""
    best, value = world.optimum(REWARDS, REFERENCE, beta=0.5)
    logits = world.logits_of(best)
    k1 = world.token_logprobs(logits) - REF_LOGPROBS
    greedy = REWARDS[greedy_row(logits)]
    advantages = remax_advantages(REWARDS[:, None], greedy.expand(15))[:, 0]
    weights = whole_answer(advantages, k1, world.MASK, 0.5)
    close(weights[world.MASK], value - greedy)


def test_a_flipped_sign_descends():
    expected = world.true_gradient(LOGITS, REWARDS)
    right = compared(whole_answer)
    assert world.cosine(ascent(lambda *args: -right(*args)), expected) < -0.999


# Part 2: advantages, weights and the loss

float64 = partial(torch.tensor, dtype=torch.float64)
CASES = strategies.batches(logprobs=strategies.logprobs, weights=strategies.tensors)
MASK = torch.tensor([[True, True, True], [True, True, False]])
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "weights": float64([[2.0, 1.0, 0.5], [-1.0, 4.0, 7.0]]),
    "mask": MASK,
}
PAID = {
    "advantages": float64([1.0, -8.0]),
    "k1": float64([[1.0, -0.5, 0.25], [0.5, 1.5, 9.0]]),
    "mask": MASK,
}
WEIGHED = strategies.batches(k1=strategies.tensors, rows=("advantages",))


def test_advantages_by_hand():
    """Right against wrong, both right, wrong against right, both wrong: ADV-11."""
    rewards = float64([[1.0, 1.0], [0.0, 1.0], [0.1, 0.0]])
    actual = remax_advantages(rewards, float64([0.0, 1.0, 0.1]))
    close(actual, float64([[1.0, 1.0], [-1.0, 0.0], [0.0, -0.1]]))


@settings(max_examples=30)
@given(strategies.groups(), st.sampled_from([0.0, 0.5, -3.0]))
def test_a_greedy_answer_of_the_same_reward_gives_exactly_nothing(rewards, shift):
    """ADV-11: also in float32, and whatever is added to all rewards."""
    for x in (rewards, rewards.float()):
        for k in range(x.shape[1]):
            advantages = remax_advantages(x, x[:, k])
            assert (advantages[:, k] == 0).all()
            assert ((advantages == 0) == (x == x[:, k : k + 1])).all()
            close(remax_advantages(x + shift, x[:, k] + shift), advantages, 1e-6)
    one = remax_advantages(rewards[:, :1], rewards[:, 1])  # K = 1 is the method
    close(one[:, 0], rewards[:, 0] - rewards[:, 1])


def test_advantages_refuse_other_shapes_and_numbers():
    case = {"rewards": torch.ones(3, 2), "greedy_rewards": torch.ones(3)}
    remax_advantages(**case)
    for name, bad in (
        ("rewards", torch.ones(3)),
        ("rewards", torch.ones(3, 2, 1)),
        ("rewards", torch.tensor([[1.0, math.nan]] * 3)),
        ("greedy_rewards", torch.ones(2)),
        ("greedy_rewards", torch.ones(3, 1)),
        ("greedy_rewards", torch.ones(3, 2)),
        ("greedy_rewards", torch.tensor([1.0, 0.0, math.inf])),
    ):
        call = {**case, name: bad}
        common.assert_refused(remax_advantages, call, ValueError, str(bad), [name])
        call = {**case, name: torch.ones_like(case[name]).long()}
        common.assert_refused(remax_advantages, call, TypeError, "int64", [name])


def test_loss_by_hand():
    """-(-1 - 1.5 - 1 + 0.1 - 12) / 2, and -weight / B for every live token."""
    leaf = CASE["logprobs"].clone().requires_grad_()
    loss = remax_loss(leaf, CASE["weights"], MASK)
    close(loss, 7.7)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert slope.tolist() == [[-1.0, -0.5, -0.25], [0.5, -2.0, 0.0]]


def test_weights_by_hand():
    """1 - 0.5 (1 - 0.5 + 0.25) and -8 - 0.5 (0.5 + 1.5), whatever is masked."""
    actual = whole_answer(**PAID, beta=0.5)
    close(actual, float64([[0.625] * 3, [-9.0, -9.0, 0.0]]))


def test_the_golden_returns_of_the_code():
    """methods.md, section 8: r - b = 1, gamma 0.99, three tokens; then by hand."""
    ones = torch.ones(1, dtype=torch.float64)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    golden = code_returns(ones, zeros, torch.ones(1, 3, dtype=torch.bool), 0.1)
    close(golden, float64([[0.970299, 0.9801, 0.99]]))
    # -8 is clipped to -5, and each token pays for its own KL.
    expected = float64(
        [
            [0.970299 - 0.5, 0.9801 + 0.25, 0.99 - 0.125],
            [-5 * 0.9801 - 0.25, -5 * 0.99 - 0.75, 0.0],
        ]
    )
    close(code_returns(**PAID, beta=0.5), expected)
    close(code_weights(**PAID, beta=0.5), expected * 2 / 5)


@pytest.mark.parametrize("difference", [-6.0, -5.0, -4.9, 0.0, 5.0, 5.1, 1e30])
def test_the_clip_of_the_code_has_its_corners_at_5(difference):
    k1, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    actual = code_returns(torch.tensor([difference]), k1, mask, 0.0)
    close(actual, 0.99 * max(-5.0, min(5.0, difference)), atol=1e-6)


@settings(max_examples=30)
@given(WEIGHED, st.data())
def test_the_code_takes_a_token_mean(case, data):
    """Weighted by B / tokens, the sequence sum is the mean over live tokens."""
    logprobs = data.draw(strategies.logprobs(case["mask"].shape))
    returns = code_returns(**case, beta=0.3)
    expected = -token_mean(returns * logprobs, case["mask"])
    weights = code_weights(**case, beta=0.3)
    close(remax_loss(logprobs, weights, case["mask"]), expected)


def test_the_loss_owes_what_every_loss_owes():
    """C-1 to C-12."""
    common.check_mask_is_inert(remax_loss, CASES)
    common.check_microbatches(remax_loss, CASES, common.live_rows)
    common.check_permutation(remax_loss, CASES)
    common.check_shapes_refused(remax_loss, CASE)
    common.check_no_gradient_to(remax_loss, CASES, ["weights"])
    common.check_gradient_reaches(remax_loss, CASE)
    common.check_pure(remax_loss, CASES)
    common.check_dtype(remax_loss, CASES, ["logprobs"])
    common.check_duplication(remax_loss, CASES)


@pytest.mark.parametrize("weigh", [whole_answer, code_returns, code_weights])
def test_weights_owe_it_too(weigh):
    """No gradient to anything: a weight is a constant of the policy."""
    priced, names = partial(weigh, beta=0.3), ["advantages", "k1"]
    common.check_mask_is_inert(priced, WEIGHED, names)
    common.check_shapes_refused(priced, PAID)
    common.check_no_gradient_to(priced, WEIGHED, names)
    common.check_pure(priced, WEIGHED)
    common.check_dtype(priced, WEIGHED, names)
    if weigh is not code_weights:  # which counts the tokens of all rows
        common.check_permutation(priced, WEIGHED, names)
    betas = {str(b): partial(weigh, beta=b) for b in (0, 0.1, 0.3)}
    common.check_option_matters(
        {b: lambda s=s, **case: s(**case).sum() for b, s in betas.items()}, PAID
    )
    for beta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta: got"):
            weigh(**PAID, beta=beta)


def by_multiplication(logprobs, weights, mask, count=None):
    """nan * 0 is nan."""
    rows = mask.any(1).sum() if count is None else count
    return -(logprobs * weights.detach() * mask).sum() / rows


def masked_late(logprobs, weights, mask, count=None):
    """The value is right and the gradient is nan: 0 x inf."""
    rows = mask.any(1).sum() if count is None else count
    return -torch.where(mask, logprobs * weights.detach(), 0.0).sum() / rows


def own_mean(logprobs, weights, mask, count=None):
    """A token mean whose divisor is the micro-batch's own."""
    return remax_loss(logprobs, weights, mask, int(mask.sum()))


def broadcast(logprobs, weights, mask, count=None):
    """(B, 1) weights, or one for all, are as welcome as (B, S)."""
    return remax_loss(logprobs, weights.expand(mask.shape), mask, count)


@pytest.mark.parametrize(
    "check, wrong, cases",
    [
        (common.check_mask_is_inert, by_multiplication, CASES),
        (common.check_mask_is_inert, masked_late, CASES),
        (common.check_shapes_refused, broadcast, CASE),
        (partial(common.check_microbatches, count=common.live_rows), own_mean, CASES),
    ],
)
def test_the_properties_find_wrong_losses(check, wrong, cases):
    assert common.refutes(check, wrong, cases)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "weights"])
def test_the_loss_refuses_what_is_not_finite(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1, 0] = bad
    common.assert_refused(remax_loss, case, ValueError, f"{bad}", [name])


def test_probabilities_above_1_and_empty_batches_are_refused():
    case = {**CASE, "logprobs": -CASE["logprobs"]}
    common.assert_refused(remax_loss, case, ValueError, "above 0", ["logprobs"])
    empty = torch.zeros_like(MASK)
    for function, case in ((remax_loss, CASE), (partial(whole_answer, beta=0), PAID)):
        call = {**case, "mask": empty}
        common.assert_refused(function, call, ValueError, "no live token", ["mask"])


def test_far_log_probabilities_and_single_tokens_are_fine():
    """Degenerate but legal: T = 1, one row, -1000 nats, no advantage at all."""
    one = torch.ones(1, 1, dtype=torch.bool)
    leaf = float64([[-1000.0]]).requires_grad_()
    for advantage in (0.0, 1.0):
        k1 = float64([[-990.0]])
        weights = whole_answer(float64([advantage]), k1, one, 0.0)
        loss = remax_loss(leaf, weights, one)
        close(loss, 1000.0 * advantage)
        (slope,) = torch.autograd.grad(loss, leaf)
        assert slope.item() == -advantage


# Part 3: training, in a world where the answers are "y" and "no"

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
    drawn = training.spied(monkeypatch, remax, "generate")
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
    """ADV-11: from the same parameters; a stale greedy policy stays where it was."""
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
