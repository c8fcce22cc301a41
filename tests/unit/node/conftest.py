"""What every test of the node daemon leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """The command sends the logs of the whole process to a stream that ends with it."""
    yield
    structlog.reset_defaults()
