"""Command-line options of the whole test suite."""

import os

import pytest

# Daemons of tests may run as root with a Python that no other user can reach; what they run is the tests' own code.
os.environ.setdefault("PUHUI_NODE_ALLOW_ROOT_PROCESSES", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-gpu",
        action="store_true",
        help="run the read-only part of the NVML contract on this machine's real GPU as well",
    )
