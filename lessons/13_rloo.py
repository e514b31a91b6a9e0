# %% [markdown]
# # Lesson 13: Answers that judge each other (RLOO)
#
# **Question.** Can answers to one problem judge each other?
#
# **Afterwards you can** build an unbiased baseline out of a group of answers, say why
# the answer itself is left out of it, and find a slip that no shape gives away.
#
# **Read before:** [lesson 11](11_reinforce.py): the policy gradient, baselines, and
# signal to noise.
#
# **Papers:** Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!". For
# language models: Ahmadian et al. 2024, [arXiv
# 2402.14740](https://arxiv.org/abs/2402.14740).
#
# **Look at:** the two pairs of bars in Figure 1.
#
# **Turn first:** `samples`, the answers to each problem.
#
# **Time:** `quick` takes a minute on two CPU cores, `full` six minutes on one, and seed
# 0 half an hour, for it makes the trials. 2 GB of memory.

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
from minialign.algorithms import rloo
from minialign.evaluation import policy_gradient
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %% tags=["setup"]
settings = course.setup("13_rloo")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = rloo.RlooConfig(
    updates=settings.pick(2, 20, 64),
    prompts=settings.pick(2, 32, 32),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## The idea
#
# In lesson 11 a baseline was one number for all answers. It may as well be another one
# on each problem: the proof holds problem by problem. And one would think that it
# should be, for a right answer means little on an easy problem and much on a hard one.
# If we draw several answers to the problem anyway, the *others'* mean reward says how
# well the policy does there. RLOO, *REINFORCE leave-one-out*, draws K answers to each
# problem and credits each one with what it earned above the mean of the other K − 1:
#
#     A_i = r_i − mean_{j≠i} r_j = K/(K − 1) · (r_i − r̄)
#
# Here r̄ is the mean of all K. The second form says that leaving an answer out is the
# same as leaving it in and multiplying by K/(K − 1).
#
# Why leave it out at all? A baseline must not look at the answer that it is subtracted
# for. With the answer in its own baseline, only (K − 1)/K of the expected gradient is
# left. That is harmless here, for the direction is right. Leaving it out costs nothing,
# and then the estimate is unbiased.
#
# If all K answers earn the same, all advantages are 0. Such a group is called *dead*.
# It was paid for, and it teaches nothing.
#
# ## By hand
#
# The four answers earn 1, 1, 0, 0. The others of a right answer earn 1/3 on average, so
# its advantage is 2/3. The others of a wrong one earn 2/3.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    logprobs = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)

advantages = rloo.leave_one_out(rewards[None])[0]  # (4,), one group of K = 4
leaf = logprobs.clone().requires_grad_()
rloo.rloo_loss(leaf, advantages, mask).backward()
weights = (-4 * leaf.grad).sum(1) / mask.sum(1)  # (4,), the division by 4 undone
assert torch.allclose(weights, torch.tensor([2 / 3, 2 / 3, -2 / 3, -2 / 3]))
assert torch.allclose(weights, 4 / 3 * (rewards - rewards.mean()))
hand = course.hand_table(settings.lesson, {"RLOO": weights}, beside="11_reinforce")

# %% [markdown]
# Is the expected gradient exactly right? Imagine a world in which these four answers
# are all there is, each as likely as the base makes it. Let groups of K = 3 be drawn
# there. All 64 of them can be listed, and the mean over groups is a sum instead of an
# estimate.


# %%
def leave_one_out(r: Tensor) -> Tensor:
    return rloo.leave_one_out(r)


def itself_included(r: Tensor) -> Tensor:
    return r - r.mean(1, keepdim=True)


# By the logits of the four answers: ∇ E[r], and ∇ log π of each answer in each group.
chances = torch.softmax(logprobs.sum(1), 0)  # (4,)
truth = chances * (rewards - chances @ rewards)  # (4,) ∇ E[r], by the logits
answer = torch.arange(4)
groups = torch.cartesian_prod(answer, answer, answer)  # (64, 3), all there are
slopes = (torch.eye(4) - chances)[groups]  # (64, 3, 4), ∇ log π of each answer


def share_left(compare) -> float:
    """How much of the true gradient is left in the expected one, exactly."""
    A = compare(rewards[groups])  # (64, 3)
    of_group = (A[:, :, None] * slopes).mean(1)  # (64, 4)
    expected = chances[groups].prod(1) @ of_group  # (4,)
    share = (expected @ truth / (truth @ truth)).item()
    assert torch.allclose(expected, share * truth, atol=1e-6)  # the same direction
    return share


for compare in (leave_one_out, itself_included):
    print(f"{compare.__name__:<18}{share_left(compare):+.3f} of the true gradient")

# %% [markdown]
# With the answer itself in the mean, 2/3 of the gradient is left, as (K − 1)/K says.
#
# ## Predict
#
# Our reward is 1 for right and 0 for wrong. It could as well be 0 for right and −1 for
# wrong: the task is the same. After 4,096 answers *without* a baseline, rewards of 1
# and 0 give an accuracy of 0.635. What do rewards of 0 and −1 give?

# %%
my_guess = 0.63  # edit me

# %% [markdown]
# ## Train


# %%
def slip_of_one_row(r: Tensor) -> Tensor:
    """A bug, for later: every answer gets the advantage of its neighbour."""
    return rloo.leave_one_out(r).roll(1, dims=1)


COMPARE = {  # rewards (P, K) -> advantages (P, K)
    "no baseline": lambda r: r,
    "no baseline, paid 0 or -1": lambda r: r - 1,
}


def run_rloo(config, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    training = rloo.train(
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
policy, series = run_rloo(config, settings)
course.save_policy(settings, policy, tokenizer)

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["reward"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: where the zero lies
#
# How many answers does it take until the signal is as large as the noise? That is the
# inverse of lesson 11's measure. From the frozen base we draw 32 answers to each of
# many problems, cut them into groups of 8, and let the same answers serve three
# estimates: no baseline with rewards of 1 and 0, no baseline with rewards of 0 and −1,
# and leave-one-out. As in lesson 11 only dot products are kept, here of ∇ log π for
# every two answers to a problem.


# %% tags=["setup"]
def slopes_of(policy, problem, draw) -> tuple[Tensor, Tensor, Tensor]:
    """32 answers: rewards (32,), dot products (32, 32) of ∇ log π, RLOO's gradient."""
    rollout = generate(
        policy,
        [tokenizer.encode_prompt(problem.question)],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=config.max_new_tokens,
        samples=32,
        generator=draw,
    )
    rewards = score(verifier, [problem], rollout, tokenizer)
    one = torch.ones(1, device=settings.device)
    slopes = []
    for row in torch.arange(32, device=settings.device).split(1):
        slopes.append(policy_gradient(policy, rollout.select(row), one))
    slopes = torch.stack(slopes)  # (32, weights)
    gradient = rloo.leave_one_out(rewards[None])[0] @ slopes / 32
    return rewards, slopes @ slopes.T, gradient


def answers_needed(policy, count: int, K: int = 8) -> dict[str, list[float]]:
    """Answers until signal = noise, {baseline: [value, low, high]}."""
    estimates = {**COMPARE, "leave-one-out": rloo.leave_one_out}
    squares: dict[str, list[float]] = {name: [] for name in estimates}
    total = 0.0
    own = 0.0
    draw = settings.generator("splits")
    for problem in tqdm(course.stream(settings.seed + 1, count), disable=None):
        rewards, dots, gradient = slopes_of(policy, problem, draw)
        total = total + gradient
        own += gradient.square().sum().item()
        for name, compare in estimates.items():
            advantages = compare(rewards.view(-1, K))  # (32/K, K)
            lengths = []  # squared, of the gradient of each group
            for group, A in enumerate(advantages):
                own_rows = slice(K * group, K * (group + 1))
                lengths.append((A @ dots[own_rows, own_rows] @ A).item() / K**2)
            squares[name].append(float(np.mean(lengths)))
    # The square of the sum, less what each problem adds by its own noise.
    signal = (total.square().sum().item() - own) / (count * (count - 1))
    signal = max(signal, 1e-6)  # of few problems it may come out below 0
    found = {}
    for name, each in squares.items():
        noise = K * (np.array(each) / signal - 1)
        found[name] = course.as_list(bootstrap(noise))
    return found


# %%
needed = plotting.load_record(settings.lesson).get("0", {}).get("needed", {})
if settings.measures_once:
    frozen = copy.deepcopy(reference).requires_grad_(True)
    needed = answers_needed(frozen, settings.pick(2, 0, 192))
    run["needed"] = needed
for name, (value, low, high) in needed.items():
    print(f"{name:<28}{value:>6.0f} answers [{low:.0f}, {high:.0f}]")

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
fast = replace(short, lr=1.6e-3)
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (fast, {}),
    "lr 3.2e-3": (replace(short, lr=3.2e-3), {}),
    "lr 1.6e-3, 64 x 4": (replace(fast, prompts=2 * fast.prompts, samples=4), {}),
    "lr 1.6e-3, 16 x 16": (replace(fast, prompts=fast.prompts // 2, samples=16), {}),
}
trials = tuning | {
    "no baseline": (short, {"compare": COMPARE["no baseline"]}),
    "no baseline, paid 0 or -1": (
        short,
        {"compare": COMPARE["no baseline, paid 0 or -1"]},
    ),
    "broken: slip of one row": (short, {"compare": slip_of_one_row}),
}
RLOO = "lr 8e-4"  # the settings of the run above
SHIFTED = "no baseline, paid 0 or -1"
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rloo, tuning)

# %% tags=["plot"]
figure, (bars,) = plotting.new_figure(
    1,
    "Without a baseline it matters where the zero of the reward lies; leave-one-out "
    "does not care",
    width=9.5,
    height=3.6,
)
if needed:
    colors = {"1 and 0": plotting.COLORS[0], "0 and −1": plotting.COLORS[1]}
    arms = {  # height of the bar: (estimate, right and wrong earn, its name above)
        0.0: ("no baseline", "1 and 0", "no baseline"),
        0.8: ("no baseline", "0 and −1", "no baseline, paid 0 or -1"),
        2.0: ("leave-one-out", "1 and 0", "leave-one-out"),
        2.8: ("leave-one-out", "0 and −1", "leave-one-out"),
    }
    for place, (arm, paid, name) in arms.items():
        value, low, high = needed[name]
        interval = [[value - low], [high - value]]
        bars.barh(place, value, 0.7, color=colors[paid], xerr=interval)
        bars.annotate(
            f"{arm}, right and wrong earn {paid} ",
            (0, place),
            ha="right",
            va="center",
            annotation_clip=False,
        )
        bars.annotate(f"  {value:.0f}", (high, place), va="center")
bars.set_yticks([])
bars.invert_yaxis()
bars.set(
    xlabel="answers until signal = noise, at the base (fewer is better; lines: 95 %)"
)
bars.margins(x=0.12)
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** How many answers it takes, at the base, until the gradient's signal is
# as large as its noise. The same answers, without a baseline and with the mean of the
# others; rewards of 1 and 0, and of 0 and −1. (With the mean of the others both are one
# number, as exercise 1 shows.)

# %%
if SHIFTED in tried:
    course.predict(
        "Accuracy without a baseline, paid 0 or −1:",
        my_guess,
        tried[SHIFTED]["accuracy"][0],
        key="tried > no baseline, paid 0 or -1",
    )
exam.compare_trials(tried, "no baseline", SHIFTED, "No baseline: 1 and 0, or 0 and −1")
exam.compare_trials(tried, RLOO, "no baseline", "Leave-one-out, or no baseline")

# %% [markdown]
# ## Break it: a slip of one row
#
# Let every answer get the advantage of its neighbour in the group. No shape changes, no
# error is raised, and the loss looks as before. First in the world of four answers,
# then in training.

# %%
print(f"slip of one row: {share_left(slip_of_one_row):+.3f} of the true gradient")
exam.compare_trials(tried, RLOO, "broken: slip of one row", "Right rows, or a slip")

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(2, "Settings tried, 4,096 answers each")
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default=RLOO, base=base)
plotting.draw_trial_prices(cost, tried)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% tags=["record"]
dead = series["dead"]
run["dead_first"] = dead[0]
run["dead_last"] = float(np.mean(dead[-5:]))
run["tried"] = {name: trial["accuracy"] for name, trial in tried.items()}

# %% [markdown]
# ## What we found
#
# * RLOO closes 0.81 [0.79, 0.84] of the gap: the mean of three seeds, with Student's
#   interval over them. It costs 1.72 nats, and the second skill falls from 0.76 to
#   0.66.
# * At the base, the estimate without a baseline takes 66 answers until the signal is as
#   large as the noise if right and wrong earn 1 and 0, and 305 if they earn 0 and −1,
#   which is the same as a baseline of 1: the right end of lesson 11's Figure 1.
#   Leave-one-out takes 97 either way.
# * It shows in training. After 4,096 answers, no baseline reaches 0.635 with rewards of
#   1 and 0, and 0.551 with 0 and −1. Leave-one-out reaches 0.613. The intervals part
#   the first two, and do not part the first from the last.
# * So leave-one-out is not the quietest here, but it does not depend on where the zero
#   of the reward lies, and nobody knows beforehand where it should. Any mean of rewards
#   has this advantage, the batch mean of lesson 11 too (0.602 there). That a mean of
#   its own for each problem is better than one for all, this task does not show.
# * The slip of one row leaves −1/(K − 1) of the gradient: −0.5 in groups of three, and
#   −1/7 in the groups of eight that we train with. What is left points the wrong way.
#   The policy ends at 0.146; noise alone had led to 0.259 in lesson 11.
# * In the first batch 0.16 of the groups are dead, and in the last five 0.64. The
#   better the policy, the more of what is drawn teaches nothing.

# %% tags=["record"]
course.check(
    "13_rloo",
    {
        "gap_closed": "0.81",
        "kl": "1.72",
        "second_skill before": "0.76",
        "second_skill after": "0.66",
        "needed > no baseline, seed 0": "66",
        "needed > no baseline, paid 0 or -1, seed 0": "305",
        "needed > leave-one-out, seed 0": "97",
        "dead_first, seed 0": "0.16",
        "dead_last, seed 0": "0.64",
    },
)
course.check(
    "13_rloo_trials",
    {
        "accuracy, seed no baseline": "0.635",
        "accuracy, seed no baseline, paid 0 or -1": "0.551",
        "accuracy, seed lr 8e-4": "0.613",
        "accuracy, seed broken: slip of one row": "0.146",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Should dead groups be thrown away and drawn again?** Skipping them changes nothing
# but the scale: they add 0. Drawing the *same* problem again until its group lives is
# another matter. Hard and easy problems then count as much as others, although their
# groups are mostly dead: each problem's gradient is divided by the chance that its
# group lives. That is the gradient of another objective than accuracy.
#
# **How many answers to a problem?** More make a better baseline and fewer problems. Of
# 256 answers, 64 x 4 and 32 x 8 came out alike here, and 16 x 16 below them (settings
# tried).

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Show that adding a constant to all rewards leaves A_i as it
# is.
#
# **Exercise 2 (derive).** With K = 2, and rewards 0.3 and 0, write down the two
# advantages.
#
# **Exercise 3 (break).** Subtract the *best* reward of the group instead of the mean of
# the others. Which problems lose most of their gradient?

# %% [markdown] tags=["answers"]
# **Answer 1.** r_i and the mean of the others grow by the same number.
#
# **Answer 2.** +0.3 and −0.3.
#
# **Answer 3.** The hard ones. A right answer then has advantage 0, and a wrong one is
# pushed down only if another one in its group is right. What is left of the gradient is
# 1 − (1 − p)^(K − 1), the chance that one of the K − 1 others is right: nearly nothing
# if p is small.
