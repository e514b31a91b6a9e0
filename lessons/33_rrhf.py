# %% [markdown]
# # Lesson 33: Ranking one's own answers (RRHF)
#
# **Question.** If a policy is taught to find its right answers likelier than its wrong
# ones, *per token*, will it also give right answers more often?
#
# Read before: lesson 10 (rejection sampling) and lesson 30 (DPO).
#
# RRHF draws K answers to a problem and compares each right one with each wrong one. As
# its *score* an answer has the mean log-probability of its tokens. Where a wrong answer
# scores higher, the *ranking loss* pushes the two past each other and then lets go; and
# one right answer is imitated. No reference, no value model, no ratio.
#
# You will see: which pairs are in the wrong order before any training; what ranking
# does alone, and imitation alone; whose answers to rank; and what a length is good for.
#
# Time: `quick` about 60 s on two CPU cores; `full` some four minutes a seed there (the
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
from collections import defaultdict
from dataclasses import asdict, replace
from random import Random

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import rrhf
from minialign.intervals import bootstrap
from minialign.logprobs import masked_sum, token_logprobs
from minialign.problems import demonstration, style_of, verify
from minialign.rewards import score, verifier
from minialign.sampling import Rollout, collate, generate

# %%
settings = course.setup("33_rrhf")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = rrhf.RRHFConfig(
    rounds=settings.pick(2, 1, 4),
    prompts=settings.pick(4, 512, 512),
    samples=settings.pick(4, 8, 8),
    max_new_tokens=settings.pick(32, 128, 128),
    updates=settings.pick(1, 16, 32),
    batch=settings.pick(2, 32, 32),
)

# %% [markdown]
# ## By hand
#
# Four answers to one question, two right, two wrong: four pairs. The score s is the
# mean log-probability of a token. A pair in which the wrong one has the higher s gives
# −∇s to the wrong one and +∇s to the right one; and ∇s is ∇ log π divided by the
# *length*: the shorter the answer, the harder each of its tokens is moved. Imitation
# has weight 100 here. The authors' code has 1; the paper adds up the tokens of the best
# answer, which comes to some 28 in the same units. The trials show the two ends.

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
with torch.no_grad():
    scored = reference, tokens.to(settings.device), mask.to(settings.device)
    logprobs = token_logprobs(*scored).cpu()  # (4, S)
s, pushes = rrhf.mean_logprobs(logprobs, mask).tolist(), [0] * 4
print("s:", "  ".join(f"{x:.3f}" for x in s), " lengths:", mask.sum(1).tolist())
for right, wrong in itertools.product((0, 1), (2, 3)):
    if s[wrong] + config.margin > s[right]:
        pushes[right] += 1
        pushes[wrong] -= 1
by_hand = torch.tensor(pushes) / mask.sum(1)
imitated = torch.tensor([1.0, 0, 0, 0]) / mask.sum(1)  # the first of the right ones
rows = {}
for name, weight, expected in (
    ("RRHF, ranking alone", 0.0, by_hand),
    ("RRHF, with imitation", config.sft_weight, by_hand + config.sft_weight * imitated),
):
    leaf = logprobs.clone().requires_grad_()
    options = {"sft_weight": weight, "margin": config.margin}
    rrhf.rrhf_loss(leaf, rewards[None], mask, **options).backward()
    assert torch.allclose(-leaf.grad, torch.where(mask, expected[:, None], 0.0))
    rows[name] = expected
hand = course.hand_table(settings.lesson, rows)

# %% [markdown]
# ## Predict

# %%
print("A pair is a right and a wrong answer of the base to one problem. In how many")
print("pairs does the wrong one have the higher score?")
my_guess = 0.5  # edit me

# %% [markdown]
# ## One run
#
# A round draws 512 x 8 answers and takes 32 steps, each on 32 problems with all their
# answers. The mean reward of a draw is the sampled accuracy *before* it is learnt from.


# %%
def run_rrhf(config: rrhf.RRHFConfig, settings, answers=None, **options) -> tuple:
    """The trained policy and its series; `answers` writes them instead of drawing."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.rounds * config.prompts)
    given = answers(config, settings) if answers else None
    if given:  # 4 to a problem: as many answers a step, of more problems
        config = replace(config, batch=config.batch * config.samples // 4)
    series, start = {}, time.perf_counter()
    training = rrhf.train(
        policy, tokenizer, problems, verifier, config, given=given,
        generator=settings.generator("sampling"), reference=reference, **options,
    )  # fmt: skip
    for metrics in tqdm(training, total=config.rounds * config.updates, disable=None):
        course.keep_series(series, metrics | {"seconds": time.perf_counter() - start})
    series["accuracy"] = series.get("reward", [])
    return policy, series


# %% [markdown]
# ## Before

# %%
before = exam.exam(settings, tokenizer, reference, "before")
exam.show_answers(before)

# %% [markdown]
# ## What does the base score highest?
#
# Fresh answers of the base, sorted by style and by right or wrong.

# %%
Weighed = list[list[tuple[str, float, float, int]]]  # per problem, per answer


def weigh(policy: torch.nn.Module) -> Weighed:
    """Each answer's kind, mean and sum of log-probs, tokens."""
    asked, found = course.stream(settings.seed + 1, settings.pick(4, 128, 256)), []
    rollout = generate(
        policy, [tokenizer.encode_prompt(problem.question) for problem in asked],
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_new_tokens=128,
        samples=8, generator=settings.generator("weigh"),
    )  # fmt: skip
    sums = masked_sum(rollout.logprobs, rollout.mask).tolist()
    for row, ids in enumerate(rollout.responses()):
        problem, text = asked[row // 8], tokenizer.decode_response(ids)
        right = verify(problem, text) and not rollout.truncated[row]
        kind = style_of(problem, text) + (", right" if right else ", wrong")
        found.append((kind, sums[row] / len(ids), sums[row], len(ids)))
    return [found[i : i + 8] for i in range(0, len(found), 8)]


# %%
weighed, found = weigh(reference), defaultdict(list)
for kind, *numbers in itertools.chain(*weighed):
    found[kind].append(numbers)
kinds = {  # kind: share of answers, mean score, mean sum, mean tokens
    kind: [len(rows) / sum(map(len, weighed)), *np.mean(rows, 0).tolist()]
    for kind, rows in sorted(found.items(), key=lambda item: -len(item[1]))
}
print(f"{'kind':<18}{'share':>7}{'mean':>9}{'sum':>8}{'tokens':>8}")
for kind, row in kinds.items():
    print(f"{kind:<18}{row[0]:>7.3f}{row[1]:>9.3f}{row[2]:>8.2f}{row[3]:>8.1f}")


# %%
def compare(weighed: Weighed, column: int) -> dict[str, list[int]]:
    """'right kind > wrong kind': pairs, and those that stand in the wrong order."""
    pairs = defaultdict(lambda: [0, 0])
    for answers in weighed:
        for a, b in itertools.product(answers, answers):
            if a[0].endswith("right") and b[0].endswith("wrong"):
                counts = pairs[f"{a[0][:-7]} > {b[0][:-7]}"]
                counts[0] += 1
                counts[1] += b[column] > a[column]
    return dict(sorted(pairs.items(), key=lambda item: -item[1][0]))


pairs, by_sums = compare(weighed, 1), compare(weighed, 2)
total = sum(n for n, _ in pairs.values())
print(f"\n{'right > wrong':<24}{'share':>7}   in the wrong order by mean, by sum")
for name, (n, wrong) in pairs.items():
    share, sums = n / max(total, 1), by_sums[name][1] / n
    print(f"{name:<24}{share:>7.3f}{wrong / n:>10.2f}{sums:>8.2f}")
violated = sum(wrong for _, wrong in pairs.values()) / max(total, 1)
course.predict("Share of pairs in the wrong order:", my_guess, violated)

# %% [markdown]
# A worked answer has many tokens that could hardly be others; a terse one has few, and
# its number is a guess. Where worked answers lead in the means above, the ranking loss
# has nothing to ask of them, *however seldom they are given*: an order of means says
# little about odds. What is left to push are the pairs in the wrong order, and in those
# the policy may learn to lift the terse. (The tests have an exact world in which the
# loss is 0 and accuracy 16 %.)
#
# ## Train

# %%
policy, series = run_rrhf(config, settings)
if settings.preset != "smoke":
    checkpoint.save_model(settings.policy_path, policy, tokenizer)
columns = ["reward", "violated", "mean_logprob_right", "mean_logprob_wrong"]
columns += ["tied", "unanswered"]
print("round" + "".join(f"{name:>20}" for name in columns))
for i in range(0, len(series["round"]), config.updates):
    row = [np.mean(series[name][i : i + config.updates]) for name in columns]
    print(f"{series['round'][i]:>5}" + "".join(f"{value:>20.3f}" for value in row))

# %% [markdown]
# ## After

# %%
after = exam.exam(settings, tokenizer, policy, "after")
exam.show_answers(after)
draws = slice(None, None, config.updates)
last = float(after.sampled.correct.mean())
curve = [0, *series["completions"][draws]], [*series["accuracy"][draws], last]
run = {"config": asdict(config), "series": series, "hand": hand, "curve": curve}
run |= {"kinds": kinds, "pairs": pairs, "pairs_by_sums": by_sums}
run |= exam.report(settings, tokenizer, policy, reference, before, after, curve)

# %% [markdown]
# ## Trials, and breaking it
#
# All see 4,096 answers in 16 or 32 steps, judged on validation, with one seed. Adam
# hardly cares how long a gradient is, only which of its two terms is the longer:
# ranking sums over up to 16 pairs of a problem, imitation is a mean over tokens.
# Answers come from the paper's three sources: *given* by others (here the four kinds of
# "By hand" to each of 1,024 problems), *own, once*, *own, in rounds*.


# %%
DEFAULT = "32 updates"  # lr 8e-4, imitation x 100


def unranked(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every answer scores alike: no pair lacks anything, imitation is left."""
    return 0.0 * rrhf.mean_logprobs(logprobs, mask)


def padded_width(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Broken, as in the authors' code: the width of the batch as everyone's length."""
    return rrhf.summed_logprobs(logprobs, mask) / mask.shape[1]


def four_kinds(text: str, random: Random) -> list[str]:
    """A worked answer, and from it a terse, a mistaken terse and a careless one."""
    *lines, last = text.split("\n")
    value = int(last.removeprefix("#### "))
    dropped = [*lines[:-1], f"#### {lines[-2].split('=')[1].removesuffix('>>')}"]
    texts = [text, last, f"#### {value + random.randint(1, 9)}", "\n".join(dropped)]
    return random.sample(texts, 4)  # in no order: the first right one is imitated


# %%
def teachers(config: rrhf.RRHFConfig, settings) -> rrhf.Judged:
    """As many answers as a round draws, 4 to each problem. The policy did not write
    them: their log-probs when written are nan."""
    random = Random(settings.seed)
    rows = (demonstration(settings.seed, "train", 10_000_000 + i) for i in range(10**6))
    worked = (x for x in rows if x.style == "worked" and x.problem.steps > 1)
    chosen = list(itertools.islice(worked, config.prompts * config.samples // 4))
    asked = [x.problem for x in chosen]
    prompts = [tokenizer.encode_prompt(p.question) for p in asked for _ in range(4)]
    texts = [text for x in chosen for text in four_kinds(x.answer, random)]
    ids = [tokenizer.encode_response(text) for text in texts]
    tokens, mask = collate(list(zip(prompts, ids, strict=True)), tokenizer.pad_id)
    starts = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    unknown, cut = torch.full(mask.shape, torch.nan), torch.zeros(len(ids)).bool()
    rollout = Rollout(tokens, mask, unknown, starts, cut, temperature=1.0, samples=4)
    return rollout, score(verifier, asked, rollout, tokenizer).view(-1, 4)


# %%
short = replace(config, rounds=1)
brief = replace(short, updates=settings.pick(1, 8, 16))
alone = replace(short, sft_weight=0.0)
parts = settings.pick(1, 4, 4)  # the same answers and steps, in more rounds
size, steps = config.prompts // parts, config.updates // parts
iterated = replace(short, rounds=parts, prompts=size, updates=steps)
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
    "ranking sums": (short, {"likelihood": rrhf.summed_logprobs}),
    "broken: padded width": (alone, {"likelihood": padded_width}),
    "given answers": (short, {"answers": teachers}),
    "own answers, 4 rounds": (iterated, {}),
}

# %%
tried = exam.run_trials(settings, tokenizer, reference, trials, run_rrhf, tuning)
exam.print_trials(tried)

# %% [markdown]
# ## The figures
#
# The message, its price, and which pairs the base already has in the right order.

# %%
(was, *_), (now, *_) = run["sampled"]
figure, (rise, price, asks) = plotting.new_figure(
    3,
    f"RRHF, imitation x {config.sft_weight:g}: {was:.2f} to {now:.2f} right (seed "
    f"{settings.seed}); {1 - violated:.0%} of the base's pairs were in order already",
)
runs = course.runs_on_record(settings, run)
plotting.draw_rise(rise, runs, run, not settings.record, base, "RRHF")
plotting.draw_price(price, runs or [run], course.base_success(), base)
shown = list(pairs.items())[:7]
counts, broken = np.reshape([both for _, both in shown], (-1, 2)).T / max(total, 1)
places = np.arange(len(shown))
asks.barh(places, counts, color="#c9d6df", label="all")
asks.barh(places, broken, color=plotting.COLORS[1], label="in the wrong order")
asks.set_yticks(places, [name for name, _ in shown], fontsize=9)
asks.set(xlabel="share of pairs, right > wrong", ylim=(len(shown) - 0.5, -0.5))
asks.legend(loc="lower right")
asks.set_title("what ranking has to ask of the base")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# The trials; what the answers became under some of them; and what training did to the
# scores. The ranking loss wants the two lines apart, not right answers frequent.

# %%
figure, axes = plotting.new_figure(3, "Whose answers, how much imitation", height=4.6)
accuracy, mix, order = axes
plotting.draw_trials(accuracy, tried, default=DEFAULT)
bottom = np.zeros(len(tried))
for style, color in plotting.STYLE_COLORS.items():
    share = np.array([trial["styles"][f"style_{style}"] for trial in tried.values()])
    mix.barh(range(len(tried)), share, left=bottom, color=color, label=style)
    bottom += share
mix.set(xlabel="share of answers, rows as on the left", yticks=[])
mix.set(ylim=(len(tried) - 0.5, -0.5))
mix.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8)
for kind, color in (("right", plotting.COLORS[2]), ("wrong", plotting.COLORS[1])):
    line = series["update"], series[f"mean_logprob_{kind}"]
    order.plot(*line, color=color, label=f"{kind} answers")
order.set(xlabel="optimiser step", ylabel="mean score, nats a token")
order.legend()
trials_path = settings.figure_path.with_name(f"{settings.lesson}_dials.png")
plotting.save_figure(figure, trials_path)

# %% [markdown]
# ## What we saw

# %%
lead = {k: row[1] for k, row in kinds.items() if k in ("worked, right", "terse, wrong")}
tied, unanswered = (np.mean(series[name][-config.updates :]) for name in columns[-2:])
print(f"""
- Sampled accuracy went from {was:.2f} to {now:.2f}: {run["gap_closed"][0]:.0%} of the
  way to the base forced to work, at {run["kl"][0]:.2f} nats.
- Before training {violated:.0%} of the pairs stood in the wrong order. Mean scores:
  {", ".join(f"{kind} {score:.3f}" for kind, score in lead.items())}.
- Answers went from {run["length"][0][0]:.0f} to {run["length"][1][0]:.0f} tokens.
- In the last round {tied:.0%} of the problems had no pair, {unanswered:.0%} none right.
""")

# %%
exam.compare_trials(tried, "imitation alone", "ranking alone", "Either term by itself")
exam.compare_trials(tried, DEFAULT, "imitation alone", "What ranking adds")
exam.compare_trials(tried, "ranking sums", DEFAULT, "Sums for means")
exam.compare_trials(tried, DEFAULT, "given answers", "Own answers or others'")
exam.compare_trials(tried, "own answers, 4 rounds", DEFAULT, "Fresh answers, as many")
for name in ("ranking alone", "broken: padded width", "imitation alone"):
    if name in tried:
        trial, norm = tried[name], np.median(tried[name]["series"]["grad_norm"])
        norm /= trial["config"]["sft_weight"] or 1
        print(f"- {name}: {trial['length']:.0f} tokens an answer, greedy "
              f"{trial['greedy'][0]:.2f}, KL {trial['kl'][0]:.2f}; median length of "
              f"the gradient {norm:.2g}, at weight 1.")  # fmt: skip
ends = [bootstrap(taken.sampled.correct.mean(1)) for taken in (before, after)]
measure = "sampled accuracy on test problems, 95 % over problems"
course.finish(settings, run, *ends, measure)

# %% [markdown]
# Exercises. (1) Rank the four hand-made answers by `rrhf.summed_logprobs`. (Each token
# can only lower a sum: the worked one leads if all its tokens together cost fewer nats
# than the few of the terse one.) (2) Why is a margin of 1 nat *per token* much? (Sure
# tokens have no room to rise: most of it must come from pushing the worse down.)
