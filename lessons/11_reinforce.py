# %% [markdown]
# # Lesson 11: Learning from rewards (REINFORCE)
#
# **Question.** How does a reward become a gradient?
#
# **Afterwards you can** derive the policy gradient in three lines, say why any baseline
# may be subtracted from the rewards, and measure whether one helps.
#
# **Read before:** [lesson 04](04_frontier.py): KL and the frontier. [Lesson
# 10](10_rejection_sampling.py): what imitating right answers does.
#
# **Papers:** Williams 1992, *Machine Learning* 8, section 4. For language models:
# Ahmadian et al. 2024, [arXiv 2402.14740](https://arxiv.org/abs/2402.14740), equations
# 3, 6 and 7.
#
# **Look at:** where the curve of Figure 1 has its peak.
#
# **Turn first:** `baseline` in the call of `reinforce.train`.
#
# **Time:** `quick` takes a minute on two CPU cores, `full` six minutes on one, and seed
# 0 a quarter of an hour, for it makes the trials. 2 GB of memory.

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
import copy
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minialign import course, exam, plotting
from minialign.algorithms import reinforce
from minialign.evaluation import policy_gradient
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %% tags=["setup"]
settings = course.setup("11_reinforce")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = reinforce.ReinforceConfig(
    updates=settings.pick(2, 22, 64),
    prompts=settings.pick(2, 32, 32),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## The idea
#
# We want the mean reward of a policy to rise. But the reward is given by a program that
# nobody can differentiate, and the answers are drawn at random. What *can* be
# differentiated is how likely each answer was. So: draw answers, see what they earned,
# and make each of them more likely in proportion to what it earned. In symbols, with
# Σ_y for the sum over all possible answers, E for the mean over answers that the policy
# draws, and log π(y) for the sum of the log-probabilities of an answer's tokens,
#
#     ∇ E[r] = Σ_y r(y) ∇π(y) = Σ_y π(y) r(y) ∇ log π(y) = E[ r ∇ log π(y) ]
#
# The middle step is ∇π = π ∇ log π. On the right stands a mean over the policy's own
# answers, and a mean can be estimated from a batch of them. The estimate is *unbiased*:
# its own mean, over all batches that might have been drawn, is the true gradient.
#
# A *baseline* b is a number that is subtracted from the rewards. What is left of an
# answer's reward, r − b, is its *advantage*. On average a baseline changes nothing,
# because chances sum to 1 and so their gradients sum to 0:
#
#     E[ b ∇ log π(y) ] = b Σ_y π(y) ∇ log π(y) = b ∇ Σ_y π(y) = b ∇ 1 = 0
#
# This holds for every b that does not look at the answer. (The mean reward of the batch
# does look at it, a little: the answer is part of the batch. Lesson 13 comes back to
# that.) What b does change is the noise of the estimate, and with it the number of
# answers that it takes to see where to go.
#
# ## By hand
#
# The four answers earn 1, 1, 0, 0. Without a baseline, right answers are pulled up and
# wrong ones left alone. With the mean reward as baseline, right answers are pulled up
# and wrong ones pushed down.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    logprobs = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)

rows = {}
baselines = {
    "no baseline": reinforce.no_baseline,
    "batch mean": reinforce.batch_mean,
}
for name, baseline in baselines.items():
    advantages = rewards - baseline(rewards, 0.0)  # (4,)
    leaf = logprobs.clone().requires_grad_()
    reinforce.reinforce_loss(leaf, advantages, mask).backward()
    weights = -len(rewards) * leaf.grad  # (4, S), the loss's division by 4 undone
    assert torch.allclose(weights, torch.where(mask, advantages[:, None], 0.0))
    rows[f"REINFORCE, {name}"] = weights.sum(1) / mask.sum(1)
hand = course.hand_table(settings.lesson, rows, beside="10_rejection_sampling")

# %% [markdown]
# The terse right answer gets exactly the weight of the worked one. A reward for being
# right does not ask for work. If the policy learns to show its work all the same, it is
# because worked answers are right more often, over many problems.
#
# ## Predict
#
# How good is the estimate? A gradient is an arrow in a space of many dimensions.
# Estimated from a single answer, it is a different arrow each time, and these scatter
# around the true one. Call *signal* the squared length of the true arrow, and *noise*
# the mean squared distance of the others from it. Their ratio tells how much one answer
# says about the direction. Textbooks subtract the mean reward. At our base, by what
# factor will that change the ratio, compared with no baseline?

# %%
my_guess = 1.5  # edit me: above 1, the baseline helps

# %% [markdown]
# ## Train
#
# Each update draws 8 answers to each of 32 fresh problems and takes one step, without a
# baseline: the trials below led there. The mean reward of a draw is also an honest
# estimate of accuracy before that step.


# %%
def run_reinforce(config, settings, reward=verifier, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    training = reinforce.train(
        policy,
        tokenizer,
        problems,
        reward,
        config,
        generator=settings.generator("sampling"),
        reference=reference,
        **options,
    )
    return policy, course.follow(training, config.updates)


before = exam.exam(settings, tokenizer, reference, "before")
policy, series = run_reinforce(config, settings)
course.save_policy(settings, policy, tokenizer)

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["reward"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: what a baseline does to the noise
#
# The base stays as it is. We draw 64 batches of 32 answers, one to each problem, and
# compute two gradients of each batch: Σ r ∇ log π and Σ ∇ log π. The estimate with
# baseline b is the first less b times the second, so the same answers serve every b.
# All that is needed of these long vectors is the dot products of every two of them,
# since squared lengths, means and distances are made of those.


# %% tags=["setup"]
def gradients_of(policy, batches: int, size: int) -> tuple[Tensor, float]:
    """Dot products (2 M, 2 M) of the gradients of M batches, first those that weigh by
    the reward, then those that weigh by 1; and the mean reward."""
    weighted = []
    plain = []
    means = []
    problems = course.stream(settings.seed + 1, size * batches)
    draw = settings.generator("signal to noise")
    for i in tqdm(range(batches), disable=None):
        asked = problems[size * i : size * (i + 1)]
        rollout = generate(
            policy,
            [tokenizer.encode_prompt(problem.question) for problem in asked],
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_new_tokens=config.max_new_tokens,
            generator=draw,
        )
        rewards = score(verifier, asked, rollout, tokenizer)  # (size,)
        weighted.append(policy_gradient(policy, rollout, rewards))
        plain.append(policy_gradient(policy, rollout, torch.ones_like(rewards)))
        means.append(rewards.mean().item())
    vectors = torch.stack(weighted + plain)  # (2 M, weights)
    return vectors @ vectors.T, float(np.mean(means))


def signal_to_noise(dots: Tensor, b: float, size: int) -> float:
    """|mean gradient|² / variance of one answer's gradient, with baseline b.

    From the dot products of M batches of `size` answers. The squared mean holds noise
    too, which is subtracted.
    """
    M = len(dots) // 2
    paid = dots[:M, :M]
    cross = dots[:M, M:]
    plain = dots[M:, M:]
    own = paid - b * (cross + cross.T) + b * b * plain  # (M, M), with the baseline
    squared_mean = own.sum() / M**2
    variance = (own.trace() - M * squared_mean) / (M - 1)  # of a batch's gradient
    signal = squared_mean - variance / M
    return (signal / (variance * size)).item()


# %%
noise = plotting.load_record(settings.lesson).get("0", {}).get("noise", {})
if settings.measures_once:
    frozen = copy.deepcopy(reference).requires_grad_(True)
    M, size = settings.pick((4, 4), (0, 0), (64, 32))
    dots, mean_reward = gradients_of(frozen, M, size)

    def ratio(b: float, dots: Tensor = dots) -> float:
        """With baseline b, over that without one."""
        return signal_to_noise(dots, b, size) / signal_to_noise(dots, 0.0, size)

    grid = np.linspace(0, 1, 101).tolist()
    curve_of_b = [ratio(b) for b in grid]
    without_one = []  # the factor of the mean reward, a batch left out at a time
    for out in range(M):
        rest = [i for i in range(2 * M) if i % M != out]
        without_one.append(ratio(mean_reward, dots[rest][:, rest]))
    error = float(np.std(without_one) * np.sqrt(M - 1))  # the jackknife
    noise = {
        "baselines": grid,
        "factors": curve_of_b,
        "mean_reward": mean_reward,
        "factor_of_the_mean": ratio(mean_reward),
        "standard_error": error,
        "best": grid[int(np.argmax(curve_of_b))],
        "factor_of_the_best": max(curve_of_b),
    }
    run["noise"] = noise
if noise:
    best = noise["best"]
    mean_reward = noise["mean_reward"]
    print(f"best baseline {best:.2f}: factor {noise['factor_of_the_best']:.2f}")
    print(f"mean reward {mean_reward:.2f}: factor {noise['factor_of_the_mean']:.2f}")
    print(f"(standard error of that factor: {noise['standard_error']:.2f})")

# %% tags=["plot"]
figure, (axes,) = plotting.new_figure(1, "", width=9, height=4.4)
if noise:
    factor = noise["factor_of_the_mean"]
    axes.plot(noise["baselines"], noise["factors"], color=plotting.COLORS[0], lw=2.5)
    marked = {  # name: (baseline, its factor)
        "the best baseline": (noise["best"], noise["factor_of_the_best"]),
        "the mean reward": (noise["mean_reward"], factor),
        "no baseline": (0.0, 1.0),
    }
    for name, (b, height) in marked.items():
        axes.plot(b, height, "o", color=plotting.COLORS[1], ms=9)
        below = -14 if b == 0 else 4
        plotting.label(axes, f"{name}, b = {b:.2f}", (b, height), (10, below))
    effect = "helps" if factor > 1 else "hurts"
    plotting.headline(
        figure,
        f"Subtracting the mean reward {effect} here: the best baseline is "
        f"{noise['best']:.2f}",
    )
axes.axhline(1, color="#444", ls=":", lw=1.2)
axes.set(xlabel="baseline b", ylabel="signal to noise (no baseline = 1)")
axes.set(xlim=(-0.01, 1), ylim=(0, None))
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** How much one answer of the base says about the gradient, for every
# baseline b, as a multiple of what it says without one.

# %%
if noise:
    course.predict(
        "The mean reward as baseline changes signal to noise by a factor of",
        my_guess,
        noise["factor_of_the_mean"],
        key="noise > factor_of_the_mean",
    )

# %% [markdown]
# ## Break it: every answer earns 1
#
# If every answer earns 1, there is nothing to be learned, and the expected gradient is
# zero. Without a baseline each single step still moves the policy, by noise. How far
# does that lead in 16 updates, beside a run with the true rewards? Both are judged on
# validation problems.


# %%
def one_for_all(problems, texts) -> list[float]:
    """Every answer earns 1."""
    return [1.0] * len(texts)


short = replace(config, updates=settings.pick(1, 16, 16))
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "moving average": (short, {"baseline": reinforce.moving_average}),
    "batch mean": (short, {"baseline": reinforce.batch_mean}),
}
trials = tuning | {"broken: all earn 1": (short, {"reward": one_for_all})}
tried = exam.run_trials(settings, tokenizer, reference, trials, run_reinforce, tuning)
exam.compare_trials(tried, "lr 8e-4", "broken: all earn 1", "True rewards, or all 1")
exam.compare_trials(tried, "lr 8e-4", "batch mean", "No baseline, or the batch mean")

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(2, "Settings tried, 4,096 answers each")
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default="lr 8e-4", base=base)
plotting.draw_trial_prices(cost, tried)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we found
#
# * REINFORCE closes 0.84 [0.77, 0.91] of the gap between the base and the base forced
#   to work: the mean of three seeds, with Student's interval over them. Sampled
#   accuracy comes to 0.87, and the answers grow from 20 tokens to 33. No reward ever
#   mentioned working.
# * It costs 1.75 nats, for which the frontier would be right nearly always. And the
#   second skill, which no reward asks about, falls from 0.76 to 0.67.
# * Proved: no baseline that does not look at the answer changes the expected gradient.
#   Measured at the base: the best one is 0.16, and the mean reward, 0.45, lies far
#   beyond it. It leaves 0.77 of the signal to noise (standard error 0.09).
# * So are baselines useless? No. *No baseline* is a baseline of 0, and on this task 0
#   happens to be near the best one. Had we paid −1 for wrong answers and 0 for right
#   ones, *no baseline* would be a baseline of 1, at the right end of Figure 1. Lesson
#   13 tries it. A mean of rewards moves along with their zero, and needs no such luck.
#   That is what it is for.
# * In training the difference is small: after 4,096 answers 0.635 without a baseline
#   and 0.602 with the batch mean, one seed, intervals overlapping.
# * If every answer earns 1, noise alone takes the policy 5 nats away, and it is right
#   on 0.259 of its answers. Steps that lead nowhere on average still lead away, as a
#   drunkard's do, and most ways to change a good answer make it worse. (The control of
#   lesson 10 imitated answers at random as well, and went much less far. It had half
#   the learning rate, and took twice as many steps on answers drawn once. Which of
#   these makes the difference we have not measured.)
#
# That the mean reward adds noise is not what textbooks lead one to expect. The best
# baseline is a mean reward too, but one in which each answer counts by the squared
# length of its gradient (exercise 1). It lies below the plain mean if right answers
# have the shorter gradients. We guess, and have not measured, why that should be:
# tokens that the model is sure of, as in a worked answer, have short gradients, and
# guessed numbers long ones.

# %% tags=["record"]
course.check(
    "11_reinforce",
    {
        "gap_closed": "0.84",
        "sampled after": "0.87",
        "length before": "20",
        "length after": "33",
        "kl": "1.75",
        "second_skill before": "0.76",
        "second_skill after": "0.67",
        "noise > best, seed 0": "0.16",
        "noise > mean_reward, seed 0": "0.45",
        "noise > factor_of_the_mean, seed 0": "0.77",
        "noise > standard_error, seed 0": "0.09",
    },
    own=run,
)
course.check(
    "11_reinforce_trials",
    {
        "accuracy, seed lr 8e-4": "0.635",
        "accuracy, seed batch mean": "0.602",
        "accuracy, seed broken: all earn 1": "0.259",
        "kl, seed broken: all earn 1": "5.0",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Why does the loss not fall?** Because it is not a loss in the usual sense. Only its
# gradient means anything: its value is the mean of reward times log-probability, and
# that may go either way while the policy improves. Watch the reward.
#
# **Why the sum over tokens, and not the mean?** Because the answer is one action, and
# the logarithm of its probability is the sum over its tokens. The mean would weigh the
# tokens of short answers more. It is another objective, which [lesson 16](16_grpo.py)
# looks at.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Which baseline makes the variance of (r − b) ∇ log π
# smallest? Write it as a mean over answers.
#
# **Exercise 2 (explain).** `reinforce.train` samples and scores at one temperature.
# Sample at 0.7 and score at 1: whose gradient is it then?
#
# **Exercise 3 (change).** Reward right answers of fewer than 8 tokens only. Which style
# will be left?

# %% [markdown] tags=["answers"]
# **Answer 1.** The mean does not depend on b, so minimise E[(r − b)² |∇ log π|²]. Its
# derivative by b is 0 at b = E[r |∇ log π|²] / E[|∇ log π|²]: the mean reward, with
# every answer weighed by the squared length of its gradient. It lies below the plain
# mean if right answers have the shorter gradients.
#
# **Answer 2.** Nobody's. The answers come from another policy than the one whose log π
# is used.
#
# **Answer 3.** Terse. Working no longer pays, as it takes more tokens.
