# %% [markdown]
# # Lesson 16: Graded on a curve (GRPO)
#
# **Question.** What do dividing by spread and by length change?
#
# **Afterwards you can** say which problems and which answers GRPO favours, derive both
# from its two divisions, and decide whether you want them.
#
# **Read before:** [lesson 13](13_rloo.py): groups, and dead groups. [Lesson
# 15](15_ppo.py): the ratio and the clip.
#
# **Papers:** Shao et al. 2024, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300),
# equations 3 and 4. Liu et al. 2025 (Dr. GRPO), [arXiv
# 2503.20783](https://arxiv.org/abs/2503.20783).
#
# **Look at:** the ends of the left panel, and the two outer pairs of bars in the right
# one.
#
# **Turn first:** `advantage` and `reduction` in the call of `grpo.train`.
#
# **Time:** `quick` takes a minute and a half on two CPU cores, `full` ten minutes on
# one, and seed 0 three quarters of an hour, for it makes the trials. 2 GB of memory.

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
from math import comb

import numpy as np
import torch

from minialign import course, exam, plotting
from minialign.algorithms import grpo
from minialign.logprobs import token_logprobs
from minialign.rewards import verifier

# %% tags=["setup"]
settings = course.setup("16_grpo")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = grpo.GRPOConfig(
    updates=settings.pick(2, 10, 64),
    prompts=settings.pick(2, 32, 32),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## The idea
#
# GRPO, *group relative policy optimisation*, is the algorithm that DeepSeek-R1 made
# famous. It draws a group of K answers to each problem, as RLOO does. It may take
# several clipped steps on each draw, as PPO does (lesson 14; its authors took one, we
# take two). It has no critic. What is its own are two divisions. The first divides the
# advantages of every group by the standard deviation of its rewards (PPO's whitening
# has one deviation for the whole draw, which changes the size of a step and nothing
# else),
#
#     A_i = (r_i − r̄) / std(r_1 … r_K)
#
# The second averages over the tokens of an answer where RLOO adds them up. With n_i for
# the length of answer i, and ρ for the ratio of lesson 14,
#
#     maximise  mean over answers of (1/n_i) Σ_t min( ρ A_i, clip(ρ, 1 − ε, 1 + ε) A_i )
#
# Both look like good manners. Both change what is asked for. The first decides how much
# a *problem* counts, the second how much a token of an *answer* does. *Dr. GRPO* ("GRPO
# done right") leaves both divisions out, and divides by a constant instead of n_i.
#
# ## By hand
#
# The four answers earn 1, 1, 0, 0. Their mean is 1/2 and their standard deviation is
# √(1/3) = 0.577, with the divisor K − 1. So the advantages are ±0.866, and each token
# of an answer gets that divided by the answer's length.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    old = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)
lengths = mask.sum(1)  # (4,)
signs = 2 * rewards - 1  # (4,)


def weigh(name: str, A: torch.Tensor, reduction) -> torch.Tensor:
    """The weight of each token of the four answers: (4,)."""
    logprobs = old.clone().requires_grad_()
    loss = grpo.grpo_loss(logprobs, old, A, mask, reduction(mask, 128))
    loss.backward()
    print(f"{name:<10} loss {loss.item():+.4f}")
    return -logprobs.grad.sum(1) / lengths  # alike at all tokens of an answer


divided = grpo.group_advantages(rewards[None])[0]  # (4,), one group of K = 4
centred = grpo.centred_advantages(rewards[None])[0]  # (4,)
rows = {
    "GRPO": weigh("GRPO", divided, grpo.per_sequence),
    "Dr. GRPO": weigh("Dr. GRPO", centred, grpo.by_constant),
}
assert torch.allclose(rows["GRPO"].float(), signs * 0.866 / lengths / 4, atol=1e-4)
assert torch.allclose(rows["Dr. GRPO"].float(), signs * 0.5 / 128 / 4, atol=1e-8)
hand = course.hand_table(settings.lesson, rows, beside="13_rloo")

# %% [markdown]
# Under GRPO, a token of the short right answer weighs several times as much as one of
# the long right answer, and a token of the short wrong answer is pushed down several
# times as hard as one of the long wrong one. So among right answers the short ones gain
# most, and among wrong answers the long ones lose least: who is going to be wrong does
# better to be wrong at length. Under Dr. GRPO neither preference exists.
#
# GRPO's loss is 0 here, because every ratio is 1, every answer counts once, and the
# advantages of a group sum to 0. It will be 0 in the first step of every draw: the loss
# of GRPO is no measure of progress. (Dr. GRPO's is not 0. It adds up tokens, and our
# wrong answers have fewer of them.)
#
# ## Predict
#
# How much does a *problem* count? Take a problem that is solved with chance p and draw
# K = 8 answers to it. The larger their advantages, whatever their sign, the harder the
# problem pulls. So call the expected mean of |A| its weight. Without the first
# division, a problem with p = 0.05 weighs 0.19 of one with p = 0.5. With it?

# %%
my_guess = 0.5  # edit me

# %% [markdown]
# ## Train
#
# Each update draws 8 answers to each of 32 problems and takes two steps on them.


# %%
def run_grpo(config, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    training = grpo.train(
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
policy, series = run_grpo(config, settings)
course.save_policy(settings, policy, tokenizer)
assert max(series["ratio_first"]) == 0  # before the first step of a draw, ρ is 1

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["reward"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: who counts


# %%
def weight_at(advantage, p: np.ndarray, K: int = 8) -> np.ndarray:
    """Mean |A| of an answer to a problem of chance p, exactly: (N,) -> (N,)."""
    groups = (torch.arange(K) < torch.arange(K + 1)[:, None]).double()  # (K + 1, K)
    sizes = advantage(groups).abs().mean(1).numpy()  # (K + 1,), by the number right
    total = np.zeros_like(p)
    for right in range(K + 1):
        chance = comb(K, right) * p**right * (1 - p) ** (K - right)
        total += chance * sizes[right]
    return total


FORMS = {
    "divided by std": grpo.group_advantages,
    "not divided": grpo.centred_advantages,
}
rare = np.array([0.05])
even = np.array([0.5])
relative = {}
for name, advantage in FORMS.items():
    for K in (8, 64):
        share = weight_at(advantage, rare, K) / weight_at(advantage, even, K)
        relative[f"{name}, K = {K}"] = float(share[0])
for name, share in relative.items():
    print(f"{name:<24} p = 0.05 weighs {share:.2f} of p = 0.5")

# %% tags=["plot"]
with_std = relative["divided by std, K = 8"]
without = relative["not divided, K = 8"]
figure, (problems, answers) = plotting.new_figure(
    2,
    f"Dividing by the deviation: rare successes weigh {with_std:.2f} instead of "
    f"{without:.2f}; by length: a short answer's tokens weigh more",
    width=6.4,
    height=4.2,
)
grid = np.linspace(0, 1, 101)
for (name, advantage), color in zip(FORMS.items(), plotting.COLORS, strict=False):
    weight = weight_at(advantage, grid)
    problems.plot(grid, weight / weight.max(), color=color, lw=2.5, label=name)
    rare = float((weight / weight.max())[5])
    problems.plot(grid[5], rare, "o", color=color)
    plotting.label(problems, f"{rare:.2f}", (grid[5], rare), (8, -6))
limit = 2 * np.sqrt(grid * (1 - grid))
problems.plot(grid, limit, ":", color="#888", label="divided, K very large")
problems.set(xlabel="chance p that an answer is right", ylabel="weight, largest 1")
problems.set(ylim=(0, 1.05), xlim=(0, 1))
problems.legend(loc="lower center")
problems.set_title("a problem's weight, K = 8")

places = np.arange(4)
for shift, (name, weights), color in zip(
    (-0.2, 0.2), rows.items(), plotting.COLORS, strict=False
):
    scaled = (weights / weights.abs().max()).tolist()
    answers.bar(places + shift, scaled, 0.38, color=color, label=name)
labels = [
    f"{name if ',' in name else name + ', wrong'}\n{int(count)} tokens"
    for name, count in zip(course.HAND_ANSWERS, lengths, strict=True)
]
answers.set_xticks(places, labels, fontsize=9)
answers.axhline(0, color="#444", lw=1)
answers.set(ylabel="weight, largest of a method 1", ylim=(-1.1, 1.1))
answers.set_title("the four answers of lesson 01, a token of each")
answers.legend(loc="upper right")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Left: how much a problem counts, by the chance that it is solved, with
# and without the division by the standard deviation. Right: how much a token of each of
# the four answers counts, under GRPO and under Dr. GRPO.

# %%
run["relative_weight"] = relative
course.predict(
    "Divided by the standard deviation, p = 0.05 weighs, of p = 0.5,",
    my_guess,
    relative["divided by std, K = 8"],
    key="relative_weight > divided by std, K = 8",
)

# %% [markdown]
# Without the division, the weight of a problem is 2 p (1 − p)(K − 1)/K. That is what
# the gradient of accuracy asks for: ∇p = p (1 − p) · (mean ∇ log π of right answers −
# that of wrong ones). With the division, and with very many answers, it goes as √(p (1
# − p)). Now ∇p/√(p (1 − p)) is the slope of 2 arcsin √p. So with the first division
# alone, with one step on each draw and with many answers to a problem, one climbs the
# mean of *that*, and not accuracy. With K = 8 much of the difference is gone. At p =
# 0.05 two groups in three are dead, and weigh nothing whether they are divided or not.
# The division can only enlarge the advantages in the groups that are left.
#
# ## Break it: take each part away
#
# Runs of 4,096 answers from the base, judged on validation, with four passes over each
# draw, so that the clip has something to do, and all at the learning rate that was
# tuned for GRPO. (AdamW divides the gradient by its own size, so that a constant factor
# in the loss hardly matters. Whether another rate would suit an arm better was not
# tried.) *No std* and *no length* lack one division, *Dr. GRPO* lacks both, and the
# last arm drops the clip. (The paper also has a price on KL in its loss, an estimate
# called k3. We leave it out, as most do now; [lesson 17](17_kl.py) shows what it does.)

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
four = replace(short, epochs=4)
tuning = {  # name: (config, other arguments)
    "2 epochs, lr 2e-4": (replace(short, lr=2e-4), {}),
    "2 epochs, lr 4e-4": (replace(short, lr=4e-4), {}),
    "2 epochs, lr 8e-4": (short, {}),
    "2 epochs, lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "1 epoch": (replace(short, epochs=1), {}),
    "4 epochs": (four, {}),
}
no_std = {"advantage": grpo.centred_advantages}
no_length = {"reduction": grpo.by_constant}
trials = tuning | {
    "no std": (four, no_std),
    "no length": (four, no_length),
    "Dr. GRPO": (four, no_std | no_length),
    "broken: no clip": (replace(four, eps_low=1.0, eps_high=1e9), {}),
}
DEFAULT = "2 epochs, lr 8e-4"  # the settings of the headline run
WHOLE = "4 epochs"  # what each of the arms takes a part away from
tried = exam.run_trials(settings, tokenizer, reference, trials, run_grpo, tuning)
for name in ("no std", "no length", "Dr. GRPO", "broken: no clip"):
    exam.compare_trials(tried, name, WHOLE, f"{name}, or GRPO")

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(2, "Settings tried, 4,096 answers each")
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default=DEFAULT, base=base)
near = [name for name in tried if tried[name]["kl"][0] < 10]
plotting.draw_trial_prices(cost, tried, near)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% tags=["record"]
run["tried"] = {
    name: {"accuracy": trial["accuracy"], "kl": trial["kl"], "length": trial["length"]}
    for name, trial in tried.items()
}
run["dead_first"] = series["dead"][0]
run["dead_last"] = float(np.mean(series["dead"][-5:]))

# %% [markdown]
# ## What we found
#
# * GRPO closes 0.86 [0.83, 0.89] of the gap: the mean of three seeds, with Student's
#   interval over them. It costs 1.68 nats. Of the second skill, 0.76 before, it has
#   0.36, 0.62 and 0.56 left, by seed: no other method so far has lost as much, nor as
#   unevenly.
# * Derived: dividing by the standard deviation raises the weight of a problem with p =
#   0.05 from 0.19 to 0.25 of one with p = 0.5 in groups of 8, and to 0.42 in groups of
#   64.
# * In training we see neither division. With four passes over each draw, the whole
#   reaches 0.745, without the first division 0.765, without the second 0.721, and
#   without both 0.715. All four intervals overlap. Nor do the lengths of all answers
#   differ: 33.3 to 33.6 tokens. (Those of the wrong ones alone we have not looked at.
#   The growth of wrong answers that made Dr. GRPO's case was seen on answers of
#   thousands of tokens, and ours have thirty.)
# * The clip matters where a draw serves four steps: without it the run breaks down to
#   0.130, far below the base.
# * In the first batch 0.16 of the groups are dead, and in the last five 0.70.
#
# All comparisons of settings are of one seed, 4,096 answers each, on validation
# problems. That a division cannot be seen here does not make it harmless elsewhere:
# what is derived holds wherever rewards are 0 and 1.

# %% tags=["record"]
course.check(
    "16_grpo",
    {
        "gap_closed": "0.86",
        "kl": "1.68",
        "second_skill before": "0.76",
        "second_skill after, seed 0": "0.36",
        "second_skill after, seed 1": "0.62",
        "second_skill after, seed 2": "0.56",
        "relative_weight > not divided, K = 8, seed 0": "0.19",
        "relative_weight > divided by std, K = 8, seed 0": "0.25",
        "relative_weight > divided by std, K = 64, seed 0": "0.42",
        "dead_first, seed 0": "0.16",
        "dead_last, seed 0": "0.70",
    },
)
course.check(
    "16_grpo_trials",
    {
        "accuracy, seed 4 epochs": "0.745",
        "accuracy, seed no std": "0.765",
        "accuracy, seed no length": "0.721",
        "accuracy, seed Dr. GRPO": "0.715",
        "accuracy, seed broken: no clip": "0.130",
        "length, seed Dr. GRPO": "33.3",
        "length, seed no std": "33.6",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Is GRPO's gradient biased?** With both divisions left out and one step a draw, its
# mean is the true gradient times a constant. As long as rewards are 0 or 1, the
# division by the standard deviation changes only how much each problem counts, and so
# turns the sum over problems. The division by length turns the gradient of each single
# problem, because it looks at the answer.
#
# **Which reduction is in use?** It differs, and it changes. The paper averages over
# each answer, the library TRL now averages over all tokens of a batch, and Dr. GRPO
# divides by a constant. Look before you compare learning rates.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Show that the weight of a problem without the division is 2 p
# (1 − p)(K − 1)/K.
#
# **Exercise 2 (change).** Give `grpo.train` an advantage of your own: the rank of an
# answer in its group, centred. When does it differ from Dr. GRPO's?
#
# **Exercise 3 (break).** Reward nothing but ending. What does the division by the
# standard deviation do once nearly all answers end?

# %% [markdown] tags=["answers"]
# **Answer 1.** |A| is 1 − c/K for the c right answers and c/K for the others, so its
# mean is 2 (c/K)(1 − c/K), and E[c/K (1 − c/K)] = p (1 − p)(K − 1)/K.
#
# **Answer 2.** Only for graded rewards. With rewards of 0 and 1, ties sharing their
# rank, it is K/2 times Dr. GRPO's.
#
# **Answer 3.** The rare group in which one answer does not end gets an advantage of
# −2.5 for it: the division makes the most of the last rare failures.
