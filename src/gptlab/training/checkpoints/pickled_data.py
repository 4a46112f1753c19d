"""Interprets pickles of plain data without importing or calling anything, and limits their size when built."""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from gptlab.parsing import MAX_DEPTH

STORAGE = "persistent id"  # name of the PickledObject of a tensor's data, whose argument is torch's description of it
MAX_BITS = 128  # of an integer; the state of numpy's PCG64 has 128
_ATOMS = (str, int, float, type(None))


class PickledName(str):
    """Name of a class or function in a pickle."""

    __slots__ = ()


@dataclass(eq=False)
class PickledObject:
    """Object of a pickle: the name of its class or function, the arguments of the call, and its state."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


class PickledDict(dict[Any, Any]):
    """OrderedDict of a pickle."""

    state: Any = None


def interpret(
    content: bytes, named: Callable[[str], Any], has_state: Callable[[str], bool]
) -> tuple[Any, list[PickledObject]]:
    """Interprets a pickle of plain data and of objects with known names; imports and calls nothing.

    Args:
        content: The pickle.
        named: Returns the value for the full name of a class or function: a ``PickledName`` if it may be called.
        has_state: Whether an object with this name may have a state, which is set by the opcode BUILD.

    Returns:
        The data, with a ``PickledObject`` for each object, and all objects.

    Raises:
        ValueError, IndexError, KeyError, TypeError, AttributeError: The pickle is damaged, or has other opcodes or
            names than those that describe plain data and tensors.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stack below each MARK
    memo: dict[int, Any] = {}
    objects: list[PickledObject] = []

    def push_object(name: str, args: tuple[Any, ...]) -> None:
        objects.append(PickledObject(name, args))
        stack.append(objects[-1])

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINUNICODE" | "BINUNICODE":
                if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                    raise ValueError(f"it has an integer of more than {MAX_BITS} bits")
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[cast(int, argument)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[cast(int, argument)])
            case "MARK":
                marks.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                plain(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marks.pop()
                plain(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                plain(stack[-1], dict, PickledDict)[_key(key)] = value
            case "SETITEMS":
                items, stack = stack, marks.pop()
                plain(stack[-1], dict, PickledDict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL":
                stack.append(named(cast(str, argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = plain(stack.pop(), str), plain(stack.pop(), str)
                stack.append(named(f"{module}.{name}"))
            case "NEWOBJ" | "REDUCE":
                args, called = plain(stack.pop(), tuple), plain(stack.pop(), PickledName)
                if called == "collections.OrderedDict" and not args:
                    stack.append(PickledDict())
                else:
                    push_object(called, args)
            case "BINPERSID":
                push_object(STORAGE, plain(stack.pop(), tuple))
            case "BUILD":
                state, built = stack.pop(), plain(stack[-1], PickledObject, PickledDict)
                name = built.name if isinstance(built, PickledObject) else "collections.OrderedDict"
                if not has_state(name) or built.state is not None:
                    raise ValueError(f"{name} has an unexpected state")
                built.state = state
            case "STOP":
                return stack.pop(), objects
            case other:
                raise ValueError(f"it has the opcode {other}, which does not describe a tensor")
    raise ValueError("it has no end")


def check_size(values: Iterable[Any], limit: int) -> None:
    """Checks the memory that values need if no part of them is shared, so that each use of a part is a copy.

    Such a copy is made by ``copy.deepcopy`` of tuples, by the functions that a pickle calls, and by printing. Hashing
    takes as long.

    Args:
        values: Results of ``interpret``.
        limit: Maximum of the sum of all values, in bytes (approximate).

    Raises:
        ValueError: They are larger, contain themselves, or are nested too deeply.
    """
    known: dict[int, tuple[int, int] | None] = {}  # size and height by id; None while the parts are measured

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, str):
            return len(value), 0
        parts = _parts(value)
        if not parts:
            return 8, 0
        if id(value) in known:
            if (found := known[id(value)]) is None:
                raise ValueError("one of its values contains itself")
            return found
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        known[id(value)] = None
        measured = [measure(part, depth + 1) for part in parts]
        size, height = 8 + sum(size for size, _ in measured), 1 + max(height for _, height in measured)
        if size > limit or height > MAX_DEPTH:
            reason = f"is nested more than {MAX_DEPTH} deep" if height > MAX_DEPTH else "uses the same parts many times"
            raise ValueError(f"it {reason}, so a copy of it could be of any size")
        known[id(value)] = size, height
        return size, height

    if sum(measure(value, 0)[0] for value in values) > limit:
        raise ValueError("it uses the same parts many times, so a copy of it could be of any size")


def plain(value: Any, *kinds: type[Any]) -> Any:
    """Returns a value of one of the given types, not of a subclass; raises ValueError for others."""
    if type(value) not in kinds:
        raise ValueError(f"expected {kinds[0].__name__}, got {type(value).__name__}")
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, PickledObject):
        return [*value.args, value.state]
    if isinstance(value, PickledDict):
        return [*value, *value.values(), value.state]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, tuple | list) else []


def _key(key: Any) -> Any:
    """Returns a key of a dict; others, such as nested tuples, may take forever to hash."""
    is_plain = isinstance(key, (*_ATOMS, PickledObject))
    if not is_plain and not (isinstance(key, tuple) and all(isinstance(part, _ATOMS) for part in key)):
        raise ValueError(f"a key is of the type {type(key).__name__}")
    return key
