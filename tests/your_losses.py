"""A reader's own functions meet the properties of ours.

    python tests/mutants.py my_losses.py

Every function in the file with the name and the arguments of one of ours meets all that
tests/entries.py says ours owes: golden vectors, what every loss owes, and what is its
own. The table says which hold and which are broken, and how. An option that a function
does not take is not asked about. Whether it looks at its inputs is said apart: a loss
that lets a wrong shape pass may still be right.
"""

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tests.entries import ENTRIES, Entry
from tests.mutants import BLIND
from tests.properties import common, vectors

NAMES = sorted({entry.function.__name__ for entry in ENTRIES})
HOLDS, BROKEN, SKIPPED, LAX = "holds", "BROKEN", "skipped", "lax"


class NotTakenError(Exception):
    """A property sets an option that the reader's function does not have."""


class Verdict(NamedTuple):
    """What became of one property, and what it said."""

    function: str  # of ours, such as ppo.policy_loss
    check: common.Property
    outcome: str
    said: str = ""


def load(path: Path) -> ModuleType:
    """The file as a module; what it imports from its own folder is found."""
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(f"yours_{path.stem}", path)
    if spec is None:
        raise ImportError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def functions_of(module: ModuleType) -> dict[str, Callable]:
    """Its own: what it imports is somebody else's."""
    own = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in own if f.__module__ == module.__name__}


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def meant(name: str, function: Callable) -> list[Entry]:
    """The entries that a function of this name may be held to.

    Where several of ours share a name, as `sft_loss` does, its arguments decide.
    """
    named = [entry for entry in ENTRIES if entry.function.__name__ == name]
    theirs = set(parameters(function))

    def alike(entry: Entry) -> float:
        ours = set(parameters(entry.function))
        return len(theirs & ours) / len(theirs | ours)

    most = max(map(alike, named), default=0)
    return [entry for entry in named if alike(entry) == most]


def missing_arguments(function: Callable, ours: Callable) -> list[str]:
    """Arguments of ours that have no default, and that it does not take."""
    takes = parameters(function)
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return []
    needed = parameters(ours).values()
    return [x.name for x in needed if x.default is x.empty and x.name not in takes]


def lenient(function: Callable, ours: Callable) -> Callable:
    """The function, without the options that it does not take where ours stand at their
    defaults: a loss without `count` is a loss all the same."""
    takes = parameters(function)
    anything = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    defaults = {name: each.default for name, each in parameters(ours).items()}

    def call(*arguments, **options):
        kept = {}
        for name, value in options.items():
            default = defaults.get(name, inspect.Parameter.empty)
            if anything or name in takes:
                kept[name] = value
            elif value is not default and value != default:
                raise NotTakenError(name)
        return function(*arguments, **kept)

    return call


def what_failed(failure: BaseException) -> str:
    """In one line: the first that it says, and by how much; or the line that failed."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if not lines:
        return traceback.extract_tb(failure.__traceback__)[-1].line
    said = lines[0]
    for line in lines[1:]:
        if line.startswith(("Expected", "Greatest absolute")):
            said += f" {line}"
            break
    if isinstance(failure, AssertionError):
        return said
    return f"{type(failure).__name__}: {said}"


def verdict(entry: Entry, check: common.Property, test: Callable) -> Verdict:
    """What becomes of a property when this test of it is run."""
    broken = LAX if common.name_of(check) in BLIND else BROKEN
    try:
        with common.first_failure():
            test()
    except NotTakenError as option:
        return Verdict(entry.name, check, SKIPPED, f"you have no `{option}`")
    except Exception as failure:  # noqa: BLE001 (a reader's code may raise anything)
        return Verdict(entry.name, check, broken, what_failed(failure))
    return Verdict(entry.name, check, HOLDS)


def golden_verdict(entry: Entry, check: common.Property, function: Callable) -> Verdict:
    """Case by case: those with options that it does not take are passed over, and a
    wrong number is said before a gradient that should not be."""
    called = vectors.adapted(entry.name, function)
    found = []
    for case in vectors.cases(entry.name):

        def test(case=case):
            vectors.check_case(called, entry.name, case)

        found.append(verdict(entry, check, test))
    count = Counter(each.outcome for each in found)
    wrong = [each for each in found if each.outcome == BROKEN]
    wrong.sort(key=lambda each: "should be a constant" in each.said)
    if wrong:
        cases = f"{len(wrong)} of {len(found)} cases; {wrong[0].said}"
        return wrong[0]._replace(said=cases)
    if count[HOLDS] == 0:
        return found[0]
    passed_over = f"{count[SKIPPED]} cases passed over" if count[SKIPPED] else ""
    return Verdict(entry.name, check, HOLDS, passed_over)


def judge(function: Callable, entry: Entry) -> Iterator[Verdict]:
    """All properties that a function is asked for."""
    asked = lenient(function, entry.function)
    for check in entry.properties:
        if common.name_of(check) == "check_golden_vectors":
            yield golden_verdict(entry, check, asked)
        else:
            yield verdict(entry, check, lambda check=check: check(asked))


def show(found: Verdict) -> None:
    """One line; of a broken property two more: what it is, and what came."""
    word = common.name_of(found.check).removeprefix("check_").replace("_", " ")
    aside = (
        f" ({found.said})" if found.said and found.outcome in (SKIPPED, HOLDS) else ""
    )
    print(f"  {found.outcome:8}{word}{aside}")
    if found.outcome in (BROKEN, LAX):
        print(f"          {common.said_by(found.check)}")
        print(f"          {found.said[:200]}")


def not_judged(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1)
    return f"{name} (did you mean {near[0]}?)" if near else name


def refuse(path: Path, why: object) -> int:
    print(f"error: {path}: {why}", file=sys.stderr)
    return 2


def main(path: Path) -> int:
    """Prints the table; 1 if a property is broken, 2 if there was nothing to judge."""
    if not path.is_file():
        return refuse(path, "no such file")
    try:
        module = load(path)
    except (Exception, SystemExit) as failure:  # noqa: BLE001 (it is the reader's code)
        return refuse(path, f"cannot be imported: {type(failure).__name__}: {failure}")
    outcomes = Counter()
    others = []
    for name, function in functions_of(module).items():
        entries = meant(name, function)
        if not entries:
            others.append(not_judged(name))
        for entry in entries:
            print(f"\n{entry.name}")
            missing = missing_arguments(function, entry.function)
            if missing:
                takes = f"takes {', '.join(parameters(function))}"
                outcomes[BROKEN] += 1
                print(f"  BROKEN  it {takes}; ours also {', '.join(missing)}")
                continue
            for found in judge(function, entry):
                show(found)
                outcomes[found.outcome] += 1
    if others:
        print(f"\nNot judged, for none of ours is called so: {', '.join(others)}")
    if not outcomes:
        return refuse(path, f"no function has the name of one of ours: {NAMES}")
    print(
        f"\n{path.name}: {outcomes[BROKEN]} properties broken, {outcomes[HOLDS]} hold"
    )
    if outcomes[LAX]:
        print(
            "lax: it does not look at its inputs, and computes something all the same"
        )
    return int(outcomes[BROKEN] > 0)
