# %% [markdown]
# # Lesson 02: How answers are judged
#
# **Question.** Who says that an answer is right, and how sure can 500 problems make us
# that one policy is better than another?
#
# Read before: lesson 01 (the base model and its four styles).
#
# A *verifier* is a program that judges answers. Everything that follows is built on its
# verdicts: it is the reward that policies learn from and the ruler they are measured
# with. A policy that is optimised against a verifier will find every hole in it.
#
# You will see: what counts as an answer, which wrong answers a sloppy verifier would
# let through, what more samples can find, and how wide an honest interval is.
#
# Time: `quick` about 40 s on two CPU cores; `full` about five minutes. Memory: 1 GB.

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
import re
from collections import Counter

import numpy as np

from minialign import course, plotting
from minialign.evaluation import (
    dead_share,
    maj_at_k,
    pass_at_k,
    reward_variance_share,
    sample_answers,
)
from minialign.intervals import bootstrap
from minialign.problems import explain, extract_answer, verify

# %%
settings = course.setup("02_verifier")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 200, 500))
validation = course.load_problems("validation", settings.pick(8, 200, 500))
samples = settings.pick(4, 16, 64)

# %% [markdown]
# ## By hand
#
# The four answers that every lesson weighs, judged. Only the number after the last
# `####` counts: not the working, not the politeness. An answer that does not end within
# its budget of tokens earns 0, whatever it holds.

# %%
for name, text in course.HAND_ANSWERS.items():
    verdict = explain(course.HAND_PROBLEM, text)
    print(f"{name:<14} reward {verify(course.HAND_PROBLEM, text):d}   {verdict}")

# %% [markdown]
# The number is read as an exact fraction, so `18`, `18.0` and `36/2` are one answer.
# Real models write numbers in many ways, and most lines here were once judged wrongly
# by some program in wide use.

# %%
awkward = """#### 18.|#### 18.0|#### $18|####18|#### - 5|#### \u22125|#### 3/4
#### 18 ... #### 20|#### 007|#### 1,234|#### 12,34|#### ,|#### 18 apples
#### 18 red apples|10-5|it costs $29.00|#### 25%|#### nan|#### 3/0"""
for text in re.split(r"[|\n]", awkward):
    print(f"{text!r:<22} -> {extract_answer(text)}")

# %% [markdown]
# ## Predict
#
# The base answers a problem right in fewer than half of its samples. Draw eight
# samples: for what share of the problems is at least one of them right?

# %%
my_guess = 0.60  # edit me

# %% [markdown]
# ## Before: the base under the ruler

# %%
draw = settings.generator("samples")
sampled = sample_answers(base, tokenizer, test, samples, generator=draw)
greedy = sample_answers(base, tokenizer, test, 1, greedy=True)
worked = sample_answers(base, tokenizer, test, 1, greedy=True, first_token="<<")
terse = sample_answers(base, tokenizer, test, 1, greedy=True, first_token="#### ")
for name, answers in (
    ("sampled", sampled), ("greedy", greedy), ("forced worked", worked),
    ("forced terse", terse),
):  # fmt: skip
    accuracy = bootstrap(answers.correct.mean(1))
    format_rate = bootstrap(answers.formatted.mean(1))
    print(f"{name:<14} accuracy {accuracy}   format {format_rate}")

# %% [markdown]
# *Accuracy* and *format rate* are two numbers: an answer can be well-formed and wrong.
# Here nearly all are well-formed, so what is missing is not the format.
#
# Could a lower temperature do it, without any training? The best one is chosen on
# validation and measured on test. From now on every accuracy figure has two lines: the
# base at its best temperature, and the base forced to work. Up to the second, a method
# elicits what the base can do; beyond it, it teaches.

# %%
grid = {}
for heat in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
    draw = settings.generator(f"temperature {heat}")
    options = {"temperature": heat, "generator": draw}
    tried = sample_answers(base, tokenizer, validation, 2, **options)
    grid[heat] = float(tried.correct.mean())
grid[0.0] = float(sample_answers(base, tokenizer, validation, 1, greedy=True)
                  .correct.mean())  # fmt: skip
heat = max(grid, key=grid.get)
draw = settings.generator("best temperature")
options = {"temperature": heat, "generator": draw} if heat else {"greedy": True}
found = sample_answers(base, tokenizer, test, 2 if heat else 1, **options)
best = bootstrap(found.correct.mean(1))
for hot in sorted(grid):
    print(f"temperature {hot:<5} validation accuracy {grid[hot]:.3f}")
print(f"best: {heat}; on test {best}")

# %% [markdown]
# ## Auditing
#
# Never trust a verifier you have not watched. `explain` says why it refused an answer;
# here are the reasons for the base's samples, and one example of each style that
# failed.

# %%
reasons, examples = Counter(), {}
for n, problem in enumerate(test):
    for k, text in enumerate(sampled.texts[n]):
        reason = explain(problem, text)
        if sampled.truncated[n, k]:
            reason = "cut: no end within the budget"
        reasons[re.sub("^wrong: .*|: '.*", "", reason) or "wrong number"] += 1
        if not sampled.correct[n, k]:
            examples.setdefault(sampled.styles[n][k], (problem, text))
for reason, count in reasons.most_common():
    print(f"{count / reasons.total():>6.1%}  {reason}")
for style, (problem, text) in examples.items():
    print(f"--- {style}: {problem.question}\n{text}\n=> {explain(problem, text)}")

# %% [markdown]
# ## Break it
#
# A sloppy verifier: the answer counts if the right number stands *anywhere* in it. It
# sounds lenient. Look at whom it lets through: *showy* answers, which reach the right
# number and then hand in another. A policy trained on it would be paid for writing many
# numbers. (Careless answers mostly fail here too: they never reach the last number.)


# %%
def anywhere(problem, text: str) -> bool:
    """The sloppy one: is the right number among the numbers in the text?"""
    return str(problem.gold) in re.findall(r"[0-9]+", text)


fooled, wrong = Counter(), Counter()
for n, problem in enumerate(test):
    for k, text in enumerate(sampled.texts[n]):
        if not sampled.correct[n, k]:
            wrong[sampled.styles[n][k]] += 1
            fooled[sampled.styles[n][k]] += anywhere(problem, text)
for style, count in wrong.most_common():
    print(f"{style:<9} wrong {count:>6}, let through {fooled[style] / count:>6.1%}")
let_through = {style: [fooled[style], count] for style, count in wrong.items()}

# %% [markdown]
# ## What more samples find
#
# *pass@k*: the chance that at least one of k samples is right. *maj@k*: whether the
# most frequent answer among k is right. The first needs someone who recognises a right
# answer; the second needs nobody. We estimate both from all samples drawn.

# %%
counts = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
passed = {k: bootstrap(pass_at_k(sampled.correct, k)) for k in counts}
gold = [problem.gold for problem in test]
majority = {k: bootstrap(maj_at_k(sampled.votes, gold, k)) for k in counts}
for k in counts:
    print(f"k = {k:<3} pass@k {passed[k]}   maj@k {majority[k]}")
if 8 in passed:
    course.predict("pass@8 of the base:", my_guess, passed[8].value)

# %% [markdown]
# pass@k is what reinforcement lives on: what is never sampled can never be rewarded.
#
# The problems are not alike, though. *Dead* groups are those of which all 8 samples are
# right, or all wrong: comparing samples of one problem teaches nothing there.

# %%
success = sampled.correct.mean(1)
eight = sampled.correct[:, : min(8, samples)]
print(f"dead groups at K = {eight.shape[1]}: {dead_share(eight)}")
share = reward_variance_share(sampled.correct)
print(f"share of the reward's variance that lies between problems: {share}")

# %% [markdown]
# ## What 500 problems can tell
#
# Ask 500 *other* problems and the accuracy comes out a little different. The
# *bootstrap* asks by how much: it redraws the problems, with replacement, ten thousand
# times, and the middle 95 % of the means is the interval. Problems are redrawn, not
# single answers: eight answers to one problem are eight looks at the same difficulty.

# %%
sizes = [n for n in (25, 50, 100, 200, 500) if n <= len(test)] or [len(test)]
half_widths = {}
for answers, name in ((greedy, "greedy, 1 answer"), (sampled, f"{samples} samples")):
    found = [bootstrap(answers.correct.mean(1)[:n]) for n in sizes]
    half_widths[name] = [(e.high - e.low) / 2 for e in found]
    widths = ", ".join(
        f"{n}: ±{w:.3f}" for n, w in zip(sizes, half_widths[name], strict=True)
    )
    print(f"{name:<18} half-width by number of problems  {widths}")

# %% [markdown]
# Two policies closer than that need more problems, or a comparison problem by problem.
# So every comparison *on record* in this course uses 500 problems or more, sampled and
# greedy answers, and prints its interval; and what is said of a method rests on seeds.

# %%
figure, (left, middle, right) = plotting.new_figure(
    3,
    f"One sample is right {success.mean():.1%} of the time; for "
    f"{passed[counts[-1]].value:.1%} of the problems one of {counts[-1]} is",
)
left.hist(success, bins=np.linspace(0, 1, 17), color=plotting.COLORS[2])
left.set(xlabel=f"share of {samples} samples right", ylabel="problems")
left.set_title("some problems are easy for the base")
for name, line, color in (("pass@k", passed, 0), ("maj@k", majority, 1)):
    values = [line[k].value for k in counts]
    low, high = ([getattr(line[k], side) for k in counts] for side in ("low", "high"))
    middle.plot(counts, values, "o-", color=plotting.COLORS[color], label=name)
    middle.fill_between(counts, low, high, color=plotting.COLORS[color], alpha=0.2)
middle.axhline(worked.correct.mean(), color="#444", ls="--", lw=1.2)
middle.axhline(best.value, color="#444", ls=":", lw=1.2)
marks = {"forced to work": worked.correct.mean(), "best temperature": best.value}
for text, y in marks.items():
    middle.annotate(text, (counts[0], y + 0.01), fontsize=8)
middle.set(xscale="log", xlabel="samples k", ylabel="accuracy", ylim=(0, 1.03))
middle.set_xticks(counts, counts)
middle.minorticks_off()
middle.set_title("what more samples find (95 % bands)")
middle.legend(loc="lower right")

# %%
for number, (name, widths) in enumerate(half_widths.items()):
    right.plot(sizes, widths, "o-", color=plotting.COLORS[number], label=name)
right.set(xscale="log", xlabel="test problems", ylim=(0, None))
right.set(ylabel="half-width of the 95 % interval")
right.set_xticks(sizes, sizes)
right.minorticks_off()
right.set_title("what n problems can tell")
right.legend()
plotting.save_figure(figure, settings.figure_path)

# %%
run = {
    "samples": samples,
    "length": course.as_list(bootstrap(sampled.lengths.mean(1))),
    "right_of_samples": sampled.correct.sum(1).tolist(),
    "pass_at_k": {k: course.as_list(passed[k]) for k in counts},
    "maj_at_k": {k: course.as_list(majority[k]) for k in counts},
    "forced_worked": course.as_list(bootstrap(worked.correct[:, 0])),
    "forced_terse": course.as_list(bootstrap(terse.correct[:, 0])),
    "greedy": course.as_list(bootstrap(greedy.correct[:, 0])),
    "best_temperature": {"temperature": heat, "accuracy": course.as_list(best),
                         "grid": grid},
    "let_through": let_through,
    "half_widths": half_widths,
    "sizes": sizes,
}  # fmt: skip
measure = f"sampled accuracy of the base, then its pass@{counts[-1]}"
course.finish(settings, run, bootstrap(success), passed[counts[-1]], measure)

# %% [markdown]
# Exercises. (1) ReFT's authors gave 0.1 for a *wrong* number and 0 for none. What would
# a policy do with it on problems that it never gets right? (It always hands in a
# number, and soon any number.) (2) Which of the awkward lines would the pattern `####
# (\-?[0-9.,]+)`, first match, with string comparison judge wrongly? (`18.`, `18.0`,
# `$18`, `####18`, both minus signs, `3/4`, `007`, and 18 for the pair.) (3) How many
# problems does it take to tell 0.45 from 0.48? (With one answer each, about 2,100 for a
# 95 % interval that excludes 0 half of the time, 4,300 for four times in five: 2 p (1 −
# p) (1.96 + 0.84)² / 0.03².)
#
# Next: lesson 11 turns the verdicts into a reward.
