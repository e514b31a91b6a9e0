# %% [markdown]
# # Lesson 03: The exact world
#
# **Question.** Where does each method of this course go when nothing is left to chance?
#
# Read before: lesson 02. Now only "What accuracy costs", the rest after lesson 33.
# *KL*(π ‖ ref), nats: the mean of log π(answer) − log ref(answer) over π's answers.
#
# One question with 15 possible answers, and a policy that can give them any chances.
# Expectations are sums over the 15, over their pairs, or over groups of three: there is
# no noise. You will see the best policy, which KL estimate has which gradient, and all
# methods walking along their own *expected* gradients. Time: half a minute, one core.

# %%
import sys
from pathlib import Path

# A script looks for minialign above itself, a notebook above its working directory.
here = Path(globals().get("__file__", "notebook")).resolve()
roots = [folder for folder in here.parents if (folder / "minialign/course.py").exists()]
if not roots:
    raise FileNotFoundError(f"no minialign above {here}: run this in its repository")
sys.path.insert(0, str(roots[0]))

# %%
from collections import Counter, namedtuple
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from minialign import course, plotting
from minialign.algorithms import dpo, grpo, ppo, remax, rloo, rrhf
from minialign.algorithms.reinforce import reinforce_loss, shape_rewards
from minialign.algorithms.rejection_sampling import best_of_n_kl, likelihood_loss
from minialign.evaluation import binary_kl, frontier_at
from minialign.intervals import Estimate
from minialign.logprobs import kl_k1, kl_k2, kl_k3, kl_ratio_k3, masked_sum

settings = course.setup("03_exact_world")
steps, beta = settings.pick(12, 800, 800), 0.3  # beta: reward paid for a nat of KL

# %% [markdown]
# ## The world
#
# Three tokens: `a`, `b`, and `.`, which ends the answer; three tokens at most. An
# answer is *right* if it ends and holds exactly one `b`. Eight answers never end: they
# are cut and earn nothing. The policy is a table of logits, one row for each of the 7
# beginnings after which it must choose a token. All is float64, on the CPU.

# %%
beginnings, answers = [""], []
for beginning in beginnings:  # the list grows while we walk along it
    for token in "ab.":
        text = beginning + token
        (answers if token == "." or len(text) == 3 else beginnings).append(text)
LENGTHS = torch.tensor([len(text) for text in answers])  # (15,)
MASK = torch.arange(3) < LENGTHS[:, None]  # (15, 3)
TOKENS = torch.tensor([["ab.".index(c) for c in f"{y:.<3}"] for y in answers])
rows = [[beginnings.index(y[: min(t, len(y) - 1)]) for t in range(3)] for y in answers]
STATES = torch.tensor(rows)  # (15, 3): the row of the table where each was chosen
ended = torch.tensor([float(y[-1] == ".") for y in answers]).double()  # (15,)
EACH = torch.arange(15)[:, None]  # groups of one answer
right = ended * torch.tensor([y.count("b") == 1 for y in answers])  # (15,)


def token_logprobs(logits: Tensor) -> Tensor:
    """(7, 3) logits -> (15, 3) log-probabilities, 0 where an answer has no token."""
    return torch.where(MASK, logits.log_softmax(1)[STATES, TOKENS], 0.0)


# %%
def gradient(function, logits: Tensor) -> Tensor:
    """(7, 3): the true gradient of a number that the logits determine."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def chances(logits: Tensor) -> Tensor:
    return token_logprobs(logits).sum(1).exp()  # (15,), of each answer


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_y p(y) (log p(y) − log q(y)) of the policies with these logits."""
    return (chances(p) * (token_logprobs(p) - token_logprobs(q)).sum(1)).sum()


# %%
def mean_slope(loss, logits, chance: Tensor, groups: Tensor = EACH) -> Tensor:
    """(7, 3): E[∇ loss] over groups (N, K) of answers, drawn with `chance` (N,).

    The batch holds every group once; loss(logprobs (N K, 3)) is a mean over groups that
    do not look at each other. As in a real run, the draw is not differentiated.
    """
    logits = logits.detach().requires_grad_()
    logprobs, rows = token_logprobs(logits), groups.flatten()  # (15, 3), (N K,)
    leaf = logprobs.detach()[rows].requires_grad_()  # (N K, 3)
    (slopes,) = torch.autograd.grad(loss(leaf), leaf)
    slopes = slopes.view(*groups.shape, 3) * (len(groups) * chance)[:, None, None]
    total = torch.zeros_like(logprobs).index_add(0, rows, slopes.flatten(0, 1))
    return torch.autograd.grad(logprobs, logits, total)[0]


# %% [markdown]
# ## By hand
#
# The reference comes from the seed: another seed, another world, the same laws. Three
# columns hold the numbers that multiply ∇ log π(answer) in expected gradients:
# REINFORCE, chance x reward; with the mean reward p subtracted, chance x (reward − p);
# and imitation, an answer's chance among the right ones, less its chance. What is
# subtracted changes no gradient (Σ chance · ∇ log π = 0): the first two are one, and
# the third is that one over p.

# %%
draw = torch.Generator().manual_seed(settings.seed)
reference = 0.6 * torch.randn(7, 3, generator=draw, dtype=torch.float64)
REF, ref = token_logprobs(reference), chances(reference)  # (15, 3), (15,)
p = (ref @ right).item()
numbers = torch.stack((ref * right, ref * (right - p), ref * right / p - ref))
truth = gradient(lambda x: chances(x) @ right, reference)
for number, A in zip(numbers[:2], (right, right - p), strict=True):
    by_hand = gradient(lambda x, n=number: n @ token_logprobs(x).sum(1), reference)
    way = mean_slope(lambda x, A=A: reinforce_loss(x, A, MASK), reference, ref)
    assert torch.allclose(-way, by_hand) and torch.allclose(by_hand, truth)
assert torch.allclose(numbers[2], numbers[1] / p)
print("answer  reward  reference   REINFORCE   less mean   imitation")
for i, text in enumerate(answers):
    row = "".join(f"{number:>+12.4f}" for number in numbers[:, i])
    print(f"{text:<8}{right[i]:>6.0f}{ref[i]:>11.4f}{row}")

# %% [markdown]
# ## Predict

# %%
print(f"the reference is right with chance {p:.3f}; how often, at best, one nat away?")
my_guess = 0.5  # edit me

# %% [markdown]
# ## Before: the best there is
#
# Methods with a price on KL seek the highest J(π) = E[r] − β KL(π ‖ ref). The best is
# π* = ref · exp(r / β) / Z (Z makes it sum to 1), and J(π*) = β log Z: nothing needs
# learning to write it down. (For a language model nobody can sum Z, nor draw from π*:
# that is what methods are for.) Plain ascent on J should arrive there.


# %%
def optimum(rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """π* as (7, 3) logits, and its value β log Z."""
    scores = REF.sum(1) + rewards / beta  # (15,)
    mass = torch.zeros(7, 3).double()  # what passes through each choice
    share = scores.softmax(0).repeat_interleave(LENGTHS)
    mass.index_put_((STATES[MASK], TOKENS[MASK]), share, accumulate=True)
    return mass.log(), beta * scores.logsumexp(0).item()


def J(logits: Tensor) -> Tensor:
    return chances(logits) @ right - beta * kl(logits, reference)


def walk(slope) -> list[Tensor]:
    """Adam from the reference, against slope(logits, step); lr falls to 0."""
    logits, path = reference.clone(), []
    adam = torch.optim.Adam([logits])
    for step in range(steps):
        path.append(logits.clone())
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logits.grad = slope(logits, step)
        adam.step()
    return [*path, logits]


# %%
star, best = optimum(right, beta)
reached = walk(lambda logits, step: -gradient(J, logits))[-1]
assert gradient(J, star).abs().max() < 1e-6
assert abs(J(star) - best) < 1e-6 and J(reached) < best + 1e-6
print(f"J: reference {p:.6f}, after {steps} steps {J(reached):.6f}, π* {J(star):.6f}, "
      f"β log Z {best:.6f}")  # fmt: skip

# %% [markdown]
# ## Which KL estimate has which gradient
#
# With d = log π − log ref: k1 = d, k2 = d² / 2, k3 = e^(−d) − 1 + d, of the whole
# answer, or summed over its tokens. As a *loss*, each has a mean gradient. That is not
# the gradient of its mean *value*, which also moves the chances of the answers.


# %%
def estimate(name: str, new: Tensor, old: Tensor) -> Tensor:
    """(15,): the estimate `name`, from log-probs new (15, 3) under the policy."""
    whole = "whole" in name  # the answer as one choice: (15, 1)
    new, old, ref = (x.sum(1, keepdim=True) if whole else x for x in (new, old, REF))
    mask = MASK[:, : ref.shape[1]]
    if "ratio" in name:
        return kl_ratio_k3(new, old, ref, mask).sum(1)
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[name[:2]](new, ref, mask).sum(1)


def compare(name: str, sampler: Tensor) -> list[float]:
    """Mean value; cosine and length of the mean gradient beside ∇KL's, both KLs."""
    old, new, chance = *map(token_logprobs, (sampler, policy)), chances(sampler)
    loss = partial(estimate, name, old=old)
    if name == "k1 in the reward":
        paid = shape_rewards(0 * right, new, REF, MASK, 1.0)
        loss = partial(reinforce_loss, advantages=paid, mask=MASK)
    found = mean_slope(lambda x: loss(x).mean(), policy, chance)
    row = [(chance @ estimate(name, new, old)).item()]
    for function in (lambda x: kl(x, reference), lambda x: kl(reference, x)):
        true = gradient(function, policy)
        size = (found.norm() / true.norm()).item()
        cosine = torch.cosine_similarity(found.flatten(), true.flatten(), dim=0).item()
        row += [cosine if size > 1e-9 else 0.0, size]
    return row


# %%
change = torch.randn(2, 7, 3, generator=draw, dtype=torch.float64)
policy, older = reference + 0.6 * change
names = ["k1", "k2 whole", "k2 per token", "k3 whole", "k3 per token",
         "ratio x k3 whole", "ratio x k3 per token", "k1 in the reward"]  # fmt: skip
fresh, stale = ({n: compare(n, sampler) for n in names} for sampler in (policy, older))
distance = kl(policy, reference).item()
print(f"KL(π ‖ ref) = {distance:.4f}. Cosine and relative length of mean gradients:")
for title, table in {"from π": fresh, "from an older policy": stale}.items():
    print(f"\n{title:<22}{'mean':>8}     ∇KL(π ‖ ref)     ∇KL(ref ‖ π)")
    for name in names:
        print(f"{name:<22}" + "".join(f"{x:>8.3f}" for x in table[name]))

# %%
for name in ("k1", "k3 whole", "k3 per token", "ratio x k3 whole"):
    assert abs(fresh[name][0] - distance) < 1e-6  # unbiased values
for name in ("k2 whole", "ratio x k3 whole", "k1 in the reward"):
    assert np.allclose(fresh[name][1:3], 1, atol=1e-6)  # ∇KL(π ‖ ref)
assert np.allclose(fresh["k3 whole"][3:], 1, atol=1e-6) and fresh["k1"][2] < 1e-6
assert np.allclose(stale["ratio x k3 whole"][:3], [distance, 1, 1], atol=1e-6)
k1 = mean_slope(lambda x: estimate("k1", x, x).mean(), policy, chances(older))
assert torch.allclose(k1, -gradient(lambda x: kl(older, x), policy))

# %% [markdown]
# - **k1 as a loss does nothing** on fresh answers: Σ π ∇ log π = 0. On stale ones its
#   descent *raises* KL(older ‖ π): away from whoever drew the answers.
# - **k3 as a loss** (GRPO's) descends the *other* KL, though its value is unbiased.
# - **k2 of the whole answer** and **k1 in the reward** have ∇KL(π ‖ ref) on fresh
#   answers; **ratio x k3 of the whole answer** (ratio: π / the π that drew) on all.
#   **Per token** none has it: a token is not told what it does to the KL of later ones.
#
# ## What accuracy costs
#
# To be right with chance a instead of p takes kl(a ‖ p) = a log(a/p) + (1−a) log((1−a)
# / (1−p)) nats at least: the *frontier*. π* keeps the odds among right answers, and
# among wrong ones, and wastes nothing; as β falls it walks along the frontier to where
# it is always right, −log p nats away. Best-of-n keeps those odds too: it is on the
# frontier, at a = 1 − (1 − p)^n, and log n − (n − 1)/n only *bounds* its KL.


# %%
def trace(rewards: Tensor) -> np.ndarray:
    """(400, 2): KL to the reference and E[r] of π*, as β falls from 50 to 0.02."""
    stars = [optimum(rewards, b)[0] for b in np.geomspace(50, 0.02, 400)]
    return np.array([[kl(x, reference), chances(x) @ rewards] for x in stars])


counts = np.array([1, 2, 4, 8, 16, 32])
lucky = 1 - (1 - p) ** counts  # accuracy of the best of n
nats = np.array([float(best_of_n_kl(p, int(n))) for n in counts])
bound = np.log(counts) - (counts - 1) / counts
assert np.allclose(nats, binary_kl(lucky, p)) and (nats <= bound + 1e-6).all()
costs, gains = trace(right).T
assert np.allclose(costs, binary_kl(gains.clip(0, 1), p), atol=1e-6)
course.predict("Best accuracy one nat away:", my_guess, frontier_at(np.array([p]), 1.0))

# %% [markdown]
# ## Train: every method, without noise
#
# Each follows its expected gradient for the same number of steps. DPO's pairs are in
# order; groups of three count once for all their orders. `redraw`: the steps between
# two draws of answers. `paid`: r − β k1. PPO's critic says 0 (λ = 1). "Sure" labels
# never err, BT (Bradley-Terry) ones prefer y to z with chance σ(r_y − r_z). "Plain"
# GRPO divides by nothing. *Wasted*: nats beyond the frontier's for the same reward.

# %%
pairs = torch.tensor(list(product(range(15), repeat=2)))  # (225, 2)
orders = Counter(tuple(sorted(three)) for three in product(range(15), repeat=3))
threes, ways = torch.tensor(list(orders)), torch.tensor(list(orders.values()))
GROUPS = {1: (EACH, 1), 2: (pairs, 1), 3: (threes, ways)}  # threes: (680, 3)
Batch = namedtuple("Batch", "new old ref mask r paid greedy chance")  # r, paid: (N, K)


def follow(rewards: Tensor, K: int, redraw: int, loss, label=None) -> list[Tensor]:
    """The path of a method; label(r_winner, r_loser) weighs DPO's pairs."""
    groups, ways = GROUPS[K]  # (N, K)
    r, fixed, drawn = rewards[groups], [x[groups.flatten()] for x in (REF, MASK)], []

    def slope(logits: Tensor, step: int) -> Tensor:
        if step % redraw == 0:
            old = token_logprobs(logits)[groups.flatten()]  # (N K, 3)
            paid = shape_rewards(r.flatten(), old, *fixed, beta).view_as(r)
            chance = ways * chances(logits)[groups].prod(1)  # (N,)
            chance = chance * label(*r.T) if label else chance
            likeliest = (TOKENS == logits.argmax(1)[STATES]) | ~MASK
            greedy = rewards[likeliest.all(1)].expand(len(r))  # (N,)
            drawn[:] = old, *fixed, r, paid, greedy, chance
        return mean_slope(lambda x: loss(Batch(x, *drawn)), logits, drawn[-1], groups)

    return walk(slope)


# %%
def imitate(b: Batch) -> Tensor:
    kept = (b.r == b.r.amax(1, keepdim=True)) & (b.r > 0)  # ties: the mean of all lots
    weights = kept.double() / kept.sum(1, keepdim=True).clamp(min=1)
    return likelihood_loss(b.new, weights.flatten(), b.mask)


def remax_loss(b: Batch) -> Tensor:
    A = remax.remax_advantages(b.r, b.greedy).flatten()
    weights = remax.whole_answer(A, kl_k1(b.old, b.ref, b.mask), b.mask, beta)
    return remax.remax_loss(b.new, weights, b.mask)


def ppo_loss(b: Batch) -> Tensor:
    earned = ppo.shape_token_rewards(b.r[:, 0], b.old, b.ref, b.mask, beta)  # (15, 3)
    A = ppo.gae(earned, 0 * earned, b.mask, 1.0, 1.0)
    return ppo.policy_loss(b.new, b.old, A, b.mask, 0.2, 0.2)


def grpo_loss(b: Batch, rewards: Tensor, advantages, reduction, price: float) -> Tensor:
    each = grpo.clipped_loss(b.new, b.old, advantages(rewards).flatten(), b.mask)
    each = each + price * grpo.k3_term(b.new, b.old, b.ref, b.mask)  # (N K, 3)
    return masked_sum(reduction(b.mask, 3) * each, b.mask).sum()


# %%
def dpo_loss(b: Batch, again: bool = False) -> Tensor:
    both = (x.sum(1).view_as(b.r).T for x in (b.new, b.old if again else b.ref))
    return dpo.dpo_loss(*(side for pair in both for side in pair), beta)


def rrhf_loss(b: Batch) -> Tensor:
    tokens = rrhf.best_answers(b.r) * b.mask.sum(1).view_as(b.r)  # imitated
    counts = len(tokens), len(tokens) * (b.chance @ tokens.sum(1).double()).item()
    return rrhf.rrhf_loss(b.new, b.r, b.mask, counts=counts)


# %%
std, mean, lengths, even = (grpo.group_advantages, grpo.centred_advantages,
                            grpo.per_sequence, grpo.by_constant)  # fmt: skip
methods = {  # name: (K, redraw, loss, label)
    "imitate the best of 3": (3, steps, imitate),
    "imitate in 4 rounds": (3, steps // 4, imitate),
    "RRHF": (2, steps, rrhf_loss),
    "RRHF in 4 rounds": (2, steps // 4, rrhf_loss),
    "DPO, sure labels": (2, steps, dpo_loss, torch.gt),
    "DPO, sure, in 4 rounds": (2, steps // 4, lambda b: dpo_loss(b, True), torch.gt),
    "REINFORCE, β = 0": (1, 1, lambda b: reinforce_loss(b.new, b.r[:, 0], b.mask)),
    "GRPO, k3": (3, 1, lambda b: grpo_loss(b, b.r, std, lengths, beta)),
    "GRPO, k3, plain": (3, 1, lambda b: grpo_loss(b, b.r, mean, even, beta)),
    "REINFORCE": (1, 1, lambda b: reinforce_loss(b.new, b.paid[:, 0], b.mask)),
    "ReMax": (1, 1, remax_loss),
    "RLOO": (2, 1, lambda b: rloo.rloo_loss(
        b.new, rloo.leave_one_out(b.paid).flatten(), b.mask)),
    "PPO": (1, 4, ppo_loss),
    "GRPO, k1": (3, 1, lambda b: grpo_loss(b, b.paid, std, lengths, 0.0)),
    "DPO, BT labels": (2, steps, dpo_loss, lambda won, lost: (won - lost).sigmoid()),
}  # fmt: skip

# %%
some = torch.maximum(right, 0.4 * ended)
worlds = {"reward 0 or 1": right, "right 1, other ends 0.4": some}
kept = np.unique(np.geomspace(1, steps + 1, 30).astype(int)) - 1  # of a path's points
ends, paths, floors = {}, {}, {}
for world, rewards in worlds.items():
    ends[world], paths[world], floors[world] = {}, {}, trace(rewards)
    goal = chances(optimum(rewards, beta)[0])
    print(f"\n{world:<28}{'E[r]':>8}{'KL':>8}{'wasted':>8}{'J':>8}{'to π*':>10}")
    for name, method in methods.items():
        path = follow(rewards, *method)
        line = [(kl(path[i], reference), chances(path[i]) @ rewards) for i in kept]
        cost, gain = map(float, line[-1])
        wasted = max(cost - np.interp(gain, *floors[world].T[::-1]), 0.0)
        off = (chances(path[-1]) - goal).abs().sum().item() / 2  # total variation
        row = ends[world][name] = [gain, cost, wasted, gain - beta * cost, off]
        paths[world][name] = np.array(line).tolist()  # 30 pairs or fewer
        cells = "".join(f"{x:>8.4f}" for x in row[:4])
        print(f"{name:<28}{cells}{off:>10.0e}")

# %%
zero, graded = ends.values()
arrived = [name for name in methods if max(zero[name][4], graded[name][4]) < 1e-3]
extra = zero["REINFORCE, β = 0"][2]
title = f"{len(arrived)} methods end at π*; REINFORCE at β = 0 wastes {extra:.2f} nats"
figure, axes = plotting.new_figure(2, title, width=6.4, height=4.6)
families = {"imitation": 2, "RRHF": 2, "DPO, sure labels": 2, "REINFORCE, β = 0": 1,
            "GRPO, k3 in the loss": 2, "β k1 paid; DPO, BT: at π*": 6}  # fmt: skip
colors = np.repeat(plotting.COLORS, list(families.values()))  # of methods, in order
for axis, world in zip(axes, worlds, strict=True):
    axis.plot(*floors[world].T, color="#aaa", lw=6, alpha=0.5, label="π* at each β")
    for color, line in zip(colors, paths[world].values(), strict=True):
        axis.plot(*zip(*line, strict=True), color=color, lw=1)
        axis.plot(*line[-1], "o", color=color)
    axis.set(xlabel="KL to the reference, nats", ylabel="mean reward", title=world)
axes[0].plot(nats, lucky, "kx", label="best of 1, 2, 4, 8, 16, 32")
axes[0].plot(bound, lucky, "k:", lw=1, label="the bound on its KL")
for label, color in zip(families, plotting.COLORS, strict=True):
    axes[0].plot([], [], "o", color=color, label=label)
axes[0].legend(loc="lower right")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# ## What we saw

# %%
print(f"""- Within 1e-3 of π* in both worlds: {"; ".join(arrived) or "none"}.
- Nats the reward (0 or 1) did not ask for: imitation, which keeps the odds among right
  answers, {zero["imitate the best of 3"][2]:.3f}; REINFORCE at β = 0: {extra:.3f};
  DPO with sure labels: {zero["DPO, sure labels"][2]:.3f}.""")
run = {"config": {"steps": steps, "beta": beta}, "accuracy": p, "ends": ends,
       "paths": paths, "kl_fresh": fresh, "kl_stale": stale,
       "best_of_n": {"accuracy": lucky, "kl": nats, "bound": bound}}  # fmt: skip
before, after = (Estimate(x, x, x) for x in (p, (chances(star) @ right).item()))
course.finish(settings, run, before, after, "exact chance to be right: no noise")

# %% [markdown]
# Exercise. At which β does REINFORCE weigh r against KL as plain GRPO? (0.3 / (2/3):
# subtracting the mean of three leaves 2/3 of r. But k3 descends the other KL.)
