"""What TRPO owes: its curvature, its direction, its step, and the search along it.

The policy is a table of logits, one row for each of the 7 prefixes of
tests/enumeration.py, so that the Fisher matrix and every KL can be written down. It is
called as a GPT is. `base_change` makes its weights φ with logits = B φ: another way to
say the same policies.
"""

import copy
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import torch
from torch import Tensor, nn

from minialign.algorithms import trpo
from minialign.sampling import Rollout
from tests import enumeration as world
from tests.properties.common import close, float64
from tests.properties.logprobs import check_scores_one_by_one
from tests.toy import base

PROMPT = 0  # one token, which the table does not look at
LOGITS = world.random_logits(0)  # (7, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
CONFIG = trpo.TRPOConfig(delta=0.01, damping=0.0, micro_batch=4)
DRAWN = torch.tensor([*range(15), 1, 1, 3, 8])  # responses of a draw: every prefix
DAMPING = 0.3


class Table(nn.Module):
    """A policy with a row of logits for each prefix: the weights times a basis."""

    def __init__(self, logits: Tensor, basis: Tensor | None = None) -> None:
        super().__init__()
        size = logits.numel()
        eye = torch.eye(size, dtype=logits.dtype)
        self.register_buffer("basis", eye if basis is None else basis)
        weights = torch.linalg.solve(self.basis, logits.flatten())
        self.weights = nn.Parameter(weights.view_as(logits))

    def table(self) -> Tensor:
        return (self.basis @ self.weights.flatten()).view(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, 7): which prefix was read so far, as a row of 0 and a 1."""
        hidden = torch.zeros(*tokens.shape, 7, dtype=self.basis.dtype)
        for b, row in enumerate(tokens.tolist()):
            for t in range(len(row)):
                prefix = tuple(row[1 : t + 1])
                if prefix in world.PREFIXES:
                    hidden[b, t, world.PREFIXES.index(prefix)] = 1.0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table()


def draw(rows: Tensor = DRAWN) -> Rollout:
    """These responses, after a prompt of one token. Nobody asks for their logprobs."""
    mask = world.MASK[rows]
    prompt = torch.full((len(rows), 1), PROMPT)
    return Rollout(
        tokens=torch.cat((prompt, world.TOKENS[rows]), dim=1),
        mask=mask,
        logprobs=torch.zeros(mask.shape, dtype=torch.float64),
        prompt_lengths=torch.ones(len(rows), dtype=torch.int64),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        temperature=1.0,
        samples=1,
    )


def visits(rows: Tensor = DRAWN) -> Tensor:
    """(7,): the share of a draw's choices that are made after each prefix."""
    states = world.STATES[rows][world.MASK[rows]]
    return torch.bincount(states, minlength=7).double() / len(states)


def fisher(logits: Tensor, rows: Tensor = DRAWN) -> Tensor:
    """(21, 21): the mean of E[∇ log π ∇ log πᵀ] over the choices of a draw."""
    whole = torch.zeros(7, 3, 7, 3, dtype=torch.float64)
    for state, share in enumerate(visits(rows)):
        p = logits[state].softmax(0)
        whole[state, :, state] = share * (p.diag() - p.outer(p))
    return whole.view(21, 21)


def moved(before: Tensor, after: Tensor, rows: Tensor = DRAWN) -> Tensor:
    """The mean KL(before ‖ after) of a choice in a draw, from two tables."""
    old, new = before.log_softmax(1), after.log_softmax(1)
    return visits(rows) @ (old.exp() * (old - new)).sum(1)


@cache
def base_change() -> Tensor:
    """(21, 21), far from orthogonal, and such that nothing is lost."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.eye(21) + 0.3 * torch.randn(21, 21, generator=generator)
    return basis.double()


# score_choices


def check_every_choice(score) -> None:
    """All that could have been chosen, row by row; and of it what was."""

    def chosen(model, tokens, mask, temperature=1.0):
        logprobs, every = score(model, tokens, mask, temperature)
        close(every.exp().sum(1), torch.ones_like(every[:, 0]))
        rows, slots = mask.nonzero(as_tuple=True)
        targets = tokens[rows, slots + 1]
        close(every[torch.arange(len(every)), targets], logprobs[mask])
        if temperature == 1.0:  # which is what nobody has to say
            close(score(model, tokens, mask)[0], logprobs)
        return logprobs

    check_scores_one_by_one(chosen)

    def cooler(*call):
        return chosen(*call, 0.5)

    check_scores_one_by_one(cooler, temperature=0.5)


def check_half_is_lifted(score) -> None:
    """Nothing is summed in half precision."""
    policy = base()
    tokens = torch.tensor([[256, 97, 259, 121]])
    mask = torch.tensor([[False, False, True]])
    for found in score(policy.bfloat16(), tokens, mask):
        assert found.dtype == torch.float32


# surrogate_loss


def check_slope_at_the_old_policy(loss) -> None:
    """There the expected gradient is that of E[r], uphill."""

    def weighted(rows, logprobs, mask):
        return loss(logprobs, logprobs.detach(), REWARDS[rows], mask)

    expected = world.true_gradient(LOGITS, REWARDS)
    for samples in (1, 2):
        close(-world.expected_gradient(weighted, LOGITS, samples), expected)


def check_a_single_choice_is_corrected(loss) -> None:
    """Of answers of one token that another policy drew, value and gradient are those of
    E[A] under this one."""
    old, new = world.random_logits(3)[0], world.random_logits(4)[0]
    advantages = float64([1.0, -0.5, 0.25])
    mask = torch.ones(1, 1, dtype=torch.bool)
    leaf = new.clone().requires_grad_()
    found = torch.zeros((), dtype=torch.float64)
    for token in range(3):
        chance = old.softmax(0)[token]
        logprobs = leaf.log_softmax(0)[token].view(1, 1)
        was = old.log_softmax(0)[token].view(1, 1)
        found = found + chance * loss(logprobs, was, advantages[token].view(1), mask)
    close(-found, new.softmax(0) @ advantages)
    (slope,) = torch.autograd.grad(-found, leaf)
    close(slope, world.gradient(lambda x: x.softmax(0) @ advantages, new))


# choice_kl


def check_old_first(kl) -> None:
    """KL(old ‖ new), which is not KL(new ‖ old); 0 where both agree."""
    old, new = float64([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    expected = 0.5 * torch.log(old[0] / new[0]) + 0.25 * torch.log(old[1] / new[1])
    expected = expected + 0.25 * torch.log(old[2] / new[2])
    both = torch.stack((old, old)).log(), torch.stack((new, old)).log()
    close(kl(*both), torch.stack((expected, torch.zeros_like(expected))))


def check_its_bend_is_the_fisher_matrix(kl) -> None:
    """At the old policy: no slope, and the second derivative diag(p) − p pᵀ."""
    logits = LOGITS[2]
    old = logits.log_softmax(0)[None]

    def value(x):
        return kl(old, x.log_softmax(0)[None]).sum()

    p = logits.softmax(0)
    close(world.gradient(value, logits), torch.zeros(3, dtype=torch.float64))
    bend = torch.autograd.functional.hessian(value, logits)
    close(bend, p.diag() - p.outer(p))


# Curvature


def check_is_the_fisher_matrix(curvature) -> None:
    """H v, H written down; however the answers are cut into parts."""
    vectors = world.random_logits(6).flatten(), world.random_logits(7).flatten()
    for micro_batch in (1, 4, 100):
        product = curvature(Table(LOGITS), draw(), 0.0, micro_batch)
        for v in vectors:
            close(product(v), fisher(LOGITS) @ v)


def check_is_damped(curvature) -> None:
    """Along a direction that changes no policy only the damping is left."""
    product = curvature(Table(LOGITS), draw(), DAMPING, 100)
    v = torch.ones(21, dtype=torch.float64)
    close(product(v), DAMPING * v)
    v = world.random_logits(6).flatten()
    close(product(v), fisher(LOGITS) @ v + DAMPING * v)


# conjugate_gradients


def positive_matrix(*eigenvalues: float) -> Tensor:
    generator = torch.Generator().manual_seed(len(eigenvalues))
    size = len(eigenvalues)
    turned, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).double())
    return turned @ float64(eigenvalues).diag() @ turned.T


TARGET = float64([1.0, -2.0, 0.5, 3.0, 0.0, 1.5])


def check_solves(solve) -> None:
    """With as many iterations as there are dimensions; half-way it has not."""
    H = positive_matrix(1.0, 2.0, 3.0, 5.0, 8.0, 13.0)
    expected = torch.linalg.solve(H, TARGET)
    for scale in (1.0, 1e-12):
        close(solve(H.matmul, scale * TARGET, 6) / scale, expected)
    assert (solve(H.matmul, TARGET, 3) - expected).norm() > 1e-3


def check_as_many_as_eigenvalues(solve) -> None:
    """Two different ones: two iterations."""
    H = positive_matrix(1.0, 1.0, 1.0, 4.0, 4.0, 4.0)
    expected = torch.linalg.solve(H, TARGET)
    close(solve(H.matmul, TARGET, 2), expected)
    assert (solve(H.matmul, TARGET, 1) - expected).norm() > 0.1


def check_first_is_the_slope(solve) -> None:
    """One iteration: along the target, as far as is best on that line."""
    H = positive_matrix(1.0, 2.0, 3.0, 5.0, 8.0, 13.0)
    best = (TARGET @ TARGET) / (TARGET @ H @ TARGET)
    close(solve(H.matmul, TARGET, 1), best * TARGET)


def check_ends_when_solved(solve) -> None:
    """No product is asked for that nobody needs; nothing is wanted, nothing done."""
    asked = []

    def product(v):
        asked.append(v)
        return 2.0 * v

    close(solve(product, TARGET, 6), TARGET / 2)
    assert len(asked) == 1
    assert not solve(product, torch.zeros(6), 6).any()
    assert len(asked) == 1


def assert_curvature_refused(call) -> None:
    try:
        found = call()
    except ValueError as error:
        assert "curvature" in str(error)
        return
    raise AssertionError(f"not refused: {found}")


def check_refuses_negative_curvature(solve) -> None:
    H = positive_matrix(1.0, 2.0, -3.0, 5.0, 8.0, 13.0)
    for product in (H.matmul, lambda v: 0.0 * v, lambda v: float("nan") * v):
        assert_curvature_refused(partial(solve, product, TARGET, 6))


# step_within


def check_quadratic_kl(step_within) -> None:
    """½ sᵀHs is delta, and s points along x."""
    H = positive_matrix(1.0, 2.0, 3.0, 5.0, 8.0, 13.0)
    for delta in (0.01, 0.5):
        step = step_within(TARGET, H @ TARGET, delta)
        close(step @ H @ step / 2, float64(delta))
        close(step / step.norm(), TARGET / TARGET.norm())
    assert not step_within(0 * TARGET, 0 * TARGET, 0.01).any()


def check_refuses_a_wrong_bend(step_within) -> None:
    for bent in (-TARGET, 0 * TARGET, float("nan") * TARGET):
        assert_curvature_refused(partial(step_within, TARGET, bent, 0.01))


# line_search


def searched(search, step: Tensor, rewards: Tensor, config=CONFIG):
    """(the policy's table afterwards, what the search says)."""
    policy = Table(LOGITS)
    parts = trpo.scored_parts(policy, draw(), rewards[DRAWN], config.micro_batch)
    said = search(policy, step, parts, config)
    return policy, said


def gain(before: Tensor, after: Tensor, rewards: Tensor) -> Tensor:
    """Of E_old[Σ ρ A] over the draw, from two tables."""
    ratio = (world.token_logprobs(after) - world.token_logprobs(before)).exp()
    ratio = torch.where(world.MASK, ratio - 1, 0.0).sum(1)  # (15,)
    return (ratio * rewards)[DRAWN].mean()


def uphill(rewards: Tensor) -> Tensor:
    """(21,): the slope of E_old[ρ A] in the table."""
    return world.gradient(lambda x: gain(LOGITS, x, rewards), LOGITS).flatten()


def check_stays_within_the_bound(search) -> None:
    """A step that is too long is shortened: the first of the lengths within delta, and
    the KL that is reported is the one that there is."""
    step = 3 * uphill(REWARDS)
    step[0] = 0.0  # a weight may stay
    policy, said = searched(search, step, REWARDS)
    after = policy.table().detach()
    assert said.accepted and said.tries > 2
    assert 0 < said.kl <= CONFIG.delta
    close(float64(said.kl), moved(LOGITS, after))
    close(float64(said.gain), gain(LOGITS, after, REWARDS))
    length = CONFIG.shrink ** (said.tries - 1)
    close(after.flatten(), LOGITS.flatten() + length * step)
    longer = LOGITS + (length / CONFIG.shrink * step).view(7, 3)
    assert moved(LOGITS, longer) > CONFIG.delta


def check_measures_the_papers_kl(search) -> None:
    """Old first. Two bounds a hair apart, one on either side of the KL of a step: it
    is taken under one, and shortened under the other."""
    step = 3 * uphill(REWARDS)
    there = moved(LOGITS, LOGITS + step.view(7, 3)).item()
    back = moved(LOGITS + step.view(7, 3), LOGITS).item()
    assert abs(there - back) > 1e-3 * there  # they can be told apart
    for factor, tries in ((1 + 1e-6, 1), (1 - 1e-6, 2)):
        config = trpo.TRPOConfig(delta=there * factor, micro_batch=4)
        assert searched(search, step, REWARDS, config)[1].tries == tries


def check_must_gain(search) -> None:
    """Downhill, or where all are alike, no length will do: nothing is taken, and no bit
    has changed."""
    step = 0.1 * uphill(REWARDS)
    for way, rewards in ((-step, REWARDS), (step, 0 * REWARDS)):
        policy, said = searched(search, way, rewards)
        assert not said.accepted
        assert (said.tries, said.gain, said.kl) == (CONFIG.tries, 0.0, 0.0)
        assert torch.equal(policy.weights, Table(LOGITS).weights)


def check_too_long_for_every_try(search) -> None:
    """Uphill, and still too far after the last try: no bit has changed."""
    policy, said = searched(search, 1e3 * uphill(REWARDS), REWARDS)
    assert not said.accepted and said.tries == CONFIG.tries
    assert torch.equal(policy.weights, Table(LOGITS).weights)


def check_what_cannot_be_computed_is_too_long(search) -> None:
    """Where logits lie further apart than numbers go, a step is refused, and no error
    is raised."""
    slope = uphill(REWARDS)
    step = 1e308 * slope / slope.abs().max()
    config = replace(CONFIG, shrink=0.9, tries=3)
    policy, said = searched(search, step, REWARDS, config)
    assert not said.accepted and said.tries == 3
    assert torch.equal(policy.weights, Table(LOGITS).weights)


def check_an_interrupt_leaves_no_trace(search) -> None:
    """Whatever ends the search in the middle, the weights are those of before."""
    policy = Table(LOGITS)
    parts = trpo.scored_parts(policy, draw(), REWARDS[DRAWN], CONFIG.micro_batch)

    def interrupted(*args):
        raise KeyboardInterrupt

    with mock.patch.object(trpo, "choice_kl", interrupted):
        try:
            search(policy, uphill(REWARDS), parts, CONFIG)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
    assert torch.equal(policy.weights, Table(LOGITS).weights)


def check_stays_where_it_is_told_to(search) -> None:
    """A step of 0 is no step, and is not tried."""
    policy, said = searched(search, torch.zeros(21).double(), REWARDS)
    assert (said.accepted, said.tries, said.gain, said.kl) == (False, 0, 0.0, 0.0)
    assert torch.equal(policy.weights, Table(LOGITS).weights)


def check_counts_from_where_it_stands(search) -> None:
    """Of answers that another policy drew, the ratios are not 1 to begin with: the gain
    is what the step brought, and not what lay between the two policies."""
    step = 0.1 * uphill(REWARDS)
    older = world.token_logprobs(world.random_logits(3))
    policy = Table(LOGITS)
    parts = trpo.scored_parts(policy, draw(), REWARDS[DRAWN], len(DRAWN))
    order = draw().micro_batches(len(DRAWN))[0]
    (part,) = parts
    part = replace(part, logprobs=older[DRAWN][order])
    said = search(policy, step, [part], CONFIG)

    def objective(logits):
        ratio = (world.token_logprobs(logits) - older).exp()
        ratio = torch.where(world.MASK, ratio, 0.0).sum(1)
        return (ratio * REWARDS)[DRAWN].mean()

    grown = objective(LOGITS + step.view(7, 3)) - objective(LOGITS)
    assert said.accepted == (grown > 0)
    if said.accepted:
        close(float64(said.gain), grown)
    policy = Table(LOGITS)
    said = search(policy, -step, [part], CONFIG)
    back = objective(LOGITS - step.view(7, 3)) - objective(LOGITS)
    assert said.accepted == (back > 0)


# All of it together


def one_step(policy: Table, config: trpo.TRPOConfig) -> tuple[Tensor, trpo.Search]:
    """The table (7, 3) after one update on DRAWN, and what the search says."""
    policy = copy.deepcopy(policy)
    rollout = draw()
    parts = trpo.scored_parts(policy, rollout, REWARDS[DRAWN], config.micro_batch)
    slope = trpo.surrogate_slope(policy, parts, 1.0)
    curvature = trpo.Curvature(policy, rollout, config.damping, config.micro_batch)
    direction = trpo.conjugate_gradients(curvature, slope, config.iterations)
    step = trpo.step_within(direction, curvature(direction), config.delta)
    said = trpo.line_search(policy, step, parts, config)
    return policy.table().detach(), said
