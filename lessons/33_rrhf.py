# %% [markdown]
# # Lesson 33: Ranking one's own answers (RRHF)
#
# **Question.** If right answers are likelier per token, are they given more often?
#
# **Afterwards you can** write a ranking loss, say why an order of means is not a matter
# of odds, and take a method with two terms apart.
#
# **Read before:** [lesson 10](10_rejection_sampling.py): imitating what was right.
# [Lesson 30](30_dpo.py): learning from pairs.
#
# **Paper:** Yuan et al. 2023, [arXiv 2304.05302](https://arxiv.org/abs/2304.05302),
# equations 1 to 4.
#
# **Look at:** the bar of ranking alone, beside the base.
#
# **Turn first:** `sft_weight`, the weight of imitation.
#
# **Time:** `quick` takes a minute on two CPU cores, `full` ten minutes on one, and seed
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
import itertools
from collections import defaultdict
from dataclasses import asdict, replace

import numpy as np
import torch

from minialign import course, exam, plotting
from minialign.algorithms import rrhf
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap
from minialign.logprobs import masked_sum, token_logprobs
from minialign.problems import style_of, verify
from minialign.rewards import verifier
from minialign.sampling import generate

# %% tags=["setup"]
settings = course.setup("33_rrhf")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
config = rrhf.RRHFConfig(
    rounds=settings.pick(2, 1, 4),
    prompts=settings.pick(4, 512, 512),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
    updates=settings.pick(1, 16, 32),
    batch=settings.pick(2, 32, 32),
)

# %% [markdown]
# ## The idea
#
# RRHF, *rank responses to align with human feedback*, wants the order of a policy's own
# likings to be the order of the rewards. It measures the liking of an answer by its
# mean log-probability *per token*, p_i = log π(y_i)/n_i, so that long answers are not
# at a disadvantage. Wherever a worse answer has the higher p, the two are pushed
# towards each other until they have passed. A pair in the right order is left alone.
# And the best answer is imitated:
#
#     L = L_rank + w · L_sft
#     L_rank = Σ_{r_i < r_j} max(0, p_i − p_j),    L_sft = −p_best
#
# No reference is needed, no ratio and no critic. With rewards of 0 and 1, every pair is
# a right and a wrong answer. If several answers are equally good, a random one of them
# is imitated, and if none is right, none is. (The paper's L_sft adds up the tokens of
# the best answer. Ours takes one mean over the tokens of all best answers in a batch.)
#
# ## By hand
#
# Four answers, two right and two wrong: four pairs. We count, for each answer, the
# pairs in which it is pushed. The gradient of p is ∇ log π divided by the *length*, so
# the shorter the answer, the harder each of its tokens is pushed.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    logprobs = token_logprobs(
        reference, tokens.to(settings.device), mask.to(settings.device)
    ).cpu()  # (4, S)
lengths = mask.sum(1)  # (4,)
p = rrhf.mean_logprobs(logprobs, mask)  # (4,)
for name, mean, length in zip(course.HAND_ANSWERS, p, lengths, strict=True):
    print(f"{name:<14} {length:>2} tokens, mean log-probability {mean:.3f}")

pushes = torch.zeros(4)
for right in (0, 1):
    for wrong in (2, 3):
        if p[wrong] > p[right]:
            pushes[right] += 1
            pushes[wrong] -= 1
imitated = torch.tensor([1.0, 0, 0, 0]) / lengths  # the first of the right ones
weights = {"ranking alone": 0.0, "with imitation": config.sft_weight}
rows = {}
for name, weight in weights.items():
    expected = pushes / lengths + weight * imitated
    leaf = logprobs.clone().requires_grad_()
    rrhf.rrhf_loss(leaf, rewards[None], mask, sft_weight=weight).backward()
    assert torch.allclose(-leaf.grad, torch.where(mask, expected[:, None], 0.0))
    rows[f"RRHF, {name}"] = expected
hand = course.hand_table(settings.lesson, rows, beside="30_dpo")

# %% [markdown]
# The worked answer leads by far. Once it has begun a calculation, the model is nearly
# sure of every token that follows, so its mean is close to 0. So ranking has nothing to
# ask of it. What ranking pushes up is the other right answer, the terse one, until it
# has passed the careless one.
#
# ## Predict
#
# The base is right on 0.44 of its answers to the validation problems. Train it on 4,096
# of its own answers for 32 steps, with the ranking loss alone and at the learning rate
# of the whole method. What share of its answers will be right?

# %%
my_guess = 0.6  # edit me

# %% [markdown]
# ## Train
#
# A round draws 8 answers to each of 512 problems, and takes 32 steps on 32 problems
# each, with all their answers. Imitation has the weight w = 100, and 1,000 was tried
# too. (The paper adds up the tokens of a best answer, some 28 of them, where we take
# their mean. So its weight of 1 is our 28. Its code takes a mean as well, with a weight
# of 1.) A problem has up to 16 pairs, whose gradients add up in the ranking loss. With
# w = 1 we should expect them to outweigh imitation, but have not tried.


# %%
def run_rrhf(config, settings, **options) -> tuple:
    """From the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.rounds * config.prompts)
    training = rrhf.train(
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
policy, series = run_rrhf(config, settings)
course.save_policy(settings, policy, tokenizer)

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
each = config.prompts * config.samples
drawn = [each * i for i in range(config.rounds + 1)]
heights = series["reward"][:: config.updates] + [float(after.sampled.correct.mean())]
curve = drawn, heights
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## The result: each term by itself
#
# All arms start at the base, draw the same 4,096 answers and take 32 steps on them. The
# learning rate was tuned for both terms together, so ranking alone also gets a fourth
# and a sixteenth of it.


# %%
def unranked(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every answer is liked alike: no pair is out of order, and imitation is left."""
    return 0.0 * rrhf.mean_logprobs(logprobs, mask)


def padded_width(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As in the authors' code: everyone's length is the width of the batch."""
    return rrhf.summed_logprobs(logprobs, mask) / mask.shape[1]


short = replace(config, rounds=1)
brief = replace(short, updates=settings.pick(1, 8, 16))
alone = replace(short, sft_weight=0.0)
GENTLE = {"ranking alone, lr 2e-4": 2e-4, "ranking alone, lr 5e-5": 5e-5}
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(brief, lr=2e-4), {}),
    "lr 4e-4": (replace(brief, lr=4e-4), {}),
    "lr 8e-4": (replace(brief, lr=8e-4), {}),
    "lr 1.6e-3": (replace(brief, lr=1.6e-3), {}),
    "imitation x 1000": (replace(brief, sft_weight=1000.0, max_grad_norm=800.0), {}),
    "32 updates": (short, {}),
}
trials = tuning | {
    "ranking alone": (alone, {}),
    "imitation alone": (short, {"likelihood": unranked}),
    "ranking alone, padded width": (alone, {"likelihood": padded_width}),
}
for name, lr in GENTLE.items():
    trials[name] = (replace(alone, lr=lr), {})
BOTH = "32 updates"  # the settings of the headline run
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rrhf, tuning)

# %%
arms = plotting.load_record(settings.lesson).get("0", {}).get("arms", {})
ALONE = ["ranking alone", *GENTLE]
if settings.measures_once and {*ALONE, "imitation alone", BOTH} <= set(tried):
    validation = course.load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    base = sample_answers(reference, tokenizer, validation, 4, generator=draw)
    arms = {
        "the base": course.as_list(bootstrap(base.correct.mean(1))),
        **{name: tried[name]["accuracy"] for name in ALONE},
        "imitation alone": tried["imitation alone"]["accuracy"],
        "both: RRHF": tried[BOTH]["accuracy"],
    }
    run["arms"] = arms
for name, accuracy in arms.items():
    print(f"{name:<26}{course.as_estimate(accuracy)}")
exam.compare_trials(tried, BOTH, "imitation alone", "What ranking adds to imitation")
exam.compare_trials(tried, "imitation alone", "ranking alone", "Either term by itself")

# %% tags=["plot"]
figure, (bars,) = plotting.new_figure(1, "", width=9, height=3.6)
if arms:
    start, _, highest = arms["the base"]
    ranking, lowest, _ = max(arms[name] for name in ALONE)
    found = "lifts the base" if lowest > highest else "does not lift the base"
    worst = min(arms[name][0] for name in ALONE)
    imitated = arms["imitation alone"][0]
    plotting.headline(
        figure,
        f"Ranking alone {found} ({worst:.2f} to {ranking:.2f}, the base {start:.2f}); "
        f"imitation alone reaches {imitated:.2f}",
    )
    colors = dict.fromkeys(ALONE, plotting.COLORS[1])
    colors["the base"] = "#8d99ae"
    colors["imitation alone"] = plotting.COLORS[2]
    colors["both: RRHF"] = plotting.COLORS[0]
    for name, (value, low, high) in arms.items():
        color = colors[name]
        bars.barh(name, value, color=color, xerr=[[value - low], [high - value]])
        bars.annotate(f"{value:.2f} ", (0.01, name), va="center", color="white")
bars.set(xlabel="validation problems, sampled answers: share right (lines: 95 %)")
bars.set(xlim=(0, 1))
bars.invert_yaxis()
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Sampled accuracy of the base, and of the base trained with the ranking
# loss alone at three learning rates, with imitation alone, and with both. Same draw,
# same number of steps, one seed.

# %%
if arms:
    course.predict(
        "Accuracy after ranking alone:",
        my_guess,
        arms["ranking alone"][0],
        key="arms > ranking alone",
    )

# %% [markdown]
# Why does ranking alone do no better? Let us look at what it had to ask. We draw fresh
# answers of the base, pair each right one with each wrong one to the same problem, and
# count the pairs in the wrong order: first by kind of pair, at the base, and then over
# the steps of training, in the answers that were trained on.


# %%
def order_of_pairs() -> dict[str, list[int]]:
    """'right style > wrong style': [pairs, those in the wrong order]."""
    problems = course.stream(settings.seed + 1, settings.pick(4, 128, 256))
    rollout = generate(
        reference,
        [tokenizer.encode_prompt(problem.question) for problem in problems],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=128,
        samples=8,
        generator=settings.generator("weigh"),
    )
    means = masked_sum(rollout.logprobs, rollout.mask) / rollout.mask.sum(1)  # (B,)
    styles = []
    verdicts = []
    for row, ids in enumerate(rollout.responses()):
        problem = problems[row // 8]
        text = tokenizer.decode_response(ids)
        styles.append(style_of(problem, text))
        verdicts.append(verify(problem, text) and not rollout.truncated[row])
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for first in range(0, len(styles), 8):
        group = range(first, first + 8)
        for i, j in itertools.product(group, group):
            if verdicts[i] and not verdicts[j]:
                pair = found[f"{styles[i]} > {styles[j]}"]
                pair[0] += 1
                pair[1] += int(means[j] > means[i])
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


pairs = order_of_pairs()
total = max(sum(count for count, _ in pairs.values()), 1)
print(f"{'right > wrong':<24}{'pairs':>7}{'in the wrong order':>20}")
for name, (count, wrong) in pairs.items():
    if count > total / 100:
        print(f"{name:<24}{count:>7}{wrong / count:>20.2f}")
run["pairs"] = pairs
run["in_order"] = 1 - sum(wrong for _, wrong in pairs.values()) / total
print(f"{run['in_order']:.2f} of the pairs are in the right order already")
run["wrong_first"] = {}
run["wrong_last"] = {}
for name in [name for name in (*ALONE, BOTH) if name in tried]:
    wrong = tried[name]["series"]["violated"]
    first = float(np.mean(wrong[:4]))
    last = float(np.mean(wrong[-4:]))
    run["wrong_first"][name] = first
    run["wrong_last"][name] = last
    print(f"{name:<24}in the wrong order: {first:.2f} at first, {last:.2f} at last")

# %% [markdown]
# ## Break it: another length
#
# The authors' code divides by the padded width of the batch in place of the answer's
# length (it overwrites the labels that mark padding before it counts them). Then p is a
# sum in disguise, and long answers are at a disadvantage after all. We try it on
# ranking alone, where imitation hides nothing; the authors have both terms.

# %%
wide = "ranking alone, padded width"
exam.compare_trials(tried, wide, "ranking alone", "The padded width, or the length")
for name in (wide, "ranking alone", "imitation alone"):
    if name in tried:
        print(f"{name}: {tried[name]['length']:.1f} tokens an answer")

# %% tags=["trials"]
exam.print_trials(tried)
figure, (accuracy, cost) = plotting.new_figure(2, "Settings tried, 4,096 answers each")
base = exam.base_on_validation()
plotting.draw_trials(accuracy, tried, default=BOTH, base=base)
plotting.draw_trial_prices(cost, tried)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_trials.png")
plotting.save_figure(figure, trials_path)

# %% tags=["record"]
run["tried"] = {
    name: {"accuracy": trial["accuracy"], "length": trial["length"]}
    for name, trial in tried.items()
}

# %% [markdown]
# ## What we found
#
# * RRHF closes 0.82 [0.77, 0.88] of the gap: the mean of three seeds, with Student's
#   interval over them. It costs 1.50 nats, and the second skill falls from 0.76 to
#   0.68.
# * Imitation does it. Alone it reaches 0.638, with ranking 0.626, and the intervals
#   overlap. With the weight of 100 that we train with, imitation outweighs ranking by
#   more than ten to one on the four answers weighed by hand, so this says little about
#   the authors' smaller weights, which we did not try.
# * Ranking alone falls from 0.441 to 0.256, and at a sixteenth of the learning rate it
#   stays where it was, at 0.441.
# * Why does it not rise? Ranking had little to ask: 0.88 of the base's pairs were in
#   the right order before any training, and of the 1,091 pairs of a worked right answer
#   and a terse wrong one, not one was out of order. How often an answer is drawn
#   depends on the *sum* of its log-probabilities, and there the first token, `<<` or
#   `####`, counts in full. The mean over thirty tokens hardly notices that one. So a
#   policy can hold the worked answers to be the better ones and go on being terse.
# * What ranking does ask for is mostly one terse answer above another, or above a
#   careless one. Nor does it get what it asks for: of the pairs that it trains on 0.09
#   are in the wrong order at first, and 0.10 at last. Its answers become shorter
#   instead, 12.9 tokens where imitation alone has 28.4. Why they do, and why accuracy
#   falls with that, we have not measured.
# * Divided by the padded width, ranking alone reaches 0.495, above 0.256: then it
#   orders by sums, in which the first token counts in full. (It also divides every push
#   by a larger number. Which of the two it is we have not tried.)
#
# All arms are of one seed, 4,096 answers each, on validation problems. The authors rank
# answers of several sources by a graded reward. With our own answers and rewards of 0
# and 1 there is nothing to rank but right above wrong, and RRHF comes close to the
# rejection sampling of lesson 10, with one best answer to each problem.

# %% tags=["record"]
course.check(
    "33_rrhf",
    {
        "gap_closed": "0.82",
        "kl": "1.50",
        "second_skill before": "0.76",
        "second_skill after": "0.68",
        "arms > imitation alone, seed 0": "0.638",
        "arms > both: RRHF, seed 0": "0.626",
        "arms > the base, seed 0": "0.441",
        "arms > ranking alone, seed 0": "0.256",
        "in_order, seed 0": "0.88",
        "wrong_first > ranking alone, seed 0": "0.09",
        "wrong_last > ranking alone, seed 0": "0.10",
    },
)
course.check(
    "33_rrhf_trials",
    {
        "accuracy, seed ranking alone, lr 5e-5": "0.441",
        "length, seed ranking alone": "12.9",
        "length, seed imitation alone": "28.4",
        "accuracy, seed ranking alone, padded width": "0.495",
    },
)

# %% tags=["record"]
exam.finish(settings, run, before, after)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Whose answers are ranked?** In the paper those of several sources, drawn once. We
# draw from the policy, anew in each round, so that it is compared with the other
# methods on equal terms. `given` takes answers from elsewhere.
#
# **What is the right weight of imitation?** The authors' code has 1, with a mean over
# tokens that counts padding too. The paper adds up the tokens of the best answer, which
# comes to some 28 in our units. We have 100. Look at the settings tried before you
# trust any of them.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** To some question a policy gives a worked right answer with
# chance 0.1, and terse wrong ones with chance 0.9 in all. Can the worked one have a
# higher mean log-probability than each of the wrong ones?
#
# **Exercise 2 (change).** Rank by sums (`likelihood=rrhf.summed_logprobs`). Which pairs
# are out of order now?
#
# **Exercise 3 (explain).** A ranking loss may ask for a lead: max(0, m + p_i − p_j),
# with a *margin* m, which is 0 here. Why would m = 1 nat per token be much to ask?

# %% [markdown] tags=["answers"]
# **Answer 1.** Yes. Ten tokens of probability 0.794 each make 0.1, with a mean of −0.23
# nats. Let the 0.9 be shared by ten numbers of two tokens each, the end included. Each
# of those answers has chance 0.09, and a mean of log(0.09)/2 = −1.2 nats.
#
# **Answer 2.** More of those with a worked right answer, since every token lowers a
# sum. Of our four hand-made answers none: the terse wrong one is too unlikely.
#
# **Answer 3.** Sure tokens have no room to rise. Most of the margin must come from
# pushing the worse answer down.
