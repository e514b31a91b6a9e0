"""What SFT and the methods that learn from rewards owe, beside what every loss does."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from minialign.algorithms import ppo, reinforce, remax, sft
from minialign.algorithms.reinforce import reinforce_loss
from minialign.logprobs import token_logprobs
from tests import enumeration as world
from tests import strategies, test_grpo, test_ppo, test_remax, test_sft
from tests.properties import common, training
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    base,
    generator,
    new_gpt,
    row_nats,
    stretched,
    yes,
)

float64 = partial(torch.tensor, dtype=torch.float64)
LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
SMALL = {"updates": 4, "prompts": 2, "samples": 6, "max_new_tokens": 3, "lr": 1e-2}
REINFORCE = reinforce.ReinforceConfig(**SMALL)
PPO = ppo.PPOConfig(**SMALL, critic_lr=1e-2, kl_stop=None, minibatches=1)


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def ascent(loss, samples=1):
    """(7, 3): what the policy moves along, in expectation: -E[∇ loss]."""
    return -world.expected_gradient(loss, LOGITS, samples)


# sft


def check_mean_of_a_constant(loss) -> None:
    """C-3: c nats at every live token cost c."""
    masks = strategies.shapes().flatmap(strategies.masks)

    def reduce(x, mask):
        return loss(-x.abs(), mask)

    common.check_constant(reduce, masks, lambda c, mask: abs(c))


def check_epochs(batches) -> None:
    """Every example once an epoch; each epoch and each seed in an order of its own."""
    examples = test_sft.numbered(9)

    def orders(seed):
        config = sft.SFTConfig(updates=9, batch_size=3, window=2, seed=seed)
        drawn = list(batches(examples, config, test_sft.PAD))
        assert len(drawn) == 9
        rows = [[test_sft.who(tokens) for tokens, *_ in drawn[i : i + 3]]
                for i in (0, 3, 6)]  # fmt: skip
        for epoch in rows:
            assert sorted(itertools.chain(*epoch)) == list(range(9))
        return rows

    assert orders(0) == orders(0)
    assert len({str(epoch) for seed in range(3) for epoch in orders(seed)}) == 9


def check_resumed_batches(batches) -> None:
    """From any update on, the batches are those of the whole run."""
    config = sft.SFTConfig(updates=7, batch_size=3, window=2)
    whole = list(batches(test_sft.numbered(7), config, test_sft.PAD))
    for start in range(config.updates):
        rest = list(batches(test_sft.numbered(7), config, test_sft.PAD, start))
        for found, expected in zip(rest, whole[start:], strict=True):
            assert all(map(torch.equal, found[:2], expected[:2]))
            assert found[2] == expected[2]


def check_resumed_training(train) -> None:
    """IO-3: stopped, saved, loaded and resumed, a run has the same bits."""

    def begin(state):
        model = test_sft.tiny_gpt(100 * bool(state))
        examples, config = test_sft.EXAMPLES, test_sft.CONFIG
        return train(model, examples, config, pad_id=test_sft.PAD, state=state)

    with TemporaryDirectory() as folder:
        training.check_resume(begin, (2, 3), Path(folder) / "sft.pt")


# reinforce, and what is right for its loss in others


def check_unbiased(loss) -> None:
    """PG-1, PG-2: the expected gradient is that of E[r]."""

    def weighted(rows, logprobs, mask):
        return loss(logprobs, REWARDS[rows], mask)

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(ascent(weighted, samples), expected)


def check_kl_in_the_reward(shape) -> None:
    """PG-7: the expected gradient is that of E[r] - beta KL(policy ‖ reference)."""

    def loss(rows, logprobs, mask):
        shaped = shape(REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask, 0.5)
        return reinforce_loss(logprobs, shaped, mask)

    close(ascent(loss), world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.5))


def check_priced_kl(train) -> None:
    """The KL in the reward is that of the two policies that were sampled from."""
    policy, reference, heat = stretched(), base(), 0.7
    twin, right, drawn = copy.deepcopy(policy), reinforce.generate, []

    def spy(*args, **options):
        drawn.append(right(*args, **options))
        return drawn[-1]

    config = replace(REINFORCE, temperature=heat, beta=0.5)
    more = {"reference": reference, "generator": generator()}
    with mock.patch.object(reinforce, "generate", spy):
        metrics = next(train(policy, TOKENIZER, PROBLEMS, yes, config, **more))
    nats, others = (row_nats(each, drawn[0], heat) for each in (twin, reference))
    assert math.isclose(metrics["kl"], (nats - others).mean().item(), rel_tol=1e-4)


# remax


def check_kl_of_the_whole_answer(weigh) -> None:
    """PG-7, KL-9: the expected gradient is that of E[r] - beta KL."""

    def loss(rows, logprobs, mask):
        k1 = torch.where(mask, logprobs.detach() - REF_LOGPROBS[rows], 0.0)
        weights = weigh(REWARDS[rows], k1, mask, 0.3)
        return remax.remax_loss(logprobs, weights, mask)

    close(ascent(loss), world.true_gradient(LOGITS, REWARDS, REFERENCE, 0.3))


def check_weights_by_hand(weigh) -> None:
    """1 - 0.5 (1 - 0.5 + 0.25) and -8 - 0.5 (0.5 + 1.5), whatever is masked."""
    actual = weigh(**test_remax.PAID, beta=0.5)
    close(actual, float64([[0.625] * 3, [-9.0, -9.0, 0.0]]))


# grpo


def check_golden_advantages(advantage) -> None:
    """ADV-6: they tell the divisor K - 1 from K."""
    rewards = float64([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    a = math.sqrt(3) / 2
    expected = float64([[a, -a, -a, a], [1.5, -0.5, -0.5, -0.5]])
    close(advantage(rewards, epsilon=0.0), expected)


def check_own_group_only(advantage) -> None:
    """ADV-5, ADV-8: another group changes nothing, nor does a constant."""

    @common.forall(strategies.groups(max_prompts=2), examples=20)
    def holds(rewards):
        own = advantage(rewards)
        close(advantage(rewards[:1]), own[:1])
        close(advantage(rewards.flip(1)), own.flip(1))
        close(advantage(rewards + 0.25), own)

    holds()


def check_equal_rewards(advantage) -> None:
    """ADV-9: exactly 0, in float32 too, where the mean of equals is not their value."""
    for value in (0.1, 123.456, 1 / 3):
        for K in range(2, 65):
            assert (advantage(torch.full((2, K), value)) == 0).all()


def check_epsilon_law(advantage) -> None:
    """ADV-8: A(a r) = A(r) (s + e) / (s + e / a), and no other size of it."""
    rewards = float64([[1.0, 0.0, 0.0], [0.1, 0.5, -1.0]])
    s = rewards.std(1, keepdim=True)
    for a, e in ((0.25, 1e-4), (0.25, 0.5), (40.0, 0.5)):
        law = (s + e) / (s + e / a)
        close(advantage(a * rewards, e), advantage(rewards, e) * law)


def check_weights(reduction) -> None:
    """C-3, C-5, C-12: an answer's weights add up to 1 / B, however it is padded."""

    @common.forall(strategies.shapes().flatmap(strategies.masks), examples=20)
    def holds(mask):
        rows = mask.any(1).double()
        weights = reduction(mask, 9)
        close(weights.sum(1), rows / rows.sum())
        assert (weights[~mask] == 0).all()
        close(reduction(mask.flip(0), 9), weights.flip(0))
        twice = torch.cat((weights, weights)) / 2
        close(reduction(torch.cat((mask, mask)), 9), twice)

    holds()


def check_clip_by_hand(loss) -> None:
    """Ratios e^-0.1, e^1 and e^0.1 for A = 2; e^0.5 and e^-1 for A = -1."""
    losses = loss(**test_grpo.CASE, eps_low=0.2, eps_high=0.3)
    first = [-2 * math.exp(-0.1), -2 * 1.3, -2 * math.exp(0.1)]
    close(losses, float64([first, [math.exp(0.5), 0.8, 0.0]]))


# ppo


def check_scores_before_the_choice(score_tokens) -> None:
    """All three are read off what was known when the token was chosen, row by row."""
    policy, temperature = base().double(), 0.7
    critic = ppo.Critic(policy)
    critic.head.weight.data += 0.1  # it has an opinion
    critic.trunk.load_state_dict(new_gpt(3).state_dict(), strict=False)
    tokens = torch.randint(5, 200, (3, 9), generator=generator())
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:7] = mask[1, 2] = mask[2, 4:8] = True
    nats, values, entropies = score_tokens(policy, critic, tokens, mask, temperature)
    close(nats, token_logprobs(policy, tokens, mask, temperature))
    for row, slot in mask.nonzero().tolist():
        seen = tokens[row, : slot + 1][None]
        odds = (policy.logits(policy(seen))[0, -1] / temperature).softmax(-1)
        value = critic.head(critic.trunk(seen))[0, -1]
        close(values[row, slot], value.item())
        close(entropies[row, slot], -(odds * odds.log()).sum().item())


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


def check_token_rewards_add_up(shape) -> None:
    """GAE-12, KL-10: Σ = score - beta Σ k1; a likelier reference costs less."""

    @common.forall(test_ppo.PAID, examples=15)
    def holds(case):
        k1 = torch.where(case["mask"], case["logprobs"] - case["ref_logprobs"], 0.0)
        close(shape(**case, beta=0.3).sum(1), case["rewards"] - 0.3 * k1.sum(1))

    holds()


def check_token_rewards_by_hand(shape) -> None:
    """The score is on the last live token, never on the padding after it."""
    actual = shape(**test_ppo.PAID_CASE, beta=0.5)
    close(actual, float64([[-0.5, 0.25, 1.0], [-0.05, 1.5, 0.0]]))


def check_one_of_its_kind(scale) -> None:
    """WH-4: with one live token, or with equal ones, exactly 0 and never nan."""
    x = torch.full((3, 7), 0.1)
    assert (scale(x, torch.ones(3, 7, dtype=torch.bool)) == 0).all()
    assert (scale(x, torch.arange(21).reshape(3, 7) == 4) == 0).all()


def check_far_from_0(scale) -> None:
    """WH-2 in float32: a common shift by 1000 changes nothing."""
    x, mask = torch.tensor([[0.0, 1.0, 3.0, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    close(scale(x + 1000, mask), scale(x, mask), atol=1e-5)


def check_where_the_clip_lets_go(loss) -> None:
    """PPO-3, PPO-4, in every quadrant, with an asymmetric band (0.8, 1.3)."""
    old, mask = float64([[-3.0]]), torch.tensor([[True]])
    ratios = (0.3, 0.79, 0.81, 1.0, 1.29, 1.31, 4.0)
    for A, ratio in itertools.product((2.0, -2.0), ratios):
        leaf = (old + math.log(ratio)).requires_grad_()
        value = loss(leaf, old, float64([[A]]), mask, eps_low=0.2, eps_high=0.3)
        (slope,) = torch.autograd.grad(value, leaf)
        flat = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
        close(slope, 0.0 if flat else -A * ratio)
        close(value.detach(), -min(A * ratio, A * min(max(ratio, 0.8), 1.3)))


def check_values_move_towards_returns(loss) -> None:
    """VC-1, VC-2: slope V - R, but 0 beyond the clip on the way to R."""

    @common.forall(test_ppo.VALUES, examples=20)
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

    holds()


def check_returns_are_what_was_earned(train) -> None:
    """With λ = 1 and no price of KL, the critic's target is the answer's reward."""
    right, targets = ppo.value_loss, []

    def spy(values, old_values, returns, mask, *more):
        targets.append((returns, mask))
        return right(values, old_values, returns, mask, *more)

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
    """PPO-1: exactly 1, bit by bit, whatever the minibatches."""
    more = {"minibatches": 3, "micro_batch": 3, "temperature": 0.8}
    config = replace(PPO, updates=2, **more)
    metrics = list(ppo_run(train, base(), config))
    assert [row["ratio_first"] for row in metrics] == [0.0] * 2


def check_micro_batches(train) -> None:
    """C-4, in float64: sizes that do and do not divide the answers change nothing."""
    config = replace(PPO, updates=2)
    training.check_micro_batches(partial(ppo_run, train), config, sizes=(100, 5))


def never(problems, texts):
    return [0.0] * len(texts)


def check_entropy_bonus(train) -> None:
    """It lowers the loss; without any reward it makes answers more random."""
    ends = []
    for weight in (0.0, 1.0):
        config = replace(PPO, entropy_coef=weight)
        metrics = list(ppo_run(train, base(), config, reward=never))
        ends.append(metrics[-1]["entropy"])
    assert ends[1] > ends[0] + 0.1
