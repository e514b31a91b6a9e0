# %% [markdown]
# # Lesson 02: The program that says "right" (verifiers)
#
# **Question.** Who says that an answer is right?
#
# **Afterwards you can** write a reward for a task whose answers can be checked, say
# which wrong answers it would pay for, and audit it on a model's own answers before
# anything is trained on it.
#
# **Read before:** [lesson 01](01_sft.py): the base model, and its four styles of
# answer.
#
# **Paper:** Cobbe et al. 2021, [arXiv 2110.14168](https://arxiv.org/abs/2110.14168),
# for the problems and the `####` that announces a result.
#
# **Look at:** which style of wrong answer a lenient judge lets through.
#
# **Turn first:** the pattern in `anywhere`, the lenient judge.
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
import re
from collections import Counter

from minialign import course, plotting
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap
from minialign.problems import explain, extract_answer, verify

# %% tags=["setup"]
settings = course.setup("02_verifier")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 200, 500))
samples = settings.pick(4, 16, 64)

# %% [markdown]
# ## The idea
#
# From here on a model will be told only whether its answers are right, and it will
# change so as to hear "right" more often. Whatever says "right" is therefore part of
# the training. In this course it is a program, a *verifier*. It pays a *reward* of 1 if
# the number after the last `####` equals the known solution, and 0 otherwise:
#
#     r(question, answer) = 1 if (number after the last ####) = solution, else 0
#
# The number is read as an exact fraction, so that `18`, `18.0` and `36/2` are the same.
# An answer that does not end within its budget of tokens earns 0, whatever it holds.
#
# A verifier never sees what we meant. It sees what we wrote. If it pays for something
# that we did not want, then a model that is trained on it will find out, because
# finding out is what training does.
#
# ## By hand
#
# Every lesson weighs the same four answers to one question. Two are right: one shows
# its work, the other is *terse* and gives only the result. Of the two wrong ones, the
# first is a bad guess, and the *careless* one forgets the last step.

# %%
print(course.HAND_PROBLEM.question)
for name, text in course.HAND_ANSWERS.items():
    reward = verify(course.HAND_PROBLEM, text)
    reason = explain(course.HAND_PROBLEM, text)
    print(f"{name:<14} reward {reward:d}   {reason}")

# %% [markdown]
# The terse right answer earns exactly as much as the one that shows its work. That is a
# decision: this verifier asks for results and not for working. Later lessons will show
# what comes of it.
#
# Models write numbers in many ways, and most lines of the next cell were once judged
# wrongly by some program in wide use. Here is what ours reads in them. Where it reads
# `None`, it cannot be sure what was meant: `12,34` is no way to write a number, after
# `18` there come words, `10-5` is not announced by `####`, and nothing can be divided
# by 0.

# %%
AWKWARD = [
    "#### 18.",
    "#### $18",
    "####18",
    "#### - 5",
    "#### \u22125",  # a minus sign that is no hyphen
    "#### 3/4",
    "#### 18 ... #### 20",
    "#### 1,234",
    "#### 12,34",
    "#### 18 red apples",
    "10-5",
    "#### 25%",
    "#### 3/0",
]
for text in AWKWARD:
    print(f"{text!r:<24} -> {extract_answer(text)}")

# %% [markdown]
# ## Predict
#
# A colleague finds this strict, and proposes a lenient verifier: an answer counts if
# the right number stands *anywhere* in it. The base has a polite, *showy* style: it
# talks at length and often hands in a wrong number. Of its wrong showy answers, how
# many would the lenient verifier let through?

# %%
my_guess = 0.3  # edit me: a share

# %% [markdown]
# ## Audit: what the base's answers earn, and why
#
# Before a verifier is trusted, somebody should read what it refuses. We draw many
# answers to each test problem, count the reasons, and show one wrong answer of each
# style.

# %%
draw = settings.generator("samples")
sampled = sample_answers(base, tokenizer, test, samples, generator=draw)

reasons: Counter[str] = Counter()
examples: dict[str, str] = {}
for n, problem in enumerate(test):
    for k, text in enumerate(sampled.texts[n]):
        reason, _, details = explain(problem, text).partition(":")
        if reason == "no answer":
            reason = f"no answer:{details.partition(':')[0]}"
        if sampled.truncated[n, k]:
            reason = "cut off: it did not end"
        reasons[reason] += 1
        if not sampled.correct[n, k]:
            shown = f"{problem.question}\n{text}\n=> {explain(problem, text)}"
            examples.setdefault(sampled.styles[n][k], shown)

for reason, count in reasons.most_common():
    print(f"{count / reasons.total():>6.1%}  {reason}")
for style in ("terse", "careless", "showy"):
    if style in examples:
        print(f"\n--- {style}\n{examples[style]}")

# %% [markdown]
# Hardly any answer fails because of its form. The base knows how to hand in a number;
# it hands in wrong ones.
#
# ## Break it: the lenient verifier
#
# Now the colleague's proposal, on the same answers.


# %%
def anywhere(problem, text: str) -> bool:
    """Is the right number among the numbers in the text?"""
    return str(problem.gold) in re.findall(r"[0-9]+", text)


wrong: Counter[str] = Counter()
fooled: Counter[str] = Counter()
for n, problem in enumerate(test):
    for k, text in enumerate(sampled.texts[n]):
        if not sampled.correct[n, k]:
            style = sampled.styles[n][k]
            wrong[style] += 1
            fooled[style] += anywhere(problem, text)

let_through = {style: [fooled[style], count] for style, count in wrong.items()}
shares = {style: passed / count for style, (passed, count) in let_through.items()}
for style in ("terse", "careless", "worked", "showy"):
    if style in shares:
        print(f"{style:<10} {wrong[style]:>6} wrong, let through {shares[style]:.2f}")

# %% tags=["plot"]
order = [style for style in ("terse", "careless", "worked", "showy") if style in shares]
most = max(order, key=shares.get)
figure, (bars,) = plotting.new_figure(
    1,
    f"A lenient verifier pays for {shares[most]:.0%} of wrong {most} answers",
    width=8,
    height=3.2,
)
colors = [plotting.STYLE_COLORS[style] for style in order]
bars.barh(order, [shares[style] for style in order], color=colors)
for row, style in enumerate(order):
    passed, count = let_through[style]
    bars.annotate(
        f" {shares[style]:.0%} of {count:,}", (shares[style], row), va="center"
    )
bars.set(xlabel="wrong answers that pass, for they hold the right number somewhere")
bars.set(xlim=(0, 1))
plotting.in_percent(bars.xaxis)
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Wrong answers of the base, by style, and the share of them in which the
# right number stands somewhere.

# %% tags=["record"]
run = {
    "samples": samples,
    "let_through": let_through,
    "let_through_share": shares,
    "formatted": float(sampled.formatted.mean()),
}
course.predict(
    "Wrong showy answers that the lenient verifier lets through:",
    my_guess,
    shares.get("showy", 0.0),
    key="let_through_share > showy",
)

# %% [markdown]
# ## What we found
#
# * Of the wrong showy answers, 0.81 hold the right number somewhere: they reach it,
#   talk on, and hand in another.
# * Careless answers hold it in 0.04 of the cases: they stop before the step that would
#   have given it. Terse ones hardly ever do, for their only number is the wrong one.
# * Of all answers of the base, 0.999 hand in a number in the form that was asked for.
#
# The lenient verifier looked equally lenient to every style. In fact it favours the one
# style that writes many numbers, and pays it for being wrong. A model that is trained
# on it is paid for writing many numbers. What it would make of that we have not tried
# here; exercise 3 asks you to.

# %% tags=["record"]
course.check(
    "02_verifier",
    {
        "let_through_share > showy": "0.81",
        "let_through_share > careless": "0.04",
        "formatted": "0.999",
    },
    own=run,
)
right = bootstrap(sampled.correct.mean(1))
form = bootstrap(sampled.formatted.mean(1))
course.finish(settings, run, right, form, "right answers of the base, then well-formed")

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Why not compare strings?** Because `18`, `18.0`, `$18` and `1,234` against `1234`
# would then be wrong, and the model would be taught to write numbers as we do instead
# of to find them. Comparing fractions also avoids the rounding of floats.
#
# **Why the last ####, and not the first?** A model that hands in two numbers has
# changed its mind, or is hedging. The last one is what it stands by. The choice must be
# made once and kept: a verifier that took whichever matches would be the lenient one.
#
# **Could a model judge instead of a program?** Yes. Nothing in the algorithms that
# follow knows where a reward comes from. But a model makes mistakes too, and its
# mistakes are harder to read than a pattern.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Some authors pay 0.1 for a *wrong* number and 0 for none.
# What does a policy learn from that on problems that it never gets right?
#
# **Exercise 2 (explain).** Which of the awkward lines would a program judge wrongly
# that looks for the pattern `#### (\-?[0-9.,]+)`, takes the first match and compares
# strings?
#
# **Exercise 3 (break).** Once you have read lesson 11, train REINFORCE there with
# `anywhere` as the reward. Watch the styles of its answers and their length.

# %% [markdown] tags=["answers"]
# **Answer 1.** To hand in a number, always, and soon any number: there, 0.1 is the most
# that can be earned, and every number earns it.
#
# **Answer 2.** `18.`, `$18`, `####18`, both minus signs, `3/4`, `1,234`, and 18 for the
# line that goes on to 20. It also reads a number in `18 red apples`, in `12,34` and in
# `3/0`, where ours reads none.
#
# **Answer 3.** If the answers become longer and more of them showy, while the strict
# accuracy does not rise, then you have seen a model find a hole in its reward.
