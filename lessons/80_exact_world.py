# %% [markdown]
# # Lesson 80: The exact world
#
# **Question.** Where does each method go when nothing is left to chance?
#
# **Afterwards you can** say which methods of this course seek the same policy and which
# do not, and what it takes to arrive.
#
# **Read before:** [lesson 04](04_frontier.py): the best policy at a price of KL.
# Lessons [10](10_rejection_sampling.py) to [16](16_grpo.py), [30](30_dpo.py) and
# [33](33_rrhf.py): the methods. [Lesson 17](17_kl.py): which estimate of the KL has
# which gradient.
#
# **Papers:** those of the lessons above; π* below is equation 4 of Rafailov et al.
# 2023, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290).
#
# **Look at:** the dots on the grey curve of Figure 1, and those beside it.
#
# **Turn first:** `beta`, the price of a nat.
#
# **Time:** half a minute on one CPU core, at every preset.

# %% tags=["setup"]
import sys
from pathlib import Path

# A script looks for minialign above itself, a notebook above its working directory.
here = Path(globals().get("__file__", "notebook")).resolve()
roots = [folder for folder in here.parents if (folder / "minialign/course.py").exists()]
if not roots:
    raise FileNotFoundError(f"no minialign above {here}: run this in its repository")
sys.path.insert(0, str(roots[0]))

# %% tags=["setup"]
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from minialign import course, plotting
from minialign import exact_world as world
from minialign.algorithms import dpo, grpo, ppo, remax, rloo, rrhf
from minialign.algorithms.reinforce import reinforce_loss, shape_rewards
from minialign.algorithms.rejection_sampling import likelihood_loss
from minialign.intervals import Estimate
from minialign.logprobs import kl_k1, kl_k3, kl_ratio_k3, masked_sum

# %% tags=["setup"]
settings = course.setup("80_exact_world")
steps = settings.pick(12, 800, 800)
beta = 0.3  # reward paid for a nat of KL
MASK = world.MASK

# %% [markdown]
# ## The idea
#
# On real problems every result is blurred by chance, and two methods that seek
# different policies may look alike for a long time. So we make a world so small that
# nothing needs to be drawn at random. There is one question with 15 possible answers.
# They are made of the tokens `a`, `b` and `.`, which ends an answer; after three tokens
# an answer is cut off. An answer is right if it ends and holds exactly one `b`. The
# policy is a table that can give the 15 any chances at all. Expectations are sums over
# the 15, over all pairs, or over all groups of three. We reward the answers in two
# ways. In the first, right answers earn 1 and all others 0. In the second, a wrong
# answer that at least ends earns 0.4.
#
# A method then has a *destination*: the policy where its expected gradient is 0. (Some
# have none, and move on for ever. Of those we say where 800 steps have left them.)
# Where should it be? Lesson 04 had the identity
#
#     E[r] − β KL(π ‖ ref) = β log Z − β KL(π ‖ π*),    π* = ref · e^(r/β)/Z
#
# so that a method with a price of β on KL should end at π*. Do they?
#
# ## By hand
#
# The reference is drawn from the seed. Another seed makes another world with the same
# laws. The last two columns hold what multiplies ∇ log π of each answer in the expected
# gradient: for REINFORCE with the mean reward p as baseline, and for imitating right
# answers. (The second has the chance of every answer subtracted, which changes no
# gradient, for Σ π ∇ log π = 0.) They are the same but for a factor, 1/p. Lesson 10
# said so of its first step.

# %%
draw = torch.Generator().manual_seed(settings.seed)
reference = world.random_policy(draw)  # (7, 3) logits
REF = world.token_logprobs(reference)  # (15, 3)
ref = world.chances(reference)  # (15,)
p = (ref @ world.RIGHT).item()
by_reinforce = ref * (world.RIGHT - p)  # (15,)
by_imitation = ref * world.RIGHT / p - ref  # (15,)
assert torch.allclose(by_imitation, by_reinforce / p)

truth = world.gradient(lambda x: world.chances(x) @ world.RIGHT, reference)
loss = partial(reinforce_loss, advantages=world.RIGHT - p, mask=MASK)
expected = world.expected_gradient(loss, reference, ref)
assert torch.allclose(-expected, truth)

print("answer  reward  reference   REINFORCE   imitation")
for i, text in enumerate(world.ANSWERS):
    row = f"{world.RIGHT[i]:>6.0f}{ref[i]:>11.4f}{by_reinforce[i]:>+12.4f}"
    print(f"{text:<8}{row}{by_imitation[i]:>+12.4f}")
star = world.best_policy(reference, world.RIGHT, beta)
print(f"right: {p:.3f} at the reference, {world.chances(star) @ world.RIGHT:.3f} at π*")


# %% [markdown]
# ## The variants
#
# In lessons 11 to 16 no method paid for KL. Here all that have a place for a price pay
# 0.3 for a nat. Imitation and RRHF have none, and one REINFORCE goes without. So this
# is no verdict on those lessons: it asks what each method *seeks*. Every method takes
# 800 steps of Adam. Some keep the chances of a draw for a whole round, which `redraw`
# counts in steps. (In four rounds, DPO has the policy of the last one as its
# reference.) PPO's critic says 0, at λ = 1. DPO's labels are *sure*, where the better
# answer always wins, or *Bradley-Terry*, where y beats z with chance σ(r(y) − r(z)).
#
# How is the KL paid for? In one of the ways of lesson 17. REINFORCE, ReMax, RLOO and
# PPO are paid r − β k1, through which no gradient flows, and so is GRPO in one variant.
# In the others it has a price in its loss, on k3 per token as in its paper, on k3 of
# the *whole* answer, or on ratio × k3 of the whole answer. *Undivided* means without
# either division of lesson 16. The mean of three answers is still subtracted there, and
# a third of it is the answer's own reward. So 2/3 of r is left, and the price is 2/3 of
# β.
#
# ## Predict
#
# Seventeen variants of the methods walk along their own expected gradients: imitation,
# RRHF and DPO in one round and in four, DPO with noisy labels, REINFORCE without a
# price on KL and with one, ReMax, RLOO, PPO, and five variants of GRPO. How many of the
# seventeen end at π* under both rewards, with no more than a thousandth of all chance
# elsewhere?

# %%
my_guess = 10  # edit me

# %% [markdown]
# ## Train: every method, without noise
#
# The table has a row for each variant: its mean reward E[r] and its KL at the end; how
# many of those nats are *wasted*: so many more than π* at some other price spends for
# the same mean reward; and how much of all chance lies elsewhere than at π* with our
# price β. (Of groups of three, those that differ only in their order are computed
# once.)


# %% tags=["setup"]
@dataclass
class Batch:
    """All groups of K answers, with what a loss may ask of them."""

    new: Tensor  # (N K, 3) log-probabilities of the policy, which carry the gradient
    old: Tensor  # (N K, 3) of the policy that drew
    ref: Tensor  # (N K, 3) of the reference
    mask: Tensor  # (N K, 3)
    rewards: Tensor  # (N, K)
    paid: Tensor  # (N, K), less the price of KL
    greedy: Tensor  # (N,), the reward of the greedy answer
    chance: Tensor  # (N,), of each group


@dataclass(frozen=True)
class Method:
    """A method in the exact world."""

    group: int  # answers that a loss compares with each other
    redraw: int  # steps on one draw
    loss: Callable[[Batch], Tensor]
    label: Callable[[Tensor, Tensor], Tensor] | None = None  # weights of DPO's pairs
    color: str = "#888"


def all_groups() -> dict[int, tuple[Tensor, Tensor]]:
    """{K: (groups (N, K), in how many orders each is drawn)}."""
    pairs = torch.tensor(list(product(range(15), repeat=2)))  # (225, 2)
    orders = Counter(tuple(sorted(three)) for three in product(range(15), repeat=3))
    threes = torch.tensor(list(orders))  # (680, 3)
    return {
        1: (world.EACH, torch.ones(15)),
        2: (pairs, torch.ones(len(pairs))),
        3: (threes, torch.tensor(list(orders.values()))),
    }


GROUPS = all_groups()


def walk(slope: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """Adam from the reference, against slope(logits, step); lr falls to 0."""
    logits = reference.clone()
    path = []
    adam = torch.optim.Adam([logits])
    for step in range(steps):
        path.append(logits.clone())
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logits.grad = slope(logits, step)
        adam.step()
    return [*path, logits]


def draw_all(logits: Tensor, rewards: Tensor, method: Method) -> dict[str, Tensor]:
    """What the policy with these logits would draw: every group, with its chance."""
    groups, orders = GROUPS[method.group]
    rows = groups.flatten()  # (N K,)
    earned = rewards[groups]  # (N, K)
    old = world.token_logprobs(logits)[rows]  # (N K, 3)
    paid = shape_rewards(earned.flatten(), old, REF[rows], MASK[rows], beta)
    chance = orders * world.chances(logits)[groups].prod(1)  # (N,)
    if method.label is not None:
        mine, other = earned.T  # (N,) each
        chance = chance * method.label(mine, other)
    likeliest = (world.TOKENS == logits.argmax(1)[world.STATES]) | ~MASK
    greedy = rewards[likeliest.all(1)].expand(len(groups))  # (N,)
    return {
        "old": old,
        "ref": REF[rows],
        "mask": MASK[rows],
        "rewards": earned,
        "paid": paid.view_as(earned),
        "greedy": greedy,
        "chance": chance,
    }


def follow(rewards: Tensor, method: Method) -> list[Tensor]:
    """The path of a method along its expected gradient."""
    drawn: dict[str, Tensor] = {}

    def slope(logits: Tensor, step: int) -> Tensor:
        if step % method.redraw == 0:
            drawn.update(draw_all(logits, rewards, method))
        groups, _ = GROUPS[method.group]
        return world.expected_gradient(
            lambda new: method.loss(Batch(new, **drawn)),
            logits,
            drawn["chance"],
            groups,
        )

    return walk(slope)


# %% [markdown]
# The losses are those of the library, put together as each `train` does. A batch holds
# every possible group of answers once. `world.expected_gradient` takes the slope of the
# loss by each row's log-probabilities, weighs it by the chance that the group is drawn,
# and adds up. So a loss that is a mean over groups becomes the expectation over draws.


# %%
def imitate(b: Batch) -> Tensor:
    best = b.rewards == b.rewards.amax(1, keepdim=True)
    kept = best & (b.rewards > 0)
    weights = kept.double() / kept.sum(1, keepdim=True).clamp(min=1)  # ties share
    return likelihood_loss(b.new, weights.flatten(), b.mask)


def reinforce(b: Batch) -> Tensor:
    return reinforce_loss(b.new, b.paid[:, 0], b.mask)


def reinforce_free(b: Batch) -> Tensor:
    return reinforce_loss(b.new, b.rewards[:, 0], b.mask)


def remax_loss(b: Batch) -> Tensor:
    A = remax.remax_advantages(b.rewards, b.greedy).flatten()
    k1 = kl_k1(b.old, b.ref, b.mask)
    weights = remax.whole_answer(A, k1, b.mask, beta)
    return remax.remax_loss(b.new, weights, b.mask)


def rloo_loss(b: Batch) -> Tensor:
    return rloo.rloo_loss(b.new, rloo.leave_one_out(b.paid).flatten(), b.mask)


def ppo_loss(b: Batch) -> Tensor:
    paid = ppo.shape_token_rewards(b.rewards[:, 0], b.old, b.ref, b.mask, beta)
    A = ppo.gae(paid, torch.zeros_like(paid), b.mask, 1.0, 1.0)
    return ppo.policy_loss(b.new, b.old, A, b.mask, 0.2, 0.2)


def grpo_loss(rewards: Tensor, b: Batch, advantages, reduction, price: float) -> Tensor:
    A = advantages(rewards).flatten()
    each = grpo.clipped_loss(b.new, b.old, A, b.mask)
    each = each + price * grpo.k3_term(b.new, b.old, b.ref, b.mask)  # (N K, 3)
    return masked_sum(reduction(b.mask, 3) * each, b.mask).sum()


def grpo_k3(b: Batch) -> Tensor:
    return grpo_loss(b.rewards, b, grpo.group_advantages, grpo.per_sequence, beta)


def grpo_undivided(b: Batch, price: float) -> Tensor:
    return grpo_loss(b.rewards, b, grpo.centred_advantages, grpo.by_constant, price)


def grpo_k3_undivided(b: Batch) -> Tensor:
    return grpo_undivided(b, 2 / 3 * beta)


def grpo_whole_k3(b: Batch, ratio: bool) -> Tensor:
    """The price is on the estimate of the whole answer, and not of its tokens."""
    new = b.new.sum(1, keepdim=True)  # (N K, 1)
    old = b.old.sum(1, keepdim=True)
    ref = b.ref.sum(1, keepdim=True)
    whole = b.mask[:, :1]
    k = kl_ratio_k3(new, old, ref, whole) if ratio else kl_k3(new, ref, whole)
    price = 2 / 3 * beta * k.mean() / 3  # by_constant divides by 3 tokens
    return grpo_undivided(b, 0.0) + price


def grpo_k1(b: Batch) -> Tensor:
    return grpo_loss(b.paid, b, grpo.group_advantages, grpo.per_sequence, 0.0)


def dpo_loss(b: Batch, against: str = "ref") -> Tensor:
    new = b.new.sum(1).view_as(b.rewards)  # (N, 2)
    fixed = (b.ref if against == "ref" else b.old).sum(1).view_as(b.rewards)
    return dpo.dpo_loss(new[:, 0], new[:, 1], fixed[:, 0], fixed[:, 1], beta)


def rrhf_loss(b: Batch) -> Tensor:
    lengths = b.mask.sum(1).view_as(b.rewards)
    tokens = rrhf.best_answers(b.rewards) * lengths  # imitated
    mean_tokens = (b.chance @ tokens.sum(1).double()).item()
    counts = len(tokens), len(tokens) * mean_tokens
    return rrhf.rrhf_loss(b.new, b.rewards, b.mask, counts=counts)


# %%
def bradley_terry(won: Tensor, lost: Tensor) -> Tensor:
    return (won - lost).sigmoid()


GREEN = plotting.COLORS[2]
RED = plotting.COLORS[1]
ORANGE = plotting.COLORS[3]
PURPLE = plotting.COLORS[4]
quarter = steps // 4
again = partial(dpo_loss, against="old")
whole_k3 = partial(grpo_whole_k3, ratio=False)
whole_ratio_k3 = partial(grpo_whole_k3, ratio=True)
METHODS = {
    "imitate the best of 3": Method(3, steps, imitate, color=ORANGE),
    "imitate in 4 rounds": Method(3, quarter, imitate, color=ORANGE),
    "RRHF": Method(2, steps, rrhf_loss, color=ORANGE),
    "RRHF in 4 rounds": Method(2, quarter, rrhf_loss, color=ORANGE),
    "DPO, sure labels": Method(2, steps, dpo_loss, torch.gt, color=RED),
    "DPO, sure, in 4 rounds": Method(2, quarter, again, torch.gt, color=RED),
    "REINFORCE, β = 0": Method(1, 1, reinforce_free, color=RED),
    "GRPO, k3 per token": Method(3, 1, grpo_k3, color=PURPLE),
    "GRPO undivided, k3 per token": Method(3, 1, grpo_k3_undivided, color=PURPLE),
    "GRPO undivided, k3 whole": Method(3, 1, whole_k3, color=PURPLE),
    "GRPO undivided, ratio × k3 whole": Method(3, 1, whole_ratio_k3, color=GREEN),
    "REINFORCE": Method(1, 1, reinforce, color=GREEN),
    "ReMax": Method(1, 1, remax_loss, color=GREEN),
    "RLOO": Method(2, 1, rloo_loss, color=GREEN),
    "PPO": Method(1, 4, ppo_loss, color=GREEN),
    "GRPO, k1 paid": Method(3, 1, grpo_k1, color=GREEN),
    "DPO, Bradley-Terry labels": Method(2, steps, dpo_loss, bradley_terry, color=GREEN),
}


# %%
def trace(rewards: Tensor) -> np.ndarray:
    """(400, 2): KL to the reference and E[r] of π*, as β falls from 50 to 0.02."""
    points = []
    for price in np.geomspace(50, 0.02, 400):
        best = world.best_policy(reference, rewards, price)
        nats = world.kl(best, reference).item()
        points.append([nats, (world.chances(best) @ rewards).item()])
    return np.array(points)


graded = torch.maximum(world.RIGHT, 0.4 * world.ENDED)
WORLDS = {"right 1, others 0": world.RIGHT, "right 1, ended 0.4": graded}
shown = np.unique(np.geomspace(1, steps + 1, 30).astype(int)) - 1  # points of a path
ends: dict[str, dict[str, list[float]]] = {}
paths: dict[str, dict[str, list]] = {}
curves = {}
for name_of_world, rewards in WORLDS.items():
    curves[name_of_world] = trace(rewards)
    goal = world.chances(world.best_policy(reference, rewards, beta))
    ends[name_of_world] = {}
    paths[name_of_world] = {}
    print(f"\n{name_of_world:<34}{'E[r]':>8}{'KL':>8}{'wasted':>8}{'to π*':>10}")
    for name, method in METHODS.items():
        path = follow(rewards, method)
        line = []
        for i in shown:
            nats = world.kl(path[i], reference).item()
            line.append([nats, (world.chances(path[i]) @ rewards).item()])
        nats, gain = line[-1]
        nats_of_best, gains = curves[name_of_world].T
        wasted = max(nats - np.interp(gain, gains, nats_of_best), 0.0)
        apart = (world.chances(path[-1]) - goal).abs().sum().item() / 2
        ends[name_of_world][name] = [gain, nats, wasted, apart]
        paths[name_of_world][name] = line
        print(f"{name:<34}{gain:>8.4f}{nats:>8.4f}{wasted:>8.4f}{apart:>10.7f}")

# %% [markdown]
# ## The result

# %%
plain_world, graded_world = ends.values()
arrived = [
    name for name in METHODS if max(plain_world[name][3], graded_world[name][3]) < 1e-3
]
print(f"at π* in both worlds: {', '.join(arrived)}")

# %% tags=["plot"]
free = plain_world["REINFORCE, β = 0"][2]
figure, axes = plotting.new_figure(
    2,
    f"{len(arrived)} of {len(METHODS)} variants end at π*; without a price REINFORCE "
    f"wastes {free:.2f} nats",
    width=7,
    height=4.8,
)
for panel, name_of_world in zip(axes, WORLDS, strict=True):
    nats_of_best, gains = curves[name_of_world].T
    panel.plot(nats_of_best, gains, color="#bbb", lw=4, alpha=0.7)
    for name, method in METHODS.items():
        x, y = np.array(paths[name_of_world][name]).T
        panel.plot(x, y, color=method.color, lw=1, alpha=0.6)
        panel.plot(x[-1], y[-1], "o", color=method.color, ms=7)
    best = world.best_policy(reference, WORLDS[name_of_world], beta)
    nats = world.kl(best, reference).item()
    earned = (world.chances(best) @ WORLDS[name_of_world]).item()
    panel.plot(nats, earned, "*", color="#111", mfc="none", ms=19, zorder=5)
    here = f"π* at our price:\n{len(arrived)} end here in both worlds "
    plotting.label(panel, here, (nats, earned), (-8, 8), ha="right")
    panel.set(xlabel="KL to the reference, nats", ylabel="mean reward")
    panel.set_title(name_of_world)
earned, nats, _, _ = plain_world["REINFORCE, β = 0"]
plotting.label(axes[0], "REINFORCE,\nno price", (nats, earned), (0, -32), ha="center")
labels = (
    ("k1 paid in the reward; ratio × k3; DPO, Bradley-Terry labels", GREEN),
    ("GRPO with k3 in the loss", PURPLE),
    ("imitation, RRHF", ORANGE),
    ("REINFORCE without a price; DPO with sure labels", RED),
)
for text, color in labels:
    axes[0].plot([], [], "o", color=color, label=text)
axes[0].plot([], [], color="#bbb", lw=4, alpha=0.7, label="π* at every β")
axes[0].legend(loc="lower right", fontsize=8)
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** The paths of seventeen variants along their expected gradients, and
# where 800 steps lead, in two worlds. Grey: π* at every price β. Left of the grey curve
# nobody can be.

# %%
course.predict("Variants that end at π*:", my_guess, len(arrived), key="arrived")

# %% [markdown]
# ## Break it: the right value, without the right gradient
#
# Two of GRPO's variants differ in nothing but a factor of 1. Both pay for k3 of the
# whole answer in their loss, whose mean is the KL. One multiplies it by the ratio
# π/π_old, which is 1 on a fresh answer. Where do they end?

# %%
print(f"{'':<36}{'E[r]':>8}{'KL':>8}{'to π*':>12}")
for name_of_world, found in ends.items():
    print(name_of_world)
    for name in ("GRPO undivided, k3 whole", "GRPO undivided, ratio × k3 whole"):
        gain, nats, _, apart = found[name]
        print(f"  {name:<34}{gain:>8.4f}{nats:>8.4f}{apart:>12.7f}")

# %% [markdown]
# With the ratio, it is π*. Without it, it is another policy: a factor whose value is 1
# has a slope, and the slope is what training follows.

# %% tags=["record"]
run = {
    "config": {"steps": steps, "beta": beta},
    "accuracy": p,
    "arrived": len(arrived),
    "wasted": {name: end[2] for name, end in plain_world.items()},
    "wasted, graded": {name: end[2] for name, end in graded_world.items()},
    "apart": {name: end[3] for name, end in plain_world.items()},
    "ends": ends,
    "paths": paths,
}

# %% [markdown]
# ## What we found
#
# No answer was drawn, so no number has an interval. What lies at π* lies there to less
# than a millionth; where the others stand is where 800 steps of Adam left them, in one
# world (seed 0).
#
# * Seven of the seventeen end at π* under both rewards. They are REINFORCE, ReMax,
#   RLOO, PPO (with V = 0 and λ = 1) and GRPO where the price of KL is paid in the
#   reward as k1, GRPO without divisions and with ratio × k3 of the whole answer in the
#   loss, and DPO with Bradley-Terry labels. They are seven ways to the same policy, and
#   in the worlds of two other seeds it is seven again.
# * Why do GRPO's divisions do no harm when k1 is paid? At π* the paid reward r − β k1
#   is the same for *all* answers. So every advantage is 0 there, whatever it is divided
#   by. Where the policy cannot be π*, the divisions move the destination (exercise 2).
# * REINFORCE without a price becomes right nearly always, and wastes 0.37 nats on its
#   way: it leaves the grey curve early. How much depends on the world. With two other
#   seeds it wasted 0.27 and 1.53. DPO with sure labels goes 0.05 nats too far under the
#   first reward and 0.38 under the second. Imitation and RRHF keep to the curve where
#   rewards are 0 and 1. Where they are graded, those of one round end below the curve,
#   and those of four rounds close to it.
# * GRPO with k3 in the loss ends elsewhere. With the divisions it could hardly be
#   otherwise, for the price then weighs KL against rewards in units of their deviation.
#   But it ends elsewhere without them too: with k3 of the whole answer 0.11 of all
#   chance lies elsewhere than at π* (under the first reward), and with ratio × k3 of
#   the whole answer nothing does. The value of k3 is the KL, and its gradient that of
#   the *other* KL, KL(ref ‖ π): lesson 17 has the proof.

# %% tags=["record"]
course.check(
    "80_exact_world",
    {
        "arrived, seed 0": 7,
        "arrived, seed 1": 7,
        "arrived, seed 2": 7,
        "wasted > REINFORCE, β = 0, seed 0": "0.37",
        "wasted > DPO, sure labels, seed 0": "0.05",
        "wasted, graded > DPO, sure labels, seed 0": "0.38",
        "apart > GRPO undivided, k3 whole, seed 0": "0.11",
        "wasted > REINFORCE, β = 0, seed 1": "0.27",
        "wasted > REINFORCE, β = 0, seed 2": "1.53",
    },
    own=run,
)
right_at_best = (world.chances(star) @ world.RIGHT).item()
before = Estimate(p, p, p)
after = Estimate(right_at_best, right_at_best, right_at_best)
course.finish(settings, run, before, after, "exact chance to be right: no noise")

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Does it matter in practice that k3 descends the other KL?** Near the reference,
# where a high price keeps the policy, the two KLs have nearly the same gradient. Far
# from it they differ: one punishes answers that the reference would not give, the other
# punishes giving up those that it would.
#
# **Why does DPO need noisy labels to find π\*?** Because its model says that labels are
# noisy. If the better answer always wins, no finite h (lesson 30) explains it: the loss
# goes on falling as h grows, and the policy goes on moving.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** GRPO has groups of three, no divisions, and a price of 0.3 in
# its loss. At which β does REINFORCE weigh reward against KL alike?
#
# **Exercise 2 (change).** Let the policy's table of logits have one row for all
# beginnings. Who arrives at the best policy of *that* family?

# %% [markdown] tags=["answers"]
# **Answer 1.** At β = 0.45 for a price of 0.3 in the loss: subtracting the mean of
# three leaves 2/3 of r, and 0.3/(2/3) = 0.45.
#
# **Answer 2.** Those whose mean gradient is that of E[r] − β KL arrive at a point where
# it is 0. GRPO with its divisions no longer does: the paid rewards differ at the best
# policy of that family.
