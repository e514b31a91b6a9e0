"""What every lesson does around its subject: settings, the base, the four answers.

A lesson is a script that is read from top to bottom. What would be said the same way
twenty times over stands here: reading --preset, --device and --seed; loading the base
model or failing in one clear line; the four completions that every lesson weighs by
hand; the record and the closing table.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minialign import checkpoint, plotting
from minialign.evaluation import (
    smoothed_success,
)
from minialign.intervals import Estimate
from minialign.model import GPT
from minialign.problems import DATA, Problem, make_problem, read_problems, verify
from minialign.tokenizer import VOCABULARY, Tokenizer

BASE = DATA / "base.ckpt"
PRESETS = ("smoke", "quick", "full")
Value = TypeVar("Value")

# --- settings -----------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    lesson: str  # the script's name without .py, such as 11_reinforce
    preset: str
    device: torch.device
    seed: int
    started: float  # seconds, time.perf_counter()
    record: bool = False  # write figures/, the authors' record, and not figures/local/
    grid: bool = False  # make comparisons that take hours, and not read them

    def pick(self, smoke: Value, quick: Value, full: Value) -> Value:
        """The value for this preset."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.preset]

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for each purpose, so that one more draw here does not
        move the numbers there."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        generator = torch.Generator(self.device)
        return generator.manual_seed(int.from_bytes(digest[:6], "big"))

    @property
    def measures_once(self) -> bool:
        """Whether this run measures what takes long and is measured once, not for every
        seed: seed 0 at `full` does, and `smoke`, which tries everything. All others
        read it from the record."""
        return self.preset == "smoke" or (self.preset, self.seed) == ("full", 0)

    @property
    def figure_path(self) -> Path:
        """Where the lesson's figure is drawn; with --record, over the committed one."""
        return self.folder / f"{self.lesson}.png"

    @property
    def folder(self) -> Path:
        """Where figures and records of this run go."""
        return plotting.FIGURES if self.record else plotting.LOCAL

    @property
    def policy_path(self) -> Path:
        """Where the policy that this lesson trains is kept, for `lessons ask`."""
        return plotting.LOCAL / f"{self.lesson}.ckpt"


def setup(lesson: str, arguments: Sequence[str] | None = None) -> Settings:
    """Read --preset, --device and --seed; say what was chosen.

    `lesson` is the script's name, such as 11_reinforce, or its path. In a notebook or
    an editor's cells there is no command line: the defaults hold.
    """
    if arguments is None:
        arguments = [] if "ipykernel" in sys.modules else sys.argv[1:]
    lesson = Path(lesson).stem
    parser = argparse.ArgumentParser(prog=f"lessons/{lesson}.py", add_help=True)
    add_options(parser)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    preset = options.preset or ("full" if device.type == "cuda" else "quick")
    for flag in ("record", "grid"):
        if getattr(options, flag) and preset != "full":
            fail(f"--{flag}: this is of --preset full, not of {preset}")
    settings = Settings(
        lesson,
        preset,
        device,
        options.seed,
        time.perf_counter(),
        options.record,
        options.grid,
    )
    try:
        plotting.LOCAL.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(error)
    if not os.access(settings.folder, os.W_OK):
        fail(f"{settings.folder} cannot be written to")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console lacks ∇
    say(f"{lesson}: preset {preset}, device {device}, seed {options.seed}")
    return settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every lesson and `python -m lessons` take."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="smoke: seconds, for tests; quick: two minutes, the default without a "
        "GPU; full: what the record was made with, the default with one",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="0, 1, 2, ...")
    parser.add_argument(
        "--record",
        action="store_true",
        help="for the authors: write the committed record, not figures/local/",
    )
    parser.add_argument(
        "--grid",
        action="store_true",
        help="make the lesson's longest comparisons too, in hours; a second call goes "
        "on where the first was stopped",
    )


def pick_device(name: str) -> torch.device:
    """The device asked for; `auto` is CUDA where there is one (MPS lacks float64)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device {name}: unknown; use auto, cpu or cuda")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count()}
    index = device.index or 0
    if index >= counts.get(device.type, 0):
        fail(f"--device {name}: this machine has no such device; use auto or cpu")
    return device


def say(message: str) -> None:
    """What is no result, such as a place or a time: on standard error, off the page."""
    print(message, file=sys.stderr, flush=True)


def fail(message: object) -> NoReturn:
    """End with one clear line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- where every lesson starts ------------------------------------------------------


def load_tokenizer(path: Path = VOCABULARY) -> Tokenizer:
    """A saved tokenizer, the course's by default."""
    try:
        return Tokenizer.load(path)
    except (ValueError, OSError) as error:
        fail(error)


def load_policy(tokenizer: Tokenizer, device: torch.device, path: Path = BASE) -> GPT:
    """A saved policy, the course's base by default, ready to train."""
    try:
        model, _ = checkpoint.load_model(path, tokenizer, device)
    except (ValueError, OSError) as error:
        fail(error)
    return model


def load_problems(split: str, count: int | None = None) -> list[Problem]:
    """The first `count` problems of a split, or all: "test", "validation", ..."""
    try:
        return read_problems(DATA / f"{split}.jsonl")[:count]
    except (ValueError, OSError) as error:
        fail(error)


def stream(seed: int, count: int) -> list[Problem]:
    """The training problems of a run: the same ones, in the same order, for every
    method at the same seed. Fresh draws of the training split: none was a
    demonstration for the base, but a few share their numbers with one."""
    return [make_problem(seed, "train", 10_000_000 + i) for i in range(count)]


def base_facts() -> dict:
    """What lesson 03 measured of the committed base: among it the two lines that every
    accuracy figure carries, `forced_worked` and `best_temperature`."""
    try:
        runs = plotting.load_record("03_ruler")
    except ValueError as error:
        fail(error)
    if "0" not in runs:
        fail("figures/03_ruler.json is missing: restore it, or run 03 at full")
    return runs["0"]


def base_success() -> np.ndarray:
    """The base's success rate on each of 500 test problems, smoothed (lesson 03).

    (c + 1/2) / (n + 1) of n samples: a rate of exactly 0 or 1 would claim that no
    policy could ever do better or worse there.
    """
    facts = base_facts()
    right = np.array(facts["right_of_samples"])[:, None]
    return smoothed_success(np.arange(facts["samples"]) < right)


# --- by hand ------------------------------------------------------------------------

HAND_PROBLEM = Problem(
    "Mia has 3 bags of 5 apples and 2 boxes of 6 apples. How many apples is that?",
    gold=Fraction(27),
    family="groups",
    steps=3,
    id="by hand",
)
HAND_ANSWERS = {
    "worked, right": "<<3*5=15>>\n<<2*6=12>>\n<<15+12=27>>\n#### 27",
    "terse, right": "#### 27",
    "terse, wrong": "#### 25",
    "careless": "<<3*5=15>>\n<<2*6=12>>\n#### 12",
}


def by_hand(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """The four completions as a batch.

    Shapes: -> tokens (4, T), mask (4, S), rewards (4,).
    """
    prompt = tokenizer.encode_prompt(HAND_PROBLEM.question)
    responses = [tokenizer.encode_response(text) for text in HAND_ANSWERS.values()]
    longest = len(prompt) + max(map(len, responses))
    tokens = torch.full((len(responses), longest), tokenizer.pad_id)  # (4, T)
    mask = torch.zeros(len(responses), longest - 1, dtype=torch.bool)  # (4, S)
    for row, response in enumerate(responses):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) - 1 : end - 1] = True
    right = [float(verify(HAND_PROBLEM, text)) for text in HAND_ANSWERS.values()]
    return tokens, mask, torch.tensor(right)


def hand_table(
    lesson: str, rows: Mapping[str, Sequence[float]], beside: str | None = None
) -> dict[str, list[float]]:
    """Print the weight that a method puts on each completion's ∇ log π.

    Each row is scaled to a largest weight of 1: what a method prefers is in the
    proportions. Above the lesson's own rows stand those of the lesson `beside` it, from
    its record. Returns the rows for this record, as they are.
    """
    own = {name: list(map(float, weights)) for name, weights in rows.items()}
    known: dict[str, list[float]] = {}
    if beside is not None:
        runs = list(plotting.load_record(beside).values())
        known = runs[0].get("hand", {}) if runs else {}
    head = "".join(f"{name:>16}" for name in HAND_ANSWERS)
    print(f"\n{'weight of ∇ log π, largest 1':<34}{head}")
    for name, weights in (known | own).items():
        mark = ">" if name in own else " "
        largest = max(abs(weight) for weight in weights) or 1.0
        numbers = "".join(f"{weight / largest:>+16.2f}" for weight in weights)
        print(f"{mark} {name:<32}{numbers}")
    return own


def predict(question: str, guess: float, measured: float, key: str = "") -> None:
    """Set the reader's guess beside the answer.

    `key` names the number in this lesson's record, as `check` does: a test looks that
    no text gives it away before.
    """
    print(f"\n{question}\n  your guess {guess:g}, measured {measured:.3g}")


# --- what the text says -------------------------------------------------------------


def check(
    record: str, numbers: Mapping[str, float | str], own: Mapping | None = None
) -> list[str]:
    """The numbers in a paragraph are those of the committed record of a lesson.

    `numbers` are {key: as the text has it}, such as {"gap_closed": 0.85, "kl, seed 1":
    "1.60"}: they agree if the record's number rounds to as many digits. A key without a
    seed means the mean over the seeds; see `number`. Prints nothing where all agree,
    and says on standard error what does not. `own`: the reader's own run, whose numbers
    may differ from the text without either being wrong.

    Returns what does not agree with the record, a line each, a key that the record does
    not have among it: the tests ask for none.
    """
    runs = plotting.load_record(record)
    wrong = []
    for key, text in numbers.items():
        try:
            value = number(runs, key)
        except ValueError as error:
            wrong.append(f"{record}: {error}")
            continue
        if not _rounds_to(value, text):
            wrong.append(
                f"{record}: the text says {key} {text}, the record {value:.6g}"
            )
    for line in wrong:
        say(line)
    if own is not None:
        for line in _unlike(own, numbers):
            say(f"your run: {line}")
    return wrong


def _unlike(own: Mapping, numbers: Mapping[str, float | str]) -> list[str]:
    """In what a reader's own run differs from the text."""
    found = []
    for key, text in numbers.items():
        name = key.partition(", seed ")[0]
        try:
            value = number({"": own}, name)
        except ValueError:
            found.append(f"it has no {name}")
            continue
        if not _rounds_to(value, text):
            found.append(f"{key} is {value:.4g}, in the text {text}")
    return found


def number(runs: Mapping[str, Mapping], key: str) -> float:
    """A number of a record: {seed: run} and a key -> the mean over the seeds.

    Keys are names, joined by " > " where a record has records in it. "sampled after" is
    the second of a pair of estimates, "sampled before" the first; of an estimate, the
    value and not the ends of its interval. "kl, seed 1" is that of one seed.
    """
    name, _, seed = key.partition(", seed ")
    chosen = [runs[seed]] if seed in runs else list(runs.values())
    if not chosen or (seed and seed not in runs):
        raise ValueError(f"{key}: the record has the seeds {', '.join(runs) or 'none'}")
    return sum(_number_of(run, name) for run in chosen) / len(chosen)


def _number_of(run: Mapping, name: str) -> float:
    found: Any = run
    for part in name.split(" > "):
        plain, _, when = part.rpartition(" ")
        if when in ("before", "after") and plain in found:
            found = found[plain][("before", "after").index(when)]
        elif part in found:
            found = found[part]
        else:
            raise ValueError(f"{name}: there is no {part!r} in the record")
    return float(found[0] if isinstance(found, list) else found)


def _rounds_to(value: float, text: float | str) -> bool:
    """Whether the value, with as many decimals as the text has, is the text."""
    written = str(text)
    decimals = len(written.partition(".")[2])
    return f"{value:.{decimals}f}" == written


# --- while it runs ------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C asks for a stop after the current step; a second one stops at once.

    Yields a list that is empty until then: `if stop: save and leave`.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(where: str, saved: Path | None) -> NoReturn:
    """End an interrupted lesson: say where it stands; exit code 130."""
    kept = f"saved in {saved}; the same command goes on" if saved else "nothing saved"
    print(f"stopped at {where}, {kept}", file=sys.stderr)
    sys.exit(130)


def resume(path: Path, config: dict) -> dict:
    """What an interrupted run saved, without its config; {} when there is nothing.

    A file made under another config is refused, never ignored.
    """
    way_out = f"(remove {path} to start from nothing)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return {}
        saved = checkpoint.load(path)
    except (ValueError, OSError) as error:
        fail(f"{error} {way_out}")
    kept = saved.pop("config", None)
    if not isinstance(kept, dict):
        fail(f"{path} is not an interrupted run: it has no config {way_out}")
    try:
        checkpoint.check_config(kept, config)
    except ValueError as error:
        fail(f"{error} {way_out}")
    print(f"going on with {path}")
    return saved


def follow(
    training: Iterable[Mapping[str, float]], total: int
) -> dict[str, list[float]]:
    """Run a training to its end: {metric: its values, one an update}, and "seconds"."""
    series: dict[str, list[float]] = {}
    start = time.perf_counter()
    for metrics in tqdm(training, total=total, disable=None):
        keep_series(series, {**metrics, "seconds": time.perf_counter() - start})
    return series


def follow_long(
    training: Iterable[Mapping[str, float]],
    total: int,
    log: dict[str, dict],
    path: Path | None,
    evaluate: Callable[[int], Mapping[str, float]],
    every: int = 250,
) -> None:
    """As `follow`, for a long run: Ctrl-C may end it, and a later call goes on with it.

    `log` holds "series" and "evaluations", to which this appends, and whatever else the
    run needs to go on, such as its state. It is saved in `path`, with what `resume`
    compares in it, after every evaluation and when the run is interrupted. `path` None:
    neither is done, as in a run of seconds.
    """
    series = log.setdefault("series", {})
    evaluations = log.setdefault("evaluations", {})
    done = len(series.get("seconds", []))
    start = time.perf_counter()
    with interruptible() as stop:
        for metrics in tqdm(training, initial=done, total=total, disable=None):
            done += 1
            seconds = time.perf_counter() - start
            keep_series(series, {**metrics, "seconds": seconds})
            due = done % every == 0
            if path is not None and due:
                spent = sum(series["seconds"])
                point = {"update": done, "seconds": spent, **evaluate(done)}
                keep_series(evaluations, point)
            if path is not None and (due or stop):
                checkpoint.save(path, log)
            if stop:
                stopped(f"update {done}", path)
            if done >= total:
                break
            start = time.perf_counter()


def keep_series(series: dict[str, list[float]], metrics: Mapping[str, float]) -> None:
    """Append one dict of metrics to the series of the record."""
    for name, value in metrics.items():
        series.setdefault(name, []).append(value)


def save_policy(settings: Settings, policy: GPT, tokenizer: Tokenizer) -> None:
    """Keep what a lesson trained, for `python -m lessons ask`; `smoke` trains nothing
    worth asking."""
    if settings.preset != "smoke":
        checkpoint.save_model(settings.policy_path, policy, tokenizer)


# --- how every lesson ends ----------------------------------------------------------


def finish(
    settings: Settings, run: dict, before: Estimate, after: Estimate, what: str
) -> None:
    """Save the run and print the closing table. `what` names the two numbers."""
    seconds = time.perf_counter() - settings.started
    run = {
        "lesson": settings.lesson,
        "preset": settings.preset,
        "seed": settings.seed,
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **plotting.provenance(settings.device),
        "what": what,
        "before": as_list(before),
        "after": as_list(after),
        "figure": settings.figure_path.relative_to(plotting.FIGURES.parent).as_posix(),
        **cost(run.get("series", {})),
        **run,
    }
    path = plotting.save_run(settings.lesson, run, settings.seed, not settings.record)
    say("")
    print_table([run], file=sys.stderr)
    say(f"record: {path.relative_to(plotting.FIGURES.parent)}")


def cost(series: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What a run of these series cost: its optimiser steps, and the tokens they were
    made of. {} of a run that does not say."""
    counted = ("steps", "tokens_trained")
    return {name: sum(series[name]) for name in counted if name in series}


def runs_on_record(settings: Settings, run: dict) -> list[dict]:
    """The committed runs of this lesson, one a seed; with --record this one joins."""
    record = plotting.load_record(settings.lesson)  # other seeds may have ended by now
    if settings.record:
        record |= {str(settings.seed): run}
    return list(record.values())


def as_list(estimate: Estimate) -> list[float]:
    """[value, low, high], as records hold it."""
    return [estimate.value, estimate.low, estimate.high]


def as_estimate(held: Sequence[float]) -> Estimate:
    """The estimate of a record's [value, low, high]."""
    value, low, high = held
    return Estimate(value, low, high)


def print_table(runs: Sequence[dict], file: TextIO | None = None) -> None:
    """Lesson, seconds, before, after, figure: one line a run. None: standard output."""
    head = f"{'lesson':<16}{'seconds':>8}  {'before':>22}  {'after':>22}  figure"
    print(head, file=file)
    for run in runs:
        before = str(as_estimate(run["before"]))
        after = str(as_estimate(run["after"]))
        print(
            f"{run['lesson']:<16}{run['seconds']:>8.0f}  {before:>22}  {after:>22}  "
            f"{run['figure']}",
            file=file,
        )
    for what in dict.fromkeys(run["what"] for run in runs):
        print(f"  before, after: {what}", file=file)


def titles(folder: Path) -> dict[str, tuple[str, str]]:
    """{lesson: (title, question)} of a folder of lessons, in the course's order.

    A lesson's first cell begins with `# # Title` and holds `# **Question.** ...`.
    """
    found = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.py")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# # (.+)$", text, re.MULTILINE)
        question = re.search(r"\*\*Question\.\*\* ((?:.+\n# )*?.*?\?)", text)
        if not title or not question:
            raise ValueError(f"{path.name}: no title or no **Question.** in it")
        found[path.stem] = title[1], question[1].replace("\n# ", " ")
    return found


def last_run(lesson: str, seed: int, local: bool) -> dict | None:
    """The run that a lesson wrote last for this seed, or None."""
    folder = plotting.LOCAL if local else plotting.FIGURES
    try:
        return json.loads((folder / f"{lesson}.json").read_text()).get(str(seed))
    except (OSError, ValueError):
        return None
