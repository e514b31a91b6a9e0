"""A reader's own functions meet the properties of ours.

    python tests/mutants.py my_losses.py

Every function in the file with the name of one of ours, and its arguments, meets all
that tests/entries.py says ours owes: golden vectors, what every loss owes, and what is
its own. The table says which it breaks, and how.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tests.entries import ENTRIES, Entry
from tests.properties import common


def load(path: Path) -> ModuleType:
    """The file as a module; what it imports from its own folder is found."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(module: ModuleType) -> dict[str, Callable]:
    """Its own: what it imports is somebody else's."""
    own = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in own if f.__module__ == module.__name__}


def meant(name: str, function: Callable) -> list[Entry]:
    """The entries that a function of this name may be held to.

    Where several of ours share a name, as `sft_loss` does, its arguments decide.
    """
    named = [entry for entry in ENTRIES if entry.function.__name__ == name]
    theirs = set(inspect.signature(function).parameters)

    def alike(entry: Entry) -> float:
        ours = set(inspect.signature(entry.function).parameters)
        return len(theirs & ours) / len(theirs | ours)

    most = max(map(alike, named), default=0)
    return [entry for entry in named if alike(entry) == most]


def lenient(function: Callable, ours: Callable) -> Callable:
    """The function, not asked about options that it does not take where ours stand at
    their defaults: a loss without `count` is a loss all the same."""
    takes = inspect.signature(function).parameters
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ours).parameters.items()
    }

    def call(*arguments, **options):
        kept = {
            name: value
            for name, value in options.items()
            if name in takes or value is not defaults.get(name)
        }
        return function(*arguments, **kept)

    return call


def complaint(check: common.Property, function: Callable) -> str:
    """What the property says of this function, in one line; nothing if it holds."""
    try:
        with common.first_failure():
            check(function)
    except Exception as failure:  # noqa: BLE001 (a reader's code may raise anything)
        lines = [line.strip() for line in str(failure).splitlines()]
        said = next((line for line in lines if line), "it fails")
        if isinstance(failure, AssertionError):
            return said
        return f"{type(failure).__name__}: {said}"
    return ""


class Verdict(NamedTuple):
    """What became of one property."""

    function: str  # of ours, such as ppo.policy_loss
    check: common.Property
    complaint: str  # nothing if it holds


def judge(path: Path) -> list[Verdict]:
    """All properties that the functions of a file were asked for."""
    found = []
    for name, function in functions_of(load(path)).items():
        for entry in meant(name, function):
            asked = lenient(function, entry.function)
            for check in entry.properties:
                found.append(Verdict(entry.name, check, complaint(check, asked)))
    return found


def show(verdict: Verdict) -> None:
    """One line; of a broken property three: its name, what it is, what came."""
    word = common.name_of(verdict.check).removeprefix("check_")
    if not verdict.complaint:
        print(f"  holds   {word}")
        return
    print(f"  BROKEN  {word}: {common.said_by(verdict.check)}")
    print(f"          {verdict.complaint[:200]}")


def main(path: Path) -> int:
    """Prints the table; 1 if a property is broken, 2 if there was nothing to judge."""
    if not path.is_file():
        print(f"error: {path} is no file", file=sys.stderr)
        return 2
    verdicts = judge(path)
    if not verdicts:
        names = ", ".join(sorted({entry.function.__name__ for entry in ENTRIES}))
        said = f"{path} has no function with the name of one of ours: {names}"
        print(f"error: {said}", file=sys.stderr)
        return 2
    for name in dict.fromkeys(verdict.function for verdict in verdicts):
        print(f"\n{name}")
        for verdict in verdicts:
            if verdict.function == name:
                show(verdict)
    broken = sum(bool(verdict.complaint) for verdict in verdicts)
    print(f"\n{path.name}: {broken} of {len(verdicts)} properties broken")
    return int(broken > 0)
