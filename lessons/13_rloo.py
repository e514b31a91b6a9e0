# %% [markdown]
# # Lesson 13: Answers that judge each other (RLOO)
#
# **Question.** Answers to one problem can be each other's baseline. With 256 answers to
# spend, should they go to many problems or to few?
#
# Read before: lesson 11 (REINFORCE, and what a baseline is for).
#
# RLOO draws K answers to each problem and credits each one with its reward minus the
# mean reward of the *other* K − 1. Nothing else changes from REINFORCE: no greedy
# answer, no second model. An answer is good if it beats what the policy says on the
# same problem otherwise.
#
# You will see: why the answer itself must be left out, what groups cost in which all
# answers are right or all wrong, and which way to split 256 answers learns fastest.
#
# Time: `quick` about 60 s on two CPU cores; `full` some four minutes a seed there (the
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

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import rloo
from minialign.evaluation import dead_share, policy_gradient
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %%
settings = course.setup("13_rloo")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = rloo.RlooConfig(
    updates=settings.pick(2, 20, 64),
    prompts=settings.pick(2, 32, 32),
    max_new_tokens=settings.pick(32, 128, 128),
)
SPLITS = (2, 4, 8, 16, 32)  # K, answers to each problem

# %% [markdown]
# ## By hand
#
# Four answers to one question, rewards 1, 1, 0, 0. The others of a right answer earn
# 1/3 on average, so it is worth 1 − 1/3 = 2/3; a wrong one 0 − 2/3. With the mean of
# all four (lesson 11's batch mean) it would be ±1/2: the same, times (K − 1)/K.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
advantages = rloo.leave_one_out(rewards[None])[0]  # (4,): one group of K = 4
with torch.no_grad():
    scored = reference, tokens.to(settings.device), mask.to(settings.device)
    logprobs = token_logprobs(*scored).cpu()  # (4, S)
logprobs.requires_grad_()
rloo.rloo_loss(logprobs, advantages, mask).backward()
weights = -4 * logprobs.grad  # (4, S): the same at every token of an answer
by_hand = torch.tensor([1 - 1 / 3, 1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3])
assert torch.allclose(weights, torch.where(mask, by_hand[:, None], 0.0))
assert torch.allclose(by_hand, 4 / 3 * (rewards - rewards.mean()))
row = {"RLOO (x B)": weights.sum(1) / mask.sum(1)}
hand = course.hand_table(settings.lesson, row)

# %% [markdown]
# Why leave the answer out? Let these four answers be the whole world, each as likely as
# the base makes it. Then every group of K can be listed, and the expected gradient is a
# sum, not an estimate.

# %%
COMPARE = {  # rewards (P, K) -> advantages (P, K)
    "leave-one-out": rloo.leave_one_out,
    "itself included": lambda r: r - r.mean(1, keepdim=True),
    "no baseline": lambda r: r,
    "no baseline, paid 0 or -1": lambda r: r - 1,
    "mean of another problem": lambda r: r - r.roll(1, dims=0).mean(1, keepdim=True),
    "broken: best of the group": lambda r: r - r.amax(1, keepdim=True),
    "broken: slip of one row": lambda r: rloo.leave_one_out(r).roll(1, dims=1),
}
by_calculus = {"leave-one-out": 1, "itself included": 2 / 3}
by_calculus["broken: slip of one row"] = -1 / 2
chances = torch.softmax(logprobs.detach().sum(1), 0)
truth = chances * (rewards - chances @ rewards)  # ∇ E[reward] in logits
groups = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, K = 3), all there are
slopes = (torch.eye(4) - chances)[groups]  # (64, 3, 4), ∇ log π of each answer
for name in (*by_calculus, "broken: best of the group"):
    mean = (COMPARE[name](rewards[groups])[:, :, None] * slopes).mean(1)  # (64, 4)
    expected = chances[groups].prod(1) @ mean  # (4,)
    left = (expected @ truth / (truth @ truth)).item()
    print(f"{name:<26} K = 3: {left:+.3f} of the true gradient, in expectation")
    assert torch.allclose(expected, by_calculus.get(name, left) * truth, atol=1e-6)

# %% [markdown]
# Included, (K − 1)/K of it is left, in the same direction. With the best of the group
# 1 − (1 − p)^(K − 1) is left, p the chance to be right: seldom solved problems lose
# most. And a slip of one
# row turns the gradient *round*: your neighbour's advantage holds −1/(K − 1) of your
# reward, and that is all it knows of you.
#
# ## Predict

# %%
print("256 answers: 128 x 2, 64 x 4, 32 x 8, 16 x 16 or 8 x 32 (problems x K)?")
my_guess = 8  # edit me: the K that learns fastest

# %% [markdown]
# ## One run


# %%
def run_rloo(config: rloo.RlooConfig, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    series, start = {}, time.perf_counter()
    training = rloo.train(
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

# %%
policy, series = run_rloo(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## After

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["accuracy"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## Many problems or few
#
# Two things pull apart. More answers to a problem make a better baseline. But they all
# tell of one problem, so fewer problems make more noise. With 256/K groups in a batch,
#
#     variance of its gradient = (K/256) (between problems + within one, at this K)
#
# The true gradient is the same for every split. So ask *how many answers it takes until
# the signal is as large as the noise*: K (between + within) / |true gradient|², the
# inverse of lesson 11's signal to noise. From the frozen base we draw 32 answers to
# each problem, and cut them into groups of every K; the same answers serve all
# baselines. We keep only the dot products of all pairs of ∇ log π: they give the length
# of any sum.


# %%
def dot_products(policy, problem, draw) -> tuple:
    """32 answers: rewards (32,), dot products (32, 32) of ∇ log π, RLOO's gradient."""
    rollout = generate(
        policy, [tokenizer.encode_prompt(problem.question)], samples=32,
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        max_new_tokens=config.max_new_tokens, generator=draw,
    )  # fmt: skip
    rewards = score(verifier, [problem], rollout, tokenizer)
    one = torch.ones(1, device=settings.device)
    rows = torch.arange(32, device=settings.device).split(1)
    slopes = [policy_gradient(policy, rollout.select(row), one) for row in rows]
    slopes = torch.stack(slopes)  # (32, weights)
    gradient = rloo.leave_one_out(rewards[None])[0] @ slopes / 32
    return rewards, slopes @ slopes.T, gradient


def of_groups(advantages, dots):
    """(G, K) and (G K, G K) -> (G, G): dot products of the groups' gradients."""
    weights = torch.block_diag(*advantages / advantages.shape[1])  # (G, G K)
    return weights @ dots @ weights.T


# %%
def measure_splits(policy, count: int) -> dict:
    """Answers until signal = noise, {baseline: {K: [value, low, high]}}."""
    names = "no baseline", "no baseline, paid 0 or -1", "leave-one-out"
    squares = {(name, K): [] for name in names for K in SPLITS}
    total, own, alike = 0, 0, []
    draw = settings.generator("splits")
    for problem in tqdm(course.stream(settings.seed + 1, count), disable=None):
        rewards, dots, gradient = dot_products(policy, problem, draw)
        total, own = total + gradient, own + gradient.square().sum().item()
        for (name, K), found in squares.items():
            products = of_groups(COMPARE[name](rewards.view(-1, K)), dots)
            found.append(products.diag().mean().item())
            if (name, K) == ("leave-one-out", 16):
                alike.append(products[0, 1].item())  # apart: no noise within
    signal = (total.square().sum().item() - own) / (count * (count - 1))
    signal = max(signal, 1e-6)  # of few problems, the estimate may be below 0
    noise = {name: {} for name in names}
    for (name, K), found in squares.items():
        answers = bootstrap(K * (np.array(found) / signal - 1))
        noise[name][str(K)] = course.as_list(answers)
    return noise | {"between": float(np.mean(alike)) / signal - 1}


# %%
splits = plotting.load_record(settings.lesson).get("0", {}).get("splits", {})
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    frozen = copy.deepcopy(reference).requires_grad_(True)
    run["splits"] = splits = measure_splits(frozen, settings.pick(2, 0, 192))
right = np.array(base["right_of_samples"])[:, None]  # of 64 answers, lesson 02
known = np.arange(base["samples"]) < right  # (500, 64)
dead = {K: dead_share(known, K).value for K in SPLITS}
noise = {name: row for name, row in splits.items() if name != "between"}
print("answers until the signal is as large as the noise, at the base, by baseline")
print(f"{'P x K':<10}{'dead groups':>12}" + "".join(f"{name:>26}" for name in noise))
for K in SPLITS:
    cells = "".join(f"{row[str(K)][0]:>26.0f}" for row in noise.values())
    print(f"{f'{256 // K} x {K}':<10}{dead[K]:>12.0%}{cells}")

# %% [markdown]
# Where right answers hold little of the squared gradient (lesson 11's best constant was
# small), rewards of 0 and 1 without a baseline come near the best one, by luck. Pay 0
# and −1, the same task, and that luck is gone: compare the columns. Leave-one-out gives
# the same advantages for both: it need not have the least noise, but does not hang on
# where the zero lies. (Same answers in all columns, one seed; all numbers share the
# error of one estimate of the signal.)
#
# ## Trials, and breaking it
#
# Runs of 4,096 answers, as in lesson 11: learning rates at 32 x 8, splits at the rate
# that led (one seed: where intervals overlap, "furthest" says little), other baselines.
# *Mean of another problem* loses "the same problem", and stays unbiased: no answer is
# in its own baseline. The broken one is biased.

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
FASTEST = 1.6e-3


def split(K):
    """As many answers, K to each problem, at the learning rate that led."""
    prompts = short.prompts * short.samples // K
    return replace(short, lr=FASTEST, prompts=prompts, samples=K)


# %%
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (split(8), {}),
    "lr 3.2e-3": (replace(short, lr=3.2e-3), {}),
    "lr 1.6e-3, 64 x 4": (split(4), {}),
    "lr 1.6e-3, 16 x 16": (split(16), {}),
}
others = list(COMPARE)[2:6]
trials = tuning | {f"lr 1.6e-3, {256 // K} x {K}": (split(K), {}) for K in (32, 2)}
trials |= {name: (short, {"compare": COMPARE[name]}) for name in others}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rloo, tuning)
exam.print_trials(tried)
plain = [d for d in tried.values() if not d["options"] and d["config"]["beta"] == 0]
by_split = {d["config"]["samples"]: d for d in plain if d["config"]["lr"] == FASTEST}
by_split = dict(sorted(by_split.items()))  # {K: what was measured}
best = None
if len(by_split) == len(SPLITS):
    best = max(by_split, key=lambda K: by_split[K]["accuracy"][0])
    course.predict("The K with the best accuracy after 4,096:", my_guess, best)
    low = by_split[best]["accuracy"][1]
    reach = [K for K in by_split if by_split[K]["accuracy"][2] > low and K != best]
    rivals = ", ".join(map(str, reach)) or "none"
    print(f"  other K whose intervals reach into that of the best: {rivals}")

# %% [markdown]
# ## The figures

# %%
(was, *_), (now, *_) = run["sampled"]
message = f"Answers as each other's baseline: {was:.2f} to {now:.2f} right "
message += f"(seed {settings.seed})"
if best:
    message += f"; K = {best} led in 4,096 answers (not told apart: {rivals})"
figure, axes = plotting.new_figure(3, message)
rise, price, pace = axes
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "RLOO")
plotting.draw_price(price, runs or [run], course.base_success(), base)
if by_split:
    values, lows, highs = np.array([row["accuracy"] for row in by_split.values()]).T
    bars = [values - lows, highs - values]
    pace.errorbar(list(by_split), values, bars, fmt="o-", capsize=3)
pace.set(xlabel="K, answers to each problem", ylabel="sampled accuracy, validation")
pace.set_xscale("log", base=2)
pace.set_xticks(SPLITS, SPLITS)
pace.set_title("4,096 answers, P x K = 256 an update")
plotting.save_figure(figure, settings.figure_path)

# %%
figure, axes = plotting.new_figure(3, "What the settings do, and what K costs", width=5)
accuracy, cost, lost = axes
plotting.draw_trials(accuracy, tried, default="lr 8e-4")
for color, (name, row) in zip(plotting.COLORS, noise.items(), strict=False):
    values, lows, highs = np.array([row[str(K)] for K in SPLITS]).T
    cost.plot(SPLITS, values, "o-", color=color, label=name)
    cost.fill_between(SPLITS, lows, highs, color=color, alpha=0.12)
part = [K * splits.get("between", 0) for K in SPLITS]
cost.plot(SPLITS, part, "k:", label="the part between problems")
cost.set(xlabel="K, answers to each problem", ylim=(0, None))
cost.set_title("answers until signal = noise, at the base")
lost.plot(SPLITS, list(dead.values()), "o-", label="base, from lesson 02")
ends = {K: np.mean(row["series"]["dead"][-5:]) for K, row in by_split.items()}
lost.plot(list(ends), list(ends.values()), "s--", label="end of the short runs")
lost.set(xlabel="K, answers to each problem", ylabel="share of groups", ylim=(0, 1))
lost.set_title("dead groups")
for axis in (cost, lost):
    axis.set_xscale("log", base=2)
    axis.set_xticks(SPLITS, SPLITS)
    axis.legend()
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we saw

# %%
clipped = np.mean(np.array(series["grad_norm"]) > config.max_grad_norm)
print(f"""
- Sampled accuracy: {was:.2f} to {now:.2f}; greedy: {run["greedy"][0][0]:.2f} to
  {run["greedy"][1][0]:.2f}.
- Dead groups: {series["dead"][0]:.0%} of the first batch, {series["dead"][-1]:.0%} of
  the last. They were paid for and taught nothing.
- In {clipped:.0%} of the updates the gradient was longer than {config.max_grad_norm:g}
  and clipped to that: there, a constant factor such as (K − 1)/K changes nothing.""")
if noise:
    none, _, ours = noise.values()
    quiet = min(SPLITS, key=lambda K: ours[str(K)][0])
    none, ours = none["8"][0], ours["8"][0]
    print(f"""- The quietest K for leave-one-out, at the base, is {quiet}. At 32 x 8 the
  signal takes {ours:.0f} answers, without a baseline {none:.0f}: here leaving one out
  {"adds" if ours > none else "takes away"} noise.""")
ends = [bootstrap(e.sampled.correct.mean(1)) for e in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# Exercises. (1) Skip dead groups and draw problems until 32 live ones are found: is it
# still the gradient of E[r]? (Yes, divided by the share of live groups: dead ones added
# 0. But redraw the *same* problem until it is live, and each gradient is divided by
# that problem's own chance to be live: another objective.) (2) K = 2, rewards 0.3 and
# 0: show that the gradient at the reference is DPO's with beta = 0.3.
# (tests/test_identities.py does.) Next: GRPO divides by the group's spread.
