# %% [markdown]
# # Lesson 00: The tour
#
# **Question.** Can a model that was taught to imitate learn, from nothing but "right"
# and "wrong", to show its work?
#
# Read before: nothing. Two minutes on two CPU cores, under 2 GB.
#
# You will see a small language model that answers school problems, mostly without any
# working and mostly wrong; some thirty updates of the simplest algorithm of
# reinforcement learning; and what the model does after them. Every other lesson takes
# one piece of this apart.

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

from tqdm import tqdm

from minialign import checkpoint, course, plotting
from minialign.algorithms import reinforce
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap, difference
from minialign.rewards import verifier

settings = course.setup("00_tour")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 256, 1000))
facts = course.base_facts()

# %% [markdown]
# ## What the base does
#
# The *base* learned by imitation (lesson 01) from teachers of whom most wrote only the
# result. `<<15+12=27>>` is a calculation, `####` stands before the answer. It writes
# *token* by token (a digit, a sign, a piece of a word); *sampled* means that each one
# is drawn with the probability the model gives it. `0.43 [0.40, 0.46]` is a measured
# value with its 95 % interval.

# %%
draw = settings.generator("before")
before = sample_answers(base, tokenizer, test, 4, generator=draw)
was = bootstrap(before.correct.mean(1))
print(f"The base gets {was} of its sampled answers right, "
      f"in {before.lengths.mean():.0f} tokens each.")  # fmt: skip

# %% [markdown]
# ## Predict
#
# Now the model answers fresh problems and a program says right (reward 1) or wrong
# (reward 0). An *update* takes 256 of its answers and makes the right ones a little
# more likely. A model seen as something that chooses its answers is called a *policy*.
# Nobody ever tells it to show its work.

# %%
my_guess = 0.5  # edit me: its accuracy after some thirty such updates

# %% [markdown]
# ## Thirty updates of REINFORCE

# %%
config = replace(reinforce.ReinforceConfig(), updates=settings.pick(2, 28, 28))
if settings.preset == "smoke":
    config = replace(config, prompts=4)
problems = course.stream(settings.seed, config.updates * config.prompts)
policy = copy.deepcopy(base)
series: dict[str, list[float]] = {}
training = reinforce.train(
    policy, tokenizer, problems, verifier, config,
    generator=settings.generator("sampling"),
)  # fmt: skip
for metrics in tqdm(training, total=config.updates, disable=None):
    course.keep_series(series, metrics)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## What it does now

# %%
draw = settings.generator("after")
after = sample_answers(policy, tokenizer, test, 4, generator=draw)
now = bootstrap(after.correct.mean(1))
gain = difference(after.correct.mean(1), before.correct.mean(1))
print(f"Sampled accuracy {was} -> {now}: a gain of {gain},\n"
      f"in {after.lengths.mean():.0f} tokens an answer "
      f"instead of {before.lengths.mean():.0f}.")  # fmt: skip
course.predict("Accuracy after training:", my_guess, now.value)

# %% [markdown]
# The same four problems, side by side. These are first samples, not chosen ones. There
# are four styles: *worked* (every step), *terse* (the result only), *careless* (forgets
# the last step) and *showy* (long and polite, often wrong).

# %%
for i in range(4):
    print(f"\n{test[i].question}  (right: {test[i].gold})")
    print(f"    {'before':<34}after")
    columns = [a.texts[i][0].split("\n") for a in (before, after)]
    for line in range(max(map(len, columns))):
        left, right = (c[line] if line < len(c) else "" for c in columns)
        print(f"    {left:<34}{right}")

# %% tags=["plot"]
figure, (rise, shares) = plotting.new_figure(
    2, f"From right and wrong alone, it learns to show its work: "
    f"{was.value:.2f} to {now.value:.2f}", width=5.2,
)  # fmt: skip
ours = {"series": series}
plotting.draw_runs(
    rise, [ours], "completions", "reward", "REINFORCE", plotting.COLORS[0], smooth=3
)
plotting.draw_base(rise, facts)
rise.set(xlabel="answers drawn", ylabel="share of answers right", ylim=(0, 1))
rise.set_title("accuracy on fresh problems")
rise.legend(loc="lower right")
plotting.draw_styles(shares, ours, "completions", smooth=3)
shares.set(xlabel="answers drawn")
shares.set_title("how it answers")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Left: the share of right answers among those drawn in training, against
# the number of answers drawn. Dashed: the base forced to work. Dotted: the base at its
# best temperature. Right: how the same answers were written.

# %%
lengths = [before.lengths.mean(), after.lengths.mean()]
run = {"config": asdict(config), "series": series, "lengths": lengths}
print(f"""
What happened? The base could do it all along: forced to begin with a calculation, it is
right on {facts["forced_worked"][0]:.0%} (the dashed line of the figure). It just
preferred not to. A reward that asks only for right answers changed the preference.""")
measure = f"sampled accuracy on {len(test)} test problems, 95 % over problems"
course.finish(settings, run, was, now, measure)

# %% [markdown]
# **Exercise 1 (look).** Which style goes first, and why that one?
#
# Or ask the two of them something: `python -m lessons ask "Mia has 3 bags of 5 apples
# and 2 boxes of 6 apples. How many apples is that?"`

# %% [markdown] tags=["answers"]
# **Answer 1.** The stacked figure shows it: the style that is frequent and mostly wrong
# has most to lose.
