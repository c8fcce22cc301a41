"""Who used how much: stretches of usage, added up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import grpc

from controlplane.metering import Kind, Stretch
from controlplane.tensor_peaks import slice_tflops
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import fleet_service_pb2 as wire
from puhui.v1 import job_pb2

__all__ = ["Interval", "added_up", "interval_of"]

_DEFAULT_S = 86400.0
_MOST_POINTS = 500
_MOST_ROWS = 1000
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Interval:
    """A time that is told of, from `start` to before `end`, in seconds since the epoch."""

    start: float
    end: float


@dataclass(frozen=True)
class _Piece:
    """The part of a stretch that lies in an interval."""

    stretch: Stretch
    start: float
    end: float
    busy_share: float
    """Share of the whole stretch that was busy. When in it is not known, so that every part gets as much."""
    at_peer: bool

    @property
    def length_s(self) -> float:
        return self.end - self.start


def interval_of(request: wire.GetUsageRequest, now_s: float) -> Interval:
    """Returns the time that a request asks about: the last 24 h, if it does not say.

    Raises:
        Refusal: INVALID_ARGUMENT with USAGE_INVALID.
    """
    end = moment(request.end_time) if request.HasField("end_time") else now_s
    start = moment(request.start_time) if request.HasField("start_time") else end - _DEFAULT_S
    _require(start < end, "start_time", "must be before end_time")
    _require(request.point_count <= _MOST_POINTS, "point_count", f"is at most {_MOST_POINTS}")
    _require(request.group_by in wire.UsageGroup.values(), "group_by", "is TENANT, JOB or RUN")
    return Interval(start, end)


def added_up(
    stretches: Iterable[Stretch],
    interval: Interval,
    group: wire.UsageGroup.ValueType,
    point_count: int,
    now_s: float,
    at_peers: Collection[tuple[str, int]] = (),
) -> wire.GetUsageResponse:
    """Returns what was used in an interval.

    Busy seconds of a stretch that lies in the interval in part are counted in proportion, so that the usage of two
    intervals that touch is that of both together. Runs of one job may overlap; each is counted whole.

    Args:
        stretches: all that overlap the interval.
        interval: the time that is told of.
        group: what a row is about.
        point_count: number of equal times to tell of; 0 is none.
        now_s: stretches that last still count until then, in seconds since the epoch.
        at_peers: job and number of every attempt that was at a peer.
    """
    pieces = [piece for stretch in stretches if (piece := _within(stretch, interval, now_s, at_peers)) is not None]
    shares = [piece for piece in pieces if piece.stretch.kind is not Kind.RUN]
    by_tenant = _rows(shares, interval, _tenant_row)
    if group == wire.USAGE_GROUP_RUN:
        rows = _rows([piece for piece in pieces if piece.stretch.kind is Kind.RUN], interval, _run_row)
    elif group == wire.USAGE_GROUP_JOB:
        rows = _rows(shares, interval, _job_row)
    else:
        rows = by_tenant
    return wire.GetUsageResponse(
        tenants=[
            wire.TenantUsage(
                tenant=row.tenant,
                held_slice_seconds=row.held_slice_seconds,
                busy_slice_seconds=row.busy_slice_seconds,
                tflops_hours=row.tflops_hours,
                reclaimed_slice_seconds=row.reclaimed_slice_seconds,
            )
            for row in by_tenant
        ],
        rows=rows[:_MOST_ROWS],
        points=_points(shares, interval, point_count),
        start_time=timestamp(interval.start),
        end_time=timestamp(interval.end),
    )


def _within(stretch: Stretch, interval: Interval, now_s: float, at_peers: Collection[tuple[str, int]]) -> _Piece | None:
    last = stretch.end if stretch.end is not None else max(now_s, stretch.start)
    start, end = max(stretch.start, interval.start), min(last, interval.end)
    if end <= start:
        return None
    length_s = last - stretch.start
    share = min(stretch.busy_s, length_s) / length_s if length_s > 0 else 0.0
    return _Piece(stretch, start, end, share, (stretch.job_id, stretch.attempt) in at_peers)


def _tenant_row(stretch: Stretch) -> wire.UsageRow:
    return wire.UsageRow(tenant=stretch.tenant)


def _job_row(stretch: Stretch) -> wire.UsageRow:
    return wire.UsageRow(tenant=stretch.tenant, job_id=stretch.job_id, job_name=stretch.job_name)


def _run_row(stretch: Stretch) -> wire.UsageRow:
    row = _job_row(stretch)
    row.run_id = stretch.run_id
    return row


def _rows(
    pieces: Sequence[_Piece], interval: Interval, begin: Callable[[Stretch], wire.UsageRow]
) -> list[wire.UsageRow]:
    rows: dict[tuple[str, str, str], wire.UsageRow] = {}
    for piece in pieces:
        fresh = begin(piece.stretch)
        _add(rows.setdefault((fresh.tenant, fresh.job_id, fresh.run_id), fresh), piece, interval)
    return [row for _, row in sorted(rows.items(), key=lambda item: (-item[1].held_slice_seconds, item[0]))]


def _add(row: wire.UsageRow, piece: _Piece, interval: Interval) -> None:
    stretch, slices = piece.stretch, piece.stretch.compute_slices
    row.emulated |= stretch.emulated
    if stretch.kind is Kind.RECLAIMED:
        row.reclaimed_slice_seconds += piece.length_s * slices
        return
    busy_s = piece.length_s * piece.busy_share
    row.held_seconds += piece.length_s
    row.busy_seconds += busy_s
    row.held_slice_seconds += piece.length_s * slices
    row.busy_slice_seconds += busy_s * slices
    row.peer_slice_seconds += piece.length_s * slices * piece.at_peer
    row.tflops_hours += slice_tflops(stretch.gpu_model, slices, stretch.gpu_slices) * piece.length_s / _HOUR_S
    taken = stretch.end is not None and stretch.reclaim_mode != job_pb2.RECLAIM_MODE_UNSPECIFIED
    row.reclaims += taken and interval.start < (stretch.end or 0.0) <= interval.end


def _points(pieces: Sequence[_Piece], interval: Interval, count: int) -> list[wire.UsagePoint]:
    if not count:
        return []
    step_s = (interval.end - interval.start) / count
    edges = [interval.start + number * step_s for number in range(count)] + [interval.end]
    points = [wire.UsagePoint(start_time=timestamp(edge)) for edge in edges[:-1]]
    for piece in pieces:
        # One more to the left: an edge is rounded.
        number = max(min(int((piece.start - interval.start) / step_s), count - 1) - 1, 0)
        while number < count and edges[number] < piece.end:
            covered_s = min(edges[number + 1], piece.end) - max(edges[number], piece.start)
            if covered_s > 0:
                mean = covered_s / step_s * piece.stretch.compute_slices
                if piece.stretch.kind is Kind.RECLAIMED:
                    points[number].reclaimed_slices += mean
                else:
                    points[number].held_slices += mean
                    points[number].busy_slices += mean * piece.busy_share
            number += 1
    return points


def _require(holds: bool, field: str, what: str) -> None:
    if not holds:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "USAGE_INVALID", f"{field} {what}", field=field)
