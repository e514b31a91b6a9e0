"""Checkpoints: what survives a kill or a full disk, and what is refused on loading."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import stat
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign import checkpoint, course
from minialign.checkpoint import (
    CheckpointError,
    check_config,
    load,
    load_model,
    load_reward_model,
    save,
    save_model,
    save_reward_model,
)
from minialign.model import GPT, GPTConfig
from minialign.rewards import RewardModel
from minialign.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = Tokenizer([bytes([value]) for value in range(256)])
CONFIG = GPTConfig(vocab_size=260, context=16, dim=8, layers=1, heads=2, kv_heads=1)


def state_of(step):
    return {"step": step, "weights": torch.full((500,), float(step))}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.pt"


def previous(path):
    return path.with_name("run.pt.previous")


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def contents(path):
    files = (file for file in path.parent.iterdir() if file.is_file())
    return {file.name: file.read_bytes() for file in files}


# What comes back.


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b)) and type(a) is type(b)
    return type(a) is type(b) and a == b


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.lists(st.integers(0, 255), max_size=4).map(
        lambda values: torch.tensor(values, dtype=torch.uint8)
    )
    | st.lists(st.floats(-9, 9), max_size=3).map(torch.tensor)
)
STATES = st.dictionaries(
    st.text("abc", max_size=3) | st.integers(),
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@given(STATES)
def test_round_trip(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("trip") / "run.pt"
    save(path, state)
    assert same(load(path), state)


def test_the_format_as_written_down(path):
    save(path, state_of(3))
    header, _, payload = path.read_bytes().partition(b"\n")
    sha256 = hashlib.sha256(payload).hexdigest()
    expected = f"minialign-checkpoint version=1 sha256={sha256} bytes={len(payload)}"
    assert header == expected.encode()
    assert same(torch.load(io.BytesIO(payload), weights_only=True), state_of(3))


def test_generators_go_on_where_they_were(path):
    generator, chance = torch.Generator().manual_seed(1), random.Random(2)
    torch.rand(5, generator=generator), chance.random()
    save(path, {"torch": generator.get_state(), "python": chance.getstate()})
    expected = torch.rand(9, generator=generator), chance.random()
    state, other, other_chance = load(path), torch.Generator(), random.Random()
    other.set_state(state["torch"])
    other_chance.setstate(state["python"])
    assert torch.equal(torch.rand(9, generator=other), expected[0])
    assert other_chance.random() == expected[1]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Muon])
def test_training_goes_on_bit_for_bit(path, optimizer):
    def start():
        model = torch.nn.Linear(4, 4, bias=False)
        steps = optimizer(model.parameters(), lr=0.1)
        decay = torch.optim.lr_scheduler.LinearLR(steps, total_iters=9)
        return model, steps, decay, torch.Generator().manual_seed(0)

    def go(model, steps, decay, generator):
        for _ in range(5):
            steps.zero_grad()
            model(torch.randn(3, 4, generator=generator)).square().sum().backward()
            steps.step()
            decay.step()
        return model.weight.detach()

    first = start()
    go(*first)
    state = [part.state_dict() for part in first[:3]] + [first[3].get_state()]
    save(path, {"state": state})
    straight = go(*first)
    second = start()
    loaded = load(path)["state"]
    for part, part_state in zip(second[:3], loaded[:3], strict=True):
        part.load_state_dict(part_state)
    second[3].set_state(loaded[3])
    assert torch.equal(go(*second), straight)


def test_saving_draws_no_random_numbers_and_changes_nothing(path):
    state = state_of(1)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    save(path, state)
    save(path, load(path))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert same(state, state_of(1))


# What may not go in.

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value, name",
    [
        (np.float64(1), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (pathlib.Path("x"), "PosixPath"),
        (Pair(1, 2), "Pair"),
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (defaultdict(int), "defaultdict"),
        (torch.Generator(), "Generator"),
        (torch.float32, "torch.dtype"),
        (torch.nn.Parameter(torch.ones(1)), "Parameter"),
        (CONFIG, "GPTConfig"),
        (print, "builtin_function"),
    ],
)
def test_types_that_would_not_load_are_refused_with_their_place(path, value, name):
    save(path, state_of(1))
    with pytest.raises(TypeError, match=name) as caught:
        save(path, {"ok": 1, "deep": [0, {"er": (value,)}]})
    assert "state['deep'][1]['er'][0]" in str(caught.value)
    assert load(path)["step"] == 1 and names(path) == ["run.pt"]


def test_other_refusals_of_save(path):
    for state in ([1], None, Pair(1, 2)):
        with pytest.raises(TypeError, match="must be a dict"):
            save(path, state)
    with pytest.raises(TypeError, match=r"state\['a'\] has the key \(1, 2\)"):
        save(path, {"a": {(1, 2): 3}})
    assert names(path) == []
    save(path, OrderedDict(a=1))
    assert load(path) == {"a": 1}


# The older file, leftovers, and a disk that refuses.


@pytest.mark.parametrize("links", [True, False])
def test_the_two_newest_survive(path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", fail(errno.EPERM))
    for step in range(4):
        save(path, state_of(step))
        assert same(load(path), state_of(step))
        if step:
            assert same(load(previous(path)), state_of(step - 1))
    assert names(path) == ["run.pt", "run.pt.previous"]


def test_a_damaged_file_does_not_push_out_a_whole_one(path):
    for step in range(2):
        save(path, state_of(step))
    path.write_bytes(path.read_bytes()[:-1])
    save(path, state_of(2))
    assert load(path)["step"] == 2
    assert load(previous(path))["step"] == 0


def test_leftovers_of_this_file_are_removed(path):
    others = ["run.pt.tmp", "run.pt.0123.tmp", "xrun.pt.01234567.tmp", "run.tmp"]
    for name in ["run.pt.01234567.tmp", "run.pt.89abcdef.tmp", *others]:
        (path.parent / name).write_text("left over")
    save(path, state_of(1))
    assert names(path) == sorted([*others, "run.pt"])


def fail(code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return refuse


class Fault:
    """A system that refuses a save its call number `fatal`, and, where the fault is
    `lasting`, every call from then on. A file takes one KiB at a time."""

    def __init__(self, monkeypatch, fatal, code, lasting, links):
        self.fatal, self.code, self.lasting = fatal, code, lasting
        self.calls = []

        def stand_between(owner, name, call):
            def instead(*args, **kwargs):
                self.met(call)
                return true(*args, **kwargs)

            true = getattr(owner, name)
            monkeypatch.setattr(owner, name, instead)

        for name in ("fsync", "replace", "link", "unlink"):
            stand_between(os, name, name)
        stand_between(os, "open", "open folder")
        monkeypatch.setattr(checkpoint, "open", self.open, raising=False)
        monkeypatch.setattr(shutil, "copyfile", self.copy)
        if not links:
            monkeypatch.setattr(os, "link", fail(errno.EPERM))

    def met(self, call):
        self.calls.append(call)
        since = len(self.calls) - 1 - self.fatal
        if since == 0 or self.lasting and since > 0:
            fail(self.code)()

    def open(self, name, mode):
        self.met("open")
        if mode != "xb":
            return open(name, mode)
        fault = self

        class Raw(io.FileIO):
            def write(self, data):
                fault.met("write")
                return super().write(data[:1024])

        class Buffered(io.BufferedWriter):
            def flush(self):
                fault.met("flush")
                super().flush()

        return Buffered(Raw(name, "x"))

    def copy(self, source, target):
        whole = source.read_bytes()
        target.write_bytes(whole[:1024])
        self.met("copy")
        target.write_bytes(whole)


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_every_call_of_a_save_may_fail(path, monkeypatch, code, lasting, links):
    """Full disk and unwritable folder: two whole files, one line, and it goes on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow; of no use here
    refused = Counter()
    for fatal in itertools.count():
        for step in (1, 2):
            save(path, state_of(step))
        before = contents(path)
        path.with_name("run.pt.01234567.tmp").write_text("left over by a kill")
        error = None
        with monkeypatch.context() as patch:
            fault = Fault(patch, fatal, code, lasting, links)
            try:
                save(path, state_of(3))
            except CheckpointError as caught:
                error = caught
        after = contents(path)
        survived = [load(path)["step"], load(previous(path))["step"]]
        save(path, state_of(4))  # and the next save works
        assert load(path)["step"] == 4 and load(previous(path))["step"] == survived[0]
        assert names(path) == ["run.pt", "run.pt.previous"]
        if fatal == len(fault.calls):
            break  # all of them have failed once
        call = fault.calls[fatal]
        refused[call] += 1
        # It does without links, and leaves what it cannot remove to the next save.
        linkless = call == "link" and not lasting
        assert (error is None) == (linkless or call == "unlink" and fatal > 0)
        if error is None:
            assert survived == [3, 2]
        else:
            reason = f"{os.strerror(code)}; no earlier file is damaged"
            assert str(error) == f"cannot save {path}: {reason}"
            replaced = fault.calls[:fatal].count("replace")
            assert survived == [[2, 1], [3, 1], [3, 2]][replaced]
            assert replaced or after.items() >= before.items()
        if fatal > 0 and not lasting:
            assert after.keys() == before.keys()  # nothing is left lying about
    expected = {"open": 1, "flush": 2, "fsync": 2, "link": 1, "replace": 2}
    if not links:
        expected = {"open": 2, "flush": 2, "fsync": 3, "copy": 1, "replace": 2}
    expected |= {"write": len(after["run.pt"]) // 1024 + 1}
    assert refused == {**expected, "unlink": 3, "open folder": 1}


def test_an_interrupt_leaves_the_files_as_they_were(path, monkeypatch):
    save(path, state_of(1))

    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(path, state_of(2))
    assert load(path)["step"] == 1 and names(path) == ["run.pt"]


def test_everything_is_on_the_disk_before_the_name_changes(path, monkeypatch):
    save(path, state_of(1))
    calls = []

    def record(name):
        true = getattr(os, name)

        def recorded(*args):
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(*args).st_mode)
            calls.append("fsync directory" if folder else name)
            return true(*args)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "replace", "link"):
        record(name)
    save(path, state_of(2))
    assert calls == ["fsync", "link", "replace", "replace", "fsync directory"]


def test_places_where_nothing_can_be_saved(path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        save(path / "deeper", state_of(1))
    path.write_text("a file")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(path / "deeper", state_of(1))
    folder = path.with_name("folder")
    folder.mkdir()
    with pytest.raises(CheckpointError, match="s a directory"):
        save(folder, state_of(1))
    for nameless in "", path.with_name("a\0b"):
        with pytest.raises(CheckpointError, match="it names no file"):
            save(nameless, state_of(1))
        with pytest.raises(CheckpointError, match="cannot load"):
            load(nameless)
    assert names(path) == ["folder", "run.pt"]


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from minialign import checkpoint

path = Path(sys.argv[1])
previous = path.with_name(path.name + ".previous")
torch.set_num_threads(1)

def state(step, size):
    return {"step": step, "weights": torch.full((size,), float(step))}

def forked(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return child

def survivors():
    steps = []
    for file in (path, previous):
        loaded = checkpoint.load(file)
        assert loaded["weights"].eq(loaded["step"]).all()
        steps.append(loaded["step"])
    return steps

"""

AT_EACH_LINE = """
def killed_at_line(count):  # die before the count-th line of checkpoint.py
    def on_line(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def work():
        sys.settrace(on_line)
        checkpoint.save(path, state(3, 100))

    return work

by_line, littered = [], 0
while True:
    for step in (1, 2):
        checkpoint.save(path, state(step, 100))
    status = os.waitpid(forked(killed_at_line(len(by_line) + 1)), 0)[1]
    littered += any(path.parent.glob("*.tmp"))
    by_line.append(survivors())
    if status == 0:
        break
checkpoint.save(path, state(0, 1))
print(json.dumps([by_line, littered]))
"""

AT_RANDOM = """
def save_for_ever():
    step = survivors()[0]
    while True:
        step += 1
        checkpoint.save(path, state(step, 500_000))

for step in (1, 2):
    checkpoint.save(path, state(step, 1))
chance, newest, at_random, torn = random.Random(0), 2, [], 0
for _ in range(int(sys.argv[2])):
    child = forked(save_for_ever)
    while (seen := checkpoint.load(path)["step"]) == newest:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += any(path.parent.glob("*.tmp"))
    newest, older = survivors()
    at_random.append([seen, newest, older])
checkpoint.save(path, state(0, 1))
print(json.dumps([at_random, torn]))
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, SIGKILL")


def killed(script, path, *arguments):
    run = subprocess.run(
        [sys.executable, "-c", KILLED + script, str(path), *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert names(path) == ["run.pt", "run.pt.previous"]
    return json.loads(run.stdout)


@needs_fork
def test_a_kill_at_any_line_leaves_two_whole_files(path):
    by_line, littered = killed(AT_EACH_LINE, path)
    # (newest, older) as the kill moves down the lines: three states, in this order.
    stages = [by_line[0]]
    for pair in by_line:
        if pair != stages[-1]:
            stages.append(pair)
    assert stages == [[2, 1], [3, 1], [3, 2]]
    assert len(by_line) > 30
    assert littered > 5  # the kills came in the middle of it


@needs_fork
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_moment_leaves_two_whole_files(path, kills):
    at_random, torn = killed(AT_RANDOM, path, str(kills))
    assert len(at_random) == kills
    for seen, newest, older in at_random:
        assert newest >= seen  # what could be read before is not lost
        assert newest in (older + 1, older + 2)
    assert torn >= kills // 20  # of some, a file half written was left behind
    print(f"{kills} kills, {torn} of them in the middle of a file: {kills} loaded")


# Damage.


def test_torch_alone_loads_a_flipped_bit():
    buffer = io.BytesIO()
    torch.save(state_of(1), buffer)
    data = bytearray(buffer.getvalue())
    data[data.index(torch.ones(500).numpy().tobytes()) + 99] ^= 64
    silently = torch.load(io.BytesIO(bytes(data)), weights_only=True)
    assert not same(silently, state_of(1))


def test_no_damage_passes(path):
    for step in range(2):
        save(path, state_of(step))
    older = f"the older {previous(path)} is whole and could be loaded"
    data, chance = path.read_bytes(), random.Random(0)
    header = data.index(b"\n") + 1
    lengths = [*range(header + 2), *range(header, len(data), 128), len(data) - 1]
    damaged = [data[:length] for length in lengths]
    damaged += [data + b"\0", data + data, data[1:], data[header:], b"\n" + data]
    for position in [*range(header), *chance.choices(range(len(data)), k=300)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for start in range(0, len(data) - 64, 64):
        if any(data[start : start + 64]):
            damaged.append(data[:start] + bytes(64) + data[start + 64 :])
    for copy in damaged:
        assert copy != data
        path.write_bytes(copy)
        with pytest.raises(CheckpointError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"cannot load {path}: ") and message.endswith(older)
        assert "\n" not in message


def sealed(payload, version=1):
    sha256 = hashlib.sha256(payload).hexdigest()
    line = f"minialign-checkpoint version={version} sha256={sha256}"
    return f"{line} bytes={len(payload)}\n".encode() + payload


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(999), "not a minialign checkpoint"),
        (b"some text", "not a minialign checkpoint"),
        (torch_bytes({"step": 1}), "not a minialign checkpoint"),
        (sealed(torch_bytes({"step": 1}), version=2), "version 2.*reads version 1"),
        (sealed(torch_bytes({"step": 1}), version="9" * 5000), "not a minialign"),
        (sealed(torch_bytes({"step": 1})) + b"x", "damaged: .* bytes follow"),
        (sealed(torch_bytes({"step": 1})).replace(b"step", b"stop"), "its sha256"),
        (sealed(torch_bytes([1, 2])), "a list, not a dict"),
        (sealed(b"not torch's format"), "cannot load"),
        (sealed(b""), "cannot load"),
    ],
)
def test_damage_is_named(path, data, reason):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"cannot load {path}: ")
    assert message.endswith("; there is no older file") and "\n" not in message


def test_the_older_file_is_named_and_never_taken_silently(path):
    with pytest.raises(CheckpointError, match="No such file.*there is no older file"):
        load(path)
    for step in range(2):
        save(path, state_of(step))
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{previous(path)} is whole") as caught:
        load(path)
    assert isinstance(caught.value, ValueError)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{previous(path)} is whole"):
        load(path)
    assert load(previous(path))["step"] == 0
    previous(path).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{previous(path)} is damaged too"):
        load(path)
    with pytest.raises(CheckpointError, match="s a directory"):
        load(path.parent)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def test_loading_runs_nothing(path):
    marker = path.with_name("touched")
    path.write_bytes(sealed(torch_bytes({"step": Trap(marker)})))
    with pytest.raises(CheckpointError, match="cannot load"):
        load(path)
    assert not marker.exists()
    # The trap works where anything may be loaded.
    payload = path.read_bytes().partition(b"\n")[2]
    torch.load(io.BytesIO(payload), weights_only=False)
    assert marker.exists()


# Models.


def gpt(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return GPT(config, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"norm_eps": 0.01}])
def test_a_model_comes_back(path, changes):
    model = gpt(**changes)
    save_model(path, model, TOKENIZER, {"step": 7, "seed": 3})
    before = torch.get_rng_state()
    loaded, extra = load_model(path, TOKENIZER)
    assert torch.equal(torch.get_rng_state(), before)
    assert extra == {"step": 7, "seed": 3}
    assert loaded.config == model.config
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = model.logits(model(tokens))
        assert torch.equal(loaded.logits(loaded(tokens)), expected)
    save_model(path, model, TOKENIZER)
    assert load_model(path, TOKENIZER, device=torch.device("cpu"))[1] == {}
    for name, weight in loaded.named_parameters():
        assert weight.requires_grad, name


def test_another_vocabulary_is_refused(path):
    other = Tokenizer([*(bytes([value]) for value in range(256)), b"ab"])
    with pytest.raises(CheckpointError, match="vocab_size is 260.* 261 tokens"):
        save_model(path, gpt(), other)
    assert names(path) == []
    save_model(path, gpt(), TOKENIZER)
    with pytest.raises(CheckpointError, match="vocabulary") as caught:
        load_model(path, other)
    for tokenizer in (TOKENIZER, other):
        assert tokenizer.fingerprint[:12] in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_both_ways(path, value):
    save_model(path, gpt(), TOKENIZER)
    state = load(path)
    model = gpt()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[1, 2] = value
    with pytest.raises(CheckpointError, match=r"up_proj.weight is not finite"):
        save_model(path, model, TOKENIZER)
    assert same(load(path), state) and names(path) == ["run.pt"]
    state["weights"]["norm.weight"][0] = value
    save(path, state)
    with pytest.raises(CheckpointError, match=r"norm.weight is not finite"):
        load_model(path, TOKENIZER)


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda s: s["weights"].pop("norm.weight"), "norm.weight is missing"),
        (lambda s: s["weights"].update(more=torch.ones(1)), "has no weight more"),
        (
            lambda s: s["weights"].update({"norm.weight": torch.ones(1, 8)}),
            r"norm.weight is \(1, 8\) torch.float32, the model's is \(8,\)",
        ),
        (
            lambda s: s["weights"].update({"norm.weight": torch.ones(8).double()}),
            r"norm.weight is \(8,\) torch.float64",
        ),
        (lambda s: s["weights"].update({"norm.weight": 1}), "norm.weight is int"),
        (lambda s: s["config"].update(tied=True), "has no weight lm_head.weight"),
        (lambda s: s["config"].update(layers=2), "layers.1.* is missing"),
        (lambda s: s["config"].update(depth=3), "do not share depth"),
        (lambda s: s["config"].pop("rope_theta"), "do not share rope_theta"),
        (lambda s: s["config"].update(heads=3), "its config is refused: .*heads"),
        (lambda s: s["config"].update(heads="x"), "its config is refused"),
        (lambda s: s["config"].update(context=float("nan")), "its config is refused"),
        (lambda s: s.update(config=None), "not a model"),
        (lambda s: s.update(weights=[]), "not a model"),
        (lambda s: s.update(vocabulary=None), "vocabulary None"),
        (lambda s: s.pop("vocabulary"), "not a model; it holds config, weights, extra"),
        (lambda s: s.update(optimizer={}), "not a model"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(path, edit, reason):
    save_model(path, gpt(), TOKENIZER)
    state = load(path)
    edit(state)
    save(path, state)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(path, TOKENIZER)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_model_names_the_older_one(path):
    for _ in range(2):
        save_model(path, gpt(), TOKENIZER)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{previous(path)} is whole"):
        load_model(path, TOKENIZER)


def test_extras_are_plain(path):
    with pytest.raises(TypeError, match=r"state\['extra'\]\['config'\]"):
        save_model(path, gpt(), TOKENIZER, {"config": CONFIG})


# Going on under the same config.


def test_check_config_lists_every_difference():
    saved = {"lr": 0.1, "beta": 0, "family": "a", "clip": (0.2, 0.3)}
    check_config(saved, {"clip": (0.2, 0.3), "beta": 0, "lr": 0.1, "family": "a"})
    check_config({}, {})
    with pytest.raises(CheckpointError) as caught:
        check_config(saved, {"lr": 0.2, "family": "a", "clip": (0.2, 0.3), "seed": 1})
    message = str(caught.value)
    assert "lr (saved 0.1, now 0.2)" in message
    assert "beta (saved 0, now absent)" in message
    assert "seed (saved absent, now 1)" in message
    assert "family" not in message and "clip" not in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(SystemExit) as stopped:
        course.resume(tmp_path / "file" / "run.ckpt", {"lr": 0.1})
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "file" in said


def test_names_that_are_too_long_are_refused_like_any_other(tmp_path):
    with pytest.raises(CheckpointError, match="cannot load .*too long"):
        load(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda path: None, "the config differs in lr (saved 0.1, now 0.2)"),
        (lambda path: path.write_bytes(b"text"), "not a minialign checkpoint"),
        (lambda path: os.truncate(path, 1024), "damaged: "),
        (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
        (lambda path: save(path, {"a": 1}), "is not an interrupted run"),
        (lambda path: save(path, {"config": 1}), "is not an interrupted run"),
    ],
    ids=["other config", "wrong file", "truncated", "folder", "no run", "no config"],
)
def test_a_lesson_does_not_go_on_with_what_is_not_its_run(path, capsys, edit, reason):
    """One line that names the file and what can be done; exit code 2."""
    save(path, {"config": {"lr": 0.1}, **state_of(7)})
    assert course.resume(path, {"lr": 0.1})["step"] == 7
    capsys.readouterr()
    edit(path)
    before = names(path), contents(path)
    with pytest.raises(SystemExit) as stopped:
        course.resume(path, {"lr": 0.2})
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert reason in said and said.endswith(f"(remove {path} to start from nothing)\n")
    assert before == (names(path), contents(path))


# Reward models.


def rated():
    model = RewardModel(gpt())
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        model.head.weight.normal_(generator=draw)
    model.fix_scale(torch.tensor([0.5, 1.0, 3.0]))
    return model


def test_a_reward_model_comes_back_with_its_scale(path):
    model = rated()
    save_reward_model(path, model, TOKENIZER, {"pairs": 4000})
    loaded, extra = load_reward_model(path, TOKENIZER)
    assert extra == {"pairs": 4000}
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    tokens = torch.arange(10)[None]
    mask = torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(loaded(tokens, mask), model(tokens, mask))
    assert load_model(path, TOKENIZER)[0].config == model.body.config
    save_reward_model(path, model, TOKENIZER)
    assert load_reward_model(path, TOKENIZER)[1] == {}


def test_a_model_without_a_head_is_no_reward_model(path):
    save_model(path, gpt(), TOKENIZER)
    with pytest.raises(CheckpointError, match="not a reward model"):
        load_reward_model(path, TOKENIZER)


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda head: head.pop("scale"), "not a reward model"),
        (lambda head: head.update(more=torch.ones(1)), "not a reward model"),
        (lambda head: head.update({"head.weight": torch.ones(3)}), "head.weight is"),
        (lambda head: head.update(offset=torch.tensor(float("nan"))), "offset is not"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(path, edit, reason):
    save_reward_model(path, rated(), TOKENIZER)
    state = load(path)
    edit(state["extra"]["head"])
    save(path, state)
    with pytest.raises(CheckpointError, match=reason):
        load_reward_model(path, TOKENIZER)


def test_a_head_that_is_not_finite_is_not_saved(path):
    model = rated()
    with torch.no_grad():
        model.head.weight[2] = float("inf")
    with pytest.raises(CheckpointError, match="head.weight is not finite"):
        save_reward_model(path, model, TOKENIZER)
    assert names(path) == []
