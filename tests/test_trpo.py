"""TRPO: one step as a whole, what it does not depend on, and training."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from minialign.algorithms import trpo
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close, float64
from tests.properties.trust_region import (
    CONFIG,
    LOGITS,
    REWARDS,
    Table,
    base_change,
    fisher,
    gain,
    moved,
    one_step,
    uphill,
)
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    base,
    base_weights,
    judged,
    never,
    row_nats,
    stretched,
    token_nats,
)

# Part 1: a step of a table, every number of which can be written down

CONVERGED = replace(CONFIG, iterations=100)


def test_a_step_is_the_natural_gradient_as_long_as_the_bound_allows():
    """x = F⁺ g by linear algebra, scaled to a quadratic KL of delta, then shortened."""
    after, said = one_step(Table(LOGITS), CONVERGED)
    F_ = fisher(LOGITS)
    natural = torch.linalg.pinv(F_) @ uphill(REWARDS)
    length = torch.sqrt(2 * CONFIG.delta / (natural @ F_ @ natural))
    assert said.accepted
    shrunk = CONFIG.shrink ** (said.tries - 1)
    expected = LOGITS + (shrunk * length * natural).view(7, 3)
    close(after.log_softmax(1), expected.log_softmax(1), atol=1e-6)


def test_the_accepted_step_moves_no_further_than_it_says():
    """Its KL by enumeration of every choice; and it has gained."""
    for config in (CONVERGED, replace(CONVERGED, damping=0.1), CONFIG):
        after, said = one_step(Table(LOGITS), config)
        assert 0 < said.kl <= config.delta
        close(float64(said.kl), moved(LOGITS, after))
        assert said.gain > 0
        close(float64(said.gain), gain(LOGITS, after, REWARDS))


def test_a_small_step_uses_the_bound_up():
    """There the KL is what its second derivative says."""
    _, said = one_step(Table(LOGITS), replace(CONVERGED, delta=1e-8))
    assert said.tries == 1 or said.kl > 0.6e-8
    assert said.kl == pytest.approx(1e-8 * 0.64 ** (said.tries - 1), rel=1e-3)


def both_ways(config: trpo.TRPOConfig) -> list[torch.Tensor]:
    """The policies after a step of θ, and of φ with θ = B φ."""
    ends = []
    for policy in (Table(LOGITS), Table(LOGITS, base_change())):
        after, said = one_step(policy, config)
        assert said.accepted
        ends.append(world.probabilities(after))
    return ends


def test_without_damping_the_weights_do_not_matter():
    """θ = B φ, B not orthogonal: the same policy, whatever its weights are called."""
    basis = base_change()
    assert (basis.T @ basis - torch.eye(21)).abs().max() > 0.5
    close(*both_ways(CONVERGED), atol=1e-6)


@pytest.mark.parametrize("change", [{"damping": 0.1}, {"iterations": 1}], ids=str)
def test_damped_or_along_the_plain_gradient_they_do(change):
    here, there = both_ways(replace(CONVERGED, **change))
    assert (here - there).abs().max() > 1e-3


# Part 2: what a ratio corrects

OLD = world.random_logits(3)  # the policy that drew


def slope_of_old_draws(weigh) -> torch.Tensor:
    """(7, 3): E_old[∇ weigh(ratios) · r] at LOGITS, all 15 answers."""
    old = world.token_logprobs(OLD)

    def objective(logits):
        ratio = (world.token_logprobs(logits) - old).exp()  # (15, 3), 1 where masked
        return (old.sum(1).exp() * weigh(ratio) * REWARDS).sum()

    return world.gradient(objective, LOGITS)


def test_only_the_product_over_the_answer_corrects_who_drew():
    """E_old[ρ r] = E[r] for ρ of the whole answer. Token by token it is not: nothing
    says that the policy now comes to other beginnings."""
    truth = world.true_gradient(LOGITS, REWARDS)
    close(slope_of_old_draws(lambda ratio: ratio.prod(1)), truth)
    by_token = slope_of_old_draws(
        lambda ratio: torch.where(world.MASK, ratio, 0.0).sum(1)
    )
    assert world.cosine(by_token, truth) < 0.99

    def loss(rows, logprobs, mask):
        old = world.token_logprobs(OLD)[rows]
        return trpo.surrogate_loss(logprobs, old, REWARDS[rows], mask)

    found = -world.expected_gradient(loss, LOGITS, behaviour=OLD)
    close(found, by_token)


# Part 3: of a transformer

METHOD = METHODS["trpo"]
TOY = METHOD.config
run = METHOD.run


def test_the_curvature_of_a_transformer_is_that_of_its_kl():
    """vᵀHv against KL(θ ‖ θ + εv), measured: attention's second derivative is there."""
    policy = stretched().double()
    generator = torch.Generator().manual_seed(0)
    rollout = training.room.draw(policy, TOKENIZER, PROBLEMS, 0, TOY, generator)[1]
    inputs = rollout.tokens[:, :-1]
    live = rollout.mask

    def nats(weights):
        hidden = functional_call(policy, weights, (inputs,))[live]
        head = weights["lm_head.weight"]
        return F.linear(hidden, head).log_softmax(-1)

    weights = {name: x.detach() for name, x in policy.named_parameters()}
    moves = {
        name: torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for name, x in weights.items()
    }
    v = torch.cat([move.flatten() for move in moves.values()])
    epsilon = 1e-3 / v.norm()
    old = nats(weights)
    bends = []
    for sign in (1, -1):
        new = nats(
            {name: x + sign * epsilon * moves[name] for name, x in weights.items()}
        )
        kl = F.kl_div(new, old, log_target=True, reduction="sum") / len(old)
        bends.append(2 * kl / epsilon**2)
    product = trpo.Curvature(policy, rollout, 0.0, 5)
    expected = (bends[0] + bends[1]).item() / 2
    assert (v @ product(v)).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied_draws(monkeypatch)
    config = replace(TOY, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    rewards = judged(rollout)  # (12,)
    nats = row_nats(twin, rollout, temperature)  # (12,)
    groups = rewards.tolist()[:6], rewards.tolist()[6:]
    advantages = torch.tensor([r - (sum(g) - r) / 5 for g in groups for r in g])
    loss = -(advantages * nats).mean()
    tokens = sum(map(len, rollout.responses()))
    kl = training.row_kl(twin, policy, rollout, temperature)  # old first
    k1 = (nats - row_nats(reference, rollout, temperature)).detach()
    grown = 0.0
    pairs = zip(
        token_nats(twin, rollout, temperature),
        token_nats(policy, rollout, temperature),
        advantages,
        strict=True,
    )
    for old, new, A in pairs:
        grown += (A * ((new - old).exp() - 1).sum()).item() / 12
    expected = {
        "completions": 12,
        "dead": sum(len(set(g)) == 1 for g in groups) / 2,
        "advantage_std": advantages.square().mean().sqrt().item(),  # their mean is 0
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": k1.mean().item(),
        "tries": metrics["tries"],
        "kl_moved": sum(kl) / tokens,
        "gain": grown,
        # scored, forward, back, tried; the curvature: forward, back, 4 products
        "passes": 3 + metrics["tries"] + 6 * 4 / 12,
    }
    assert metrics.pop("steps") == 1 and metrics["tries"] >= 1
    guard = {"guarded": 0.0, "steps": 1}  # it has none; what the others report
    training.assert_metrics(metrics | guard, rollout, expected, rel=1e-3)


def test_dead_groups_teach_nothing_and_nothing_is_tried():
    policy = base()
    state = {}
    metrics = next(run(policy, TOY, never, state=state))
    assert metrics["dead"] == 1 and metrics["advantage_std"] == 0
    shown = ("grad_norm", "steps", "tokens_trained", "tries", "kl_moved", "gain")
    assert [metrics[name] for name in shown] == [0] * 6
    training.assert_same_bits(dict(state["policy"]), dict(base_weights()))


def test_the_curvature_is_of_as_many_problems_as_there_can_be(monkeypatch):
    """Four answers of twelve, two of them to each problem."""
    seen = []
    right = trpo.Curvature

    def spy(policy, rollout, *more):
        seen.append(rollout)
        return right(policy, rollout, *more)

    monkeypatch.setattr(trpo, "Curvature", spy)
    drawn = training.spied_draws(monkeypatch)
    next(run(base()))
    ((_, rollout),) = drawn
    assert len(seen[0].tokens) == 4
    for row, source in enumerate((0, 3, 6, 9)):
        used = seen[0].tokens.shape[1]
        assert torch.equal(seen[0].tokens[row], rollout.tokens[source, :used])


def test_the_bound_holds_at_every_update_and_a_longer_one_moves_further():
    moves = {}
    for delta in (0.001, 0.05):
        config = replace(TOY, delta=delta, prompts=5)
        metrics = list(run(base(), config))
        moves[delta] = [row["kl_moved"] for row in metrics]
        assert max(moves[delta]) <= delta
        assert all(row["gain"] > 0 for row in metrics if row["steps"])
    assert max(moves[0.05]) > max(moves[0.001])
