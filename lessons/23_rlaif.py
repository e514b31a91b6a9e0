# %% [markdown]
# # Lesson 23: A model as the judge (RLAIF)
#
# **Question.** Can a model take the place of the people who judge?
#
# **Afterwards you can** let a language model judge pairs of answers, undo what their
# order does to it, and train a policy on its opinions.
#
# **Read before:** [lesson 22](22_rlhf.py): a reward that was learnt from people, and
# what happens when it is optimised.
#
# **Paper:** Lee et al. 2023 (RLAIF), [arXiv
# 2309.00267](https://arxiv.org/abs/2309.00267), section 2.
#
# **Look at:** where the curves of Figure 1 lie on one another, and where they end.
#
# **Turn first:** `judge` in `usual`: who judges.
#
# **Time:** `quick` takes 75 seconds on one CPU core, `full` twenty-five minutes. The
# judges and the runs that are compared are read from the record. `python
# lessons/23_rlaif.py --preset full --grid` makes them anew, in some four hours, and
# goes on where it was stopped. 2 GB of memory.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from random import Random

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minialign import checkpoint, course, exam, plotting
from minialign.algorithms import ppo, reward_model, sft
from minialign.evaluation import Answers, sample_answers
from minialign.intervals import Estimate, bootstrap, over_seeds, verdict
from minialign.model import GPT
from minialign.problems import (
    DATA,
    MISTAKES,
    STYLES,
    Problem,
    extract_answer,
    spoiled,
    workings,
)
from minialign.rewards import (
    Judge,
    JudgedReward,
    LearnedReward,
    Reward,
    RewardModel,
    careful,
    verdict_ids,
    verdict_prompt,
    verifier,
)
from minialign.sampling import Example

# %% tags=["setup"]
settings = course.setup("23_rlaif")
tokenizer = course.load_tokenizer()
base = course.load_policy(tokenizer, settings.device).requires_grad_(False)
JUDGE = DATA / "judge.ckpt"

# %% [markdown]
# ## The idea
#
# Thousands of comparisons by people cost weeks. But a language model can read two
# answers too, and say which is better. Let it read
#
#     question   first answer   1   second answer   2
#
# and look at what it would write next. Of all that it might say, take the logits of the
# two tokens "1" and "2" alone. A softmax over these two is a chance, P("1"): the
# judge's *opinion* that the first answer is better.
#
# Two things can go wrong. A model may like what stands first, or what stands last,
# whatever it says. So ask twice, with the answers exchanged, and average. Let a and b
# be the two answers:
#
#     P(a better than b) = ½ [ P("1" | a first, b second) + P("2" | b first, a second) ]
#
# A liking for the first place now speaks once for each answer, and cancels. And a model
# that has to answer at once has no time to think. So let it *work* first: write down
# what it makes of the problem, and then decide. Behind the second "2" our judge reads a
# *working* of the problem. It is written by the base, whose answer is begun with `<<`,
# so that it has to calculate. As the writer of the working we call it the judge's
# *worker*; it does not see the two answers.
#
# What is done with the opinions? There are two ways. Either they take the place of
# people's choices in lesson 20: a reward model learns from pairs, each of which has a
# chance where it had a label. Or, every time the policy gives an answer, the judge
# itself is asked whether it is better than the base's greedy answer, its *rival*, and
# the opinion is the reward. This way is called *direct*. The algorithm behind it
# notices no difference:
#
#     problem → policy → answer → [ program | model of people | judge ] → reward
#
# Learning from the first source is ReFT (lesson 21), from the second RLHF (lesson 22),
# from the third *RLAIF*: reinforcement learning from the feedback of an AI. There is
# one algorithm, and there are three sources of reward. (ReFT also has a warm-up by
# imitation, of the same questions. Here stands its reward alone.)

# %% [markdown] tags=["folded"]
# **What does the average undo, and what not?** Write the logit of "1" less the logit of
# "2" as q + c. Here q is what the judge thinks of the answers, and changes its sign
# when they are exchanged; c is what it thinks of the places, and does not. With a first
# the judge says σ(q + c) for a, and with b first 1 − σ(−q + c) = σ(q − c). The average
# of the two is more than a half exactly if q > 0, whatever c is. But the larger c, the
# closer every average comes to a half. As c → ∞ nothing of q is left to be seen.
#
# **In the cheatsheet.** The card of this method, for the [table of all](cheatsheet.md):
#
#     Card: RLAIF (2309.00267)
#         data: own answers; pairs of them that a model has judged, in both orders
#         policy: near
#         comparison: critic V (here); the paper: a value baseline
#         credit: token
#         reference: k1 in each token's reward
#         loss: −P log σ(r_1 − r_2) − (1 − P) log σ(r_2 − r_1), then PPO; or PPO on P

# %% [markdown]
# ## By hand
#
# A judge prefers an answer by q = 1, and adds c to the logit difference for whatever
# stands first. What does it say for the better answer, if that stands first, if it
# stands second, and on average?

# %%
print("  c   better first   better second   average")
for place in (0.0, 1.0, 3.0, -3.0):
    quality = torch.tensor(1.0)
    at_first = torch.sigmoid(quality + place).item()
    at_second = torch.sigmoid(quality - place).item()
    average = (at_first + at_second) / 2
    assert average > 0.5
    print(f"{place:>4.0f}{at_first:>14.3f}{at_second:>16.3f}{average:>11.3f}")

# %% [markdown]
# With c = 3 the judge says "1" nearly always. On average the better answer is ahead all
# the same, by less.
#
# ## Predict
#
# The judge below works each problem first, and of a right and a wrong answer it names
# the right one in 0.95 of the cases. The base is right in 0.45 of its answers. A policy
# is paid by this judge's direct opinions alone. In which share is it right, after 4,096
# answers?

# %%
my_guess = 0.9  # edit me: a share

# %% [markdown]
# ## Train the judge
#
# The judge starts as a copy of the base. It has the same size, and can read twice as
# far. It may not learn from answers of the policy, nor from what the verifier says of
# them: then it would be the verifier over again. It learns from right solutions, such
# as the teachers of lesson 01 show, and from wrong copies of them, on problems that
# nobody else is asked. A wrong copy has one mistake, of one of these kinds:

# %%
SCHOOL = 9000  # the seed of the problems that judges learn from: nobody else's
problem, texts = workings(SCHOOL, "train", 0)
print(problem.question)
print("right:     ", texts[0].replace("\n", " "))
for mistake in MISTAKES:
    wrong = spoiled(texts[0], Random(0), mistake)
    print(f"{mistake:<11}", wrong.replace("\n", " "))

# %% [markdown]
# Right or wrong, an answer is shown with its working or as a last line alone, by lot.
# So its form does not give away whether it is right.


# %%
@dataclass(frozen=True)
class Schooling:
    """How a judge is made from the base."""

    works: bool = True  # it is shown what the base finds when it works the problem
    reads: bool = True  # the question
    pairs: str = "spoiled"  # right answers and wrong copies; or "verdicts", "nothing"
    short: int = 700  # updates on last lines alone, 128 pairs each
    whole: int = 600  # then on whole answers, 64 pairs each
    seed: int = 0


# %% tags=["setup"]
@dataclass(frozen=True)
class Compared:
    """Two answers to a question, of which one is right, and a working of it."""

    question: str
    working: str
    right: str
    wrong: str

    def reduced(self, chance: float, rng: Random) -> "Compared":
        """Each part reduced with this chance: no question, and last lines alone."""
        simple = self
        if rng.random() < chance:
            simple = replace(simple, question="")
        if rng.random() < chance:
            right = last_line(self.right)
            simple = replace(simple, right=right, wrong=last_line(self.wrong))
        if rng.random() < chance:
            simple = replace(simple, working=last_line(self.working))
        return simple


def last_line(answer: str) -> str:
    """The result alone: a terse answer."""
    return answer.splitlines()[-1]


def spoiled_pair(number: int, rng: Random) -> Compared:
    """A right answer and a wrong copy of one, each worked or terse by lot."""
    problem, texts = workings(SCHOOL, "train", number)
    right = rng.choice(texts)
    wrong = spoiled(rng.choice(texts), rng)
    if rng.random() < 0.5:
        right = last_line(right)
    if rng.random() < 0.5:
        wrong = last_line(wrong)
    return Compared(problem.question, rng.choice(texts), right, wrong)


# %% [markdown]
# In what it reads, each answer is followed by its number. So the judge has to find, in
# the answers, the result that its own working came to, and say which number comes
# behind it. Attention can learn to look that up, but on whole answers it does not come
# upon it: after 1,000 updates of that kind our judges named the right answer in 0.47 to
# 0.75 of the cases. With last lines alone it does. So the judge begins with 700 updates
# on pairs of last lines, without the question, and goes on with 600 on whole answers,
# of which each part is left out at times.


# %%
class Lessons(Sequence):
    """What a judge is taught: pairs in an order by lot, and which of them is right."""

    def __init__(self, schooling: Schooling, count: int, chance: float) -> None:
        self.schooling = schooling
        self.count = count
        self.chance = chance  # that a part is reduced

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        schooling = self.schooling
        rng = Random(f"{schooling.seed}/{self.chance}/{number}")
        if schooling.pairs == "spoiled":
            pair = spoiled_pair(number, rng)
        else:
            pairs = judged_pairs()
            pair = pairs[number % len(pairs)]
        pair = pair.reduced(self.chance, rng)
        one, two = verdict_ids(tokenizer)
        first, second, verdict = pair.right, pair.wrong, one
        if rng.random() < 0.5:
            first, second, verdict = pair.wrong, pair.right, two
        question = pair.question if schooling.reads else ""
        working = pair.working if schooling.works else None
        prompt = verdict_prompt(tokenizer, question, first, second, working)
        return prompt, [verdict]


# %% tags=["setup"]
@cache
def judged_pairs() -> list[Compared]:
    """A right and a wrong answer of the base to the same problem, by the verifier."""
    problems = course.stream(SCHOOL, settings.pick(16, 4000, 4000))
    draw = draw_of(0, "for the ceiling")
    held = sample_answers(base, tokenizer, problems, 4, generator=draw)
    working = Judge(base, tokenizer, worker=base).work(problems)
    found = []
    rows = zip(problems, held.texts, held.correct, working, strict=True)
    for problem, texts, correct, own in rows:
        right = [text for text, fine in zip(texts, correct, strict=True) if fine]
        wrong = [text for text, fine in zip(texts, correct, strict=True) if not fine]
        if right and wrong:
            found.append(Compared(problem.question, own, right[0], wrong[0]))
    return found


def draw_of(seed: int, purpose: str) -> torch.Generator:
    """A generator for this purpose, whatever the seed of this run."""
    return replace(settings, seed=seed).generator(purpose)


def reader_of(model: GPT) -> GPT:
    """A copy that reads twice as far: a question, two answers and a working."""
    config = replace(model.config, context=512)
    reader = GPT(config, torch.Generator().manual_seed(0)).to(settings.device)
    reader.load_state_dict(model.state_dict())
    return reader


# %%
def school(schooling: Schooling) -> tuple[Judge, list[float]]:
    """A judge, and the loss of each update of its training."""
    model = reader_of(base)
    losses = []
    at_times = 0.5 if schooling.works else 0.0
    stages = [  # updates, pairs in each, chance that a part is reduced, learning rate
        (schooling.short, settings.pick(4, 128, 128), 1.0, 1e-3),
        (schooling.whole, settings.pick(4, 64, 64), at_times, 5e-4),
    ]
    for updates, batch, chance, lr in stages:
        if updates == 0 or schooling.pairs == "nothing":
            continue
        config = sft.SFTConfig(
            updates=updates, batch_size=batch, lr=lr, warmup=20, muon=False
        )
        lessons = Lessons(schooling, updates * batch, chance)
        training = sft.train(model, lessons, config, pad_id=tokenizer.pad_id)
        for metrics in tqdm(training, total=updates, disable=None):
            losses.append(metrics["loss"])
    model.requires_grad_(False)
    return judge_with(model, schooling), losses


# %% tags=["setup"]
class BlindJudge(Judge):
    """A judge from whom the question is hidden."""

    def says_first(
        self, problems: Sequence[Problem], first: Sequence[str], second: Sequence[str]
    ) -> Tensor:
        """As `Judge`, of answers to nothing."""
        hidden = [replace(problem, question="") for problem in problems]
        return super().says_first(hidden, first, second)


def judge_with(model: GPT, schooling: Schooling) -> Judge:
    """The judge of such a schooling, from its weights."""
    if not schooling.reads:
        return BlindJudge(model, tokenizer)
    return Judge(model, tokenizer, base if schooling.works else None)


@cache
def to_be_judged() -> tuple[Answers, tuple[tuple[int, int, int], ...]]:
    """The base's answers to validation problems, 4 each; of each problem with both, a
    right and a wrong one: (problem, right, wrong)."""
    unseen = course.load_problems("validation", settings.pick(8, 100, 500))
    draw = draw_of(exam.TUNING_SEED, "to be judged")
    held = sample_answers(base, tokenizer, unseen, 4, generator=draw)
    pairs = []
    for place, correct in enumerate(held.correct):
        right = np.flatnonzero(correct)
        wrong = np.flatnonzero(~correct)
        if len(right) and len(wrong):
            pairs.append((place, int(right[0]), int(wrong[0])))
    return held, tuple(pairs)


def examine(judge: Judge) -> dict:
    """How often a judge prefers the right answer, in either order, and by kind; and
    how often it agrees with a careful person without noise."""
    held, pairs = to_be_judged()
    asked = [held.problems[place] for place, _, _ in pairs]
    right = [held.texts[place][i] for place, i, _ in pairs]
    wrong = [held.texts[place][j] for place, _, j in pairs]
    at_first = judge.says_first(asked, right, wrong).cpu()  # (N,)
    at_second = 1 - judge.says_first(asked, wrong, right).cpu()  # (N,)
    both = (at_first + at_second) / 2  # (N,)
    kinds = {}
    for (place, i, j), sure in zip(pairs, both.tolist(), strict=True):
        kind = f"{held.styles[place][i]} against {held.styles[place][j]}"
        kinds.setdefault(kind, []).append(float(sure > 0.5))
    return {
        "pairs": len(pairs),
        "right at first": (at_first > 0.5).double().mean().item(),
        "right at second": (at_second > 0.5).double().mean().item(),
        "right": course.as_list(bootstrap((both > 0.5).double().numpy())),
        "chance": both.mean().item(),
        "says first": ((at_first + 1 - at_second) / 2).mean().item(),
        "kinds": {name: [np.mean(xs), len(xs)] for name, xs in kinds.items()},
        "people": agreement_with_people(judge),
    }


def agreement_with_people(judge: Judge) -> float:
    """Of pairs that a careful person does not like alike, the share that the judge
    orders as that person does; ties of the judge count a half."""
    held, _ = to_be_judged()
    asked = []
    ours = []
    theirs = []
    better = []
    for problem, texts in zip(held.problems, held.texts, strict=True):
        one, two = careful([problem] * 2, texts[:2])
        if one != two:
            asked.append(problem)
            ours.append(texts[0])
            theirs.append(texts[1])
            better.append(one > two)
    says = judge.prefers(asked, ours, theirs).cpu().numpy()
    return float(np.mean((says > 0.5) == np.array(better)))


def run_school(schooling: Schooling) -> dict:
    """Make a judge, keep it, and examine it."""
    judge, losses = school(schooling)
    if settings.preset != "smoke":
        checkpoint.save_model(kept_judge(schooling), judge.model, tokenizer)
    return {"losses": losses[::10], "exam": examine(judge)}


def kept_judge(schooling: Schooling) -> Path:
    """Where a judge of this schooling is kept."""
    if schooling == Schooling():
        return JUDGE if settings.record else plotting.LOCAL / "judge.ckpt"
    words = [str(value) for value in asdict(schooling).values()]
    return plotting.LOCAL / f"23_{'_'.join(words)}.ckpt"


SCHOOLS = {
    "strong": Schooling(),
    "middling": Schooling(whole=100),
    "weak": Schooling(whole=25),
    "without working": Schooling(works=False, short=0, whole=1200),
    "question hidden": Schooling(works=False, reads=False, short=0, whole=1200),
    "taught by verdicts": Schooling(pairs="verdicts"),
    "the base itself": Schooling(pairs="nothing"),
}


@cache
def judge_of(name: str) -> Judge:
    """A judge that has been made before, or is made now."""
    schooling = SCHOOLS[name]
    if schooling.pairs == "nothing":
        return judge_with(reader_of(base), schooling)
    path = kept_judge(schooling)
    if schooling == Schooling():
        path = JUDGE
    if path.exists():
        model, _ = checkpoint.load_model(path, tokenizer, settings.device)
        return judge_with(model.requires_grad_(False), schooling)
    judge, _ = school(schooling)
    if settings.preset != "smoke":
        checkpoint.save_model(path, judge.model, tokenizer)
    return judge


# %%
if settings.preset == "full":
    judge, losses = school(Schooling(seed=settings.seed))
    if settings.record and settings.seed == 0:
        checkpoint.save_model(JUDGE, judge.model, tokenizer)
else:
    short = Schooling(short=settings.pick(1, 10, 0), whole=settings.pick(1, 0, 0))
    _, losses = school(short)  # the beginning alone; the rest is read from the file
    judge = judge_of("strong")
run = {"losses": losses[::10]}
for place in range(0, len(losses), max(len(losses) // 10, 1)):
    print(f"update {place + 1:>5}: {losses[place]:.3f} nats a verdict")

# %% [markdown]
# A verdict by lot costs log 2 = 0.693 nats. Whole answers begin at update 701.
#
# ## How good is the judge?
#
# The base has given four answers to each of 500 validation problems. Where some are
# right and some are wrong, we take one of each. The right one stands first, or second.
# (Styles are those of lesson 01: worked, terse, careless, showy.)

# %%
run["judge"] = examine(judge)
found = run["judge"]
print(f"{found['pairs']} pairs of a right and a wrong answer")
print(f"it names the right one if that stands first:  {found['right at first']:.3f}")
print(f"                       if that stands second: {found['right at second']:.3f}")
print("                       on average of both:    ", end="")
print(course.as_estimate(found["right"]))
print(f"its mean opinion of what stands first: {found['says first']:.3f}")
print("by the styles of the right and the wrong one, where there are 10 pairs or more:")
for kind, (named, count) in sorted(found["kinds"].items(), key=lambda it: -it[1][1]):
    if count >= 10:
        print(f"    {kind:<24}{named:.2f} of {count}")

# %% [markdown]
# The place of an answer means next to nothing to this judge, so that there is hardly
# anything to undo. Others are not so. *Middling* and *weak* ones stop after 100 and
# after 25 of the 600 updates on whole answers. One is shown no working, and must see at
# once which answer is right. From one the question is hidden as well. (These two have
# no use for pairs of bare results, and get 1,200 updates on whole answers instead.) One
# is taught by verdicts of the verifier on the base's own answers, as a ceiling. And one
# is the base itself, which nobody has taught what "1" and "2" stand for. (The table,
# and all policies but the one trained below, were made on another machine. Its last
# digits differ, and in 1,300 updates they grow to another judge of the same kind:
# *strong* is the judge above, trained there.)

# %%
schools = dict(SCHOOLS)
if settings.preset == "smoke":
    schools = {"taught by verdicts": replace(SCHOOLS["weak"], pairs="verdicts")}
    schools = {name: replace(it, short=1, whole=1) for name, it in schools.items()}
judges = exam.run_grid(settings, schools, run_school, "judges")
print("pairs of which a judge names the right answer, if that stands first or second;")
print(
    "of the pairs of which careful people like one better, those it orders as they do"
)
print(f"{'':<20}{'first':>9}{'second':>9}{'both averaged':>24}", end="")
print(f"{'as people':>11}{'says 1':>8}")
run["judges"] = {}
for name, cell in judges.items():
    found = cell["exam"]
    run["judges"][name] = found
    both = course.as_estimate(found["right"])
    print(f"{name:<20}{found['right at first']:>9.3f}", end="")
    print(f"{found['right at second']:>9.3f}{both!s:>24}", end="")
    print(f"{found['people']:>11.3f}{found['says first']:>8.3f}")

# %% [markdown]
# What does an opinion cost? For each pair the judge reads everything twice. The working
# is written once a problem, however many pairs it has.

# %%
held, pairs = to_be_judged()
read = []
written = []
for place, i, j in pairs:
    problem = held.problems[place]
    texts = held.texts[place][i], held.texts[place][j]
    (working,) = judge.work([problem])
    read.append(len(verdict_prompt(tokenizer, problem.question, *texts, working)))
    written.append(len(tokenizer.encode_response(working)))
run["tokens_read"] = 2 * float(np.mean(read))
run["tokens_written"] = float(np.mean(written))
print(f"{run['tokens_read']:.0f} tokens read for an opinion, both orders together,")
print(f"and {run['tokens_written']:.0f} written to work the problem")
worked_out = judge.work(held.problems)
run["worker"] = course.as_list(bootstrap(np.array(verifier(held.problems, worked_out))))
print(f"the working comes to the right result: {course.as_estimate(run['worker'])}")

# %% [markdown]
# ## Train the policy
#
# The policy that is paid by a judge we call its *pupil*. It learns by PPO, from the
# base, with the settings of lesson 22: 16 updates of 8 answers to each of 32 problems.
# Whatever pays, its rewards are brought to mean 0 and deviation 1 over the base's
# answers, and a nat of KL costs 0.3 deviations. From here on an *opinion* is meant on
# this scale.


# %%
@dataclass(frozen=True)
class Pupil:
    """One run of PPO from the base, by whose reward."""

    source: str = "judge"  # its own opinion; or "reward model", of what the judge says
    #  of 4,000 pairs; or "program"
    judge: str = "strong"  # of SCHOOLS
    beta: float = 0.3  # price of a nat of KL, in deviations of the reward
    seed: int = 0
    updates: int = 16  # of 32 problems with 8 answers each
    looks: tuple[int, ...] = (1, 2, 4, 8, 12, 16)  # updates after which it is examined


# %% tags=["setup"]
TRUNCATED = -2.0  # what an answer earns that does not end, in deviations


def greedy_answers(problems: Sequence[Problem]) -> list[str]:
    """The base's greedy answer to each problem."""
    held = sample_answers(base, tokenizer, problems, 1, greedy=True)
    return [texts[0] for texts in held.texts]


class Standard:
    """A reward in its own deviations: mean 0 and deviation 1 over two of the base's
    answers to each validation problem. Of two answers to one problem, `pays` says by
    how much a right one earns more than a wrong one, and a worked one more than a terse
    one. The share of right answers that it meets in training is written down."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.truth: list[float] = []
        held, _ = to_be_judged()
        asked = [problem for problem in held.problems for _ in range(2)]
        said = [text for texts in held.texts for text in texts[:2]]
        numbers = np.reshape(reward(asked, said), (-1, 2))  # two to each problem
        self.mean = float(numbers.mean())
        self.deviation = float(numbers.std())
        styles = np.array([names[:2] for names in held.styles])
        pays = {
            "right": (held.correct[:, :2], ~held.correct[:, :2]),
            "worked": (styles == "worked", styles == "terse"),
        }
        self.pays = {}
        for name, (better, other) in pays.items():
            both = (better.any(1)) & (other.any(1))  # problems with one of each
            gap = numbers[both][better[both]] - numbers[both][other[both]]
            self.pays[name] = float(gap.mean() / self.deviation) if both.any() else 0.0

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> Sequence[float]:
        self.truth.append(float(np.mean(verifier(problems, texts))))
        numbers = np.array(self.reward(problems, texts))
        return ((numbers - self.mean) / self.deviation).tolist()


def learned_from(name: str, seed: int) -> LearnedReward:
    """A reward model of a judge's opinions of 4,000 pairs of the base's answers."""
    problems = course.stream(1000 + seed, settings.pick(16, 4000, 4000))
    held = sample_answers(
        base, tokenizer, problems, 2, generator=draw_of(seed, "to be ranked")
    )
    ours = [texts[0] for texts in held.texts]
    theirs = [texts[1] for texts in held.texts]
    chance = judge_of(name).prefers(problems, ours, theirs)  # (N,)
    rankings = []
    for problem, texts, sure in zip(problems, held.texts, chance.tolist(), strict=True):
        answers = [tokenizer.encode_response(text) for text in texts]
        prompt = tokenizer.encode_prompt(problem.question)
        rankings.append(reward_model.Ranking(prompt, answers, label=sure))
    config = reward_model.RewardModelConfig(
        updates=settings.pick(2, 125, 125), batch=settings.pick(4, 32, 32)
    )
    model = RewardModel(base)
    training = reward_model.train(
        model, tokenizer, rankings, config, generator=draw_of(seed, "order")
    )
    course.follow(training, config.updates)
    return LearnedReward(model, tokenizer)


def reward_of(pupil: Pupil) -> Standard:
    """What this pupil is paid."""
    if pupil.source == "program":
        return Standard(verifier)
    if pupil.source == "reward model":
        return Standard(learned_from(pupil.judge, pupil.seed))
    return Standard(JudgedReward(judge_of(pupil.judge), greedy_answers))


def look(policy: GPT, pupil: Pupil, reward: Standard, purpose: str) -> dict:
    """Examine a policy: truth on test, KL, and what its reward says of new answers."""
    test = course.load_problems("test", settings.pick(4, 100, 1000))
    unseen = course.load_problems("validation", settings.pick(4, 100, 250))
    draw = draw_of(pupil.seed, purpose)
    on_test = sample_answers(policy, tokenizer, test, 1, generator=draw)
    nats = exam.distance(tokenizer, policy, base, unseen, draw)
    said = [texts[0] for texts in on_test.texts]
    numbers = np.array(reward.reward(test, said))
    right = on_test.correct[:, 0]
    kinds = {}  # {style and verdict: [mean reward in deviations, answers]}
    styles = np.array(on_test.styles)[:, 0]
    for style in STYLES:
        for fine in (True, False):
            these = (styles == style) & (right == fine)
            if these.any():
                rise = float((numbers[these].mean() - reward.mean) / reward.deviation)
                name = f"{style}, {'right' if fine else 'wrong'}"
                kinds[name] = [rise, int(these.sum())]
    workings = judge_of("strong").work(test)
    alike = []
    for text, working, fine in zip(said, workings, right, strict=True):
        if not fine:
            alike.append(float(extract_answer(text) == extract_answer(working)))
    return {
        "test": course.as_list(bootstrap(right)),
        "as the worker": float(np.mean(alike)) if alike else 0.0,  # of wrong answers
        "kl": nats.value,
        "reward": float((numbers.mean() - reward.mean) / reward.deviation),
        "kinds": kinds,
        "answers": said[:3],
    }


def run_pupil(pupil: Pupil) -> dict:
    """From the base: what the reward said, what was true, and how far it went."""
    reward = reward_of(pupil)
    policy = copy.deepcopy(base).requires_grad_(True)
    prompts = settings.pick(2, 16, 32)
    config = ppo.PPOConfig(
        updates=pupil.updates,
        prompts=prompts,
        samples=settings.pick(2, 8, 8),
        max_new_tokens=settings.pick(32, 128, 128),
        truncated_reward=TRUNCATED,
        beta=pupil.beta,
    )
    training = ppo.train(
        policy,
        tokenizer,
        course.stream(pupil.seed, pupil.updates * prompts),
        reward,
        config,
        critic=ppo.Critic(policy),
        reference=base,
        generator=draw_of(pupil.seed, "sampling"),
    )
    series = {}
    looks = {}
    for metrics in tqdm(training, total=pupil.updates, disable=None):
        course.keep_series(series, metrics)
        done = metrics["update"]
        if done in pupil.looks:
            looks[str(done)] = look(policy, pupil, reward, f"look {done}")
    series["truth"] = reward.truth
    skill = course.load_problems("second_skill", settings.pick(8, 100, 500))
    other = sample_answers(policy, tokenizer, skill, 1, greedy=True)
    return {
        "pays": reward.pays,
        "series": {name: series[name] for name in KEPT if name in series},
        "looks": looks,
        "second_skill": course.as_list(bootstrap(other.correct[:, 0])),
    }


STYLE_NAMES = ("style_worked", "style_terse", "style_careless", "style_showy")
KEPT = ("completions", "reward", "truth", "kl", "length", "truncated")
KEPT += STYLE_NAMES

# %% [markdown]
# What do the sources pay for? Of two answers of the base to one problem, by how many
# deviations does a right one earn more than a wrong one, and a worked one more than a
# terse one, on average?

# %%
learned, _ = checkpoint.load_reward_model(
    DATA / "reward_model.ckpt", tokenizer, settings.device
)
sources = {
    "program": verifier,
    "model of people": LearnedReward(learned, tokenizer),
    "judge, direct": JudgedReward(judge, greedy_answers),
}
if settings.preset == "full":  # it takes some minutes
    sources["judge, by a reward model"] = learned_from("strong", settings.seed)
run["sources"] = {}
print(f"{'':<26}{'right':>7}{'worked':>9}")
for name, reward in sources.items():
    pays = Standard(reward).pays
    run["sources"][name] = pays
    print(f"{name:<26}{pays['right']:>7.2f}{pays['worked']:>9.2f}")

# %% [markdown]
# The reward models pay more for working than for being right, and the program the other
# way round. The direct opinion pays less for both. It depends on the rival too: a right
# answer earns a half where the rival is right, and so does a wrong one where the rival
# is wrong. So a part of its spread says nothing of the answer.
#
# Now one run by the judge's direct opinion. How many answers are right is written down,
# and told to nobody.

# %%
usual = Pupil(seed=settings.seed, updates=settings.pick(2, 2, 16))
usual = replace(usual, looks=settings.pick((2,), (2,), usual.looks))
test = course.load_problems("test", settings.pick(4, 100, 1000))
draw = settings.generator("before")
before = sample_answers(base, tokenizer, test, settings.pick(2, 4, 8), generator=draw)
at_first = bootstrap(before.correct.mean(1))
run |= {"config": asdict(usual), **run_pupil(usual)}
print("answers   opinion   right      KL   worked")
series = run["series"]
for place in range(0, usual.updates, max(usual.updates // 8, 1)):
    print(
        f"{series['completions'][place]:>7,}{series['reward'][place]:>10.2f}"
        f"{series['truth'][place]:>8.2f}{series['kl'][place]:>8.2f}"
        f"{series['style_worked'][place]:>9.2f}"
    )
last = run["looks"][str(usual.updates)]
after = course.as_estimate(last["test"])
print(f"on test problems, right: {at_first} before, {after} after")

# %% [markdown]
# ## The result: one algorithm, three sources of reward
#
# Now all of them, with the same PPO, from the same base, at the same price. There is
# the program; models of careful people, which are runs of lesson 22; the judge by
# reward models, each learnt from its opinions of 4,000 pairs; and the judge directly.
# Three seeds each. The number of answers was fixed before, so that nobody looks at the
# truth to decide when to stop.

# %%
SEEDS = (0, 1, 2)
SOURCES = {
    "program": Pupil("program"),
    "judge, by a reward model": Pupil("reward model"),
    "judge, direct": Pupil("judge"),
}
HALVED = {  # the price of a nat, at which two of the sources are met once more
    "program, half the price": Pupil("program", beta=0.15, looks=(16,)),
    "judge, direct, half the price": Pupil("judge", beta=0.15, looks=(16,)),
}
OTHERS = ("taught by verdicts", "without working", "question hidden", "weak")
pupils = {}
for seed in SEEDS:
    for name, pupil in SOURCES.items():
        pupils[f"{name}, seed {seed}"] = replace(pupil, seed=seed)
for name, pupil in HALVED.items():
    pupils[f"{name}, seed 0"] = pupil
for name in OTHERS:
    pupils[f"{name}, seed 0"] = Pupil("judge", judge=name, looks=(16,))
if settings.preset == "smoke":
    pupils = {"smoke": Pupil("reward model", updates=1, looks=(1,))}
taught = exam.run_grid(settings, pupils, run_pupil, "pupils")
people = plotting.load_record("22_rlhf_grid")
for seed in SEEDS:
    taught[f"people, seed {seed}"] = people[f"careful, β 0.3, seed {seed}"]


# %% tags=["setup"]
def over(name: str) -> list[dict]:
    """The runs of this name with the seeds that there are."""
    titles = [f"{name}, seed {seed}" for seed in SEEDS]
    return [taught[title] for title in titles if title in taught]


def last_look(cell: Mapping) -> dict:
    """What the last examination of a run found."""
    return list(cell["looks"].values())[-1]


def right_of(name: str) -> list[float]:
    """The share right on test problems at the end, for each seed."""
    return [last_look(cell)["test"][0] for cell in over(name)]


def estimate_of(name: str) -> Estimate:
    """Over the seeds; of one seed, the interval over problems."""
    cells = over(name)
    if len(cells) == 1:
        return course.as_estimate(last_look(cells[0])["test"])
    return over_seeds(right_of(name))


def pays_worked(name: str) -> float:
    """What such a reward pays more for a worked answer than for a terse one."""
    if name == "people":
        return run["sources"]["model of people"]["worked"]
    return float(np.mean([cell["pays"]["worked"] for cell in over(name)]))


# %%
SHOWN = ("program", "people", "judge, by a reward model", "judge, direct")
run["ends"] = {}
print("right on test and KL at the end: mean over three seeds, or one seed with its")
print("interval over problems; in the last column deviations, worked less terse")
print(f"{'4,096 answers, paid by':<30}{'right':>21}{'KL':>7}", end="")
print(f"{'second skill':>14}{'pays':>7}")
for name in (*SHOWN, *HALVED, *OTHERS):
    cells = over(name)
    if not cells:
        continue
    right = estimate_of(name)
    row = {
        "right": course.as_list(right),
        "kl": float(np.mean([last_look(cell)["kl"] for cell in cells])),
        "second_skill": float(np.mean([cell["second_skill"][0] for cell in cells])),
        "pays_worked": pays_worked(name),
    }
    run["ends"][name] = row
    print(f"{name:<30}{right!s:>21}{row['kl']:>7.2f}", end="")
    print(f"{row['second_skill']:>14.3f}{row['pays_worked']:>7.2f}")

# %% tags=["plot"]
figure, axes = plotting.new_figure(1, "", width=8.6, height=4.6)
base_right = at_first.value
titles = {"people": "a model of careful people (lesson 22)"}
for color, name in zip(plotting.COLORS, SHOWN, strict=False):
    paths = []
    for cell in over(name):
        looks = list(cell["looks"].values())
        nats = [0.0, *(look["kl"] for look in looks)]
        right = [base_right, *(look["test"][0] for look in looks)]
        axes[0].plot(nats, right, color=color, lw=1, alpha=0.3)
        axes[0].plot(nats[-1], right[-1], "o", color=color, ms=6)
        paths.append((nats, right))
    if paths:
        axes[0].plot(*np.mean(paths, axis=0), color=color, lw=2.2)
    title = titles.get(name, name)
    axes[0].plot([], [], color=color, marker="o", label=title)
    for cell in over(f"{name}, half the price"):
        end = last_look(cell)
        spot = {"mec": color, "mfc": "white", "ms": 9, "mew": 1.8}
        axes[0].plot(end["kl"], end["test"][0], "o", zorder=4, **spot)
axes[0].axhline(base_right, color="#444", lw=0.8, ls="--")
plotting.label(axes[0], "the base", (0.02, base_right), (0, -14))
axes[0].set(xlabel="KL(policy ‖ base), nats an answer", ylim=(0.35, 1), xlim=(0, None))
axes[0].set(ylabel="right on test problems")
axes[0].legend(loc="upper left", title="paid by")
if len(run["ends"]) > 2:
    ends = [run["ends"][name]["right"][0] for name in SHOWN]
    plotting.headline(
        figure,
        "Four ways to be paid, one curve: at one price for a nat PPO ends at "
        f"{min(ends):.2f} to {max(ends):.2f}, from {base_right:.2f}",
    )
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** PPO from the base with four rewards, at the same price for a nat: the
# share of right answers on test problems, by how far the policy has moved, after 1, 2,
# 4, 8, 12 and 16 updates. Thick: the mean of three seeds, which are drawn thin; a dot
# is the end of a run, after 4,096 answers. Open circles: the ends of the program's and
# the judge's policies at half the price, one seed.

# %%
if over("judge, direct"):
    course.predict(
        "Right at the end, paid by the judge's direct opinion:",
        my_guess,
        run["ends"]["judge, direct"]["right"][0],
        key="ends > judge, direct > right",
    )

# %% [markdown]
# Are they apart? Differences seed by seed:

# %%
run["gaps"] = {}
for one, other in (
    ("program", "judge, direct"),
    ("people", "program"),
    ("judge, by a reward model", "program"),
    ("judge, by a reward model", "people"),
    ("judge, by a reward model", "judge, direct"),
):
    if len(over(one)) == len(over(other)) == len(SEEDS):
        gaps = np.subtract(right_of(one), right_of(other))  # a number for each seed
        found = verdict(gaps[:, None])
        name = f"{one}, less {other}"
        run["gaps"][name] = course.as_list(found.estimate)
        print(f"{name:<46}{found}")

# %% [markdown]
# ## Break it: judges that are worse
#
# The last rows of the table are pupils of other judges, directly.

# %% tags=["plot"]
figure, axes = plotting.new_figure(2, "", width=5.6, height=4.2)
SHIFTS = {  # of the labels, in both panels
    "strong": ((-44, -14), (0, 0)),
    "taught by verdicts": ((-108, 6), (-112, 2)),
    "weak": ((8, -4), (8, 4)),
    "without working": ((8, -4), (8, -12)),
    "question hidden": ((-40, 10), (8, -4)),
    "program": ((0, 0), (4, -14)),
    "people": ((0, 0), (6, -12)),
    "judge, by a reward model": ((0, 0), (-142, 4)),
    "judge, direct": ((0, 0), (8, -6)),
}
for name in (*OTHERS, "judge, direct"):
    judged = "strong" if name == "judge, direct" else name
    if judged in run["judges"] and over(name):
        point = (run["judges"][judged]["right"][0], run["ends"][name]["right"][0])
        axes[0].plot(*point, "o", color=plotting.COLORS[3], ms=6)
        plotting.label(axes[0], judged, point, SHIFTS[judged][0])
for name in (*SHOWN, *OTHERS):
    if over(name):
        point = (run["ends"][name]["pays_worked"], run["ends"][name]["right"][0])
        color = plotting.COLORS[3] if name in OTHERS else plotting.COLORS[0]
        axes[1].plot(*point, "o", color=color, ms=6)
        plotting.label(axes[1], name, point, SHIFTS[name][1])
for panel in axes:
    panel.axhline(base_right, color="#444", lw=0.8, ls="--")
    panel.set(ylim=(0.4, 0.9))
axes[0].set(xlabel="pairs of which the judge names the right answer", xlim=(0.5, 1))
axes[0].set(ylabel="right on test problems, its pupil", title="judges, direct")
axes[1].set(xlabel="paid more for worked than for terse, deviations", xlim=(0, 2.4))
axes[1].set(title="all sources")
if over("without working"):
    named = run["judges"]["without working"]["right"][0]
    taught_to = run["ends"]["without working"]["right"][0]
    plotting.headline(
        figure,
        f"A judge that names the right one of two answers in {named:.2f} of the cases "
        f"brings its pupil to {taught_to:.2f}: what counts is what it pays for",
    )
plotting.save_figure(figure, settings.folder / f"{settings.lesson}_judges.png")

# %% [markdown]
# **Figure 2.** Where policies end after 4,096 answers. Left: pupils of five judges,
# paid by direct opinions, by how often their judges name the right one of two answers.
# Right: all sources of reward, by how much more they pay for a worked answer than for a
# terse one to the same problem. Dashed: the base. The strong judge's pupil and all that
# is drawn dark are means of three seeds, the others one seed.
#
# A judge that errs by lot would only be a noisy teacher. One that errs by kind has a
# taste, and a pupil can learn to please it. What do they write in the end, and what do
# their judges say of it? An opinion is in deviations above what the base's answers get.

# %%
run["writes"] = {}
print("in the last two draws")
print(f"{'paid by':<27}{'opinion':>9}{'right':>8}{'worked':>9}{'terse':>8}", end="")
print(f"{'careless':>10}{'tokens':>8}")
for name in (*SOURCES, *OTHERS):
    cells = over(name)
    if not cells:
        continue
    row = {}
    for what in ("reward", "truth", *STYLE_NAMES[:3], "length"):
        lasts = [np.mean(cell["series"][what][-2:]) for cell in cells]
        row[what] = float(np.mean(lasts))
    run["writes"][name] = row
    print(f"{name:<27}{row['reward']:>9.2f}{row['truth']:>8.2f}", end="")
    print(f"{row['style_worked']:>9.2f}{row['style_terse']:>8.2f}", end="")
    print(f"{row['style_careless']:>10.2f}{row['length']:>8.0f}")

# %% [markdown]
# And how are worked answers paid at the end, right ones and wrong ones? In deviations
# above the base's answers:

# %%
run["of_worked"] = {}
print(f"{'paid by':<27}{'worked, right':>14}{'worked, wrong':>15}")
for name in SOURCES:
    cells = over(name)
    if not cells:
        continue
    row = {}
    for kind in ("worked, right", "worked, wrong"):
        row[kind] = float(
            np.mean([last_look(cell)["kinds"][kind][0] for cell in cells])
        )
    run["of_worked"][name] = row
    print(f"{name:<27}{row['worked, right']:>14.2f}{row['worked, wrong']:>15.2f}")

# %% [markdown]
# The strong judge has made up its mind by what the base found when it worked the
# problem. Where the base is wrong, such a judge pays for the base's mistake. Does its
# pupil learn to make the same ones? Of the wrong answers, the share whose result is
# that of the working:

# %%
run["as_the_worker"] = {}
print(f"{'paid by':<27}{'after 1 update':>15}{'after 16':>10}")
for name in SOURCES:
    cells = over(name)
    if not cells:
        continue
    first = [next(iter(cell["looks"].values()))["as the worker"] for cell in cells]
    final = [last_look(cell)["as the worker"] for cell in cells]
    run["as_the_worker"][name] = [float(np.mean(first)), float(np.mean(final))]
    print(f"{name:<27}{np.mean(first):>15.3f}{np.mean(final):>10.3f}")

# %% [markdown]
# ## What we found
#
# Numbers are means over three seeds where nothing else is said, and intervals are
# Student's over the seeds.
#
# **There is one algorithm, and each source of reward works.** The base is right in 0.45
# of its answers. Paid by the program, PPO comes to 0.804 in 4,096 answers; by models of
# what people prefer to 0.845; by models of what the judge prefers to 0.852; by the
# judge directly to 0.751. Nobody looked at the truth to decide when to stop. What the
# four share is the base, the algorithm, the price on KL and the problems. They differ
# in who pays: in what that one knows, where it errs, and what its word costs.
#
# **They move along nearly one curve.** At the same distance from the base the four are
# right about as often (Figure 1; in the middle the runs lie up to 0.1 apart). What
# differs most is how far they go at the same price. At half the price the judge's pupil
# goes 1.07 nats far and is right in 0.784, where the program's policy has 0.804 at
# 1.07; and the program's policy goes 1.29 nats far and is right in 0.833, where the
# reward models' have 0.852 at 1.32 (one seed each). So compare such runs as curves, and
# not by their ends alone.
#
# **What counts is what is paid for.** The base has to learn to work, and little else.
# Models of people pay a worked answer 2.01 deviations more than a terse one to the same
# problem, models of the judge 1.92, the program 1.46, the judge's direct opinion 0.90.
# The policies' distances have the same order, and nearly so have their shares of right
# answers (Figure 2, right). The program pays for working only by its results, and a
# terse answer that is right by luck earns as much. The reward models hardly see whether
# a sum is right: at the end those of the judge pay 1.19 deviations for right worked
# answers and 1.09 for wrong ones. They have learnt from many pairs what goes with being
# right, and pay for that, without luck. So knowing less they taught more, here, where
# form was what was to be learnt, and as long as a price on KL kept the sums as they
# were. Lesson 22 shows what becomes of these without it.
#
# **How good a judge seems does not say what it teaches.** Of a right and a wrong answer
# the strong judge names the right one in 0.970 of the cases, and its pupil is right in
# 0.751. One that is shown no working names it in 0.760, and its pupil is right in
# 0.463, hardly more than the base: it has learnt nothing (Figure 2, left; one seed for
# each of the others). Which answer leads is one thing, and by how much another. This
# judge thinks nearly alike of all answers but careless ones. It pays 0.40 deviations
# for working, and that is not worth its price in nats. With the question hidden the
# pupil comes to 0.478, with the weak judge to 0.497, and with the one that verdicts
# have taught, which pays 1.15 deviations for working, to 0.802.
#
# **Does a pupil end above its judge?** It ends below. The strong judge's worker comes
# to the right result in 0.944 of the cases, and the judge trusts it. No policy comes to
# that in 4,096 answers. A judge that can solve the problems could simply be asked to
# solve them. What it is good for is to teach a policy that answers by itself, without
# being made to work.
#
# **The judge.** A working is what makes it good: 0.970 with (0.950 in the training
# above, which is the same on another machine), 0.760 [0.713, 0.807] without. Without
# one it sees forms. It tells worked from terse answers in 0.88 of the cases, and right
# terse answers from wrong ones in 0.44. With the question hidden as well 0.690 are
# left, so that much of what it knows is in the answers alone. Verdicts on the base's
# own answers teach a judge little that spoiled copies do not: 0.977. The strong judge
# agrees with careful people in 0.826 of their preferences. Its opinion costs 242 tokens
# of reading, and each problem 34 of writing. A reward model asks for 4,000 opinions
# once, and the direct way for one an answer, here 4,096.
#
# **The order of the answers.** The strong judge has no liking for a place: it names the
# right answer in 0.963 of the cases whether that stands first or second. The weak one
# has 0.863 if it stands first and 0.220 if second; averaged, 0.577. The base itself,
# which was never taught to judge, likes the second place, with 0.157 and 0.843, and
# averaged it names the right one in 0.413 [0.357, 0.470], less than half: it likes
# terse answers.
#
# **Does the pupil learn to please?** We looked for its worker's mistakes in what the
# pupil gets wrong. Of its wrong answers 0.066 have the working's result; but of those
# of the program's policy, whom no judge has paid, it is 0.082, and it is most, 0.126,
# where the reward models of the judge have paid, whose policies work the most. Policies
# that work make the mistakes that working makes, and the judge adds none. What pleases
# without being right is found where a judge is sure of nothing but forms: the opinion
# of the judge without working rises by 0.38 deviations over its pupil's training, while
# no more answers are right. Careless ones have gone, which were few.
#
# **What the paper says, here.**
#
# * RLAIF is as good as RLHF: undecided. 0.852 less 0.845 is 0.007 [-0.040, 0.053], and
#   the interval just leaves our margin of 0.05 (lesson 03).
# * A labeller of the policy's own size still helps: holds, for one that has been taught
#   to judge. The base as it is could not.
# * The direct way is better than a reward model of the same judge: fails at this price,
#   by 0.101 [0.068, 0.134]. (The paper's judge gives a mark. Ours compares with a
#   rival, and at half the price it is at 0.784.)
# * To let a judge work first helps it: holds.
# * Averaging both orders undoes the liking for a place: holds, and where the judge
#   knows little, little is left.
#
# So can a model take the place of the people who judge? Here it can. But it had to be
# taught first, by 128,000 pairs of which somebody knew the right answer, where the
# models of people had 4,000 comparisons. That pays off where right answers to *some*
# problems are at hand, or where a larger model has learnt to judge already.

# %% tags=["record"]
course.check(
    "23_rlaif",
    {
        "ends > program > right": "0.804",
        "ends > program > kl": "1.07",
        "ends > people > right": "0.845",
        "ends > judge, by a reward model > right": "0.852",
        "ends > judge, by a reward model > kl": "1.32",
        "ends > judge, direct > right": "0.751",
        "ends > judge, direct, half the price > right": "0.784",
        "ends > judge, direct, half the price > kl": "1.07",
        "ends > program, half the price > right": "0.833",
        "ends > program, half the price > kl": "1.29",
        "ends > people > pays_worked": "2.01",
        "ends > judge, by a reward model > pays_worked": "1.92",
        "ends > program > pays_worked": "1.46",
        "ends > judge, direct > pays_worked": "0.90",
        "of_worked > judge, by a reward model > worked, right": "1.19",
        "of_worked > judge, by a reward model > worked, wrong": "1.09",
        "judges > strong > right": "0.970",
        "judge > right": "0.950",
        "judges > strong > right at first": "0.963",
        "judges > strong > right at second": "0.963",
        "judges > strong > people": "0.826",
        "judges > without working > right": "0.760",
        "judges > question hidden > right": "0.690",
        "judges > taught by verdicts > right": "0.977",
        "judges > weak > right": "0.577",
        "judges > weak > right at first": "0.863",
        "judges > weak > right at second": "0.220",
        "judges > the base itself > right": "0.413",
        "judges > the base itself > right at first": "0.157",
        "judges > the base itself > right at second": "0.843",
        "ends > without working > right": "0.463",
        "ends > without working > pays_worked": "0.40",
        "ends > question hidden > right": "0.478",
        "ends > weak > right": "0.497",
        "ends > taught by verdicts > right": "0.802",
        "ends > taught by verdicts > pays_worked": "1.15",
        "writes > without working > reward": "0.38",
        "worker": "0.944",
        "tokens_read": "242",
        "tokens_written": "34",
        "gaps > judge, by a reward model, less people": "0.007",
        "gaps > judge, by a reward model, less judge, direct": "0.101",
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
# **Should a judge compare two answers, or give each a mark?** A comparison asks for
# less: no scale has to be kept from one problem to the next. But a reward is wanted for
# one answer. Our direct judge gets from the one to the other by a fixed rival, the
# base's greedy answer, so that what is learnt is to beat the base. When the policy does
# so nearly always, all answers earn the same, and a better rival is needed. (The
# paper's direct form asks for a mark of 1 to 10 instead.)
#
# **My judge prefers the first answer. Is it useless?** No, if it tells answers apart at
# all: averaged over both orders the liking cancels. Look at how often both orders name
# the same answer. Where that is rare, little of the verdict is about the answers.
#
# **Is a judge that works the problem first not just another verifier?** Nearly: it is a
# verifier whose gold answers are the base's own. It is wrong where the base, made to
# work, is wrong, and there it pays for the same mistake.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (derive).** Show that the mean over both orders of a pair is 1 less the
# mean with the answers exchanged. Is that also true of each order by itself?
#
# **Exercise 2 (derive).** A judge names the right one of two answers with chance a,
# whatever they are, and an answer is right with chance p. Its opinion is 1 or 0, and
# the rival is right with chance g. What does a right answer earn on average, and a
# wrong one? (If both are right or both wrong, it tosses a coin.)
#
# **Exercise 3 (change).** Let `judge` be "question hidden" in `usual`. What does the
# policy learn to write?
#
# **Exercise 4 (break).** In `Judge.prefers`, return `at_first` alone, and let the rival
# stand first instead. Which judges of the table would you still trust?

# %% [markdown] tags=["answers"]
# **Answer 1.** P(1 ≻ 2) = ½ [a + 1 − b], where a and b are the chances of "1" in the
# two orders. Exchanged, a and b change places: ½ [b + 1 − a]. Both add up to 1. By
# itself a judge with a liking for the first place gives each answer more than a half
# when it stands there, so that a + b is more than 1.
#
# **Answer 2.** A right answer earns g/2 + (1 − g) a, a wrong one g (1 − a) + (1 − g)/2.
# The difference is g/2 + (1 − g) a − g (1 − a) − (1 − g)/2 = a − ½: it does not depend
# on the rival. So a judge that is right in 0.76 of the pairs pays as RLOO's verifier
# does with J = 0.26 (lesson 22), if its mistakes are made by lot. They are not.
#
# **Answer 3.** In our run more showy answers, 0.13 instead of 0.05, and fewer terse
# ones. Whatever the question was, they look right. No more of them are.
#
# **Answer 4.** Those that name the right answer as often at first as at second: the
# strong one, and nearly so the one that verdicts have taught.
