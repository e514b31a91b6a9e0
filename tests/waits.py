"""Where Python waits for a GPU, counted on the one that is not there.

    with other_device(), counted() as watch:
        next(steps)
    print(*watch.waits, sep="\n")  # algorithms/rloo.py:168 > sampling.py:70: int

A GPU works through what it is told while Python goes on to tell it more. Whoever reads
a number off it waits until all of that is done, and then it has nothing to do until it
is told again. So does whoever needs to know how large a result is (`nonzero`, an index
of bools), and whoever copies memory from one device to the other, either way.

Two modes of torch look on. One sees the calls that Python code makes: it knows what
moves, and to which side. The other sees the operations inside a call, those of autograd
among them. These meet tensors of the CPU only, so what an operation makes is taken to
lie there if anything that it was given does.

A real GPU says the same with `torch.cuda.set_sync_debug_mode("warn")`. Not known here
are waits for free memory, and what an operation that is in no list below does inside.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode

import minialign
from tests.other_device import device_of, lies_there, name_of, tensors_in

LIBRARY = Path(minialign.__file__).parent

# Calls that make of what they are given something that may lie on the other side.
MOVES = {
    "array",
    "as_tensor",
    "cpu",
    "cuda",
    "new_tensor",
    "numpy",
    "tensor",
    "to",
    "tolist",
    "type_as",
}

# Operations that look at numbers on the GPU, to return one or to size their result.
LOOKS = {
    "_local_scalar_dense",  # item, bool, int, float, and what reads its arguments
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_scatter_backward",  # it selects with the mask
    "masked_select",
    "multinomial",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}

Far = Callable[[Tensor], bool]  # whether a tensor lies there
BY_DEVICE = "_group_tensors_by_device_and_dtype"
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Wait:
    """One wait: the call that waits, and the lines of minialign that led to it."""

    call: str
    lines: tuple[tuple[str, int], ...]  # file and line, the innermost last

    def __str__(self) -> str:
        places = [f"{file}:{line}" for file, line in self.lines]
        return f"{' > '.join(places)}: {self.call}"


@dataclass
class Watch:
    """What was seen so far, and what the two modes say of the call that is made now."""

    waits: list[Wait] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # of torch, by name
    call: str = ""
    silent: bool = False  # on a GPU this call would not look
    made: dict = field(default_factory=dict)  # memory that the call made there, by id

    def begin(self, call: str, silent: bool) -> None:
        self.call = call
        self.silent = silent
        self.made = {}

    def far(self, tensor: Tensor) -> bool:
        """Whether it lies there, or would, had the call not been made on the CPU."""
        return lies_there(tensor) or id(tensor.untyped_storage()) in self.made

    def made_of(self, given: list[Tensor], result: object) -> None:
        """What an operation makes lies where what it was given does."""
        if any(map(self.far, given)):
            came_in = {id(tensor.untyped_storage()) for tensor in given}
            for tensor in tensors_in([result]):
                memory = tensor.untyped_storage()
                if id(memory) not in came_in:
                    self.made[id(memory)] = memory

    def add(self, times: int, operation: str = "") -> None:
        """Note that many waits, at the lines that are being executed now."""
        if times and not self.silent:
            shown = operation.strip("_")
            same = not shown or shown in (self.call, "local_scalar_dense")
            call = self.call if same else f"{self.call} ({shown})"
            self.waits += [Wait(call, lines_of_ours())] * times


@contextmanager
def counted() -> Iterator[Watch]:
    """The waits of what is done while this is open, on a device that is not there."""
    watch = Watch()
    stand_in = mock.patch.object(clip_grad, BY_DEVICE, grouped)
    with stand_in, Calls(watch), Operations(watch):
        yield watch


def grouped(tensors: list, with_indices: bool = False) -> dict:
    """`clip_grad_norm_` asks by device; torch answers with where memory really lies."""
    groups = _group_tensors_by_device_and_dtype(tensors, with_indices)
    return {
        (device_of(group[0][0]), dtype): (group, indices)
        for (_, dtype), (group, indices) in groups.items()
    }


class Calls(TorchFunctionMode):
    """Sees every call of torch that Python code makes, and what moves in it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(function)
        if name.startswith("get ") or name == "untyped_storage":
            return function(*args, **kwargs)
        self.watch.calls[name] += 1
        # The CPU looks whether its numbers fit; told how many there are, CUDA does not.
        told = len(args) > 1 or "num_classes" in kwargs
        self.watch.begin(name, silent=name == "one_hot" and told)
        result = function(*args, **kwargs)
        if name in MOVES and not kwargs.get("non_blocking"):
            data = args[1] if name == "new_tensor" else args[0]
            self.watch.begin(name, silent=False)
            self.watch.add(moves(data, result))
        return result


class Operations(TorchDispatchMode):
    """Sees every operation inside a call, and which of them look."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        self.watch.add(looks(name, args, kwargs, self.watch.far), name)
        result = operation(*args, **kwargs)
        given = list(tensors_in([*args, *kwargs.values()]))
        self.watch.made_of(given, result)
        return result


def moves(given: object, result: object) -> int:
    """How many copies a call makes from one side to the other.

    The tensors in a list are read one by one; what they become is sent as a whole.
    """
    sent = isinstance(result, Tensor) and lies_there(result)
    if isinstance(given, Tensor):
        return int(lies_there(given) != sent)
    return sum(map(lies_there, tensors_in([given]))) + sent


def looks(name: str, args: tuple, kwargs: dict, far: Far) -> int:
    """How many times an operation waits."""
    if name in INDEXING:
        return index_waits(far, *args[:3])
    if name == "copy_":
        waiting = not (args[2:] or kwargs.get("non_blocking"))
        return int(waiting and far(args[0]) != far(args[1]))
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return 0
    return int(name in LOOKS and any(map(far, tensors_in(args))))


def index_waits(far: Far, target: Tensor, index: list, *written: Tensor) -> int:
    """A bool index asks how many it picks, and one of the other side has to move.

    Nothing is asked where one number of Python is written wherever a mask says.
    """
    parts = list(tensors_in(index))
    waits = 0
    for part in parts:
        asks = far(part) and part.dtype == torch.bool
        waits += asks or far(part) != far(target)
    if written and written[0].numel() == 1 and not far(written[0]):
        a_mask = len(parts) == 1 and parts[0].dtype == torch.bool
        if a_mask and far(parts[0]) == far(target):
            return 0
    return waits


def lines_of_ours() -> tuple[tuple[str, int], ...]:
    """The lines of minialign that are being executed, the innermost last."""
    found = []
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(LIBRARY):
            found.append((str(path.relative_to(LIBRARY)), line))
    return tuple(reversed(found))
