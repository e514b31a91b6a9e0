# %% [markdown]
# # Lesson 12: Compared with its own best guess (ReMax)
#
# **Question.** Is a policy's own greedy answer a good baseline?
#
# **Afterwards you can** say what a baseline may know and what it may not, count what
# ties cost, and compare two baselines on the same answers.
#
# **Read before:** [lesson 11](11_reinforce.py): the policy gradient, and signal to
# noise.
#
# **Paper:** Li et al. 2023, [arXiv 2310.10505](https://arxiv.org/abs/2310.10505),
# algorithm 1.
#
# **Look at:** the green band of Figure 1.
#
# **Turn first:** `samples`, the sampled answers that share one greedy answer.
#
# **Time:** `quick` takes a minute on two CPU cores, `full` six minutes on one, and seed
# 0 half an hour, for it makes the trials. 3 GB of memory.

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
from minialign.algorithms import remax
from minialign.evaluation import policy_gradient, signal_to_noise
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %% tags=["setup"]
settings = course.setup("12_remax")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = remax.RemaxConfig(
    updates=settings.pick(2, 20, 64),
    prompts=settings.pick(2, 128, 128),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## The idea
#
# A reward of 1 means little on an easy problem and much on a hard one. So a baseline
# should know the problem. How hard is it for this policy, at this moment? ReMax asks
# the policy: it draws one answer, and it also takes the *greedy* one, with the
# likeliest token at every step. The sampled answer is credited with the difference,
#
#     A = r(y) − r(ŷ),        y sampled, ŷ greedy
#
# May a baseline know the problem? Yes: lesson 11's proof holds on each problem by
# itself, with x for the problem and the mean taken over the answers y to it, E[b(x) ∇
# log π(y|x)] = b(x) · 0, for any number b(x) that does not look at y. The greedy answer
# follows from the problem and the policy alone, so it may serve. That it depends on the
# policy does no harm: its reward is used as a number, and nothing is differentiated
# through it.
#
# There is a price: half of the answers are greedy, and nothing is learned from those.
# And an answer *ties* if it earns what the greedy one earns. Its advantage is then 0,
# and it teaches nothing. (Without a baseline, wrong answers teach nothing either. The
# question is which of the two leaves the better estimate.)
#
# ## By hand
#
# The four answers earn 1, 1, 0, 0. If the greedy answer is wrong, the right ones are
# pulled up. If it is right, the wrong ones are pushed down. Either way two of four tie.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    logprobs = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)

rows = {}
for verdict, earned in {"right": 1.0, "wrong": 0.0}.items():
    greedy = torch.full((4,), earned)  # four times the same problem
    advantages = remax.remax_advantages(rewards[:, None], greedy)[:, 0]  # (4,)
    no_kl = torch.zeros_like(logprobs)
    weights = remax.whole_answer(advantages, no_kl, mask, 0.0)  # (4, S)
    leaf = logprobs.clone().requires_grad_()
    remax.remax_loss(leaf, weights, mask).backward()
    by_hand = torch.where(mask, (rewards - earned)[:, None], 0.0)
    assert torch.allclose(-4 * leaf.grad, by_hand)
    rows[f"ReMax, greedy {verdict}"] = advantages
hand = course.hand_table(settings.lesson, rows, beside="11_reinforce")

# %% [markdown]
# ## Predict
#
# At the base, 46 of 100 sampled answers to test problems and 40 of 100 greedy ones are
# right. Were they independent of each other, half of the answers would tie. What share
# of the sampled answers of a whole run will tie, and teach nothing?

# %%
my_guess = 0.5  # edit me

# %% [markdown]
# ## Train
#
# An update asks 128 problems. Each gets a sampled and a greedy answer, so that 256
# answers are drawn, as in lesson 11, and 128 are learned from.


# %%
def run_remax(config, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    training = remax.train(
        policy,
        tokenizer,
        problems,
        verifier,
        config,
        generator=settings.generator("sampling"),
        reference=reference,
        **options,
    )
    return policy, course.follow(training, config.updates)


before = exam.exam(settings, tokenizer, reference, "before")
policy, series = run_remax(config, settings)
course.save_policy(settings, policy, tokenizer)

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["reward"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: who still teaches
#
# An answer that does not tie is either right beside a wrong greedy answer, and pulled
# up, or wrong beside a right one, and pushed down.

# %%
ties = np.array(series["ties"])
lead = np.array(series["reward"]) - np.array(series["greedy_reward"])
moved = 1 - ties  # the pulled up and the pushed down together
pulled_up = (moved + lead) / 2
pushed_down = (moved - lead) / 2

late = slice(len(ties) // 2, None)
run["comparisons"] = {
    "ties": float(ties.mean()),
    "ties, first half": float(ties[: len(ties) // 2].mean()),
    "ties, second half": float(ties[late].mean()),
    "up, second half": float(pulled_up[late].mean()),
    "down, second half": float(pushed_down[late].mean()),
}
for name, share in run["comparisons"].items():
    print(f"{name:<20}{share:.3f}")

# %% tags=["plot"]
up = pulled_up[late].mean()
down = pushed_down[late].mean()
figure, (axes,) = plotting.new_figure(
    1,
    f"{ties.mean():.0%} of the comparisons tie; in the second half {up:.0%} pull an "
    f"answer up, {down:.0%} push one down",
    width=9,
    height=4.2,
)
bands = {
    "pulled up": (pulled_up, plotting.COLORS[2]),
    "pushed down": (pushed_down, plotting.COLORS[1]),
    "tied: nothing learned": (ties, "#ccd3dc"),
}
plotting.draw_bands(axes, series["completions"], bands, smooth=5)
axes.axvline(series["completions"][len(ties) // 2], color="#444", ls=":", lw=1.2)
axes.set(xlabel="answers drawn, sampled and greedy ones; dotted: half of the run")
axes.set(ylabel="sampled answers, beside greedy ones")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** What becomes of the sampled answers of a run: those that beat the greedy
# answer, those that lose to it, and those that tie. Means of five updates.

# %%
course.predict(
    "Share of sampled answers that tie:",
    my_guess,
    run["comparisons"]["ties"],
    key="comparisons > ties",
)

# %% [markdown]
# ## What the greedy answer buys
#
# Lesson 11's measure, signal to noise at the frozen base, but per answer *drawn*: with
# K sampled answers to a problem, ReMax has paid for K + 1. We draw 8 answers to each
# problem once, and all rows make use of these. The first four use all 8: with no
# baseline, with the batch's mean, with the mean of the *other* answers to the problem,
# which is lesson 13's idea, and with the greedy answer. The last two use one of the 8,
# as in the run above. The errors of two rows are not independent, for their answers are
# the same.


# %% tags=["setup"]
def advantages_by(rewards: Tensor, greedy: Tensor) -> dict[str, tuple[Tensor, int]]:
    """{baseline: (advantages (N, K), answers drawn)}."""
    N, K = rewards.shape
    others = (rewards.sum(1, keepdim=True) - rewards) / (K - 1)  # (N, K)
    first = torch.zeros_like(rewards)
    first[:, 0] = K  # one sample of each problem, and the mean over answers undone
    greedily = remax.remax_advantages(rewards, greedy)  # (N, K)
    return {
        "none": (rewards, N * K),
        "mean of the batch": (rewards - rewards.mean(), N * K),
        "mean of the others": (rewards - others, N * K),
        "greedy answer": (greedily, N * (K + 1)),
        "none, 1 sample": (rewards * first, N),
        "greedy, 1 sample": (greedily * first, N * 2),
    }


def with_error(gradients: Tensor, drawn: int) -> list[float]:
    """[signal to noise per answer drawn, its standard error by the jackknife]."""
    if not gradients.any():  # every answer tied
        return [0.0, 0.0]
    M = len(gradients)
    without_one = []
    for out in range(M if M > 2 else 0):
        rest = [i for i in range(M) if i != out]
        without_one.append(signal_to_noise(gradients[rest], drawn))
    error = float(np.std(without_one) * np.sqrt(M - 1)) if without_one else 0.0
    return [signal_to_noise(gradients, drawn), error]


def compare_baselines(policy, batches: int, N: int, K: int) -> dict[str, list[float]]:
    """{baseline: [signal to noise, error]}, from batches of N problems, K answers."""
    problems = course.stream(settings.seed + 1, N * batches)
    draw = settings.generator("signal to noise")
    limits = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    limits["max_new_tokens"] = config.max_new_tokens
    gradients: dict[str, list[Tensor]] = {}
    drawn = {}
    for i in tqdm(range(batches), disable=None):
        asked = problems[N * i : N * (i + 1)]
        prompts = [tokenizer.encode_prompt(problem.question) for problem in asked]
        rollout = generate(policy, prompts, samples=K, generator=draw, **limits)
        rewards = score(verifier, asked, rollout, tokenizer).view(N, K)
        best = generate(policy, prompts, greedy=True, **limits)
        greedy = score(verifier, asked, best, tokenizer)  # (N,)
        for name, (weights, count) in advantages_by(rewards, greedy).items():
            gradient = policy_gradient(policy, rollout, weights.flatten())
            gradients.setdefault(name, []).append(gradient)
            drawn[name] = count
    return {
        name: with_error(torch.stack(rows), drawn[name])
        for name, rows in gradients.items()
    }


# %%
noise = plotting.load_record(settings.lesson).get("0", {}).get("signal_to_noise", {})
if settings.measures_once:
    frozen = copy.deepcopy(reference).requires_grad_(True)
    batches = settings.pick(2, 0, 16)
    problems_each = settings.pick(2, 0, 16)
    samples_each = settings.pick(2, 0, 8)
    noise = compare_baselines(frozen, batches, problems_each, samples_each)
    run["signal_to_noise"] = noise
print("signal to noise of one answer drawn, at the base")
for name, (value, error) in noise.items():
    print(f"{name:<20}{value:>9.4f} ± {error:.4f}")

# %% [markdown]
# ## Break it: no baseline at all
#
# Take the baseline away, and nothing else: the greedy answers are drawn and thrown
# away. As long a run as the one above, with another seed, judged on validation. (Lesson
# 11 has the arm that does not draw them in the first place. It learns from twice as
# many answers.)
#
# Among the trials, *3 samples* draws three sampled answers to each problem beside the
# greedy one. *Authors' weights* follows the authors' public code, where the paper and
# the code differ: there each token's weight is discounted by 0.99 for every token that
# follows it, and the mean is taken over the tokens of a batch instead of over its
# answers.

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
high = replace(short, lr=1.6e-3)
wide = replace(high, prompts=settings.pick(2, 64, 64), samples=3)


def no_baseline(rewards: Tensor, greedy: Tensor) -> Tensor:
    """The greedy answers are paid for, and not used."""
    return rewards


tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "lr 3.2e-3": (replace(short, lr=3.2e-3), {}),
    "lr 1.6e-3, 3 samples": (wide, {}),
    "lr 1.6e-3, authors' weights": (high, {"weigh": remax.code_weights}),
}
trials = tuning | {
    "no baseline": (short, {"compare": no_baseline}),
    "16,384": (config, {}),
    "16,384, no baseline": (config, {"compare": no_baseline}),
}
tried = exam.run_trials(settings, tokenizer, reference, trials, run_remax, tuning)
exam.compare_trials(tried, "16,384", "16,384, no baseline", "16,384 answers")
exam.compare_trials(tried, "lr 4e-4", "no baseline", "4,096 answers")

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(
    2, "Settings tried, 4,096 answers each where nothing else is said"
)
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default="lr 4e-4", base=base)
plotting.draw_trial_prices(cost, tried)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we found
#
# * ReMax closes 0.68 [0.64, 0.73] of the gap: the mean of three seeds, with Student's
#   interval over them. It costs 1.07 nats, and 0.72 of the second skill is left, of
#   0.76.
# * Of all comparisons 0.77 tie (seed 0), and not one half, as they would if the two
#   answers were independent. They are not: an easy problem is solved both times, and a
#   hard one neither time. In the second half of the run 0.01 of the sampled answers are
#   pulled up and 0.17 pushed down: beside a greedy answer that is nearly always right
#   there is little to praise.
# * Two things may hold it back, and we have not separated them. Late in the run next to
#   nothing is pulled up. And the estimate seems to be noisier from the start: at the
#   base, with 8 samples, the signal to noise of one answer drawn is 0.0077 ± 0.0014
#   with the greedy baseline and 0.0151 ± 0.0037 with none. The price of drawing the
#   greedy answers lowers 0.0151 by a ninth, to 0.0134, and explains no more than that.
# * Without the baseline the same run is better: 0.866 [0.844, 0.885] against 0.792
#   [0.766, 0.816], on validation, one seed. After 4,096 answers it is 0.545 with the
#   baseline and 0.570 without, and the intervals overlap. So we cannot say when the
#   loss comes.
#
# The paper finds less variance with the greedy baseline than without, on another task,
# with other models, and with graded rewards, which hardly ever tie. With our rewards of
# 0 and 1, no baseline happens to be near the best constant one (lesson 11). Had we paid
# −1 for wrong answers and 0 for right ones, the run without a baseline would have been
# much noisier, while nothing would have changed for ReMax. That a greedy baseline is a
# bad one everywhere is not shown here.

# %% tags=["record"]
course.check(
    "12_remax",
    {
        "gap_closed": "0.68",
        "kl": "1.07",
        "second_skill before": "0.76",
        "second_skill after": "0.72",
        "comparisons > ties, seed 0": "0.77",
        "comparisons > up, second half, seed 0": "0.01",
        "comparisons > down, second half, seed 0": "0.17",
        "signal_to_noise > greedy answer, seed 0": "0.0077",
        "signal_to_noise > none, seed 0": "0.0151",
    },
)
course.check(
    "12_remax_trials",
    {
        "accuracy, seed lr 4e-4": "0.545",
        "accuracy, seed no baseline": "0.570",
        "accuracy, seed 16,384": "0.792",
        "accuracy, seed 16,384, no baseline": "0.866",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Is the greedy answer's reward an estimate of the mean reward?** A coarse one: it is
# 0 or 1, while the mean lies between. On a problem that is solved with chance 0.6 it
# says 0 or 1, and always the same until the policy changes.
#
# **Does a tie not tell anything?** Not to this estimate. Two answers are drawn, and the
# product of advantage and ∇ log π is 0. The nearer the policy is to always being right,
# the more often that happens.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (explain).** The sampled answer's own reward would be a baseline that
# removes all noise from the rewards. Why may it not be used?
#
# **Exercise 2 (change).** Skip the backward pass for ties. Which numbers change?
#
# **Exercise 3 (break).** Let the greedy answer be that of *another* problem
# (`compare=lambda r, g: remax.remax_advantages(r, g.roll(1))`). Is the gradient biased?

# %% [markdown] tags=["answers"]
# **Answer 1.** It looks at the answer. With b = r(y) every advantage is 0, and so is
# the gradient, whatever the true one is.
#
# **Answer 2.** The seconds, and the count of tokens that were trained on. The weights
# do not, as long as beta is 0, for the gradient of a tie is exactly 0.
#
# **Answer 3.** No, it is as unbiased as before, for the other problem's answer does not
# look at y. It only knows less about this one.
