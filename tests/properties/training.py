"""What every `train` owes: resuming gives the same bits, and randomness stays apart.

A test module describes a run by a function `begin(state)` at its top level: it builds
everything anew (a model with *other* weights when the state is to bring them) and gives
the generator that `train` returns. The state says where to go on; an empty one, from
the start.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from minialign import checkpoint

Begin = Callable[[dict], Iterator[dict[str, float]]]

CONTINUE = """
import importlib, json, sys, torch
from minialign import checkpoint
torch.set_num_threads(1)
module, begin, before, after = sys.argv[1:]
state = checkpoint.load(before)
metrics = list(getattr(importlib.import_module(module), begin)(state))
checkpoint.save(after, state)
print(json.dumps(metrics))
"""


def assert_same_bits(actual, expected, where: str = "state") -> None:
    """Two states are equal in every tensor and number, not just close."""
    assert type(actual) is type(expected), f"{where}: {actual!r}, not {expected!r}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: {actual.keys()}"
        for key, value in expected.items():
            assert_same_bits(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries"
        for i, value in enumerate(expected):
            assert_same_bits(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}"
        assert torch.equal(actual, expected), f"{where} differs"
    else:
        assert actual == expected, f"{where}: {actual!r}, not {expected!r}"


def check_resume(
    begin: Begin,
    stops: Sequence[int],
    path: Path,
    load: Callable[[Path], dict] = checkpoint.load,
) -> None:
    """IO-3: stopped after any of these updates and resumed from a file: the same bits.

    Compared are the metrics of every update and, at the end, all of the state.
    """
    whole: dict = {}
    expected = list(begin(whole))
    for stop in stops:
        state: dict = {}
        metrics = list(islice(begin(state), stop))
        checkpoint.save(path, state)
        state = load(path)
        metrics += list(begin(state))
        assert metrics == expected, f"stopped after {stop}: other metrics"
        assert_same_bits(state, whole, f"stopped after {stop}: state")


def check_resume_in_new_process(begin: Begin, stop: int, folder: Path) -> None:
    """IO-3, the rest of the run in a process that has nothing but the file."""
    whole: dict = {}
    expected = list(begin(whole))
    state: dict = {}
    list(islice(begin(state), stop))
    before, after = folder / "before.pt", folder / "after.pt"
    checkpoint.save(before, state)
    names = begin.__module__, begin.__qualname__
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, *names, str(before), str(after)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected[stop:]
    assert_same_bits(checkpoint.load(after), whole)


def check_global_randomness_untouched(begin: Begin) -> None:
    """Training draws from its own generators only, and does not hang on the others."""
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        runs.append(list(begin({})))
        assert torch.equal(torch.get_rng_state(), states[0]), "torch's generator moved"
        assert random.getstate() == states[1], "Python's generator moved"
        same = zip(np.random.get_state(), states[2], strict=True)
        assert all(np.array_equal(a, b) for a, b in same), "NumPy's generator moved"
    assert runs[0] == runs[1], "the run depends on a global generator"
