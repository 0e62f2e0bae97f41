"""Copies of interpreted kernels with a bug put in, to show that a test would see it."""

import inspect
import itertools
import linecache
import os
import textwrap
import types
from typing import Any

_serial = itertools.count(1)


def mutant(kernel: Any, old: str, new: str, *, of: Any = None, count: int = 1) -> Any:
    """A copy of ``kernel`` with ``new`` in place of ``old`` in its source, or in that of a function it calls.

    ``mutant(exchange_kernel, 'sem="release"', 'sem="relaxed"', of=grid.signal)`` is ``exchange_kernel`` with another
    ``signal``; the originals stay as they are. Mutants can be mutated again. A function that reaches the kernel as an
    argument, and not by its name, is to be mutated by itself and passed.

    Args:
        kernel: a ``@triton.jit`` function at the top level of its module, in a process that interprets kernels.
        old: text of the source, decorators included; ``count`` says how often it must occur.
        new: what replaces it.
        of: the function to mutate, called by ``kernel`` by name or as an attribute of a module, at any depth of calls;
            ``kernel`` itself by default.

    Raises:
        TypeError: if ``kernel`` or ``of`` is not an interpreted function.
        ValueError: if ``old`` occurs more or less often than ``count``, or ``kernel`` does not call ``of``.
    """
    target = kernel if of is None else of
    for function in (kernel, target):
        if not _is_interpreted(function):
            raise TypeError(f"need a @triton.jit function with TRITON_INTERPRET=1, got {type(function).__name__}")
    source = textwrap.dedent(inspect.getsource(target.fn))
    if source.count(old) != count:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {target.__name__}, expected {count}")
    copies = {target: _compiled(target.fn, source.replace(old, new))}
    copy = _with_callees(kernel, copies)
    if copy is kernel:
        raise ValueError(f"{kernel.__name__} does not call {target.__name__} by name")
    return copy


def _is_interpreted(value: Any) -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(value, InterpretedFunction)


def _compiled(function: types.FunctionType, source: str) -> Any:
    """The jit function that ``source`` defines, with the globals and line numbers of ``function``."""
    file, line = function.__code__.co_filename, function.__code__.co_firstlineno
    source = "\n" * (line - 1) + source
    name = f"<mutant {next(_serial)} of {os.path.basename(file)}>"
    # Where the interpreter's rewriter and tracebacks look for source; without a time stamp it is never thrown out.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(function.__globals__)
    exec(compile(source, name, "exec"), namespace)
    return namespace[function.__name__]


def _with_callees(function: Any, copies: dict[Any, Any]) -> Any:
    """``function``, or its copy if anything it calls, at any depth, has one in ``copies``, which grows by it."""
    if function in copies:
        return copies[function]
    copies[function] = function  # ends recursion; a recursive function calls its original
    scope, used = function.fn.__globals__, function.fn.__code__.co_names
    changed = {}
    for name in used:
        value = scope.get(name)
        if _is_interpreted(value):
            changed[name] = _with_callees(value, copies)
        elif inspect.ismodule(value) and not value.__name__.startswith("triton"):
            callees = {n: vars(value)[n] for n in used if _is_interpreted(vars(value).get(n))}
            renewed = {n: _with_callees(callee, copies) for n, callee in callees.items()}
            if renewed != callees:
                changed[name] = types.SimpleNamespace(**{**vars(value), **renewed})
    changed = {name: value for name, value in changed.items() if value is not scope[name]}
    if changed:
        fn = function.fn
        renewed = types.FunctionType(fn.__code__, {**scope, **changed}, fn.__name__, fn.__defaults__)
        renewed.__annotations__ = fn.__annotations__
        copies[function] = type(function)(renewed, **function.kwargs)
    return copies[function]
