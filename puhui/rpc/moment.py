"""Times and durations between protobuf and Python.

Inside Puhui a moment is a float of seconds since the Unix epoch, a duration a float of seconds.
"""

from __future__ import annotations

import time

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

__all__ = ["duration", "moment", "now", "seconds", "timestamp"]


def now() -> float:
    """Returns the wall-clock time, in seconds since the epoch."""
    return time.time()


def timestamp(moment_s: float) -> Timestamp:
    """Returns `moment_s` (seconds since the epoch) as a Timestamp."""
    nanos = round(moment_s * 1e9)
    return Timestamp(seconds=nanos // 10**9, nanos=nanos % 10**9)


def moment(stamp: Timestamp) -> float:
    """Returns `stamp` in seconds since the epoch."""
    return stamp.seconds + stamp.nanos / 1e9


def duration(length_s: float) -> Duration:
    """Returns `length_s` (seconds) as a Duration."""
    result = Duration()
    result.FromNanoseconds(round(length_s * 1e9))
    return result


def seconds(length: Duration) -> float:
    """Returns `length` in seconds."""
    return length.seconds + length.nanos / 1e9
