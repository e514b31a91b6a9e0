# %% [markdown]
# # Lesson 01: Imitation (SFT)
#
# **Question.** What does imitation copy?
#
# **Afterwards you can** write the loss of supervised fine-tuning, say which tokens it
# is about, and predict what a model makes of teachers who disagree.
#
# **Read before:** [lesson 00](00_tour.py): the four styles of answer.
#
# **Paper:** Ouyang et al. 2022 (InstructGPT), [arXiv
# 2203.02155](https://arxiv.org/abs/2203.02155), section 3.5, whose first step it is.
#
# **Look at:** how near the dots lie to the diagonal.
#
# **Turn first:** `learn_prompt` in the config.
#
# **Time:** `quick` takes a minute on two CPU cores. `full` makes the base model of the
# course from random weights, which takes a quarter of an hour on one core. 2 GB.

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
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import torch

from minialign import checkpoint, course, plotting
from minialign.algorithms import sft
from minialign.evaluation import sample_answers
from minialign.families import FAMILIES
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.model import GPT, GPTConfig
from minialign.problems import STYLES, demonstration

# %% tags=["setup"]
settings = course.setup("01_sft")
tokenizer = course.load_tokenizer()
validation = course.load_problems("validation", settings.pick(8, 200, 500))
test = course.load_problems("test", settings.pick(8, 256, 1000))
skill = course.load_problems("second_skill", settings.pick(8, 100, 500))
full = settings.preset == "full"

# %% [markdown]
# ## The teachers
#
# A *demonstration* is a question together with one teacher's answer. Our teachers have
# the four styles of lesson 00. The format is that of GSM8K, a well-known set of about
# 8,800 school problems: `<<15+12=27>>` is a calculation, and `####` announces the
# result.

# %%
shown: dict[str, str] = {}
teachers: dict[str, Counter] = {family: Counter() for family in FAMILIES}
for index in range(settings.pick(4_000, 20_000, 20_000)):
    row = demonstration(settings.seed, "train", index)
    if row.style != "skill":
        teachers[row.problem.family][row.style] += 1
    if row.problem.family == "groups" and row.problem.steps == 3:
        shown.setdefault(row.style, f"{row.problem.question}\n{row.answer}")
for style in STYLES:
    print(f"--- {style}\n{shown[style]}\n")

# %% [markdown]
# The problems come in fifteen *families*, such as shopping or sharing. Our teachers
# demonstrate twelve of them; three are kept for later lessons. How often each style
# occurs depends on the family: in some nearly everybody works the answer out, in others
# most teachers are terse. Terse teachers know the answer, and all of their results are
# right. Keep that in mind.
#
# One demonstration in ten has nothing to do with word problems. It is of a *second
# skill*, such as sorting numbers. Nobody will ever reward it, and later lessons watch
# what becomes of it.

# %%
for family, styles in teachers.items():
    total = styles.total()
    shares = [f"{style} {styles[style] / total:.2f}" for style in STYLES]
    print(f"{family:<16}" + "  ".join(shares))

# %% [markdown]
# ## The idea
#
# Supervised fine-tuning (SFT) makes the teachers' answers likely. A model gives every
# possible next token a probability π, given the question and the answer so far. The
# loss is the mean of −log π over the tokens of the demonstrated answers. Logarithms are
# natural ones, and their unit is called a *nat*:
#
#     L = −(1/N) Σ_t log π(y_t | x, y_<t)        over all N answer tokens
#
# The question is read but not scored: a *mask* says which tokens count. The end of the
# answer is a token too (EOS), and it does count, since when to stop is a choice like
# any other.
#
# Where is this loss smallest? Not where the model answers *well*. It is smallest where
# the model is a copy of its teachers, who answer in several ways, each with its own
# frequency.

# %% [markdown] tags=["folded"]
# **The derivation.** The losses of an answer's tokens add up to −log π(y), where π(y)
# is the probability of the whole answer. Let q(y) be how often the teachers give the
# answer y to some question. The mean loss of an answer is then
#
#     −Σ_y q(y) log π(y) = −Σ_y q(y) log q(y) + Σ_y q(y) log (q(y)/π(y))
#
# The first term is the *entropy* of the teachers, how undecided they are, and no
# training changes it. The second is the *KL divergence* KL(q ‖ π), how far π is from q.
# It is never negative, and 0 only where π = q: where the model *is* the teachers'
# mixture, with the terse ones and the careless ones in it.

# %% [markdown]
# ## By hand
#
# Each method of this course is weighed on the same four answers to one question, two of
# them right and two wrong. Whatever the method, an update makes some answers likelier
# and others rarer. Let log π(answer) be the sum over the answer's tokens. The update
# then adds to the parameters, for each answer, weight · ∇ log π(answer). A positive
# weight makes the answer likelier, a negative one rarer, and 0 leaves it alone. The
# table shows those weights alone, scaled so that the largest is 1. Nothing is trained
# for it.

# %%
print(course.HAND_PROBLEM.question)
for name, text in course.HAND_ANSWERS.items():
    print(f"--- {name}\n{text}")

tokens, mask, _ = course.by_hand(tokenizer)
small = GPT(replace(GPTConfig(tokenizer.n_vocab), dim=32, layers=1, hidden=64))
logprobs = token_logprobs(small, tokens, mask)  # (4, S)
logprobs.retain_grad()
loss = sft.sft_loss(logprobs, mask)
by_hand = -logprobs[mask].sum() / mask.sum()
assert torch.isclose(loss, by_hand)

loss.backward()
# The loss is a weighted sum of log-probabilities: its gradient by them is the weights.
per_token = -logprobs.grad * mask.sum()  # (4, S), the loss's 1/N undone
weights = per_token.sum(1) / mask.sum(1)  # (4,)
assert torch.allclose(weights, torch.ones(4))
hand = course.hand_table(settings.lesson, {"SFT": weights})

# %% [markdown]
# Every answer is pulled up with the same weight, right or wrong. SFT never asks.
#
# ## Predict
#
# The model will have seen tens of thousands of terse answers, and all of them were
# right. Force the trained model to be terse: it must begin with `####` and give the
# result at once. How often will it be right?

# %%
my_guess = 0.7  # edit me

# %% [markdown]
# ## Train
#
# `full` trains the base from random weights. `quick` makes the first updates of that
# same schedule, compares their losses with those on record, and goes on with the base
# that comes with the course. The learning rate rises for 60 updates, since large first
# steps on random weights do harm, and then falls to 0. The matrices are trained with
# the optimiser Muon, all else with AdamW.


# %% tags=["setup"]
class Demonstrations:
    """The mixture as (prompt ids, response ids), made when asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> sft.Example:
        row = demonstration(settings.seed, "train", index)
        prompt = tokenizer.encode_prompt(row.problem.question)
        return prompt, tokenizer.encode_response(row.answer)


def evaluate(update: int) -> dict[str, float]:
    """Greedy and sampled accuracy on validation."""
    draw = settings.generator(f"evaluation {update}")
    greedy = sample_answers(model, tokenizer, validation[:250], 1, greedy=True)
    sampled = sample_answers(model, tokenizer, validation[:250], 2, generator=draw)
    return {
        "greedy": float(greedy.correct.mean()),
        "sampled": float(sampled.correct.mean()),
    }


# %%
config = replace(sft.SFTConfig(), seed=settings.seed)
steps = settings.pick(3, 60, config.updates)
data = Demonstrations(config.updates * config.batch_size)
weights_of = torch.Generator().manual_seed(settings.seed)
model = GPT(GPTConfig(tokenizer.n_vocab), weights_of).to(settings.device)

unfinished = plotting.LOCAL / f"01_sft_seed{settings.seed}.train.ckpt"
log = course.resume(unfinished, asdict(config)) if full else {}
log |= {"config": asdict(config)}
state = log.setdefault("state", {})
training = sft.train(model, data, config, pad_id=tokenizer.pad_id, state=state)
course.follow_long(training, steps, log, unfinished if full else None, evaluate)
series = log["series"]

# %% tags=["setup"]
record = plotting.load_record(settings.lesson)
if full:
    made = plotting.LOCAL / f"01_sft_seed{settings.seed}.ckpt"
    checkpoint.save_model(made, model, tokenizer, {"seed": settings.seed})
    unfinished.unlink(missing_ok=True)
    course.say(f"the new base is {made}; to adopt it, copy it to {course.BASE}")
else:
    known = record.get(str(settings.seed), {}).get("series", {}).get("loss", [])
    pairs = zip(series["loss"], known, strict=False)
    apart = max((abs(mine - theirs) for mine, theirs in pairs), default=float("nan"))
    verdict = "the same schedule" if apart < 0.02 else "NOT the record's schedule"
    print(f"{steps} losses against the record's: at most {apart:.4f} apart, {verdict}")
    model = course.load_policy(tokenizer, settings.device)

# %% [markdown]
# ## The result
#
# We draw eight answers to each test problem, each token with the probability that the
# model gives it: these are *sampled* answers. A *greedy* answer takes the likeliest
# token every time. A *forced* answer is greedy, but its first token is given: `<<`
# makes it work, `####` forbids it.

# %%
draw = settings.generator("test")
sampled = sample_answers(model, tokenizer, test, 8, generator=draw)
greedy = sample_answers(model, tokenizer, test, 1, greedy=True)
worked = sample_answers(model, tokenizer, test, 1, greedy=True, first_token="<<")
terse = sample_answers(model, tokenizer, test, 1, greedy=True, first_token="#### ")
other = sample_answers(model, tokenizer, skill, 1, greedy=True)
measured = {
    "sampled": bootstrap(sampled.correct.mean(1)),
    "greedy": bootstrap(greedy.correct[:, 0]),
    "forced_worked": bootstrap(worked.correct[:, 0]),
    "forced_terse": bootstrap(terse.correct[:, 0]),
    "second_skill": bootstrap(other.correct[:, 0]),
}
for name, estimate in measured.items():
    print(f"{name:<16}{estimate}")
course.predict(
    "Right, when forced to be terse:",
    my_guess,
    measured["forced_terse"].value,
    key="base > forced_terse",
)

# %% [markdown]
# And its styles: for each family, how often did the teachers use a style, and how often
# does the model?

# %%
pupil: dict[str, Counter] = {family: Counter() for family in FAMILIES}
for problem, styles in zip(sampled.problems, sampled.styles, strict=True):
    pupil[problem.family].update(styles)

points: dict[str, list[list[float]]] = {style: [] for style in STYLES}
for family, seen in pupil.items():
    if not seen:
        continue
    for style in STYLES:
        taught = teachers[family][style] / teachers[family].total()
        points[style].append([taught, seen[style] / seen.total()])
gaps = []
for pairs in points.values():
    gaps += [abs(taught - copied) for taught, copied in pairs]
print(f"shares of the teachers and of the model are {np.mean(gaps):.3f} apart on")
print(f"average, at most {max(gaps):.3f}")

# %% tags=["plot"]
figure, (axes,) = plotting.new_figure(
    1,
    f"It copies its teachers' habits: shares differ by {np.mean(gaps):.3f} on average",
    width=6.6,
    height=5.6,
)
axes.plot([0, 1], [0, 1], color="#999", lw=1)
for style, pairs in points.items():
    shares = np.array(pairs)  # (families, 2): the teachers', the model's
    axes.scatter(
        shares[:, 0],
        shares[:, 1],
        color=plotting.STYLE_COLORS[style],
        s=34,
        label=style,
    )
axes.set(xlabel="share of a style among the teachers of a family")
axes.set(ylabel="share among the model's sampled answers")
axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
axes.legend(title="a dot: one style in one family", loc="lower right")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Each dot is one style in one family of problems: its share among the
# teachers' answers, and its share among the answers that the trained model samples. On
# the diagonal the two are the same.

# %% [markdown]
# ## Break it: without the mask
#
# Let the loss count the tokens of the question as well. Both runs see the same 15,360
# demonstrations in the same order, and are judged by their loss on the answers of
# demonstrations that neither has seen.


# %% tags=["setup"]
def short_run(examples: int, **changes: object) -> float:
    """The loss on unseen answers, after training on so many demonstrations."""
    updates = max(examples // config.batch_size, 1)
    short = replace(config, warmup=20, updates=updates, **changes)
    weights_of = torch.Generator().manual_seed(settings.seed)
    policy = GPT(GPTConfig(tokenizer.n_vocab), weights_of).to(settings.device)
    rows = Demonstrations(examples)
    training = sft.train(policy, rows, short, pad_id=tokenizer.pad_id)
    course.follow(training, updates)
    unseen = [rows[5_000_000 + i] for i in range(settings.pick(8, 512, 512))]
    tokens, mask = sft.collate(unseen, tokenizer.pad_id)
    tokens = tokens.to(settings.device)
    mask = mask.to(settings.device)
    with torch.no_grad():
        return sft.sft_loss(token_logprobs(policy, tokens, mask), mask).item()


# %%
losses = record.get("0", {}).get("answer_loss", {})
if settings.measures_once:
    examples = settings.pick(64, 0, 15_360)
    losses = {
        "answers alone": short_run(examples),
        "questions too": short_run(examples, learn_prompt=True),
    }
for name, answer_loss in losses.items():
    print(f"{name:<16}loss {answer_loss:.3f} nats per answer token")

# %% tags=["record"]
run = {
    "config": asdict(config),
    "base": {name: course.as_list(estimate) for name, estimate in measured.items()},
    "hand": hand,
    "points": points,
    "apart": float(np.mean(gaps)),
    "series": series,
    "evaluations": log["evaluations"],
}
if losses:
    run["answer_loss"] = losses

# %% [markdown]
# ## What we found
#
# * The model uses each style about as often as its teachers did, family by family: all
#   dots lie near the diagonal, and the shares differ by 0.01 on average. It has copied
#   the mixture, faults included.
# * Of its sampled answers 0.46 are right. (Lesson 00 drew others, and came to 0.45.)
#   Its greedy answers are right less often, on 0.403: in eight of the twelve families
#   the likeliest manner is the terse one. Forced to work, it is right on 0.95 of the
#   problems: the skill is there, and the preference is not.
# * Forced to be terse, it is right on 0.165. Its terse teachers were always right, but
#   they did the calculation in their heads, where there was nothing to copy. It copied
#   their manner.
# * Learning the question too makes the loss on the answers larger: after 15,360
#   demonstrations it is 0.80 nats a token instead of 0.60. A small model then spends
#   its steps on guessing names and fruit.

# %% tags=["record"]
course.check(
    "01_sft",
    {
        "base > sampled, seed 0": "0.46",
        "base > forced_worked, seed 0": "0.95",
        "base > greedy, seed 0": "0.403",
        "base > forced_terse, seed 0": "0.165",
        "apart, seed 0": "0.01",
        "answer_loss > questions too, seed 0": "0.80",
        "answer_loss > answers alone, seed 0": "0.60",
    },
    own=run,
)

# %% [markdown]
# This model is the *base* of all that follows. Every later lesson starts from its
# weights, so that methods can be compared fairly. Trained from two other seeds it comes
# out a little better: 0.49 and 0.48 of the sampled answers are right, and 0.95 and 0.96
# when forced to work.
#
# The same seed does not make the same model everywhere. Processors round differently,
# in the seventh digit, and five thousand updates magnify that. Trained again from seed
# 0 on another processor, it came out as another model, with somewhat other accuracies.
# That is why the base comes with the course, as `data/base.ckpt`.

# %% tags=["record"]
course.check(
    "01_sft",
    {
        "base > sampled, seed 1": "0.49",
        "base > sampled, seed 2": "0.48",
        "base > forced_worked, seed 1": "0.95",
        "base > forced_worked, seed 2": "0.96",
    },
)
what = "sampled accuracy of the base on test, then the base forced to work"
course.finish(settings, run, measured["sampled"], measured["forced_worked"], what)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Why not average each answer, and then the answers?** Then a short answer's tokens
# would count for more than a long one's. Libraries differ here. TRL, a widely used one,
# averages over the tokens of each batch; the authors of DPO add up each answer; and our
# training divides by a token count that is averaged over many batches, so that a batch
# of short answers does not count for more than its share.
#
# **Could one not simply delete the bad teachers?** One could, if somebody says which
# they are. That is a reward, and lesson 10 does exactly this with the model's own
# answers.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (explain).** What would the model sample if `minialign/families.py` knew
# worked answers alone?
#
# **Exercise 2 (derive).** A question has two answers, and the teachers give each of
# them half of the time. What is the least loss per answer that any model can reach?
#
# **Exercise 3 (break).** Leave EOS out in `Tokenizer.encode_response`. What becomes of
# the answers, and of their accuracy?

# %% [markdown] tags=["answers"]
# **Answer 1.** Worked answers, and nearly all of them right: there is nothing else to
# copy.
#
# **Answer 2.** log 2 = 0.69 nats, the entropy of the teachers. A loss that stops
# falling need not be a fault of the training.
#
# **Answer 3.** They never end. They are cut off at the limit of tokens and count as
# wrong, whatever they say.
