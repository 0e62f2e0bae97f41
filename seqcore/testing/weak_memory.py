"""A model of a GPU's weak memory, for interpreted programs: stores that others see late, loads that see the past.

On a GPU a block-wide barrier and an atomic by one thread together order what all threads of a program do (see the
memory consistency model of the PTX ISA). Accordingly:

- Other programs see a store at a random later time, not in program order: at the latest when its program executes a
  release atomic with a ``tl.debug_barrier()`` between the two, or when the launch ends.
- A load may return what a location held before other programs overwrote it, back to the time of its program's last
  acquire atomic with a ``tl.debug_barrier()`` between the two. Cache modifiers make no difference.
- A program sees its own stores; its stores to one location keep their order; no program sees a location go back in
  time. Atomics act on memory at once, whatever their semantics.

Whatever happens here is allowed by these rules; not all that they allow happens.
"""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The chance that a store becomes visible before some switch; so low that many are later than the next barrier.
COMMIT_CHANCE = 1 / 32
# How many stores back a late load may be.
HISTORY = 64
# Bytes of the widest element.
WIDEST = 8

Span = tuple[int, int]


@dataclass(eq=False)
class Observer:
    """One program's part in memory: its stores that no other sees yet, and how far back its own loads may see."""

    buffer: "list[_Store]" = field(default_factory=list)
    view: int = 0
    acquired: int = 0


@dataclass(eq=False)
class _Store:
    """Some elements on their way to memory; or, in the history, what they replaced there, sorted by address."""

    observer: Observer
    ptrs: np.ndarray  # [N], uint64
    value: np.ndarray  # [N]
    ordered: bool = False  # a barrier has followed

    def __post_init__(self) -> None:
        self.span = _span(self.ptrs, self.value.itemsize)


def _span(ptrs: np.ndarray, itemsize: int) -> Span:
    return (int(ptrs.min()), int(ptrs.max()) + itemsize) if ptrs.size else (0, 0)


def _overlap(one: Span, other: Span) -> bool:
    """Whether two address ranges meet. Their elements may not even so; then memory is stronger than it need be."""
    return one[0] < other[1] and other[0] < one[1]


class Memory:
    """The memory that the programs of one launch share.

    Args:
        raw: the interpreter's own load and store, on arrays of addresses.
        chance: decides when stores become visible and how far back loads see.
        weak: if False, all stores are visible at once.
    """

    def __init__(self, raw: Any, chance: random.Random, weak: bool) -> None:
        self.version = 0  # grows with each change
        self._raw, self._random, self._weak = raw, chance, weak
        self._overwritten: deque[_Store] = deque(maxlen=HISTORY)
        self._time = 0  # stores committed so far

    def read(self, ptrs: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """What memory holds now."""
        return self._raw.load(ptrs, np.ones(ptrs.shape, dtype=bool), np.zeros(ptrs.shape, dtype=dtype), dtype)

    def load(self, observer: Observer, ptrs: np.ndarray, mask: np.ndarray | bool, operate: Callable[[], Any]) -> Any:
        """The result of ``operate``, which loads where ``mask``, as ``observer`` sees it."""
        if not observer.buffer and observer.view == self._time:
            return operate()
        kept = np.broadcast_to(mask, ptrs.shape)
        self._commit_own(observer, ptrs[kept])
        result = operate()
        result.data[kept] = self._as_seen(observer, ptrs[kept], result.data[kept])
        return result

    def store(
        self,
        observer: Observer,
        ptrs: np.ndarray,
        value: np.ndarray,
        mask: np.ndarray | bool,
        operate: Callable[[], None],
    ) -> None:
        """Store ``value`` where ``mask``, now by ``operate`` or later."""
        if self._weak:
            ptrs, value, kept = np.broadcast_arrays(ptrs, value, mask)
            if kept.any():
                observer.buffer.append(_Store(observer, ptrs[kept], value[kept]))
        else:
            operate()
            self.version += 1

    def barrier(self, observer: Observer) -> None:
        """Order what all threads of the program stored before its releases, and its acquires before what they load."""
        observer.view = max(observer.view, observer.acquired)
        for store in observer.buffer:
            store.ordered = True

    def atomic(
        self, observer: Observer, ptrs: np.ndarray, mask: np.ndarray | bool, semantics: str, operate: Callable[[], Any]
    ) -> Any:
        """The result of ``operate``, an atomic where ``mask``, which releases and acquires as ``semantics`` says."""
        ptrs = ptrs[kept := np.broadcast_to(mask, ptrs.shape)]
        if semantics in ("RELEASE", "ACQUIRE_RELEASE"):
            self.commit([store for store in observer.buffer if store.ordered])
        self._commit_own(observer, ptrs)
        result = operate()
        if semantics in ("ACQUIRE", "ACQUIRE_RELEASE"):
            observer.acquired = self._time
        before = result.data[kept]
        # It has seen these locations as they are, and may not see them older afterwards.
        span = _span(ptrs, before.itemsize)
        observer.view = max(observer.view, self._time_after(lambda store: _overlap(store.span, span)))
        if self.read(ptrs, before.dtype).tobytes() != before.tobytes():
            self.version += 1
        return result

    def commit(self, stores: list[_Store]) -> None:
        """Make ``stores`` visible to all, each after those that its program made to the same locations before it."""
        for store in list(stores):
            buffer = store.observer.buffer
            if store not in buffer:
                continue
            earlier = buffer[: buffer.index(store)]
            self.commit([other for other in earlier if _overlap(other.span, store.span)])
            buffer.remove(store)
            ptrs = np.unique(store.ptrs)
            self._overwritten.append(_Store(store.observer, ptrs, self.read(ptrs, store.value.dtype)))
            self._raw.store(store.ptrs, store.value, np.ones(store.ptrs.shape, dtype=bool))
            self._time += 1
            self.version += 1

    def commit_at_random(self, observers: Iterable[Observer]) -> None:
        """Perhaps make one store visible."""
        buffers = [observer.buffer for observer in observers if observer.buffer]
        if buffers and self._random.random() < COMMIT_CHANCE:
            self.commit([self._random.choice(self._random.choice(buffers))])

    def _commit_own(self, observer: Observer, ptrs: np.ndarray) -> None:
        if observer.buffer:
            span = _span(ptrs, WIDEST)
            self.commit([store for store in observer.buffer if _overlap(store.span, span)])

    def _time_after(self, matches: Callable[[_Store], bool]) -> int:
        """The time just after the last store in the history that matches."""
        return next((self._time - age for age, store in enumerate(reversed(self._overwritten)) if matches(store)), 0)

    def _as_seen(self, observer: Observer, ptrs: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What ``observer`` loads where memory now holds ``values``: what it held at some time since its view."""
        span = _span(ptrs, values.itemsize)

        def cannot_be_undone(store: _Store) -> bool:
            undoable = store.observer is not observer and store.value.dtype == values.dtype
            return not undoable and _overlap(store.span, span)

        oldest = max(observer.view, self._time - len(self._overwritten), self._time_after(cannot_be_undone))
        # Half of the time as old as allowed: that is where bugs show.
        observer.view = oldest if self._random.random() < 0.5 else self._random.randint(oldest, self._time)
        for store in itertools.islice(reversed(self._overwritten), self._time - observer.view):
            if _overlap(store.span, span):
                nearest = np.searchsorted(store.ptrs, ptrs).clip(max=store.ptrs.size - 1)
                found = store.ptrs[nearest] == ptrs
                values[found] = store.value[nearest[found]]
        return values
