# %% [markdown]
# # Lesson 14: Graded on a curve (GRPO)
#
# **Question.** GRPO divides each group's rewards by their spread, and each answer's
# tokens by its length. What do the two divisions change, and who asked for them?
#
# Read before: lesson 13 (RLOO, groups and dead groups).
#
# GRPO draws K answers to each problem and credits each with its reward minus the
# group's mean, *divided by the group's standard deviation* (std). Each answer's tokens
# are then averaged, not summed. The same answers may serve several steps: a *ratio*
# ρ = π / π_old weighs each token by how much likelier it has become since the draw, and
# a *clip* lets go of a token whose ratio has left 0.8 to 1.2.
#
# You will see: which problems std favours, which answers the length does, what two
# forms of a KL penalty in the loss do to the policy, and what the clip is for.
#
# Time: `quick` about 80 s on two CPU cores; `full` some six minutes a seed there (the
# trials are in seed 0: half an hour more). Memory: about 2 GB.

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
import copy
import time
from dataclasses import asdict, replace
from math import comb

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import grpo
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import verifier

# %%
settings = course.setup("14_grpo")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = grpo.GRPOConfig(
    updates=settings.pick(2, 13, 64),
    prompts=settings.pick(2, 32, 32),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## By hand
#
# Four answers to one question, rewards 1, 1, 0, 0: mean 1/2, std √(1/3) (the divisor is
# K − 1), so the advantages are ±0.5 / 0.577 = ±0.866. In the mean over an answer's
# tokens, each token gets that divided by the answer's length. *Dr. GRPO* ("done right")
# drops both divisions: ±0.5 at every token.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    scored = reference, tokens.to(settings.device), mask.to(settings.device)
    old = token_logprobs(*scored).cpu()  # (4, S)
rows, lengths = {}, mask.sum(1)
for name, advantage, reduction, by_hand in (
    ("GRPO (x B)", grpo.group_advantages, grpo.per_sequence, 0.866 / lengths),
    ("Dr. GRPO (x B max tokens)", grpo.centred_advantages, grpo.by_constant, 0.5),
):
    logprobs = old.clone().requires_grad_()
    A = advantage(rewards[None])[0]  # (4,): one group of K = 4
    weights = reduction(mask, 128)  # (4, S)
    loss = (weights * grpo.clipped_loss(logprobs, old, A, mask)).sum()
    loss.backward()
    scale = 4 * 128 if reduction is grpo.by_constant else 4
    each = (-scale * logprobs.grad).sum(1) / lengths  # (4,): alike at all its tokens
    assert torch.allclose(each, (2 * rewards - 1) * by_hand, atol=1e-3)
    rows[name] = each
    print(f"{name:<28} loss {loss.item():+.4f}")
hand = course.hand_table(settings.lesson, rows)

# %% [markdown]
# A token of the long right answer is now worth a fraction of one of the short right
# answer: the average over tokens is kind to short right answers, and to long wrong
# ones. GRPO's loss is 0 here because the ratios are 1 and the advantages sum to 0.
# It will be 0 in every first step: *the loss of GRPO is no measure of progress*.
#
# ## What std does to a problem
#
# Take a problem that the policy solves with chance p. Sum over all outcomes of K draws:
# how large is |A| on average? That is the weight of the problem in the batch.


# %%
def weight_at(advantage, p: np.ndarray, K: int = 8) -> np.ndarray:
    """E |A| of an answer to a problem of chance p, exactly: (N,) -> (N,)."""
    groups = (torch.arange(K) < torch.arange(K + 1)[:, None]).double()  # (K + 1, K)
    sizes = advantage(groups).abs().mean(1).numpy()  # (K + 1,), by the number right
    chances = [comb(K, c) * p**c * (1 - p) ** (K - c) for c in range(K + 1)]
    return np.stack(chances, 1) @ sizes


FORMS = {"std": grpo.group_advantages, "no std": grpo.centred_advantages}
points = np.array([0.02, 0.05, 0.1, 0.2, 0.5])
success = course.base_success()  # (500,) of the test problems, lesson 02
assert np.allclose(weight_at(FORMS["no std"], success), 7 / 4 * success * (1 - success))
ends, relative = (success < 0.2) | (success > 0.8), {}
print(f"weight relative to p = 0.5; {ends.mean():.0%} of problems outside 0.2 to 0.8")
print(f"{'chance p':<20}" + "".join(f"{p:>8}" for p in points) + f"{'outside':>10}")
for name, K in (("no std", 8), ("std", 8), ("std", 64)):
    weight, own = (weight_at(FORMS[name], p, K) for p in (points, success))
    relative[f"{name}, K = {K}"] = (weight / weight[-1]).tolist()
    cells = "".join(f"{w:>8.2f}" for w in weight / weight[-1])
    print(f"{f'{name}, K = {K}':<20}{cells}{own[ends].sum() / own.sum():>10.0%}")

# %% [markdown]
# Without std the weight is 2 p (1 − p) (K − 1)/K, exactly: what the gradient of mean
# accuracy asks for. With std and very many answers it goes as √(p (1 − p)), and the
# ends of the scale count for more. ∇p / √(p (1 − p)) is the slope of 2 arcsin √p: who
# divides by std asks for the mean of *that*, not for accuracy. But with K = 8 much of
# the difference is gone. A problem of p = 0.05 mostly comes as a *dead* group, 8 wrong
# answers: 0 by any std is 0.
#
# ## Predict

# %%
dead_at_base = float((success**8 + (1 - success) ** 8).mean())
print(f"{dead_at_base:.0%} of the groups are dead at the base; how many at the end?")
my_guess = 0.24  # edit me: a share

# %% [markdown]
# ## One run


# %%
def run_grpo(config: grpo.GRPOConfig, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    series, start = {}, time.perf_counter()
    training = grpo.train(
        policy, tokenizer, problems, verifier, config, reference=reference,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.updates, disable=None):
        clock = {"accuracy": metrics["reward"], "seconds": time.perf_counter() - start}
        course.keep_series(series, metrics | clock)
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## Train
#
# Four passes over each draw (the paper takes one; the trials below show what more of
# them buy, and cost). In the first, all ratios are 1 and nothing is clipped.

# %%
policy, series = run_grpo(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)
assert max(series["ratio_first"]) == 0.0  # not "about": the very same forward pass
largest = max(map(abs, series["loss"]))
print(f"largest ratio - 1: {max(series['ratio_first'])}; largest |loss|: {largest:.0e}")

# %% [markdown]
# ## After

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["accuracy"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)
run |= {"relative_weight": relative, "dead_at_base": dead_at_base}
dead = float(np.mean(series["dead"][-5:]))
course.predict("Share of dead groups in the last five batches:", my_guess, dead)

# %%
said = run["tokens_of"] = {}
for when, taken in (("before", before), ("after", after)):
    right = taken.sampled.correct
    for verdict, chosen in (("right", right), ("wrong", ~right)):
        total = taken.sampled.lengths[chosen].sum()
        said[f"{verdict} {when}"] = float(total / max(chosen.sum(), 1))
print("tokens of answers:", {key: round(value, 1) for key, value in said.items()})

# %% [markdown]
# ## Trials, and breaking it
#
# Runs of 4,096 answers, as in lesson 11. *Dr. GRPO* drops both divisions, *no std* and
# *no length* one each. Then a price on KL, put into the loss token by token, in two of
# four forms (k1 and k3), at the same beta. With d = log π − log π_ref of a token:
#
# - k1 = d. As a *loss*, summed over tokens of fresh answers, its mean gradient is 0.
#   But we divide by the length, which pays for longer answers, and later passes are
#   stale (lesson 03). See what becomes of it.
# - k2 = d²/2: the gradient of each choice's own KL(π ‖ ref).
# - k3 = e^(−d) − 1 + d, the paper's: the gradient of each choice's own KL(ref ‖ π).
# - ρ k3. At ρ = 1 its gradient is that of k2, sample by sample: only in later passes
#   over a draw do the two part.
#
# *Epochs* are passes over the same answers. The broken one drops the clip.

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
tuning = {  # name: (config, other arguments)
    "2 epochs, lr 2e-4": (replace(short, epochs=2, lr=2e-4), {}),
    "2 epochs, lr 4e-4": (replace(short, epochs=2, lr=4e-4), {}),
    "2 epochs, lr 8e-4": (replace(short, epochs=2), {}),
    "2 epochs, lr 1.6e-3": (replace(short, epochs=2, lr=1.6e-3), {}),
    "1 epoch": (replace(short, epochs=1), {}),
    "4 epochs": (short, {}),
}
centred = {"advantage": grpo.centred_advantages}
constant = {"reduction": grpo.by_constant}
held = replace(short, beta=1.0)
by_form = {
    "beta 1, k1": (held, {"kl_term": grpo.k1_term}),
    "beta 1, k3": (held, {"kl_term": grpo.k3_term}),
}
no_clip = replace(short, eps_low=1.0, eps_high=1e9)
trials = tuning | by_form
trials |= {
    "no std": (short, centred),
    "no length": (short, constant),
    "Dr. GRPO": (short, centred | constant),
    "broken: no clip": (no_clip, {}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_grpo, tuning)
exam.print_trials(tried)
plain = "4 epochs"  # the settings of the headline run
print(f"\n{'last five batches':<28}{'tokens, A > 0':>14}{'A < 0':>8}{'clipped':>9}")
for name, trial in tried.items():
    last = {key: np.mean(values[-5:]) for key, values in trial["series"].items()}
    print(f"{name:<28}{last['length_up']:>14.1f}{last['length_down']:>8.1f}"
          f"{last['clip_fraction']:>9.1%}")  # fmt: skip

# %% [markdown]
# ## The figures

# %%
(was, *_), (now, *_) = run["sampled"]
few = [relative[name][1] for name in ("no std, K = 8", "std, K = 8")]
figure, axes = plotting.new_figure(
    3,
    f"Graded on a curve: {was:.2f} to {now:.2f} right (seed {settings.seed}). p = 0.05 "
    f"weighs {few[1]:.0%} of p = 0.5, without std {few[0]:.0%}",
)
rise, price, curves = axes
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "GRPO")
plotting.draw_price(price, runs or [run], success, base)
grid = np.linspace(0, 1, 101)
for (name, advantage), color in zip(FORMS.items(), plotting.COLORS, strict=False):
    weight = weight_at(advantage, grid)
    curves.plot(grid, weight / weight.max(), color=color, lw=2, label=f"{name}, K = 8")
curves.plot(grid, 2 * np.sqrt(grid * (1 - grid)), "k:", label="std, K without end")
share = np.full(len(success), 1 / len(success))
curves.hist(success, bins=20, weights=share, color="#bbb", label="problems of the base")
curves.set(xlabel="chance p that an answer is right", ylabel="weight, largest = 1")
curves.legend(loc="center")
curves.set_title("which problems count")
plotting.save_figure(figure, settings.figure_path)

# %%
figure, axes = plotting.new_figure(3, "What each part of GRPO does", rows=2, width=5)
accuracy, forms, words, passes, clips, groups = axes
plotting.draw_trials(accuracy, tried, default=plain)
again = ["1 epoch", "2 epochs, lr 8e-4", plain, "broken: no clip"]
for axis, key, title, names in (
    (forms, "kl", "KL to the base, by form of the price", [plain, *by_form]),
    (words, "length", "tokens per answer", [plain, "no std", "no length", "Dr. GRPO"]),
    (passes, "accuracy", "sampled accuracy, by passes over a draw", again),
    (clips, "clip_fraction", "share of tokens clipped", again),
):
    there = [name for name in names if name in tried]
    for color, name in zip(plotting.COLORS, there, strict=False):
        label = f"default ({name})" if name == plain else name
        plotting.draw_runs(axis, [tried[name]], "completions", key, label, color)
    axis.set_title(title)
forms.set_yscale("symlog", linthresh=1)
plotting.draw_runs(groups, runs or [run], "completions", "dead", "GRPO", "#1d3557")
groups.set(ylim=(0, 1))
groups.set_title("share of dead groups")
for axis in axes[1:]:
    axis.set(xlabel="answers generated")
    if axis.lines:
        axis.legend()
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we saw

# %%
print(f"""
- Sampled accuracy: {was:.2f} to {now:.2f}; greedy: {run["greedy"][0][0]:.2f} to
  {run["greedy"][1][0]:.2f}. The loss stayed within {largest:.0e} of 0 all the way.
- Std: a problem solved once in 20 weighs {few[1]:.0%} of one solved half the time,
  without std {few[0]:.0%} (K = 8).
- Dead groups: {dead_at_base:.0%} at the base, {dead:.0%} in the last five batches.
- Tokens of right answers: {said["right before"]:.0f} to {said["right after"]:.0f}, of
  wrong ones: {said["wrong before"]:.0f} to {said["wrong after"]:.0f}.""")
for name in [name for name in (plain, *by_form) if name in tried]:
    right, nats = tried[name]["accuracy"][0], tried[name]["kl"][0]
    print(f"- {name}: {right:.2f} right, KL {nats:.2f} nats.")
results = [bootstrap(e.sampled.correct.mean(1)) for e in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *results, measure)

# %% [markdown]
# Exercises. (1) Give `grpo.train` an advantage of your own: the rank of the answer
# within its group, centred, ties sharing theirs. (For right and wrong that is K/2 times
# Dr. GRPO's: only graded rewards tell them apart.) (2) At ρ = 1, differentiate ρ k3 by
# hand. (k3 ∇ log π + (1 − e^(−d)) ∇ log π = d ∇ log π: k2's.) Next: PPO learns its
# baseline.
