# %% [markdown]
# # Lesson 18: Round after round (RAFT, Llama 2)
#
# **Question.** How many rounds of rejection sampling are enough, and what is lost on
# the way?
#
# **Afterwards you can** measure the variety of a policy's answers, say how much of it a
# round of imitation costs, and choose what to carry from one round to the next.
#
# **Read before:** [lesson 10](10_rejection_sampling.py): one round, and why its filter
# teaches. [Lesson 15](15_ppo.py): PPO.
#
# **Papers:** Dong et al. 2023 (RAFT), [arXiv
# 2304.06767](https://arxiv.org/abs/2304.06767), algorithm 1. Touvron et al. 2023 (Llama
# 2), [arXiv 2307.09288](https://arxiv.org/abs/2307.09288), section 3.2.3.
#
# **Look at:** the right panel of Figure 1.
#
# **Turn first:** `keep` in `usual`, what is carried from one round to the next.
#
# **Time:** `quick` takes two minutes on two CPU cores, `full` ten on one. The runs that
# are compared are read from the record. `python lessons/18_raft.py --preset full
# --grid` makes them anew, in three hours, and goes on where it was stopped. 2 GB of
# memory.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from minialign import course, exam, plotting
from minialign.algorithms import ppo
from minialign.algorithms import rejection_sampling as rs
from minialign.evaluation import (
    distinct_workings,
    measured_kl,
    pass_at_k,
    sample_answers,
    workings_differ,
)
from minialign.intervals import bootstrap, over_seeds
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import verifier
from minialign.sampling import generate

# %% tags=["setup"]
settings = course.setup("18_raft")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device).requires_grad_(False)


# %% [markdown]
# ## The idea
#
# Lesson 10 kept the right answers of a draw, imitated them, and drew again. Each such
# *round* starts from a better policy. Here are eight of them, and two questions that
# four rounds did not raise: when to stop, and what goes missing.
#
# Think of imitation as perfect. Then the next policy gives every answer that was kept
# as often as the draw had it, and no other:
#
#     π_{t+1}(y) = share of y among m right answers that were drawn from π_t
#
# On average that is π_t, given that the answer is right. So after one round all answers
# would be right, and a second round would have nothing to add. Further rounds are
# needed because imitation is not perfect: a few steps do not take a policy all the way.
#
# But the average is not the whole story. Many problems can be worked in more than one
# way. A filter that asks only for the right result likes all of them alike, and on
# average their shares stay as they were. In any one draw, though, they come out a
# little higher or lower, and a way that is missing from a draw is gone for good. Let D
# be the chance that two right answers to a problem are worked differently, that is,
# that their calculations are not the same ones in the same order. On average over the
# draws
#
#     E[ D_{t+1} ] = (1 − 1/m) D_t
#
# Nothing works against a way of working, and still variety falls, round after round.
# Biologists know this as *genetic drift*: m is the size of the population.

# %% [markdown] tags=["folded"]
# **Why 1 − 1/m?** Draw two answers from the next policy. Each is a copy of one of the m
# kept ones. With the chance 1/m both are copies of the same one, and alike. Else they
# are copies of two different ones, which were drawn from π_t, and differ with the
# chance D_t.
#
# **And if imitation is not perfect?** Let p be the shares of the ways to work a
# problem, so that D = 1 − Σ p². If the shares move to p' without preference, E[p'] = p,
# then E[D'] = D − Σ Var(p'). Any movement that has no direction costs variety, whether
# it comes from the draw or from the noise of the optimiser.

# %% [markdown]
# ## By hand
#
# A problem with two ways to work it, each as likely as the other, and a policy that is
# nothing but a table of shares. In each round m answers are drawn, and the table
# becomes what was drawn. 10,000 such problems, beside the formula.

# %%
chance = np.random.default_rng(0)
SHOWN = (0, 1, 2, 4, 8)  # rounds
print("D, two ways to work: simulated (formula)")
print(f"{'answers kept':<14}" + "".join(f"{f'round {t}':>16}" for t in SHOWN))
for kept in (1, 4, 16):
    first = np.full(10_000, 0.5)  # share of the first way, a problem each
    print(f"{kept:<14}", end="")
    for t in range(max(SHOWN) + 1):
        differ = np.mean(2 * first * (1 - first))
        formula = 0.5 * (1 - 1 / kept) ** t
        assert abs(differ - formula) < 0.01
        if t in SHOWN:
            print(f"{differ:>9.3f} ({formula:.2f})", end="")
        first = chance.binomial(kept, first) / kept
    print()

# %% [markdown]
# With one answer kept, one round is enough to lose the other way. A language model is
# no such table. What it learns from one problem it uses in all others, so that all
# answers kept in a round speak for its habits together, and m is large. On the other
# hand it moves by steps that have noise of their own. How fast it drifts has to be
# measured.
#
# ## Predict
#
# Take two right answers of the base to the same problem, both with working. With a
# chance of 0.37 they are worked differently. How large is this chance after eight
# rounds, in each of which all right answers were kept?

# %%
my_guess = 0.1  # edit me: a chance

# %% [markdown]
# ## Train
#
# A round asks 256 problems, which no round before has asked, and draws 8 answers to
# each. Whatever is kept is learnt from for 16 steps of some 2,048 tokens, at the
# learning rate of lesson 10.


# %%
@dataclass(frozen=True)
class Plan:
    """One run of rejection sampling in rounds."""

    choose: str = "right"  # or "best per problem", "top of the pool", "by lot"
    keep: str = "latest"  # round, or "all" rounds
    temperature: float = 1.0  # of the draws
    learning_temperature: float = 1.0
    rounds: int = 8
    prompts: int = 256  # problems a round, with 8 answers each: 2,048 answers
    updates: int = 16  # optimiser steps a round
    then_ppo: int = 0  # updates of PPO afterwards, of 256 answers each
    ppo_lr: float = 4e-4  # the policy's in PPO; lesson 15
    seed: int = 0
    looks: tuple[int, ...] = (1, 2, 3, 4, 6, 8)  # rounds after which it is examined


SELECT = {
    "right": rs.select_right,
    "best per problem": rs.select_best,
    "top of the pool": rs.select_top,
    "by lot": rs.select_random,
}
KEEP = {"latest": rs.keep_latest, "all": rs.keep_all}


# %% tags=["setup"]
def draw_of(seed: int, purpose: str) -> torch.Generator:
    """A generator for this purpose, whatever the seed of this run."""
    return replace(settings, seed=seed).generator(purpose)


def spread(policy: GPT, draw: torch.Generator) -> dict[str, float]:
    """How far the policy is from the base, and how unsure of its own answers."""
    unseen = course.load_problems("validation", settings.pick(4, 50, 250))
    rollout = generate(
        policy,
        [tokenizer.encode_prompt(problem.question) for problem in unseen],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=128,
        samples=2,
        generator=draw,
    )
    nats = -rollout.logprobs.double().sum().item()
    return {
        "kl": measured_kl(policy, base, rollout).mean().item(),
        "entropy": nats / int(rollout.mask.sum()),  # nats per token
        "entropy per answer": nats / len(rollout.tokens),
    }


def look(policy: GPT, seed: int, done: int) -> dict:
    """Examine a policy after `done` rounds."""
    draw = draw_of(seed, f"look {done}")
    test = course.load_problems("test", settings.pick(4, 100, 500))
    unseen = course.load_problems("validation", settings.pick(4, 100, 500))
    skill = course.load_problems("second_skill", settings.pick(4, 50, 500))
    on_test = sample_answers(policy, tokenizer, test, 4, generator=draw)
    on_validation = sample_answers(policy, tokenizer, unseen, 2, generator=draw)
    other = sample_answers(policy, tokenizer, skill, 1, greedy=True)
    return {
        "test": course.as_list(bootstrap(on_test.correct.mean(1))),
        "validation": course.as_list(bootstrap(on_validation.correct.mean(1))),
        "second_skill": float(other.correct.mean()),
        **spread(policy, draw),
    }


def look_closely(policy: GPT, seed: int) -> dict:
    """The end of a run: all test problems, and 64 answers to 100 of them."""
    draw = draw_of(seed, "look closely")
    test = course.load_problems("test", settings.pick(4, 200, 1000))
    answers = sample_answers(policy, tokenizer, test, 4, generator=draw)
    greedy = sample_answers(policy, tokenizer, test, 1, greedy=True)
    few = test[: settings.pick(2, 15, 100)]
    many = sample_answers(policy, tokenizer, few, 64, generator=draw)
    return {
        "test": course.as_list(bootstrap(answers.correct.mean(1))),
        "greedy": course.as_list(bootstrap(greedy.correct[:, 0])),
        "pass_at_64": float(pass_at_k(many.correct, 64).mean()),
        "distinct": float(distinct_workings(many).mean()),
        "differ": float(np.nanmean(workings_differ(many))),
    }


def run_plan(plan: Plan) -> dict:
    """From the base through all rounds: the series, the looks, and the end."""
    policy = copy.deepcopy(base).requires_grad_(True)
    series = {}
    looks = {}
    if plan.rounds == 0:
        looks["0"] = look(policy, plan.seed, 0)
    count = plan.rounds * plan.prompts
    problems = course.stream(plan.seed, count + 32 * plan.then_ppo)
    for metrics in rounds_of(policy, problems[:count], plan):
        if metrics["update"] % plan.updates == 0:
            course.keep_series(series, metrics)
            done = metrics["update"] // plan.updates
            if done in plan.looks:
                looks[str(done)] = look(policy, plan.seed, done)
    if plan.then_ppo:
        go_on_with_ppo(policy, problems[count:], plan, series)
        looks["PPO"] = look(policy, plan.seed, plan.rounds + 1)
    return {
        "series": {name: series[name] for name in KEPT if name in series},
        "looks": looks,
        "end": look_closely(policy, plan.seed),
    }


def rounds_of(
    policy: GPT, problems: Sequence[Problem], plan: Plan
) -> Iterator[Mapping[str, float]]:
    """Rejection sampling by this plan, step by step; nothing without rounds."""
    if plan.rounds == 0:
        return
    config = rs.RejectionSamplingConfig(
        rounds=plan.rounds,
        prompts=plan.prompts,
        samples=settings.pick(2, 8, 8),
        max_new_tokens=settings.pick(32, 128, 128),
        temperature=plan.temperature,
        learning_temperature=plan.learning_temperature,
        updates=plan.updates,
    )
    training = rs.train(
        policy,
        tokenizer,
        problems,
        verifier,
        config,
        generator=draw_of(plan.seed, "sampling"),
        select=SELECT[plan.choose],
        keep=KEEP[plan.keep],
    )
    yield from tqdm(training, total=plan.rounds * plan.updates, disable=None)


def go_on_with_ppo(
    policy: GPT, problems: Sequence[Problem], plan: Plan, series: dict[str, list[float]]
) -> None:
    """PPO as in lesson 15, from the policy as it is; its rewards join the series."""
    config = ppo.PPOConfig(
        updates=plan.then_ppo,
        prompts=settings.pick(2, 32, 32),
        samples=settings.pick(2, 8, 8),
        max_new_tokens=settings.pick(32, 128, 128),
        lr=plan.ppo_lr,
    )
    training = ppo.train(
        policy,
        tokenizer,
        problems,
        verifier,
        config,
        critic=ppo.Critic(policy),
        generator=draw_of(plan.seed, "sampling for PPO"),
    )
    for metrics in tqdm(training, total=config.updates, disable=None):
        course.keep_series(series, {"reward of PPO": metrics["reward"]})


KEPT = ("completions", "reward", "length", "kept", "pool", "unanswered")
KEPT += ("reward of PPO",)


# %%
usual = Plan(
    seed=settings.seed,
    rounds=settings.pick(2, 3, 8),
    prompts=settings.pick(4, 96, 256),
    updates=settings.pick(1, 6, 16),
    looks=settings.pick((2,), (1, 2, 3), Plan.looks),
)
run = {"config": asdict(usual), "base": look(base, settings.seed, 0)}
run |= run_plan(usual)
print("rounds   right on test   on validation     KL   entropy   second skill")
for done, moment in {"0": run["base"], **run["looks"]}.items():
    print(
        f"{done:>6}{moment['test'][0]:>16.3f}{moment['validation'][0]:>16.3f}"
        f"{moment['kl']:>7.2f}{moment['entropy']:>10.3f}{moment['second_skill']:>15.3f}"
    )

# %% [markdown]
# *Entropy* is that of the next token, in nats, over the policy's own answers: 0 would
# be a policy that always says the same.
#
# ## The result: what rounds bring, and what they cost
#
# Now other ways to keep. *All rounds*: the answers that were kept earlier stay, as in
# Llama 2. *Best per problem*: one right answer to each problem, if there is one. *Top
# of the pool*: the best eighth of all answers, whichever problems they answer, as in
# RAFT; with a verifier that is as many right answers as there are problems. *By lot*:
# the control of lesson 10, as many tokens as were right, whatever they say. And *top, 4
# steps*: as RAFT, but with a quarter of the steps, so that each answer kept is met
# about once in its round, and not about four times.

# %%
SEEDS = (0, 1, 2)
WAYS = {
    "right, latest": Plan(),
    "right, all rounds": Plan(keep="all"),
    "best per problem": Plan(choose="best per problem"),
    "top of the pool": Plan(choose="top of the pool"),
}
ONCE = {
    "by lot": Plan(choose="by lot"),
    "top, 4 steps": Plan(choose="top of the pool", updates=4),
    "drawn at 0.7, learnt at 0.7": Plan(temperature=0.7, learning_temperature=0.7),
    "drawn at 0.7, learnt at 1": Plan(temperature=0.7),
}
HALF = "half the rounds, then PPO"
GENTLY = "half the rounds, then PPO at 1e-4"
cells = {}
for seed in SEEDS:
    cells[f"the base, seed {seed}"] = Plan(rounds=0, looks=(0,), seed=seed)
    for name, plan in WAYS.items():
        cells[f"{name}, seed {seed}"] = replace(plan, seed=seed)
    then_ppo = Plan(rounds=4, then_ppo=32, looks=(1, 2, 3, 4), seed=seed)
    cells[f"{HALF}, seed {seed}"] = then_ppo
    if seed == 0:
        cells[f"{GENTLY}, seed 0"] = replace(then_ppo, ppo_lr=1e-4)
for name, plan in ONCE.items():
    cells[f"{name}, seed 0"] = plan
if settings.preset == "smoke":
    cells = {"smoke": replace(usual, rounds=1, then_ppo=1, looks=(1,))}
held = exam.run_grid(settings, cells, run_plan, "rounds")


def over(name: str) -> list[dict]:
    """The cells of this name with the seeds that there are."""
    titles = [f"{name}, seed {seed}" for seed in SEEDS]
    return [held[title] for title in titles if title in held]


def mean_of(name: str, what: str, moment: str = "end") -> float:
    """The mean over the seeds of a number of the end, or of one look."""
    values = []
    for cell in over(name):
        found = cell["end"] if moment == "end" else cell["looks"][moment]
        value = found[what]
        values.append(value[0] if isinstance(value, list) else value)
    return float(np.mean(values))


# %%
run["ends"] = {}
print("the end, means over three seeds; by lot and with 4 steps: one seed")
print(f"{'':<20}{'right':>7}{'greedy':>8}{'KL':>6}{'entropy':>9}", end="")
print(f"{'differ':>8}{'distinct':>10}{'pass@64':>9}{'second skill':>14}")
for name in ("the base", *WAYS, "by lot", "top, 4 steps"):
    if not over(name):
        continue
    last = str(over(name)[0]["config"]["rounds"])
    row = {"right": mean_of(name, "test")}
    for what in ("greedy", "differ", "distinct", "pass_at_64"):
        row[what] = mean_of(name, what)
    for what in ("kl", "entropy", "second_skill"):
        row[what] = mean_of(name, what, last)
    run["ends"][name] = row
    print(f"{name:<20}{row['right']:>7.3f}{row['greedy']:>8.3f}", end="")
    print(f"{row['kl']:>6.2f}{row['entropy']:>9.3f}{row['differ']:>8.3f}", end="")
    print(f"{row['distinct']:>10.2f}{row['pass_at_64']:>9.3f}", end="")
    print(f"{row['second_skill']:>14.3f}")


# %% [markdown]
# The last columns are of 64 answers to each of 100 problems. *Differ* is D. *Distinct*
# counts the different workings among the right ones of the 64, and pass@64 asks whether
# any of the 64 is right. How sure are the differences?

# %%
run["gaps"] = {}
for name in list(WAYS)[1:]:
    pairs = list(zip(over(name), over("right, latest"), strict=False))
    if len(pairs) < len(SEEDS):
        continue
    in_test = over_seeds([a["end"]["test"][0] - b["end"]["test"][0] for a, b in pairs])
    in_variety = over_seeds([a["end"]["differ"] - b["end"]["differ"] for a, b in pairs])
    run["gaps"][name] = {
        "right": course.as_list(in_test),
        "differ": course.as_list(in_variety),
    }
    print(f"{name}, less right, latest")
    print(f"  right {in_test}; two workings differ {in_variety}")


# %% tags=["plot"]
def draw_rounds(panel, what: str) -> None:
    """One quantity over the rounds, the mean over seeds; 0 is the base."""
    for place, name in enumerate((*WAYS, "by lot")):
        if not over(name) or not over("the base"):
            continue
        rounds = [int(done) for done in over(name)[0]["looks"]]
        heights = [mean_of(name, what, str(done)) for done in rounds]
        heights.insert(0, mean_of("the base", what, "0"))
        color = plotting.COLORS[place] if name != "by lot" else "#8d99ae"
        style = "--" if name == "by lot" else "-"
        panel.plot(
            [0, *rounds], heights, color=color, ls=style, marker=".", ms=7, label=name
        )
    panel.set(xlabel="rounds of 2,048 answers", ylim=(0, None))


figure, axes = plotting.new_figure(3, "", width=4.6, height=3.9)
draw_rounds(axes[0], "test")
draw_rounds(axes[1], "entropy")
axes[0].set(title="share right", ylim=(0, 1))
axes[1].set(title="entropy, nats a token")
if len(axes[0].lines):
    axes[0].legend(loc="lower right")
shown = [name for name in run["ends"] if name != "top, 4 steps"]
for row, name in enumerate(shown):
    values = [cell["end"]["differ"] for cell in over(name)]
    color = "#8d99ae"
    if name in WAYS:
        color = plotting.COLORS[list(WAYS).index(name)]
    axes[2].barh(row, np.mean(values), color=color, alpha=0.75)
    axes[2].plot(values, [row] * len(values), "o", color="#222", ms=3)
axes[2].set_yticks(range(len(shown)), shown)
axes[2].invert_yaxis()
axes[2].set(title="two right workings differ, at the end: chance", xlim=(0, 0.45))
if "top of the pool" in run["ends"]:
    many = run["ends"]["right, latest"]
    few = run["ends"]["top of the pool"]
    plotting.headline(
        figure,
        f"Keep all right answers, or few: in the end {many['right']:.2f} or "
        f"{few['right']:.2f} are right, and two right workings differ with a chance of "
        f"{many['differ']:.2f} or {few['differ']:.2f}",
    )
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Eight rounds from the base, by what is kept; means over three seeds, of
# *by lot* one seed. Left: right answers to 500 test problems. Middle: entropy of the
# next token, over answers to validation problems. Right: the chance D that two right
# answers to one problem, both with working, are worked differently; bars are means, and
# dots are seeds.

# %%
if "right, latest" in run["ends"]:
    course.predict(
        "The chance that two right workings differ, after eight rounds:",
        my_guess,
        run["ends"]["right, latest"]["differ"],
        key="ends > right, latest > differ",
    )

# %% [markdown]
# ## Is there a round too many?
#
# Whoever trains may look at the validation problems after six of the rounds, and keep
# the policy that was best there. Would that have been better than to go on to the end?
# The rule was fixed before the runs: the round with the highest share on validation.


# %%
def stop_of(cell: Mapping) -> tuple[int, float]:
    """The round that validation would keep, and what it is worth on test beside the
    last."""
    looks = cell["looks"]
    best = max(looks, key=lambda done: looks[done]["validation"][0])
    last = list(looks)[-1]
    return int(best), looks[best]["test"][0] - looks[last]["test"][0]


run["stops"] = {}
for name in WAYS:
    stops = [stop_of(cell) for cell in over(name)]
    if len(stops) == len(SEEDS):
        gain = over_seeds([gained for _, gained in stops])
        run["stops"][name] = course.as_list(gain)
        rounds = ", ".join(str(done) for done, _ in stops)
        print(f"{name:<20} round {rounds:<10} on test, less the last: {gain}")

# %% [markdown]
# ## What Llama 2 did next
#
# Llama 2 was filtered for some rounds, and then trained further with PPO. Here are
# 16,384 answers, spent in three ways: all on filtering; half of them on four rounds of
# filtering, the rest on PPO from there; all on PPO from the base, which is the run of
# lesson 15. PPO has its settings of lesson 15 in both.

# %%
run["next"] = {}
rows = {
    "filtering": [cell["end"]["test"][0] for cell in over("right, latest")],
    HALF: [cell["end"]["test"][0] for cell in over(HALF)],
}
alone = plotting.load_record("15_ppo")
rows["PPO from the base"] = [alone[str(seed)]["sampled"][1][0] for seed in SEEDS]
print(f"{'16,384 answers':<27}{'right on test':>23}{'KL':>7}{'second skill':>14}")
for name, values in rows.items():
    if len(values) < len(SEEDS):
        continue
    found = over_seeds(values)
    row = {"right": course.as_list(found)}
    if name == "PPO from the base":
        of_seeds = [alone[str(seed)] for seed in SEEDS]
        row["kl"] = float(np.mean([one["kl"][0] for one in of_seeds]))
        skills = [one["second_skill"][1][0] for one in of_seeds]
        row["second_skill"] = float(np.mean(skills))
    else:
        cell_name = HALF if name == HALF else "right, latest"
        moment = list(over(cell_name)[0]["looks"])[-1]
        row["kl"] = mean_of(cell_name, "kl", moment)
        row["second_skill"] = mean_of(cell_name, "second_skill", moment)
    run["next"][name] = row
    print(f"{name:<27}{found!s:>23}{row['kl']:>7.2f}{row['second_skill']:>14.3f}")
gently = [cell["end"]["test"][0] for cell in over(GENTLY)]
if gently:
    run["next"][GENTLY] = {"right": gently[0]}
    print(f"the same, PPO's learning rate 1e-4: {gently[0]:.3f} (one seed)")
run["apart"] = {}
for other in ("filtering", "PPO from the base"):
    pairs = zip(rows[HALF], rows[other], strict=False)
    gaps = [first - second for first, second in pairs]
    if len(gaps) == len(SEEDS):
        gap = over_seeds(gaps)
        run["apart"][f"less {other}"] = course.as_list(gap)
        print(f"{HALF}, less {other}: {gap}")

# %% [markdown]
# ## Break it: draw colder than you learn
#
# RAFT's authors draw at a temperature of 0.85 and learn at 1. Each answer is then
# copied from a policy that is surer of itself than the one that learns. Here at 0.7, so
# that it can be seen; once more with learning at 0.7 too; one seed each.

# %%
run["temperatures"] = {}
print("one seed; judged at temperature 1")
print(f"{'':<29}{'right, round 1':>15}{'right, end':>12}{'differ':>8}{'entropy':>9}")
COLDER = [name for name in ONCE if name.startswith("drawn")]
for name in ("right, latest", *COLDER):
    if f"{name}, seed 0" not in held:
        continue
    cell = held[f"{name}, seed 0"]
    row = {
        "first": cell["looks"]["1"]["test"][0],
        "right": cell["end"]["test"][0],
        "differ": cell["end"]["differ"],
        "entropy": cell["looks"]["8"]["entropy"],
    }
    run["temperatures"][name] = row
    print(f"{name:<29}{row['first']:>15.3f}{row['right']:>12.3f}", end="")
    print(f"{row['differ']:>8.3f}{row['entropy']:>9.3f}")

# %% [markdown]
# ## What we found
#
# All numbers are means over three seeds where nothing else is said, and intervals are
# Student's over the seeds.
#
# **Rounds.** Where all right answers of the latest round are imitated, the share of
# right answers goes from 0.46 to 0.90. Most of the way is made in the first three
# rounds, and the last ones bring little. (The learning rate falls to 0 over the eight
# rounds, so that the last ones would bring less in any case.) On validation the last
# round was the best one for all seeds, so that a look there would have kept it.
#
# **What is kept decides how varied the answers stay, much more than how right they
# are.** All right answers are some 900 in the first round and 1,800 in the last; one
# best per problem are 256 at most. Those come to 0.88, which is 0.012 [0.007, 0.017]
# less: apart, by less than 0.05. But two right workings differ with a chance of 0.13,
# and not of 0.24; the base has 0.37. Of 64 answers, the right ones are worked in 1.6
# ways, and not in 2.2. One of the 64 is right nearly always, before and after, so that
# pass@64 shows nothing of this.
#
# **Old rounds cost accuracy, and may keep variety.** With the answers of all rounds two
# right workings differ with a chance of 0.30, and 0.85 are right, which is 0.045
# [0.021, 0.069] less than with the latest alone. Whether D is higher is undecided. (Our
# guess: the pool keeps what the base got right, and much of that is terse, and right by
# luck.)
#
# **Drift explains little of it.** A filter also lowers D by itself, where one way of
# working succeeds more often than another (exercise 1). By lot, where nothing is
# preferred by design, D falls from 0.37 to 0.31, and the accuracy with it, to 0.40 (one
# seed). For a table of shares with m = 256, eight rounds would leave 0.97 of D. Keeping
# as few as that left a third of it. What differs is that 16 steps go through 256
# answers some four times. With 4 steps a round each is met about once, and D is 0.33 in
# the end, with 0.66 right (one seed). So it seems to be repetition that makes a policy
# narrow; steps and repetition were not varied apart from each other.
#
# **The second skill is forgotten most where few answers are repeated.** It falls from
# 0.758 to 0.649 with one best per problem, to 0.731 with all right ones of the latest
# round, and to 0.741 with those of all rounds. By lot it falls too, to 0.688 (one
# seed), and there is no reward in that: to imitate answers to other problems for long
# is enough.
#
# **PPO after filtering helps; at untuned rates, more filtering helped more.** PPO takes
# the filtered policies to 0.831. That is 0.065 [0.018, 0.111] less than four more
# rounds of filtering would have brought, and not told apart from PPO from the base,
# with 0.824. But its learning rate was chosen for the base. For seed 0 it leads from
# 0.784 to 0.834 of 500 problems. Of all 1,000 problems the end is 0.818, with a quarter
# of the rate 0.882, and with filtering alone 0.899. No rate was tuned for this start,
# so the order of the two is open.
#
# **Colder draws** bring nothing but less variety in the end. Drawn at 0.7 and learnt at
# 1, as in RAFT, the policy is right as often, 0.897 and 0.899 without, and two right
# workings differ with a chance of 0.17 and not of 0.26. Learnt at 0.7 too, it stays at
# 0.85 when it is asked at 1 (one seed each).
#
# **What the papers say, here.**
#
# * Keeping the answers of earlier rounds prevents forgetting (Llama 2): undecided for
#   the second skill, 0.741 beside 0.731; for variety it holds in the mean, and over
#   three seeds is undecided too.
# * PPO after filtering improves further (Llama 2): holds. As many answers spent on
#   filtering do it too.
# * The best answer to each problem is enough (RAFT): holds for accuracy, within 0.05.
#
# How many rounds are enough? As long as validation rises; here that was to the end. And
# what is lost is variety, by as much as little is kept and often repeated.

# %% tags=["record"]
course.check(
    "18_raft",
    {
        "ends > the base > right": "0.46",
        "ends > right, latest > right": "0.90",
        "ends > best per problem > right": "0.88",
        "gaps > best per problem > right": "-0.012",
        "ends > best per problem > differ": "0.13",
        "ends > right, latest > differ": "0.24",
        "ends > the base > differ": "0.37",
        "ends > best per problem > distinct": "1.6",
        "ends > right, latest > distinct": "2.2",
        "ends > right, all rounds > differ": "0.30",
        "ends > right, all rounds > right": "0.85",
        "gaps > right, all rounds > right": "-0.045",
        "ends > by lot > differ": "0.31",
        "ends > by lot > right": "0.40",
        "ends > top, 4 steps > differ": "0.33",
        "ends > top, 4 steps > right": "0.66",
        "ends > the base > second_skill": "0.758",
        "ends > best per problem > second_skill": "0.649",
        "ends > right, latest > second_skill": "0.731",
        "ends > right, all rounds > second_skill": "0.741",
        "ends > by lot > second_skill": "0.688",
        "next > half the rounds, then PPO > right": "0.831",
        "apart > less filtering": "-0.065",
        "next > PPO from the base > right": "0.824",
        "next > half the rounds, then PPO at 1e-4 > right": "0.882",
        "temperatures > drawn at 0.7, learnt at 1 > right": "0.897",
        "temperatures > drawn at 0.7, learnt at 1 > differ": "0.17",
        "temperatures > drawn at 0.7, learnt at 0.7 > right": "0.85",
        "temperatures > right, latest > right": "0.899",
        "temperatures > right, latest > differ": "0.26",
    },
    own=run,
)
course.check(
    "18_raft_rounds",
    {
        "looks > 4 > test, seed half the rounds, then PPO, seed 0": "0.784",
        "looks > PPO > test, seed half the rounds, then PPO, seed 0": "0.834",
        "end > test, seed half the rounds, then PPO, seed 0": "0.818",
    },
)

# %% tags=["record"]
course.finish(
    settings,
    run,
    course.as_estimate(run["base"]["test"]),
    course.as_estimate(run["end"]["test"]),
    "sampled accuracy on test problems, 95 % over problems",
)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **At which round should I stop?** Look at validation, as above: in ten of twelve runs
# it would have gone on to the end, and nothing was lost by going all the way. What it
# cannot show is what no validation problem asks about. So look at variety and at other
# skills too, and stop when a round costs more of these than it brings.
#
# **How does this differ from PPO?** Both learn from the policy's own answers. The
# filter raises right answers and does nothing else; PPO also lowers wrong ones, token
# by token, and takes a few careful steps on each draw instead of many free ones. On
# fresh answers the first step of the filter, with one draw a step, goes on average
# where REINFORCE without a baseline goes (lesson 10). Everything that makes the two
# different comes after the first step.
#
# **Why is nothing pushed down here, and wrong answers still die out?** Probabilities
# sum to 1. What is imitated rises, and all else makes room.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** A problem has two ways to work it. One leads to the right
# result with chance a, the other with chance b < a. Both are chosen equally often at
# first. Let imitation change how often a way is chosen, but not how well it is carried
# out, and let m be so large that there is no drift. Which share has the first way after
# t rounds?
#
# **Exercise 2 (change).** Set `prompts=2048` and `updates=128` in `usual`, with
# `rounds=1`: the same answers and steps in one round. What does it come to, and why?
#
# **Exercise 3 (break).** Let `threshold` be −1 in the config and choose the best answer
# per problem. What is imitated now, of a problem that nobody solved?

# %% [markdown] tags=["answers"]
# **Answer 1.** Among the right answers the odds of the first way are those among all
# answers, times a/b. Each round does it again, so that after t rounds the odds are
# (a/b)^t, and the share is a^t/(a^t + b^t). A filter that asks for nothing but the
# result still favours the way that succeeds more often.
#
# **Answer 2.** We expect less, and have not run it. All 16,384 answers are then the
# base's own, and of its right ones many are terse, right by a lucky guess. Each further
# round draws from a policy that works more often, and so finds more worked answers to
# keep. One round of lesson 10, of 4,096 answers and 32 steps, came to 0.64, with a
# quarter of the steps.
#
# **Answer 3.** One of its wrong answers, by lot. On problems that are never solved the
# policy is taught what it did wrong, and these are the hardest ones. A threshold is
# part of the filter.
