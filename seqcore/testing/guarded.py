"""Launches whose tensors stand between guard bands, so that whatever a kernel touches beside them is seen.

Within :func:`guarded` each launch gets copies of its tensors, in memory all of which is poisoned but the elements that
some argument of the launch addresses: bands before and after, and the gaps of strided views. Poison that was read shows
in the results, which are to be compared with those of an unguarded run; poison that was written over is an error. So
is, where kernels are interpreted, every access to an address that no argument has. What ``torch.empty`` and its kin
return is poisoned, too, so that an element nobody wrote shows.

A guard that finds nothing shows no more than itself. So break the kernel once, and see its test fail.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..devices import INTERPRETED

# Bytes on either side of a storage; and what its address leaves, divided by ALIGNED, is the copy's, too: whether
# addresses are aligned decides what is compiled.
BAND, ALIGNED = 1 << 16, 1 << 8


class OutOfBounds(RuntimeError):
    """A kernel touched memory that none of its arguments addresses. The message says which, and where."""


@contextlib.contextmanager
def guarded(*, accesses: bool = INTERPRETED) -> Iterator[Counter[str]]:
    """Put guard bands around all tensors of every launch within the ``with`` block, and poison what is allocated there.

    Not for several threads at once, nor for what torch.compile makes. Within ``explore``, not around it.

    Args:
        accesses: whether interpreted loads, stores and atomics are each looked at before they happen; if not, as where
            kernels are compiled, only what was written shows here, and what was read in the results.

    Yields:
        How often each kernel was launched, by name.

    Raises:
        OutOfBounds: from a launch, after which its tensors hold what they held before.
        ValueError: if ``accesses`` are to be looked at in a process that compiles its kernels.
    """
    if accesses and not INTERPRETED:
        raise ValueError("here kernels are compiled, and accesses are seen where they are interpreted; leave that out")
    launches: Counter[str] = Counter()
    kind = _kernel_class()
    run = kind.run

    def guarded_run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        if warmup:
            return run(kernel, *arguments, grid=grid, warmup=warmup, **keywords)
        name = kernel.fn.__name__
        launches[name] += 1
        guards = _Guards(name, dict(zip(kernel.arg_names, arguments, strict=False)) | keywords)
        given, named = [guards.moved(value) for value in arguments], {k: guards.moved(v) for k, v in keywords.items()}
        with guards.watching() if accesses else contextlib.nullcontext():
            found = run(kernel, *given, grid=grid, warmup=warmup, **named)
        guards.finish()
        return found

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(kind, "run", guarded_run))
        for owner, name in _ALLOCATIONS:
            patches.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield launches


_ALLOCATIONS = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
_ALLOCATIONS += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]


def _kernel_class() -> type:
    from triton.runtime import interpreter, jit

    return interpreter.InterpretedFunction if INTERPRETED else jit.JITFunction


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poison(*arguments: Any, **keywords: Any) -> Tensor:
        made = allocate(*arguments, **keywords)
        if type(made) is Tensor and made.device.type in ("cpu", "cuda"):
            with torch.no_grad():
                made.fill_(poison(made.dtype))
        return made

    return allocate_poison


def poison(dtype: torch.dtype) -> float | int | bool:
    """What no kernel may read: NaN, or as an index or a length something far beyond all tensors, or True."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else int.from_bytes(b"\x7f" * dtype.itemsize, "little")


class _Guards:
    """The tensors of one launch, moved to between the bands, storage by storage."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        views: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _tensors(arguments):
            views.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        self.rooms = {address: _Room(several) for address, several in views.items()}

    def moved(self, value: Any) -> Any:
        """An argument whose tensors are those between the bands."""
        if isinstance(value, Tensor):
            return self.rooms[value.untyped_storage().data_ptr()].moved(value)
        if isinstance(value, tuple):
            several = map(self.moved, value)
            return type(value)(*several) if hasattr(value, "_fields") else type(value)(several)
        if hasattr(value, "block_shape"):
            value = copy.copy(value)
            value.base = self.moved(value.base)
        return value

    def finish(self) -> None:
        """Take home what the launch has written to its tensors, if it has written to nothing else."""
        for room in self.rooms.values():
            wrong = ((room.memory != room.filling) & ~room.addressed).nonzero()
            if len(wrong):
                raise OutOfBounds(self._message("wrote to", room, int(wrong[0])))
        for room in self.rooms.values():
            room.copy_back()

    def _message(self, did: str, room: "_Room", place: int) -> str:
        name, element = room.describe(place)
        shape, steps = list(room.views[name].shape), room.views[name].stride()
        return f"{self.kernel} {did} element {element} of {name}, which has {shape} in steps of {steps}"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at each interpreted access before it happens."""
        from triton.runtime import interpreter

        builder, stack = interpreter.interpreter_builder, contextlib.ExitStack()
        rooms = sorted(self.rooms.values(), key=lambda room: room.memory.data_ptr())
        starts = np.array([room.memory.data_ptr() for room in rooms], dtype=np.uint64)
        addressed = [room.addressed.numpy() for room in rooms]

        def look(did: str, ptrs: Any, mask: Any = True) -> None:
            addresses = ptrs.data[np.broadcast_to(mask, ptrs.data.shape)]
            found = np.searchsorted(starts, addresses, "right").astype(np.int64) - 1
            for index in np.unique(found):
                chosen = addresses[found == index]
                places = (chosen - starts[max(index, 0)]).astype(np.int64)
                room, allowed = rooms[max(index, 0)], addressed[max(index, 0)]
                inside = (index >= 0) & (places >= 0) & (places < len(allowed))
                wrong = places[~(inside & allowed[np.where(inside, places, 0)])]
                if len(wrong):
                    raise OutOfBounds(self._message(did, room, int(wrong[0])))

        def load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            look("read", ptrs, mask.data)
            return stock["create_masked_load"](ptrs, mask, *rest, **options)

        def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            look("writes to", ptrs, mask.data)
            return stock["create_masked_store"](ptrs, value, mask, *rest, **options)

        def rmw(kind: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            look("changes", ptrs, mask.data)
            return stock["create_atomic_rmw"](kind, ptrs, value, mask, *rest)

        def cas(ptrs: Any, *rest: Any) -> Any:
            look("changes", ptrs)
            return stock["create_atomic_cas"](ptrs, *rest)

        watched = {
            "create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": rmw, "create_atomic_cas": cas
        }  # fmt: skip
        stock = {name: getattr(builder, name) for name in watched}
        with stack:
            stack.enter_context(mock.patch.multiple(builder, **watched))
            try:
                yield
            except interpreter.InterpreterError as error:
                cause: BaseException | None = error
                # Each device function on the way out has wrapped the error once.
                while cause is not None and not isinstance(cause, OutOfBounds):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise cause from None


class _Room:
    """One storage and its copy between bands, both byte by byte."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        self.views = views
        first = next(iter(views.values()))
        self.home = torch.zeros(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())
        length = self.home.numel() + 2 * BAND + ALIGNED
        self.memory = torch.zeros(length, dtype=torch.uint8, device=first.device)
        self.start = BAND + (first.untyped_storage().data_ptr() - self.memory.data_ptr()) % ALIGNED
        self.inside = slice(self.start, self.start + self.home.numel())
        self.addressed = torch.zeros(length, dtype=torch.bool, device=first.device)
        for view in views.values():
            self._mark(view)
        pattern = torch.full((1,), poison(first.dtype), dtype=first.dtype, device=first.device).view(torch.uint8)
        self.filling = pattern.repeat(length // len(pattern) + 2)[-self.start % len(pattern) :][:length]
        self.memory.copy_(self.filling)
        self.memory[self.inside] = torch.where(self.addressed[self.inside], self.home, self.memory[self.inside])

    def _mark(self, view: Tensor) -> None:
        # Along a dimension of stride 0 there is one element, however many there seem to be.
        sizes = [min(size, 1) if step == 0 else size for size, step in zip(view.shape, view.stride(), strict=True)]
        steps = [step * view.itemsize for step in view.stride()]
        offset = self.start + view.storage_offset() * view.itemsize
        self.addressed.as_strided((*sizes, view.itemsize), (*steps, 1), offset).fill_(True)

    def moved(self, view: Tensor) -> Tensor:
        offset = self.start // view.itemsize + view.storage_offset()
        return self.memory[:0].view(view.dtype).as_strided(view.shape, view.stride(), offset)

    def copy_back(self) -> None:
        self.home.copy_(torch.where(self.addressed[self.inside], self.memory[self.inside], self.home))

    def describe(self, place: int) -> tuple[str, int]:
        """The argument nearest to a place, and that place as an element of it, counted from its first."""
        elements = {
            name: (place - self.start) // view.itemsize - view.storage_offset() for name, view in self.views.items()
        }

        def distance(name: str) -> int:
            view = self.views[name]
            last = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
            return max(-elements[name], elements[name] - last, 0)

        name = min(elements, key=distance)
        return name, elements[name]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a launch's arguments, in tuples and descriptors, too, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, key)
    elif isinstance(value, tuple):
        keys = getattr(value, "_fields", range(len(value)))
        for key, part in zip(keys, value, strict=True):
            yield from _tensors(part, f"{name}.{key}")
    elif hasattr(value, "block_shape"):
        yield from _tensors(value.base, f"{name}.base")
