"""Power and temperature of a card that does not exist.

There is nothing to measure, so both follow from one fact that is real: the share of the card's
compute slices that a live process holds. They are there so that a dashboard has what it reads on
hardware; nothing may decide by them.
"""

from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.state import Gpu

_IDLE_POWER_SHARE = 0.1
_IDLE_CELSIUS = 30
_BUSY_CELSIUS = 70


def busy_share(driver: EmulatedDriver, gpu: Gpu) -> float:
    """Return the share of the card's compute slices that a live process holds, 0 to 1."""
    nodes = {
        driver.caps.compute_instance(gpu, instance, compute): compute.size for instance, compute in gpu.mig_devices()
    }
    if not nodes:
        return 0.0
    held = driver.processes(nodes)
    return sum(size for node, size in nodes.items() if held[node]) / gpu.card.compute_slices


def power_milliwatts(limit_watts: int, busy_share: float) -> int:
    """Return the draw, mW: from a tenth of the limit when idle to the limit when wholly busy."""
    share = _IDLE_POWER_SHARE + (1 - _IDLE_POWER_SHARE) * busy_share
    return round(1000 * limit_watts * share)


def temperature_celsius(busy_share: float) -> int:
    """Return the temperature, °C: from 30 when idle to 70 when wholly busy."""
    return round(_IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * busy_share)
