"""Whom the driver takes the caller for."""

import os
from pathlib import Path
from typing import Protocol


class Caller(Protocol):
    """The process that calls NVML."""

    def is_root(self) -> bool:
        """Say whether it may toggle MIG mode."""

    def may_read(self, node: Path) -> bool:
        """Say whether it may open a cap node."""


class ThisProcess:
    """The calling process as the kernel sees it."""

    def is_root(self) -> bool:  # noqa: D102 - see Caller
        return os.geteuid() == 0

    def may_read(self, node: Path) -> bool:  # noqa: D102 - see Caller
        return os.access(node, os.R_OK)
