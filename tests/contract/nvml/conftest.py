"""The drivers that the contract runs on: the emulation always, a real GPU with --real-gpu."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver, installed, parse_cards

CARDS = "H100-80GB-SXM5,A100-40GB,A30-24GB,H200-141GB"
StartDriver = Callable[..., EmulatedDriver]

_drivers_seen: set[str] = set()


@contextmanager
def started(directory: Path, cards: str, **options: Any) -> Iterator[EmulatedDriver]:
    """An emulated driver under pynvml, between nvmlInit and nvmlShutdown."""
    with installed(EmulatedDriver(directory, parse_cards(cards), **options)) as driver:
        pynvml.nvmlInit()
        _drivers_seen.add(f"emulated ({pynvml.nvmlSystemGetDriverVersion()})")
        try:
            yield driver
        finally:
            pynvml.nvmlShutdown()


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[StartDriver]:
    """Start an emulated driver with the given cards and options, in one directory per test."""
    with ExitStack() as stack:

        def start(cards: str = CARDS, **options: Any) -> EmulatedDriver:
            return stack.enter_context(started(tmp_path, cards, **options))

        yield start


@pytest.fixture
def driver(start_driver: StartDriver) -> EmulatedDriver:
    """An emulated driver with MIG mode on."""
    return start_driver()


@pytest.fixture
def h100(driver: EmulatedDriver) -> Any:
    """The handle of an empty emulated H100 with MIG mode on."""
    return pynvml.nvmlDeviceGetHandleByIndex(0)


@pytest.fixture
def a100(driver: EmulatedDriver) -> Any:
    """The handle of an empty emulated A100-40GB with MIG mode on."""
    return pynvml.nvmlDeviceGetHandleByIndex(1)


@contextmanager
def _real_driver() -> Iterator[None]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pynvml.nvmlLib = None
        pytest.skip(f"no real GPU: {error}")
    _drivers_seen.add(f"real ({pynvml.nvmlSystemGetDriverVersion()})")
    try:
        yield
    finally:
        pynvml.nvmlShutdown()
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture(params=["emulated", "real"])
def any_driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each driver in turn, between nvmlInit and nvmlShutdown; for tests that only read."""
    running = _real_driver() if request.param == "real" else started(tmp_path, CARDS)
    with running:
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --real-gpu the real half is not there at all, rather than skipped."""
    if config.getoption("--real-gpu"):
        return
    real = [item for item in items if _wants_real(item)]
    items[:] = [item for item in items if not _wants_real(item)]
    config.hook.pytest_deselected(items=real)


def _wants_real(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("any_driver") == "real"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _drivers_seen:
        seen = ", ".join(sorted(_drivers_seen))
        terminalreporter.write_line(f"NVML contract ran on: {seen}")
