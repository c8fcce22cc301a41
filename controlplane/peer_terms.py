"""What two centres have agreed on: hours, tenants, labels. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, tzinfo

from puhui.v1 import job_pb2, peer_service_pb2

__all__ = [
    "DEFAULT_BYTES_A_DAY",
    "DEFAULT_CALLS_A_SECOND",
    "DEFAULT_MOST",
    "DEFAULT_RESULT_BYTES",
    "TermsError",
    "is_open",
    "labels_allow",
    "parse_hours",
    "require_sound_terms",
    "tenant_in",
    "tenant_out",
]

DEFAULT_MOST = 100
"""Attempts of one centre at the other at once, where the terms do not say."""
DEFAULT_CALLS_A_SECOND = 100
DEFAULT_RESULT_BYTES = 64 * 2**30
DEFAULT_BYTES_A_DAY = 100 * 2**30

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_PART = re.compile(r"(?:([a-z]{3})(?:-([a-z]{3}))?\s+)?(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})")
_TENANT = re.compile(r"[a-z0-9._-]{1,63}")
_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,63}")
_DAY_MIN = 24 * 60
_MOST_NAME = 63

Hours = tuple[tuple[int, int], ...]
"""Stretches of minutes of the week, from Monday 00:00; the end is not in it."""


class TermsError(ValueError):
    """Terms that nobody can keep; the text is a sentence."""


def parse_hours(text: str) -> Hours:
    """Returns the stretches of a week that a text names, such as "mon-fri 20:00-08:00, sat-sun 00:00-24:00".

    Without days, every day is meant. A stretch whose end is not after its beginning goes on into the next day.

    Raises:
        TermsError: it cannot be read so.
    """
    found: list[tuple[int, int]] = []
    for part in (one.strip() for one in text.lower().split(",")):
        match = _PART.fullmatch(part)
        if match is None:
            raise TermsError(f'hours {part!r}: write them as "mon-fri 20:00-08:00, sat 00:00-24:00"')
        begin, end = _minutes(part, match[3], match[4]), _minutes(part, match[5], match[6])
        for day in _days(part, match[1], match[2]):
            start = day * _DAY_MIN + begin
            stop = day * _DAY_MIN + (end if end > begin else end + _DAY_MIN)
            found.append((start, stop))
    return tuple(found)


def _minutes(part: str, hours: str, minutes: str) -> int:
    total = int(hours) * 60 + int(minutes)
    if int(minutes) >= 60 or total > _DAY_MIN:
        raise TermsError(f"hours {part!r}: times are from 00:00 to 24:00")
    return total


def _days(part: str, first: str | None, last: str | None) -> list[int]:
    for name in (first, last):
        if name is not None and name not in _DAYS:
            raise TermsError(f"hours {part!r}: days are {', '.join(_DAYS)}")
    if first is None:
        return list(range(7))
    begin, end = _DAYS.index(first), _DAYS.index(last or first)
    return [day % 7 for day in range(begin, (end if end >= begin else end + 7) + 1)]


def is_open(hours: str, at: float, zone: tzinfo | None = None) -> bool:
    """Returns whether a moment is within hours; "" is always.

    Args:
        hours: as `parse_hours` reads them.
        at: in seconds since the epoch.
        zone: whose hours they are; this machine's if not given.

    Raises:
        TermsError: the hours cannot be read.
    """
    if not hours.strip():
        return True
    local = datetime.fromtimestamp(at).astimezone() if zone is None else datetime.fromtimestamp(at, zone)
    minute = local.weekday() * _DAY_MIN + local.hour * 60 + local.minute
    week = 7 * _DAY_MIN
    return any(start <= moment < stop for start, stop in parse_hours(hours) for moment in (minute, minute + week))


def tenant_out(terms: peer_service_pb2.PeerTerms, tenant: str) -> str | None:
    """Returns the name by which a peer knows a tenant; None when the tenant's jobs may not be sent there."""
    if terms.tenants and tenant not in terms.tenants:
        return None
    return terms.tenants_out.get(tenant, tenant)


def tenant_in(peer: str, terms: peer_service_pb2.PeerTerms, tenant: str) -> str:
    """Returns our tenant for a peer's: the one that the terms name, else one of that peer's own.

    Raises:
        TermsError: it is no name of a tenant.
    """
    if not _TENANT.fullmatch(tenant):
        raise TermsError("a tenant is named by lower-case letters, digits, '.', '_' and '-', at most 63 of them")
    if tenant in terms.tenants_in:
        return terms.tenants_in[tenant]
    name = f"{peer}.{tenant}"
    if len(name) > _MOST_NAME:
        raise TermsError(f"tenant {tenant}: its name is too long beside that of its centre")
    return name


def labels_allow(labels: Mapping[str, str], policy: job_pb2.PeerPolicy) -> bool:
    """Returns whether a job may run where these labels are."""
    required = all(labels.get(key) == value for key, value in policy.required_labels.items())
    return required and not any(labels.get(key) == value for key, value in policy.forbidden_labels.items())


def require_sound_terms(terms: peer_service_pb2.PeerTerms) -> None:
    """Refuses terms that nobody can keep.

    Raises:
        TermsError: with the first that is wrong.
    """
    if terms.hours.strip():
        parse_hours(terms.hours)
    named = [*terms.tenants, *terms.tenants_out, *terms.tenants_out.values(), *terms.tenants_in.values()]
    for name in (*named, *terms.tenants_in):
        if not _TENANT.fullmatch(name):
            raise TermsError(f"{name[:80]!r} is no name of a tenant")
    for key, value in terms.labels.items():
        if not _LABEL.fullmatch(key) or len(value) > 256:
            raise TermsError(f"{key[:80]!r} is no label")
    for field, number in (("weight", terms.weight), ("distance", terms.distance), ("cost", terms.cost)):
        # NaN is in no range.
        if not 0 <= number <= 1e9:
            raise TermsError(f"{field} is from 0 to 1e9")
    if abs(terms.highest_priority) > 100:
        raise TermsError("highest_priority is from -100 to 100")
