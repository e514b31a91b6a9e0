"""Word problems: a generator, a reader of GSM8K files, a verifier.

One problem in three dresses. The *question* is English; the *answer* is GSM8K's
format, one calculation a line and then the result after ``####``::

    Mia has 12 apples. She buys 3 bags of 5 apples. How many apples does she have?

    <<3*5=15>>
    <<12+15=27>>
    #### 27

The demonstrations that the base model imitates come in four *styles*: worked (every
step, right), terse (the last line alone, right), careless (forgets the last step,
wrong) and showy (long, polite, full of checks, often wrong). How likely a style is
depends on the family of the problem. Imitation learns that mixture, faults and all;
the rest of the course is about getting the good behaviour out of the same model.

Families live in `families.py`; this file deals the problems and judges the answers.
"""

import codecs
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from minialign.families import FAMILIES, NEW_FAMILIES, SKILLS, Draft, Teller

DATA = Path(__file__).resolve().parents[1] / "data"
STYLES = ("worked", "terse", "careless", "showy")

SPLITS = {  # name: how many problems its file in data/ holds (0: dealt on demand)
    "train": 0,
    "validation": 500,
    "test": 1000,
    "more_steps": 500,
    "larger_numbers": 500,
    "new_families": 500,
    "new_families_train": 1500,
    "second_skill": 500,
    "second_skill_train": 0,
}

SECOND_SKILL_SHARE = 0.10
SHOWY_WRONG = 0.6


@dataclass(frozen=True)
class Problem:
    """A question and what counts as right.

    `gold` is a Fraction for word problems and a str for the second skill, whose
    answers (a sorted list, say) must match exactly. `steps` counts calculations.
    """

    question: str
    gold: Fraction | str
    family: str
    steps: int
    id: str


@dataclass(frozen=True)
class Demonstration:
    """A problem with one teacher's answer, labelled with its style."""

    problem: Problem
    style: str
    answer: str


# --- dealing ------------------------------------------------------------------------


def make_problem(seed: int, split: str, index: int) -> Problem:
    """Problem number `index` of a split: a function of its three arguments alone.

    Raises: ValueError for an unknown split or a negative index.
    """
    return _deal(seed, split, index)[0]


def demonstration(seed: int, split: str, index: int) -> Demonstration:
    """Row `index` of the mixture of styles that the base model imitates.

    One row in ten of `train` is a second-skill problem instead. The other splits
    have plain worked answers.
    """
    rng = Random(f"{seed}/{split}/{index}/style")
    if split == "train" and rng.random() < SECOND_SKILL_SHARE:
        split = "second_skill_train"
    problem, draft = _deal(seed, split, index)
    if draft.family in SKILLS:
        return Demonstration(problem, "skill", str(problem.gold))
    style = _draw_style(rng, draft) if split == "train" else "worked"
    answer = _write_answer(rng, draft, style)
    if style == "careless" and verify(problem, answer):  # right by coincidence
        style, answer = "worked", _write_answer(rng, draft, "worked")
    return Demonstration(problem, style, answer)


def _deal(seed: int, split: str, index: int) -> tuple[Problem, Draft]:
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, known are {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index: got {index}, must be 0 or more")
    name = f"{seed}/{split}/{index}"
    rng = Random(name)
    larger = split == "larger_numbers"
    wanted = (7, 8) if split == "more_steps" else (1, 6)
    while True:
        if split.startswith("second_skill"):
            family = rng.choice(list(SKILLS))
            draft = SKILLS[family](Teller(rng, family))
        else:
            known = NEW_FAMILIES if split.startswith("new_families") else FAMILIES
            names = [f for f in known if known[f].deals(wanted)]
            family = rng.choices(names, [known[f].weight for f in names])[0]
            draft = known[family].tell(Teller(rng, family, wanted, larger))
        if _home(draft) == split or split in ("more_steps", "larger_numbers"):
            gold = draft.gold if family in SKILLS else Fraction(draft.gold)
            return Problem(draft.question, gold, family, draft.steps, name), draft


def _home(draft: Draft) -> str:
    """The split that owns a problem: decided by its family and numbers alone, so
    that no question of `test` is a `train` question with another name in it."""
    key = f"{draft.family}:{','.join(map(str, draft.numbers))}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    if draft.family in SKILLS:
        return "second_skill" if bucket == 0 else "second_skill_train"
    if draft.family in NEW_FAMILIES:
        return "new_families" if bucket < 3 else "new_families_train"
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _draw_style(rng: Random, draft: Draft) -> str:
    """A style, by the odds of the family; the rest of the odds are for `worked`."""
    odds = FAMILIES[draft.family]
    shares = (odds.terse, odds.careless, odds.showy)
    style = rng.choices(STYLES, (1 - sum(shares), *shares))[0]
    if style == "careless" and draft.steps == 1:
        return "worked"  # no last step to forget
    return style


def _write_answer(rng: Random, draft: Draft, style: str) -> str:
    steps = rng.choice(draft.orders)
    lines = [f"<<{a}{op}{b}={_value(a, op, b)}>>" for a, op, b in steps]
    result = _value(*steps[-1])
    if style == "terse":
        lines = []
    elif style == "careless":
        lines.pop()
        result = _value(*steps[-2])
    elif style == "showy":
        opening = ("Happy to help!", "What a lovely problem!", "Of course!")
        undo = {"+": "-", "-": "+", "*": "/", "/": "*"}
        checks = [
            f"Check: <<{_value(a, op, b)}{undo[op]}{b}={a}>>" for a, op, b in steps[-2:]
        ]
        lines = [rng.choice(opening), *lines, *checks, "I am sure, all is checked."]
        if rng.random() < SHOWY_WRONG:
            result += rng.choice((1, 2, 3, 10))
    return "\n".join([*lines, f"#### {result}"])


def _value(a: int, op: str, b: int) -> int:
    value = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}[op]
    if value < 0 or value != int(value):
        raise ValueError(f"step {a}{op}{b}: every result is a non-negative integer")
    return int(value)


# --- judging ------------------------------------------------------------------------

_NUMBER = re.compile(
    r"""(?:(?P<sign>[-+\u2212])\s*)? (?:\$\s*)? (?:(?P<late_sign>[-+\u2212])\s*)?
    (?=[0-9.])           # no run of spaces can be split in two ways: linear time
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?   # 1,234 or 1234; 12,34 is refused
    (?P<decimals>\.[0-9]+)?
    (?:/(?P<under>[0-9]+))?                       # a simple fraction
    (?:\s*(?:%|(?P<word>[^\W\d_]+)))?            # one optional word, or %
    \.?""",
    re.VERBOSE,
)
_MOST_DIGITS = 40


def extract_answer(text: str) -> Fraction | None:
    """The number after the last ``####``, or None; never raises on any str.

    Allowed around it: ``$``, a sign (ASCII or U+2212), thousands commas, decimals,
    a simple fraction, one word or ``%``, a full stop. Anything else is no answer.
    """
    return _read_answer(text)[0]


def _read_answer(text: str) -> tuple[Fraction | None, str]:
    """The answer and, where there is none, why."""
    _, marker, tail = text.rpartition("####")
    if not marker:
        return None, "no #### marker"
    if not tail.strip():
        return None, "nothing after ####"
    found = _NUMBER.fullmatch(tail.strip())
    if not found or not (found["whole"] or found["decimals"]):
        return None, f"not one number after ####: {tail.strip()[:40]!r}"
    if any(map(str.isnumeric, found["word"] or "")):  # 3½, say
        return None, f"not one number after ####: {tail.strip()[:40]!r}"
    if found["sign"] and found["late_sign"]:
        return None, "two signs"
    if len(found["whole"] or "") + len(found["decimals"] or "") > _MOST_DIGITS:
        return None, "number too long"
    if found["under"] and (found["decimals"] or len(found["under"]) > _MOST_DIGITS):
        return None, "not a simple fraction"
    whole = (found["whole"] or "0").replace(",", "")
    value = Fraction(whole + (found["decimals"] or ""))
    if found["under"]:
        if int(found["under"]) == 0:
            return None, "division by zero"
        value /= int(found["under"])
    negative = (found["sign"] or found["late_sign"]) in ("-", "\u2212")
    return (-value if negative else value), ""


def verify(problem: Problem, text: str) -> bool:
    """Is the answer right? Exact equality of fractions, never of strings or floats.

    `text` is the response up to its end-of-sequence token. Second-skill problems
    compare the stripped text.
    """
    if isinstance(problem.gold, str):
        return text.strip() == problem.gold
    return extract_answer(text) == problem.gold


def explain(problem: Problem, text: str) -> str:
    """Why `verify` said what it said, in a few words, for people and for audits."""
    if verify(problem, text):
        return "right"
    if isinstance(problem.gold, str):
        return f"wrong: {text.strip()[:40]!r} instead of {problem.gold!r}"
    answer, reason = _read_answer(text)
    if answer is None:
        return f"no answer: {reason}"
    return f"wrong: {answer} instead of {problem.gold}"


def is_formatted(problem: Problem, text: str) -> bool:
    """Does the text hold an answer at all, right or wrong?"""
    return isinstance(problem.gold, str) or extract_answer(text) is not None


def style_of(problem: Problem, text: str) -> str:
    """The style of a response, read off its text: one of STYLES, "skill" or "other".

    Fewer calculations than the problem has steps, and the last one's result handed
    in as the answer: careless. A slip of arithmetic does not change the style.
    """
    if isinstance(problem.gold, str):
        return "skill"
    answer = extract_answer(text)
    if answer is None:
        return "other"
    if text.startswith("####"):
        return "terse"
    if not text.startswith("<<"):
        return "showy" if "Check:" in text else "other"
    results = re.findall(r"<<[^<>=]*=([0-9]+)>>", text)
    if not results:
        return "other"
    handed_in = answer == extract_answer(f"####{results[-1]}")
    return "careless" if len(results) < problem.steps and handed_in else "worked"


# --- files --------------------------------------------------------------------------


def read_problems(path: str | Path, rejected: list[str] | None = None) -> list[Problem]:
    """Problems from a JSONL file of ``{"question": ..., "answer": ...}`` rows.

    Reads GSM8K's own files as they are; the gold answer is extracted from `answer`. A
    byte-order mark at the start of the file is skipped; anywhere else it is content.

    Strict by default: the first bad row raises. Pass a list as `rejected` to go on;
    it collects one line for each row left out, and every row is in one of the two.

    Raises: ValueError naming file, line and reason; OSError if it cannot be read.
    """
    # Editors on Windows begin a UTF-8 file with the mark.
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    problems = []
    for number, raw in enumerate(data.splitlines(), start=1):
        try:
            problems.append(_read_row(raw, f"{Path(path).name}:{number}"))
        except ValueError as error:
            reason = f"{path}, line {number}: {error}"
            if rejected is None:
                raise ValueError(reason) from None
            rejected.append(reason)
    return problems


def _read_row(raw: bytes, name: str) -> Problem:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        row = json.loads(
            line,
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    _require(isinstance(row, dict), f"a row is an object, got {type(row).__name__}")
    row = {"family": "gsm8k", **row}
    for field in ("question", "answer", "family"):
        text = row.get(field)
        filled = isinstance(text, str) and text.strip() != ""
        _require(filled, f"field {field!r}: must be a non-empty string")
        half = re.search("[\ud800-\udfff]", text)
        _require(half is None, f"field {field!r}: holds half of a surrogate pair")
    family, steps = row["family"], row.get("steps")
    if steps is None:
        steps = row["answer"].count("<<")
    counted = type(steps) is int and steps >= 0
    _require(counted, "field 'steps': must be an integer, 0 or more")
    if family in SKILLS:
        gold: Fraction | str = row["answer"].strip()
    else:
        answer, reason = _read_answer(row["answer"])
        if answer is None:
            raise ValueError(f"field 'answer': {reason}")
        gold = answer
    return Problem(row["question"], gold, family, steps, name)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("the same key twice")
    return row


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(number: str) -> float:
    return _refuse(number[:40]) if math.isinf(float(number)) else float(number)


def load_split(name: str, count: int | None = None) -> list[Problem]:
    """The first `count` problems of a split's file in data/ (all of them: None).

    Raises: ValueError for a split without a file, or too few rows; OSError.
    """
    if not SPLITS.get(name):
        files = ", ".join(split for split, size in SPLITS.items() if size)
        raise ValueError(f"split: got {name!r}, data/ holds {files}")
    problems = read_problems(DATA / f"{name}.jsonl")
    if count is not None and not 0 <= count <= len(problems):
        raise ValueError(f"count: got {count}, {name} has {len(problems)} problems")
    return problems[:count]


def write_data(folder: Path = DATA, say: Callable[[str], None] = print) -> None:
    """Write every split that has a file: the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SPLITS.items():
        if size:
            path = folder / f"{split}.jsonl"
            path.write_bytes("".join(_lines(split, size)).encode())
            say(f"{path.name}: {size} problems, {path.stat().st_size:,} bytes")


def _lines(split: str, size: int) -> Iterator[str]:
    for index in range(size):
        row = demonstration(0, split, index)
        fields = {
            "question": row.problem.question,
            "answer": row.answer,
            "style": row.style,
            "family": row.problem.family,
            "steps": row.problem.steps,
        }
        yield json.dumps(fields, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("usage: python -m minialign.problems  (writes data/*.jsonl)")
        sys.exit(2)
    write_data()
