# %% [markdown]
# # Lesson 91: A museum of bugs
#
# **Question.** If the learning curve goes up, why write tests?
#
# Read before: lesson 14 (GRPO: groups, ratio, clip).
#
# Six mistakes hang here, of kinds that widely used code has made; none raises an error,
# and each is a line or two. Every one is trained from the base, in the place of
# the right line, with GRPO's settings of lesson 14. Then it meets one *property*: a
# sentence about the right code that a few numbers can refute.
#
# You will see: which curves give their bug away, which do not, and how little a
# property needs to know.
#
# Time: `quick` seconds on two CPU cores (its curves are the record's); `full` some
# fifteen minutes. Memory: about 2 GB.

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
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from minialign import course, exam, plotting, sampling
from minialign.algorithms import grpo
from minialign.intervals import Estimate
from minialign.logprobs import probability_ratio, token_logprobs
from minialign.rewards import verifier
from minialign.sampling import generate, rescore

# %%
settings = course.setup("91_bug_museum")
tokenizer = course.load_tokenizer()
reference = course.load_policy(tokenizer, settings.device).requires_grad_(False)
base = course.base_facts()
config = grpo.GRPOConfig(
    updates=settings.pick(1, 16, 16),
    prompts=settings.pick(2, 32, 32),
    epochs=2,
    max_new_tokens=settings.pick(48, 128, 128),
)
right_loss, right_scores = grpo.clipped_loss, token_logprobs

# %% [markdown]
# ## The exhibits
#
# A row of a batch is a prompt, its answer and padding; `mask` is True on the tokens the
# policy chose. Here is what should have been written, and what was.
#
# 1. **One mean for all.** Advantages compare answers to *one* problem.
#    `rewards - rewards.mean(1, keepdim=True)` became `rewards - rewards.mean()`, and
#    the std likewise. (A baseline from the batch is a method too, but it is not GRPO.)


# %%
def of_the_batch(rewards: Tensor) -> Tensor:
    """Right is still up and wrong is down, however easy the problem; and groups all
    right or all wrong, worth 0 before, now push."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# %% [markdown]
# 2. **The needless `min`.** `min(ratio * A, clipped * A)` became `clipped * A`.
# 3. **Old is new.** The ratio divides by the policy that *drew*; here by the policy as
#    it is now, `logprobs.detach()`.
# 4. **EOS forgotten.** The answer's last token (EOS, "I have finished", unless it was
#    cut) fell out of the mask: padding often has the same id.
#
# 2 and 3 are harmless on the first pass over a draw, where the ratio is 1. Our settings
# make two: on the second, 3 neither corrects nor clips. `right_loss` is the library's.


# %%
def without_min(logprobs, old_logprobs, advantages, mask, low=0.2, high=0.2) -> Tensor:
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.where(mask, -clipped * advantages[:, None], 0.0)


def old_is_new(logprobs, old_logprobs, *rest) -> Tensor:
    return right_loss(logprobs, logprobs.detach(), *rest)


def without_eos(logprobs, old_logprobs, advantages, mask, *band) -> Tensor:
    later = mask.flip(1).cumsum(1).flip(1)  # (B, S) live tokens from here on
    return right_loss(logprobs, old_logprobs, advantages, mask & (later > 1), *band)


# %% [markdown]
# 5. **The padded width.** An answer's length is `mask.sum(1)`, not `mask.shape[1]`, its
#    row's width, prompt and padding included. Now all tokens weigh the same, by a
#    number that the longest row decides.
# 6. **Two temperatures.** Drawn at 0.7, scored at 1: `logits / temperature` was
#    forgotten on one side.


# %%
def padded_width(mask: Tensor, max_new_tokens: int) -> Tensor:
    return mask.double() / mask.shape[1] / mask.any(1).sum()


def scored_at_one(model, tokens, mask, temperature=1.0) -> Tensor:
    return right_scores(model, tokens, mask)


places = {  # exhibit: (module, name, what hangs there instead)
    "one mean for all": [(grpo, "group_advantages", of_the_batch)],
    "the needless min": [(grpo, "clipped_loss", without_min)],
    "old is new": [(grpo, "clipped_loss", old_is_new)],
    "EOS forgotten": [(grpo, "clipped_loss", without_eos)],
    "the padded width": [(grpo, "per_sequence", padded_width)],
    "two temperatures": [
        (room, "token_logprobs", scored_at_one) for room in (grpo, sampling)
    ],
}

# %% [markdown]
# ## Predict

# %%
print("After 4,096 answers, how many of the six will end clearly below the right code?")
my_guess = 3  # edit me

# %% [markdown]
# ## One second each
#
# First the properties. Each is a question with a number for an answer, and needs no
# training: tensors made by hand, or one small draw (not in the seconds below).

# %%
one = torch.ones(1, 1, dtype=torch.bool)  # a single live token
asked = course.stream(settings.seed, 4)
prompts = [tokenizer.encode_prompt(problem.question) for problem in asked]
drawn = generate(
    reference, prompts, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, samples=4,
    max_new_tokens=32, temperature=0.7, generator=settings.generator("properties"),
)  # fmt: skip


def slope(ratio: float, A: float) -> float:
    """∂ loss / ∂ log π of one token whose probability has changed by `ratio`."""
    leaf = torch.tensor([[-2.0]]).add(torch.tensor(ratio).log()).requires_grad_()
    old, advantage = torch.tensor([[-2.0]]), torch.tensor([A])
    grpo.clipped_loss(leaf, old, advantage, one, 0.2, 0.2).sum().backward()
    return leaf.grad.item()


# %%
def other_problems() -> float:
    """By how much does my advantage change when another problem's rewards do?"""
    mine, less, more = [1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4
    two = [grpo.group_advantages(torch.tensor([mine, x]))[0] for x in (less, more)]
    return (two[0] - two[1]).abs().max().item()


def no_way_back() -> float:
    """A bad token grew likelier by half: how much of the pull down is lost?"""
    return abs(slope(1.5, -1.0) / 1.5 - 1)


def never_let_go() -> float:
    """A good token grew likelier by half: how much of the pull up is left?"""
    return abs(slope(1.5, 1.0))


# %%
def end_unheard() -> float:
    """How many tokens that the policy chose get no gradient?"""
    leaf = drawn.logprobs.clone().requires_grad_()
    ones = torch.ones(len(leaf), device=settings.device)
    grpo.clipped_loss(leaf, drawn.logprobs, ones, drawn.mask).sum().backward()
    return (drawn.mask.sum(1) - (leaf.grad != 0).sum(1)).abs().sum().item()


def padding_heard() -> float:
    """By how much do forty columns of padding change a token's weight?"""
    wider = torch.nn.functional.pad(drawn.mask, (0, 40))
    two = grpo.per_sequence(drawn.mask, 128), grpo.per_sequence(wider, 128)
    return (two[0] / two[1][:, :-40])[drawn.mask].sub(1).abs().max().item()


def scored_apart() -> float:
    """How far is the sampler's log-prob from the one that training computes? Nats."""
    scored = rescore(reference, drawn, [torch.arange(len(drawn.tokens))])
    return (scored - drawn.logprobs).abs().max().item()


# %% [markdown]
# The answer is 0 for the right code, but for rounding. Now with each mistake in place.


# %%
def hang(stack: ExitStack, exhibit: str) -> None:
    """Put the wrong lines where the right ones are, until the stack is closed."""
    for room, name, wrong in places.get(exhibit, []):
        stack.enter_context(mock.patch.object(room, name, wrong))


properties = dict(zip(places, (other_problems, no_way_back, never_let_go, end_unheard,
                               padding_heard, scored_apart), strict=True))  # fmt: skip
caught = {}
print(f"{'exhibit':<20}{'property':<18}{'right':>9}{'wrong':>9}{'seconds':>9}")
for exhibit, ask in properties.items():
    right, start = ask(), time.perf_counter()
    with ExitStack() as stack:
        hang(stack, exhibit)
        wrong = ask()
    caught[exhibit] = [right, wrong, time.perf_counter() - start]
    assert right < 1e-3 and wrong > 0.1, f"{exhibit}: {caught[exhibit]}"
    cells = "".join(f"{x:>9.3f}" for x in caught[exhibit])
    print(f"{exhibit:<20}{ask.__name__:<18}{cells}")

# %% [markdown]
# The library's tests ask such questions of every function, with inputs that a machine
# invents, and again of more than a hundred wrong versions (`python tests/mutants.py`).
#
# ## The curves
#
# Now what most of us look at. 16 updates of 256 answers from the base, one seed, judged
# on 500 validation problems. The two runs at temperature 0.7 are judged at 1, as all:
# their curves lie higher than the numbers beside them.


# %%
def run_grpo(config: grpo.GRPOConfig, settings, exhibit="") -> tuple:
    """From the base: the trained policy and its series, with an exhibit in place."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    series, start = {}, time.perf_counter()
    with ExitStack() as stack:
        hang(stack, exhibit)
        training = grpo.train(
            policy, tokenizer, problems, verifier, config, reference=reference,
            generator=settings.generator("sampling"),
            advantage=grpo.group_advantages, reduction=grpo.per_sequence,
        )  # fmt: skip
        for metrics in tqdm(training, total=config.updates, disable=None):
            seconds = time.perf_counter() - start
            clock = {"accuracy": metrics["reward"], "seconds": seconds}
            course.keep_series(series, metrics | clock)
    return policy, series


# %%
cold = replace(config, temperature=0.7)
trials = {"right": (config, {}), "right, at 0.7": (cold, {})}
for exhibit in places:
    own = cold if exhibit == "two temperatures" else config
    trials[exhibit] = (own, {"exhibit": exhibit})
tried = exam.run_trials(settings, tokenizer, reference, trials, run_grpo)
exam.print_trials(tried)
rivals = {name: "right, at 0.7" if own is cold else "right"
          for name, (own, options) in trials.items() if options}  # fmt: skip
below = [name for name, rival in rivals.items() if {name, rival} <= tried.keys()
         and tried[name]["accuracy"][2] < tried[rival]["accuracy"][1]]  # fmt: skip
course.predict("Exhibits clearly below the right code:", my_guess, len(below))

# %% [markdown]
# ## The figure

# %%
start = base["before"]  # the base's sampled accuracy, with its interval
rising = [name for name in rivals if name in tried
          and tried[name]["accuracy"][1] > start[2]]  # fmt: skip
message = f"{len(rising)} of {len(rivals)} bugs learn: without the right curve beside "
message += "it, a rising one proves little"
figure, axes = plotting.new_figure(3, message, rows=2, width=4.6)
for axis, (name, rival) in zip(axes, rivals.items(), strict=True):
    for color, title in (("#5c677d", rival), ("#d1495b", name)):
        if title in tried:
            label = f"{title}: {tried[title]['accuracy'][0]:.2f} on validation"
            runs = [{"series": tried[title]["series"]}]
            plotting.draw_runs(axis, runs, "completions", "accuracy", label, color, 3)
    axis.axhline(start[0], color="#444", ls=":", lw=1.2, label="the base")
    axis.set(xlabel="answers drawn", ylabel="accuracy, mean of 3 batches", ylim=(0, 1))
    axis.set_title(f"{name}: caught without training", fontsize=10)
    axis.legend(loc="upper left", fontsize=8)
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# ## What we saw

# %%
print(f"- Of {len(rivals)} bugs {len(rising)} end above the base ({start[0]:.2f}), "
      f"beyond the intervals; {len(below)} end below the right code.")  # fmt: skip
for name, rival in rivals.items():
    exam.compare_trials(tried, name, rival, f"caught by {properties[name].__name__}")
run = {"caught": caught, "below": below, "rising": rising}
none = [0.0, 0.0, 0.0]
last = min(tried.values(), key=lambda trial: trial["accuracy"][0], default={})
ends = [tried.get("right", {}).get("accuracy", none), last.get("accuracy", none)]
what = "accuracy on validation of the right code and of the worst bug"
course.finish(settings, run, *(Estimate(*end) for end in ends), what)

# %% [markdown]
# A curve asks one question, "does it get better?", and for most of this wrong code the
# answer is yes: the gradient points roughly upwards, and the optimiser forgives the
# rest. Most of these bugs cost accuracy already here, yet you see it only because the
# right run hangs beside them, and in your own work there is none. Those that cannot be
# told apart from the right code will cost something in another setting, and by then
# it is a mystery. A property asks whether the number is *the* number.
#
# Exercises. (1) Swap the two epsilons in `grpo.clipped_loss`. Which property sees it?
# (None above: with 0.2 and 0.2 nothing has changed. A property has to use inputs that
# tell the two apart.) (2) Break a line of `ppo.py` yourself and run
# `python -m pytest -k ppo`. (Something should fail. If nothing does, you have found a
# hole in our tests: please tell us.)
