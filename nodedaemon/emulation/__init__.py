"""An emulated NVIDIA driver with MIG cards, under unmodified pynvml.

No development machine has a MIG GPU. `install` puts an implementation of the NVML C functions
under pynvml, so that the code which drives real cards runs here unchanged, against the geometry
recorded on real cards. Nothing it does is taken for real: the driver version says "emulated".

    driver = install(state_dir, parse_cards("H100-80GB-SXM5:4"))
    pynvml.nvmlInit()

State lives in ``state_dir``: it is shared by every process that installs the same directory,
survives a kill -9 of any of them, and is wiped by `EmulatedDriver.reboot`. A slice's cap nodes are
files in ``EmulatedDriver.caps.directory``; whoever holds one open is a process running there, and
its CPU share is the slice's utilization.

What goes wrong, how slow calls are, and whether UUIDs come back, `Operator` sets for all processes
of the node at once; `EmulatedDriver.faults` is this process's alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nodedaemon.emulation.caller import Caller
from nodedaemon.emulation.cards import CardSpec, UnknownCardError, parse_cards
from nodedaemon.emulation.driver import CardsChangedError, EmulatedDriver
from nodedaemon.emulation.faults import Fault, FaultPlan, Latency, When
from nodedaemon.emulation.holders import Holders
from nodedaemon.emulation.library import RealDriverLoadedError, functions, put_under_pynvml
from nodedaemon.emulation.operator import CardBusyError, NoEmulationError, Operator, UnknownSliceError
from nodedaemon.emulation.state import UuidPolicy
from nodedaemon.emulation.store import DamagedStateError

__all__ = [
    "Caller",
    "CardBusyError",
    "CardSpec",
    "CardsChangedError",
    "DamagedStateError",
    "EmulatedDriver",
    "Fault",
    "FaultPlan",
    "Holders",
    "Latency",
    "NoEmulationError",
    "Operator",
    "RealDriverLoadedError",
    "UnknownCardError",
    "UnknownSliceError",
    "UuidPolicy",
    "When",
    "functions",
    "install",
    "installed",
    "parse_cards",
]


def install(
    state_dir: Path,
    cards: Sequence[CardSpec],
    *,
    mig_enabled: bool = True,
    uuid_policy: UuidPolicy | None = None,
    latency: Latency | None = None,
    caller: Caller | None = None,
    holders: Holders | None = None,
) -> EmulatedDriver:
    """Put an emulated driver under pynvml for the rest of this process.

    The arguments and errors are those of `EmulatedDriver`.

    Returns:
        The driver, whose handle on faults, cap nodes and reboot NVML itself does not offer.

    Raises:
        RealDriverLoadedError: pynvml already talks to a real driver in this process.
    """
    driver = EmulatedDriver(
        state_dir,
        cards,
        mig_enabled=mig_enabled,
        uuid_policy=uuid_policy,
        latency=latency,
        caller=caller,
        holders=holders,
    )
    put_under_pynvml(driver)
    return driver


@contextmanager
def installed(driver: EmulatedDriver) -> Iterator[EmulatedDriver]:
    """Put a driver under pynvml inside a with block, and what was there before back after it."""
    put_back = put_under_pynvml(driver)
    try:
        yield driver
    finally:
        put_back()
