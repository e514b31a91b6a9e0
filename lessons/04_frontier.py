# %% [markdown]
# # Lesson 04: What accuracy costs (KL and the frontier)
#
# **Question.** How right can a policy be without moving far from where it started?
#
# **Afterwards you can** say what a distance of one nat means, compute the best accuracy
# that any method can reach at a given distance, and place a method below that limit.
#
# **Read before:** [lesson 03](03_ruler.py): each test problem has its own chance to be
# solved by the base.
#
# **Papers:** Gao et al. 2022, [arXiv 2210.10760](https://arxiv.org/abs/2210.10760), who
# draw reward against KL. Beirami et al. 2024, [arXiv
# 2401.01879](https://arxiv.org/abs/2401.01879), for the best of n.
#
# **Look at:** how steep the frontier is at its beginning.
#
# **Turn first:** the grid of `n` in the best of n.
#
# **Time:** `quick` takes 15 seconds on two CPU cores, `full` half a minute. 1 GB.

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
import numpy as np

from minialign import course, plotting
from minialign.algorithms.rejection_sampling import best_of_n_accuracy, best_of_n_kl
from minialign.evaluation import (
    best_of_n,
    binary_kl,
    frontier,
    frontier_at,
    sample_answers,
)
from minialign.intervals import bootstrap

# %% tags=["setup"]
settings = course.setup("04_frontier")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device)
test = course.load_problems("test", settings.pick(8, 200, 500))
facts = course.base_facts()

# %% [markdown]
# ## The idea
#
# A language model that is trained further is called a *policy* from here on: it chooses
# its answers. Training moves it away from the base, and with the distance come risks.
# It forgets what nobody asked about, and it finds holes in the reward. So the question
# is not only how right a policy is, but what distance it paid.
#
# The distance is measured in answers. Let the policy answer, and ask both models how
# likely they find that answer. The mean difference of the logarithms is the *KL
# divergence* (lesson 01 had it in a fold):
#
#     KL(π ‖ base) = mean over answers y of π of ( log π(y) − log base(y) )   nats
#
# It is 0 if the two are the same, and never below. At 1 nat, the policy finds its own
# answers e = 2.7 times as likely as the base does, on (geometric) average.
#
# Now take one problem that the base solves with chance p, and ask for a policy that
# solves it with chance a. The cheapest such policy makes all right answers likelier by
# one and the same factor, and all wrong ones rarer by another. Its distance is that
# between two coins, right or wrong, which we write with small letters:
#
#     kl(a ‖ p) = a log(a/p) + (1 − a) log((1 − a)/(1 − p))
#
# Every other policy with this accuracy pays more, because it also prefers some right
# answers to others, or some wrong ones, which nobody asked for.
#
# Over many problems, a budget of nats has to be divided among them. In the best
# division, one more nat buys equally much accuracy on every problem: otherwise we would
# move it from where it buys less to where it buys more. Let β be that common exchange
# rate, the accuracy that the last nat buys everywhere. Then each problem by itself goes
# on until a − β kl(a ‖ p) no longer grows. The slope of kl(a ‖ p) is log(a/(1 − a)) −
# log(p/(1 − p)), so that this is where
#
#     log(a/(1 − a)) = log(p/(1 − p)) + 1/β
#
# So the best policy adds the same number, 1/β, to the *log-odds* of every problem, the
# logarithm of right to wrong. The smaller the price β of a nat, the further it goes.
# Drawn for all β, mean accuracy against mean KL is the *frontier*. No method gets above
# it.

# %% [markdown] tags=["folded"]
# **The derivation, for whole answers.** Write E[r] for the mean reward over a policy's
# own answers: here the chance to be right, since r is 1 for right answers and 0 for
# wrong ones. We look for the policy π that maximises E[r] − β KL(π ‖ base) on each
# problem. Write π*(y) = base(y) e^(r(y)/β) / Z, where Z makes the chances sum to 1.
# Then
#
#     E[r] − β KL(π ‖ base) = β log Z − β KL(π ‖ π*)
#
# for every π: put log base(y) = log π*(y) − r(y)/β + log Z into the left side. The
# right side is largest where KL(π ‖ π*) = 0, so π* is the best policy. It multiplies
# all right answers by e^(1/β)/Z and all wrong ones by 1/Z, so that a/(1 − a) = e^(1/β)
# p/(1 − p): the line above.
#
# That nobody pays less than kl(a ‖ p) for accuracy a is the log-sum inequality: merging
# all right answers into one, and all wrong ones into another, can only lower a KL.

# %% [markdown]
# ## By hand
#
# Let a base have three answers: one that works the problem out, one that guesses right,
# and one that is wrong. Two policies are right nine times in ten. The first raises both
# right answers by the same factor. The second puts nearly everything on the worked one.

# %%
answers = ("worked, right", "guessed, right", "wrong")
base_chances = np.array([0.30, 0.16, 0.54])
same_factor = np.array([0.9 * 0.30 / 0.46, 0.9 * 0.16 / 0.46, 0.1])
all_on_one = np.array([0.88, 0.02, 0.10])
for name, chances in {"same factor": same_factor, "all on one": all_on_one}.items():
    nats = np.sum(chances * np.log(chances / base_chances))
    print(f"{name:<12} right {chances[:2].sum():.2f}, KL {nats:.3f} nats")
print(f"kl(0.9 ‖ 0.46) = {binary_kl(0.9, 0.46):.3f}")
cheapest = np.sum(same_factor * np.log(same_factor / base_chances))
assert np.isclose(cheapest, binary_kl(0.9, 0.46))

# %% [markdown]
# ## Predict
#
# The base is right on 0.46 of its sampled answers. Half a nat is little: on a single
# problem of that difficulty it buys an accuracy of 0.93. Our 500 test problems are of
# all difficulties. How right can a policy be on them, half a nat from the base?

# %%
my_guess = 0.6  # edit me

# %% [markdown]
# ## The frontier of our base
#
# Nothing has to be trained for it. Lesson 03 counted how often the base solves each
# test problem, and that is all the formula asks for.

# %%
success = course.base_success()  # (500,) chances, from 64 answers each
nats, accuracy = frontier(success)
print("KL, nats    best accuracy")
budgets = (0.1, 0.25, 0.5, 1.0, 2.0)  # nats
limits = {f"{budget:g}": frontier_at(success, budget) for budget in budgets}
for price, limit in limits.items():
    print(f"{price:>8}    {limit:.3f}")

# %% [markdown]
# ## Who comes close without training: the best of n
#
# Draw n answers, and hand in one that is right if there is any, and any one if there is
# none. This takes a verifier at the time of use, somebody who knows the solution. The
# whole is a policy too, the *best of n*. Its accuracy is what lesson 03 called pass@n,
# computed here with c/64 in the place of each problem's chance. With 64 answers that
# reads only a little low: 0.912 for n = 8, where lesson 03 has 0.917. On one problem it
# is right with chance a = 1 − (1 − p)^n, and it prefers no right answer to another, so
# that it pays exactly kl(a ‖ p) there. Over many problems it falls short of the
# frontier, if only by a little: it draws n answers everywhere, while the frontier
# spends its nats where they buy most.

# %%
draw = settings.generator("best of n")
sampled = sample_answers(base, tokenizer, test, 8, generator=draw)
judged = sampled.correct  # (N, 8)
here_success = success[: len(test)]
law = {}
print(f"{'n':>3}{'accuracy':>10}{'KL':>8}{'frontier there':>16}   measured")
for n in (1, 2, 4, 8, 16, 32):
    right = float(best_of_n_accuracy(success, n).mean())
    paid = float(best_of_n_kl(success, n).mean())
    law[str(n)] = [right, paid, frontier_at(success, paid)]
    seen = ""
    if n <= judged.shape[1]:
        seen = f"{bootstrap(best_of_n(judged, judged, n))}"
    print(f"{n:>3}{right:>10.3f}{paid:>8.3f}{law[str(n)][2]:>16.3f}   {seen}")

# %% tags=["plot"]
half = limits["0.5"]
base = law["1"][0]
figure, (axes,) = plotting.new_figure(
    1,
    f"Half a nat could lift {base:.2f} to {half:.2f}, and best of n comes close",
    width=9,
    height=4.4,
)
axes.plot(nats, accuracy, color=plotting.COLORS[0], lw=2.5)
axes.fill_between(nats, accuracy, 1.0, color="#ddd", alpha=0.6)
axes.plot([0.5, 0.5, 0], [0.4, half, half], ":", color="#444", lw=1.2)
axes.plot(0.5, half, "o", color=plotting.COLORS[0], ms=8)
plotting.label(axes, f"{half:.2f}", (0.5, half), (-34, 5))
axes.annotate("no policy gets here", (0.1, 0.93), fontsize=11, color="#555")
middle = int(np.searchsorted(nats, 0.2))
axes.annotate(
    "frontier ",
    (nats[middle], accuracy[middle]),
    ha="right",
    va="bottom",
    color=plotting.COLORS[0],
)
for n, (right, paid, _) in law.items():
    axes.plot(paid, right, "o", color=plotting.COLORS[1])
    name = "the base" if n == "1" else f"best of {n}"
    plotting.label(axes, name, (paid, right), (8, -12), color=plotting.COLORS[1])
axes.set(xlabel="KL to the base, nats per answer", ylabel="accuracy on test problems")
axes.set(xlim=(-0.02, max(nats)), ylim=(0.4, 1.0))
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** The most accuracy that a mean KL to the base can buy on the test
# problems, and the best of n answers of the base, which needs no training.

# %%
course.predict(
    "Best accuracy half a nat away:", my_guess, limits["0.5"], key="frontier > 0.5"
)

# %% [markdown]
# ## Break it: prefer a style
#
# The frontier is reached by a policy that asks for one thing only, to be right. Suppose
# that a policy also prefers a style: it gives up all right answers that show no work.
# On top of kl(a ‖ p) it then pays for the preference: if w is the share of worked
# answers among the base's right ones, a · log(1/w) nats more. In the cell below it
# raises the odds of a worked right answer against a wrong one, by e^push on every
# problem, and we use one w for all problems.

# %%
styles = np.array(sampled.styles)
is_worked = styles == "worked"
share_worked = float(is_worked[sampled.correct].mean())  # w


def worked_alone(push: float) -> tuple[float, float]:
    """Mean KL and mean accuracy, if the log-odds of worked answers rise by `push`."""
    worked = success * share_worked  # (500,) chance of an answer right and worked
    a = worked / (worked + (1 - success) * np.exp(-push))
    paid = binary_kl(a, success) + a * np.log(1 / share_worked)
    return float(paid.mean()), float(a.mean())


print(f"of the base's right answers {share_worked:.2f} are worked")
print("raised by   accuracy    KL    frontier there")
fussy = {}
for push in (1, 2, 3, 4, 6):
    paid, right = worked_alone(push)
    fussy[str(push)] = [right, paid, frontier_at(success, paid)]
    print(f"{push:>9}{right:>11.3f}{paid:>6.2f}{fussy[str(push)][2]:>18.3f}")

# %% tags=["record"]
run = {
    "frontier": limits,
    "best_of_n": law,
    "share_worked": share_worked,
    "worked_alone": fussy,
    "best_of_8": course.as_list(bootstrap(best_of_n(judged, judged, 8))),
    "best_of_8_law": float(best_of_n_accuracy(here_success, 8).mean()),
}

# %% [markdown]
# ## What we found
#
# * Proved: no policy is above the frontier, and the policy that adds 1/β to the
#   log-odds of every problem is on it.
# * Measured: on our problems half a nat can buy an accuracy of 0.87, and a whole nat
#   nearly everything. Behind that lie 500 chances that are themselves estimates.
# * The best of 8 was measured at 0.916 [0.892, 0.940], and its law says 0.912. For the
#   0.643 nats that it pays, the frontier has 0.916: on these problems, drawing n
#   everywhere loses hardly anything.
# * A policy that prefers work pays for the preference. Of the base's right answers 0.82
#   are worked already, and still: with 0.42 nats such a policy is right on 0.76, where
#   0.83 could be had.

# %% tags=["record"]
course.check(
    "04_frontier",
    {
        "frontier > 0.5": "0.87",
        "best_of_8": "0.916",
        "best_of_8_law": "0.912",
        "share_worked": "0.82",
        "worked_alone > 2": "0.76",
    },
    own=run,
)

# %% [markdown]
# From one nat on the limit is so near to 1 that "below the frontier" says hardly more
# than "not always right". It is between 0 and 1 nat that the frontier tells methods
# apart. And the frontier speaks of this reward alone. What a policy forgets on its way
# does not show in it, which is why later lessons watch a *second skill* that no reward
# asks about.

# %% tags=["record"]
before = bootstrap(success)
after = bootstrap(best_of_n(judged, judged, 8))
course.finish(
    settings, run, before, after, "the base, and the best of 8 of its answers"
)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Papers give log n − (n − 1)/n as the KL of the best of n. Is it not?** It is a
# bound, and it is near the truth only if hardly any two answers earn the same. With
# rewards of 0 and 1 most do. On a problem with p = 0.5 the best of 1,000 has a KL of
# 0.69 nats, while the bound says 5.9.
#
# **Why KL(π ‖ base) and not the other way round?** Because we can draw from π: the mean
# is over the policy's own answers. The other KL would ask how the policy treats answers
# that it no longer gives, and is infinite as soon as it rules one of them out.

# %% [markdown] tags=["folded"]
# **In the cheatsheet.** The card of this method, for the [table of all](cheatsheet.md):
#
#     Card: Best of n
#         data: n own answers at the time of use
#         policy: –
#         comparison: the other n − 1
#         credit: answer
#         reference: kl(1 − (1 − p)^n ‖ p) for rewards of 0 and 1
#         loss: none, nothing is trained

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** What does it cost to be always right on a problem that the
# base solves with chance p? What does that say about problems it never solves?
#
# **Exercise 2 (change).** Draw the frontier for the second half of the problems alone.
# Why is it not the same curve?
#
# **Exercise 3 (break).** Let the policy prefer terse right answers instead of worked
# ones. What does the preference cost at an accuracy of 0.9?

# %% [markdown] tags=["answers"]
# **Answer 1.** −log p nats: kl(1 ‖ p). For p = 0 it is infinite. What the base never
# does, no finite KL can buy.
#
# **Answer 2.** The frontier depends on the difficulties. A set with more problems of
# middling difficulty gains faster.
#
# **Answer 3.** `share_worked` becomes that of the terse ones, 0.18 at most, and
# log(1/w) is at least 1.7. At an accuracy of 0.9 the preference alone costs 1.5 nats.
