# %% [markdown]
# # Lesson 22: Optimising what people seem to like (RLHF)
#
# **Question.** When does a learned reward stop being right?
#
# **Afterwards you can** train a policy on a reward model, tell by which signs the
# reward is being fooled, and decide where to stop.
#
# **Read before:** [lesson 15](15_ppo.py): PPO. [Lesson 17](17_kl.py): a price on KL.
# [Lesson 20](20_reward_model.py): the reward model that is used here.
#
# **Papers:** Ouyang et al. 2022 (InstructGPT), [arXiv
# 2203.02155](https://arxiv.org/abs/2203.02155), equation 2. Gao et al. 2022, [arXiv
# 2210.10760](https://arxiv.org/abs/2210.10760), section 3, for the curves of Figure 1.
#
# **Look at:** where the lower curves of Figure 1 turn down, and what the upper ones do
# there.
#
# **Turn first:** `beta` in `usual`, the price of a nat.
#
# **Time:** `quick` takes two minutes on one CPU core, `full` eight. The runs of Figures
# 1 and 2 are read from the record. `python lessons/22_rlhf.py --preset full --grid`
# makes them anew, in four hours, and goes on where it was stopped. 2 GB of memory.

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
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import ppo, reinforce, reward_model, rloo
from minialign.evaluation import Answers, best_of_n, sample_answers
from minialign.intervals import Estimate, bootstrap, over_seeds
from minialign.model import GPT
from minialign.problems import DATA, Problem, demonstration, style_of, verify
from minialign.rewards import (
    LearnedReward,
    Reward,
    RewardModel,
    careful,
    lazy,
    rank,
    verifier,
)

# %% tags=["setup"]
settings = course.setup("22_rlhf")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device).requires_grad_(False)
REWARD_MODEL = DATA / "reward_model.ckpt"


# %% [markdown]
# ## The idea
#
# A reward model has seen answers of the base, and has learnt how people order *those*.
# Reinforcement learning then looks for the answers that the model likes best, wherever
# they are. It moves to answers that the base hardly ever gives. Nobody has compared
# such answers, and there the model guesses. If among all answers there are some of
# which it thinks too much, a policy that is paid by it will find them. "When a measure
# becomes a target, it ceases to be a good measure", as Goodhart's law is often put.
#
# So people who train by a learned reward r do not let the policy go as far as it likes.
# They pay for every nat between it and the base, and may let it go on imitating texts D
# that it knew before:
#
#     maximise  E[ r(x, y) ] − β KL(π ‖ base) + γ E_D[ log π(y|x) ]
#
# The algorithm is PPO as in lesson 15, and it does not know where its rewards come
# from. What is new is how many models there are at once:
#
#     problem → policy ────── answer ─→ reward model ─→ r, at the last token
#               (learns)        ├─────→ reference ────→ −β (log π − log π_ref), at each
#                               └─────→ critic ───────→ V, before each
#                                       (learns)
#
# In training a weight that learns takes four numbers: itself, its slope, and AdamW's
# two averages. One that only answers takes one.

# %%
policy_size = sum(weight.numel() for weight in base.parameters())
bodies = policy_size - base.lm_head.weight.numel()  # without the last layer
models = {  # name: (weights, numbers kept for each)
    "policy": (policy_size, 4),
    "critic": (bodies, 4),
    "reference": (policy_size, 1),
    "reward model": (bodies, 1),
}
print(f"{'':<14}{'weights':>10}{'megabytes, float32':>20}")
for name, (weights, numbers) in models.items():
    print(f"{name:<14}{weights:>10,}{weights * numbers * 4 / 1e6:>20.1f}")
total = sum(weights * numbers for weights, numbers in models.values())
alone = policy_size * 4
print(f"all of them {total / alone:.1f} times the policy alone")

# %% [markdown]
# ## By hand
#
# What the four answers of lesson 01 are worth to the verifier, to a careful person, to
# a lazy one (who checks no sum, and likes to be greeted and to be told much), and to
# the model that has learnt from careful people. Its numbers have mean 0 and deviation 1
# over the base's answers.

# %%
model, _ = checkpoint.load_reward_model(REWARD_MODEL, tokenizer, settings.device)
asked = [course.HAND_PROBLEM] * 4
texts = list(course.HAND_ANSWERS.values())
worth = {
    "verifier": verifier(asked, texts),
    "careful": careful(asked, texts),
    "lazy": lazy(asked, texts),
    "learnt": LearnedReward(model, tokenizer)(asked, texts),
}
print(f"{'':<16}" + "".join(f"{name:>10}" for name in worth))
for row, name in enumerate(course.HAND_ANSWERS):
    numbers = "".join(f"{marks[row]:>10.2f}" for marks in worth.values())
    print(f"{name:<16}{numbers}")

# %% [markdown]
# The model gives the right and the wrong terse answer nearly the same number, for it
# has not learnt to calculate. That a worked answer is likely to be right, it has learnt
# well.
#
# ## Predict
#
# A policy is paid by a model of careful people, and nothing for staying near the base
# (β = 0). The base is right in 0.46 of its answers. In which share is the policy right,
# after 4,096 answers?

# %%
my_guess = 0.7  # edit me: a share

# %% [markdown]
# ## Train
#
# One run first, with a price of β = 0.3 deviations of the learned reward a nat. Each of
# its 16 updates draws 8 answers to each of 32 problems. An answer that does not end
# earns −2, which is less than nearly any other. Whether answers are right is written
# down, and told to nobody.


# %%
@dataclass(frozen=True)
class Cell:
    """One run of RLHF."""

    people: str = "careful"  # or "lazy"
    beta: float = 0.0  # price of a nat of KL, in deviations of the learned reward
    seed: int = 0
    model: int = 0  # which reward model of these people: the seed of its pairs
    method: str = "ppo"  # or "rloo", "reinforce", "best of n"
    target: float = 0.0  # nats that an adaptive price aims at; 0: the price is fixed
    mix: float = 0.0  # weight of the pretraining mix; 0: there is none
    updates: int = 16  # of 32 problems with 8 answers each
    looks: tuple[int, ...] = (1, 2, 4, 8, 12, 16)  # updates after which it is examined


ASKED = 33  # comparisons at each of six looks: 198 in all
TRUNCATED = (
    -2.0
)  # what an answer earns that does not end: less than nearly any that does
PEOPLE = {"careful": (careful, 0.81), "lazy": (lazy, 1.25)}  # likings, sharpness


# %% tags=["setup"]
def draw_of(seed: int, purpose: str) -> torch.Generator:
    """A generator for this purpose, whatever the seed of this run."""
    return replace(settings, seed=seed).generator(purpose)


@cache
def learned_reward(people: str, seed: int) -> LearnedReward:
    """A reward model of these people, as in lesson 20: from 4,000 pairs."""
    kept = plotting.LOCAL / f"22_{people}_{seed}.ckpt"
    if (people, seed) == ("careful", 0):
        kept = REWARD_MODEL
    if kept.exists():
        model, _ = checkpoint.load_reward_model(kept, tokenizer, settings.device)
        return LearnedReward(model, tokenizer)
    likings, sharpness = PEOPLE[people]
    problems = course.stream(1000 + seed, settings.pick(16, 4000, 4000))
    held = sample_answers(
        base, tokenizer, problems, 2, generator=draw_of(seed, "to be ranked")
    )
    liked = []
    for problem, texts in zip(problems, held.texts, strict=True):
        liked.append(likings([problem] * 2, texts))
    draw = draw_of(seed, "people")
    orders = rank(torch.tensor(liked).to(draw.device), sharpness, draw)  # (N, 2)
    rankings = reward_model.rankings_of(problems, held.texts, orders, tokenizer)
    config = reward_model.RewardModelConfig(
        updates=settings.pick(2, 125, 125), batch=settings.pick(4, 32, 32)
    )
    model = RewardModel(base)
    training = reward_model.train(
        model, tokenizer, rankings, config, generator=draw_of(seed, "order")
    )
    course.follow(training, config.updates)
    learned = LearnedReward(model, tokenizer)
    unseen = course.load_problems("validation", settings.pick(4, 250, 500))
    draw = draw_of(exam.TUNING_SEED, "held out, validation")
    fresh = sample_answers(base, tokenizer, unseen, 8, generator=draw)
    asked, said = flat(fresh)
    model.fix_scale(learned.scores(asked, said))
    if settings.preset != "smoke":
        checkpoint.save_reward_model(kept, model, tokenizer)
    return learned


def flat(held: Answers) -> tuple[list[Problem], list[str]]:
    """Every answer, and the problem that it answers."""
    asked = []
    said = []
    for problem, texts in zip(held.problems, held.texts, strict=True):
        asked += [problem] * len(texts)
        said += texts
    return asked, said


class Watched:
    """A reward, and the share of right answers among those that it was asked about,
    which is written down and told to nobody."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.truth = []

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> Sequence[float]:
        self.truth.append(float(np.mean(verifier(problems, texts))))
        return self.reward(problems, texts)


# %% [markdown]
# Each run starts from the base, with one of three algorithms, and is looked at after
# some of its updates.


# %% tags=["setup"]
def train_cell(
    cell: Cell, reward: Reward, problems: list[Problem]
) -> tuple[GPT, Iterator[Mapping[str, float]]]:
    """The policy, and the training to be run through."""
    policy = copy.deepcopy(base).requires_grad_(True)
    common = {
        "updates": cell.updates,
        "prompts": settings.pick(2, 32, 32),
        "samples": settings.pick(2, 8, 8),
        "max_new_tokens": settings.pick(32, 128, 128),
        "truncated_reward": TRUNCATED,
        "beta": cell.beta,
    }
    more = {"generator": draw_of(cell.seed, "sampling"), "reference": base}
    if cell.method == "rloo":
        config = rloo.RlooConfig(**common)
        training = rloo.train(policy, tokenizer, problems, reward, config, **more)
        return policy, training
    if cell.method == "reinforce":
        config = reinforce.ReinforceConfig(**common)
        more["baseline"] = reinforce.moving_average
        training = reinforce.train(policy, tokenizer, problems, reward, config, **more)
        return policy, training
    if cell.target:
        more["next_beta"] = partial(
            ppo.adapt_beta, target=cell.target, horizon=256, completions=256
        )
    if cell.mix:
        examples = []
        for index in range(settings.pick(64, 4096, 4096)):
            row = demonstration(0, "train", index)  # one that the base learnt from
            prompt = tokenizer.encode_prompt(row.problem.question)
            examples.append((prompt, tokenizer.encode_response(row.answer)))
        more["mix"] = ppo.PretrainingMix(examples, cell.mix)
    more["critic"] = ppo.Critic(policy)
    config = ppo.PPOConfig(**common)
    training = ppo.train(policy, tokenizer, problems, reward, config, **more)
    return policy, training


def look(policy: GPT, cell: Cell, purpose: str) -> dict:
    """Examine a policy: truth on test, truth for the oracle, KL, and what people say
    of 33 of its answers beside the base's."""
    test = course.load_problems("test", settings.pick(4, 250, 1000))
    unseen = course.load_problems("validation", settings.pick(4, 250, 500))
    draw = draw_of(cell.seed, purpose)
    on_test = sample_answers(policy, tokenizer, test, 1, generator=draw)
    for_oracle = sample_answers(policy, tokenizer, unseen, 1, generator=draw)
    nats = exam.distance(
        tokenizer, policy, base, unseen[: settings.pick(4, 250, 250)], draw
    )
    likings, sharpness = PEOPLE[cell.people]
    before = base_answers(cell.seed)
    compared = []
    for problem, new, old in zip(unseen, for_oracle.texts, before.texts, strict=True):
        compared.append(likings([problem] * 2, [new[0], old[0]]))
    place = ASKED * cell.looks.index(int(purpose.split()[-1])) % len(compared)
    few = torch.tensor(compared)[place : place + ASKED]
    first = rank(few.to(draw.device), sharpness, draw)[:, 0]  # (33,), 0: the new one
    return {
        "test": course.as_list(bootstrap(on_test.correct[:, 0])),
        "oracle": float(for_oracle.correct.mean()),
        "kl": nats.value,
        "preferred": float((first == 0).float().mean()),
        "answers": [texts[0] for texts in on_test.texts[:3]],
    }


@cache
def base_answers(seed: int) -> Answers:
    """The base's answers that people compare with: one to each validation problem."""
    unseen = course.load_problems("validation", settings.pick(4, 250, 500))
    return sample_answers(
        base, tokenizer, unseen, 1, generator=draw_of(seed, "to compare")
    )


def run_cell(cell: Cell) -> dict:
    """From the base: what the learned reward said, what was true, and the KL."""
    if cell.method == "best of n":
        return choose_best(cell)
    reward = Watched(learned_reward(cell.people, cell.model))
    problems = course.stream(cell.seed, cell.updates * settings.pick(2, 32, 32))
    policy, training = train_cell(cell, reward, problems)
    series = {}
    looks = {}
    for metrics in tqdm(training, total=cell.updates, disable=None):
        course.keep_series(series, metrics)
        done = metrics["update"]
        if done in cell.looks:
            looks[str(done)] = look(policy, cell, f"look {done}")
    series["truth"] = reward.truth
    skill = course.load_problems("second_skill", settings.pick(8, 100, 500))
    other = sample_answers(policy, tokenizer, skill, 1, greedy=True)
    return {
        "series": {name: series[name] for name in KEPT if name in series},
        "looks": looks,
        "second_skill": course.as_list(bootstrap(other.correct[:, 0])),
    }


@cache
def many_answers() -> Answers:
    """32 answers of the base to each of 200 validation problems."""
    unseen = course.load_problems("validation", settings.pick(4, 200, 200))
    draw = draw_of(exam.TUNING_SEED, "best of n")
    return sample_answers(
        base, tokenizer, unseen, settings.pick(4, 32, 32), generator=draw
    )


def choose_best(cell: Cell) -> dict:
    """No training: of n answers of the base, the one that the reward model likes."""
    held = many_answers()
    learned = learned_reward(cell.people, cell.model)
    asked, said = flat(held)
    numbers = np.reshape(learned(asked, said), held.correct.shape)
    series = {"reward": [], "truth": [], "kl": []}
    for n in (1, 2, 4, 8, 16, 32):
        if n <= numbers.shape[1]:
            series["reward"].append(float(best_of_n(numbers, numbers, n).mean()))
            right = held.correct.astype(float)
            series["truth"].append(float(best_of_n(numbers, right, n).mean()))
            series["kl"].append(math.log(n) - (n - 1) / n)
    return {"series": series}


STYLE_NAMES = ("style_worked", "style_terse", "style_careless", "style_showy")
KEPT = ("completions", "reward", "truth", "kl", "length", "truncated", "beta")
KEPT += ("mix_nats", "stopped_early", *STYLE_NAMES)


# %%
usual = Cell(beta=0.3, seed=settings.seed, updates=settings.pick(2, 4, 16))
usual = replace(usual, looks=settings.pick((2,), (4,), usual.looks))
test = course.load_problems("test", settings.pick(4, 250, 1000))
draw = settings.generator("before")
before = sample_answers(base, tokenizer, test, settings.pick(2, 4, 8), generator=draw)
at_first = bootstrap(before.correct.mean(1))
run = {"config": asdict(usual), **run_cell(usual)}
last = run["looks"][str(usual.updates)]
print("answers   learned reward   right      KL")
series = run["series"]
for place in range(0, usual.updates, max(usual.updates // 8, 1)):
    print(
        f"{series['completions'][place]:>7,}{series['reward'][place]:>17.2f}"
        f"{series['truth'][place]:>8.2f}{series['kl'][place]:>8.2f}"
    )
after = course.as_estimate(last["test"])
print(f"on test problems, right: {at_first} before, {after} after")

# %% [markdown]
# ## The result: two curves that part
#
# Now without a price, and from other people. *Lazy* ones are asked for as many pairs,
# and agree with each other as often. So there are four cells: two kinds of people, and
# a price of 0 or 0.3. They were fixed before any of them was run, and all are shown.
# Each has three reward models, learnt from other pairs, and a run on each. On the same
# axes stands the *best of n*: no training, but n answers of the base, of which the
# reward model chooses one. Its KL is log n − (n − 1)/n at most (lesson 04).

# %%
SEEDS = (0, 1, 2)
grid = {}
best = {}
for people in PEOPLE:
    for seed in SEEDS:
        chosen = Cell(people, seed=seed, model=seed, method="best of n")
        best[f"{people}, seed {seed}"] = chosen
        for beta in (0.0, 0.3):
            name = f"{people}, β {beta:g}, seed {seed}"
            grid[name] = Cell(people, beta, seed=seed, model=seed)


def made(cells: Mapping[str, Cell], name: str) -> dict[str, dict]:
    """What these cells came to: from the record, or made with --grid."""
    if settings.preset == "smoke":
        if name not in ("best", "prices"):
            return plotting.load_record(f"22_rlhf_{name}")
        title, cell = list(cells.items())[-1]
        cells = {title: replace(cell, updates=2, looks=(2,))}
    return exam.run_grid(settings, cells, run_cell, name)


in_grid = made(grid, "grid")
without = made(best, "best")


def over(cells: Mapping[str, dict], name: str) -> list[dict]:
    """The cells of this name with the seeds that there are."""
    titles = [f"{name}, seed {seed}" for seed in SEEDS]
    return [cells[title] for title in titles if title in cells]


def over_cells(estimates: Sequence[list[float]]) -> Estimate:
    """Over the seeds; of one seed, the interval over problems."""
    if len(estimates) == 1:
        return course.as_estimate(estimates[0])
    return over_seeds([value for value, _, _ in estimates])


def turn_of(cell: Mapping) -> dict[str, float]:
    """Where the oracle would stop, and where the run ended, on test problems."""
    looks = list(cell["looks"].values())
    best = max(looks, key=lambda moment: moment["oracle"])
    return {
        "best": best["test"][0],
        "KL there": best["kl"],
        "end": looks[-1]["test"][0],
        "KL at the end": looks[-1]["kl"],
        "learned": float(np.mean(cell["series"]["reward"][-2:])),
        "preferred": looks[-1]["preferred"],
    }


def means_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the seeds."""
    return {what: float(np.mean([row[what] for row in rows])) for what in rows[0]}


# %%
run["turns"] = {}
print("means over three seeds; right: share on test; learned: reward, deviations;")
print("preferred: share of comparisons with the base that people decide for the policy")
print(f"{'':<17}{'right, best':>12}{'KL there':>10}{'right, end':>12}", end="")
print(f"{'KL, end':>9}{'learned, end':>14}{'preferred, end':>16}")
for people in PEOPLE:
    for beta in (0.0, 0.3):
        name = f"{people}, β {beta:g}"
        turns = [turn_of(cell) for cell in over(in_grid, name)]
        if turns:
            turn = means_of(turns)
            run["turns"][name] = turn
            print(f"{name:<17}{turn['best']:>12.2f}{turn['KL there']:>10.2f}", end="")
            print(f"{turn['end']:>12.2f}{turn['KL at the end']:>9.2f}", end="")
            print(f"{turn['learned']:>14.2f}{turn['preferred']:>16.2f}")


# %% tags=["plot"]
def draw_curves(panel, what: str, people: str) -> None:
    """One quantity against the distance from the base, for both prices."""
    colors = {"β 0": plotting.COLORS[1], "β 0.3": plotting.COLORS[0]}
    for price, color in colors.items():
        for cell in over(in_grid, f"{people}, {price}"):
            series = cell["series"]
            x = np.sqrt(np.maximum(series["kl"], 0))
            y = plotting.smoothed(series[what], 3)
            panel.plot(x, y, color=color, lw=1.3, marker=".", ms=4)
    for cell in over(without, people):
        series = cell["series"]
        panel.plot(np.sqrt(series["kl"]), series[what], color="#444", ls="--", lw=1)


figure, axes = plotting.new_figure(2, "", rows=2, width=5.4, height=3.3)
for column, people in enumerate(PEOPLE):
    draw_curves(axes[column], "reward", people)
    draw_curves(axes[2 + column], "truth", people)
    axes[column].set(title=f"a model of {people} people")
    axes[2 + column].set(xlabel="√KL(policy ‖ base), √nats", ylim=(0, 1))
axes[0].set(ylabel="learned reward, deviations")
axes[2].set(ylabel="truth: share right")
lines = {
    "no price": (plotting.COLORS[1], "-"),
    "β = 0.3": (plotting.COLORS[0], "-"),
    "best of 1, 2, … 32": ("#444", "--"),
}
for name, (color, style) in lines.items():
    axes[1].plot([], [], color=color, ls=style, label=name)
axes[1].legend(loc="lower right")
if len(run["turns"]) == 4:
    turning = []
    for cell in over(in_grid, "careful, β 0"):
        peak = plotting.smoothed(cell["series"]["truth"], 3).argmax()
        turning.append(cell["series"]["kl"][peak])
    plotting.headline(
        figure,
        "Without a price the learned reward goes on rising, while the share that is "
        f"right turns at {min(turning):.1f} to {max(turning):.1f} nats, and falls to "
        f"{run['turns']['careful, β 0']['end']:.2f} (careful people)",
    )
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** What the reward model says of the policy's answers (upper row) and how
# many of them are right (lower row), by how far the policy has moved from the base.
# Each line is a run of 4,096 answers with a reward model of its own, three draws of 256
# taken together; dashed, the best of n answers of the base by each of the three models,
# whose KL is at most what is drawn (lesson 04).

# %%
if "careful, β 0" in run["turns"]:
    course.predict(
        "Right at the end, paid by a model of careful people, without a price:",
        my_guess,
        run["turns"]["careful, β 0"]["end"],
        key="turns > careful, β 0 > end",
    )

# %% [markdown]
# This is what the first of the policies without a price writes in the end, for both
# kinds of people.

# %%
for people in PEOPLE:
    for cell in over(in_grid, f"{people}, β 0")[:1]:
        said = list(cell["looks"].values())[-1]["answers"]
        shown = course.load_problems("test", 3)
        for problem, answer in list(zip(shown, said, strict=True))[1:]:
            print(f"--- {people} people (gold {problem.gold})")
            print(f"{problem.question}\n{answer}\n")

# %% [markdown]
# ## When to stop
#
# Whoever trains sees the upper row of Figure 1, and not the lower one. Three rules need
# no truth. *Last*: stop when the answers are used up. *KL*: stop before the policy is
# farther than 1 nat from the base. *People*: at six moments ask the people who taught
# the reward model which they prefer, an answer of the policy or one of the base, 33
# times each, and keep the policy that they preferred most often. Beside them stands an
# *oracle* that is told the truth on 500 problems at each of these moments.

# %%
FAR = 1.0  # nats


def stops_of(looks: Mapping[str, dict]) -> dict[str, dict | None]:
    """The look at which each rule stops; None: at the base."""
    moments = list(looks.values())
    liked = max(moments, key=lambda moment: moment["preferred"])
    near = None
    for moment in moments:
        if moment["kl"] > FAR:
            break
        near = moment
    return {
        "last": moments[-1],
        "KL": near,
        "people": liked if liked["preferred"] > 0.5 else None,
        "oracle": max(moments, key=lambda moment: moment["oracle"]),
    }


base_right = plotting.load_record("01_sft")["0"]["base"]["sampled"][0]
RULES = ("last", "KL", "people", "oracle")
run["lift"] = {}
print(f"right on test, less the base's {base_right:.3f}: mean over three seeds")
print(f"{'':<17}" + "".join(f"{rule:>25}" for rule in RULES))
for name in run["turns"]:
    row = {rule: [] for rule in RULES}
    for cell in over(in_grid, name):
        for rule, moment in stops_of(cell["looks"]).items():
            right = base_right if moment is None else moment["test"][0]
            row[rule].append(right - base_right)
    print(f"{name:<17}", end="")
    run["lift"][name] = {}
    for rule, values in row.items():
        if len(values) > 1:
            found = over_seeds(values)
            run["lift"][name][rule] = course.as_list(found)
            print(f"{found!s:>25}", end="")
    print()

# %% [markdown]
# ## Break it: other ways to stay near
#
# The same reward models of careful people, held near the base in other ways. *β 0.003*
# is a hundredth of the price of Figure 1. *Adaptive*: the price begins at 0.1 and is
# raised or lowered after every update, by a fifth at most, so that the KL comes to 1
# nat (lesson 17, exercise 4). *The mix*: there is no price, but every step of PPO also
# imitates 64 of the demonstrations that the base has learnt from, with γ = 1.
# InstructGPT's authors call this PPO-ptx; they mix in texts from the web, and keep a
# small price. One of ten demonstrations shows the *second skill* (sorting, sequences:
# lesson 01), which no reward ever asks about.

# %%
PRICED = ("β 0.003", "adaptive", "no price, and the mix")
prices = {}
for seed in SEEDS:
    cell = Cell(seed=seed, model=seed, looks=(16,))
    prices[f"adaptive, seed {seed}"] = replace(cell, beta=0.1, target=1.0)
    prices[f"no price, and the mix, seed {seed}"] = replace(cell, mix=1.0)
    if seed == 0:
        prices["β 0.003, seed 0"] = replace(cell, beta=0.003)
at_prices = made(prices, "prices")
run["prices"] = {}
both = {"no price": over(in_grid, "careful, β 0")}
both["β 0.3"] = over(in_grid, "careful, β 0.3")
for name in PRICED:
    both[name] = over(at_prices, name)
first = plotting.load_record("01_sft")["0"]["base"]
print(
    f"{'careful people':<23}{'right on test':>22}{'KL':>7}{'second skill':>23}", end=""
)
print(f"{'β, end':>8}{'seeds':>7}")
print(f"{'the base':<23}{first['sampled'][0]:>22.3f}{0:>7.2f}", end="")
print(f"{first['second_skill'][0]:>23.3f}")
for name, cells in both.items():
    if cells:
        lasts = [list(cell["looks"].values())[-1] for cell in cells]
        right = over_cells([last["test"] for last in lasts])
        skill = over_cells([cell["second_skill"] for cell in cells])
        row = {
            "right": course.as_list(right),
            "KL": float(np.mean([last["kl"] for last in lasts])),
            "second skill": course.as_list(skill),
            "β": float(np.mean([cell["series"]["beta"][-1] for cell in cells])),
        }
        run["prices"][name] = row
        print(f"{name:<23}{right!s:>22}{row['KL']:>7.2f}{skill!s:>23}", end="")
        print(f"{row['β']:>8.3f}{len(cells):>7}")

# %% [markdown]
# ## Is PPO to blame?
#
# The same reward models of careful people, without a price, and the other two
# algorithms, each with the learning rate of its own lesson.

# %%
others = {}
for method in ("rloo", "reinforce"):
    for seed in SEEDS:
        cell = Cell(seed=seed, model=seed, method=method, looks=(16,))
        others[f"{method}, seed {seed}"] = cell
by_others = made(others, "others")
run["methods"] = {}
rivals = {"PPO": over(in_grid, "careful, β 0")}
rivals["RLOO"] = over(by_others, "rloo")
rivals["REINFORCE"] = over(by_others, "reinforce")
print("best of training: the highest share that was right in three draws together")
print(f"{'':<11}{'best of training':>17}{'right on test, end':>26}", end="")
print(f"{'KL, end':>9}{'learned, end':>14}")
for name, cells in rivals.items():
    if len(cells) > 1:
        row = means_of([turn_of(cell) for cell in cells])
        peaks = [plotting.smoothed(cell["series"]["truth"], 3).max() for cell in cells]
        row["in training"] = float(np.mean(peaks))
        right = over_seeds([turn_of(cell)["end"] for cell in cells])
        row["right"] = course.as_list(right)
        run["methods"][name] = row
        print(f"{name:<11}{row['in training']:>17.2f}{right!s:>26}", end="")
        print(f"{row['KL at the end']:>9.2f}{row['learned']:>14.2f}")

# %% [markdown]
# ## Programs make mistakes too
#
# A learned reward is wrong here and there, and one cannot say where. With a program we
# can choose. First *by lot*: a right answer earns 1 with the chance TP, a wrong one
# with the chance FP. What does the gradient of RLOO then come to? The mean reward of an
# answer is FP + (TP − FP) [right]. A constant cancels among the answers to one problem,
# and so, on average,
#
#     gradient = J · (gradient of the verifier that makes no mistakes),   J = TP − FP
#
# Only J, the *informedness*, counts: nine programs, three values of J with three of FP
# each, should teach alike where J is alike.
#
# Then *by kind*. One program lets four of five careless answers pass. Another misses
# four of five right answers that are worked. Its mistakes may be drawn anew each time,
# or fixed once and for all for each text, as those of a program would be. These runs
# meet 128 problems four times.


# %% tags=["setup"]
@dataclass(frozen=True)
class Wrong:
    """A verifier with errors."""

    hit: float = 1.0  # chance that a right answer earns 1
    slip: float = 0.0  # chance that a wrong answer earns 1
    kind: str = "any"  # only "careless" slip; only "worked" miss; "any": by lot
    fixed: bool = False  # a text is judged alike each time
    problems: int = 512  # asked; fewer are asked again
    seed: int = 0
    updates: int = 16


class WrongVerifier:
    """The verifier, with errors by lot or by kind."""

    def __init__(self, wrong: Wrong, draw: torch.Generator) -> None:
        self.wrong = wrong
        self.draw = draw

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> Sequence[float]:
        marks = []
        for problem, text in zip(problems, texts, strict=True):
            right = verify(problem, text)
            chance = float(right)
            style = style_of(problem, text)
            if right and self.wrong.kind in ("any", style):
                chance = self.wrong.hit
            if not right and self.wrong.kind in ("any", style):
                chance = self.wrong.slip
            marks.append(float(self.luck(problem, text) < chance))
        return marks

    def luck(self, problem: Problem, text: str) -> float:
        """A number in [0, 1): drawn anew, or always the same for a text."""
        if not self.wrong.fixed:
            return torch.rand((), generator=self.draw).item()
        digest = hashlib.sha256(f"{problem.id}/{text}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


def run_wrong(wrong: Wrong) -> dict:
    """RLOO from the base, rewarded by such a verifier."""
    luck = torch.Generator().manual_seed(wrong.seed)
    reward = Watched(WrongVerifier(wrong, luck))
    config = rloo.RlooConfig(
        updates=wrong.updates,
        prompts=settings.pick(2, 32, 32),
        samples=settings.pick(2, 8, 8),
        max_new_tokens=settings.pick(32, 128, 128),
    )
    problems = course.stream(
        wrong.seed, settings.pick(4, wrong.problems, wrong.problems)
    )
    policy = copy.deepcopy(base).requires_grad_(True)
    series = course.follow(
        rloo.train(
            policy,
            tokenizer,
            problems,
            reward,
            config,
            generator=draw_of(wrong.seed, "sampling"),
        ),
        config.updates,
    )
    series["truth"] = reward.truth
    test = course.load_problems("test", settings.pick(4, 250, 1000))
    after = sample_answers(
        policy, tokenizer, test, 2, generator=draw_of(wrong.seed, "after")
    )
    return {
        "series": {name: series[name] for name in KEPT if name in series},
        "test": course.as_list(bootstrap(after.correct.mean(1))),
    }


# %%
marks = torch.tensor([[1.0, 0.0, 0.0, 1.0]])  # of four answers to one problem
tp = 0.8
fp = 0.3
expected = fp + (tp - fp) * marks
assert torch.allclose(
    rloo.leave_one_out(expected), (tp - fp) * rloo.leave_one_out(marks)
)
INFORMED = (0.2, 0.4, 0.7)
verifiers = {"no errors": Wrong()}
for gain in INFORMED:
    for slip in (0.0, (1 - gain) / 2, 1 - gain):
        verifiers[f"J {gain:g}, FP {slip:.2g}"] = Wrong(hit=gain + slip, slip=slip)
again = Wrong(problems=128)
verifiers["no errors, 128 problems"] = again
for fixed in (False, True):
    manner = "fixed" if fixed else "redrawn"
    kind = replace(again, fixed=fixed)
    missed = replace(kind, kind="worked", hit=0.2)
    verifiers[f"worked missed, {manner}"] = missed
    verifiers[f"careless paid, {manner}"] = replace(kind, kind="careless", slip=0.8)
if settings.preset == "smoke":
    verifiers = {"smoke": replace(missed, updates=2, problems=4)}
by_verifiers = exam.run_grid(settings, verifiers, run_wrong, "verifiers")
run["verifiers"] = {name: cell["test"] for name, cell in by_verifiers.items()}
for name, cell in by_verifiers.items():
    shares = [f"{what[6:]} {cell['series'][what][-1]:.2f}" for what in STYLE_NAMES[:3]]
    right = course.as_estimate(cell["test"])
    print(f"{name:<26}{right}   in the last draw: {', '.join(shares)}")

# %% tags=["plot"]
figure, axes = plotting.new_figure(2, "", width=5.6, height=3.8)
for gain, color in zip(INFORMED, plotting.COLORS, strict=False):
    cells = [cell for name, cell in by_verifiers.items() if f"J {gain:g}," in name]
    slips = [cell["config"]["slip"] for cell in cells]
    right = np.array([cell["test"] for cell in cells]).reshape(-1, 3)
    error = np.abs(right[:, 1:] - right[:, :1]).T
    axes[0].errorbar(slips, right[:, 0], error, color=color, marker="o", capsize=3)
    if slips:
        plotting.label(axes[0], f"J = {gain:g}", (slips[0], right[0, 0]), (-46, -4))
axes[0].set(xlabel="FP, the share of wrong answers that earn 1", xlim=(-0.2, 0.9))
axes[0].set(ylabel="right on test", ylim=(0.4, 0.7), title="mistakes by lot")
kinds = [name for name in by_verifiers if "," in name and "J " not in name]
places = range(len(kinds))
heights = [by_verifiers[name]["test"][0] for name in kinds]
axes[1].barh(places, heights, color=plotting.COLORS[0])
axes[1].set_yticks(places, kinds)
axes[1].invert_yaxis()
axes[1].axvline(base_right, color="#444", ls="--", lw=1)
axes[1].set(xlabel="right on test (dashed: the base)", xlim=(0, 1))
axes[1].set(title="mistakes by kind")
if len(kinds) == 5:
    clean = heights[0]
    missed = heights[1]
    paid = heights[2]
    plotting.headline(
        figure,
        f"A verifier that misses worked answers brings a policy to {missed:.2f}, one "
        f"that pays careless ones to {paid:.2f}, one without mistakes to {clean:.2f}",
    )
plotting.save_figure(figure, settings.folder / f"{settings.lesson}_verifiers.png")

# %% [markdown]
# **Figure 2.** RLOO from the base with a verifier that makes mistakes, 4,096 answers
# and one seed each. Left: mistakes by lot; lines join programs of the same J, bars are
# 95 % intervals over problems. Right: mistakes by kind, drawn anew each time or fixed
# for each text.

# %% [markdown]
# ## What we found
#
# All numbers are means over three seeds where nothing else is said.
#
# **A learned reward is right near the answers that it was learnt from.** Paid by a
# model of careful people, without a price, PPO raises the learned reward to 1.34
# deviations. The share of right answers rises a little at first, and turns between 0.4
# and 1.8 nats (Figure 1). Of the moments at which we looked, 0.4 nats was the best,
# with 0.51. In the end 0.25 are right, where the base has 0.46. The three runs end far
# apart, so that the interval of this mean still holds the base, but each of them ends
# below it. Nearly all of the answers look worked. But the model cannot calculate
# (lesson 20), and so nothing pays for a sum that is right, and the sums go wrong. Best
# of n turns too: by a model of lazy people the best of 32 is right less often than the
# best of 8.
#
# **A price keeps it useful, and does more than to stop early.** At 0.3 a nat the same
# models bring the policy to 0.85, which is 0.387 above the base: apart, without any
# look at the truth, in a cell that was fixed beforehand. It stays 1.4 nats away. At
# that distance the runs without a price have 0.5 to 0.6. They have gone as far, and not
# to the same place. (Our guess: without a price the optimiser is never called back from
# a step that brought nothing.)
#
# **When to stop.** With careful people, to stop before 1 nat never lost, and gained
# 0.06 where the last policy of the runs with a price gained 0.387, for our moments lie
# too far apart. To ask people cannot be told apart from that: the share that 33
# comparisons give has an error of 0.09, and by such errors it now keeps an early policy
# and now a late one. With a price the last policy was the oracle's choice as well.
#
# **People get what they like.** Lazy people check no sum, and like it when others say
# that they did. In the first run without a price the policy learns to write "I am sure,
# all is checked" below sums that are wrong. In the end 0.35 of the answers are right,
# over the three runs, and people prefer them to the base's in 0.73 of the comparisons.
#
# **Imitation holds as well as a price.** With the mix and without a price PPO comes to
# 0.826 at 1.0 nats, and keeps 0.733 of the second skill, where the base has 0.758 and
# PPO alone is left with 0.469. (The mix adds steps of imitation to those of
# reinforcement; what these do by themselves was not tried.) A price of 0.3 keeps 0.724,
# a hundredth of it 0.542 (one seed). The adaptive price begins too low, comes back from
# 3 nats, and ends at 0.831 and 1.6 nats: as right as with a fixed price (undecided),
# with a little less of the second skill, 0.696.
#
# **PPO is not alone.** RLOO ends at 0.16 and REINFORCE at 0.17. But even by the learned
# reward they have no more than 0.70 in the end. Their rates were chosen for rewards of
# 0 and 1 (lessons 11 and 13), and are probably too high for these. Whether PPO is hurt
# more or less than they would be at rates of their own, is undecided.
#
# **Mistakes of a program.** One seed each. By lot, with FP = 0, J = 0.7, 0.4 and 0.2
# come to 0.62, 0.58 and 0.54. Where wrong answers are paid at times the policies end
# lower, by as much as J makes a difference. The mean of the gradient is the same for
# the same J, its noise is not, and one seed cannot tell the two from luck. By kind, the
# policy that is not paid for worked answers ends at 0.44, below the base, and the one
# that is paid for careless ones at 0.60. Whether a text is judged alike each time makes
# no difference where no problem is asked more than four times.
#
# **What the papers say, here.**
#
# * Optimised far enough, a learned reward parts from what it stands for (Gao et al.):
#   holds.
# * A price on KL changes how far a policy goes, and not what it has there (Gao et al.):
#   fails.
# * The mix keeps what would be forgotten (InstructGPT): holds.
# * A hundred times the price does not keep it (InstructGPT): fails, from 0.003 to 0.3.
#   Our second skill is a small one, and one seed stands for 0.003.
# * An adaptive price brings the KL to its target (Ziegler et al. 2019): undecided, for
#   16 updates are few.
#
# So when does a learned reward stop being right? When the policy gives answers of a
# kind that nobody has compared: a price, or imitation, keeps it from there. And where
# people like something else than what is right, it never was.

# %% tags=["record"]
course.check(
    "22_rlhf",
    {
        "turns > careful, β 0 > learned": "1.34",
        "turns > careful, β 0 > best": "0.51",
        "turns > careful, β 0 > KL there": "0.4",
        "turns > careful, β 0 > end": "0.25",
        "turns > careful, β 0.3 > end": "0.85",
        "turns > careful, β 0.3 > KL at the end": "1.4",
        "lift > careful, β 0.3 > last": "0.387",
        "lift > careful, β 0.3 > oracle": "0.387",
        "lift > careful, β 0.3 > KL": "0.06",
        "turns > lazy, β 0 > end": "0.35",
        "turns > lazy, β 0 > preferred": "0.73",
        "prices > no price, and the mix > right": "0.826",
        "prices > no price, and the mix > KL": "1.0",
        "prices > no price, and the mix > second skill": "0.733",
        "prices > no price > second skill": "0.469",
        "prices > β 0.3 > second skill": "0.724",
        "prices > β 0.003 > second skill": "0.542",
        "prices > adaptive > right": "0.831",
        "prices > adaptive > KL": "1.6",
        "prices > adaptive > second skill": "0.696",
        "methods > RLOO > right": "0.16",
        "methods > REINFORCE > right": "0.17",
        "methods > RLOO > learned": "0.70",
        "methods > REINFORCE > learned": "0.70",
        "verifiers > J 0.7, FP 0": "0.62",
        "verifiers > J 0.4, FP 0": "0.58",
        "verifiers > J 0.2, FP 0": "0.54",
        "verifiers > worked missed, redrawn": "0.44",
        "verifiers > careless paid, redrawn": "0.60",
    },
    own=run,
)

# %% tags=["record"]
course.finish(
    settings,
    run,
    at_first,
    after,
    "sampled accuracy on test problems, 95 % over problems",
)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Which mistake of a verifier hurts more, to pay for a wrong answer or to miss a right
# one?** By lot, neither: on average the gradient knows only J = TP − FP. What differs
# is the noise about it, TP(1 − TP) among right answers and FP(1 − FP) among wrong ones.
# By kind, it depends on what else earns more. Here it was far worse to miss worked
# answers, for then terse ones pay better, than to let careless ones pass, which earn
# less than worked ones still.
#
# **Does a better reward model prevent all this, or delay it?** Our models of careful
# people are good ones by lesson 20's measure, and were fooled as well. That measure was
# taken on answers of the base. It says nothing of answers that the base does not give.
# What delays the fall is to ask people again, about answers of the policy as it is now,
# and to train a new model on these, which InstructGPT's authors did too.
#
# **Where would I see it, without a truth to look at?** The KL is the first sign: every
# run without a price or a mix ended more than 9 nats from the base, and those with a
# price of 0.3 or the mix within 2. Then read answers, above all those that earn most.
# The learned reward looks well to the end.
#
# **My grader runs the code that the model has written. Is that a danger?** Yes: it is
# then the model that decides what runs on your machine, and reinforcement learning
# looks for whatever makes the grader say yes, exit codes and files included. Run it in
# a place without network, files and time to spare. Ours only reads text.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** A right answer earns 1 with the chance TP, a wrong one with
# the chance FP. Show that the leave-one-out advantages are on average J = TP − FP times
# those of the verifier. What does RLOO learn if J < 0?
#
# **Exercise 2 (derive).** Two answers are equally good, and the learned reward of each
# is what it should be plus a mistake, normal with deviation s. By how much is the
# reward of the better rated one too high, on average? And of the best rated of n?
#
# **Exercise 3 (change).** Set `people="lazy"` and `beta=0.0` in `usual`. After how many
# updates do you see in the answers that something is wrong, and after how many in the
# learned reward?
#
# **Exercise 4 (break).** Set `TRUNCATED` to 1. What will the policy learn to do?

# %% [markdown] tags=["answers"]
# **Answer 1.** The advantage of an answer is linear in the rewards: its own less the
# mean of the others. On average a reward is FP + J [right]. FP cancels, and J is a
# factor of all. With J < 0 the policy is taught to be wrong.
#
# **Answer 2.** The expected maximum of two standard normal numbers is 1/√π = 0.56, so
# by 0.56 s; of n it grows like s √(2 log n). To choose by a noisy number is to choose
# the noise too, and the harder one chooses, the more of it.
#
# **Answer 3.** The learned reward never shows it. In the answers look at the sums.
#
# **Answer 4.** Not to end: 1 is more than most answers earn, and it needs nothing but
# to go on for 128 tokens.
