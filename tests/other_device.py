"""A GPU that is not there: its tensors say `cuda:0`, lie in the CPU's memory, and may
not meet the CPU's tensors where a real GPU's may not.

    with other_device() as there:
        policy = base().to(there)
        policy(torch.tensor([[1, 2]]))  # RuntimeError: two devices, as on a real GPU

Where a tensor lies is said of its *memory*: what is made there has the attribute
`there` on its storage, which views, parameters and saved files share. A
`TorchFunctionMode` sees every call of torch that Python code makes. It refuses what
CUDA would refuse, lets the CPU do the work, and marks new memory. So the numbers are
the CPU's, bit for bit, and the type of a tensor is `torch.Tensor`, as on a real GPU
(a subclass of it would not pass `checkpoint.save`).

What it does not see is the inside of a call: a function of `torch.nn.functional` is
one operation, and hooks that autograd calls meet tensors of the CPU. Not imitated are
memory, speed, streams, rounding and the global generator (the CPU's serves both).

Sources of the rules are torch's own: TensorIterator.cpp (0-dim tensors),
TensorAdvancedIndexing.cpp and TensorIndexing.h (indices).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HERE = torch.device("cpu")
THERE = torch.device("cuda:0")

# What a tensor that lies there says of itself.
ANSWERS = {
    "get device": THERE,
    "get is_cuda": True,
    "get is_cpu": False,
    "get_device": 0,
}

# These copy from one device to another, or look at shapes and types only.
EITHER = {
    "backward",
    "broadcast_tensors",
    "copy",
    "expand_as",
    "foreach_copy",
    "grad",
    "has_compatible_shallow_copy_type",
    "reshape_as",
    "result_type",
    "set data",
    "tensor_split",
    "view_as",
}

# Elementwise arithmetic: a GPU takes one 0-dim tensor of the CPU among its inputs, as
# a number. `clamp` does not, and nothing that moves data about.
ARITHMETIC = {
    "add",
    "addcdiv",
    "addcmul",
    "addr",
    "allclose",
    "and",
    "atan2",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "clamp_max",
    "clamp_min",
    "copysign",
    "div",
    "divide",
    "eq",
    "float_power",
    "floor_divide",
    "floordiv",
    "fmax",
    "fmin",
    "fmod",
    "ge",
    "greater",
    "greater_equal",
    "gt",
    "hypot",
    "iand",
    "ior",
    "isclose",
    "ixor",
    "le",
    "lerp",
    "less",
    "less_equal",
    "logaddexp",
    "logical_and",
    "logical_or",
    "logical_xor",
    "lt",
    "masked_fill",
    "maximum",
    "minimum",
    "mod",
    "mul",
    "multiply",
    "ne",
    "not_equal",
    "or",
    "pow",
    "rdiv",
    "remainder",
    "rfloordiv",
    "rmod",
    "rpow",
    "rsub",
    "rtruediv",
    "sub",
    "subtract",
    "true_divide",
    "truediv",
    "where",
    "xlogy",
    "xor",
}

# These read numbers, out of 0-dim tensors too, and make a tensor of the CPU of them
# where no device is named.
FROM_NUMBERS = {"arange", "full", "linspace", "logspace"}
FROM_DATA = {"as_tensor", "new_tensor", "tensor"}  # a list's tensors are numbers too

CUDA = {  # what torch.cuda is asked for
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_name": lambda device=None: "a GPU that is not there",
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: None,
}


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Torch has a GPU while this is open; gives its name."""
    registry = [(0, location_tag, restore), *torch.serialization._package_registry]
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch, "Generator", Generator),
            (torch.serialization, "_package_registry", registry),
            *((torch.cuda, name, answer) for name, answer in CUDA.items()),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(OtherDevice())
        yield THERE


def lies_there(tensor: Tensor) -> bool:
    """Whether this tensor's memory was made on the device that is not there."""
    return getattr(tensor.untyped_storage(), "there", False)


def device_of(tensor: Tensor) -> torch.device:
    """The device that a tensor says it lies on."""
    return THERE if lies_there(tensor) else tensor.device


class OtherDevice(TorchFunctionMode):
    """Sees every call: refuses what CUDA refuses, and marks the memory that is made."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:  # a name, and no memory yet
            return torch.device(*args, **kwargs)
        name = name_of(function)
        if name in ANSWERS and lies_there(args[0]):
            return ANSWERS[name]
        if name.startswith("get ") and name != "get grad":
            return function(*args)  # views of the same memory, or no tensors

        given = [*args, *kwargs.values()]
        tensors = list(tensors_in(given))
        some_there = any(map(lies_there, tensors))
        if name == "parse_to":  # `Module.to` asks what its arguments mean
            device, *rest = function(*args, **kwargs)
            return (THERE if some_there else device, *rest)
        if some_there and name in ("numpy", "array") and not kwargs.get("force"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )

        asked = device_asked_for(name, given)
        if asked is None and some_there:
            check_devices(function, name, args, tensors)
        device = asked or device_of_result(name, args, tensors)
        check_generator(kwargs.get("generator"), device)

        if asked is not None:
            args = [on_the_cpu(value) for value in args]
            kwargs = {key: on_the_cpu(value) for key, value in kwargs.items()}
        if name == "cuda":  # the CPU has no such method; to its memory it is the same
            result = args[0].cpu()
        else:
            result = function(*args, **kwargs)
        if asked is not None:
            result = moved(result, asked, tensors)
        if device.type == "cuda":
            mark_new_memory(result, tensors)
        return result


@cache
def name_of(function) -> str:
    """`add` for `torch.add`, `Tensor.add_` and `+`; `get device` for the property."""
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {function.__self__.__name__}"
    return name.strip("_")


def tensors_in(values: Sequence) -> Iterator[Tensor]:
    """The tensors among arguments or results, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def named_device(value: object) -> torch.device | None:
    """The device that an argument is, if it is one."""
    if type(value) is torch.device:
        return value
    if isinstance(value, str) and value.startswith(("cpu", "cuda")):
        return torch.device(value)
    return None


def on_the_cpu(value: object) -> object:
    """The argument as it is told to the CPU, which does the work."""
    device = named_device(value)
    return HERE if device is not None and device.type == "cuda" else value


def device_asked_for(name: str, given: Sequence) -> torch.device | None:
    """What `device=`, `.cpu()`, `.cuda()` or `.to(...)` say; None: nothing does."""
    if name in ("cpu", "cuda"):
        return torch.device(name)
    for value in given:
        device = named_device(value)
        if device is not None:
            return device
    if name in ("to", "type_as"):
        for other in tensors_in(given[1:]):
            return device_of(other)
    return None


def device_of_result(name: str, args: Sequence, tensors: Sequence) -> torch.device:
    """Where a call that names no device makes its result."""
    if name in FROM_NUMBERS:
        tensors = []
    if name in FROM_DATA:
        tensors = [data for data in args[:1] if isinstance(data, Tensor)]
    if name == "grad":  # a gradient lies where its input does
        tensors = list(tensors_in(args[1:2]))
    return THERE if any(map(lies_there, tensors)) else HERE


def moved(result: object, device: torch.device, inputs: Sequence[Tensor]) -> object:
    """To the CPU nothing has moved; but a copy is not the memory that it is made of."""
    if isinstance(result, Tensor) and device_of(result).type != device.type:
        memory = result.untyped_storage()
        if any(tensor.untyped_storage() is memory for tensor in inputs):
            return result.clone()
    return result


def mark_new_memory(result: object, inputs: Sequence[Tensor]) -> None:
    """What an operation makes there lies there; memory that came in stays as it was."""
    came_in = {id(tensor.untyped_storage()) for tensor in inputs}
    for tensor in tensors_in([result]):
        memory = tensor.untyped_storage()
        if id(memory) not in came_in:
            memory.there = True


# --- what is refused ----------------------------------------------------------------


def check_devices(function, name: str, args: Sequence, tensors: Sequence) -> None:
    """The tensors of an operation, some of them there, all are, but for exceptions."""
    here = [tensor for tensor in tensors if not lies_there(tensor)]
    if not here or name in EITHER | FROM_NUMBERS | FROM_DATA:
        return
    if name == "getitem":
        check_reading(*args)
        return
    if name in ("setitem", "index_put"):
        check_writing(name, *args[:3])
        return
    if name in ARITHMETIC or name.startswith("foreach"):
        numbers = all(tensor.dim() == 0 for tensor in here)
        few = len(here) == 1 or name == "where"
        if numbers and few and not (in_place(function) and args[0] is here[0]):
            return
    refuse(name)


def in_place(function) -> bool:
    """Whether the first argument is written: `add_` and `__iand__`, not `__and__`."""
    name = function.__name__
    return name in ("__iand__", "__ior__", "__ixor__") or (
        name.endswith("_") and not name.endswith("__")
    )


def check_reading(target: Tensor, index: object) -> None:
    """A GPU's tensor is read at indices of either side, the CPU's only at its own.

    A 0-dim index is no index in this sense: it is read as a whole number.
    """
    indices = [each for each in tensors_in([index]) if each.dim() > 0]
    if not lies_there(target) and any(map(lies_there, indices)):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed "
            "tensor (cpu)"
        )


def check_writing(name: str, target: Tensor, index: object, value: object) -> None:
    """Where to write may be said by either side; what is written at indices may not.

    A single number may, and into slices anything: it is copied.
    """
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    parts = index if isinstance(index, tuple) else (index,)
    picked = name == "index_put" or any(map(picks, parts))
    if picked and lies_there(value) != lies_there(target):
        refuse("index_put_")


def picks(part: object) -> bool:
    """Whether a part of an index picks elements one by one, as no slice does."""
    if isinstance(part, Tensor):
        return part.dim() > 0 or part.dtype == torch.bool
    return isinstance(part, list | np.ndarray)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Chance comes from the device on which it is used."""
    if generator is None:
        return
    side = THERE if getattr(generator, "there", False) else HERE
    if side.type != device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found "
            f"'{side.type}'"
        )


def refuse(name: str) -> None:
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two "
        f"devices, cuda:0 and cpu! (in {name})"
    )


# --- generators and files -----------------------------------------------------------


class Generator(torch.Generator):
    """The CPU's generator, which may say that it is the GPU's: the same numbers.

    A real GPU's has other numbers, and a state of another size, in the CPU's memory. A
    state of one side is refused by the other, so ours has another size too.
    """

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.there = torch.device(device).type == "cuda"
        return generator

    @property
    def device(self) -> torch.device:
        return THERE if self.there else HERE

    def get_state(self) -> Tensor:
        state = super().get_state()
        return torch.cat((state, state[:16])) if self.there else state

    def set_state(self, state: Tensor) -> "Generator":
        if lies_there(state):
            raise TypeError("RNG state must be a torch.ByteTensor")
        if self.there and len(state) != len(self.get_state()):
            raise RuntimeError("RNG state is wrong size")
        return super().set_state(state[:-16] if self.there else state)


def location_tag(storage: torch.UntypedStorage) -> str | None:
    """What a file says of where memory lay; None: not for us to say."""
    return "cuda:0" if getattr(storage, "there", False) else None


def restore(
    storage: torch.UntypedStorage, location: str
) -> torch.UntypedStorage | None:
    """Memory read from a file, for there; None: not for us to restore."""
    if not location.startswith("cuda"):
        return None
    storage.there = True
    return storage
