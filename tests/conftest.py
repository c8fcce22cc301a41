"""Command-line options of the whole test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-gpu",
        action="store_true",
        help="run the read-only part of the NVML contract on this machine's real GPU as well",
    )
