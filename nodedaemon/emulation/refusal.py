"""What an emulated NVML call answers when it does not do what was asked."""

from enum import IntEnum


class Code(IntEnum):
    """The return codes of nvml.h (``nvmlReturn_t``) that the emulation uses."""

    SUCCESS = 0
    UNINITIALIZED = 1
    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    INSUFFICIENT_SIZE = 7
    TIMEOUT = 10
    RESET_REQUIRED = 16
    IN_USE = 19
    NO_DATA = 21
    INSUFFICIENT_RESOURCES = 23
    ARGUMENT_VERSION_MISMATCH = 25
    UNKNOWN = 999


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault of the emulation
    """Ends a call with a return code other than success.

    Attributes:
        code: The ``nvmlReturn_t`` that the caller gets.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = int(code)
