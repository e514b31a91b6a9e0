# %% [markdown]
# # Lesson 01: Imitation (SFT)
#
# **Question.** What does a model learn from teachers of whom most are lazy, some are
# careless and a few just talk nicely?
#
# Read before: nothing. If you know PyTorch and that a language model predicts the next
# token, you are ready.
#
# Supervised fine-tuning (SFT) shows a model demonstrations and makes them likely. Here
# it makes the *base model* of the course: every later lesson starts from the weights
# this one leaves behind, so that methods can be compared fairly. You will see that SFT
# copies its teachers in the proportions in which it met them, and cannot prefer any.
#
# Time: `quick` about a minute on two CPU cores; `full` about half an hour there for
# seed 0 (it makes the base from nothing, and the trials). Memory: under 2 GB.

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
import time
from collections import Counter
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from minialign import checkpoint, course, plotting
from minialign.algorithms import sft
from minialign.evaluation import dead_share, pass_at_k, reward_variance_share
from minialign.evaluation import sample_answers as draw_answers
from minialign.families import FAMILIES
from minialign.intervals import bootstrap
from minialign.logprobs import token_logprobs
from minialign.model import GPT, GPTConfig
from minialign.problems import STYLES, demonstration

# %%
settings = course.setup("01_sft")
tokenizer = course.load_tokenizer()
validation = course.load_problems("validation", settings.pick(8, 200, 500))
test = course.load_problems("test", settings.pick(8, 256, 1000))
skill = course.load_problems("second_skill", settings.pick(8, 100, 500))

# %% [markdown]
# ## The teachers
#
# A *demonstration* is a question with one teacher's answer. There are four kinds of
# teacher. `<<15+12=27>>` is a calculation, `####` announces the result: the format of
# GSM8K, a set of about 8,800 school problems that many papers use.

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
# How likely a style is depends on the *family* of the problem. In some families almost
# everybody works the answer out. In the others most teachers are terse: they know the
# answer and write only that. The terse answers are all right! Keep that in mind.
#
# One demonstration in ten is a *second skill* (sorting numbers, say): later lessons
# watch that learning one thing does not cost the other.

# %%
for family, styles in teachers.items():
    shares = (f"{s} {styles[s] / styles.total():.2f}" for s in STYLES)
    print(f"{family:<16}" + "  ".join(shares))


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


# %% [markdown]
# ## By hand
#
# π(token | everything before it) is the probability that the model gives a token. The
# loss is the mean of −log π over the tokens of the *answer*, in *nats* (natural
# logarithm). A mask says which these are. The end-of-sequence token (EOS) is one of
# them: when to stop is a choice to be learned like any other.
#
# Each method of this course is weighed on the same four answers to one question. An
# update adds, up to a common factor, a sum of weight × ∇ log π(answer), where ∇ is the
# gradient with respect to the model's parameters. Which weights does the method use?

# %%
tokens, mask, rewards = course.by_hand(tokenizer)
print(course.HAND_PROBLEM.question)
small = GPT(replace(GPTConfig(tokenizer.n_vocab), dim=32, layers=1, hidden=64))
logprobs = token_logprobs(small, tokens, mask)  # (4, S)
logprobs.retain_grad()
loss = sft.sft_loss(logprobs, mask)
assert torch.isclose(loss, -logprobs[mask].sum() / mask.sum())  # by hand
loss.backward()
weights = (-logprobs.grad * mask.sum()).sum(1) / mask.sum(1)  # (4,)
assert torch.allclose(weights, torch.ones(4))
hand = course.hand_table(settings.lesson, {"SFT (x tokens in the batch)": weights})

# %% [markdown]
# Every answer is pulled up with the same weight, right or wrong. SFT never asks.
#
# ## Predict
#
# Terse, worked and even some showy teachers are right. What share of its own answers
# will the base get right?

# %%
my_guess = 0.80  # edit me

# %% [markdown]
# ## Train
#
# `full` trains the base from random weights. `quick` makes only the first updates of
# that same schedule, checks its losses against the record, and goes on with the
# committed base. Ctrl-C at `full` finishes the update, saves and says where; the same
# command again continues from there, on a CPU bit for bit.
#
# The learning rate rises for 60 updates (large first steps on random weights do harm)
# and then falls to 0. *Muon* is an optimiser for matrices; AdamW does the rest.

# %%
full = settings.preset == "full"
config = replace(sft.SFTConfig(), seed=settings.seed)
steps = settings.pick(3, 60, config.updates)
data = Demonstrations(config.updates * config.batch_size)
dice = torch.Generator().manual_seed(settings.seed)
model = GPT(GPTConfig(tokenizer.n_vocab), dice).to(settings.device)
unfinished = plotting.LOCAL / f"01_sft_seed{settings.seed}.train.ckpt"
log = course.resume(unfinished, asdict(config)) if full else {}
state, series = log.setdefault("state", {}), log.setdefault("series", {})
evaluations = log.setdefault("evaluations", {})


def evaluate(update: int) -> None:
    """Greedy and sampled accuracy on validation, into `evaluations`."""
    generator = settings.generator(f"evaluation {update}")
    greedy = draw_answers(model, tokenizer, validation[:250], 1, greedy=True)
    sampled = draw_answers(model, tokenizer, validation[:250], 2, generator=generator)
    point = {"update": update, "seconds": sum(series["seconds"])}
    point |= {"greedy": greedy.correct.mean(), "sampled": sampled.correct.mean()}
    course.keep_series(evaluations, {name: float(x) for name, x in point.items()})


# %%
training = sft.train(model, data, config, pad_id=tokenizer.pad_id, state=state)
start, began = state.get("update", 0), time.perf_counter()
with course.interruptible() as stop:
    for metrics in tqdm(training, initial=start, total=steps, disable=None):
        metrics["seconds"] = time.perf_counter() - began
        course.keep_series(series, metrics)
        if full and metrics["update"] % 250 == 0:
            evaluate(metrics["update"])
        if full and (stop or metrics["update"] % 250 == 0):
            checkpoint.save(unfinished, {"config": asdict(config), **log})
        if stop:
            course.stopped(f"update {metrics['update']}", unfinished if full else None)
        if metrics["update"] >= steps:
            break
        began = time.perf_counter()
seconds = sum(series["seconds"])
speed = sum(series["tokens"]) / seconds
print(f"{steps} updates, {seconds:.0f} s, {speed:,.0f} tokens/s")

# %%
record = plotting.load_record(settings.lesson)
if full:
    made = plotting.LOCAL / f"01_sft_seed{settings.seed}.ckpt"
    checkpoint.save_model(made, model, tokenizer, {"seed": settings.seed})
    unfinished.unlink(missing_ok=True)
    print(f"the new base is {made}; to adopt it, copy it to {course.BASE}")
else:
    known = record.get(str(settings.seed), {}).get("series", {}).get("loss", [])
    pairs = zip(series["loss"], known, strict=False)
    apart = max((abs(mine - theirs) for mine, theirs in pairs), default=float("nan"))
    verdict = "the same schedule" if apart < 0.02 else "NOT the record's schedule"
    print(f"{steps} losses against the record's: at most {apart:.4f} apart, {verdict}")
    print("from here on with the committed base, made by the same schedule")
    model = course.load_policy(tokenizer, settings.device)

# %% [markdown]
# ## What it learned
#
# *Greedy* answers take the likeliest token each time. *Sampled* ones draw each token
# with the probability the model gives it (temperature 1): that is the model's own
# mixture, and what every later lesson improves. *Forced* answers have their first token
# fixed. The other lines of the table (lesson 02 explains them) say how the base will
# take to learning from rewards.

# %%
draw = settings.generator("test")
sampled = draw_answers(model, tokenizer, test, 8, generator=draw)
alone = {"greedy": None, "forced_worked": "<<", "forced_terse": "#### "}
alone = {
    name: draw_answers(model, tokenizer, test, 1, greedy=True, first_token=first)
    for name, first in alone.items()
}
other = draw_answers(model, tokenizer, skill, 1, greedy=True)
measured = {
    "sampled": bootstrap(sampled.correct.mean(1)),
    **{name: bootstrap(answers.correct[:, 0]) for name, answers in alone.items()},
    "pass_at_8": bootstrap(pass_at_k(sampled.correct, 8)),
    "format_rate": bootstrap(sampled.formatted.mean(1)),
    "second_skill": bootstrap(other.correct[:, 0]),
    "dead_share": dead_share(sampled.correct),
    "variance_between_problems": reward_variance_share(sampled.correct),
}
for name, estimate in measured.items():
    print(f"{name:<28}{estimate}")
own = {str(settings.seed): {"evaluations": evaluations}}
runs = record | (own if settings.record else {})
for seed, one in runs.items():
    last = one["evaluations"]["greedy"][-10:]
    print(f"seed {seed}: greedy accuracy over the last {len(last)} evaluations "
          f"from {min(last):.3f} to {max(last):.3f}")  # fmt: skip
course.predict("Share of right sampled answers:", my_guess, measured["sampled"].value)

# %% [markdown]
# The skill is there when the model is forced to begin with a calculation, and mostly
# gone when it is forced not to. It copied its terse teachers' *manner*, and could not
# copy their mental arithmetic. Four samples for one problem:

# %%
print(test[0].question)
for text, style in zip(sampled.texts[0][:4], sampled.styles[0][:4], strict=True):
    print(f"--- {style}\n{text}")

# %%
pupil: dict[str, Counter] = {family: Counter() for family in FAMILIES}
for problem, styles in zip(sampled.problems, sampled.styles, strict=True):
    pupil[problem.family].update(styles)
points = {style: [] for style in STYLES}
for family, seen in pupil.items():
    for style in STYLES if seen else ():
        taught = teachers[family][style] / teachers[family].total()
        points[style].append((taught, seen[style] / seen.total()))
gaps = [abs(x - y) for pairs in points.values() for x, y in pairs]
print(f"share of a style in a family, teachers against pupil: on average "
      f"{sum(gaps) / len(gaps):.3f} apart, at most {max(gaps):.3f}")  # fmt: skip

# %% [markdown]
# ## Break it
#
# Remove the one idea, the mask: learn to predict the *question* as well. And change
# what was chosen: the optimiser, its learning rate, the batch, the schedule. Each line
# is a run of its own on the same 15,360 demonstrations, one seed, judged on
# demonstrations that no run has seen. `quick` shows the record.


# %%
def short_run(examples: int, **changes: object) -> dict[str, float]:
    """Train with these changes; what came out and how long it took."""
    size = changes.get("batch_size", config.batch_size)
    short = replace(config, warmup=20, **changes, updates=max(examples // size, 1))
    dice = torch.Generator().manual_seed(settings.seed)
    policy = GPT(GPTConfig(tokenizer.n_vocab), dice).to(settings.device)
    rows, began = Demonstrations(examples), time.perf_counter()
    runs = sft.train(policy, rows, short, pad_id=tokenizer.pad_id)
    for _ in tqdm(runs, total=short.updates, disable=None):
        pass
    took = time.perf_counter() - began
    unseen = [rows[5_000_000 + i] for i in range(settings.pick(8, 512, 512))]
    tokens, mask = sft.collate(unseen, tokenizer.pad_id)
    tokens, mask = tokens.to(settings.device), mask.to(settings.device)
    with torch.no_grad():
        loss = sft.sft_loss(token_logprobs(policy, tokens, mask), mask).item()
    return {"answer_loss": loss, "seconds": took}


# %%
trials = {"no mask: learn the question too": {"learn_prompt": True}}
for lr in (2e-3, 4e-3, 8e-3):
    trials[f"AdamW, lr {lr:g}"] = {"muon": False, "lr": lr}
    trials[f"Muon, lr {lr:g}"] = {"lr": lr}
trials |= {f"Muon, batch {size}": {"batch_size": size} for size in (16, 64)}
trials["Muon, falling only in the last half"] = {"cooldown": 0.5}
tried = {}
if settings.record and settings.seed == 0:
    tried = {name: short_run(15_360, **trials[name]) for name in trials}
if settings.preset == "smoke":
    tried = {"smoke": short_run(64)}
shown_trials = tried or record.get("0", {}).get("dials", {})
print(f"{'15,360 demonstrations':<38}{'answer loss':>12}{'seconds':>9}")
for name, row in shown_trials.items():
    print(f"{name:<38}{row['answer_loss']:>12.4f}{row['seconds']:>9.0f}")

# %%
figure, (left, middle, right) = plotting.new_figure(
    3,
    "SFT imitates: the shares of the styles are "
    f"{sum(gaps) / len(gaps):.3f} from its teachers' on average",
)
left.plot([0, 1], [0, 1], color="#999", lw=1)
for style, pairs in points.items():
    color = plotting.STYLE_COLORS[style]
    left.scatter(*zip(*pairs, strict=True), color=color, label=style, s=28)
left.set(xlabel="share among its teachers", ylabel="share among its own samples")
left.set_title("each dot: one style in one family")
left.legend()
bars = ["forced_terse", "sampled", "greedy", "forced_worked", "pass_at_8"]
values = [measured[name] for name in bars]
errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
names = ["forced terse", "sampled", "greedy", "forced to work", "any of 8 samples"]
middle.barh(names, [v.value for v in values], xerr=errors, color=plotting.COLORS[2])
middle.set(xlim=(0, 1), xlabel=f"accuracy on {len(test)} test problems (95 %)")
middle.set_title("it can do better than it does")

# %%
runs = {seed: one["series"] for seed, one in record.items()}
runs |= {str(settings.seed): series} if settings.record else {}
for number, curve in enumerate(runs.values()):
    label = f"{len(runs)} seed(s), mean of 101 updates" if not number else None
    color = plotting.COLORS[number % len(plotting.COLORS)]
    loss = plotting.smoothed(curve["loss"], 101)
    right.plot(curve["update"], loss, lw=1, color=color, label=label)
if not settings.record:
    loss = plotting.smoothed(series["loss"], 21)
    right.plot(series["update"], loss, "k--", lw=2, label="this run")
right.set(xlabel="update", ylabel="loss, nats per answer token", ylim=(0, 1.5))
right.set_title("learning, on answer tokens only")
right.legend()
plotting.save_figure(figure, settings.figure_path)

# %%
base = {name: course.as_list(estimate) for name, estimate in measured.items()}
run = {"config": asdict(config), "base": base, "hand": hand}
run |= {"dials": tried} if tried else {}
run |= {"tokens_per_second": speed, "training_seconds": seconds}
run |= {"series": series, "evaluations": evaluations}
what = "sampled accuracy of the base on test, then the base forced to work"
course.finish(settings, run, measured["sampled"], measured["forced_worked"], what)

# %% [markdown]
# ## What we saw
#
# The gap between the base on its own and the base forced to work is not a lack of skill
# but of *preference*; and a teacher who is terse and right teaches terseness, not
# rightness.
#
# Exercises. (1) What would be sampled if every `terse`, `careless` and `showy` in
# `minialign/families.py` were 0? (Worked answers alone: there is nothing else to copy.)
# (2) Drop EOS in `Tokenizer.encode_response`: answers never end, are cut, and score 0.
# (3) Set `learn_prompt=True` and watch the loss: most of it is spent on names and
# fruit.
#
# Next: lesson 02, how answers are judged, and what 500 problems can tell.
