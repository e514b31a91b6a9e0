"""What the methods that learn from rewards owe, each beside what every loss does."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from hypothesis import assume
from hypothesis import strategies as st

from minialign import training as room
from minialign.algorithms import ppo, reinforce, remax
from minialign.algorithms.reinforce import reinforce_loss
from minialign.logprobs import token_logprobs
from minialign.sampling import collate
from tests import enumeration as world
from tests import strategies
from tests.properties import common, training
from tests.properties.common import close, float64
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    base,
    generator,
    never,
    new_gpt,
    row_nats,
    stretched,
    yes,
)

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
GUESSES = world.random_logits(3)[:, 0]  # (7,): what a critic may say of each prefix
SMALL = {"updates": 4, "prompts": 2, "samples": 6, "max_new_tokens": 3, "lr": 1e-2}
REINFORCE = reinforce.ReinforceConfig(**SMALL)
PPO = ppo.PPOConfig(**SMALL, critic_lr=1e-2, kl_stop=None, minibatches=1)

# Two answers, of three tokens and of two

MASK = torch.tensor([[True, True, True], [True, True, False]])
NATS = float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]])
REF_NATS = float64([[-1.5, -1.0, -2.0], [-0.2, -1.0, -0.5]])
near = partial(strategies.tensors, elements=strategies.numbers(-3.0, 3.0))
shares = partial(strategies.tensors, elements=strategies.numbers(0.0, 1.0))


def ascent(loss, samples=1):
    """(7, 3): what the policy moves along, in expectation: -E[∇ loss]."""
    return -world.expected_gradient(loss, LOGITS, samples)


# reinforce, and what is right for its loss in others


def check_costs_no_bias(baseline) -> None:
    """It has not seen the answer. So whatever it remembers of earlier batches,
    nothing at first, the expected gradient of B answers is that of E[r]."""
    for B, memory in itertools.product((1, 2), (0.0, 5.0)):

        def compare(rewards, memory=memory):
            return torch.stack([batch - baseline(batch, memory) for batch in rewards])

        close(ascent_of_groups(compare, B), world.true_gradient(LOGITS, REWARDS))


def check_unbiased(loss) -> None:
    """The expected gradient is that of E[r]."""

    def weighted(rows, logprobs, mask):
        return loss(logprobs, REWARDS[rows], mask)

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(ascent(weighted, samples), expected)


def check_unbiased_by_token(loss) -> None:
    """Unbiased where every token has a weight of its own: here its answer's reward."""

    def weighted(rows, logprobs, mask):
        return loss(logprobs, REWARDS[rows][:, None].expand_as(mask), mask)

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(ascent(weighted, samples), expected)


def check_unbiased_in_groups(compare) -> None:
    """Advantages within a group of 2 or 3 draws, each summed over its tokens,
    have the gradient of E[r] as their expectation."""
    for K in (2, 3):
        close(ascent_of_groups(compare, K), world.true_gradient(LOGITS, REWARDS))


def ascent_of_groups(compare, K, rewards=REWARDS):
    """(7, 3): E[(1/K) Σ_i A_i ∇ log π(y_i)] over all K-tuples of draws, in one call."""
    rows = torch.cartesian_prod(*[torch.arange(15)] * K).view(-1, K)  # (15^K, K)
    chance = world.probabilities(LOGITS)[rows].prod(1, keepdim=True)  # (15^K, 1)
    weight = torch.zeros(15, dtype=torch.float64)
    each = chance * compare(rewards[rows]) / K  # (15^K, K)
    weight.index_add_(0, rows.flatten(), each.flatten())
    return world.gradient(lambda x: weight @ world.sequence_logprobs(x), LOGITS)


def check_unbiased_at_ratio_1(loss) -> None:
    """On fresh answers the clip is silent, and the ratio's gradient is that
    of the log-probability."""

    def weighted(rows, logprobs, mask):
        advantages = REWARDS[rows][:, None].expand_as(logprobs)
        return loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.3)

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(ascent(weighted, samples), expected)


def check_tokens_are_unbiased_at_ratio_1(loss) -> None:
    """Unbiased, for a loss that is not reduced: the mean answer's sum over tokens."""

    def reduced(logprobs, old_logprobs, advantages, mask, *band):
        each = loss(logprobs, old_logprobs, advantages[:, 0], mask, *band)
        return each.sum() / len(each)

    check_unbiased_at_ratio_1(reduced)


def check_lambda_1_is_unbiased(advantage) -> None:
    """Whatever the critic guesses before each token, with λ = 1 the advantages
    have the gradient of E[r] as their expectation."""
    actual = ascent_by_critic(advantage, GUESSES, lam=1.0)
    close(actual, world.true_gradient(LOGITS, REWARDS))


def check_true_values_are_unbiased(advantage) -> None:
    """A critic that is right may be trusted as far as one likes."""
    for lam in (0.0, 0.5, 0.95):
        actual = ascent_by_critic(advantage, true_values(), lam)
        close(actual, world.true_gradient(LOGITS, REWARDS))


def true_values():
    """(7,): what the policy earns from each prefix on, by summing over responses."""
    earned, mass = torch.zeros(2, 7, dtype=torch.float64)
    odds = world.probabilities(LOGITS)
    for row, live in enumerate(world.MASK):
        prefixes = world.STATES[row][live]
        earned[prefixes] += odds[row] * REWARDS[row]
        mass[prefixes] += odds[row]
    return earned / mass


def ascent_by_critic(advantage, values, lam):
    """(7, 3): of answers whose last token earns the reward, each token judged by what
    the critic said before it; γ = 1."""

    def loss(rows, logprobs, mask):
        earned = torch.zeros_like(logprobs)
        last = world.LENGTHS[rows] - 1
        earned[torch.arange(len(rows)), last] = REWARDS[rows]
        A = advantage(earned, values[world.STATES[rows]], mask, 1.0, lam)
        return -(A * logprobs).sum() / len(rows)

    return ascent(loss)


def check_kl_to_come(shape) -> None:
    """A token that answers for all that is paid from itself on follows the
    gradient of E[r] - beta KL(policy ‖ reference): what came before is spent."""
    for beta in (0.3, 2.0):

        def loss(rows, logprobs, mask, beta=beta):
            paid = shape(REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask, beta)
            to_come = paid.flip(1).cumsum(1).flip(1)  # (samples, 3)
            return -(torch.where(mask, to_come, 0.0) * logprobs).sum() / len(rows)

        close(ascent(loss), world.true_gradient(LOGITS, REWARDS, REFERENCE, beta))


def check_kl_in_the_reward(shape) -> None:
    """The expected gradient is that of E[r] - beta KL(policy ‖ reference)."""

    def loss(rows, logprobs, mask):
        shaped = shape(REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask, 0.5)
        return reinforce_loss(logprobs, shaped, mask)

    close(ascent(loss), world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.5))


SHAPED = {
    "rewards": float64([1.0, 0.0]),
    "logprobs": NATS,
    "ref_logprobs": REF_NATS,
    "mask": MASK,
}


def check_nan_is_refused_at_no_price(pay, case=SHAPED) -> None:
    """Beta 0 is no reason not to look: what is not finite is refused by name."""
    for name, x in case.items():
        if x.is_floating_point():
            spoiled = x.clone()
            spoiled.view(-1)[0] = math.nan
            call = {**case, name: spoiled}
            free = partial(pay, beta=0.0)
            common.assert_refused(free, call, ValueError, f"nan in {name}", [name])


def check_any_log_probability(loss, shape=(1,)) -> None:
    """A token of -1000 nats counts as any other does, and for nothing where A is 0.

    `shape` is that of the advantages of one answer of one token.
    """
    leaf = float64([[-1000.0]]).requires_grad_()
    for A in (2.0, 0.0):
        advantages = torch.full(shape, A, dtype=torch.float64)
        value = loss(leaf, advantages, torch.tensor([[True]]))
        (slope,) = torch.autograd.grad(value, leaf)
        close(value.detach(), 1000 * A)
        close(slope, -A)


def check_priced_kl(train) -> None:
    """The KL in the reward is that of the two policies that were sampled from."""
    policy, reference, heat = stretched(), base(), 0.7
    twin, right, drawn = copy.deepcopy(policy), room.generate, []

    def spy(*args, **options):
        drawn.append(right(*args, **options))
        return drawn[-1]

    config = replace(REINFORCE, temperature=heat, beta=0.5)
    more = {"reference": reference, "generator": generator()}
    with mock.patch.object(room, "generate", spy):
        metrics = next(train(policy, TOKENIZER, PROBLEMS, yes, config, **more))
    nats, others = (row_nats(each, drawn[0], heat) for each in (twin, reference))
    assert math.isclose(metrics["kl"], (nats - others).mean().item(), rel_tol=1e-4)


# remax


def check_greedy_ties(compare) -> None:
    """Exactly 0 where the greedy answer earned the same, and only there; K = 1
    is the method; right against wrong by hand."""
    rewards = float64([[1.0, 1.0], [0.0, 1.0], [0.1, 0.0]])
    actual = compare(rewards, float64([0.0, 1.0, 0.1]))
    close(actual, float64([[1.0, 1.0], [-1.0, 0.0], [0.0, -0.1]]))

    @common.forall(strategies.groups(), examples=20)
    def holds(rewards):
        for x in (rewards, rewards.float()):
            for k in range(x.shape[1]):
                advantages = compare(x, x[:, k])
                assert ((advantages == 0) == (x == x[:, k : k + 1])).all()
        one = compare(rewards[:, :1], rewards[:, 1])
        close(one[:, 0], rewards[:, 0] - rewards[:, 1])

    holds()


def check_any_greedy_answer_costs_no_bias(compare) -> None:
    """Whichever of the 15 responses the greedy one was, a stale policy's even:
    it did not look at the sampled one, and the expected gradient is that of E[r]."""
    for earned in REWARDS:

        def against(rewards, earned=earned):
            return compare(rewards, earned.expand(len(rewards)))

        close(ascent_of_groups(against, 2), world.true_gradient(LOGITS, REWARDS))


def check_kl_of_the_whole_answer(weigh) -> None:
    """The expected gradient is that of E[r] - beta KL."""

    def loss(rows, logprobs, mask):
        k1 = torch.where(mask, logprobs.detach() - REF_LOGPROBS[rows], 0.0)
        weights = weigh(REWARDS[rows], k1, mask, 0.3)
        return remax.remax_loss(logprobs, weights, mask)

    close(ascent(loss), world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.3))


PAID = {
    "advantages": float64([1.0, -8.0]),
    "k1": float64([[1.0, -0.5, 0.25], [0.5, 1.5, 9.0]]),
    "mask": MASK,
}


def check_code_returns_by_hand(weigh) -> None:
    """0.99 to the power of the tokens from each one on, itself included; -8 is cut to
    -5; and each token pays for its own KL alone."""
    ones, mask = float64([1.0]), torch.ones(1, 3, dtype=torch.bool)
    actual = weigh(ones, torch.zeros(1, 3, dtype=torch.float64), mask, 0.1)
    close(actual, float64([[0.970299, 0.9801, 0.99]]))
    first = [0.970299 - 0.5, 0.9801 + 0.25, 0.99 - 0.125]
    second = [-5 * 0.9801 - 0.25, -5 * 0.99 - 0.75, 0.0]
    close(weigh(**PAID, beta=0.5), float64([first, second]))


def check_weights_by_hand(weigh) -> None:
    """1 - 0.5 (1 - 0.5 + 0.25) and -8 - 0.5 (0.5 + 1.5), whatever is masked."""
    actual = weigh(**PAID, beta=0.5)
    close(actual, float64([[0.625] * 3, [-9.0, -9.0, 0.0]]))


def check_token_mean(weigh) -> None:
    """With these weights the sequence sum is the mean over the live tokens."""
    slots = {"logprobs": strategies.logprobs, "k1": near}

    @common.forall(strategies.batches(**slots, rows=("advantages",)))
    def holds(case):
        logprobs, mask = case["logprobs"], case["mask"]
        paid = {name: case[name] for name in PAID}
        actual = remax.remax_loss(logprobs, weigh(**paid, beta=0.3), mask)
        returns = remax.code_returns(**paid, beta=0.3)
        close(actual, -(returns * logprobs)[mask].mean())

    holds()


# rloo and grpo


def group_mean(rewards):
    """The answer is part of its own baseline; GRPO's numerator."""
    return rewards - rewards.mean(1, keepdim=True)


def check_leave_one_out(compare) -> None:
    """What makes it leave-one-out, and not just unbiased."""

    @common.forall(strategies.groups())
    def holds(rewards):
        K = rewards.shape[1]
        actual = compare(rewards)
        assert actual.shape == rewards.shape and actual.dtype == rewards.dtype
        rows = rewards.tolist()
        by_hand = [
            [row[i] - math.fsum(row[:i] + row[i + 1 :]) / (K - 1) for i in range(K)]
            for row in rows
        ]
        close(actual, float64(by_hand))
        close(actual.sum(1), 0.0)
        close(actual, K / (K - 1) * group_mean(rewards))
        if K == 2:
            close(actual[:, 0], rewards[:, 0] - rewards[:, 1])
        for a, b in ((2.5, 1.0), (-1.0, 3.0), (0.0, -2.0)):
            close(compare(a * rewards + b), a * actual)
        changed = rewards.clone()
        changed[0] = 5.0 - 3.0 * rewards[0].flip(0)
        close(compare(changed)[1:], actual[1:])
        order = list(range(1, K)) + [0]
        close(compare(rewards[:, order]), actual[:, order])
        close(compare(rewards.flip(0)), actual.flip(0))

    holds()


def check_own_share_of_the_gradient(compare) -> None:
    """An answer is part of its own mean, which leaves (K - 1)/K of the gradient
    of E[r]."""
    expected = world.true_gradient(LOGITS, REWARDS)
    for K in (2, 3, 4):
        close(ascent_of_groups(compare, K), (K - 1) / K * expected)


def check_std_weighs_the_problem(advantage) -> None:
    """Of right or wrong the std turns nothing. One problem with chance p has the
    gradient of p, times

    Σ_c Bin(c; K, p) c (K - c) / K² / (s_c + 1e-4) / (p (1 - p)), s_c the sample std.
    """
    verdicts = (REWARDS > 0.3).double()
    p = (world.probabilities(LOGITS) * verdicts).sum().item()
    for K in (2, 3, 4):
        weight = 0.0
        for c in range(1, K):
            chance = math.comb(K, c) * p**c * (1 - p) ** (K - c)
            std = math.sqrt(c * (K - c) / K / (K - 1))
            weight += chance * c * (K - c) / K**2 / (std + 1e-4) / (p * (1 - p))
        actual = ascent_of_groups(advantage, K, verdicts)
        close(actual, weight * world.true_gradient(LOGITS, verdicts))


def check_golden_advantages(advantage) -> None:
    """They tell the divisor K - 1 from K."""
    rewards = float64([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    a = math.sqrt(3) / 2
    expected = float64([[a, -a, -a, a], [1.5, -0.5, -0.5, -0.5]])
    close(advantage(rewards, epsilon=0.0), expected)


def check_own_group_only(advantage) -> None:
    """Another group changes nothing, nor does a constant."""

    @common.forall(strategies.groups(max_prompts=2), examples=20)
    def holds(rewards):
        own = advantage(rewards)
        close(advantage(rewards[:1]), own[:1])
        close(advantage(rewards.flip(1)), own.flip(1))
        close(advantage(rewards + 0.25), own)

    holds()


def check_spread(advantage) -> None:
    """They add up to 0 and, without an epsilon, their squares to
    K - 1; an epsilon makes none of them larger."""

    @common.forall(strategies.groups(), examples=20)
    def holds(rewards):
        scaled = advantage(rewards, epsilon=0.0)
        unequal = rewards.amax(1) > rewards.amin(1)
        close(scaled.sum(1), 0.0)
        squares = torch.where(unequal, rewards.shape[1] - 1.0, 0.0)
        close(scaled.square().sum(1), squares)
        close(scaled * rewards.std(1, keepdim=True), group_mean(rewards))
        assert (advantage(rewards).abs() <= scaled.abs() + 1e-12).all()

    holds()


def check_equal_rewards(advantage) -> None:
    """Exactly 0, whatever the number, its type and K, and beside a group
    of another number.

    In float32 the mean of seven times 0.1 is not 0.1.
    """
    for value in (0.1, 1 / 3, 123.456, 1e-30, -1e30):
        for K in (2, 3, 7, 15, 64):
            for dtype in (torch.float32, torch.float64):
                rewards = torch.full((2, K), value, dtype=dtype)
                rewards[1] = 0.7
                actual = advantage(rewards)
                assert (actual == 0).all(), f"{K} times {value}, {dtype}: {actual}"


def check_epsilon_law(advantage) -> None:
    """A(a r) = ±A(r) (s + e) / (s + e / |a|), and no other size of it."""
    rewards = float64([[1.0, 0.0, 0.0], [0.1, 0.5, -1.0]])
    s = rewards.std(1, keepdim=True)
    for a, e in ((0.25, 1e-4), (0.25, 0.5), (40.0, 0.5), (-3.0, 0.5)):
        law = math.copysign(1.0, a) * (s + e) / (s + e / abs(a))
        close(advantage(a * rewards, e), advantage(rewards, e) * law)


def each_answer_alike(mask):
    """(B,): 1 / B for every answer."""
    return mask.any(1).double() / mask.any(1).sum()


def each_token_alike(mask):
    """(B,): an answer's share of all tokens."""
    return mask.sum(1).double() / mask.sum()


def each_ninth(mask):
    """(B,): 1 / B for an answer of nine tokens, and less for a shorter one."""
    return mask.sum(1).double() / 9 / mask.any(1).sum()


def check_weights(reduction, of_an_answer) -> None:
    """What an answer's weights add up to, however it is padded."""

    @common.forall(strategies.shapes().flatmap(strategies.masks), examples=20)
    def holds(mask):
        weights = reduction(mask, 9)
        assert weights.dtype == torch.float64
        close(weights.sum(1), of_an_answer(mask))
        assert (weights[~mask] == 0).all()
        close(reduction(mask.flip(0), 9), weights.flip(0))
        twice = torch.cat((weights, weights)) / 2
        close(reduction(torch.cat((mask, mask)), 9), twice)

    holds()


def check_constant_divisor(reduction) -> None:
    """No answer can change it, so the gradient is that of E[r], over it."""

    def weighted(rows, logprobs, mask):
        each = REWARDS[rows][:, None] * logprobs
        return -(reduction(mask, 4) * each).sum()

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(4 * ascent(weighted, samples), expected)


def check_divergence_of_each_choice(term, divergence) -> None:
    """On fresh answers, summed over tokens, a term has the gradient of
    this divergence of each choice, the ways to the choices as they are."""

    def loss(rows, logprobs, mask):
        return term(logprobs, logprobs.detach(), REF_LOGPROBS[rows], mask).sum()

    close(world.expected_gradient(loss, LOGITS), choice_by_choice(divergence))


def choice_by_choice(divergence):
    """(7, 3): ∇ Σ_prefixes chance of coming by x divergence of the choice there."""
    live = world.probabilities(LOGITS)[:, None].expand(15, 3)[world.MASK]
    visits = torch.zeros(7, dtype=torch.float64)
    visits.index_add_(0, world.STATES[world.MASK], live)

    def total(logits):
        policy, reference = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
        return (visits * divergence(policy, reference)).sum()

    return world.gradient(total, LOGITS)


def reverse(policy, reference):
    """KL(policy ‖ reference) of each choice."""
    return (policy.exp() * (policy - reference)).sum(-1)


def forward(policy, reference):
    return reverse(reference, policy)


def nothing(policy, reference):
    return 0.0 * policy.sum(-1)


CLIPPED = {
    "logprobs": NATS,
    "old_logprobs": float64([[-0.4, -2.5, -2.1], [-0.6, -2.0, -0.5]]),
    "advantages": float64([2.0, -1.0]),
    "mask": MASK,
}
CLIP_CASES = strategies.batches(
    logprobs=strategies.logprobs,
    old_logprobs=strategies.logprobs,
    rows=("advantages",),
)


def check_clip_by_hand(loss) -> None:
    """Ratios e^-0.1, e^1 and e^0.1 for A = 2; e^0.5 and e^-1 for A = -1."""
    losses = loss(**CLIPPED, eps_low=0.2, eps_high=0.3)
    first = [-2 * math.exp(-0.1), -2 * 1.3, -2 * math.exp(0.1)]
    close(losses, float64([first, [math.exp(0.5), 0.8, 0.0]]))


WHOLE = {**CLIPPED, "ref_logprobs": REF_NATS}
WEIGHED = {**WHOLE, "weights": float64([[0.5, 0.25, 2.0], [1.0, 0.125, 9.0]])}
# Summed over each answer: the clipped loss of `check_clip_by_hand`, and k3, which is
# exp(d) - 1 - d with d = log π_ref - log π: -1, 0.5, 0 and -0.1, 2.
LOST = [-2 * math.exp(-0.1) - 2 * 1.3 - 2 * math.exp(0.1), math.exp(0.5) + 0.8]
DRIFT = [math.exp(-1) + math.exp(0.5) - 1.5, math.exp(-0.1) + math.exp(2) - 3.9]
BOUND = {"eps_low": 0.2, "eps_high": 0.3}


def check_reductions_by_hand(loss) -> None:
    """Without weights a mean of two answers' means; with Dr. GRPO's, their sums over
    2 x 9; with DAPO's, the mean of five tokens. The KL is reduced as the rest is."""
    for beta in (0.0, 0.7):
        first = LOST[0] + beta * DRIFT[0]
        second = LOST[1] + beta * DRIFT[1]
        by_hand = [
            (None, (first / 3 + second / 2) / 2),
            (MASK.double() / 2 / 9, (first + second) / 2 / 9),
            (MASK.double() / 5, (first + second) / 5),
        ]
        for weights, expected in by_hand:
            value = loss(**WHOLE, weights=weights, beta=beta, **BOUND)
            close(value, expected)


def check_what_need_not_be_said(loss) -> None:
    """Without a word of it there is no price on the KL, and no reference is needed."""
    silent = loss(**CLIPPED, **BOUND)
    close(silent, loss(**WHOLE, **BOUND, weights=None, beta=0.0))


PENALISED = strategies.batches(
    logprobs=partial(strategies.logprobs, low=-3.0),
    old_logprobs=partial(strategies.logprobs, low=-3.0),
    ref_logprobs=partial(strategies.logprobs, low=-3.0),
    weights=shares,
    rows=("advantages",),
)


def check_parts_add_up(loss) -> None:
    """Each part with its own rows of the batch's weights, and no count."""

    def weighed(count=None, **tensors):
        return loss(**tensors, beta=0.7)

    common.check_microbatches(weighed, PENALISED, common.live_rows)


def check_rows_twice_without_weights(loss) -> None:
    """Then it is a mean over answers."""
    alone = PENALISED.map(
        lambda case: {name: x for name, x in case.items() if name != "weights"}
    )
    common.check_duplication(partial(loss, beta=0.7), alone)


def check_centred_by_a_constant(loss) -> None:
    """Of two fresh answers, centred and divided by a constant, it has REINFORCE's
    gradient: that of E[r], times (K - 1)/K, over max_new_tokens."""

    def centred(rows, logprobs, mask):
        A = REWARDS[rows] - REWARDS[rows].mean()  # (2,)
        return loss(logprobs, logprobs.detach(), A, mask, mask.double() / 2 / 4)

    close(ascent(centred, 2), world.true_gradient(LOGITS, REWARDS) / 2 / 4)


def check_price_of_each_choice(loss) -> None:
    """Where nothing is earned, beta times the gradient of k3, each choice's own
    KL(ref ‖ π), with the weights that it has."""

    def priced(logprobs, old, ref, mask):
        nothing = torch.zeros(len(mask), dtype=torch.float64)
        options = {"beta": 0.5, "ref_logprobs": ref}
        return 8 * loss(logprobs, old, nothing, mask, mask.double() / 4, **options)

    check_divergence_of_each_choice(priced, forward)


def check_the_price_is_never_let_go(loss) -> None:
    """The clip holds back what is earned: a token whose ratio has left the band on
    either side is still drawn to the reference."""
    old, ref, mask = float64([[-3.0]]), float64([[-0.5]]), torch.tensor([[True]])
    for A, log_ratio in ((2.0, 1.0), (-2.0, -1.0)):
        leaf = (old + log_ratio).requires_grad_()
        value = loss(leaf, old, float64([A]), mask, beta=0.5, ref_logprobs=ref)
        (slope,) = torch.autograd.grad(value, leaf)
        d = -0.5 - (-3.0 + log_ratio)
        close(slope, 0.5 * (1 - math.exp(d)))


def check_quadrants(loss) -> None:
    """Value and gradient for either sign of A on all sides of the band.

    No gradient where A > 0 and ratio > 1 + eps_high or A < 0 and ratio < 1 - eps_low,
    else -ratio A; and never less than without the clip.
    """

    @common.forall(CLIP_CASES, 40)
    def holds(case):
        old = case["old_logprobs"]
        # Near the old ones, where the band is; and away from its edges.
        logprobs = (old + 0.1 * case["logprobs"] + 0.4).clamp(max=0.0)
        ratio = (logprobs - old).exp()
        assume(
            ((ratio - 1.4).abs() > 1e-6).all() and ((ratio - 0.8).abs() > 1e-6).all()
        )
        case = {**case, "logprobs": logprobs}
        value, slopes = common.value_and_gradients(summed(loss), case)
        A = case["advantages"][:, None].expand_as(ratio)
        flat = ((A > 0) & (ratio > 1.4)) | ((A < 0) & (ratio < 0.8))
        live = case["mask"]
        close(slopes["logprobs"], torch.where(flat | ~live, 0.0, -ratio * A))
        edge = torch.where(A > 0, 1.4, 0.8).double().round(decimals=1)
        close(value, -torch.where(live, torch.where(flat, edge, ratio) * A, 0.0).sum())
        assert value >= -(ratio * A)[live].sum() - 1e-9

    holds()


def summed(loss):
    return lambda **case: loss(**case, eps_low=0.2, eps_high=0.4).sum()


POLICY_CASES = strategies.batches(
    shape=(2, 4),
    logprobs=partial(strategies.logprobs, low=-3.0),
    old_logprobs=partial(strategies.logprobs, low=-3.0),
    advantages=near,
)


def check_only_the_ratio_counts(loss, cases) -> None:
    """What both log-probs share cancels, three times A counts three
    times, and nothing is better than it would be without the clip."""

    @common.forall(cases, examples=20)
    def holds(case):
        clipped = partial(loss, eps_low=0.2, eps_high=0.3)
        found = clipped(**case)
        less = {name: case[name] - 1.5 for name in ("logprobs", "old_logprobs")}
        same = partial(torch.testing.assert_close, **common.E64)
        same(clipped(**{**case, **less}), found)
        same(clipped(**{**case, "advantages": 3 * case["advantages"]}), 3 * found)
        unclipped = loss(**case, eps_low=1.0, eps_high=1e9)
        assert (found >= unclipped - 1e-9 * unclipped.abs() - 1e-12).all()

    holds()


def at_one_token(loss, log_ratio, A, shape, **band):
    """Value and slope where the only token's π / π_old is e^log_ratio."""
    old, mask = float64([[-3.0]]), torch.tensor([[True]])
    leaf = (old + log_ratio).requires_grad_()
    advantages = torch.full(shape, A, dtype=torch.float64)
    value = loss(leaf, old, advantages, mask, **band).sum()
    (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope.squeeze()


def check_where_the_clip_lets_go(loss, shape=(1, 1)) -> None:
    """Value and slope in every quadrant, with an asymmetric band (0.8, 1.3).

    `shape` of the advantages. A token that has all but vanished is in no way special.
    """
    ratios = (1e-300, 0.3, 0.79, 0.81, 1.0, 1.29, 1.31, 4.0)
    for A, ratio in itertools.product((2.0, -2.0), ratios):
        band = {"eps_low": 0.2, "eps_high": 0.3}
        value, slope = at_one_token(loss, math.log(ratio), A, shape, **band)
        flat = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
        close(slope, 0.0 if flat else -A * ratio)
        close(value, -min(A * ratio, A * min(max(ratio, 0.8), 1.3)))


def check_on_the_edge_it_moves(loss, shape=(1, 1)) -> None:
    """A ratio that stands on the edge of the band is still within."""
    low, high = float64([-0.5, 0.5]).exp().tolist()
    band = {"eps_low": 1 - low, "eps_high": high - 1}
    close(at_one_token(loss, 0.5, 1.0, shape, **band)[1], -high)
    close(at_one_token(loss, -0.5, -1.0, shape, **band)[1], low)


# ppo


def check_scores_before_the_choice(score_tokens) -> None:
    """All three are read off what was known when the token was chosen, row by row.

    Whoever's hidden states the critic reads, and at temperature 1 and another.
    """
    tokens = torch.randint(5, 200, (3, 9), generator=generator())
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:7] = mask[1, 2] = mask[2, 4:8] = True
    for shared, temperature in itertools.product((False, True), (1.0, 0.7)):
        policy = base().double()
        critic = with_an_opinion(ppo.Critic(policy, shared))
        if not shared:
            critic.trunk.load_state_dict(new_gpt(3).state_dict(), strict=False)
        scores = score_tokens(policy, critic, tokens, mask, temperature)
        nats, values, entropies = scores
        close(nats, token_logprobs(policy, tokens, mask, temperature))
        for row, slot in mask.nonzero().tolist():
            seen = tokens[row, : slot + 1][None]
            hidden = policy(seen)
            odds = (policy.logits(hidden)[0, -1] / temperature).softmax(-1)
            read = hidden if shared else critic.trunk(seen)
            value = (read[0, -1] * critic.head.weight).sum() + critic.head.bias
            close(values[row, slot], value.item())
            close(entropies[row, slot], -(odds * odds.log()).sum().item())
        assert all((each[~mask] == 0).all() for each in scores)
        assert all(each.dtype == torch.float64 for each in scores)
        assert values[mask].std() > 0.01


def with_an_opinion(critic):
    """At first all values are 0, which hides who is read."""
    with torch.no_grad():
        critic.head.weight += torch.linspace(-0.1, 0.1, 32)
        critic.head.bias += 0.3
    return critic


def check_who_learns_from_values(score_tokens) -> None:
    """A trunk that policy and critic share, and no policy with a critic apart."""
    tokens = torch.randint(5, 200, (2, 6), generator=generator())
    mask = torch.ones(2, 5, dtype=torch.bool)
    for shared in (False, True):
        policy = base()
        critic = with_an_opinion(ppo.Critic(policy, shared))
        _, values, entropies = score_tokens(policy, critic, tokens, mask, 1.0)
        values.sum().backward()
        moved = [name for name, p in policy.named_parameters() if p.grad is not None]
        assert bool(moved) == shared and "lm_head.weight" not in moved
        assert all(p.grad is not None for p in critic.parameters())
        (slope,) = torch.autograd.grad(entropies.sum(), policy.lm_head.weight)
        assert slope.norm() > 0


def check_half_is_scored_in_float32(score_tokens) -> None:
    """Contract 8, whoever's hidden states the critic reads."""
    tokens, mask = torch.ones(2, 5).long(), torch.ones(2, 4).bool()
    for shared in (False, True):
        policy = base().bfloat16()
        critic = ppo.Critic(policy, shared)
        scores = score_tokens(policy, critic, tokens, mask, 1.0)
        assert {each.dtype for each in scores} == {torch.float32}


def check_sure_policy(score_tokens) -> None:
    """A policy that all but excludes words has an entropy near 0, with a gradient."""
    policy = base()
    policy.lm_head.weight.data *= 300
    tokens = torch.randint(5, 200, (2, 6), generator=generator())
    mask = torch.ones(2, 5, dtype=torch.bool)
    critic = ppo.Critic(policy, shared=True)
    *_, entropies = score_tokens(policy, critic, tokens, mask, 1.0)
    assert entropies.isfinite().all() and (entropies >= 0).all()
    slopes = torch.autograd.grad(entropies.sum(), list(policy.layers.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)


STEPS = strategies.batches(shape=(2, 5), token_rewards=near, values=near)
GAMMAS = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def explicit(r, V, gamma, lam):
    """Σ_j (γλ)^j δ_{t+j}, with δ from the definition and nothing at the end."""
    V = [*V, 0.0]
    n = len(r)
    delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
    return [
        sum((gamma * lam) ** j * delta[t + j] for j in range(n - t)) for t in range(n)
    ]


def on_each_row(gamma, lam, advantages, token_rewards, values, mask):
    for row, live in enumerate(mask):
        r, V = token_rewards[row][live].tolist(), values[row][live].tolist()
        close(advantages[row][live], float64(explicit(r, V, gamma, lam)), atol=1e-9)
        assert (advantages[row][~live] == 0).all()


def check_gae(advantage) -> None:
    """The sum over live tokens, wherever the masked ones lie; the rest."""

    @common.forall(st.tuples(STEPS, GAMMAS, GAMMAS))
    def holds(drawn):
        case, gamma, lam = drawn
        r, V, mask = case.values()
        A = advantage(r, V, mask, gamma, lam)
        on_each_row(gamma, lam, A, **case)
        close(advantage(r, V, mask, 0.0, lam), torch.where(mask, r - V, 0.0))
        double = advantage(2 * r + 1, 2 * V - 1, mask, gamma, lam)
        ones = torch.ones_like(r)
        close(double, 2 * A + advantage(ones, -ones, mask, gamma, lam), atol=1e-9)
        zero = torch.zeros_like(r)
        earned = advantage(r, zero, mask, gamma, 1.0)  # λ = 1: return less V
        whole = advantage(r, V, mask, gamma, 1.0)
        close(whole, torch.where(mask, earned - V, 0.0), atol=1e-9)
        perfect = advantage(r, earned, mask, gamma, lam)  # nothing to regret
        close(perfect, 0.0, atol=1e-9)

    holds()


def check_what_is_known_beforehand(advantage) -> None:
    """ΓΦ' - Φ in the reward with V - Φ; Φ is 0 at the end."""

    @common.forall(st.tuples(STEPS, near((1, 5)), GAMMAS, GAMMAS))
    def holds(drawn):
        case, potential, gamma, lam = drawn
        r, V, _ = case.values()
        mask = torch.ones_like(case["mask"])
        phi = potential.expand_as(r)
        A = advantage(r, V, mask, gamma, lam)
        shaped = advantage(r + gamma * later(phi) - phi, V - phi, mask, gamma, lam)
        close(shaped, A, atol=1e-9)
        # A constant c in V shows at the end alone, where V is 0: -c λ^(steps to go).
        to_go = torch.arange(r.shape[1]).flip(0).double()
        raised = advantage(r, V + 2.0, mask, 1.0, lam)
        close(raised, advantage(r, V, mask, 1.0, lam) - 2.0 * lam**to_go, atol=1e-9)
        R = A + V
        mixed = (1 - lam) * later(V) + lam * later(R)
        close(R, r + gamma * mixed, atol=1e-9)

    holds()


def later(x):
    """(B, S): the next slot's, and 0 after the last."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


SPREAD = strategies.batches(shape=(2, 4), x=near)


def check_whitening(scale) -> None:
    """Over live slots the mean is 0 and the variance, divided by their
    number, 1; order and masked slots stay as they are."""

    @common.forall(SPREAD)
    def holds(case):
        x, mask = case["x"], case["mask"]
        y = scale(x, mask)
        live, given = y[mask], x[mask]
        assert (y[~mask] == 0).all()
        if given.min() == given.max():
            assert (y == 0).all()
        elif given.var(correction=0) > 0.01:
            close(live.mean(), 0.0)
            close(live.square().mean(), 1.0, atol=1e-5)
            close(scale(3 * x + 7, mask), y, atol=1e-5)
            close(scale(y, mask), y, atol=1e-5)
        assert (live.diff().sign() * given.diff().sign() >= 0).all()

    holds()
    common.check_mask_is_inert(scale, SPREAD, ["x"])


TOKEN_PAID = strategies.batches(
    shape=(2, 4),
    logprobs=strategies.logprobs,
    ref_logprobs=strategies.logprobs,
    rows=("rewards",),
).map(strategies.without_dead_rows)


def check_token_rewards_add_up(shape) -> None:
    """Σ = score - beta Σ k1; a likelier reference costs less."""

    @common.forall(TOKEN_PAID, examples=15)
    def holds(case):
        k1 = torch.where(case["mask"], case["logprobs"] - case["ref_logprobs"], 0.0)
        close(shape(**case, beta=0.3).sum(1), case["rewards"] - 0.3 * k1.sum(1))

    holds()


def check_token_rewards_by_hand(shape) -> None:
    """The score is on the last live token, never on the padding after it."""
    rewards = float64([1.0, 0.5])
    actual = shape(rewards, NATS, REF_NATS, MASK, beta=0.5)
    close(actual, float64([[-0.5, 0.25, 1.0], [-0.05, 1.5, 0.0]]))


def check_one_of_its_kind(scale) -> None:
    """With one live token, or with equal ones, exactly 0 and never nan."""
    x = torch.full((3, 7), 0.1)
    assert (scale(x, torch.ones(3, 7, dtype=torch.bool)) == 0).all()
    assert (scale(x, torch.arange(21).reshape(3, 7) == 4) == 0).all()


def check_far_from_0(scale) -> None:
    """In float32: a common shift by 1000 changes nothing."""
    x, mask = torch.tensor([[0.0, 1.0, 3.0, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    close(scale(x + 1000, mask), scale(x, mask), atol=1e-5)


VALUES = strategies.batches(shape=(2, 3), values=near, old_values=near, returns=near)


def check_values_move_towards_returns(loss) -> None:
    """Slope V - R, but 0 beyond the clip on the way to R; a clip makes
    nothing better, and nothing other where no value has moved."""

    @common.forall(VALUES, examples=20)
    def holds(case):
        v, old, R, mask = case.values()
        clipped = partial(loss, clip=0.25)
        value, slopes = common.value_and_gradients(clipped, case, ["values"])
        near = old + (v - old).clamp(-0.25, 0.25)
        flat = ((v - old).abs() > 0.25) & ((near - R).abs() > (v - R).abs())
        expected = torch.where(flat, 0.0, v - R) / mask.sum()
        apart = ((near - R).abs() - (v - R).abs()).abs() > 1e-9
        edge = ((v - old).abs() - 0.25).abs() > 1e-6
        seen = mask & edge & (apart | ((v - old).abs() < 0.25))
        close(slopes["values"][seen], expected[seen])
        plain = loss(**case)
        close(plain, 0.5 * ((v - R)[mask] ** 2).mean(), atol=1e-9)
        assert value >= plain - 1e-12
        assert torch.equal(loss(**case, clip=math.inf), plain)
        close(clipped(**{**case, "old_values": v}), plain, atol=1e-12)
        raised = {name: case[name] + 1 for name in ("values", "old_values", "returns")}
        close(clipped(**{**case, **raised}), value, atol=1e-9)

    holds()


def check_share_explained(measure) -> None:
    """1 for the truth, whatever its mean; 0 for a constant; below 0 for worse."""
    R = float64([[0.0, 1.0, 1.0], [0.0, 1.0, 9.0]])
    guesses = ((R + 5, 1.0), (0 * R + 0.7, 0.0), (R / 2, 0.75), (-R, -3.0))
    for guess, share in guesses:
        seen = guess.masked_fill(~MASK, math.nan)
        assert math.isclose(measure(seen, R, MASK), share, abs_tol=1e-12)
    assert measure(R, torch.full_like(R, 0.1), MASK) == 0.0


def check_returns_are_what_was_earned(train) -> None:
    """With λ = 1 and no price of KL, the critic's target is the answer's reward."""
    right, targets = ppo.value_loss, []

    def spy(values, old_values, returns, mask, *more, **options):
        targets.append((returns, mask))
        return right(values, old_values, returns, mask, *more, **options)

    with mock.patch.object(ppo, "value_loss", spy):
        config = replace(PPO, updates=1, epochs=1, lam=1.0, micro_batch=99)
        list(ppo_run(train, base(), config))
    ((returns, mask),) = targets
    rows = [row[live] for row, live in zip(returns, mask, strict=True)]
    earned = {row.mean().item() for row in rows}
    assert earned == {0.0, 1.0} and all((row == row[0]).all() for row in rows)


def ppo_run(train, policy, config, reward=yes, **more):
    more = {"generator": generator(), "critic": ppo.Critic(policy, shared=True), **more}
    return train(policy, TOKENIZER, PROBLEMS, reward, config, **more)


def check_first_ratio(train) -> None:
    """Exactly 1, bit by bit, whatever the minibatches."""
    more = {"minibatches": 3, "micro_batch": 3, "temperature": 0.8}
    config = replace(PPO, updates=2, **more)
    metrics = list(ppo_run(train, base(), config))
    assert [row["ratio_first"] for row in metrics] == [0.0] * 2


def check_micro_batches(train) -> None:
    """In float64: sizes that do and do not divide the answers change nothing."""
    config = replace(PPO, updates=2)
    training.check_micro_batches(partial(ppo_run, train), config, sizes=(100, 5))


def check_pull_of_the_mix(loss) -> None:
    """Every live token of every example is pulled up by γ/N, whatever its nats."""
    logprobs = NATS.clone().requires_grad_()
    value = loss(logprobs, MASK, 0.7)
    close(value.detach(), float64(0.35 * (0.5 + 1.5 + 2.0 + 0.1 + 3.0)))
    (slope,) = torch.autograd.grad(value, logprobs)
    close(slope, -0.35 * MASK.double())
    close(loss(NATS, MASK, 0.7, count=4), value.detach() / 2)


def check_the_mix_is_imitated(train) -> None:
    """Where nobody earns anything, all of its examples become likelier, in turn."""
    examples = []
    for problem, text in zip(PROBLEMS, ("nn", "yy"), strict=False):
        prompt = TOKENIZER.encode_prompt(problem.question)
        examples.append((prompt, TOKENIZER.encode_response(text)))
    tokens, mask = collate(examples, TOKENIZER.pad_id)

    def nats(policy):
        with torch.no_grad():
            return token_logprobs(policy, tokens, mask).sum(1)

    policy = base()
    before = nats(policy)
    mix = ppo.PretrainingMix(examples, weight=1.0, batch=1)
    for metrics in ppo_run(train, policy, PPO, reward=never, mix=mix):
        last = metrics["mix_nats"]
    after = nats(policy)
    assert (after > before + 1).all()
    assert 0 < last < -before.min()


def check_entropy_bonus(train) -> None:
    """It lowers the loss; without any reward it makes answers more random."""
    ends = []
    for weight in (0.0, 1.0):
        config = replace(PPO, entropy_coef=weight)
        metrics = list(ppo_run(train, base(), config, reward=never))
        ends.append(metrics[-1]["entropy"])
    assert ends[1] > ends[0] + 0.1
