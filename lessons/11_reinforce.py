# %% [markdown]
# # Lesson 11: Learning from rewards (REINFORCE)
#
# **Question.** The base can work problems out but mostly does not care to. Can it learn
# to, when all it is ever told is whether its answer was right?
#
# Read before: lesson 01 (imitation) and lesson 02 (the verifier).
#
# REINFORCE draws answers from the policy itself, asks a *reward* how good each one is,
# and makes each answer more or less likely in proportion. Nobody shows it a good
# answer.
#
# You will see: accuracy rises, and the answers grow longer, because the policy finds
# out that showing its work pays. And you will see what a *baseline* is for.
#
# Time: `quick` about 100 s on two CPU cores; `full` some ten minutes a seed there (the
# dials are in seed 0). Memory: about 2 GB.

# %%
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# %%
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from minialign import checkpoint, course, plotting
from minialign.algorithms import reinforce
from minialign.evaluation import (
    bootstrap,
    difference,
    frontier,
    frontier_at,
    gap_closed,
    measured_kl,
    pass_at_k,
    policy_gradient,
    sample_answers,
    signal_to_noise,
)
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %%
settings = course.setup(__file__)
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
test = course.load_problems("test", settings.pick(8, 256, 1000))
skill = course.load_problems("second_skill", settings.pick(8, 100, 500))
base = course.base_facts()
config = reinforce.ReinforceConfig(
    updates=settings.pick(2, 22, 64), prompts=settings.pick(4, 32, 32)
)
problems = course.stream(settings.seed, 64 * config.prompts)

# %% [markdown]
# ## By hand
#
# Four answers to one question, two of them right: rewards 1, 1, 0, 0. The gradient of
# REINFORCE is the mean over answers of (reward − baseline) · ∇ log π(answer), where
# log π(answer) is the *sum* of its tokens' log-probabilities: the answer is one action.
#
# A *baseline* is a number subtracted from all rewards. Without one, right answers are
# pulled up and wrong ones left alone. With the mean reward as baseline, right answers
# are pulled up and wrong ones pushed down.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
rows = {}
for name, baseline in (
    ("REINFORCE, no baseline (x B)", reinforce.no_baseline),
    ("REINFORCE, batch mean (x B)", reinforce.batch_mean),
):
    advantages = rewards - baseline(rewards, 0.0)  # (4,)
    with torch.no_grad():
        logprobs = token_logprobs(
            reference, tokens.to(settings.device), mask.to(settings.device)
        ).cpu()  # (4, S)
    logprobs.requires_grad_()
    reinforce.reinforce_loss(logprobs, advantages, mask).backward()
    weights = -4 * logprobs.grad  # (4, S): the same at every token of an answer
    by_hand = torch.where(mask, advantages[:, None], 0.0)
    assert torch.allclose(weights, by_hand)
    rows[name] = weights.sum(1) / mask.sum(1)
hand = course.hand_table(settings.lesson, rows)

# %% [markdown]
# The terse right answer gets exactly the weight of the worked one! A reward for being
# right does not ask for work. If the policy learns to show its work all the same, it
# can only be because, over many problems, worked answers are right more often.
#
# Why may we subtract anything? Probabilities sum to 1, so the mean of ∇ log π(answer)
# over the policy's own answers is exactly 0. A number b that does not look at the
# answer adds −b · 0 to the expected gradient: the same direction on average, another
# noise.
#
# ## Predict

# %%
print(f"the base writes {base['length'][0]:.0f} tokens an answer; how many after?")
my_guess = 20  # edit me

# %% [markdown]
# ## Before


# %%
def test_policy(policy: torch.nn.Module, purpose: str) -> dict:
    """Sampled and greedy answers to the test problems, and the second skill's."""
    draw = settings.generator(purpose)
    return {
        "sampled": sample_answers(policy, tokenizer, test, 8, generator=draw),
        "greedy": sample_answers(policy, tokenizer, test, 1, greedy=True),
        "skill": sample_answers(policy, tokenizer, skill, 1, greedy=True),
    }


before = test_policy(reference, "before")
forced = sample_answers(reference, tokenizer, test, 1, greedy=True, first_token="<<")
for i in range(3):
    style, text = before["sampled"].styles[i][0], before["sampled"].texts[i][0]
    print(f"{test[i].question}\n{text}\n({style}; gold {test[i].gold})\n")

# %% [markdown]
# ## Train
#
# 32 problems, 8 answers to each, one step, no baseline (you will see why). Fresh
# problems every time, so the mean reward of a batch is also an honest estimate of
# sampled accuracy.


# %%
def run_reinforce(setup: reinforce.ReinforceConfig, **options) -> tuple:
    """One run from the base: the trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    paid, right, series = options.pop("reward", verifier), [], {}

    def watched(asked, texts):
        """Whatever is paid, the verdicts are kept."""
        right.append(sum(verifier(asked, texts)) / len(texts))
        return paid(asked, texts)

    training = reinforce.train(
        policy, tokenizer, problems, watched, setup, reference=reference,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=setup.updates, disable=None):
        course.keep_series(series, metrics | {"accuracy": right[-1]})
    return policy, series


policy, series = run_reinforce(config)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## After

# %%
after = test_policy(policy, "after")
for i in range(3):
    text = after["sampled"].texts[i][0]
    print(f"{test[i].question}\n{text}\n(gold {test[i].gold})\n")
was, now = (t["sampled"].correct.mean(1) for t in (before, after))
gap = gap_closed(was, now, forced.correct[:, 0])
print(f"sampled accuracy {bootstrap(was)} -> {bootstrap(now)}")
print(f"greedy accuracy  {bootstrap(before['greedy'].correct[:, 0])} -> "
      f"{bootstrap(after['greedy'].correct[:, 0])}")  # fmt: skip
print(f"gap to forced-worked closed: {gap}")
lengths = [bootstrap(t["sampled"].lengths.mean(1)) for t in (before, after)]
print(f"tokens per answer {lengths[0]} -> {lengths[1]}")
drift = difference(after["skill"].correct[:, 0], before["skill"].correct[:, 0])
print(f"second skill (never rewarded here): change of accuracy {drift}")
course.predict("Tokens per answer after training:", my_guess, lengths[1].value)

# %% [markdown]
# ## What a baseline is for
#
# The estimate of the gradient is the true gradient plus noise. *Signal to noise*, per
# answer, is |mean gradient|² / variance of one answer's gradient. The policy stays
# frozen and the same answers serve every baseline b: (r − b) ∇ log π comes from the two
# sums Σ r ∇ log π and Σ ∇ log π. The moving average of earlier batches is, in the long
# run, the constant mean reward; the batch mean also looks at its own 32 answers; and
# the best constant, Cov / Var of the two sums, is computed with hindsight.


# %%
def compare_baselines(policy, mean: float, batches: int) -> dict[str, float]:
    """Per answer, from independent batches of 32 problems, one answer each."""
    paid, plain, own = [], [], []  # Σ r ∇ log π, Σ ∇ log π, the batch's mean reward
    extra = course.stream(settings.seed + 1, 32 * batches)
    draw = settings.generator("signal to noise")
    for i in tqdm(range(batches), disable=None):
        asked = extra[32 * i : 32 * i + 32]
        rollout = generate(
            policy, [tokenizer.encode_prompt(p.question) for p in asked],
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_new_tokens=128,
            generator=draw,
        )  # fmt: skip
        rewards = score(verifier, asked, rollout, tokenizer)
        paid.append(policy_gradient(policy, rollout, rewards))
        plain.append(policy_gradient(policy, rollout, torch.ones_like(rewards)))
        own.append(rewards.mean())
    paid, plain = torch.stack(paid), torch.stack(plain)  # (batches, weights)
    means = torch.stack(own).to(paid)[:, None]  # (batches, 1)
    spread = plain - plain.mean(0)
    best = ((paid - paid.mean(0)) * spread).sum() / spread.square().sum()
    found = {"none": paid, "mean reward": paid - mean * plain}
    found["batch mean"] = (paid - means * plain) * 32 / 31
    found[f"best constant, {best:.2f}"] = paid - best * plain
    return {name: signal_to_noise(g, 32) for name, g in found.items()}


# %%
record = plotting.load_record(settings.lesson)
frozen = {}
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    for where, model in (("base", copy.deepcopy(reference)), ("trained", policy)):
        model.requires_grad_(True)
        mean = (before if where == "base" else after)["sampled"].correct.mean()
        frozen[where] = compare_baselines(model, mean, settings.pick(2, 0, 64))
shown_frozen = frozen or record.get("0", {}).get("signal_to_noise", {})
for where, row in shown_frozen.items():
    cells = "  ".join(f"{name} {value:.2e}" for name, value in row.items())
    print(f"signal to noise per answer, {where:<8} {cells}")

# %% [markdown]
# The best constant is E[r |∇ log π|²] / E[|∇ log π|²]: the share of all squared
# gradient that right answers hold. Where it lies below the mean reward, wrong answers
# have the longer gradients, and subtracting the mean wakes them: without a baseline
# their weight was 0. (Our guess why, not measured: a guessed digit moves more than a
# sure one.) A baseline is no free lunch: it lowers the noise only as far as it lies
# near this number. These are estimates from 2,048 answers of one seed.
#
# ## Dials, and breaking it
#
# Shorter runs of 4,096 answers, one seed, their learning rate falling to 0, judged on
# validation (the intervals are over problems; another seed can differ by more). The
# broken variant loses the one idea: every answer earns 1, so the *expected* gradient is
# 0 and only noise moves the policy.
#
# *KL*(policy ‖ base), in nats, says how far the policy has moved: the mean over its own
# answers of log π(answer) − log base(answer). With *beta*, it is paid for out of the
# reward: r − beta · KL.

# %%
short = replace(config, updates=settings.pick(2, 0, 16))
trials = {  # name: (changes of the config, other arguments)
    "no baseline": ({}, {}),
    "moving average": ({}, {"baseline": reinforce.moving_average}),
    "batch mean": ({}, {"baseline": reinforce.batch_mean}),
    "no baseline, beta 0.03": ({"beta": 0.03}, {}),
    "no baseline, beta 0.1": ({"beta": 0.1}, {}),
    "no baseline, lr 1e-4": ({"lr": 1e-4}, {}),
    "no baseline, lr 2e-4": ({"lr": 2e-4}, {}),
    "no baseline, lr 8e-4": ({"lr": 8e-4}, {}),
    "broken: every answer earns 1": (
        {},
        {"reward": lambda problems, texts: [1.0] * len(texts)},
    ),
}

# %%
dials = {}
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    validation = course.load_problems("validation", settings.pick(4, 0, 500))
    for name, (changes, options) in trials.items():
        tried, trace = run_reinforce(replace(short, **changes), **options)
        draw = settings.generator("dials")
        out = sample_answers(tried, tokenizer, validation, 4, generator=draw)
        accuracy = course.as_list(bootstrap(out.correct.mean(1)))
        dials[name] = {"accuracy": accuracy, "kl": trace["kl"][-1], "series": trace}
shown = dials or record.get("0", {}).get("dials", {})
for name, row in shown.items():
    value, low, high = row["accuracy"]
    print(f"{name:<32} sampled {value:.3f} [{low:.3f}, {high:.3f}]  KL {row['kl']:.2f}")

# %% [markdown]
# ## What it cost, and the figures
#
# First how far the policy moved, on the problems of which we know the base's success
# rates. Then the message; the dashed line is the base *forced to work*.

# %%
held = test[: len(success := course.base_success())]
prompts = [tokenizer.encode_prompt(problem.question) for problem in held]
rollout = generate(
    policy, prompts, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
    max_new_tokens=128, samples=2, generator=settings.generator("kl"),
)  # fmt: skip
nats = measured_kl(policy, reference, rollout).view(-1, 2).mean(1)
spent, bought = bootstrap(nats.cpu().numpy()), now[: len(held)].mean()
best = frontier_at(success[: len(held)], spent.value)
print(f"KL(policy ‖ base) {spent} nats; sampled accuracy {bought:.3f}, "
      f"and {best:.3f} is the most that so many nats can buy")  # fmt: skip

# %%
run = {"config": asdict(config), "series": series, "hand": hand}
run |= {"gap_closed": course.as_list(gap), "length": list(map(course.as_list, lengths))}
run |= {"kl": course.as_list(spent), "frontier": best, "accuracy_at_kl": bought}
for name, pick in (
    ("greedy", lambda tested: tested["greedy"].correct[:, 0]),
    ("pass_at_8", lambda tested: pass_at_k(tested["sampled"].correct, 8)),
    ("second_skill", lambda tested: tested["skill"].correct[:, 0]),
):
    pair = [bootstrap(pick(tested)) for tested in (before, after)]
    run[name] = [course.as_list(estimate) for estimate in pair]
    print(f"{name:<14}{pair[0]} -> {pair[1]}")
run |= {"signal_to_noise": frozen, "dials": dials} if dials else {}
record = plotting.load_record(settings.lesson)  # other seeds may have ended meanwhile
others = [r for seed, r in record.items() if seed != str(settings.seed)]
runs = [*others, run] if settings.preset == "full" else list(record.values())

# %%
figure, axes = plotting.new_figure(
    3,
    f"Rewarded only for right answers, it shows its work: {was.mean():.2f} to "
    f"{now.mean():.2f} right, {lengths[1].value / lengths[0].value:.1f} x as long",
)
rise, shares, length = axes
if runs:
    args = ("completions", "accuracy", "REINFORCE", plotting.COLORS[0])
    plotting.draw_runs(rise, runs, *args)
if settings.preset != "full":
    plotting.draw_live(rise, run, "completions", "accuracy")
plotting.draw_base(rise, base)
rise.set(xlabel="answers drawn", ylabel="sampled accuracy", ylim=(0, 1))
rise.legend(loc="lower right")
rise.set_title("accuracy on fresh problems")

# %%
plotting.draw_styles(shares, run, "completions")
shares.set(xlabel="answers drawn")
shares.set_title("how it answers")
if runs:
    args = ("completions", "length", "REINFORCE", plotting.COLORS[2])
    plotting.draw_runs(length, runs, *args)
if settings.preset != "full":
    plotting.draw_live(length, run, "completions", "length")
length.legend(loc="lower right")
length.set(xlabel="answers drawn", ylabel="tokens per answer", ylim=(0, None))
length.set_title("answers grow")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# The second shows the dials. Raising the accuracy on one problem from p to a costs at
# least a log(a/p) + (1−a) log((1−a)/(1−p)) nats of KL, whatever the method. The
# *frontier* is the best mean accuracy for each mean KL, computed from the base's
# success rates on 500 test problems (lesson 02). The star is the trained policy on
# those same problems; the lines are training batches of other problems, and noisier.

# %%
figure, axes = plotting.new_figure(3, "What each dial does to pace, price and noise")
pace, price, noise = axes
shown = dials or record.get("0", {}).get("dials", {})
drawn = [item for item in shown.items() if "lr" not in item[0]]
for (name, row), color in zip(drawn, plotting.COLORS, strict=False):
    trace = {"series": row["series"]}
    broken = "broken" in name
    plotting.draw_runs(pace, [trace], "completions", "accuracy", name, color)
    line = [plotting.smoothed(row["series"][key], 5) for key in ("kl", "accuracy")]
    price.plot(*line, color=color, lw=1, ls=":" if broken else "-")
line = [plotting.smoothed(series[key], 9) for key in ("kl", "accuracy")]
price.plot(*line, "k-", lw=1.6, label="this run, while training")
kls, accuracies = frontier(success)
price.plot(kls, accuracies, color="#888", lw=2, label="frontier (500 test problems)")
price.plot(spent.value, bought, "k*", ms=13, label="this run, on those problems")
price.set(xlabel="KL to the base, nats per answer", ylabel="sampled accuracy",
          xlim=(0, max(series["kl"]) * 1.2 + 0.1), ylim=(0, 1))  # fmt: skip
price.set_title("what accuracy costs")
price.legend(loc="lower right")
pace.set(xlabel="answers drawn", ylabel="sampled accuracy", ylim=(0, 1))
pace.set_title("other baselines, and a price on KL")
if shown:
    pace.legend()
plotting.draw_base(pace, base)
plotting.draw_base(price, base)

# %%
row = (frozen or record.get("0", {}).get("signal_to_noise", {})).get("base", {})
noise.barh(list(row), row.values(), color=plotting.COLORS[2])
noise.set(xlabel="signal to noise per answer, at the base")
noise.set_title("same answers, other baseline")
dials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, dials_path)

# %% [markdown]
# ## What we saw

# %%
share = series["style_worked"]
print(f"""
- Sampled accuracy went from {was.mean():.2f} to {now.mean():.2f}: {gap.value:.0%} of
  the way to the base forced to work ({forced.correct.mean():.2f}).
- Worked answers went from {share[0]:.0%} to {share[-1]:.0%} of the samples. No reward
  ever mentioned them.
- Greedy accuracy: {before["greedy"].correct.mean():.2f} to
  {after["greedy"].correct.mean():.2f}. Sharpening alone explains
  {base["best_temperature"]["accuracy"][0]:.2f}: the base at its best temperature.
- The loss was {series["loss"][0]:.2f} at first and {series["loss"][-1]:.2f} at the end.
  It is no measure of progress: only its gradient means anything.
""")
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, bootstrap(was), bootstrap(now), measure)

# %% [markdown]
# Exercises. (1) `reinforce.train` samples and scores at one temperature. Sample at 0.7
# and score at 1: whose gradient is it then? (Nobody's: answers come from another policy
# than the one whose log π is used.) (2) Reward right answers of fewer than 15 tokens
# only. (Then working cannot pay, and `terse` is what is left.)
