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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from minialign.families import (
    FAMILIES,
    NEW_FAMILIES,
    SKILLS,
    Draft,
    Step,
    Teller,
    calculate,
)

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
    "new_families_validation": 500,
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
    problem, _ = _deal(seed, split, index)
    return problem


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
        style = "worked"
        answer = _write_answer(rng, draft, style)
    return Demonstration(problem, style, answer)


def workings(seed: int, split: str, index: int) -> tuple[Problem, list[str]]:
    """A problem, and its worked answers: one for each order that it may be worked in.
    Where two orders have the same numbers, their texts are one.

    Raises: as `make_problem`; ValueError for a problem of the second skill.
    """
    problem, draft = _deal(seed, split, index)
    if not draft.orders:
        raise ValueError(f"split: {split!r} is of the second skill, which has no steps")
    texts = []
    for steps in draft.orders:
        results = [calculate(a, op, b) for a, op, b in steps]
        texts.append(_write_steps(steps, results))
    return problem, list(dict.fromkeys(texts))


def _deal(seed: int, split: str, index: int) -> tuple[Problem, Draft]:
    """Draw problems until one belongs to the split; return it and its draft."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, known are {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index: got {index}, must be 0 or more")
    problem_id = f"{seed}/{split}/{index}"
    rng = Random(problem_id)
    larger = split == "larger_numbers"
    wanted = (7, 8) if split == "more_steps" else (1, 6)
    while True:
        if split.startswith("second_skill"):
            family = rng.choice(list(SKILLS))
            draft = SKILLS[family](Teller(rng, family))
        else:
            known = NEW_FAMILIES if split.startswith("new_families") else FAMILIES
            names = [name for name in known if known[name].deals(wanted)]
            weights = [known[name].weight for name in names]
            family = rng.choices(names, weights)[0]
            draft = known[family].tell(Teller(rng, family, wanted, larger))
        if _home(draft) == split or split in ("more_steps", "larger_numbers"):
            break
    problem = Problem(
        question=draft.question,
        gold=draft.gold if family in SKILLS else Fraction(draft.gold),
        family=family,
        steps=draft.steps,
        id=problem_id,
    )
    return problem, draft


def _home(draft: Draft) -> str:
    """The split that owns a problem.

    Its family and numbers alone decide, so that no question of `test` is a question of
    `train` with another name in it.
    """
    key = f"{draft.family}:{','.join(map(str, draft.numbers))}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    if draft.family in SKILLS:
        return "second_skill" if bucket == 0 else "second_skill_train"
    if draft.family in NEW_FAMILIES:
        if bucket < 3:
            return "new_families"
        return "new_families_validation" if bucket < 5 else "new_families_train"
    if bucket == 0:
        return "validation"
    if bucket == 1:
        return "test"
    return "train"


def _draw_style(rng: Random, draft: Draft) -> str:
    """A style, by the odds of the family; the rest of the odds are for `worked`."""
    odds = FAMILIES[draft.family]
    shares = (odds.terse, odds.careless, odds.showy)
    worked = 1 - sum(shares)
    style = rng.choices(STYLES, (worked, *shares))[0]
    if style == "careless" and draft.steps == 1:
        return "worked"  # no last step to forget
    return style


def _write_answer(rng: Random, draft: Draft, style: str) -> str:
    """What a teacher of this style writes."""
    steps = rng.choice(draft.orders)
    results = [calculate(a, op, b) for a, op, b in steps]
    lines = []
    for (a, op, b), result in zip(steps, results, strict=True):
        lines.append(f"<<{a}{op}{b}={result}>>")
    handed_in = results[-1]
    if style == "terse":
        lines = []
    elif style == "careless":
        lines.pop()
        handed_in = results[-2]
    elif style == "showy":
        opening = rng.choice(("Happy to help!", "What a lovely problem!", "Of course!"))
        checks = _write_checks(steps[-2:], results[-2:])
        lines = [opening, *lines, *checks, "I am sure, all is checked."]
        if rng.random() < SHOWY_WRONG:
            handed_in += rng.choice((1, 2, 3, 10))
    return "\n".join([*lines, f"#### {handed_in}"])


def _write_checks(steps: Sequence[Step], results: Sequence[int]) -> list[str]:
    """Each step undone: its result and its second number give back its first."""
    undo = {"+": "-", "-": "+", "*": "/", "/": "*"}
    checks = []
    for (a, op, b), result in zip(steps, results, strict=True):
        checks.append(f"Check: <<{result}{undo[op]}{b}={a}>>")
    return checks


def _write_steps(steps: Sequence[Step], results: Sequence[int]) -> str:
    """One calculation a line, and the last result."""
    lines = []
    for (a, op, b), result in zip(steps, results, strict=True):
        lines.append(f"<<{a}{op}{b}={result}>>")
    return "\n".join([*lines, f"#### {results[-1]}"])


# --- spoiling -----------------------------------------------------------------------

MISTAKES = ("slip", "operation", "number", "left out", "result")


def spoiled(answer: str, rng: Random, mistake: str | None = None) -> str:
    """A wrong copy of a right answer: one mistake, and all that follows from it.

        slip         a calculation has another result
        operation    it is another operation on the same numbers
        number       one of its numbers is another
        left out     the last step is missing
        result       only the number after #### is another

    Later steps go on with what the mistake has led to. They are known by the result
    that they use: a number of the story that happens to equal it changes with it. A
    terse answer allows only the last mistake. `mistake` is drawn where it is None.

    Raises: ValueError for an answer that is neither a working as `workings` writes it,
    nor one line with its result; for a mistake that is not in MISTAKES, and for one
    that cannot be made in this answer.
    """
    right = extract_answer(answer)
    if mistake is not None and mistake not in MISTAKES:
        raise ValueError(f"mistake: got {mistake!r}, known are {', '.join(MISTAKES)}")
    steps = []
    results = []
    for a, op, b, result in re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", answer):
        steps.append((int(a), op, int(b)))
        results.append(int(result))
    _check_working(answer, steps, results)
    allowed = _allowed(steps)
    if mistake is not None and mistake not in allowed:
        raise ValueError(f"mistake: {mistake!r} needs more steps than {len(steps)}")
    for _ in range(100):
        kind = mistake or rng.choice(allowed)
        if kind == "result":
            handed_in = _near(int(right), rng)
            lines = answer.rpartition("####")[0]
            return f"{lines}#### {handed_in}"
        if kind == "left out":
            new_steps = steps[:-1]
            new_results = results[:-1]
        else:
            new_steps, new_results = _mistaken(steps, results, kind, rng)
        if new_results[-1] not in (right, None):
            return _write_steps(new_steps, new_results)
    raise ValueError(f"mistake: {mistake!r} makes no other result of {answer!r}")


def _check_working(answer: str, steps: Sequence[Step], results: Sequence[int]) -> None:
    """Refuse what is neither right calculations and their result, nor a result."""
    if not steps:
        fine = re.fullmatch(r"#### [0-9]+", answer) is not None
    else:
        true = [_calculated(a, op, b) for a, op, b in steps]
        fine = true == list(results) and answer == _write_steps(steps, results)
    if not fine:
        raise ValueError(
            f"answer: must be right calculations, one a line, and #### with the last "
            f"result, or that line alone; got {answer[:60]!r}"
        )


def _allowed(steps: Sequence[Step]) -> list[str]:
    """The mistakes that can be made in so many steps."""
    if not steps:
        return ["result"]
    return [kind for kind in MISTAKES if kind != "left out" or len(steps) > 1]


def _mistaken(
    steps: Sequence[Step], results: list[int], kind: str, rng: Random
) -> tuple[list[Step], list[int | None]]:
    """One step wrong, and the later ones from there. Where a result would be no whole
    number or below 0 they cannot go on, and the last result is None; so too where
    another step has the same result, and nothing tells which of the two is used."""
    place = rng.randrange(len(steps))
    if results[:-1].count(results[place]) > 1:  # of those that can be used
        return list(steps), [None]
    a, op, b = steps[place]
    if kind == "operation":
        op = rng.choice([other for other in "+-*" if other != op])
    if kind == "number" and rng.random() < 0.5:
        a = _near(a, rng)
    elif kind == "number":
        b = _near(b, rng)
    result = _near(results[place], rng) if kind == "slip" else _calculated(a, op, b)
    new_steps = [*steps[:place], (a, op, b)]
    new_results = [*results[:place], result]
    became = {results[place]: result}
    for (a, op, b), was in zip(steps[place + 1 :], results[place + 1 :], strict=True):
        if new_results[-1] is None:
            break
        a = became.get(a, a)
        b = became.get(b, b)
        new_steps.append((a, op, b))
        new_results.append(_calculated(a, op, b))
        became[was] = new_results[-1]
    return new_steps, new_results


def _calculated(a: int, op: str, b: int) -> int | None:
    """The result, or None where it is no whole number that is 0 or more."""
    try:
        return calculate(a, op, b)
    except (ValueError, ZeroDivisionError):
        return None


def _near(number: int, rng: Random) -> int:
    """Another whole number, 0 or more: a little off, or by up to a half of it. The
    number is 0 or more itself."""
    while True:
        far = rng.randint(1, max(2, number // 2))
        off = rng.choice((1, 2, 3, 10, far)) * rng.choice((1, -1))
        if number + off >= 0:
            return number + off


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
    answer, _ = _read_answer(text)
    return answer


def _read_answer(text: str) -> tuple[Fraction | None, str]:
    """The answer and, where there is none, why."""
    _, marker, tail = text.rpartition("####")
    if not marker:
        return None, "no #### marker"
    if not tail.strip():
        return None, "nothing after ####"
    shown = repr(tail.strip()[:40])
    found = _NUMBER.fullmatch(tail.strip())
    if not found:
        return None, f"not one number after ####: {shown}"
    whole = found["whole"] or ""
    decimals = found["decimals"] or ""
    under = found["under"] or ""
    word = found["word"] or ""
    if not whole and not decimals:
        return None, f"not one number after ####: {shown}"
    if any(letter.isnumeric() for letter in word):  # 3½, say
        return None, f"not one number after ####: {shown}"
    if found["sign"] and found["late_sign"]:
        return None, "two signs"
    if len(whole) + len(decimals) > _MOST_DIGITS:
        return None, "number too long"
    if under and (decimals or len(under) > _MOST_DIGITS):
        return None, "not a simple fraction"
    value = Fraction((whole or "0").replace(",", "") + decimals)
    if under:
        if int(under) == 0:
            return None, "division by zero"
        value /= int(under)
    sign = found["sign"] or found["late_sign"]
    if sign in ("-", "\u2212"):
        value = -value
    return value, ""


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
    """The problem in one line of a file.

    Raises: ValueError with the reason why there is none.
    """
    row = {"family": "gsm8k", **_parse_row(raw)}
    for field in ("question", "answer", "family"):
        _check_text(row, field)
    steps = row.get("steps")
    if steps is None:
        steps = row["answer"].count("<<")
    if type(steps) is not int or steps < 0:  # a bool is no count
        raise ValueError("field 'steps': must be an integer, 0 or more")
    if row["family"] in SKILLS:
        gold = row["answer"].strip()
    else:
        gold, reason = _read_answer(row["answer"])
        if gold is None:
            raise ValueError(f"field 'answer': {reason}")
    return Problem(
        question=row["question"],
        gold=gold,
        family=row["family"],
        steps=steps,
        id=name,
    )


def _parse_row(raw: bytes) -> dict[str, object]:
    """The object in one line, strictly: Python's json lets more through than JSON."""
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
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, got {type(row).__name__}")
    return row


def _check_text(row: dict[str, object], field: str) -> None:
    """Refuse a field that is no text to read or to write again."""
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"field {field!r}: must be a non-empty string")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"field {field!r}: holds half of a surrogate pair")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Python's json would keep the last of two values under one key."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key twice")
    return row


def _refuse(constant: str) -> float:
    """Python's json would let NaN and the infinities through."""
    raise ValueError(f"{constant} is not a number")


def _finite(number: str) -> float:
    """Python's json would read 1e999 as infinity."""
    value = float(number)
    if math.isinf(value):
        _refuse(number[:40])
    return value


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
    """The rows of a split's file, each with its line break."""
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
