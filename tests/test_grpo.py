"""GRPO: what turns its expected gradient, the value of its loss, and training."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from minialign.algorithms import grpo
from minialign.algorithms.grpo import (
    by_constant,
    centred_advantages,
    clipped_loss,
    group_advantages,
    grpo_loss,
    k1_term,
    k2_term,
    k3_term,
    per_sequence,
    per_token,
)
from minialign.logprobs import kl_ratio_k3
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close, float64
from tests.properties.policy_gradients import (
    LOGITS,
    REF_LOGPROBS,
    REFERENCE,
    REWARDS,
    ascent,
)
from tests.toy import (
    base,
    base_weights,
    generator,
    judged,
    never,
    stretched,
    token_nats,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)


def ascent_of_two(advantage, reduction=by_constant):
    """(7, 3): what a group of two fresh answers moves the policy along."""

    def loss(rows, logprobs, mask):
        A = advantage(REWARDS[rows][None])[0]  # (2,)
        return grpo_loss(logprobs, logprobs.detach(), A, mask, reduction(mask, 4))

    return ascent(loss, samples=2)


def test_centred_and_by_a_constant_it_rescales_the_true_gradient():
    """By (K - 1)/K, for its own share, and by max_new_tokens."""
    expected = world.true_gradient(LOGITS, REWARDS)
    close(ascent_of_two(centred_advantages), expected / 2 / 4)


def test_the_std_turns_the_gradient():
    """Of two answers only who is better is left."""
    expected = world.true_gradient(LOGITS, REWARDS)
    assert world.cosine(ascent_of_two(group_advantages), expected) < 0.98


@pytest.mark.parametrize("reduction", [per_sequence, per_token])
def test_dividing_by_lengths_turns_the_gradient(reduction):
    """These divisors depend on what the policy answered."""
    expected = world.true_gradient(LOGITS, REWARDS)
    actual = ascent_of_two(centred_advantages, reduction)
    assert 1 - world.cosine(actual, expected) > 1e-3


def kl_gradient(term, reduction=by_constant):
    """(7, 3): E[∇ Σ_t term_t] on fresh samples, or with other weights."""

    def loss(rows, logprobs, mask):
        args = logprobs, logprobs.detach(), REF_LOGPROBS[rows], mask
        return 4 * (reduction(mask, 4) * term(*args)).sum()

    return world.expected_gradient(loss, LOGITS)


def test_the_ratio_gives_k3_the_gradient_of_k2():
    """That of KL(policy ‖ reference), where k3 alone has the other KL's."""
    close(kl_gradient(kl_ratio_k3), kl_gradient(k2_term))
    assert (kl_gradient(k3_term) - kl_gradient(k2_term)).abs().max() > 0.02


@pytest.mark.parametrize("term", [k1_term, k2_term, k3_term, kl_ratio_k3])
def test_no_kl_term_has_the_gradient_of_the_kl_over_whole_answers(term):
    """Each looks at its own choice, not at where the choice leads."""
    whole = world.gradient(lambda x: world.sequence_kl(x, REFERENCE), LOGITS)
    assert (kl_gradient(term) - whole).abs().max() > 0.02


@pytest.mark.parametrize("term", [k2_term, k3_term, kl_ratio_k3])
def test_dividing_by_lengths_turns_the_gradient_of_a_kl_term(term):
    divided = kl_gradient(term, per_sequence)
    assert 1 - world.cosine(divided, kl_gradient(term)) > 1e-3


def test_k1_divided_by_lengths_pays_for_length_whatever_the_reference():
    """E[(1 / |y|) ∇ log π(y)] = ∇ E[1 / |y|]: descent makes answers longer. Undivided
    it has no gradient."""
    slope = world.gradient(
        lambda x: world.probabilities(x) @ (1 / world.MASK.sum(1).double()), LOGITS
    )
    close(kl_gradient(k1_term, per_sequence), 4 * slope)
    assert slope.norm() > 0.1


# Part 2: the value of the loss


def test_the_value_of_the_first_loss():
    """0 by sequence, not by token, and its gradient is not 0."""
    mask = torch.tensor([[False, True, True, True], [True, False, False, False]])
    A = centred_advantages(float64([[1.0, 0.0]]))[0]
    logprobs = (-mask.double()).requires_grad_()
    call = logprobs, logprobs.detach(), A, mask
    by_sequence = grpo_loss(*call, per_sequence(mask, 10))
    close(by_sequence, 0.0)
    close(grpo_loss(*call), 0.0)
    close(grpo_loss(*call, per_token(mask, 10)), -(3 * 0.5 - 1 * 0.5) / 4)
    (slope,) = torch.autograd.grad(by_sequence, logprobs)
    close(slope[0], -float64([0, 1, 1, 1]) / 12)


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["grpo"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, token by token, against code of its own."""
    drawn = training.spied_draws(monkeypatch)
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    groups = judged(rollout).view(2, 6)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    advantages = advantages / (groups.std(1) + 1e-4).repeat_interleave(6)
    nats = token_nats(twin, rollout, temperature)
    ref = [row.detach() for row in token_nats(reference, rollout, temperature)]
    loss, kl = torch.zeros(()), 0.0
    for A, ours, theirs in zip(advantages, nats, ref, strict=True):
        k3 = torch.exp(theirs - ours) - 1 - (theirs - ours)
        loss = loss - (A * (ours - ours.detach()).exp() - 0.5 * k3).mean() / 12
        kl += (ours - theirs).sum().item() / 12
    lengths = torch.tensor([float(len(row)) for row in nats])
    expected = {
        "completions": 12,
        "length_up": lengths[advantages > 0].mean().item(),
        "length_down": lengths[advantages < 0].mean().item(),
        "dead": 0.0,
        "ratio_first": 0.0,
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": kl,
    }
    training.assert_metrics(metrics, rollout, expected)
    assert 0 < groups[0].mean() < 1 and 0 < groups[1].mean() < 1


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_first_ratio_is_exactly_1(monkeypatch, minibatches):
    """Not about 1; and a wrong old log-prob shows."""
    config = replace(CONFIG, minibatches=minibatches, temperature=0.6, micro_batch=3)
    assert all(row["ratio_first"] == 0.0 for row in run(base(), config))
    right = grpo.rescore
    monkeypatch.setattr(grpo, "rescore", lambda *args: right(*args) - 0.01)
    metrics = next(run(base(), config))
    assert metrics["ratio_first"] == pytest.approx(math.exp(0.01) - 1, abs=1e-5)


def test_without_a_step_no_ratio_moves(monkeypatch):
    """Lr 0 keeps them all at 1 to rounding, through four passes."""
    ratios = training.spied(monkeypatch, grpo, "probability_ratio")
    config = replace(CONFIG, epochs=4, minibatches=2, updates=1)
    for lr, still in ((0.0, True), (1e-2, False)):
        ratios.clear()
        (metrics,) = run(base(), replace(config, lr=lr))
        off = max((ratio.detach() - 1).abs().max().item() for _, ratio in ratios)
        assert (off < 1e-5) == still and (metrics["clip_fraction"] == 0) == still


def test_old_log_probs_are_those_of_the_draw(monkeypatch):
    """Throughout the passes; and the sampler's agree with them to rounding."""
    drawn = training.spied_draws(monkeypatch)
    losses = training.spied(monkeypatch, grpo, "clipped_loss")
    list(run(base(), replace(CONFIG, epochs=3, updates=1, temperature=0.6)))
    ((_, rollout),) = drawn
    parts = rollout.micro_batches(CONFIG.micro_batch)
    assert len(losses) == 3 * len(parts)
    for (args, _), rows in zip(losses, 3 * parts, strict=True):
        close(args[1], rollout.select(rows).logprobs, atol=1e-5)
        assert not args[1].requires_grad


def test_the_clip_fraction_counts_tokens_without_a_gradient(monkeypatch):
    """Of live tokens, on average over steps; those with A = 0 are no such, nor those
    that left the band against A. Ratios lie on all sides of it from the first
    step on, for the old log-probs are off by up to 30 %."""
    right = grpo.rescore

    def off(*args):
        old = right(*args)
        return old * (0.7 + 0.6 * torch.rand(old.shape, generator=generator(3)))

    monkeypatch.setattr(grpo, "rescore", off)
    losses = training.spied(monkeypatch, grpo, "clipped_loss")
    config = replace(CONFIG, epochs=3, updates=1, eps_low=0.1, eps_high=0.02)
    (metrics,) = run(base(), config)
    stopped, live = 0, 0
    outside = set()
    for (logprobs, old, A, mask, *eps), _ in losses:
        leaf = logprobs.detach().clone().requires_grad_()
        loss = clipped_loss(leaf, old, A, mask, *eps).sum()
        (slope,) = torch.autograd.grad(loss, leaf)
        stopped += ((slope == 0) & mask & (A != 0)[:, None]).sum().item()
        live += mask.sum().item()
        assert eps == [0.1, 0.02]
        ratio = (leaf.detach() - old).exp()
        side = (ratio > 1.02).long() - (ratio < 0.9).long()
        outside |= set((side * A.sign()[:, None])[mask].tolist())
    assert metrics["clip_fraction"] == pytest.approx(stopped / live) and stopped > 5
    assert outside == {-1, 0, 1}


def test_the_gradient_norm_is_the_mean_over_steps(monkeypatch):
    norms = training.spied(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    config = replace(CONFIG, epochs=3, updates=1, lr=0.05)
    (metrics,) = run(base(), config)
    lengths = [norm.item() for _, norm in norms]
    assert len(lengths) == 3 and max(lengths) > 1.05 * min(lengths)
    assert metrics["grad_norm"] == pytest.approx(sum(lengths) / 3)


@pytest.mark.parametrize("reduction", [per_sequence, per_token])
def test_a_minibatch_is_weighed_by_itself(reduction):
    """With A = 1 everywhere and ratios at 1, the loss of each step is -1."""
    config = replace(CONFIG, minibatches=3, epochs=2, updates=1, lr=0.0)
    more = {"advantage": torch.ones_like, "reduction": reduction}
    (metrics,) = run(base(), config, **more)
    assert metrics["loss"] == pytest.approx(-1, abs=1e-5)


def test_dr_grpo_divides_by_the_budget():
    """With A = 1 and ratios at 1 the loss is -length / max_new_tokens, on average."""
    config = replace(CONFIG, minibatches=3, updates=1, lr=0.0)
    more = {"advantage": torch.ones_like, "reduction": by_constant}
    (metrics,) = run(base(), config, **more)
    assert metrics["loss"] == pytest.approx(-metrics["length"] / 3, abs=1e-5)


def test_groups_without_a_difference_are_counted_and_move_nothing():
    """In float32 0.1, whose mean is not 0.1; and the loss is 0 when they are dead."""
    policy = base()
    config = replace(CONFIG, samples=7)
    metrics = next(run(policy, config, lambda _, texts: [0.1] * len(texts)))
    assert metrics["dead"] == 1.0 and metrics["loss"] == 0 == metrics["grad_norm"]
    assert metrics["length_up"] == 0 == metrics["length_down"] < metrics["length"]
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))

    def half(problems, texts):
        return [float(i) if i < 6 else 1.0 for i in range(len(texts))]

    assert next(run(base(), CONFIG, half))["dead"] == 0.5


def test_the_kl_term_brings_a_policy_home_even_from_dead_groups():
    """Whichever has a gradient; k1 as a loss only adds noise: the control."""
    away = base()
    list(run(away, replace(CONFIG, updates=3, prompts=5, lr=4e-3)))
    config = replace(CONFIG, beta=1.0, updates=12, prompts=5, lr=2e-3, samples=20)
    config = replace(config, micro_batch=100)
    ends = {}
    for term in (k1_term, k2_term, k3_term):
        more = {"reference": base(), "kl_term": term}
        metrics = list(run(copy.deepcopy(away), config, never, **more))
        assert metrics[0]["dead"] == 1 and metrics[0]["kl"] > 0.7
        ends[term.__name__] = metrics[-1]["kl"]
    assert ends.pop("k1_term") > 0.7
    assert max(ends.values()) < 0.2


def test_ratio_k3_and_k2_are_one_gradient_at_ratio_1():
    """Sample by sample: one step a draw cannot tell them apart. Later steps can."""
    ref, mask = torch.tensor([[-0.5, -4.0, -1.0]]), torch.ones((1, 3), dtype=torch.bool)
    for moved, same in ((0.0, True), (0.3, False)):
        slopes = []
        for term in (k2_term, kl_ratio_k3):
            logprobs = torch.tensor([[-2.0, -0.1, -1.5]]).requires_grad_()
            old = logprobs.detach() - moved
            total = term(logprobs, old, ref, mask).sum()
            slopes.append(torch.autograd.grad(total, logprobs)[0])
        assert torch.allclose(*slopes, atol=1e-5) == same


def test_a_kl_term_is_given_the_log_probs_of_the_draw(monkeypatch):
    """Throughout the passes, as the clip is: the ratio in it is that of the step."""
    losses = training.spied(monkeypatch, grpo, "clipped_loss")
    olds = []

    def watching(logprobs, old, ref, mask):
        olds.append(old)
        return k3_term(logprobs, old, ref, mask)

    config = replace(CONFIG, epochs=3, updates=1, beta=0.1)
    list(run(base(), config, reference=base(), kl_term=watching))
    assert len(olds) == len(losses) > 3
    for old, (args, _) in zip(olds, losses, strict=True):
        assert torch.equal(old, args[1])


def test_every_kl_term_is_used():
    """Other weights after two updates."""
    ends = []
    for term in (k1_term, k2_term, k3_term, kl_ratio_k3):
        state = {}
        config = replace(CONFIG, updates=2, beta=1.0, max_grad_norm=1e9, epochs=2)
        list(run(base(), config, reference=base(), state=state, kl_term=term))
        ends.append(training.weights_of(state))
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
