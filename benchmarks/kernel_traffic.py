"""Bytes that Triton kernels load and store, counted in Triton's interpreter.

The interpreter runs a kernel program by program on numpy arrays, so every pointer it follows can be
seen. For each launch and each tensor argument this counts the distinct bytes that are read and
written, masked-out elements left out. Distinct, because a GEMM reads its inputs once per tile of
the other side and serves the repeats from the L2 cache: what reaches HBM is each byte once per
kernel. The requested bytes, repeats included, are kept beside it.

A true shape is too large to interpret. There the launchers run on tensors that have shapes and no
data, kernels are recorded and not executed, and a launch is charged

    bytes(argument) = size(argument at the true shape) * share(argument)

with the share of the argument that the same launch touched at a small shape; the two runs must
launch the same kernels in the same order. Grids and scratch buffers are thus those of the true
shape.

Import this in a process started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from triton.runtime import interpreter

from benchmarks.passes import num_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

Argument = tuple[str, str]
"""Name of a launch and of one of its arguments."""

Share = tuple[float, float]
"""Part of an argument that is read, and part that is written."""


@dataclass
class Access:
    """Traffic of one tensor argument in one launch, in bytes.

    Attributes:
        shape: Of the tensor.
        size: Bytes of its elements.
        read: Distinct bytes loaded.
        written: Distinct bytes stored.
        requested: Bytes of all loads and stores, repeats included.
    """

    shape: tuple[int, ...]
    size: int
    read: int = 0
    written: int = 0
    requested: int = 0


@dataclass
class Launch:
    """One kernel launch and the traffic of its tensor arguments.

    Attributes:
        name: The kernel's name, numbered from its second launch on.
        accesses: By argument; a tensor passed several times is one argument, `a=b`.
    """

    name: str
    accesses: dict[str, Access] = field(default_factory=dict)


class _Storage:
    """Which bytes of one block of memory the running launch has touched."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.read, self.written = (np.zeros(self.size, dtype=bool) for _ in range(2))
        self.requested = np.zeros(self.size, dtype=np.int32)

    def touch(self, addresses: np.ndarray[Any, Any], itemsize: int, write: bool) -> int:
        """Mark elements that lie in this block; returns how many did."""
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        offsets = offsets[(offsets >= 0) & (offsets < self.size)]
        flags = self.written if write else self.read
        for byte in range(itemsize):
            flags[offsets + byte] = True
        np.add.at(self.requested, offsets, itemsize)
        return offsets.size


class Recorder:
    """Records kernel launches while it is entered.

    Attributes:
        launches: In the order of their start.
        execute: Whether kernels run; without running, only the sizes of arguments are recorded.
    """

    def __init__(self, execute: bool = True) -> None:
        self.launches: list[Launch] = []
        self.execute = execute
        self._counts: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}
        self._originals: dict[tuple[Any, str], Any] = {}

    def __enter__(self) -> Recorder:
        builder = interpreter.InterpreterBuilder
        self._replace(interpreter.InterpretedFunction, "run", self._run)
        self._replace(builder, "create_masked_load", self._watch(read="ptrs", write=None))
        self._replace(builder, "create_masked_store", self._watch(read=None, write="ptrs"))
        self._replace(builder, "create_atomic_rmw", self._watch(read="ptr", write="ptr"))
        self._replace(builder, "create_atomic_cas", self._watch(read="ptr", write="ptr"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._originals[owner, name] = original
        setattr(owner, name, make(original))

    def _run(self, original: Any) -> Any:
        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            named = dict(zip(function.arg_names, args, strict=False))
            named.update({k: v for k, v in kwargs.items() if k in function.arg_names})
            tensors = _merged(_tensors(named.items()))
            kernel = function.fn.__name__
            self._counts[kernel] += 1
            count = self._counts[kernel]
            launch = Launch(
                kernel if count == 1 else f"{kernel} {count}",
                {k: Access(tuple(t.shape), num_bytes(t)) for k, t in tensors.items()},
            )
            self.launches.append(launch)
            if not self.execute:
                return None
            self._storages = {
                t.untyped_storage().data_ptr(): _Storage(t) for t in tensors.values() if t.numel()
            }
            result = original(function, *args, grid=grid, warmup=warmup, **kwargs)
            for storage in self._storages.values():
                _assign(launch, tensors, storage)
            return result

        return run

    def _watch(self, read: str | None, write: str | None) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            signature = inspect.signature(original)

            def watched(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs).arguments
                pointers = given[read or write]
                addresses = np.asarray(pointers.data)
                if "mask" in given and given["mask"] is not None:
                    mask = np.broadcast_to(given["mask"].data.astype(bool), addresses.shape)
                    addresses = addresses[mask]
                bits = pointers.get_element_ty().primitive_bitwidth
                for is_write in [False] * bool(read) + [True] * bool(write):
                    self._touch(addresses.ravel(), max(1, bits // 8), is_write)
                return original(*args, **kwargs)

            return watched

        return make

    def _touch(self, addresses: np.ndarray[Any, Any], itemsize: int, write: bool) -> None:
        found = sum(s.touch(addresses, itemsize, write) for s in self._storages.values())
        if found != addresses.size:
            raise AssertionError(
                f"{self.launches[-1].name} touched {addresses.size - found} elements outside "
                "the tensors it was given"
            )


def _tensors(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in items:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _tensors((f"{name}[{i}]", part) for i, part in enumerate(value))
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            yield name, value.base


def _merged(items: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by name, with one name for a tensor that is passed several times."""
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, tensor in items:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return {"=".join(names[key]): tensor for key, tensor in tensors.items()}


def _assign(launch: Launch, tensors: dict[str, torch.Tensor], storage: _Storage) -> None:
    """Give the touched bytes of a block to the arguments that start at or before them."""
    inside = [
        (t.data_ptr() - storage.start, name)
        for name, t in tensors.items()
        if t.numel() and t.untyped_storage().data_ptr() == storage.start
    ]
    starts = sorted({start for start, _ in inside})
    for start, end in zip(starts, [*starts[1:], storage.size], strict=True):
        name = next(name for at, name in inside if at == start)
        access = launch.accesses[name]
        access.read = int(storage.read[start:end].sum())
        access.written = int(storage.written[start:end].sum())
        access.requested = int(storage.requested[start:end].sum())


def shares(launches: Iterable[Launch]) -> dict[Argument, Share]:
    """Share of each argument's bytes that a launch reads and writes."""
    return {
        (launch.name, name): (access.read / access.size, access.written / access.size)
        for launch in launches
        for name, access in launch.accesses.items()
        if access.size
    }


def charged(
    launches: Iterable[Launch], share: dict[Argument, Share]
) -> dict[Argument, tuple[float, float]]:
    """Bytes read and written per argument of launches that were recorded and not executed.

    Raises:
        KeyError: These are not the launches that were interpreted.
    """
    sizes = {
        (launch.name, name): access.size
        for launch in launches
        for name, access in launch.accesses.items()
        if access.size
    }
    if sizes.keys() != share.keys():
        different = sorted(map(str, sizes.keys() ^ share.keys()))
        raise KeyError(f"launched at one shape and not at the other: {', '.join(different)}")
    return {key: (share[key][0] * size, share[key][1] * size) for key, size in sizes.items()}
