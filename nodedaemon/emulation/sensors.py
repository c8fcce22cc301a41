"""Power and temperature of a card that does not exist.

There is nothing to measure, so both follow from one fact that is real: the share of the card's
compute slices that a live process holds. They are there so that a dashboard has what it reads on
hardware; nothing may decide by them.
"""

_IDLE_POWER_SHARE = 0.1
_IDLE_CELSIUS = 30
_BUSY_CELSIUS = 70


def power_milliwatts(limit_watts: int, busy_share: float) -> int:
    """Return the draw, mW: from a tenth of the limit when idle to the limit when wholly busy."""
    share = _IDLE_POWER_SHARE + (1 - _IDLE_POWER_SHARE) * busy_share
    return round(1000 * limit_watts * share)


def temperature_celsius(busy_share: float) -> int:
    """Return the temperature, °C: from 30 when idle to 70 when wholly busy."""
    return round(_IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * busy_share)
