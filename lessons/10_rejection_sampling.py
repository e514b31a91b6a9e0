# %% [markdown]
# # Lesson 10: Keep what was right, imitate it (rejection sampling)
#
# **Question.** Can a policy learn from its own right answers?
#
# **Afterwards you can** turn a verifier into training data, say what one such step has
# to do with the gradient of accuracy, and tell whether it was the filter that taught.
#
# **Read before:** [lesson 01](01_sft.py): imitation. [Lesson 02](02_verifier.py): the
# verifier. [Lesson 03](03_ruler.py): intervals. [Lesson 04](04_frontier.py): KL.
#
# **Papers:** Dong et al. 2023 (RAFT), [arXiv
# 2304.06767](https://arxiv.org/abs/2304.06767), algorithm 1. Touvron et al. 2023 (Llama
# 2), [arXiv 2307.09288](https://arxiv.org/abs/2307.09288), section 3.2.3.
#
# **Look at:** the middle bar of Figure 1.
#
# **Turn first:** `select`, what is kept of each draw.
#
# **Time:** `quick` takes a minute on two CPU cores, `full` seven minutes on one, and
# seed 0 half an hour, for it makes the trials. 2 GB of memory.

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

import torch

from minialign import course, exam, plotting
from minialign.algorithms import rejection_sampling as rs
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import verifier

# %% tags=["setup"]
settings = course.setup("10_rejection_sampling")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = rs.RejectionSamplingConfig(
    rounds=settings.pick(2, 1, 4),
    prompts=settings.pick(4, 512, 512),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
    updates=settings.pick(1, 32, 32),
    batch_tokens=settings.pick(128, 2048, 2048),
)

# %% [markdown]
# ## The idea
#
# Imitation is only as good as what it imitates. But a policy that is right half of the
# time writes good demonstrations itself, if somebody sorts them. *Rejection sampling*
# draws several answers to each problem, keeps the right ones, imitates those for some
# steps, and starts again with the better policy:
#
#     maximise  Σ log π(y)   over the answers y that were drawn from π and kept
#
# Llama 2's chat model was trained like this before any reinforcement learning. The idea
# has been invented many times, and goes by the names of RAFT, STaR, ReST and expert
# iteration.
#
# It looks like imitation. On fresh answers it is more than that. Imitating the right
# ones moves the parameters along ∇ log π of each right answer. The mean of that over
# the policy's own answers is the gradient of the chance to be right. In symbols, with
# E_π for that mean, 1{right} for a number that is 1 for right answers and 0 for others,
# and ∇ log π = ∇π/π:
#
#     E_π[ 1{right} ∇ log π(y) ] = Σ_y π(y) 1{right} ∇π(y)/π(y) = ∇ Σ_{right} π(y)
#
# So the first step climbs accuracy itself. After it the policy has moved on and the
# answers have not: what makes this a method of its own is that it takes many steps on
# one draw. (Lesson 11 takes one step on each draw, and allows rewards other than 1 and
# 0.)
#
# ## By hand
#
# Of the four answers two are right. We may keep *all right ones*, or *one best answer*
# to each problem, chosen at random between the two.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    logprobs = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)
lengths = mask.sum(1)  # (4,)


def weights_of(kept: torch.Tensor) -> torch.Tensor:
    """What multiplies ∇ log π of each answer, the mean over kept tokens undone."""
    leaf = logprobs.clone().requires_grad_()
    count = int(lengths[kept].sum())
    rs.likelihood_loss(leaf, kept.float(), mask, count).backward()
    return (-count * leaf.grad).sum(1) / lengths


all_right = rs.select_right(rewards[None], lengths[None], torch.Generator())[0]
assert torch.allclose(weights_of(all_right), rewards)
one_best = torch.zeros(4)
for seed in range(100):
    chance = torch.Generator().manual_seed(seed)
    kept = rs.select_best(rewards[None], lengths[None], chance)[0]
    one_best += weights_of(kept) / 100
assert torch.allclose(one_best, rewards / 2, atol=0.1)
rows = {"filter, all right": weights_of(all_right), "filter, one best": one_best}
hand = course.hand_table(settings.lesson, rows, beside="01_sft")

# %% [markdown]
# Wrong answers have weight 0: nothing pushes them down, except that chances sum to 1.
# (The second row is the mean of 100 random choices. Each row is scaled to a largest
# weight of 1, so that both look alike.)
#
# Keeping one best answer per problem favours hard problems. Each problem counts once if
# it was solved at all, no matter how often. In symbols, with p for the chance to be
# right and K for the number of answers drawn, the first step then follows ∇p · (1 − (1
# − p)^K)/p instead of ∇p.
#
# ## Predict
#
# Is it the filter that teaches, or the additional training? A control tells. It keeps
# answers *at random*: as many tokens as all right answers hold, from right and wrong
# ones alike, and trains on them with the same steps. The base is right on 0.44 of its
# answers to the validation problems. Where will the control end?

# %%
my_guess = 0.5  # edit me

# %% [markdown]
# ## How methods are trained and examined here
#
# From here on every lesson trains a method, and all in the same way.
#
# * A training run starts from the base and draws 16,384 answers. At `quick` it is
#   shorter. Three runs, from the seeds 0, 1 and 2, are on record.
# * Before and after it, an *exam*: sampled and greedy answers to the test problems, and
#   the second skill. It prints how much of the *gap* to the base forced to work was
#   closed, the KL to the base, and, for the 500 problems of which lesson 03 knows the
#   chances, the accuracy there and the accuracy that so many nats could buy. *Area* is
#   the mean height of the learning curve.
# * *Trials* are short runs of 4,096 answers with another seed, judged on validation
#   problems. Some of them *tune* the method. From those its settings were chosen by one
#   rule for all: of the trials that are tied with the most accurate one, the fewest
#   optimiser steps win, and then the smallest learning rate. (A full run is four times
#   as long, and what is fast in a trial may break there.) Two trials are *tied* if the
#   95 % interval of their difference holds 0. The others answer a question of the
#   lesson. Trials take long, so that only seed 0 at `full` makes them. Every other run
#   shows those on record. A trial is one run with one seed, which is less than *apart*
#   in lesson 03 asks for. So of those that answer a question we only say "above" or
#   "below" where the intervals of two trials over problems do not overlap, and "not
#   told apart" where they do.
# * What a page shows is the run of seed 0. What it says under "What we found" are means
#   over the three seeds, unless it speaks of trials.
#
# ## Train
#
# A round draws 8 answers to each of 512 problems, and takes 32 steps of some 2,048
# answer tokens each on those that were kept.


# %%
def run_rejection(config, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.rounds * config.prompts)
    training = rs.train(
        policy,
        tokenizer,
        problems,
        verifier,
        config,
        generator=settings.generator("sampling"),
        reference=reference,
        **options,
    )
    return policy, course.follow(training, config.rounds * config.updates)


before = exam.exam(settings, tokenizer, reference, "before")
policy, series = run_rejection(config, settings)
course.save_policy(settings, policy, tokenizer)

# %% [markdown]
# Each round asks fresh problems, so what it draws measures the policy that the rounds
# before it trained. The exam measures the last one.

# %%
print("round  right   kept  problems nobody solved")
for i in range(0, len(series["round"]), config.updates):
    row = {name: series[name][i] for name in ("round", "reward", "pool", "unanswered")}
    print("{round:>5}{reward:>7.3f}{pool:>7}{unanswered:>24.3f}".format(**row))

after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
each = config.prompts * config.samples
drawn = [each * i for i in range(config.rounds + 1)]
heights = series["reward"][:: config.updates] + [float(after.sampled.correct.mean())]
curve = drawn, heights
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: the filter against chance
#
# The run above had four rounds. For a comparison one round is enough: 4,096 answers and
# 32 steps, from the base. Both arms draw the same answers, and take the same steps on
# as many tokens. The only difference is which answers they keep.

# %%
short = replace(config, rounds=1)
fewer, more = settings.pick((1, 2), (16, 64), (16, 64))
halves = replace(
    config, rounds=2, prompts=config.prompts // 2, updates=settings.pick(1, 16, 16)
)
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "lr 8e-4, 16 updates": (replace(short, lr=8e-4, updates=fewer), {}),
    "lr 8e-4, 64 updates": (replace(short, lr=8e-4, updates=more), {}),
}
trials = tuning | {
    "control: at random": (short, {"select": rs.select_random}),
    "one best per problem": (short, {"select": rs.select_best}),
    "two rounds, latest": (halves, {"keep": rs.keep_latest}),
    "two rounds, all": (halves, {"keep": rs.keep_all}),
}
FILTER = "lr 4e-4"  # the settings of the run above
CONTROL = "control: at random"
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rejection, tuning)

# %%
arms = plotting.load_record(settings.lesson).get("0", {}).get("arms", {})
if settings.measures_once and FILTER in tried and CONTROL in tried:
    validation = course.load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    base = sample_answers(reference, tokenizer, validation, 4, generator=draw)
    arms = {
        "the base": course.as_list(bootstrap(base.correct.mean(1))),
        "imitating at random": tried[CONTROL]["accuracy"],
        "imitating what was right": tried[FILTER]["accuracy"],
    }
    run["arms"] = arms
for name, accuracy in arms.items():
    print(f"{name:<28}{course.as_estimate(accuracy)}")

# %% tags=["plot"]
figure, (bars,) = plotting.new_figure(1, "", width=9, height=3.4)
if arms:
    _, at_random, by_right = arms.values()
    plotting.headline(
        figure,
        f"The filter teaches: {by_right[0]:.2f} right; had answers been kept at "
        f"random, {at_random[0]:.2f}",
    )
    colors = ("#8d99ae", plotting.COLORS[1], plotting.COLORS[2])
    for name, color in zip(arms, colors, strict=True):
        value, low, high = arms[name]
        bars.barh(name, value, color=color, xerr=[[value - low], [high - value]])
        bars.annotate(f"{value:.2f} ", (0.01, name), va="center", color="white")
bars.set(xlabel="validation problems, sampled answers: share right (lines: 95 %)")
bars.set(xlim=(0, 1))
bars.invert_yaxis()
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Sampled accuracy of the base, of the base trained on answers that were
# kept at random, and of the base trained on right answers. Same draw, steps and tokens;
# from the record, one seed.

# %%
if arms:
    course.predict(
        "Accuracy of the control:",
        my_guess,
        arms["imitating at random"][0],
        key="arms > imitating at random",
    )

# %% [markdown]
# ## Break it: other ways to keep
#
# Keep one best answer per problem instead of all right ones. Or spend the same 4,096
# answers in two rounds, and learn from the latest draw alone, or from both.

# %%
for name in ("one best per problem", "two rounds, latest", "two rounds, all"):
    exam.compare_trials(tried, name, FILTER, name)

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(2, "Settings tried, 4,096 answers each")
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default=FILTER, base=base)
plotting.draw_trial_prices(cost, tried)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we found
#
# * Rejection sampling closes 0.87 [0.85, 0.89] of the gap: the mean of three seeds,
#   with Student's interval over them. It costs 1.18 nats. The second skill, which
#   nobody asked about, has 0.74 left of 0.76.
# * It is the filter that teaches. The same number of steps on as many tokens, kept at
#   random, leaves the policy where it was: 0.436, with the base at 0.441. Kept because
#   they were right, they take it to 0.64 (validation, 4,096 answers, one seed).
# * We cannot tell whether it matters how right answers are chosen. One best per problem
#   came to 0.648, two rounds to 0.657 and 0.650, with intervals that overlap that of
#   the default.
# * Greedy answers change all at once. At the smallest learning rate 0.565 of the
#   sampled answers are right in the end, and 0.400 of the greedy ones; when 0.64 of the
#   sampled ones are, it is 0.932 of the greedy ones: a preference for working need only
#   pass one half on a problem to take the greedy answer there.
#
# In the papers, Llama 2 keeps the best answer and old rounds too, RAFT the best of each
# draw. On this task we cannot tell such choices apart. What neither paper shows is the
# control.

# %% tags=["record"]
course.check(
    "10_rejection_sampling",
    {
        "gap_closed": "0.87",
        "kl": "1.18",
        "second_skill before": "0.76",
        "second_skill after": "0.74",
        "arms > the base, seed 0": "0.441",
        "arms > imitating at random, seed 0": "0.436",
        "arms > imitating what was right, seed 0": "0.64",
    },
    own=run,
)
course.check(
    "10_rejection_sampling_trials",
    {
        "accuracy, seed one best per problem": "0.648",
        "accuracy, seed two rounds, latest": "0.657",
        "accuracy, seed two rounds, all": "0.650",
        "accuracy, seed lr 2e-4": "0.565",
        "greedy, seed lr 2e-4": "0.400",
        "greedy, seed lr 4e-4": "0.932",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **What if no answer to a problem is right?** Then nothing is kept of it, and it
# teaches nothing: we count such problems. That is the limit of every method that learns
# from its own answers. What is never drawn is never rewarded.
#
# **Does the policy not become ever surer of itself?** It does: imitating one's own
# answers, right or not, sharpens them. At random the effect is small here, as the
# control shows.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Show that one step on *one best of K* follows ∇p · (1 − (1 −
# p)^K)/p on a problem that is solved with chance p.
#
# **Exercise 2 (change).** In `rejection_sampling.train`, draw at temperature 0.7, train
# at 1 as before, and keep at random. Does accuracy rise without any filter?
#
# **Exercise 3 (break).** Use `anywhere` of lesson 02 as the reward. What does the
# filter keep now?

# %% [markdown] tags=["answers"]
# **Answer 1.** Some answer is right with chance 1 − (1 − p)^K. If so, the one that is
# kept is distributed as right answers are, so that its mean ∇ log π is ∇p/p. Multiply.
#
# **Answer 2.** A little: imitating colder answers makes the policy colder. It can gain
# no more than an accuracy of 0.50, which is what the base has at its best temperature
# (lesson 03).
#
# **Answer 3.** Showy answers that pass by the right number and hand in another.
