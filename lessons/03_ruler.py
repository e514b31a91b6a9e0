# %% [markdown]
# # Lesson 03: The ruler (accuracy, pass@k, intervals)
#
# **Question.** How sure can 500 problems make us that one model is better than another?
#
# **Afterwards you can** say what pass@k and maj@k measure and estimate both, put an
# honest interval around an accuracy, and judge whether a difference is one.
#
# **Read before:** [lesson 01](01_sft.py): the base, sampled, greedy and forced answers.
# [Lesson 02](02_verifier.py): the verifier.
#
# **Papers:** Chen et al. 2021, [arXiv 2107.03374](https://arxiv.org/abs/2107.03374),
# equation 1, for pass@k. Wang et al. 2022, [arXiv
# 2203.11171](https://arxiv.org/abs/2203.11171), for the majority of k answers.
#
# **Look at:** how much more eight answers find than one.
#
# **Turn first:** the number of test problems in `load_problems`.
#
# **Time:** `quick` takes half a minute on two CPU cores, `full` two minutes. 1 GB.

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
from itertools import combinations
from math import comb

import numpy as np

from minialign import course, plotting
from minialign.evaluation import maj_at_k, pass_at_k, sample_answers
from minialign.intervals import bootstrap, difference

# %% tags=["setup"]
settings = course.setup("03_ruler")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 200, 500))
validation = course.load_problems("validation", settings.pick(8, 200, 500))
samples = settings.pick(4, 16, 64)

# %% [markdown]
# ## The idea
#
# An accuracy of 0.46 is a mean over problems that somebody happened to write down.
# Other problems would give another number. How far apart the two may be is decided
# above all by the number of *problems*, N. Drawing more answers to each helps less:
# eight answers to one problem are eight looks at the same difficulty. If p is the true
# accuracy, and each problem gets one answer, then 95 of 100 such measurements lie
# within
#
#     p ± 1.96 √(p (1 − p) / N)
#
# A *95 % interval* is written in brackets, as in 0.46 [0.43, 0.49] for 64 answers to
# each problem. We compute it by the *bootstrap*, which needs no formula: draw N
# problems out of our own N, with replacement, ten thousand times, and take the middle
# 95 % of the means.
#
# There is a second ruler. *pass@k* is the chance that at least one of k answers is
# right. It says what a model can do at all, and so what learning from rewards can find:
# an answer that is never drawn is never rewarded. Write C(n, k) for the number of ways
# to choose k of n answers. If c of n answers to a problem are right, then C(n − c, k)
# of all C(n, k) choices hold no right one, so
#
#     pass@k = 1 − C(n − c, k) / C(n, k)
#
# *maj@k* lets k answers vote and asks whether the most frequent number is right. It
# needs nobody who knows the solution. We estimate it by letting every k neighbours
# among the n answers vote, with a tie going to the number that came first.
#
# ## By hand
#
# Four answers to one question, one of them right, and k = 2. We list all pairs.

# %%
correct = [True, False, False, False]
pairs = list(combinations(correct, 2))
holding = sum(one or other for one, other in pairs)
print(f"{holding} of {len(pairs)} pairs hold the right answer: {holding / len(pairs)}")

by_formula = 1 - comb(4 - 1, 2) / comb(4, 2)
(by_library,) = pass_at_k(np.array([correct]), 2)
assert holding / len(pairs) == by_formula == by_library

# %% [markdown]
# If we knew the chance p to be right on this problem, pass@k would be 1 − (1 − p)^k. It
# is tempting to put the share c/n in place of p: here 1 − 0.75² = 0.44 instead of 0.5.
# On average that is too low, for it draws from the four answers with replacement, and
# may draw the same wrong one twice.
#
# ## Predict
#
# One sampled answer of the base is right with chance 0.46. If that were its chance on
# every single problem, eight answers would hold a right one with chance 1 − 0.54⁸ =
# 0.99. But problems differ. What is pass@8 of the base?

# %%
my_guess = 0.6  # edit me

# %% [markdown]
# ## Measure

# %%
draw = settings.generator("samples")
sampled = sample_answers(base, tokenizer, test, samples, generator=draw)
success = sampled.correct.mean(1)  # (N,) of each problem
gold = [problem.gold for problem in test]

counts = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
passed = {k: bootstrap(pass_at_k(sampled.correct, k)) for k in counts}
majority = {k: bootstrap(maj_at_k(sampled.votes, gold, k)) for k in counts}
for k in counts:
    print(f"k = {k:<3} pass@k {passed[k]}   maj@k {majority[k]}")

# %% [markdown]
# Two lines will stand beside the learning curve of every method. The first is the base
# *forced to work*: its answers are made to begin with `<<` and are greedy from there
# on, and then it is right nearly always. A method that comes up to this line has taught
# the base to do what it already could. From the base up to the line, we speak of the
# *gap*.

# %%
greedy = sample_answers(base, tokenizer, test, 1, greedy=True)
worked = sample_answers(base, tokenizer, test, 1, greedy=True, first_token="<<")
terse = sample_answers(base, tokenizer, test, 1, greedy=True, first_token="#### ")
kinds = {
    "sampled": sampled,
    "greedy": greedy,
    "forced to work": worked,
    "forced terse": terse,
}
for name, answers in kinds.items():
    print(f"{name:<16}{bootstrap(answers.correct.mean(1))}")

# %% [markdown]
# The second line is the base at its best *temperature*. Before a token is drawn, the
# logits are divided by the temperature: below 1 likely tokens become likelier still,
# and 0 stands for greedy. That costs nothing and trains nothing, so a method has to
# beat it. The best temperature is chosen on the validation problems and measured on the
# test problems. Had we chosen on the test problems, we would have reported the luckiest
# of seven numbers.


# %%
def accuracy_at(heat: float, problems, purpose: str) -> np.ndarray:
    """(N,): the share of right answers, 2 samples each or the greedy answer."""
    if heat == 0:
        answers = sample_answers(base, tokenizer, problems, 1, greedy=True)
    else:
        draw = settings.generator(purpose)
        answers = sample_answers(
            base, tokenizer, problems, 2, temperature=heat, generator=draw
        )
    return answers.correct.mean(1)


grid = {}
for heat in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
    grid[heat] = accuracy_at(heat, validation, f"temperature {heat}").mean()
    print(f"temperature {heat:<5} validation accuracy {grid[heat]:.3f}")
best_heat = max(grid, key=grid.get)
best = bootstrap(accuracy_at(best_heat, test, "best temperature"))
print(f"best: {best_heat}, on test {best}")

# %% tags=["plot"]
largest = counts[-1]
shown = min(8, largest)
figure, (axes,) = plotting.new_figure(
    1,
    f"One answer is right in {passed[1].value:.0%} of cases, at least one of {shown} "
    f"in {passed[shown].value:.0%}",
    width=9,
    height=4.4,
)
lines = {  # what a curve shows: (its estimates, color, side of its name)
    "pass@k: at least one is right": (passed, plotting.COLORS[0], "bottom"),
    "maj@k: the most frequent is right": (majority, plotting.COLORS[1], "top"),
}
for name, (line, color, side) in lines.items():
    values = [line[k].value for k in counts]
    lows = [line[k].low for k in counts]
    highs = [line[k].high for k in counts]
    axes.plot(counts, values, "o-", color=color)
    axes.fill_between(counts, lows, highs, color=color, alpha=0.2)
    axes.annotate(f"  {name}", (largest, values[-1]), color=color, va=side)
levels = {  # what a straight line shows: (height, style, where its name begins)
    "forced to work": (worked.correct.mean(), "--", 1),
    "best temperature": (best.value, ":", largest * 1.3),
}
for text, (height, style, place) in levels.items():
    axes.axhline(height, color="#444", ls=style, lw=1.2)
    plotting.label(axes, text, (place, height), (0, 3))
for k in (1, shown):
    height = passed[k].value
    axes.plot(k, height, "o", color=plotting.COLORS[0], ms=11)
    plotting.label(axes, f"{height:.0%}", (k, height), (6, -16))
axes.set(xscale="log", xlabel="k answers to a problem (log scale)", ylim=(0, 1.03))
axes.set(ylabel="share of problems, 95 % bands", xlim=(0.9, largest * 6))
plotting.in_percent(axes.yaxis)
axes.set_xticks(counts, counts)
axes.minorticks_off()
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** The base on the test problems, with 95 % bands over problems: the chance
# that k answers hold a right one, and that their majority is right. Dashed: one greedy
# answer, forced to work. Dotted: one answer at the best temperature.

# %%
course.predict(
    f"pass@{shown} of the base:", my_guess, passed[shown].value, key="pass_at_k > 8"
)

# %% [markdown]
# ## Break it: answers taken for the sample
#
# We have many thousands of answers. Why not an interval for so many independent ones?
# Because they are not independent. Such a claim can be tested. Split the problems into
# two halves, at random, and see how far apart the accuracies of the halves lie. An
# honest interval predicts how far that will be. (Below, a variance is doubled because
# two means differ by the noise of both.)

# %%
dice = np.random.default_rng(0)
half = len(test) // 2
apart = []
for _ in range(2_000):
    shuffled = dice.permutation(success)
    apart.append(shuffled[:half].mean() - shuffled[half : 2 * half].mean())
observed = 1.96 * float(np.std(apart))

p = success.mean()
by_answers = 1.96 * np.sqrt(2 * p * (1 - p) / (half * samples))
by_problems = 1.96 * np.sqrt(2 * success.var() / half)
print(f"two halves lie within ±{observed:.3f} of each other, 95 times in 100")
print(f"an interval over problems says ±{by_problems:.3f}")
print(f"an interval over answers says  ±{by_answers:.3f}")

# %% [markdown]
# ## How many problems are enough?
#
# The half-width of the interval falls with the square root of the number of problems.
# Drawing 64 answers to each, instead of one, makes it narrower by two fifths here;
# drawing more would change hardly anything, since each problem's own chance is known by
# then.

# %%
sizes = [n for n in (25, 50, 100, 200, 500) if n <= len(test)] or [len(test)]
half_widths = {}
exams = {"greedy, 1 answer": greedy, f"{samples} samples": sampled}
for name, answers in exams.items():
    half_widths[name] = []
    for n in sizes:
        found = bootstrap(answers.correct.mean(1)[:n])
        half_widths[name].append((found.high - found.low) / 2)
print(f"{'problems':<20}" + "".join(f"{n:>8}" for n in sizes))
for name, widths in half_widths.items():
    print(f"{name:<20}" + "".join(f"{width:>8.3f}" for width in widths))

# %% [markdown]
# There is a better way to compare two models than two intervals: ask both the *same*
# problems, subtract problem by problem, and put the interval around the difference.
# What makes a problem hard for both then cancels. (In the example it is little. Forced
# to work, the base is right nearly everywhere.)

# %%
gain = difference(worked.correct[:, 0], greedy.correct[:, 0])
print(f"forced to work {bootstrap(worked.correct[:, 0])}")
print(f"greedy         {bootstrap(greedy.correct[:, 0])}")
print(f"difference     {gain}")

# %% tags=["record"]
run = {
    "samples": samples,
    "length": course.as_list(bootstrap(sampled.lengths.mean(1))),
    "right_of_samples": sampled.correct.sum(1).tolist(),
    "pass_at_k": {k: course.as_list(passed[k]) for k in counts},
    "maj_at_k": {k: course.as_list(majority[k]) for k in counts},
    "forced_worked": course.as_list(bootstrap(worked.correct[:, 0])),
    "forced_terse": course.as_list(bootstrap(terse.correct[:, 0])),
    "greedy": course.as_list(bootstrap(greedy.correct[:, 0])),
    "best_temperature": {
        "temperature": best_heat,
        "accuracy": course.as_list(best),
        "grid": grid,
    },
    "halves": {
        "observed": observed,
        "by_problems": by_problems,
        "by_answers": by_answers,
    },
    "half_widths": half_widths,
    "sizes": sizes,
}

# %% [markdown]
# ## What we found
#
# * pass@8 of the base is 0.92, twice its 0.46 for a single answer, and pass@64 is
#   0.998: of 500 problems one was never solved. pass@8 is less than the 0.99 of
#   problems that are all alike: problems differ, and the hard ones take many answers.
# * The majority of 8 answers is right with 0.67. So seven more answers and a vote buy
#   0.21. With somebody who recognises the right answer among the eight, they buy 0.46.
# * Forced to work, the base is right on 0.95 of the problems. At the temperature that
#   was best on validation it has 0.50 [0.46, 0.54]: a small gain, if it is one.
# * Two halves of the test problems lie within ±0.053 of each other. The interval over
#   problems says so; the interval over answers promises ±0.011, a fifth of that.
# * How sure can 500 problems make us? Of an accuracy with one answer each, to ±0.044;
#   with 64 answers each, to ±0.027.

# %% tags=["record"]
course.check(
    "03_ruler",
    {
        "pass_at_k > 8": "0.92",
        "pass_at_k > 1": "0.46",
        "pass_at_k > 64": "0.998",
        "maj_at_k > 8": "0.67",
        "forced_worked": "0.95",
        "best_temperature > accuracy": "0.50",
        "halves > observed": "0.053",
        "halves > by_answers": "0.011",
    },
    own=run,
)

# %% [markdown]
# In this course, therefore: every comparison on record uses 500 test problems or more.
# What is said of a *method* rests on three training runs from different seeds, because
# the next run may differ by more than the next problems. Their mean gets an interval as
# well, Student's, which is wide for three numbers. (The base's own accuracy will appear
# as 0.44, 0.45 or 0.46 in these lessons, by the problems and the draw.) Two methods are
# called
#
# * *apart* if the interval of their difference excludes 0;
# * *equal* if it lies within ±0.05;
# * *apart by less than 0.05* if both hold, as with [0.02, 0.04];
# * *undecided* if neither does, as with [−0.03, 0.08].

# %% tags=["record"]
measure = f"sampled accuracy of the base, then its pass@{largest}"
course.finish(settings, run, bootstrap(success), passed[largest], measure)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **With 64 answers the base is right on nearly every problem. Is there anything left to
# learn?** Yes: to give those answers at the first attempt. Somebody has to recognise
# the right one among 64, and in use there is nobody. Whether training can also teach
# what was *not* among the 64 is another question, which this task cannot answer.
#
# **My two intervals overlap. Are the models equal?** Not therefore. Two intervals may
# overlap although the difference on the same problems excludes 0. And "no difference
# seen" is not "equal": for *equal*, the interval of the difference has to be narrow.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** How many problems does it take to tell accuracies of 0.45 and
# 0.48 apart, with one answer to each problem?
#
# **Exercise 2 (change).** Estimate pass@8 from 8 answers instead of 64. Does its mean
# change? Does its interval?
#
# **Exercise 3 (break).** Choose the best temperature on the test problems themselves.
# By how much does its accuracy there grow?

# %% [markdown] tags=["answers"]
# **Answer 1.** About 2,100, from 2 p (1 − p) · 1.96² / 0.03². Then the interval of the
# difference excludes 0 in half of all such comparisons. For four in five it takes
# 4,300, with (1.96 + 0.84)² in place of 1.96².
#
# **Answer 2.** Its mean does not, as the estimate is unbiased. Its interval grows a
# little: each problem's own share is now 0 or 1.
#
# **Answer 3.** By nothing if the same temperature wins, and otherwise by the luck of
# the draw. That it can only grow is the point.
