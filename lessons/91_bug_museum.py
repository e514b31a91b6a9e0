# %% [markdown]
# # Lesson 91: A museum of bugs
#
# **Question.** If the learning curve goes up, why test?
#
# **Afterwards you can** name six mistakes in code for alignment, say why a curve does
# not show them, and write a test that does.
#
# **Read before:** [lesson 16](16_grpo.py): groups, the ratio, the clip and the two
# divisions of GRPO.
#
# **Paper:** none. One like the fifth is known from public code (lesson 33), and the
# others are easily made.
#
# **Look at:** where the red dots of Figure 1 lie beside the dotted line, and beside the
# green ones.
#
# **Turn first:** a line of your own in `minialign/algorithms/grpo.py`.
#
# **Time:** `quick` takes twenty seconds on two CPU cores, `full` twenty minutes on one.
# 2 GB of memory.

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
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from minialign import course, exam, plotting, sampling
from minialign.algorithms import grpo
from minialign.evaluation import sample_answers
from minialign.intervals import bootstrap
from minialign.logprobs import probability_ratio, token_logprobs
from minialign.rewards import verifier
from minialign.sampling import generate, rescore

# %% tags=["setup"]
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
right_loss = grpo.clipped_loss
right_scores = token_logprobs

# %% [markdown]
# ## The idea
#
# A learning curve asks one question: does it get better? A wrong gradient may well
# answer yes. It only has to point roughly upwards. So a rising curve proves little,
# unless the curve of right code hangs beside it, and in your own work there is none.
#
# A *property* asks another question: is this number *the* number? It is a sentence
# about right code that a few tensors can refute, in less than a second. Some have the
# form
#
#     changing X must not change Y
#
# and others say what a number must be.
#
# Six mistakes hang here. None raises an error and each is a line or two. In each case
# we say what should have been written, and what was. `mask` is true on the tokens that
# the policy chose; `right_loss` and `right_scores` keep the library's own functions,
# because the names in the library will be made to point to the wrong ones. (Two of the
# six are near to things that are done elsewhere on purpose. A batch mean compares all
# answers of a batch, as the first does, and Dr. GRPO divides by a constant, nearly as
# the fifth does. They are mistakes here because GRPO was meant.)
#
# **1. One mean for all.** Advantages compare answers to *one* problem. Here the mean
# and the deviation are those of the whole batch.


# %%
def of_the_batch(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# %% [markdown]
# **2. The needless min.** The loss should hold `min(ratio * A, clipped * A)`. Somebody
# thought the `min` needless and kept `clipped * A`. Then a token whose ratio has left
# the range against its advantage gets no gradient, and is not called back: a bad one
# that has grown likelier, say.
#
# **3. Old is new.** The ratio divides by the policy that *drew* the answers; here by
# the policy as it is now. Then the ratio is always 1, and the clip never stops a token
# from being pushed further.
#
# **4. EOS forgotten.** The last token of an answer says "I have finished". Here it fell
# out of the mask, as it easily does where padding has the same id.


# %%
def without_min(logprobs, old_logprobs, advantages, mask, low=0.2, high=0.2) -> Tensor:
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.where(mask, -clipped * advantages[:, None], 0.0)


def old_is_new(logprobs, old_logprobs, advantages, mask, low=0.2, high=0.2) -> Tensor:
    return right_loss(logprobs, logprobs.detach(), advantages, mask, low, high)


def without_eos(logprobs, old_logprobs, advantages, mask, low=0.2, high=0.2) -> Tensor:
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # (B, S)
    shortened = mask & (still_to_come > 1)
    return right_loss(logprobs, old_logprobs, advantages, shortened, low, high)


# %% [markdown]
# **5. The padded width.** An answer's length is the number of its tokens. Here it is
# the width of the batch, with prompt and padding.
#
# **6. Two temperatures.** The answers are drawn at 0.7 and scored at 1. The ratio still
# starts at 1, but the gradient is that of another policy than the one that drew.


# %%
def padded_width(mask: Tensor, max_new_tokens: int) -> Tensor:
    answers = mask.any(1).sum()
    return mask.double() / mask.shape[1] / answers


def scored_at_one(model, tokens, mask, temperature=1.0) -> Tensor:
    return right_scores(model, tokens, mask)


PLACES = {  # mistake: (module, name, what replaces it)
    "one mean for all": [(grpo, "group_advantages", of_the_batch)],
    "the needless min": [(grpo, "clipped_loss", without_min)],
    "old is new": [(grpo, "clipped_loss", old_is_new)],
    "EOS forgotten": [(grpo, "clipped_loss", without_eos)],
    "the padded width": [(grpo, "per_sequence", padded_width)],
    "two temperatures": [
        (grpo, "token_logprobs", scored_at_one),
        (sampling, "token_logprobs", scored_at_one),
    ],
}

# %% [markdown]
# ## By hand: six properties
#
# Each is a question whose answer is a number, and for right code the number is 0. They
# need a few tensors made by hand, or one small draw. (`rescore` is how training scores
# the tokens that were drawn.) Each was written with one mistake in view. In the table,
# all six are asked of right code and of every mistake: a column is a property, numbered
# as the mistake that it was written for.

# %%
one_token = torch.ones(1, 1, dtype=torch.bool)
asked = course.stream(settings.seed, 4)
drawn = generate(
    reference,
    [tokenizer.encode_prompt(problem.question) for problem in asked],
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
    samples=4,
    max_new_tokens=32,
    temperature=0.7,
    generator=settings.generator("properties"),
)


def slope(ratio: float, A: float) -> float:
    """∂ loss / ∂ log π of one token whose probability has changed by `ratio`."""
    old = torch.tensor([[-2.0]])
    leaf = (old + torch.tensor(ratio).log()).requires_grad_()
    loss = grpo.clipped_loss(leaf, old, torch.tensor([A]), one_token, 0.2, 0.2)
    loss.sum().backward()
    return leaf.grad.item()


def other_problems() -> float:
    """By how much does my advantage change when another problem's rewards do?"""
    mine = [1.0, 0.0, 0.0, 1.0]
    beside_wrong = grpo.group_advantages(torch.tensor([mine, [0.0] * 4]))[0]
    beside_right = grpo.group_advantages(torch.tensor([mine, [1.0] * 4]))[0]
    return (beside_wrong - beside_right).abs().max().item()


def no_way_back() -> float:
    """A bad token grew likelier by half: how much of the pull down is lost?"""
    # With A = −1 the right slope is the ratio itself, 1.5.
    return abs(slope(1.5, -1.0) / 1.5 - 1)


def never_let_go() -> float:
    """A good token grew likelier by half: how much of the pull up is left?"""
    return abs(slope(1.5, 1.0))


def end_unheard() -> float:
    """How many tokens that the policy chose get no gradient?"""
    leaf = drawn.logprobs.clone().requires_grad_()
    ones = torch.ones(len(leaf), device=settings.device)
    grpo.clipped_loss(leaf, drawn.logprobs, ones, drawn.mask).sum().backward()
    return float((drawn.mask.sum() - (leaf.grad != 0).sum()).abs())


def padding_heard() -> float:
    """By what share do forty columns of padding change a token's weight?"""
    wider = torch.nn.functional.pad(drawn.mask, (0, 40))
    narrow_weights = grpo.per_sequence(drawn.mask, 128)
    wide_weights = grpo.per_sequence(wider, 128)[:, :-40]
    return (narrow_weights / wide_weights)[drawn.mask].sub(1).abs().max().item()


def scored_apart() -> float:
    """How far at worst is a token's log-probability from the sampler's? In nats."""
    scored = rescore(reference, drawn, [torch.arange(len(drawn.tokens))])
    return (scored - drawn.logprobs).abs().max().item()


PROPERTIES = {
    "one mean for all": other_problems,
    "the needless min": no_way_back,
    "old is new": never_let_go,
    "EOS forgotten": end_unheard,
    "the padded width": padding_heard,
    "two temperatures": scored_apart,
}


# %%
def hang(stack: ExitStack, mistake: str) -> None:
    """Put the wrong lines where the right ones are, until the stack is closed."""
    for module, name, wrong in PLACES.get(mistake, []):
        stack.enter_context(mock.patch.object(module, name, wrong))


caught = {}  # mistake: the answers of all six properties
print(f"{'':<22}" + "".join(f"{number:>9}" for number in range(1, 7)))
for row, mistake in enumerate(["right code", *PROPERTIES]):
    with ExitStack() as stack:
        hang(stack, mistake)
        caught[mistake] = [ask() for ask in PROPERTIES.values()]
    name = f"{row}. {mistake}" if row else mistake
    print(f"{name:<22}" + "".join(f"{answer:>9.3f}" for answer in caught[mistake]))
assert max(caught["right code"]) < 1e-3
for column, mistake in enumerate(PROPERTIES):
    assert caught[mistake][column] > 0.1, mistake

# %% [markdown]
# ## Predict
#
# Now what most of us look at. Put each mistake in the place of the right line, and
# train from the base on 4,096 answers, with one seed. Call a run *clearly below* the
# right code if the upper end of its 95 % interval over problems lies under the lower
# end of the right code's. How many of the six will be?

# %%
my_guess = 3  # edit me

# %% [markdown]
# ## Train
#
# Each run has sixteen updates, with two steps on each draw, and is judged on validation
# problems. We look at its end alone: if that lies above the base, its curve has risen.
# Right code is trained with three seeds, so that we see how far apart equal code may
# end. The run with two temperatures draws at 0.7, so it is compared with right code
# that draws and scores at 0.7. All are judged at temperature 1. (This could favour the
# mistake, for right code at 0.7 improves the policy as it is drawn at 0.7.)


# %%
def run_grpo(config, settings, mistake="", later=0) -> tuple:
    """From the base: the trained policy and its series, with a mistake in place.
    `later`: another seed, so many further on."""
    settings = replace(settings, seed=settings.seed + later)
    policy = copy.deepcopy(reference).requires_grad_(True)
    problems = course.stream(settings.seed, config.updates * config.prompts)
    with ExitStack() as stack:
        hang(stack, mistake)
        training = grpo.train(
            policy,
            tokenizer,
            problems,
            verifier,
            config,
            generator=settings.generator("sampling"),
            # A default argument is bound when the library is read, before the wrong
            # function is put in its place. So both are passed here.
            advantage=grpo.group_advantages,
            reduction=grpo.per_sequence,
            reference=reference,
        )
        series = course.follow(training, config.updates)
    return policy, series


cold = replace(config, temperature=0.7)
trials = {  # name: (config, other arguments)
    "right": (config, {}),
    "right, at 0.7": (cold, {}),
    "right, seed 1": (config, {"later": 1}),
    "right, seed 2": (config, {"later": 2}),
}
rivals = {}  # mistake: the right code that it is compared with
for mistake in PLACES:
    is_cold = mistake == "two temperatures"
    trials[mistake] = (cold if is_cold else config, {"mistake": mistake})
    rivals[mistake] = "right, at 0.7" if is_cold else "right"
tried = exam.run_trials(settings, tokenizer, reference, trials, run_grpo)
exam.print_trials(tried)

# %% [markdown]
# ## The result

# %%
# The base on the same problems: measured once, and else read from the record.
start = plotting.load_record(settings.lesson).get("0", {}).get("base", base["before"])
if settings.measures_once:
    validation = course.load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    found = sample_answers(reference, tokenizer, validation, 4, generator=draw)
    start = course.as_list(bootstrap(found.correct.mean(1)))
below = []
rising = []
for mistake, rival in rivals.items():
    if mistake not in tried or rival not in tried:
        continue
    _, low, high = tried[mistake]["accuracy"]
    if high < tried[rival]["accuracy"][1]:
        below.append(mistake)
    if low > start[2]:
        rising.append(mistake)
shown = [mistake for mistake, rival in rivals.items() if {mistake, rival} <= set(tried)]
print(f"the base {course.as_estimate(start)}")
print(f"{len(rising)} of {len(shown)} end clearly above it")
print(f"{len(below)} clearly below right code")

# %% tags=["plot"]
figure, (axes,) = plotting.new_figure(
    1,
    f"{len(rising)} of {len(shown)} mistakes still learn: a rising curve proves little",
    width=9.5,
    height=4.2,
)
shown.sort(key=lambda mistake: tried[mistake]["accuracy"][0])
for row, mistake in enumerate(shown):
    wrong, low, high = tried[mistake]["accuracy"]
    right = tried[rivals[mistake]]["accuracy"][0]
    axes.plot([wrong, right], [row, row], color="#bbb", lw=2)
    axes.plot([low, high], [row, row], color=plotting.COLORS[1], lw=5, alpha=0.35)
    axes.plot(wrong, row, "o", color=plotting.COLORS[1], ms=9)
    axes.plot(right, row, "o", color=plotting.COLORS[2], ms=9)
    for other in ("right, seed 1", "right, seed 2"):
        if rivals[mistake] == "right" and other in tried:
            again = tried[other]["accuracy"][0]
            axes.plot(again, row, "o", mfc="white", mec=plotting.COLORS[2], ms=6)
red, green = plotting.COLORS[1:3]
axes.plot([], [], "o-", color=red, label="with the mistake (bar: 95 % over problems)")
axes.plot([], [], "o", color=green, ms=9, label="right code, same seed")
axes.plot([], [], "o", mfc="white", mec=green, ms=6, label="right code, other seeds")
axes.axvline(start[0], color="#444", ls=":", lw=1.2)
axes.annotate(" the base, before training", (start[0], -0.45), fontsize=9)
axes.set_yticks(range(len(shown)), shown)
axes.set(xlabel="sampled accuracy on validation, after 4,096 answers")
axes.set(ylim=(-0.6, max(len(shown), 1) - 0.3))
axes.legend(loc="upper left")
plotting.save_figure(figure, settings.figure_path)

# %% [markdown]
# **Figure 1.** Accuracy after the same training with a mistake in it, and with right
# code; hollow dots: right code with two other seeds (at 0.7 it was trained once).
# Dotted: the base, before any training.

# %%
course.predict("Mistakes clearly below right code:", my_guess, len(below), key="below")
run = {"caught": caught, "below": len(below), "rising": len(rising), "base": start}
run["tried"] = {name: trial["accuracy"] for name, trial in tried.items()}

# %% [markdown]
# ## What we found
#
# * All six runs end clearly above the base, which has 0.441. One of them is clearly
#   below the right code, *old is new*, with 0.541 [0.509, 0.574] against 0.709. Nothing
#   ever stops its pushes, and we think that this is why. *Two temperatures*, at 0.67,
#   only just escapes: right code at 0.7 has 0.712, no less than right code at 1.
# * Four of the mistakes even end above the right code of the same seed, by up to 0.06.
#   That does not make them improvements. Right code with two other seeds came to 0.732
#   and 0.773: equal code ends as far apart as that, and a single curve cannot tell it
#   from a mistake.
# * What accuracy hides, another number may show. Right code went 2.2 nats from the base
#   (2.0 at 0.7), *old is new* 11.0, and *two temperatures* 12.2. Somebody who plots the
#   KL, and knows from lesson 04 that so much accuracy need not cost two nats, would
#   have begun to ask. Of the other four, the KL says little.
# * Each property finds the mistake that it was written for, before any training, in
#   seconds. But hardly any sees another one: off the diagonal of the table only two of
#   thirty answers are not 0. A seventh mistake needs a seventh question.
#
# Each mistake was trained with one seed, and not for long. So nothing here says that
# they do no harm. In a run as short as this, the end of the curve shows the harm of one
# in six.

# %% tags=["record"]
course.check(
    "91_bug_museum",
    {"below, seed 0": 1, "rising, seed 0": 6, "base, seed 0": "0.441"},
    own=run,
)
course.check(
    "91_bug_museum_trials",
    {
        "accuracy, seed old is new": "0.541",
        "accuracy, seed right": "0.709",
        "accuracy, seed one mean for all": "0.77",
        "accuracy, seed right, seed 1": "0.732",
        "accuracy, seed right, seed 2": "0.773",
        "accuracy, seed two temperatures": "0.67",
        "accuracy, seed right, at 0.7": "0.712",
        "kl, seed right": "2.2",
        "kl, seed right, at 0.7": "2.0",
        "kl, seed old is new": "11.0",
        "kl, seed two temperatures": "12.2",
    },
)

# %% tags=["record"]
none = [0.0, 0.0, 0.0]  # smoke tries one mistake, and maybe no right code
right = tried.get("right", {}).get("accuracy", none)
worst = tried[shown[0]]["accuracy"] if shown else none  # sorted above
what = "accuracy on validation of the right code and of the worst mistake"
course.finish(settings, run, course.as_estimate(right), course.as_estimate(worst), what)

# %% [markdown]
# ## Readers' questions

# %% [markdown] tags=["folded"]
# **Do mistakes 2 and 3 do harm in the first step of a draw?** No. The ratio is 1 there,
# and the gradient is right. With one step on each draw nobody would ever notice. Here
# there are two.
#
# **How do I find properties for my own code?** Ask what must not matter: padding, the
# order of a batch, its division into micro-batches, other problems' rewards, the
# content of masked slots. Then ask what must be exact: the first loss, the first ratio,
# the expected gradient where all answers can be listed.

# %% [markdown]
# ## Exercises
#
# **Exercise 1 (explain).** Swap the two epsilons in `grpo.clipped_loss`. Which of the
# six properties sees it?
#
# **Exercise 2 (break).** Break a line of `minialign/algorithms/ppo.py` and run `python
# -m pytest -k ppo`. Does anything fail?
#
# **Exercise 3 (derive).** Write a property of GRPO's loss that none of our six asks
# for.

# %% [markdown] tags=["answers"]
# **Answer 1.** None: they are 0.2 and 0.2, and nothing has changed. A property has to
# use inputs that tell the two apart.
#
# **Answer 2.** It should. If nothing does, you have found a hole in our tests: please
# tell us.
#
# **Answer 3.** For example: an answer whose advantage is 0 has no gradient. Or:
# swapping two rows of the batch, with all that belongs to them, swaps their gradients
# and changes nothing else.
