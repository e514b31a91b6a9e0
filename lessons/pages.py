"""A lesson as a page: its script in Markdown, with what its cells printed and drew.

The script is the source, and its page `lessons/NN_name.md` is made from it: prose as it
stands, code fenced, what a cell printed below it, its figures in place. Outputs are
stored beside the record, each with a hash of its cell's code. So a change of prose
needs no run, and a cell that was changed since says so on the page.

    run(lesson, arguments)     run the script cell by cell and store what came
    render(lesson, local)      the page, from the script and what is stored
    complaints(lesson)         in what a committed page differs from what it is made of

In a script, `# %% tags=["setup"]`, `["plot"]` and `["record"]` fold a cell of code,
`["trials"]` folds a cell of code with what it printed, and `["folded"]` prose: each
paragraph in it that begins in bold heads a fold. A last cell with `["answers"]` holds
`**Answer 1.** ...`, which go folded below `**Exercise 1`. A paragraph that begins with
`**Figure 1.**` is the caption of the figure before it.
"""

import ast
import contextlib
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minialign import plotting

HERE = Path(__file__).resolve().parent
MARKER = re.compile(r"# %%( \[markdown\])?(?: tags=(\[.*\]))?\s*")
HEAD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)  # of a fold
CAPTION = re.compile(r"\*\*Figure \d+\.\*\* (.+?)(?:\n\n|$)", re.DOTALL)
STRIP = "The method's learning curve, and its accuracy against KL to the base"
SUMMARIES = {
    "setup": "Set-up",
    "plot": "How the figure is drawn",
    "record": "For the record",
    "trials": "Settings tried",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a percent script."""

    is_prose: bool
    tags: tuple[str, ...]
    line: int  # of its first line in the script, from 1
    source: str  # code, or prose without its leading "# "

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @property
    def is_check(self) -> bool:
        """Whether it only compares numbers of the prose with a record. Such a cell
        prints nothing and belongs to the prose: it may change without a run."""
        if self.is_prose or not self.source.startswith("course.check("):
            return False
        statements = ast.parse(self.source).body
        return all(ast.unparse(each).startswith("course.check(") for each in statements)


# --- the script ---------------------------------------------------------------------


def read_cells(path: Path) -> list[Cell]:
    """The cells of a percent script, in order.

    Raises: ValueError for text before the first cell, and prose that is no comment.
    """
    cells = []
    marker = None
    start = 0
    held: list[str] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*lines, "# %%"], start=1):
        found = MARKER.fullmatch(line)
        if not found:
            held.append(line)
            continue
        if marker is not None:
            cells.append(_cell(path, marker, start, held))
        elif any(each.strip() for each in held):
            raise ValueError(f"{path.name}: text before the first cell")
        marker = found
        start = number + 1
        held = []
    return cells


def _cell(path: Path, marker: re.Match, start: int, lines: Sequence[str]) -> Cell:
    is_prose = marker[1] is not None
    tags = tuple(json.loads(marker[2])) if marker[2] else ()
    if is_prose:
        lines = [_prose(path, start + i, line) for i, line in enumerate(lines)]
    return Cell(is_prose, tags, start, "\n".join(lines).strip("\n"))


def _prose(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    if not line.startswith("#"):
        raise ValueError(f"{path.name}, line {number}: prose must be a comment")
    return line.removeprefix("#").removeprefix(" ")


# --- running it ---------------------------------------------------------------------


def stored(lesson: str, local: bool) -> Path:
    """Where the outputs of a lesson's cells lie."""
    return (plotting.LOCAL if local else plotting.FIGURES) / f"{lesson}.cells.json"


def page(lesson: str, local: bool) -> Path:
    """Where its page lies."""
    return (plotting.LOCAL if local else HERE) / f"{lesson}.md"


class Tee(io.StringIO):
    """Keeps what is written, and shows it as it comes."""

    def __init__(self, shown: io.TextIOBase) -> None:
        super().__init__()
        self.shown = shown

    def write(self, text: str) -> int:
        self.shown.write(text)
        self.shown.flush()
        return super().write(text)


def run(lesson: str, arguments: Sequence[str]) -> Path:
    """Run the script cell by cell, with these arguments, and store what each printed
    and which figures it saved. Returns the file.

    Only standard output is kept: progress, times and places belong on standard error.

    Raises: ValueError for an output that names a place on this machine; and what the
    script raises.
    """
    path = HERE / f"{lesson}.py"
    names = {"__name__": "__main__", "__file__": str(path)}
    sys.argv = [str(path), *arguments]
    outputs = []
    for cell in read_cells(path):
        if cell.is_prose:
            continue
        before = len(plotting.SAVED)
        kept = Tee(sys.stdout)
        code = compile("\n" * (cell.line - 1) + cell.source, str(path), "exec")
        with contextlib.redirect_stdout(kept):
            exec(code, names)  # noqa: S102 (it is our own script)
        output = kept.getvalue().rstrip()
        _refuse_places(lesson, cell, output)
        if cell.is_check:
            continue
        drawn = plotting.SAVED[before:]
        figures = {saved.name: plotting.digest_of(saved) for saved in drawn}
        outputs.append({"code": cell.digest, "output": output, "figures": figures})
    local = not names["settings"].record
    file = stored(lesson, local)
    held = {"arguments": list(arguments), "cells": outputs}
    text = json.dumps(held, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def _refuse_places(lesson: str, cell: Cell, output: str) -> None:
    """A page must read the same whoever made it."""
    for place in (str(HERE.parent), str(Path.home())):
        if place in output:
            raise ValueError(
                f"{lesson}, cell at line {cell.line}: its output names {place}"
            )


# --- the page -----------------------------------------------------------------------


def render(lesson: str, local: bool = False) -> str:
    """The page as Markdown, from the script and what is stored. Nothing is run.

    `local`: from figures/local/, as a reader's own run left it there.
    """
    path = HERE / f"{lesson}.py"
    cells = read_cells(path)
    file = stored(lesson, local)
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    known = {} if held is None else {each["code"]: each for each in held["cells"]}
    places = [] if held is None else held["cells"]
    answers = _answers(cells)
    blocks = [_heading_note(lesson, held, local)]
    setup: list[str] = []  # code of the cells of set-up just before
    position = 0
    for cell in cells:
        if "answers" in cell.tags:
            continue
        if cell.is_prose:
            setup = []
            folded = "folded" in cell.tags
            prose = _folds(cell.source) if folded else cell.source
            blocks.append(_with_answers(prose, answers))
            continue
        # Cells of set-up that follow each other and print nothing share one fold.
        is_setup = "setup" in cell.tags
        if is_setup and setup:
            blocks.pop()
        setup = [*setup, cell.source] if is_setup else []
        code = "\n\n".join(setup) if is_setup else cell.source
        parts = [f"```python\n{code}\n```"]
        if cell.is_check:
            blocks += _tucked(cell, parts)
            continue
        output = known.get(cell.digest)
        if output is None and position < len(places):
            parts.append("> **Stale:** this is of an earlier version of the cell.")
            output = places[position]
        if output is not None:
            parts += _shown(output, _caption(cells, cell), local)
        if len(parts) > 1:
            setup = []
        blocks += _tucked(cell, parts)
        position += 1
    blocks.append(_next(lesson, local))
    # The note stands below the title, which is the first line of the first cell.
    title, _, rest = blocks[1].partition("\n")
    blocks[:2] = [title, blocks[0], rest.strip("\n")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _heading_note(lesson: str, held: dict | None, local: bool) -> str:
    folder = "../../lessons/" if local else ""
    note = f"*This page is made from [{lesson}.py]({folder}{lesson}.py)"
    if held is None:
        return note + "; the script has not been run for it yet.*"
    return note + f", run with `{' '.join(held['arguments'])}`.*"


def _tucked(cell: Cell, parts: list[str]) -> list[str]:
    """Code and what came of it, with what the cell's tag folds put away."""
    code, *shown = parts
    for tag, summary in SUMMARIES.items():
        if tag in cell.tags:
            if tag == "trials":
                return [_folded(summary, "\n\n".join(parts))]
            return [_folded(summary, code), *shown]
    return parts


def _folds(prose: str) -> str:
    """Prose in which each paragraph that begins in bold heads a fold of its own."""
    blocks: list[list[str]] = []
    for paragraph in prose.split("\n\n"):
        if HEAD.match(paragraph) or not blocks:
            blocks.append([])
        blocks[-1].append(paragraph)
    found = []
    for block in blocks:
        head = HEAD.match(block[0])
        if head is None:
            found.append("\n\n".join(block))
            continue
        summary = " ".join(head[1].split())
        block[0] = block[0][head.end() :].lstrip()
        found.append(_folded(summary, "\n\n".join(filter(None, block))))
    return "\n\n".join(found)


def _folded(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _shown(output: dict, caption: str, local: bool) -> list[str]:
    """What a cell printed, and the figures it saved."""
    blocks = []
    if output["output"]:
        blocks.append(f"```text\n{output['output']}\n```")
    folder = "" if local else "../figures/"
    for name in output["figures"]:
        alt = STRIP if name.endswith("_strip.png") else caption
        blocks.append(f"![{alt}]({folder}{name})")
    return blocks


def _next(lesson: str, local: bool) -> str:
    """Where the course goes on: to the lesson that comes after, by number."""
    lessons = sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))
    after = [other for other in lessons if other > lesson]
    if not after:
        return ""
    title = read_cells(HERE / f"{after[0]}.py")[0].source.partition("\n")[0]
    folder = "../../lessons/" if local else ""
    end = "md" if page(after[0], local=False).exists() else "py"
    return f"**Next:** [{title.lstrip('# ')}]({folder}{after[0]}.{end})"


def _caption(cells: Sequence[Cell], cell: Cell) -> str:
    """What a figure is called to those who cannot see it: its caption, plain."""
    after = cells[cells.index(cell) + 1 :]
    for other in after:
        found = CAPTION.search(other.source)
        if other.is_prose and found:
            return " ".join(re.sub(r"[*`\[\]]", "", found[1]).split())
    title = cells[0].source.partition("\n")[0]
    return title.lstrip("# ") + ": its figure"


def _answers(cells: Sequence[Cell]) -> dict[str, str]:
    """{number of the exercise: its answer}."""
    found = {}
    for cell in cells:
        if "answers" in cell.tags:
            parts = re.split(r"\*\*Answer (\d+)\.\*\* ?", cell.source)
            found |= dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
    return found


def _with_answers(prose: str, answers: dict[str, str]) -> str:
    """Prose, with each answer folded below its exercise."""
    paragraphs = []
    for paragraph in prose.split("\n\n"):
        paragraphs.append(paragraph)
        exercise = re.match(r"\*\*Exercise (\d+)\b", paragraph)
        if exercise and exercise[1] in answers:
            paragraphs.append(_folded("Answer", answers[exercise[1]]))
    return "\n\n".join(paragraphs)


# --- whether it is as it should be --------------------------------------------------


def complaints(lesson: str) -> list[str]:
    """In what a committed page differs from its script, its outputs and its figures."""
    found = []
    if page(lesson, local=False).read_text(encoding="utf-8") != render(lesson):
        found.append(f"{lesson}: the page is not what its script makes now")
    file = stored(lesson, local=False)
    if not file.exists():
        return [*found, f"{lesson}: no outputs are stored"]
    held = json.loads(file.read_text(encoding="utf-8"))
    outputs = held["cells"]
    cells = read_cells(HERE / f"{lesson}.py")
    codes = [cell for cell in cells if not cell.is_prose and not cell.is_check]
    digests = [cell.digest for cell in codes]
    if [each["code"] for each in outputs] != digests:
        ran = {each["code"] for each in outputs}
        stale = [cell.line for cell in codes if cell.digest not in ran]
        found.append(f"{lesson}: cells were changed since they ran, at lines {stale}")
    figures = {}
    for output in outputs:
        figures |= output["figures"]
    for name, digest in figures.items():
        if plotting.digest_of(plotting.FIGURES / name) != digest:
            found.append(f"{lesson}: {name} is not the figure of these outputs")
    return found


def is_stale(lesson: str) -> bool:
    """Whether there is a page, and it should be made again."""
    return page(lesson, local=False).exists() and bool(complaints(lesson))
