"""What kernels do to memory, watched in Triton's interpreter.

Within `watch` every pointer argument of a kernel is an address far from all others, so that each
access is known to be made through one argument, whatever it would hit. Errors, which name kernel,
program and argument, are

- an access outside of that argument's tensor,
- two programs of one launch of which one writes what the other reads or writes, unless the later
  one has done an atomic operation on a counter before.

The bytes that are loaded and stored are counted, for `passes`.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_SPACING = 1 << 44  # bytes between the addresses of two arguments
_NOBODY, _SEVERAL = -1, -2  # in place of a program's number


class AccessError(Exception):
    """A kernel did what it must not. The interpreter wraps it into an InterpreterError."""


@dataclass
class Launch:
    """One launch: its tensors, and the bytes loaded from and stored to each, by argument.

    Lanes that are masked off do not count; what is loaded twice counts twice.
    """

    kernel: str
    programs: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)


def passes(launches: list[Launch], x: Tensor) -> tuple[float, float]:
    """How often tensors of the shape of x were loaded, and stored, in units of the bytes of x."""

    def count(launch: Launch, bytes_by_name: Counter[str]) -> int:
        large = (n for n, tensor in launch.tensors.items() if tensor.shape == x.shape)
        return sum(bytes_by_name[name] for name in large)

    size = x.numel() * x.element_size()
    loaded = sum(count(launch, launch.loaded) for launch in launches)
    stored = sum(count(launch, launch.stored) for launch in launches)
    return loaded / size, stored / size


def _span(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last one."""
    if not tensor.numel():
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()


class _Users:
    """Per byte of a storage, which program of the launch has read and written it."""

    def __init__(self, size: int):
        self.reader = np.full(size, _NOBODY, np.int32)
        self.writer = np.full(size, _NOBODY, np.int32)

    def load(self, program: int, places: np.ndarray) -> bool:
        """Whether another program has written there."""
        others = self.reader[places]
        self.reader[places] = np.where((others == _NOBODY) | (others == program), program, _SEVERAL)
        writers = self.writer[places]
        return bool(((writers != _NOBODY) & (writers != program)).any())

    def store(self, program: int, places: np.ndarray) -> bool:
        """Whether another program has read or written there."""
        users = np.concatenate((self.reader[places], self.writer[places]))
        self.writer[places] = program
        return bool(((users != _NOBODY) & (users != program)).any())


class _Watcher:
    """The launch that is running, and the interpreter's functions put in place of its own."""

    def __init__(self, reverse: bool):
        self.launches: list[Launch] = []
        self.reverse = reverse

    def start(self, execute, executor, *arguments, **options):
        names = inspect.getfullargspec(executor.fn).args
        named = {name: value for name, value in options.items() if name in names}
        values = inspect.getcallargs(executor.fn, *arguments, **named)
        self.launch = Launch(executor.fn.__name__)
        self.launches.append(self.launch)
        self.names = iter([name for name, value in values.items() if hasattr(value, "data_ptr")])
        self.arguments: list[tuple[str, Tensor]] = []
        self.users: dict[int, _Users] = {}
        execute(executor, *arguments, **options)

    def convert(self, convert, value):
        converted = convert(value)
        if isinstance(value, Tensor):
            name = next(self.names)
            self.launch.tensors[name] = value
            self.arguments.append((name, value))
            converted.handle.data[0] = len(self.arguments) * _SPACING
        return converted

    def set_program(self, set_grid_idx, builder, x, y, z):
        self.launch.programs += 1
        self.program = builder.grid_dim[0] - 1 - x if self.reverse else x
        self.synchronised = False
        set_grid_idx(builder, self.program, y, z)

    def load(self, load, builder, pointers, mask, *others):
        return load(builder, self.real("load", pointers, mask), mask, *others)

    def store(self, store, builder, pointers, value, mask, *others):
        return store(builder, self.real("store", pointers, mask), value, mask, *others)

    def atomic(self, atomic, builder, operation, pointers, value, mask, *others):
        self.synchronised = True
        real = self.real("atomic", pointers, mask)
        return atomic(builder, operation, real, value, mask, *others)

    def real(self, kind: str, pointers, mask):
        """The pointers as they are in memory, when nothing is wrong with the access."""
        addresses = pointers.data.astype(np.int64)
        numbers = (addresses + _SPACING // 2) // _SPACING
        real = np.zeros_like(pointers.data)
        for number in np.unique(numbers[mask.data]):
            active = mask.data & (numbers == number)
            offsets = addresses[active] - number * _SPACING
            name, tensor = self.arguments[number - 1]
            self.check(kind, name, tensor, offsets, pointers.get_element_ty())
            real[active] = offsets.astype(np.uint64) + np.uint64(tensor.data_ptr())
        return interpreter.TensorHandle(real, pointers.dtype)

    def check(self, kind: str, name: str, tensor: Tensor, offsets: np.ndarray, element) -> None:
        where = (
            f"{self.launch.kernel}, program {self.program}: {kind} of {name} {list(tensor.shape)}"
        )
        size = max(element.primitive_bitwidth // 8, 1)
        outside = offsets[(offsets < 0) | (offsets + size > _span(tensor))]
        if outside.size:
            elements = outside[0] / tensor.element_size()
            raise AccessError(f"{where} out of bounds, at element {elements:g} of its memory")
        if kind != "store":
            self.launch.loaded[name] += offsets.size * size
        if kind != "load":
            self.launch.stored[name] += offsets.size * size
        if kind == "atomic":
            return
        storage = tensor.untyped_storage()
        users = self.users.setdefault(storage.data_ptr(), _Users(storage.nbytes()))
        places = offsets + tensor.storage_offset() * tensor.element_size()
        shared = (users.load if kind == "load" else users.store)(self.program, places)
        if shared and not self.synchronised:
            raise AccessError(f"{where} touches what another program of the launch uses")


@contextlib.contextmanager
def watch(reverse: bool = False) -> Iterator[list[Launch]]:
    """The launches within, as they come; `reverse`: programs run from the last to the first."""
    watcher = _Watcher(reverse)
    builder = interpreter.InterpreterBuilder
    replaced = (
        (interpreter.GridExecutor, "__call__", watcher.start),
        (interpreter, "_implicit_cvt", watcher.convert),
        (builder, "set_grid_idx", watcher.set_program),
        (builder, "create_masked_load", watcher.load),
        (builder, "create_masked_store", watcher.store),
        (builder, "create_atomic_rmw", watcher.atomic),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            original = getattr(owner, name)
            wrapper = _with_original(replacement, original)
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield watcher.launches


def _with_original(replacement, original):
    """A plain function, so that a method of a class stays one."""

    def wrapper(*arguments, **options):
        return replacement(original, *arguments, **options)

    return wrapper
