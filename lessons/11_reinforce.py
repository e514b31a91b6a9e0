# %% [markdown]
# # Lesson 11: Learning from rewards (REINFORCE)
#
# **Question.** The base can work problems out but mostly does not care to. Can it learn
# to, when all it is ever told is whether its answer was right?
#
# Read before: lesson 01 (imitation), lesson 02 (the verifier), and of lesson 03 "What
# accuracy costs" (KL, the frontier).
#
# REINFORCE draws answers from the policy itself, asks a *reward* how good each one is,
# and makes each answer more or less likely in proportion. Nobody shows it a good
# answer.
#
# You will see: accuracy rises, and the answers grow longer, because the policy finds
# out that showing its work pays. And you will see what a *baseline* does to the noise.
#
# Time: `quick` about 50 s on two CPU cores; `full` some four minutes a seed there (the
# trials are in seed 0). Memory: about 2 GB.

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
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import reinforce
from minialign.evaluation import policy_gradient, signal_to_noise
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %%
settings = course.setup("11_reinforce")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = reinforce.ReinforceConfig(
    updates=settings.pick(2, 22, 64),
    prompts=settings.pick(2, 32, 32),
    max_new_tokens=settings.pick(32, 128, 128),
)

# %% [markdown]
# ## By hand
#
# Four answers to one question, two of them right: rewards 1, 1, 0, 0. The gradient of
# REINFORCE is the mean over answers of (reward − baseline) · ∇ log π(answer), where
# log π(answer) is the *sum* of its tokens' log-probabilities: the answer is one action.
#
# A *baseline* is a number subtracted from all rewards. Without one, right answers are
# pulled up and wrong ones left alone. With the mean reward as baseline, right answers
# are pulled up and wrong ones pushed down. (`x B` undoes the loss's division by the
# batch's 4 answers.)

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
# ## One run
#
# From the base, with any config. The problems are fresh every time, so the mean reward
# of a batch is also an honest estimate of sampled accuracy.


# %%
def run_reinforce(config: reinforce.ReinforceConfig, settings, **options) -> tuple:
    """The trained policy and its series."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    paid, right, series = options.pop("reward", verifier), [], {}
    problems = course.stream(settings.seed, config.updates * config.prompts)
    start = time.perf_counter()

    def watched(asked, texts):
        """Whatever is paid, the verdicts are kept."""
        right.append(sum(verifier(asked, texts)) / len(texts))
        return paid(asked, texts)

    training = reinforce.train(
        policy, tokenizer, problems, watched, config, reference=reference,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.updates, disable=None):
        clock = {"accuracy": right[-1], "seconds": time.perf_counter() - start}
        course.keep_series(series, metrics | clock)
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## Train
#
# 32 problems, 8 answers to each, one step, no baseline (why: "What a baseline is for").

# %%
policy, series = run_reinforce(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)

# %% [markdown]
# ## After

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
curve = series["completions"], series["accuracy"]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)
grown = run["length"][1][0]
course.predict("Tokens per answer after training:", my_guess, grown)

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
def compare_baselines(policy, mean: float, batches: int, N: int) -> dict[str, float]:
    """Per answer, from independent batches of N problems, one answer each."""
    paid, plain, own = [], [], []  # Σ r ∇ log π, Σ ∇ log π, the batch's mean reward
    extra = course.stream(settings.seed + 1, N * batches)
    draw = settings.generator("signal to noise")
    for i in tqdm(range(batches), disable=None):
        asked = extra[N * i : N * i + N]
        rollout = generate(
            policy, [tokenizer.encode_prompt(p.question) for p in asked],
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
            max_new_tokens=config.max_new_tokens, generator=draw,
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
    found["batch mean"] = (paid - means * plain) * N / (N - 1)
    found[f"best constant, {best:.2f}"] = paid - best * plain
    return {name: signal_to_noise(g, N) for name, g in found.items()}


# %%
record = plotting.load_record(settings.lesson)
frozen = {}
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    sizes = settings.pick((2, 4), None, (64, 32))
    for where, model in (("base", copy.deepcopy(reference)), ("trained", policy)):
        model.requires_grad_(True)
        mean = (before if where == "base" else after).sampled.correct.mean()
        frozen[where] = compare_baselines(model, mean, *sizes)
run |= {"signal_to_noise": frozen} if frozen else {}
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

# %% [markdown]
# ## Trials, and breaking it
#
# Shorter runs of 4,096 answers, one seed, their learning rate falling to 0, judged on
# validation (the intervals are over problems; another seed can differ by more). From
# the first six the settings of this lesson were chosen, by one rule for all methods
# (figures/README.md). The broken variant loses the one idea: every answer earns 1, so
# the *expected* gradient is 0 and only noise moves the policy.
#
# *KL*(policy ‖ base), in nats, says how far the policy has moved: the mean over its own
# answers of log π(answer) − log base(answer). With *beta*, it is paid for out of the
# reward: r − beta · KL.

# %%
short = replace(config, updates=settings.pick(1, 16, 16))


def one_for_all(problems, texts):
    """Every answer earns 1."""
    return [1.0] * len(texts)


tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "moving average": (short, {"baseline": reinforce.moving_average}),
    "batch mean": (short, {"baseline": reinforce.batch_mean}),
}
trials = tuning | {
    "beta 0.03": (replace(short, beta=0.03), {}),
    "beta 0.1": (replace(short, beta=0.1), {}),
    "broken: all earn 1": (short, {"reward": one_for_all}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_reinforce, tuning)
exam.print_trials(tried)

# %% [markdown]
# ## The figures
#
# First the message. The dashed line is the base *forced to work*. Raising the accuracy
# on one problem from p to a costs at least a log(a/p) + (1−a) log((1−a)/(1−p)) nats of
# KL, whatever the method. The *frontier* is the best mean accuracy for each mean KL,
# computed from the base's success rates on 500 test problems (lesson 02).

# %% tags=["plot"]
(was, *_), (now, *_) = run["sampled"]
figure, axes = plotting.new_figure(
    3,
    f"Rewarded only for right answers, it shows its work: {was:.2f} to {now:.2f} "
    f"right, {grown / run['length'][0][0]:.1f} x as long (seed {settings.seed})",
)
rise, shares, price = axes
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "REINFORCE")
plotting.draw_styles(shares, run, "completions")
shares.set(xlabel="answers generated")
shares.set_title("how it answers")
plotting.draw_price(price, runs or [run], course.base_success(), base)
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Left: sampled accuracy in training, each committed seed and their mean,
# between the base at its best temperature (dotted) and forced to work (dashed). Middle:
# how the answers of this run were written. Right: accuracy after training against KL to
# the base, a star a seed, under the frontier.

# %% tags=["plot"]
figure, axes = plotting.new_figure(3, "What the settings do to pace, price and noise")
accuracy, cost, noise = axes
plotting.draw_trials(accuracy, tried, default="lr 8e-4")
plotting.draw_trial_prices(cost, tried)
row = shown_frozen.get("base", {})
noise.barh(list(row), row.values(), color=plotting.COLORS[2])
noise.set(xlabel="signal to noise per answer, at the base")
noise.set_title("same answers, other baseline")
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# **Figure 2.** The trials: sampled accuracy on validation with its interval, the star
# for the settings of this lesson; the same against KL to the base; and the signal to
# noise of one answer's gradient at the base, by baseline.
#
# ## What we saw

# %%
share = series["style_worked"]
print(f"""
- Sampled accuracy went from {was:.2f} to {now:.2f}: {run["gap_closed"][0]:.0%} of the
  way to the base forced to work.
- Worked answers went from {share[0]:.0%} to {share[-1]:.0%} of the samples. No reward
  ever mentioned them.
- Greedy accuracy: {run["greedy"][0][0]:.2f} to {run["greedy"][1][0]:.2f}. Sharpening
  alone explains {base["best_temperature"]["accuracy"][0]:.2f}: the base at its best
  temperature.
- The loss was {series["loss"][0]:.2f} at first and {series["loss"][-1]:.2f} at the end.
  It is no measure of progress: only its gradient means anything.
""")
ends = [bootstrap(e.sampled.correct.mean(1)) for e in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# **Exercise 1 (explain).** `reinforce.train` samples and scores at one temperature.
# Sample at 0.7 and score at 1: whose gradient is it then?
#
# **Exercise 2 (change).** Reward right answers of fewer than 8 tokens only.

# %% [markdown] tags=["answers"]
# **Answer 1.** Nobody's: answers come from another policy than the one whose log π is
# used.
#
# **Answer 2.** Then working cannot pay, and `terse` is what is left.
