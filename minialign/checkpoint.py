"""Checkpoints that survive a kill, and refuse to load when they did not.

A file is one ASCII line (format, version, sha256 and length of what follows) and then
what `torch.save` wrote. The sha256 is there because `torch.load` accepts a flipped bit
inside a weight without a word. The file before the last stays as `<name>.previous`.

    save(path, state)                  any dict of plain types and tensors
    state = load(path)                 that dict on the CPU, or a CheckpointError
    save_model(path, model, tokenizer) the weights, and what they mean
    save_reward_model(...)             the same, with the head and scale of a reward
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import secrets
import shutil
from collections import OrderedDict
from pathlib import Path

import torch

from minialign.model import GPT, GPTConfig
from minialign.rewards import RewardModel
from minialign.tokenizer import Tokenizer

VERSION = 1
HEADER = "minialign-checkpoint version={} sha256={} bytes={}\n"
HEADER_LINE = re.compile(
    r"minialign-checkpoint version=(?P<version>\d{1,9}) "
    r"sha256=(?P<sha256>[0-9a-f]{64}) bytes=(?P<bytes>\d{1,18})"
)
PLAIN = (torch.Tensor, str, int, float, bool, type(None))


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used here; the message says why."""


def save(path: str | Path, state: dict) -> None:
    """Write the state so that at every instant a whole checkpoint is on the disk.

    The new file is complete before it takes the name, and the file that had the name
    becomes `<name>.previous`, if it is whole. One process writes to one path.

    Raises: TypeError naming the entry that is not a tensor, number, string, None or
        dict, list or tuple of these; CheckpointError when the disk refuses.
    """
    if type(state) not in (dict, OrderedDict):
        raise TypeError(f"save: state is {type(state).__name__}; it must be a dict")
    _check_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    sha256 = hashlib.sha256(payload).hexdigest()
    header = HEADER.format(VERSION, sha256, len(payload)).encode()
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise CheckpointError(f"cannot save {str(path)!r}: it names no file")
    # In the same directory: a rename is atomic only within one file system.
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    spare = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _remove_leftovers(path)
        with open(new, "xb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        kept = _second_name(path, spare)
        os.replace(new, path)
        if kept:
            os.replace(spare, _previous(path))
        _sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {path}: {error.strerror or error}; no earlier file is damaged"
        ) from error
    finally:
        for temporary in (new, spare):
            with contextlib.suppress(OSError):
                temporary.unlink()


def load(path: str | Path) -> dict:
    """Read a state, its tensors on the CPU, after checking its length and its sha256.

    Raises: CheckpointError naming the file, what is wrong with it, and the older file
        that could be loaded instead. Which to use is the caller's decision.
    """
    path = Path(path)
    try:
        payload = _read_payload(path)
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"it holds a {type(state).__name__}, not a dict")
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise CheckpointError(
            f"cannot load {path}: {reason.splitlines()[0]}; {_older(path)}"
        ) from error
    return state


def save_model(
    path: str | Path, model: GPT, tokenizer: Tokenizer, extra: dict | None = None
) -> None:
    """Write a model with its config, the vocabulary it speaks and plain extras.

    Raises: CheckpointError when a weight is not finite or the vocabulary sizes
        disagree, and as `save`. Nothing is written then.
    """
    if model.config.vocab_size != tokenizer.n_vocab:
        raise CheckpointError(
            f"cannot save {path}: the model's vocab_size is {model.config.vocab_size}, "
            f"the tokenizer has {tokenizer.n_vocab} tokens"
        )
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"cannot save {path}: {name} is not finite")
    state = {
        "config": dataclasses.asdict(model.config),
        "vocabulary": tokenizer.fingerprint,
        "weights": weights,
        "extra": {} if extra is None else extra,
    }
    save(path, state)


def load_model(
    path: str | Path, tokenizer: Tokenizer, device: str | torch.device = "cpu"
) -> tuple[GPT, dict]:
    """The model that `save_model` wrote, and its extras.

    Raises: CheckpointError when the file was written with another vocabulary, config
        fields, parameter names or shapes, or a weight is not finite; and as `load`.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"cannot load {path}: {reason}")

    state = load(path)
    no_model = f"not a model; it holds {', '.join(map(str, state))}"
    if set(state) != {"config", "vocabulary", "weights", "extra"}:
        raise refuse(no_model)
    if not isinstance(state["config"], dict) or not isinstance(state["weights"], dict):
        raise refuse(no_model)
    if state["vocabulary"] != tokenizer.fingerprint:
        raise refuse(
            f"made with the vocabulary {str(state['vocabulary'])[:12]}..., the "
            f"tokenizer has {tokenizer.fingerprint[:12]}..."
        )
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    if set(state["config"]) != fields:
        odd = sorted(fields ^ set(state["config"]))
        raise refuse(f"GPTConfig and the saved config do not share {', '.join(odd)}")
    try:
        # Its own generator: loading draws nothing from the caller's.
        model = GPT(GPTConfig(**state["config"]), generator=torch.Generator())
    except Exception as error:  # absurd sizes end in torch, each in its own way
        reason = (str(error) or repr(error)).splitlines()[0]
        raise refuse(f"its config is refused: {reason}") from error
    misfit = _first_misfit(state["weights"], model.state_dict())
    if misfit:
        raise refuse(misfit)
    model.load_state_dict(state["weights"])
    return model.to(device), state["extra"]


def save_reward_model(
    path: str | Path,
    model: RewardModel,
    tokenizer: Tokenizer,
    extra: dict | None = None,
) -> None:
    """Write a reward model: its body as any model, and its head and scale beside it.

    Raises: as `save_model`.
    """
    own = {name: x.cpu() for name, x in model.state_dict().items()}
    head = {name: x for name, x in own.items() if not name.startswith("body.")}
    for name, number in head.items():
        if not number.isfinite().all():
            raise CheckpointError(f"cannot save {path}: {name} is not finite")
    more = {} if extra is None else extra
    save_model(path, model.body, tokenizer, {"head": head, "extra": more})


def load_reward_model(
    path: str | Path, tokenizer: Tokenizer, device: str | torch.device = "cpu"
) -> tuple[RewardModel, dict]:
    """The reward model that `save_reward_model` wrote, and its extras.

    Raises: as `load_model`; CheckpointError for a model that has no such head.
    """
    body, extra = load_model(path, tokenizer, device)
    model = RewardModel(body)
    names = [name for name in model.state_dict() if not name.startswith("body.")]
    head = extra.get("head")
    if not isinstance(head, dict) or sorted(head) != sorted(names):
        raise CheckpointError(f"cannot load {path}: not a reward model, it has no head")
    misfit = _first_misfit(head, {name: model.state_dict()[name] for name in names})
    if misfit:
        raise CheckpointError(f"cannot load {path}: {misfit}")
    model.load_state_dict(model.state_dict() | head)
    return model, extra["extra"]


def _first_misfit(weights: dict, expected: dict[str, torch.Tensor]) -> str | None:
    """Why these weights are not those of a model that has the expected ones."""
    for name in [*expected, *weights]:
        if name not in weights:
            return f"the weight {name} is missing"
        if name not in expected:
            return f"the model has no weight {name}"
        saved_shape = _shape(weights[name])
        model_shape = _shape(expected[name])
        if saved_shape != model_shape:
            return f"{name} is {saved_shape}, the model's is {model_shape}"
        if not weights[name].isfinite().all():
            return f"{name} is not finite"
    return None


def check_config(saved: dict, current: dict) -> None:
    """Refuse to go on under another config than the run was started with.

    Raises: CheckpointError listing every key that differs, with both values.
    """
    differences = []
    for key in {**saved, **current}:
        before = repr(saved[key]) if key in saved else "absent"
        now = repr(current[key]) if key in current else "absent"
        if before != now:
            differences.append(f"{key} (saved {before}, now {now})")
    if differences:
        raise CheckpointError(f"the config differs in {', '.join(differences)}")


def _shape(weight: object) -> str:
    """Shape and dtype; of what is no tensor, its type."""
    if not isinstance(weight, torch.Tensor):
        return type(weight).__name__
    return f"{tuple(weight.shape)} {weight.dtype}"


def _check_plain(value: object, where: str) -> None:
    """Refuse now what `torch.load(weights_only=True)` would refuse too late."""
    # Exact types: numpy.float64 is a float and a NamedTuple a tuple, yet neither loads.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"save: {where} has the key {key!r}; use str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in PLAIN:
        raise TypeError(
            f"save: {where} is {type(value).__module__}.{type(value).__qualname__}; "
            "allowed are tensors, numbers, strings, None, and dicts, lists and tuples"
        )


def _read_payload(path: Path) -> bytes:
    """What follows the header, if all of it is as it was written."""
    data = path.read_bytes()
    if not data:
        raise CheckpointError("the file is empty")
    line, _, payload = data.partition(b"\n")
    header = HEADER_LINE.fullmatch(line[:200].decode("ascii", errors="replace"))
    if not header:
        raise CheckpointError("not a minialign checkpoint")
    version = int(header["version"])
    length = int(header["bytes"])
    if version != VERSION:
        raise CheckpointError(
            f"format version {version}; this code reads version {VERSION}"
        )
    if len(payload) != length:
        raise CheckpointError(
            f"damaged: {len(payload)} bytes follow the header, {length} were written"
        )
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise CheckpointError("damaged: the content does not match its sha256")
    return payload


def _is_whole(path: Path) -> bool:
    """Can the file be read, and is its content as it was written?"""
    try:
        _read_payload(path)
    except (OSError, CheckpointError):
        return False
    return True


def _previous(path: Path) -> Path:
    """Where the file before the last lies."""
    return path.parent / f"{path.name}.previous"


def _older(path: Path) -> str:
    """What is known of the older file, for the message of a failed load."""
    previous = _previous(path)
    if not os.path.exists(previous):  # Path.exists may raise PermissionError
        return "there is no older file"
    if _is_whole(previous):
        return f"the older {previous} is whole and could be loaded"
    return f"the older {previous} is damaged too"


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of earlier saves to this path that were killed."""
    temporary = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")
    for file in path.parent.glob("*.tmp"):
        if temporary.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _second_name(path: Path, spare: Path) -> bool:
    """Name the file `spare` too. A damaged one must not push out a whole one: False."""
    if not _is_whole(path):
        return False
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, spare)
        with open(spare, "rb+") as file:
            os.fsync(file.fileno())
    return True


def _sync_directory(directory: Path) -> None:
    """Make the rename itself last. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
