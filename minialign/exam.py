"""What every method is compared by: an exam, a report, and trials of its settings.

A lesson on a method takes the base and what became of it through the same exam, and
reports the way between them. Trials say how much of it is due to the method's settings.

    exam, show_answers                          a policy answers the test problems
    distance, report                            what its training brought, and the price
    run_trials, print_trials, compare_trials    the same algorithm under other settings
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from minialign import plotting
from minialign.course import Settings, as_list, base_success, load_problems
from minialign.evaluation import (
    Answers,
    frontier_at,
    measured_kl,
    pass_at_k,
    sample_answers,
    style_shares,
)
from minialign.intervals import Estimate, bootstrap, difference, gap_closed
from minialign.model import GPT
from minialign.problems import Problem
from minialign.sampling import generate
from minialign.tokenizer import Tokenizer

TUNING_SEED = 100  # settings are chosen with it, on validation; 0, 1, 2 report on test

# --- how good a policy is -----------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """A policy's answers to the test problems, and to those of the second skill."""

    sampled: Answers  # 8 to each problem, at temperature 1
    greedy: Answers
    skill: Answers  # greedy, to problems that no reward of the course ever asks


def exam(settings: Settings, tokenizer: Tokenizer, policy: GPT, purpose: str) -> Exam:
    """Examine a policy; `purpose` ("before", "after") names the sampling generator."""
    test = load_problems("test", settings.pick(8, 256, 1000))
    skill = load_problems("second_skill", settings.pick(8, 100, 500))
    draw = settings.generator(purpose)
    return Exam(
        sampled=sample_answers(policy, tokenizer, test, 8, generator=draw),
        greedy=sample_answers(policy, tokenizer, test, 1, greedy=True),
        skill=sample_answers(policy, tokenizer, skill, 1, greedy=True),
    )


def show_answers(taken: Exam, count: int = 3) -> None:
    """Print the first sampled answer to each of the first problems."""
    answers = taken.sampled
    for i, problem in enumerate(answers.problems[:count]):
        verdict = "right" if answers.correct[i, 0] else "wrong"
        print(f"{problem.question}\n{answers.texts[i][0]}")
        print(f"({answers.styles[i][0]}, {verdict}; gold {problem.gold})\n")


def distance(
    tokenizer: Tokenizer,
    policy: GPT,
    reference: GPT,
    problems: Sequence[Problem],
    generator: torch.Generator,
) -> Estimate:
    """KL(policy ‖ reference) in nats per answer: mean over problems, 2 answers each."""
    rollout = generate(
        policy,
        [tokenizer.encode_prompt(problem.question) for problem in problems],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=128,
        samples=2,
        generator=generator,
    )
    nats = measured_kl(policy, reference, rollout).view(-1, 2).mean(1)  # (N,)
    return bootstrap(nats.cpu().numpy())


def report(
    settings: Settings,
    tokenizer: Tokenizer,
    policy: GPT,
    reference: GPT,
    before: Exam,
    after: Exam,
    curve: tuple[Sequence[float], Sequence[float]],
) -> dict:
    """What every method is compared by: printed, and returned for the record.

    `curve` is (completions generated, sampled accuracy) over training. The *gap* leads
    from the base to the base forced to work. `area` is the mean height of the curve.
    The *frontier* is the most accuracy that the measured KL can buy (lesson 03).
    """
    test = before.sampled.problems
    forced = sample_answers(
        reference, tokenizer, test, 1, greedy=True, first_token="<<"
    ).correct[:, 0]
    was, now = (taken.sampled.correct.mean(1) for taken in (before, after))
    held = test[: len(success := base_success())]
    nats = distance(tokenizer, policy, reference, held, settings.generator("kl"))
    steps, heights = np.asarray(curve[0], float), np.asarray(curve[1], float)
    if len(heights) > 20:  # batches of a few hundred answers: noisy
        heights = plotting.smoothed(heights, 5)
    above = np.flatnonzero(heights >= 0.8)
    reached = float(steps[above[0]]) if len(above) else None
    middles, widths = (heights[1:] + heights[:-1]) / 2, np.diff(steps)
    mean = float(np.average(middles, weights=widths) if len(widths) else heights[0])
    pairs = {
        "sampled": (was, now),
        "greedy": tuple(taken.greedy.correct[:, 0] for taken in (before, after)),
        "pass_at_8": tuple(pass_at_k(t.sampled.correct, 8) for t in (before, after)),
        "second_skill": tuple(taken.skill.correct[:, 0] for taken in (before, after)),
        "length": tuple(taken.sampled.lengths.mean(1) for taken in (before, after)),
    }
    found: dict[str, Any] = {}
    print()
    for name, (first, last) in pairs.items():
        ends = bootstrap(first), bootstrap(last)
        found[name] = [as_list(end) for end in ends]
        print(f"{name:<16}{ends[0]} -> {ends[1]}, change {difference(last, first)}")
    closed = gap_closed(was, now, forced)
    best, bought = frontier_at(success[: len(held)], nats.value), now[: len(held)]
    print(f"gap to the base forced to work ({forced.mean():.3f}) closed: {closed}")
    print(f"KL(policy ‖ base) {nats} nats per answer; {bought.mean():.3f} right there,")
    print(f"  where so many nats can buy {best:.3f} at most (the frontier)")
    print(f"answers drawn to reach 0.8: {reached or 'never reached'}; area {mean:.3f}")
    return found | {
        "gap_closed": as_list(closed),
        "kl": as_list(nats),
        "accuracy_at_kl": float(bought.mean()),
        "frontier": best,
        "completions_to_0.8": reached,
        "area": mean,
    }


# --- trials: the same algorithm under other settings --------------------------------


def run_trials(
    settings: Settings,
    tokenizer: Tokenizer,
    reference: GPT,
    trials: Mapping[str, tuple[Any, Mapping[str, Any]]],
    run: Callable[..., tuple[GPT, dict[str, list[float]]]],
) -> dict[str, dict]:
    """Try settings: {name: (config, options)} -> {name: what was measured}.

    Calls run(config, settings, **options) -> (policy, series) with a seed that no
    reported run uses, and judges on validation. At `full`, seed 0 runs what the
    record lacks and saves each as it ends: a trial whose config and options are on
    record is not run again. `smoke` runs one for each set of options and saves none.
    Else: the record.
    """
    name = f"{settings.lesson}_dials"
    record = plotting.load_record(name)
    if settings.preset == "quick" or (settings.preset == "full" and settings.seed > 0):
        return record
    if settings.preset == "smoke":
        kinds = {str(_names(trials[title][1], title)): title for title in trials}
        trials = {title: trials[title] for title in kinds.values()}
    tuning = replace(settings, seed=TUNING_SEED)
    known = {} if settings.preset == "smoke" else record
    known = {_trial_key(entry): entry for entry in known.values()}
    tried: dict[str, dict] = {}
    for title, (config, options) in trials.items():
        what = {"config": asdict(config), "options": _names(options, title)}
        entry = known.get(_trial_key(what))
        if entry is None:
            print(f"trial: {title}", flush=True)
            policy, series = run(config, tuning, **options)
            entry = what | _judge(tuning, tokenizer, policy, reference)
            entry |= {"seconds": series["seconds"][-1], "series": series}
            if settings.preset == "full":
                plotting.save_trials(name, record | tried | {title: entry})
        tried[title] = entry
    if settings.preset == "full":
        plotting.save_trials(name, tried)
        tried = plotting.load_record(name)
    return tried


def _judge(
    settings: Settings, tokenizer: Tokenizer, policy: GPT, reference: GPT
) -> dict:
    """A trial's numbers, all on validation problems."""
    problems = load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    sampled = sample_answers(policy, tokenizer, problems, 4, generator=draw)
    greedy = sample_answers(policy, tokenizer, problems, 1, greedy=True)
    nats = distance(tokenizer, policy, reference, problems, draw)
    asked = [problem for problem in problems for _ in range(4)]
    texts = np.where(sampled.truncated, "", np.array(sampled.texts, dtype=object))
    return {
        "accuracy": as_list(bootstrap(sampled.correct.mean(1))),
        "greedy": as_list(bootstrap(greedy.correct[:, 0])),
        "kl": as_list(nats),
        "length": float(sampled.lengths.mean()),
        "pass_at_4": float(pass_at_k(sampled.correct, 4).mean()),
        "styles": style_shares(asked, texts.flatten().tolist()),
    }


def _names(options: Mapping[str, Any], title: str) -> dict[str, str]:
    """Functions by name (one without a name by its trial's), all else as it prints."""
    names = {key: getattr(x, "__name__", repr(x)) for key, x in options.items()}
    return {key: title if "<" in name else name for key, name in names.items()}


def _trial_key(entry: Mapping[str, Any]) -> str:
    """What sets a trial apart; micro-batches bound memory and change rounding only."""
    config = {k: x for k, x in entry["config"].items() if k != "micro_batch"}
    what = [plotting.rounded(config), entry["options"]]
    return json.dumps(what, sort_keys=True)


def print_trials(trials: Mapping[str, dict]) -> None:
    """One line a trial: accuracy with its interval over 500 validation problems."""
    head = f"{'sampled':>22}{'greedy':>8}{'KL':>7}{'tokens':>8}{'pass@4':>8}"
    print(f"\n{'on validation':<38}{head}")
    for name, row in trials.items():
        accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*row["accuracy"])
        print(
            f"{name:<38}{accuracy:>22}{row['greedy'][0]:>8.3f}{row['kl'][0]:>7.2f}"
            f"{row['length']:>8.1f}{row['pass_at_4']:>8.3f}"
        )


def compare_trials(trials: Mapping[str, dict], one: str, two: str, what: str) -> None:
    """Two trials side by side, and whether their 95 % intervals part them."""
    if {one, two} <= trials.keys():
        (a, low, high), (b, least, most) = (trials[x]["accuracy"] for x in (one, two))
        above, below = low > most, high < least
        verdict = "above" if above else "below" if below else "not told apart from"
        print(f"- {what}:\n  {one}, {a:.3f}, is {verdict} {two}, {b:.3f}.")
