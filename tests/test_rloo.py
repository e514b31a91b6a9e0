"""RLOO: its expected gradient by enumeration, its advantages, loss and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume

from minialign.algorithms import reinforce, rloo
from minialign.algorithms.rloo import leave_one_out, rloo_loss, shape_rewards
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
from tests.toy import (
    PROBLEMS,
    base,
    base_weights,
    judged,
    never,
    new_gpt,
    row_nats,
    stretched,
)

# Part 1: the expected gradient, over all K-tuples of 15 responses

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
LOGPROBS = world.token_logprobs(LOGITS)  # (15, 3)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
GRADIENT = world.true_gradient(LOGITS, REWARDS)  # (7, 3), of E[r]


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def ascent(compare, samples, rewards=REWARDS):
    """(7, 3): what the policy moves along, in expectation: -E[∇ loss].

    All 15^K tuples are one batch of groups; each group's advantages are weighted by the
    chance of drawing it. That is exact, for the loss is linear in the advantages.
    """
    tuples = torch.cartesian_prod(*[torch.arange(15)] * samples)  # (P, K)
    chances = world.probabilities(LOGITS)[tuples].prod(1, keepdim=True)  # (P, 1)
    advantages = compare(rewards[tuples]) * chances * len(tuples)  # (P, K)
    rows = tuples.flatten()  # (B,)

    def expected(logits):
        logprobs = world.token_logprobs(logits)[rows]  # (B, 3)
        return rloo_loss(logprobs, advantages.flatten(), world.MASK[rows])

    return -world.gradient(expected, LOGITS)


def test_the_weighted_batch_is_the_expectation():
    """The harness above, against the one that calls the loss on each pair alone."""

    def loss(rows, logprobs, mask):
        return rloo_loss(logprobs, leave_one_out(REWARDS[rows][None])[0], mask)

    one_by_one = -world.expected_gradient(loss, LOGITS, samples=2)
    close(ascent(leave_one_out, 2), one_by_one)


# Other ways to compare; (P, K) -> (P, K), as leave_one_out


def nothing(rewards):
    return rewards


def group_mean(rewards):
    """The answer is part of its own baseline; GRPO's numerator."""
    return rewards - rewards.mean(1, keepdim=True)


def divided_by_k(rewards):
    """A sum of K - 1 rewards over K."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / rewards.shape[1]


def best_of_the_group(rewards):
    """A baseline that looks at the answer itself."""
    return rewards - rewards.amax(1, keepdim=True)


def best_of_the_others(rewards):
    return rewards - of_others(rewards, lambda others: others.amax(1))


def neighbours(rewards):
    """The right numbers, one answer too far."""
    return leave_one_out(rewards).roll(1, dims=1)


def across_the_batch(rewards):
    """T50: statistics over all answers to all problems."""
    return leave_one_out(rewards.reshape(1, -1)).view_as(rewards)


def other_order(rewards):
    """(K, P) read as (P, K)."""
    mixed = rewards.T.reshape(rewards.shape)
    return leave_one_out(mixed).reshape(rewards.T.shape).T


def by_the_others_spread(rewards):
    """T51: divides by the others' standard deviation, which is 0 when they tie."""
    spread = of_others(rewards, lambda others: others.std(1, correction=0))
    return leave_one_out(rewards) / (spread + 1e-6)


def rounded(rewards):
    """NUM-2: right on paper; seven times 0.1 leaves a rest in float32."""
    K = rewards.shape[1]
    return K / (K - 1) * group_mean(rewards)


def of_others(rewards, statistic):
    """(P, K): entry i of a group is a statistic of its other K - 1 rewards."""
    columns = []
    for i in range(rewards.shape[1]):
        others = torch.cat((rewards[:, :i], rewards[:, i + 1 :]), dim=1)
        columns.append(statistic(others))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_leave_one_out_is_exactly_unbiased(samples):
    """PG-2."""
    close(ascent(leave_one_out, samples), GRADIENT)


@pytest.mark.parametrize("samples", [2, 3])
def test_the_mean_of_all_shortens_the_gradient(samples):
    """PG-3: by (K - 1)/K exactly, and in no other direction."""
    close(ascent(group_mean, samples), (samples - 1) / samples * GRADIENT)


@pytest.mark.parametrize("other", [nothing, divided_by_k, best_of_the_others])
def test_being_unbiased_does_not_make_it_leave_one_out(other):
    """PG-8: whatever the others earned, it is a baseline that costs nothing."""
    close(ascent(other, 3), GRADIENT)


def test_a_baseline_that_looks_at_the_answer_is_biased():
    """PG-1, the negative control. With rewards of 0 and 1 it still ascends, but each
    problem by 1 - (chance of wrong)^(K - 1) of its gradient."""
    actual = ascent(best_of_the_group, 3)
    assert (actual - GRADIENT).abs().max() > 0.05
    assert world.cosine(actual, GRADIENT) < 0.995
    right = (REWARDS > 0).double()
    chance = (world.probabilities(LOGITS) * right).sum()
    expected = (1 - (1 - chance) ** 2) * world.true_gradient(LOGITS, right)
    close(ascent(best_of_the_group, 3, right), expected)


def test_a_neighbours_advantage_turns_the_gradient_round():
    """A shift by one row: what y_i is paid contains -r_i / (K - 1), and nothing else of
    it."""
    close(ascent(neighbours, 2), -GRADIENT)
    close(ascent(neighbours, 3), -GRADIENT / 2)


def penalised(shape, beta):
    """(15,): the shaped reward of every response."""
    return shape(REWARDS, LOGPROBS, REF_LOGPROBS, world.MASK, beta)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_kl_in_the_reward_has_the_gradient_of_the_objective(beta):
    """PG-7: that of E[r] - beta KL(policy ‖ reference), over whole answers."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, beta)
    close(ascent(leave_one_out, 2, penalised(shape_rewards, beta)), expected)
    assert (expected - GRADIENT).norm() > 0.05


def swapped(rewards, logprobs, ref_logprobs, mask, beta):
    return shape_rewards(rewards, ref_logprobs, logprobs, mask, beta)


def per_token(rewards, logprobs, ref_logprobs, mask, beta):
    shaped = shape_rewards(rewards, logprobs, ref_logprobs, mask, beta)
    return rewards + (shaped - rewards) / mask.sum(1)


@pytest.mark.parametrize("wrong", [swapped, per_token])
def test_wrong_penalties_are_seen(wrong):
    """PG-7, negative controls."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 2.0)
    actual = ascent(leave_one_out, 2, penalised(wrong, 2.0))
    assert (actual - expected).abs().max() > 0.05


def test_nothing_moves_at_the_optimum():
    """X-1: at reference exp(r / beta) / Z no answer is better than another, ever."""
    best, _ = world.optimum(REWARDS, REFERENCE, beta=0.5)
    logprobs = world.token_logprobs(world.logits_of(best))
    shaped = shape_rewards(REWARDS, logprobs, REF_LOGPROBS, world.MASK, beta=0.5)
    close(leave_one_out(shaped.view(3, 5)), 0.0)


def test_two_answers_are_a_preference():
    """X-2: at policy = reference, the gradient of DPO(beta) is that of K = 2 with
    rewards beta apart."""
    beta, winner, loser = 0.3, 4, 11
    rows = torch.tensor([winner, loser])

    def of_pair(logits):
        logprobs = world.token_logprobs(logits)[rows]
        advantages = leave_one_out(float64([[beta, 0.0]]))[0]
        return rloo_loss(logprobs, advantages, world.MASK[rows])

    def dpo(logits):
        margin = world.sequence_logprobs(logits) - world.sequence_logprobs(LOGITS)
        return -F.logsigmoid(beta * (margin[winner] - margin[loser]))

    close(world.gradient(of_pair, LOGITS), world.gradient(dpo, LOGITS))


def test_a_group_is_a_sample_covariance():
    """(1/K) Σ A g = Σ (r - mean r)(g - mean g) / (K - 1), for any numbers g."""
    for K in (2, 5):
        rewards, g = world.random_logits(K).flatten()[: 2 * K].view(2, K)
        pair = torch.stack((rewards, g))
        actual = (leave_one_out(rewards[None])[0] * g).mean()
        close(actual, torch.cov(pair)[0, 1])


def test_a_flipped_sign_descends():
    right = ascent(leave_one_out, 2)
    wrong = ascent(lambda rewards: -leave_one_out(rewards), 2)
    assert world.cosine(right, GRADIENT) > 0.999
    assert world.cosine(wrong, GRADIENT) < -0.999


# Part 2: the advantages, and the loss

float64 = partial(torch.tensor, dtype=torch.float64)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ([0, 1], [-1, 1]),
        ([1, 1, 1, 1, 0], [0.25, 0.25, 0.25, 0.25, -1]),
        ([3.5, -1.5, 1.0], [3.75, -3.75, 0]),
        ([7, 7, 7], [0, 0, 0]),
    ],
)
def test_golden_advantages(rewards, expected):
    """ADV-3 and the golden numbers of methods.md, section 8; a second group beside."""
    other = [0.5] * len(rewards)
    actual = leave_one_out(float64([rewards, other]))
    close(actual, float64([expected, [0.0] * len(rewards)]))


def check_leave_one_out(compare):
    """ADV-1 to ADV-5: what makes it leave-one-out, and not just unbiased."""

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
        deviation = rewards.std(1, correction=0, keepdim=True)
        assume((deviation > 1e-6).all())
        grpo = group_mean(rewards) / deviation
        close(actual, K / (K - 1) * deviation * grpo)  # ADV-4
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


def test_leave_one_out_owes_what_makes_it_that():
    check_leave_one_out(leave_one_out)


@pytest.mark.parametrize(
    "wrong",
    [
        nothing,
        group_mean,
        divided_by_k,
        best_of_the_others,
        neighbours,
        across_the_batch,
        other_order,
        by_the_others_spread,
    ],
)
def test_others_do_not(wrong):
    """PG-8, T50, T51."""
    assert common.refutes(check_leave_one_out, wrong)


def check_equal_rewards(compare):
    """ADV-9: exactly 0, and of no size: whatever the number, type and K."""
    for value in (0.1, 1 / 3, 123.456, 1e-30, -1e30):
        for K in (2, 3, 7, 15, 64):
            for dtype in (torch.float32, torch.float64):
                actual = compare(torch.full((2, K), value, dtype=dtype))
                assert (actual == 0).all(), f"{K} times {value}, {dtype}: {actual}"


def test_equal_rewards_give_exactly_zero():
    """NUM-2."""
    check_equal_rewards(leave_one_out)
    assert common.refutes(check_equal_rewards, rounded)


def test_others_that_tie_explode_nothing():
    """T51: the spread of the others is 0, and nobody divides by it."""
    one_of_four = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert leave_one_out(one_of_four).abs().max() == 1
    assert by_the_others_spread(one_of_four).abs().max() > 1e5


def test_advantages_owe_what_every_function_owes():
    """C-5, C-7, C-9, C-11, for (P, K) in and (P, K) out."""
    cases = strategies.groups().map(lambda rewards: {"rewards": rewards})
    common.check_permutation(leave_one_out, cases, ())
    common.check_no_gradient_to(leave_one_out, cases, ["rewards"])
    common.check_pure(leave_one_out, cases)
    common.check_dtype(leave_one_out, cases, ())


@pytest.mark.parametrize("shape", [(4,), (4, 1), (0, 4), (2, 0), (2, 2, 2), ()])
def test_advantages_refuse_the_shape(shape):
    """ADV-12: K = 1 above all; and (B,) is not (P, K)."""
    with pytest.raises(ValueError, match="rewards.*shape"):
        leave_one_out(torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_advantages_refuse_what_is_not_finite(bad):
    with pytest.raises(ValueError, match=r"rewards must be finite.*\[1, 0\]"):
        leave_one_out(float64([[0.0, 1.0], [bad, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_advantages_refuse_the_type(dtype):
    with pytest.raises(TypeError, match="rewards"):
        leave_one_out(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match="rewards"):
        leave_one_out([[0.0, 1.0]])


CASES = strategies.batches(logprobs=strategies.logprobs, rows=("advantages",))
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "advantages": float64([2.0, -1.0]),
    "mask": torch.tensor([[True, True, True], [True, True, False]]),
}
SHAPED = {
    "rewards": float64([1.0, 0.0]),
    "logprobs": CASE["logprobs"],
    "ref_logprobs": float64([[-1.5, -1.0, -2.0], [-0.2, -1.0, -0.5]]),
    "mask": CASE["mask"],
}


def test_loss_by_hand():
    """-(2 (-0.5 - 1.5 - 2) - 1 (-0.1 - 3)) / 2, and -A / B for every live token."""
    leaf = CASE["logprobs"].clone().requires_grad_()
    loss = rloo_loss(leaf, CASE["advantages"], CASE["mask"])
    close(loss, 2.45)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert slope.tolist() == [[-1.0, -1.0, -1.0], [0.5, 0.5, 0.0]]


def test_shaped_rewards_by_hand():
    """1 - 0.5 (1.0 - 0.5 + 0.0) and 0 - 0.5 (0.1 - 2.0)."""
    shaped = shape_rewards(**SHAPED, beta=0.5)
    assert shaped.tolist() == pytest.approx([0.75, 0.95])


def test_the_copies_are_the_same():
    """Lines that RLOO shares with REINFORCE, bit for bit (X-3): what shaping owes is
    shown in test_reinforce.py."""
    both = {"logprobs": strategies.logprobs, "ref_logprobs": strategies.logprobs}

    @common.forall(strategies.batches(**both, rows=("numbers",)), examples=10)
    def holds(case):
        logprobs, ref_logprobs, numbers, mask = case.values()
        for module in (rloo, reinforce):
            shaped.append(
                module.shape_rewards(numbers, logprobs, ref_logprobs, mask, 0.3)
            )
        assert torch.equal(*shaped[-2:])
        call = {"logprobs": logprobs, "advantages": numbers, "mask": mask}
        expected = common.value_and_gradients(reinforce.reinforce_loss, call)
        actual = common.value_and_gradients(rloo_loss, call)
        training.assert_same_bits(list(actual), list(expected))

    shaped = []
    holds()
    assert len(shaped) >= 20


def test_the_loss_at_its_edges():
    """T = 1; log-probs of -1000; all advantages 0: loss 0, gradient 0, not nan."""
    one = {"logprobs": float64([[-0.7]]), "advantages": float64([3.0])}
    close(rloo_loss(**one, mask=torch.tensor([[True]])), 2.1)
    rare = {**CASE, "logprobs": CASE["logprobs"] * 0 - 1000}
    value, slopes = common.value_and_gradients(rloo_loss, rare)
    close(value, (2 * 3000 - 2000) / 2)
    assert slopes["logprobs"].isfinite().all()
    none = {**CASE, "advantages": CASE["advantages"] * 0}
    value, slopes = common.value_and_gradients(rloo_loss, none)
    assert value == 0 and (slopes["logprobs"] == 0).all()


def test_the_loss_owes_what_every_loss_owes():
    """C-1 to C-12."""
    common.check_mask_is_inert(rloo_loss, CASES)
    common.check_microbatches(rloo_loss, CASES, common.live_rows)
    common.check_permutation(rloo_loss, CASES)
    common.check_shapes_refused(rloo_loss, CASE)
    common.check_no_gradient_to(rloo_loss, CASES, ["advantages"])
    common.check_gradient_reaches(rloo_loss, CASE)
    common.check_pure(rloo_loss, CASES)
    common.check_dtype(rloo_loss, CASES)
    common.check_duplication(rloo_loss, CASES)


def by_multiplication(logprobs, advantages, mask, count=None):
    """nan * 0 is nan."""
    rows = mask.any(1).sum() if count is None else count
    return -(logprobs * advantages.detach()[:, None] * mask).sum() / rows


def token_normalised(logprobs, advantages, mask, count=None):
    """The token mean of other codes: its divisor depends on the policy's lengths."""
    live = mask.any(1).sum() if count is None else count
    return rloo_loss(logprobs, advantages, mask, count) * live / mask.sum()


def broadcast(logprobs, advantages, mask, count=None):
    """(B, 1) advantages, or (1, B), or one for all, are as welcome as (B,)."""
    rows = advantages.detach().expand(len(mask), -1)[:, 0]
    return rloo_loss(logprobs, rows, mask, count)


@pytest.mark.parametrize(
    "check, wrong, cases",
    [
        (common.check_mask_is_inert, by_multiplication, CASES),
        (common.check_shapes_refused, broadcast, CASE),
        (
            partial(common.check_microbatches, count=common.live_rows),
            token_normalised,
            CASES,
        ),
    ],
)
def test_the_properties_find_wrong_losses(check, wrong, cases):
    assert common.refutes(check, wrong, cases)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "advantages"])
def test_the_loss_refuses_what_is_not_finite(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1] = bad
    common.assert_refused(rloo_loss, case, ValueError, f"{bad}", [name])


@pytest.mark.parametrize("name", ["rewards", "logprobs", "ref_logprobs"])
def test_shaping_refuses_what_is_not_finite(name):
    case = {**SHAPED, name: SHAPED[name].clone()}
    case[name][1] = math.nan
    shape = partial(shape_rewards, beta=0.0)
    common.assert_refused(shape, case, ValueError, "nan", [name])


def test_probabilities_above_1_and_empty_batches_are_refused():
    case = {**CASE, "logprobs": -CASE["logprobs"]}
    common.assert_refused(rloo_loss, case, ValueError, "above 0", ["logprobs"])
    case = {**CASE, "mask": torch.zeros_like(CASE["mask"])}
    common.assert_refused(rloo_loss, case, ValueError, "no live token", ["mask"])


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_shaping_refuses_the_beta(beta):
    with pytest.raises(ValueError, match="beta: got"):
        shape_rewards(**SHAPED, beta=beta)


# Part 3: training, in a world where the answers are "y" and "no"

METHOD = METHODS["rloo"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied(monkeypatch, rloo, "generate")
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    rewards = judged(rollout)  # (12,)
    nats = row_nats(twin, rollout, temperature)  # (12,)
    k1 = (nats - row_nats(reference, rollout, temperature)).detach()
    shaped = rewards - 0.5 * k1
    groups = shaped.tolist()[:6], shaped.tolist()[6:]  # one after the other
    advantages = torch.tensor([r - (sum(g) - r) / 5 for g in groups for r in g])
    loss = -(advantages * nats).mean()
    expected = {
        "completions": 12,
        "dead": sum(len(set(g)) == 1 for g in rewards.view(2, 6).tolist()) / 2,
        "advantage_std": advantages.square().mean().sqrt().item(),  # their mean is 0
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": k1.mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)


def test_dead_groups_are_counted_and_teach_nothing(monkeypatch):
    """Right and wrong by problem, not by answer: whole groups tie, and only those."""

    def by_problem(problems, texts):
        right = [problem.question in "ac" for problem in problems]
        right[problems.index(PROBLEMS[4])] = True
        return [float(one) for one in right]

    config = replace(CONFIG, prompts=5, samples=4, updates=1, max_new_tokens=4)
    (metrics,) = run(base(), config, by_problem)
    assert metrics["dead"] == pytest.approx(4 / 5)
    # Of e: one 1 among four; A is 1 and three times -1/3, over 20 answers.
    assert metrics["advantage_std"] == pytest.approx(math.sqrt((1 + 3 / 9) / 20))

    policy = base()
    state = {}
    (metrics,) = run(policy, config, never, reference=base(), state=state)
    assert metrics["dead"] == 1 and metrics["advantage_std"] == 0
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
    training.assert_same_bits(dict(state["policy"]), dict(base_weights()))
    # With a price on KL answers differ all the same; dead still means the reward.
    config = replace(config, beta=0.5)
    policy = new_gpt(3)
    (metrics,) = run(policy, config, never, reference=base())
    assert metrics["dead"] == 1 and metrics["advantage_std"] > 0
