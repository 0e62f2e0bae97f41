"""Interpreted launches whose programs take turns at random, so that kernels with barriers can be tested on a CPU.

Triton's interpreter runs the programs of a launch one after another: a program that waits for a later one hangs, and
one that reads too early what a later one writes is never caught. Inside :func:`explore` each program is a coroutine,
suspended before every load, store and atomic, and a seed decides who goes on. The same seed gives the same schedule.
A loop that touches no memory is never interrupted.

Stores and loads take effect late, as far as a GPU's memory allows: see :mod:`seqcore.testing.weak_memory`.

A schedule that fails shows a bug; schedules that pass show no more than themselves. So break the kernel once, and see
its test fail.
"""

import contextlib
import contextvars
import inspect
import math
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from ..devices import INTERPRETED
from .weak_memory import Memory, Observer

PATIENCE = 1_000
# Each program goes on at one of these relative rates, so that some lag behind by a step.
_SPEEDS = (1.0, 0.5, 0.125)

_active: "Exploration | None" = None


class Deadlock(RuntimeError):
    """No unfinished program of a launch makes progress. The message says where each stands and what it waits for."""


@contextlib.contextmanager
def explore(seed: int, *, patience: int = PATIENCE, weak_memory: bool = True) -> "Iterator[Exploration]":
    """Interleave the programs of every interpreted launch within the ``with`` block, at random.

    Args:
        seed: decides every switch, in all launches of the block.
        patience: a launch is deadlocked once each unfinished program had this many turns while none finished and
            memory did not change. A kernel that loads more than this between two stores needs a higher one.
        weak_memory: whether stores and loads may take effect late. A missing release or acquire shows only if they
            may; a location overwritten too early shows under more seeds if they may not. So test with both.

    Yields:
        The :class:`Exploration`, which counts launches and switches.

    Raises:
        Deadlock: from a launch, if its programs wait for one another forever.
        triton.runtime.errors.InterpreterError: from a launch, with the program's index and its position, if a program
            raised; the other programs are ended where they stand.
        ValueError: if ``patience`` is less than 1.
        RuntimeError: if kernels are not interpreted in this process, or within another ``explore``.
        ImportError: if greenlet is not installed.
    """
    global _active
    if patience < 1:
        raise ValueError(f"patience is a number of turns, at least 1, got {patience}; the default is {PATIENCE}")
    if not INTERPRETED:
        raise RuntimeError(
            "explore schedules interpreted kernels, and in this process kernels are compiled; set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    if _active is not None:
        raise RuntimeError("explore is already under way and one process has one schedule; leave the outer one first")
    try:
        import greenlet  # noqa: F401
    except ImportError as error:
        raise ImportError("explore needs greenlet, to suspend programs; pip install seqcore[dev]") from error
    from triton.runtime import interpreter

    from ..kernels import grid

    exploration = Exploration(seed, patience, weak_memory)
    stock_launch, stock_patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched = set()

    def patch_once(function):
        # Stock, each call of a device function prepares triton.language anew, which takes longer than most calls.
        if function in patched:
            return None
        patched.add(function)
        return stock_patch(function)

    def scheduled_launch(executor, *args, **kwargs):
        patched.clear()
        executor.fn = _Collector(executor.fn, exploration)
        try:
            stock_launch(executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            # The executor has wrapped what the schedule raised, which says all by itself.
            cause = error.__cause__
            raise cause from cause.__cause__

    _active = exploration
    try:
        with (
            mock.patch.object(interpreter.GridExecutor, "__call__", scheduled_launch),
            mock.patch.object(interpreter, "_patch_lang", patch_once),
            mock.patch.object(grid, "interleaved", True),
            mock.patch.multiple(interpreter.interpreter_builder, **exploration._operations()),
        ):
            yield exploration
    finally:
        _active = None


class _Collector:
    """Stands in for a kernel's function in the executor's loop over the grid, and schedules all programs at its end."""

    def __init__(self, function: Callable[..., None], exploration: "Exploration") -> None:
        # What the executor reads of a function.
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = inspect.signature(function)
        self._function, self._exploration = function, exploration
        self._programs: list[_Program] = []

    def __call__(self, **arguments: Any) -> None:
        builder = self._exploration._builder
        self._programs.append(_Program(builder.grid_idx, arguments))
        if len(self._programs) == math.prod(builder.grid_dim):
            self._exploration._launch(self._function, self._programs)


@dataclass(eq=False)
class _Program:
    """One program of a launch: its coroutine, what it is about to do, and its part in memory."""

    index: tuple[int, int, int]
    arguments: dict[str, Any]
    coroutine: Any = None
    idle: int = 0
    operation: str = ""
    ptrs: Any = None  # TensorHandle
    mask: Any = True
    observer: Observer = field(default_factory=Observer)


class Exploration:
    """What :func:`explore` yields: ``launches`` scheduled so far, and ``switches`` between programs in all of them."""

    def __init__(self, seed: int, patience: int, weak_memory: bool) -> None:
        from triton.runtime import interpreter

        self.launches = self.switches = 0
        self._patience, self._weak_memory = patience, weak_memory
        self._random = random.Random(seed)
        self._interpreter, self._builder = interpreter, interpreter.interpreter_builder
        self._running: _Program | None = None
        self._memory: Memory | None = None

    def _launch(self, function: Callable[..., None], programs: list[_Program]) -> None:
        import greenlet

        self.launches += 1
        self._memory = Memory(self._interpreter._interpreter, self._random, self._weak_memory)
        last_index = self._builder.grid_idx
        for program in programs:
            program.coroutine = greenlet.greenlet(lambda p=program: function(**p.arguments))
            program.coroutine.gr_context = contextvars.copy_context()
        try:
            self._schedule(programs)
            for program in programs:
                self._memory.commit(program.observer.buffer)
        finally:
            for program in programs:
                program.coroutine.throw()  # unwinds it where it stands, if it has not finished
            self._builder.set_grid_idx(*last_index)
            self._running = self._memory = None

    def _schedule(self, programs: list[_Program]) -> None:
        speeds = {program: self._random.choice(_SPEEDS) for program in programs}
        unfinished, version = list(programs), 0
        while unfinished:
            self._memory.commit_at_random(program.observer for program in programs)
            if self._memory.version != version:
                version = self._memory.version
                for program in unfinished:
                    program.idle = 0
            elif all(program.idle >= self._patience for program in unfinished):
                raise Deadlock(self._describe_deadlock(unfinished, len(programs)))
            program = self._random.choices(unfinished, [speeds[p] for p in unfinished])[0]
            self._resume(program)
            program.idle += 1
            if program.coroutine.dead:
                unfinished.remove(program)
                self._memory.version += 1

    def _resume(self, program: _Program) -> None:
        self.switches += 1
        self._running = program
        self._builder.set_grid_idx(*program.index)
        try:
            program.coroutine.switch()
        except Exception as error:
            # Each device function on the way out has wrapped the error once.
            chain = [error]
            while isinstance(chain[-1], self._interpreter.InterpreterError) and chain[-1].__cause__:
                chain.append(chain[-1].__cause__)
            frames = [frame for link in chain for frame in traceback.walk_tb(link.__traceback__)]
            message = f"program {program.index} at {_position(frames)}: {chain[-1]!r}"
            raise self._interpreter.InterpreterError(message) from error

    def _pause(self, operation: str, ptrs: Any, mask: Any = True) -> Observer:
        """Let others go on before the running program does ``operation``; return its part in memory."""
        program = self._running
        program.operation, program.ptrs, program.mask = operation, ptrs, mask
        program.coroutine.parent.switch()
        return program.observer

    def _operations(self) -> dict[str, Callable]:
        """The builder's methods with a point of switching before each. Its other loads and stores call these."""
        builder, pause = self._builder, self._pause
        load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

        def scheduled_load(ptrs, mask, *rest, **options):
            observer = pause("load of", ptrs, kept := np.asarray(mask.data))
            return self._memory.load(observer, ptrs.data, kept, lambda: load(ptrs, mask, *rest, **options))

        def scheduled_store(ptrs, value, mask, *rest, **options):
            observer = pause("store to", ptrs, kept := np.asarray(mask.data))
            operate = lambda: store(ptrs, value, mask, *rest, **options)
            self._memory.store(observer, ptrs.data, value.data, kept, operate)

        def scheduled_barrier():
            self._memory.barrier(self._running.observer)
            return barrier()

        def scheduled_rmw(kind, ptrs, value, mask, sem, scope):
            observer = pause(f"atomic {kind.name.lower()} on", ptrs, kept := np.asarray(mask.data))
            operate = lambda: rmw(kind, ptrs, value, mask, sem, scope)
            return self._memory.atomic(observer, ptrs.data, kept, sem.name, operate)

        def scheduled_cas(ptrs, expected, value, sem, scope):
            observer = pause("atomic compare-and-swap on", ptrs)
            operate = lambda: cas(ptrs, expected, value, sem, scope)
            return self._memory.atomic(observer, ptrs.data, True, sem.name, operate)

        return {
            "create_masked_load": scheduled_load,
            "create_masked_store": scheduled_store,
            "create_barrier": scheduled_barrier,
            "create_atomic_rmw": scheduled_rmw,
            "create_atomic_cas": scheduled_cas,
        }

    def _describe_deadlock(self, unfinished: list[_Program], launched: int) -> str:
        lines = [
            f"{len(unfinished)} of {launched} programs wait forever: no progress in {self._patience} turns of each",
            *(
                f"  program {p.index} at {_position(traceback.walk_stack(p.coroutine.gr_frame), inward=False)}: "
                f"{self._describe_operation(p)}"
                for p in sorted(unfinished, key=lambda p: p.index)
            ),
            "Compare what each waits for with what the others signal and how many were launched. If the kernel is "
            f"right but loads long between two stores, pass explore a patience of more than {self._patience}.",
        ]
        return "\n".join(lines)

    def _describe_operation(self, program: _Program) -> str:
        ptrs = program.ptrs.data[np.broadcast_to(program.mask, program.ptrs.data.shape)]
        if not ptrs.size:
            return f"{program.operation} nothing, as all is masked out"
        address = int(ptrs[0])
        dtype = self._interpreter._get_np_dtype(program.ptrs.get_element_ty())
        [held] = self._memory.read(ptrs[:1], dtype)
        bases = {
            int(argument.handle.data.item()): name
            for name, argument in program.arguments.items()
            if hasattr(argument, "handle") and argument.dtype.is_ptr()
        }
        base = max((start for start in bases if start <= address), default=None)
        place = hex(address) if base is None else f"{bases[base]}[{(address - base) // dtype.itemsize}]"
        return f"{program.operation} {place}, which holds {held}"


def _position(frames: Iterable[tuple[Any, int]], inward: bool = True) -> str:
    """The lines of kernel source among ``frames``, outermost first, as ``forward.py:120 -> grid.py:30``."""
    import triton

    machinery = (os.path.dirname(triton.__file__), __file__)
    names = [(frame.f_code.co_filename, line) for frame, line in frames]
    lines = [f"{os.path.basename(file)}:{line}" for file, line in names if not file.startswith(machinery)]
    return " -> ".join(lines if inward else reversed(lines)) or "its start"
