"""Two pages that are made from the lessons: the table of contents and the cheatsheet.

    contents()      lessons/README.md: question, command, what to look at, what to turn
    cheatsheet()    lessons/cheatsheet.md: a row a method, from its `Card:` block
    python -m lessons contents    writes both

The first cell of a lesson holds `**Question.**`, `**Look at:**` and `**Turn first:**`.
A card stands in the docstring of an algorithm, or in the prose of a lesson whose method
has no file of its own:

    Card: NAME (arXiv numbers)
        data: ...
        policy: ...
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lessons import pages
from minialign import course, plotting

HERE = Path(__file__).resolve().parent
ALGORITHMS = HERE.parent / "minialign" / "algorithms"
DECADES = {
    "0": "Foundations",
    "1": "Learning from rewards",
    "2": "Where feedback comes from",
    "3": "Preferences and rankings",
    "4": "Fixed piles of answers",
    "8": "Theory",
    "9": "Comparison, and a museum",
}
FIELDS = {  # of a card, with their headings
    "data": "data",
    "policy": "policy",
    "comparison": "compared with",
    "credit": "unit of credit",
    "reference": "reference, KL",
    "loss": "loss",
}
INTRODUCTION = """\
Each lesson is a script, and a page made of it with all that it printed and drew. Read
them in this order, or go by what a lesson names under *Read before*, which only ever
points backwards. The [cheatsheet](cheatsheet.md) has all methods in one table."""
SYMBOLS = """\
Every loss is minimised, and its mean over problems is understood. s = log π(y|x) is the
sum over the n tokens of an answer y, its end included, and p = s/n their mean. With
d = s − s_ref, the reward less the price of KL is R = r − β d; it is a constant, like
advantages A, baselines b and weights: no gradient flows through them. h = d_w − d_l
belongs to a pair, chosen less rejected. ρ_t = π_t/π_old,t is the ratio of a token.

*Policy*: **on**, if the answers are drawn from the policy that learns; **near**, if
from a slightly older one; **off**, if from elsewhere. Formulas follow the papers. Where
the authors' code differs, the method's file says so."""
HAND = """\
What each method, as its lesson runs it, puts on ∇ log π of the four answers that every
lesson weighs, scaled to a largest weight of 1. The first two earn 1, the others 0."""


@dataclass(frozen=True)
class Card:
    """What there is to know of a method at a glance."""

    name: str
    fields: dict[str, str]
    home: str  # the file it stands in, from lessons/


# --- table of contents --------------------------------------------------------------


def contents() -> str:
    """lessons/README.md as Markdown."""
    blocks = ["# The course", INTRODUCTION]
    lessons = course.titles(HERE)
    for digit, title in DECADES.items():
        rows = [_row(lesson) for lesson in lessons if lesson.startswith(digit)]
        if not rows:
            continue
        heads = ["lesson", "question", "command", "look at", "turn first"]
        table = [heads, ["---"] * len(heads), *rows]
        blocks += [f"## {title}", "\n".join(map(_line, table))]
    return "\n\n".join(blocks) + "\n"


def _row(lesson: str) -> list[str]:
    _, question = course.titles(HERE)[lesson]
    header = pages.read_cells(HERE / f"{lesson}.py")[0].source
    number, _, name = lesson.partition("_")
    end = "md" if (HERE / f"{lesson}.md").exists() else "py"
    return [
        f"[{number} {name.replace('_', ' ')}]({lesson}.{end})",
        question,
        f"`python -m lessons {number}`",
        labelled(header, "Look at"),
        labelled(header, "Turn first"),
    ]


def labelled(header: str, label: str) -> str:
    """What follows `**label:**` in a lesson's first cell, up to the next paragraph.

    Raises: ValueError where there is none.
    """
    found = re.search(rf"\*\*{label}:\*\* (.+?)(?:\n\n|\Z)", header, re.DOTALL)
    if found is None:
        raise ValueError(f"no **{label}:** in the header that begins {header[:40]!r}")
    return " ".join(found[1].split()).removesuffix(".")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- cheatsheet ---------------------------------------------------------------------


def cheatsheet() -> str:
    """lessons/cheatsheet.md as Markdown."""
    heads = ["method", *FIELDS.values()]
    table = [heads, ["---"] * len(heads)]
    for card in cards():
        values = list(card.fields.values())
        values[-1] = _code(values[-1])  # the loss
        table.append([f"[{card.name}]({card.home})", *values])
    weights = [["method", *course.HAND_ANSWERS], ["---"] * 5]
    for name, row in _hand_rows().items():
        largest = max(abs(weight) for weight in row) or 1.0
        weights.append([name, *(f"{weight / largest:+.2f}" for weight in row)])
    methods = "\n".join(map(_line, table))
    answers = "\n".join(map(_line, weights))
    blocks = ["# Cheatsheet", SYMBOLS, methods, "## The four answers", HAND, answers]
    return "\n\n".join(blocks) + "\n"


def _code(formula: str) -> str:
    """A formula as code, words as they are; a bar would end the cell."""
    escaped = formula.replace("|", "\\|")
    return f"`{escaped}`" if re.search("[−Σσ²]", formula) else escaped


def _hand_rows() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for lesson in course.titles(HERE):
        for run in plotting.load_record(lesson).values():
            found |= run.get("hand", {})
    return found


def cards() -> list[Card]:
    """Every method's card, in the order of the lessons that teach them."""
    found: dict[str, list[Card]] = {}
    for path in sorted(ALGORITHMS.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lesson = re.search(r"lessons/(\d\d\w+)\.py", doc)
        home = f"../minialign/algorithms/{path.name}"
        if lesson:
            found.setdefault(lesson[1], []).extend(_read_cards(doc, home))
    for lesson in course.titles(HERE):
        for cell in pages.read_cells(HERE / f"{lesson}.py"):
            if cell.is_prose:
                cards_of = _read_cards(cell.source, f"{lesson}.py")
                found.setdefault(lesson, []).extend(cards_of)
    return [card for lesson in sorted(found) for card in found[lesson]]


def _read_cards(text: str, home: str) -> Iterator[Card]:
    """The cards in a text. Raises: ValueError for one that lacks a field."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        head = re.match(r"( *)Card: (.+)", line)
        if head is None:
            continue
        margin = len(head[1]) + 4
        fields: dict[str, str] = {}
        for following in lines[number + 1 :]:
            found = re.match(rf" {{{margin}}}(\w+): (.+)", following)
            if found is None:
                break
            fields[found[1]] = found[2]
        if list(fields) != list(FIELDS):
            raise ValueError(f"{home}: the card of {head[2]} has the fields {fields}")
        yield Card(head[2].partition(" (")[0], fields, home)


def write() -> list[Path]:
    """Write both pages."""
    written = {"README.md": contents(), "cheatsheet.md": cheatsheet()}
    for name, text in written.items():
        (HERE / name).write_text(text, encoding="utf-8")
    return [HERE / name for name in written]
