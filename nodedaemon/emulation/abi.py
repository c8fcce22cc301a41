"""The C side: functions with nvml.h's argument types, so that a wrong call raises.

ctypes converts by itself what a C compiler would refuse: it takes a structure where a pointer to it
is declared. The argument rules here do not, because the real library has no such rules at all: it
would read the structure's first bytes as an address.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.refusal import Code, Refusal

P = ParamSpec("P")
Body = Callable[Concatenate[EmulatedDriver, P], None]

_log = logging.getLogger(__name__)


class PointerTo:
    """An argument declared as ``T *``.

    Accepts ``byref(T)``, ``pointer(T)``, an array of T, ``byref`` of such an array, and None.

    Args:
        target: The ctypes type T.
        nullable: Whether NULL is a legal value, rather than INVALID_ARGUMENT.
    """

    def __init__(self, target: Any, *, nullable: bool = False) -> None:
        self.target = target
        self.native = ctypes.POINTER(target)
        self.nullable = nullable

    def from_param(self, value: Any) -> Any:
        """Convert as ctypes does, except a T passed by value.

        Raises:
            TypeError: The value is no pointer to T; ctypes turns it into an ArgumentError.
        """
        if isinstance(value, self.target):
            raise TypeError(f"{self.target.__name__} passed by value; pass byref() of it")
        referent = getattr(value, "_obj", value if isinstance(value, ctypes.Array) else None)
        declared = referent._type_ if isinstance(referent, ctypes.Array) else type(referent)
        if isinstance(referent, ctypes.Array) and declared is self.target:
            return value
        if _same_layout(declared, self.target):
            return ctypes.cast(value, self.native)
        return self.native.from_param(value)


def _same_layout(one: Any, other: Any) -> bool:
    """Say whether two classes describe one C structure: some programs declare nvml.h's again."""
    if not (issubclass(one, ctypes.Structure) and issubclass(other, ctypes.Structure)):
        return False
    mine, theirs = ([field[1] for field in kind._fields_] for kind in (one, other))
    return ctypes.sizeof(one) == ctypes.sizeof(other) and mine == theirs


UINT = ctypes.c_uint
UINT_OUT = PointerTo(ctypes.c_uint)
TEXT_OUT = PointerTo(ctypes.c_char)


@dataclass(frozen=True, slots=True)
class Call:
    """One function of nvml.h.

    Attributes:
        name: The exported symbol.
        arguments: ctypes types and `PointerTo` rules, as in nvml.h.
        body: What it does; raises Refusal for any answer but success.
        needs_init: Whether it answers UNINITIALIZED before nvmlInit.
    """

    name: str
    arguments: tuple[Any, ...]
    body: Callable[..., None]
    needs_init: bool


class CallTable:
    """The functions that one module of the emulation implements."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def export(
        self, *names: str, arguments: tuple[Any, ...] = (), needs_init: bool = True
    ) -> Callable[[Body[P]], Body[P]]:
        """Declare the decorated body as the function of these names."""

        def declare(body: Body[P]) -> Body[P]:
            self.calls.extend(Call(name, arguments, body, needs_init) for name in names)
            return body

        return declare


def public_name(symbol: str) -> str:
    """Return the name that nvml.h's macros give an exported symbol: the one without its version."""
    return symbol.removesuffix("_v2").removesuffix("_v3")


def c_function(call: Call, driver: EmulatedDriver) -> Any:
    """Return a C function pointer that runs a call on a driver."""
    name = public_name(call.name)

    def run(*arguments: Any) -> int:
        try:
            with driver.call(name, arguments[0] if arguments else None, needs_init=call.needs_init):
                for rule, argument in zip(call.arguments, arguments, strict=True):
                    _check_null(rule, argument)
                call.body(driver, *arguments)
        except Refusal as refusal:
            return refusal.code
        except Exception:  # noqa: BLE001 - ctypes would print it and report success to the caller
            _log.exception("emulated %s failed", call.name)
            return int(Code.UNKNOWN)
        return int(Code.SUCCESS)

    native = [rule.native if isinstance(rule, PointerTo) else rule for rule in call.arguments]
    function = ctypes.CFUNCTYPE(ctypes.c_int, *native)(run)
    function.argtypes = list(call.arguments)
    return function


def _check_null(rule: Any, argument: Any) -> None:
    if isinstance(rule, PointerTo):
        missing = not rule.nullable and not argument
    elif isinstance(rule, type) and issubclass(rule, ctypes._Pointer):
        missing = not argument
    else:
        missing = argument is None
    if missing:
        raise Refusal(Code.INVALID_ARGUMENT)


def write_text(buffer: Any, capacity: int, text: str) -> None:
    """Write a NUL-terminated string into a ``char *`` argument.

    Raises:
        Refusal: INSUFFICIENT_SIZE, when it does not fit.
    """
    data = text.encode() + b"\0"
    if len(data) > capacity:
        raise Refusal(Code.INSUFFICIENT_SIZE)
    ctypes.memmove(buffer, data, len(data))


def write_array(items: Iterable[Any], array: Any, count: Any) -> None:
    """Write a list into an array argument and its in-out count.

    Args:
        items: What to write.
        array: First element, or NULL to learn the count alone.
        count: Capacity in, number out.

    Raises:
        Refusal: INSUFFICIENT_SIZE, when the array is there but too short; the number is out.
    """
    values = list(items)
    capacity, count[0] = count[0], len(values)
    if not array:
        return
    if capacity < len(values):
        raise Refusal(Code.INSUFFICIENT_SIZE)
    for position, value in enumerate(values):
        array[position] = value


def set_fields(structure: Any, **fields: Any) -> None:
    """Set fields of a structure argument."""
    for name, value in fields.items():
        setattr(structure.contents, name, value)
