# %% [markdown]
# # Lesson 10: Keep what was right, imitate it (rejection sampling)
#
# **Question.** Imitation needs good answers to imitate. Can a policy get them from
# itself, by drawing many and keeping those that turned out right?
#
# Read before: lesson 01 (imitation), lesson 02 (the verifier, pass@k) and, in lesson
# 03, "What accuracy costs" (KL and the frontier).
#
# *Rejection sampling* draws 8 answers to each problem, keeps the right ones, takes some
# steps of SFT on those, and starts again with the better policy. Llama 2's chat model
# was trained so before any PPO; as RAFT, STaR or ReST it has been invented many times.
#
# You will see: how far that leads; what *best of n* buys without training, at every
# question anew; what filtering does to variety; and the control that every filter owes:
# answers drawn by lot, at equal tokens.
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
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import rejection_sampling as rs
from minialign.evaluation import best_of_n, frontier_at, pass_at_k
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import verifier
from minialign.sampling import generate

# %%
settings = course.setup("10_rejection_sampling")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = rs.RejectionSamplingConfig(
    rounds=settings.pick(2, 1, 4),
    prompts=settings.pick(4, 512, 512),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
    updates=settings.pick(1, 32, 32),
    batch_tokens=settings.pick(128, 2048, 2048),
)

# %% [markdown]
# ## By hand
#
# Four answers to one question, two of them right. Keep *all right ones*, and the loss
# is −(Σ log π of each kept token) / (number of kept tokens): SFT. Each kept answer's
# ∇ log π is multiplied by one and the same number, each other answer's by 0. Keep *one
# best answer* instead, and a lot decides which of the two right ones it is.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    scored = reference, tokens.to(settings.device), mask.to(settings.device)
    logprobs = token_logprobs(*scored).cpu()  # (4, S)
right, best = [], []
for seed in range(32):  # 32 lots
    lot = torch.Generator().manual_seed(seed)
    for found, select in ((right, rs.select_right), (best, rs.select_best)):
        kept = select(rewards[None], mask.sum(1)[None], lot)[0]  # (4,) bool
        leaf, count = logprobs.clone().requires_grad_(), int(mask[kept].sum())
        rs.likelihood_loss(leaf, kept.float(), mask, count).backward()
        by_hand = torch.where(mask & kept[:, None], 1.0, 0.0)  # at every kept token
        assert torch.allclose(-count * leaf.grad, by_hand)
        found.append(kept.tolist())
assert all(kept == rewards.bool().tolist() for kept in right)
assert {tuple(kept) for kept in best} == {(1, 0, 0, 0), (0, 1, 0, 0)}  # by lot
rows = {"filter, all right (x tokens)": rewards}
rows["filter, best of 4 (x tokens)"] = rewards / rewards.sum()  # the mean of all lots
hand = course.hand_table(settings.lesson, rows)

# %% [markdown]
# Wrong answers have weight 0. On fresh answers, and divided by their number, such a
# step *is* one of REINFORCE without a baseline (lesson 11; the tests enumerate it). The
# method becomes another one by going on: many steps on one draw.
#
# (`x tokens`, `x B`: the numbers in the table are multiplied by these, to undo the
# loss's own mean, over kept tokens here, over B answers in later lessons.)
#
# *Best of K* weighs problems otherwise. If p is the chance to be right on a problem,
# one step follows ∇p when all right answers are kept, but ∇p · (1 − (1 − p)^K) / p when
# one is: a problem solved once in 8 counts as much as one solved 8 times.
#
# ## Predict

# %%
success = course.base_success()  # the base's rates on 500 test problems (lesson 02)
found = rs.best_of_n_accuracy(success, 8).mean()
print(f"8 answers of the base hold a right one with chance {found:.2f}: its pass@8.")
print("Now we imitate only what was right. What becomes of pass@8?")
my_guess = 0.9  # edit me

# %% [markdown]
# ## One run
#
# A round draws 512 x 8 answers and takes its steps, of some 2,048 response tokens each,
# from the kept ones. It asks fresh problems, so its mean reward is an honest estimate
# of sampled accuracy *before* it is learnt from.


# %%
def run_rejection(config: rs.RejectionSamplingConfig, settings, **options) -> tuple:
    """The trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.rounds * config.prompts)
    series, start = {}, time.perf_counter()
    training = rs.train(
        policy, tokenizer, problems, verifier, config, reference=reference,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.rounds * config.updates, disable=None):
        clock = {"seconds": time.perf_counter() - start}
        course.keep_series(series, metrics | clock | {"accuracy": metrics["reward"]})
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## Train

# %%
policy, series = run_rejection(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)
print("round  right   kept  problems without a right answer  nats a token")
for i in range(0, len(series["round"]), config.updates):
    names = "round", "reward", "pool", "unanswered", "entropy"
    row = [series[name][i] for name in names]
    print("{:>5}{:>7.3f}{:>7}{:>33.3f}{:>14.3f}".format(*row))

# %% [markdown]
# ## After
#
# The learning curve has a point for each draw, made before its round's training, and
# the exam as its last.

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
draws = slice(None, None, config.updates)
total, each = series["completions"][-1], config.prompts * config.samples
curve = (
    [done - each for done in series["completions"][draws]] + [total],
    series["accuracy"][draws] + [float(after.sampled.correct.mean())],
)
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)
course.predict("pass@8 after training:", my_guess, run["pass_at_8"][1][0])

# %% [markdown]
# ## The other way to spend answers: best of n
#
# Do not train; draw n answers to each question and let a verifier pick, if you have it
# there. With rewards 0 and 1 the pick is right with chance a = 1 − (1 − p)^n, and
# as it does not choose among right answers, nor among wrong ones, its distance is
#
#     KL(best of n ‖ base) = a log(a/p) + (1−a) log((1−a)/(1−p)), exactly.
#
# The formula usually quoted, log n − (n−1)/n, is only a bound, near it where hardly any
# two rewards tie. On *one* problem nobody is as right for fewer nats. Over many, the
# frontier spends its nats where they buy most accuracy, while best of n draws n
# everywhere: best of n stays below.

# %%
judged = before.sampled.correct[: len(success)]  # other answers, to the same problems
here = success[: len(judged)]
law = {}
print(f"{'n':>3}{'law':>8}{'frontier':>10}{'KL':>8}{'bound':>8}   measured (law there)")
for n in (1, 2, 4, 8, 16, 32, 64):
    right, kl = rs.best_of_n_accuracy(success, n), rs.best_of_n_kl(success, n).mean()
    law[n] = [float(right.mean()), float(kl), frontier_at(success, float(kl))]
    bound, seen = np.log(n) - (n - 1) / n, ""
    if n <= judged.shape[1]:
        there = rs.best_of_n_accuracy(here, n).mean()
        seen = f"   {bootstrap(best_of_n(judged, judged, n))} ({there:.3f})"
    print(f"{n:>3}{law[n][0]:>8.3f}{law[n][2]:>10.3f}{kl:>8.3f}{bound:>8.3f}{seen}")
run |= {"best_of_n": {str(n): row for n, row in law.items()}}
now = run["sampled"][1][0]
reach = [n for n in range(1, 65) if rs.best_of_n_accuracy(here, n).mean() >= now]
enough = reach[0] if reach else "more than 64"
print(f"one answer of the trained policy is worth a best of {enough} of the base")

# %% [markdown]
# ## What a filter does to variety
#
# *Entropy* is how undecided the policy is: −log π of its own tokens, on average. And
# pass@k asks what k answers hold *together*: if one answer gets better while all become
# alike, it may fall.


# %%
def entropy(model: torch.nn.Module) -> float:
    """Nats per token of answers to test problems, 2 each."""
    rollout = generate(
        model,
        [tokenizer.encode_prompt(p.question) for p in before.sampled.problems[:256]],
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_new_tokens=128,
        samples=2, generator=settings.generator("entropy"),
    )  # fmt: skip
    return -(rollout.logprobs.sum() / rollout.mask.sum()).item()


run["entropy"] = [entropy(reference), entropy(policy)]
run["pass_at_k"] = [
    [float(pass_at_k(taken.sampled.correct, k).mean()) for k in range(1, 9)]
    for taken in (before, after)
]
print("entropy, nats a token: {:.3f} -> {:.3f}".format(*run["entropy"]))
for name, line in zip(("base", "trained"), run["pass_at_k"], strict=True):
    print(f"pass@1 to pass@8, {name:<8}" + "".join(f"{value:>7.3f}" for value in line))

# %% [markdown]
# ## Trials, and the control
#
# All draw 4,096 answers, most of them in one round, and are judged on validation, with
# one seed: the intervals are over problems, another seed can differ by more. `best of
# each problem` keeps one of 8, `top of the pool` as many, but from all problems at
# once, so easy ones prevail. The *control* loses the one idea: as many tokens as all
# right answers hold, drawn by lot. Same steps, same tokens, same rate: what it gains,
# filtering did not do. And of two rounds, learn from the latest draw, or from both?

# %%
short = replace(config, rounds=1)
fewer, more = settings.pick((1, 2), (16, 64), (16, 64))
default = "lr 4e-4"  # the settings of the headline run
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
    "best of each problem": (short, {"select": rs.select_best}),
    "top of the pool": (short, {"select": rs.select_top}),
    "control: by lot": (short, {"select": rs.select_random}),
    "two rounds, latest": (halves, {"keep": rs.keep_latest}),
    "two rounds, all": (halves, {"keep": rs.keep_all}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rejection, tuning)
exam.print_trials(tried)

# %% [markdown]
# ## The figures
#
# The message; its price, with best of 1, 2, 4, ... as dots; pass@k, mean over seeds.

# %%
(was, *_), (now, *_) = run["sampled"]
figure, axes = plotting.new_figure(
    3,
    f"Imitating its own right answers: {was:.2f} to {now:.2f} right (seed "
    f"{settings.seed}), entropy {run['entropy'][0]:.2f} to {run['entropy'][1]:.2f} "
    f"nats a token",
)
rise, price, variety = axes
runs = course.runs_on_record(settings, run)
label = "rejection sampling"
plotting.draw_rise(rise, runs, run, not settings.record, base, label)
rights, nats, _ = zip(*law.values(), strict=True)
price.plot(nats, rights, ".:", color=plotting.COLORS[3], label="best of n, no training")
plotting.draw_price(price, runs or [run], success, base)
for name, row, color in (("base", 0, "#5c677d"), ("trained", 1, "#d1495b")):
    lines = np.mean([each["pass_at_k"][row] for each in runs or [run]], axis=0)
    variety.plot(range(1, 9), lines, "o-", color=color, label=name)
variety.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
variety.legend(loc="lower right")
variety.set_title("what k answers hold together")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# The trials, and how what is kept differs from what was drawn: nobody asked for work.

# %%
figure, axes = plotting.new_figure(3, "What the settings do, and what the filter keeps")
accuracy, cost, shares = axes
plotting.draw_trials(accuracy, tried, default=default)
plotting.draw_trial_prices(cost, tried)
drawn, kept = series["style_worked"][draws], series["kept_style_worked"][draws]
places = np.arange(1, len(drawn) + 1)
shares.bar(places - 0.2, drawn, 0.4, color=plotting.COLORS[5], label="drawn")
shares.bar(places + 0.2, kept, 0.4, color=plotting.COLORS[2], label="kept")
shares.set(xlabel="round", xticks=places, ylabel="share that shows work", ylim=(0, 1.2))
shares.legend(loc="upper left", ncol=2)
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we saw

# %%
first, last = run["pass_at_8"]
moved = "overlap" if first[1] <= last[2] and last[1] <= first[2] else "do not overlap"
print(f"""
- Sampled accuracy went from {was:.2f} to {now:.2f}: {run["gap_closed"][0]:.0%} of the
  way to the base forced to work.
- It cost {run["kl"][0]:.2f} nats, for which {run["frontier"]:.2f} could be had at most.
  Best of {enough} answers of the base would be as right, at each question anew.
- Of the answers drawn first {drawn[0]:.0%} showed work, of those kept {kept[0]:.0%}.
- Entropy went from {run["entropy"][0]:.3f} to {run["entropy"][1]:.3f} nats a token,
  pass@8 from {first[0]:.3f} to {last[0]:.3f}: the intervals {moved}.
""")
exam.compare_trials(tried, default, "control: by lot", "By right or by lot")
ends = [bootstrap(taken.sampled.correct.mean(1)) for taken in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# Exercises. (1) In `rejection_sampling.train`, let `generate` draw at 0.7, train at 1
# as before, and keep by lot. (Imitating colder answers sharpens without any filter.
# Expect little: compare the base at its best temperature.) (2) What is
# `rs.best_of_n_kl(0.5, 1000)`? (0.693 = −log p, which it never exceeds; the bound by n
# says 5.9.) Next: lesson 11 takes one step per draw, and may push answers down.
