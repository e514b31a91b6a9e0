# %% [markdown]
# # Lesson 17: Which KL, and where?
#
# **Question.** Which estimate of the KL belongs where?
#
# **Afterwards you can** say of any estimate what its gradient is, in the loss and in
# the reward, and prove it by adding up fifteen numbers.
#
# **Read before:** [lesson 04](04_frontier.py): what a nat buys. [Lesson
# 11](11_reinforce.py): the gradient of a reward. [Lesson 14](14_trpo.py): ratios.
#
# **Papers:** for the values, Schulman 2020, "Approximating KL divergence". For the
# gradients, Tang and Munos 2025, [arXiv 2506.09477](https://arxiv.org/abs/2506.09477).
#
# **Look at:** on which side of 0 the left panel of Figure 1 lies.
#
# **Turn first:** the estimate in `directions`: put k2 in the place of k3.
#
# **Time:** a few seconds on one CPU core, at every preset.

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
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minialign import course, plotting
from minialign import exact_world as world
from minialign.intervals import Estimate
from minialign.logprobs import kl_k1, kl_k2, kl_k3, kl_ratio_k3

# %% tags=["setup"]
settings = course.setup("17_kl")

# %% [markdown]
# ## The idea
#
# A policy that is trained on rewards moves away from where it started, and what no
# reward asks about is lost on the way. A *price* on the KL holds it back: it maximises
# E[r] − β KL(π ‖ ref). But nobody computes that KL. It is *estimated*, from the tokens
# of the answers that were drawn. With d = log π − log ref for a token, or for a whole
# answer, three estimates are in use:
#
#     k1 = d        k2 = d²/2        k3 = e^(−d) − 1 + d
#
# k1 is d itself, and its mean is the KL by definition. k3 adds e^(−d) − 1, whose mean
# is 0, so that its mean is the KL too; but k3 is never negative, and it scatters less.
# So one would think that k3 is the better one, wherever it is put.
#
# And there are two places to put it. *In the reward* an estimate is paid, as a
# constant: the answer earns r − β k, and the policy gradient does the rest. *In the
# loss* it stands beside the rest of the loss, and its own gradient is taken.
#
# The two differ, because the mean of an estimate depends on the policy in two ways:
# through the estimate itself, and through how often each answer is drawn.
#
#     ∇ E[k]  =  E[ ∇k ]  +  E[ k ∇ log π ]
#                in the     in the
#                loss       reward
#
# Each place holds one half, and the other half is missing. Whether that matters depends
# on the estimate. For k1 in the reward the missing half is 0.

# %% [markdown] tags=["folded"]
# **Where does it come from?** E[k] = Σ_y π(y) k(y). The product rule gives Σ π ∇k + Σ k
# ∇π, and ∇π = π ∇ log π.
#
# **What are the halves of k1?** ∇k1 = ∇ log π, whose mean is 0, as that of any
# baseline. So all of ∇KL stands in the reward's half, and nothing in the loss's.
#
# **And of k2?** Of a whole answer, ∇k2 = d ∇ log π = k1 ∇ log π. So the loss's half of
# k2 is the reward's half of k1, which is ∇KL(π ‖ ref).
#
# **And of k3?** Of a whole answer, ∇k3 = (1 − e^(−d)) ∇ log π. Its mean is −E[(ref/π) ∇
# log π] = −Σ ref ∇ log π = ∇KL(ref ‖ π). So the loss's half is the gradient of the
# *other* KL; and the reward's half is what is left, ∇KL(π ‖ ref) − ∇KL(ref ‖ π).
#
# **And of ratio × k3?** With ρ = π/π_old, ∇(ρ k3) = ρ (k3 ∇ log π + ∇k3). It has both
# halves in itself, and on answers of an older policy the ratio makes up for who drew.

# %% [markdown]
# ## By hand
#
# One choice among three tokens. The policy has the logits 0.5, −0.2 and 0.1, the
# reference 0, 0.3 and −0.4. Everything is by the logits, so a gradient has three
# numbers, and means are sums over three tokens.

# %%
policy3 = torch.tensor([0.5, -0.2, 0.1]).double()
ref3 = torch.tensor([0.0, 0.3, -0.4]).double().log_softmax(0)
KINDS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def one_choice(kind: Callable, logits: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
    """Of every token: the estimate; and its mean gradient, by place: (V,) each."""
    logits = logits.detach().requires_grad_()
    live = torch.ones(len(ref), 1, dtype=torch.bool)
    nats = logits.log_softmax(0)
    k = kind(nats[:, None], ref[:, None], live)[:, 0]  # (V,)
    p = nats.exp().detach()
    (in_loss,) = torch.autograd.grad(p @ k, logits, retain_graph=True)
    (in_reward,) = torch.autograd.grad((p * k.detach()) @ nats, logits)
    return k.detach(), in_loss, in_reward


p = policy3.softmax(0)
print(f"{'':<4}{'of the three tokens':>26}{'mean':>9}", end="")
print(f"{'gradient in the loss':>30}{'in the reward':>26}")
for name, kind in KINDS.items():
    k, in_loss, in_reward = one_choice(kind, policy3, ref3)
    print(f"{name:<4}" + "".join(f"{x:>9.3f}" for x in k) + f"{p @ k:>9.4f}   ", end="")
    for slope in (in_loss, in_reward):
        print("  " + "".join(f"{x:>8.4f}" for x in slope), end="")
    print()
k1_slope = one_choice(kl_k1, policy3, ref3)[2]
k3_slope = one_choice(kl_k3, policy3, ref3)[2]
assert torch.allclose(k1_slope, one_choice(kl_k2, policy3, ref3)[1])
assert k1_slope @ k3_slope < 0

# %% [markdown]
# The gradient of KL(π ‖ ref) is that of k1 in the reward; k2 in the loss has it too. k1
# in the loss has none. And k3 in the reward, with the right mean and a quarter of the
# deviation, points the *other way*: paid like this, it would drive the policy away from
# the reference. Is that an accident of these numbers?
#
# ## The table
#
# An answer has more than one token, and so every estimate comes in two forms: summed
# over the *tokens*, or with the d of the *whole* answer. In a world of 15 answers
# (three tokens at most, a policy and a reference drawn by lot) all means are sums. The
# table has the mean of each estimate, its deviation from answer to answer, and its mean
# gradient beside the gradients of both KLs: by the cosine of the angle between them,
# and by its length, that of the true one being 1. A cosine of 1 and a length of 1 mean
# exactly this gradient.


# %%
draws = torch.Generator().manual_seed(settings.seed)
reference15 = world.random_policy(draws)  # (7, 3) logits
changes = torch.randn(2, 7, 3, generator=draws, dtype=torch.float64)
policy15, older15 = reference15 + 0.6 * changes
REF = world.token_logprobs(reference15)  # (15, 3)


def estimate(name: str, new: Tensor, old: Tensor) -> Tensor:
    """Of every answer: such as "k3, whole", from log-probabilities (15, 3): (15,)."""
    kind, _, form = name.partition(", ")
    ref = REF
    mask = world.MASK
    if form == "whole":  # the answer as one choice
        new = new.sum(1, keepdim=True)  # (15, 1)
        old = old.sum(1, keepdim=True)
        ref = ref.sum(1, keepdim=True)
        mask = mask[:, :1]
    if kind == "ratio × k3":
        return kl_ratio_k3(new, old, ref, mask).sum(1)
    return KINDS[kind](new, ref, mask).sum(1)


def mean_gradient(name: str, place: str, sampler: Tensor) -> Tensor:
    """(7, 3), over answers that the sampler draws."""
    old = world.token_logprobs(sampler)

    def loss(new: Tensor) -> Tensor:
        k = estimate(name, new, old)
        if place == "reward":
            k = k.detach() * new.sum(1)
        return k.mean()

    return world.expected_gradient(loss, policy15, world.chances(sampler))


TRUE = {
    "KL(π ‖ ref)": world.gradient(lambda x: world.kl(x, reference15), policy15),
    "KL(ref ‖ π)": world.gradient(lambda x: world.kl(reference15, x), policy15),
}


def row_of(name: str, place: str, sampler: Tensor) -> list[float]:
    """Mean and deviation; cosine and length beside both true gradients."""
    chance = world.chances(sampler)
    old = world.token_logprobs(sampler)
    k = estimate(name, world.token_logprobs(policy15), old)
    mean = chance @ k
    deviation = (chance @ (k - mean) ** 2).sqrt()
    found = mean_gradient(name, place, sampler)
    row = [mean.item(), deviation.item()]
    for true in TRUE.values():
        length = (found.norm() / true.norm()).item()
        cosine = torch.cosine_similarity(found.flatten(), true.flatten(), dim=0).item()
        row += [cosine if length > 1e-9 else 0.0, length]
    return row


ROWS = [
    ("loss", "k1, tokens"),
    ("loss", "k2, whole"),
    ("loss", "k2, tokens"),
    ("loss", "k3, whole"),
    ("loss", "k3, tokens"),
    ("loss", "ratio × k3, whole"),
    ("loss", "ratio × k3, tokens"),
    ("reward", "k1, tokens"),
    ("reward", "k2, whole"),
    ("reward", "k2, tokens"),
    ("reward", "k3, whole"),
    ("reward", "k3, tokens"),
]
nats15 = world.kl(policy15, reference15).item()
table = {}
print(f"KL(π ‖ ref) = {nats15:.4f}{'':>30}∇KL(π ‖ ref)     ∇KL(ref ‖ π)")
print(f"{'':<34}{'mean':>8}{'dev.':>8}" + f"{'cosine':>8}{'length':>8}" * 2)
for place, name in ROWS:
    row = row_of(name, place, policy15)
    table[f"{name}, {place}"] = row
    print(f"in the {place:<7}{name:<20}" + "".join(f"{x:>8.3f}" for x in row))

# %%
mean = 0  # places in a row
cosine = 2
length = 3
right = [name for name, row in table.items() if np.allclose(row[2:4], 1, atol=1e-6)]
print("the gradient of KL(π ‖ ref):", "; ".join(right))
assert right == ["k2, whole, loss", "ratio × k3, whole, loss", "k1, tokens, reward"]
assert table["k1, tokens, loss"][length] < 1e-6  # none at all
assert np.allclose(table["k3, whole, loss"][4:], 1, atol=1e-6)  # of the other KL
difference = TRUE["KL(π ‖ ref)"] - TRUE["KL(ref ‖ π)"]
assert torch.allclose(mean_gradient("k3, whole", "reward", policy15), difference)
stale = {}
for _, name in ROWS[:7]:
    stale[name] = row_of(name, "loss", older15)
kept = [
    name
    for name, row in stale.items()
    if abs(row[mean] - nats15) < 1e-6 and np.allclose(row[2:4], 1, atol=1e-6)
]
print("value and gradient, on answers of an older policy:", "; ".join(kept))
assert kept == ["ratio × k3, whole"]

# %% [markdown]
# Three of twelve have the gradient that is meant, and the right mean does not tell
# them: k2 has another mean, and k3 has the right one. Summed over tokens, no estimate
# in the loss has it, for a token's own gradient is not told what the token does to the
# KL of later ones. (For an estimate that is *paid*, the reward tells it.)
#
# ## Predict
#
# *Should RLOO's reward have k3 in the place of k1, since its mean is the same and its
# variance is smaller?* That was proposed for a widely used library, and argued about.
# The question can be closed without a model. Draw 2,000 pairs of a policy and a
# reference, for one choice among three tokens, the policy's logits 0.5 from the
# reference's. In what share of them does k3 in the reward point *away*, so that paying
# for it makes KL(π ‖ ref) grow?

# %%
my_guess = 0.1  # edit me: a share from 0 to 1

# %% [markdown]
# ## The result: an open question, closed


# %%
def directions(words: int, shift: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """k3 in the reward beside ∇KL(π ‖ ref): cosines and lengths, (count,) each."""
    generator = torch.Generator().manual_seed(1000 * words + settings.seed)
    shape = (count, words)
    ref = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = ref + shift * torch.randn(shape, generator=generator, dtype=torch.float64)
    d = logits.log_softmax(1) - ref.log_softmax(1)  # (count, words)
    p = logits.softmax(1)

    def paid(k: Tensor) -> Tensor:
        """E[k ∇ log π] by the logits."""
        return p * (k - (p * k).sum(1, keepdim=True))

    k1 = paid(d)
    k3 = paid(torch.expm1(-d) + d)
    cosines = torch.cosine_similarity(k1, k3, dim=1)
    return cosines.numpy(), (k3.norm(dim=1) / k1.norm(dim=1)).numpy()


SIZES = (3, 5, 20)
SHIFTS = (0.1, 0.5, 1.0, 2.0)
debate = {}
print("tokens   shift   mean cosine   share that points away   median length")
for words in SIZES:
    for shift in SHIFTS:
        cosines, lengths = directions(words, shift, settings.pick(50, 2000, 2000))
        found = cosines.mean(), (cosines < 0).mean(), np.median(lengths)
        names = ("cosine", "away", "length")
        numbers = map(float, found)
        debate[f"{words} tokens, {shift:g}"] = dict(zip(names, numbers, strict=True))
        row = f"{found[0]:>14.2f}{found[1]:>25.2f}{found[2]:>16.2f}"
        print(f"{words:>6}{shift:>8.1f}{row}")

# %% tags=["plot"]
figure, (angle, size) = plotting.new_figure(
    2,
    "Near the reference, k3 in the reward points nowhere in particular, and is far too "
    "short",
    width=5.4,
    height=3.6,
)
for words, color in zip(SIZES, plotting.COLORS, strict=False):
    rows = [debate[f"{words} tokens, {shift:g}"] for shift in SHIFTS]
    cosines = [row["cosine"] for row in rows]
    lengths = [row["length"] for row in rows]
    angle.plot(SHIFTS, cosines, "o-", color=color, label=f"{words} tokens")
    size.plot(SHIFTS, lengths, "o-", color=color, label=f"{words} tokens")
angle.axhline(1, color="#444", lw=1.2, ls="--")
plotting.label(angle, "k1: always 1", (0.1, 1), (0, -12))
angle.set(ylabel="mean cosine with ∇KL(π ‖ ref)", ylim=(-1, 1.05))
size.axhline(1, color="#444", lw=1.2, ls="--")
plotting.label(size, "k1: always 1", (0.1, 1), (0, -12))
size.set(ylabel="median length, that of ∇KL being 1", ylim=(0, 1.05))
for panel in (angle, size):
    panel.set(xlabel="deviation of the logits from the reference")
    panel.legend(loc=(0.7, 0.6) if panel is angle else "lower right")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** k3 paid in the reward: how its mean gradient lies to that of KL(π ‖
# ref), for 2,000 random pairs of policy and reference at each dot. Left: the cosine.
# Right: the length. For k1 both are 1, always.

# %%
course.predict(
    "Share of the pairs in which k3 in the reward points away:",
    my_guess,
    debate["3 tokens, 0.5"]["away"],
    key="debate > 3 tokens, 0.5 > away",
)

# %% [markdown]
# ## Break it: answers of an older policy
#
# All that was on fresh answers. What is left of the table, for the loss, if the answers
# come from an older policy?

# %%
print(f"KL(π ‖ ref) = {nats15:.4f}{'':>3}mean  cosine  length  (with ∇KL(π ‖ ref))")
for name, row in stale.items():
    print(f"{name:<20}{row[mean]:>8.3f}{row[cosine]:>8.3f}{row[length]:>8.3f}")

# %% tags=["record"]
run = {
    "config": {"pairs": settings.pick(50, 2000, 2000)},
    "table": table,
    "stale": stale,
    "debate": debate,
}

# %% [markdown]
# ## What we found
#
# Nothing here was drawn by a model, and all of the table is exact.
#
# * Three of twelve estimates have the gradient of KL(π ‖ ref): k1 in the reward, and in
#   the loss k2 and ratio × k3, both of the whole answer. Only ratio × k3 keeps value
#   and gradient on the answers of an older policy. There k1 in the loss has a gradient
#   as well, and to descend it raises the KL: its cosine is −0.64.
# * k1 in the loss has no mean gradient at all. k3 in the loss has the gradient of the
#   other KL, and summed over tokens that of neither.
# * k3 in the reward has the right mean, and the difference of two gradients, ∇KL(π ‖
#   ref) − ∇KL(ref ‖ π). In the world of 15 answers its cosine with the right one is
#   −0.32. Among random pairs with three tokens it points away in 0.58 of them at a
#   distance of 0.5, and its length is 0.14 of the right one. With 20 tokens it points
#   away in 0.40, and its length is 0.25. So near the reference it points hardly
#   anywhere. That its variance is smaller is true of the value, and no help.
#
# What all this does to a language model we have not measured here.

# %% tags=["record"]
course.check(
    "17_kl",
    {
        "debate > 3 tokens, 0.5 > away, seed 0": "0.58",
        "debate > 3 tokens, 0.5 > length, seed 0": "0.14",
        "debate > 20 tokens, 0.5 > away, seed 0": "0.40",
        "debate > 20 tokens, 0.5 > length, seed 0": "0.25",
    },
    own=run,
)
best = table["k1, tokens, reward"][cosine]
worst = table["k3, whole, reward"][cosine]
course.finish(
    settings,
    run,
    Estimate(best, best, best),
    Estimate(worst, worst, worst),
    "cosine with ∇KL of k1 and of k3, in the reward: exact",
)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **So which KL do I put where?** To hold a policy near a reference, subtract β k1 from
# the reward: its value is right, its gradient is right, and it may be summed over
# tokens. If the price has to stand in the loss, take ratio × k3 of the whole answer (or
# k2, on fresh answers alone). To *report* how far the policy is, take the mean of k1 or
# of k3: both are unbiased, and k3 scatters less.
#
# **Why is my KL negative?** Because k1 of an answer may be negative: it says that the
# reference thought more of this answer than the policy does. Its mean is not negative,
# unless the answers were drawn in another way than they are scored, such as at another
# temperature.
#
# **Why is k1 in the loss not just useless?** On fresh answers it is: its mean gradient
# is 0, and what is left is noise. On answers that a step has already been taken on, its
# mean gradient is no longer 0. It makes those answers less likely, whatever they are.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Show that k1 in the reward and k2 of the whole answer in the
# loss have the same mean gradient, answer by answer and not only on average.
#
# **Exercise 2 (derive).** What does k3 in the reward come to if policy and reference
# are close? Compare ∇KL(π ‖ ref) with ∇KL(ref ‖ π) to first order in d.
#
# **Exercise 3 (change).** A price need not be fixed. The first work on preferences for
# language models (Ziegler et al. 2019, [arXiv
# 1909.08593](https://arxiv.org/abs/1909.08593)) names a *target* for the KL instead,
# and after every update multiplies β by 1 + clip(KL/target − 1, ±0.2) · n/horizon, for
# n answers an update. `ppo.train` takes such a rule as `next_beta`, and
# `ppo.adapt_beta` is one. Run lesson 15 with β = 0.05, a target of 0.5 nats and a
# horizon of 1,024 answers. Are 64 updates enough to hold the KL?

# %% [markdown] tags=["answers"]
# **Answer 1.** The loss's gradient of d²/2 is d ∇ log π, the reward's of d is d ∇ log
# π.
#
# **Answer 2.** With d small, ∇KL(π ‖ ref) = E[d ∇ log π], and ∇KL(ref ‖ π) = −E[(e^(−d)
# − 1) ∇ log π] = E[d ∇ log π] − E[d² ∇ log π]/2 + …: they differ in second order, and
# nothing of first order is left.
#
# **Answer 3.** The price falls while the KL is below 0.5, and then rises, by 5 % an
# update at most: over 64 updates by a factor of 23, if it rose all the time. Compare
# the series `kl` and `beta` of your run.
