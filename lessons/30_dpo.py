# %% [markdown]
# # Lesson 30: Learning from preferences (DPO)
#
# **Question.** Can a policy learn from pairs of answers alone, told only which of the
# two was better, with no reward in the loss and no new answers within a round?
#
# Read before: lesson 11 (REINFORCE, KL, the frontier) and lesson 02 (the verifier).
#
# DPO takes pairs (chosen, rejected) and asks the policy to favour the chosen answer
# more than a frozen *reference* does. What is gained is that training needs no sampler;
# what is lost, that the pairs grow old while the policy moves on.
#
# You will see: one round of old pairs against rounds of fresh ones; what beta does; and
# what becomes of the answers that were *chosen*.
#
# Time: `quick` about 50 s on two CPU cores; `full` some four minutes a seed there (the
# trials are in seed 0). Memory: about 2 GB.

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
import copy
import itertools
import time
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import dpo
from minialign.evaluation import frontier
from minialign.intervals import bootstrap
from minialign.logprobs import masked_sum, token_logprobs
from minialign.problems import STYLES, demonstration, style_of, verify
from minialign.rewards import verifier
from minialign.sampling import generate

# %%
settings = course.setup("30_dpo")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = dpo.DPOConfig(
    rounds=settings.pick(2, 1, 4),
    prompts=settings.pick(4, 512, 512),
    max_new_tokens=settings.pick(32, 128, 128),
    updates=settings.pick(1, 64, 128),
    batch=settings.pick(2, 32, 32),
)

# %% [markdown]
# ## By hand
#
# Two pairs: worked and right over terse and wrong; terse and right over careless. With
# h = how much more the policy prefers the chosen answer than the reference does, in
# nats, a pair weighs its two answers by β σ(−β h) and by minus that. At the start the
# policy is the reference, h = 0 and the weight is β/2 for every pair. (The table
# multiplies by the 4 answers, the loss is a mean over 2 pairs: it shows β.)
#
# In the second row the policy has made the wrong terse answer e^8 times as rare. That
# pair is told apart, so it hardly pulls any longer; a reward would go on pulling.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    where = tokens.to(settings.device), mask.to(settings.device)
    sums = masked_sum(token_logprobs(reference, *where), where[1]).cpu()  # (4,)
chosen, rejected, rows = [0, 1], [2, 3], {}
for name, gone in (("at the reference", 0.0), ("first pair told apart", 8.0)):
    policy_sums = (sums - torch.tensor([0, 0, gone, 0])).requires_grad_()
    four = policy_sums[chosen], policy_sums[rejected], sums[chosen], sums[rejected]
    loss = dpo.dpo_loss(*four, beta=config.beta)
    loss.backward()
    weights = -4 * policy_sums.grad  # (4,)
    pull = 2 * config.beta / (1 + np.exp(config.beta * np.array([gone, 0])))  # (2,)
    assert np.allclose(weights, [*pull, *-pull], atol=1e-5)
    assert gone or abs(loss.item() - np.log(2)) < 1e-6  # else: no reference
    rows[f"DPO, {name} (x B)"] = weights
hand = course.hand_table(settings.lesson, rows)

# %% [markdown]
# With these two pairs the first row is β times REINFORCE's with the batch mean as
# baseline, times two. That is no accident: at the reference, DPO on two answers of the
# policy's own is RLOO with rewards β apart (our tests check it on average, by
# enumeration). All of what is special about DPO comes after the first step.
#
# ## Predict
#
# Every step pushes chosen answers to be likelier *compared with* rejected ones.

# %%
print("log π of the chosen answers, at a round's end: how many nats up or down?")
my_guess = 1.0  # edit me

# %% [markdown]
# ## One run
#
# A *round*: 512 problems, 8 answers each; at most 4 pairs a problem, each of a right
# answer and a wrong one, no answer in two pairs; then 128 steps of 32 pairs. The paper
# has one round, with pairs from elsewhere or from the policy it starts at. Here the
# reference of each round is the policy that drew it.


# %%
def run_dpo(config: dpo.DPOConfig, settings, given=None, **options) -> tuple:
    """The trained policy and its series; `given` makes pairs instead of drawing them.

    "reward" is that of the last draw: it stands still while a round trains.
    """
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.rounds * config.prompts)
    series, start = {}, time.perf_counter()
    if given is None:
        options["reference"] = reference  # each draw's distance to it is measured
    else:
        options["given"] = given(settings)
    training = dpo.train(
        policy, tokenizer, problems, verifier, config,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.rounds * config.updates, disable=None):
        seconds = time.perf_counter() - start
        course.keep_series(series, metrics | {"seconds": seconds})
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## Train

# %%
policy, series = run_dpo(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## After
#
# The learning curve has one point a draw: what a round drew measures the policy that
# the rounds before it trained. The test measures the last one.

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
per_round = config.prompts * config.samples
drawn = [per_round * i for i in range(config.rounds + 1)]
heights = [*series["reward"][:: config.updates], after.sampled.correct.mean().item()]
curve = drawn, heights
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)
late = slice(config.updates * 3 // 4, config.updates)  # the end of the first round
shifts = {k: np.mean(series[f"{k}_shift"][late]) for k in ("chosen", "rejected")}
course.predict("Chosen answers, nats:", my_guess, shifts["chosen"])

# %% [markdown]
# ## Where the probability goes
#
# The loss sees a *difference*. It is content when the chosen answer falls, if only the
# rejected one falls further. And there is little room above: over the reference's own
# answers to a question, the mean of log π − log reference is −KL(reference ‖ π), never
# above 0; over its right answers alone it is at most −log of their share, reached
# only if all wrong ones vanish and all right ones gain alike. Downwards there is no
# limit.
#
# So whose gain is it? The base answers test questions, and each answer is scored by
# the base and by the trained policy. Beside that, the share of such answers before and
# after: a kind whose old answers fell may still have become more frequent, by others.


# %%
@torch.no_grad()
def where_it_went(policy, problems) -> dict[str, float]:
    """{kind of the base's answers: mean log π − log base}, "all" for all of them."""
    rollout = generate(
        reference, [tokenizer.encode_prompt(p.question) for p in problems], samples=8,
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_new_tokens=128,
        generator=settings.generator("where"),
    )  # fmt: skip
    texts = [tokenizer.decode_response(ids) for ids in rollout.responses()]
    asked = [problem for problem in problems for _ in range(8)]
    found = {"all": []}
    for rows in rollout.micro_batches(128):
        part = rollout.select(rows)
        now, base = (
            masked_sum(token_logprobs(model, part.tokens, part.mask), part.mask)
            for model in (policy, reference)
        )
        for row, nats in zip(rows.tolist(), (now - base).tolist(), strict=True):
            pair = asked[row], texts[row]
            kind = f"{style_of(*pair)}, {'right' if verify(*pair) else 'wrong'}"
            found.setdefault(kind, []).append(nats)
            found["all"].append(nats)
    return {kind: float(np.mean(nats)) for kind, nats in found.items()}


# %%
def shares(taken: exam.Exam, kind: str) -> float:
    """Of a policy's sampled answers, the share of this kind."""
    style, _, verdict = kind.partition(", ")
    same = np.array(taken.sampled.styles) == style
    return float((same & (taken.sampled.correct == (verdict == "right"))).mean())


kinds = [f"{style}, {verdict}" for style in STYLES for verdict in ("right", "wrong")]
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    count = settings.pick(8, 0, 128)
    went = where_it_went(policy, before.sampled.problems[:count])
    run["where"] = went | {"shares": {k: [shares(before, k), shares(after, k)]
                                      for k in kinds}}  # fmt: skip
record = plotting.load_record(settings.lesson)
where = run.get("where") or record.get("0", {}).get("where", {"shares": {}})
print(f"{'answers of the base':<20}{'log π − log base':>18}{'share':>18}")
for kind, (was, now) in where["shares"].items():
    nats = f"{where[kind]:+.2f}" if kind in where else "none drawn"
    print(f"{kind:<20}{nats:>18}{was:>9.3f} -> {now:.3f}")
if "all" in where:
    print(f"{'all':<20}{where['all']:>+18.2f}")

# %% [markdown]
# ## Trials, and breaking it
#
# One round of 4,096 answers each, unless it says otherwise; one seed, judged on
# validation. A small *beta* is a long leash: the loss is content only at a larger h.
# *IPO* pulls h to 1/(2β), half a nat at beta 1, and no further.
#
# *Given* pairs come from a teacher: a worked answer over one in another style, for the
# same problem. Terse ones are right too: nothing but the style is preferred.


# %%
def teacher_pairs(spoil, settings) -> list:
    """A worked demonstration over a spoiled one: about as many as a round draws."""
    pairs = []
    for index in itertools.count(10_000_000):  # never shown to the base
        row = demonstration(settings.seed, "train", index)
        if row.style != "worked" or row.problem.steps < 2:
            continue
        both = (tokenizer.encode_response(x) for x in (row.answer, spoil(row.answer)))
        pairs.append((tokenizer.encode_prompt(row.problem.question), *both))
        if len(pairs) == settings.pick(4, 1000, 1000):
            return pairs


def over_terse(settings) -> list:
    return teacher_pairs(lambda worked: worked.splitlines()[-1], settings)


def over_careless(settings) -> list:
    def without_last_step(worked):
        *steps, _, _ = worked.splitlines()
        return "\n".join([*steps, "#### " + steps[-1].split("=")[1].strip(">")])

    return teacher_pairs(without_last_step, settings)


# %%
def reference_free_loss(chosen, rejected, *reference, beta, count):
    """Broken: −log σ(β (log π_w − log π_l)), with no reference to stay near."""
    zeros = map(torch.zeros_like, reference)
    return dpo.dpo_loss(chosen, rejected, *zeros, beta, count)


# %%
default = "128 updates"
short = replace(config, rounds=1)
brief = {"prompts": settings.pick(2, 128, 128), "updates": settings.pick(1, 16, 32)}
half = settings.pick(1, 32, 64)  # steps on the same pairs
iterated = replace(short, rounds=4, **brief)
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, updates=half, lr=2e-4), {}),
    "lr 4e-4": (replace(short, updates=half, lr=4e-4), {}),
    "lr 8e-4": (replace(short, updates=half, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, updates=half, lr=1.6e-3), {}),
    "beta 0.5": (replace(short, updates=half, beta=0.5), {}),
    "128 updates": (short, {}),
}
trials = tuning | {
    "4 rounds of 1,024": (iterated, {}),
    "4 rounds, base as reference": (replace(iterated, reset_reference=False), {}),
    "IPO": (short, {"loss": partial(dpo.dpo_loss, per_pair=dpo.ipo)}),
    "given: worked over terse": (short, {"given": over_terse}),
    "given: worked over careless": (short, {"given": over_careless}),
    "broken: no reference": (short, {"loss": reference_free_loss}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_dpo, tuning)
exam.print_trials(tried)
for name, row in tried.items():
    ends = [np.mean(row["series"][f"{k}_shift"][-16:]) for k in ("chosen", "rejected")]
    mix = "  ".join(f"{s} {row['styles'][f'style_{s}']:.2f}" for s in STYLES)
    print(f"{name:<30}chosen {ends[0]:+7.2f} rejected {ends[1]:+7.2f} nats  {mix}")

# %% [markdown]
# ## The figures
#
# The message; what happened to the two answers of a pair, in nats against the round's
# reference (every round starts from 0); and what the accuracy cost.

# %%
(was, *_), (now, *_) = run["sampled"]
fell = "fell" if shifts["chosen"] < 0 else "rose"
figure, axes = plotting.new_figure(
    3,
    f"Told which of two was better, {config.rounds} rounds: {was:.2f} to {now:.2f} "
    f"right (seed {settings.seed}); in the first, chosen ones {fell} by "
    f"{abs(shifts['chosen']):.2f} nats",
)
rise, pairs, price = axes
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "DPO")
for name, color in (("chosen", plotting.COLORS[2]), ("rejected", plotting.COLORS[1])):
    pairs.plot(series["update"], series[f"{name}_shift"], color=color, label=name)
for start in range(config.updates, config.rounds * config.updates, config.updates):
    pairs.axvline(start + 0.5, color="#888", lw=1, ls=":")
pairs.axhline(0, color="#444", lw=1)
pairs.set(xlabel="optimiser steps", ylabel="log π − log reference, nats")
pairs.legend()
pairs.set_title("only the gap is trained (this run)")
plotting.draw_price(price, runs or [run], course.base_success(), base)
plotting.save_figure(figure, settings.figure_path)

# %%
figure, axes = plotting.new_figure(3, "Whose pairs, how long a leash", height=4.4)
accuracy, leash, mix = axes
plotting.draw_trials(accuracy, tried, default=default)
accuracy.set_title("4,096 answers each (given pairs: none)")
leash.plot(*frontier(course.base_success()), color="#888", label="frontier (test)")
leash.set(ylim=(0, 1), title="what accuracy costs, after one round")
near = [name for name in tuning if name in tried and tried[name]["kl"][0] < 10]
plotting.draw_trial_prices(leash, tried, near)
leash.legend(loc="lower right")

# %%
left = np.zeros(len(tried))  # how each of them answers
for style, color in plotting.STYLE_COLORS.items():
    width = np.array([row["styles"][f"style_{style}"] for row in tried.values()])
    mix.barh(range(len(tried)), width, left=left, color=color, label=style)
    left = left + width
mix.set_yticks(range(len(tried)), [])
mix.set(ylim=(len(tried) - 0.5, -0.5), xlabel="share of answers, rows as on the left")
mix.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=8)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we saw

# %%
print(f"""
- Sampled accuracy went from {was:.2f} to {now:.2f}: {run["gap_closed"][0]:.0%} of the
  way to the base forced to work; greedy {run["greedy"][0][0]:.2f} to
  {run["greedy"][1][0]:.2f}.
- The first loss was {series["loss"][0]:.4f}; log 2 is {np.log(2):.4f}. Any other number
  would mean another reference than the policy we start from.
- By the end of round one, chosen answers had moved by {shifts["chosen"]:+.2f} nats and
  rejected ones by {shifts["rejected"]:+.2f}: the gap is what was asked for.
- Pairs a round: {", ".join(f"{n:.0f}" for n in series["pairs"][:: config.updates])};
  problems without any: {series["unpaired"][0]:.0%} of the first draw.
""")
for name in [name for name in tuning if name in tried]:
    moved = np.mean(tried[name]["series"]["chosen_shift"][-16:])  # the last steps
    print(f"- {name}: chosen answers moved by {moved:+.2f} nats.")
exam.compare_trials(tried, default, "4 rounds of 1,024", "4,096 answers, once or not")
ends = [bootstrap(e.sampled.correct.mean(1)) for e in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# Exercises. (1) Swap chosen and rejected in `dpo_loss`: is the first loss still log 2?
# (Yes; only the direction is wrong. That number checks the reference, not the sign.)
# (2) At beta 0.1, add −0.1 · mean log π(chosen) to the loss. (Where chosen answers
# fall, this holds them up: the cure of several papers. Whether accuracy gains is for
# you to measure.) (3) Include the prompt in the mask. (Nothing changes: log π(prompt)
# cancels between the two answers.)
#
# Next: lesson 33 (RRHF), which ranks answers without any reference.
