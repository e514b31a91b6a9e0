# %% [markdown]
# # Lesson 12: Compared with its own best guess (ReMax)
#
# **Question.** A baseline should know how hard the problem is. Can the policy's own
# greedy answer tell it, and is that worth an answer that is never learned from?
#
# Read before: lesson 11 (REINFORCE, and what a baseline is for).
#
# ReMax asks each problem twice: once sampled, once *greedy* (the likeliest token at
# every step). The advantage is the sampled answer's reward less the greedy one's. No
# critic and no ratio; one update per batch. Where both earn the same, nothing happens.
#
# You will see: how many answers are silent, and ever more so; what the greedy answer
# buys, per answer *generated*; and what PPO's critic would cost in bytes and seconds.
#
# Time: `quick` about 50 s on two CPU cores; `full` some four minutes a seed there (the
# trials and the baselines are in seed 0). Memory: about 3 GB.

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
import timeit
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import remax
from minialign.evaluation import policy_gradient, signal_to_noise
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.model import ScalarHead
from minialign.rewards import score, verifier
from minialign.sampling import generate

# %%
settings = course.setup("12_remax")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = remax.RemaxConfig(
    updates=settings.pick(2, 20, 64),
    prompts=settings.pick(2, 128, 128),
    max_new_tokens=settings.pick(32, 128, 128),
)
limits = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
limits["max_new_tokens"] = config.max_new_tokens

# %% [markdown]
# ## By hand
#
# The four answers of lesson 11 earn 1, 1, 0, 0. If the greedy answer is wrong, only the
# right ones move: up. If it is right, only the wrong ones move: down.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    scored = tokens.to(settings.device), mask.to(settings.device)
    logprobs = token_logprobs(reference, *scored).cpu()  # (4, S)
rows = {}
for verdict, earned in (("right", 1.0), ("wrong", 0.0)):
    greedy = torch.full((4,), earned)  # four times the same problem
    advantages = remax.remax_advantages(rewards[:, None], greedy)[:, 0]  # (4,)
    weights = remax.whole_answer(advantages, torch.zeros_like(logprobs), mask, 0.0)
    leaf = logprobs.clone().requires_grad_()
    remax.remax_loss(leaf, weights, mask).backward()
    by_hand = torch.where(mask, (rewards - earned)[:, None], 0.0)
    assert torch.allclose(-4 * leaf.grad, by_hand)
    rows[f"ReMax, greedy {verdict} (x B)"] = advantages
hand = course.hand_table(settings.lesson, rows)

prompt = tokenizer.encode_prompt(course.HAND_PROBLEM.question)
(said,) = generate(reference, [prompt], greedy=True, **limits).responses()
print(f"the base's own greedy answer: {tokenizer.decode_response(said)!r}")

# %% [markdown]
# Half of the four are silent in either case. The greedy answer does not look at the
# sampled one, so its reward leaves the expected gradient as it was, exactly
# (the tests sum over all answers of a small world). Only noise changes.
#
# ## Predict
#
# Which share of the sampled answers of a run will tie with the greedy one, and teach
# nothing? (Were the two independent at the base, 46 % and 40 % right: about half.)

# %%
my_guess = 0.5  # edit me

# %% [markdown]
# ## One run
#
# 128 problems, one sampled and one greedy answer each: 256 generated, 128 learned from.


# %%
def run_remax(config: remax.RemaxConfig, settings, stale=False, **options) -> tuple:
    """The trained policy and its series; `stale`: the base gives the greedy answers."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    if stale:
        options["greedy_policy"] = reference
    problems = course.stream(settings.seed, config.updates * config.prompts)
    series, start = {}, time.perf_counter()
    training = remax.train(
        policy, tokenizer, problems, verifier, config, reference=reference,
        generator=settings.generator("sampling"), **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.updates, disable=None):
        seconds = time.perf_counter() - start
        clock = {"accuracy": metrics["reward"], "seconds": seconds}
        course.keep_series(series, metrics | clock)
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## Train

# %%
policy, series = run_remax(config, settings)
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
silent = float(np.mean(series["ties"]))
course.predict("Share of sampled answers that tied:", my_guess, silent)

# %% [markdown]
# ## Silence
#
# A tie costs two answers. A policy that is nearly always right must tie nearly always.

# %%
quarters = [float(q.mean()) for q in np.array_split(series["ties"], 4) if len(q)]
drawn = series["completions"][-1]
run["ties"] = {"share": silent, "quarters": quarters, "answers": silent * drawn}
print(f"ties by quarters of the run: {', '.join(f'{q:.0%}' for q in quarters)}")
lead = np.subtract(series["reward"], series["greedy_reward"])  # share up - share down
up, down = (np.mean((1 - np.array(series["ties"]) + x)[len(lead) // 2 :]) / 2
            for x in (lead, -lead))  # fmt: skip

# %% [markdown]
# ## What the greedy answer buys
#
# Signal to noise as in lesson 11, |mean gradient|² / variance, at a frozen policy, but
# per answer **generated**: with K sampled answers to a problem, ReMax pays K + 1. The
# same answers serve every baseline: none, the batch's mean, the mean of the problem's
# *other* answers (leave-one-out, lesson 13), the greedy answer. Of each of 16 problems
# all 8 samples are used or, in "1 each", one. The ± is one standard error (jackknife).


# %%
def weigh_all(r: torch.Tensor, greedy: torch.Tensor) -> dict:
    """{baseline: (advantages (N, K), answers generated)}."""
    N, K = r.shape
    found = {"none": (r, N * K), "batch mean": (r - r.mean(), N * K)}
    if K > 1:
        found["leave-one-out"] = (r * K - r.sum(1, keepdim=True)) / (K - 1), N * K
    return found | {"greedy": (remax.remax_advantages(r, greedy), N * (K + 1))}


def with_error(gradients: torch.Tensor, generated: int) -> list[float]:
    """[signal to noise per answer generated, standard error]."""
    if not gradients.any():  # all ties
        return [0.0, 0.0]
    parts = torch.arange(len(gradients)).chunk(min(8, len(gradients) // 2))
    kept = [torch.cat([p for p in parts if p is not out]) for out in parts if parts[1:]]
    values = [signal_to_noise(gradients[rows], generated) for rows in kept] or [0.0]
    error = np.std(values) * (len(values) - 1) ** 0.5
    return [signal_to_noise(gradients, generated), float(error)]


# %%
def compare_baselines(policy: torch.nn.Module, batches: int, N: int, K: int) -> dict:
    """{baseline: [signal to noise, error]} from batches of N problems, K answers."""
    extra = course.stream(settings.seed + 1, N * batches)
    draw, kept, paid = settings.generator("signal to noise"), {}, {}
    for i in tqdm(range(batches), disable=None):
        asked = extra[N * i : N * i + N]
        prompts = [tokenizer.encode_prompt(problem.question) for problem in asked]
        rollout = generate(policy, prompts, samples=K, generator=draw, **limits)
        r = score(verifier, asked, rollout, tokenizer).view(N, K)
        greedy = generate(policy, prompts, greedy=True, **limits)
        g = score(verifier, asked, greedy, tokenizer)  # (N,)
        first = rollout.select(torch.arange(0, N * K, K, device=r.device))
        for sampled, rewards, name in ((rollout, r, ""), (first, r[:, :1], ", 1 each")):
            for kind, (advantages, generated) in weigh_all(rewards, g).items():
                gradient = policy_gradient(policy, sampled, advantages.flatten())
                kept.setdefault(kind + name, []).append(gradient)
                paid[kind + name] = generated
    return {name: with_error(torch.stack(kept.pop(name)), paid[name]) for name in paid}


# %%
record = plotting.load_record(settings.lesson)
if (settings.preset, settings.seed) == ("full", 0) or settings.preset == "smoke":
    sizes = settings.pick((2, 2, 2), None, (16, 16, 8))
    run["signal_to_noise"] = {
        where: compare_baselines(copy.deepcopy(model).requires_grad_(True), *sizes)
        for where, model in (("base", reference), ("trained", policy))
    }
frozen = run.get("signal_to_noise") or record.get("0", {}).get("signal_to_noise", {})
if frozen and "signal_to_noise" not in run:
    print("(from the record, not from this run)")
for where, row in frozen.items():
    print(f"signal to noise per answer generated, {where}:")
    for name, (value, error) in row.items():
        print(f"  {name:<24}{value:>11.2e} ± {error:.1e}")

# %% [markdown]
# ## What a critic would cost
#
# PPO (lesson 15) predicts the reward with a *critic*: a network of its own, or a head
# on the policy's hidden states (a shared trunk). In float32 each trained number costs
# 4 bytes, its gradient 4 and AdamW's two moments 8. *Activations* are what the forward
# pass keeps for the backward pass, measured here on one micro-batch of real answers
# (weights not counted twice). A reference model (4 bytes a weight) comes on top of all
# three, but only with beta > 0. The critic's loss here is a stand-in: mean square.


# %%
def one_pass(rollout, network, critic=None, head=None) -> torch.Tensor:
    """The loss of a micro-batch, as each layout needs it."""
    live, inputs = rollout.mask, rollout.tokens[:, :-1]
    hidden, chosen = network(inputs), rollout.tokens[:, 1:][live]  # (B, S, D), (live,)
    logits = network.logits(hidden[live])  # (live, V)
    loss = torch.nn.functional.cross_entropy(logits, chosen)
    if head is None:
        return loss
    values = head(hidden if critic is None else critic(inputs))  # (B, S)
    return loss + (values[live] - 0.5).square().mean()


# %%
def kept_bytes(loss_of, *modules: torch.nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves, without the weights'."""
    ours = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of()  # alive while we count, so no address is used twice
    del loss
    return sum(size for address, size in saved.items() if address not in ours)


def seconds_of(work) -> float:
    """The fastest of three: what the machine can do, others' load aside."""
    wait = torch.cuda.synchronize if settings.device.type == "cuda" else list
    return min(timeit.repeat(lambda: (work(), wait()), number=1, repeat=3))


# %%
asked = course.stream(settings.seed + 2, settings.pick(2, 64, 64))
prompts = [tokenizer.encode_prompt(problem.question) for problem in asked]
sample = partial(generate, reference, prompts, **limits)
greedily = partial(sample, greedy=True)
sample = partial(sample, generator=settings.generator("cost"))
actor = copy.deepcopy(reference).requires_grad_(True)
critic, head = copy.deepcopy(actor), ScalarHead(actor.config.dim).to(settings.device)
critic.lm_head = torch.nn.Identity()  # a critic has no use for the vocabulary
layouts = {
    "ReMax": (actor,),
    "PPO, shared trunk": (actor, None, head),
    "PPO, own critic": (actor, critic, head),
}
cost, part = {}, sample()
seconds = {"sampled": seconds_of(sample), "greedy": seconds_of(greedily)}
for name, parts in layouts.items():
    modules, work = [m for m in parts if m is not None], partial(one_pass, part, *parts)
    count = sum(p.numel() for m in modules for p in m.parameters())
    cost[name] = {"weights": 4 * count, "gradients": 4 * count, "AdamW": 8 * count}
    cost[name]["activations"] = kept_bytes(work, *modules)
    seconds[name] = seconds_of(lambda work=work: work().backward())

# %%
run["cost"], ours = {"bytes": cost, "seconds": seconds}, cost["ReMax"]
print(f"MB to train on {len(asked)} answers; ReMax's share, with activations and "
      "without; seconds for 256 answers generated")  # fmt: skip
for name, row in cost.items():
    total, least, kept = sum(row.values()), sum(ours.values()), "activations"
    cells = "  ".join(f"{item} {size / 1e6:.1f}" for item, size in row.items())
    trained = 128 if name == "ReMax" else 256  # PPO with one epoch
    took = trained * (seconds["sampled"] + seconds[name])
    took += (256 - trained) * seconds["greedy"]
    fixed = (least - ours[kept]) / (total - row[kept])
    print(f"{name:<18}{cells}  {least / total:.0%}  {fixed:.0%}  "
          f"{took / len(asked):.1f} s")  # fmt: skip
largest = max(ours, key=ours.get)

# %% [markdown]
# The paper reports 46 % of PPO's memory *saved* at 7 B weights, a share of 54 %:
# compare it with PPO's own critic, two networks for one. Here PPO's two losses share a
# backward pass; one after the other, only one network's activations are held at a time.
# Greedy answers cost time but no such memory. And see how little a shared trunk adds.
#
# ## Trials, and breaking it
#
# Short runs of 4,096 answers, greedy ones counted. Three samples may share a greedy
# answer; the *authors' weights* discount by 0.99 from the last token and take the token
# mean.
# Without the idea: no baseline (the greedy answers are drawn for nothing), the greedy
# answers of *another problem*, *stale* ones from the base. None of these three is
# biased, for none looks at the sampled answer: only the noise differs. Last, three long
# runs: as above; with no baseline; with 256 answers to learn from per update, as many
# as lesson 11 has. What holds ReMax back, its baseline or the answers it pays for?

# %%
short = replace(config, updates=settings.pick(1, 16, 16))
high = replace(short, lr=1.6e-3)
wide = replace(high, prompts=settings.pick(2, 64, 64), samples=3)
double = replace(config, prompts=settings.pick(2, 256, 256))
others = {"compare": lambda r, g: remax.remax_advantages(r, g.roll(1))}
alone, code = {"compare": lambda r, g: r}, {"weigh": remax.code_weights}
tuning = {  # name: (config, other arguments)
    "lr 2e-4": (replace(short, lr=2e-4), {}),
    "lr 4e-4": (replace(short, lr=4e-4), {}),
    "lr 8e-4": (replace(short, lr=8e-4), {}),
    "lr 1.6e-3": (replace(short, lr=1.6e-3), {}),
    "lr 3.2e-3": (replace(short, lr=3.2e-3), {}),
    "lr 1.6e-3, 3 samples": (wide, {}),
    "lr 1.6e-3, authors' weights": (high, code),
}
trials = tuning | {
    "no baseline": (short, alone),
    "another problem's greedy": (short, others),
    "stale greedy (the base's)": (short, {"stale": True}),
    "16,384": (config, {}),
    "16,384, no baseline": (config, alone),
    "32,768, half of them greedy": (double, {}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_remax, tuning)
exam.print_trials(tried)

# %% [markdown]
# ## The figures

# %%
(was, *_), (now, *_) = run["sampled"]
figure, axes = plotting.new_figure(
    3,
    f"Compared with its own greedy answer: {was:.2f} to {now:.2f} right (seed "
    f"{settings.seed}); {silent:.0%} of the comparisons were ties",
)
rise, price, silence = axes
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "ReMax")
plotting.draw_price(price, runs or [run], course.base_success(), base)
names = {"ties": "ties", "reward": "sampled right", "greedy_reward": "greedy right"}
for key, name in names.items():
    silence.plot(curve[0], plotting.smoothed(series[key], 5), label=name)
silence.set(xlabel="answers generated", ylabel="share", ylim=(0, 1))
silence.set_title("how many comparisons are silent")
silence.legend()
plotting.save_figure(figure, settings.figure_path)

# %%
figure, axes = plotting.new_figure(3, "What it is worth, what it costs, what it needs")
accuracy, noise, memory = axes
plotting.draw_trials(accuracy, tried, default="lr 4e-4")
for shift, (where, row) in zip((-0.2, 0.2), frozen.items(), strict=False):
    values, errors = np.array(list(row.values())).T
    at = np.arange(len(row)) + shift
    noise.barh(at, values, 0.38, xerr=errors, label=f"{where} policy")
    noise.set_yticks(range(len(row)), row, fontsize=9)
    noise.legend()
noise.set(xlabel="signal to noise per answer generated")
left = np.zeros(len(cost))
for item in ours:
    sizes = np.array([row[item] / 1e6 for row in cost.values()])
    memory.barh(list(cost), sizes, left=left, label=item)
    left += sizes
memory.set(xlabel=f"MB while training on {len(asked)} answers")
memory.legend()
plotting.save_figure(figure, settings.figure_path.with_name("12_remax_dials.png"))

# %% [markdown]
# ## What we saw

# %%
print(f"""
- Sampled accuracy went from {was:.2f} to {now:.2f} in {drawn:,}, half of them greedy.
- Ties: {quarters[0]:.0%} of the first quarter, {quarters[-1]:.0%} of the last.
- In the second half {up:.0%} of the comparisons pulled a right answer up and {down:.0%}
  pushed a wrong one down: beside a good greedy answer little is left to praise.
- The largest item in memory at our size: {largest}.""")
exam.compare_trials(tried, "16,384", "16,384, no baseline", "The baseline's share")
exam.compare_trials(tried, "32,768, half of them greedy", "16,384", "The answers'")
ends = [bootstrap(e.sampled.correct.mean(1)) for e in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# Exercises. (1) Skip the backward pass of ties: which numbers change? (With beta 0 only
# the seconds.) (2) With beta > 0, take beta times the greedy answer's own KL out of its
# reward: biased? (No: it still does not look at the sampled answer.) Next, lesson 13
# (RLOO): a baseline from answers that are learned from as well.
