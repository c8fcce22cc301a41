"""`puhui usage`: who used how much, and what reclaim gave back."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from puhui.cli.chart import strip
from puhui.cli.connection import connect
from puhui.cli.find_job import find_job
from puhui.cli.job_options import json_flag, server_option
from puhui.cli.terminal import Mistake, table, terminal
from puhui.cli.words import count, span
from puhui.rpc.moment import moment, now
from puhui.rpc.quantities import parse_duration
from puhui.v1.fleet_service_pb2 import (
    USAGE_GROUP_JOB,
    USAGE_GROUP_RUN,
    USAGE_GROUP_TENANT,
    GetUsageResponse,
    UsageRow,
)

__all__ = ["By", "add_commands", "remarks", "usage_table"]

_POINTS = 40
_HOUR_S = 3600.0


class By(StrEnum):
    """What a line is about."""

    TENANT = "tenant"
    JOB = "job"
    RUN = "run"


_GROUPS = {By.TENANT: USAGE_GROUP_TENANT, By.JOB: USAGE_GROUP_JOB, By.RUN: USAGE_GROUP_RUN}


def add_commands(app: typer.Typer) -> None:
    """Adds `usage`."""
    app.command("usage")(_usage)


def _usage(
    by: Annotated[By, typer.Option(help="What a line is about.")] = By.TENANT,
    since: Annotated[str, typer.Option(metavar="TIME", help="How far back, such as 90m or 7d.")] = "24h",
    tenant: Annotated[str, typer.Option(show_default=False, help="Only this tenant.")] = "",
    job: Annotated[str, typer.Option(show_default=False, metavar="JOB", help="Only this job.")] = "",
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Show who used how much, and what reclaim gave back."""
    try:
        length_s = parse_duration(since)
    except ValueError as error:
        raise Mistake("USAGE", f"--since: {error}") from error
    if length_s <= 0:
        raise Mistake("USAGE", "--since: name a time that is longer than nothing, such as 24h")
    end = now()
    with connect(server) as centre:
        job = find_job(centre, job).id if job else ""
        usage = centre.usage(end - length_s, end, group_by=_GROUPS[by], tenant=tenant, job_id=job, point_count=_POINTS)
    if terminal().as_json:
        terminal().json(usage)
        return
    if not usage.rows:
        what = "no run used a share" if by is By.RUN else "nobody held a share"
        terminal().note(f"{what} in the last {span(length_s)}")
        return
    terminal().show(usage_table(usage, by))
    terminal().show("")
    terminal().show(_chart(usage))
    for remark in remarks(usage):
        terminal().note(remark)


def usage_table(usage: GetUsageResponse, by: By) -> Table:
    """Returns a line for each row; what was held at peers has a column where there is any."""
    named = {By.TENANT: ["TENANT"], By.JOB: ["JOB", "NAME"], By.RUN: ["RUN", "JOB"]}[by]
    figures = ["HELD", "USED", "SHARE-H", "TFLOPS·H", "SAVED-H", "TAKEN"]
    peers = any(row.peer_slice_seconds for row in usage.rows)
    if peers:
        figures.insert(figures.index("SHARE-H") + 1, "PEERS-H")
    shown = table(*named, *figures, right=tuple(figures))
    for column in (shown.columns[0], *shown.columns[len(named) :]):
        column.no_wrap = True
    for row in usage.rows:
        names = {"TENANT": row.tenant, "JOB": row.job_id, "NAME": row.job_name or "-", "RUN": row.run_id}
        cells = [names[name] for name in named]
        cells[-1] += " (emulated)" if row.emulated else ""
        shown.add_row(
            *cells,
            span(row.held_seconds),
            f"{100 * row.busy_seconds / row.held_seconds:.0f} %" if row.held_seconds else "-",
            _hours(row.held_slice_seconds),
            *([_hours(row.peer_slice_seconds)] if peers else ()),
            "?" if _unknown(row) else f"{row.tflops_hours:.1f}",
            "-" if by is By.RUN else _hours(row.reclaimed_slice_seconds),
            "-" if by is By.RUN else str(row.reclaims),
        )
    return shown


def _chart(usage: GetUsageResponse) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    lines = [
        ("held", [point.held_slices for point in usage.points], "cyan"),
        ("used", [point.busy_slices for point in usage.points], "green"),
        ("given back", [point.reclaimed_slices for point in usage.points], "yellow"),
    ]
    most = max((value for _, values, _ in lines for value in values), default=0.0)
    for name, values, colour in lines:
        peak = max(values, default=0.0)
        grid.add_row(name, Text(strip(values, most), style=colour), f"peak {peak:.2g} slices")
    start, end = (datetime.fromtimestamp(moment(stamp)).astimezone() for stamp in (usage.start_time, usage.end_time))
    shape = "%H:%M" if (end - start).total_seconds() <= 24 * _HOUR_S else "%d %b"
    left, right = start.strftime(shape), end.strftime(shape)
    grid.add_row("", Text(left + right.rjust(max(len(usage.points) - len(left), len(right) + 1)), style="dim"), "")
    return grid


def remarks(usage: GetUsageResponse) -> list[str]:
    """Returns what else there is to say of it, a sentence each."""
    said = []
    saved = sum(tenant.reclaimed_slice_seconds for tenant in usage.tenants)
    held = sum(tenant.held_slice_seconds for tenant in usage.tenants)
    if saved:
        percent = 100 * saved / (saved + held)
        said.append(
            f"reclaim gave back {_hours(saved)} share-hours (one compute slice for an hour each): "
            f"{percent:.0f} % of what would have been held without it"
        )
    away = sum(row.peer_slice_seconds for row in usage.rows)
    if away:
        percent = 100 * away / sum(row.held_slice_seconds for row in usage.rows)
        said.append(f"{_hours(away)} of these share-hours were held at peers: {percent:.0f} %")
    unknown = sum(_unknown(row) for row in usage.rows)
    if unknown:
        said.append(f"TFLOPS·h of {count(unknown, 'line')} are not known: no data sheet of the GPU is at hand")
    if any(row.emulated for row in usage.rows):
        said.append("figures of emulated cards are of time on the emulation; no such compute was there")
    return said


def _unknown(row: UsageRow) -> bool:
    return row.held_slice_seconds > 0 and row.tflops_hours == 0


def _hours(slice_seconds: float) -> str:
    hours = slice_seconds / _HOUR_S
    return f"{hours:.3f}" if 0 < hours < 0.1 else f"{hours:.1f}"
