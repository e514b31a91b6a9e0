# %% [markdown]
# # Lesson 00: The tour
#
# **Question.** Can "right" and "wrong" alone teach a model to show its work?
#
# **Afterwards you can** say what the course is about, and ask a trained model and the
# model it came from a question of your own.
#
# **Read before:** nothing. It helps to know that a language model writes one token
# after the other, and that PyTorch trains networks by gradients.
#
# **Look at:** which band in the right panel gives way.
#
# **Turn first:** `updates` in the config.
#
# **Time:** two minutes on two CPU cores. Less than 2 GB of memory. Like every lesson it
# has two sizes: `--preset quick` is short, and `full` is the one whose results are on
# record. Both run on a CPU.

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

from minialign import checkpoint, course, plotting
from minialign.algorithms import reinforce
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap, difference
from minialign.rewards import verifier

# %% tags=["setup"]
settings = course.setup("00_tour")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 256, 1000))
facts = course.base_facts()

# %% [markdown]
# ## A model with a bad habit
#
# Our *base* is a small language model that answers word problems. It learned to do so
# by imitation, as lesson 01 shows, from teachers of whom many wrote down only the
# result. So it often does the same. Four styles occur among its answers:
#
# * *worked*: every calculation is written down, as in `<<3*5=15>>`, then the result
#   after `####`;
# * *terse*: the result alone;
# * *careless*: worked, but the last calculation is missing, and the result of the one
#   before is handed in as the answer;
# * *showy*: long and polite, and often wrong.
#
# Let us draw four answers of the base to each test problem. Each token is drawn with
# the probability that the model gives it, so two answers to one problem may differ.

# %%
draw = settings.generator("before")
before = sample_answers(base, tokenizer, test, 4, generator=draw)
accuracy_before = bootstrap(before.correct.mean(1))
tokens_before = before.lengths.mean()
print(f"right: {accuracy_before} of the answers, {tokens_before:.1f} tokens each")

# %% [markdown]
# The brackets hold a *95 % interval*: how far the number might be off, had we asked
# other problems.
#
# ## Reward what is right
#
# Now the model practises. It gets fresh problems and writes eight answers to each, and
# a program compares each result with the solution. A right answer earns a reward of 1,
# a wrong one 0. Then one training step makes every right answer a little likelier, and
# we start again with new problems:
#
#     repeat:  draw answers → reward 1 if right, else 0 → make right ones likelier
#
# This is REINFORCE, the simplest algorithm of reinforcement learning, and lesson 11
# takes it apart. Note what is missing. Nobody shows the model a good answer. The reward
# does not ask for work: a terse answer that is right earns as much as a worked one.
#
# ## Predict
#
# The base writes some 20 tokens to an answer. After 28 such steps, with 256 answers
# each, how many tokens will it write?

# %%
my_guess = 20  # edit me

# %% [markdown]
# ## Train

# %%
config = replace(reinforce.ReinforceConfig(), updates=settings.pick(2, 28, 28))
if settings.preset == "smoke":
    config = replace(config, prompts=4)
problems = course.stream(settings.seed, config.updates * config.prompts)
policy = copy.deepcopy(base)
training = reinforce.train(
    policy,
    tokenizer,
    problems,
    verifier,
    config,
    generator=settings.generator("sampling"),
)
series = course.follow(training, config.updates)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## The result

# %%
draw = settings.generator("after")
after = sample_answers(policy, tokenizer, test, 4, generator=draw)
accuracy_after = bootstrap(after.correct.mean(1))
tokens_after = after.lengths.mean()
gain = difference(after.correct.mean(1), before.correct.mean(1))
print(f"right: {accuracy_before} before, {accuracy_after} after, a gain of {gain}")

# %% tags=["plot"]
figure, (rise, shares) = plotting.new_figure(
    2,
    f"Told only right or wrong, it learns to show its work: "
    f"{accuracy_before.value:.2f} to {accuracy_after.value:.2f} right",
    width=5.4,
)
drawn = series["completions"]
blue = plotting.COLORS[0]
rise.plot(drawn, series["reward"], color=blue, alpha=0.3, label="each step")
smooth = plotting.smoothed(series["reward"], 5)
rise.plot(drawn, smooth, color=blue, lw=2.4, label="mean of five steps, one run")
exams = [accuracy_before.value, accuracy_after.value]
rise.plot([0, drawn[-1]], exams, "D", color=plotting.COLORS[1], label="test problems")
for at, value in zip((0, drawn[-1]), exams, strict=True):
    plotting.label(rise, f"{value:.2f}", (at, value), (6, -12))
forced = facts["forced_worked"][0]
rise.axhline(forced, color="#444", ls="--", lw=1.2)
rise.annotate("the same model, forced to work", (0, forced + 0.015), fontsize=9)
rise.legend(loc="lower right")
rise.set(xlabel="answers drawn", ylabel="share of answers right", ylim=(0, 1.03))
rise.set_title("how many are right")
plotting.draw_styles(shares, {"series": series}, "completions", smooth=3)
shares.set(xlabel="answers drawn")
shares.set_title("how they are written")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Left: the share of right answers among those drawn in training, which
# are to problems the model has never seen; the thick line averages five steps. Dashed:
# how often the base is right when its answers are made to begin with a calculation, and
# it goes on with the likeliest token every time. Right: the styles of the same answers.

# %%
course.predict(
    "Tokens an answer after training:", my_guess, tokens_after, key="tokens after"
)

# %% [markdown]
# Here are the first answers to four problems, before and after. Now and then an answer
# comes out broken: after 28 steps the model is on its way from one style to another.

# %%
for i in range(4):
    print(f"\n{test[i].question}  (right: {test[i].gold})")
    print(f"    {'before':<34}after")
    lines_before = before.texts[i][0].split("\n")
    lines_after = after.texts[i][0].split("\n")
    for row in range(max(len(lines_before), len(lines_after))):
        left = lines_before[row] if row < len(lines_before) else ""
        right = lines_after[row] if row < len(lines_after) else ""
        print(f"    {left:<34}{right}")

# %% tags=["record"]
run = {
    "config": asdict(config),
    "series": series,
    "tokens before": tokens_before,
    "tokens after": tokens_after,
    "sampled": [course.as_list(accuracy_before), course.as_list(accuracy_after)],
    "gain": course.as_list(gain),
}

# %% [markdown]
# ## What we found
#
# Accuracy rose from 0.45 to 0.72. The answers grew from 20.0 tokens to 31.2, because
# terse ones gave way to worked ones.
#
# The skill was there all along. When the base's answers are made to begin with a
# calculation, it is right on 0.95 of the problems. It merely preferred not to write
# any. A reward that asks only for right answers began to change the preference, because
# over many problems worked answers are right more often than terse ones. After 28 steps
# the change is not complete.
#
# That is what this course is about. Where the reward comes from, how it becomes a
# gradient, what the change costs, and how to do without reinforcement learning, are the
# questions of the lessons that follow.

# %% tags=["record"]
course.check(
    "00_tour",
    {
        "sampled before": "0.45",
        "sampled after": "0.72",
        "tokens before": "20.0",
        "tokens after": "31.2",
    },
    own=run,
)
course.check("03_ruler", {"forced_worked": "0.95"})
measure = f"sampled accuracy on {len(test)} test problems, 95 % over problems"
course.finish(settings, run, accuracy_before, accuracy_after, measure)

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (ask).** Ask both models something: `python -m lessons ask "Mia has 3
# bags of 5 apples and 2 boxes of 6 apples. How many apples is that?"`
#
# **Exercise 2 (explain).** Which style goes first, and why that one?
#
# **Exercise 3 (break).** Reward every answer with 1. What do you expect?

# %% [markdown] tags=["answers"]
# **Answer 1.** The base gives the result alone more often than not. Both answer
# greedily here, that is with the likeliest token at every step.
#
# **Answer 2.** The terse style. It is about as frequent as the worked one and less
# often right, so it has most to lose: what is not made likelier becomes rarer, since
# all chances sum to 1.
#
# **Answer 3.** On average nothing. Each drawn answer is pulled up and all others make
# room for it, but frequent answers are drawn more often, and in the mean the two cancel
# exactly. Lesson 11 proves it, and makes that run.
